"""plans.json is validated where it is read, and its JSON Schema is the one in docs/."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_lite.errors import UserError
from nnunet_lite.planning.nnunet import plan_from_nnunet
from nnunet_lite.planning.schema import Plan

ABOUT = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "Anterior": 1, "Posterior": 2}, "numTraining": 200}


@pytest.fixture
def plan() -> Plan:
    plans = json.loads((Path(__file__).parent / "data" / "nnunet_plans.json").read_text())
    return plan_from_nnunet(plans, ABOUT)


@pytest.fixture
def edited(plan: Plan, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """Write the plan after a change by hand."""

    def write(change: Callable[[dict[str, Any]], Any]) -> Path:
        value = json.loads(plan.to_json())
        change(value)
        (tmp_path / "plans.json").write_text(json.dumps(value))
        return tmp_path / "plans.json"

    return write


def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "plans.json").write_text(plan.to_json())
    assert Plan.read(tmp_path / "plans.json") == plan


FULL = "3d_fullres"


@pytest.mark.parametrize(
    ("configuration", "change", "message"),
    [
        (FULL, {"batch_size": 0}, r"configurations.3d_fullres.batch_size.*greater than 0"),
        (FULL, {"patch_size": [40, 55, 40]}, r"patch_size\[1\] = 55.*multiple of 8.*48 and 56"),
        (FULL, {"pach_size": [8, 8, 8]}, r"3d_fullres.pach_size"),
        ("x", {"inherits_from": "3d_fulres"}, r"inherits_from '3d_fulres', which does not exist"),
        ("x", {"inherits_from": "x"}, r"configurations.x.inherits_from goes in a circle: x -> x"),
        ("x", {"inherits_from": "2D"}, r"configurations.x.inherits_from '2D', .*there are: 2d, 3d_fullres"),
        ("x", {"inherits_from": ["2d"]}, r"configurations.x.inherits_from \['2d'\], which does not exist"),
        (FULL, {"previous_stage": "3d_lwres"}, r"3d_fullres.previous_stage = '3d_lwres' is no other.*there are: 2d"),
        (FULL, {"previous_stage": FULL}, r"configurations.3d_fullres.previous_stage = '3d_fullres' is no other"),
        (FULL, {"median_shape": [36, 50]}, r"median_shape = \[36.0, 50.0\] must have 3 numbers, one per axis"),
        (FULL, {"spacing": [1, 1]}, r"3d_fullres: spacing = \[1.0, 1.0\] must have 3 numbers, one per axis"),
        (FULL, {"spacing": [1, float("inf"), 1]}, r"3d_fullres.spacing.1: .*finite number \(found inf\)"),
        (FULL, {"spacing": [1, 0, 1]}, r"3d_fullres.spacing.1: .*greater than 0 \(found 0\)"),
        (FULL, {"patch_size": [8] * 4}, r"3d_fullres: patch_size = \[8, 8, 8, 8\] must have two or three axes"),
    ],
)
def test_an_illegal_configuration_names_its_place_and_what_is_legal(
    edited: Any, configuration: str, change: Any, message: str
) -> None:
    path = edited(lambda plan: plan["configurations"].setdefault(configuration, {}).update(change))
    with pytest.raises(UserError, match=message) as raised:
        Plan.read(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kernels", [[3, 3, 3], [3, 3], [3] * 3, [3] * 3], r"network.kernels\[1\] = \[3, 3\] must have 3 numbers"),
        ("strides", [[1, 1, 1], [2] * 3, [2] * 3, [2, 2]], r"network.strides\[3\] = \[2, 2\] must have 3 numbers"),
        ("strides", [[2] * 3] * 4, r"network.strides\[0\] = \[2, 2, 2\] must be all 1"),
        ("kernels", [[3, 3, 3], [3, 2, 3], [3] * 3, [3] * 3], r"network.kernels.1.1: must be odd.*\(found 2\)"),
        ("kernels", [[3, 3, 3]] * 3, r"network: kernels has 3 entries for 4 stages"),
        ("strides", [[1, 1, 1]] * 5, r"network: strides has 5 entries for 4 stages"),
        ("features", [], r"network.features: .*at least 1 item"),
    ],
)
def test_an_illegal_network_names_the_stage(edited: Any, key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"configurations.3d_fullres[.:] ?{message}"):
        Plan.read(edited(lambda plan: plan["configurations"][FULL]["network"].update({key: value})))


@pytest.mark.parametrize("order", [-1, 6])
def test_a_spline_has_an_order_from_0_to_5(edited: Any, order: int) -> None:
    with pytest.raises(UserError, match=rf"3d_fullres.resampling.image_order: .*(0|5) \(found {order}\)"):
        Plan.read(edited(lambda plan: plan["configurations"][FULL]["resampling"].update(image_order=order)))


@pytest.mark.parametrize("order", [[0, 1, 1], [1, 2, 3], [0, 0, 0]])
def test_axes_are_taken_in_an_order(edited: Any, order: list[int]) -> None:
    with pytest.raises(UserError, match=r"axis_order: must be a permutation of 0, 1, 2 \(found \[") as raised:
        Plan.read(edited(lambda plan: plan.update(axis_order=order)))
    assert str(order) in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_are_numbers(edited: Any, value: float) -> None:
    with pytest.raises(UserError, match=rf"channels.0.statistics.std: .*finite number \(found {value}\)"):
        Plan.read(edited(lambda plan: plan["channels"][0]["statistics"].update(std=value)))


def test_illegal_labels_are_named(edited: Any) -> None:
    with pytest.raises(UserError, match=r"labels: ignore and Anterior share the value 1. Correct"):
        Plan.read(edited(lambda plan: plan["labels"].update(ignore=1)))


def test_a_list_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "plans.json").write_text("[1]")
    with pytest.raises(UserError, match=r"the file: .*valid dictionary.*\(found \[1\]\)"):
        Plan.read(tmp_path / "plans.json")


def test_an_unknown_scheme_lists_the_known_ones(edited: Any) -> None:
    with pytest.raises(UserError, match=r"channels.0.normalization.*'ct', 'zscore'.*found 'ZScore'"):
        Plan.read(edited(lambda plan: plan["channels"][0].update(normalization="ZScore")))


def test_a_missing_key_is_named(edited: Any) -> None:
    with pytest.raises(UserError, match="channels: Field required"):
        Plan.read(edited(lambda plan: plan.pop("channels")))


def test_invalid_json_has_a_line_and_a_column(tmp_path: Path) -> None:
    (tmp_path / "plans.json").write_text('{"format":\n oops}')
    with pytest.raises(UserError, match="line 2, column 2"):
        Plan.read(tmp_path / "plans.json")


def test_configurations_inherit(edited: Any, plan: Plan) -> None:
    path = edited(lambda p: p["configurations"].update(small={"inherits_from": "3d_fullres", "batch_size": 3}))
    small = Plan.read(path).configuration("small")
    assert small == plan.configuration("3d_fullres").model_copy(update={"batch_size": 3})


def test_the_schema_in_docs_is_current() -> None:
    docs = Path(__file__).parent.parent / "docs" / "plans.schema.json"
    assert json.loads(docs.read_text()) == json.loads(Plan.json_schema())
