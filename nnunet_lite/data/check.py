"""Every problem of a data set in one report, found in one pass over its files.

A second look at each case (the fingerprint) is handed in as `visit`, so that no file is read twice.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from nnunet_lite import system
from nnunet_lite.data.cases import Case, split_name, unsupported
from nnunet_lite.data.dataset import Dataset, map_labels
from nnunet_lite.data.file_list import check_files
from nnunet_lite.data.formats import forms_apart
from nnunet_lite.data.geometry import ACCEPTABLE, Geometry, common_orientation
from nnunet_lite.data.images import Image, read_geometry, read_image, read_label, stem, suffix_of
from nnunet_lite.data.label_values import MASK_NOTE, check_labels, correction
from nnunet_lite.data.names import TIFF
from nnunet_lite.data.problems import Problem, Report, few, plural
from nnunet_lite.data.tiff import orientation_tag
from nnunet_lite.errors import UserError

T = TypeVar("T")
Visit = Callable[[np.ndarray, Geometry, np.ndarray], T]
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

FOLDS = 5
_BYTES_PER_VOXEL = 12  # while a case is checked: float32 as read, stacked, and masks


@dataclass(frozen=True)
class Range:
    """The values of one channel of one case."""

    low: float
    high: float
    whole: bool


@dataclass
class CaseFindings(Generic[T]):
    """What the pass keeps of a case once its arrays are gone."""

    problems: list[Problem] = field(default_factory=list)
    geometry: Geometry | None = None
    ranges: list[Range] = field(default_factory=list)
    values: set[int] | None = None
    digest: bytes = b""
    visited: T | None = None


def check_dataset(
    dataset: Dataset,
    visit: Visit[T] | None = None,
    keep: Callable[[str, T], None] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read every file once and report all problems.

    Parameters
    ----------
    visit : called with image (channels, z, y, x), geometry and foreground mask (z, y, x) of each case that is sound, in
        a thread.
    keep : called with the id of each such case and what `visit` returned, in the order of the cases.
    workers : threads, hence cases in memory; None for one per CPU this process may use, 0 for none.
    progress : wraps the loop over the cases, such as `nnunet_lite.log.progress`.
    """
    found: list[CaseFindings[T]] = []
    results = _each_case(dataset, visit, workers)
    for findings in progress(results, len(dataset.cases), "check") if progress else results:
        if keep is not None and findings.visited is not None:
            keep(dataset.cases[len(found)].id, findings.visited)
        findings.visited = None
        found.append(findings)
    problems = [*check_files(dataset)]
    of_labels = [*check_labels(dataset, [findings.values for findings in found])]
    instances = any(problem.kind == "instances" for problem in of_labels)  # which no list of values would correct
    void = any(255 in (findings.values or ()) for findings in found)  # then 255 is no other form of 1
    notes = [note for note in dataset.notes if not (void and note == MASK_NOTE)]
    problems += [Problem("understood", str(dataset.root), note) for note in notes]
    problems += [p for findings in found for p in findings.problems if not (instances and p.kind == "label_value")]
    problems += of_labels
    problems += [*_dimensions(dataset, found), *_orientations(dataset, found), *_without_spacing(dataset, found)]
    problems += [*_across_cases(dataset, found), *_intensity_units(dataset, found)]
    problems = [_relative(problem, dataset.root) for problem in problems]
    return Report(dataset.name, len(dataset.cases), dataset.channels, tuple(problems), dataset.accept_geometry)


def broken_dataset(root: Path, error: UserError) -> Report:
    """The report of a folder that `read_dataset` refused."""
    where = root if error.file is None else Path(error.file)
    problem = _unread(error, where, "invalid_json" if "invalid JSON" in error.what else "invalid_dataset")
    return Report(root.name, 0, (), (_relative(problem, root),))


