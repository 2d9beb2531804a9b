"""Names find datasets; files are written completely or not at all; a broken JSON file is reported with the place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic, read_json, sweep, write_json, write_text
from nnunet_lite.workspace import find_raw, planned_paths, use, workspace_folder


def make_raw(place: Path, name: str) -> Path:
    (place / name / "imagesTr").mkdir(parents=True)
    return place / name


def make_planned(workspace: Path, name: str) -> None:
    write_text(workspace / name / "plans.json", "{}")
    write_json(workspace / name / "dataset.json", {"root": str(workspace / "nowhere")})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.delenv("NNLITE_WORKSPACE", raising=False)
    return tmp_path


def test_the_workspace_is_what_is_given_else_of_the_environment_else_here(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_an_ambiguous_name_lists_the_folders(here: Path) -> None:
    one, other = make_raw(here, "Task04_One"), make_raw(here / "data", "Task04_Other")
    with pytest.raises(UserError, match=f"'Task04' could be {one}, {other}.*Give the path"):
        find_raw("Task04", here / "workspace")
    assert find_raw("data/Task04_Other", here / "workspace") == other


def test_what_is_no_dataset_is_refused(here: Path) -> None:
    make_raw(here, "Task044_Other")
    with pytest.raises(UserError, match="no dataset 'Task04'"):
        find_raw("Task04", here / "workspace")
    (here / "scan.nii.gz").touch()
    with pytest.raises(UserError, match=r"scan\.nii\.gz: is a file"):
        find_raw("scan.nii.gz", here)


def test_the_only_planned_dataset_is_taken_and_of_several_one_must_be_named(here: Path) -> None:
    with pytest.raises(UserError, match="no dataset is planned"):
        planned_paths(here)
    make_planned(here, "Task04_Hippocampus")
    use(here, "Task04_Hippocampus")
    assert planned_paths(here).name == "Task04_Hippocampus" and planned_paths(here).option == ""
    make_planned(here, "Task09_Spleen")
    use(here, "Task09_Spleen")
    several = r"has 2 planned datasets: Task04_Hippocampus, Task09_Spleen\. Say which one with -d NAME"
    with pytest.raises(UserError, match=several):
        planned_paths(here)
    assert planned_paths(here, only_reads=True).name == "Task09_Spleen"
    assert planned_paths(here, "Task04").option == " -d Task04_Hippocampus"
    assert planned_paths(here, "some/where/Task04_Hippocampus").plans == here / "Task04_Hippocampus" / "plans.json"
    with pytest.raises(UserError, match=r"'Task05'.*It holds: Task04_Hippocampus, Task09_Spleen"):
        planned_paths(here, "Task05")


def test_a_folder_that_was_not_planned_is_not_taken_for_one_of_its_name(here: Path) -> None:
    planned, other = make_raw(here / "a", "data"), make_raw(here / "b", "data")
    make_planned(here / "workspace", "data")
    write_json(here / "workspace" / "data" / "dataset.json", {"root": str(planned)})
    assert planned_paths(here / "workspace", str(planned)) == planned_paths(here / "workspace", "data")
    with pytest.raises(UserError, match=f"b/data: is not planned: the dataset data in .* is from {planned}"):
        planned_paths(here / "workspace", "b/data")
    planned.rename(here / "gone")
    assert planned_paths(here / "workspace", str(other)).name == "data", "it was moved"


def test_atomic_leaves_nothing_behind_when_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file.nii.gz"
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.read_text() for p in path.parent.iterdir()] == ["old"]
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert [p.read_text() for p in path.parent.iterdir()] == ["new"]


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    code = "import pathlib, nnunet_lite.files as f; f.write_text(pathlib.Path('a.json'), '\"L\\xe4sion\"')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], cwd=tmp_path, env=environment, check=True)
    assert read_json(tmp_path / "a.json") == "Läsion"


def test_sweeping_takes_the_leftovers_of_killed_runs_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, nnunet_lite.files as f\n"
        "with f.atomic(pathlib.Path('a.json')) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 1
    leftover = next(tmp_path.iterdir())
    assert leftover.name.startswith(".tmp-")
    below = tmp_path / "below" / leftover.name
    write_text(below, "")
    write_text(tmp_path / "a.json", "whole")
    (tmp_path / ".tmp-folder").mkdir()
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", "below", ".tmp-folder"} and below.exists()
    sweep(tmp_path / "missing")


def test_json_round_trip_and_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"é": [1, None]})
    assert read_json(file) == {"é": [1, None]}
    file.write_text('{"a": 1,\n "b": 2,\n}')
    with pytest.raises(UserError, match=r"a\.json: invalid JSON at line (2|3), column \d+"):
        read_json(file)
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(file) == [1], "a byte order mark is skipped"
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=r"a\.json: is not UTF-8 text \(byte 7\)"):
        read_json(file)
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")


def test_the_only_planned_dataset_needs_no_current_json(tmp_path: Path) -> None:
    """It may have been copied here, or the one planned last was deleted."""
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "plans.json").write_text("{}")
    for content in (None, "{", json.dumps({"dataset": "gone"})):
        if content is not None:
            (tmp_path / "current.json").write_text(content)
        assert planned_paths(tmp_path).root == planned_paths(tmp_path, only_reads=True).root == tmp_path / "A"
    (tmp_path / "B").mkdir()
    (tmp_path / "B" / "plans.json").write_text("{}")
    for only_reads in (False, True):
        with pytest.raises(UserError, match=r"has 2 planned datasets: A, B\. Say which one with -d"):
            planned_paths(tmp_path, only_reads=only_reads)
