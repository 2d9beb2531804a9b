"""Problems that only the list of files or all cases together show: unused files, copies, mixed images, wrong units."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from nnunet_lite.data.cases import Case, image_files
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.geometry import Geometry, common_orientation
from nnunet_lite.data.names import stem
from nnunet_lite.data.pairing import LABEL_FOLDERS, label_base
from nnunet_lite.data.problems import Problem, plural
from nnunet_lite.files import read_json
from nnunet_lite.workspace import IMAGE_FOLDERS

T = TypeVar("T")
FOLDS = 5


@dataclass(frozen=True)
class IntensityRange:
    """The values of one channel of one case.

    Parameters
    ----------
    low, high : float
        The extremes.
    whole : bool
        Whether a sample of the values are integers.
    """

    low: float
    high: float
    whole: bool


@dataclass
class CaseFindings(Generic[T]):
    """The results of checking a case that are kept after its arrays are gone.

    Parameters
    ----------
    problems : list of Problem
        Of this case alone.
    geometry : Geometry or None
        Of its image; None if it cannot be read.
    ranges : list of IntensityRange
        One per channel.
    values : set of int or None
        Values in its label map besides the background; None if it cannot be read.
    digest : bytes
        Hash of the voxels of its image.
    visited : T or None
        The result of the visitor.
    """

    problems: list[Problem] = field(default_factory=list)
    geometry: Geometry | None = None
    ranges: list[IntensityRange] = field(default_factory=list)
    values: set[int] | None = None
    digest: bytes = b""
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
        Wrong number of cases, files that no case uses, ids that occur twice.
    """
    table = dataset.root / "dataset.json"
    declared = read_json(table).get("numTraining") if table.is_file() else None
    if isinstance(declared, int) and declared != len(dataset.cases):
        fix = "Add the files that are missing, or correct numTraining."
        text = f"numTraining is {declared}, and there are {plural(len(dataset.cases), 'case')}"
        yield Problem("n_cases", str(table), text, "", fix)
    if dataset.layout != "explicit":  # a dataset that lists its files may leave some out
        unlisted: set[str] = set()
        yield from _unused_images(dataset, unlisted)
        yield from _unused_labels(dataset, unlisted)
    for case_id, n in Counter(case.id for case in dataset.cases).items():
        if n > 1:
            files = [case.images[0] for case in dataset.cases if case.id == case_id]
            text = f"{n} cases have the id {case_id} ({', '.join(sorted({path.name for path in files}))})"
            yield Problem("duplicate_id", str(files[0]), text, "one", "Rename or remove one.")


def _unused(dataset: Dataset, files: Sequence[Path], usual: Sequence[str]) -> list[Path]:
    """Return the unused files in the folders of some files, if these folders have a usual name."""
    used = {path for case in dataset.cases for path in (*case.images, case.label)}
    folders = {path.parent for path in files}
    folders = {f for f in folders if f.parent == dataset.root and f.name.lower() in usual and f.is_dir()}
    return [path for folder in sorted(folders) for path in image_files(folder) if path not in used]


def _unused_images(dataset: Dataset, unlisted: set[str]) -> Iterator[Problem]:
    """Report images that no case uses; `unlisted` gets the names of those that are cases of their own."""
    ids = {case.id for case in dataset.cases}
    for path in _unused(dataset, [case.images[0] for case in dataset.cases], IMAGE_FOLDERS):
        case_id, _, number = stem(path).rpartition("_")
        other_ending = not path.name.lower().endswith(dataset.file_ending.lower())
        if dataset.layout == "nnunet_v2" and other_ending:
            text, fix = f"does not end with {dataset.file_ending}, and is left out", "Convert it, or remove it."
        elif case_id in ids and number.isdigit():
            found = f"a file for channel {int(number)} of case {case_id}"
            expected = f"{plural(len(dataset.channels), 'channel')} ({', '.join(dataset.channels)})"
            fix = "Name the channel in dataset.json, or remove the file."
            yield Problem("extra_channel", str(path), found, expected, fix)
            continue
        else:
            text, fix = "is not in the dataset", "List it in dataset.json, or remove it."
        unlisted |= {stem(path), case_id}
        yield Problem("extra_image", str(path), text, "", fix)


