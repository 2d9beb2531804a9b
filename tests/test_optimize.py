"""Learning rates follow their formulas, and the plateau rule is that of the 2018 paper."""

from __future__ import annotations

import pytest
import torch

from nnunet_lite.settings import OptimizerSettings, ScheduleSettings
from nnunet_lite.training.optimize import Plateau, learning_rate, make_optimizer


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
    state = Plateau(lr=3e-4).after_epoch(1.0, settings)
    assert (state.average, state.best) == (1.0, 1.0)
    for _ in range(30):
        state = state.after_epoch(1.0, settings)
        assert state.lr == 3e-4
    state = state.after_epoch(1.0, settings)
    assert state.lr == pytest.approx(6e-5)
    assert state.since == 0
    cuts = 0
    while state.lr >= settings.min_lr:
        before, state = state.lr, state.after_epoch(1.0, settings)
        cuts += state.lr < before
    assert cuts == 3  # 6e-5, 1.2e-5, 2.4e-6, 4.8e-7: below 1e-6 the run ends


def test_plateau_looks_at_the_moving_average_and_improvement_starts_the_count_anew() -> None:
    settings = ScheduleSettings(name="plateau", patience=3)
    state = Plateau(lr=1.0).after_epoch(1.0, settings).after_epoch(0.0, settings)
    assert state.average == pytest.approx(0.93)
    for _ in range(3):
        state = state.after_epoch(2.0, settings)
    assert state.since == 3
    state = state.after_epoch(-20.0, settings)
    assert (state.since, state.lr) == (0, 1.0)
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
