"""What is watched during a run: signals to stop, labels that are never seen or learnt, and what fits a GPU."""

from __future__ import annotations

import math
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnunet_lite import log
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import Stopped
from nnunet_lite.planning.override import limit_sizes, override_sizes
from nnunet_lite.planning.schema import Plan
from nnunet_lite.system import GB, in_units
from nnunet_lite.training.distributed import Ranks, sum_over_ranks

_STUCK_EPOCHS = 10  # with a Dice of 0 before a label is reported
_STUCK_SHARE = 0.05  # of the run, likewise


@dataclass
class Stop:
    """Whether the user or the scheduler asked the run to stop, and by which signal."""

    asked: int | None = None

    def raise_if_asked(self, where: str) -> None:
        """End the run, whose checkpoint is written.

        Raises
        ------
        Stopped : a signal came.
        """
        if self.asked is not None:
            name = signal.Signals(self.asked).name
            raise Stopped(f"stopped by {name} {where}; the same command goes on from there", self.asked)


_in_threads: list[Stop] = []


def ask_to_stop() -> None:
    """Ask the runs in other threads than the main one of this process to stop, as SIGTERM would."""
    for stop in _in_threads:
        stop.asked = signal.SIGTERM


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the step; the second one ends the process at once.

    Signals only reach the main thread; a run in another thread of a program is left to that program, see `ask_to_stop`.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        _in_threads.append(stop)
        try:
            yield stop
        finally:
            _in_threads.remove(stop)
        return
    before: dict[int, Any] = {}

    def ask(number: int, _: object) -> None:
        stop.asked = number
        for each, handler in before.items():
            signal.signal(each, handler)
        log.info(f"{signal.Signals(number).name}: writing a checkpoint after this step; once more stops at once")

    before |= {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@dataclass(frozen=True)
class Trend:
    """Moving average of the held-out Dice, and for how many epochs it has not risen: for `training.early_stop`."""

    average: float | None = None
    best: float = 0.0
    since: int = 0

    def after_epoch(self, dice: float | None) -> Trend:
        if dice is None:
            return self
        average = dice if self.average is None else 0.9 * self.average + 0.1 * dice
        return Trend(average, max(self.best, average), 0 if average > self.best else self.since + 1)


@dataclass
class Seen:
    """How much of each class (of each region) the patches of the first epoch showed, and the Dice of all epochs so far.

    `voxels`, `patches` : how many showed it, and last how many there were. `stuck` : epochs with a Dice of 0.
    """

    voxels: list[float] = field(default_factory=list)
    patches: list[float] = field(default_factory=list)
    stuck: list[int] = field(default_factory=list)
    reported: list[str] = field(default_factory=list)

    def count(self, per_patch: Tensor, labels: Labels, ranks: Ranks) -> None:
        """Add the voxels of each class in each patch of this rank, (patches, classes with the ignored one)."""
        members = [list(m) for m in labels.region_classes] + [list(range(per_patch.shape[1]))]
        voxels = torch.stack([per_patch[:, m].sum(1) for m in members], 1)
        found = torch.stack([voxels.sum(0), (voxels > 0).float().sum(0)])
        total = (sum_over_ranks(found) if ranks.world > 1 else found).cpu().double()
        if self.voxels:
            total += torch.tensor([self.voxels, self.patches], dtype=total.dtype)
        self.voxels, self.patches = total.tolist()

    def report_unseen(self, labels: Labels) -> None:
        """Report, after the first epoch, the labels that none of its patches showed."""
        for name, patches in zip(labels.region_names, self.patches, strict=False):
            if patches == 0 and name not in self.reported:
                self.reported.append(name)
                log.warn(
                    f"{name} was in none of the {self.patches[-1]:.0f} patches of the first epoch: it cannot be "
                    "learnt. Are there training cases with it? Then raise training.foreground or the patch size"
                )

    def after_epoch(self, dice: dict[str, float | None], progress: float) -> None:
        """Report a label whose Dice has been 0 ever since the run began; `progress` is the share of it that is done.

        An epoch without a pseudo-validation has no `dice` and tells nothing.
        """
        if not dice:
            return
        before = self.stuck or [0] * len(dice)
        self.stuck = [
            n if n < 0 or d is None else (n + 1 if d == 0 else -1)  # -1: not any more
            for n, d in zip(before, dice.values(), strict=True)
        ]
        for i, (name, epochs) in enumerate(zip(dice, self.stuck, strict=True)):
            if epochs >= _STUCK_EPOCHS and progress >= _STUCK_SHARE and name not in self.reported:
                self.reported.append(name)
                where = ""
                if self.voxels:
                    voxels, patches = (counts[i] / counts[-1] for counts in (self.voxels, self.patches))
                    where = f"; {voxels:.2%} of the voxels, in {patches:.0%} of the patches"
                log.warn(
                    f"{name} has had a Dice of 0 in all of {epochs} epochs{where}. Raise "
                    "training.foreground, the patch size or loss.class_weights, or check its labels"
                )


def voxels_per_class(classes: Tensor, n: int) -> Tensor:
    """Voxels of each of n classes in each patch: (batch, *patch) -> (batch, n). Does not wait for a GPU."""
    batch = classes.shape[0]
    offset = n * torch.arange(batch, device=classes.device).reshape(-1, *(1 for _ in classes.shape[1:]))
    rows = (classes + offset).float()
    return torch.histc(rows, bins=batch * n, min=-0.5, max=batch * n - 0.5).reshape(batch, n)


def what_fits(plan: Plan, configuration: str, memory: float) -> str:
    """A smaller batch, and a smaller patch, whose predicted memory fits `memory` GB; how to ask for them."""
    planned, options = plan.configuration(configuration), []
    for batch in range(planned.batch_size - 1, 0, -1):
        smaller = override_sizes(plan, configuration, None, batch).configuration(configuration)
        if (smaller.memory_gb or math.inf) <= memory:
            options.append(f"--batch-size {batch} (about {in_units((smaller.memory_gb or 0) * GB)})")
            break
    voxels = math.prod(planned.patch_size)
    while voxels > 64:
        voxels = voxels * 9 // 10
        smaller = limit_sizes(plan, configuration, voxels).configuration(configuration)
        if smaller.patch_size != planned.patch_size and (smaller.memory_gb or math.inf) <= memory:
            size = "x".join(map(str, smaller.patch_size))
            options.append(f"--patch-size {size} (about {in_units((smaller.memory_gb or 0) * GB)})")
            break
    return " or ".join(options)


def out_of_memory(plan: Plan, configuration: str, device: torch.device, taken: int) -> tuple[str, str]:
    """What to say when a GPU's memory did not suffice, and how to mend it; the cases have `taken` bytes of it."""
    planned = plan.configuration(configuration)
    free, total = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device) - taken
    patches = f"{planned.batch_size} patches of {'x'.join(map(str, planned.patch_size))}"
    room, need = f"{in_units(usable)} of {in_units(total)} usable", in_units((planned.memory_gb or 0) * GB)
    what = f"the GPU's memory ({room}) is too small for {patches} (about {need})"
    fits = what_fits(plan, configuration, 0.9 * usable / GB)
    return what, f"{fits} would fit." if fits else "Plan with a smaller --memory."


def names_of(case_ids: Sequence[Sequence[str]], chosen: Sequence[int]) -> str:
    """The cases of some batches, each once."""
    return ", ".join(dict.fromkeys(case for i in chosen for case in case_ids[i]))


def memory_peak(device: torch.device) -> float:
    """GB: of the GPU since the start of the run, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
