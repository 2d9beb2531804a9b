"""`nnlite predict`: segment images with a trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.data.cases import Case, find_cases
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import PICTURES, Format, case_of, stem, suffix_of
from nnunet_lite.data.problems import align, html_table, plural
from nnunet_lite.errors import UserError, describe, no_such_file
from nnunet_lite.evaluation.postprocessing import Rule, apply_rules
from nnunet_lite.evaluation.selection import choose_models
from nnunet_lite.files import read_json
from nnunet_lite.inference.cases import check_output, names_file, output_file
from nnunet_lite.inference.folder import Outputs, Postprocess, predict_cases
from nnunet_lite.inference.outputs import ExtraMaps, parse_label_names
from nnunet_lite.inference.predictor import Predictor, load
from nnunet_lite.inference.quality import QUALITY_TABLE, CaseQuality, worst_first
from nnunet_lite.inference.record import CaseResult, PredictionRecord, describe_predictor
from nnunet_lite.models.argument import as_model_folder, find_model
from nnunet_lite.models.folder import (
    QUALITY,
    Checkpoint,
    now_as_text,
    trained_folds,
    versions_in_use,
    weight_files,
    weights_fingerprint,
)
from nnunet_lite.models.lookup import first_common_fold, read_model
from nnunet_lite.networks.cpu import keep_freed_memory
from nnunet_lite.planning.schema import Plan
from nnunet_lite.system import expand_home
from nnunet_lite.workspace import select_dataset, workspace_folder

_SHOWN = 10  # label maps whose expected quality is printed
_LOOKS_BLACK = 64  # grey levels of 255 below this are hard to see
# --speed: changes of the settings; "fast" also uses one fold
_SPEEDS: dict[str, dict[str, Any]] = {
    "best": {},
    "balanced": {"inference.mirroring": False},
    "fast": {"inference.mirroring": False, "inference.step_size": 0.75},
}


@dataclass(frozen=True)
class Predictions:
    """The label maps of a prediction.

    Parameters
    ----------
    output : Path
        The folder of the label maps, or the file of one.
    files : tuple of Path
        The label maps that were written.
    failed : dict of str to str
        Id of each case that failed, and the reason.
    models, folds : tuple
        The models that predicted, and their folds.
    labels : Labels
        Of the label maps.
    postprocessing : dict of str to str
        Label or region, and the rule for its components.
    images : dict of str to Path
        Id of each case, and its first image.
    quality : dict of str to CaseQuality
        What is expected of each label map, by the name of its case; empty for a model that was not calibrated.
    """

    output: Path
    files: tuple[Path, ...]
    failed: dict[str, str]
    models: tuple[Path, ...]
    folds: tuple[str, ...]
    labels: Labels
    postprocessing: dict[str, str] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    quality: dict[str, CaseQuality] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """1 if some cases failed, 2 if all failed."""
        return (1 if self.files else 2) if self.failed else 0

    def to_text(self) -> str:
        return "\n".join([self._summary(), *self._quality_lines()])

    def _summary(self) -> str:
        return f"{plural(len(self.files), 'label map')} in {self.output}"

    def _quality_lines(self) -> list[str]:
        """Return a table of the label maps with the lowest expected Dice, and of those that are flagged."""
        if not self.quality:
            return []
        ranked = worst_first(self.quality)
        flagged = [name for name, one in ranked if one.flags]
        rows = [(name, *one.in_cells()) for name, one in ranked[:_SHOWN]]
        head = f"expected quality, worst first; {len(flagged)} of {len(ranked)} are flagged"
        left = [f"... all {len(ranked)} are in {self.output / QUALITY_TABLE}"] if len(ranked) > len(rows) else []
        return [f"{head}:", align([("case", "Dice", "90 % interval", "why"), *rows], left=4), *left]

    def __repr__(self) -> str:
        failed = f"; {plural(len(self.failed), 'case')} failed" if self.failed else ""
        return f"{self._summary()}, by {' + '.join(model.name for model in self.models)}{failed}"

    def _repr_html_(self) -> str:
        failed = [(case, f"failed: {reason}") for case, reason in self.failed.items()]
        written = [(stem(file), str(file)) for file in self.files]
        return html_table([("case", "label map"), *failed, *written], [repr(self)])


def predict(
    input: Annotated[
        str | Path | Sequence[str | Path],
        options.data("-i", "--input", help="Image, DICOM series, or folder of them; may be repeated."),
    ],
    output: Annotated[str | Path, options.data("-o", "--output", help="Folder for the label maps, or a file for one.")],
    *,
    model: Annotated[
        str | Path | Sequence[str | Path] | None,
        options.model(
            "-m",
            "--model",
            help="Model folder, nnU-Net's too, zip, or name; several vote.",
            show_default="as selected, or trained",
        ),
    ] = None,
    configuration: Annotated[
        str | Sequence[str] | None,
        options.model("-c", "--configuration", help="2d, 3d_fullres, ...; several vote together."),
    ] = None,
    fold: Annotated[
        int | str | Sequence[int | str] | None,
        options.model("-f", "--fold", help="Networks to average.", show_default="selected, or all"),
    ] = None,
    speed: Annotated[
        Literal["fast", "balanced", "best"] | None,
        options.setting(help="balanced: no mirrored copies; fast: one fold, fewer windows, too.", show_default="best"),
    ] = None,
    mirroring: Annotated[bool | None, options.setting(help="Average over mirrored copies: 4-8 times slower.")] = None,
    step_size: Annotated[float | None, options.setting(help="Distance of windows as a share of the patch.")] = None,
    precision: options.Precision = None,
    max_memory: Annotated[
        float | None,
        options.hardware(
            metavar="GB", help="Memory to use besides the image, on a GPU too.", show_default="80 % of what is free"
        ),
    ] = None,
    save_probabilities: Annotated[
        str | None,  # without a value: see nnunet_options.py
        options.output(metavar="[LABELS]", help="Write maps of probabilities too, of all labels or of these."),
    ] = None,
    save_uncertainty: Annotated[
        bool, options.output("--save-uncertainty", help="Write maps of entropy and of the folds' disagreement too.")
    ] = False,
    format: Annotated[
        Format | None,
        options.output(help="Write label maps so; the last two need DICOM series.", show_default="as the images"),
    ] = None,
    per_label: Annotated[
        bool, options.output("--per-label", help="Write a file for each label too: segmentations/CASE/LABEL.")
    ] = False,
    statistics: Annotated[
        bool, options.output("--statistics", help="Write volumes and mean intensities of labels too, as CSV and JSON.")
    ] = False,
    quality: Annotated[
        bool,
        options.output(help="Say how good each label map is expected to be, if `nnlite select` calibrated the model."),
    ] = True,
    num_parts: Annotated[
        int, options.data("-num_parts", "--num-parts", min=1, help="Share the images between this many calls.")
    ] = 1,
    part_id: Annotated[
        int | None, options.data("-part_id", "--part-id", min=0, help="Which of these calls it is, from 0.")
    ] = None,
    scheduler: options.Scheduler = None,
    device: options.Device = None,
    skip_existing: Annotated[
        bool, options.resuming("--continue", help="Keep label maps that exist, make what is missing.")
    ] = False,
    postprocess: Annotated[
        bool, options.setting("--postprocess/--no-postprocess", help="Apply what `nnlite select` found to help.")
    ] = True,
    accept_geometry: options.AcceptGeometry = False,
    settings: options.SettingOverrides = None,
    checkpoint: options.WhichCheckpoint = "final",
    trust_code: options.TrustCode = False,
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> Predictions:
    """Segment images with a trained model.

    Parameters
    ----------
    input : str, Path or sequence of them
        Images, DICOM series or folders of them, of any mix of formats.
    output : str or Path
        The folder for their label maps, or for a single image its file.
    model : str, Path or sequence of them
        A model folder, ours or nnU-Net's, its name in the workspace, or a zip. Several vote with the mean of their
        probabilities. By default what `select` chose for the dataset, otherwise the trained model.
    configuration : str or sequence of str, optional
        Predict with the trained models of these configurations; or with those in a folder or zip that `model` names.
    fold : int, str or sequence of them, optional
        Networks to average; default: the selected ones, or all.
    speed : {"fast", "balanced", "best"}, optional
        balanced: no mirrored copies; fast: one fold and fewer windows too; default: best.
    mirroring : bool, optional
        Average over mirrored copies.
    step_size : float, optional
        Distance of windows as a share of the patch.
    precision : {"auto", "fp32", "bf16", "fp16"}, optional
        Number format of the network.
    max_memory : float, optional
        GB besides the image; of the GPU too. Default: 80 % of what is free.
    save_probabilities : str, optional
        Write their maps too: "all", or names of labels with commas.
    save_uncertainty : bool
        Write maps of entropy and of the folds' disagreement too.
    format : {"nifti", "seg.nrrd", "dicom-seg", "rtstruct"}, optional
        Of the label maps; default: that of their images, or that of a file's name. seg.nrrd is a segmentation of 3D
        Slicer; dicom-seg and rtstruct are for DICOM series.
    per_label : bool
        Write a file for each label too.
    statistics : bool
        Write statistics.csv and statistics.json too: volumes and mean intensities of the labels.
    quality : bool
        Write quality.csv and quality.json too, if `select` calibrated the model: the Dice to expect of each label, and
        what is unusual about an image. It takes about a tenth of the time of small images.
    num_parts, part_id : int
        Predict only image part_id, part_id + num_parts, ... of the sorted images; other calls, which may write into the
        same folder at the same time, predict the others.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers do it.
    device : str, optional
        Such as "cpu" or "cuda:1"; default: a GPU if there is one.
    skip_existing : bool
        Keep label maps that exist already. Statistics and files of labels that are missing are made from them; cases
        whose maps are missing are predicted again.
    postprocess : bool
        Postprocess as `select` found to help.
    accept_geometry : bool
        Take files of a case by their voxels if origin or direction differ.
    settings : mapping, optional
        Changes of the `inference` settings, such as {"inference.mirroring": False}.
    checkpoint : {"final", "best"}
        Which of nnU-Net's checkpoints to read.
    trust_code : bool
        Run code that the model names, although it is not in the workspace.
    dataset : str, optional
        Planned dataset; default: the only one.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    Predictions
        The files that were written, and the reason for each case that failed.

    Raises
    ------
    UserError
        There is no such image or model, or an option is illegal.

    Examples
    --------
    nnlite predict -i scan.nii.gz -o label.nii.gz
    nnlite predict -i images -o labels -m model.zip --speed fast --continue
    """
    settings = options.overrides_of(
        settings, inference__mirroring=mirroring, inference__step_size=step_size, inference__precision=precision,
        inference__max_memory=max_memory,
    )  # fmt: skip
    settings = {**_SPEEDS[speed or "best"], **settings}
    out, root = expand_home(output), workspace_folder(workspace)
    sources = [expand_home(path) for path in options.list_of(input)]
    if not sources:
        raise UserError("no image is given to predict")
    if part_id not in range(num_parts) and (part_id, num_parts) != (None, 1):
        raise UserError(f"--num-parts {num_parts} needs a --part-id from 0 to {num_parts - 1}")

    configurations = options.names_of(configuration) or []
    pairs = product(options.list_of(model or None), configurations or [None])  # type: ignore[list-item]
    models = list(dict.fromkeys(find_model(path, root, dataset, name) for path, name in pairs))
    paths = None if models else select_dataset(workspace, dataset, needs_plan=False)
    folders, folds, rules = choose_models(paths, models, configurations, options.names_of(fold), postprocess)
    if speed == "fast" and fold is None:
        folds = folds[:1] if folds else first_common_fold(folders, checkpoint)
    if missing := next((source for source in sources if not source.exists()), None):  # loading may take long
        raise no_such_file(missing)
    is_file = names_file(out)  # others write into its folder too
    record = PredictionRecord((out.parent if is_file else out).absolute(), statistics, not is_file, quality)
    loader = partial(
        load, [folder.absolute() for folder in folders] if scheduler else folders, folds, device, settings,
        checkpoint=checkpoint, trust_code=trust_code, workspace=root.absolute(), judging=quality,
    )  # fmt: skip
    if scheduler is None:
        predictor = loader()
        if predictor.device.type == "cpu":
            keep_freed_memory()
        plan, used = predictor.plan, list(predictor.folds)
    else:
        with as_model_folder(folders[0], checkpoint) as folder:
            plan, used = read_model(folder)[0], folds or trained_folds(folder)

    cases = _find_images(sources, plan, folders[0])
    check_output(sources, cases, out, plan.labels, format)
    cases = sorted(cases, key=lambda case: case.id)[part_id::num_parts] if num_parts > 1 else cases
    if not is_file:
        record.refuse_other_images({output_file(case, out, format): case for case in cases})
    outputs = Outputs(
        maps=_extra_maps(save_probabilities, save_uncertainty, len(folders) * len(used) > 1, plan.labels),
        format=format, per_label=per_label, statistics=statistics, quality=quality, skip_existing=skip_existing,
        postprocess=_postprocessing(rules, plan.labels),
    )  # fmt: skip
    run = _describe_run(checkpoint, rules, plan.labels)
    if scheduler is None:
        how = f"{predictor} on {predictor.device}, {predictor.arithmetic.precision}"
        log.info(f"predicting {plural(len(cases), 'image')} with {how}")
        report = partial(record.add, run={**run, **describe_predictor(predictor)})
        predict_all = partial(predict_cases, predictor, cases, out, report=report)
    else:
        predict_all = partial(_predict_on, scheduler, loader, cases, out.absolute(), record=record, run=run)
    with record:
        files, failed = predict_all(outputs=outputs, accept_geometry=accept_geometry)
    for case, reason in failed.items():
        log.error(f"failed: {case}: {reason}")
    is_calibrated = scheduler is None and quality and predictor.quality is not None
    judged = _find_judged(files, record, is_calibrated)
    _warn_of_black_pictures(files, plan.labels)
    images, words = {case.id: case.images[0] for case in cases}, run["postprocessing"]
    return Predictions(out, tuple(files), failed, tuple(folders), tuple(used), plan.labels, words, images, judged)


def _describe_run(checkpoint: Checkpoint, rules: Mapping[str, Rule], labels: Labels) -> dict[str, Any]:
    """Return what predictions.json says of a run besides the model."""
    order = {"regions_class_order": list(labels.region_order)} if labels.region_order else {}
    return {
        "date": now_as_text(),
        "versions": versions_in_use(),
        "checkpoint": checkpoint,
        "postprocessing": {label: str(rule) for label, rule in rules.items()},
        "labels": labels.to_json(),
        **order,
    }


def _find_judged(files: Sequence[Path], record: PredictionRecord, is_calibrated: bool) -> dict[str, CaseQuality]:
    """Return the quality of label maps by their names, and log how many have none though others do or would."""
    judged = {name: record.judged[name] for name in map(case_of, files) if name in record.judged}
    if (judged or is_calibrated) and (n_lacking := len(files) - len(judged)):
        what = f"nothing is known about the quality of {plural(n_lacking, 'label map')} kept by --continue"
        log.info(f"{what}; without it they are predicted again")
    return judged


def _find_images(sources: Sequence[Path], plan: Plan, model: Path) -> list[Case]:
    """Find the images, and say on which files the model was trained if there are none, or pictures instead of scans."""
    table = model / "dataset.json"
    ending = read_json(table).get("file_ending") if table.is_file() else None
    try:
        cases = find_cases(sources, len(plan.channels), [channel.name for channel in plan.channels])
    except UserError as error:
        if ending is None or "no image" not in error.what:
            raise
        raise UserError(error.what, error.file, f"This model was trained on {ending}. {error.fix}") from None
    endings = {suffix_of(case.images[0]) for case in cases}
    if ending is not None and not any((ending in PICTURES) == (found in PICTURES) for found in endings):
        these = ", ".join(sorted(found or "DICOM" for found in endings))
        log.warn(f"this model was trained on {ending}, these are {these} files")
    return cases


def _extra_maps(probabilities: str | None, uncertainty: bool, several: bool, labels: Labels) -> ExtraMaps:
    """Return the maps to write besides label maps; `several` networks may disagree."""
    if uncertainty and not several:
        log.info("one network predicts: there is no map of disagreement, only of entropy")
    names = () if probabilities is None else parse_label_names(probabilities, labels)
    return ExtraMaps(names, uncertainty, several)


def _postprocessing(rules: dict[str, Rule], labels: Labels) -> Postprocess | None:
    """Return what changes label maps by the rules of a selection."""
    if unknown := sorted(rules.keys() - set(labels.region_names)):
        what = f"the selection postprocesses {unknown[0]}, which is no label of the model"
        raise UserError(what, fix="Run `nnlite select` again, or give --no-postprocess.")
    return partial(apply_rules, labels=labels, rules=rules) if rules else None


def _warn_of_black_pictures(files: Sequence[Path], labels: Labels) -> None:
    picture, highest = next((file for file in files if suffix_of(file) in PICTURES), None), max(labels.values)
    if picture is not None and highest < _LOOKS_BLACK:
        log.info(f"{picture.name} contains 0 to {highest}: it looks black in most viewers, not in `nnlite view`")


def after_predict(result: Predictions, **_: Any) -> list[list[str]]:
    """Return the commands to type next: to look at the first label map, and to score those of a folder."""
    if not result.files or result.failed or result.files[0].name.endswith((".dcm", ".seg.nrrd")):  # for other programs
        return []  # and failures are the last words
    file, out = result.files[0], result.output
    image = next(iter(result.images.values())) if names_file(out) else result.images[stem(file)]
    scoring = [] if names_file(out) else [["nnlite", "evaluate", str(out), "REFERENCES"]]
    return [["nnlite", "view", str(image), str(file)], *scoring]


# ------------------------------------------------------------------------------------------------------------ a cluster


_loaded: dict[str, Predictor] = {}  # the model that this worker predicts with


def _predict_on_worker(
    case: Case, loader: partial[Predictor], out: Path, outputs: Outputs, accept_geometry: bool
) -> tuple[list[Path], dict[str, str], list[CaseResult], dict[str, Any]]:
    """Predict a case on a worker; as `predict_cases`, and for the record. Other weights are loaded again."""
    (folders, folds), checkpoint = loader.args[:2], loader.keywords.get("checkpoint", "final")
    used = [(folder, fold) for folder in folders for fold in folds or trained_folds(folder, checkpoint)]
    weights = [weights_fingerprint(folder, fold) for folder, fold in used]
    stamps = [
        (file.stat().st_mtime_ns, file.stat().st_size)
        for folder in folders
        for file in (folder, folder / QUALITY, *weight_files(folder, checkpoint).values())
        if file.is_file()
    ]
    key = str((loader, weights, stamps))
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = loader()
    results: list[CaseResult] = []
    files, failed = predict_cases(
        _loaded[key], [case], out, outputs, report=results.append, accept_geometry=accept_geometry
    )
    return files, failed, results, describe_predictor(_loaded[key])


def _predict_on(
    scheduler: str,
    loader: partial[Predictor],
    cases: Sequence[Case],
    out: Path,
    outputs: Outputs,
    record: PredictionRecord,
    run: dict[str, Any],
    accept_geometry: bool,
) -> tuple[list[Path], dict[str, str]]:
    """Predict cases on the workers of a Dask scheduler; as `predict_cases`."""
    files: list[Path] = []
    failed: dict[str, str] = {}
    task = partial(_predict_on_worker, loader=loader, out=out, outputs=outputs, accept_geometry=accept_geometry)
    with options.cluster_of(scheduler, record.folder) as cluster:
        assert cluster is not None  # there is a scheduler
        absolute = [replace(case, images=tuple(path.absolute() for path in case.images)) for case in cases]
        for case, found in cluster.spread(task, absolute, "predict", heavy=True):
            if isinstance(found, Exception):
                failed[case.id] = describe(found)
                file = output_file(case, out, outputs.format)
                record.add(CaseResult(file, case, f"failed: {failed[case.id]}"), run)
            else:
                written, reasons, results, predictor = found
                files += written
                failed |= reasons
                for result in results:
                    record.add(result, {**run, **predictor})
    return sorted(files), dict(sorted(failed.items()))
