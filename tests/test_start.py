"""The command at its very beginning: closed standard streams, and Ctrl-C while it imports."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from samples import Copy, Counts, Forked, wait_until

NOT_OF_USERS = ("NNLITE_WORKSPACE", "nnUNet_raw", "PYTHONUNBUFFERED")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in NOT_OF_USERS}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"
NNLITE = shlex.quote(str(Path(sysconfig.get_path("scripts")) / "nnlite"))
AS_MODULE = f"{shlex.quote(sys.executable)} -m nnunet_lite"

# a finder that sends SIGINT to this process as soon as a certain module is looked for, in `sitecustomize`
INTERRUPTS = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("start", "closed"),
    [
        (NNLITE, "2>&-"),
        (NNLITE, ">&- <&-"),
        (NNLITE, "2>/dev/full"),
        (AS_MODULE, "2>&- >&- <&-"),
    ],
)
def test_closed_streams(copy_dataset: Copy, tmp_path: Path, start: str, closed: str) -> None:
    """The command works as if they led to /dev/null: no file that it opens becomes its standard error."""
    command = f"{start} plan {shlex.quote(str(copy_dataset(3)))} --json {closed}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["configurations"] if ">&-" not in closed.split() else done.stdout == ""
    assert ("0 errors" in done.stderr) == ("2>" not in closed)
    stored = tmp_path / "nnlite_workspace" / "broken"
    for name in ("check.json", "dataset.json", "fingerprint.json", "plans.json"):
        json.loads((stored / name).read_text())
    wrong = subprocess.run(f"{start} plan nowhere {closed}", shell=True, cwd=tmp_path, env=ENVIRONMENT)
    assert wrong.returncode == 2


@pytest.mark.parametrize(
    ("at", "number"),
    [("nnunet_lite.log", 2), ("nnunet_lite.cli", 15), ("typer", 2), ("pydantic", 2), ("torch", 2), ("torch.nn", 15)],
)
def test_a_signal_while_the_command_imports(
    tiny_model: Path, hippocampus: Path, tmp_path: Path, counts: Counts, at: str, number: int
) -> None:
    """One line and the shell's exit code, also where a library makes another exception of KeyboardInterrupt."""
    counts("faults survived")
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    image = min((hippocampus / "imagesTs").iterdir())
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path), "INTERRUPT_AT": at, "SIGNAL": str(number)}
    arguments = ["predict", "-i", str(image), "-o", "out", "-m", str(tiny_model), "--device", "cpu"]
    done = subprocess.run(
        [*shlex.split(NNLITE), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (128 + number, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("stopped"), done.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_before_the_command_handles_signals(tmp_path: Path) -> None:
    """It ends without a traceback; Python itself starts before, which nothing can change."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path), "INTERRUPT_AT": "nnunet_lite.errors", "SIGNAL": "2"}
    done = subprocess.run([*shlex.split(NNLITE), "info"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-2, "", "")


def test_a_program_that_imports_the_package_keeps_its_signals() -> None:
    code = (
        "import signal, sys\n"
        "before = [signal.getsignal(n) for n in (2, 15, 1)], sys.unraisablehook\n"
        "import nnunet_lite\n"
        "assert before == ([signal.getsignal(n) for n in (2, 15, 1)], sys.unraisablehook)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    """As by nohup, and for a job in the background of a script."""
    code = (
        "import sys; sys.argv = ['nnlite']\nimport signal, nnunet_lite\nprint(*map(int, map(signal.getsignal, (1, 2))))"
    )
    command = f"trap '' HUP INT; exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    assert subprocess.check_output(["sh", "-c", command], text=True) == "1 1\n"


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_training_is_answered_at_once_and_an_empty_model_is_deleted(
    tiny_workspace: Path, tmp_path: Path, times: int
) -> None:
    """While a fold starts one Ctrl-C ends it; later it ends after the step, and at once if it comes again."""
    workspace = shutil.copytree(tiny_workspace, tmp_path / "workspace", ignore=shutil.ignore_patterns("models"))
    options = ["--device", "cpu", "--set", "training.iterations=100000", *["--recipe", "cpu"] * (times == 2)]
    process = Forked("train", "3d_fullres", "0", *options, "-w", workspace)
    said = Path(f"/proc/{process.pid}/fd/2").read_text
    begin, stopping = "about" if times == 2 else "training 3d_fullres", "SIGINT: stopping after this step; press again"
    wait_until(lambda: f"\n{begin}" in said(), process)
    process.send_signal(signal.SIGINT)
    if times == 2:
        wait_until(lambda: f"\n{stopping} to stop now\n" in said(), process)
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "resumes from" in errors, errors
    assert list(workspace.glob("*/models/*/fold_0")) == [] or times == 2
