"""nnU-Net v2's plans.json, dataset.json and splits_final.json, both ways.

tests/data/nnunet_plans.json is a plan as nnU-Net 2.8.1 wrote it for hippocampus cases, with two configurations added by
hand that inherit from 2d and 3d_fullres.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from samples import Counts, reference_plan

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.models.nnunet import _labels_for_nnunet
from nnunet_lite.planning.nnunet import plan_from_nnunet, plan_to_nnunet, read_plan
from nnunet_lite.planning.schema import Plan

DATA = Path(__file__).parent / "data"
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
    "numTraining": 200,
    "file_ending": ".nii.gz",
}


@pytest.fixture
def plans() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DATA / "nnunet_plans.json").read_text())
    return loaded


def older(plans: dict[str, Any]) -> dict[str, Any]:
    """The same plan as the first 2.x versions wrote it."""
    configurations = {}
    for name, top in (("2d", 512), ("3d_fullres", 320)):
        c = dict(plans["configurations"][name])
        kwargs = c.pop("architecture")["arch_kwargs"]
        configurations[name] = {
            **c,
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 32,
            "unet_max_num_features": top,
            "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
            "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
            "num_pool_per_axis": [3] * len(c["patch_size"]),
            "pool_op_kernel_sizes": kwargs["strides"],
            "conv_kernel_sizes": kwargs["kernel_sizes"],
        }
    return {**plans, "configurations": configurations}


def test_nnunets_plan_comes_back_as_it_was(plans: dict[str, Any]) -> None:
    before = copy.deepcopy(plans)
    assert plan_to_nnunet(plan_from_nnunet(plans, DATASET), DATASET) == plans == before


def test_plan_is_ours_afterwards_and_a_configuration_has_what_it_inherits(plans: dict[str, Any]) -> None:
    plan = plan_from_nnunet(plans, DATASET)
    assert plan.labels.values == (0, 1, 2) and plan.n_cases == 200 and plan.median_shape == (36, 50, 35)
    assert plan.channels[0].normalization == "zscore" and plan.channels[0].statistics.mean == 19506.830078125
    assert Plan.model_validate_json(plan.to_json()) == plan
    small, full = plan.configurations["3d_small"], plan.configurations["3d_fullres"]
    assert (small.batch_size, small.network.features) == (2, (16, 32, 64, 128))
    assert (small.patch_size, small.spacing, small.resampling) == (full.patch_size, full.spacing, full.resampling)
    assert small.memory_gb is not None and full.memory_gb is not None and small.memory_gb < full.memory_gb


def test_older_plans_mean_the_same_and_inherit_in_a_chain(plans: dict[str, Any]) -> None:
    chain = older(plans)
    chain["configurations"]["a"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    chain["configurations"]["b"] = {"inherits_from": "a", "UNet_base_num_features": 24}
    now, then = (plan_from_nnunet(content, DATASET).configurations for content in (plans, chain))
    assert [then[name] for name in ("2d", "3d_fullres")] == [now[name] for name in ("2d", "3d_fullres")]
    assert (then["b"].batch_size, then["b"].network.features) == (3, (24, 48, 96, 192))


def planned(number: int, preset: str = "default") -> tuple[Plan, dict[str, Any], dict[str, Any]]:
    """Return our plan of a reference dataset, the same as nnU-Net's JSON, and the dataset.json."""
    fixture = json.loads((DATA / "plan_fixtures.json").read_text())[number]
    plan = reference_plan(fixture, preset)
    return plan, plan_to_nnunet(plan, fixture["dataset"]), fixture["dataset"]


