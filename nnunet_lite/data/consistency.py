"""Problems that only the list of files or all cases together show: unused files, copies, mixed images, odd labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import cc3d
import numpy as np

from nnunet_lite.data.cases import (
    LABEL_FOLDERS,
    Case,
    image_files,
    label_base,
    likely_pairs,
    names_of_image,
    split_name,
)
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.geometry import Geometry, common_orientation
from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import BACKGROUND, Labels, contradiction, number_meanings
from nnunet_lite.data.names import PICTURES, stem, suffix_of
from nnunet_lite.data.problems import Problem, few, plural
from nnunet_lite.files import read_json
from nnunet_lite.workspace import IMAGE_FOLDERS

T = TypeVar("T")
FOLDS = 5
_VOID = (255, 65535, -1)  # values that mean "not annotated" in many datasets
_MOST_CLASSES = 256  # in the plain layout
_MOST_INVERTED = 0.75  # of the label maps
_MAPS_SAMPLED = 10
_PIECES_SAMPLED = 200  # values of one label map
_PADDING, _AIR, _BONE = -5000, -900, 300  # HU: lowest value outside of the field of view; air; bone
_MOST_NESTED = 5  # values of an organ with its lesions, which look like numbered ones


@dataclass(frozen=True)
class ChannelRange:
    """The values of one channel of an image.

    Parameters
    ----------
    low, high : float
        The extremes.
    two_values : bool
        Whether there is nothing between them.
    """

    low: float
    high: float
    two_values: bool


@dataclass
class CaseFindings(Generic[T]):
    """The results of checking a case that are kept after its arrays are gone.

    Parameters
    ----------
    problems : list of Problem
        Of this case alone.
    geometry : Geometry or None
        Of its image; None if it cannot be read.
    values : set of int or None
        Values in the file of its label map besides the background; None if it cannot be read.
    surrounding : int or None
        Value on the border of its label map, mapped to the dataset's; None if there is no background.
    digest : bytes
        Hash of the voxels of its image.
    ranges : list of ChannelRange
        The values of each channel of its image.
    visited : T or None
        The result of the visitor.
    """

    problems: list[Problem] = field(default_factory=list)
    geometry: Geometry | None = None
    values: set[int] | None = None
    surrounding: int | None = None
    digest: bytes = b""
    ranges: list[ChannelRange] = field(default_factory=list)
    visited: T | None = None


# ---------------------------------------------------------------------------------------------------- the list of files


def check_files(dataset: Dataset) -> Iterator[Problem]:
    """Check the names of files, without reading an image.

    Parameters
    ----------
    dataset : Dataset
        The dataset.

    Yields
    ------
    Problem
        Wrong number of cases, regions that are overwritten, files that no case uses, ids that occur twice.
    """
    table = dataset.root / "dataset.json"
    declared = read_json(table).get("numTraining") if table.is_file() else None
    if isinstance(declared, int) and declared != len(dataset.cases) + len(dataset.excluded):
        fix = "Add the files that are missing, or correct numTraining."
        text = f"numTraining is {declared}, and there are {plural(len(dataset.cases), 'case')}"
        yield Problem("n_cases", str(table), text, "", fix)
    yield from _lost_region(dataset)
    if dataset.layout != "explicit":  # a dataset that lists its files may leave some out
        images = _unused(dataset, [case.images[0] for case in dataset.cases], IMAGE_FOLDERS)
        ids = {case.id for case in dataset.cases}
        yield from (_unused_image(dataset, path, ids) for path in images)
        yield from _unused_labels(dataset, {name for path in images for name in names_of_image(path)})
    for case_id, n in Counter(case.id for case in dataset.cases).items():
        if n > 1:
            files = [case.images[0] for case in dataset.cases if case.id == case_id]
            text = f"{n} cases have the id {case_id} ({', '.join(sorted({path.name for path in files}))})"
            yield Problem("duplicate_id", str(files[0]), text, "one", "Rename or remove one.")


def _lost_region(dataset: Dataset) -> Iterator[Problem]:
    """Report the first region that a perfect prediction would lack: others overwrite it, or its value is another's."""
    regions, order = dataset.labels.regions, dataset.labels.region_order or ()
    for value in dataset.labels.values[1:] if dataset.labels.has_regions else ():
        written = [last for members, last in zip(regions.values(), order, strict=True) if value in members][-1]
        if wrong := [name for name, members in regions.items() if (value in members) != (written in members)]:
            text = f"regions_class_order writes {written} into predictions where label maps hold {value}"
            fix = "List large regions before those inside them; the value of each is in it, and in no region inside it."
            fix += " Of two that overlap in part, list the overlap as a third region after them."
            yield Problem("region_order", str(dataset.description), f"{text}: wrong for {few(wrong)}", "", fix)
            return


