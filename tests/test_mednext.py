"""MedNeXt has the paper's sizes and computes what other implementations do; it trains and is used like a U-Net."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import TINIEST
from torch import Tensor

import nnunet_lite
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json
from nnunet_lite.inference.onnx_runner import load_onnx
from nnunet_lite.models.folder import read_weights_header
from nnunet_lite.networks.mednext import MedNeXt
from nnunet_lite.planning.schema import Kind, Network
from nnunet_lite.planning.topology import default_network, resize_kernels, topology_of
from nnunet_lite.training.finetune import adopt_weights

CUBE = topology_of((1.0, 1.0, 1.0), (64, 64, 64), "mednext_s")
LABELS = ("background", "a", "b")


def small(spec: Network, base: int = 2) -> Network:
    return spec.model_copy(update={"features": tuple(base << stage for stage in range(len(spec.features)))})


@pytest.mark.parametrize(
    ("kind", "kernel", "millions"),  # of the paper's table; 5,981,932 is 5.9 there
    [("mednext_s", 3, 5.6), ("mednext_b", 3, 10.5), ("mednext_m", 3, 17.6), ("mednext_l", 3, 61.8),
     ("mednext_s", 5, 5.98), ("mednext_b", 5, 11.0), ("mednext_m", 5, 18.3), ("mednext_l", 5, 63.0)],
)  # fmt: skip
def test_the_sizes_are_those_of_the_paper(kind: Kind, kernel: int, millions: float) -> None:
    spec = default_network(kind, CUBE)
    spec = spec.model_copy(update={"kernels": resize_kernels(spec.kernels, kernel)})
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MedNeXt(spec, 1, 3).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.051)


def test_a_published_model_has_as_many_parameters() -> None:
    """61,779,399 of MedNeXt-L with one head of six outputs, and one that the authors' code adds for checkpointing."""
    with torch.device("meta"):
        network = MedNeXt(default_network("mednext_l", CUBE), 1, 6)
    others = sum(p.numel() for p in network.heads[:-1].parameters())
    assert sum(p.numel() for p in network.parameters()) - others + 1 == 61_779_399


