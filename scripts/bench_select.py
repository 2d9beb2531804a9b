#!/usr/bin/env python3
"""Time `nnlite select` where all predictions exist: two models, the pair of them, and rules for components.

usage: taskset -c 0,1 python scripts/bench_select.py DATA [--output TABLE.md]

DATA is a labelled data set, such as the 200 cases of Task04_Hippocampus. The predictions are its references, moved,
eroded or grown and with false specks; networks are not needed, and of models only what `select` reads is there.
Prints one table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from bench_demo import processor, publish
from scipy import ndimage

import nnunet_lite
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, dataset_from_json, map_labels
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.evaluation.comparison import ENSEMBLE_WEIGHTS, ensemble_weights
from nnunet_lite.evaluation.cross_validation import score_predictions
from nnunet_lite.evaluation.members import find_members
from nnunet_lite.files import read_json, write_json
from nnunet_lite.models.folder import MODEL, VALIDATION, open_run
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import load_settings
from nnunet_lite.training.job import configure_plan
from nnunet_lite.training.splits import read_splits
from nnunet_lite.workspace import Paths, planned_paths

NAMES = {"2d-bench": "2d", "3d-bench": "3d_fullres"}
SPECKS = {"2d-bench": 6, "3d-bench": 3, "2d-bench+3d-bench": 2}


def perturbed(reference: np.ndarray, name: str, number: int) -> np.ndarray:
    """A prediction such as a network makes, a different one for each name and case."""
    rng = np.random.default_rng([number, *name.encode()])
    out = reference.copy()
    for value in np.unique(reference[reference > 0]):
        mask = reference == value
        change = ndimage.binary_erosion if rng.random() < 0.5 else ndimage.binary_dilation
        noise = rng.random(mask.shape) < (0.5 if "+" in name else 0.7)  # of the rim, this share is wrong
        wrong = (change(mask) != mask) & noise
        out[wrong & mask] = 0
        out[wrong & ~mask & (out == 0)] = value
    for _ in range(rng.integers(0, SPECKS[name] + 1)):
        corner = [int(rng.integers(0, length)) for length in out.shape]
        box = tuple(slice(start, start + int(rng.integers(1, 5))) for start in corner)
        out[box] = np.where(out[box] == 0, rng.choice(reference[reference > 0]), out[box])
    return out


def write_prediction(job: tuple[Case, Path, str, int], dataset: Dataset) -> None:
    case, out, name, number = job
    assert case.label is not None
    array, geometry, _ = read_label(case.label)
    array = map_labels(array, dataset.value_map).astype(np.uint8)
    write_label(out / f"{case.id}.nii.gz", perturbed(array, name, number), geometry)


def make_models(paths: Paths, dataset: Dataset) -> None:
    """Model folders without networks, of which `select` asks only what they were made for, and a file of weights."""
    plan, settings = Plan.read(paths.plans), load_settings("cpu")
    folds = read_splits(paths.splits, dataset)
    for name, configuration in NAMES.items():
        open_run(paths.models / name, configure_plan(plan, configuration, settings), dataset, configuration, settings)
        for fold in range(len(folds)):
            file = paths.models / name / f"fold_{fold}" / MODEL
            file.parent.mkdir()
            file.write_bytes(os.urandom(1 << 20))


def make_predictions(paths: Paths, dataset: Dataset) -> None:
    """Label maps of every model and pair, with a summary for the models, as training leaves it; none for the pairs."""
    folds = read_splits(paths.splits, dataset)
    cases = {case.id: (number, case) for number, case in enumerate(dataset.cases)}
    members, _ = find_members(paths, dataset)
    places = {member.name: member.folder for member in members}
    for pair in combinations(members, 2):
        name = "+".join(member.name for member in pair)
        places[name] = paths.ensembles / name
        for fold in range(len(folds)):
            write_json(places[name] / f"fold_{fold}" / ENSEMBLE_WEIGHTS, ensemble_weights(pair, str(fold)))
    jobs = [
        (cases[case_id][1], folder / f"fold_{fold}" / VALIDATION, name, cases[case_id][0])
        for name, folder in places.items()
        for fold, split in enumerate(folds)
        for case_id in split.validation
    ]
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(write_prediction, dataset=dataset), jobs, chunksize=16))
    for member in members:
        for fold, split in enumerate(folds):
            score_predictions(member.folder / f"fold_{fold}" / VALIDATION, dataset, split.validation)


def timed(paths: Paths, *options: str) -> tuple[float, str]:
    """Wall time in s and the table of `nnlite select`."""
    start = time.perf_counter()
    command = ["nnlite", "select", "--no-quality", "-w", str(paths.root.parent), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, help="write the table here too")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        nnunet_lite.plan(options.data.absolute(), workspace=workspace)
        paths = planned_paths(workspace)
        dataset = dataset_from_json(read_json(paths.dataset))
        make_models(paths, dataset)
        make_predictions(paths, dataset)
        pairs = timed(paths)
        rows.append(("two models, the pair scored again, postprocessing", pairs[0]))
        rows.append(("the same again, all scores there", timed(paths)[0]))
        rows.append(("`--no-ensembles --no-postprocess`", timed(paths, "--no-ensembles", "--no-postprocess")[0]))
        for file in [*paths.models.rglob("summary.json"), *paths.ensembles.rglob("summary.json")]:
            file.unlink()
        rows.append(("everything scored again, postprocessing", timed(paths)[0]))
        shutil.rmtree(paths.root)
    cores = len(os.sched_getaffinity(0))
    head = (
        f"`nnlite select`, {len(dataset.cases)} cases of {dataset.name}, predictions there, {cores} cores of "
        f"{processor()}, {time.strftime('%Y-%m-%d')}"
    )
    lines = [head, "", "| what | time |", "|---|---|", *(f"| {what} | {seconds:.1f} s |" for what, seconds in rows)]
    table = "\n".join([*lines, "", "```", pairs[1].rstrip(), "```"])
    publish(table, options.output)


if __name__ == "__main__":
    main()
