"""A run is restored bit by bit, and a file that does not fit or is cut off is refused with one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnunet_lite.errors import UserError
from nnunet_lite.models.checkpoint import load_checkpoint, load_weights, save_weights, snapshot_checkpoint
from nnunet_lite.models.folder import read_weights_header
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Network
from nnunet_lite.settings import OptimizerSettings
from nnunet_lite.training.optim import make_optimizer

SHAPE = {"features": (4, 8), "strides": ((1, 1, 1), (2, 2, 2)), "kernels": ((3, 3, 3), (3, 3, 3))}
SPEC = Network(**SHAPE, blocks=(1, 1), decoder_convolutions=(1,), norm="batch")
Pair = tuple[UNet, torch.optim.Optimizer]


def make(seed: int, name: Any = "sgd", channels_last: bool = False, frozen: bool = False) -> Pair:
    torch.manual_seed(seed)
    network = UNet(SPEC, 1, 2)
    if channels_last:
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(not (frozen and key.startswith("encoder.")))
    return network, make_optimizer(network, OptimizerSettings(name=name, lr=0.01), torch.device("cpu"))


def steps(pair: Pair, seeds: range, channels_last: bool = False) -> Pair:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    network, optimizer = pair
    for seed in seeds:
        x = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=layout)
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
    return pair


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_resuming_from_a_checkpoint_equals_never_stopping(path: Path, name: str, channels_last: bool) -> None:
    trained = steps(make(0, name, channels_last), range(3), channels_last)
    state = {"epoch": 3, "plateau": {"best": 0.1}}
    write = snapshot_checkpoint(path, *trained, state)
    steps(trained, range(3, 6), channels_last)
    write()  # what a thread does while the training goes on
    restored = make(1, name, channels_last)
    assert load_checkpoint(path, *restored) == state
    for parameter in restored[0].parameters():
        moments = restored[1].state[parameter]
        assert all(m.stride() == parameter.stride() for m in moments.values() if m.shape == parameter.shape)
    steps(restored, range(3, 6), channels_last)
    assert equal(trained[0], restored[0])


def test_weights_are_restored_with_their_header(path: Path) -> None:
    network, restored = make(0, channels_last=True)[0], make(1)[0]
    header: dict[str, Any] = {"configuration": "3d_fullres", "epochs": 3}
    save_weights(path, network, header)
    assert load_weights(path, restored) == read_weights_header(path) == header
    assert equal(network, restored)
    (path.parent / "any").touch()
    assert path.stat().st_mode == (path.parent / "any").stat().st_mode, "others may read it"
    assert any(name.endswith("running_mean") for name in restored.state_dict())


def test_weights_of_another_network_are_refused(path: Path) -> None:
    message = r"checkpoint\.safetensors: holds the weights of another network.*heads"
    other = UNet(SPEC, 1, 3)
    save_weights(path, make(0)[0], {})
    with pytest.raises(UserError, match=message) as caught:
        load_weights(path, other)
    assert "\n" not in str(caught.value)
    snapshot_checkpoint(path, *make(0), {})()
    with pytest.raises(UserError, match=message):
        load_checkpoint(path, other, make_optimizer(other, OptimizerSettings(), torch.device("cpu")))


@pytest.mark.parametrize("length", [0, 5, 100, -100])
def test_a_cut_off_file_is_refused(path: Path, length: int) -> None:
    network, _ = make(0)
    save_weights(path, network, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: is no safetensors file") as caught:
        load_weights(path, network)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_weights_header(path.with_name("none.safetensors"))


def test_a_failed_write_keeps_the_old_file(path: Path) -> None:
    first, restored = make(0), make(1)
    snapshot_checkpoint(path, *first, {"epoch": 1})()  # before the first step: without moments
    load_checkpoint(path, *restored)
    assert equal(first[0], restored[0])
    with pytest.raises(TypeError):
        snapshot_checkpoint(path, *make(0), {"epoch": object()})()
    assert read_weights_header(path) == {"epoch": 1}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)], ids=["thawed", "frozen"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_moments_belong_to_their_weights_whichever_are_frozen(path: Path, name: str, before: bool, after: bool) -> None:
    network, optimizer = steps(make(0, name, frozen=before), range(2))
    snapshot_checkpoint(path, network, optimizer, {})()
    restored, other = make(0, name, frozen=after)
    load_checkpoint(path, restored, other)
    saved = {key: optimizer.state[p] for key, p in network.named_parameters() if p in optimizer.state}
    both = [(key, p) for key, p in restored.named_parameters() if p.requires_grad and key in saved]
    assert both
    assert all(torch.equal(other.state[p][moment], value) for key, p in both for moment, value in saved[key].items())
    steps((restored, other), range(2, 4))
    assert all(torch.isfinite(p).all() for p in restored.parameters())


def test_weights_that_two_layers_share_are_saved(path: Path) -> None:
    def tied() -> nn.Sequential:
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        network[1].weight = network[0].weight
        return network

    network, restored = tied(), tied()
    save_weights(path, network, {})
    load_weights(path, restored)
    assert torch.equal(network[0].weight, restored[1].weight)
