"""One preprocessed case on disk: a folder that exists whole or not at all.

image.b2nd       blosc2, (channels, z, y, x) of the plan's `stored_as`; float32 where float16 would overflow
label.b2nd       blosc2, (z, y, x) classes, uint8 (wider only for more than 256); where a channel is normalised inside
                 the nonzero mask, `Labels.outside_class` outside of it
foreground.npy   int16 or int32 (n, 3), voxels of each class or region, then those that are not ignored
case.json        how many voxels each has, the placement, and size and checksum of the other files

`write_stored_case` and `read_stored_case` are the way in and out; `sample_voxels` chooses the voxels that training
centres patches on.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, scratch
from nnunet_lite.planning.schema import Precision
from nnunet_lite.preprocessing.pipeline import Placement, Preprocessed
from nnunet_lite.preprocessing.resampling import label_boxes

_BLOCK_BYTES = 1 << 16  # is decompressed at once: fits a core's cache
_CHUNK_BYTES = 1 << 22  # of one channel
_CHUNK_CHANNELS = 16  # at most
SAMPLES, _SHARE = 10_000, 0.01  # foreground voxels kept of each class: the larger of both, as in nnU-Net
_ANNOTATED = -1
_SLAB = 1 << 20  # voxels searched at a time


@dataclass(frozen=True)
class CaseArrays:
    """A preprocessed case: numpy arrays, tensors on a device, or arrays on disk.

    Parameters
    ----------
    case_id : str
        Its id.
    image : array, shape (channels, z, y, x)
        float16 or float32.
    label : array, shape (z, y, x)
        Classes.
    foreground : dict of int to ndarray, shape (n, 3)
        Voxels of each class but the background, or of each region counted from 1; see `sample_voxels`.
    annotated : ndarray or None, shape (n, 3)
        Voxels that are not ignored; None for a dataset without ignore label.
    previous : array or None, shape (z, y, x)
        Classes that the previous stage of a cascade predicted on this grid; see training/cascade.py.
    teacher : array or None, shape (foreground classes or regions, z, y, x)
        Probabilities that other models predict, uint8 with 255 for 1; see inference/teachers.py.
    """

    case_id: str
    image: Any
    label: Any
    foreground: dict[int, np.ndarray]
    annotated: np.ndarray | None
    previous: Any = None
    teacher: Any = None


@dataclass(frozen=True, kw_only=True)
class StoredCase(CaseArrays):
    """A case on disk; opening it reads no voxels, and any number of threads may read it.

    Its arrays are of blosc2, memory-mapped: `image[:, z0:z1, y0:y1, x0:x1]` reads that box as a numpy array.

    Parameters
    ----------
    placement : Placement
        Where the array is in its image.
    key : str
        Name of the case's folder, which contains a hash of what it was made of.
    """

    placement: Placement
    key: str


def is_whole(folder: Path) -> bool:
    """Check that a case exists as it was written: its files have their sizes and, where one changed since, their sums.

    Reads a file only if it is newer than case.json, which is written last; so an unchanged dataset costs no reading.
    """
    description = folder / "case.json"
    try:
        written = description.stat().st_mtime_ns
        for name, (size, checksum) in read_json(description)["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != size or (stat.st_mtime_ns > written and _checksum(folder / name) != checksum):
                return False
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return False
    return True


def _checksum(path: Path) -> int:
    return zlib.crc32(np.memmap(path, np.uint8, "r").data)


def read_stored_case(folder: Path, case_id: str) -> StoredCase:
    """Open the folder of a case."""
    description = read_json(folder / "case.json")
    foreground: dict[int, np.ndarray] = {}
    if description["foreground"]:
        voxels = np.load(folder / "foreground.npy", mmap_mode="r")
        start = 0
        for number, count in description["foreground"]:
            foreground[number] = voxels[start : start + count]
            start += count
    annotated = foreground.pop(_ANNOTATED, None)
    image, label = (open_array(folder / f"{name}.b2nd") for name in ("image", "label"))
    placement = Placement.from_json(description["placement"])
    return StoredCase(case_id, image, label, foreground, annotated, placement=placement, key=folder.name)


def write_stored_case(
    folder: Path, case: Preprocessed, labels: Labels, patch: Sequence[int], precision: Precision
) -> None:
    """Write a case.

    Parameters
    ----------
    folder : Path
        Where to; the last part of the path is the case's key.
    case : Preprocessed
        The arrays.
    labels : Labels
        The dataset's labels.
    patch : sequence of int
        Voxels (z, y, x) that training will read at once, which decide chunks and blocks.
    precision : {"float16", "float32"}
        Type of the stored image.
    """
    with scratch(folder.parent) as temporary:
        new = temporary / folder.name
        new.mkdir()
        _write_files(new, case, labels, patch, precision)
        if folder.is_dir() and not is_whole(folder):
            shutil.rmtree(folder)
        try:
            new.rename(folder)
        except OSError:
            if not is_whole(folder):  # otherwise another process has made it meanwhile, of the same files
                raise


def _write_files(folder: Path, case: Preprocessed, labels: Labels, patch: Sequence[int], precision: Precision) -> None:
    assert case.classes is not None  # every case of a planned dataset has a reference
    files: dict[str, tuple[int, int]] = {}

    def write(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        files[name] = len(content), zlib.crc32(content)

    voxels, stored = sample_voxels(case.classes, labels), io.BytesIO()
    np.save(stored, np.concatenate([np.zeros((0, 3), np.int16), *(v for _, v in voxels)]))
    write("foreground.npy", stored.getvalue())
    image, largest = case.image, max(-float(case.image.min()), float(case.image.max()))
    if precision == "float16" and largest <= float(np.finfo(np.float16).max):
        image = image.astype(np.float16)
    write("image.b2nd", compress_array(image, patch))
    dtype = np.min_scalar_type(labels.outside_class)
    write("label.b2nd", compress_array(case.classes.astype(dtype, copy=False), patch))
    description = {
        "foreground": [(number, len(v)) for number, v in voxels],
        "placement": asdict(case.placement),
        "files": files,
    }
    (folder / "case.json").write_text(json.dumps(description))


def compress_array(array: np.ndarray, patch: Sequence[int], key: str = "") -> bytes:
    """Return the file of an array (..., z, y, x) that is read in patches (z, y, x); its metadata has the key.

    blosc2 itself would open the file some twenty times to write it.
    """
    import blosc2  # a sixth of a second, which predicting does not need

    chunks, blocks = chunks_and_blocks(array.shape, patch, array.itemsize)
    # zstd's level 1 is within a tenth of the size of level 8 at a twentieth of the time
    how = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    made = blosc2.asarray(np.ascontiguousarray(array), chunks=chunks, blocks=blocks, cparams=how, contiguous=True)
    if key:
        made.vlmeta["key"] = key
    content: bytes = made.to_cframe()
    return content


def open_array(path: Path) -> Any:
    """Open an array on disk: `array[..., z0:z1, y0:y1, x0:x1]` reads that box as a numpy array."""
    import blosc2

    return blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))


def chunks_and_blocks(shape: Sequence[int], patch: Sequence[int], itemsize: int) -> tuple[list[int], list[int]]:
    """Choose blosc2's chunks (units of the file) and blocks (units of decompression) for arrays read in patches.

    Both are the patch, halved along its longest axis until small enough. A chunk has 16 channels at most, a block one.

    Parameters
    ----------
    shape : sequence of int
        (channels, z, y, x) or (z, y, x).
    patch : sequence of int
        Voxels (z, y, x) that are read at once.
    itemsize : int
        Bytes of a voxel.

    Returns
    -------
    tuple of two lists of int
        Shapes of chunks and blocks, with the axes of `shape`.
    """
    lead = len(shape) - 3

    def halve(size: list[int], most: int) -> list[int]:
        size = list(size)
        while math.prod(size) * itemsize > most and max(size) > 1:
            longest = size.index(max(size))
            size[longest] = -(-size[longest] // 2)
        return size

    chunks = halve([min(n, p) for n, p in zip(shape[lead:], patch, strict=True)], _CHUNK_BYTES)
    return [*(min(n, _CHUNK_CHANNELS) for n in shape[:lead]), *chunks], [*[1] * lead, *halve(chunks, _BLOCK_BYTES)]


def sample_voxels(classes: np.ndarray, labels: Labels) -> list[tuple[int, np.ndarray]]:
    """Sample voxels of each class but the background, or of each region.

    10 000 are kept, or a hundredth of all where that is more. The same classes give the same voxels.

    Parameters
    ----------
    classes : ndarray, shape (z, y, x)
        Classes of a case.
    labels : Labels
        The dataset's labels.

    Returns
    -------
    list of tuple of int and ndarray, shape (n, 3)
        Class or region (counted from 1) and voxels. With an ignore label, the voxels of all other classes come last,
        numbered -1.
    """
    groups = list(enumerate(labels.region_classes, 1))
    if labels.ignore_class is not None:
        groups.append((_ANNOTATED, (*range(labels.n_classes), labels.outside_class)))
    boxes = dict(label_boxes(classes))
    whole = tuple(slice(0, n) for n in classes.shape)
    dtype = np.int16 if max(classes.shape) <= np.iinfo(np.int16).max else np.int32
    out = []
    for number, members in groups:
        inside = [whole if member == 0 else boxes[member] for member in members if member == 0 or member in boxes]
        if inside:
            box = tuple(slice(min(b[a].start for b in inside), max(b[a].stop for b in inside)) for a in range(3))
            voxels = _sample(classes[box], members, np.random.default_rng([1234, number - _ANNOTATED]))
            out.append((number, (voxels + [span.start for span in box]).astype(dtype)))
    return out


def _sample(classes: np.ndarray, members: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Some voxels (n, 3) of some classes, in the order of the array; slab by slab, with little memory."""
    flat = np.ascontiguousarray(classes).reshape(-1)
    starts = range(0, flat.size, _SLAB)

    def is_member(start: int) -> np.ndarray:
        slab = flat[start : start + _SLAB]
        return slab == members[0] if len(members) == 1 else np.isin(slab, members)

    counts = [int(np.count_nonzero(is_member(start))) for start in starts]
    total = sum(counts)
    kept = min(total, max(SAMPLES, math.ceil(total * _SHARE)))
    ranks = np.arange(kept)
    if total > kept:
        ranks = np.sort(rng.choice(total, kept, replace=False, shuffle=False))
    voxels, before = [np.zeros(0, np.int64)], 0
    for start, count in zip(starts, counts, strict=True):
        chosen = ranks[np.searchsorted(ranks, before) : np.searchsorted(ranks, before + count)] - before
        if chosen.size:
            voxels.append(np.flatnonzero(is_member(start))[chosen] + start)
        before += count
    return np.stack(np.unravel_index(np.concatenate(voxels), classes.shape), axis=1)
