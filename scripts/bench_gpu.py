#!/usr/bin/env python3
"""Time nnlite on one GPU in at most 8 minutes, and write one table: scripts/results/bench_gpu_<card>.md.

usage: python scripts/bench_gpu.py [--budget 480] [--nnunet-python ~/venvs/nnunet/bin/python] [--output TABLE.md]

It needs no network and no data: it makes its own. First come the tests of tests/test_gpu.py; then training of
3d_fullres (128^3, batch 2) and 2d (512^2, batch 12), with and without loading of data, plain and compiled, beside
nnU-Net's own trainer where nnunetv2 can be imported; and prediction of 512 x 512 x 300 voxels with 3 and 60 classes.
Each part is a process of its own: one that fails is a row with its error, and one for which no time is left is a row
that says so. `--device cpu --tiny` runs everything on small sizes within a minute, to see that the script works.

Columns: seconds of a step, or of a volume; of a step on a batch that is already on the device; the share of the time
that loading adds; the largest memory that torch allocated, and what was predicted; the floating-point operations of
forward and backward per second, and their share of the card's peak in bf16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# dense bf16 (fp16 before Ampere) with sums in float32, TFLOP/s, as in the data sheets; other cards are measured
PEAKS = {"B200": 2250, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
         "L40S": 362, "L40": 181, "L4": 121, "A10": 125, "RTX 4090": 165, "V100": 125, "T4": 65}  # fmt: skip
HEAD = ("part", "seconds", "on the device", "waiting", "GB", "GB predicted", "TFLOP/s", "of the peak", "remarks")
NUMBERS = {"3d_fullres": 900, "2d": 901}  # of the data sets in nnU-Net's folders
RANDOM_SEED = 0


@dataclass(frozen=True)
class Sizes:
    """What is trained and predicted: shapes (z, y, x) of images, patches, and how often each step is timed."""

    images: dict[str, tuple[int, ...]]
    patches: dict[str, tuple[int, ...]]
    batches: dict[str, int]
    volume: tuple[int, ...]
    features: tuple[int, ...]
    steps: int


FULL = Sizes(
    images={"3d_fullres": (160, 160, 160), "2d": (24, 512, 512)},
    patches={"3d_fullres": (128, 128, 128), "2d": (512, 512)},
    batches={"3d_fullres": 2, "2d": 12},
    volume=(300, 512, 512),
    features=(32, 64, 128, 256, 320, 320),
    steps=12,
)
TINY = Sizes(
    images={"3d_fullres": (24, 24, 24), "2d": (4, 32, 32)},
    patches={"3d_fullres": (16, 16, 16), "2d": (32, 32)},
    batches={"3d_fullres": 2, "2d": 2},
    volume=(24, 40, 40),
    features=(4, 8),
    steps=2,
)


# --------------------------------------------------------------------------- the parts, each in a process of its own


def describe_card(sizes: Sizes, device_name: str, work: Path) -> dict[str, Any]:
    """The card and the versions of what computes on it, and how fast it multiplies matrices in 16 bits."""
    import torch

    from nnunet_lite.networks.devices import has_bf16

    device, about = torch.device(device_name), {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"card": properties.name, "gb": properties.total_memory / 1e9}
        about["cudnn"] = str(torch.backends.cudnn.version())
    else:
        about["card"] = device.type
    n = 8192 if sizes is FULL else 256
    before_ampere = device.type == "cuda" and not has_bf16(device)
    matrix = torch.randn(n, n, device=device, dtype=torch.float16 if before_ampere else torch.bfloat16)
    best = min(timed(lambda: matrix @ matrix, device) for _ in range(5))
    product = 2 * n**3 / best / 1e12
    peak = next((value for name, value in PEAKS.items() if re.search(rf"\b{name}\b", about["card"])), product)
    remarks = f"product of two {n} x {n} matrices; the peak is {'measured' if peak == product else 'the data sheet'}"
    return {"about": {**about, "peak": peak}, "seconds": best, "tflops": product, "remarks": remarks}


def make_data(sizes: Sizes, device_name: str, work: Path, nnunet_python: str | None) -> dict[str, Any]:
    """Make two data sets, plan and preprocess them, also with nnU-Net where it is there."""
    import nibabel

    import nnunet_lite

    for configuration, number in NUMBERS.items():
        name = f"Dataset{number}_{configuration}"
        raw, theirs = work / "nnUNet_raw" / name, work / "nnUNet_preprocessed" / name
        for folder in (raw / "imagesTr", raw / "labelsTr", theirs):
            folder.mkdir(parents=True)
        for case in range(6):
            image, label = draw(sizes.images[configuration], case)
            affine = np.diag([1.0, 1.0, 1.0 if configuration == "3d_fullres" else 5.0, 1.0])
            nibabel.save(nibabel.Nifti1Image(image.T, affine), raw / "imagesTr" / f"case_{case}_0000.nii")
            nibabel.save(nibabel.Nifti1Image(label.T, affine), raw / "labelsTr" / f"case_{case}.nii")
        table = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1, "lesion": 2}, "numTraining": 6,
                 "file_ending": ".nii"}  # fmt: skip
        for folder in (raw, theirs):
            (folder / "dataset.json").write_text(json.dumps(table))
        chosen: dict[str, Any] = {
            "configuration": configuration, "patch_size": sizes.patches[configuration],
            "batch_size": sizes.batches[configuration],
        }  # fmt: skip
        (theirs / "dataset_fingerprint.json").write_text("{}")  # which nnU-Net copies beside its results
        plans = theirs / "nnUNetPlans.json"
        nnunet_lite.plan(raw, **chosen, workspace=work / "ws", format="nnunet", output=plans)
        nnunet_lite.preprocess(configuration, dataset=name, workspace=work / "ws")
        if nnunet_python:
            cores = str(max(1, len(os.sched_getaffinity(0)) // 2))
            entry = "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import preprocess_entry as run"
            arguments = ["-d", str(number), "-plans_name", "nnUNetPlans", "-c", configuration, "-np", cores]
            subprocess.run([nnunet_python, "-c", f"{entry}; run()", *arguments], check=True, stdout=sys.stderr)
    return {"remarks": "two data sets of 6 images made, planned and preprocessed"}


def train_ours(sizes: Sizes, device_name: str, work: Path, configuration: str, compiled: bool) -> dict[str, Any]:
    """Training steps of nnlite."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from nnunet_lite.data.dataset import stored_dataset
    from nnunet_lite.networks.build import build_network
    from nnunet_lite.planning.schema import Plan
    from nnunet_lite.preprocessing.store import open_case
    from nnunet_lite.settings import load_settings
    from nnunet_lite.training import learner as learning
    from nnunet_lite.training.cache import load_cases
    from nnunet_lite.training.dataloader import prefetch, training_batches
    from nnunet_lite.training.job import Job, configure_plan
    from nnunet_lite.workspace import planned_paths

    changes = {"training.compile": compiled, "training.channels_last": True if compiled else "auto"}
    device, settings = torch.device(device_name), load_settings("default", changes)
    torch.backends.cudnn.benchmark = True
    paths = planned_paths(work / "ws", f"Dataset{NUMBERS[configuration]}_{configuration}")
    plan = configure_plan(Plan.read(paths.plans), configuration, settings)
    ids = [case.id for case in stored_dataset(paths.dataset).cases]
    cases = load_cases(ids, lambda i: open_case(paths.preprocessed, plan, configuration, i), "auto", device)
    job = Job(plan, configuration, settings, 0, paths.root, device, cases, cases)
    network = learning.make_network(job)
    # compiled, the likely winner is enough: each format is compiled to be timed
    options = learning.list_training_formats(job)
    compute = learning.choose_format(job, network, options[-1:] if compiled else options)
    learner = learning.parallelize(job, learning.make_learner(job, network, compute))
    batches = prefetch(training_batches(job, 0), device, settings.training.workers)
    found = time_steps(lambda batch: learning.train_step(job, learner, [batch], 1e-3, 0), batches, device, sizes.steps)

    planned = plan.configuration(configuration)
    bare = build_network(plan, configuration).to("meta")
    shape = (planned.batch_size, plan.n_inputs(configuration), *planned.patch_size)
    with FlopCounterMode(display=False) as counter:
        outputs = bare(torch.empty(shape, device="meta"))
        torch.stack([output.sum() for output in (outputs if isinstance(outputs, list) else [outputs])]).sum().backward()
    return {
        **found, "gb_predicted": planned.memory_gb, "tflops": counter.get_total_flops() / found["on_device"] / 1e12,
        "remarks": f"{'x'.join(map(str, planned.patch_size))}, batch {planned.batch_size}, {learner.compute}: "
                   f"{learner.compute.reason}",
    }  # fmt: skip


