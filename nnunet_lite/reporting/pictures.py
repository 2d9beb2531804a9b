"""Pictures of the cases: slices as WebP with the outlines of their labels, within a limit of bytes and of time.

Read from `draw_cases` downwards: it chooses the cases, reads each one once, in threads, and keeps what fits the page.
Axial pictures have the patient's right on the left and the front at the top; coronal ones the right on the left and
sagittal ones the front on the left, both with the head at the top. Pictures (PNG, TIFF, ...) are shown as stored.
"""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PillowImage

from nnunet_lite import log, system
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, map_labels, read_case
from nnunet_lite.data.geometry import Geometry, Turn, turn_between
from nnunet_lite.data.images import read_geometry, read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError, describe
from nnunet_lite.planning.schema import Plan
from nnunet_lite.reporting.material import Material

TILES = 24  # cases in the montage
PAGE_BYTES = 9_000_000  # of all overlays in the page
_MAX_VOXELS = 2.5e9  # of all images that are read, a third of them for the montage: about 20 s on two cores
_MAX_LABEL_VOXELS = 4e9  # of all label maps that are read only for their volumes
_MAX_CHANNELS = 4  # of a case that are shown
_SIZES = (384, 320, 256, 192, 160, 128)  # pixels along the longer side of an overlay
_TILE_SIZE = 224
_QUALITY, _METHOD = 75, 4  # of WebP; method 0 is fast, 6 is small
_UNKNOWN_SHAPE = (64, 256, 256)  # of a case that is not in the fingerprint
_BYTES_PER_VOXEL = 16  # in memory while a case is drawn: image, label map and prediction
_CASE_SAMPLES = 4000  # voxels of each label and case for the histograms of intensities
_IMAGE_SAMPLES = 1_000_000  # voxels for the mean and deviation of an image
_LEVEL_SAMPLES = 200_000  # voxels for its grey levels
_CT_MARGIN = 0.25  # by which a CT's grey levels exceed the intensities of the foreground

Box = tuple[slice, slice, slice]
Picture = dict[str, Any]  # a plane as report.html.j2 and report.js draw it, see `OrientedImage.plane`


@dataclass
class CasePictures:
    """What the page shows of one case.

    Parameters
    ----------
    voxels : dict
        Region -> its voxels in the reference.
    tile : dict or None
        The picture for the montage.
    intensities : dict
        "image" or region -> ndarray, shape (channels, samples).
    overlays : dict
        Model -> its planes.
    problem : str
        Why the case could not be read.
    """

    case_id: str
    geometry: Geometry | None = None
    voxels: dict[str, int] = field(default_factory=dict)
    tile: Picture | None = None
    intensities: dict[str, np.ndarray] = field(default_factory=dict)
    overlays: dict[str, list[Picture]] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Gallery:
    """The pictures of all cases.

    Parameters
    ----------
    cases : dict
        Case -> its pictures.
    overlaid : dict
        Model -> cases with overlays, the worst first.
    notes : tuple of str
        What is left out, and why.
    """

    cases: dict[str, CasePictures]
    overlaid: dict[str, list[str]]
    notes: tuple[str, ...]


def draw_cases(material: Material) -> Gallery:
    """Read the cases in threads and draw them."""
    cases, channels = material.dataset.cases, len(material.plan.channels)
    found = material.fingerprint
    known = dict(zip(found.case_ids, found.shapes_after_crop, strict=False)) if found else {}
    shapes = {case.id: known.get(case.id, _UNKNOWN_SHAPE) for case in cases}
    mean = sum(map(prod, shapes.values())) * channels / max(1, len(shapes))
    tiles = _evenly(cases, min(TILES, max(4, int(_MAX_VOXELS / 3 / max(1, mean)))))
    scored = {row.case for model in material.scored for row in model.scores.rows}
    unscored = [case for case in cases if case.id not in scored and case.label is not None]
    voxels = sum(prod(shapes[case.id]) for case in unscored)
    measured = _evenly(unscored, max(8, int(len(unscored) * min(1, _MAX_LABEL_VOXELS / max(1, voxels)))))
    overlays, size = _choose_overlays(material, shapes, tiles)
    predictions: dict[str, dict[str, Path]] = defaultdict(dict)
    for case_id, model, file in overlays:
        predictions[case_id][model] = file
    draw = partial(draw_case, material.dataset, material.plan, size)
    contents = [(c.id in tiles, c.id in measured, predictions[c.id]) for c in cases]
    largest = max(map(prod, shapes.values()), default=0) * channels
    with ThreadPoolExecutor(system.cases_in_flight(largest * _BYTES_PER_VOXEL, None), "report") as pool:
        drawn = list(log.progress(pool.map(draw, cases, *zip(*contents, strict=True)), len(cases), "report"))
    notes = []
    if len(tiles) < len(cases):
        notes.append(f"the montage and the intensities are those of {len(tiles)} of {len(cases)} cases, evenly spaced")
    if (counted := len(scored | measured)) < len(cases):
        notes.append(f"volumes are those of {counted} of {len(cases)} cases, evenly spaced")
    if problems := [found.problem for found in drawn if found.problem]:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        notes.append(f"{len(problems)} of {len(cases)} cases could not be shown: {'; '.join(problems[:3])}{more}")
    return _fit_page(material, {found.case_id: found for found in drawn}, overlays, notes)