def test_cascade_goes_both_ways() -> None:
    plan, written, dataset = planned(0)
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    assert written["configurations"]["3d_cascade_fullres"] == cascade
    assert written["configurations"]["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    back = plan_from_nnunet(written, dataset)
    for name, configuration in plan.configurations.items():
        taken_over = back.configurations[name].model_copy(update={"reasons": configuration.reasons})
        assert taken_over == configuration


def test_presets_share_preprocessed_data_only_where_nnunet_does() -> None:
    _, written, _ = planned(2, "resenc_m")
    assert written["plans_name"] == "nnUNetResEncUNetMPlans"
    assert written["experiment_planner_used"] == "nnUNetPlannerResEncM"
    folders = {name: c.get("data_identifier") for name, c in written["configurations"].items()}
    assert folders["3d_fullres"] == "nnUNetPlans_3d_fullres"
    assert folders["3d_lowres"] == "nnUNetResEncUNetMPlans_3d_lowres"


READERS = {  # by file ending and number of slices
    "SimpleITKIO": [(".nii.gz", 36), (".NII.GZ", 36), (".mha", 36), (".nrrd", 1)],
    "NibabelIO": [(".nii", 36)],
    "Tiff3DIO": [(".tif", 36), (".tiff", 36)],
    "NaturalImage2DIO": [(".tif", 1), (".tiff", 1), (".png", 1), (".PNG", 1), (".bmp", 1), (".jpg", 1)],
}


@pytest.mark.parametrize(
    ("ending", "slices", "reader"), [(*image, reader) for reader, images in READERS.items() for image in images]
)
def test_images_choose_nnunets_reader(
    plans: dict[str, Any], ending: str, slices: int, reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their number of slices does, not which configurations the plan has: a model's plan has only its own."""
    plan = plan_from_nnunet(plans, DATASET)
    only_2d = {"2d": plan.configurations["2d"]}
    plan = plan.model_copy(update={"median_shape": (slices, *plan.median_shape[1:]), "configurations": only_2d})
    assert plan_to_nnunet(plan, {**DATASET, "file_ending": ending})["image_reader_writer"] == reader
    assert ("nnU-Net has no reader for .jpg" in capsys.readouterr().err) == (ending == ".jpg")


@pytest.mark.parametrize("named", ["None", None, "NibabelIOWithReorient"])
def test_a_reader_that_dataset_json_names_is_taken(plans: dict[str, Any], named: str | None) -> None:
    """ "None" is nnU-Net's word for no name."""
    written = plan_to_nnunet(plan_from_nnunet(plans, DATASET), {**DATASET, "overwrite_image_reader_writer": named})
    assert written["image_reader_writer"] == ("SimpleITKIO" if named in ("None", None) else named)


def test_clipping_is_not_dropped(plans: dict[str, Any], counts: Counts) -> None:
    plan = plan_from_nnunet(plans, DATASET)
    clipped = tuple(channel.model_copy(update={"clip_percentiles": (1, 99)}) for channel in plan.channels)
    with pytest.raises(UserError, match="clips images to percentiles, which nnU-Net cannot do"):
        plan_to_nnunet(plan.model_copy(update={"channels": clipped}), DATASET)
    counts("bad inputs refused in one line")


REGIONS = {"background": 0, "all": [1, 2], "core": [2], "ignore": 3}


@pytest.mark.parametrize(
    ("labels", "order", "written"),
    [
        ({"bg": 0, "b": 7, "a": 3}, None, {"background": 0, "a": 1, "b": 2}),
        ({"Background": 0, "a": 1, "void": 2}, None, {"background": 0, "a": 1, "void": 2}),
        ({"background": 0, "a": 1, "Ignore": 255}, None, {"background": 0, "a": 1, "ignore": 2}),
        ({"background": 5, "a": 1}, None, {"background": 0, "a": 1}),
        (REGIONS, [1, 2], REGIONS),
        ({"nothing": 0, "all": [1, 4], "core": 4, "ignore": 255}, [1, 4], REGIONS),
        ({"background": 5, "all": [0, 7], "core": [7]}, [0, 7], {"background": 0, "all": [1, 2], "core": [2]}),
        ({"background": 0, "all": [2, 4], "core": [4], "ignore": 9}, [1, 2], REGIONS),
    ],
)
def test_labels_are_written_as_nnunet_demands_them(
    labels: dict[str, Any], order: list[int] | None, written: dict[str, Any]
) -> None:
    """What its LabelManager asserts: "background" is 0, and ignore is one more than the last value."""
    found = _labels_for_nnunet(Labels.from_json(labels, order))
    assert found["labels"] == written
    assert found.get("regions_class_order") == (order and [1, 2]), "what nnU-Net writes is in the regions"


def test_lists_of_one_value_are_labels_as_in_nnunet() -> None:
    labels = Labels.from_json({"background": [0], "a": [1], "b": [2]})
    assert not labels.has_regions and labels.n_channels == 3
    assert labels.to_json() == {"background": 0, "a": 1, "b": 2}


def test_relu_and_batch_norm_are_taken_over(plans: dict[str, Any]) -> None:
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    kwargs |= {"norm_op": "torch.nn.modules.batchnorm.BatchNorm2d", "nonlin": "torch.nn.ReLU"}
    plan = plan_from_nnunet(plans, DATASET)
    network = plan.configurations["2d"].network
    assert (network.norm, network.activation) == ("batch", "relu")
    assert plan_to_nnunet(plan, DATASET) == plans


def _change(plans: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(plans)
    *parents, last = path.split("/")
    node = changed
    for key in parents:
        node = node[key]
    node[last] = value
    return changed


ARCHITECTURE = "configurations/3d_fullres/architecture"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("configurations/3d_small/inherits_from", "3d_big", "3d_small.inherits_from '3d_big', which does not exist"),
        ("configurations/3d_fullres", {"inherits_from": "3d_small"}, "circle: 3d_fullres -> 3d_small -> 3d_fullres"),
        ("configurations/2d/normalization_schemes", ["MyNormalization"], "normalise differently"),
        (f"{ARCHITECTURE}/network_class_name", "my.Net", "configurations.3d_fullres.network class 'my.Net'"),
        (f"{ARCHITECTURE}/arch_kwargs/conv_bias", False, "conv_bias False"),
        (f"{ARCHITECTURE}/arch_kwargs/dropout_op", "torch.nn.Dropout3d", "dropout_op"),
        (f"{ARCHITECTURE}/arch_kwargs/stem_channels", 7, "stem_channels 7"),
        (f"{ARCHITECTURE}/arch_kwargs/nonlin_kwargs/negative_slope", 0.2, "negative_slope 0.2"),
        (f"{ARCHITECTURE}/arch_kwargs/norm_op_kwargs/eps", 1e-3, "norm_op_kwargs"),
        (f"{ARCHITECTURE}/arch_kwargs/norm_op", "torch.nn.GroupNorm", "norm_op 'torch.nn.GroupNorm'"),
        ("configurations/2d/resampling_fn_seg", "mine", "configurations.2d.resampling_fn_seg 'mine'"),
        ("configurations/2d/preprocessor_name", "Mine", "configurations.2d.preprocessor_name 'Mine'"),
        ("configurations/2d/patch_size", [50, 40], "2d.patch_size.* a multiple of 8; the nearest are 48 and 56"),
        ("configurations/2d/batch_size", 0, "configurations.2d.batch_size: .*greater than 0"),
        ("configurations/2d/spacing", None, "configurations.2d.spacing: "),
        ("configurations/2d", {"batch_size": 3}, "p.json: nnU-Net's plan lacks configurations.2d.spacing"),
        ("transpose_forward", [0, 1], "p.json: nnU-Net's plan: axis_order"),
    ],
)
def test_what_cannot_be_followed_is_refused(plans: dict[str, Any], path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_from_nnunet(_change(plans, path, value), DATASET, Path("p.json"))


def test_read_plan_takes_either_kind(plans: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = DATA / "nnunet_plans.json", tmp_path / "plans.json"
    plan = read_plan(theirs, DATASET)
    ours.write_text(plan.to_json())
    assert read_plan(ours) == plan
    with pytest.raises(UserError, match=r"needs a dataset\.json"):
        read_plan(theirs)


def test_a_broken_dataset_json_is_refused(plans: dict[str, Any]) -> None:
    """As a dataset's own, see test_check.py."""
    for dataset, message in (
        ({"labels": {"background": 0, "a": 1}}, "has no channel_names"),
        ({"channel_names": {"0": "CT"}, "labels": {"a": 1, "b": 1}}, "labels: two labels share one value"),
    ):
        with pytest.raises(UserError, match=message):
            plan_from_nnunet(plans, dataset)