def _unused(dataset: Dataset, files: Sequence[Path], usual: Sequence[str]) -> list[Path]:
    """Return the unused files in the folders of some files, if these folders have a usual name."""
    used = {path for case in (*dataset.cases, *dataset.excluded) for path in (*case.images, case.label)}
    folders = {path.parent for path in files}
    folders = {f for f in folders if f.parent == dataset.root and f.name.lower() in usual and f.is_dir()}
    return [path for folder in sorted(folders) for path in image_files(folder) if path not in used]


def _unused_image(dataset: Dataset, path: Path, ids: set[str]) -> Problem:
    case_id, number = split_name(stem(path))
    if dataset.layout == "nnunet_v2" and not path.name.lower().endswith(dataset.file_ending.lower()):
        text, fix = f"does not end with {dataset.file_ending}, and is left out", "Convert it, or remove it."
    elif number is not None and case_id in ids:
        expected = f"{plural(len(dataset.channels), 'channel')} ({', '.join(dataset.channels)})"
        fix = "Name the channel in dataset.json, or remove the file."
        return Problem("extra_channel", str(path), f"a file for channel {number} of case {case_id}", expected, fix)
    else:
        text, fix = "is not in the dataset", "List it in dataset.json, or remove it."
    return Problem("extra_image", str(path), text, "", fix)


def _unused_labels(dataset: Dataset, known: set[str]) -> Iterator[Problem]:
    """Report label maps that no case uses, except those of unused images, whose names are known."""
    labels = {case.id: case.label for case in dataset.cases if case.label}
    alone = []
    for path in _unused(dataset, list(labels.values()), LABEL_FOLDERS):
        owner = next((name for name in (stem(path), label_base(stem(path))) if name in labels), None)
        if owner is not None:
            listed = dataset.layout in ("msd", "nnunet_v1")
            if not listed and (stem(path) == owner) == (stem(labels[owner]) == owner):
                found = f"could be the label map of case {owner}, and {labels[owner].name} is taken"
                yield Problem("ambiguous_label", str(path), found, "one label map", "Remove one of the two.")
            else:
                found = f"is not used: {labels[owner].name} is the label map of case {owner}"
                yield Problem("extra_label", str(path), found, "", "Remove it if it is not needed.")
        elif stem(path) not in known:
            alone.append(path)
    unlabelled = [path for case in dataset.cases if not (case.label and case.label.exists()) for path in case.images]
    pairs = likely_pairs(unlabelled, alone)
    for path in alone:
        likely = " and ".join(image.name for image in pairs.get(path, ()))
        fix = f"Is it that of {likely}? " if likely else ""
        fix += "Name it as its image, add the image, or remove it."
        yield Problem("extra_label", str(path), "a label map without an image", "", fix)


# -------------------------------------------------------------------------------------------------------- all the cases


