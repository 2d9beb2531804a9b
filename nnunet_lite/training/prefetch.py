"""Preparing batches ahead, in threads: no worker process that could die unseen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=tuple[Any, ...])

_ON_A_GPU = 2  # threads: one reads while the other waits for the disk or for the interpreter


def prefetch(makers: Iterator[Callable[[], T]], device: torch.device, workers: int | None) -> Generator[T, None, None]:
    """Yield what `makers` make, in their order, while `workers` threads make what comes next.

    Making must not depend on what was made before. An error is raised here, after the items before it. On the CPU the
    network needs every core and preparing ahead would only take them away, so there it is done in line unless `workers`
    asks for threads; 0 always means in line. On a GPU, threads copy and augment on a stream of their own: the training
    stream waits for an item to be ready, but the host never waits.
    """
    workers = (_ON_A_GPU if device.type == "cuda" else 0) if workers is None else workers
    if workers == 0:
        yield from (make() for make in makers)
        return
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    if side:
        side.wait_stream(torch.cuda.current_stream(device))  # what makers use may still be on its way to the device
    with ThreadPoolExecutor(workers, "prefetch") as pool:
        ahead = deque(pool.submit(_made, make, side) for make in islice(makers, workers + 1))
        try:
            while ahead:
                item, ready = ahead.popleft().result()
                ahead.extend(pool.submit(_made, make, side) for make in islice(makers, 1))
                if ready:
                    _hand_over(item, ready, torch.cuda.current_stream(device))
                yield item
        finally:
            for future in ahead:
                future.cancel()


def _made(make: Callable[[], T], side: torch.cuda.Stream | None) -> tuple[T, torch.cuda.Event | None]:
    """What is made, and the event after which a GPU has made it."""
    if side is None:
        return make(), None
    with torch.cuda.stream(side):
        return make(), side.record_event()


def _hand_over(item: tuple[Any, ...], ready: torch.cuda.Event, user: torch.cuda.Stream) -> None:
    """Let a stream use what another one makes: it waits, and memory is not given to others before it is done."""
    user.wait_event(ready)
    for part in item:
        if isinstance(part, Tensor):
            part.record_stream(user)
