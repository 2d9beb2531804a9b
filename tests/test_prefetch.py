"""Items come in order, an error in a thread is raised where they are used, and no thread is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from nnunet_lite.training.dataloader import prefetch

CPU = torch.device("cpu")
Makers = Iterator[Callable[[], tuple[int]]]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def slow(i: int) -> tuple[int]:
    time.sleep(0.02 if i % 3 == 0 else 0.001)  # every third is overtaken by the next
    return (i,)


@pytest.mark.parametrize("workers", [None, 0, 1, 4])
def test_all_items_come_in_order_and_the_threads_end(workers: int | None) -> None:
    makers: Makers = (partial(slow, i) for i in range(20))
    assert list(prefetch(makers, CPU, workers)) == [(i,) for i in range(20)]
    assert threads() == []


def test_threads_make_several_items_at_once() -> None:
    both = threading.Barrier(2, timeout=10)  # passed only if two wait for it together

    def meet() -> tuple[int]:
        return (both.wait(),)

    found = list(prefetch((meet for _ in range(6)), CPU, 2))
    assert sorted(i for (i,) in found) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("workers", "most"), [(0, 1), (1, 3), (3, 5)])
def test_little_is_prepared_ahead_and_nothing_in_line(workers: int, most: int) -> None:
    made: list[int] = []

    def make(i: int) -> tuple[int]:
        made.append(i)
        return (i,)

    ahead = prefetch((partial(make, i) for i in range(1000)), CPU, workers)
    assert next(ahead) == (0,)
    assert bool(threads()) is (workers > 0)
    ahead.close()
    assert len(made) <= most
    assert threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_after_the_items_before_it(workers: int) -> None:
    def fail() -> tuple[int]:
        raise OSError("disk gone")

    ahead = prefetch(iter([partial(slow, 0), fail, partial(slow, 2)]), CPU, workers)
    assert next(ahead) == (0,)
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    assert threads() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_training_stream_sees_finished_batches() -> None:
    device = torch.device("cuda")

    def make(i: int) -> tuple[torch.Tensor]:
        x = torch.full((512, 512), float(i), pin_memory=True).to(device, non_blocking=True)
        for _ in range(20):
            x = x @ torch.eye(512, device=device)
        return (x,)

    sums = [x.sum() for (x,) in prefetch((partial(make, i) for i in range(30)), device, None)]
    assert [round(float(s) / 512**2) for s in sums] == list(range(30))
