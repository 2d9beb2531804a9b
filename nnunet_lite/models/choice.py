"""The models that there are: choosing one, and loading it from wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import Paths, planned_paths, workspace_folder

if TYPE_CHECKING:
    from nnunet_lite.data.labels import Labels
    from nnunet_lite.evaluation.postprocessing import Rule
    from nnunet_lite.evaluation.selection import Selection
    from nnunet_lite.inference.folder import Finish
    from nnunet_lite.inference.predictor import Model
    from nnunet_lite.models.nnunet import Checkpoint

# --speed: what is changed of the settings; "fast" also takes one fold
SPEEDS: dict[str, dict[str, Any]] = {
    "best": {},
    "balanced": {"inference.mirroring": False},
    "fast": {"inference.mirroring": False, "inference.step_size": 0.75},
}
_ALIKE = "Models vote together on the same labels and channels, such as configurations of one plan."


@dataclass(frozen=True)
class Choice:
    """What is to predict: model folders, folds of them (None: all trained), and the rules for their label maps.

    `all_folds` : whether nobody asked for certain folds.
    """

    folders: list[Path]
    folds: Sequence[str | int] | None
    all_folds: bool
    rules: dict[str, Rule] = field(default_factory=dict)

    def finish(self, labels: Labels) -> Finish | None:
        """What postprocesses a label map; None where there is nothing to do.

        Raises
        ------
        UserError : a rule is for a label that the model does not have.
        """
        from nnunet_lite.evaluation.postprocessing import apply_rules

        if strange := sorted(self.rules.keys() - set(labels.region_names)):
            what = f"the selection postprocesses {strange[0]}, which is no label of the model"
            raise UserError(what, fix="Run `nnlite select` again, or give --no-postprocess.")
        return (lambda array, place: apply_rules(array, place.spacing, labels, self.rules)) if self.rules else None


def chosen(
    paths: Paths | None,
    models: Sequence[Path],
    configurations: Sequence[str],
    folds: Sequence[str | int] | None,
    postprocess: bool,
) -> Choice:
    """The models that were asked for, else those that `nnlite select` chose, else the trained one; says which.

    What was selected for postprocessing is done where exactly the selected models predict.

    Parameters
    ----------
    paths : of the data set; None where `models` are given, beside which their data set's selection may lie.

    Raises
    ------
    UserError : nothing is trained, or a selected model is gone.
    """
    if paths is not None and not configurations:
        selection = _selected(paths)
        if selection is None:
            return Choice([choose_model(paths)], folds, folds is None)
        from nnunet_lite.evaluation.selection import selected_models

        folders = selected_models(paths, selection)
    else:
        folders = list(models) if paths is None else [choose_model(paths, name) for name in configurations]
        paths = paths or Paths(folders[0].absolute().parent.parent)
        ours = all(folder.absolute().parent == paths.models for folder in folders)
        selection = _selected(paths) if ours else None
        if selection is None or set(selection.models) != {folder.name for folder in folders}:
            return Choice(folders, folds, folds is None)
    used = list(selection.folds) if folds is None else folds
    rules = selection.postprocessing if postprocess else {}
    if doubtful := [label for label in selection.unconfirmed if label in rules]:
        rules = {label: rule for label, rule in rules.items() if label not in doubtful}
        what = f"the postprocessing of {', '.join(doubtful)} was chosen and measured on the same cases"
        log.warn(f"{what}, and is not applied; `nnlite select` chooses and confirms it on different cases")
    _tell(paths, selection, used, rules)
    return Choice(folders, used, folds is None, rules)


def _selected(paths: Paths) -> Selection | None:
    from nnunet_lite.evaluation.selection import read_selection

    return read_selection(paths) if paths.inference.is_file() else None


def _tell(paths: Paths, selection: Selection, folds: Sequence[str | int], rules: dict[str, Rule]) -> None:
    """One line on what is obeyed, and one if it is out of date."""
    from nnunet_lite.evaluation.selection import changed_models, describe_selection

    log.info(f"{paths.inference}: {describe_selection(selection.models, [str(fold) for fold in folds], rules)}")
    if changed := changed_models(paths, selection):
        what = f"{' and '.join(changed)} changed since that was selected ({selection.made})"
        log.warn(f"{what}; `nnlite select` compares anew")


def choose_model(paths: Paths, configuration: str | None = None) -> Path:
    """The trained model with the most folds, of equals the one that scored best on its held-out cases.

    The first stage of a cascade whose second stage is trained does not count, unless it is asked for.

    Raises
    ------
    UserError : nothing is trained (of that configuration).
    """
    from nnunet_lite.models.folder import first_training, model_folders, read_run, trained_folds, validation_dice

    runs = {folder: read_run(folder) for folder in model_folders(paths) if trained_folds(folder)}
    first_stages = {run.get("previous") for run in runs.values()} if configuration is None else set()
    found = [
        (len(folds := trained_folds(folder)), max(validation_dice(folder, fold) or 0.0 for fold in folds), folder)
        for folder, run in runs.items()
        if configuration in (None, folder.name, run["configuration"]) and folder.name not in first_stages
    ]
    if not found:
        of = f" {configuration}" if configuration else ""
        have = [f"{folder.name} ({run['configuration']})" for folder, run in runs.items()]
        todo = f"Run `{first_training(paths)}`." if paths.plans.is_file() else f"There is: {', '.join(have)}."
        raise UserError(f"no{of} model of {paths.name} is trained", paths.models, todo)
    n_folds, dice, best = max(found)
    if len(found) > 1:
        why = f"most folds ({n_folds}), then best Dice on held-out cases ({dice:.3f})"
        log.info(f"{len(found)} models are trained; taking {best.name}: {why}. -m takes another")
    return best


def model_at(given: str | Path, workspace: Path, dataset: str | None = None) -> Path:
    """A model folder or zip from its path, or from the name of a model in the workspace.

    Parameters
    ----------
    dataset : whose models count, where one is given.

    Raises
    ------
    UserError : several datasets have a model of that name.
    """
    path = Path(given).expanduser()
    if path.exists() or len(path.parts) != 1:
        return path
    found = sorted(file.parent for file in workspace.glob("*/models/*/run.json") if file.parent.name == path.name)
    if len(found) > 1 and dataset is not None:
        of_dataset = planned_paths(workspace, dataset, needs_plan=False).models
        found = [folder for folder in found if folder.parent == of_dataset]
    if len(found) > 1:
        raise UserError(f"{given} could be {' or '.join(map(str, found))}", fix="Give the path, or -d.")
    return found[0] if found else path


def first_fold(folders: Sequence[Path], checkpoint: Checkpoint = "final") -> list[str] | None:
    """The first fold that all of these models have trained; None where that is unknown before they are opened."""
    from nnunet_lite.models.folder import trained_folds
    from nnunet_lite.models.nnunet import nnunet_folds

    have = [list(nnunet_folds(folder, checkpoint)) or trained_folds(folder) for folder in folders]
    shared = [str(fold) for fold in have[0] if all(fold in others for others in have)]
    return shared[:1] or None


@contextmanager
def in_our_form(
    folders: Sequence[Path], folds: Sequence[str | int] | None = None, checkpoint: Checkpoint = "final"
) -> Iterator[list[Path]]:
    """Model folders in our form: of zips, and of models that nnU-Net wrote, copies that the block's end deletes.

    Parameters
    ----------
    checkpoint : of each fold of a model of nnU-Net.

    Raises
    ------
    UserError : one of them is no model, or they cannot vote together.
    """
    from nnunet_lite.inference.predictor import read_model
    from nnunet_lite.models.nnunet import native
    from nnunet_lite.models.unpack import unpacked

    with ExitStack() as stack:
        found = [stack.enter_context(unpacked(folder)) for folder in folders]
        for given, folder in zip(folders, found, strict=True):
            if checkpoint != "final" and (folder / "run.json").is_file():
                what = f"has no {checkpoint} checkpoint: it is no model of nnU-Net"
                raise UserError(what, given, "Leave out --checkpoint.")
        ours = [stack.enter_context(native(folder, folds, checkpoint)) for folder in found]
        plans = [read_model(folder)[0] for folder in ours]
        for folder, plan in zip(folders[1:], plans[1:], strict=True):
            for what in ("labels", "axis_order"):
                if getattr(plan, what) != getattr(plans[0], what):
                    raise UserError(f"has other {what.replace('_', ' ')} than {folders[0]}", folder, _ALIKE)
            names = [[channel.name for channel in p.channels] for p in (plans[0], plan)]
            if names[0] != names[1]:
                raise UserError(f"has other channels than {folders[0]}", folder, _ALIKE)
        yield ours


def load(
    folder: str | Path | Sequence[str | Path],
    folds: Sequence[str | int] | str | int | None = None,
    device: str | None = None,
    settings: dict[str, Any] | None = None,
    *,
    checkpoint: Checkpoint = "final",
    trust_code: bool = False,
    workspace: str | Path | None = None,
) -> Model:
    """Load a model folder, ours or nnU-Net's, or a zip; `model(array, spacing)` or `model("scan.nii.gz")` segments.

    Parameters
    ----------
    folder : its path, or the name of a model in the workspace; or several, which then vote with the mean of their
        probabilities.
    folds : one, or several; by default all that are trained.
    device : cpu, cuda, cuda:1; by default a GPU if there is one.
    settings : changes of the run's `inference` settings, e.g. {"inference.step_size": 0.75}.
    checkpoint : "final" or "best", of each fold of an nnU-Net model. Folds that lack it are left out, which is logged.
    trust_code : run the code that makes the model's network, if its `network.factory` names any. Without it only models
        in the workspace may.
    workspace : default: NNLITE_WORKSPACE, or ./nnlite_workspace.

    Raises
    ------
    UserError : no model there, or not that fold, or they cannot vote together, or they name code that is not trusted.
    """
    place = workspace_folder(None if workspace is None else Path(workspace))
    folders = [model_at(one, place) for one in ([folder] if isinstance(folder, str | Path) else folder)]
    if not folders:
        raise UserError("no model folder is given")
    wanted = [folds] if isinstance(folds, str | int) else folds
    with in_our_form(folders, wanted, checkpoint) as ours:
        return load_all(folders, ours, wanted, device, settings, trust_code=trust_code, workspace=place)


def load_all(
    folders: Sequence[Path],
    ours: Sequence[Path],
    folds: Sequence[str | int] | None,
    device: str | None,
    settings: dict[str, Any] | None,
    *,
    trust_code: bool,
    workspace: Path,
) -> Model:
    """One model of those in `ours`, the forms of `folders` that `in_our_form` gives."""
    from nnunet_lite.inference.predictor import load as load_ours
    from nnunet_lite.models.nnunet import relocated

    load_one = partial(
        load_ours, folds=folds, device=device, settings=settings, trust_code=trust_code, workspace=workspace
    )
    first, *others = [relocated(load_one(path), folder) for folder, path in zip(folders, ours, strict=True)]
    return replace(first, partners=tuple(others))
