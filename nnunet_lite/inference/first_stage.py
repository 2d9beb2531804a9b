"""The first stage of a cascade, as its second stage needs it: which fold predicts which case, and the predictions.

`find_first_stage` -> `predict_first_stage` -> `open_array`. Each case is predicted by a fold that held it out,
from its preprocessed image. The logits are resampled linearly to the grid of the second stage, slab by slab, and become
classes there: that is sharper than resampling a label map. Predictions are kept; other weights, settings, images or
grids make them again.

fold_k/next_stage/3d_cascade_fullres/case_001.b2nd    in the model folder of the first stage: blosc2, (z, y, x) classes
                                                      on the grid of the second, with a key of what they were made of
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.problems import name_cases
from nnunet_lite.errors import UserError, naming
from nnunet_lite.files import atomic, hash_of, locked, sweep
from nnunet_lite.inference.predictor import load, predict_on_grid
from nnunet_lite.models.folder import MODEL, is_finished, model_folder, read_run
from nnunet_lite.models.lookup import read_model
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.pipeline import Preprocessed
from nnunet_lite.preprocessing.store import open_case, preprocess_dataset
from nnunet_lite.preprocessing.stored_case import compress_array, open_array
from nnunet_lite.training.splits import ALL, Split, load_splits
from nnunet_lite.workspace import Paths

_VERSION = 1  # of how predictions are made; a larger number makes them again
_FOLDER = "next_stage"


@dataclass(frozen=True)
class FirstStage:
    """The first stage of a cascade, as one fold of the second stage needs it.

    Parameters
    ----------
    configuration : str
        Such as "3d_lowres".
    folder : Path
        Of its model.
    holders : mapping of str to str
        Case id -> the fold that predicts it, because it held it out.
    """

    configuration: str
    folder: Path
    holders: Mapping[str, str]

    def subset(self, case_ids: Iterable[str]) -> FirstStage:
        """Return the same for some of the cases."""
        return replace(self, holders={case_id: self.holders[case_id] for case_id in case_ids})

    @property
    def folds(self) -> list[str]:
        return sorted(set(self.holders.values()))


def find_first_stage(
    paths: Paths, plan: Plan, configuration: str, split: Split, folder: Path, recipe: str, name: str | None
) -> FirstStage | None:
    """Find the first stage of a cascade.

    Parameters
    ----------
    paths, plan, configuration : Paths, Plan, str
        Of the second stage.
    split : Split
        The fold of the second stage.
    folder, recipe, name : Path, str, str or None
        Of its model.

    Returns
    -------
    FirstStage or None
        None for a configuration without one.

    Raises
    ------
    UserError
        No fold holds out one of the cases.
    """
    stage = plan.configuration(configuration).previous_stage
    if stage is None:
        return None
    holders = find_holders(split, [] if split.name == ALL else load_splits(paths.splits))
    return FirstStage(stage, first_stage_folder(paths, folder, stage, recipe, name, set(holders.values())), holders)


def first_stage_folder(
    paths: Paths, folder: Path, stage: str, recipe: str, name: str | None, folds: Iterable[str]
) -> Path:
    """Return the model folder of the first stage.

    The one that the second stage began with; otherwise that of the recipe, also for a second stage with a name of its
    own if all the folds that it needs are trained there; otherwise one with the name of the second stage.
    """
    if (folder / "run.json").is_file() and (known := read_run(folder).get("previous")):
        known = model_folder(paths, str(known))
        if not (known / "run.json").is_file() or read_run(known)["configuration"] == stage:  # previous_stage is as then
            return known
    usual = model_folder(paths, f"{stage}-{recipe}")
    if name is None or all(is_finished(usual / f"fold_{fold}") for fold in folds):
        return usual
    return model_folder(paths, f"{stage}-{name}")


def find_holders(split: Split, splits: Sequence[Split]) -> dict[str, str]:
    """Return which fold of the first stage predicts each case: one that did not train on it.

    Cases that a fold of the second stage holds out are predicted by the same fold; "all" has no choice.

    Raises
    ------
    UserError
        No fold holds out one of the cases.
    """
    if split.name == ALL:
        return dict.fromkeys(split.training, ALL)
    holders = {case_id: fold.name for fold in splits for case_id in fold.validation}
    holders |= dict.fromkeys(split.validation, split.name)
    if missing := sorted({*split.training} - set(holders)):
        what = (
            f"the second stage learns from predictions of held-out cases, and no fold holds out {name_cases(missing)}"
        )
        raise UserError(what, fix="Train the fold `all`, or complete splits.json.")
    return {case_id: holders[case_id] for case_id in (*split.training, *split.validation)}


# ------------------------------------------------------------------------------------------------------- predictions


def predict_first_stage(
    first: FirstStage,
    dataset: Dataset,
    plan: Plan,
    configuration: str,
    preprocessed: Path,
    workers: int | None,
    device: str | None,
) -> dict[str, Path]:
    """Predict the cases of `first.holders`; predictions that exist are kept.

    Parameters
    ----------
    first : FirstStage
        Which folds predict which cases.
    dataset, plan, configuration : Dataset, Plan, str
        Of the second stage.
    preprocessed : Path
        Folder of the preprocessed cases; those that are missing for either stage are made.
    workers, device : int or None, str or None
        Threads that preprocess; where the networks run.

    Returns
    -------
    dict of str to Path
        Case id -> file, for `open_array`.

    Raises
    ------
    UserError
        One of the folds is not trained.
    """
    first_plan, _ = read_model(first.folder)
    preprocess_dataset(dataset, first_plan, [first.configuration], preprocessed, workers)
    preprocess_dataset(dataset, plan, [configuration], preprocessed, workers)
    open_first = partial(open_case, preprocessed, first_plan, first.configuration)
    open_second = partial(open_case, preprocessed, plan, configuration)
    patch = [1, *plan.configuration(configuration).patch_size][-3:]
    files: dict[str, Path] = {}
    for fold in first.folds:
        fold_folder = first.folder / f"fold_{fold}"
        held_out = [case_id for case_id, holder in first.holders.items() if holder == fold]
        files |= {case_id: stage_map_file(fold_folder, configuration, case_id) for case_id in held_out}
        recipe = _describe_fold(first.folder, fold)
        keys = {case_id: hash_of([recipe, open_first(case_id).key, open_second(case_id).key]) for case_id in held_out}
        folder = files[held_out[0]].parent
        with locked(folder, "predicting"):
            sweep(folder, alone=True)
            todo = [case_id for case_id in held_out if _stored_key(files[case_id]) != keys[case_id]]
            if not todo:
                continue
            model = load(first.folder, [fold], device, workspace=first.folder.absolute().parents[2])
            for case_id in log.progress(todo, len(todo), f"{first.configuration} fold {fold} predicts"):
                source, target = open_first(case_id), open_second(case_id)
                with naming(case_id):
                    array = Preprocessed(source.image[:], None, source.placement)
                    classes = predict_on_grid(model, array, target.placement)
                content = compress_array(classes.astype(target.label.dtype), patch, keys[case_id])
                with atomic(files[case_id]) as temporary:
                    temporary.write_bytes(content)
    return files


def _describe_fold(folder: Path, fold: str) -> dict[str, Any]:
    """Everything about a fold that decides its predictions.

    Raises
    ------
    UserError
        It is not trained.
    """
    plan, run = read_model(folder)
    weights = folder / f"fold_{fold}" / MODEL
    if not is_finished(weights.parent):
        load(folder, [fold])  # raises the error
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    stage = plan.configuration(run["configuration"])
    return {
        "version": _VERSION,
        "weights": digest,
        "stage": stage.model_dump(mode="json", exclude={"memory_gb", "reasons", "batch_size"}),
        "settings": run["settings"]["inference"],
    }


# ------------------------------------------------------------------------------------------------------------- files


def stage_map_file(fold_folder: Path, configuration: str, case_id: str) -> Path:
    """Return where a fold of the first stage keeps what it predicts of a case for a second stage."""
    return fold_folder / _FOLDER / configuration / f"{case_id}.b2nd"


def _stored_key(file: Path) -> str | None:
    if not file.is_file():
        return None
    stored = open_array(file)  # its metadata is valid as long as it exists
    return str(stored.vlmeta["key"])
