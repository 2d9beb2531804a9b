#!/usr/bin/env python3
"""Accuracy at equal work: the recipe `default` against nnU-Net 2.8.1, with one plan and equal steps, folds and seeds.

usage: python scripts/compare_training.py DATA --nnunet-python ~/venvs/nnunet/bin/python --work FOLDER
           [--configuration 2d] [--plan plans.json] [--splits splits.json] [--folds 0 1] [--seeds 0 1 2] [--slices 2]

The plan is DATA's own or the one of --plan, with the patch, batch and features of the options, so that a CPU can train
it. nnU-Net gets the same plan and the same folds. The two frameworks run side by side, each on a core of its own. Both
predict the held-out images whole, with their final weights and with mirroring, and one evaluator scores them. Prints
the mean Dice of each seed and the mean difference (nnlite minus nnU-Net, paired by case) with a 95 % bootstrap interval
over cases. Exits with 1 where the difference over all seeds is below -0.005.

Both keep checkpoints in --work: the same command resumes there. A resumed training of nnU-Net draws other random
numbers than one that was never interrupted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import SimpleITK as sitk
from bench_preprocess import nnunet_layout

import nnunet_lite
from nnunet_lite.commands.train import fold_names
from nnunet_lite.data.dataset import Dataset, read_case, read_dataset, summarize_dataset
from nnunet_lite.evaluation.scores import score_files
from nnunet_lite.files import write_json, write_text
from nnunet_lite.planning.nnunet import plan_to_nnunet
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import load_settings
from nnunet_lite.training.job import configure_plan
from nnunet_lite.workspace import planned_paths

NUMBER = 900  # of the dataset in nnU-Net's folders
EPOCH = 25  # steps: nnU-Net lowers its rate once an epoch
TOLERATED = 0.005
WHO = ("nnU-Net", "nnlite")


@dataclass(frozen=True)
class Work:
    """What both frameworks do.

    Parameters
    ----------
    dataset : Dataset
        What is trained on.
    folder : Path
        Holds everything that either framework writes.
    configuration : str
        Of the plan.
    iterations : int
        Steps of each training, rounded up to whole epochs.
    changes : dict[str, Any]
        Patch, batch and features, as settings of a recipe.
    splits : Path or None
        The folds; None for nnU-Net's.
    device, precision : str
        As of `nnlite train`; nnU-Net takes fp32 on a CPU, fp16 on a GPU.
    """

    dataset: Dataset
    folder: Path
    configuration: str
    iterations: int
    changes: dict[str, Any]
    splits: Path | None
    device: str
    precision: str

    @property
    def epochs(self) -> int:
        return -(-self.iterations // EPOCH)

    @property
    def workspace(self) -> Path:
        return self.folder / "nnlite"

    @cached_property
    def plan(self) -> Plan:
        return Plan.read(self.folder / "plan.json")

    def ours(self, seed: int, fold: str) -> Path:
        """The folder of our predictions of a fold's held-out cases."""
        models = next(self.workspace.glob("*/plans.json")).parent / "models"
        return models / f"seed_{seed}" / f"fold_{fold}" / "validation"

    def theirs(self, seed: int, fold: str) -> Path:
        """The folder of nnU-Net's predictions of a fold's held-out cases."""
        model = f"nnUNetTrainer__nnUNetPlans__{self.configuration}"
        return self._nnunet_results(seed) / nnunet_name(self.dataset) / model / f"fold_{fold}" / "validation"

    def _nnunet_results(self, seed: int) -> Path:
        return self.folder / "nnunet" / f"seed_{seed}"

    def environment(self, seed: int) -> dict[str, str]:
        return nnunet_environment(self.folder / "nnunet", self._nnunet_results(seed), self.device)


