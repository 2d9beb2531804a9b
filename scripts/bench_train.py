#!/usr/bin/env python3
"""Time training iterations of nnU-Net and of nnlite on the same device, plan and data, with and without loading data.

usage: python scripts/bench_train.py DATA --nnunet-python ~/venvs/nnunet/bin/python [--cores 0,1] [--output TABLE.md]

Both plan and preprocess the data themselves; that their patch, batch and number of weights agree is checked. Then they
train in turn, each in a process of its own, and the fastest of a few short epochs counts, as in nnU-Net's benchmark:
whatever else the machine does makes an epoch slower, nothing makes one faster. Without loading, one batch is used again
and again. nnU-Net augments in as many worker processes as there are cores, nnlite as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NUMBER = 900  # of the data set in nnU-Net's folders
LOADING, REPEATED = "with loading", "without"


# ---------------------------------------------------------------- one side, in a process and interpreter of its own


def nnlite(configuration: str, device: Any) -> tuple[Callable[[Any], Any], Iterator[Any], dict[str, Any]]:
    """A training step, batches for it, and what is trained: ours."""
    from nnunet_lite.data.dataset import dataset_from_json
    from nnunet_lite.files import read_json
    from nnunet_lite.networks.cpu import keep_freed_memory
    from nnunet_lite.planning.schema import Plan
    from nnunet_lite.preprocessing.store import open_case
    from nnunet_lite.settings import Settings
    from nnunet_lite.training.cache import load_cases
    from nnunet_lite.training.dataloader import prefetch, training_batches
    from nnunet_lite.training.job import Job, configure_plan
    from nnunet_lite.training.learner import choose_format, make_learner, make_network, parallelize, train_step
    from nnunet_lite.workspace import planned_paths

    if device.type == "cpu":
        keep_freed_memory()
    paths, settings = planned_paths(Path(os.environ["NNLITE_WORKSPACE"])), Settings()
    plan = configure_plan(Plan.read(paths.plans), configuration, settings)
    ids = [case.id for case in dataset_from_json(read_json(paths.dataset)).cases]
    cases = load_cases(ids, lambda i: open_case(paths.preprocessed, plan, configuration, i), "auto", device)
    job = Job(plan, configuration, settings, 0, paths.root, device, cases, cases)
    network = make_network(job)
    learner = parallelize(job, make_learner(job, network, choose_format(job, network)))
    about = {
        "patch": list(job.planned.patch_size),
        "batch": job.planned.batch_size,
        "weights": sum(p.numel() for p in network.parameters()),
        "arithmetic": learner.compute.reason,
    }
    batches = prefetch(training_batches(job, 0), device, settings.training.workers)
    return lambda batch: train_step(job, learner, [batch], 1e-3, 0), batches, about


def nnunet(configuration: str, device: Any) -> tuple[Callable[[Any], Any], Iterator[Any], dict[str, Any]]:
    """nnU-Net's."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(str(NUMBER), configuration, 0, device=device)
    trainer.initial_lr = 1e-3
    trainer.on_train_start()
    trainer.network.train()
    about = {
        "patch": list(trainer.configuration_manager.patch_size),
        "batch": trainer.batch_size,
        "weights": sum(p.numel() for p in trainer.network.parameters()),
    }
    return trainer.train_step, trainer.dataloader_train, about


