"""The stage before the second one of a cascade: which of its folds predicts which case, and its predictions on disk.

fold_k/next_stage/3d_cascade_fullres/case_001.b2nd    in the model folder of the first stage: blosc2, (z, y, x) classes
                                                      on the grid of the second, with a key of what they were made of
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic
from nnunet_lite.models.folder import is_finished, model_folder, read_run
from nnunet_lite.preprocessing.stored_case import StoredCase
from nnunet_lite.training.splits import ALL, Split
from nnunet_lite.workspace import Paths

_NEXT_STAGE = "next_stage"


def map_file(fold_folder: Path, configuration: str, case_id: str) -> Path:
    """Where a fold of the previous stage keeps what it predicts of a case for `configuration`."""
    return fold_folder / _NEXT_STAGE / configuration / f"{case_id}.b2nd"


def write_map(path: Path, classes: np.ndarray, like: Any, key: str) -> None:
    """Write classes (z, y, x), chunked as a stored label of the same shape; `key` says what they were made of."""
    import blosc2

    how = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, nthreads=1)
    layout = {"chunks": like.chunks, "blocks": like.blocks, "cparams": how}
    with atomic(path) as temporary:
        stored = blosc2.asarray(classes.astype(like.dtype, order="C"), urlpath=str(temporary), mode="w", **layout)
        stored.vlmeta["key"] = key


def read_map(path: Path) -> Any:
    """The classes of a map, memory-mapped: `map[z0:z1, y0:y1, x0:x1]` reads that box as a numpy array."""
    import blosc2

    return blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))


def map_key(path: Path) -> str | None:
    """What a map was made of; None where there is none."""
    if not path.is_file():
        return None
    stored = read_map(path)  # its metadata lives no longer than it does
    return str(stored.vlmeta["key"])


def with_previous(case: StoredCase, file: Path) -> StoredCase:
    """A preprocessed case with its map from the previous stage, of which no voxel is read yet."""
    return replace(case, previous=read_map(file))


def previous_folder(
    paths: Paths, folder: Path, stage: str, recipe: str, name: str | None, folds: Iterable[str]
) -> Path:
    """The model folder of the stage before.

    The one that the second stage was begun with; else that of the recipe, also where the second stage has a name of its
    own and all the folds that it needs are trained there; else one named after it.
    """
    if (folder / "run.json").is_file() and (known := read_run(folder).get("previous")):
        return model_folder(paths, str(known))
    usual = model_folder(paths, f"{stage}-{recipe}")
    if name is None or all(is_finished(usual / f"fold_{fold}") for fold in folds):
        return usual
    return model_folder(paths, f"{stage}-{name}")


def held_out_by(fold: Split, splits: Sequence[Split]) -> dict[str, str]:
    """Which fold of the previous stage predicts each case for a fold of the second: one that did not train on it.

    Returns
    -------
    Case id -> fold. Cases that a fold holds out are predicted by the same fold; for "all" there is no choice.

    Raises
    ------
    UserError : a case is held out by no fold.
    """
    if fold.name == ALL:
        return dict.fromkeys(fold.training, ALL)
    found = {case_id: split.name for split in splits for case_id in split.validation}
    found |= dict.fromkeys(fold.validation, fold.name)
    missing = sorted({*fold.training} - set(found))
    if missing:
        raise UserError(
            f"the second stage learns from predictions of held-out cases, and no fold holds out {missing[0]}"
            + (f" ({len(missing)} cases in all)" if len(missing) > 1 else ""),
            fix="Train the fold `all`, or give splits.json a fold that holds it out.",
        )
    return {case_id: found[case_id] for case_id in (*fold.training, *fold.validation)}
