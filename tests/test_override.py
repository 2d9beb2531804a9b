"""Patches and batches that a user or a recipe asks for."""

import json
from math import prod
from pathlib import Path

import pytest

from nnunet_lite.errors import UserError
from nnunet_lite.planning.nnunet import plan_from_nnunet
from nnunet_lite.planning.override import limit_sizes, override_sizes
from nnunet_lite.planning.schema import Configuration, Plan

ABOUT = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "Anterior": 1, "Posterior": 2}, "numTraining": 200}


@pytest.fixture
def plan() -> Plan:
    plans = json.loads((Path(__file__).parent / "data" / "nnunet_plans.json").read_text())
    return plan_from_nnunet(plans, ABOUT)


def test_limits_shorten_the_patch_and_keep_two_in_a_batch(plan: Plan) -> None:
    before = plan.configuration("3d_fullres")
    after = limit_sizes(plan, "3d_fullres", patch_voxels=30_000, batch_voxels=50_000).configuration("3d_fullres")
    assert prod(before.patch_size) > 30_000 >= prod(after.patch_size)
    assert all(n % d == 0 for n, d in zip(after.patch_size, after.network.divisor, strict=True))
    assert after.batch_size == 2
    Configuration.model_validate(after.model_dump())


def test_limits_that_hold_already_change_nothing(plan: Plan) -> None:
    before = plan.configuration("3d_fullres")
    after = limit_sizes(plan, "3d_fullres", patch_voxels=10**9, batch_voxels=10**9).configuration("3d_fullres")
    assert (after.patch_size, after.batch_size, after.network) == (before.patch_size, before.batch_size, before.network)


def test_a_flat_patch_keeps_a_large_batch_where_a_deep_one_does_not(plan: Plan) -> None:
    flat = limit_sizes(plan, "2d", 100_000, 200_000).configuration("2d")
    assert flat.batch_size == 200_000 // prod(flat.patch_size) > 2


def test_an_illegal_patch_names_its_neighbours(plan: Plan) -> None:
    with pytest.raises(UserError, match=r"40x55x40 cannot be pooled.*40x48x40 and 40x56x40"):
        override_sizes(plan, "3d_fullres", patch_size=(40, 55, 40))