def time_side(side: str, configuration: str, device_name: str, epochs: int, iterations: int) -> dict[str, Any]:
    """Seconds per iteration of every epoch, with and without loading."""
    import torch

    device = torch.device(device_name)
    if device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    step, batches, about = {"nnlite": nnlite, "nnunet": nnunet}[side](configuration, device)
    batch = next(batches)
    step(batch)
    seconds: dict[str, list[float]] = {LOADING: [], REPEATED: []}
    for how, each in seconds.items():
        for _ in range(epochs):
            start = time.perf_counter()
            for _ in range(iterations):
                step(next(batches) if how == LOADING else batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            each.append((time.perf_counter() - start) / iterations)
    return {**about, "seconds": seconds}


# ------------------------------------------------------------------------------------------- both sides, in turn


def prepare(data: Path, configurations: list[str], python: Path, scratch: Path) -> dict[str, str]:
    """Plan and preprocess with both; returns the environment variables that find what they made."""
    from bench_preprocess import nnunet_layout

    import nnunet_lite
    from nnunet_lite.data.dataset import read_dataset

    folders = {f"nnUNet_{name}": scratch / name for name in ("raw", "preprocessed", "results")}
    environment = {name: str(folder) for name, folder in folders.items()} | {"NNLITE_WORKSPACE": str(scratch / "ws")}
    if (scratch / "ws" / "current.json").is_file():
        return environment
    for folder in folders.values():
        folder.mkdir(parents=True)
    nnunet_layout(read_dataset(data), NUMBER, folders["nnUNet_raw"])
    planning = [str(python.with_name("nnUNetv2_plan_and_preprocess")), "-d", str(NUMBER), "-npfp", "2"]
    planning += ["-c", *configurations, "-np", *["2"] * len(configurations)]
    subprocess.run(planning, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
    nnunet_lite.plan(data, workspace=scratch / "ws")
    nnunet_lite.preprocess(configurations, workspace=scratch / "ws")
    return environment


def run_side(side: str, configuration: str, o: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    cores = [int(core) for core in o.cores.split(",")] if o.cores else sorted(os.sched_getaffinity(0))
    environment = environment | {"OMP_NUM_THREADS": str(len(cores)), "nnUNet_n_proc_DA": str(len(cores))}
    python = o.nnunet_python if side == "nnunet" else Path(sys.executable)
    arguments = [side, configuration, o.device, str(o.epochs), str(o.iterations)]
    command = [str(python), __file__, "--side", *arguments]
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def rows(configuration: str, o: argparse.Namespace, environment: dict[str, str]) -> list[str]:
    """The lines of the table for one configuration."""
    best: dict[tuple[str, str], float] = {}
    for _ in range(o.rounds):
        found = {side: run_side(side, configuration, o, environment) for side in ("nnunet", "nnlite")}
        for what in ("patch", "batch", "weights"):
            if found["nnunet"][what] != found["nnlite"][what]:
                sys.exit(f"the plans differ in {what}: {found['nnunet'][what]} and {found['nnlite'][what]}")
        for side, result in found.items():
            for how, seconds in result["seconds"].items():
                best[side, how] = min(*seconds, best.get((side, how), float("inf")))
        print(f"{configuration}: {found['nnlite']['arithmetic']}", file=sys.stderr)
    size = f"{'x'.join(map(str, found['nnlite']['patch']))}, batch {found['nnlite']['batch']}"
    lines = []
    for how in (LOADING, REPEATED):
        theirs, ours = best["nnunet", how], best["nnlite", how]
        lines.append(f"| {configuration} | {size} | {how} | {theirs:.3g} | {ours:.3g} | **{theirs / ours:.2f}** |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--nnunet-python", type=Path, required=True, help="interpreter that has nnunetv2")
    parser.add_argument("--configurations", nargs="+", default=["3d_fullres", "2d"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cores", help="such as 0,1; default: all that this process may use")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=5, help="per epoch")
    parser.add_argument("--rounds", type=int, default=1, help="how often both take their turn")
    parser.add_argument("--work", type=Path, help="keep plans and preprocessed data here for the next time")
    parser.add_argument("--output", type=Path, help="write the table here too")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        environment = prepare(o.data, o.configurations, o.nnunet_python, (o.work or Path(scratch)).absolute())
        head = ["configuration", "patch", "data", "nnU-Net, s per iteration", "nnlite, s per iteration", "ratio"]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        print(*lines, sep="\n", flush=True)
        for configuration in o.configurations:
            lines += rows(configuration, o, environment)
            print(*lines[-2:], sep="\n", flush=True)
    if o.output:
        o.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":  # nnU-Net's worker processes import this file again
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(time_side(*sys.argv[2:5], *map(int, sys.argv[5:7]))))
        sys.stdout.flush()
        os._exit(0)  # without waiting for nnU-Net's workers
    main()
