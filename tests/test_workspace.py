"""Names find raw data and planned datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nnunet_lite.errors import UserError
from nnunet_lite.files import write_json, write_text
from nnunet_lite.workspace import find_raw, planned_paths, use, workspace_folder


def make_raw(place: Path, name: str) -> Path:
    (place / name / "imagesTr").mkdir(parents=True)
    return place / name


def make_planned(workspace: Path, name: str, root: Path = Path("nowhere")) -> None:
    write_text(workspace / name / "plans.json", "{}")
    write_text(workspace / name / "fingerprint.json", "{}")
    write_json(workspace / name / "dataset.json", {"root": str(root)})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.delenv("NNLITE_WORKSPACE", raising=False)
    return tmp_path


def test_the_workspace_is_given_or_of_the_environment_or_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace_folder() == here / "nnlite_workspace"
    monkeypatch.setenv("NNLITE_WORKSPACE", str(here / "set"))
    assert workspace_folder() == here / "set"
    assert workspace_folder(Path("given")) == here / "given"


@pytest.mark.parametrize("place", [".", "data", "workspace", "elsewhere"])
def test_the_beginning_of_a_name_finds_raw_data(here: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """In the current folder, ./data, the workspace and nnUNet_raw; a planned dataset of that name is not raw data."""
    monkeypatch.setenv("nnUNet_raw", str(here / "elsewhere"))
    raw = make_raw(here / place, "Task04_Hippocampus")
    if place != "workspace":
        make_planned(here / "workspace", "Task04_Hippocampus")
    for name in ("Task04", "Task04_Hippocampus"):
        assert find_raw(name, here / "workspace") == raw.resolve()


def test_numbers_of_nnunet_find_raw_and_planned_data(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = make_raw(here / "data", "Task04_Hippocampus")
    nuclei = make_raw(here, "Dataset018_Nuclei2D")
    make_raw(here, "Dataset104_Other")
    for number, folder in (("4", raw), ("04", raw), ("004", raw), ("18", nuclei), ("018", nuclei)):
        assert find_raw(number, here / "workspace") == folder.resolve()
    make_planned(here / "workspace", "Task04_Hippocampus")
    make_planned(here / "workspace", "Dataset104_Other")
    assert planned_paths(here / "workspace", "4").name == "Task04_Hippocampus"
    with pytest.raises(UserError, match="no planned dataset called '1'"):
        planned_paths(here / "workspace", "1")
    write_json(here / "workspace" / "Dataset004_Liver" / "models" / "imported" / "run.json", {})
    assert planned_paths(here / "workspace", "4").name == "Task04_Hippocampus", "the other one is not planned"
    with pytest.raises(UserError, match=r"several datasets called '4'\. Give the name: Dataset004_Liver"):
        planned_paths(here / "workspace", "4", needs_plan=False)
    (here / "results" / "Dataset007_Lung").mkdir(parents=True)
    monkeypatch.setenv("nnUNet_results", str(here / "results"))
    with pytest.raises(UserError, match=r"`nnlite import .*/results/Dataset007_Lung`, or `-m "):
        planned_paths(here / "workspace", "7", needs_plan=False)
    monkeypatch.setenv("nnUNet_raw", str(here / "no"))
    with pytest.raises(UserError, match=r"/no \(nnUNet_raw, which does not exist\)"):
        find_raw("7", here / "workspace")
    make_raw(here, "Dataset004_Liver")
    with pytest.raises(UserError, match=r"'4' could be .*Dataset004_Liver, .*Task04_Hippocampus"):
        find_raw("4", here / "workspace")
    assert find_raw(str(make_raw(here, "4").name), here / "workspace") == here / "4", "a folder of that name"


def test_a_folder_that_init_has_searched_is_the_dataset_that_lists_its_files(here: Path) -> None:
    cells = here / "cells"
    cells.mkdir()
    listed = here / "workspace" / "raw" / "cells"
    assert find_raw("cells", here / "workspace") == cells
    write_json(listed / "dataset.json", {"dataset": {"a": {"images": [str(cells / "a.tif")], "label": ""}}})
    for given in ("cells", "./cells", str(cells)):
        assert find_raw(given, here / "workspace") == listed
    (here / "other" / "cells").mkdir(parents=True)
    assert find_raw("other/cells", here / "workspace") == here / "other" / "cells", "it has other files"
    (cells / "images").mkdir()
    assert find_raw("cells", here / "workspace") == listed, "the labels named there would be lost"
    write_json(cells / "dataset.json", {})
    assert find_raw("cells", here / "workspace") == cells, "a dataset itself"


def test_raw_data_that_cannot_be_found(here: Path) -> None:
    first, second = make_raw(here, "Task04_One"), make_raw(here / "data", "Task04_Other")
    make_raw(here, "Task055_Other")
    (here / "scan.nii.gz").touch()
    with pytest.raises(UserError, match=f"'Task04' could be {first}, {second}.*Give the path"):
        find_raw("Task04", here / "workspace")
    assert find_raw("data/Task04_Other", here / "workspace") == second
    with pytest.raises(UserError, match="no dataset 'Task05'"):
        find_raw("Task05", here / "workspace")
    with pytest.raises(UserError, match=r"scan\.nii\.gz: is a file"):
        find_raw("scan.nii.gz", here)


def test_the_only_planned_dataset_is_selected_and_of_several_one_must_be_named(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, fix in (("one", "Run `nnlite plan one` first"), ("two", r"`nnlite plan DATA` first\. .* are one, two")):
        make_raw(here / "raw", name).joinpath("dataset.json").touch()
        with pytest.raises(UserError, match=f"no dataset is planned .*{fix}"):
            planned_paths(here)
    make_planned(here, "Task04_Hippocampus")
    for content in (None, "{", json.dumps({"dataset": "deleted"})):  # of current.json, which is not needed
        if content is not None:
            (here / "current.json").write_text(content)
        for only_reads in (False, True):
            assert planned_paths(here, only_reads=only_reads).name == "Task04_Hippocampus"
    assert planned_paths(here).option == f" -w {here}"
    monkeypatch.setenv("NNLITE_WORKSPACE", str(here))
    assert planned_paths(here).option == ""
    make_planned(here, "Task09_Spleen")
    several = r"has 2 planned datasets: Task04_Hippocampus, Task09_Spleen\. Say which one with -d NAME"
    for only_reads in (False, True):
        with pytest.raises(UserError, match=several):
            planned_paths(here, only_reads=only_reads)
    use(here, "Task09_Spleen")
    with pytest.raises(UserError, match=several):
        planned_paths(here)
    assert planned_paths(here, only_reads=True).name == "Task09_Spleen"
    assert planned_paths(here, "Task04").option == " -d Task04_Hippocampus"
    make_planned(here, "my data")
    assert planned_paths(here, "my data").option == " -d 'my data'"
    shutil.rmtree(here / "my data")
    assert planned_paths(here, "some/where/Task04_Hippocampus").plans == here / "Task04_Hippocampus" / "plans.json"
    with pytest.raises(UserError, match=r"'Task05'.*It holds: Task04_Hippocampus, Task09_Spleen"):
        planned_paths(here, "Task05")


def test_a_folder_that_was_not_planned_is_not_confused_with_one_of_its_name(here: Path) -> None:
    planned, other = make_raw(here / "a", "data"), make_raw(here / "b", "data")
    make_planned(here / "workspace", "data", planned)
    assert planned_paths(here / "workspace", str(planned)) == planned_paths(here / "workspace", "data")
    with pytest.raises(UserError, match=f"b/data: is not planned: the dataset data in .* is from {planned}"):
        planned_paths(here / "workspace", "b/data")
    planned.rename(here / "gone")
    assert planned_paths(here / "workspace", str(other)).name == "data", "it was moved"
