"""`nnlite predict`: segment images with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nnunet_lite import log
from nnunet_lite.commands.options import (
    AcceptGeometry,
    DatasetName,
    Device,
    FilePath,
    Precision,
    Scheduler,
    SettingOverrides,
    TrustCode,
    WhichCheckpoint,
    Workspace,
    cluster_of,
    names_of,
    overrides_of,
)
from nnunet_lite.data.cases import Case, find_all_cases
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError, describe
from nnunet_lite.models.choice import SPEEDS, Choice, chosen, first_fold, in_our_form, load, load_all, model_at
from nnunet_lite.models.folder import trained_folds
from nnunet_lite.workspace import select_dataset, workspace_folder

if TYPE_CHECKING:  # they import torch: after the checks of what was typed
    from nnunet_lite.inference.maps import Wanted
    from nnunet_lite.inference.predictor import Model

PROBABILITIES = "--save-probabilities"  # its value may be left out, see cli.py


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
    postprocessing : dict of str to str
        Label or region, and the rule for its components.
    """

    output: Path
    files: tuple[Path, ...]
    failed: dict[str, str]
    models: tuple[Path, ...]
    folds: tuple[str, ...]
    postprocessing: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """1 if some cases failed, 2 if all failed."""
        return (1 if self.files else 2) if self.failed else 0

    def to_json(self) -> dict[str, Any]:
        files, models = [str(path) for path in self.files], [str(path) for path in self.models]
        return {**asdict(self), "output": str(self.output), "files": files, "models": models, "folds": list(self.folds)}

    def to_text(self) -> str:
        return f"{plural(len(self.files), 'label map')} in {self.output}"


def predict(
    input: Annotated[
        FilePath | Sequence[FilePath],
        typer.Option("-i", "--input", help="Image, DICOM series, or folder of them; may be repeated."),
    ],
    output: Annotated[FilePath, typer.Option("-o", "--output", help="Folder for the label maps, or a file for one.")],
    *,
    model: Annotated[
        FilePath | Sequence[FilePath] | None,
        typer.Option(
            "-m", "--model", help="Model folder, nnU-Net's too, zip, or name [as selected, or trained]; several vote."
        ),
    ] = None,
    configuration: Annotated[
        str | Sequence[str] | None,
        typer.Option("-c", "--configuration", help="2d, 3d_fullres, ...; several vote together."),
    ] = None,
    fold: Annotated[
        int | str | Sequence[int | str] | None,
        typer.Option("-f", "--fold", help="Networks to average [selected, or all]."),
    ] = None,
    speed: Annotated[
        Literal["fast", "balanced", "best"] | None,
        typer.Option(help="balanced: no mirrored copies; fast: one fold, fewer windows, too [best]."),
    ] = None,
    mirroring: Annotated[bool | None, typer.Option(help="Average over mirrored copies: 4 to 8 times slower.")] = None,
    step_size: Annotated[float | None, typer.Option(help="Distance of windows as a share of the patch.")] = None,
    precision: Precision = None,
    max_memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Besides the image; of the GPU's as well [80 % of what is free]."),
    ] = None,
    save_probabilities: Annotated[
        str | None,
        typer.Option(PROBABILITIES, metavar="[LABELS]", help="Maps of them too: all, or names with commas [all]."),
    ] = None,
    save_uncertainty: Annotated[
        bool, typer.Option("--save-uncertainty", help="Maps of entropy and of the folds' disagreement too.")
    ] = False,
    dicom_seg: Annotated[bool, typer.Option("--dicom-seg", help="Write DICOM segmentations of DICOM series.")] = False,
    scheduler: Scheduler = None,
    device: Device = None,
    skip_existing: Annotated[bool, typer.Option("--continue", help="Keep label maps that exist already.")] = False,
    postprocess: Annotated[
        bool, typer.Option("--postprocess/--no-postprocess", help="As `nnlite select` found to help.")
    ] = True,
    accept_geometry: AcceptGeometry = False,
    settings: SettingOverrides = None,
    checkpoint: WhichCheckpoint = "final",
    trust_code: TrustCode = False,
    dataset: DatasetName = None,
    workspace: Workspace = None,
) -> Predictions:
    """Segment images with a trained model.

    Parameters
    ----------
    input, output : str or Path
        Images of any mix of formats; the folder for their label maps, or for a single image its file.
    model : str, Path or sequence of them
        A model folder, ours or nnU-Net's, its name in the workspace, or an exported zip. Several vote with the mean
        of their probabilities. By default what `select` chose for the dataset, otherwise the trained model.
    settings : mapping
        Changes of the `inference` settings, such as {"inference.mirroring": False}.

    Returns
    -------
    Predictions
        The files that were written, and the reason for each case that failed.

    Raises
    ------
    UserError
        There is no such image or model, or an option is illegal.
    """
    from nnunet_lite.inference.folder import check_output, predict_cases
    from nnunet_lite.inference.maps import Wanted, wanted_labels
    from nnunet_lite.inference.predictor import read_model

    settings = overrides_of(
        settings, inference__mirroring=mirroring, inference__step_size=step_size, inference__precision=precision,
        inference__max_memory=max_memory,
    )  # fmt: skip
    out, place = Path(output), workspace_folder(workspace)
    sources = [Path(path) for path in _as_list(input)]
    if not sources:
        raise UserError("no image is given to predict")
    paths = None if model else select_dataset(workspace, dataset, needs_plan=False)
    given = [model_at(path, place, dataset) for path in _as_list(model or ())]
    choice = chosen(paths, given, names_of(configuration) or [], None if fold is None else _as_list(fold), postprocess)
    folders, folds = choice.folders, choice.folds
    if speed == "fast" and choice.all_folds:
        folds = first_fold(folders, checkpoint) if folds is None else folds[:1]
    code: dict[str, Any] = {"trust_code": trust_code, "workspace": place}
    with in_our_form(folders, folds, checkpoint) as ours:
        plan = read_model(ours[0])[0]
        cases = find_all_cases(sources, len(plan.channels))
        check_output(sources, cases, out, plan.labels, dicom_seg)
        asked = () if save_probabilities is None else wanted_labels(save_probabilities, plan.labels)
        settings = {**SPEEDS[speed or "best"], **settings}
        rules = {label: str(rule) for label, rule in choice.rules.items()}
        if scheduler is not None:
            parcel = _Parcel(replace(choice, folders=[folder.absolute() for folder in folders], folds=folds), settings,
                             device, out.absolute(), Wanted(asked, save_uncertainty), dicom_seg,
                             skip_existing, accept_geometry, {**code, "checkpoint": checkpoint})  # fmt: skip
            files, failed = _predict_on(scheduler, parcel, cases)
            used = folds or trained_folds(ours[0])
            return _reported(Predictions(out, tuple(files), failed, tuple(folders), tuple(map(str, used)), rules))
        loaded = load_all(folders, ours, folds, device, settings, **code)
    if loaded.device.type == "cpu":
        from nnunet_lite.networks.cpu import keep_freed_memory

        keep_freed_memory()
    log.info(
        f"predicting {plural(len(cases), 'image')} with {loaded} on {loaded.device}, {loaded.arithmetic.precision}"
    )
    files, failed = predict_cases(
        loaded, cases, out, wanted=Wanted(asked, save_uncertainty), dicom_seg=dicom_seg,
        skip_existing=skip_existing, show=log.progress, finish=choice.finish(loaded.plan.labels),
        accept_geometry=accept_geometry,
    )  # fmt: skip
    return _reported(Predictions(out, tuple(files), failed, tuple(folders), loaded.folds, rules))


