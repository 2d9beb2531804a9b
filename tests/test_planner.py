"""Plans equal those that nnU-Net 2.8.1 makes of the same fingerprints, say why, and can be changed within limits."""

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import nnunet_plan, reference_plan

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.nnunet import plan_to_nnunet
from nnunet_lite.planning.planner import limit_sizes, make_plan, override_sizes
from nnunet_lite.planning.schema import Configuration, Plan, Statistics
from nnunet_lite.planning.show import patch_share, plan_table
from nnunet_lite.planning.topology import resize_kernels, topology_of

FIXTURES = json.loads((Path(__file__).parent / "data" / "plan_fixtures.json").read_text())
STATISTICS = Statistics(mean=1, median=1, std=1, min=0, max=2, percentile_00_5=0, percentile_99_5=2)
LABELS = Labels(names={"background": 0, "tumour": 1})
PLANNED = ("spacing", "patch_size", "batch_size", "median_image_size_in_voxels", "normalization_schemes")
PLANNED += ("use_mask_for_norm", "batch_dice")
DRAWN = ("n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage_decoder")


def plan_of(fixture: dict[str, Any]) -> Plan:
    return reference_plan(fixture, fixture["preset"], fixture["gpu_memory_gb"])


def fingerprint_of(
    spacings: Sequence[tuple[float, ...]], shapes: Sequence[tuple[int, ...]], crop: float = 1.0, channels: int = 1
) -> Fingerprint:
    per_channel = {str(number): STATISTICS.model_dump() for number in range(channels)}
    return Fingerprint.model_validate(
        {
            "spacings": spacings,
            "shapes_after_crop": shapes,
            "median_relative_size_after_cropping": crop,
            "foreground_intensity_properties_per_channel": per_channel,
        }
    )


def simple(
    shape: tuple[int, int, int], voxel: tuple[float, float, float], n: int = 20, crop: float = 1.0, **options: Any
) -> Plan:
    """A plan of n equal cases with one channel."""
    channels = options.pop("channels", ("T1",))
    fingerprint = fingerprint_of((voxel,) * n, (shape,) * n, crop, len(channels))
    return make_plan(fingerprint, "Test", channels, LABELS, **options)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f"{f['kind']}-{f['preset']}-{f['gpu_memory_gb']}")
def test_plan_is_nnunets(fixture: dict[str, Any]) -> None:
    ours, wanted = plan_to_nnunet(plan_of(fixture), fixture["dataset"]), fixture["expected"]
    for key in ("transpose_forward", "transpose_backward", "original_median_shape_after_transp"):
        assert ours[key] == wanted[key]
    assert ours["original_median_spacing_after_transp"] == pytest.approx(wanted["original_median_spacing_after_transp"])
    assert set(ours["configurations"]) == set(wanted["configurations"])
    for name, theirs in wanted["configurations"].items():
        mine = ours["configurations"][name]
        if "inherits_from" in theirs:
            assert mine == {key: theirs[key] for key in ("inherits_from", "previous_stage")}
            continue
        arguments = mine["architecture"]["arch_kwargs"]
        blocks = arguments.get("n_conv_per_stage", arguments.get("n_blocks_per_stage"))
        assert {key: mine[key] for key in PLANNED if key != "spacing"} == {
            key: theirs[key] for key in PLANNED if key != "spacing"
        }
        assert mine["spacing"] == pytest.approx(theirs["spacing"], rel=1e-9)
        assert {key: arguments[key] for key in DRAWN} == {key: theirs[key] for key in DRAWN}
        assert blocks == theirs["n_conv_or_blocks_per_stage"]