def nnunet_environment(root: Path, results: Path, device: str) -> dict[str, str]:
    """The environment variables that nnU-Net needs; its folders are made."""
    folders = {"raw": root / "raw", "preprocessed": root / "preprocessed", "results": results}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    # on a CPU, workers would take the core of the network, and the seed alone would not decide the batches
    workers = {"nnUNet_n_proc_DA": "0" if device == "cpu" else "8", "nnUNet_def_n_proc": "1"}
    memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # as ours: see keep_freed_memory
    return {f"nnUNet_{name}": str(folder) for name, folder in folders.items()} | workers | memory


def prepare(work: Work, given: Path | None, python: Path) -> None:
    """Plan once, for both, and let nnU-Net preprocess by that plan."""
    if not (work.folder / "plan.json").is_file():
        how: dict[str, Any] = {"workspace": work.workspace, "splits": work.splits}
        planned = nnunet_lite.plan(work.dataset.root, plans=given, **how)
        small = configure_plan(planned, work.configuration, load_settings("default", work.changes))
        write_text(work.folder / "made.json", small.to_json())
        nnunet_lite.plan(work.dataset.root, plans=work.folder / "made.json", **how)
        fold_names(planned_paths(work.workspace))  # writes splits.json
        (work.folder / "made.json").rename(work.folder / "plan.json")
    preprocessed = work.folder / "nnunet" / "preprocessed" / nnunet_name(work.dataset)
    if (preprocessed / "done").is_file():
        return
    environment, log = work.environment(0), work.folder / "nnunet.log"
    if not (raw := work.folder / "nnunet" / "raw" / nnunet_name(work.dataset)).is_dir():
        nnunet_layout(work.dataset, NUMBER, raw.parent)
    run_logged([python.with_name("nnUNetv2_extract_fingerprint"), "-d", NUMBER, "-np", 1], environment, log)
    data = work.dataset
    plans = plan_to_nnunet(work.plan, {"file_ending": data.file_ending}) | {
        "dataset_name": nnunet_name(data),
        "plans_name": "nnUNetPlans",
    }
    write_json(preprocessed / "nnUNetPlans.json", plans)
    write_text(preprocessed / "dataset.json", (raw / "dataset.json").read_text())
    run_logged(
        [python.with_name("nnUNetv2_preprocess"), "-d", NUMBER, "-c", work.configuration, "-np", 1], environment, log
    )
    splits = next(work.workspace.glob("*/splits.json"))
    write_text(preprocessed / "splits_final.json", splits.read_text())
    (preprocessed / "done").touch()


def train_ours(work: Work, seed: int, fold: str, core: int) -> None:
    """Train and validate a fold with nnlite, unless that is done."""
    if (work.ours(seed, fold) / "summary.json").is_file():
        return
    settings = {
        "training.epochs": work.epochs,
        "training.iterations": EPOCH,
        "training.validation_iterations": 1,
        "training.precision": work.precision,
        "training.seed": seed,
    }
    command = [sys.executable, "-m", "nnunet_lite", "train", work.configuration, fold, "--name", f"seed_{seed}",
               "--device", work.device, "-w", work.workspace]  # fmt: skip
    command += [f"--set={key}={value}" for key, value in settings.items()]
    run_logged(command, {}, work.folder / f"nnlite_seed_{seed}_fold_{fold}.log", core)


def train_nnunet(work: Work, seed: int, fold: str, core: int, python: Path) -> None:
    """Train and validate a fold with nnU-Net, unless that is done."""
    if (work.theirs(seed, fold) / "summary.json").is_file():
        return
    script = Path(__file__).with_name("nnunet_training.py")
    command = [python, script, NUMBER, work.configuration, fold, work.epochs, EPOCH, seed, work.device]
    run_logged(command, work.environment(seed), work.folder / f"nnunet_seed_{seed}_fold_{fold}.log", core)


def nnunet_name(dataset: Dataset) -> str:
    return f"Dataset{NUMBER:03d}_{dataset.name.split('_')[-1]}"  # as nnunet_layout names it


