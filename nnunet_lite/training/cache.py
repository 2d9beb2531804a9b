"""Where the preprocessed cases lie while training: on the training device, in RAM, or on disk."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.system import GB, cpus, free_memory, in_units
from nnunet_lite.training.sampler import CaseArrays

Cache = Literal["auto", "device", "ram", "disk"]
_SHARE = 0.5  # of the memory that is free, at most, goes to cases


@dataclass(frozen=True)
class LoadedCase:
    """A case read whole: numpy arrays in RAM, or tensors on a device."""

    case_id: str
    image: np.ndarray | Tensor
    label: np.ndarray | Tensor
    foreground: Mapping[int, np.ndarray]
    annotated: np.ndarray | None
    previous: np.ndarray | Tensor | None = None


def load_cases(
    case_ids: Sequence[str],
    open_one: Callable[[str], CaseArrays],
    cache: Cache,
    device: torch.device,
    reserve_gb: float = 0.0,
    processes: int = 1,
) -> list[CaseArrays]:
    """The cases where `cache` says. One that stays on disk is read patch by patch.

    Parameters
    ----------
    cache : "auto" takes the GPU's memory where they need less than half of what is free there after training took
        `reserve_gb`, else RAM where they need less than half of what is free, else the disk.
    device : that is trained on.
    processes : how many load the same cases into one RAM.

    Raises
    ------
    UserError : they were to lie on the device, whose memory is too small for them.
    """
    if cache == "disk":
        return _on_disk(case_ids, open_one)
    needed = sum(_bytes(open_one(case_id)) for case_id in case_ids)
    where, why = _choose(needed, device, reserve_gb, processes) if cache == "auto" else (cache, "as asked for")
    log.info(f"{len(case_ids)} cases, {in_units(needed)}, {_PLACES[where].format(device=device)}: {why}")
    if where == "disk":
        return _on_disk(case_ids, open_one)
    with ThreadPoolExecutor(cpus()) as pool:
        loaded = pool.map(lambda case_id: in_memory(open_one(case_id)), case_ids)
        try:
            return [on_device(case, device) if where == "device" else case for case in loaded]
        except torch.OutOfMemoryError:
            raise UserError(f"the memory of {device} is too small for the cases", fix="Use --cache ram.") from None


_PLACES = {"device": "kept on {device}", "ram": "kept in RAM", "disk": "read from disk"}


def _choose(needed: int, device: torch.device, reserve_gb: float, processes: int) -> tuple[Cache, str]:
    """Where `auto` puts cases of so many bytes, and why."""
    room, free = 0.0, free_memory()
    if device.type == "cuda":
        room = max(0.0, torch.cuda.mem_get_info(device)[0] - reserve_gb * GB)
        if needed < _SHARE * room:
            return "device", f"training leaves {in_units(room)} of its memory"
    taken = f" and {in_units(room)} of the GPU's memory" if device.type == "cuda" else ""
    if needed * processes < _SHARE * free:
        return "ram", f"{in_units(free)} of it{taken} are free"
    return "disk", f"only {in_units(free)} of RAM{taken} are free" + (f" for {processes} processes" * (processes > 1))


def _on_disk(case_ids: Sequence[str], open_one: Callable[[str], CaseArrays]) -> list[CaseArrays]:
    """Each holds up to four open files, so the limit of this process is raised as far as it may be."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return [open_one(case_id) for case_id in case_ids]


def in_memory(case: CaseArrays) -> LoadedCase:
    """A case read whole, with none of its files left open."""
    voxels = {number: np.array(v) for number, v in case.foreground.items()}
    annotated = None if case.annotated is None else np.array(case.annotated)
    previous = None if case.previous is None else case.previous[:]
    return LoadedCase(case.case_id, case.image[:], case.label[:], voxels, annotated, previous)


def on_device(case: LoadedCase, device: torch.device) -> LoadedCase:
    """A case with its arrays as tensors: images as they were stored, labels uint8 (int32 for more than 256 classes)."""

    def tensor(array: Any) -> Tensor:
        wide = array.dtype.itemsize > 1 and array.dtype.kind == "u"  # which torch can hold, but not calculate with
        return torch.from_numpy(array.astype(np.int32) if wide else array).to(device)

    previous = None if case.previous is None else tensor(case.previous)
    return LoadedCase(case.case_id, tensor(case.image), tensor(case.label), case.foreground, case.annotated, previous)


def _bytes(case: CaseArrays) -> int:
    arrays = [array for array in (case.image, case.label, case.previous) if array is not None]
    return sum(prod(array.shape) * array.dtype.itemsize for array in arrays)