def _unused_labels(dataset: Dataset, unlisted: set[str]) -> Iterator[Problem]:
    """Report label maps that no case uses, except those of unlisted images."""
    labels = {case.id: case.label for case in dataset.cases if case.label}
    maps = _unused(dataset, list(labels.values()), LABEL_FOLDERS)
    for path in maps:
        owner = next((name for name in (stem(path), label_base(stem(path))) if name in labels), None)
        if owner is not None:
            listed = dataset.layout in ("msd", "nnunet_v1")
            if not listed and (stem(path) == owner) == (stem(labels[owner]) == owner):
                found = f"could be the label map of case {owner}, and {labels[owner].name} is taken"
                yield Problem("ambiguous_label", str(path), found, "one label map", "Remove one of the two.")
            else:
                found = f"is not used: {labels[owner].name} is the label map of case {owner}"
                yield Problem("extra_label", str(path), found, "", "Remove it if it is not needed.")
        elif stem(path) not in unlisted:
            fix = "Name it as its image, add the image, or remove it."
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
        Mixed dimensions, orientations and spacings, equal images, too few cases, and channels that may be CT.
    """
    known = [(case, found.geometry) for case, found in zip(dataset.cases, findings, strict=True) if found.geometry]
    yield from _dimensions(known)
    yield from _orientations(known, dataset.orientation)
    yield from _spacings(known)
    yield from _copies(dataset, findings)
    if len(dataset.cases) < FOLDS:
        text, expected = plural(len(dataset.cases), "case"), f"at least {FOLDS} for {FOLDS}-fold cross-validation"
        fix = "Train on all of them (fold `all`), or add cases."
        yield Problem("few_cases", str(dataset.root), text, expected, fix)
    for number, name in enumerate(dataset.channels):
        ranges = [found.ranges[number] for found in findings if len(found.ranges) == len(dataset.channels)]
        if ranges:
            yield from _hounsfield_units(dataset, name, ranges)


def _dimensions(known: Sequence[tuple[Case, Geometry]]) -> Iterator[Problem]:
    counts = Counter(geometry.dimensions for _, geometry in known)
    for case, geometry in known:
        usual = counts.most_common(1)[0][0]
        if geometry.dimensions != usual:
            text, fix = f"{geometry.dimensions} dimensions", "All images of a dataset must have the same."
            yield Problem("dimensions", str(case.images[0]), text, f"{usual} as most", fix)


def _orientations(known: Sequence[tuple[Case, Geometry]], required: str | None) -> Iterator[Problem]:
    """Report images whose axes point elsewhere than those of most, or than dataset.json requires."""
    usual = required or common_orientation(geometry.orientation for _, geometry in known)
    why = "as dataset.json asks" if required else "as most"
    for case, geometry in known:
        if geometry.orientation == usual or geometry.dimensions == 2:
            continue
        text, fix = f"stored as {geometry.orientation}", "It is turned on reading."
        if geometry.orientation is None:
            text, fix = "states no orientation", "It is taken as it is stored."
        yield Problem("orientation", str(case.images[0]), text, f"{usual} {why}", fix)


def _spacings(known: Sequence[tuple[Case, Geometry]]) -> Iterator[Problem]:
    """Report images that state no spacing if others do."""
    calibrated = sum(geometry.calibrated for _, geometry in known)
    for case, geometry in known:
        if calibrated and not geometry.calibrated:
            text = f"states no spacing, and {calibrated} of {plural(len(known), 'image')} do"
            fix = 'For a TIFF file give it in <case>.json: {"spacing": [z, y, x]} in mm.'
            yield Problem("no_spacing", str(case.images[0]), text, "", fix)


def _copies(dataset: Dataset, findings: Sequence[CaseFindings[Any]]) -> Iterator[Problem]:
    equal: dict[bytes, list[Case]] = defaultdict(list)
    for case, found in zip(dataset.cases, findings, strict=True):
        if found.digest:
            equal[found.digest].append(case)
    for first, *others in equal.values():
        for case in others:
            text = f"holds the same image as case {first.id}"
            fix = "Remove one: the same patient in training and validation makes scores too good."
            yield Problem("duplicate_case", str(case.images[0]), text, "", fix)


def _hounsfield_units(dataset: Dataset, name: str, ranges: Sequence[IntensityRange]) -> Iterator[Problem]:
    """Report a channel that looks like CT (Hounsfield units) without having that name, and the reverse."""
    like_ct = sum(-5000 <= r.low <= -900 and r.high >= 300 and r.whole for r in ranges)
    unlike_ct = sum(r.low >= 0 for r in ranges)
    text = f"channel {name} holds values {min(r.low for r in ranges):g} .. {max(r.high for r in ranges):g}"
    if name.lower() != "ct" and 2 * like_ct > len(ranges):
        how = "write a dataset.json that names" if dataset.layout == "plain" else "name"
        fix = f"If it is CT, {how} the channel CT, so that it is normalised as CT."
        yield Problem("looks_like_ct", str(dataset.table), f"{text}, which look like Hounsfield units", "", fix)
    if name.lower() == "ct" and 2 * unlike_ct > len(ranges):
        fix = "If it is not CT, or is rescaled, give the channel another name: CT is normalised as such."
        yield Problem("not_ct", str(dataset.table), f"{text}, which do not look like Hounsfield units", "", fix)
