"""What the report takes from the files of one case, each read once: its size, label volumes, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.dataset import Case, Dataset, map_labels, read_case
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_geometry, read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import PICTURES
from nnunet_lite.errors import UserError, describe
from nnunet_lite.planning.schema import Plan
from nnunet_lite.reporting.outline import outline
from nnunet_lite.reporting.planes import Box, Plane, View, box_around, cut, grey_levels, thinned, to_bytes, webp

MOST_CHANNELS = 4  # that are shown
_INTENSITIES = 4000  # voxels of each label and case that the histograms of intensities are made of
_SAMPLES = 1_000_000  # voxels from which the mean and deviation of an image are taken
_CT_ROOM = 0.25  # how much wider than the foreground's intensities a CT is shown

Levels = tuple[float, float]


@dataclass(frozen=True)
class Detail:
    """How finely pictures are stored: pixels along the longer side, and WebP's quality."""

    longest: int
    quality: int


@dataclass(frozen=True)
class Wanted:
    """What is to be made of one case.

    Parameters
    ----------
    tile : a picture for the montage, and a sample of its intensities.
    volumes : how large its labels are.
    predictions : model -> label map to show over the image.
    """

    case: Case
    tile: bool
    volumes: bool
    predictions: Mapping[str, Path]


@dataclass
class Seen:
    """What was found; what could not be read is told in `problems`."""

    case: str
    geometry: Geometry | None = None
    voxels: dict[str, int] = field(default_factory=dict)  # of each region
    tile: dict[str, Any] | None = None
    intensities: dict[str, np.ndarray] = field(default_factory=dict)  # region -> (channels, voxels)
    overlays: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def is_colour(dataset: Dataset, plan: Plan) -> bool:
    """Whether the three channels of a case are the red, green and blue of one picture."""
    return len(plan.channels) == 3 and (
        all(c.normalization == "rgb_0_1" for c in plan.channels)
        or (dataset.file_ending in PICTURES and {c.name.lower()[:1] for c in plan.channels} == set("rgb"))
    )


def look(wanted: Wanted, dataset: Dataset, plan: Plan, detail: Detail, tile_detail: Detail) -> Seen:
    """Read a case and make what is wanted of it."""
    seen = Seen(wanted.case.id)
    try:
        if wanted.tile or wanted.predictions:
            image, label = read_case(wanted.case, dataset)
            seen.geometry = image.geometry
            shown = _Shown(image.array, image.geometry, plan, is_colour(dataset, plan))
            reference = None if label is None else shown.view.turn.apply(label)
            if wanted.tile:
                seen.tile = shown.tile(reference, tile_detail)
                seen.intensities = _intensities(image.array, label, plan)
            for model, path in wanted.predictions.items():
                seen.overlays[model] = _overlay(shown, reference, path, detail)
        else:
            seen.geometry = read_geometry(wanted.case.images[0])[0]
            label = _label(wanted.case, dataset) if wanted.volumes else None
        if wanted.volumes and label is not None:
            seen.voxels = _voxels(label, plan.labels)
    except (UserError, OSError, MemoryError) as error:
        seen.problems.append(f"{wanted.case.id}: {describe(error)}")
    return seen


def _label(case: Case, dataset: Dataset) -> np.ndarray | None:
    return None if case.label is None else map_labels(read_label(case.label)[0], dataset.label_map)


