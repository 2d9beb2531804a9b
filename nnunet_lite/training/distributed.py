"""Data-parallel training: several processes, one per GPU (or on the CPU), train one network together.

`nnlite train --gpus N` starts them on one machine (launch.py); torchrun starts them on one or several machines. Each
process draws the same batches and takes its share of the samples. Sums over the samples are sums over the processes
(`sum_over_ranks`), so loss and gradients equal those of one process with the whole batch.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from nnunet_lite import log, system
from nnunet_lite.errors import Lost, UserError
from nnunet_lite.networks.devices import pick_device, require_working
from nnunet_lite.training.launch import RENDEZVOUS, Ranks, current_ranks

T = TypeVar("T")

SYNC_EVERY = 20  # steps between two points at which all processes compare signals and clocks
_TIMEOUT = timedelta(minutes=30)  # of a collective operation; another process may read or compile meanwhile


def rank_device(ranks: Ranks, device: torch.device) -> torch.device:
    """Return the device of one of several processes: each has a GPU of its own.

    Raises
    ------
    UserError
        There are more processes than GPUs.
    """
    if ranks.world == 1 or device.type != "cuda":
        return device
    if ranks.local >= torch.cuda.device_count():
        raise UserError(f"process {ranks.local + 1} on this machine has no GPU: it has {torch.cuda.device_count()}")
    return torch.device("cuda", ranks.local)


def join_group(device_name: str | None) -> tuple[Ranks, torch.device]:
    """Connect this process with the others, once; from then on only the first process prints messages.

    Processes of `launch` meet through a file, so no port can be taken by another program; those of torchrun meet at
    its MASTER_ADDR and MASTER_PORT.

    Parameters
    ----------
    device_name : str or None
        As for `pick_device`.

    Returns
    -------
    Ranks
        The position of this process.
    torch.device
        Its device.

    Raises
    ------
    Lost
        Another process has not come.
    """
    ranks = current_ranks()
    device = require_working(rank_device(ranks, pick_device(device_name)))
    if ranks.world == 1 or torch.distributed.is_initialized():
        return ranks, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch waits for the others in C++, where Python's signals do not arrive
    signals = system.calling_on_signal(system.stop_at_once) if system.is_command else nullcontext()
    with log.working(f"connecting {ranks.world} processes"), report_lost_peer(), signals:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=os.environ.get(RENDEZVOUS, "env://"),
            timeout=_TIMEOUT,
            rank=ranks.rank,
            world_size=ranks.world,
        )
    atexit.register(torch.distributed.destroy_process_group)
    if ranks.rank:
        log.set_verbosity(log.SILENT)
    return ranks, device


def leave_group() -> None:
    """End this process successfully without Python's clean-up, if it is one of several.

    DistributedDataParallel and its logger refer to each other, so the threads of gloo outlive the process group. A
    thread that still releases a tensor while Python shuts down aborts the process, which would stop the others.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(0)


@contextmanager
def report_lost_peer() -> Iterator[None]:
    """Turn the network error that the end of another process causes into one clear line.

    Raises
    ------
    Lost
        A collective operation failed.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's errors have no class of their own; their text names its source file
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error).lower():
            raise
        raise Lost(
            "another process of this training ended, or its machine or the network is down; look at its output. The "
            "same nnlite command resumes from the last checkpoint, also with another number of processes or machines"
        ) from error


def wait_for_first(is_done: Callable[[], bool]) -> None:
    """Wait until the first process has done what it does alone; a collective operation would end after its timeout.

    Raises
    ------
    Lost
        It ended before: the addresses of all, which it or its torchrun keeps, cannot be read any more.
    """
    with report_lost_peer():
        while not is_done():
            torch.distributed.distributed_c10d._get_default_store().check([""])
            time.sleep(1)


def rank_share(batch_size: int, ranks: Ranks) -> slice:
    """Return which samples of a batch belong to this process: contiguous, in equal numbers or one more.

    Raises
    ------
    UserError
        There are fewer samples than processes.
    """
    if batch_size < ranks.world:
        raise UserError(f"a batch of {batch_size} is too small for {ranks.world} processes", fix="Use fewer --gpus.")
    size, rest = divmod(batch_size, ranks.world)
    start = ranks.rank * size + min(ranks.rank, rest)
    return slice(start, start + size + (ranks.rank < rest))


def from_first(value: T, ranks: Ranks) -> T:
    """Return the value that the first process has."""
    if ranks.world == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def max_over_ranks(value: int, ranks: Ranks) -> int:
    """Return the largest value that any process has."""
    if ranks.world == 1:
        return value
    values: list[Any] = [0] * ranks.world
    torch.distributed.all_gather_object(values, value)
    return max(values)


class Clock:
    """Seconds since the start, the same in all processes: they stop and lower the learning rate together.

    One process alone reads its own clock. Several take the time of the first one every SYNC_EVERY steps and extrapolate
    in between.

    Parameters
    ----------
    ranks : Ranks
        The processes.
    pace : float
        Seconds per step for the extrapolation; 0 where it is not known yet.
    """

    def __init__(self, ranks: Ranks, pace: float) -> None:
        self._ranks, self._pace, self._start = ranks, pace, time.monotonic()
        self._synced, self._seconds = 0, 0.0

    def after(self, steps: int) -> float:
        """Return the seconds after a number of steps; called before each step."""
        now = time.monotonic() - self._start
        if self._ranks.world == 1:
            return now
        if steps and steps % SYNC_EVERY == 0:
            self._synced, self._seconds = steps, from_first(now, self._ranks)
        return self._seconds + (steps - self._synced) * self._pace


class _Sum(torch.autograd.Function):
    """Sum over the processes, which all compute the same loss from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # DistributedDataParallel averages the gradients of the parameters afterwards: this makes a sum of the mean
        return gradients[0] * torch.distributed.get_world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; gradients flow through it."""
    return _Sum.apply(x)
