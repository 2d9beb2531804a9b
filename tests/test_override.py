"""Patches and batches that a user or a recipe asks for."""

import json
from math import prod
from pathlib import Path

import pytest

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.nnunet import plan_from_nnunet
from nnunet_lite.planning.override import limit_sizes, override_sizes
from nnunet_lite.planning.planner import make_plan
from nnunet_lite.planning.schema import Configuration, Plan, Statistics
from nnunet_lite.planning.topology import topology_of

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


def cubic(size: int) -> Plan:
    """Return the plan of 20 equal images of 1 mm."""
    statistics = dict.fromkeys(Statistics.model_fields, 1.0)
    fingerprint = Fingerprint.model_validate(
        {
            "spacings": [[1, 1, 1]] * 20,
            "shapes_after_crop": [[size] * 3] * 20,
            "median_relative_size_after_cropping": 1,
            "foreground_intensity_properties_per_channel": {"0": statistics},
        }
    )
    return make_plan(fingerprint, "Test", ["T1"], Labels(names={"background": 0, "tumour": 1}))


def test_override_takes_a_legal_patch_and_recomputes_the_topology() -> None:
    plan = cubic(200)
    changed = override_sizes(plan, "3d_fullres", (64, 64, 32), 5)
    c = changed.configurations["3d_fullres"]
    assert (c.patch_size, c.batch_size) == ((64, 64, 32), 5)
    assert c.network.strides == topology_of((1, 1, 1), (64, 64, 32)).strides
    assert len(c.network.features) == 5
    assert c.memory_gb is not None and c.memory_gb < (plan.configurations["3d_fullres"].memory_gb or 0)
    assert changed.configurations["2d"] == plan.configurations["2d"]
    assert Plan.model_validate_json(changed.to_json()) == changed


def test_override_keeps_the_widths_of_the_stages_that_stay() -> None:
    plan = cubic(64)
    c = plan.configurations["3d_fullres"]
    narrow = c.network.model_copy(update={"features": (16, 32, 64, 128, 200)})
    plan = plan.model_copy(update={"configurations": {"3d_fullres": c.model_copy(update={"network": narrow})}})
    deeper = override_sizes(plan, "3d_fullres", (128, 128, 128)).configurations["3d_fullres"].network
    assert deeper.features == (16, 32, 64, 128, 200, 320)
    shallower = override_sizes(plan, "3d_fullres", (16, 16, 16)).configurations["3d_fullres"].network
    assert shallower.features == (16, 32, 64) and shallower.decoder_convolutions == (2, 2)


@pytest.mark.parametrize(
    ("patch", "batch", "message"),
    [
        ((100, 64, 64), None, "100x64x64 cannot be pooled.* The nearest are 96x64x64 and 112x64x64"),
        ((64, 64), None, "64x64 is no patch. Give 3 positive numbers"),
        ((0, 64, 64), None, "0x64x64 is no patch"),
        ((4, 4, 4), None, "too small to pool"),
        (None, 0, "batch size of 0"),
    ],
)
def test_override_refuses_what_cannot_be(patch: tuple[int, ...] | None, batch: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override_sizes(cubic(200), "3d_fullres", patch, batch)