def _voxels(label: np.ndarray, labels: Labels) -> dict[str, int]:
    """How many voxels each region has."""
    values, counts = np.unique(label, return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    pairs = zip(labels.region_names, labels.region_values, strict=True)
    return {name: sum(found.get(value, 0) for value in members) for name, members in pairs}


def _intensities(image: np.ndarray, label: np.ndarray | None, plan: Plan) -> dict[str, np.ndarray]:
    """Evenly spaced voxels of each region, and of the image where it is not zero, z-scored where the plan says so."""
    flat = image.reshape(len(image), -1)
    nonzero = (flat != 0).any(axis=0)
    masks, labels = {"image": nonzero}, plan.labels
    if label is not None:
        for name, members in zip(labels.region_names, labels.region_values, strict=True):
            masks[name] = np.isin(label.reshape(-1), members)
    taken = {name: np.flatnonzero(mask) for name, mask in masks.items()}
    taken = {name: places[:: max(1, places.size // _INTENSITIES)] for name, places in taken.items()}
    out = {name: flat[:, places].astype(np.float32) for name, places in taken.items()}
    step = max(1, flat.shape[1] // _SAMPLES)
    for i, channel in enumerate(plan.channels):
        if channel.normalization == "zscore":
            some = flat[i, ::step].astype(np.float64)
            some = some[nonzero[::step]] if channel.use_mask else some
            for values in out.values():
                values[i] = (values[i] - some.mean()) / max(float(some.std()), 1e-8)
    return out


def _overlay(shown: _Shown, reference: np.ndarray | None, path: Path, detail: Detail) -> list[dict[str, Any]]:
    """The planes through the slices with the most wrong voxels.

    Raises
    ------
    UserError : the prediction cannot be read, or lies on another grid.
    """
    prediction, geometry, _ = read_label(path, shown.geometry)
    if geometry.shape != shown.image.shape[1:]:
        raise UserError(f"has shape {geometry.shape}, its image {shown.image.shape[1:]}", path)
    turned = shown.view.turn.apply(prediction)
    truth = np.zeros_like(turned) if reference is None else reference
    wrong, labels = turned != truth, shown.plan.labels
    if labels.ignore is not None:
        wrong &= truth != labels.ignore
    foreground = (truth != labels.background) | (turned != labels.background)
    at = _busiest(wrong if wrong.any() else foreground)
    box = box_around(foreground)
    return [shown.plane(plane, at, box, detail, truth, turned) for plane in shown.view.planes]


def _busiest(mask: np.ndarray) -> tuple[int, int, int]:
    """The slice along each axis in which most of a mask lies; the middle one where it is empty."""
    if not mask.any():
        return tuple(n // 2 for n in mask.shape)
    along = mask.sum(axis=2, dtype=np.int64)
    last = mask.sum(axis=(0, 1), dtype=np.int64)
    return int(along.sum(axis=1).argmax()), int(along.sum(axis=0).argmax()), int(last.argmax())


class _Shown:
    """An image with what its pictures need: its view, and grey levels, which are found once."""

    def __init__(self, image: np.ndarray, geometry: Geometry, plan: Plan, colour: bool) -> None:
        self.image, self.plan, self.colour = image, plan, colour
        self.geometry, self.view = geometry, View.of(geometry)
        self.turned = self.view.turn.apply(image)
        self.levels = [self._levels(i) for i in range(min(len(image), MOST_CHANNELS))]

    def _levels(self, number: int) -> Levels:
        channel = self.plan.channels[number]
        if self.image.dtype == np.uint8 and self.colour:
            return 0.0, 255.0
        if channel.normalization == "ct":
            low, high = channel.statistics.percentile_00_5, channel.statistics.percentile_99_5
            room = _CT_ROOM * max(high - low, 1.0)
            return low - room, high + room
        return grey_levels(self.image[number])

    def pixels(self, plane: Plane, index: int, box: Box, channels: Sequence[int]) -> list[np.ndarray]:
        """A slice as grey pictures, one for each channel, or a single one in colour."""
        grey = [to_bytes(cut(self.turned[i], plane, index, box), self.levels[i]) for i in channels]
        return [np.ascontiguousarray(np.stack(grey, axis=-1))] if self.colour else grey

    def tile(self, reference: np.ndarray | None, detail: Detail) -> dict[str, Any]:
        """The first plane, through most of the labels, in the first channel."""
        plane, at = self.view.planes[0], tuple(n // 2 for n in self.turned.shape[1:])
        if reference is not None:
            at = _busiest(reference != self.plan.labels.background)
        whole: Box = tuple(slice(0, n) for n in self.turned.shape[1:])  # type: ignore[assignment]
        return self.plane(plane, at, whole, detail, reference, None, range(3) if self.colour else range(1))

    def plane(
        self,
        plane: Plane,
        at: tuple[int, ...],
        box: Box,
        detail: Detail,
        reference: np.ndarray | None,
        prediction: np.ndarray | None,
        channels: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """A plane for the page: pictures and outlines in voxels, its size in voxels and mm, and where it lies."""
        index, n = at[plane.normal], self.turned.shape[1 + plane.normal]
        axis = self.view.turn.order[plane.normal]
        pictures = self.pixels(plane, index, box, range(len(self.levels)) if channels is None else channels)
        height, width = pictures[0].shape[:2]
        spacing = self.view.spacing
        return {
            "name": plane.name,
            "sides": plane.sides,
            "size": [width, height],
            "mm": [round(width * spacing[plane.columns], 3), round(height * spacing[plane.rows], 3)],
            "slice": n - 1 - index if self.view.turn.reversed[plane.normal] else index,
            "of": n,
            "axis": "zyx"[axis],
            "cropped": any(b.stop - b.start < size for b, size in zip(box, self.turned.shape[1:], strict=True)),
            "images": [webp(picture, detail.longest, detail.quality) for picture in pictures],
            "reference": self._outlines(reference, plane, index, box, detail),
            "prediction": None if prediction is None else self._outlines(prediction, plane, index, box, detail),
        }

    def _outlines(
        self, label: np.ndarray | None, plane: Plane, index: int, box: Box, detail: Detail
    ) -> list[tuple[int, str]]:
        """(number of the region, path) of the regions that are in a slice."""
        if label is None:
            return []
        shown, step = thinned(cut(label, plane, index, box), detail.longest)
        masks = [np.isin(shown, members) for members in self.plan.labels.region_values]
        return [(i, outline(mask, step)) for i, mask in enumerate(masks) if mask.any()]
