"""Label maps from DICOM segmentations (DICOM-SEG) and contours (RTSTRUCT); needs the extra [dicom].

A mask belongs to the series whose UIDs it has. Contours are filled slice by slice: a voxel is inside if its centre is
inside the contour or on it. Contours of one structure in one slice are combined by even-odd, so that a contour inside
another is a hole. A contour counts for the slice that is nearest, at most half a slice away.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
from highdicom import VolumeGeometry
from highdicom.seg import segread
from matplotlib.path import Path as Outline
from pydicom import dcmread

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dicom import is_scan, series_geometry
from nnunet_lite.data.discovery import CONTOURS, Discovery, Files
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import write_label
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError
from nnunet_lite.files import scratch

_TAGS = ["PatientID", "Modality", "SeriesInstanceUID", "SOPInstanceUID"]
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_ON_LINE = 1e-3  # voxels: a centre this near to a contour is on it
_SAME_GRID = 1e-2  # mm, of the geometry of a segmentation


@dataclass(frozen=True)
class MaskedSeries:
    """A DICOM series with its masks.

    Parameters
    ----------
    case : Case
        Named by the patient's id, with a number from the second series on. Its label map is still to be written.
    modality : str
        Such as "CT".
    masks : dict of Path to tuple of str
        Files of segmentations or contours, and the structures of each that are used.
    """

    case: Case
    modality: str
    masks: dict[Path, tuple[str, ...]]


def find_masked_series(
    files: Files, labels: Path, patterns: Sequence[str] = ()
) -> tuple[list[MaskedSeries], Discovery, dict[str, int]]:
    """Find the series that DICOM masks belong to.

    Parameters
    ----------
    files : Files
        What a folder contains.
    labels : Path
        The folder where label maps are to be written.
    patterns : sequence of str
        Patterns of the structures to use, or of the files of masks. Empty: all.

    Returns
    -------
    series : list of MaskedSeries
        Sorted by id.
    found : Discovery
        Their cases, and what is not used.
    counts : dict of str to int
        Structure -> number of cases that have it, sorted by name.

    Raises
    ------
    UserError
        Two masks of a series have a structure of the same name, no structure matches a pattern, or no mask has a
        series; or there are series of several modalities.
    """
    scans, about, owner = _headers(files)
    left_out = defaultdict[str, list[str]](list)
    masks = defaultdict[str, dict[Path, tuple[str, ...]]](dict)
    for path in files.masks:
        header, own = dcmread(path, stop_before_pixels=True, force=True), path.relative_to(files.root)
        uids = {
            str(e.value) for e in header.iterall() if e.keyword in ("SeriesInstanceUID", "ReferencedSOPInstanceUID")
        }
        found = {owner[uid] for uid in uids & owner.keys()}
        names = structure_names(header)
        used = [n for n in names if not patterns or any(fnmatchcase(n, p) or own.match(p) for p in patterns)]
        left_out["is not chosen"] += sorted({*names} - {*used} - {*left_out["is not chosen"]})
        if len(found) != 1:
            left_out["refers to several series" if found else "refers to no series of the folder"].append(str(own))
        elif used:
            masks[found.pop()][path] = tuple(used)
    if not masks:
        reasons = [f"{few(names, 9)} ({reason})" for reason, names in left_out.items() if names]
        what = f"no mask of a series can be used: {'; '.join(reasons) or 'they have no structures'}"
        raise UserError(what, files.root, "Give the folder of series and masks, and names of structures as --label.")
    series: list[MaskedSeries] = []
    numbers = Counter[str]()
    for uid, of_series in sorted(masks.items(), key=lambda item: scans[item[0]]):
        _require_one_of_each(files.root, of_series)
        place = _place(scans, uid)
        patient = re.sub(r"[^\w.-]+", "_", str(about[uid].get("PatientID") or "")).strip("_") or place.name
        numbers[patient] += 1
        name = f"{patient}_{numbers[patient]}" if numbers[patient] > 1 else patient
        case = Case(name, (place,), labels / f"{name}.nii.gz")
        series.append(MaskedSeries(case, str(about[uid].get("Modality") or "image"), of_series))
    kinds = Counter(one.modality for one in series)
    if len(kinds) > 1:
        what = f"masks are of {' and '.join(f'{plural(n, kind)} series' for kind, n in kinds.items())}"
        raise UserError(what, files.root, "Choose the files of masks with --label PATTERN.")
    left_out["has no masks"] = [str(_place(scans, uid).relative_to(files.root)) for uid in scans if uid not in masks]
    counts = Counter(name for one in series for names in one.masks.values() for name in names)
    series.sort(key=lambda one: one.case.id)
    unused = {reason: names for reason, names in left_out.items() if names}
    return series, Discovery(tuple(one.case for one in series), tuple(kinds), unused), dict(sorted(counts.items()))


def write_label_maps(series: Sequence[MaskedSeries], values: Mapping[str, int], folder: Path) -> list[str]:
    """Write the label maps of series, all or none. A voxel of several structures gets the smallest one.

    Parameters
    ----------
    series : sequence of MaskedSeries
        The series and their masks.
    values : mapping of str to int
        Structure -> value.
    folder : Path
        The folder to make.

    Returns
    -------
    list of str
        Which structures overlap, and by how many voxels.

    Raises
    ------
    UserError
        The folder exists, masks are on another grid than their series, or a contour is outside of it.
    """
    if folder.exists():
        raise UserError("exists already", folder, "Delete it, or give another --output.")
    overlaps = Counter[tuple[str, str]]()
    with scratch(folder.parent) as temporary:
        (temporary / folder.name).mkdir()
        for one in log.progress(series, len(series), "label maps"):
            label, geometry, common = read_masks(one, values)
            overlaps.update(common)
            write_label(temporary / folder.name / f"{one.case.id}.nii.gz", label, geometry)
        (temporary / folder.name).rename(folder)
    return [
        f"{large} and {small} overlap in {plural(n, 'voxel')}, taken as {small}"
        for (large, small), n in overlaps.items()
    ]


def structure_names(header: Any) -> list[str]:
    """Return the names of the structures in a DICOM file.

    Parameters
    ----------
    header : pydicom.Dataset
        Of a segmentation, or of a set of contours.

    Returns
    -------
    list of str
        Segments, or structures with closed contours.
    """
    if header.SOPClassUID == CONTOURS:
        return list(dict.fromkeys(name for name, _ in _contours(header)))
    return [str(segment.SegmentLabel).strip() for segment in header.SegmentSequence]


def read_masks(
    series: MaskedSeries, values: Mapping[str, int]
) -> tuple[np.ndarray, Geometry, dict[tuple[str, str], int]]:
    """Read the masks of a series as a label map. A voxel of several structures gets the smallest one.

    Parameters
    ----------
    series : MaskedSeries
        The series and its masks.
    values : mapping of str to int
        Structure -> value.

    Returns
    -------
    array : ndarray of int, shape (z, y, x)
        The label map.
    geometry : Geometry
        The grid of the series.
    overlaps : dict of (str, str) to int
        Larger and smaller structure -> number of voxels that are in both.

    Raises
    ------
    UserError
        The masks are on another grid, or a contour is outside of the series.
    """
    geometry = series_geometry(series.case.images[0])
    masks: dict[str, np.ndarray] = {}
    for path, names in series.masks.items():
        header = dcmread(path, force=True)
        read = _fill_contours if header.SOPClassUID == CONTOURS else _read_segments
        masks |= {name: mask for name, mask in read(path, header, geometry).items() if name in names}
    label = np.zeros(geometry.shape, np.uint16)
    overlaps = defaultdict[tuple[str, str], int](int)
    names_of = {value: name for name, value in values.items()}
    for name in sorted(masks, key=lambda name: -int(masks[name].sum())):
        below, counts = np.unique(label[masks[name]], return_counts=True)
        for value, count in zip(below.tolist(), counts.tolist(), strict=True):
            if value:
                overlaps[names_of[value], name] += count
        label[masks[name]] = values[name]
    return label, geometry, dict(overlaps)


def _headers(files: Files) -> tuple[dict[str, list[Path]], dict[str, Any], dict[str, str]]:
    """Return the files of each series by its UID, the header of one, and the series of each UID of a series or file."""
    scans = defaultdict[str, list[Path]](list)
    about: dict[str, Any] = {}
    owner: dict[str, str] = {}
    paths = [path for path, uid in files.dicom.items() if is_scan(uid)]
    for path in log.progress(paths, len(paths), "DICOM headers"):
        header = dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=True)
        series = str(header.get("SeriesInstanceUID", ""))
        scans[series].append(path)
        about.setdefault(series, header)
        owner |= {series: series, str(header.get("SOPInstanceUID", "")): series}
    return dict(scans), about, owner


def _place(scans: dict[str, list[Path]], uid: str) -> Path:
    folder = scans[uid][0].parent
    alone = all(path.parent != folder for other, paths in scans.items() if other != uid for path in paths)
    return folder if alone else scans[uid][0]


def _require_one_of_each(root: Path, masks: dict[Path, tuple[str, ...]]) -> None:
    files_of = defaultdict[str, list[str]](list)
    for path, names in masks.items():
        for name in names:
            files_of[name].append(str(path.relative_to(root)))
    for name, files in files_of.items():
        if len(files) > 1:
            fix = f"Choose with --label PATTERN, such as --label '{files[0]}'."
            raise UserError(f"{len(files)} masks of a series have a structure {name!r}: {few(files)}", root, fix)


def _read_segments(path: Path, header: Any, geometry: Geometry) -> dict[str, np.ndarray]:
    """Return the masks (z, y, x) of a segmentation on a grid."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(geometry.direction, (3, 3))[:, ::-1] * geometry.spacing
    affine[:3, 3] = geometry.origin
    grid = VolumeGeometry(affine, geometry.shape, "PATIENT")
    try:
        volume = segread(path).get_volume().match_geometry(grid, tol=_SAME_GRID)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"is on another grid than its series ({error})".replace("\n", " "), path) from None
    masks = np.moveaxis(volume.array, 3, 0) >= 0.5
    return dict(zip(structure_names(header), masks, strict=True))


