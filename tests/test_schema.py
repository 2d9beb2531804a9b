"""plans.json is validated where it is read, and its JSON Schema is the one in docs/."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_lite.errors import UserError
from nnunet_lite.interop.nnunet import plan_from_nnunet
from nnunet_lite.plan.schema import Plan

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
        ("x", {"inherits_from": "3d_fulres"}, r"inherits_from '3d_fulres', which is not there"),
        ("x", {"inherits_from": "x"}, r"goes in a circle: x -> x"),
    ],
)
def test_an_illegal_configuration_names_its_place_and_what_is_legal(
    edited: Any, configuration: str, change: Any, message: str
) -> None:
    path = edited(lambda plan: plan["configurations"].setdefault(configuration, {}).update(change))
    with pytest.raises(UserError, match=message) as raised:
        Plan.read(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


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