def train_theirs(sizes: Sizes, device_name: str, work: Path, configuration: str, compiled: bool) -> dict[str, Any]:
    """Training steps of nnU-Net's own trainer, on the same plan and data."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    os.environ["nnUNet_compile"] = str(compiled).lower()  # noqa: SIM112 - the name that nnU-Net gave it
    device = torch.device(device_name)
    torch.backends.cudnn.benchmark = True
    trainer = get_trainer_from_args(str(NUMBERS[configuration]), configuration, 0, device=device)
    trainer.initial_lr = 1e-3
    trainer.on_train_start()
    trainer.network.train()
    found = time_steps(trainer.train_step, trainer.dataloader_train, device, sizes.steps)
    return {**found, "remarks": f"{'x'.join(map(str, trainer.configuration_manager.patch_size))}, "
                                f"batch {trainer.batch_size}"}  # fmt: skip


def predict_volume(sizes: Sizes, device_name: str, work: Path, classes: int) -> dict[str, Any]:
    """Prediction of one volume by a network with random weights; the first one, which includes cuDNN's search, too."""
    import torch

    from nnunet_lite.inference import predictor

    planned, plan_memory = [], predictor.plan_memory

    def remember(*arguments: Any, **options: Any) -> Any:
        planned.append(plan_memory(*arguments, **options))
        return planned[-1]

    predictor.plan_memory = remember  # what it returns is compared with what is allocated
    patch = sizes.patches["3d_fullres"]
    model = predictor.load(
        random_model(work / f"model_{classes}", classes, sizes.features, patch, [0, 1, 2]), device=device_name
    )
    image = np.random.default_rng(RANDOM_SEED).integers(-1000, 1000, sizes.volume).astype(np.int16)
    device, seconds = torch.device(device_name), []
    for _ in range(2):
        reset_peak(device)
        seconds.append(timed(lambda: model(image, (1.0, 0.8, 0.8)), device))
    shape = " x ".join(map(str, reversed(sizes.volume)))
    return {
        "seconds": seconds[-1], "gb": peak_gb(device), "gb_predicted": planned[-1][0][0].device / 1e9 or None,
        "remarks": f"{shape}, {model.arithmetic}, {len(model.mirror_axes)} axes mirrored; the first one "
                   f"{seconds[0]:.3g} s",
    }  # fmt: skip


