"""Where the preprocessed cases are kept while training: on the training device, in RAM, or on disk.

On disk the arrays are compressed. blosc2 holds Python's lock while it decompresses: two threads read no faster than
one (46 and 49 patches of 128 x 128 x 128 voxels a second), and the thread that feeds a GPU stands still meanwhile. So
training on GPUs, or by several processes, memory-maps uncompressed copies (752 and 669 patches a second). The system
keeps as many of their pages in RAM as fit, once for all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_lite import log
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic, locked
from nnunet_lite.networks.devices import free_device_memory, is_out_of_memory
from nnunet_lite.preprocessing.stored_case import CaseArrays, StoredCase
from nnunet_lite.settings import Cache
from nnunet_lite.system import GB, allow_open_files, cpus, free_memory, in_units

_SHARE = 0.5  # of the free memory, at most, is used for cases
_ARRAYS = ("image", "label", "previous", "teacher")  # of a case
_PLACES = {"device": "kept on {device}", "ram": "kept in RAM", "disk": "read from disk"}


def load_cases(
    case_ids: Sequence[str],
    open_case: Callable[[str], StoredCase],
    cache: Cache,
    device: torch.device,
    reserve_gb: float = 0.0,
    processes: int = 1,
) -> Sequence[CaseArrays]:
    """Load the cases to where `cache` says; cases on disk are read patch by patch.

    Parameters
    ----------
    case_ids : sequence of str
        Ids of the cases.
    open_case : callable
        Opens the stored arrays of a case without reading them.
    cache : str
        "device", "ram" or "disk". "auto" takes the GPU if the cases need less than half of its memory that is free
        without the `reserve_gb` of training, otherwise RAM if they need less than half of it, otherwise the disk.
        Several processes share what is in RAM, as memory maps.
    device : torch.device
        Training device.
    reserve_gb : float
        GPU memory (GB) that training needs.
    processes : int
        How many processes load the same cases.

    Returns
    -------
    sequence of CaseArrays
        The cases, in the order of their ids.

    Raises
    ------
    UserError
        The memory of the device is too small.
    """
    needed = sum(_bytes(_arrays_of(open_case(case_id))) for case_id in case_ids) if cache != "disk" else 0
    if cache != "disk":
        cache, reason = choose_cache(needed, device, reserve_gb) if cache == "auto" else (cache, "as set")
        what, place = plural(len(case_ids), "case"), _PLACES[cache].format(device=device)
        log.info(f"{what}, {in_units(needed)}, {place}: {reason}")
    if cache == "disk" or (cache == "ram" and processes > 1):
        # a case holds up to four open files, so the limit of this process is raised
        allow_open_files()
        cases = [open_case(case_id) for case_id in case_ids]
        return map_cases(cases) if device.type != "cpu" or processes > 1 else cases

    def load(case_id: str) -> CaseArrays:
        case = load_case(open_case(case_id))
        return move_case(case, device) if cache == "device" else case  # at once: RAM may not hold all of them

    try:
        return log.map_in_threads(load, case_ids, cpus(), "loading cases")
    except RuntimeError as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
        raise UserError(f"the memory of {device} is too small for the cases", fix="Use --cache ram.") from None


def choose_cache(needed: int, device: torch.device, reserve_gb: float) -> tuple[Cache, str]:
    """Return where "auto" keeps cases of this many bytes, and why; see `load_cases`."""
    gpu_free, ram_free = 0.0, free_memory()
    if device.type == "cuda":
        gpu_free = max(0.0, free_device_memory(device) - reserve_gb * GB)
        if needed < _SHARE * gpu_free:
            return "device", f"training leaves {in_units(gpu_free)} of its memory"
    and_gpu = f" and {in_units(gpu_free)} of the GPU's memory" if device.type == "cuda" else ""
    if needed < _SHARE * ram_free:
        return "ram", f"{in_units(ram_free)} of it{and_gpu} are free"
    return "disk", f"only {in_units(ram_free)} of RAM{and_gpu} are free"


def map_cases(cases: Sequence[StoredCase]) -> Sequence[CaseArrays]:
    """Map uncompressed copies of the arrays into memory, which are written next to them on first use.

    Where the disk has no space for them, a warning says so, and the cases are read as they are.
    """
    arrays = [array for case in cases for array in _arrays_of(case)]
    if not arrays:
        return cases
    folder = Path(arrays[0].urlpath).parents[1]
    with locked(folder, "unpacking cases"):
        missing = [array for array in arrays if not _is_current(_copy_of(array), Path(array.urlpath))]
        needed = _bytes(missing)
        if needed > _SHARE * (free := disk_usage(folder).free):
            what = f"uncompressed copies need {in_units(needed)} and {in_units(free)} are free"
            log.warn(f"{folder}: {what}, so that each patch is decompressed, which may let the GPU wait")
            return cases
        for array in log.progress(missing, len(missing), "unpacking"):
            with atomic(_copy_of(array)) as temporary:
                np.save(temporary, array[:])

    return [replace(case, **_change_arrays(case, lambda a: np.load(_copy_of(a), mmap_mode="r"))) for case in cases]


def _copy_of(array: Any) -> Path:
    return Path(array.urlpath).with_suffix(".npy")


def _is_current(copy: Path, original: Path) -> bool:
    """Whether a copy exists and is not older: a first stage of a cascade may have predicted again."""
    return copy.is_file() and copy.stat().st_mtime_ns >= original.stat().st_mtime_ns


def load_case(case: StoredCase) -> CaseArrays:
    """Read a case into RAM and leave none of its files open."""
    voxels = {number: np.array(v) for number, v in case.foreground.items()}
    annotated = None if case.annotated is None else np.array(case.annotated)
    arrays = _change_arrays(case, lambda array: array[:])
    return CaseArrays(case.case_id, foreground=voxels, annotated=annotated, **arrays)


def move_case(case: CaseArrays, device: torch.device) -> CaseArrays:
    """Copy the arrays of a case to a device: images as stored, labels uint8 (int32 for more than 256 classes)."""

    def tensor(array: Any) -> Tensor:
        is_wide = array.dtype.itemsize > 1 and array.dtype.kind == "u"  # torch can hold these, but not calculate
        return torch.from_numpy(array.astype(np.int32) if is_wide else array).to(device)

    return replace(case, **_change_arrays(case, tensor))


def _change_arrays(case: CaseArrays, change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the arrays that a case has, changed, by their names."""
    return {name: change(array) for name in _ARRAYS if (array := getattr(case, name)) is not None}


def _arrays_of(case: CaseArrays) -> list[Any]:
    return list(_change_arrays(case, lambda array: array).values())


def _bytes(arrays: Iterable[Any]) -> int:
    return sum(prod(array.shape) * array.dtype.itemsize for array in arrays)
