"""Messages and bars: a message never breaks a bar, and nothing is printed where there is nowhere to print."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def on_a_terminal(code: str) -> str:
    """What a program writes to a terminal that is its standard output and error."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 4096):
            written += part
    except OSError:  # the last one on the other side has gone
        pass
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def shown(written: str) -> list[str]:
    """The lines as a terminal shows them: what follows a carriage return overwrites."""
    lines = []
    for line in written.replace("\r\n", "\n").replace("\x1b[A", "").split("\n"):  # the cursor up, to another bar
        screen: list[str] = []
        for part in line.split("\r"):
            screen[: len(part)] = part
        lines.append("".join(screen).rstrip())
    return lines


def test_a_message_stands_on_a_line_of_its_own_above_the_bar() -> None:
    code = (
        "import time\n"
        "from nnunet_lite import log\n"
        "for i in log.progress(range(6), 6, 'predict'):\n"
        "    time.sleep(0.12)\n"
        "    if i == 2: log.info('sums in float32')\n"
        "    if i == 3: log.warn('case_003: ' + 'a long line ' * 12)\n"
        "    if i == 4: log.answer('{\"result\": 1}')\n"
        "log.info('done')\n"
    )
    written = on_a_terminal(code)
    assert "predict:  50%" in written and "6/6" in written
    lines = [line for line in shown(written) if line]
    assert lines == [
        "sums in float32", "warning: case_003: " + ("a long line " * 12).rstrip(), '{"result": 1}', "done",
    ]  # fmt: skip


def test_messages_in_threads_leave_two_bars_whole() -> None:
    code = (
        "import time, threading\n"
        "from nnunet_lite import log\n"
        "def speak():\n"
        "    for i in range(20): log.info(f'message {i}'); time.sleep(0.01)\n"
        "thread = threading.Thread(target=speak)\n"
        "for i in log.progress(range(3), 3, 'outer'):\n"
        "    if i == 1: thread.start()\n"
        "    for _ in log.progress(range(5), 5, 'inner'): time.sleep(0.05)\n"
        "thread.join()\n"
    )
    lines = shown(on_a_terminal(code))
    assert [line for line in lines if "message" in line] == [f"message {i}" for i in range(20)]


@pytest.mark.parametrize("lost", ["None", "open(os.devnull, 'w')"])
def test_without_standard_streams_a_program_works_silently(tiny_model: Path, hippocampus: Path, lost: str) -> None:
    """As under pythonw, or where they were closed: messages must not go to the other stream either."""
    image = min((hippocampus / "imagesTs").iterdir())
    code = (
        f"import os, sys; sys.stderr = {lost}; lost = sys.stderr\n"
        "if lost is not None: lost.close()\n"
        "import nnunet_lite, tempfile\n"
        "from nnunet_lite import log\n"
        "out = tempfile.mkdtemp()\n"
        f"found = nnunet_lite.predict({str(image)!r}, out, model={str(tiny_model)!r}, device='cpu')\n"
        "assert list(log.progress([1, 2], 2, 'x')) == [1, 2]; log.last('x')\n"
        "print(len(found.files), found.failed)\n"
        "sys.stdout = None; log.answer('x')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 {}\n", "")