@pytest.mark.parametrize(
    ("name", "scheme", "masked"),
    [
        ("CT", "ct", False),
        ("ct", "ct", False),
        ("noNorm", "none", False),
        ("Rescale_To_0_1", "rescale_0_1", False),
        ("rgb_to_0_1", "rgb_0_1", False),
        ("ZScore", "zscore", True),
        ("T1", "zscore", True),
        ("none", "zscore", True),  # as nnU-Net: only noNorm switches normalisation off
    ],
)
def test_channel_name_chooses_the_normalisation(name: str, scheme: str, masked: bool) -> None:
    channel = simple((60, 60, 60), (1, 1, 1), crop=0.74, channels=(name,)).channels[0]
    assert (channel.normalization, channel.use_mask) == (scheme, masked)
    assert not simple((60, 60, 60), (1, 1, 1), crop=0.75, channels=(name,)).channels[0].use_mask


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ((10.0,) * 5, "is 10 mm, the 10th percentile: voxels there"),
        ((4.9999, 5.0, 5.0, 5.0, 5.0), "is 5 mm, the 10th percentile: voxels there"),
        ((4.0, 4.0, 5.0, 5.0, 5.0), "is 4 mm, the 10th percentile, not the median 5 mm: voxels there"),
    ],
)
def test_a_coarse_axis_comes_first_and_takes_the_10th_percentile(lengths: tuple[float, ...], words: str) -> None:
    """The reasons name the median only where it is another length."""
    fingerprint = fingerprint_of([(0.8, 0.8, z) for z in lengths], [(400, 400, 30)] * len(lengths))
    plan = make_plan(fingerprint, "Test", ("CT",), LABELS)
    full = plan.configurations["3d_fullres"]
    assert plan.axis_order == (2, 0, 1)
    assert full.spacing == pytest.approx((np.percentile(lengths, 10), 0.8, 0.8))
    assert f"spacing along x {words}" in full.reasons[0] and "order x, z, y" in full.reasons[1]


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f"{f['kind']}-{f['preset']}")
def test_the_spacing_of_the_plan_given_by_hand_gives_the_same_plan(fixture: dict[str, Any]) -> None:
    planned = plan_of(fixture)
    target = planned.configurations.get("3d_fullres", planned.configurations["2d"]).spacing
    by_axis = sorted(zip(planned.axis_order[-len(target) :], target, strict=True))
    again = reference_plan(fixture, fixture["preset"], fixture["gpu_memory_gb"], tuple(mm for _, mm in by_axis))
    assert again.trains_as(planned)


def test_a_coarser_spacing_by_hand_decides_axes_patch_and_configurations() -> None:
    own, isotropic = simple((400, 400, 400), (1, 1, 1)), simple((400, 400, 400), (1, 1, 1), spacing=[2.5])
    full = isotropic.configurations["3d_fullres"]
    assert full.spacing == (2.5, 2.5, 2.5) and full.median_shape == (160, 160, 160)
    assert full.reasons[0] == "spacing 2.5x2.5x2.5 was set by hand"
    assert "3d_lowres" in own.configurations and "3d_lowres" not in isotropic.configurations
    turned = simple((400, 400, 400), (1, 1, 1), spacing=(2, 1, 5))
    assert turned.axis_order == (2, 0, 1) and turned.configurations["3d_fullres"].spacing == (5, 2, 1)
    assert turned.configurations["2d"].median_shape == (200, 400) and turned.median_spacing == (1, 1, 1)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("distance", [999.0, 1.0, 0.5])
@pytest.mark.parametrize("given", [None, (4,), (2, 4), (4, 4)])
def test_single_slices_are_the_first_axis_whatever_their_spacing(
    axis: int, distance: float, given: tuple[float, ...] | None
) -> None:
    shape, spacing = [500, 400], [0.5, 0.5]
    shape.insert(axis, 1)
    spacing.insert(axis, distance)
    plan = simple(tuple(shape), tuple(spacing), spacing=given)  # type: ignore[arg-type]
    assert plan.axis_order[0] == axis and list(plan.configurations) == ["2d"]
    two = (0.5, 0.5) if given is None else given if len(given) == 2 else given * 2
    assert plan.configurations["2d"].spacing == two
    assert plan.configurations["2d"].median_shape == (round(250 / two[0]), round(200 / two[1]))


