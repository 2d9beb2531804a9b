"""Messages and bars: a message never breaks a bar, and nothing is printed without standard streams."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from samples import ENVIRONMENT, FAST, Copy

import nnunet_lite
from nnunet_lite import log

ABOVE_A_BAR = """
import time
from nnunet_lite import log
for i in log.progress(range(6), 6, 'predict'):
    time.sleep(0.12)
    if i == 2: log.info('sums in float32')
    if i == 3: log.warn('case_003: ' + 'a long line ' * 12)
    if i == 4: log.answer('{"result": 1}')
log.info('done')
"""
IN_A_THREAD = """
import time, threading
from nnunet_lite import log
def speak():
    for i in range(20): log.info(f'message {i}'); time.sleep(0.01)
thread = threading.Thread(target=speak)
for i in log.progress(range(3), 3, 'outer'):
    if i == 1: thread.start()
    for _ in log.progress(range(5), 5, 'inner'): time.sleep(0.05)
thread.join()
"""
SIGNS = """
import time
from nnunet_lite import log
log._SECONDS_BETWEEN_LINES, log._SECONDS_BETWEEN_SIGNS = 0.3, 0.05
with log.working('fold', 3) as advance:
    time.sleep(0.5)
    advance(1)
    log.info('message')
    list(log.progress((time.sleep(0.5) for _ in range(1)), 2, 'windows'))
with log.working('predict', 1) as advance: advance(1); time.sleep(0.5)
try:
    with log.working('formats'): time.sleep(0.5); raise ValueError
except ValueError: log.info('an error'); time.sleep(0.5)
"""
EVERY_KIND = """
import sys, warnings
from nnunet_lite import cli, log
log.set_verbosity({verbosity})
warnings.showwarning = cli._show_warning
log.info('a message'); log.detail('a detail'); log.warn('this: warning: stays'); warnings.warn('of a\\nlibrary')
for i in log.progress(range(2), 2, 'steps'): pass
log.answer('case: fine\\nwarning: case_1: thin\\nerror: case_2: no label'); log.error('failed: case_3\\nerror: the end')
"""
DOCTOR = """
import sys
from nnunet_lite import cli
sys.argv[1:] = ['doctor']
try:
    cli.main()
except SystemExit as end:
    assert end.code in (0, 1)  # 1: this machine has a problem
"""
WITHOUT_STREAMS = """
import os, sys, tempfile
closed = open(os.devnull, 'w'); closed.close()
sys.stderr = None
import nnunet_lite
from nnunet_lite import log
for sys.stderr in (None, closed):
    found = nnunet_lite.plan(sys.argv[1], workspace=tempfile.mkdtemp())
    assert list(log.progress([1, 2], 2, 'x')) == [1, 2]; log.error('x')
    print(*found.configurations)
sys.stdout = None; log.answer('x')
"""


def run_on_a_terminal(code: str, size: tuple[int, int] = (24, 80), **variables: str) -> tuple[str, list[str]]:
    """What a program writes to a terminal, and the lines that it shows: text after a carriage return overwrites."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, size)
    environment = ENVIRONMENT | {"TERM": "xterm", "NO_COLOR": ""} | variables
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 4096):
            written += part
    except OSError:  # the process has closed its side
        pass
    os.close(ours)
    assert process.wait() == 0, written.decode()
    lines = []
    for line in written.decode().replace("\r\n", "\n").replace("\x1b[A", "").split("\n"):  # the cursor up, to a bar
        screen: list[str] = []
        for text in line.split("\r"):
            screen[: len(text)] = text
        lines.append("".join(screen).rstrip())
    return written.decode(), [line for line in lines if line]


@pytest.mark.parametrize("size", [(24, 80), (0, 0)])
def test_a_message_is_on_a_line_of_its_own_above_the_bar(size: tuple[int, int]) -> None:
    written, lines = run_on_a_terminal(ABOVE_A_BAR, size)
    assert "predict:  50%" in written and "6/6" in written
    long = "\x1b[33mwarning:\x1b[0m case_003: " + ("a long line " * 12).rstrip()
    assert lines == ["sums in float32", long, '{"result": 1}', "done"]


def test_a_command_shows_a_sign_before_torch_is_imported() -> None:
    written, _ = run_on_a_terminal(DOCTOR)
    assert written.startswith("\rstarting doctor") and "starting" not in written.partition("torch")[2]


def test_messages_in_threads_leave_two_bars_whole() -> None:
    _, lines = run_on_a_terminal(IN_A_THREAD)
    assert [line for line in lines if "message" in line] == [f"message {i}" for i in range(20)]


