#!/usr/bin/env python3
"""Compare a distilled network with the ensemble that taught it: Dice of unseen cases, paired, and time to predict one.

usage: taskset -c 0,1 python scripts/bench_distill.py DATA --work FOLDER [--teacher cpu] [--minutes 4] [--student 30]
           [--seeds 0 1 2] [--no-control] [--folds 5] [--test 4] [--configuration 3d_fullres] [--set KEY=VALUE ...]
           [--output TABLE.md]

Every fourth case (`--test`) is left out of the plan and of all trainings. Five folds of the recipe `--teacher` are
trained for `--minutes` each, then for each seed two networks of the recipe `distill` for `--student` minutes: one
taught by the ensemble, and one that only has the labels (not with `--no-control`). `--set` changes settings of these
two. Everything is in FOLDER, and the same command again resumes. Times are of whole calls (reading, preprocessing,
network, label map), of all models in turn for each of five images, the faster of two rounds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from bench_demo import processor, publish

import nnunet_lite
from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.evaluation.cross_validation import validate_cases
from nnunet_lite.evaluation.statistics import compare_paired, mean_of_labels
from nnunet_lite.inference.predictor import Predictor, load
from nnunet_lite.system import cpus
from nnunet_lite.workspace import Paths

_TIMED, _ROUNDS = 5, 2


def seconds_per_image(models: dict[str, Predictor], images: list[Path]) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of a call of each model, the mean over images."""
    times = np.empty((_ROUNDS, len(images), len(models), 2))
    for turn in range(_ROUNDS):
        for i, image in enumerate(images):
            for k, model in enumerate(models.values()):
                begin = time.perf_counter(), time.process_time()
                model(image)
                times[turn, i, k] = time.perf_counter() - begin[0], time.process_time() - begin[1]
    means = times.min(0).mean(0)
    return {name: (float(wall), float(cpu)) for name, (wall, cpu) in zip(models, means, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--teacher", default="cpu", help="recipe of the ensemble [cpu]")
    parser.add_argument("--minutes", type=float, default=4.0, help="length of each of its folds [4]")
    parser.add_argument("--student", type=float, default=30.0, help="minutes of a distilled network [30]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--no-control", action="store_true", help="no network that has the labels only")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--test", type=int, default=4, help="every n-th case is left out of all trainings [4]")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the small networks")
    parser.add_argument("--output", type=Path, help="write the table here too")
    o = parser.parse_args()
    changes = dict(change.split("=", 1) for change in o.set)
    dataset = read_dataset(o.data)
    cases = sorted(dataset.cases, key=lambda case: case.id)[:: o.test]
    nnunet_lite.plan(o.data, exclude=[case.id for case in cases], workspace=o.work)
    common = {"workspace": o.work, "device": "cpu"}
    nnunet_lite.train(
        o.configuration, "all-folds", folds=o.folds, recipe=o.teacher, time_limit=o.minutes, seed=0, name="ensemble",
        **common,
    )  # fmt: skip
    length = {"recipe": "distill", "time_limit": o.student, "settings": changes}
    names = {"ensemble": "ensemble", "its fold 0": "ensemble"}
    for seed in o.seeds:
        names[f"distilled, seed {seed}"] = f"distilled-{seed}"
        nnunet_lite.distill("ensemble", seed=seed, name=f"distilled-{seed}", **length, **common)
        if not o.no_control:
            names[f"labels only, seed {seed}"] = f"labels-{seed}"
            nnunet_lite.train(o.configuration, "all", seed=seed, name=f"labels-{seed}", **length, **common)

    folder = Paths(o.work.absolute() / dataset.name).models
    models = {label: load(folder / name, [0] if "fold 0" in label else None, "cpu") for label, name in names.items()}
    dice = {
        label: validate_cases(model, o.work / "predicted" / label, dataset, [case.id for case in cases]).values()
        for label, model in models.items()
    }
    times = seconds_per_image(models, [case.images[0] for case in cases[:_TIMED]])
    of_all, (slow, slow_cpu) = dice["ensemble"], times["ensemble"]
    rows = []
    for label, own in dice.items():
        margin, (wall, cpu) = compare_paired(own, of_all), times[label]
        gap = "" if label == "ensemble" else f"{margin.mean:+.4f} ({margin.low:+.4f} to {margin.high:+.4f})"
        faster = f"{slow / wall:.1f} ({slow_cpu / cpu:.1f})"
        rows.append(f"| {label} | {mean_of_labels(own):.4f} | {gap} | {wall:.2f} ({cpu:.2f}) | {faster} |")
    setup = f"{o.folds} folds of `{o.teacher}`, {o.minutes:g} minutes each; `distill`, {o.student:g} minutes"
    head = f"{dataset.name}, {len(cases)} unseen cases, {o.configuration}: {setup} {' '.join(o.set)}".strip()
    where = f"{cpus()} cores of {processor()}, {time.strftime('%Y-%m-%d')}"
    columns = "| model | Dice | against the ensemble, 95 % interval | s per image (CPU) | times as fast (CPU) |"
    publish("\n".join([head, where, "", columns, "|---|---|---|---|---|", *rows]), o.output)


if __name__ == "__main__":
    main()
