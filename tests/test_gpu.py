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
from samples import ENVIRONMENT, FAST, as_options, fold_of, read_metrics, sample_plan

import nnunet_lite
from nnunet_lite.commands.machines import doctor
from nnunet_lite.data.labels import Labels
from nnunet_lite.inference.predictor import load
from nnunet_lite.models.checkpoint import save_weights
from nnunet_lite.models.folder import CHECKPOINT, MODEL, read_weights_header, write_description
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.devices import computes_bf16, find_wrong_gpus, has_bf16
from nnunet_lite.networks.precision import ComputeFormat, apply_format
from nnunet_lite.settings import Settings
from nnunet_lite.system import GB

DEVICE = os.environ.get("NNLITE_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICE, reason="there is no GPU; NNLITE_TEST_DEVICE=cpu runs these tests on the CPU"),
]
# as the command, but both processes use one GPU, which NCCL refuses
ON_ONE_GPU = """
import torch
from nnunet_lite import cli
from nnunet_lite.training import distributed
connect = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend, **options: connect("gloo", **options)
distributed.rank_device = lambda ranks, device: torch.device(device.type, 0)
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
        settings = {**tiny_settings, "training.patch_size": [16, 32, 16], "training.compile": False, **(changes or {})}
        options = {"device": DEVICE, "workspace": workspace, "name": name, **options}
        nnunet_lite.train("3d_fullres", 0, settings=settings, **options)
        return read_metrics(fold_of(workspace.parent, name))

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
def limit_memory() -> Iterator[Callable[[int], None]]:
    """Let torch allocate no more than some bytes on the GPU, which the driver does not know."""

    def limit(number: int) -> None:
        if DEVICE.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(number / torch.cuda.mem_get_info()[1])

    yield limit
    if DEVICE.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(1.0)


def share_equal(one: np.ndarray, other: np.ndarray) -> float:
    assert len(np.unique(one)) > 1, "otherwise this shows nothing"
    return float((one == other).mean())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
def test_the_doctor_describes_the_gpu() -> None:
    about = doctor()
    assert about.values["gpus"][0]["name"] in about.text and about.values["gpus"][0]["memory_gb"] > 0
    assert f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" in about.text


# ---------------------------------------------------------------------------------------------------------- predicting


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.9995), ("auto", 0.99)])
def test_label_maps_equal_those_of_the_cpu(tiny_model: Path, scans: list[Path], precision: str, share: float) -> None:
    mirrored = {**FAST, "inference.mirroring": True}
    on_cpu = load(tiny_model, device="cpu", settings=mirrored)
    on_device = load(tiny_model, device=DEVICE, settings={**mirrored, "inference.precision": precision})
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


@pytest.mark.parametrize(("number", "known"), [(620_000_000, True), (250_000_000, False)])
def test_two_images_in_a_row_fit_where_one_does(
    many_labels: Path,
    limit_memory: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    number: int,
    known: bool,
) -> None:
    """torch keeps the memory of the first image, which the second one uses again.

    The fastest way is planned with 636 MB, of which 500 are an allowance for cuDNN; the logits of its slices take
    256 MB. Where the limit is not known beforehand, the prediction runs out of memory and continues with less.
    """
    limit_memory(number)
    limit = {"inference.max_memory": number / GB} if known else {}
    images = [np.random.default_rng(seed).normal(size=(64, 128, 128)).astype(np.float32) for seed in (0, 1)]
    model = load(many_labels, device=DEVICE, settings={**FAST, **limit})
    alone = [load(many_labels, device="cpu", settings=FAST)(image, (1.0, 1.0, 1.0)) for image in images]
    for image, expected in zip(images, alone, strict=True):
        assert share_equal(expected, model(image, (1.0, 1.0, 1.0))) > 0.95  # sums may be in float16
    if DEVICE.startswith("cuda"):
        assert ("memory is short" in capsys.readouterr().err) == (not known)


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
    no_noise = {"augmentation.p_noise": 0}  # a GPU draws other numbers
    on_device, on_cpu = train("device", no_noise), train("cpu", no_noise, device="cpu")
    for one, other in zip(on_device, on_cpu, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=5e-3)
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], abs=5e-3)


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
    for one, other in zip(alone, read_metrics(fold_of(tmp_path, "two")), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=5e-3)


def test_nothing_of_a_training_stays_in_the_memory_of_the_device(train: Train) -> None:
    train("trained")
    if DEVICE.startswith("cuda"):
        torch._C._cuda_clearCublasWorkspaces()  # which torch keeps for each stream
        assert torch.cuda.memory_allocated(DEVICE) < 1_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_norm_keeps_the_memory_format_and_computes_what_torchs_does(dtype: torch.dtype) -> None:
    plain, torchs = (torch.nn.Sequential(torch.nn.InstanceNorm3d(8, affine=True)).to(DEVICE) for _ in range(2))
    apply_format(plain, ComputeFormat(channels_last=True, plain_norm=True), 3)
    values = torch.randn(2, 8, 12, 10, 14, device=DEVICE).to(dtype)
    results = []
    for network, layout in ((plain, torch.channels_last_3d), (torchs, torch.contiguous_format)):
        x = values.detach().to(memory_format=layout, copy=True).requires_grad_()
        y = network(x)
        y.square().mean().backward()
        results.append((y, x.grad))
        assert y.is_contiguous(memory_format=layout)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_convolutions_in_bf16_are_compared() -> None:
    """Of the size of a patch; a GPU that computes them wrongly is one that `nnlite doctor` names."""
    if DEVICE.startswith("cuda") and has_bf16(torch.device(DEVICE)):
        right = computes_bf16(torch.device(DEVICE), (1, 32, 128, 128, 128), (3, 3, 3))
        assert right == (find_wrong_gpus() == [])


# --------------------------------------------------------------------- compiling takes longest, and so comes last


def test_a_compiled_network_learns_what_the_plain_one_learns(train: Train) -> None:
    plain, compiled = (train(str(choice), {"training.compile": choice}) for choice in (False, True))
    for one, other in zip(plain, compiled, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=5e-3)


def test_the_fastest_format_is_timed_once(train: Train, workspace: Path, tmp_path: Path) -> None:
    """With torch.compile and without, in both memory formats, with torch's instance norm and the plain one."""
    auto = {"training.precision": "auto", "training.seed": None, "training.channels_last": "auto"}
    auto |= {"training.compile": "auto"}
    train("first", auto)
    file = workspace / "Task04_Hippocampus" / "formats.json"
    reasons = [read_weights_header(fold_of(tmp_path, "first") / MODEL)["arithmetic"]["reason"]]
    if DEVICE.startswith("cuda"):
        (kept,) = json.loads(file.read_text()).values()
        assert reasons == [kept["reason"]] and kept["reason"].count(", ") >= 3
        train("second", auto)
        reasons.append(read_weights_header(fold_of(tmp_path, "second") / MODEL)["arithmetic"]["reason"])
        assert reasons[0] == reasons[1]