def _fill_contours(path: Path, header: Any, geometry: Geometry) -> dict[str, np.ndarray]:
    """Return the masks (z, y, x) of contours on a grid."""
    masks = defaultdict[str, np.ndarray](lambda: np.zeros(geometry.shape, bool))
    cosines, (sz, sy, sx) = np.reshape(geometry.direction, (3, 3)), geometry.spacing
    for name, points in _contours(header):
        x, y, z = ((points - geometry.origin) @ cosines / (sx, sy, sz)).T  # voxels
        depth = round(float(z.mean()))
        if np.abs(z - depth).max() > 0.5 + _ON_LINE or not 0 <= depth < geometry.shape[0]:
            raise UserError(f"a contour of {name} is outside of the slices of its series", path)
        box = tuple(
            slice(max(0, floor(a.min() - _ON_LINE)), max(0, min(n, floor(a.max() + _ON_LINE) + 1)))
            for a, n in zip((y, x), geometry.shape[1:], strict=True)
        )
        turn = np.sign(np.sum(y * np.roll(x, -1) - np.roll(y, -1) * x))  # matplotlib widens by the sense of rotation
        centres = np.stack(np.meshgrid(*(np.arange(s.start, s.stop) for s in box), indexing="ij"), -1)
        inside = Outline(np.stack([y, x], 1)).contains_points(centres.reshape(-1, 2), radius=2 * _ON_LINE * turn)
        masks[name][depth][box] ^= inside.reshape(centres.shape[:2])
    return dict(masks)


def _contours(header: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the points (n, 3), LPS mm, of each closed contour of a planar structure."""
    names = {roi.ROINumber: str(roi.ROIName).strip() for roi in header.StructureSetROISequence}
    for roi in header.get("ROIContourSequence") or ():
        for contour in roi.get("ContourSequence") or ():
            if contour.ContourGeometricType in _CLOSED:
                yield names[roi.ReferencedROINumber], np.reshape(np.asarray(contour.ContourData, float), (-1, 3))
