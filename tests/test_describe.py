"""`nnlite doctor` names what is missing instead of falling over it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from nnunet_lite.commands import doctor as machine

ROOT = Path(__file__).parent.parent


def doctor(folder: Path, *options: str) -> tuple[int, str]:
    """Exit code and output of a doctor that finds the modules in `folder` before all others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "nnunet_lite", "doctor", "--workspace", str(folder), *options]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_the_packages_are_those_of_pyproject() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {entry.partition(">")[0] for entry in told} == set(machine._PACKAGES)


def test_a_missing_package_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PACKAGES", ("numpy", "no-such-package"))
    about = machine.describe_machine(tmp_path)
    assert about.values["packages"] == {"numpy": metadata.version("numpy"), "no-such-package": None}
    assert "no-such-package is not installed: pip install no-such-package" in about.values["problems"]
    assert "no-such-package missing" in about.text and "no problem found" not in about.text
    json.dumps(about.values)


@pytest.mark.parametrize("module", ["torch", "psutil", "numpy"])
def test_a_package_that_cannot_be_imported_does_not_stop_the_doctor(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('libsomething.so is missing')")
    _, out = doctor(tmp_path, "--json")
    about: dict[str, Any] = json.loads(out)
    assert about["cpus"] >= 1
    assert (about["memory_gb"] is None) == (module == "psutil")
    assert (f"{module} cannot be imported: libsomething.so is missing" in about["problems"]) == (module != "numpy")


def test_a_broken_torch_is_told_and_the_exit_code_is_1(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    code, out = doctor(tmp_path)
    assert code == 1
    assert "problem: torch cannot be imported: libcudart.so.12: cannot open shared object file" in out
