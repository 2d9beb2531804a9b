"""Compare the reference of a case with held-out predictions, and try corrections that would make them agree.

A correction of the whole map, such as an exchange of two labels, and one of a place, such as a region that the models
see and the reference lacks, are measured in the same way: by the Dice that each class would have after it. `audit.py`
compares the corrections of all cases.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cc3d
import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from nnunet_lite.data.geometry import bounding_box, slices
from nnunet_lite.data.problems import plural

Kind = Literal[
    "left/right swap", "swapped labels", "flipped map", "shifted map", "map of another case", "missing structure",
    "slices without labels", "surplus structure", "other label", "boundary drift", "low agreement",
]  # fmt: skip
Place = tuple[int, int, int]

_AGREEING = 0.75  # share of the models that must predict the same
_THIN_SLICE = 0.25  # of the usual voxels of a label in a slice; a thinner end of it may well be left out
_LONG_GAP = 3  # slices at the end of a label
_FEW_VOXELS = 20  # smaller maps of two cases may be equal by chance
_MOST_REGIONS = 12  # of a case that are corrected one by one
_SIDE = re.compile(r"(?<![a-z])(left|right|l|r)(?![a-z])")


class Correction(NamedTuple):
    """A change of the reference that might make it more like the predictions.

    Parameters
    ----------
    kind : str
        What is wrong then.
    text : str
        The same in words.
    place : tuple of int
        A voxel (z, y, x) as stored.
    dice : ndarray
        Dice of each foreground class after it.
    label : int
        The class that it is about; 0 for all.
    depth : int
        Of a region: the distance of its deepest voxel from its border. Of slices between others: their number.
    moved : tuple of int
        Of a region: its class in the reference, the class that the models see, and its voxels.
    """

    kind: Kind
    text: str
    place: Place
    dice: np.ndarray
    label: int = 0
    depth: int = 0
    moved: tuple[int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """What held-out predictions say about the reference of a case.

    Parameters
    ----------
    case_id : str
        The case.
    counts : ndarray, shape (n, n)
        Voxels by class in the reference and in the predictions.
    corrections : tuple of Correction
        All that were tried.
    place : tuple of int
        The thickest contradiction, a voxel (z, y, x) as stored.
    digest : str
        Hash of the reference's foreground; empty for a small one.
    unit : {"voxel", "pixel"}
        What the map consists of.
    """

    case_id: str
    counts: np.ndarray
    corrections: tuple[Correction, ...]
    place: Place
    digest: str
    unit: Literal["voxel", "pixel"]


def collect_evidence(
    case_id: str, reference: np.ndarray, predictions: Sequence[np.ndarray], names: Sequence[str], ignore: int | None
) -> Evidence:
    """Compare the reference of a case with the predictions of models that hold it out.

    Parameters
    ----------
    case_id : str
        The case.
    reference : ndarray of int, shape (z, y, x)
        Classes; 0 is the background.
    predictions : sequence of ndarray
        Classes that each model predicts.
    names : sequence of str
        The name of each class, with the background.
    ignore : int or None
        The class of voxels that are not annotated.
    """
    voted, sure = majority_vote(predictions)
    if ignore is not None:
        hidden = reference == ignore
        reference, voted, sure = np.where(hidden, 0, reference), np.where(hidden, 0, voted), sure | hidden
    ends = zip(bounding_box((reference != 0) | (voted != 0)), reference.shape, strict=True)
    margins = [min(low, n - high) for (low, high), n in ends]  # equal on both sides, so that a flip stays in the crop
    box = tuple(slice(low, n - low) for low, n in zip(margins, reference.shape, strict=True))
    ours, theirs, known = (np.ascontiguousarray(array[box]) for array in (reference, voted, sure))
    pair = _Pair(ours, theirs, known, margins, names, "pixel" if reference.shape[0] == 1 else "voxel")
    wrong = pair.reference != pair.agreed
    depth = ndimage.distance_transform_cdt(wrong, "taxicab") if not wrong.all() else np.ones(wrong.shape, int)
    place = pair.place(np.unravel_index(int(depth.argmax()), depth.shape))
    corrections = (
        *_exchanges(pair, place), *_flips(pair, place), *_shifts(pair, place), *_absences(pair), *_gaps(pair),
        *_regions(pair, depth),
    )  # fmt: skip
    return Evidence(case_id, pair.counts, corrections, place, _digest(pair.reference), pair.unit)


def majority_vote(predictions: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the class that most models predict, and where enough of them do.

    Parameters
    ----------
    predictions : sequence of ndarray of int, shape (z, y, x)
        Classes that each model predicts.

    Returns
    -------
    voted : ndarray of int
        Classes; any one where not enough models agree.
    sure : ndarray of bool
        Whether they do.
    """
    voted, differ = predictions[0].copy(), np.zeros(predictions[0].shape, bool)
    for other in predictions[1:]:
        differ |= other != voted
    votes = np.sort(np.stack([one[differ] for one in predictions]), axis=0)
    voted[differ] = votes[len(votes) // 2]  # a class with most of the votes is there
    sure = ~differ
    sure[differ] = (votes == voted[differ]).sum(axis=0) >= _AGREEING * len(votes)
    return voted, sure


def count_pairs(reference: np.ndarray, prediction: np.ndarray, n: int) -> np.ndarray:
    """Count the voxels of each pair of classes.

    Parameters
    ----------
    reference, prediction : ndarray of int, shape (z, y, x)
        Classes below n.
    n : int
        Number of classes.

    Returns
    -------
    ndarray of int, shape (n, n)
        By class in the reference and in the prediction.
    """
    counts = np.zeros(n * n, np.int64)
    for own, other in zip(reference, prediction, strict=True):
        counts += np.bincount((own * np.intp(n) + other).ravel(), minlength=n * n)
    return counts.reshape(n, n)


def dice_of_counts(counts: np.ndarray) -> np.ndarray:
    """Return Dice of each foreground class; NaN for one that neither map has.

    Parameters
    ----------
    counts : ndarray, shape (n, n)
        From `count_pairs`.
    """
    total = (counts.sum(0) + counts.sum(1))[1:]
    return np.where(total > 0, 2 * counts.diagonal()[1:] / np.maximum(total, 1), np.nan)


def dice_after(counts: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Return Dice after some voxels of the reference got the class that the models see.

    Parameters
    ----------
    counts : ndarray, shape (n, n)
        From `count_pairs`.
    moved : ndarray, shape (n, n)
        Those of the voxels, counted in the same way.
    """
    return dice_of_counts(counts - moved + np.diag(moved.sum(0)))


class _Pair:
    """The reference and the vote of the models, cropped to the foreground of both."""

    def __init__(
        self, reference: np.ndarray, voted: np.ndarray, sure: np.ndarray, corner: Sequence[int], names: Sequence[str],
        unit: Literal["voxel", "pixel"],
    ) -> None:  # fmt: skip
        self.reference, self.voted, self.sure, self.corner, self.names = reference, voted, sure, corner, names
        self.unit = unit
        self.agreed = self.agreeing_with(reference)
        self.counts = count_pairs(reference, self.agreed, len(names))
        self.axes = [axis for axis, size in enumerate(reference.shape) if size > 1]
        self.profiles = {axis: _profile(reference, axis, len(names)) for axis in self.axes}

    def agreeing_with(self, reference: np.ndarray) -> np.ndarray:
        """Return the vote where the models agree; a reference has the benefit of the doubt elsewhere."""
        return np.where(self.sure, self.voted, reference).astype(reference.dtype, copy=False)

    def dice_of(self, reference: np.ndarray) -> np.ndarray:
        """Return Dice of a corrected reference."""
        return dice_of_counts(count_pairs(reference, self.agreeing_with(reference), len(self.names)))

    def place(self, voxel: Sequence[Any]) -> Place:
        """Return a voxel of the crop as one of the image."""
        z, y, x = (int(low + n) for low, n in zip(self.corner, voxel, strict=True))
        return z, y, x

    def middle(self, mask: np.ndarray) -> Place:
        """Return the voxel of a mask of the crop that is nearest to its centre."""
        voxels = np.argwhere(mask)
        return self.place(voxels[np.square(voxels - voxels.mean(0)).sum(1).argmin()])


def _exchanges(pair: _Pair, place: Place) -> Iterator[Correction]:
    """Give each class of the reference the name under which it agrees best."""
    counts, names = pair.counts, pair.names
    totals = counts.sum(1)[1:, None] + counts.sum(0)[None, 1:]
    best = [0, *(linear_sum_assignment(-counts[1:, 1:] / np.maximum(totals, 1))[1] + 1)]
    moved = [k for k, other in enumerate(best) if k != other and counts[k].any()]
    if moved:
        sided = all(_other_side(names[k]) == names[best[k]].lower() for k in moved)
        text = " and ".join(names[k] for k in moved) + " are exchanged"
        if len(moved) != 2:
            text = "; ".join(f"{names[k]} is where the models see {names[best[k]]}" for k in moved)
        dice = pair.dice_of(np.asarray(best, pair.reference.dtype)[pair.reference])
        yield Correction("left/right swap" if sided else "swapped labels", text, place, dice)


def _other_side(name: str) -> str:
    """Exchange left and right in the name of a label, in lower case."""
    sides = {"left": "right", "right": "left", "l": "r", "r": "l"}
    return _SIDE.sub(lambda word: sides[word[0]], name.lower())


def _flips(pair: _Pair, place: Place) -> Iterator[Correction]:
    """Flip the whole map along each axis."""
    for axis in pair.axes:
        text = f"the map fits if it is flipped along {'zyx'[axis]}"
        yield Correction("flipped map", text, place, pair.dice_of(np.flip(pair.reference, axis)))


def _shifts(pair: _Pair, place: Place) -> Iterator[Correction]:
    """Move the reference to where its voxels of each class in each slice fit best, along each axis alone."""
    sure, n, steps = np.where(pair.sure, pair.voted, 0), len(pair.names), [0, 0, 0]
    for axis in pair.axes:
        own, models = pair.profiles[axis], _profile(sure, axis, n)
        fits = [np.correlate(models[:, k], own[:, k], "full") for k in range(1, n)]
        steps[axis] = int(np.sum(fits, axis=0).argmax()) - len(own) + 1
    if any(steps):
        by = " and ".join(f"{step:+d} along {axis}" for step, axis in zip(steps, "zyx", strict=True) if step)
        moved = ndimage.shift(pair.reference, steps, order=0)
        yield Correction(
            "shifted map", f"the map fits if it is moved by {by} ({pair.unit}s)", place, pair.dice_of(moved)
        )


def _profile(array: np.ndarray, axis: int, n: int) -> np.ndarray:
    """Count the voxels of each foreground class in each slice along an axis (slices, n); at 0 those of all."""
    counts = np.stack([np.bincount(one.ravel(), minlength=n) for one in np.moveaxis(array, axis, 0)])
    counts[:, 0] = counts[:, 1:].sum(1)
    return counts


def _absences(pair: _Pair) -> Iterator[Correction]:
    """Add a class that the reference does not have at all."""
    for k in np.flatnonzero((pair.counts.sum(1) == 0) & (pair.counts.sum(0) > 0)).tolist():
        moved = np.zeros_like(pair.counts)
        moved[:, k] = pair.counts[:, k]
        text = f"{pair.names[k]} is nowhere, and the models see {plural(int(moved.sum()), pair.unit)} of it"
        yield Correction("missing structure", text, pair.middle(pair.agreed == k), dice_after(pair.counts, moved), k)


def _gaps(pair: _Pair) -> Iterator[Correction]:
    """Fill runs of slices that have no voxel of a class, or of any (0), in which the models see it."""
    n = len(pair.names)
    for axis in pair.axes if len(pair.axes) > 2 else ():  # a picture has no slices
        own, models = (np.moveaxis(array, axis, 0) for array in (pair.reference, pair.agreed))
        has, seen = pair.profiles[axis], _profile(pair.agreed, axis, n)
        for k in np.flatnonzero(has.any(0) & seen.any(0)).tolist():
            first, last = np.flatnonzero(has[:, k])[[0, -1]]
            thin = _THIN_SLICE * np.median(seen[seen[:, k] > 0, k])
            empty = (has[:, k] == 0) & (seen[:, k] >= thin)
            empty[first:last] = (has[first:last, k] == 0) & (seen[first:last, k] > 0)
            for start, stop in np.flatnonzero(np.diff(empty, prepend=False, append=False)).reshape(-1, 2).tolist():
                lacking = (own[start:stop] == 0) & ((models[start:stop] == k) if k else (models[start:stop] != 0))
                length = stop - start if first < start < last else 0
                if lacking.sum() < max(seen[start:stop, k].sum() / 2, thin * (stop - start)):
                    continue  # it has another label there, or the models see but a speck between two parts of it
                if not length and stop - start < _LONG_GAP:
                    continue  # it ends a little earlier
                moved = np.zeros_like(pair.counts)
                moved[0] = np.bincount(models[start:stop][lacking], minlength=n)
                part = np.zeros(pair.agreed.shape, bool)
                np.moveaxis(part, axis, 0)[start:stop] = lacking
                low, name = pair.corner[axis] + start, pair.names[k] if k else "every label"
                ends = f"{'zyx'[axis]} = {low} to {low + stop - start - 1}"
                text = f"{name} is missing in {plural(stop - start, 'slice')}, {ends}"
                yield Correction(
                    "slices without labels", text, pair.middle(part), dice_after(pair.counts, moved), k, length
                )


def _regions(pair: _Pair, depth: np.ndarray) -> Iterator[Correction]:
    """Correct each thick region in which the reference has one class and the models see another."""
    n, names = len(pair.names), pair.names
    wrong, kinds = depth > 0, np.zeros(depth.shape, np.uint32)
    kinds[wrong] = pair.reference[wrong] * np.uint32(n) + pair.agreed[wrong]
    regions = cc3d.connected_components(kinds, connectivity=6)
    sizes, boxes = np.bincount(regions[wrong]), ndimage.find_objects(regions)
    for number in sorted(np.unique(regions[depth > 1]), key=lambda one: -sizes[one])[:_MOST_REGIONS]:
        box = boxes[number - 1]
        voxels = np.argwhere(regions[box] == number) + [side.start for side in box]
        depths = depth[tuple(voxels.T)]
        deepest = voxels[depths.argmax()]
        a, b = int(pair.reference[tuple(deepest)]), int(pair.agreed[tuple(deepest)])
        kind, text = describe_region(a, b, len(voxels), pair.unit, names)
        moved = np.zeros_like(pair.counts)
        moved[a, b] = len(voxels)
        dice, thickness = dice_after(pair.counts, moved), int(depths.max())
        yield Correction(kind, text, pair.place(deepest), dice, b or a, thickness, (a, b, len(voxels)))


def describe_region(own: int, seen: int, n: int, unit: str, names: Sequence[str]) -> tuple[Kind, str]:
    """Return the kind of a region that has one class in the reference and another one in the predictions, and a text.

    Parameters
    ----------
    own, seen : int
        The classes.
    n : int
        Its voxels.
    unit : str
        What these are called.
    names : sequence of str
        The name of each class, with the background.
    """
    size = plural(n, unit)
    if own == 0:
        return "missing structure", f"{size} of {names[seen]} are missing"
    text = f"{size} are labelled {names[own]}, and the models see {names[seen] if seen else 'nothing'}"
    return "other label" if seen else "surplus structure", text


def _digest(reference: np.ndarray) -> str:
    """Hash the foreground of a reference; empty for so few voxels that those of two cases may be equal."""
    foreground = np.ascontiguousarray(reference[slices(bounding_box(reference))])
    few = np.count_nonzero(foreground) < _FEW_VOXELS
    return "" if few else hashlib.sha256(f"{foreground.shape}".encode() + foreground.tobytes()).hexdigest()
