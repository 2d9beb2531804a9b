"""The device of a run, and the number format and memory format that compute fastest on it: timed, not guessed.

On two cores with AVX512-BF16, bf16 in channels-last format is 2-4 times faster than float32, but not for every shape;
on a GPU it depends on the generation. So each candidate runs a few steps and the fastest is taken.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nnunet_lite.errors import UserError
from nnunet_lite.system import cpus, free_memory

_LONG = 1.0  # s; a longer step is timed once
_START = 0.5  # s; a first step may take this much longer than the next ones
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ComputeFormat:
    """The number format and memory format in which a network computes.

    Parameters
    ----------
    precision : str
        Number format of autocast: fp32, bf16 or fp16.
    channels_last : bool
        Whether images and weights have the channels-last memory format.
    reason : str
        Why this format was chosen, for logs.
    """

    precision: str = "fp32"
    channels_last: bool = False
    reason: str = field(default="as set", compare=False)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, DTYPES[self.precision], enabled=self.precision != "fp32")

    def memory_format(self, dimensions: int) -> torch.memory_format:
        """Return the memory format of images with two or three dimensions."""
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last if dimensions == 2 else torch.channels_last_3d

    def arrange(self, x: Tensor) -> Tensor:
        """Return a batch of images (batch, channels, *positions) in the memory format."""
        return x.contiguous(memory_format=self.memory_format(x.ndim - 2))


def list_formats(device: torch.device, precision: str, channels_last: str | bool) -> list[ComputeFormat]:
    """List the formats worth timing, likely winners first.

    Parameters
    ----------
    device : torch.device
        Device of the run.
    precision : str
        fp32, bf16, fp16 or "auto". On a GPU with bf16, "auto" never tries fp16: bf16 needs no loss scaling and does not
        overflow. On a CPU without AVX-512 it does not try bf16: oneDNN has only its reference code there, of which one
        step takes minutes.
    channels_last : bool or str
        Whether to use the channels-last memory format; "auto" tries both.

    Returns
    -------
    list of ComputeFormat
        At least one.
    """
    if precision != "auto":
        precisions = [precision]
    elif device.type == "cuda":
        precisions = ["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp16"]
    else:
        has_bf16 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        precisions = ["bf16", "fp32"] if has_bf16 else ["fp32"]
    layouts = [True, False] if channels_last == "auto" else [bool(channels_last)]
    return [ComputeFormat(p, layout) for p in precisions for layout in layouts]


def pick_fastest(
    formats: list[ComputeFormat],
    prepare: Callable[[ComputeFormat], Callable[[], None]],
    device: torch.device,
    budget: float = math.inf,
) -> ComputeFormat:
    """Time each format after a warm-up and return the fastest; its reason lists the times.

    A format whose warm-up alone takes much longer than the best so far is not timed again. The others take turns, so
    that a machine which is slower for a while is so for all of them.

    Parameters
    ----------
    formats : list of ComputeFormat
        Candidates; a single one is returned without timing.
    prepare : callable
        Returns the work to time in a format; called before each timing, since the formats may share a network.
    device : torch.device
        Device of the work.
    budget : float
        Seconds after which the fastest of the formats timed so far is returned.
    """
    if len(formats) == 1:
        return formats[0]
    times: dict[ComputeFormat, float] = {}
    remaining: list[ComputeFormat] = []
    start = time.perf_counter()
    for candidate in formats:
        if remaining and time.perf_counter() - start > budget:
            break
        warm_up = times[candidate] = measure_seconds(prepare(candidate), device)
        best = min((times[other] for other in remaining), default=math.inf)
        if warm_up <= min(4 * best, 1.3 * best + _START):
            remaining.append(candidate)
    for number in range(1 if max(times[candidate] for candidate in remaining) > _LONG else 3):
        turn: dict[ComputeFormat, float] = {}
        for candidate in remaining:
            if time.perf_counter() - start <= budget:
                turn[candidate] = measure_seconds(prepare(candidate), device)
        if len(turn) < len(remaining):
            break  # an incomplete turn would compare warm-ups with later steps
        times |= {
            candidate: min(turn[candidate], times[candidate]) if number else turn[candidate] for candidate in turn
        }
    list_of_times = ", ".join(
        f"{candidate.precision}{' channels-last' if candidate.channels_last else ''} {seconds:.3g} s"
        for candidate, seconds in times.items()
    )
    return replace(min(times, key=times.__getitem__), reason=f"fastest of {list_of_times}")


def measure_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Run some work and return the seconds it took, including those of the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name ("cuda:1", "cpu", "mps"); by default a GPU if there is one.

    Raises
    ------
    UserError
        This machine has no such device.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    devices += [f"xpu:{i}" for i in range(torch.xpu.device_count())]
    fix = f"This machine has: {', '.join(devices)}."
    if name not in (*devices, *(device.partition(":")[0] for device in devices)):
        no_cuda = name.startswith("cuda") and not torch.backends.cuda.is_built()
        reason = "this PyTorch is built without CUDA" if no_cuda else "there is no such device"
        raise UserError(f"--device {name}: {reason}", fix=fix)
    try:
        torch.empty(1, device=name)
    except RuntimeError as error:  # the GPU exists, but is taken by others or does not work
        raise UserError(f"--device {name}: {str(error).splitlines()[0].rstrip('.')}", fix=fix) from None
    return torch.device(name)


def free_device_memory(device: torch.device) -> int:
    """Return the bytes that this process may still use on a device.

    The allocator of torch keeps freed memory for the next tensors, so what it has reserved and not allocated is free
    too, although the driver counts it as used. On the CPU it is what `free_memory` returns.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type == "mps":  # its memory is that of the machine
        allocated = torch.mps.current_allocated_memory()
        cached = torch.mps.driver_allocated_memory() - allocated
        return max(0, min(torch.mps.recommended_max_memory() - allocated, free_memory() + cached))
    if device.type == "xpu":
        cached = torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
        return int(torch.xpu.mem_get_info(device)[0]) + cached
    return free_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a computation failed for lack of memory, of a device or, with a limit such as ulimit, of a CPU."""
    texts = ("out of memory", "allocate memory", "ALLOC_FAILED")
    is_of_torch = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return is_of_torch or isinstance(error, torch.OutOfMemoryError | MemoryError)


def release_memory(device: torch.device) -> None:
    """Give memory that the allocator of torch keeps for the next tensors back to the device."""
    gc.collect()
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).empty_cache()


def use_allowed_cpus() -> None:
    """Use the CPUs that this process may use (taskset, SLURM, containers), not all that the machine has."""
    if torch.get_num_threads() > (allowed := cpus()):
        torch.set_num_threads(allowed)