def _reported(predictions: Predictions) -> Predictions:
    """Log each case that failed."""
    for case, reason in predictions.failed.items():
        log.info(f"failed: {case}: {reason}")
    return predictions


@dataclass(frozen=True)
class _Parcel:
    """How a worker of a cluster predicts a case: `parcel(case)` gives what `predict_cases` does. Paths are absolute.

    `how` : which checkpoints are loaded and whose code is trusted, as `models.load` takes it.
    """

    choice: Choice
    settings: dict[str, Any]
    device: str | None
    out: Path
    wanted: Wanted
    dicom_seg: bool
    skip_existing: bool
    accept_geometry: bool
    how: dict[str, Any]

    def __call__(self, case: Case) -> tuple[list[Path], dict[str, str]]:
        from nnunet_lite.evaluation.selection import fingerprint
        from nnunet_lite.inference.folder import predict_cases

        folders, folds = tuple(self.choice.folders), tuple(self.choice.folds or ())
        trained = tuple(fingerprint(folder, str(fold)) for folder in folders for fold in folds or trained_folds(folder))
        model = _kept(
            folders, folds, self.device, tuple(sorted(self.settings.items())), tuple(self.how.items()), trained
        )
        return predict_cases(
            model, [case], self.out, wanted=self.wanted, dicom_seg=self.dicom_seg, skip_existing=self.skip_existing,
            finish=self.choice.finish(model.plan.labels), accept_geometry=self.accept_geometry,
        )  # fmt: skip


@lru_cache(maxsize=1)
def _kept(
    folders: tuple[Path, ...], folds: tuple[str | int, ...], device: str | None, settings: tuple[tuple[str, Any], ...],
    how: tuple[tuple[str, Any], ...], trained: tuple[str, ...],
) -> Model:  # fmt: skip
    """The model that this process predicts with, read once for each training (`trained`: fingerprints of the folds)."""
    return load(folders, folds or None, device, dict(settings), **dict(how))


def _predict_on(scheduler: str, parcel: _Parcel, cases: Sequence[Case]) -> tuple[list[Path], dict[str, str]]:
    """Predict cases on the workers of a Dask scheduler; the label maps, and why others failed."""
    from nnunet_lite.inference.folder import names_file

    files: list[Path] = []
    failed: dict[str, str] = {}
    with cluster_of(scheduler, parcel.out.parent if names_file(parcel.out) else parcel.out) as cluster:
        assert cluster is not None  # there is a scheduler
        absolute = [replace(case, images=tuple(path.absolute() for path in case.images)) for case in cases]
        for case, found in cluster.spread(parcel, absolute, "predict", heavy=True):
            if isinstance(found, Exception):
                failed[case.id] = describe(found)
            else:
                files += found[0]
                failed |= found[1]
    return sorted(files), dict(sorted(failed.items()))


def _as_list(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | int | Path) else list(given)
