"""One preprocessed case on disk: a folder that is there whole or not at all.

image.b2nd       blosc2, (channels, z, y, x) of the plan's `stored_as`; float32 where float16 would overflow
label.b2nd       blosc2, (z, y, x) classes, uint8 (wider only for more than 256); absent for a case without label;
                 where a channel is normalised inside the nonzero mask, `Labels.outside_class` outside of it
foreground.npy   int16 or int32 (n, 3), voxels of each class or region, and those not ignored, one after the other
case.json        how many voxels each has, the placement, and size and checksum of the other files
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.files import must_fit, read_json, scratch
from nnunet_lite.planning.schema import Precision
from nnunet_lite.preprocessing.pipeline import Placement, Preprocessed
from nnunet_lite.preprocessing.resampling import label_boxes

_BLOCK_BYTES = 1 << 16  # is decompressed at once: fits a core's cache
_CHUNK_BYTES = 1 << 22
_SAMPLES, _SHARE = 10_000, 0.01  # foreground voxels kept of each class: the larger of both, as in nnU-Net
_ANNOTATED = -1
_SLAB = 1 << 20  # voxels looked at together


@dataclass(frozen=True)
class StoredCase:
    """A preprocessed case on disk; opening it reads no voxels, and any number of threads may read it.

    Parameters
    ----------
    image : (channels, z, y, x) float16, memory-mapped; `image[:, z0:z1, y0:y1, x0:x1]` reads that box as a numpy array.
    label : (z, y, x) classes, likewise; None for a case without label.
    foreground : voxels (n, 3) of each class but the background, or of each region counted from 1; see `sampled_voxels`.
    annotated : voxels (n, 3) that are not ignored; None for a data set without ignore label.
    key : name of the case's folder, which says what it was made of.
    previous : (z, y, x) classes that the previous stage of a cascade predicted on this grid; see training/cascade.py.
    """

    case_id: str
    image: Any
    label: Any
    foreground: dict[int, np.ndarray]
    annotated: np.ndarray | None
    placement: Placement
    key: str
    previous: Any = None


def is_whole(folder: Path) -> bool:
    """Whether a case is there as it was written: its files have their sizes and, where one changed since, their sums.

    Reads a file only if it is newer than case.json, which is written last; so an unchanged data set costs no reading.
    """
    about = folder / "case.json"
    try:
        written = about.stat().st_mtime_ns
        for name, (size, checksum) in read_json(about)["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != size or (stat.st_mtime_ns > written and _checksum(folder / name) != checksum):
                return False
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return False
    return True


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found = zlib.crc32(part, found)
    return found


def read_stored(folder: Path, case_id: str) -> StoredCase:
    """Open the folder of a case."""
    about = read_json(folder / "case.json")
    foreground: dict[int, np.ndarray] = {}
    if about["foreground"]:
        voxels = np.load(folder / "foreground.npy", mmap_mode="r")
        start = 0
        for number, count in about["foreground"]:
            foreground[number] = voxels[start : start + count]
            start += count
    annotated = foreground.pop(_ANNOTATED, None)
    label = _open(folder / "label.b2nd") if about["labelled"] else None
    place = Placement.from_json(about["placement"])
    return StoredCase(case_id, _open(folder / "image.b2nd"), label, foreground, annotated, place, folder.name)


def write_stored(folder: Path, case: Preprocessed, labels: Labels, patch: Sequence[int], precision: Precision) -> None:
    """Write a case; chunks and blocks follow from the patch (z, y, x) that will be read."""
    with scratch(folder.parent) as temporary:
        made = temporary / folder.name
        made.mkdir()
        with must_fit(folder, made):
            _write_files(made, case, labels, patch, precision)
        if folder.is_dir() and not is_whole(folder):
            shutil.rmtree(folder)
        try:
            made.rename(folder)
        except OSError:
            if not is_whole(folder):  # else another process has made it meanwhile, of the same files
                raise


def _write_files(folder: Path, case: Preprocessed, labels: Labels, patch: Sequence[int], precision: Precision) -> None:
    _write(folder / "image.b2nd", _fitting(case.image, precision), patch)
    voxels: list[tuple[int, np.ndarray]] = []
    if case.classes is not None:
        kind = np.min_scalar_type(labels.outside_class)
        _write(folder / "label.b2nd", case.classes.astype(kind, copy=False), patch)
        voxels = sampled_voxels(case.classes, labels)
        np.save(folder / "foreground.npy", np.concatenate([np.zeros((0, 3), np.int16), *(v for _, v in voxels)]))
    about = {
        "labelled": case.classes is not None,
        "foreground": [(number, len(v)) for number, v in voxels],
        "placement": case.placement.to_json(),
        "files": {path.name: (path.stat().st_size, _checksum(path)) for path in sorted(folder.iterdir())},
    }
    (folder / "case.json").write_text(json.dumps(about))


def sampled_voxels(classes: np.ndarray, labels: Labels) -> list[tuple[int, np.ndarray]]:
    """Voxels (n, 3) of each class but the background, or of each region (from 1), found in (z, y, x).

    Of each 10 000 are kept, or a hundredth of all where that is more. With an ignore label, those of all other classes
    come last, numbered -1. The same classes give the same voxels.
    """
    classes_of = labels.region_classes if labels.has_regions else [(c,) for c in range(1, labels.n_classes)]
    wanted = list(enumerate(classes_of, 1))
    if labels.ignore_class is not None:
        wanted.append((_ANNOTATED, (*range(labels.n_classes), labels.outside_class)))
    boxes = dict(label_boxes(classes))
    whole = tuple(slice(0, n) for n in classes.shape)
    kind = np.int16 if max(classes.shape) <= np.iinfo(np.int16).max else np.int32
    out = []
    for number, members in wanted:
        found = [whole if member == 0 else boxes[member] for member in members if member == 0 or member in boxes]
        if found:
            box = tuple(slice(min(b[a].start for b in found), max(b[a].stop for b in found)) for a in range(3))
            voxels = _sample(classes[box], members, np.random.default_rng([1234, number - _ANNOTATED]))
            out.append((number, (voxels + [span.start for span in box]).astype(kind)))
    return out


def chunks_and_blocks(shape: Sequence[int], patch: Sequence[int], itemsize: int) -> tuple[list[int], list[int]]:
    """Shapes of blosc2's chunks (files' units) and blocks (what is decompressed at once) for arrays read in patches.

    Both are the patch, halved along its longest axis until small enough; a block holds one channel.
    """
    lead = len(shape) - 3
    wanted = [min(n, p) for n, p in zip(shape[lead:], patch, strict=True)]

    def halved(size: list[int], most: int) -> list[int]:
        size = list(size)
        while math.prod(size) * itemsize > most and max(size) > 1:
            longest = size.index(max(size))
            size[longest] = -(-size[longest] // 2)
        return size

    chunks = halved(wanted, _CHUNK_BYTES)
    return [*shape[:lead], *chunks], [*[1] * lead, *halved(chunks, _BLOCK_BYTES)]


def _sample(classes: np.ndarray, members: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Some voxels (n, 3) of some classes, in the order of the array; slab by slab, with little memory."""
    flat = classes.reshape(-1) if classes.flags.c_contiguous else np.ascontiguousarray(classes).reshape(-1)
    starts = range(0, flat.size, _SLAB)
    counts = [int(np.count_nonzero(_is_one_of(flat[start : start + _SLAB], members))) for start in starts]
    total = sum(counts)
    kept = min(total, max(_SAMPLES, math.ceil(total * _SHARE)))
    ranks = np.arange(kept)
    if total > kept:
        ranks = np.sort(rng.choice(total, kept, replace=False, shuffle=False))
    found, before = [np.zeros(0, np.int64)], 0
    for start, count in zip(starts, counts, strict=True):
        wanted = ranks[np.searchsorted(ranks, before) : np.searchsorted(ranks, before + count)] - before
        if wanted.size:
            found.append(np.flatnonzero(_is_one_of(flat[start : start + _SLAB], members))[wanted] + start)
        before += count
    return np.stack(np.unravel_index(np.concatenate(found), classes.shape), axis=1)


def _is_one_of(part: np.ndarray, members: tuple[int, ...]) -> np.ndarray:
    return part == members[0] if len(members) == 1 else np.isin(part, members)


def _fitting(image: np.ndarray, precision: Precision) -> np.ndarray:
    """The image as it is stored: float16 unless float32 is wanted or needed."""
    if precision == "float16" and max(-float(image.min()), float(image.max())) <= float(np.finfo(np.float16).max):
        return image.astype(np.float16)
    return image


def _write(path: Path, array: np.ndarray, patch: Sequence[int]) -> None:
    import blosc2

    chunks, blocks = chunks_and_blocks(array.shape, patch, array.itemsize)
    # zstd's level 1 is within a tenth of the size of level 8 at a twentieth of the time
    how = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.SHUFFLE], nthreads=1)
    blosc2.asarray(np.ascontiguousarray(array), urlpath=str(path), chunks=chunks, blocks=blocks, cparams=how, mode="w")


def _open(path: Path) -> Any:
    import blosc2

    return blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