def run_logged(command: list[Any], environment: dict[str, str], log: Path, core: int | None = None) -> None:
    """Run a command to its end, on one core if one is given; a failure ends this program."""
    threads = {} if core is None else {"OMP_NUM_THREADS": "1"}
    with log.open("a") as output:
        process = psutil.Popen(
            list(map(str, command)), env=os.environ | environment | threads, stdout=output, stderr=subprocess.STDOUT
        )
        if core is not None:
            process.cpu_affinity([core])
        if code := process.wait():
            raise SystemExit(f"{command[0]} ended with {code}: see {log}")


# ------------------------------------------------------------------------------------------------- slices as cases


def cut_into_slices(dataset: Dataset, every: int, folder: Path) -> tuple[Path, Path]:
    """Cut volumes into axial slices, each a case, and hold out one volume in each fold.

    Parameters
    ----------
    dataset : Dataset
        Of volumes.
    every : int
        Takes evenly spaced slices of those that show a label.
    folder : Path
        Where the dataset of slices is written, unless it is there.

    Returns
    -------
    tuple[Path, Path]
        The root of the new dataset and its splits.json.
    """
    root, splits = folder / f"{dataset.name}Slices", folder / "splits.json"
    if splits.is_file():
        return root, splits
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True, exist_ok=True)
    slices: dict[str, list[str]] = {}
    for case in dataset.cases:
        image, values = read_case(case, dataset)
        assert values is not None
        spacing = image.geometry.spacing[:0:-1]
        shown = np.flatnonzero((values != dataset.labels.background).any((1, 2)))[::every]
        for z in shown:
            name = f"{case.id}s{z:03d}"
            for channel, array in enumerate(image.array):
                _write_slice(root / "imagesTr" / f"{name}_{channel:04d}.nii.gz", array[z].astype(np.float32), spacing)
            _write_slice(root / "labelsTr" / f"{name}.nii.gz", values[z].astype(np.uint8), spacing)
            slices.setdefault(case.id, []).append(name)
    every_slice = [name for names in slices.values() for name in names]
    about = summarize_dataset(dataset) | {"numTraining": len(every_slice), "file_ending": ".nii.gz"}
    write_json(root / "dataset.json", about)
    folds = [{"train": [n for n in every_slice if n not in held_out], "val": held_out} for held_out in slices.values()]
    write_json(splits, folds)
    return root, splits


def _write_slice(file: Path, array: np.ndarray, spacing: Sequence[float]) -> None:
    image = sitk.GetImageFromArray(array[None])
    image.SetSpacing((*map(float, spacing), 1.0))
    sitk.WriteImage(image, str(file))


# --------------------------------------------------------------------------------------------------------- results


def dice(folders: Sequence[Path], dataset: Dataset) -> np.ndarray:
    """Dice of the held-out cases of some folds and of each label (cases, labels), by one evaluator for both."""
    references = next(case.label for case in dataset.cases if case.label).parent
    return np.concatenate(
        [score_files(folder, references, dataset.labels, surface=False).values() for folder in folders]
    )


