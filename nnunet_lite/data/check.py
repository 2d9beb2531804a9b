"""All problems of a dataset in one report, from one pass over its files.

`check_dataset` reads each case once, in threads. A further use of the arrays (the fingerprint) is passed as `visit`, so
that no file is read twice. Problems that only all cases together show come from consistency.py.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nnunet_lite import log, system
from nnunet_lite.data.cases import Case, split_name, unsupported_files
from nnunet_lite.data.consistency import CaseFindings, ChannelRange, check_consistency, check_files, check_labels
from nnunet_lite.data.dataset import MASK_NOTE, Dataset, map_labels
from nnunet_lite.data.geometry import ACCEPTABLE, Geometry, nonzero_box, slices
from nnunet_lite.data.images import Image, read_geometry, read_image, read_label_image
from nnunet_lite.data.names import PICTURES, TIFF, stem, suffix_of
from nnunet_lite.data.nifti import form_conflict
from nnunet_lite.data.problems import Problem, Report, few, plural
from nnunet_lite.errors import UserError, suggest

T = TypeVar("T")
Visit = Callable[[Sequence[np.ndarray], Geometry, np.ndarray], T]

_BYTES_PER_VOXEL = 12  # while a case is checked: float32 as read, stacked, and masks
_VALUES_SAMPLED = 10_000  # of a channel
_SURROUNDS = 0.9  # share of the border of a label map that has the value around all others
_AVOIDED = 0.1  # share of the background on the border, of that in the whole label map, if it is what was outlined
_HEADER_FIX = "If the voxels do match, copy the image's header to the label map, else resample it onto the image."
_TILT_FIX = "Correct the tilt of the gantry: resample image and label map to a grid with right angles."
_UNKNOWN_VALUE_FIX = 'Add it to dataset.json ("ignore" for voxels without annotation), or resize without interpolation.'
_ACCEPT = " --accept-geometry takes the voxels as they are."
_READER_KINDS = {"not whole numbers": "label_fraction", "colour picture": "label_channels", "dimension": "dimensions"}


def check_dataset(
    dataset: Dataset,
    visit: Visit[T] | None = None,
    keep: Callable[[str, T], None] | None = None,
    workers: int | None = None,
) -> Report:
    """Read every file once and report all problems.

    Parameters
    ----------
    dataset : Dataset
        The dataset.
    visit : callable or None
        Called in a thread with channels (z, y, x), geometry and foreground mask (z, y, x) of each case without errors.
    keep : callable or None
        Called with the id of each such case and the result of `visit`, in the order of the cases.
    workers : int or None
        Threads, and therefore cases in memory. None for one per CPU of this process, 0 for none.

    Returns
    -------
    Report
        All problems.
    """
    findings: list[CaseFindings[T]] = []
    for found in log.progress(_check_cases(dataset, visit, workers), len(dataset.cases), "check"):
        if keep is not None and found.visited is not None:
            keep(dataset.cases[len(findings)].id, found.visited)
        found.visited = None
        findings.append(found)
    of_labels = list(check_labels(dataset, [found.values for found in findings]))
    kinds = {problem.kind for problem in of_labels}.difference(dataset.accept)
    notes = [note for note in dataset.notes if note != MASK_NOTE or "label_void" not in kinds]
    problems = [*check_files(dataset), *(Problem("understood", str(dataset.root), note) for note in notes)]
    hidden = ("label_value",) if "instances" in kinds else ()
    problems += [problem for found in findings for problem in found.problems if problem.kind not in hidden]
    problems += [*of_labels, *check_consistency(dataset, findings)]
    problems = [_relative(replace(p, accepted=p.kind in dataset.accept), dataset.root) for p in problems]
    excluded = tuple(case.id for case in dataset.excluded)
    return Report(dataset.name, len(dataset.cases), dataset.channels, tuple(problems), excluded)


def exclude_cases(dataset: Dataset, case_ids: Sequence[str]) -> Dataset:
    """Return the dataset without some cases.

    Raises
    ------
    UserError
        It has no such case, or no other.
    """
    known = [case.id for case in dataset.cases]
    for case_id in case_ids:
        if case_id not in known:
            raise UserError(f"--exclude {case_id!r} is no case", dataset.root, suggest(case_id, known, 0.4))
    kept = tuple(case for case in dataset.cases if case.id not in case_ids)
    if known and not kept:
        raise UserError("--exclude leaves out every case", dataset.root)
    return replace(dataset, cases=kept, excluded=tuple(case for case in dataset.cases if case.id in case_ids))


def broken_dataset(root: Path, error: UserError) -> Report:
    """Return the report of a folder that `read_dataset` refused.

    Parameters
    ----------
    root : Path
        The folder.
    error : UserError
        Why it was refused.

    Returns
    -------
    Report
        With one problem.
    """
    kind = "invalid_json" if "invalid JSON" in error.what else "invalid_dataset"
    problem = Problem(kind, str(root if error.file is None else error.file), error.what, "", error.fix)
    return Report(root.name, 0, (), (_relative(problem, root),))


def _relative(problem: Problem, root: Path) -> Problem:
    path = Path(problem.file)
    return replace(problem, file=str(path.relative_to(root))) if root in path.parents else problem


def _check_cases(dataset: Dataset, visit: Visit[T] | None, workers: int | None) -> Iterator[CaseFindings[T]]:
    threads = _threads(dataset) if workers is None else workers
    if threads == 0:
        yield from (_check_case(case, dataset, visit) for case in dataset.cases)
        return
    with ThreadPoolExecutor(threads) as pool:
        queue: deque[Future[CaseFindings[T]]] = deque()  # bounded, so that a slow case does not accumulate results
        for case in dataset.cases:
            queue.append(pool.submit(_check_case, case, dataset, visit))
            if len(queue) > 2 * threads:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def _threads(dataset: Dataset) -> int:
    """Return one thread per CPU of this process, or fewer if memory does not suffice for cases of the largest size."""
    sizes = {path: path.stat().st_size for case in dataset.cases for path in case.images[:1] if path.is_file()}
    try:
        geometry, channels = read_geometry(max(sizes, key=lambda path: sizes[path]))
    except (UserError, ValueError):  # the check reports what is wrong with that file, or that there is none
        return system.cpus()
    voxels = float(np.prod(geometry.shape)) * max(channels, len(dataset.channels))
    return system.cases_in_flight(int(voxels * _BYTES_PER_VOXEL), None)


# ------------------------------------------------------------------------------------------------------------- one case


def _check_case(case: Case, dataset: Dataset, visit: Visit[T] | None) -> CaseFindings[T]:
    found: CaseFindings[T] = CaseFindings()
    images = _read_channels(case, dataset, found)
    channels = _check_images(images, case, dataset, found) if len(images) == len(case.images) else None
    label = _check_label(case, dataset, images[0].geometry if channels else None, found)
    if channels is None or label is None:
        return found
    found.problems += _compare(case, images, label)
    foreground = label.array[0] != dataset.labels.background
    if foreground.shape == channels[0].shape:
        labelled = (
            foreground if dataset.labels.ignore is None else foreground & (label.array[0] != dataset.labels.ignore)
        )
        found.problems += _labels_outside(case, channels, labelled)
    if visit is not None and not any(p.stops and p.kind not in dataset.accept for p in found.problems):
        found.visited = visit(channels, images[0].geometry, foreground)
    return found


def _read_channels(case: Case, dataset: Dataset, found: CaseFindings[Any]) -> list[Image]:
    """Return the files of a case that can be read."""
    images = []
    for number, path in enumerate(case.images):
        if not path.exists():
            name = dataset.channels[number] if 1 < len(case.images) == len(dataset.channels) else "image"
            text = f"no file for {name} of case {case.id}"
            fix = f"Add the file, or leave out the case with --exclude {case.id}."
            found.problems.append(Problem("missing_image", str(path), text, "", fix))
            continue
        try:
            images.append(read_image(path, len(dataset.channels) // len(case.images)))
        except UserError as error:
            found.problems.append(_unreadable(error, path))
    return images


def _unreadable(error: UserError, path: Path) -> Problem:
    kind = next((kind for words, kind in _READER_KINDS.items() if words in error.what), "unreadable")
    return Problem(kind, str(path), error.what, "", error.fix)


def _check_images(
    images: list[Image], case: Case, dataset: Dataset, found: CaseFindings[Any]
) -> list[np.ndarray] | None:
    """Return the channels of a case if they are on one grid; to stack them would take as long as to read them."""
    found.geometry = images[0].geometry
    images = [image.aligned(images[0].geometry) for image in images]
    for path, image in zip(case.images[1:], images[1:], strict=True):
        for what, value, expected in image.geometry.differences(images[0].geometry):
            kind, more = (what, _ACCEPT) if what in ACCEPTABLE else ("grid", "")
            fix = "Register and resample all channels of a case to one grid, that of its label map." + more
            expected = f"{expected} as {case.images[0].name}"
            found.problems.append(Problem(kind, str(path), f"{what} {value}", expected, fix))
    for path, image in zip(case.images, images, strict=True):
        found.problems += [Problem("understood", str(path), note) for note in image.notes]
        if conflict := form_conflict(path, image.geometry):
            keep, change = ("qform", "sform") if conflict.startswith("its sform") else ("sform", "qform")
            fix = f"Make them equal, for example with nibabel: image.set_{change}(image.get_{keep}())."
            fix = _TILT_FIX if "sheared" in conflict else fix
            found.problems.append(Problem("forms", str(path), conflict, "", fix))
        if text := image.geometry.shear_in_words():
            found.problems.append(Problem("sheared", str(path), text, "", _TILT_FIX))
    if any(problem.kind == "grid" for problem in found.problems):
        return None
    channels = [channel for image in images for channel in image.array]
    if len(channels) != len(dataset.channels):
        expected = f"{len(dataset.channels)} ({', '.join(dataset.channels)})"
        fix = "Name the channels in dataset.json as they are in the files, or correct the file."
        name, number = split_name(stem(case.images[0]))
        if len(case.images) == 1 and number == 0:
            fix += f" Channels in files of their own are called {name}_0000, {name}_0001, ..."
        text = plural(len(channels), "channel")
        found.problems.append(Problem("channels", str(case.images[0]), text, expected, fix))
        return None
    digest = hashlib.sha256()
    files = [path for path, image in zip(case.images, images, strict=True) for _ in image.array]
    for channel, path, name in zip(channels, files, dataset.channels, strict=True):
        digest.update(np.ascontiguousarray(channel).data)
        values = _range_of(channel)
        found.problems += _check_values(channel, values, path, name)
        found.ranges.append(values)
    found.digest = digest.digest()
    return channels


def _check_values(channel: np.ndarray, values: ChannelRange, path: Path, name: str) -> Iterator[Problem]:
    """Report NaN and infinity, which show in the extremes, and constant images."""
    if not np.isfinite([values.low, values.high]).all():
        wrong = plural(int(channel.size - np.isfinite(channel).sum()), "voxel")
        fix = "Replace them, for example by 0 or by the lowest value of the image."
        yield Problem("nan", str(path), f"{wrong} of channel {name} NaN or infinite", "finite numbers", fix)
    elif values.low == values.high:
        fix = "Leave the case out if the image is lost."
        yield Problem("constant", str(path), f"every voxel of channel {name} is {values.low:g}", "an image", fix)


def _range_of(channel: np.ndarray) -> ChannelRange:
    low, high = float(channel.min()), float(channel.max())
    step = max(1, channel.size // _VALUES_SAMPLED)
    sample = channel.reshape(-1)[::step]  # most images have more values already here
    two_values = low < high and all(((x == low) | (x == high)).all() for x in (sample, channel))
    return ChannelRange(low, high, two_values)


def _check_label(case: Case, dataset: Dataset, like: Geometry | None, found: CaseFindings[Any]) -> Image | None:
    """Return the label map of a case as values of the dataset, turned to its image, if it can be read."""
    if case.label is None or not case.label.exists():
        path = str(case.label or case.images[0])
        others = unsupported_files(case.label.parent, case.id) if case.label else ""
        text = f"no label map for case {case.id}{others}"
        fix = f"Add it, or leave out the case with --exclude {case.id}."
        found.problems.append(Problem("missing_label", path, text, "", fix))
        return None
    try:
        label = read_label_image(case.label, like)
    except UserError as error:
        found.problems.append(_unreadable(error, case.label))
        return None
    path = str(case.label)
    if suffix_of(case.label) in (".jpg", ".jpeg"):
        text, fix = "a label map as JPEG, which changes values", "Store label maps as PNG or NIfTI."
        found.problems.append(Problem("label_lossy", path, text, "", fix))
        return None
    found.problems += [Problem("understood", path, note) for note in label.notes]
    found.values = {int(v) for v in np.unique(label.array[label.array != dataset.labels.background])}
    if found.values == {dataset.labels.ignore} and (label.array == dataset.labels.ignore).all():
        text, fix = f"holds only {dataset.labels.ignore}, the ignore value", "Leave it out: nothing is learnt from it."
        found.problems.append(Problem("not_annotated", path, text, "", fix))
    known = {v for v in (*dataset.labels.values, dataset.labels.ignore, *(dataset.value_map or ())) if v is not None}
    if unknown := sorted(found.values - known):
        voxels = plural(int(np.isin(label.array, unknown).sum()), "voxel")
        text = f"label value {few([str(value) for value in unknown], 5)} ({voxels})"
        legal = f"one of {', '.join(map(str, sorted(known)))}"
        found.problems.append(Problem("label_value", path, text, legal, _UNKNOWN_VALUE_FIX))
    label = replace(label, array=map_labels(label.array, dataset.value_map))
    found.surrounding = _surrounding_value(label.array[0], dataset.labels.background)
    return label


def _surrounding_value(label: np.ndarray, background: int) -> int | None:
    """Return the value on the border of a label map, unless the background is there too; None without background."""
    axes = [axis for axis, n in enumerate(label.shape) if n > 1]
    border = np.concatenate([label.take(side, axis).ravel() for axis in axes for side in (0, -1)] or [label.ravel()])
    inside = np.count_nonzero(label == background) / label.size
    if not inside or (border == background).mean() > _AVOIDED * inside:
        return background if inside else None
    values, counts = np.unique(border, return_counts=True)
    return int(values[counts.argmax()]) if counts.max() >= _SURROUNDS * border.size else background


def _labels_outside(case: Case, channels: Sequence[np.ndarray], labelled: np.ndarray) -> Iterator[Problem]:
    """Report labels that preprocessing cuts off with the zeros around the image: image and label map may not fit."""
    total = int(labelled.sum())
    if outside := total - int(labelled[slices(nonzero_box(channels))].sum()):
        share = f"{plural(outside, 'labelled voxel')} ({outside / total:.1%}) outside of the box"
        fix = "Open both: do they show the same place? What is outside of the box is not trained on."
        yield Problem("label_outside", str(case.label), f"{share} in which the image is not zero", "", fix)


def _compare(case: Case, images: list[Image], label: Image) -> Iterator[Problem]:
    """Report where a label map is on another grid than its image, or is stored in another order."""
    assert case.label is not None  # it was read
    path, geometry = str(case.label), images[0].geometry
    if geometry.oriented and not label.geometry.oriented and suffix_of(case.label) not in TIFF:
        text, fix = "states no orientation", "Its voxels are taken in the order of the image's."
        yield Problem("orientation", path, text, "that of its image", fix)
    files = [*zip(case.images, images, strict=True), (case.label, label)]
    tags = [(file, image.orientation_tag) for file, image in files if suffix_of(file) in PICTURES]
    for file, tag in tags[1:]:
        if tag != tags[0][1]:  # many programs ignore the tag, and draw the label map in another order
            expected = f"{tags[0][1]} as {tags[0][0].name}"
            fix = "Look whether label map and image match; save both without the tag if they do not."
            yield Problem("orientation_tag", str(file), f"orientation tag {tag}", expected, fix)
    for what, value, expected in label.geometry.differences(geometry):
        fix = "Save the label map with the grid of its image." if what == "shape" else _HEADER_FIX
        fix += _ACCEPT if what in ACCEPTABLE else ""
        yield Problem(what, path, f"{what} {value}", f"{expected} as its image", fix)
