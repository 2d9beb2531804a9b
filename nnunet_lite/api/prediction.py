"""Steps of trained models: predict, import, export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnunet_lite import log
from nnunet_lite.api.place import Folder, cluster_of, current_paths, folder_of
from nnunet_lite.errors import UserError, describe
from nnunet_lite.workspace import Paths

if TYPE_CHECKING:
    from nnunet_lite.data.dataset import Case
    from nnunet_lite.inference.maps import Wanted
    from nnunet_lite.inference.predictor import Model
    from nnunet_lite.models.choice import Choice
    from nnunet_lite.models.nnunet import Checkpoint


@dataclass(frozen=True)
class Predictions:
    """The label maps that were written, what failed (case id -> why), and the models that were used.

    `postprocessing` : label or region -> what was done with its components, in words.
    """

    files: tuple[Path, ...]
    failed: dict[str, str]
    models: tuple[Path, ...]
    folds: tuple[str, ...]
    postprocessing: dict[str, str] = field(default_factory=dict)


def predict(
    source: Folder | Sequence[Folder],
    out: Folder,
    *,
    model: Folder | Sequence[Folder] | None = None,
    configuration: str | Sequence[str] | None = None,
    folds: Sequence[str | int] | str | int | None = None,
    speed: Literal["fast", "balanced", "best"] | None = None,
    save_probabilities: str | None = None,
    save_uncertainty: bool = False,
    dicom_seg: bool = False,
    dataset: str | None = None,
    device: str | None = None,
    changes: dict[str, Any] | None = None,
    skip_existing: bool = False,
    postprocess: bool = True,
    accept_geometry: bool = False,
    scheduler: str | None = None,
    checkpoint: Checkpoint = "final",
    trust_code: bool = False,
    workspace: Folder | None = None,
) -> Predictions:
    """Segment images.

    Parameters
    ----------
    source : files, DICOM series, or folders of any mix of supported formats.
    out : a folder for the label maps; for a single image also the name of its label map, such as "seg.nii.gz".
    model : a model folder, ours or nnU-Net's, its name in the workspace, or an exported zip; by default what `select`
        chose for the dataset, else the trained one (says which). Several vote with the mean of their
        probabilities.
    configuration : take a model of this configuration, or of each of several, which then vote.
    folds : networks to average; default: those that were selected, or all trained folds.
    speed : best: as the model's settings say; balanced: without mirrored copies; fast: by one fold, and with windows
        that overlap less, too. What is given besides, such as `folds`, stands.
    save_probabilities : "all", or names of labels with commas: maps for them in `out`/probabilities.
    save_uncertainty : maps of entropy and of the folds' disagreement in `out`/uncertainty.
    dicom_seg : write a DICOM segmentation of each DICOM series.
    changes : of the `inference` settings, e.g. {"inference.mirroring": False}.
    skip_existing : keep label maps that are there already.
    postprocess : do what `select` found to help; only where the models are exactly those that it chose.
    accept_geometry : take the channel files of a case by their voxels where origin or direction differ.
    scheduler : address of a Dask scheduler, whose workers predict; all of them see the files. See docs/cluster.md.
    checkpoint : "final" or "best", of each fold of an nnU-Net model; folds that lack it are left out, which is logged.
    trust_code : run the code that makes a model's network, if its `network.factory` names any. Without it only models
        of the workspace may.
    """
    from nnunet_lite.data.cases import find_all_cases
    from nnunet_lite.data.problems import plural
    from nnunet_lite.inference.folder import check_output, predict_cases
    from nnunet_lite.inference.maps import Wanted, wanted_labels
    from nnunet_lite.inference.predictor import read_model
    from nnunet_lite.models.choice import SPEEDS, chosen, first_fold, in_our_form, load_all, model_at
    from nnunet_lite.models.folder import trained_folds

    sources = [Path(one) for one in _listed(source)]
    if not sources:
        raise UserError("no image is given to predict")
    paths = None if model else current_paths(workspace, dataset, needs_plan=False)
    given = [model_at(one, folder_of(workspace), dataset) for one in _listed(model or ())]
    wanted = None if folds is None else _listed(folds)
    choice = chosen(paths, given, [] if configuration is None else _listed(configuration), wanted, postprocess)
    folders, folds = choice.folders, choice.folds
    if speed == "fast" and choice.all_folds:
        folds = first_fold(folders, checkpoint) if folds is None else folds[:1]
    code: dict[str, Any] = {"trust_code": trust_code, "workspace": folder_of(workspace)}
    with in_our_form(folders, folds, checkpoint) as ours:
        plan = read_model(ours[0])[0]
        cases = find_all_cases(sources, len(plan.channels))
        check_output(sources, cases, Path(out), plan.labels, dicom_seg)
        asked = () if save_probabilities is None else wanted_labels(save_probabilities, plan.labels)
        changes = {**SPEEDS[speed or "best"], **(changes or {})}
        rules = {label: str(rule) for label, rule in choice.rules.items()}
        if scheduler is not None:
            parcel = _Parcel(replace(choice, folders=[folder.absolute() for folder in folders], folds=folds), changes,
                             device, Path(out).absolute(), Wanted(asked, save_uncertainty), dicom_seg,
                             skip_existing, accept_geometry, {**code, "checkpoint": checkpoint})  # fmt: skip
            files, failed = _predict_on(scheduler, parcel, cases)
            used = folds or trained_folds(ours[0])
            return Predictions(tuple(files), failed, tuple(folders), tuple(map(str, used)), rules)
        loaded = load_all(folders, ours, folds, device, changes, **code)
    if loaded.device.type == "cpu":
        from nnunet_lite.networks.cpu import keep_freed_memory  # imports torch: after the checks above

        keep_freed_memory()
    log.info(
        f"predicting {plural(len(cases), 'image')} with {loaded} on {loaded.device}, {loaded.arithmetic.precision}"
    )
    files, failed = predict_cases(
        loaded, cases, Path(out), wanted=Wanted(asked, save_uncertainty), dicom_seg=dicom_seg,
        skip_existing=skip_existing, show=log.progress, finish=choice.finish(loaded.plan.labels),
        accept_geometry=accept_geometry,
    )  # fmt: skip
    return Predictions(tuple(files), failed, tuple(folders), loaded.folds, rules)


@dataclass(frozen=True)
class _Parcel:
    """How a worker of a cluster predicts a case: `parcel(case)` gives what `predict_cases` does. Paths are absolute.

    `how` : which checkpoints are loaded and whose code is trusted, as `models.load` takes it.
    """

    choice: Choice
    changes: dict[str, Any]
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
        from nnunet_lite.models.folder import trained_folds

        folders, folds = tuple(self.choice.folders), tuple(self.choice.folds or ())
        trained = tuple(fingerprint(folder, str(fold)) for folder in folders for fold in folds or trained_folds(folder))
        model = _kept(
            folders, folds, self.device, tuple(sorted(self.changes.items())), tuple(self.how.items()), trained
        )
        return predict_cases(
            model, [case], self.out, wanted=self.wanted, dicom_seg=self.dicom_seg, skip_existing=self.skip_existing,
            finish=self.choice.finish(model.plan.labels), accept_geometry=self.accept_geometry,
        )  # fmt: skip


@lru_cache(maxsize=1)
def _kept(
    folders: tuple[Path, ...], folds: tuple[str | int, ...], device: str | None, changes: tuple[tuple[str, Any], ...],
    how: tuple[tuple[str, Any], ...], trained: tuple[str, ...],
) -> Model:  # fmt: skip
    """The model that this process predicts with, read once for each training (`trained`: fingerprints of the folds)."""
    from nnunet_lite.models.choice import load

    return load(folders, folds or None, device, dict(changes), **dict(how))


def _predict_on(scheduler: str, parcel: _Parcel, cases: Sequence[Case]) -> tuple[list[Path], dict[str, str]]:
    """Predict cases on the workers of a Dask scheduler; the label maps, and why others failed."""
    from nnunet_lite.inference.folder import names_file

    files: list[Path] = []
    failed: dict[str, str] = {}
    with cluster_of(scheduler, parcel.out.parent if names_file(parcel.out) else parcel.out) as cluster:
        assert cluster is not None  # there is a scheduler
        there = [replace(case, images=tuple(path.absolute() for path in case.images)) for case in cases]
        for case, found in cluster.spread(parcel, there, "predict", heavy=True):
            if isinstance(found, Exception):
                failed[case.id] = describe(found)
            else:
                files += found[0]
                failed |= found[1]
    return sorted(files), dict(sorted(failed.items()))


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | int | Path) else list(given)


def import_model(
    source: Folder,
    out: Folder | None = None,
    *,
    replace: bool = False,
    checkpoint: Checkpoint = "final",
    workspace: Folder | None = None,
) -> Path:
    """Make a model folder of an exported zip or of a model that nnU-Net v2 wrote; nothing that they carry is run.

    Parameters
    ----------
    out : where; default: among the models of its dataset in the workspace. There it is called as it was when it was
        exported, or, of nnU-Net, trainer__plans__configuration.
    replace : set a model of that name aside first.
    checkpoint : "final" or "best", of each fold of an nnU-Net model; folds that lack it are left out, which is logged.

    Returns
    -------
    The new model folder.

    Raises
    ------
    UserError : it is neither, or damaged, or a model is there already.
    """
    from nnunet_lite.models.folder import model_folder
    from nnunet_lite.models.nnunet import import_model as import_folder
    from nnunet_lite.models.nnunet import nnunet_names
    from nnunet_lite.models.unpack import is_bundle, read_manifest, unpack

    path, place = Path(source).absolute(), folder_of(workspace)
    if not path.exists():
        raise UserError("there is no such file or folder", path)
    if is_bundle(path):
        about = read_manifest(path)
        target = Path(out) if out else model_folder(Paths(place / about.dataset), about.name_for(path))
        return unpack(path, target, replace=replace)
    if (path / "run.json").is_file():
        raise UserError("is a model folder of nnlite already", path, "Use it with -m, or pack it with `nnlite export`.")
    dataset, name = ("", "") if out else nnunet_names(path, checkpoint)
    target = Path(out) if out else model_folder(Paths(place / dataset), name)
    import_folder(path, target, None, checkpoint, replace=replace)
    return target


def export_model(
    out: Folder,
    model: Folder | None = None,
    *,
    format: Literal["zip", "nnunet", "onnx"] = "zip",
    licence: str | None = None,
    note: str | None = None,
    configuration: str | None = None,
    dataset: str | None = None,
    checkpoint: Checkpoint = "final",
    trust_code: bool = False,
    workspace: Folder | None = None,
) -> Path:
    """Pack a model into one file that travels, or write it for others to predict with; returns the model's folder.

    Parameters
    ----------
    model, configuration, checkpoint, trust_code : as for `predict`; one model.
    format : zip (for `import_model`), nnunet (a folder for nnU-Net v2) or onnx (a folder, see docs/models.md).
    licence : SPDX identifier, text or file. note : on the training data. Both for zip.

    Raises
    ------
    UserError : no model is there, `out` is there already, or the model is or has what the format cannot hold.
    """
    from nnunet_lite.models.choice import choose_model, in_our_form, model_at
    from nnunet_lite.models.nnunet import export_model as export_folder

    if model:
        folder = model_at(model, folder_of(workspace), dataset)
    else:
        folder = choose_model(current_paths(workspace, dataset, needs_plan=False), configuration)
    with in_our_form([folder], None, checkpoint) as (ours,):
        if format == "nnunet":
            export_folder(ours, Path(out))
        elif format == "zip":
            from nnunet_lite.models.bundle import licence_text, pack

            pack(ours, Path(out), licence=None if licence is None else licence_text(licence), note=note)
        else:
            from nnunet_lite.inference.onnx import export_onnx

            code: dict[str, Any] = {"trust_code": trust_code, "workspace": folder_of(workspace)}
            worst = max(export_onnx(ours, Path(out), **code).values())
            log.info(f"logits differ from torch's by {worst:.1e} at most")
    return folder
