"""A GPU trains and predicts what the CPU does, within the memory that it is given: `pytest -m gpu`, at most 4 minutes.

Without a GPU these tests are skipped. NNLITE_TEST_DEVICE=cpu runs them on the CPU, to see that their code works.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from samples import ENVIRONMENT, FAST, as_options, fold_of, sample_plan

import nnunet_lite
from nnunet_lite.data.labels import Labels
from nnunet_lite.inference.predictor import load
from nnunet_lite.models.checkpoint import save_weights
from nnunet_lite.models.folder import CHECKPOINT, MODEL, read_weights_header, write_description
from nnunet_lite.networks.unet import build_network
from nnunet_lite.settings import Settings
from nnunet_lite.training.metrics import METRICS

DEVICE = os.environ.get("NNLITE_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICE, reason="there is no GPU; NNLITE_TEST_DEVICE=cpu runs these tests on the CPU"),
]
LITTLE_MEMORY = 1_500_000_000  # bytes of the GPU: less than the fastest way to predict `large_image` needs
# as the command, but both processes use one GPU, which NCCL refuses
ON_ONE_GPU = """
import torch
from nnunet_lite import cli
from nnunet_lite.training import distributed
connect = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend, **options: connect("gloo", **options)
distributed.rank_device = lambda ranks, device: device
cli.main()
"""


Train = Callable[..., list[dict[str, Any]]]  # the metrics of the epochs


@pytest.fixture
def workspace(tiny_workspace: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_workspace` to train in, where `samples.fold_of` finds its folds."""
    return Path(shutil.copytree(tiny_workspace, tmp_path / "workspace", ignore=shutil.ignore_patterns("models")))


@pytest.fixture
def train(workspace: Path, tiny_settings: dict[str, Any]) -> Train:
    """Train fold 0 on the device, and return the metrics of its epochs: train("name", {"training.epochs": 1})."""

    def run(name: str, changes: dict[str, Any] | None = None, **options: Any) -> list[dict[str, Any]]:
        settings = {**tiny_settings, "training.patch_size": [16, 32, 16], **(changes or {})}
        options = {"device": DEVICE, "workspace": workspace, "name": name, **options}
        nnunet_lite.train("3d_fullres", 0, settings=settings, **options)
        return metrics(workspace.parent, name)

    return run