def check_consistency(dataset: Dataset, findings: Sequence[CaseFindings[Any]]) -> Iterator[Problem]:
    """Compare the cases of a dataset.

    Parameters
    ----------
    dataset : Dataset
        The dataset.
    findings : sequence of CaseFindings
        Of each case.

    Yields
    ------
    Problem
        Mixed dimensions, orientations and spacings, masks for images, CT without its name, equal images, inverted
        masks, other palettes, and too few cases.
    """
    known = [(case, found.geometry) for case, found in zip(dataset.cases, findings, strict=True) if found.geometry]
    yield from _unlike_most(known, dataset.orientation)
    ranges = [found.ranges for found in findings if found.ranges]
    for number, name in enumerate(dataset.channels):
        yield from _unlikely_channel(dataset, name, [of_case[number] for of_case in ranges])
    first_with: dict[bytes, Case] = {}
    for case, found in zip(dataset.cases, findings, strict=True):
        first = first_with.setdefault(found.digest, case) if found.digest else case
        if first is not case:
            fix = "Remove one: the same patient in training and validation makes scores too good."
            yield Problem("duplicate_case", str(case.images[0]), f"holds the same image as case {first.id}", "", fix)
    yield from _inverted_masks(dataset, Counter(f.surrounding for f in findings if f.surrounding is not None))
    yield from _unlike_numbers(findings, dataset.labels)
    if len(dataset.cases) < FOLDS:
        text, expected = plural(len(dataset.cases), "case"), f"at least {FOLDS} for {FOLDS}-fold cross-validation"
        fix = "Train on all of them (fold `all`), or add cases."
        yield Problem("few_cases", str(dataset.root), text, expected, fix)


def _inverted_masks(dataset: Dataset, surrounding: Counter[int]) -> Iterator[Problem]:
    """Report a label around the background of most label maps; cells and tissue, which images cut, are on no border."""
    labels, (value, n) = dataset.labels, max(surrounding.items(), key=lambda entry: entry[1], default=(None, 0))
    names = [name for name, members in labels.regions.items() if value in members]
    if names and n >= _MOST_INVERTED * surrounding.total():
        maps = f"{n} of {plural(surrounding.total(), 'label map')}"
        text = f"label {names[0]} surrounds the background ({labels.background}) in {maps}, as in inverted masks"
        fix = "If they are inverted, exchange the two values in the files, or the two names in dataset.json."
        yield Problem("inverted", str(dataset.description), text, "", fix)


def _unlike_numbers(findings: Sequence[CaseFindings[Any]], labels: Labels) -> Iterator[Problem]:
    """Report the first label map in which a number has another colour, or name of a segment, than elsewhere.

    Another name may be the same label, spelled otherwise, unless it has another number in `labels` or a file before.
    """
    seen, numbers, doubt = dict[int, tuple[str, str]](), dict[str, tuple[int, str]](), None
    notes = [(one, found.values or ()) for found in findings for one in found.problems if one.kind == "understood"]
    for problem, values in notes:
        wrong = contradiction(problem.found, labels)
        for number, meaning in number_meanings(problem.found):
            if number not in (labels.background, *values):
                continue
            other, file = seen.setdefault(number, (meaning, problem.file))
            kind, what = "palettes", f"the number {number} is the colour {meaning}"
            fix = "If the colours are what the labels mean, save all label maps with one palette, or as grey."
            if not meaning.startswith("#"):
                kind, what = "segment_names", f"the number {number} is {meaning}"
                fix = "Export label maps from 3D Slicer with one colour table, so that numbers mean the same."
                before, place = numbers.setdefault(meaning.lower(), (number, problem.file))
                if before != number:
                    wrong = wrong or f"{what}, which is {before} in {_short_name(place, problem.file)}"
            if wrong:
                yield Problem("segments", problem.file, wrong, "", fix)
                return
            if other.lower() != meaning.lower():
                text = f"{what}, and {other} in {_short_name(file, problem.file)}"
                doubt = doubt or Problem(kind, problem.file, text, "", fix)
    yield from [doubt] if doubt else []


def _short_name(file: str, beside: str) -> str:
    return file if Path(file).name == Path(beside).name else Path(file).name


def _unlikely_channel(dataset: Dataset, name: str, ranges: Sequence[ChannelRange]) -> Iterator[Problem]:
    """Report a channel that holds masks, one that holds CT under another name, and one called CT that holds none."""
    if not ranges:
        return
    low, high = min(r.low for r in ranges), max(r.high for r in ranges)
    text, table = f"channel {name} holds values from {low:g} to {high:g}", str(dataset.description)
    like_ct = sum(_PADDING <= r.low <= _AIR and r.high >= _BONE for r in ranges)
    if all(r.two_values for r in ranges):
        text = f"channel {name} holds two values in every case, as a mask does"
        yield Problem("two_values", table, text, "an image", "Remove it if it is a label map: a new image has none.")
    elif name.lower() != "ct" and 2 * like_ct > len(ranges):
        where = "in a dataset.json (`nnlite init` writes one)" if dataset.layout == "plain" else "in dataset.json"
        fix = f"If it is CT, call the channel CT {where}, so that it is normalised as CT."
        yield Problem("looks_like_ct", table, f"{text}, as CT in Hounsfield units does", "", fix)
    elif name.lower() == "ct" and 2 * sum(r.low >= 0 for r in ranges) > len(ranges):
        fix = "Give the channel another name if it is no CT, or was normalised before; else rescale it to HU."
        yield Problem("not_ct", table, text, "Hounsfield units, where air is -1000", fix)