def test_a_line_appears_when_nothing_was_printed_for_a_while_also_within_a_part() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNS], env=ENVIRONMENT, capture_output=True, text=True)
    lines = [re.sub(r"\d\.\d s", "T", line) for line in done.stderr.splitlines()]
    assert list(dict.fromkeys(lines)) == [  # on a slow machine a line appears twice
        "fold: 0/3, T so far",
        "message",
        "fold: 1/3, T left; windows: 0/2, T so far",
        "predict: 1/1, T so far",
        "formats: T so far",
        "an error",
    ]


def test_a_forked_process_has_a_clock_of_its_own() -> None:
    code = """
import os, time
from nnunet_lite import log
log._SECONDS_BETWEEN_LINES, log._SECONDS_BETWEEN_SIGNS = 0.2, 0.05
with log.working("parent"):
    if os.fork() == 0:
        with log.working("child"): time.sleep(0.5)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == {"parent", "child"}


def test_the_clock_of_a_bar_goes_on_within_a_part() -> None:
    slow = "import time\nfrom nnunet_lite import log\nwith log.working('case', 2): time.sleep(2.7)"
    written, lines = run_on_a_terminal(slow + "\nwith log.working('formats'): time.sleep(1.7)")
    assert "00:01" in written and "00:02" in written and "formats 00:01" in written
    assert lines == []


@pytest.mark.parametrize(
    ("seconds", "words"), [(9.94, "9.9 s"), (187, "3:07 min"), (7500, "2:05 h"), (1.3e6, "15 days"), (1e7, "115 days")]
)
def test_durations(seconds: float, words: str) -> None:
    assert log.duration(seconds) == words


def test_without_standard_streams_a_program_works_silently(copy_dataset: Copy) -> None:
    """As under pythonw, or where they were closed: messages must not go to the other stream either."""
    command = [sys.executable, "-c", WITHOUT_STREAMS, copy_dataset(3)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2d 3d_fullres\n2d 3d_fullres\n", "")


def test_a_prediction_needs_no_standard_error(
    tiny_model: Path, scans: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Path(os.devnull).open("w") as closed:
        pass
    for name, stream in (("none", None), ("closed", closed)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            found = nnunet_lite.predict(scans[0], tmp_path / name, model=tiny_model, device="cpu", settings=FAST)
        assert (len(found.files), found.failed) == (1, {})
    assert capfd.readouterr() == ("", "")


def test_letters_that_a_stream_lacks_are_written_as_numbers() -> None:
    """As of a name on a terminal of another encoding, or of a name that is not UTF-8 text."""
    code = "from nnunet_lite import log; log.answer('caf\\u00e9 \\udce9'); log.warn('5 \\u03bcm')"
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("caf\\xe9 \\udce9\n", "warning: 5 \\u03bcm\n")


def test_errors_are_red_and_warnings_yellow_on_a_terminal_only() -> None:
    code = EVERY_KIND.format(verbosity=0)
    _, lines = run_on_a_terminal(code)
    library = "warning: of a library (UserWarning, <string>:6)"
    plain = ["a message", "warning: this: warning: stays", library, "case: fine", "warning: case_1: thin",
             "error: case_2: no label", "failed: case_3", "error: the end"]  # fmt: skip
    red, yellow, end = "\x1b[31m", "\x1b[33m", "\x1b[0m"
    coloured = {"warning:": f"{yellow}warning:{end}", "error:": f"{red}error:{end}", "failed:": f"{red}failed:{end}"}
    first = [line.split(" ", 1) for line in plain]
    assert lines == [f"{coloured.get(word, word)} {rest}" for word, rest in first]
    for variables in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert run_on_a_terminal(code, **variables)[1] == plain
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, stdout=-1, stderr=subprocess.STDOUT)
    assert done.stdout.decode().splitlines() == plain


@pytest.mark.parametrize("verbosity", ["SILENT", "QUIET", "VERBOSE"])
def test_verbosity(verbosity: str) -> None:
    written, lines = run_on_a_terminal(EVERY_KIND.format(verbosity=f"log.{verbosity}"), NO_COLOR="1")
    assert ("steps" in written) == (verbosity == "VERBOSE")
    end = ["failed: case_3", "error: the end"]
    results = ["case: fine", "warning: case_1: thin", "error: case_2: no label"]
    quiet = ["warning: this: warning: stays", "warning: of a library (UserWarning, <string>:6)", *results]
    if verbosity == "VERBOSE":
        assert [re.sub(r"^\[\d+\.\d s\] ", "", line) for line in lines[:2]] == ["a message", "a detail"]
        assert lines[0] != "a message" and lines[2:] == [*quiet, *end]
    else:
        assert lines == (quiet if verbosity == "QUIET" else []) + end


def test_processes_that_a_process_starts_are_as_quiet() -> None:
    child = "from nnunet_lite import log; log.info('message'); log.warn('careful')"
    start = f"subprocess.run([sys.executable, '-c', {child!r}])"
    code = f"import subprocess, sys; from nnunet_lite import log; log.set_verbosity(log.QUIET); {start}"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "warning: careful\n")
