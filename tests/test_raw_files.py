"""Which files of a workspace a raw dataset has, also where it was moved, and whether it is planned again."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from samples import TINIEST, Copy, Counts

import nnunet_lite
from nnunet_lite.commands.run import next_commands
from nnunet_lite.data.dataset import dataset_to_json, read_dataset
from nnunet_lite.data.raw_files import dataset_paths, known_stamps, reason_to_plan
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.models.folder import first_training
from nnunet_lite.planning import fingerprint
from nnunet_lite.workspace import Paths, find_raw, planned_paths

SHORT = {"training.epochs": 1, "training.iterations": 1, "training.patch_size": [16, 16]}
Planned = tuple[Path, Paths]


@pytest.fixture
def planned(copy_dataset: Copy, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """A raw dataset called data, in a/, and its files in the workspace ws/."""
    monkeypatch.setattr(fingerprint, "SAMPLES", 100_000)  # to draw 1e8 takes longer than all the rest
    raw = copy_dataset(3, "a/data")
    nnunet_lite.plan(raw, workspace=raw.parents[1] / "ws", workers=0)
    return raw, Paths(raw.parents[1] / "ws" / "data")


def change_voxels(folder: Path, spacing: tuple[float, float, float] | None = None) -> None:
    """Give the files of a folder other voxels, or another spacing."""
    for file in folder.iterdir():
        image = SimpleITK.ReadImage(str(file))
        changed = SimpleITK.GetImageFromArray(np.ascontiguousarray(SimpleITK.GetArrayFromImage(image)[::-1]))
        changed.CopyInformation(image)
        changed.SetSpacing(spacing or image.GetSpacing())
        SimpleITK.WriteImage(changed, str(file))


def reason(raw: Path, paths: Paths) -> str:
    dataset = read_dataset(raw)
    return reason_to_plan(dataset, dataset_paths(paths.root.parent, dataset)) or ""


def refuse_both(raw: Path, paths: Paths, match: str) -> None:
    """`plan` and `run` refuse a dataset, and keep the plan."""
    before = paths.plans.read_text()
    for step in (nnunet_lite.plan, nnunet_lite.run):
        with pytest.raises(UserError, match=match):
            step(raw, workspace=paths.root.parent, workers=0)
    assert paths.plans.read_text() == before


def test_the_same_folder_has_its_files_also_when_it_has_changed(planned: Planned) -> None:
    raw, paths = planned
    link = raw.parent / "link"
    link.symlink_to(raw.parent)
    for root in (raw, raw / ".." / "data", link / "data"):
        assert dataset_paths(paths.root.parent, read_dataset(root)) == paths
    shutil.rmtree(raw / "imagesTr")
    assert dataset_paths(paths.root.parent, read_dataset(raw)) == paths, "the check reports what is wrong with it"


def test_the_name_of_a_planned_dataset_is_that_of_its_raw_data(planned: Planned) -> None:
    raw, paths = planned
    assert find_raw("data", paths.root.parent) == raw
    shutil.rmtree(raw)
    with pytest.raises(UserError, match="the raw data of 'data' are not there any more"):
        find_raw("data", paths.root.parent)


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "copied"])
def test_a_moved_or_copied_dataset_is_not_planned_again(
    planned: Planned, capsys: pytest.CaptureFixture[str], moved: bool
) -> None:
    raw, paths = planned
    before = paths.plans.stat().st_mtime_ns
    new = raw.parents[1] / "b" / "data"
    shutil.copytree(raw, new)  # with new times
    if moved:
        shutil.rmtree(raw)
    capsys.readouterr()
    assert reason(new, paths) == ""
    what = f"moved here from {raw}" if moved else f"has the same files as {raw}"
    message = f"{new}: {what}, and counts as the dataset data of the workspace {paths.root.parent}\n"
    assert capsys.readouterr().err == message
    stored = read_json(paths.dataset)
    assert stored["root"] == str(new) and stored["dataset"][0]["images"][0].startswith(str(new))
    assert reason(new, paths) == "" and capsys.readouterr().err == "", "its new place is recorded"
    assert paths.plans.stat().st_mtime_ns == before
    nnunet_lite.preprocess(["2d"], workspace=paths.root.parent, workers=0)


@pytest.mark.parametrize("what", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("gone", [False, True], ids=["present", "gone"])
@pytest.mark.parametrize("known", ["raw.json", "fingerprint.json"])
def test_another_dataset_of_equal_name_and_cases_is_refused(
    planned: Planned, what: str, gone: bool, known: str, counts: Counts
) -> None:
    """By the recorded hashes, otherwise by the files, otherwise by the grids in the fingerprint."""
    raw, paths = planned
    other = raw.parents[1] / "b" / "data"
    shutil.copytree(raw, other)
    change_voxels(other / what)
    if gone:
        shutil.rmtree(raw)
        if what == "labelsTr":
            change_voxels(other / "imagesTr")
    if known == "fingerprint.json":
        paths.raw.unlink()
        if gone:  # only the grids differ from what is recorded
            change_voxels(other / "imagesTr", (1, 1, 2))
    where = f"from {raw}{', which is gone' if gone else ''}"
    refuse_both(other, paths, rf"b/data: the workspace .* has another dataset called data, with other files, {where}")
    counts("bad inputs refused in one line")


def test_other_cases_are_another_dataset(planned: Planned, copy_dataset: Copy) -> None:
    raw, paths = planned
    other = copy_dataset(5, "b/data")
    refuse_both(other, paths, "another dataset called data, with other files")
    shutil.rmtree(raw)
    assert dataset_paths(paths.root.parent, read_dataset(other)) == paths, "it was moved, and has more cases"
    with pytest.raises(UserError, match="is itself in the workspace"):
        dataset_paths(other.parent, read_dataset(other))


def test_commands_name_the_dataset_where_there_are_several(planned: Planned, copy_dataset: Copy) -> None:
    raw, paths = planned
    workspace, models = paths.root.parent, [paths.models / "2d-cpu"]
    assert " -d " not in " ".join(next_commands(paths, models)) + first_training(paths)
    nnunet_lite.plan(copy_dataset(2, "other"), workspace=workspace, workers=0)
    assert re.fullmatch("nnlite train 3d_fullres all( --recipe cpu)? -d data -w .*", first_training(paths))
    nnunet_lite.plan(raw, folds=3, workspace=workspace, workers=0)
    assert re.fullmatch("nnlite train 3d_fullres 0( --recipe cpu)? -d data -w .*", first_training(paths))
    assert all(" -d data" in command for command in next_commands(paths, models))
    with pytest.raises(UserError, match="has 2 planned datasets: data, other"):
        nnunet_lite.preprocess(["2d"], workspace=workspace, workers=0)
    assert nnunet_lite.preprocess(["2d"], dataset="data", workspace=workspace, workers=0).made == 3
    options = {"recipe": "default", "settings": TINIEST | SHORT, "workspace": workspace, "device": "cpu"}
    nnunet_lite.run(raw, configurations=["2d"], fold=["all"], **options)
    assert (paths.models / "2d-default" / "fold_all" / "model.safetensors").is_file()
    assert not (workspace / "other" / "models").exists()


# ----------------------------------------------------------------------------------------- whether it is planned again


def test_the_content_of_files_decides_and_not_their_times(planned: Planned) -> None:
    raw, paths = planned
    label = min((raw / "labelsTr").iterdir())
    for seconds in (-1e6, 1e8):  # in the past, in the future
        os.utime(label, (label.stat().st_atime + seconds, label.stat().st_mtime + seconds))
        assert reason(raw, paths) == ""
        known = read_json(paths.raw)[label.name.removesuffix(".nii.gz")]
        assert known["files"][1]["changed"] == label.stat().st_mtime_ns, "it is read once"
    image = min((raw / "imagesTr").iterdir())
    before = image.stat()
    change_voxels(raw / "imagesTr")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns - 1))
    assert "has changed since it was planned (" in reason(raw, paths)


def test_a_file_that_preprocessing_has_read_is_not_read_again(planned: Planned) -> None:
    raw, paths = planned
    label = min((raw / "labelsTr").iterdir())
    os.utime(label, (1e9, 1e9))
    nnunet_lite.preprocess("2d", workspace=paths.root.parent, workers=0)
    stamps = known_stamps(paths)
    assert stamps[label.name.removesuffix(".nii.gz")].files[1].changed == label.stat().st_mtime_ns and len(stamps) == 3
    (paths.preprocessed / "raw.json").write_text("{}")  # as another plan may leave it, while cases are loaded
    assert len(known_stamps(paths)) == 3


@pytest.mark.parametrize(("folder", "kind"), [("imagesTr", "missing_image"), ("labelsTr", "missing_label")])
def test_a_missing_file_is_a_line_of_the_report(
    planned: Planned, capsys: pytest.CaptureFixture[str], counts: Counts, folder: str, kind: str
) -> None:
    raw, paths = planned
    plans, missing = paths.plans.read_text(), min((raw / folder).iterdir())
    missing.unlink()
    assert f"({missing} is gone)" in reason(raw, paths)
    with pytest.raises(UserError, match="1 error must be corrected before planning"):
        nnunet_lite.run(raw, workspace=paths.root.parent, workers=0)
    messages = capsys.readouterr().err
    assert missing.name in messages and f"[{kind}]" in messages
    assert paths.plans.read_text() == plans
    counts("bad inputs refused in one line")


def test_preprocessing_without_a_raw_file_names_it(planned: Planned) -> None:
    raw, paths = planned
    image = read_dataset(raw).cases[0].images[0]
    image.unlink()
    with pytest.raises(UserError, match=f"{image}: does not exist any more. Restore it"):
        nnunet_lite.preprocess("2d", workspace=paths.root.parent, workers=0)


def test_of_raw_data_that_are_gone_the_user_learns_what_to_type_if_they_were_moved(planned: Planned) -> None:
    raw, paths = planned
    nnunet_lite.preprocess("2d", workspace=paths.root.parent, workers=0)
    moved = raw.parent.rename(raw.parents[1] / "elsewhere") / raw.name
    for step in (nnunet_lite.preprocess, lambda **options: nnunet_lite.plan(paths.root.name, **options)):
        with pytest.raises(UserError, match=r"the raw data.* are not there any more") as refused:
            step(workspace=paths.root.parent, workers=0)
        assert refused.value.file == raw and "`nnlite plan` their new folder" in refused.value.fix
    nnunet_lite.plan(moved, workspace=paths.root.parent, workers=0)
    assert nnunet_lite.preprocess("2d", workspace=paths.root.parent, workers=0).made == 0


def test_the_reason_to_plan_again_names_the_cases(planned: Planned, copy_dataset: Copy) -> None:
    raw, paths = planned
    assert reason(raw, Paths(raw.parent / "new" / "data")) == "is not planned yet"
    accepting = replace(read_dataset(raw), accept=("n_cases",), channels=("CT",))
    assert reason_to_plan(accepting, paths) == "was planned with other channels and kinds of --accept"
    shutil.rmtree(raw)
    copy_dataset(4, "a/data")
    new = read_dataset(raw).cases[-1].id
    assert reason(raw, paths) == f"has changed since it was planned: it also has case {new}"
    paths.raw.unlink()
    shutil.rmtree(raw)
    copy_dataset(3, "a/data")
    assert "was planned before raw.json was kept" in reason(raw, paths)
    assert planned_paths(paths.root.parent).name == "data"


def test_a_pipe_in_the_place_of_an_image_is_refused(planned: Planned) -> None:
    """Its content would never end, or never come."""
    raw, paths = planned
    image = min((raw / "imagesTr").iterdir())
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(UserError, match="1 error must be corrected"):
        nnunet_lite.plan(raw, workspace=paths.root.parent, workers=0)


@pytest.mark.parametrize("name", [".hidden", "new\nline", "back\\slash", "a:b", "a" * 81])
def test_a_dataset_has_the_name_of_a_folder(copy_dataset: Copy, tmp_path: Path, name: str) -> None:
    """Such as a zip may contain: otherwise a model of it, after days of training, could not be exported."""
    raw = copy_dataset(2, name)
    for step in (nnunet_lite.plan, nnunet_lite.run):
        with pytest.raises(UserError, match=r"is no name for a dataset.* Rename the folder") as refused:
            step(raw, workspace=tmp_path / "ws", workers=0)
        assert "\n" not in str(refused.value.what)
    assert not (tmp_path / "ws").exists()
    dataset, planned = read_dataset(raw), tmp_path / "ws" / name / "dataset.json"
    write_json(planned, dataset_to_json(dataset))  # by a version that took the name
    assert dataset_paths(tmp_path / "ws", dataset).dataset == planned
