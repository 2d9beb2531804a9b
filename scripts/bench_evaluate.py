#!/usr/bin/env python3
"""Time the scores of one large case, 512 x 512 x 300 voxels with ten labels, surface distances included.

usage: taskset -c 0,1 python scripts/bench_evaluate.py [--cores N] [--repeat N] [--output TABLE.md]

The prediction is as good as that of a trained network (surfaces some voxels apart), or bad (each label far from its
place, and 2000 false specks). Prints one table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from bench_demo import processor, publish

from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation.metrics import score_case

SHAPE = (300, 512, 512)
SPACING = (1.5, 0.8, 0.8)
LABELS = Labels(names={f"organ {value}": value for value in range(1, 11)})


def organs(shift: float, seed: int = 0) -> np.ndarray:
    """Ten ellipsoids of 0.1 to 3 million voxels, `shift` voxels from their places."""
    array = np.zeros(SHAPE, np.uint8)
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    rng = np.random.default_rng(seed)
    for value in range(1, 11):
        c = rng.uniform(0.2, 0.8, 3) * SHAPE + shift
        r = rng.uniform(0.06, 0.22, 3) * SHAPE + shift / 3
        array[((z - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 + ((x - c[2]) / r[2]) ** 2 < 1] = value
    return array


def with_specks(array: np.ndarray, number: int) -> np.ndarray:
    """The same with false cubes of up to six voxels in a row, of any label, anywhere."""
    rng = np.random.default_rng(1)
    for _ in range(number):
        z, y, x = (int(rng.integers(0, length - 6)) for length in SHAPE)
        side = int(rng.integers(1, 7))
        array[z : z + side, y : y + side, x : x + side] = rng.integers(1, 11)
    return array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="the best counts")
    parser.add_argument("--output", type=Path, help="write the table here too")
    options = parser.parse_args()
    reference = organs(0)
    predictions = {
        "good": organs(3),
        "bad: far away, with 2000 specks": with_specks(organs(40), 2000),
    }
    rows = []
    for name, prediction in predictions.items():
        seconds, busy = [], []
        for _ in range(options.repeat):
            start, before = time.perf_counter(), time.process_time()
            found = score_case(prediction, reference, LABELS, SPACING, threads=options.cores)
            seconds.append(time.perf_counter() - start)
            busy.append(time.process_time() - before)
        dice = np.mean([values["Dice"] for values in found.values() if values["Dice"] is not None])
        rows.append(f"| {name} | {dice:.3f} | {min(seconds):.2f} s | {min(busy):.2f} s |")
    where = f"{options.cores} cores of {processor()}, {time.strftime('%Y-%m-%d')}"
    head = f"512 x 512 x 300, ten labels, all metrics, {where}"
    table = "\n".join([head, "", "| prediction | Dice | time | CPU time |", "|---|---|---|---|", *rows])
    publish(table, options.output)


if __name__ == "__main__":
    main()