def _unlike_most(known: Sequence[tuple[Case, Geometry]], required: str | None) -> Iterator[Problem]:
    """Report images whose dimensions or axes differ from those of most, and those without a spacing if others have one.

    `required` is the orientation that dataset.json names.
    """
    most = Counter(geometry.dimensions for _, geometry in known).most_common(1)[0][0] if known else 0
    usual = required or common_orientation(geometry.orientation for _, geometry in known)
    calibrated = sum(geometry.calibrated for _, geometry in known)
    for case, geometry in known:
        path = str(case.images[0])
        if geometry.dimensions != most:
            fix = "All images of a dataset must have the same."
            yield Problem("dimensions", path, f"{geometry.dimensions} dimensions", f"{most} as most", fix)
        stored = geometry.orientation
        if geometry.dimensions == 3 and stored != usual:
            text = f"stored as {stored}" if stored else "states no orientation"
            fix = "It is turned on reading." if stored else "It is taken as it is stored."
            yield Problem("orientation", path, text, f"{usual} as {'dataset.json asks' if required else 'most'}", fix)
        if calibrated and not geometry.calibrated:
            text = f"states no spacing, and {calibrated} of {plural(len(known), 'image')} do"
            fix = 'State it (of TIFF: {"spacing": [z, y, x]} in mm in <case>.json), or save all images without one.'
            yield Problem("no_spacing", path, text, "", fix)


# ------------------------------------------------------------------------------------------------- values of label maps


def check_labels(dataset: Dataset, found: Sequence[set[int] | None]) -> Iterator[Problem]:
    """Check the values of all label maps together.

    Parameters
    ----------
    dataset : Dataset
        The dataset.
    found : sequence of set of int or None
        The values in each file besides the background; None if it cannot be read.

    Yields
    ------
    Problem
        Labels without voxels, and values that are not classes.
    """
    mapped, table = dataset.value_map or {}, str(dataset.description)
    for raw, value in mapped.items():
        if {raw, value} <= set().union(*filter(None, found)):
            text = f"some label maps hold the value {raw}, and some {value}"
            fix = f'Write {value} in all, or add "ignore": {raw} to the labels of a dataset.json if it is no label.'
            yield Problem("label_void", table, text, "", fix)
    found = [values and {mapped.get(value, value) for value in values} for values in found]
    known = [values for values in found if values is not None]
    union = set().union(*known)
    members = dataset.labels.regions
    absent = [name for name, values in members.items() if not union & set(values)]
    if known and len(absent) == len(members) and not union - {dataset.labels.ignore}:
        yield Problem("no_foreground", table, "no label map holds anything but background", "", "Add labelled cases.")
    elif len(known) == len(found):
        for name in absent:
            text = f"label {name} ({', '.join(map(str, members[name]))}) has no voxel in any case"
            yield Problem("label_absent", table, text, "", f"Correct the labels, or remove {name} from dataset.json.")
    instances = _instances(dataset, found)
    if instances:
        yield instances
    elif not _are_named(dataset):
        yield from _unlikely_classes(dataset, union)


def _are_named(dataset: Dataset) -> bool:
    """Return whether somebody chose names for the labels: those of `nnlite init` are numbers."""
    names = dataset.labels.names.items()
    return dataset.layout != "plain" and any(name not in (BACKGROUND, f"label_{value}") for name, value in names)


