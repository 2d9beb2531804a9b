"""The counted draws against numpy's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nnunet_lite.planning import draws as module
from nnunet_lite.planning.draws import BLOCK, SEED, Draws, Stream

SAMPLES = (100_000, 3, 700_000, BLOCK)  # one after the other from the same numbers


def expected(size: int) -> list[np.ndarray]:
    random = np.random.RandomState(SEED)
    return [np.bincount(random.randint(0, size, n), minlength=size) for n in SAMPLES]


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1024, 1025, 40_000, 65_536, 65_537, 300_000])
def test_counts_are_those_of_numpy(size: int) -> None:
    draws = Draws(Stream())
    for samples, counts in zip(SAMPLES, expected(size), strict=True):
        assert np.array_equal(draws.counts(size, samples), counts)


def test_cases_share_numbers_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 2)  # later blocks are made again
    stream = Stream()

    def draw(size: int) -> list[np.ndarray]:
        draws = Draws(stream)
        return [draws.counts(size, n) for n in SAMPLES]

    sizes = (900, 100_000, 30_000, 900, 5_000)
    with ThreadPoolExecutor(3) as pool:
        for size, found in zip(sizes, pool.map(draw, sizes), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(found, expected(size), strict=True))


def test_a_count_of_low_bits_fits_into_a_byte() -> None:
    stream = Stream()
    for block in range(40):
        assert stream.counts(block, 16).sum() == BLOCK
