"""Learning rates follow their formulas, the plateau rule that of the 2018 paper; optimizers have their settings."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from nnunet_lite.settings import OptimizerSettings, ScheduleSettings
from nnunet_lite.training.optim import (
    Plateau,
    learning_rate,
    make_optimizer,
    orthogonalize,
    start_average,
    update_average,
)

CPU = torch.device("cpu")
NAMES = pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])


@pytest.mark.parametrize(
    ("schedule", "base", "progress", "rates"),
    [
        ({"name": "poly", "power": 0.9}, 0.01, (0, 0.5, 1, 1.1), (0.01, 0.01 * 0.5**0.9, 0, 0)),  # late by a moment
        ({"name": "cosine"}, 2.0, (0, 0.5, 1, 1.2), (2, 1, 0, 0)),
        ({"name": "constant"}, 2.0, (0.7,), (2,)),
        ({"name": "plateau"}, 2.0, (0.7,), (2,)),
        ({"name": "constant", "cooldown": 0.2}, 1.0, (0.5, 0.8, 0.9, 1, 1.1), (1, 1, 0.5, 0, 0)),
        ({"name": "poly", "power": 1, "cooldown": 0.5}, 1.0, (0.25, 0.5, 0.75, 1), (0.75, 0.5, 0.25, 0)),
        ({"name": "constant", "warmup": 0.1}, 1.0, (0, 0.05, 0.1, 0.9), (0.01, 0.5, 1, 1)),
    ],
)
def test_learning_rates(schedule: dict[str, Any], base: float, progress: Any, rates: Any) -> None:
    settings = ScheduleSettings(**schedule)
    assert [learning_rate(base, settings, share) for share in progress] == pytest.approx(list(rates))


def test_plateau_reduces_the_rate_after_its_patience() -> None:
    settings = ScheduleSettings(name="plateau", patience=30, factor=0.2)
    state = Plateau().update(1.0, settings)
    assert (state.average, state.best) == (1.0, 1.0)
    for _ in range(30):
        state = state.update(1.0, settings)
        assert state.factor == 1
    state = state.update(1.0, settings)
    assert 3e-4 * state.factor == pytest.approx(6e-5)
    assert state.since == 0
    reductions = 0
    while 3e-4 * state.factor >= settings.min_lr:
        before, state = state.factor, state.update(1.0, settings)
        reductions += state.factor < before
    assert reductions == 3  # 6e-5, 1.2e-5, 2.4e-6, 4.8e-7: below 1e-6 the run ends


def test_plateau_uses_the_moving_average_and_improvement_restarts_the_count() -> None:
    settings = ScheduleSettings(name="plateau", patience=3)
    state = Plateau().update(1.0, settings).update(0.0, settings)
    assert state.average == pytest.approx(0.93)
    for _ in range(3):
        state = state.update(2.0, settings)
    assert state.since == 3
    state = state.update(-20.0, settings)
    assert (state.since, state.factor) == (0, 1.0)
    assert state.best == state.average


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW"), ("muon", "Muon")])
def test_optimizers_have_the_settings(name: Any, kind: str) -> None:
    settings = OptimizerSettings(name=name, lr=0.5, weight_decay=0.25, momentum=0.75)
    optimizer = make_optimizer(nn.Linear(2, 2), settings, CPU)
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__ == kind
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert name != "sgd" or (group["momentum"], group["nesterov"]) == (0.75, True)


def test_sgd_may_have_no_momentum_and_frozen_weights_are_left_out() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    (group,) = make_optimizer(network, OptimizerSettings(momentum=0), CPU).param_groups
    assert group["nesterov"] is False
    assert [id(p) for p in group["params"]] == [id(p) for p in network[1].parameters()]


@NAMES
def test_fused_steps_in_channels_last_layout_equal_plain_ones(name: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, 3, generator=generator)
    gradients = torch.randn(4, *weight.shape, generator=generator)

    def train(layout: torch.memory_format, fused: bool) -> torch.Tensor:
        network = nn.Conv3d(4, 8, 3, bias=False)
        network.weight.data = weight.clone(memory_format=layout)
        optimizer = make_optimizer(network, OptimizerSettings(name=name, lr=0.1), CPU)
        optimizer.param_groups[0]["fused"] = fused
        for gradient in gradients:
            network.weight.grad = gradient.clone(memory_format=layout)
            optimizer.step()
        return network.weight.detach()

    plain = train(torch.contiguous_format, fused=False)
    torch.testing.assert_close(train(torch.channels_last_3d, fused=True), plain)
    assert (plain - weight).abs().min() > 0


@NAMES
def test_a_first_step_that_is_skipped_leaves_nothing_behind(name: Any) -> None:
    """As where fp16 overflows at first: the kernel reads it on the device, the host does not."""

    def train(bad_steps: int) -> torch.Tensor:
        network = nn.Conv2d(8, 64, 3)
        nn.init.zeros_(network.weight)
        optimizer: Any = make_optimizer(network, OptimizerSettings(name=name, lr=0.1), CPU)
        for bad in [True] * bad_steps + [False] * 2:
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(bad)), None
            for parameter in network.parameters():
                parameter.grad = torch.full_like(parameter, torch.inf if bad else 1.0)
            optimizer.step()
        return network.weight.detach()

    for _ in range(20):  # memory that was used before is not zero
        torch.full((64, 64), 1e9)
    assert torch.equal(train(bad_steps=1), train(bad_steps=0))


@pytest.mark.parametrize("shape", [(16, 32 * 27), (64, 8), (40, 400)])
def test_orthogonalizing_sets_singular_values_to_one_and_keeps_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) @ torch.logspace(0, -1, shape[1]).diag()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(1000 * matrix)
    assert torch.linalg.svdvals(result).sub(1).abs().max() < 0.05
    torch.testing.assert_close(result, u @ v, atol=0.05, rtol=0)


def test_muon_moves_kernels_by_the_size_of_a_step_of_adamw_and_leaves_the_rest_to_adamw() -> None:
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Conv3d(1, 8, 3), nn.Conv3d(8, 8, 3), nn.ConvTranspose3d(8, 4, 2)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [
        make_optimizer(network, OptimizerSettings(name=name, lr=0.1, weight_decay=0, momentum=0.9), CPU)
        for network, name in zip(networks, ("muon", "adamw"), strict=True)
    ]
    before = {name: weight.detach().clone() for name, weight in networks[0].named_parameters()}
    for network, optimizer in zip(networks, optimizers, strict=True):
        for weight in network.parameters():
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
        optimizer.step()
    for (name, weight), other in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        if name in ("1.weight", "2.weight"):
            assert 0.2 * 0.1 * 0.9 < (weight - before[name]).square().mean().sqrt() < 0.2 * 0.1 * 1.1
        else:
            assert torch.equal(weight, other)
    copy = nn.Sequential(nn.Conv3d(1, 8, 3), nn.Conv3d(8, 8, 3), nn.ConvTranspose3d(8, 4, 2))
    copy.load_state_dict(networks[0].state_dict())
    resumed = make_optimizer(copy, OptimizerSettings(name="muon", lr=0.1, weight_decay=0, momentum=0.9), CPU)
    resumed.load_state_dict(deepcopy(optimizers[0].state_dict()))
    for network, optimizer in ((networks[0], optimizers[0]), (copy, resumed)):
        for weight in network.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    for weight, other in zip(networks[0].parameters(), copy.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_the_average_starts_fast_then_follows_its_decay() -> None:
    network = nn.BatchNorm1d(3)
    average = start_average(network)
    expected = network.weight.detach().clone()
    for step in range(300):
        with torch.no_grad():
            network.weight.add_(torch.randn(3, generator=torch.Generator().manual_seed(step)))
            network.num_batches_tracked.add_(1)
        update_average(average, network, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    torch.testing.assert_close(average["weight"], expected)
    assert int(average["num_batches_tracked"]) == 300  # counts are copied, not averaged
