"""Label maps from DICOM segmentations (DICOM-SEG) and contours (RTSTRUCT); needs the extra [dicom].

A mask belongs to the series that it refers to by UID. Contours are filled slice by slice: a voxel is inside if its
centre is inside the contour or on it. Contours of one structure in one slice are combined by even-odd, so that a
contour inside another is a hole. A contour belongs to the nearest slice, at most half a slice away.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
from highdicom import VolumeGeometry
from highdicom.seg import segread
from matplotlib.path import Path as Outline
from pydicom import dcmread

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import labels_of
from nnunet_lite.data.dicom import is_scan, series_geometry
from nnunet_lite.data.discovery import CONTOURS, Discovery, Files
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import write_label
from nnunet_lite.data.labels import BACKGROUND
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError, describe
from nnunet_lite.files import scratch

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_ON_LINE = 1e-3  # voxels: a centre this near to a contour is on it
_SAME_GRID = 1e-2  # mm, of the geometry of a segmentation
_SERIES = "SeriesInstanceUID"
_CHOOSE = "Choose structures, or the files of masks, with --label PATTERN."


def convert_masks(
    files: Files, folder: Path, patterns: Sequence[str] = ()
) -> tuple[Discovery, dict[str, int], list[str]]:
    """Write the label maps of all series that have masks, or none. A voxel of several structures gets the smallest one.

    Parameters
    ----------
    files : Files
        What a folder contains.
    folder : Path
        The folder of label maps, which is made.
    patterns : sequence of str
        Patterns of the structures to use, or of the files of masks. Empty: all.

    Returns
    -------
    found : Discovery
        The cases, named by the patient's id, with a number from the second series on.
    labels : dict of str to int
        Background and structures, sorted by name.
    notes : list of str
        Structures that not all cases have, or that overlap larger ones.

    Raises
    ------
    UserError
        No mask has a series and a structure that matches; a structure of a series is in two files; the series are of
        several modalities; the folder exists; or a mask is on another grid than its series.
    """
    scans, masks, left_out = _masks_of_series(files, patterns)
    counts = Counter(name for of_series in masks.values() for names in of_series.values() for name in names)
    labels = {BACKGROUND: 0} | {name: value for value, name in enumerate(sorted(counts), 1)}
    labels_of({"labels": labels}, None)
    if folder.exists():
        raise UserError("exists already", folder, "Delete it, or give another --output.")
    cases, modalities, overlaps = list[Case](), set[str](), Counter[str]()
    slices_in = Counter(path.parent for slices in scans.values() for path in slices)
    with scratch(folder.parent) as temporary:
        (temporary / folder.name).mkdir()
        for uid in log.progress(sorted(masks, key=scans.__getitem__), len(masks), "label maps"):
            first = scans[uid][0]
            place = first.parent if slices_in[first.parent] == len(scans[uid]) else first
            header = _header(first, ["PatientID", "Modality"])
            modalities.add(str(header.get("Modality") or "image"))
            patient = re.sub(r"[^\w.-]+", "_", str(header.get("PatientID") or "")).strip("_") or place.name
            taken = {case.id for case in cases}
            name = next(n for n in (patient, *(f"{patient}_{i}" for i in range(2, len(masks) + 2))) if n not in taken)
            label, geometry = _label_map(place, masks[uid], labels, overlaps)
            write_label(temporary / folder.name / f"{name}.nii.gz", label, geometry)
            cases.append(Case(name, (place,), folder / f"{name}.nii.gz"))
        if len(modalities) > 1:
            what = f"has masks of {' and '.join(sorted(modalities))}"
            raise UserError(what, files.root, "Choose the files of masks with --label PATTERN.")
        (temporary / folder.name).rename(folder)
    notes = [f"{name} is in {n} of {len(cases)} cases" for name, n in sorted(counts.items()) if n < len(cases)]
    shared = [f"{plural(n, 'voxel')} of {name}" for name, n in overlaps.items() if n]
    notes += [f"in larger structures too, and taken from them: {', '.join(shared)}"] if shared else []
    return Discovery(tuple(cases), tuple(modalities), left_out), labels, notes


def _masks_of_series(
    files: Files, patterns: Sequence[str]
) -> tuple[dict[str, list[Path]], dict[str, dict[Path, list[str]]], dict[str, list[str]]]:
    """Return the slices and the masks with their structures by the UID of a series, and what is left out."""
    scans = defaultdict[str, list[Path]](list)
    paths = [path for path, uid in files.dicom.items() if is_scan(uid)]
    for path in log.progress(paths, len(paths), "DICOM headers"):
        scans[str(_header(path, [_SERIES]).get(_SERIES))].append(path)
    left_out = defaultdict[str, list[str]](list)
    masks = defaultdict[str, dict[Path, list[str]]](dict)
    for path in files.masks:
        relative = path.relative_to(files.root)
        with _readable(path):
            header = _header(path)
            names = [name for name in _structure_names(header) if name.lower() != BACKGROUND]
        series = {str(element.value) for element in header.iterall() if element.keyword == _SERIES} & scans.keys()
        used = [n for n in names if not patterns or any(fnmatchcase(n, p) or relative.match(p) for p in patterns)]
        left_out["structures that were not chosen"] += set(names) - set(used)
        if len(series) != 1:
            left_out[f"masks that refer to {len(series)} series of the folder"].append(str(relative))
        elif used:
            masks[series.pop()][path] = used
    left_out["series without masks"] = [
        str(scans[uid][0].parent.relative_to(files.root)) for uid in scans if uid not in masks
    ]
    unused = {reason: sorted({*names}) for reason, names in left_out.items() if names}
    if not masks:
        reasons = [f"{reason} ({few(names, 9)})" for reason, names in unused.items()]
        raise UserError(f"has no mask that can be used: {', '.join(reasons)}", files.root, _CHOOSE)
    for of_series in masks.values():
        names = [name for names in of_series.values() for name in names]
        if len(set(names)) < len(names):
            what = f"{few([str(path) for path in of_series])} have the same structures of one series"
            raise UserError(what, files.root, _CHOOSE)
    return scans, masks, unused


def _label_map(
    series: Path, masks: Mapping[Path, list[str]], values: Mapping[str, int], overlaps: Counter[str]
) -> tuple[np.ndarray, Geometry]:
    """Return the label map of a series; count the voxels of each structure that are in larger ones too."""
    geometry = series_geometry(series)
    found: dict[str, np.ndarray] = {}
    for path, names in masks.items():
        with _readable(path):
            found |= {name: mask for name, mask in _read_masks(path, geometry).items() if name in names}
    label = np.zeros(geometry.shape, np.uint16)
    for name in sorted(found, key=lambda name: -int(found[name].sum())):
        overlaps[name] += int(np.count_nonzero(label[found[name]]))
        label[found[name]] = values[name]
    return label, geometry


def _structure_names(header: Any) -> list[str]:
    if header.SOPClassUID == CONTOURS:
        return list(dict.fromkeys(name for _, name, _ in _contours(header)))
    return list(dict.fromkeys(str(segment.SegmentLabel).strip() for segment in header.SegmentSequence))


def _header(path: Path, tags: list[str] | None = None) -> Any:
    return dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an error of pydicom or highdicom into one line."""
    try:
        yield
    except (AttributeError, KeyError, ValueError, RuntimeError, EOFError) as error:
        raise UserError(f"cannot be used as masks of its series ({describe(error)})", path) from error


