"""Whatever a plan, a recipe, a value of --set or the header of an image holds: it is read, or refused in one line.

The examples are drawn by hypothesis, the same in each run.
"""

from __future__ import annotations

import gzip
import json
import math
import time
import tracemalloc
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel  # noqa: F401 - it and SimpleITK before the clock runs
import numpy as np
import pytest
import SimpleITK  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_lite.data.images import read_geometry, read_image
from nnunet_lite.errors import UserError
from nnunet_lite.planning.nnunet import plan_from_nnunet
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, keys, load_settings, recipes
from nnunet_lite.training.job import configure_plan

DATA = Path(__file__).parent / "data"
ABOUT = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "Anterior": 1, "Posterior": 2}, "numTraining": 200}
PLAN = json.loads(plan_from_nnunet(json.loads((DATA / "nnunet_plans.json").read_text()), ABOUT).to_json())

# a folder for all examples of a test is enough: each writes its file again
fuzzed = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([10**9, -(10**9), 2**63, 10**30, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "3d_fullres", "2d", "instance", "plain", "ct", "nnlite-plan-1", "\0", "ä", "../x"]),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value of a JSON tree."""
    found = [path] if path else []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        found += places(value, (*path, key))
    return found


PLACES = places(PLAN)


@st.composite
def mutated_plans(draw: st.DrawFn) -> Any:
    """A valid plan with one to three values replaced, taken away, or written under another name."""
    plan = deepcopy(PLAN)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(PLACES))
        parent = plan
        try:
            for key in way:
                parent = parent[key]
            how = draw(st.sampled_from(["replace", "replace", "delete", "rename", "inherit"]))
            if how == "inherit":
                plan["configurations"][draw(st.sampled_from(["2d", "x", "3d_fullres"]))] = {
                    "inherits_from": draw(st.sampled_from(["2d", "x", "3d_fullres", "y"]))
                }
            elif how == "rename" and isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = parent.pop(last)
            elif how == "delete":
                del parent[last]
            else:
                parent[last] = draw(values)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    return plan


@fuzzed
@given(plan=mutated_plans())
def test_a_plan_is_valid_or_refused(tmp_path: Path, plan: Any) -> None:
    file = tmp_path / "plans.json"
    file.write_text(json.dumps(plan))
    try:
        read = Plan.read(file)
    except UserError as error:
        assert error.file == file and "\n" not in str(error)
        return
    assert Plan.model_validate_json(read.to_json()) == read
    for name in read.configurations:
        try:
            made = configure_plan(read, name, Settings())
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert name in made.configurations


@st.composite
def mutated_recipes(draw: st.DrawFn) -> bytes:
    """The text of a recipe with some characters cut, put in or doubled, and maybe another line at the end."""
    text = recipes()[draw(st.sampled_from(sorted(recipes())))].read_text()
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 20)))
        text = text[:start] + draw(st.sampled_from(["", "=", "[", '"', "\n", "-1", "\0", "x = 1\n", "ä"])) + text[stop:]
    if draw(st.booleans()):
        key, value = draw(st.sampled_from([*keys(), "training", "base", "x.y.z", "recipe"])), draw(values)
        text += f"\n{key} = {json.dumps(value)}\n"
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16"])), "replace")


def is_itself_again(found: Settings) -> bool:
    """NaN, of which no setting holds one, would not be."""
    return Settings.model_validate(json.loads(found.model_dump_json())) == found


@fuzzed
@given(content=mutated_recipes())
def test_a_recipe_is_valid_or_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    try:
        found = load_settings(str(file))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert is_itself_again(found)


@fuzzed
@given(key=st.sampled_from(keys()), value=st.one_of(values, st.text(max_size=12), st.sampled_from(["nan", "[1", "{}"])))
def test_a_value_of_a_setting_is_valid_or_refused(key: str, value: Any) -> None:
    try:
        found = load_settings(changes={key: value})
    except UserError as error:
        assert str(error).startswith((f"{key} = ", f"{key.split('.')[0]} = ")), str(error)
    else:
        assert is_itself_again(found)


HEADER = gzip.decompress((DATA / "Task04_Hippocampus" / "imagesTr" / "hippocampus_001.nii.gz").read_bytes())
# where the fields are that decide how the voxels are read, so that they are hit often
FIELDS = [*range(4), *range(40, 56), *range(70, 74), *range(76, 108), *range(108, 124), *range(252, 348)]
offsets = st.one_of(st.integers(0, 351), st.sampled_from(FIELDS))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@fuzzed
@given(changes=st.dictionaries(offsets, st.integers(0, 255), min_size=1, max_size=6))
def test_a_header_is_read_or_refused(tmp_path: Path, ending: str, changes: dict[int, int]) -> None:
    """In less than a second of this thread, and without memory for voxels that are not there."""
    data = bytearray(HEADER)
    for offset, value in changes.items():
        data[offset] = value
    file = tmp_path / f"scan{ending}"
    file.write_bytes(gzip.compress(data, 1) if ending == ".nii.gz" else data)
    tracemalloc.start()
    start = time.thread_time()
    for read in (read_geometry, read_image):
        try:
            found = read(file)
        except UserError as error:
            assert str(file) in str(error)
            continue
        geometry = found[0] if isinstance(found, tuple) else found.geometry
        numbers = (*geometry.spacing, *geometry.origin, *geometry.direction)
        assert all(map(math.isfinite, numbers)) and min(geometry.spacing) > 0
        assert min(geometry.shape) > 0
        if not isinstance(found, tuple):
            assert found.array.shape[1:] == geometry.shape and isinstance(found.array, np.ndarray)
    took, (_, peak) = time.thread_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 1 and peak < 100e6
