#!/usr/bin/env python3
"""What a large data set takes on a cluster: measured on a few cases, and scheduled for real by tasks that sleep.

usage: python scripts/simulate_cluster.py DATA [--cases 10000] [--terabytes 20] [--workers 16] [--output PAGE]

1. Preprocesses the cases of DATA (CT volumes, say) in one thread: seconds and bytes on disk for each byte of raw file.
2. Starts a real Dask scheduler with worker threads in one process, and sends as many cases through `Cluster.spread` as
   the large data set has. Each sleeps for a measured time, shortened so that the whole takes a minute or two. What it
   takes longer than the sleeping of a perfectly filled cluster is the overhead.
3. The same with a tenth of the workers closed in the middle, without a word to the scheduler's tasks.

Prints Markdown, and writes it to --output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil

SLEEP = 0.02  # s; the mean that measured times are scaled to


@dataclass(frozen=True)
class Measured:
    """Of a few cases: bytes and seconds of each, bytes on disk in all, seconds to read a patch."""

    name: str
    raw_bytes: list[int]
    seconds: list[float]
    stored_bytes: int
    patch_bytes: int
    patch_seconds: float


def measure(data: Path) -> Measured:
    """Preprocess each case alone, in this thread; then read random patches of what is stored."""
    import nnunet_lite
    from nnunet_lite.data.dataset import stored_dataset
    from nnunet_lite.planning.schema import Plan
    from nnunet_lite.preprocessing.store import open_case, preprocess_dataset
    from nnunet_lite.workspace import planned_paths

    with tempfile.TemporaryDirectory() as folder:
        nnunet_lite.plan(data, workspace=folder)
        paths = planned_paths(Path(folder))
        plan, dataset = Plan.read(paths.plans), stored_dataset(paths.dataset)
        name = "3d_fullres" if "3d_fullres" in plan.configurations else next(iter(plan.configurations))
        seconds, raw = [], []
        for case in dataset.cases:
            start = time.perf_counter()
            alone = preprocess_dataset(replace(dataset, cases=(case,)), plan, [name], paths.preprocessed, workers=0)
            seconds.append(time.perf_counter() - start)
            raw.append(alone.raw_bytes)
        summary = nnunet_lite.preprocess([name], workspace=folder, workers=0)
        patch, rng = plan.configuration(name).patch_size, np.random.default_rng(1)
        stored = [open_case(paths.preprocessed, plan, name, case.id) for case in dataset.cases]
        start, read, n = time.perf_counter(), 0, 200
        for i in range(n):
            image = stored[i % len(stored)].image
            corner = [
                int(rng.integers(0, max(1, size - p + 1))) for size, p in zip(image.shape[1:], patch, strict=True)
            ]
            box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
            read += image[(slice(None), *box)].nbytes
        return Measured(dataset.name, raw, seconds, summary.stored_bytes, read // n, (time.perf_counter() - start) / n)


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@dataclass(frozen=True)
class Scheduled:
    """Wall seconds, those that full workers sleep, results; memory (bytes) and CPU (s) of the scheduler."""

    seconds: float
    ideal: float
    results: int
    memory: int
    cpu: float


def schedule(times: list[float], workers: int, dying: int) -> Scheduled:
    """Send a case for each time through a scheduler in a process of its own; `dying` workers are killed midway."""
    from nnunet_lite.cluster import connect

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scheduler.json"
        command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--scheduler-file", str(file)]
        scheduler = subprocess.Popen([*command, "--port", "0", "--no-dashboard"], stderr=subprocess.DEVNULL)
        half = [start_workers(file, n) for n in (workers - dying, dying) if n]
        try:
            wait_for(file)
            with connect(str(file), Path(folder) / "workspace") as cluster:
                cluster.client.wait_for_workers(workers)
                about = psutil.Process(scheduler.pid)
                before, start, found = sum(about.cpu_times()[:2]), time.perf_counter(), 0
                peak = about.memory_info().rss
                for _, result in cluster.spread(sleep, times, "sleep"):
                    found += not isinstance(result, Exception)
                    if found % 500 == 0:
                        peak = max(peak, about.memory_info().rss)
                    if dying and found >= len(times) // 3 and half[-1].poll() is None:
                        half[-1].kill()
                seconds = time.perf_counter() - start
                return Scheduled(seconds, sum(times) / workers, found, peak, sum(about.cpu_times()[:2]) - before)
        finally:
            for process in (*half, scheduler):
                process.kill()
                process.wait()


def start_workers(file: Path, number: int) -> subprocess.Popen[bytes]:
    """Workers of one thread each that share a process: they mostly sleep."""
    return subprocess.Popen([sys.executable, __file__, "--be-workers", str(file), "--workers", str(number)],
                            stderr=subprocess.DEVNULL)  # fmt: skip


async def be_workers(file: Path, number: int) -> None:
    from distributed import Worker

    wait_for(file)
    workers = [Worker(scheduler_file=str(file), nthreads=1, dashboard=False) for _ in range(number)]
    await asyncio.gather(*workers)
    await asyncio.gather(*(worker.finished() for worker in workers))


def wait_for(file: Path) -> None:
    until = time.monotonic() + 120
    while not file.is_file() and time.monotonic() < until:
        time.sleep(0.1)
    json.loads(file.read_text())


def page(measured: Measured, calm: Scheduled, stormy: Scheduled, cases: int, terabytes: float, workers: int) -> str:
    """The figures as Markdown."""
    raw, total = sum(measured.raw_bytes), terabytes * 1e12
    rate = raw / sum(measured.seconds)  # bytes of raw file per second and core
    hours = total / rate / 3600
    stored = total * measured.stored_bytes / raw
    overhead = (calm.seconds - calm.ideal) / cases
    per_step, batch = measured.patch_bytes, 2
    n = len(measured.raw_bytes)
    rows = [
        ("raw files", f"{terabytes:g} TB, {total / cases / 1e9:.1f} GB a case"),
        ("preprocessed, one configuration of full resolution",
         f"{stored / 1e12:.1f} TB ({measured.stored_bytes / raw:.2f} x raw)"),
        ("preprocessing", f"{hours:.0f} core hours ({rate / 1e6:.1f} MB of raw file per second and core); "
                          f"{hours / 100:.1f} h on 100 cores"),
        ("reading for that, on 100 cores", f"{100 * rate / 1e9:.2f} GB/s from the file server"),
        ("scheduler, for each case", f"{1000 * overhead:.1f} ms of wall time over the sleeping of full workers, "
                                     f"{1000 * calm.cpu / cases:.1f} ms of its CPU"),
        ("memory of the scheduler, most", f"{calm.memory / 1e6:.0f} MB"),
        (f"a tenth of {workers} workers killed after a third", f"{stormy.results} of {cases} cases done, "
            f"{stormy.seconds:.0f} s instead of {calm.seconds:.0f} s"),
        ("a training patch, from disk", f"{per_step / 1e6:.1f} MB as numbers, read and unpacked in "
            f"{1000 * measured.patch_seconds:.1f} ms by one thread (files in the page cache)"),
        ("a GPU that takes 5 batches of 2 a second", f"{5 * batch * per_step / 1e6:.0f} MB/s as numbers; "
            f"{5 * batch * measured.patch_seconds:.2f} threads unpack it"),
    ]  # fmt: skip
    table = "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)])
    return f"""# {cases:,} cases, {terabytes:g} TB

Counted up from {n} cases of {measured.name} ({raw / 1e6:.0f} MB), each preprocessed in one thread on {processor()},
and from a real Dask scheduler on the same machine: {cases:,} tasks that sleep for measured times, scaled to
{1000 * SLEEP:.0f} ms on average, through `Cluster.spread` to {workers} workers of one thread. Made by
`python scripts/simulate_cluster.py` on {time.strftime("%Y-%m-%d")}; other programs ran beside.

{table}

Times are proportional to raw bytes here, so the compression of raw files matters: give the script cases of your own.
Checking and planning read each file once more, in one process on one machine.
"""


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--terabytes", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--be-workers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_workers:
        asyncio.run(be_workers(options.be_workers, options.workers))
        return
    measured = measure(options.data)
    drawn = np.random.default_rng(1).choice(measured.seconds, options.cases)
    times = (drawn * SLEEP / drawn.mean()).tolist()
    run = partial(schedule, times, options.workers)
    text = page(measured, run(0), run(max(1, options.workers // 10)), options.cases, options.terabytes, options.workers)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
