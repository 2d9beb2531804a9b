"""What the first stage of a cascade predicts of the training cases, for the second stage to learn from.

Each case is predicted by a fold that held it out, from its preprocessed image. The logits are brought to the grid of
the second stage, linearly, and decided there: sharper than resampling a label map would be. Predictions are made once;
other weights, settings, images or grids redo them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.geometry import Geometry, Turn
from nnunet_lite.errors import naming
from nnunet_lite.files import locked, sweep
from nnunet_lite.inference.predictor import Model, load, predict_preprocessed, read_model
from nnunet_lite.inference.prepare import as_classes
from nnunet_lite.models.folder import MODEL, is_finished
from nnunet_lite.planning.schema import Configuration, Plan
from nnunet_lite.preprocessing.pipeline import Placement, restore_segmentation
from nnunet_lite.preprocessing.store import open_case, preprocess_dataset
from nnunet_lite.preprocessing.stored_case import StoredCase
from nnunet_lite.training.previous import held_out_by, map_file, map_key, previous_folder, write_map
from nnunet_lite.training.splits import ALL, Split, load_splits
from nnunet_lite.workspace import Paths

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = 1  # of how the predictions are made: raising it redoes them


@dataclass(frozen=True)
class FirstStage:
    """The first stage of a cascade, as one fold of the second needs it.

    Parameters
    ----------
    configuration : such as "3d_lowres". folder : of its model.
    holders : case id -> the fold that predicts it, since it held it out.
    """

    configuration: str
    folder: Path
    holders: Mapping[str, str]

    def only(self, case_ids: Iterable[str]) -> FirstStage:
        """The same for some of the cases."""
        return replace(self, holders={case_id: self.holders[case_id] for case_id in case_ids})

    @property
    def folds(self) -> list[str]:
        return sorted(set(self.holders.values()))

    @property
    def missing(self) -> list[str]:
        """The folds that are needed and not trained yet."""
        return [fold for fold in self.folds if not is_finished(self.folder / f"fold_{fold}")]

    def needs(self) -> str:
        """What is needed and what is to be done for it."""
        names = ", ".join(self.folds)
        todo = f"to be trained first: {', '.join(self.missing)}" if self.missing else "all trained"
        return f"the second stage learns from what {self.configuration} predicts: fold {names} of {self.folder}; {todo}"


def find_first_stage(
    paths: Paths, plan: Plan, configuration: str, split: Split, folder: Path, recipe: str, name: str | None
) -> FirstStage | None:
    """The first stage of a cascade; None for a configuration without one.

    Parameters
    ----------
    split : the fold of the second stage. folder, recipe, name : of its model.

    Raises
    ------
    UserError : a case is held out by no fold.
    """
    stage = plan.configuration(configuration).previous_stage
    if stage is None:
        return None
    splits = [] if split.name == ALL else load_splits(paths.splits)
    holders = held_out_by(split, splits)
    return FirstStage(stage, previous_folder(paths, folder, stage, recipe, name, set(holders.values())), holders)


def predict_for_next_stage(
    first: FirstStage,
    dataset: Dataset,
    plan: Plan,
    configuration: str,
    preprocessed: Path,
    workers: int | None,
    device: str | None,
) -> dict[str, Path]:
    """Predict the cases of `first.holders`; what is there already is kept.

    Parameters
    ----------
    plan, configuration : of the second stage.
    preprocessed : the folder of the data set's preprocessed cases; those that are missing for either stage are made.

    Returns
    -------
    Case id -> file, for `read_map`.

    Raises
    ------
    UserError : one of the folds is not trained.
    """
    first_plan, _ = read_model(first.folder)
    preprocess_dataset(dataset, first_plan, [first.configuration], preprocessed, workers, log.progress)
    preprocess_dataset(dataset, plan, [configuration], preprocessed, workers, log.progress)
    open_first = partial(open_case, preprocessed, first_plan, first.configuration)
    open_second = partial(open_case, preprocessed, plan, configuration)
    files: dict[str, Path] = {}
    for fold in first.folds:
        made_with = _made_with(first.folder, fold)
        mine = [case_id for case_id, holder in first.holders.items() if holder == fold]
        keys = {case_id: _hash([made_with, open_first(case_id).key, open_second(case_id).key]) for case_id in mine}
        targets = {case_id: map_file(first.folder / f"fold_{fold}", configuration, case_id) for case_id in mine}
        where = targets[mine[0]].parent
        with locked(where, partial(log.info, f"{where}: another process is predicting, waiting for it")):
            sweep(where, alone=True)
            todo = [case_id for case_id in mine if map_key(targets[case_id]) != keys[case_id]]
            if todo:
                model = load(first.folder, [fold], device, workspace=first.folder.absolute().parents[2])
                for case_id in log.progress(todo, len(todo), f"{first.configuration} fold {fold} predicts"):
                    target = open_second(case_id)
                    with naming(case_id):
                        classes = _predicted(model, open_first(case_id), target)
                    write_map(targets[case_id], classes, target.label, keys[case_id])
        files |= targets
    return files


def _predicted(model: Model, source: StoredCase, target: StoredCase) -> np.ndarray:
    """What the first stage says of a case, as classes on the grid of the second."""
    logits = predict_preprocessed(model, source.image[:])
    return classes_on_grid(logits, model.plan, model.configuration, source.placement, target.placement)


def classes_on_grid(
    logits: Tensor | np.ndarray, plan: Plan, stage: Configuration, first: Placement, second: Placement
) -> np.ndarray:
    """Classes (z, y, x) on the grid of the second stage's array of a case.

    Parameters
    ----------
    logits : (classes or regions, z, y, x) for the first stage's array.
    stage : the first one.
    first, second : where both arrays lie in the image; both show the same box of it.
    """
    z, y, x = second.shape
    grid, whole = Geometry(second.shape, second.new_spacing), ((0, z), (0, y), (0, x))
    # as in nnU-Net, the spacing of the first stage alone decides whether slices are resampled one by one
    place = Placement(grid, Turn(), whole, first.new_spacing, first.new_spacing, first.shape)
    return as_classes(restore_segmentation(logits, place, plan.labels, stage.resampling), plan.labels)


def _made_with(folder: Path, fold: str) -> dict[str, Any]:
    """What of a fold decides its predictions.

    Raises
    ------
    UserError : it is not trained.
    """
    plan, run = read_model(folder)
    weights = folder / f"fold_{fold}" / MODEL
    if not is_finished(weights.parent):
        load(folder, [fold])  # says what is wrong
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    stage = plan.configuration(run["configuration"])
    return {
        "version": _VERSION,
        "weights": digest,
        "stage": stage.model_dump(mode="json", exclude={"memory_gb", "reasons", "batch_size"}),
        "settings": run["settings"]["inference"],
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
