"""Preparing batches ahead, in a thread: no worker process that could die unseen."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


def prefetch(items: Iterator[T], device: torch.device, workers: int | None) -> Generator[T, None, None]:
    """Yield `items`, prepared one or more ahead in a thread.

    On the CPU the network needs every core and preparing ahead would only take them away, so there it is done in line
    unless `workers` asks for a thread; 0 always means in line. An exception in the thread is raised here.
    """
    if workers == 0 or (workers is None and device.type == "cpu"):
        yield from items
        return
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=max(2, workers or 0))
    stop, end = threading.Event(), StopIteration()

    def put(entry: tuple[T | None, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((None, end))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is end:
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
