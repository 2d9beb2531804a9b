"""The settings of a run change the plan that is trained."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch

from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training.job import Job, configure_plan


def test_settings_change_the_planned_network(tiny_plan: Plan) -> None:
    changes = {"features_base": 6, "features_max": 20, "norm": "batch"}
    settings = with_changes(Settings(), {f"network.{k}": v for k, v in changes.items()} | {"training.batch_size": 3})
    trained, planned = (
        p.configuration("3d_fullres") for p in (configure_plan(tiny_plan, "3d_fullres", settings), tiny_plan)
    )
    assert trained.network.features == (6, 12, 20, 20)[: len(trained.network.features)]
    assert (trained.network.norm, trained.network.activation, trained.batch_size) == ("batch", "leaky_relu", 3)
    assert trained.patch_size == planned.patch_size
    assert trained.memory_gb is not None and planned.memory_gb is not None and trained.memory_gb < planned.memory_gb


def test_without_changes_the_plan_is_trained_as_it_is(tiny_plan: Plan) -> None:
    trained = configure_plan(tiny_plan, "3d_fullres", Settings())
    assert trained.configurations == {"3d_fullres": tiny_plan.configuration("3d_fullres")}
    assert (
        trained.model_copy(update={"configurations": tiny_plan.configurations, "options": tiny_plan.options})
        == tiny_plan
    )


def test_a_second_stage_keeps_the_plan_of_its_first(tiny_plan: Plan) -> None:
    planned = tiny_plan.configuration("3d_fullres")
    stages = {"3d_lowres": planned, "3d_cascade_fullres": planned.model_copy(update={"previous_stage": "3d_lowres"})}
    both = tiny_plan.model_copy(update={"configurations": {**tiny_plan.configurations, **stages}})
    trained = configure_plan(both, "3d_cascade_fullres", with_changes(Settings(), {"training.batch_size": 3}))
    assert list(trained.configurations) == ["3d_cascade_fullres", "3d_lowres"]
    assert trained.configuration("3d_cascade_fullres").batch_size == 3
    assert trained.n_inputs("3d_cascade_fullres") == trained.n_inputs("3d_lowres") + 2


def test_patches_grow_axis_by_axis_with_as_many_voxels_in_a_batch(tmp_path: Path, tiny_plan: Plan) -> None:
    settings = with_changes(Settings(), {"training.patch_size": [16, 24, 16], "training.patch_growth": 0.5})
    plan = configure_plan(tiny_plan, "3d_fullres", settings)
    job = Job(plan, "3d_fullres", settings, 0, tmp_path, torch.device("cpu"), [], [])
    sizes = [stage.planned.patch_size for stage in job.stages]
    divisor = [math.prod(axis) for axis in zip(*job.planned.network.strides, strict=True)]
    assert sizes[0] == tuple(max(2 * d, 8) for d in divisor) and sizes[-1] == job.planned.patch_size
    for small, large in pairwise(sizes):
        assert sorted(b - a for a, b in zip(small, large, strict=True))[:2] == [0, 0]
    full = math.prod(sizes[-1]) * job.planned.batch_size
    for stage in job.stages:
        assert full - math.prod(stage.patch) < math.prod(stage.patch) * stage.planned.batch_size <= full
        assert stage.planned.network == job.planned.network
        assert all(n % d == 0 for n, d in zip(stage.planned.patch_size, divisor, strict=True))
    last = len(sizes) - 1
    assert [job.stage_at(share) for share in (0, 0.25, 0.49, 0.5, 1)] == [0, last // 2, last - 1, last, last]


def test_patches_that_do_not_grow_are_full_from_the_start(tmp_path: Path, tiny_plan: Plan) -> None:
    plan = configure_plan(tiny_plan, "3d_fullres", Settings())
    job = Job(plan, "3d_fullres", Settings(), 0, tmp_path, torch.device("cpu"), [], [])
    assert job.stages == [job] and job.stage_at(0) == job.stage_at(1) == 0