@pytest.fixture
def many_labels(tmp_path: Path) -> Path:
    """A model of 60 labels with random weights."""
    plan = sample_plan(Labels(names={"background": 0, **{f"label {i}": i for i in range(1, 61)}}), patch=(64, 64, 64))
    run = {"configuration": "3d_fullres", "seed": 0, "settings": Settings().model_dump(mode="json")}
    folder = tmp_path / "many_labels"
    write_description(folder, plan, {}, run)
    torch.manual_seed(0)
    save_weights(folder / "fold_0" / MODEL, build_network(plan, "3d_fullres"), {"epochs": 0, "seconds": 0})
    return folder


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let torch allocate no more than LITTLE_MEMORY on the GPU."""
    if not DEVICE.startswith("cuda"):
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(LITTLE_MEMORY / torch.cuda.mem_get_info(DEVICE)[1], DEVICE)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (fold_of(root, name) / METRICS).read_text().splitlines()]


def share_equal(one: np.ndarray, other: np.ndarray) -> float:
    assert len(np.unique(one)) > 1, "otherwise this shows nothing"
    return float((one == other).mean())


# ---------------------------------------------------------------------------------------------------------- predicting


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.9995), ("auto", 0.99)])
def test_label_maps_equal_those_of_the_cpu(tiny_model: Path, scans: list[Path], precision: str, share: float) -> None:
    on_cpu = load(tiny_model, device="cpu", settings={**FAST, "inference.mirroring": True})
    on_device = load(tiny_model, device=DEVICE, settings={"inference.precision": precision})
    for scan in scans:
        assert share_equal(on_cpu(scan), on_device(scan)) > share


def test_five_folds_equal_those_of_the_cpu(model_copy: Path, scans: list[Path]) -> None:
    """Each fold has weights of its own."""
    weights = load_file(model_copy / "fold_0" / MODEL)
    for fold in range(1, 5):
        rng = np.random.default_rng(fold)
        noisy = {name: value + rng.normal(0, 0.02, value.shape).astype(value.dtype) for name, value in weights.items()}
        (model_copy / f"fold_{fold}").mkdir()
        save_file(noisy, model_copy / f"fold_{fold}" / MODEL, {"state": '{"epochs": 2, "seconds": 1.0}'})
    on_cpu, on_device = (load(model_copy, device=device, settings=FAST) for device in ("cpu", DEVICE))
    assert on_device.folds == ("0", "1", "2", "3", "4")
    assert share_equal(on_cpu(scans[0]), on_device(scans[0])) > 0.9995


def test_two_images_in_a_row_fit_where_one_does(many_labels: Path, little_memory: None) -> None:
    """torch keeps the memory of the first image, and the second one must not count it as used."""
    images = [np.random.default_rng(seed).normal(size=(64, 128, 128)).astype(np.float32) for seed in (0, 1)]
    model = load(many_labels, device=DEVICE, settings=FAST)
    alone = [load(many_labels, device="cpu", settings=FAST)(image, (1.0, 1.0, 1.0)) for image in images]
    for image, expected in zip(images, alone, strict=True):
        assert share_equal(expected, model(image, (1.0, 1.0, 1.0))) > 0.99


# ------------------------------------------------------------------------------------------------------------ training


def test_a_fold_is_trained_and_validated(train: Train, tmp_path: Path, scans: list[Path]) -> None:
    """In the number format that the device computes fastest."""
    rows = train("trained", {"training.precision": "auto", "training.seed": None, "training.channels_last": "auto"})
    assert len(rows) == 2 and all(np.isfinite([row["train_loss"], row["validation_loss"]]).all() for row in rows)
    fold = fold_of(tmp_path, "trained")
    assert len(list((fold / "validation").glob("*.nii.gz"))) == 2 and (fold / "validation" / "summary.json").is_file()
    header = read_weights_header(fold / MODEL)
    assert header["device"] == DEVICE.partition(":")[0]
    done = nnunet_lite.predict(scans[0], tmp_path / "out", model=fold.parent, device=DEVICE)
    assert done.failed == {} and done.files[0].is_file()


def test_the_device_learns_what_the_cpu_learns(train: Train) -> None:
    on_device, on_cpu = train("device"), train("cpu", device="cpu")
    for one, other in zip(on_device, on_cpu, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=5e-3)
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], abs=5e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="the convolutions that make CPUs fast cannot be compiled for every shape")
def test_a_compiled_network_learns_what_the_plain_one_learns(train: Train) -> None:
    plain, compiled = (train(str(choice), {"training.compile": choice}) for choice in (False, True))
    for one, other in zip(plain, compiled, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=5e-3)


def test_a_run_resumes(train: Train, tmp_path: Path) -> None:
    whole = train("whole", {"training.epochs": 3})
    assert len(train("resumed", {"training.epochs": 1})) == 1
    assert (fold_of(tmp_path, "resumed") / CHECKPOINT).is_file()
    rows = train("resumed", {"training.epochs": 3})
    assert [row["epoch"] for row in rows] == [1, 2, 3] and read_weights_header(fold_of(tmp_path, "resumed") / MODEL)
    assert np.isfinite(rows[-1]["train_loss"]) and rows[0]["train_loss"] == pytest.approx(whole[0]["train_loss"], 1e-2)


def test_two_processes_on_one_device_learn_what_one_learns(workspace: Path, train: Train, tmp_path: Path) -> None:
    changes = {"training.batch_size": 3, "training.patch_size": [16, 32, 16]}
    alone = train("one", changes)
    (tmp_path / "command.py").write_text(ON_ONE_GPU)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["train", "3d_fullres", "0", "--name", "two", "-w", str(workspace), "--device", DEVICE]
    settings = json.loads((fold_of(tmp_path, "one").parent / "run.json").read_text())["settings"]
    flat = {f"{part}.{key}": value for part, values in settings.items() if isinstance(values, dict)
            for key, value in values.items() if value is not None}  # fmt: skip
    command = [*torchrun, str(tmp_path / "command.py"), *arguments, *as_options(flat)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for one, other in zip(alone, metrics(tmp_path, "two"), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=5e-3)