def known(values: np.ndarray) -> np.ndarray:
    """Without the cases that have no value: a label is neither in the reference nor predicted."""
    return values[np.isfinite(values)]


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over cases."""
    drawn = np.random.default_rng(0).integers(len(differences), size=(10_000, len(differences)))
    low, high = np.percentile(differences[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)


def table(scores: dict[str, np.ndarray], seeds: Sequence[int], labels: Sequence[str]) -> tuple[str, float]:
    """The scores as a table, and the mean difference over seeds.

    Parameters
    ----------
    scores : dict[str, np.ndarray]
        By framework, Dice (seeds, cases, labels).
    seeds : Sequence[int]
        The seeds.
    labels : Sequence[str]
        Names of the labels.
    """
    lines = [["", *WHO, "nnlite - nnU-Net (95 % interval over cases)", "cases"], ["---"] * 5]

    def add(name: str, pick: Any) -> float:
        values = {who: pick(scores[who]) for who in WHO}
        difference = known(values["nnlite"] - values["nnU-Net"])
        low, high = interval(difference)
        means = [f"{np.nanmean(values[who]):.4f}" for who in WHO]
        lines.append([name, *means, f"{difference.mean():+.4f} ({low:+.4f} to {high:+.4f})", str(len(difference))])
        return float(difference.mean())

    each = [add(f"seed {seed}", lambda v, i=i: np.nanmean(v[i], 1)) for i, seed in enumerate(seeds)]
    whole = add("all seeds", lambda v: np.nanmean(v, (0, 2)))
    if len(labels) > 1:
        for i, label in enumerate(labels):
            add(f"{label}, all seeds", lambda v, i=i: np.nanmean(v[:, :, i], 0))
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if len(seeds) > 1:
        text += f"\n\nThe difference varies from seed to seed with a standard deviation of {np.std(each, ddof=1):.4f}."
    return text, whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--nnunet-python", type=Path, required=True, help="interpreter that has nnunetv2")
    parser.add_argument("--work", type=Path, required=True, help="keeps everything; the same command resumes there")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--plan", type=Path, help="plans.json, of nnlite or nnU-Net [planned from the data]")
    parser.add_argument("--splits", type=Path, help="splits.json or splits_final.json [nnU-Net's five folds]")
    parser.add_argument("--slices", type=int, metavar="N", help="train on every Nth labelled axial slice as a 2D case, "
                        "and hold out a volume in each fold")  # fmt: skip
    parser.add_argument("--folds", nargs="+", default=["0"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--features", type=int, default=8, help="of the first stage")
    parser.add_argument("--features-max", type=int)
    parser.add_argument("--patch-size", type=int, nargs="+", help="instead of the plan's")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", help="of ours; nnU-Net takes fp32 on a CPU, fp16 on a GPU")
    parser.add_argument("--output", type=Path, help="write the table here too")
    o = parser.parse_args()
    o.work.mkdir(parents=True, exist_ok=True)
    folder, dataset = o.work.absolute(), read_dataset(o.data)
    if o.slices:
        root, o.splits = cut_into_slices(dataset, o.slices, folder)
        dataset = read_dataset(root)
    changes = {"training.batch_size": o.batch_size, "training.patch_size": o.patch_size,
               "network.features_base": o.features, "network.features_max": o.features_max}  # fmt: skip
    changes = {key: value for key, value in changes.items() if value is not None}
    work = Work(dataset, folder, o.configuration, o.iterations, changes, o.splits, o.device, o.precision)
    prepare(work, o.plan, o.nnunet_python)
    cores = sorted(psutil.Process().cpu_affinity())
    runs = [(seed, fold) for seed in o.seeds for fold in o.folds]
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(lambda: [train_ours(work, *run, cores[0]) for run in runs]),
            pool.submit(lambda: [train_nnunet(work, *run, cores[-1], o.nnunet_python) for run in runs]),
        ]
        for done in both:
            done.result()
    scores = {
        "nnlite": np.stack([dice([work.ours(seed, fold) for fold in o.folds], dataset) for seed in o.seeds]),
        "nnU-Net": np.stack([dice([work.theirs(seed, fold) for fold in o.folds], dataset) for seed in o.seeds]),
    }
    rows, difference = table(scores, o.seeds, dataset.labels.region_names)
    planned = work.plan.configuration(o.configuration)
    patch, features = "x".join(map(str, planned.patch_size)), "-".join(map(str, planned.network.features))
    text = (
        f"{dataset.name}, {o.configuration}, folds {', '.join(o.folds)}: {work.epochs * EPOCH} steps of "
        f"{planned.batch_size} patches of {patch}, features {features}, {o.device}, {o.precision}, "
        f"{time.strftime('%Y-%m-%d')}\n\n{rows}"
    )
    print(text)
    if o.output:
        o.output.write_text(text + "\n")
    return int(difference < -TOLERATED)


if __name__ == "__main__":
    sys.exit(main())