def _each_case(dataset: Dataset, visit: Visit[T] | None, workers: int | None) -> Iterator[CaseFindings[T]]:
    threads = _threads(dataset) if workers is None else workers
    if threads == 0:
        yield from (_check_case(case, dataset, visit) for case in dataset.cases)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[CaseFindings[T]]] = deque()  # bounded: one slow case piles up nothing
        for case in dataset.cases:
            ahead.append(pool.submit(_check_case, case, dataset, visit))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _threads(dataset: Dataset) -> int:
    """One per CPU that this process may use, but no more than there is memory for cases of the largest size."""
    sizes = {path: path.stat().st_size for case in dataset.cases for path in case.images[:1] if path.is_file()}
    try:
        geometry, channels = read_geometry(max(sizes, key=lambda path: sizes[path]))
    except (UserError, ValueError):  # the pass itself will tell what is wrong with that file, or that there is none
        return system.cpus()
    voxels = float(np.prod(geometry.shape)) * max(channels, len(dataset.channels))
    return system.cases_in_flight(int(voxels * _BYTES_PER_VOXEL), None)


# ------------------------------------------------------------------------------------------------------------- one case


def _check_case(case: Case, dataset: Dataset, visit: Visit[T] | None) -> CaseFindings[T]:
    out: CaseFindings[T] = CaseFindings()
    image = _check_images(case, dataset, out)
    label = _check_label(case, dataset, image.geometry if image else None, out)
    if image is None or label is None:
        return out
    values, geometry = label
    assert case.label is not None  # it was read
    if image.geometry.oriented and not geometry.oriented and suffix_of(case.label) not in TIFF:
        text, fix = "states no orientation", "Its voxels are taken in the order of the image's."
        out.problems.append(Problem("orientation", str(case.label), text, "that of its image", fix))
    out.problems += _tags_apart(case)
    for what, found, expected in geometry.differences(image.geometry):
        fix = "Save the label map with the grid of its image." if what == "shape" else _HEADER_FIX
        fix += _ACCEPT if what in ACCEPTABLE else ""
        out.problems.append(Problem(what, str(case.label), f"{what} {found}", f"{expected} as its image", fix))
    if visit is not None and not any(problem.stops(dataset.accept_geometry) for problem in out.problems):
        out.visited = visit(image.array, image.geometry, values != dataset.labels.background)
    return out


def _tags_apart(case: Case) -> Iterator[Problem]:
    """TIFF files of a case whose orientation tags differ: many programs ignore the tag, and draw another way round."""
    files = [path for path in (*case.images, case.label) if path is not None and suffix_of(path) in TIFF]
    tags = {path: orientation_tag(path) for path in files}
    for path in files[1:]:
        if tags[path] != tags[files[0]]:
            text, wanted = f"orientation tag {tags[path]}", f"{tags[files[0]]} as {files[0].name}"
            fix = "Look whether label map and image match; save both without the tag if they do not."
            yield Problem("orientation_tag", str(path), text, wanted, fix)


_HEADER_FIX = "If the voxels do match, copy the image's header to the label map, else resample it onto the image."
_ACCEPT = " --accept-geometry takes the voxels as they are."


def _check_images(case: Case, dataset: Dataset, out: CaseFindings[Any]) -> Image | None:
    """The image of a case where it is sound enough to go on with."""
    images = _read_channels(case, dataset, out)
    if len(images) < len(case.images):
        return None
    out.geometry = images[0].geometry
    images = [image.aligned(images[0].geometry) for image in images]
    fix = "Register and resample all channels of a case to one grid."
    for path, image in zip(case.images[1:], images[1:], strict=True):
        for what, found, expected in image.geometry.differences(images[0].geometry):
            wanted = f"{expected} as {case.images[0].name}"
            kind, more = (what, _ACCEPT) if what in ACCEPTABLE else ("grid", "")
            out.problems.append(Problem(kind, str(path), f"{what} {found}", wanted, fix + more))
    for path, image in zip(case.images, images, strict=True):
        out.problems += [Problem("understood", str(path), note) for note in image.notes]
        if apart := forms_apart(path, image.geometry):
            fix = "Make them equal, for example with nibabel: image.set_qform(image.get_sform())."
            out.problems.append(Problem("forms", str(path), apart, "", fix))
    if any(problem.kind == "grid" for problem in out.problems):
        return None
    array = images[0].array if len(images) == 1 else np.concatenate([image.array for image in images])
    if len(array) != len(dataset.channels):
        wanted = f"{len(dataset.channels)} ({', '.join(dataset.channels)})"
        fix = "Name the channels in dataset.json as they are in the files, or correct the file."
        name, number = split_name(stem(case.images[0]))
        if len(case.images) == 1 and number == 0:
            fix += f" Channels in files of their own are called {name}_0000, {name}_0001, ..."
        out.problems.append(Problem("channels", str(case.images[0]), plural(len(array), "channel"), wanted, fix))
        return None
    out.digest = hashlib.sha256(array.data).digest()
    files = [path for path, image in zip(case.images, images, strict=True) for _ in image.array]
    for channel, path, name in zip(array, files, dataset.channels, strict=True):
        out.problems += _check_values(channel, path, name, out)
    return Image(array, images[0].geometry)


