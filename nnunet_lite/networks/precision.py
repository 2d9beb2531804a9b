"""Which number format and memory layout runs a network fastest on this machine: timed, not guessed.

On two cores with AVX512-BF16, bf16 in channels-last layout is 2-4 times faster than float32, but not for every shape;
on a GPU it depends on the generation. So each candidate runs a few steps and the fastest is taken.
"""

from __future__ import annotations

import ctypes
import math
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnunet_lite.errors import UserError
from nnunet_lite.system import cpus

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt(3)
_LONG = 1.0  # s; a step this long is timed once
_START = 0.5  # s; what a first step may take more than the next ones
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """The number format of autocast, the layout of convolutions, and why they were taken."""

    precision: str = "fp32"
    channels_last: bool = False
    reason: str = "as set"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, DTYPES[self.precision], enabled=self.precision != "fp32")

    def layout(self, dimensions: int) -> torch.memory_format:
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last if dimensions == 2 else torch.channels_last_3d


def candidates(device: torch.device, precision: str, channels_last: str | bool) -> list[Arithmetic]:
    """The combinations worth timing, likely winners first.

    "auto" never tries fp16 on a GPU that has bf16: bf16 needs no loss scaling and does not overflow. On a CPU without
    AVX-512, bf16 is not tried: oneDNN has only its reference code there, of which one step takes minutes.
    """
    if precision != "auto":
        formats = [precision]
    elif device.type == "cuda":
        formats = ["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp16"]
    else:
        fast = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        formats = ["bf16", "fp32"] if fast else ["fp32"]
    layouts = [True, False] if channels_last == "auto" else [bool(channels_last)]
    return [Arithmetic(f, layout) for f in formats for layout in layouts]


def fastest(
    options: list[Arithmetic],
    prepare: Callable[[Arithmetic], Callable[[], None]],
    device: torch.device,
    budget: float = math.inf,
) -> Arithmetic:
    """Time each option after a warm-up and take the fastest; the reason lists the times.

    `prepare` gives the work that is timed; it is called before each time, for the options may share a network. When
    `budget` seconds are over, the fastest of what was timed until then is taken.

    An option whose warm-up alone takes much longer than the best so far is dropped without being timed again. The
    others take turns, so that a machine which is slower for a while is so for all of them.
    """
    if len(options) == 1:
        return options[0]
    times: dict[Arithmetic, float] = {}
    left: list[Arithmetic] = []
    start = time.perf_counter()
    for option in options:
        if left and time.perf_counter() - start > budget:
            break
        warm = times[option] = seconds(prepare(option), device)
        best = min((times[each] for each in left), default=math.inf)
        if warm <= min(4 * best, 1.3 * best + _START):
            left.append(option)
    rounds = 1 if max(times[option] for option in left) > _LONG else 3
    for number in range(rounds):
        took: dict[Arithmetic, float] = {}
        for option in left:
            if time.perf_counter() - start <= budget:
                took[option] = seconds(prepare(option), device)
        if len(took) < len(left):
            break  # a part of a round would compare warm-ups with what comes after them
        times |= {option: min(took[option], times[option]) if number else took[option] for option in left}
    winner = min(times, key=times.__getitem__)
    shown = ", ".join(f"{_name(o)} {seconds:.3g} s" for o, seconds in times.items())
    return Arithmetic(winner.precision, winner.channels_last, f"fastest of {shown}")


def _name(option: Arithmetic) -> str:
    return f"{option.precision}{' channels-last' if option.channels_last else ''}"


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long it takes, the GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def pick_device(name: str | None) -> torch.device:
    """The device of that name ("cuda:1", "cpu", "mps"); by default a GPU if there is one.

    Raises
    ------
    UserError : no such device here.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    have += ["mps"] if torch.backends.mps.is_available() else []
    have += [f"xpu:{i}" for i in range(torch.xpu.device_count())]
    fix = f"This machine has: {', '.join(have)}."
    if name not in (*have, *(each.partition(":")[0] for each in have)):
        unfit = name.startswith("cuda") and not torch.backends.cuda.is_built()
        reason = "this PyTorch is built without CUDA" if unfit else "there is no such device"
        raise UserError(f"--device {name}: {reason}", fix=fix)
    try:
        torch.empty(1, device=name)
    except RuntimeError as error:  # a GPU that is there, and taken by others or in no state to work
        raise UserError(f"--device {name}: {str(error).splitlines()[0].rstrip('.')}", fix=fix) from None
    return torch.device(name)


def use_allowed_cpus() -> None:
    """Use the CPUs that this process may use (taskset, SLURM, containers), not all that the machine has."""
    if torch.get_num_threads() > (allowed := cpus()):
        torch.set_num_threads(allowed)


def keep_freed_memory() -> None:
    """Keep freed memory for the next step of a computation on the CPU.

    glibc hands every freed block of over 32 MB, such as an activation, back to the system and takes page faults to get
    it again: in a virtual machine that costs more than the arithmetic on it. Set for the whole process.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def as_layout(x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """A batch of images in the memory layout that the network runs in."""
    return x.contiguous(memory_format=arithmetic.layout(x.ndim - 2))
