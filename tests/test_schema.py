"""plans.json is validated where it is read, and its JSON Schema is the one in docs/."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import nnunet_plan

from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Plan

PLAN = nnunet_plan()
FULL = "3d_fullres"


def read_edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Plan:
    """Read the plan after a change by hand."""
    value = json.loads(PLAN.to_json())
    change(value)
    (folder / "plans.json").write_text(json.dumps(value))
    return Plan.read(folder / "plans.json")


def test_round_trip_and_inheritance(tmp_path: Path) -> None:
    small = {"inherits_from": FULL, "batch_size": 3}
    plan = read_edited(tmp_path, lambda plan: plan["configurations"].update(small=small))
    assert plan.configurations.pop("small") == PLAN.configuration(FULL).model_copy(update={"batch_size": 3})
    assert plan == PLAN


@pytest.mark.parametrize(
    ("configuration", "change", "message"),
    [
        ("x", {"inherits_from": ["2d"]}, r"configurations.x.inherits_from \['2d'\], which does not exist"),
        (FULL, {"median_shape": [36, 50]}, r"median_shape = \[36.0, 50.0\] must have 3 numbers, one per axis"),
        (FULL, {"patch_size": [8, 8, 8]}, r"patch_size = \[8, 8, 8\] leaves one voxel in the coarsest stage"),
        (FULL, {"spacing": [1, float("inf"), 1]}, r"3d_fullres.spacing.1: .*finite number \(found inf\)"),
    ],
)
def test_an_illegal_configuration_names_its_place_and_what_is_legal(
    tmp_path: Path, configuration: str, change: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read_edited(tmp_path, lambda plan: plan["configurations"].setdefault(configuration, {}).update(change))
    assert str(raised.value).startswith(f"{tmp_path / 'plans.json'}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kernels", [[3, 3, 3], [3, 3], [3] * 3, [3] * 3], r"network.kernels\[1\] = \[3, 3\] must have 3 numbers"),
        ("strides", [[1, 1, 1], [2] * 3, [2] * 3, [2, 2]], r"network.strides\[3\] = \[2, 2\] must have 3 numbers"),
        ("strides", [[2] * 3] * 4, r"network.strides\[0\] = \[2, 2, 2\] must be all 1"),
    ],
)
def test_an_illegal_network_names_the_stage(tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"configurations.3d_fullres[.:] ?{message}"):
        read_edited(tmp_path, lambda plan: plan["configurations"][FULL]["network"].update({key: value}))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("channels.0.statistics.std", float("nan"), r"channels.0.statistics.std: .*finite number \(found nan\)"),
        ("channels.0.normalization", "ZScore", "channels.0.normalization.*'ct', 'zscore'.*found 'ZScore'"),
        ("labels.ignore", 1, "labels: ignore and Anterior share the value 1. Correct"),
    ],
)
def test_an_illegal_value_names_its_place(tmp_path: Path, place: str, value: Any, message: str) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in place.split(".")]

    def change(plan: Any) -> None:
        for key in parents:
            plan = plan[key]
        plan[last] = value

    with pytest.raises(UserError, match=message):
        read_edited(tmp_path, change)
