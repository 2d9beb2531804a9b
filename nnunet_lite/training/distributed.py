"""Data-parallel training: several processes, one for each GPU (or on the CPU), that train one network together.

They are started by `nnlite train --gpus N` on one machine, or by torchrun on one or more. Each draws the same batches
and takes its share of the samples; sums over the samples are sums over the processes (`sum_over_ranks`), so that loss
and gradients are those of one process with the whole batch.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from nnunet_lite import log, system
from nnunet_lite.errors import UserError

if TYPE_CHECKING:
    from types import FrameType

T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # for each other: who is lost is noticed by `launch`, or in nodes.py
_GRACE = 20.0  # seconds to end by themselves when another process has died
_POLL = 0.2
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
LOOK_EVERY = 20  # steps of a training after which all wait for each other, to look at signals and at the clock


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is; `local` counts those on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


ALONE = Ranks()


def current() -> Ranks:
    """This process among those that torchrun or `launch` started; alone where nobody did.

    The variables are torchrun's, by which it tells each process.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    return Ranks(*(int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def device_of(ranks: Ranks, device: torch.device) -> torch.device:
    """The device of one of several processes: a GPU for each.

    Raises
    ------
    UserError : there are more processes than GPUs.
    """
    if ranks.world == 1 or device.type != "cuda":
        return device
    if ranks.local >= torch.cuda.device_count():
        raise UserError(f"process {ranks.local + 1} on this machine has no GPU: it has {torch.cuda.device_count()}")
    return torch.device("cuda", ranks.local)


def join(ranks: Ranks, device: torch.device) -> None:
    """Meet the other processes, once for the life of this one; all but the first one fall silent."""
    if ranks.world == 1 or torch.distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=_PATIENCE, rank=ranks.rank, world_size=ranks.world)
    before_leaving(torch.distributed.destroy_process_group)
    if ranks.rank:
        log.be_quiet()


_before_leaving: list[Callable[[], None]] = []


def before_leaving(farewell: Callable[[], None]) -> None:
    """Have something called when this process leaves the others, by `leave` or as Python ends."""
    _before_leaving.append(farewell)
    atexit.register(farewell)


def leave() -> None:
    """End this process in success, if it has met others, without Python's tidying up.

    DistributedDataParallel and its logger hold each other, so the threads of gloo outlive the group, and one that is
    still letting go of a tensor when Python ends aborts the process: rarely, but then the others are stopped for it.
    """
    if torch.distributed.is_initialized():
        while _before_leaving:
            farewell = _before_leaving.pop()
            atexit.unregister(farewell)
            farewell()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(0)


def share(batch_size: int, ranks: Ranks) -> slice:
    """The samples of a batch that are this process's: contiguous, their numbers differ by at most one.

    Raises
    ------
    UserError : there are fewer samples than processes.
    """
    if batch_size < ranks.world:
        raise UserError(
            f"a batch of {batch_size} cannot be split over {ranks.world} processes", fix="Use fewer --gpus."
        )
    size, more = divmod(batch_size, ranks.world)
    start = ranks.rank * size + min(ranks.rank, more)
    return slice(start, start + size + (ranks.rank < more))


def from_first(value: T, ranks: Ranks) -> T:
    """The value that the first process has."""
    if ranks.world == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(value: int, ranks: Ranks) -> int:
    """The largest value that any process has."""
    if ranks.world == 1:
        return value
    found: list[Any] = [0] * ranks.world
    torch.distributed.all_gather_object(found, value)
    return max(found)


class Clock:
    """Seconds since it was made, on which all processes agree: they stop, and lower the learning rate, together.

    Alone it is this process's clock. Of several it is the first one's, at which all look every LOOK_EVERY steps; in
    between they go by `pace`, seconds per step, 0 where it is not known yet.
    """

    def __init__(self, ranks: Ranks, pace: float) -> None:
        self._ranks, self._pace, self._start = ranks, pace, time.monotonic()
        self._looked, self._seconds = 0, 0.0

    def after(self, steps: int) -> float:
        """The seconds after so many steps; called before each step."""
        now = time.monotonic() - self._start
        if self._ranks.world == 1:
            return now
        if steps and steps % LOOK_EVERY == 0:
            self._looked, self._seconds = steps, from_first(now, self._ranks)
        return self._seconds + (steps - self._looked) * self._pace


class _Sum(torch.autograd.Function):
    """Sum over the processes. All have the same loss, so the gradient of the mean over them is that of their number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # gradients of the parameters are averaged over the processes afterwards: this makes a sum of it
        return gradients[0] * torch.distributed.get_world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, through which gradients flow."""
    return _Sum.apply(x)


# -------------------------------------------------------------------------------------------------------- starting


def launch(number: int, arguments: Sequence[str]) -> int:
    """Run `nnlite` with these arguments in so many processes that train together; returns the exit code.

    Output is that of the first process; should another one die, the rest are ended, and which one it was and how it
    died is told. Signals to stop are passed on.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, system.cpus() // number)))
    processes: list[subprocess.Popen[str]] = []
    errors: list[IO[str] | None] = []

    def pass_on(signal_number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(signal_number)

    # each process is a group of its own, so what comes from a terminal or a scheduler comes here, and reaches it once
    heeded = [each for each in _PASSED_ON if signal.getsignal(each) != signal.SIG_IGN]  # nohup has SIGHUP ignored
    before = {each: signal.signal(each, pass_on) for each in heeded}
    try:
        for rank in range(number):
            own = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            error: IO[str] | None = tempfile.TemporaryFile("w+") if rank else None  # noqa: SIM115 - closed below
            errors.append(error)
            command = [sys.executable, "-m", "nnunet_lite", *arguments]
            output = subprocess.DEVNULL if rank else None
            processes.append(
                subprocess.Popen(command, env=own, stdout=output, stderr=error, text=True, process_group=0)
            )
        return _watch(processes, errors)
    finally:
        for number_of, handler in before.items():
            signal.signal(number_of, handler)
        for process in processes:
            process.kill()
            process.wait()
        for each in errors:
            if each is not None:
                each.close()


def _watch(processes: list[subprocess.Popen[str]], errors: list[IO[str] | None]) -> int:
    """Wait until all have ended; when one fails, end the others. The exit code is that of the first failure."""
    while all(process.poll() in (None, 0) for process in processes):
        if all(process.poll() == 0 for process in processes):
            return 0
        time.sleep(_POLL)
    rank, code = next((i, p.returncode) for i, p in enumerate(processes) if p.poll() not in (None, 0))
    until = time.monotonic() + _GRACE
    while any(p.poll() is None for p in processes) and time.monotonic() < until:
        if code < 0:  # killed: the others wait for it in vain
            break
        time.sleep(_POLL)
    if processes[0].poll() is not None and processes[0].returncode > 0:
        return processes[0].returncode  # which has said why
    error = errors[rank]
    if error is not None:
        error.seek(0)
        log.info(error.read().rstrip())
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    log.info(f"error: process {rank} of {len(processes)} {how}; the others are stopped. "
             "The same command goes on from the last checkpoint.")  # fmt: skip
    return 1 if code < 0 else code
