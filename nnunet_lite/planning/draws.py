"""nnU-Net's random draws of foreground voxels, counted: np.bincount(RandomState(1234).randint(0, size, samples)).

numpy takes the low bits of each 32-bit random number where they are < size, and else goes on to the next. Every case
draws from the same numbers, hence these are made, and their low 16 bits counted, once, block by block. The counts of
fewer low bits are sums of these, so what a case draws from a whole block is known without looking at its numbers.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np

SEED = 1234
BLOCK = 1 << 18  # numbers made at a time
_BITS = 16  # counted of each; 4 numbers to a count, so a count fits into a byte
_KEPT = 16  # blocks that are kept whole (16 MB): enough for data sets of a hundred cases; later ones are made again


class Stream:
    """The 32-bit numbers of np.random.RandomState(SEED) in blocks, for all cases of a data set; threads may share it.

    What it keeps grows by a quarter of a byte for each number that a case of up to 65 536 voxels draws: some 50 MB per
    channel for a single case, less for more cases.
    """

    def __init__(self) -> None:
        self._states: list[Any] = [np.random.RandomState(SEED).get_state()]  # at the start of each block
        self._numbers: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._ahead: Future[np.ndarray] | None = None
        self._pool = ThreadPoolExecutor(1, "random")
        self._making, self._counting = Lock(), Lock()

    def numbers(self, block: int) -> np.ndarray:
        """All numbers of a block, uint32; of one that has been made before, or the next."""
        if block < len(self._numbers):
            return self._numbers[block]
        random = np.random.RandomState()
        random.set_state(self._states[block])
        made = random.randint(0, 1 << 32, BLOCK, dtype=np.uint32)
        with self._making:
            if len(self._states) == block + 1:
                self._states.append(random.get_state())
                self._numbers += [made] if block < _KEPT else []
        return made

    def counts(self, block: int, bits: int) -> np.ndarray:
        """How often each value of the low bits (at most 16) occurs in a block. While it counts, the next are made."""
        with self._counting:
            while len(self._counts) <= block:
                numbers = self._ahead.result() if self._ahead else self.numbers(0)
                self._ahead = self._pool.submit(self.numbers, len(self._counts) + 1)
                counted = np.bincount(numbers & np.uint32((1 << _BITS) - 1), minlength=1 << _BITS)
                self._counts.append(counted.astype(np.uint8))
        return self._counts[block].reshape(-1, 1 << bits).sum(axis=0, dtype=np.uint32)


class Draws:
    """Draws of one case, one call after the other from the same random numbers."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._position = 0

    def counts(self, size: int, samples: int) -> np.ndarray:
        """How often each of range(size) is drawn."""
        bits = (size - 1).bit_length()
        counts = np.zeros(1 << bits, np.int64)
        left = samples
        while left > 0:
            block, start = divmod(self._position, BLOCK)
            if bits <= _BITS and start == 0:
                found = self._stream.counts(block, bits)
                drawn = int(found[:size].sum())
                if drawn <= left:
                    counts += found
                    left -= drawn
                    self._position += BLOCK
                    continue
            values = self._stream.numbers(block)[start:] & np.uint32((1 << bits) - 1)
            drawn = int(np.count_nonzero(values < size))
            if drawn > left:  # the last one is among these
                values = values[: np.flatnonzero(values < size)[left - 1] + 1]
                drawn = left
            np.add.at(counts, values, 1)
            left -= drawn
            self._position += values.size
        return counts[:size]