def _evenly(cases: Sequence[Case], n: int) -> set[str]:
    """The names of n evenly spaced cases."""
    n = min(n, len(cases))
    return {cases[round(i * (len(cases) - 1) / max(1, n - 1))].id for i in range(n)}


def _choose_overlays(
    material: Material, shapes: dict[str, tuple[int, int, int]], tiles: set[str]
) -> tuple[list[tuple[str, str, Path]], int]:
    """(case, model, prediction) to show, and pixels along the longer side.

    The worst case of each model comes first, then the second worst of each, as far as time and page allow.
    """
    ranked = [
        [(row.case, model.name, Path(row.prediction_file)) for row in model.worst_first if row.prediction_file]
        for model in material.scored
    ]
    channels = len(material.plan.channels)
    read, voxels = set(tiles), float(sum(prod(shapes[case]) * channels for case in tiles))
    overlays = []
    for rank in range(max(map(len, ranked), default=0)):
        for case, model, file in (rows[rank] for rows in ranked if rank < len(rows)):
            if case not in shapes:
                continue
            if case not in read:
                voxels += prod(shapes[case]) * channels
                read.add(case)
            if voxels <= _MAX_VOXELS:
                overlays.append((case, model, file))
    for size in _SIZES:
        total = np.cumsum([_estimate_bytes(shapes[case], size, min(channels, _MAX_CHANNELS)) for case, *_ in overlays])
        if not overlays or total[-1] <= PAGE_BYTES:
            break
    return overlays[: int(np.searchsorted(total, PAGE_BYTES, side="right"))], size


def _estimate_bytes(shape: tuple[int, int, int], size: int, pictures: int) -> float:
    """Bytes of the overlays of one case and model: a WebP in base64 and some outlines for each plane."""
    z, y, x = (min(n, size) for n in shape)
    areas = [y * x] if z == 1 else [y * x, z * x, z * y]
    return sum(700 + pictures * 4 / 3 * (200 + 0.2 * area) for area in areas)


def _fit_page(
    material: Material, drawn: dict[str, CasePictures], overlays: list[tuple[str, str, Path]], notes: list[str]
) -> Gallery:
    """Leave out overlays of the best cases if they are larger than estimated."""
    overlaid: dict[str, list[str]] = {model.name: [] for model in material.scored}
    total = 0
    for case, model, _ in overlays:
        planes = drawn[case].overlays.get(model, ())
        total += sum(len(json.dumps(plane)) for plane in planes)
        if total > PAGE_BYTES * 1.1:
            break
        if planes:
            overlaid[model].append(case)
    for results in material.scored:
        n, cases = len(overlaid[results.name]), len(results.worst_first)
        if n < cases:
            notes.append(f"{results.label}: pictures of the {n} worst of {cases} cases")
    kept = {
        case: replace(found, overlays={m: planes for m, planes in found.overlays.items() if case in overlaid[m]})
        for case, found in drawn.items()
    }
    return Gallery(kept, overlaid, tuple(notes))


# ------------------------------------------------------------------------------------------------------------- one case


