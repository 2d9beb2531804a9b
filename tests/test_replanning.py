"""A dataset that is planned again keeps its options and the edits of its plan; a copy keeps edits that get lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from samples import Copy, Counts

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json
from nnunet_lite.planning import fingerprint
from nnunet_lite.planning.schema import Plan

Change = Callable[[dict[str, Any]], Any]


class Planned:
    """A dataset of two cases in a workspace, and what `nnunet_lite.plan` says about it."""

    def __init__(self, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.raw, self.file = raw, raw.parent / "ws" / raw.name / "plans.json"
        self._capsys = capsys

    def plan(self, **options: Any) -> Plan:
        self._capsys.readouterr()
        return nnunet_lite.plan(self.raw, workspace=self.raw.parent / "ws", workers=0, **options)

    def edit(self, change: Change) -> None:
        content = read_json(self.file)
        change(content)
        self.file.write_text(json.dumps(content))

    def set(self, configuration: str, **values: Any) -> None:
        """Add or change a configuration by hand."""
        self.edit(lambda content: content["configurations"].setdefault(configuration, {}).update(values))

    def as_of_an_older_nnlite(self) -> None:
        """It wrote no planned.json."""
        self.file.with_name("planned.json").unlink()

    def said(self) -> str:
        """What the last plan reported."""
        return self._capsys.readouterr().err

    @property
    def copies(self) -> list[str]:
        return sorted(path.name for path in self.file.parent.glob("plans_*.json"))

    def add_large_cases(self) -> None:
        """Three cases of a grid that changes what is planned, three times as large as the two others."""
        table = read_json(self.raw / "dataset.json")
        first = table["training"][0]
        for number in range(3):
            entry = {what: str(Path(file).with_name(f"large_{number}.nii.gz")) for what, file in first.items()}
            for what, file in entry.items():
                small = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(self.raw / first[what])))
                large = np.tile(small, (3, 3, 3))
                large[0, 0, 0] = number if what == "image" else 0  # no two images are equal
                SimpleITK.WriteImage(SimpleITK.GetImageFromArray(large), str(self.raw / file))
            table["training"].append(entry)
        (self.raw / "dataset.json").write_text(json.dumps(table))


@pytest.fixture
def planned(copy_dataset: Copy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Planned:
    monkeypatch.setattr(fingerprint, "SAMPLES", 100_000)  # to draw 1e8 takes longer than all the rest
    return Planned(copy_dataset(2, "data"), capsys)


MINE = {"inherits_from": "3d_fullres", "batch_size": 3}
EVERY_OPTION: dict[str, Any] = {
    "preset": "resenc_m",
    "memory": 10,
    "spacing": (0.99, 0.98, 0.99),
    "patch_size": (32, 48, 32),
    "batch_size": 3,
    "clip_percentiles": (1, 99),
    "store": "float32",
}


def test_options_are_used_again_and_one_that_is_given_replaces_only_itself(planned: Planned) -> None:
    first = planned.plan(**EVERY_OPTION)
    assert first.options is not None and first.options.memory_gb == 10
    assert planned.plan() == first == Plan.read(planned.file)
    assert "planned again with the options of plans.json: preset resenc_m, memory_gb 10.0, spacing [" in planned.said()
    again = planned.plan(preset="default", patch_size=(32, 32))
    said = planned.said()
    assert again.preset == "default" and again.memory_gb == 10 and again.stored_as == "float32"
    assert again.configuration("3d_fullres").patch_size == (32, 48, 32)
    assert again.configuration("3d_fullres").network.kind == "plain"
    assert sorted(again.configuration("3d_fullres").spacing) == [0.98, 0.99, 0.99]
    assert again.configuration("2d").patch_size == (32, 32)
    assert "preset" not in said.partition("planned again")[2].partition("\n")[0]
    assert "the plan differs from the one before: 2d (patch_size [56, 40] -> [32, 32]" in said
    assert planned.copies == [], "the planner's own are made again by the options"
    limits = [planned.plan(**given).channels[0].clip_percentiles for given in ({}, {"clip_percentiles": (0, 100)}, {})]
    assert limits == [(1, 99), None, None]


def test_a_plan_that_records_no_options_is_planned_again_as_it_was(planned: Planned) -> None:
    first = planned.plan(preset="resenc_m", memory=10, store="float32")
    planned.edit(lambda content: content.pop("options"))
    planned.as_of_an_older_nnlite()
    assert planned.plan().trains_as(first) and planned.copies == []


def test_edits_stay(planned: Planned) -> None:
    planned.plan()

    def change(content: dict[str, Any]) -> None:
        content["configurations"]["mine"] = MINE
        content["configurations"]["3d_fullres"]["batch_size"] = 5
        del content["configurations"]["2d"]
        content["channels"][0]["statistics"]["percentile_99_5"] = 1000
        content["channels"][0]["normalization"] = "ct"
        content["stored_as"] = "float32"

    planned.edit(change)
    before = Plan.read(planned.file)
    assert planned.plan().trains_as(before)
    said = planned.said()
    assert planned.copies == [] and Plan.read(planned.file).trains_as(before)
    for words in (
        "stored_as (float16 -> float32)", "channels.0.normalization (zscore -> ct)", "percentile_99_5 (", "-> 1000.0)",
        "2d (deleted)", "3d_fullres (batch_size 2 -> 5)", "mine (added)",
    ):  # fmt: skip
        assert words in said.partition("edits that are kept: ")[2].partition("\n")[0]
    assert read_json(planned.file)["configurations"]["mine"] == MINE, "as it was written"


def test_labels_that_are_not_those_of_the_dataset_are_refused(planned: Planned) -> None:
    planned.plan()
    regions = {"names": {"all": [1, 2], "Posterior": [2]}, "region_order": [1, 2]}
    planned.edit(lambda content: content["labels"].update(regions))
    workspace, said = planned.file.parents[1], re.escape("labels: Anterior is None, in the dataset 1; labels: Poster")
    with pytest.raises(UserError, match=said) as refused:
        nnunet_lite.train("3d_fullres", 0, folds=2, workspace=workspace)
    assert refused.value.file == planned.file and "dataset.json of the raw data" in refused.value.fix
    with pytest.raises(UserError, match=said):
        nnunet_lite.preprocess(workspace=workspace)
    planned.plan()
    said = planned.said()
    assert "Lost: labels (" in said and "; change it in the dataset.json of the raw data)" in said
    nnunet_lite.preprocess("2d", workspace=workspace, workers=0)


def test_the_order_of_regions_and_channels_is_that_of_the_dataset(copy_nnunet: Copy, tmp_path: Path) -> None:
    """A program that sorts the keys of plans.json must not train outputs and inputs as others."""
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    raw = copy_nnunet(2, ("T2", "T1"), labels=labels, regions_class_order=[1, 2])
    made = nnunet_lite.plan(raw, workspace=tmp_path / "ws", workers=0)
    file = tmp_path / "ws" / raw.name / "plans.json"
    file.write_text(json.dumps(read_json(file), sort_keys=True))
    with pytest.raises(UserError, match="the order of the regions is core, whole, in the dataset whole, core"):
        nnunet_lite.preprocess(workspace=tmp_path / "ws")
    other = made.model_copy(update={"channels": made.channels[::-1]})
    file.write_text(other.to_json())
    with pytest.raises(UserError, match="channels: they are T1, T2, in the dataset T2, T1") as refused:
        nnunet_lite.preprocess(workspace=tmp_path / "ws")
    assert refused.value.file == file
    changed = (other.channels[0].model_copy(update={"normalization": "none"}), other.channels[1])
    file.write_text(other.model_copy(update={"channels": changed}).to_json())
    again = nnunet_lite.plan(raw, workspace=tmp_path / "ws", workers=0)
    assert again.channels == made.channels, "an edit of T1 is not made to T2"
    (tmp_path / "theirs.json").write_text(other.to_json())
    adopted = nnunet_lite.plan(raw, plans=tmp_path / "theirs.json", workspace=tmp_path / "ws", workers=0)
    assert adopted.channels == made.channels, "matched by their names"


def test_an_option_beats_a_change_by_hand_which_is_kept_aside(planned: Planned) -> None:
    made = planned.plan()
    planned.set("mine", **MINE)
    planned.set("2d", batch_size=7)
    planned.edit(lambda content: content.update(stored_as="float32"))
    edited = planned.file.read_text()
    again = planned.plan(preset="default", store="float16")
    assert again.configuration("2d") == made.configuration("2d") and again.stored_as == "float16"
    assert again.configuration("mine").batch_size == 3, "a configuration made by hand stays"
    copy = planned.file.with_name("plans_1.json")
    assert copy.read_text() == edited
    said = planned.said()
    assert f"warning: {planned.file} is replaced; {copy} is a copy of the old file. Lost: " in said
    assert "2d (batch_size 3 -> 7)" in said and "stored_as (float16 -> float32)" in said


def test_data_that_change_the_plan_replace_an_edit_and_keep_a_copy(planned: Planned) -> None:
    """A configuration that was added inherits from the new plan, and a deleted one stays deleted."""
    first = planned.plan().configuration("3d_fullres")
    planned.set("mine", **MINE)
    planned.set("3d_fullres", batch_size=5)
    planned.edit(lambda content: content["configurations"].pop("2d"))
    edited = planned.file.read_text()
    planned.add_large_cases()
    again, said = planned.plan(), planned.said()
    full, mine = again.configuration("3d_fullres"), again.configuration("mine")
    assert full.patch_size != first.patch_size and full.batch_size != 5
    assert (mine.batch_size, mine.patch_size) == (3, full.patch_size)
    assert "2d" not in again.configurations
    assert planned.file.with_name("plans_1.json").read_text() == edited
    assert "Lost: 3d_fullres (batch_size 2 -> 5)" in said
    assert "the plan differs from the one before: 3d_fullres (" in said


def test_a_configuration_that_no_longer_fits_what_it_inherits_stays_as_it_was(planned: Planned) -> None:
    planned.plan()
    planned.set("mine", inherits_from="3d_fullres", patch_size=[8, 16, 8])
    before = Plan.read(planned.file).configuration("mine")
    planned.add_large_cases()
    again = planned.plan()
    assert again.configuration("mine") == before
    assert max(again.configuration("3d_fullres").network.divisor) > max(before.network.divisor)


def test_a_plan_that_cannot_be_read_is_replaced_and_kept_with_its_options_used(planned: Planned) -> None:
    planned.plan(preset="resenc_m")
    planned.edit(lambda content: content.update(configurations={}))
    broken = planned.file.read_text()
    assert planned.plan().preset == "resenc_m"
    assert planned.file.with_name("plans_1.json").read_text() == broken
    planned.file.write_text("{")
    assert planned.plan().preset == "resenc_m"
    assert planned.copies == ["plans_1.json", "plans_2.json"]
    assert planned.file.with_name("plans_2.json").read_text() == "{"


@pytest.mark.parametrize("file", [None, "{"], ids=["of an older nnlite", "damaged"])
def test_where_the_edits_are_unknown_a_plan_that_differs_is_kept_aside(planned: Planned, file: str | None) -> None:
    planned.plan()
    planned.as_of_an_older_nnlite()
    planned.plan()
    assert planned.copies == []
    planned.set("mine", **MINE)
    planned.as_of_an_older_nnlite() if file is None else planned.file.with_name("planned.json").write_text(file)
    planned.plan()
    assert planned.copies == ["plans_1.json"] and "Lost: all that differs from it" in planned.said()
    assert json.loads(planned.file.with_name("planned.json").read_text()) == read_json(planned.file)


def test_an_adopted_plan_stays_adopted_when_its_file_is_gone(planned: Planned, tmp_path: Path) -> None:
    made = planned.plan()
    theirs = json.loads(made.to_json())
    theirs["configurations"]["3d_fullres"]["batch_size"], theirs["stored_as"] = 4, "float32"
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    adopted = planned.plan(plans=tmp_path / "theirs.json")
    assert adopted.configuration("3d_fullres").batch_size == 4 and adopted.stored_as == "float32"
    (tmp_path / "theirs.json").unlink()
    planned.set("2d", batch_size=7)
    again = planned.plan(batch_size=6)
    assert [again.configuration(name).batch_size for name in ("2d", "3d_fullres")] == [7, 6]
    assert planned.copies == []
    assert planned.plan(preset="default").configuration("2d") == made.configuration("2d")
    assert planned.copies == ["plans_1.json"], "the adopted plan is nowhere else"


def test_a_spacing_beats_an_adopted_plan_and_edits_and_ends_with_the_option_in_plans_json(
    planned: Planned, tmp_path: Path
) -> None:
    made = planned.plan()
    (tmp_path / "theirs.json").write_text(made.to_json())
    planned.plan(plans=tmp_path / "theirs.json")
    coarse = planned.plan(spacing=2)
    assert coarse.options is not None and coarse.options.adopted is None
    assert coarse.configuration("3d_fullres").spacing == (2, 2, 2)
    planned.set("3d_fullres", batch_size=7)
    assert planned.plan().configuration("3d_fullres").batch_size == 7, "replanning keeps edits and the spacing"
    assert planned.plan(spacing=2).configuration("3d_fullres").batch_size != 7
    planned.edit(lambda content: content["options"].update(spacing=None))
    assert planned.plan().trains_as(made)


def test_a_spacing_for_which_labels_are_too_small_or_images_too_coarse_warns(planned: Planned) -> None:
    """Each half of these hippocampi has about 1550 mm3."""
    planned.plan(spacing=2)
    assert "warning: the spacing" not in planned.said()
    planned.plan(spacing=(9, 9, 9))
    said = planned.said()
    assert "warning: the spacing may lose labels; voxels that their median component would have: Anterior 2." in said
    planned.plan(spacing=(0.4, 1, 1))
    assert "warning: the spacing is finer than half of the data's (0.4 mm for 1 mm)" in planned.said()


def test_options_that_no_longer_fit_are_refused_with_the_file_that_records_them(planned: Planned) -> None:
    planned.plan()
    planned.edit(lambda content: content["options"].update(sizes={"3d_lowres": {"batch_size": 4}}))
    with pytest.raises(UserError, match=r"no configuration '3d_lowres'.*`nnlite plan` keeps its options here: give"):
        planned.plan()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"store": "float8"}, "stored_as: .*found 'float8'"),
        ({"clip_percentiles": (-1, 50)}, "clip_percentiles.0: .*greater than or equal to 0"),
        ({"clip_percentiles": (99, 99)}, "clip_percentiles: must be two numbers, the lower first"),
        ({"patch_size": (0, 8, 8)}, "patch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"memory": 0}, "not positive"),
        ({"spacing": 0}, r"spacing.0: Input should be greater than 0 \(found 0\)"),
        ({"spacing": (1, 2)}, "2 numbers for images with 3 axes"),
        ({"spacing": (1, 1, 1, 1)}, "spacing: must be one length in mm, or one for each axis"),
        ({"spacing": 80}, "leaves no voxel along"),
        ({"spacing": 2, "plans": "x.json"}, "--plans has a spacing of its own"),
    ],
)
def test_illegal_options_are_refused_and_nothing_is_written(
    planned: Planned, options: dict[str, Any], says: str, counts: Counts
) -> None:
    with pytest.raises(UserError, match=says):
        planned.plan(**options)
    assert not planned.file.exists()
    counts("bad inputs refused in one line")


def test_images_stay_as_stored_for_models_of_an_older_nnlite(planned: Planned, tiny_model: Path) -> None:
    """Its plan has no orientation and no options; a model that was begun with it must still be trained further."""

    def as_before(content: dict[str, Any]) -> None:
        del content["orientation"], content["options"]

    def write_as_before() -> None:
        planned.as_of_an_older_nnlite()
        planned.edit(as_before)
        taken = planned.file.with_name("fingerprint.json")
        old = {key: value for key, value in read_json(taken).items() if not key.startswith("orientation")}
        taken.write_text(json.dumps(old))

    assert planned.plan().orientation == "RAS"
    write_as_before()
    assert planned.plan().orientation == "RAS", "without a model the images are turned from now on"
    assert planned.copies == ["plans_1.json"]
    write_as_before()
    shutil.copytree(tiny_model, planned.file.parent / "models" / "tiny")
    again = planned.plan()
    assert again.orientation is None and Plan.read(planned.file).orientation is None
    assert "images are not turned to one orientation, because models of this dataset were trained" in planned.said()
    assert planned.copies == ["plans_1.json"]


def test_an_edited_spacing_keeps_its_shape_patch_and_batch_with_a_warning(planned: Planned) -> None:
    made = planned.plan().configuration("3d_fullres")
    planned.set("3d_fullres", spacing=[1, 1, 1.004])
    assert planned.plan() and "at which the median image has" not in planned.said(), "it is a rounded spacing"
    planned.set("3d_fullres", spacing=[2, 1, 1])
    planned.set("mine", inherits_from="2d", spacing=[0.5, 0.5])
    shape = " x ".join(str(round(n / step)) for n, step in zip(made.median_shape, (2, 1, 1), strict=True))
    said = f"3d_fullres has a spacing of 2 x 1 x 1 mm, at which the median image has about {shape} voxels, and still "
    log.warn_once.cache_clear()
    nnunet_lite.preprocess("2d", workspace=planned.file.parents[1], workers=0)
    first = planned.said()
    assert said in first and "mine has a spacing of 0.5 x 0.5 mm" in first
    log.warn_once.cache_clear()
    assert planned.plan().configuration("3d_fullres").patch_size == made.patch_size and said in planned.said()
    shapes = {"3d_fullres": [18, 52, 36], "mine": [104, 72]}
    for name, found in shapes.items():
        planned.set(name, median_shape=found)
    log.warn_once.cache_clear()
    planned.plan()
    assert "at which the median image has" not in planned.said()


def test_models_of_the_former_plan_are_named_unless_only_names_of_labels_change(
    planned: Planned, tiny_model: Path
) -> None:
    planned.plan()
    shutil.copytree(tiny_model, planned.file.parent / "models" / "tiny")
    table = planned.raw / "dataset.json"
    table.write_text(table.read_text().replace("Anterior", "front"))
    assert planned.plan().labels.region_names == ("front", "Posterior") and "former plan" not in planned.said()
    planned.plan(preset="resenc_m")
    assert "warning: models trained so far belong to the former plan: tiny; they can predict" in planned.said()


def test_a_configuration_follows_what_it_inherits_and_the_change_is_reported(planned: Planned) -> None:
    planned.plan(preset="resenc_m")
    planned.set("mine", **MINE)
    mine = planned.plan(preset="default").configuration("mine")
    said = planned.said()
    assert mine.network.kind == "plain" and mine.batch_size == 3
    assert "edits that are kept: mine (added)" in said and "; mine (kind residual -> plain, " in said
    assert planned.copies == []