def random_model(
    folder: Path,
    classes: int,
    features: Sequence[int] = (8, 16, 32),
    patch: Sequence[int] = (128, 128, 128),
    mirror_axes: Sequence[int] = (),
) -> Path:
    """A model folder of ours with random weights."""
    import torch

    from nnunet_lite.models.checkpoint import save_weights
    from nnunet_lite.models.folder import write_description
    from nnunet_lite.networks.build import build_network
    from nnunet_lite.planning.schema import Plan
    from nnunet_lite.settings import load_settings

    n = len(features)
    network = {"features": features, "strides": [[1] * 3, *[[2] * 3] * (n - 1)], "kernels": [[3] * 3] * n,
               "blocks": [2] * n, "decoder_convolutions": [2] * (n - 1)}  # fmt: skip
    configuration = {"spacing": [1.5] * 3, "median_shape": [200, 273, 273], "patch_size": patch, "batch_size": 2,
                     "network": network, "batch_dice": False}  # fmt: skip
    statistics = {"mean": 50, "median": 50, "std": 200, "min": -1024, "max": 2000, "percentile_00_5": -900,
                  "percentile_99_5": 1000}  # fmt: skip
    names = {"background": 0, **{f"organ {i}": i for i in range(1, classes)}}
    about = {"name": "CT", "channel_names": {"0": "CT"}, "labels": names, "numTraining": 1, "file_ending": ".nii.gz"}
    plan = Plan.model_validate({
        "dataset": "CT", "median_spacing": [1.0, 0.8, 0.8], "median_shape": [300, 512, 512], "labels": {"names": names},
        "channels": [{"name": "CT", "normalization": "ct", "statistics": statistics}],
        "configurations": {"3d_fullres": configuration},
    })  # fmt: skip
    settings = load_settings("default", {"augmentation.mirror_axes": list(mirror_axes)}).model_dump(mode="json")
    write_description(folder, plan, about, {"configuration": "3d_fullres", "settings": settings, "seed": 0})
    torch.manual_seed(0)
    made = build_network(plan, "3d_fullres")
    save_weights(folder / "fold_0" / "model.safetensors", made, {"epochs": 0})
    return folder