def test_images_too_small_to_pool_are_planned() -> None:
    for shape, spacing in (((4, 4, 4), None), ((40, 40, 40), (10,)), ((1, 4, 4), None)):
        flat = simple(shape, (1, 1, 1), spacing=spacing).configurations["2d"]
        assert flat.patch_size == (4, 4) and "cannot be trained" in " ".join(flat.reasons)


@pytest.mark.parametrize("voxel", [(1, 8e-5, 8e-5), (60, 2e-4, 4e-4)])
def test_voxels_ten_thousand_times_longer_along_one_axis_are_planned(voxel: tuple[float, float, float]) -> None:
    """nnU-Net fails: 1 of these slices is longer than its first patch, which has 0 then."""
    plan = simple((90, 1024, 1024), voxel)
    assert {"2d", "3d_fullres"} <= plan.configurations.keys()
    assert all(min(c.patch_size) > 0 and min(c.median_shape) > 0 for c in plan.configurations.values())
    assert plan.configurations["3d_fullres"].patch_size[0] == 1


def test_one_slice_gets_2d_only() -> None:
    plan = simple((1, 500, 400), (999.0, 1.0, 1.0))
    assert list(plan.configurations) == ["2d"]
    assert plan.configurations["2d"].reasons[0] == "images have one slice: only the pixels count"


def test_lowres_and_cascade_come_with_images_much_larger_than_a_patch() -> None:
    large, small = simple((400, 400, 400), (1, 1, 1)), simple((140, 140, 140), (1, 1, 1))
    assert list(large.configurations) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    assert large.configurations["3d_lowres"].reasons[0].startswith("made because a patch of 3d_fullres sees 3.3 %")
    assert large.configurations["3d_cascade_fullres"].previous_stage == "3d_lowres"
    assert patch_share(large.configurations["3d_lowres"]) >= 0.25
    assert "3d_lowres" not in small.configurations
    assert any(reason.startswith("no 3d_lowres") for reason in small.configurations["3d_fullres"].reasons)


def test_default_batch_is_capped_at_a_twentieth_of_the_data() -> None:
    default, residual = (simple((40, 40, 40), (1, 1, 1), n=60, preset=preset) for preset in ("default", "resenc_m"))
    assert default.configurations["3d_fullres"].batch_size == 3
    assert any(
        reason.startswith("batch 3: ") and "at most 5 %" in reason
        for reason in default.configurations["3d_fullres"].reasons
    )
    assert residual.configurations["3d_fullres"].batch_size > 3