def _read_channels(case: Case, dataset: Dataset, out: CaseFindings[Any]) -> list[Image]:
    """The files of a case that can be read."""
    images = []
    for number, path in enumerate(case.images):
        if not path.exists():
            name = dataset.channels[number] if 1 < len(case.images) == len(dataset.channels) else "image"
            text = f"no file for {name} of case {case.id}"
            out.problems.append(Problem("missing_image", str(path), text, "", "Add the file, or leave out the case."))
            continue
        try:
            images.append(read_image(path, len(dataset.channels) // len(case.images)))
        except UserError as error:
            out.problems.append(_unread(error, path, "unreadable"))
    return images


def _check_values(channel: np.ndarray, path: Path, name: str, out: CaseFindings[Any]) -> Iterator[Problem]:
    """NaN and infinity, both of which show in the extremes, and constant images."""
    low, high = float(channel.min()), float(channel.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        wrong = int(channel.size - np.isfinite(channel).sum())
        fix = "Replace them, for example by 0 or by the lowest value of the image."
        yield Problem(
            "nan", str(path), f"{plural(wrong, 'voxel')} of channel {name} NaN or infinite", "finite numbers", fix
        )
        return
    if low == high:
        fix = "Leave the case out if the image is lost."
        yield Problem("constant", str(path), f"every voxel of channel {name} is {low:g}", "an image", fix)
    some = channel.ravel()[:: max(1, channel.size // 10_000)]
    out.ranges.append(Range(low, high, bool((some == np.rint(some)).all())))


def _check_label(
    case: Case, dataset: Dataset, like: Geometry | None, out: CaseFindings[Any]
) -> tuple[np.ndarray, Geometry] | None:
    """The label map of a case as values of the dataset, aligned with its image, where it can be read."""
    if case.label is None or not case.label.exists():
        where = str(case.label or case.images[0])
        fix = "Add it, or leave out the case."
        strange = unsupported(case.label.parent, case.id) if case.label else ""
        out.problems.append(Problem("missing_label", where, f"no label map for case {case.id}{strange}", "", fix))
        return None
    try:
        label, geometry, notes = read_label(case.label, like)
    except UserError as error:
        out.problems.append(_unread(error, case.label, "unreadable"))
        return None
    if suffix_of(case.label) in (".jpg", ".jpeg"):
        found, fix = "a label map as JPEG, which changes values", "Store label maps as PNG or NIfTI."
        out.problems.append(Problem("label_lossy", str(case.label), found, "", fix))
        return None
    label = map_labels(label, dataset.label_map)
    out.problems += [Problem("understood", str(case.label), note) for note in notes]
    out.values = {int(v) for v in np.unique(label[label != dataset.labels.background])}
    known = {*dataset.labels.values, dataset.labels.ignore}
    unknown = sorted(out.values - known)
    if unknown:
        voxels = int(np.isin(label, unknown).sum())
        found = f"label value {few([str(value) for value in unknown], 5)} ({plural(voxels, 'voxel')})"
        legal = ", ".join(str(v) for v in sorted(v for v in known if v is not None))
        out.problems.append(Problem("label_value", str(case.label), found, f"one of {legal}", correction(unknown)))
    return label, geometry


def _unread(error: UserError, path: Path, kind: str) -> Problem:
    """A reader's complaint as a problem: what it found, and what to do."""
    if kind == "unreadable":
        words = {"not whole numbers": "label_fraction", "colour picture": "label_channels", "dimension": "dimensions"}
        kind = next((other for word, other in words.items() if word in error.what), kind)
    return Problem(kind, str(path), error.what, "", error.fix)


# --------------------------------------------------------------------------------------------------------- all of them


def _dimensions(dataset: Dataset, found: list[CaseFindings[Any]]) -> Iterator[Problem]:
    """Two- and three-dimensional images in one dataset."""
    known = [findings.geometry.dimensions for findings in found if findings.geometry]
    if not known:
        return
    usual = Counter(known).most_common(1)[0][0]
    for case, findings in zip(dataset.cases, found, strict=True):
        if findings.geometry and findings.geometry.dimensions != usual:
            text = f"{findings.geometry.dimensions} dimensions"
            fix = "All images of a dataset must have the same."
            yield Problem("dimensions", str(case.images[0]), text, f"{usual} as most", fix)


def _orientations(dataset: Dataset, found: list[CaseFindings[Any]]) -> Iterator[Problem]:
    """Images whose axes point elsewhere than those of most, or than dataset.json asks for."""
    own = [findings.geometry.orientation if findings.geometry else None for findings in found]
    wanted = dataset.orientation or common_orientation(own)
    why = "as dataset.json asks" if dataset.orientation else "as most"
    for case, findings, orientation in zip(dataset.cases, found, own, strict=True):
        if orientation == wanted or findings.geometry is None or findings.geometry.dimensions == 2:
            continue
        text, fix = f"stored as {orientation}", "It is turned on reading."
        if orientation is None:
            text, fix = "states no orientation", "It is taken as it is stored."
        yield Problem("orientation", str(case.images[0]), text, f"{wanted} {why}", fix)


def _without_spacing(dataset: Dataset, found: list[CaseFindings[Any]]) -> Iterator[Problem]:
    """Images that state no spacing where others do."""
    known = [findings.geometry.calibrated for findings in found if findings.geometry]
    for case, findings in zip(dataset.cases, found, strict=True):
        if any(known) and findings.geometry and not findings.geometry.calibrated:
            text = f"states no spacing, and {known.count(True)} of {plural(len(known), 'image')} do"
            fix = 'For a TIFF file give it in <case>.json: {"spacing": [z, y, x]} in mm.'
            yield Problem("no_spacing", str(case.images[0]), text, "", fix)


def _across_cases(dataset: Dataset, found: list[CaseFindings[Any]]) -> Iterator[Problem]:
    """Equal images, too few cases."""
    same: dict[bytes, list[Case]] = defaultdict(list)
    for case, findings in zip(dataset.cases, found, strict=True):
        if findings.digest:
            same[findings.digest].append(case)
    for first, *others in same.values():
        for case in others:
            text = f"holds the same image as case {first.id}"
            fix = "Remove one: the same patient in training and validation makes scores too good."
            yield Problem("duplicate_case", str(case.images[0]), text, "", fix)
    if len(dataset.cases) < FOLDS:
        text = plural(len(dataset.cases), "case")
        fix = "Train on all of them (fold `all`), or add cases."
        yield Problem("few_cases", str(dataset.root), text, f"at least {FOLDS} for {FOLDS}-fold cross-validation", fix)


def _intensity_units(dataset: Dataset, found: list[CaseFindings[Any]]) -> Iterator[Problem]:
    """Channels that look like CT (Hounsfield units) without being called so, and the reverse."""
    for number, name in enumerate(dataset.channels):
        ranges = [findings.ranges[number] for findings in found if len(findings.ranges) == len(dataset.channels)]
        if not ranges:
            continue
        hounsfield = sum(-5000 <= r.low <= -900 and r.high >= 300 and r.whole for r in ranges)
        unlike = sum(r.low >= 0 for r in ranges)
        text = f"channel {name} holds values {min(r.low for r in ranges):g} .. {max(r.high for r in ranges):g}"
        table = str(dataset.root / "dataset.json" if dataset.layout != "plain" else dataset.root)
        if name.lower() != "ct" and 2 * hounsfield > len(ranges):
            where = "write a dataset.json that names" if dataset.layout == "plain" else "name"
            fix = f"If it is CT, {where} the channel CT, so that it is normalised as CT."
            yield Problem("looks_like_ct", table, f"{text}, which look like Hounsfield units", "", fix)
        if name.lower() == "ct" and 2 * unlike > len(ranges):
            fix = "If it is no CT, or is rescaled, give the channel another name: CT is normalised as such."
            yield Problem("not_ct", table, f"{text}, which do not look like Hounsfield units", "", fix)


def _relative(problem: Problem, root: Path) -> Problem:
    path = Path(problem.file)
    file = str(path.relative_to(root)) if path.is_relative_to(root) and path != root else problem.file
    return Problem(problem.kind, file, problem.found, problem.expected, problem.fix)