def test_outputs_are_those_of_monai() -> None:
    """Mean, deviation and one value of each output of MONAI 1.6.1's MedNeXt with the same weights."""

    def fill(tensor: Tensor) -> Tensor:
        values = torch.cos(torch.arange(tensor.numel(), dtype=torch.float64) * 1.7 + tensor.ndim)
        return values.float().reshape(tensor.shape)

    network = MedNeXt(small(default_network("mednext_s", CUBE)), 1, 3)
    network.deep_supervision = True
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(fill(parameter))
        outputs = network(fill(torch.empty(1, 1, 16, 32, 16)))
    expected = [
        [-2.0641, 10.1653, 3.7932],
        [-32.1067, 108.405, -19.0155],
        [77.4975, 494.9489, 42.2513],
        [7.5898, 1943.4098, 36.2804],
    ]
    found = [[float(y.mean()), float(y.std()), float(y[0, 1].flatten()[7])] for y in outputs]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("spacing", "patch", "divisor", "norm"),
    [
        ((1.0, 1.0, 1.0), (64, 64, 64), (16, 16, 16), "instance"),
        ((1.0, 1.0), (128, 80), (16, 16), "batch"),
        ((5.0, 1.0, 1.0), (7, 64, 48), (1, 8, 8), "none"),  # the coarse axis is not pooled, the first kernels are flat
        ((1.0, 1.0, 1.0), (36, 50, 35), (8, 8, 8), "instance"),  # too small to be pooled four times
    ],
)
def test_shapes_and_gradients(
    spacing: tuple[float, ...], patch: tuple[int, ...], divisor: tuple[int, ...], norm: Any
) -> None:
    shape = topology_of(spacing, patch, "mednext_b")
    spec = small(default_network("mednext_b", shape)).model_copy(update={"norm": norm})
    assert shape.divisor == spec.divisor == divisor and spec.kernels == shape.kernels
    network, x = MedNeXt(spec, 2, 3), torch.randn(1, 2, *shape.patch)
    assert network(x).shape == (1, 3, *shape.patch)
    network.deep_supervision = True
    outputs, size, expected = network(x), shape.patch, [shape.patch]
    for strides in spec.strides[1:-1]:
        size = tuple(n // step for n, step in zip(size, strides, strict=True))
        expected.append(size)
    assert [tuple(y.shape[2:]) for y in outputs] == expected, "all decoder stages"
    sum(y.square().mean() for y in outputs).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_a_large_patch_has_no_more_than_four_downsamplings() -> None:
    spec = default_network("mednext_l", topology_of((1.0, 1.0), (1024, 1024), "mednext_l"))
    assert spec.features == (32, 64, 128, 256, 512) and spec.divisor == (16, 16)
    assert spec.blocks == (3, 4, 8, 8, 8) and spec.decoder_convolutions == (8, 8, 4, 3)


@pytest.mark.parametrize("patch", [(64, 64), (64, 64, 64)])
def test_large_kernels_start_from_small_ones(patch: tuple[int, ...]) -> None:
    spec = small(default_network("mednext_s", topology_of((1.0,) * len(patch), patch, "mednext_s")))
    source = MedNeXt(spec, 1, 3)
    target = MedNeXt(spec.model_copy(update={"kernels": resize_kernels(spec.kernels, 5)}), 1, 3)
    report = adopt_weights(target, source.state_dict(), (("CT",), ("CT",)), (LABELS, LABELS))
    depthwise = [name for name in target.state_dict() if name.endswith("depthwise.weight")]
    assert report["taken over"].endswith("100.0 % of the weights are the model's")
    sizes = " to ".join("x".join(n * len(patch)) for n in "35")
    assert report["resized"] == f"{len(depthwise)} depthwise kernels, such as {sizes} (UpKern)"
    mode = "bilinear" if len(patch) == 2 else "trilinear"
    for name, value in source.state_dict().items():
        if name in depthwise:
            value = F.interpolate(value, size=(5,) * len(patch), mode=mode)
        assert torch.equal(target.state_dict()[name], value)


# ------------------------------------------------------------------------------------------------ as a user


@pytest.fixture(scope="module")
def workspace(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one trained fold of MedNeXt, which was resumed once."""
    workspace = tmp_path_factory.mktemp("mednext") / "workspace"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models"))
    for epochs in (1, 2):
        train(workspace, "mednext", {"plan.preset": "mednext_s", "training.epochs": epochs})
    return workspace


def train(workspace: Path, name: str, changes: dict[str, Any]) -> Path:
    sizes = {"training.patch_size": [16, 32, 16], "training.iterations": 1, "training.channels_last": True}
    settings = TINIEST | sizes | {"inference.precision": "fp32"} | changes
    nnunet_lite.train("3d_fullres", 0, settings=settings, device="cpu", workspace=workspace, name=name)
    return workspace / "Task04_Hippocampus" / "models" / name


def test_it_is_planned_trained_and_resumed(workspace: Path) -> None:
    folder = workspace / "Task04_Hippocampus" / "models" / "mednext"
    network = read_json(folder / "plans.json")["configurations"]["3d_fullres"]["network"]
    assert network["kind"] == "mednext_s" and network["activation"] == "gelu"
    assert read_weights_header(folder / "fold_0" / "model.safetensors")["epochs"] == 2


def test_it_starts_a_network_with_large_kernels(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = train(workspace, "large", {"network.kernel": 5, "training.init": "mednext", "training.epochs": 1})
    network = read_json(folder / "plans.json")["configurations"]["3d_fullres"]["network"]
    assert network["kind"] == "mednext_s" and network["kernels"][0] == [5, 5, 5]
    assert "depthwise kernels, such as 3x3x3 to 5x5x5 (UpKern)" in capfd.readouterr().err


IMAGE = np.random.default_rng(0).normal(size=(20, 36, 20)).astype(np.float32)


def test_it_predicts_and_travels_as_zip(workspace: Path, tmp_path: Path) -> None:
    model = workspace / "Task04_Hippocampus" / "models" / "mednext"
    expected = nnunet_lite.load(model, device="cpu")(IMAGE, (1, 1, 1))
    assert expected.shape == IMAGE.shape
    zipped = nnunet_lite.export_model([model, tmp_path / "model.zip"], workspace=workspace)
    assert np.array_equal(nnunet_lite.load(zipped, device="cpu")(IMAGE, (1, 1, 1)), expected)
    with pytest.raises(UserError, match="a network that nnU-Net lacks: mednext_s with gelu"):
        nnunet_lite.export_model([model, tmp_path / "nnunet"], format="nnunet", workspace=workspace)


@pytest.mark.slow  # test_onnx.py has a U-Net
def test_it_travels_as_onnx(workspace: Path, tmp_path: Path) -> None:
    model = workspace / "Task04_Hippocampus" / "models" / "mednext"
    graphs = nnunet_lite.export_model([model, tmp_path / "onnx"], format="onnx", workspace=workspace)
    expected = nnunet_lite.load(model, device="cpu")(IMAGE, (1, 1, 1))
    assert (load_onnx(graphs)(IMAGE, (1, 1, 1)) == expected).mean() > 0.9999
