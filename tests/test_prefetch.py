"""Batches come in order, an error in the thread is raised where they are used, and no thread is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from nnunet_lite.training.prefetch import prefetch

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("workers", [None, 0, 1, 4])
def test_all_items_come_in_order_and_the_thread_ends(workers: int | None) -> None:
    assert list(prefetch(iter(range(50)), CPU, workers)) == list(range(50))
    assert threads() == []


def test_in_line_nothing_is_prepared_ahead_and_a_thread_prepares_little() -> None:
    for workers, most in ((0, 1), (1, 5)):
        made = []

        def items(made: list[int] = made) -> Iterator[int]:
            for i in range(1000):
                made.append(i)
                yield i

        ahead = prefetch(items(), CPU, workers)
        assert next(ahead) == 0
        assert bool(threads()) is (workers > 0)
        ahead.close()
        assert len(made) <= most
        assert threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_after_the_items_before_it(workers: int) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    ahead = prefetch(items(), CPU, workers)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    assert threads() == []
