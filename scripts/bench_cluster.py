#!/usr/bin/env python3
"""Time preprocessing on two Dask workers of one core each against the same without Dask on two cores, in turn.

usage: taskset -c 0,1 python scripts/bench_cluster.py DATA [--rounds 15] [--output TABLE.md]

The workers are there before the clock starts and stay, as on a cluster. Each round gives a ratio, and their median
counts: both take their turn within seconds, so that a machine that grows slower or faster does not matter.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench_demo import processor, publish


def seconds(made_in: Path, preprocess: Callable[[], object]) -> float:
    """Of one call, into an empty folder."""
    shutil.rmtree(made_in, ignore_errors=True)
    start = time.perf_counter()
    preprocess()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the table here too")
    o = parser.parse_args()

    from distributed import LocalCluster

    import nnunet_lite
    from nnunet_lite.workspace import planned_paths

    with (
        tempfile.TemporaryDirectory() as workspace,
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as workers,
    ):
        nnunet_lite.plan(o.data, workspace=workspace)
        made_in = planned_paths(Path(workspace)).preprocessed
        times: dict[str, list[float]] = {"two threads": [], "two Dask workers": []}
        for _ in range(o.rounds):
            for how, scheduler in zip(times, (None, workers.scheduler_address), strict=True):
                options: dict[str, Any] = {"workspace": workspace, "scheduler": scheduler, "workers": 2}
                times[how].append(seconds(made_in, partial(nnunet_lite.preprocess, ["3d_fullres"], **options)))
    ratios = [spread / alone for alone, spread in zip(*times.values(), strict=True)]
    rows = [f"| {how} | {median(each):.2f} | {', '.join(f'{s:.2f}' for s in each)} |" for how, each in times.items()]
    head = f"Preprocessing {o.data.name}, on {processor()}, {time.strftime('%Y-%m-%d')}"
    table = ["| how | median, s | all |", "|---|---|---|", *rows]
    said = f"With Dask: {median(ratios) - 1:+.0%} (median of {o.rounds} ratios)."
    publish("\n".join([head, "", *table, "", said]), o.output)


if __name__ == "__main__":
    main()