def draw_case(
    dataset: Dataset, plan: Plan, size: int, case: Case, tile: bool, volumes: bool, predictions: Mapping[str, Path]
) -> CasePictures:
    """Read the files of a case and draw its pictures; a case that cannot be read has a `problem`.

    Parameters
    ----------
    size : int
        Pixels along the longer side of an overlay.
    tile, volumes : bool
        Whether to draw it for the montage, and to count the voxels of its regions.
    predictions : mapping
        Model -> label map to draw over the image.
    """
    out = CasePictures(case.id)
    try:
        if tile or predictions:
            image, label = read_case(case, dataset)
            out.geometry = image.geometry
            shown = OrientedImage(image.array, image.geometry, plan)
            reference = None if label is None else shown.turn.apply(label)
            if tile:
                out.tile = shown.tile(reference)
                out.intensities = _sample_intensities(image.array, label, plan)
            for model, file in predictions.items():
                out.overlays[model] = shown.overlay(reference, file, size)
        else:
            out.geometry, label = read_geometry(case.images[0])[0], None
            if volumes and case.label is not None:
                label = map_labels(read_label(case.label)[0], dataset.label_map)
        if volumes and label is not None:
            out.voxels = _count_voxels(label, plan.labels)
    except (UserError, OSError, MemoryError) as error:
        out.problem = f"{case.id}: {describe(error)}"
    return out