def test_more_memory_gives_a_larger_patch_and_more_predicted_memory() -> None:
    eight, eighty = (simple((400, 400, 400), (1, 1, 1), memory_gb=gb) for gb in (8, 80))
    small, large = eight.configurations["3d_fullres"], eighty.configurations["3d_fullres"]
    assert patch_share(large) > 5 * patch_share(small)
    assert small.memory_gb is not None and large.memory_gb is not None
    assert 0.5 * 8 < small.memory_gb < 8 and 0.5 * 80 < large.memory_gb < 80
    assert [simple((60, 60, 60), (1, 1, 1), preset=p).memory_gb for p in ("resenc_l", "resenc_xl")] == [24, 40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "resenc_k"}, "there is no preset 'resenc_k'. Did you mean 'resenc_"),
        ({"preset": "large", "memory_gb": 8}, "there is no preset 'large'. There are: default, resenc_m"),
        ({"memory_gb": 0}, "a memory budget of 0 GB is not positive"),
        ({"memory_gb": 1e-6}, "1e-06 GB are too few for this dataset"),
        ({"channels": ("T1", "T2")}, "has 2 channels, its fingerprint 1"),
        ({"spacing": (1, 2)}, "a spacing of 2 numbers for images with 3 axes. Give one length in mm, or one for each"),
        ({"spacing": (1, 1, 900)}, "a spacing of 1x1x900 mm leaves no voxel along x. Give a smaller one"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(fingerprint_of([(1, 1, 1)], [(60, 60, 60)]), "X", labels=LABELS, **{"channels": ("T1",), **options})


def test_table_holds_every_configuration_and_every_reason_within_its_width() -> None:
    for fixture in FIXTURES:
        plan = plan_of(fixture)
        text = plan_table(plan)
        assert max(map(len, text.splitlines())) <= 120
        flowing = " ".join(text.split())
        for name, c in plan.configurations.items():
            assert f"\n{name} " in text
            assert f" {' x '.join(map(str, c.patch_size))} {c.batch_size} {len(c.network.features)} " in flowing
            assert all(reason in flowing for reason in c.reasons)


def test_table_warns_where_many_classes_exceed_the_budget() -> None:
    many = next(fixture for fixture in FIXTURES if len(fixture["dataset"]["labels"]) > 100)
    assert "GB are more than" in plan_table(plan_of(many))


def test_limits_shrink_only_what_exceeds_them() -> None:
    plan = nnunet_plan()
    before = plan.configuration("3d_fullres")
    after = limit_sizes(plan, "3d_fullres", patch_voxels=30_000, batch_voxels=50_000).configuration("3d_fullres")
    assert prod(before.patch_size) > 30_000 >= prod(after.patch_size) and after.batch_size == 2
    Configuration.model_validate(after.model_dump())  # the patch can be pooled
    same = limit_sizes(plan, "3d_fullres", patch_voxels=10**9, batch_voxels=10**9).configuration("3d_fullres")
    assert (same.patch_size, same.batch_size, same.network) == (before.patch_size, before.batch_size, before.network)
    assert same.batch_dice == before.batch_dice
    flat = limit_sizes(plan, "2d", 100_000, 200_000).configuration("2d")
    assert flat.batch_size == 200_000 // prod(flat.patch_size) > 2


@pytest.mark.parametrize(("voxels", "batch_dice"), [(10**9, False), (32 * 40 * 32, False), (16 * 24 * 16, True)])
def test_dice_is_taken_over_the_batch_where_a_limited_patch_sees_less_than_a_quarter(
    voxels: int, batch_dice: bool
) -> None:
    plan = simple((36, 50, 35), (1, 1, 1))
    limited = limit_sizes(plan, "3d_fullres", voxels).configuration("3d_fullres")
    assert limited.batch_dice is batch_dice
    assert (prod(limited.patch_size) < 0.25 * prod(limited.median_shape)) is batch_dice


def test_another_patch_gets_its_topology_and_keeps_the_widths_of_the_stages_that_stay() -> None:
    plan = simple((200, 200, 200), (1, 1, 1))
    full = plan.configurations["3d_fullres"]
    changed = override_sizes(plan, "3d_fullres", (64, 64, 32), 5)
    c = changed.configurations["3d_fullres"]
    assert (c.patch_size, c.batch_size, len(c.network.features)) == ((64, 64, 32), 5, 5)
    assert c.network.strides == topology_of((1, 1, 1), (64, 64, 32)).strides
    assert c.memory_gb is not None and full.memory_gb is not None and c.memory_gb < full.memory_gb
    assert changed.configurations["2d"] == plan.configurations["2d"]
    assert Plan.model_validate_json(changed.to_json()) == changed
    narrow = c.model_copy(update={"network": c.network.model_copy(update={"features": (16, 32, 64, 128, 200)})})
    plan = plan.model_copy(update={"configurations": {"3d_fullres": narrow}})
    deeper = override_sizes(plan, "3d_fullres", (128, 128, 128)).configurations["3d_fullres"].network
    assert deeper.features == (16, 32, 64, 128, 200, 320)
    shallower = override_sizes(plan, "3d_fullres", (16, 16, 16)).configurations["3d_fullres"].network
    assert shallower.features == (16, 32, 64) and shallower.decoder_convolutions == (2, 2)


@pytest.mark.parametrize(
    ("patch", "batch", "message"),
    [
        (
            (100, 64, 64),
            None,
            "^3d_fullres: patch size 100x64x64 cannot be pooled.* The nearest are 96x64x64 and 112x64x64",
        ),
        ((64, 64), None, "64x64 is no patch. Give 3 positive numbers"),
        ((0, 64, 64), None, "0x64x64 is no patch"),
        ((4, 4, 4), None, "too small to pool"),
        (None, 0, "batch size of 0"),
    ],
)
def test_impossible_sizes_are_refused(patch: tuple[int, ...] | None, batch: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override_sizes(simple((200, 200, 200), (1, 1, 1)), "3d_fullres", patch, batch)


@pytest.mark.parametrize("preset", ["mednext_s", "mednext_b", "mednext_m", "mednext_l"])
@pytest.mark.parametrize(("shape", "spacing"), [((200, 512, 512), (2.5, 0.8, 0.8)), ((10, 256, 216), (10, 1.56, 1.56))])
def test_mednext_fills_its_budget_with_patches_that_can_be_halved_four_times(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], preset: str
) -> None:
    plan = simple(shape, spacing, n=100, preset=preset)
    assert {c.network.kind for c in plan.configurations.values()} == {preset}
    for c in plan.configurations.values():
        assert 0.8 * plan.memory_gb < (c.memory_gb or 0) < 1.02 * plan.memory_gb
        assert c.network.divisor[-2:] == (16, 16) and len(c.network.features) == 5
    with pytest.raises(UserError, match=f"a network that nnU-Net lacks: {preset} with gelu"):
        plan_to_nnunet(plan, {})
    smaller = limit_sizes(plan, "3d_fullres", patch_voxels=100_000).configuration("3d_fullres")
    assert prod(smaller.patch_size) <= 100_000 and smaller.network.kind == preset


def test_another_patch_keeps_the_size_of_the_kernels() -> None:
    plan = simple((128, 128, 128), (1, 1, 1), preset="mednext_s")
    c = plan.configuration("3d_fullres")
    wide = c.network.model_copy(update={"kernels": resize_kernels(c.network.kernels, 5)})
    configurations = {**plan.configurations, "3d_fullres": c.model_copy(update={"network": wide})}
    changed = override_sizes(plan.model_copy(update={"configurations": configurations}), "3d_fullres", (64, 64, 64))
    assert set(changed.configuration("3d_fullres").network.kernels) == {(5, 5, 5)}
    by_hand = c.network.model_copy(update={"kernels": ((1, 3, 3), (5, 5, 5), *c.network.kernels[2:])})
    configurations = {"3d_fullres": c.model_copy(update={"network": by_hand})}
    changed = override_sizes(plan.model_copy(update={"configurations": configurations}), "3d_fullres", (64, 64, 64))
    assert changed.configuration("3d_fullres").network.kernels == by_hand.kernels, "not 5x5x5 in all stages"


def test_another_patch_keeps_strides_that_were_edited_where_they_fit(capsys: pytest.CaptureFixture[str]) -> None:
    plan = simple((200, 200, 200), (1, 1, 1))
    c = plan.configurations["3d_fullres"]
    strides = ((1, 1, 1), (1, 2, 2), *c.network.strides[2:])
    by_hand = c.network.model_copy(update={"strides": strides})
    plan = plan.with_configuration("3d_fullres", c.model_copy(update={"network": by_hand}))
    kept = override_sizes(plan, "3d_fullres", (48, 96, 96)).configuration("3d_fullres")
    assert (kept.network, kept.patch_size) == (by_hand, (48, 96, 96)) and not capsys.readouterr().err
    lost = override_sizes(plan, "3d_fullres", (64, 64, 40)).configuration("3d_fullres")
    assert lost.network.strides == topology_of((1, 1, 1), (64, 64, 40)).strides
    assert "3d_fullres: patch size 64x64x40 does not fit the strides that were set by hand" in capsys.readouterr().err
    one_voxel = override_sizes(plan, "3d_fullres", (16, 32, 32)).configuration("3d_fullres")
    assert Configuration.model_validate(one_voxel.model_dump()).network.strides != strides
    with pytest.raises(UserError, match=r"must be a multiple of 16x16x16.*nearest are 64x64x64 and 80x64x64"):
        override_sizes(plan, "3d_fullres", (72, 64, 64))
