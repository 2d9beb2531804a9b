"""Which files of a workspace a raw dataset has: its own, also where it was moved; never those of another dataset."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from samples import TINIEST

import nnunet_lite
from nnunet_lite.commands.run import next_commands
from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json
from nnunet_lite.models.folder import first_training
from nnunet_lite.planning import fingerprint
from nnunet_lite.preprocessing.raw_files import dataset_paths, reason_to_plan
from nnunet_lite.workspace import Paths, planned_paths

SHORT = {"training.epochs": 1, "training.iterations": 1, "training.patch_size": [16, 16]}


@pytest.fixture
def planned(copy_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A raw dataset called data, in a/, and the workspace in which it is planned."""
    monkeypatch.setattr(fingerprint, "SAMPLES", 100_000)  # to draw 1e8 takes longer than all the rest
    raw = copy_dataset(3, "a/data")
    workspace = raw.parents[1] / "ws"
    nnunet_lite.plan(raw, workspace=workspace, workers=0)
    return raw, workspace


def other_values(raw: Path, what: str = "imagesTr") -> None:
    """Give a dataset the same names, sizes and grids with other voxels."""
    for file in (raw / what).iterdir():
        image = SimpleITK.ReadImage(str(file))
        turned = SimpleITK.GetImageFromArray(np.ascontiguousarray(SimpleITK.GetArrayFromImage(image)[::-1]))
        turned.CopyInformation(image)
        SimpleITK.WriteImage(turned, str(file))


def why(raw: Path, workspace: Path) -> str | None:
    dataset = read_dataset(raw)
    return reason_to_plan(dataset, dataset_paths(workspace, dataset))


def test_the_same_folder_has_its_files_also_when_it_has_grown(planned: tuple[Path, Path]) -> None:
    raw, workspace = planned
    link = raw.parent / "link"
    link.symlink_to(raw.parent)
    for root in (raw, raw / ".." / "data", link / "data"):
        assert dataset_paths(workspace, read_dataset(root)) == Paths(workspace / "data")
    shutil.rmtree(raw / "imagesTr")
    assert dataset_paths(workspace, read_dataset(raw)) == Paths(workspace / "data"), (
        "the check says what is wrong with it"
    )


