"""Learning rates follow their formulas, and the plateau rule is that of the 2018 paper."""

from __future__ import annotations

import pytest
import torch

from nnunet_lite.settings import OptimizerSettings, ScheduleSettings
from nnunet_lite.training.optim import Plateau, learning_rate, make_optimizer, start_average, update_average


def test_poly() -> None:
    poly = ScheduleSettings(name="poly", power=0.9)
    assert learning_rate(0.01, poly, 0) == 0.01
    assert learning_rate(0.01, poly, 0.5) == pytest.approx(0.01 * 0.5**0.9)
    assert learning_rate(0.01, poly, 1) == 0
    assert learning_rate(0.01, poly, 1.1) == 0  # a time limit may be overstepped by a moment


def test_cosine_and_constant() -> None:
    cosine = ScheduleSettings(name="cosine")
    assert [learning_rate(2.0, cosine, p) for p in (0, 0.5, 1, 1.2)] == pytest.approx([2, 1, 0, 0])
    for name in ("constant", "plateau"):
        assert learning_rate(2.0, ScheduleSettings(name=name), 0.7) == 2


def test_warm_up_rises_linearly_and_never_stands_still() -> None:
    settings = ScheduleSettings(name="constant", warmup=0.1)
    assert learning_rate(1.0, settings, 0) == pytest.approx(0.01)
    assert learning_rate(1.0, settings, 0.05) == pytest.approx(0.5)
    assert learning_rate(1.0, settings, 0.1) == 1
    assert learning_rate(1.0, settings, 0.9) == 1


def test_plateau_cuts_the_rate_after_so_many_epochs_without_improvement() -> None:
    settings = ScheduleSettings(name="plateau", patience=30, factor=0.2)
    state = Plateau().update(1.0, settings)
    assert (state.average, state.best) == (1.0, 1.0)
    for _ in range(30):
        state = state.update(1.0, settings)
        assert state.factor == 1
    state = state.update(1.0, settings)
    assert 3e-4 * state.factor == pytest.approx(6e-5)
    assert state.since == 0
    cuts = 0
    while 3e-4 * state.factor >= settings.min_lr:
        before, state = state.factor, state.update(1.0, settings)
        cuts += state.factor < before
    assert cuts == 3  # 6e-5, 1.2e-5, 2.4e-6, 4.8e-7: below 1e-6 the run ends


def test_plateau_looks_at_the_moving_average_and_improvement_starts_the_count_anew() -> None:
    settings = ScheduleSettings(name="plateau", patience=3)
    state = Plateau().update(1.0, settings).update(0.0, settings)
    assert state.average == pytest.approx(0.93)
    for _ in range(3):
        state = state.update(2.0, settings)
    assert state.since == 3
    state = state.update(-20.0, settings)
    assert (state.since, state.factor) == (0, 1.0)
    assert state.best == state.average


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_optimizers_have_the_settings(name: str, kind: str) -> None:
    settings = OptimizerSettings(name=name, lr=0.5, weight_decay=0.25, momentum=0.75)  # type: ignore[arg-type]
    optimizer = make_optimizer(torch.nn.Linear(2, 2), settings, torch.device("cpu"))
    assert type(optimizer).__name__ == kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.75, True)


def test_sgd_without_momentum_is_possible() -> None:
    optimizer = make_optimizer(torch.nn.Linear(2, 2), OptimizerSettings(momentum=0), torch.device("cpu"))
    assert optimizer.param_groups[0]["nesterov"] is False


def test_frozen_weights_are_left_out() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    network[0].requires_grad_(False)
    optimizer = make_optimizer(network, OptimizerSettings(), torch.device("cpu"))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in network[1].parameters()]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_fused_steps_in_channels_last_layout_are_those_of_plain_ones(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, 3, generator=generator)
    gradients = torch.randn(4, *weight.shape, generator=generator)
    settings = OptimizerSettings(name=name, lr=0.1)  # type: ignore[arg-type]

    def trained(layout: torch.memory_format, fused: bool) -> torch.Tensor:
        network = torch.nn.Conv3d(4, 8, 3, bias=False)
        network.weight.data = weight.clone(memory_format=layout)
        optimizer = make_optimizer(network, settings, torch.device("cpu"))
        optimizer.param_groups[0]["fused"] = fused
        for gradient in gradients:
            network.weight.grad = gradient.clone(memory_format=layout)
            optimizer.step()
        return network.weight.detach()

    plain = trained(torch.contiguous_format, fused=False)
    torch.testing.assert_close(trained(torch.channels_last_3d, fused=True), plain)
    assert (plain - weight).abs().min() > 0


def test_the_average_starts_fast_then_follows_its_decay() -> None:
    network = torch.nn.BatchNorm1d(3)
    average = start_average(network)
    expected = network.weight.detach().clone()
    for number in range(300):
        with torch.no_grad():
            network.weight.add_(torch.randn(3, generator=torch.Generator().manual_seed(number)))
            network.num_batches_tracked.add_(1)
        update_average(average, network, 0.9, number)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    torch.testing.assert_close(average["weight"], expected)
    assert int(average["num_batches_tracked"]) == 300  # counts are copied, not averaged


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_first_step_that_is_skipped_leaves_nothing_behind(name: str) -> None:
    def trained(skipping: bool) -> torch.Tensor:
        network = torch.nn.Linear(64, 64)
        torch.nn.init.zeros_(network.weight)
        settings = OptimizerSettings(name=name, lr=0.1)  # type: ignore[arg-type]
        optimizer = make_optimizer(network, settings, torch.device("cpu"))
        for number in range(3):
            skipped = number == 0  # as where fp16 overflows at first: the kernel is told, the host does not look
            if skipped and not skipping:
                continue
            optimizer.found_inf = torch.tensor(float(skipped))  # type: ignore[attr-defined]
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            for parameter in network.parameters():
                parameter.grad = torch.full_like(parameter, torch.inf if skipped else 1.0)
            optimizer.step()
        return network.weight.detach()

    for _ in range(20):  # memory that was used before is not zero
        torch.full((64, 64), 1e9)
    assert torch.equal(trained(skipping=True), trained(skipping=False))
