"""A small copy of the bundled data, and settings with which a network trains in seconds, shared by all tests."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.forkserver import ensure_running
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import typer
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from safetensors.numpy import load_file, save_file

from nnunet_lite import cli, system
from nnunet_lite.data.dataset import channels_of, labels_of
from nnunet_lite.data.formats import sitk
from nnunet_lite.data.labels import Labels
from nnunet_lite.models.folder import read_weights_header
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.nnunet import plan_from_nnunet
from nnunet_lite.planning.planner import make_plan
from nnunet_lite.planning.schema import Plan

# what fixtures of conftest.py are
Command = Callable[..., tuple[int, str, str]]  # `command` and `nnlite`: exit code, standard output, standard error
Copy = Callable[..., Path]  # `copy_dataset` and `copy_nnunet`
Counts = Callable[..., None]  # `counts`

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("NNLITE_WORKSPACE", "nnUNet_raw")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
HIPPOCAMPUS = Path(__file__).parent / "data" / "Task04_Hippocampus"
NNUNET_MODELS = Path(__file__).parent / "data" / "nnunet_models"  # written by nnU-Net 2.8.1

# How a model predicts in the least time, and bit-equal wherever it runs.
FAST = {"inference.mirroring": False, "inference.step_size": 1.0, "inference.precision": "fp32"}

# A network this small trains in seconds; more threads than one would only wait for each other.
TINY: dict[str, Any] = {
    **FAST,
    "training.epochs": 2,
    "training.iterations": 3,
    "training.validation_iterations": 1,
    "training.patch_size": [24, 32, 24],
    "training.batch_size": 2,
    "training.precision": "fp32",
    "training.channels_last": False,
    "training.seed": 1,
    "network.features_base": 4,
    "network.features_max": 8,
}
# Where several folds are trained and predicted; what patch, a test says.
TINIEST: dict[str, Any] = {key: value for key, value in TINY.items() if key != "training.patch_size"} | {
    "network.features_base": 2,
    "network.features_max": 4,
}


def as_options(changes: dict[str, Any]) -> list[str]:
    """Changed settings as a command line gives them."""
    return [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def first_cases(root: Path, n: int) -> Path:
    """The first cases of the bundled data in a folder of their own, in the layout of the Medical Decathlon."""
    table = json.loads((HIPPOCAMPUS / "dataset.json").read_text())
    table["training"] = table["training"][:n]
    table["numTraining"] = n
    for entry in table["training"]:
        for file in entry.values():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HIPPOCAMPUS / file, root / file)
    (root / "dataset.json").write_text(json.dumps(table))
    return root


def scan(seed: int) -> np.ndarray:
    """An image (z, y, x) of noise, uint8."""
    return np.random.default_rng(seed).integers(0, 256, (4, 24, 28)).astype(np.uint8)


def blocks(values: Iterable[int]) -> np.ndarray:
    """A label map (z, y, x) with a block for each value, none of which touches another; at most 42 values."""
    label = np.zeros((4, 24, 28), np.int64)
    for i, value in enumerate(values):
        y, x = divmod(i, 7)
        label[1:3, 4 * y : 4 * y + 3, 4 * x : 4 * x + 3] = value
    low, high = label.min(), label.max()
    return label.astype(np.uint8 if low >= 0 and high < 256 else np.uint16 if low >= 0 and high < 2**16 else np.int64)


def save_arrays(root: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write images (z, y, x) or (y, x) to files below a folder; of a volume, pictures get the middle slice."""
    for name, array in arrays.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        flat = array.ndim == 3 and name.endswith((".png", ".tif"))
        sitk().WriteImage(sitk().GetImageFromArray(array[len(array) // 2] if flat else array), root / name)


def rewrite_nifti(
    path: Path, change: Callable[[np.ndarray], np.ndarray] | None = None, affine: np.ndarray | None = None
) -> None:
    """Change the voxels (x, y, z) of a NIfTI file, or its affine."""
    image = nibabel.load(path)
    array = np.asarray(image.dataobj).copy()
    array = change(array) if change else array
    nibabel.save(nibabel.Nifti1Image(array, image.affine if affine is None else affine), path)


def move_nifti(path: Path, shift: float = 0.0, scale: float = 1.0, angle: float = 0.0) -> None:
    """Shift (mm), stretch and turn (radians) the grid of a NIfTI file about its first voxel."""
    affine = nibabel.load(path).affine.copy()
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine[:3, :3] = scale * turn @ affine[:3, :3]
    affine[0, 3] += shift
    rewrite_nifti(path, affine=affine)


def start_nnlite(*arguments: object, cwd: Path | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start the command in a process of its own, with one thread as in every other run: sums depend on the number."""
    command = [sys.executable, "-m", "nnunet_lite", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, **options)


FORKS: Any = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """Start the process that processes of `FORKS` are forked from: it has imported all, which takes 10 s of CPU."""
    FORKS.set_forkserver_preload(["fork_server"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), ENVIRONMENT["PYTHONPATH"]]))
        ensure_running()


class Forked(FORKS.Process):  # type: ignore[misc]
    """`nnlite` in a process of its own, without the imports at its start.

    It gets signals and ends as any other process, and has the methods of `subprocess.Popen` that tests use. `variables`
    are of its environment.
    """

    def __init__(self, *arguments: object, cwd: Path | None = None, **variables: str) -> None:
        super().__init__()
        self.variables = variables
        self.words, self.folder = [str(argument) for argument in arguments], str(cwd or Path.cwd())
        self.streams: list[Any] = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        start_fork_server()
        self.start()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "streams": [DupFd(stream.fileno()) for stream in self.streams]}

    def prepare(self) -> None:
        """Take the place of a process that was started with these arguments."""
        for number, stream in enumerate(self.streams, 1):
            os.dup2(stream.detach(), number)
        os.environ.clear()
        os.environ.update(ENVIRONMENT | self.variables)
        os.chdir(self.folder)
        sys.argv = ["nnlite", *self.words]

    def run(self) -> None:
        self.prepare()
        system.start_as_command()
        cli.main()

    def poll(self) -> int | None:
        return self.exitcode

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.words, timeout or 0)
        for stream in self.streams:
            stream.seek(0)
        out, err = (stream.read() for stream in self.streams)
        return out, err


def in_a_fork(*arguments: object, cwd: Path) -> tuple[int, str, str]:
    """What the fixture `nnlite` does, in a forked process."""
    process = Forked(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.exitcode, out, err


def wait_until(happens: Callable[[], Any], *processes: subprocess.Popen[str] | Forked) -> None:
    """Wait for something that running processes bring about."""
    until = time.monotonic() + 200
    while not happens():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.01)


def read_metrics(fold: Path) -> list[dict[str, Any]]:
    """The metrics of the epochs of a fold, none where it has no file of them yet."""
    file = fold / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def fold_of(tmp_path: Path, name: str) -> Path:
    """The fold folder of a model that the fixture `train_three` trains under this name."""
    return tmp_path / "workspace" / "Task04_Hippocampus" / "models" / name / "fold_0"


def turn_nifti(source: Path, target: Path, orientation: str) -> None:
    """Store a NIfTI file with its axes in another orientation, such as "LPI", as nibabel does it: no voxel changes."""
    image = nibabel.load(source)
    change = ornt_transform(io_orientation(image.affine), axcodes2ornt(orientation))
    nibabel.save(image.as_reoriented(change), target)


def forget_plan(model: Path) -> None:
    """Let the weights of a model fit any plan, as older ones do: a test may edit it."""
    for file in model.glob("fold_*/model.safetensors"):
        about = read_weights_header(file)
        del about["configuration"], about["inputs"]
        save_file(load_file(file), file, {"state": json.dumps(about)})


def sample_plan(
    labels: Labels,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    patch: tuple[int, int, int] = (32, 40, 32),
    *,
    scheme: str = "zscore",
    use_mask: bool = False,
    channels: int = 1,
    minimum: float = 0,
    **fields: Any,
) -> Plan:
    """Return a plan of a 2d and a 3d_fullres configuration; `fields` are others of the plan."""
    statistics = {
        "mean": 0,
        "median": 0,
        "std": 1,
        "min": minimum,
        "max": 1,
        "percentile_00_5": 0,
        "percentile_99_5": 1,
    }
    channel = {"name": "MRI", "normalization": scheme, "use_mask": use_mask, "statistics": statistics}

    def configuration(axes: int) -> dict[str, Any]:
        network = {"features": (8, 16), "strides": ((1,) * axes, (2,) * axes), "kernels": ((3,) * axes,) * 2,
                   "blocks": (2, 2), "decoder_convolutions": (2,)}  # fmt: skip
        return {"spacing": spacing[-axes:], "median_shape": (36.0, 50.0, 35.0)[-axes:], "patch_size": patch[-axes:],
                "batch_size": 2, "network": network, "batch_dice": False}  # fmt: skip

    return Plan.model_validate(
        {
            "dataset": "x",
            "median_spacing": spacing,
            "median_shape": (36, 50, 35),
            "channels": (channel,) * channels,
            "labels": labels,
            "configurations": {"2d": configuration(2), "3d_fullres": configuration(3)},
            **fields,
        }
    )


def reference_plan(
    fixture: dict[str, Any],
    preset: str = "default",
    memory_gb: float | None = None,
    spacing: tuple[float, ...] | None = None,
) -> Plan:
    """Return our plan of one of the fingerprints in plan_fixtures.json, of which nnU-Net's plan is known."""
    about, fingerprint = fixture["dataset"], Fingerprint.model_validate(fixture["fingerprint"])
    channels, labels, n_cases = channels_of(about, None), labels_of(about, None), about["numTraining"]
    return make_plan(fingerprint, "Dataset001_Test", channels, labels, preset, memory_gb, n_cases, spacing)


def nnunet_plan() -> Plan:
    """nnU-Net's own plan of the hippocampus data."""
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "Anterior": 1, "Posterior": 2}}
    plans = json.loads((HIPPOCAMPUS.parent / "nnunet_plans.json").read_text())
    return plan_from_nnunet(plans, about | {"numTraining": 200})


def displaced(array: np.ndarray) -> np.ndarray:
    """A prediction (z, y, x) with plausible faults: two voxels off in x, one in y, label 2 wrong in its last slice."""
    moved = np.roll(array, (0, 1, 2), (0, 1, 2))
    last = np.flatnonzero((moved == 2).any((1, 2)))[-1:]
    moved[last] = np.where(moved[last] == 2, 1, moved[last])
    return moved


def described(*channels: str, labels: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
    """The content of a dataset.json of nnU-Net v2."""
    names = {str(i): name for i, name in enumerate(channels)}
    return {"channel_names": names, "labels": labels or {"background": 0, "a": 1}, "file_ending": ".nii.gz"} | more


def save_cases(
    root: Path,
    images: Iterable[str],
    labels: Iterable[str],
    values: Iterable[int] = (1,),
    table: dict[str, Any] | None = None,
    numbers: Iterable[int] = range(5),
) -> None:
    """Write images of noise and label maps of blocks; `{}` in a name is the number of the case."""
    for i in numbers:
        save_arrays(root, {name.format(i): scan(i) for name in images})
        save_arrays(root, {name.format(i): blocks(values) for name in labels})
    if table is not None:
        (root / "dataset.json").write_text(json.dumps(table))


def save_maps(
    root: Path, maps: Iterable[np.ndarray], table: dict[str, Any] | None = None, ending: str = ".nii.gz"
) -> None:
    """Write a case with an image of noise for each label map."""
    for i, label in enumerate(maps):
        save_arrays(root, {f"images/c{i}{ending}": scan(i), f"labels/c{i}{ending}": label})
    if table is not None:
        (root / "dataset.json").write_text(json.dumps(table))


def subcommand(name: str) -> Any:
    """The command of typer for a name of `nnlite`."""
    found = typer.main.get_command(cli.app).get_command(None, name)  # type: ignore[attr-defined]
    assert found is not None, f"there is no command nnlite {name}"
    return found
