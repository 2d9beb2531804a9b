"""What trained models predict of the cases that another network learns from: its teachers, see `nnlite distill`.

`find_teachers` -> `predict_teachers`. The models predict together, as `nnlite predict` does with them, on the grid of
the preprocessed case. Their probabilities are kept; other weights, settings, images or grids make them again.

preprocessed/teachers/9f0c5d.../case_001-5f....b2nd    the folder is named by a hash of the models, the file like the
                                                       preprocessed case; blosc2, (foreground channels, z, y, x) uint8
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.images import Image
from nnunet_lite.errors import UserError, naming
from nnunet_lite.files import atomic, hash_of, locked, sweep
from nnunet_lite.inference.cases import read_case_image
from nnunet_lite.inference.folder import array_on_disk
from nnunet_lite.inference.outputs import ExtraMaps
from nnunet_lite.inference.predictor import Predictor, check_vote, load, prepare_image, segment
from nnunet_lite.models.folder import CASES, model_folder, model_folders, trained_folds
from nnunet_lite.models.lookup import model_fingerprint, read_model
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.pipeline import Placement
from nnunet_lite.preprocessing.store import open_case
from nnunet_lite.preprocessing.stored_case import compress_array
from nnunet_lite.training.splits import ALL, Split, refuse_other_cases
from nnunet_lite.workspace import Paths

_VERSION = 1  # of how probabilities are made; a larger number makes them again


@dataclass(frozen=True)
class Teacher:
    """A model that a network learns from.

    Parameters
    ----------
    folder : Path
        Of the model.
    folds : list of str
        Its folds that may teach.
    settings : dict
        As its run.json has them.
    """

    folder: Path
    folds: list[str]
    settings: dict[str, Any]


def find_teachers(
    paths: Paths, dataset: Dataset, plan: Plan, configuration: str, names: Sequence[str], split: Split
) -> list[Teacher]:
    """Find the models that a network learns from, and their folds that may teach it.

    A network that is trained on all cases learns from all folds. Fold k learns from fold k alone: the others have
    learned from the cases that fold k holds out, and would pass them on.

    Parameters
    ----------
    paths, dataset : Paths, Dataset
        The planned dataset.
    plan, configuration : Plan, str
        What is trained.
    names : sequence of str
        Names of models of the dataset.
    split : Split
        The fold that is trained.

    Returns
    -------
    list of Teacher
        One for each name.

    Raises
    ------
    UserError
        There is no such model or fold, it was trained on other cases or has other labels or channels, or one of the
        networks is the second stage of a cascade.
    """
    teachers = []
    for name in dict.fromkeys(names):
        folder = model_folder(paths, name)
        if not (folder / "run.json").is_file():
            have = ", ".join(path.name for path in model_folders(paths)) or "none"
            raise UserError(f"there is no model {name} of {paths.name} to learn from", fix=f"Its models: {have}.")
        teacher, run = read_model(folder)
        stages = plan.configuration(configuration), teacher.configuration(run["configuration"])
        if any(stage.previous_stage for stage in stages):
            raise UserError("the second stage of a cascade cannot learn from models, or teach", folder)
        check_vote(plan, teacher, paths.plans, folder)
        folds = trained_folds(folder)
        if split.name != ALL:
            if split.name not in folds or not (folder / f"fold_{split.name}" / CASES).is_file():
                what = f"has not trained fold {split.name} here, the one that fold {split.name} may learn from"
                raise UserError(what, folder, "Train it, or train the fold `all`, which learns from all folds.")
            refuse_other_cases(folder, split, paths.splits, dataset)
            folds = [split.name]
        if not folds:
            raise UserError("has no trained fold to learn from", folder, "Train one with `nnlite train`.")
        teachers.append(Teacher(folder, folds, run["settings"]))
    return teachers


def predict_teachers(
    teachers: Sequence[Teacher],
    paths: Paths,
    dataset: Dataset,
    plan: Plan,
    configuration: str,
    split: Split,
    device: str | None,
) -> dict[str, Path]:
    """Predict the training cases of a fold with its teachers; predictions that exist are kept.

    Parameters
    ----------
    teachers : sequence of Teacher
        What `find_teachers` found.
    paths, dataset, plan, configuration, split
        As for `find_teachers`; the cases are preprocessed.
    device : str or None
        Where the networks run.

    Returns
    -------
    dict of str to Path
        Case id -> file, for `open_array`.

    Raises
    ------
    UserError
        A case cannot be predicted.
    """
    if not teachers:
        return {}
    words = [f"{teacher.folder.name} (fold {', '.join(teacher.folds)})" for teacher in teachers]
    log.info(f"learning from {' and '.join(words)}")
    recipe = [[model_fingerprint(teacher.folder, teacher.folds), teacher.settings] for teacher in teachers]
    folder = paths.teachers / hash_of([_VERSION, recipe])
    open_stored = partial(open_case, paths.preprocessed, plan, configuration)
    files = {case_id: folder / f"{open_stored(case_id).key}.b2nd" for case_id in split.training}
    with locked(folder, "predicting"):
        sweep(folder, alone=True)
        todo = [case for case in dataset.cases if case.id in files and not files[case.id].is_file()]
        if not todo:
            return files
        first, *others = [load(one.folder, one.folds, device, workspace=paths.root.parent) for one in teachers]
        together = replace(first, partners=tuple(others))
        patch = [1, *plan.configuration(configuration).patch_size][-3:]
        names = ", ".join(teacher.folder.name for teacher in teachers)
        for case in log.progress(todo, len(todo), f"{names} predicts"):
            with naming(case.id):
                image = read_case_image(plan, case, dataset.accept_geometry)
                maps = predict_probabilities(together, image, open_stored(case.id).placement, folder)
            with atomic(files[case.id]) as temporary:
                temporary.write_bytes(compress_array(maps, patch))
    return files


def predict_probabilities(teacher: Predictor, image: Image, grid: Placement, folder: Path) -> np.ndarray:
    """Predict the probabilities of all foreground classes or regions on the grid of a preprocessed case.

    Parameters
    ----------
    teacher : Predictor
        The models, none of which is a cascade.
    image : Image
        The image of the case.
    grid : Placement
        Of its preprocessed array.
    folder : Path
        Where the maps are while they are made, in a file without a name: they may be larger than the memory.

    Returns
    -------
    ndarray, shape (foreground channels, z, y, x)
        uint8, with 255 for 1.
    """
    names = teacher.plan.labels.region_names
    prepared = prepare_image(teacher, image)
    arrays = tuple(replace(array, placement=array.placement.on_grid(grid)) for array in prepared.arrays)
    maps = array_on_disk(folder, (len(names), *grid.shape))
    unused = iter(maps)
    segment(teacher, replace(prepared, arrays=arrays), maps=ExtraMaps(names), new_map=lambda shape: next(unused))
    return maps