def _count_voxels(label: np.ndarray, labels: Labels) -> dict[str, int]:
    """The voxels of each region."""
    values, counts = np.unique(label, return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    regions = zip(labels.region_names, labels.region_values, strict=True)
    return {name: sum(found.get(value, 0) for value in members) for name, members in regions}


def _sample_intensities(image: np.ndarray, label: np.ndarray | None, plan: Plan) -> dict[str, np.ndarray]:
    """Evenly spaced voxels of each region and of the nonzero image; z-scores where the plan normalizes so."""
    flat = image.reshape(len(image), -1)
    nonzero = (flat != 0).any(axis=0)
    masks = {"image": nonzero}
    if label is not None:
        regions = zip(plan.labels.region_names, plan.labels.region_values, strict=True)
        masks |= {name: np.isin(label.reshape(-1), members) for name, members in regions}
    samples = {}
    for name, mask in masks.items():
        inside = np.flatnonzero(mask)
        samples[name] = flat[:, inside[:: max(1, inside.size // _CASE_SAMPLES)]].astype(np.float32)
    step = max(1, flat.shape[1] // _IMAGE_SAMPLES)
    for i, channel in enumerate(plan.channels):
        if channel.normalization == "zscore":
            values = flat[i, ::step].astype(np.float64)
            values = values[nonzero[::step]] if channel.use_mask else values
            for sample in samples.values():
                sample[i] = (sample[i] - values.mean()) / max(float(values.std()), 1e-8)
    return samples


# ------------------------------------------------------------------------------------------------------------ one image


class Plane(NamedTuple):
    """A plane of a turned array: its normal, rows and columns are axes (0, 1, 2).

    `upwards` says that the first row is at the bottom; `sides` has the letters at the left, right, top and bottom.
    """

    name: str
    normal: int
    rows: int
    columns: int
    upwards: bool = False
    sides: str = ""


_PATIENT_PLANES = (
    Plane("axial", 0, 1, 2, sides="RLAP"),
    Plane("coronal", 1, 0, 2, upwards=True, sides="RLSI"),
    Plane("sagittal", 2, 0, 1, upwards=True, sides="APSI"),
)
_STORED_PLANES = (Plane("xy", 0, 1, 2), Plane("xz", 1, 0, 2), Plane("yz", 2, 0, 1))


def planes_of(geometry: Geometry) -> tuple[Turn, tuple[Plane, ...]]:
    """How to turn an array (z, y, x) to the patient's head, back and left, and the planes to show.

    An image without a known orientation is shown as it is stored, a picture in its one plane.
    """
    if geometry.orientation is None or geometry.shape[0] == 1:
        return Turn(), _STORED_PLANES[: 1 if geometry.shape[0] == 1 else 3]
    return turn_between(geometry.orientation, "LPS"), _PATIENT_PLANES


def is_colour(array: np.ndarray, geometry: Geometry) -> bool:
    """Whether the three channels of an image are the red, green and blue of a picture."""
    return array.shape[0] == 3 and array.dtype == np.uint8 and geometry.dimensions == 2


class OrientedImage:
    """An image turned to the patient's axes, with its planes and the grey levels of its channels.

    Parameters
    ----------
    array : ndarray, shape (channels, z, y, x)
        The image as it is stored.
    """

    def __init__(self, array: np.ndarray, geometry: Geometry, plan: Plan) -> None:
        self.turn, self.planes = planes_of(geometry)
        self.geometry, self.labels, self.colour = geometry, plan.labels, is_colour(array, geometry)
        self.array, self.spacing = self.turn.apply(array), geometry.turned(self.turn).spacing
        self.levels = [self._grey_levels(array[i], plan, i) for i in range(min(len(array), _MAX_CHANNELS))]

    def _grey_levels(self, channel: np.ndarray, plan: Plan, number: int) -> tuple[float, float]:
        about = plan.channels[number]
        if self.colour:
            return 0.0, 255.0
        if about.normalization == "ct":
            low, high = about.statistics.percentile_00_5, about.statistics.percentile_99_5
            margin = _CT_MARGIN * max(high - low, 1.0)
            return low - margin, high + margin
        return grey_levels(channel)

    def tile(self, reference: np.ndarray | None) -> Picture:
        """The first plane, through most of the labels, in the first channel or in colour."""
        shape = self.array.shape[1:]
        at = tuple(n // 2 for n in shape)
        if reference is not None:
            at = fullest_slices(reference != self.labels.background)
        whole = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
        channels = 3 if self.colour else 1
        return self.plane(self.planes[0], at, whole, _TILE_SIZE, reference, None, channels)

    def overlay(self, reference: np.ndarray | None, file: Path, size: int) -> list[Picture]:
        """The planes through the slices with most errors of a prediction.

        Raises
        ------
        UserError : the prediction cannot be read, or has another shape than its image.
        """
        stored, geometry, _ = read_label(file, self.geometry)
        if geometry.shape != self.geometry.shape:
            raise UserError(f"has shape {geometry.shape}, its image {self.geometry.shape}", file)
        prediction, labels = self.turn.apply(stored), self.labels
        reference = np.zeros_like(prediction) if reference is None else reference
        wrong = prediction != reference
        if labels.ignore is not None:
            wrong &= reference != labels.ignore
        foreground = (reference != labels.background) | (prediction != labels.background)
        at, box = fullest_slices(wrong if wrong.any() else foreground), box_around(foreground)
        return [self.plane(plane, at, box, size, reference, prediction) for plane in self.planes]

    def plane(
        self,
        plane: Plane,
        at: tuple[int, ...],
        box: Box,
        size: int,
        reference: np.ndarray | None,
        prediction: np.ndarray | None,
        channels: int = _MAX_CHANNELS,
    ) -> Picture:
        """One plane for the page.

        Parameters
        ----------
        at : tuple of int
            The slice along each axis.
        box : tuple of slice
            The part of the image to show.
        size : int
            Pixels along the longer side.
        reference, prediction : ndarray or None, shape (z, y, x)
            Turned label maps to outline.

        Returns
        -------
        dict
            WebP of each channel, outlines in voxels, size in voxels and mm, and the slice as it is stored.
        """
        index, n = at[plane.normal], self.array.shape[1 + plane.normal]
        slices = [
            to_bytes(slice_of(self.array[i], plane, index, box), levels)
            for i, levels in enumerate(self.levels[:channels])
        ]
        pictures = [np.ascontiguousarray(np.stack(slices, axis=-1))] if self.colour else slices
        height, width = slices[0].shape
        return {
            "name": plane.name,
            "sides": plane.sides,
            "size": [width, height],
            "mm": [round(width * self.spacing[plane.columns], 3), round(height * self.spacing[plane.rows], 3)],
            "slice": n - 1 - index if self.turn.reversed[plane.normal] else index,
            "of": n,
            "axis": "zyx"[self.turn.order[plane.normal]],
            "cropped": any(b.stop - b.start < length for b, length in zip(box, self.array.shape[1:], strict=True)),
            "images": [webp(picture, size) for picture in pictures],
            "reference": [] if reference is None else self._outlines(slice_of(reference, plane, index, box), size),
            "prediction": None if prediction is None else self._outlines(slice_of(prediction, plane, index, box), size),
        }

    def _outlines(self, label: np.ndarray, size: int) -> list[tuple[int, str]]:
        """(number of the region, SVG path) of the regions in a slice."""
        label, step = thin_out(label, size)
        masks = (np.isin(label, members) for members in self.labels.region_values)
        return [(i, outline_path(mask, step)) for i, mask in enumerate(masks) if mask.any()]


def fullest_slices(mask: np.ndarray) -> tuple[int, ...]:
    """The slice along each axis that has most of a mask; the middle one if the mask is empty."""
    if not mask.any():
        return tuple(n // 2 for n in mask.shape)
    by_row = mask.sum(axis=2, dtype=np.int64)
    counts = by_row.sum(axis=1), by_row.sum(axis=0), mask.sum(axis=(0, 1), dtype=np.int64)
    return tuple(int(count.argmax()) for count in counts)


def box_around(mask: np.ndarray, margin: float = 0.3, smallest: int = 96) -> Box:
    """The box of a mask, widened by a share of its size on each side and to `smallest` voxels; all if it is empty."""
    box = []
    for axis, n in enumerate(mask.shape):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        low, high = (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, n)
        size = max(high - low + 2 * int(np.ceil(margin * (high - low))), smallest)
        low = max(0, min((low + high - size) // 2, n - size))
        box.append(slice(low, min(n, low + size)))
    return box[0], box[1], box[2]


def slice_of(array: np.ndarray, plane: Plane, index: int, box: Box) -> np.ndarray:
    """A slice (rows, columns) of a turned array (z, y, x), with the rows as they are drawn."""
    where: list[slice | int] = list(box)
    where[plane.normal] = index
    picture = array[tuple(where)]
    return picture[::-1] if plane.upwards else picture


def grey_levels(channel: np.ndarray) -> tuple[float, float]:
    """The intensities of black and white: the 1st and 99.5th percentile of all but the darkest value."""
    flat = channel.reshape(-1)[:: max(1, channel.size // _LEVEL_SAMPLES)]
    flat = flat[np.isfinite(flat)]
    inside = flat[flat > flat.min()] if flat.size else flat
    if not inside.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(inside, (1, 99.5)))
    return (low, high) if high > low else (low, low + 1)


def to_bytes(picture: np.ndarray, levels: tuple[float, float]) -> np.ndarray:
    """Grey levels 0 to 255; values that are not finite are black or white."""
    low, high = levels
    grey = (np.nan_to_num(picture.astype(np.float32), nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def webp(picture: np.ndarray, size: int) -> str:
    """Bytes (y, x) or (y, x, 3) as a WebP file in base64; each axis shrinks to at most `size` pixels."""
    image = PillowImage.fromarray(picture)
    shown = min(image.width, size), min(image.height, size)
    if shown != image.size:
        image = image.resize(shown, PillowImage.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY, method=_METHOD)
    return base64.b64encode(file.getvalue()).decode("ascii")


def thin_out(label: np.ndarray, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Every n-th voxel of a label map (y, x), so that at most about `size` remain along an axis, and n (y, x)."""
    down, across = (max(1, -(-n // size)) for n in label.shape)
    return label[down // 2 :: down, across // 2 :: across], (down, across)


def outline_path(mask: np.ndarray, step: tuple[int, int] = (1, 1)) -> str:
    """The closed outlines of a mask (y, x) along the edges of its voxels, as an SVG path.

    Holes run the other way round, so that both fill rules leave them empty.

    Parameters
    ----------
    step : tuple of int
        Size (y, x) of a pixel of the mask in the picture.
    """
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), np.int8)
    padded[1:-1, 1:-1] = mask
    across, down = defaultdict(list), defaultdict(list)  # start (y, x) -> ends of the runs that begin there
    # the mask is to the right of the path: its upper edges run to the right, its left edges up
    for y, first, last, sign in _runs(np.diff(padded, axis=0)):
        start, end = (first, last) if sign > 0 else (last, first)
        across[y, start].append((y, end))
    for x, first, last, sign in _runs(np.diff(padded, axis=1).T):
        start, end = (last, first) if sign > 0 else (first, last)
        down[start, x].append((end, x))
    paths = []
    for y, x in list(across):
        while across[y, x]:
            parts, at = [f"M{x * step[1]} {y * step[0]}"], (y, x)
            while True:
                corner = across[at].pop()
                parts.append(f"h{(corner[1] - at[1]) * step[1]}")
                at = down[corner].pop()
                if at == (y, x):  # z draws the last run
                    break
                parts.append(f"v{(at[0] - corner[0]) * step[0]}")
            paths.append("".join([*parts, "z"]))
    return "".join(paths)


def _runs(edges: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Runs of equal nonzero numbers along the rows: (row, first edge, last edge, number). Rows begin and end with 0."""
    rows, bounds = np.nonzero(np.diff(edges, axis=1))
    same_row = rows[1:] == rows[:-1]  # two bounds of a row enclose a run, which may be one of zeros
    rows, first, last = rows[:-1][same_row], bounds[:-1][same_row], bounds[1:][same_row]
    numbers = edges[rows, first + 1]
    runs = (array[numbers != 0].tolist() for array in (rows, first, last, numbers))
    return list(zip(*runs, strict=True))
