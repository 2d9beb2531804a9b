#!/usr/bin/env python3
"""Measure the report of a dataset with two models: the time to write it, its size, and the time to open it.

usage: taskset -c 0,1 python scripts/bench_report.py DATA [--workspace DIR]

Size and time do not depend on the quality of the models, so these are stand-ins that take seconds instead of hours:
their prediction of a case is its reference, moved and frayed at random, and their curves have 1000 epochs. A workspace
that already contains models is reported as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import nnunet_lite
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, dataset_from_json, map_labels
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.evaluation.metrics import score_case
from nnunet_lite.evaluation.scores import CaseScore, Scores
from nnunet_lite.files import read_json, write_json, write_text
from nnunet_lite.models.folder import model_folders, open_run
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import load_settings
from nnunet_lite.training.job import configure_plan
from nnunet_lite.training.splits import read_split
from nnunet_lite.workspace import Paths, planned_paths

CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync")  # fmt: skip
EPOCHS = 1000


def stand_in(paths: Paths, configuration: str, seed: int) -> None:
    """A model folder with five scored folds."""
    plan, dataset = Plan.read(paths.plans), dataset_from_json(read_json(paths.dataset))
    settings, folder = load_settings("default"), paths.models / f"{configuration}-standin"
    open_run(folder, configure_plan(plan, configuration, settings), dataset, configuration, settings)
    cases = {case.id: case for case in dataset.cases}
    for number in range(5):
        fold, draws = folder / f"fold_{number}", np.random.default_rng([seed, number])
        held_out = read_split(paths.splits, dataset, str(number)).validation
        (fold / "validation").mkdir(parents=True)
        jobs = [(cases[case_id], int(draws.integers(2**31))) for case_id in held_out]
        with ThreadPoolExecutor() as pool:
            rows = list(pool.map(lambda job, out=fold / "validation": predicted(*job, dataset, out), jobs))
        write_json(fold / "validation" / "summary.json", Scores(tuple(rows), dataset.labels).to_json())
        write_text(fold / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in epochs(dataset, draws)))


def predicted(case: Case, seed: int, dataset: Dataset, out: Path) -> CaseScore:
    """Write the reference of a case, moved by up to two voxels and with a tenth of its edge flipped, and score it."""
    draws = np.random.default_rng(seed)
    assert case.label is not None
    label, geometry, _ = read_label(case.label)
    reference = map_labels(label, dataset.value_map)
    moved = np.roll(reference, draws.integers(-2, 3, 3), (0, 1, 2))
    edge = moved != np.roll(moved, 1, 2)
    moved = np.where(edge & (draws.random(moved.shape) < 0.1), np.roll(moved, 1, 2), moved)
    path = out / f"{case.id}.nii.gz"
    write_label(path, moved, geometry)
    metrics = score_case(moved, reference, dataset.labels, geometry.spacing)
    return CaseScore(case.id, str(path), str(case.label), metrics)


def epochs(dataset: Dataset, draws: np.random.Generator) -> list[dict[str, object]]:
    """Rows of metrics.jsonl that look like those of a run."""
    rows: list[dict[str, object]] = []
    for epoch in range(1, EPOCHS + 1):
        dice = {name: round(0.9 * (1 - np.exp(-epoch / 60)) + 0.02 * draws.normal(), 4)
                for name in dataset.labels.region_names}  # fmt: skip
        rows.append({
            "epoch": epoch, "train_loss": round(-0.9 + 1.4 * np.exp(-epoch / 60) + 0.03 * draws.normal(), 5),
            "lr": 0.01 * (1 - epoch / EPOCHS) ** 0.9, "seconds": round(60 + draws.normal(), 2),
            "samples_per_second": 9.1, "waiting": 0.01, "memory_gb": 3.2, "bad_steps": 0,
            "validation_loss": round(-0.8 + 1.3 * np.exp(-epoch / 60) + 0.03 * draws.normal(), 5),
            "dice": dice, "mean_dice": round(float(np.mean(list(dice.values()))), 4),
        })  # fmt: skip
    return rows


def opening_seconds(page: Path, repeats: int = 3) -> float:
    """From the request for the page until it is drawn, in headless Chromium with a new profile, best of some."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    times = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(CHROMIUM))
        for _ in range(repeats):
            tab = browser.new_context().new_page()
            start = time.perf_counter()
            tab.goto(page.as_uri())
            tab.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
            times.append(time.perf_counter() - start)
        browser.close()
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the dataset")
    parser.add_argument("--workspace", type=Path, help="where it is or will be planned [a temporary folder]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = (given.workspace or Path(scratch)).absolute()
        if not list(workspace.glob("*/plans.json")):
            nnunet_lite.plan(given.data, workspace=workspace)
        paths = planned_paths(workspace, Path(given.data).name)
        if not model_folders(paths):
            for seed, configuration in enumerate(Plan.read(paths.plans).configurations):
                stand_in(paths, configuration, seed)
        page = Path(scratch) / "report.html"
        start = time.perf_counter()
        nnunet_lite.report(page, workspace=workspace, dataset=paths.name)
        made = time.perf_counter() - start
        n, models = len(read_json(paths.dataset)["dataset"]), ", ".join(f.name for f in model_folders(paths))
        print(f"{paths.name}, {n} cases, {models}\n\n| what | figure |\n|---|---|", file=sys.stdout)
        print(f"| time to make the report | {made:.1f} s |")
        print(f"| size of the page | {page.stat().st_size / 1e6:.2f} MB |")
        print(f"| time to open it in headless Chromium, best of 3 | {opening_seconds(page):.2f} s |")


if __name__ == "__main__":
    main()