def test_a_moved_dataset_is_recognised_and_not_planned_again(
    planned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    raw, workspace = planned
    before = Paths(workspace / "data").plans.stat().st_mtime_ns
    new = raw.parents[1] / "b" / "data"
    shutil.copytree(raw, new)  # with new times
    shutil.rmtree(raw)
    capsys.readouterr()
    assert why(new, workspace) is None
    said = capsys.readouterr().err
    assert said == f"{new}: moved here from {raw}, and counts as the dataset data of the workspace {workspace}\n"
    stored = read_json(Paths(workspace / "data").dataset)
    assert stored["root"] == str(new) and stored["dataset"][0]["images"][0].startswith(str(new))
    assert why(new, workspace) is None
    assert capsys.readouterr().err == "", "it is known from now on"
    assert Paths(workspace / "data").plans.stat().st_mtime_ns == before
    nnunet_lite.preprocess(["2d"], workspace=workspace, workers=0)


def test_a_copy_is_the_same_dataset(planned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    raw, workspace = planned
    copy = raw.parents[1] / "b" / "data"
    shutil.copytree(raw, copy)
    capsys.readouterr()
    assert why(copy, workspace) is None
    assert f"{copy}: has the same files as {raw}, and counts as the dataset data" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("gone", [False, True], ids=["there", "gone"])
@pytest.mark.parametrize("known", ["raw.json", "fingerprint.json"])
def test_another_dataset_of_equal_name_and_cases_is_refused(
    planned: tuple[Path, Path], what: str, gone: bool, known: str, counts: Callable[..., None]
) -> None:
    """By the hashes that are recorded, else by the files that are there, else by the grids in the fingerprint."""
    raw, workspace = planned
    other = raw.parents[1] / "b" / "data"
    shutil.copytree(raw, other)
    other_values(other, what)
    if gone:
        shutil.rmtree(raw)
        if what == "labelsTr":
            other_values(other, "imagesTr")
    if known == "fingerprint.json":
        Paths(workspace / "data").raw.unlink()
        if gone:  # only a grid can tell now
            for file in (other / "imagesTr").iterdir():
                image = SimpleITK.ReadImage(str(file))
                image.SetSpacing((1, 1, 2))
                SimpleITK.WriteImage(image, str(file))
    before = Paths(workspace / "data").plans.read_text()
    says = rf"b/data: the workspace .* has another dataset called data, with other files, from {raw}"
    for step in (nnunet_lite.plan, nnunet_lite.run):
        with pytest.raises(UserError, match=says + (", which is gone" if gone else "")):
            step(other, workspace=workspace, workers=0)
    assert Paths(workspace / "data").plans.read_text() == before
    counts("bad inputs refused in one line")


def test_other_cases_are_another_dataset(planned: tuple[Path, Path], copy_dataset: Callable[..., Path]) -> None:
    raw, workspace = planned
    other = copy_dataset(5, "b/data")
    for step in (nnunet_lite.plan, nnunet_lite.run):
        with pytest.raises(UserError, match="another dataset called data, with other files"):
            step(other, workspace=workspace, workers=0)
    shutil.rmtree(raw)
    assert dataset_paths(workspace, read_dataset(other)).name == "data", "it was moved, and has grown"


def test_raw_data_in_the_workspace_are_refused(copy_dataset: Callable[..., Path]) -> None:
    raw = copy_dataset(2, "ws/data")
    with pytest.raises(UserError, match="is itself in the workspace"):
        dataset_paths(raw.parent, read_dataset(raw))


def test_commands_name_the_dataset_where_there_are_several(
    planned: tuple[Path, Path], copy_dataset: Callable[..., Path]
) -> None:
    raw, workspace = planned
    paths = Paths(workspace / "data")
    assert " -d " not in " ".join(next_commands(paths, None, [paths.models / "2d-cpu"])) + first_training(paths)
    nnunet_lite.plan(copy_dataset(2, "other"), workspace=workspace, workers=0)
    assert first_training(paths) == "nnlite train 3d_fullres all -d data"
    assert all(" -d data" in words for words in next_commands(paths, None, [paths.models / "2d-cpu"]))
    with pytest.raises(UserError, match="has 2 planned datasets: data, other"):
        nnunet_lite.preprocess(["2d"], workspace=workspace, workers=0)
    assert nnunet_lite.preprocess(["2d"], dataset="data", workspace=workspace, workers=0).made == 3
    nnunet_lite.run(
        raw, configurations=["2d"], fold=["all"], settings=TINIEST | SHORT, workspace=workspace, device="cpu"
    )
    assert (paths.models / "2d-default" / "fold_all" / "model.safetensors").is_file()
    assert not (workspace / "other" / "models").exists()


# ----------------------------------------------------------------------------------- whether it is planned again


def test_a_file_of_another_time_with_the_same_content_is_not_planned_again(planned: tuple[Path, Path]) -> None:
    raw, workspace = planned
    label = sorted((raw / "labelsTr").iterdir())[0]
    for seconds in (-1e6, 1e8):  # in the past, in the future
        os.utime(label, (label.stat().st_atime + seconds, label.stat().st_mtime + seconds))
        assert why(raw, workspace) is None
        known = read_json(Paths(workspace / "data").raw)[label.name.removesuffix(".nii.gz")]
        assert known["files"][1]["changed"] == label.stat().st_mtime_ns, "it is read once"


def test_a_changed_file_of_the_old_time_and_size_is_planned_again(planned: tuple[Path, Path]) -> None:
    raw, workspace = planned
    image = sorted((raw / "imagesTr").iterdir())[1]
    stat = image.stat()
    other_values(raw)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns - 1))
    assert "has changed since it was planned (" in (why(raw, workspace) or "")


def test_a_file_that_is_gone_is_a_line_of_the_report(
    planned: tuple[Path, Path], capsys: pytest.CaptureFixture[str], counts: Callable[..., None]
) -> None:
    raw, workspace = planned
    plans = Paths(workspace / "data").plans.read_text()
    for what, kind in (("imagesTr", "missing_image"), ("labelsTr", "missing_label")):
        gone = sorted((raw / what).iterdir())[0]
        gone.rename(raw / "aside")
        assert f"({gone} is gone)" in (why(raw, workspace) or "")
        with pytest.raises(UserError, match="1 error must be corrected before planning"):
            nnunet_lite.run(raw, workspace=workspace, workers=0)
        said = capsys.readouterr().err
        assert gone.name in said and f"[{kind}]" in said
        (raw / "aside").rename(gone)
        counts("bad inputs refused in one line")
    assert Paths(workspace / "data").plans.read_text() == plans


def test_why_it_is_planned_again_names_the_cases(
    planned: tuple[Path, Path], copy_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    raw, workspace = planned
    assert why(raw, tmp_path / "new") == "is not planned yet"
    shutil.rmtree(raw)
    copy_dataset(4, "a/data")
    new = [case.id for case in read_dataset(raw).cases][-1]
    assert why(raw, workspace) == f"has changed since it was planned: it also has case {new}"
    Paths(workspace / "data").raw.unlink()
    shutil.rmtree(raw)
    copy_dataset(3, "a/data")
    assert "was planned before raw.json was kept" in (why(raw, workspace) or "")
    assert planned_paths(workspace).name == "data"
