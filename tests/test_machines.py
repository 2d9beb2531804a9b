"""`nnlite doctor` names what is missing instead of failing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nnunet_lite.commands.machines import doctor
from nnunet_lite.system import in_units

ROOT = Path(__file__).parent.parent


def run_doctor(folder: Path, *options: str) -> tuple[int, str]:
    """Exit code and output of a doctor that finds the modules in `folder` before all others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "nnunet_lite", "doctor", "--workspace", str(folder), *options]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_missing_package_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["numpy>=1.26", "no-such-package", "no-such-extra>=1; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    about = doctor(workspace=tmp_path)
    assert about.values["packages"] == {"numpy": metadata.version("numpy"), "no-such-package": None}
    assert "no-such-package is not installed: pip install no-such-package" in about.values["problems"]
    assert "no-such-package missing" in about.text and "no problem found" not in about.text and about.exit_code == 1
    json.dumps(about.values)


@pytest.mark.parametrize(("free", "small"), [(9e8, True), (2e9, False)])
def test_a_disk_that_is_nearly_full_is_a_problem(
    free: float, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    about = doctor(workspace=tmp_path)
    problem = f"only 900 MB are free where the workspace is ({tmp_path})"
    assert (problem in about.values["problems"]) == small and f"{in_units(free)} free" in about.text


def test_a_gpu_that_torch_cannot_use_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver counts its GPUs, even where it is too old for this torch."""

    def fail(number: int) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    about = doctor(workspace=tmp_path)
    problem = "torch cannot use the GPU: The NVIDIA driver on your system is too old (found version 11040)."
    assert problem in about.values["problems"] and "GPU     none" in about.text and about.exit_code == 1


@pytest.mark.parametrize("module", ["torch", "psutil", "numpy"])
def test_a_package_that_cannot_be_imported_does_not_stop_the_doctor(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('libsomething.so is missing')")
    code, out = run_doctor(tmp_path, "--json")
    about: dict[str, Any] = json.loads(out)
    assert about["cpus"] >= 1 and {"torch", "numpy", "tqdm"} <= set(about["packages"])
    assert (about["memory_gb"] is None) == (module == "psutil")
    problem = f"{module} cannot be imported: libsomething.so is missing"
    assert (problem in about["problems"]) == (module != "numpy")
    assert code == (1 if about["problems"] else 0)
