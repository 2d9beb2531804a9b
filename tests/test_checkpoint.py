"""A run is restored to the bit, and a file that does not fit or is cut off is refused with one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_lite.errors import UserError
from nnunet_lite.models.checkpoint import (
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from nnunet_lite.models.folder import read_weights_header
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Network
from nnunet_lite.settings import OptimizerSettings
from nnunet_lite.training.optim import make_optimizer

CPU = torch.device("cpu")
SPEC = Network(
    features=(4, 8),
    strides=((1, 1, 1), (2, 2, 2)),
    kernels=((3, 3, 3), (3, 3, 3)),
    blocks=(1, 1),
    decoder_convolutions=(1,),
    norm="batch",
)


def make(optimizer: str, channels_last: bool, seed: int) -> tuple[UNet, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    network = UNet(SPEC, 1, 2)
    if channels_last:
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network, make_optimizer(network, OptimizerSettings(name=optimizer, lr=0.01), CPU)  # type: ignore[arg-type]


def steps(network: UNet, optimizer: torch.optim.Optimizer, seeds: range, channels_last: bool) -> None:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    for seed in seeds:
        x = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=layout)
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_going_on_from_a_checkpoint_equals_never_stopping(tmp_path: Path, optimizer: str, channels_last: bool) -> None:
    path = tmp_path / "checkpoint.safetensors"
    network, optimiser = make(optimizer, channels_last, 0)
    steps(network, optimiser, range(3), channels_last)
    save_checkpoint(path, network, optimiser, {"epoch": 3, "plateau": {"best": 0.1}})
    steps(network, optimiser, range(3, 6), channels_last)

    restored, other = make(optimizer, channels_last, 1)
    assert load_checkpoint(path, restored, other) == {"epoch": 3, "plateau": {"best": 0.1}}
    steps(restored, other, range(3, 6), channels_last)
    for (name, a), b in zip(network.state_dict().items(), restored.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_moments_have_the_layout_of_their_parameter(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    network, optimizer = make("sgd", True, 0)
    steps(network, optimizer, range(1), True)
    save_checkpoint(path, network, optimizer, {})
    restored, other = make("sgd", True, 1)
    load_checkpoint(path, restored, other)
    for parameter in restored.parameters():
        assert other.state[parameter]["momentum_buffer"].stride() == parameter.stride()


def test_a_checkpoint_before_the_first_step_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    network, optimizer = make("sgd", False, 0)
    save_checkpoint(path, network, optimizer, {"epoch": 0})
    restored, other = make("sgd", False, 1)
    load_checkpoint(path, restored, other)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), restored.parameters(), strict=True))


def test_weights_and_what_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    network, _ = make("sgd", True, 0)
    about: dict[str, Any] = {"configuration": "3d_fullres", "epochs": 3}
    save_weights(path, network, about)
    restored, _ = make("sgd", False, 1)
    assert load_weights(path, restored) == about
    assert read_weights_header(path) == about
    for a, b in zip(network.state_dict().values(), restored.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert any(name.endswith("running_mean") for name in restored.state_dict())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(path, make("sgd", False, 0)[0], {})
    with pytest.raises(UserError, match=r"model\.safetensors: holds the weights of another network.*heads") as caught:
        load_weights(path, UNet(SPEC, 1, 3))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    network, optimizer = make("sgd", False, 0)
    save_checkpoint(path, network, optimizer, {})
    other = UNet(SPEC, 1, 3)
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: holds the weights of another network"):
        load_checkpoint(path, other, make_optimizer(other, OptimizerSettings(), CPU))


@pytest.mark.parametrize("length", [0, 5, 100, -100])
def test_a_cut_off_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    network, _ = make("sgd", False, 0)
    save_weights(path, network, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"model\.safetensors: is not a safetensors file") as caught:
        load_weights(path, network)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_weights_header(tmp_path / "none.safetensors")


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    network, optimizer = make("sgd", False, 0)
    save_checkpoint(path, network, optimizer, {"epoch": 1})
    with pytest.raises(TypeError):
        save_checkpoint(path, network, optimizer, {"epoch": object()})
    assert read_weights_header(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_model_may_be_read_by_others(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    save_weights(tmp_path / "model.safetensors", torch.nn.Linear(2, 2), {})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_moments_find_their_weights_when_others_are_frozen_or_not_any_more(tmp_path: Path, optimizer: str) -> None:
    path = tmp_path / "checkpoint.safetensors"

    def made(frozen: bool) -> tuple[UNet, torch.optim.Optimizer]:
        network, _ = make(optimizer, False, 0)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith("encoder.")))
        settings = OptimizerSettings(name=optimizer, lr=0.01)  # type: ignore[arg-type]
        return network, make_optimizer(network, settings, CPU)

    for before, after in ((True, False), (False, True)):
        network, own = made(before)
        steps(network, own, range(2), False)
        save_checkpoint(path, network, own, {})
        restored, other = made(after)
        load_checkpoint(path, restored, other)
        saved = {name: own.state[p] for name, p in network.named_parameters() if p in own.state}
        for name, parameter in restored.named_parameters():
            if parameter.requires_grad and name in saved:
                for key, value in saved[name].items():
                    assert torch.equal(other.state[parameter][key], value), (name, key)
        assert any(name in saved and p.requires_grad for name, p in restored.named_parameters())
        steps(restored, other, range(2, 4), False)
        assert all(torch.isfinite(p).all() for p in restored.parameters())


def test_weights_that_two_layers_share_are_saved(tmp_path: Path) -> None:
    def tied() -> torch.nn.Module:
        network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        network[1].weight = network[0].weight
        return network

    network, restored = tied(), tied()
    save_weights(tmp_path / "model.safetensors", network, {})
    load_weights(tmp_path / "model.safetensors", restored)
    assert torch.equal(network[0].weight, restored[1].weight)  # type: ignore[index]
