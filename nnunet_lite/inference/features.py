"""Cheap features of a prediction, from which its quality is judged: of the image, of each label, of the entropy map.

All are plain numbers. `quality.py` compares them with those of the held-out cases of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import cc3d
import numpy as np

from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.labels import Labels
from nnunet_lite.inference.outputs import ENTROPY, OF_MODELS, STEPS
from nnunet_lite.preprocessing.pipeline import Preprocessed

Values = dict[str, float]

FEATURES = 1  # counts the changes of what is computed here: what was calibrated with other features is made again

AXES = ("z", "y", "x")
_BLOCK = 32  # voxels of an axis of a block in which neighbours are compared
_BLOCKS = 4  # blocks along each axis, at most
_GRID = 16  # voxels of an axis of the coarse image in which trends are fitted
_PERIODS = (2, 3, 4, 5, 6)
_FEWEST_LINES = 24  # voxels of an axis, from which its spectrum is compared
_PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
_MARGIN = 2  # voxels around a label in which its border is searched
_SMALL = 1e-6
_SLAB = 2**22  # voxels of a label map that are described at a time


@dataclass(frozen=True)
class CaseFeatures:
    """What is known of a prediction without its reference.

    Parameters
    ----------
    image : dict of str to float
        Of the image, as from `describe_image`.
    labels : dict of str to dict
        Of each label or region, as from `describe_labels`.
    axes : tuple of str
        The axes of the image as it is stored that its features call z, y and x, after it was turned.
    """

    image: Values
    labels: dict[str, Values]
    axes: tuple[str, ...] = AXES


def describe_prediction(
    array: Preprocessed, label_map: np.ndarray, maps: Mapping[str, np.ndarray], labels: Labels
) -> CaseFeatures:
    """Describe a prediction, in the orientation in which the network takes the image.

    Parameters
    ----------
    array : Preprocessed
        The image as the network takes it.
    label_map : ndarray of int, shape (z, y, x)
        As it was predicted, before postprocessing.
    maps : mapping of str to ndarray of uint8, shape (z, y, x)
        Entropy, and of several models their disagreement.
    labels : Labels
        Names of the values.
    """
    turn = array.placement.turn
    geometry = array.placement.geometry.turned(turn)
    turned = {name: turn.apply(values) for name, values in maps.items()}
    return CaseFeatures(
        image=describe_image(array.image, geometry),
        labels=describe_labels(turn.apply(label_map), turned, geometry, labels),
        axes=tuple(AXES[axis] for axis in turn.order),
    )


def describe_image(array: np.ndarray, geometry: Geometry) -> Values:
    """Describe a preprocessed image: its size, intensities, sharpness and noise, trends and repetitions.

    Parameters
    ----------
    array : ndarray, shape (channels, z, y, x)
        As the network takes it: normalised and resampled.
    geometry : Geometry
        Of the image, before it was resampled.

    Returns
    -------
    dict of str to float
        WHAT/AXIS of the image (a picture has no z) and CHANNEL/WHAT/... of each channel. Lengths are logarithms of mm,
        intensities are normalised ones.
    """
    axes = list(zip(AXES, geometry.spacing, geometry.shape, strict=True))[-geometry.dimensions :]
    features = {f"spacing/{axis}": float(np.log(size)) for axis, size, _ in axes}
    features |= {f"extent/{axis}": float(np.log(size * n)) for axis, size, n in axes}
    for number, channel in enumerate(array):
        blocks = _blocks(channel)
        found = {**_intensities(blocks), **_texture(blocks), **_trends(channel), **_combs(channel)}
        features |= {f"{number}/{name}": float(value) for name, value in found.items()}
    return features


def _blocks(channel: np.ndarray) -> np.ndarray:
    """Cut blocks (n, z, y, x) out of an image, evenly spaced; a small image gives one, from its middle."""
    size = [min(_BLOCK, n) for n in channel.shape]
    numbers = [min(_BLOCKS, n // s) for n, s in zip(channel.shape, size, strict=True)]
    starts = [
        np.linspace(0, n - s, number + 2)[1:-1].astype(int)
        for n, s, number in zip(channel.shape, size, numbers, strict=True)
    ]
    corners = product(*starts)
    return np.stack([channel[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] for corner in corners])


def _intensities(blocks: np.ndarray) -> Values:
    return {f"intensity/{p}": v for p, v in zip(_PERCENTILES, np.percentile(blocks, _PERCENTILES), strict=True)}


def _texture(blocks: np.ndarray) -> Values:
    """Compare neighbours along each axis: noise makes their differences larger, blur and thick slices smaller.

    The second difference of white noise is sqrt(3) times the first, that of a smooth image is much smaller.
    """
    spread = np.subtract(*np.percentile(blocks, (95, 5))) + _SMALL
    features = {}
    for number, axis in enumerate(AXES, start=1):
        if blocks.shape[number] < 3:
            continue
        first = np.abs(np.diff(blocks, axis=number))
        second = np.abs(np.diff(blocks, n=2, axis=number))
        moving = first[first > 0]  # air may be constant
        curved = second[second > 0]
        step = np.mean(moving) if moving.size else 0.0
        bend = np.mean(curved) if curved.size else 0.0
        features[f"step/{axis}"] = np.log(step / spread + _SMALL)
        features[f"noise/{axis}"] = np.log((bend + _SMALL) / (step + _SMALL))
    return features


def _trends(channel: np.ndarray) -> Values:
    """Compare the coarse image with slopes and bowls along each axis: a bias field or another position changes them."""
    coarse = channel[tuple(slice(None, None, max(1, n // _GRID)) for n in channel.shape)].astype(np.float64)
    centred = (coarse - coarse.mean()) / (coarse.std() + _SMALL)
    features = {}
    for number, axis in enumerate(AXES):
        profile = centred.mean(axis=tuple(a for a in range(3) if a != number))
        slope = np.linspace(-1, 1, len(profile)) if len(profile) > 1 else np.zeros(1)
        bowl = slope**2 - np.mean(slope**2)
        for name, shape in ((axis, slope), (2 * axis, bowl)):
            features[f"trend/{name}"] = float(profile @ shape / (shape @ shape + _SMALL))
    return features


def _combs(channel: np.ndarray) -> Values:
    """Compare every 2nd to 6th line of the spectrum along each axis with the others: ghosts weaken or stress them."""
    features = {}
    for number, axis in enumerate(AXES):
        if channel.shape[number] < _FEWEST_LINES:
            continue
        steps = [1 if a == number else max(1, n // _GRID) for a, n in enumerate(channel.shape)]
        coarse = channel[tuple(slice(None, None, step) for step in steps)]
        lines = np.abs(np.fft.rfft(np.moveaxis(coarse, number, 0), axis=0)).reshape(channel.shape[number] // 2 + 1, -1)
        power = np.log(lines[1:].mean(axis=1) + _SMALL)
        smooth = np.median(np.lib.stride_tricks.sliding_window_view(np.pad(power, 2, "edge"), 5), axis=1)
        rough = power - smooth
        on_line = [np.arange(1, len(lines)) % period == 0 for period in _PERIODS]
        features[f"comb/{axis}"] = max(abs(rough[on].mean() - rough[~on].mean()) for on in on_line)
    return features


def describe_labels(
    label_map: np.ndarray, maps: Mapping[str, np.ndarray], geometry: Geometry, labels: Labels
) -> dict[str, Values]:
    """Describe each label of a prediction: volume, shape, parts, and how sure the networks are.

    Parameters
    ----------
    label_map : ndarray of int, shape (z, y, x)
        Values of the dataset.
    maps : mapping of str to ndarray of uint8, shape (z, y, x)
        As `predict_label_map` returns them: entropy, and of several models their disagreement.
    geometry : Geometry
        Of the image.
    labels : Labels
        Names of the values.

    Returns
    -------
    dict of str to dict
        Label -> feature -> value; a label without voxels has no features. `error` is 1 minus the Dice that the label
        map would have if each voxel were wrong with the probability that its entropy says.
    """
    errors, boxes = _error_table(labels), _boxes(label_map, labels)
    faces = [label_map.take([0, -1], axis) for axis in range(3) if label_map.shape[axis] > _MARGIN]
    middle = [(low + high) / 2 for low, high in _around(list(boxes.values()))] if boxes else [0.0] * 3
    features: dict[str, Values] = {}
    for name, values in labels.segments.items():
        features[name] = {}
        own = [boxes[value] for value in values if value in boxes]
        if not own:
            continue
        ends = zip(_around(own), label_map.shape, strict=True)
        box = tuple(slice(max(0, low - _MARGIN), min(n, high + _MARGIN)) for (low, high), n in ends)
        mask, sums = _sum_slabs(label_map[box], values, {what: array[box] for what, array in maps.items()}, errors)
        found = _describe_shape(mask, sums, [s.start - m for s, m in zip(box, middle, strict=True)], geometry.spacing)
        at_edge = sum(np.isin(face, values).sum() for face in faces)
        found["edge"] = at_edge / found["voxels"]
        features[name] = {what: float(value) for what, value in found.items()}
    return features


def _boxes(label_map: np.ndarray, labels: Labels) -> dict[int, tuple[slice, ...]]:
    """Return the smallest box around each value of a label map but the background, all found in one pass."""
    from scipy.ndimage import find_objects  # slow to import, and a prediction without quality needs none

    low = 0 if label_map.dtype.kind == "u" else min(0, int(label_map.min()))
    shift = 0 if low == labels.background == 0 else 1 - low  # objects have numbers from 1 on
    found = find_objects(label_map.astype(np.int32) + shift if shift else label_map)
    boxes = {number - shift: box for number, box in enumerate(found, 1) if box is not None}
    return {value: box for value, box in boxes.items() if value != labels.background}


def _around(boxes: Sequence[tuple[slice, ...]]) -> list[tuple[int, int]]:
    """Return the ends of the smallest box around some boxes."""
    return [(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes, strict=True)]


def _error_table(labels: Labels) -> np.ndarray:
    """Return for each step of entropy the probability that the decision is wrong, if two labels compete."""
    wrong = np.linspace(1e-9, 0.5, 2001)
    bits = -(wrong * np.log2(wrong) + (1 - wrong) * np.log2(1 - wrong))
    largest = len(labels.region_names) if labels.has_regions else np.log2(len(labels.values))
    return np.interp(np.arange(STEPS + 1) / STEPS * largest, bits, wrong).astype(np.float32)


def _count_neighbours(mask: np.ndarray) -> np.ndarray:
    """Count the six neighbours of each voxel that are in a mask; outside of the array all are."""
    padded = np.pad(mask, 1, "edge").astype(np.uint8)
    inner = slice(1, -1)
    count = np.zeros(mask.shape, np.uint8)
    for axis in range(3):
        for side in (slice(None, -2), slice(2, None)):
            count += padded[tuple(side if a == axis else inner for a in range(3))]
    return count


def _sum_slabs(
    label_map: np.ndarray, values: Sequence[int], maps: Mapping[str, np.ndarray], errors: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    """Return the mask of some values, and sums over it; by slabs, so that temporary arrays stay small.

    Sums are the numbers of voxels, of faces and of voxels away from the border; the probabilities of errors inside,
    around, and away from the border; and the disagreement of the models.
    """
    step = max(1, _SLAB // label_map[0].size)
    slabs = [slice(start, start + step) for start in range(0, len(label_map), step)]
    mask = np.concatenate([np.isin(label_map[slab], values) for slab in slabs])
    sums = np.zeros(7)
    for slab in slabs:
        above = min(slab.start, 1)
        neighbours = _count_neighbours(mask[slab.start - above : slab.stop + 1])[above:][:step]
        inside, wrong = mask[slab], errors[maps[ENTROPY][slab]]
        inner, around = inside & (neighbours == 6), ~inside & (neighbours > 0)
        n, n_inner = np.count_nonzero(inside), np.count_nonzero(inner)
        lost, missed, away = (wrong[part].sum(dtype=np.float64) for part in (inside, around, inner))
        votes = maps[OF_MODELS][slab][inside].sum(dtype=np.float64) / STEPS if OF_MODELS in maps else 0.0
        faces = 6 * n - neighbours[inside].sum(dtype=np.int64)
        sums += np.array([n, faces, n_inner, lost, missed, away, votes])
    return mask, sums.tolist()


def _describe_shape(mask: np.ndarray, sums: list[float], offset: Sequence[float], spacing: Sequence[float]) -> Values:
    """Return the features of a label but `edge`; `offset` is where the mask starts, in voxels."""
    n, faces, n_inner, lost, missed, away, votes = sums
    parts = cc3d.statistics(cc3d.connected_components(mask, binary_image=True))["voxel_counts"][1:]
    features: Values = {
        "voxels": n,
        "volume": np.log(n * np.prod(spacing)),
        "compactness": np.log(max(faces, 1) / n ** (2 / 3)),
        "parts": np.log(len(parts)),
        "scattered": 1 - parts.max() / n,
        "error": 1 - 2 * (n - lost) / (2 * n - lost + missed),
        "inner": away / n_inner if n_inner else lost / n,
        "disagreement": votes / n,
    }
    for number, (axis, start, size) in enumerate(zip(AXES, offset, spacing, strict=True)):
        counts = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != number))
        places = np.flatnonzero(counts)
        features[f"position/{axis}"] = (counts @ np.arange(len(counts)) / n + start) * size
        features[f"length/{axis}"] = np.log(size * (1 + places[-1] - places[0]))
    return features
