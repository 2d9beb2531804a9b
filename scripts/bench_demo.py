#!/usr/bin/env python3
"""Time each step of the main job on a data set, and score fold 0, with the recipe `cpu`.

usage: taskset -c 0,1 python scripts/bench_demo.py DATA [--time-limit MINUTES] [--output TABLE.md]

Every step is a real `nnlite` process in a fresh workspace. Prints one table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path


def run(*arguments: str, workspace: Path) -> tuple[float, str]:
    """Wall time in s and standard output of an nnlite command."""
    start = time.perf_counter()
    environment = {**os.environ, "NNLITE_WORKSPACE": str(workspace)}
    done = subprocess.run(["nnlite", *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return time.perf_counter() - start, done.stdout


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def publish(table: str, output: Path | None) -> None:
    """Print a table, and write it too."""
    print(table)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(table + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--time-limit", type=float, default=4.0, help="of the training, minutes")
    parser.add_argument("--output", type=Path, help="write the table here too")
    options = parser.parse_args()
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        helping = min(run("--help", workspace=workspace)[0] for _ in range(3))
        rows.append(("`nnlite --help`, best of 3", f"{helping:.2f} s"))
        planning = min(run("plan", str(options.data.absolute()), workspace=workspace)[0] for _ in range(2))
        rows.append(("`nnlite plan` with check and fingerprint, best of 2", f"{planning:.2f} s"))
        preprocessing, _ = run("preprocess", "3d_fullres", workspace=workspace)
        rows.append(("`nnlite preprocess 3d_fullres`", f"{preprocessing:.2f} s"))
        limit = str(options.time_limit)
        seconds, out = run(
            "train", "3d_fullres", "0", "--recipe", "cpu", "--time-limit", limit, "--json", workspace=workspace
        )
        scores = json.loads(out)["0"]
        rows.append(
            (f"`nnlite train 3d_fullres 0 --recipe cpu --time-limit {limit}`, validation included", f"{seconds:.0f} s")
        )
        model = next(workspace.glob("*/models/*/fold_0/metrics.jsonl"))
        epochs = [json.loads(line) for line in model.read_text().splitlines()]
        rows.append(("of which training epochs", f"{len(epochs)}, {sum(e['seconds'] for e in epochs):.0f} s"))
        for value, name in scores["labels"].items():
            rows.append((f"Dice of fold 0, {name}, mean over whole images", f"{scores['mean'][value]['Dice']:.4f}"))
        overall = scores["statistics"]["foreground"]["Dice"]
        rows.append(
            ("Dice of fold 0, foreground mean", f"{overall['mean']:.4f} ({overall['low']:.4f}-{overall['high']:.4f})")
        )
    cores = len(os.sched_getaffinity(0))
    head = f"{options.data.name}, {cores} cores of {processor()}, {time.strftime('%Y-%m-%d')}"
    table = "\n".join(
        [head, "", "| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)]
    )
    publish(table, options.output)


if __name__ == "__main__":
    main()