def draw(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image of noise (z, y, x) with a bright ellipsoid and a brighter one in it, and their label map."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    centre = rng.uniform(-0.2, 0.2, 3)
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)))
    label = (distance < 0.6).astype(np.uint8) + (distance < 0.3)
    return (rng.normal(0, 100, shape) + 200 * label).astype(np.int16), label


def time_steps(step: Callable[[Any], Any], batches: Iterator[Any], device: Any, n: int) -> dict[str, Any]:
    """Measure the seconds of a training step with loading, and on one batch: the least of three rounds."""
    batch = next(batches)
    for _ in range(3):
        step(batch)
    reset_peak(device)

    def seconds(following: Callable[[], Any]) -> float:
        return min(timed(lambda: [step(following()) for _ in range(n)], device) for _ in range(3)) / n

    with_loading, on_device = seconds(partial(next, batches)), seconds(lambda: batch)
    waiting = max(0.0, 1 - on_device / with_loading)
    return {"seconds": with_loading, "on_device": on_device, "waiting": waiting, "gb": peak_gb(device)}


def timed(work: Callable[[], Any], device: Any) -> float:
    """Measure the seconds of some work, and of what it started on the GPU."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def reset_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: Any) -> float | None:
    import torch

    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


PARTS = {part.__name__: part for part in (describe_card, make_data, train_ours, train_theirs, predict_volume)}


# ------------------------------------------------------------------------------------------------ the table


class Bench:
    """Runs the parts one after the other within a budget of seconds, and writes the table after each of them."""

    def __init__(self, o: argparse.Namespace, work: Path) -> None:
        self.o, self.work, self.start = o, work, time.monotonic()
        self.rows: list[str] = []
        self.about: dict[str, Any] = {"card": o.device, "peak": None}
        folders = {f"nnUNet_{name}": str(work / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")}
        paths = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, **folders, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}

    def run(self, title: str, needed: float, command: list[str], most: float = math.inf) -> str | None:
        """Run a command that needs about so many seconds; return what it printed, None if it failed or was skipped.

        After `most` seconds it is stopped, and at the end of the budget.
        """
        left = self.o.budget - (time.monotonic() - self.start)
        if left < needed:
            self.add(title, remarks=f"skipped: {left:.0f} s of {self.o.budget:.0f} are left, it needs about {needed:g}")
            return None
        print(f"{title} ({left:.0f} s are left)", file=sys.stderr, flush=True)
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=output, stderr=errors,
                                       text=True, start_new_session=True)  # fmt: skip
            said = "failed"
            try:
                process.wait(timeout=min(left, most))
            except subprocess.TimeoutExpired:
                said = "stopped, the time is over"
            with suppress(ProcessLookupError):  # all of its processes have ended
                os.killpg(process.pid, signal.SIGKILL)
            output.seek(0)
            if process.wait() == 0:
                return output.read()
            errors.seek(0)
            lines = [line.strip() for line in (*output, *errors) if line.strip()]
        print(*lines[-20:], sep="\n", file=sys.stderr, flush=True)
        tests = [line.partition("::")[2] for line in lines if line.startswith("FAILED ")]
        errors_of_python = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b", line)]
        reason = "; ".join(tests) or (*errors_of_python, *lines[-1:], f"exit code {process.returncode}")[0]
        self.add(title, remarks=f"{said}: {reason[:500]}")
        return None

    def part(self, title: str, needed: float, python: str, name: str, *arguments: Any) -> dict[str, Any] | None:
        """Run a function of this file in a process of its own, and add its row."""
        given = json.dumps([name, self.o.tiny, self.o.device, str(self.work), *arguments])
        out = self.run(title, needed, [python, __file__, "--part", given])
        found = None if out is None else json.loads(out.splitlines()[-1])
        if found is not None:
            self.about |= found.pop("about", {})
            self.add(title, **found)
        return found

    def add(self, title: str, **found: Any) -> None:
        """Add a row, and write the table."""

        def number(key: str, form: str = ".3g", scale: float = 1.0) -> str:
            return "" if found.get(key) is None else f"{scale * found[key]:{form}}"

        tflops, peak = found.get("tflops"), self.about["peak"]
        share = "" if tflops is None or not peak else f"{tflops / peak:.1%}"
        cells = (title, number("seconds"), number("on_device"), number("waiting", ".0%"), number("gb", ".2f"),
                 number("gb_predicted", ".2f"), number("tflops"), share, found.get("remarks", ""))  # fmt: skip
        self.rows.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
        print(self.rows[-1], flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(self.text())

    @property
    def file(self) -> Path:
        card = "".join(letter if letter.isalnum() else "_" for letter in self.about["card"].lower())
        return self.o.output or ROOT / "scripts" / "results" / f"bench_gpu_{card}.md"

    def text(self) -> str:
        memory = f", {self.about['gb']:.0f} GB" if "gb" in self.about else ""
        versions = ", ".join(f"{name} {self.about[name]}" for name in ("torch", "cuda", "cudnn") if name in self.about)
        took = f"{time.monotonic() - self.start:.0f} s of {self.o.budget:.0f}"
        head = f"# {self.about['card']}{memory}\n\n{versions}; Python {platform.python_version()}; {took}\n"
        return "\n".join([head, f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *self.rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all parts together")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script works")
    parser.add_argument("--skip-tests", action="store_true", help="without tests/test_gpu.py")
    parser.add_argument("--nnunet-python", help="interpreter that has nnunetv2; default: this one, if it has")
    parser.add_argument("--output", type=Path, help="the table; default: scripts/results/bench_gpu_<card>.md")
    o = parser.parse_args()
    has_nnunet = importlib.util.find_spec("nnunetv2") is not None
    theirs = o.nnunet_python or (sys.executable if has_nnunet else None)
    seconds = 2.0 if o.tiny else 20.0
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(o, Path(work))
        bench.part("card", 0, sys.executable, "describe_card")
        if not o.skip_tests:
            pytest = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "tests/test_gpu.py"]
            out = bench.run("tests", seconds, pytest, most=o.budget / 2)
            if out is not None:
                bench.add("tests", remarks=out.strip().splitlines()[-1])
        bench.part("data", seconds, sys.executable, "make_data", theirs)
        for compiled in (False, True):  # the compiler takes longest
            how, needed = ("compiled", 3 * seconds) if compiled else ("plain", seconds)
            if compiled and o.tiny:
                bench.add("compiled", remarks="skipped: it takes minutes on a CPU")
                continue
            for configuration in NUMBERS:
                options = (configuration, compiled)
                bench.part(f"train {configuration}, {how}", needed, sys.executable, "train_ours", *options)
                if theirs:
                    bench.part(f"train {configuration}, nnU-Net, {how}", needed, theirs, "train_theirs", *options)
            if not compiled:
                for classes in (3, 60):
                    bench.part(f"predict, {classes} classes", seconds, sys.executable, "predict_volume", classes)
    print(f"written to {bench.file}", file=sys.stderr)


if __name__ == "__main__":  # nnU-Net's worker processes import this file again
    if sys.argv[1:2] == ["--part"]:
        name, tiny, device, folder, *arguments = json.loads(sys.argv[2])
        print(json.dumps(PARTS[name](TINY if tiny else FULL, device, Path(folder), *arguments)))
        sys.stdout.flush()
        os._exit(0)  # without waiting for nnU-Net's workers
    main()
