#!/usr/bin/env python3
"""Which recipe is better, and is the difference more than chance? Several seeds, paired by case, in equal time or work.

usage: taskset -c 0,1 python scripts/bench_recipes.py SET RECIPE [RECIPE ...] --seeds 3 --minutes 5 | --steps 500
           [--set KEY=VALUE] [--nnunet-python ~/venvs/nnunet/bin/python] [-w FOLDER] [--output TABLE.md]

SET     hippocampus, nuclei (both of --data), phantoms (made by make_phantoms.py), or the folder of a dataset
RECIPE  cpu                            a recipe, or its TOML file
        cpu+relu, cpu+mine.toml        what another recipe says on top of it, its own base left out: configs/ablations
        cpu:optimizer.lr=4e-3,training.foreground=0.5       changed settings
        cpu@../main                    trained by the nnlite of another checkout, which plans for itself too

Trains each recipe with the seeds 0, 1, ... on fold 0, scores the held-out images whole, and prints the mean Dice with
its standard deviation over seeds, and the difference to the first recipe, paired by case after the mean over seeds,
with its 95 % bootstrap interval over cases. --minutes are those of the training; the held-out images are predicted
after them, unless --set training.limit_validation=true. A run with a seed computes in fp32 on a CPU.

nnU-Net 2.8.1 is a row with --nnunet-python: its own plan and preprocessing, as long on the same cores. It has no time
limit, so its steps are taken until the time is over, with its learning rate following the time.

Finished runs are kept in the folder, and an interrupted one continues; nnU-Net with --minutes begins again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import tomllib
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_preprocess import nnunet_layout
from compare_training import NUMBER, nnunet_environment, nnunet_name, run_logged
from make_phantoms import LABEL_MAP, make_dataset, read_anatomy

from nnunet_lite.data.dataset import Dataset, read_dataset
from nnunet_lite.data.names import PICTURES
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.scores import score_files
from nnunet_lite.evaluation.statistics import compare_paired, mean_of_labels
from nnunet_lite.files import read_json
from nnunet_lite.settings import flatten, load_settings, recipes
from nnunet_lite.system import cpus

HERE = Path(__file__).absolute().parents[1]
SETS = {"hippocampus": "Task04_Hippocampus", "nuclei": "Dataset018_Nuclei2D", "phantoms": "Dataset040_Phantoms"}
EPOCH = 50  # steps
COLUMNS = ("recipe", "Dice", "sd over seeds", "difference (95 % interval over cases)", "steps", "validation, s")


@dataclass(frozen=True)
class Bench:
    """What all rows of the table share; the length is minutes, or steps."""

    dataset: Dataset
    folder: Path  # keeps every run
    configuration: str
    minutes: float | None
    epochs: int
    iterations: int
    changes: tuple[str, ...]  # settings of all recipes, KEY=VALUE
    device: str

    @property
    def length(self) -> str:
        return f"{self.epochs * self.iterations} steps" if self.minutes is None else f"{self.minutes:g} minutes"


@dataclass(frozen=True)
class Result:
    """A finished run: Dice (cases, labels), the names of the cases, steps, seconds of validation."""

    dice: np.ndarray
    cases: tuple[str, ...]
    steps: int
    validation: float


def parse_row(row: str) -> tuple[str, list[str], Path]:
    """The recipe of a row, its changed settings and the checkout that trains it."""
    row, _, checkout = row.partition("@")
    row, _, changes = row.partition(":")
    recipe, *additions = row.split("+")
    files = {name.removeprefix("ablations/"): file for name, file in recipes().items()}
    found = []
    for addition in additions:
        tree = tomllib.loads(files.get(addition, Path(addition)).read_text())
        tree.pop("base", None)
        found += [f"{key}={json.dumps(value)}" for key, value in flatten(tree)]
    found += re.split(r",(?=\w+\.\w+=)", changes) if changes else []  # a comma may be part of a value
    if recipe.endswith(".toml"):
        recipe = str(Path(recipe).absolute())
    return recipe, found, Path(checkout).absolute() if checkout else HERE


def model_name(bench: Bench, row: str) -> str:
    """A name for the folder of a row; another one where a recipe of this checkout has changed since."""
    recipe, changes, checkout = parse_row(row)
    overrides = dict(change.split("=", 1) for change in (*bench.changes, *changes))
    settings = load_settings(recipe, overrides).model_dump_json(exclude_defaults=True) if checkout == HERE else ""
    identity = zlib.crc32(f"{row} {overrides} {settings}".encode())
    return re.sub(r"\W+", "_", f"{row.split('@')[0][:60]} {bench.length} {identity:08x}")


def train_nnlite(bench: Bench, row: str, seed: int) -> Path:
    """The folder of the trained and validated fold."""
    recipe, changes, checkout = parse_row(row)
    (workspace := bench.folder / f"nnlite-{checkout.name}").mkdir(parents=True, exist_ok=True)
    command, environment = [sys.executable, "-P", "-m", "nnunet_lite"], {"PYTHONPATH": str(checkout)}
    name = f"{model_name(bench, row)}_seed_{seed}"
    where = ["-w", workspace, "--dataset", bench.dataset.name]
    fold = workspace / bench.dataset.name / "models" / name / "fold_0"
    if (fold / "validation" / "summary.json").is_file():
        return fold
    if not (workspace / bench.dataset.name / "plans.json").is_file():
        run_logged([*command, "plan", bench.dataset.root, *where[:2]], environment, workspace / "plan.log")
    length = [f"training.time_limit={bench.minutes}", "training.limit_validation=false"]
    if bench.minutes is None:
        length = [f"training.epochs={bench.epochs}", f"training.iterations={bench.iterations}"]
    settings = [f"training.seed={seed}", *length, *bench.changes, *changes]
    command += ["train", bench.configuration, "0", "--recipe", recipe, "--name", name, "--device", bench.device, *where]
    run_logged(command + [f"--set={change}" for change in settings], environment, workspace / f"{name}.log")
    return fold


def train_nnunet(bench: Bench, seed: int, python: Path) -> Path:
    """The folder of the trained and validated fold."""
    root = bench.folder / "nnunet"
    results, data = root / f"{bench.length} seed {seed}".replace(" ", "_"), nnunet_name(bench.dataset)
    fold = results / data / f"nnUNetTrainer__nnUNetPlans__{bench.configuration}" / "fold_0"
    if (fold / "validation" / "summary.json").is_file():
        return fold
    environment, log = nnunet_environment(root, results, bench.device), root / f"{results.name}.log"
    if not (root / "raw" / data).is_dir():
        nnunet_layout(bench.dataset, NUMBER, root / "raw")
    done = root / "preprocessed" / data / "done"
    if not done.is_file():
        program = python.with_name("nnUNetv2_plan_and_preprocess")
        command = [program, "-d", NUMBER, "-c", bench.configuration, "-npfp", 1, "-np", 1]
        run_logged(command, environment | {"nnUNet_n_proc_DA": "1"}, log)  # its planner refuses 0
        done.touch()
    script = Path(__file__).with_name("nnunet_training.py")
    command = [python, script, NUMBER, bench.configuration, 0, bench.epochs, bench.iterations, seed, bench.device]
    run_logged([*command, *([] if bench.minutes is None else [bench.minutes])], environment, log)
    return fold


def read_result(bench: Bench, fold: Path) -> Result:
    """Score a validated fold, by one evaluator for all rows."""
    references = next(case.label for case in bench.dataset.cases if case.label).parent
    scores = score_files(fold / "validation", references, bench.dataset.labels, surface=False)
    (trained,) = (*fold.glob("model.safetensors"), *fold.glob("checkpoint_final.pth"))
    seconds = (fold / "validation" / "summary.json").stat().st_mtime - trained.stat().st_mtime
    return Result(scores.values(), tuple(row.case for row in scores.rows), count_steps(bench, fold), seconds)


def count_steps(bench: Bench, fold: Path) -> int:
    """The steps of a run; the last epoch of one of nnlite may be cut off by the limit."""
    if bench.minutes is None:
        return bench.epochs * bench.iterations
    if (fold / "steps.txt").is_file():
        return int((fold / "steps.txt").read_text())
    epochs = [json.loads(line) for line in (fold / "metrics.jsonl").open()]
    training = read_json(fold.parent / "run.json")["settings"]["training"]
    batch = read_json(fold.parent / "plans.json")["configurations"][bench.configuration]["batch_size"]
    last = epochs[-1]["samples_per_second"] * epochs[-1]["seconds"] / batch / training["accumulate"]
    return (len(epochs) - 1) * training["iterations"] + min(round(last), training["iterations"])


def table(found: dict[str, list[Result]], labels: Sequence[str]) -> str:
    """The rows, each with its difference to the first one."""
    head = [*COLUMNS, *labels]
    lines, first = [head, ["---"] * len(head)], next(iter(found.values()))
    for row, results in found.items():
        if any(result.cases != first[0].cases for result in results):
            raise SystemExit(f"{row} holds out other cases than {next(iter(found))}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a label that a case does not have
            ours, reference = (np.nanmean([result.dice for result in r], 0) for r in (results, first))
            by_label = np.nanmean(ours, 0)
        each = [mean_of_labels(result.dice) for result in results]
        margin = compare_paired(ours, reference)
        limits = "" if margin.low is None else f" ({margin.low:+.4f} to {margin.high:+.4f})"
        difference = "" if results is first else f"{margin.mean:+.4f}{limits}"
        lines.append(
            [row, f"{mean_of_labels(ours):.4f}", f"{np.std(each, ddof=1):.4f}" if len(each) > 1 else "", difference,
             f"{np.mean([result.steps for result in results]):.0f}",
             f"{np.mean([result.validation for result in results]):.0f}", *(f"{dice:.4f}" for dice in by_label)]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", metavar="SET")
    parser.add_argument("recipes", metavar="RECIPE", nargs="+")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=5.0, help="of each training; default: 5")
    length.add_argument("--steps", type=int, help="of each training, rounded up to whole epochs")
    parser.add_argument("--seeds", type=int, default=3, help="their number; default: 3")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help="for all rows")
    parser.add_argument("--configuration", help="default: 2d for pictures, else 3d_fullres")
    parser.add_argument("--nnunet-python", type=Path, help="interpreter that has nnunetv2: nnU-Net is a row")
    parser.add_argument("--data", type=Path, default=HERE.parent / "shared" / "data", help="default: ../shared/data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-w", "--workspace", type=Path, default=Path("bench_recipes"))
    parser.add_argument("--output", type=Path, help="write the table here too, after each seed")
    o = parser.parse_args()
    where = o.workspace / "data" if o.set == "phantoms" else o.data
    root = where / SETS[o.set] if o.set in SETS else Path(o.set)
    if o.set == "phantoms" and not (root / "dataset.json").is_file():
        make_dataset(root, read_anatomy(LABEL_MAP))
    dataset = read_dataset(root)
    configuration = o.configuration or ("2d" if dataset.file_ending in PICTURES else "3d_fullres")
    epochs = -(-o.steps // EPOCH) if o.steps else 1
    bench = Bench(
        dataset, o.workspace.absolute() / dataset.name, configuration, None if o.steps else o.minutes,
        epochs, -(-(o.steps or 1) // epochs), tuple(o.changes), o.device,
    )  # fmt: skip
    precision = "fp32 as always on a CPU with a seed" if o.device == "cpu" else o.device
    found: dict[str, list[Result]] = {row: [] for row in o.recipes if model_name(bench, row)}  # refuses a mistake
    for seed in range(o.seeds):  # a machine that slows down does so for all rows
        for row in o.recipes:
            found[row].append(read_result(bench, train_nnlite(bench, row, seed)))
        if o.nnunet_python:
            fold = train_nnunet(bench, seed, o.nnunet_python.absolute())
            found.setdefault("nnU-Net 2.8.1", []).append(read_result(bench, fold))
        text = (
            f"{dataset.name}, {configuration}, fold 0, {len(found[o.recipes[0]][0].cases)} held-out cases, "
            f"{bench.length} of training, seeds 0 to {seed}, {precision}, {cpus()} cores, {time.strftime('%Y-%m-%d')}"
            f"{''.join(f', {change}' for change in o.changes)}\n\n{table(found, dataset.labels.region_names)}"
        )
        if o.output:
            o.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
