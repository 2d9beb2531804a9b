"""The step that trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from nnunet_lite.api.place import Folder, current_paths, dataset_of, folder_of
from nnunet_lite.workspace import current

if TYPE_CHECKING:
    from nnunet_lite.evaluation.scores import Scores


def train(
    configuration: str,
    fold: int | str,
    *,
    recipe: str = "default",
    changes: dict[str, Any] | None = None,
    folds: int | None = None,
    group_by: Folder | None = None,
    stratify: bool | Folder = False,
    splits: Folder | None = None,
    dataset: str | None = None,
    name: str | None = None,
    device: str | None = None,
    restart: bool | Literal["model"] = False,
    resume: bool = False,
    force: bool = False,
    preview: bool = False,
    workspace: Folder | None = None,
) -> Scores | None:
    """Train one fold, then predict and score its held-out cases. The same call again goes on where it stopped.

    The second stage of a cascade learns from what the first one predicts of cases that it held out: the folds of the
    first stage that this needs are trained before, with the same recipe and settings, where they are not there.

    Parameters
    ----------
    configuration : of the plan, e.g. "3d_fullres".
    fold : 0 to 4, or "all" to train on every case (nothing is held out: returns None).
    recipe : a name in configs/ or a TOML file.
    changes : settings on top of the recipe, e.g. {"training.epochs": 100}.
    folds, group_by, stratify, splits : see `training.splits.FoldRule`; for splits.json where it is not there yet.
    name : of the model folder; default `<configuration>-<recipe>`. A first stage of the recipe that is trained is used
        by all second stages; else it is named alike.
    restart : begin anew; the fold that is there is moved aside, not deleted; "model": all folds are.
    resume : go on with a run that was begun; where there is none, that is an error.
    force : go on with changed settings; a longer run, by `changes`, needs no force.
    preview : draw augmented samples to fold_k/preview.png first.

    Raises
    ------
    UserError : an illegal setting, a run that was begun with others, or nothing to resume.
    Stopped : a signal asked for it; the checkpoint is written.
    Lost : another process of those that torchrun started is gone; the last checkpoint is whole.
    """
    from nnunet_lite.fold import Request, train_and_validate
    from nnunet_lite.models.folder import told_lengths
    from nnunet_lite.settings import load as load_settings
    from nnunet_lite.training.splits import FoldRule

    settings = load_settings(recipe, changes)  # a mistake in it is told first
    request = Request(
        configuration, str(fold), settings, FoldRule(folds, group_by, stratify, splits), name, device, restart,
        resume, force, told_lengths(changes), preview,
    )  # fmt: skip
    return train_and_validate(request, current_paths(workspace, dataset))


def fold_names(
    *,
    folds: int | None = None,
    group_by: Folder | None = None,
    stratify: bool | Folder = False,
    splits: Folder | None = None,
    dataset: str | None = None,
    workspace: Folder | None = None,
) -> list[str]:
    """The folds of a planned dataset, "0" and up; splits.json is made if it is not there, as in `train`."""
    from nnunet_lite.training.splits import FoldRule, read_splits

    paths = current(folder_of(workspace), dataset)
    rule = FoldRule(folds, group_by, stratify, splits)
    return [split.name for split in read_splits(paths.splits, dataset_of(paths), rule)]
