#!/usr/bin/env python3
"""Accuracy at equal work: the recipe `default` against nnU-Net 2.8.1 on one fold, with the same plan, steps and batch.

usage: taskset -c 0,1 python scripts/compare_training.py DATA --nnunet-python ~/venvs/nnunet/bin/python

Both plan and preprocess the data themselves; the network and the batch are then made smaller alike, so that a CPU can
train them. Both predict the held-out images whole, with mirroring, and one evaluator scores them. Prints the mean Dice
of both for each label and seed, and the mean difference (ours minus nnU-Net's, paired by case) with a bootstrap
interval over cases. Exits with 1 where ours is worse by more than 0.005. With --work, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_preprocess import nnunet_layout

import nnunet_lite
from nnunet_lite.data.dataset import Dataset, read_dataset
from nnunet_lite.evaluation.scores import evaluate

NUMBER = 900  # of the data set in nnU-Net's folders
EPOCH = 25  # steps: nnU-Net lowers its rate once an epoch
TOLERATED = 0.005


@dataclass(frozen=True)
class Work:
    """What both do."""

    dataset: Dataset
    folder: Path
    fold: int
    iterations: int
    features: int
    batch: int
    device: str

    @property
    def epochs(self) -> int:
        return -(-self.iterations // EPOCH)


def train_ours(work: Work, seed: int, precision: str) -> Path:
    """Our predictions of the held-out cases."""
    workspace, name = work.folder / "nnlite", f"seed_{seed}"
    if not (workspace / "current.json").is_file():
        nnunet_lite.plan(work.dataset.root, workspace=workspace)
    changes: dict[str, Any] = {
        "training.epochs": work.epochs,
        "training.iterations": EPOCH,
        "training.validation_iterations": 1,
        "training.batch_size": work.batch,
        "training.precision": precision,
        "training.seed": seed,
        "network.features_base": work.features,
    }
    nnunet_lite.train("3d_fullres", work.fold, changes=changes, name=name, device=work.device, workspace=workspace)
    (model,) = workspace.glob(f"*/models/{name}")
    return model / f"fold_{work.fold}" / "validation"


def train_nnunet(work: Work, seed: int, python: Path) -> Path:
    """nnU-Net's."""
    root, results = work.folder / "nnunet", work.folder / "nnunet" / f"seed_{seed}"
    folders = {"raw": root / "raw", "preprocessed": root / "preprocessed", "results": results}
    environment = {f"nnUNet_{name}": str(folder) for name, folder in folders.items()}
    environment |= {"nnUNet_n_proc_DA": "8", "nnUNet_def_n_proc": "2"}
    environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # as ours: see keep_freed_memory
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    if not any(folders["preprocessed"].glob("*/splits_final.json")):
        nnunet_layout(work.dataset, NUMBER, folders["raw"])
        planning = python.with_name("nnUNetv2_plan_and_preprocess")
        _run([planning, "-d", NUMBER, "-c", "3d_fullres", "-np", 2, "-npfp", 2], environment, root / "planning.log")
        (plans,) = folders["preprocessed"].glob("*/nnUNetPlans.json")
        plans.write_text(json.dumps(_smaller(json.loads(plans.read_text()), work)))
        splits = next((work.folder / "nnlite").glob("*/splits.json"))
        (plans.parent / "splits_final.json").write_text(splits.read_text())
    if not any(results.rglob("validation/summary.json")):
        script = Path(__file__).with_name("nnunet_training.py")
        arguments = [NUMBER, work.fold, work.epochs, EPOCH, seed, work.device]
        if work.device == "cpu":  # workers would take the cores of the network, and the seed would not decide alone
            environment["nnUNet_n_proc_DA"] = "0"
        _run([python, script, *arguments], environment, results / "training.log")
    (summary,) = results.rglob(f"fold_{work.fold}/validation/summary.json")
    return summary.parent


def _smaller(plans: dict[str, Any], work: Work) -> dict[str, Any]:
    planned = plans["configurations"]["3d_fullres"]
    planned["batch_size"] = work.batch
    network = planned["architecture"]["arch_kwargs"]
    top = max(network["features_per_stage"])
    network["features_per_stage"] = [min(work.features * 2**i, top) for i in range(network["n_stages"])]
    return plans


def _run(command: list[Any], environment: dict[str, str], log: Path) -> None:
    with log.open("w") as output:
        done = subprocess.run(list(map(str, command)), env=os.environ | environment, stdout=output, stderr=output)
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}: see {log}")


def dice(predictions: Path, dataset: Dataset) -> np.ndarray:
    """Dice of each held-out case and label (cases, labels), by our evaluator for both."""
    references = next(case.label for case in dataset.cases if case.label).parent
    return evaluate(predictions, references, dataset.labels, surface=False).values()


def known(values: np.ndarray) -> np.ndarray:
    """Without those of cases that have none: no label is there, neither in truth nor as predicted."""
    return values[np.isfinite(values)]


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over cases."""
    drawn = np.random.default_rng(0).integers(len(differences), size=(10_000, len(differences)))
    low, high = np.percentile(differences[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)


def table(scores: dict[tuple[str, int], np.ndarray], labels: list[str]) -> str:
    head = ["", "seed", *labels, "mean Dice"]
    lines = [head, ["---"] * len(head)]
    for (who, seed), values in scores.items():
        means = [f"{value:.4f}" for value in (*np.nanmean(values, 0), np.nanmean(values))]
        lines.append([who, str(seed), *means])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--nnunet-python", type=Path, required=True, help="interpreter that has nnunetv2")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--features", type=int, default=8, help="of the first stage")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", help="of ours; nnU-Net takes fp32 on a CPU, fp16 on a GPU")
    parser.add_argument("--work", type=Path, help="keep everything here, and go on with what is there")
    parser.add_argument("--output", type=Path, help="write the table here too")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (o.work or Path(scratch)).absolute()
        work = Work(read_dataset(o.data), folder, o.fold, o.iterations, o.features, o.batch_size, o.device)
        scores = {}
        for seed in o.seeds:
            scores["nnlite", seed] = dice(train_ours(work, seed, o.precision), work.dataset)
            scores["nnU-Net", seed] = dice(train_nnunet(work, seed, o.nnunet_python), work.dataset)
    by_case = {who: np.mean([np.nanmean(scores[who, s], 1) for s in o.seeds], 0) for who in ("nnlite", "nnU-Net")}
    difference = known(by_case["nnlite"] - by_case["nnU-Net"])
    low, high = interval(difference)
    text = "\n".join(
        [
            f"{o.data.name}, fold {o.fold}: {work.epochs * EPOCH} steps of {o.batch_size} patches, features from "
            f"{o.features} on, {o.device}, {o.precision}, {time.strftime('%Y-%m-%d')}",
            "",
            table(scores, list(work.dataset.labels.region_names)),
            "",
            f"nnlite - nnU-Net, {len(difference)} cases, {len(o.seeds)} seed(s): {difference.mean():+.4f} "
            f"(95 % interval over cases {low:+.4f} to {high:+.4f})",
        ]
    )
    print(text)
    if o.output:
        o.output.write_text(text + "\n")
    return int(difference.mean() < -TOLERATED)


if __name__ == "__main__":
    sys.exit(main())