def _unlikely_classes(dataset: Dataset, union: set[int]) -> Iterator[Problem]:
    """Report values without a name that are rarely classes: of smoothed masks, images, voxels without annotation."""
    low, high, between = min(union, default=0), max(union, default=0), union - {0, 255}
    smoothed = len(between) > 64 or (len(between) > 5 and 254 not in between)  # FreeSurfer has labels 251 to 255
    smoothed |= 254 in between and any(case.label and suffix_of(case.label) in PICTURES for case in dataset.cases)
    if len(union) > _MOST_CLASSES or (high == 255 and smoothed and max(between) > 200):
        text = f"label maps hold {len(union)} values from {low} to {high}, as an image or a smoothed mask does"
        fix = "Export them without interpolation and not as JPEG. If they are labels, name them in a dataset.json."
        yield Problem("label_levels", str(dataset.description), text, "a value per label", fix)
        return
    for void in _VOID:
        others = sorted(union - {void})
        if void in union and others and not {void - 1, void + 1} & union:
            text = f"label maps hold the value {void} besides {few([str(value) for value in others])}"
            fix = f'Name the labels in a dataset.json, with "ignore": {void} if it marks voxels without annotation.'
            yield Problem("label_void", str(dataset.description), text, "", fix)


def _instances(dataset: Dataset, found: Sequence[set[int] | None]) -> Problem | None:
    """Report label maps that number cells or lesions instead of naming classes.

    Each map then contains 1, 2, ... n (some may have been removed), with n different, few maps contain the largest
    value, and each value is one piece. Of organs, the missing one is not always the last; and an organ and a tumour
    inside it touch.
    """
    ignored = [value for value in (dataset.labels.background, dataset.labels.ignore) if value is not None]
    cases = zip(dataset.cases, found, strict=True)
    maps = [(case.label, values.difference(ignored)) for case, values in cases if case.label and values]
    maps = sorted((entry for entry in maps if entry[1]), key=lambda entry: len(entry[1]), reverse=True)
    counts = [len(values) for _, values in maps]
    union = set().union(*(values for _, values in maps))
    if len(set(counts)) < 2 or min(union) < 1:
        return None
    rare = len(maps) >= 5 and len(union) >= 20 and sum(counts) <= 0.2 * len(union) * len(maps)  # hardly any value twice
    highest = [max(values) for _, values in maps]
    dense = np.mean(np.divide(counts, highest))
    numbered = dense >= 0.9 or (dense >= 0.6 and counts[0] > _MOST_NESTED and max(highest) >= 1.5 * min(highest))
    vary = len(set(counts)) > 2 or counts[0] >= 1.5 * counts[-1]
    common_last = 2 * sum(max(union) in values for _, values in maps) > len(maps)
    if not rare and (not numbered or not vary or common_last):
        return None
    sample = maps[:: max(1, len(maps) // _MAPS_SAMPLED)][:_MAPS_SAMPLED]
    pieces = np.array([piece for path, _ in sample for piece in _pieces(path, ignored)], float).reshape(-1, 2)
    connected, isolated = pieces.mean(axis=0) if len(pieces) else (0, 0)
    if connected < 0.9 or (counts[0] <= _MOST_NESTED and (isolated < 0.8 or len(set(counts)) < 3)):
        return None
    text = f"label maps hold {counts[-1]} to {counts[0]} values, each of which is one piece, as instance masks do"
    fix = "Set every value above 0 to 1 if they number cells. If they are classes, name them in dataset.json."
    named = _are_named(dataset) and union <= set(dataset.labels.values)
    kind = "instances_likely" if named else "instances"
    return Problem(kind, str(maps[0][0].parent), text, "a value per class", fix)


def _pieces(path: Path, ignored: Sequence[int]) -> Iterator[tuple[bool, bool]]:
    """Return for each value of a label map whether its voxels are connected, and whether they touch no other value."""
    array = read_label(path)[0]
    array = np.where(np.isin(array, ignored), 0, array)
    pieces = cc3d.connected_components(array, connectivity=26)  # each of one value
    value_of = np.zeros(int(pieces.max()) + 1, array.dtype)
    value_of[pieces] = array
    touching = {int(value_of[piece]) for pair in cc3d.contacts(pieces, connectivity=26) for piece in pair}
    counts = Counter(value_of[1:].tolist())
    yield from ((counts[value] == 1, value not in touching) for value in sorted(counts)[:_PIECES_SAMPLED])
