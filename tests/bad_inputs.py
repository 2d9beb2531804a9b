"""What the tests of bad input share: one bad input, a place to make it in, and what it means to refuse it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samples import Command


@dataclass(frozen=True)
class Bad:
    """A bad input: how to make it in a folder, the command that meets it, and words that the one line must hold.

    Arguments of the command are separated by blanks.
    """

    make: Callable[[Path], object]
    command: str
    says: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadData:
    """A bad dataset: how to make it in a folder, the file or folder to blame, and words that the line must contain.

    The file "." is the dataset itself.
    """

    make: Callable[[Path], object]
    file: str
    says: tuple[str, ...] = ()


class Evil:
    """Makes a file where it is unpickled by a careless reader."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, ("was_run",)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder with its bytes, links with where they lead; locks, which are empty, do not count."""
    entries = (path for path in folder.rglob("*") if path.name != ".lock" and (path.is_symlink() or path.is_file()))
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in entries
    }


def refuse(bad: Bad, command: Command, place: Path, made_before: Callable[[Path], object] | None = None) -> None:
    """Make a bad input in a folder and run the command on it: one line, exit code 2, and nothing is left behind."""
    bad.make(place)
    before = contents(place)
    code, out, err = command(*bad.command.split(), cwd=place)
    lines = [line for line in err.splitlines() if not line.startswith(("dataset ", "predicting "))]
    assert code == 2, (code, out, err)
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
    assert "Traceback" not in err
    for word in bad.says:
        assert word in lines[0], (word, lines[0])
    left = contents(place)
    assert left == before, sorted(set(left) ^ set(before))


def refuse_dataset(bad: BadData, command: Command, root: Path) -> None:
    """Make a bad dataset and check it: one error line names the file or folder, exit code 2, and nothing is changed."""
    bad.make(root)
    before = contents(root.parent)
    code, out, err = command("check", root.name, cwd=root.parent)
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    warned = [line for line in err.splitlines() if not line.startswith("check: ")]  # a busy machine shows progress
    assert (code, warned) == (2, []) and len(errors) == 1, (code, out, err)
    assert errors[0].startswith(f"error: {root if bad.file == '.' else bad.file}: "), errors
    assert all(word in errors[0] for word in bad.says), errors
    assert contents(root.parent) == before


def copies_of_scan(*names: str) -> Callable[[Path], None]:
    """Copy scan.nii.gz to files of these names."""

    def make(place: Path) -> None:
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(place / "scan.nii.gz", place / name)

    return make


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file: `change` works on its value in place, or returns another one."""
    value = json.loads(file.read_text())
    changed = change(value)
    file.write_text(json.dumps(value if changed is None else changed))


def setting(**values: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a JSON object, for `edit`."""
    return lambda value: value.update(values)


def copy_workspace(workspace: Path, place: Path) -> Path:
    """A workspace to break, as ./nnlite_workspace; returns the folder of its dataset."""
    shutil.copytree(workspace, place / "nnlite_workspace", ignore=shutil.ignore_patterns(".lock"))
    return place / "nnlite_workspace" / "Task04_Hippocampus"
