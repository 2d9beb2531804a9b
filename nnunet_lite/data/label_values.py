"""What the values in all label maps of a dataset mean: classes, masks of 0 and 255, instances, voxels not annotated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from nnunet_lite.data.cases import Case
from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import Problem, few
from nnunet_lite.errors import UserError

if TYPE_CHECKING:
    from nnunet_lite.data.dataset import Dataset

MASK_NOTE = "label maps hold 0 and 255: 255 is read as 1"
_MIXED_NOTE = "some label maps hold 0 and 1, the others 0 and 255: 255 is read as 1"
_VOID = (255, 65535, -1)  # values that mean "not annotated" in many datasets
_MANY = 20  # more values than these that dataset.json does not list are no slip of a tool
_MOST_CLASSES = 256  # that are taken from the files without a dataset.json
_MAPS_LOOKED_AT = 10
_PIECES_LOOKED_AT = 200  # values of one label map


def _readable(paths: Sequence[Path]) -> list[set[int]]:
    """The values in each of some label maps. Files that cannot be read are left out: the check reports each of them."""

    def values(path: Path) -> set[int] | None:
        try:
            return {int(value) for value in np.unique(read_label(path)[0])}
        except UserError:
            return None

    with ThreadPoolExecutor(4) as pool:
        return [found for found in pool.map(values, paths) if found is not None]


def labels_of_files(paths: Sequence[Path], folder: Path) -> tuple[Labels, dict[int, int] | None, tuple[str, ...]]:
    """The labels of a dataset without dataset.json: a class for each value in its label maps; `label_map`; and notes.

    Parameters
    ----------
    folder : of the label maps, which messages name.

    Raises
    ------
    UserError : all label maps can be read, and none holds anything but zeros; or the values are too far apart.
    """
    values = _readable(paths)
    union = set().union(*values)
    mask = Labels(names={"background": 0, "label_1": 1})
    apart = union == {0, 1, 255} and not any({1, 255} <= found for found in values)
    if union == {0, 255} or apart:
        return mask, {255: 1}, (_MIXED_NOTE if apart else MASK_NOTE,)
    fix = "Label maps hold 0 for the background and 1, 2, ... for the labels."
    if not union - {0}:
        if len(values) < len(paths):  # the check reports each of those that cannot be read
            return mask, None, ()
        raise UserError("holds no label map with anything but zeros", folder, fix)
    names: dict[str, int | tuple[int, ...]] = {f"label_{value}": value for value in sorted(union - {0})}
    try:
        return Labels(names={"background": 0, **names}), None, ()
    except ValidationError as error:
        message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise UserError(message, folder, fix) from None


def mask_map(labels: Labels, cases: Sequence[Case]) -> tuple[dict[int, int] | None, tuple[str, ...]]:
    """Whether the masks of a dataset with the values 0 and 1 hold 0 and 255, as `label_map`, and a note.

    Looks at three files, and if they hold nothing but background at others until one does.
    """
    if labels.values != (0, 1) or labels.ignore is not None:
        return None, ()
    paths = [case.label for case in cases if case.label and case.label.is_file()]
    some = [paths[i] for i in sorted({0, len(paths) // 2, len(paths) - 1}) if paths]
    values = _readable(some)
    if set().union(*values) == {0}:
        values = next((found for found in (_readable([path]) for path in paths) if set().union(*found) - {0}), values)
    masks = any(255 in found for found in values) and not any({1, 255} <= found for found in values)
    return ({255: 1}, (MASK_NOTE,)) if masks else (None, ())


def correction(unknown: Sequence[int]) -> str:
    """What to do about values in a label map that dataset.json does not list."""
    if len(unknown) > _MANY:
        return (
            "If they come from smoothing or resizing, export the label map again without interpolation; if they number "
            "instances, set all of them to 1; if they are labels, add them to dataset.json."
        )
    void = next((value for value in _VOID if value in unknown), None)
    if void is not None:
        return (
            f'If {void} marks voxels that are not annotated, add "ignore": {void} to the labels of dataset.json; if it '
            "is a label, add its name, or write the value that the label has there."
        )
    return "Add it to the labels of dataset.json, or correct the file."


# --------------------------------------------------------------------------------------------- problems of all cases


def check_labels(dataset: Dataset, found: Sequence[set[int] | None]) -> Iterator[Problem]:
    """Labels without voxels, and values that are no classes.

    Parameters
    ----------
    found : the values of each case besides the background, None where its label map could not be read.
    """
    known = [values for values in found if values is not None]
    union = set().union(*known)
    table = str(dataset.root / "dataset.json" if dataset.layout != "plain" else dataset.root)
    members = dict(zip(dataset.labels.region_names, dataset.labels.region_values, strict=True))
    absent = [name for name, wanted in members.items() if not union & set(wanted)]
    if known and len(absent) == len(members) and not union:
        yield Problem("no_foreground", table, "no label map holds anything but background", "", "Add labelled cases.")
    elif len(known) == len(found):
        for name in absent:
            text = f"label {name} ({', '.join(map(str, members[name]))}) has no voxel in any case"
            yield Problem("label_absent", table, text, "", f"Correct the labels, or remove {name} from dataset.json.")
    instances = _instances(dataset, found)
    yield from instances
    if dataset.layout == "plain" and not instances:
        yield from _no_classes(dataset, union, table)


def _no_classes(dataset: Dataset, union: set[int], table: str) -> Iterator[Problem]:
    """Values without a name that are rarely classes: of smoothed masks, of images, and of voxels not annotated."""
    between = union - {0, 255}
    levels = f"label maps hold {len(union)} different values from {min(union, default=0)} to {max(union, default=0)}"
    smoothed = len(between) > 64 or (len(between) > 5 and 254 not in between)  # FreeSurfer has labels 251 to 255
    if max(union, default=0) == 255 and smoothed and max(between) > 200:
        fix = (
            "Export them again without interpolation and not as JPEG, or set values above 127 to 1 and the others to 0."
        )
        yield Problem("label_levels", table, f"{levels}, as a smoothed or resized mask does", "a value per label", fix)
        return
    if len(union) > _MOST_CLASSES:
        fix = "Are the folders of images and label maps exchanged? If they are labels, name them in a dataset.json."
        yield Problem("label_levels", table, f"{levels}, as an image does", "a value per label", fix)
        return
    for void in _VOID:
        others = sorted(union - {void})
        if void not in union or not others or {void - 1, void + 1} & union:
            continue
        names = {"background": 0, **{f"label_{value}": value for value in others[:3]}}
        pairs = ", ".join(f'"{name}": {value}' for name, value in names.items()) + (", ..." if others[3:] else "")
        channels = ", ".join(f'"{i}": "{name}"' for i, name in enumerate(dataset.channels))
        fix = (
            f"If {void} marks voxels that are not annotated, write a dataset.json: "
            f'{{"channel_names": {{{channels}}}, "labels": {{{pairs}, "ignore": {void}}}}}; if it is a label, give its '
            'name in place of "ignore".'
        )
        text = f"label maps hold the value {void} besides {few([str(value) for value in others])}"
        yield Problem("label_void", table, text, "", fix)


# -------------------------------------------------------------------------------------------------------- instances


def _instances(dataset: Dataset, found: Sequence[set[int] | None]) -> list[Problem]:
    """Whether label maps number cells or lesions instead of naming classes.

    The number of values then varies from case to case, each map holds (nearly) 1, 2, ... n, few hold the largest, and
    each value is one piece. Organs of which some are missing are no such thing: what is missing is not always the last.
    """
    ignored = {dataset.labels.background, dataset.labels.ignore}
    maps = [
        (case.label, values - ignored)
        for case, values in zip(dataset.cases, found, strict=True)
        if case.label and values and values - ignored
    ]
    if not _numbered([values for _, values in maps]):
        return []
    by_size = sorted(maps, key=lambda one: len(one[1]), reverse=True)
    step = max(1, len(by_size) // _MAPS_LOOKED_AT)
    pieces = [piece for path, _ in by_size[::step][:_MAPS_LOOKED_AT] for piece in _pieces(path, ignored)]
    if not pieces or np.mean([piece.whole for piece in pieces]) < 0.9:
        return []
    counts = sorted(len(values) for _, values in maps)
    apart = float(np.mean([piece.apart for piece in pieces])) >= 0.8
    union = set().union(*(values for _, values in maps))
    named = dataset.layout != "plain" and union <= set(dataset.labels.values)
    few = 12 if named else 5  # organs with lesions inside look the same
    clear = counts[-1] > few or (len(set(counts)) > 2 and apart)
    if not clear and (named or not apart):
        return []
    text = (
        f"label maps hold {counts[0]} to {counts[-1]} values, and each value is one connected piece: they look like "
        "instance masks, which number cells or lesions"
    )
    fix = (
        "Networks here learn classes: set every value above 0 to 1 (to separate instances that touch, give a label of "
        "its own to the border between them)."
    )
    if dataset.layout == "plain":
        fix += " If the values are classes, name them in a dataset.json."
    where = str(maps[0][0].parent)
    return [Problem("instances" if clear and not named else "instances_likely", where, text, "a value per class", fix)]


def _numbered(maps: Sequence[set[int]]) -> bool:
    """Whether the values of label maps (without background) are numbers of instances, as far as values show it."""
    counts = {len(values) for values in maps}
    union = set().union(*maps)
    if len(maps) < 2 or len(counts) < 2 or min(union) < 1:
        return False
    if len(maps) >= 5 and len(union) >= 20 and sum(map(len, maps)) <= 0.2 * len(union) * len(maps):
        return True  # hardly any value occurs twice
    dense = float(np.mean([len(values) / max(values) for values in maps]))
    last = max(union)
    if 2 * sum(last in values for values in maps) > len(maps):
        return False
    if max(counts) < 1.5 * min(counts):  # the last of many organs may be missing in some cases
        return len(counts) > 2 and dense == 1
    return dense >= 0.9


@dataclass(frozen=True)
class _Piece:
    """The voxels of one value: whether they are connected, and whether they touch no other value."""

    whole: bool
    apart: bool


def _pieces(path: Path, ignored: Collection[int | None]) -> Iterator[_Piece]:
    from scipy.ndimage import binary_dilation, find_objects, label

    array = read_label(path)[0]
    array = np.where(np.isin(array, [value for value in ignored if value is not None]), 0, array)
    values, index = np.unique(array, return_inverse=True)
    dense = index.reshape(array.shape).astype(np.int32) + (0 if values[0] == 0 else 1)
    around = np.ones((3, 3, 3), bool)
    for number, box in enumerate(find_objects(dense)[:_PIECES_LOOKED_AT], 1):
        if box is None:
            continue
        wider = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
        inside = dense[wider] == number
        near = dense[wider][binary_dilation(inside, around)]
        yield _Piece(label(inside, around)[1] == 1, bool(np.isin(near, (0, number)).all()))