def _read_masks(path: Path, geometry: Geometry) -> dict[str, np.ndarray]:
    """Return the masks (z, y, x) of the structures of a file on the grid of their series."""
    header = _header(path)
    if header.SOPClassUID == CONTOURS:
        return _fill_contours(path, header, geometry)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(geometry.direction, (3, 3))[:, ::-1] * geometry.spacing
    affine[:3, 3] = geometry.origin
    file = segread(path)
    volume = file.get_volume().match_geometry(VolumeGeometry(affine, geometry.shape, "PATIENT"), tol=_SAME_GRID)
    names = [file.get_segment_description(number).segment_label.strip() for number in file.segment_numbers]
    return _united(zip(names, np.moveaxis(volume.array, 3, 0) >= 0.5, strict=True))  # without a background segment


def _fill_contours(path: Path, header: Any, geometry: Geometry) -> dict[str, np.ndarray]:
    masks = defaultdict[tuple[str, int], np.ndarray](lambda: np.zeros(geometry.shape, bool))
    (depth, height, width), (sz, sy, sx) = geometry.shape, geometry.spacing
    for number, name, points in _contours(header):
        x, y, z = ((points - geometry.origin) @ np.reshape(geometry.direction, (3, 3)) / (sx, sy, sz)).T  # voxels
        n = round(float(z.mean()))
        if np.abs(z - n).max() > 0.5 + _ON_LINE or not 0 <= n < depth:
            raise UserError(f"a contour of {name} is outside of the slices of its series", path)
        rows, columns = (
            np.arange(max(0, ceil(a.min() - _ON_LINE)), min(size, floor(a.max() + _ON_LINE) + 1))
            for a, size in ((y, height), (x, width))
        )
        centres = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
        turn = np.sign(np.sum(y * np.roll(x, -1) - np.roll(y, -1) * x))  # by which matplotlib widens, not narrows
        inside = Outline(np.stack([y, x], 1)).contains_points(centres, radius=2 * _ON_LINE * turn)
        masks[name, number][n][np.ix_(rows, columns)] ^= inside.reshape(len(rows), len(columns))
    return _united((name, mask) for (name, _), mask in masks.items())


def _united(masks: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return one mask for each name: lesions may be structures of their own that share a name."""
    found: dict[str, np.ndarray] = {}
    for name, mask in masks:
        found[name] = found[name] | mask if name in found else mask
    return found


def _contours(header: Any) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yield number and name of the structure, and the points (n, 3), LPS mm, of each closed contour."""
    names = {roi.ROINumber: str(roi.ROIName).strip() for roi in header.StructureSetROISequence}
    for roi in header.get("ROIContourSequence") or ():
        for contour in roi.get("ContourSequence") or ():
            if contour.ContourGeometricType in _CLOSED:
                number = int(roi.ReferencedROINumber)
                yield number, names[number], np.reshape(np.asarray(contour.ContourData, float), (-1, 3))
