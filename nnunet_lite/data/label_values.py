"""Checks of the values in all label maps together: classes, instances, smoothed masks, voxels without annotation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.images import read_label
from nnunet_lite.data.problems import Problem, few

UNKNOWN_VALUE_FIX = (
    'Add it to the labels of dataset.json ("ignore" for voxels that are not annotated), or correct the file: resize '
    "label maps without interpolation."
)
_VOID = (255, 65535, -1)  # values that mean "not annotated" in many datasets
_MOST_CLASSES = 256  # in the plain layout
_MAPS_SAMPLED = 10
_PIECES_SAMPLED = 200  # values of one label map


def check_labels(dataset: Dataset, found: Sequence[set[int] | None]) -> Iterator[Problem]:
    """Check the values of all label maps together.

    Parameters
    ----------
    dataset : Dataset
        The dataset.
    found : sequence of set of int or None
        The values of each case besides the background; None if its label map cannot be read.

    Yields
    ------
    Problem
        Labels without voxels, and values that are not classes.
    """
    known = [values for values in found if values is not None]
    union = set().union(*known)
    members = dict(zip(dataset.labels.region_names, dataset.labels.region_values, strict=True))
    absent = [name for name, values in members.items() if not union & set(values)]
    table = str(dataset.table)
    if known and len(absent) == len(members) and not union:
        yield Problem("no_foreground", table, "no label map holds anything but background", "", "Add labelled cases.")
    elif len(known) == len(found):
        for name in absent:
            text = f"label {name} ({', '.join(map(str, members[name]))}) has no voxel in any case"
            yield Problem("label_absent", table, text, "", f"Correct the labels, or remove {name} from dataset.json.")
    instances = _instances(dataset, found)
    if instances:
        yield instances
    elif dataset.layout == "plain":
        yield from _unlikely_classes(dataset, union)


def _unlikely_classes(dataset: Dataset, union: set[int]) -> Iterator[Problem]:
    """Report values without a name that are rarely classes: of smoothed masks, images, voxels without annotation."""
    low, high, between = min(union, default=0), max(union, default=0), union - {0, 255}
    smoothed = len(between) > 64 or (len(between) > 5 and 254 not in between)  # FreeSurfer has labels 251 to 255
    if len(union) > _MOST_CLASSES or (high == 255 and smoothed and max(between) > 200):
        text = f"label maps hold {len(union)} values from {low} to {high}, as an image or a smoothed mask does"
        fix = "Export them without interpolation and not as JPEG. If they are labels, name them in a dataset.json."
        yield Problem("label_levels", str(dataset.table), text, "a value per label", fix)
        return
    for void in _VOID:
        others = sorted(union - {void})
        if void in union and others and not {void - 1, void + 1} & union:
            text = f"label maps hold the value {void} besides {few([str(value) for value in others])}"
            fix = f'Name the labels in a dataset.json, with "ignore": {void} if it marks voxels without annotation.'
            yield Problem("label_void", str(dataset.table), text, "", fix)


# ------------------------------------------------------------------------------------------------------------ instances


def _instances(dataset: Dataset, found: Sequence[set[int] | None]) -> Problem | None:
    """Report label maps that number cells or lesions instead of naming classes.

    The number of values then varies from case to case, each map contains (nearly) 1, 2, ... n, few contain the largest,
    and each value is one piece. Missing organs are different: the missing one is not always the last.
    """
    ignored = {dataset.labels.background, dataset.labels.ignore}
    maps = [
        (case.label, values - ignored)
        for case, values in zip(dataset.cases, found, strict=True)
        if case.label and values and values - ignored
    ]
    if not _are_numbers([values for _, values in maps]):
        return None
    by_size = sorted(maps, key=lambda entry: len(entry[1]), reverse=True)
    step = max(1, len(by_size) // _MAPS_SAMPLED)
    pieces = [piece for path, _ in by_size[::step][:_MAPS_SAMPLED] for piece in _pieces(path, ignored)]
    if not pieces or np.mean([piece.connected for piece in pieces]) < 0.9:
        return None
    counts = sorted(len(values) for _, values in maps)
    isolated = float(np.mean([piece.isolated for piece in pieces])) >= 0.8
    union = set().union(*(values for _, values in maps))
    named = dataset.layout != "plain" and union <= set(dataset.labels.values)
    organs = 12 if named else 5  # organs with lesions inside look the same
    certain = counts[-1] > organs or (len(set(counts)) > 2 and isolated)
    if not certain and (named or not isolated):
        return None
    text = f"label maps hold {counts[0]} to {counts[-1]} values, each of which is one piece, as instance masks do"
    fix = "Set every value above 0 to 1 if they number cells. If they are classes, name them in dataset.json."
    kind = "instances" if certain and not named else "instances_likely"
    return Problem(kind, str(maps[0][0].parent), text, "a value per class", fix)


def _are_numbers(maps: Sequence[set[int]]) -> bool:
    """Return whether the values of label maps, without background, may be numbers of instances."""
    counts = {len(values) for values in maps}
    union = set().union(*maps)
    if len(maps) < 2 or len(counts) < 2 or min(union) < 1:
        return False
    if len(maps) >= 5 and len(union) >= 20 and sum(map(len, maps)) <= 0.2 * len(union) * len(maps):
        return True  # hardly any value occurs twice
    density = float(np.mean([len(values) / max(values) for values in maps]))
    if 2 * sum(max(union) in values for values in maps) > len(maps):
        return False
    if max(counts) < 1.5 * min(counts):  # the last of many organs may be missing in some cases
        return len(counts) > 2 and density == 1
    return density >= 0.9


class _Piece(NamedTuple):
    """Whether the voxels of a value are connected, and whether they touch no other value."""

    connected: bool
    isolated: bool


def _pieces(path: Path, ignored: Collection[int | None]) -> Iterator[_Piece]:
    from scipy.ndimage import binary_dilation, find_objects, label  # slow to import

    array = read_label(path)[0]
    array = np.where(np.isin(array, [value for value in ignored if value is not None]), 0, array)
    values, index = np.unique(array, return_inverse=True)
    dense = index.reshape(array.shape).astype(np.int32) + (0 if values[0] == 0 else 1)
    around = np.ones((3, 3, 3), bool)
    for number, box in enumerate(find_objects(dense)[:_PIECES_SAMPLED], 1):
        if box is None:
            continue
        wider = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
        inside = dense[wider] == number
        near = dense[wider][binary_dilation(inside, around)]
        yield _Piece(label(inside, around)[1] == 1, bool(np.isin(near, (0, number)).all()))
