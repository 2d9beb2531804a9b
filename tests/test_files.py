"""Files are complete or do not exist: long names, full disks, kills and signals; JSON that cannot be read."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import Counts
from torch import nn

from nnunet_lite import files
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.data.nifti import write_nifti
from nnunet_lite.errors import UserError
from nnunet_lite.files import append, atomic, cut_short, must_fit, no_space, read_json, scratch, sweep, write_json
from nnunet_lite.inference.folder import array_on_disk
from nnunet_lite.models.checkpoint import load_weights, save_weights
from nnunet_lite.preprocessing.stored_case import compress_array

ROOT = Path(__file__).parents[1]
VOLUME = Geometry((20, 30, 40), (1.0, 1.0, 1.0), calibrated=False)  # a TIFF of it has no sidecar
PICTURE = Geometry((1, 120, 200), (999.0, 1.0, 1.0), dimensions=2)


def noise(geometry: Geometry) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, geometry.shape).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ text and JSON


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.nii.gz"
    for old in ([], ["old"]):
        with pytest.raises(RuntimeError), atomic(path) as temporary:
            assert temporary.name.endswith(".nii.gz")
            temporary.write_text("half")
            raise RuntimeError
        assert [file.read_text() for file in path.parent.iterdir()] == old
        path.write_text("old")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert [file.read_text() for file in path.parent.iterdir()] == ["new"]


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    code = "import pathlib, nnunet_lite.files as f; f.write_text(pathlib.Path('a.json'), '\"L\\xe4sion\"')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], cwd=tmp_path, env=environment, check=True)
    assert read_json(tmp_path / "a.json") == "Läsion"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": 2,\n}', r"a\.json: invalid JSON at line (2|3), column \d+"),
        (b'{"a": "\xff"}', r"a\.json: is not UTF-8 text \(byte 7\)"),
        (None, r"a\.json: no such file"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"é": [1, None]})
    assert read_json(file) == {"é": [1, None]}
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(file) == [1], "a byte order mark is skipped"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(file)


# -------------------------------------------------------------------------------------------------------- long names


@pytest.mark.parametrize("letter", ["x", "é", "脑", "🧠", "e\u0301"])
@pytest.mark.parametrize("suffix", [".json", ".nii.gz", ".png", ".safetensors"])
def test_a_name_may_have_255_bytes(tmp_path: Path, letter: str, suffix: str) -> None:
    path = tmp_path / (letter * ((255 - len(suffix)) // len(letter.encode())) + suffix)
    if suffix == ".json":
        write_json(path, [1])
        assert read_json(path) == [1]
    elif suffix == ".safetensors":
        save_weights(path, nn.Linear(1, 1), {"a": 1})
        assert load_weights(path, nn.Linear(1, 1)) == {"a": 1}
    else:
        geometry = PICTURE if suffix == ".png" else VOLUME
        write_label(path, noise(geometry), geometry)
        assert np.array_equal(read_label(path)[0], noise(geometry))
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------- a limit for files


@contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """As `ulimit -f`: what writes more is cut short, as by a full disk. Needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path], object]] = {
    **{
        f"a.label{suffix}": lambda path: write_label(path, noise(VOLUME), VOLUME)
        for suffix in (".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".mgz")
    },
    **{f"a.label{suffix}": lambda path: write_label(path, noise(PICTURE), PICTURE) for suffix in (".png", ".bmp")},
    "a.map.nii.gz": lambda path: write_shares(path),
    "a.json": lambda path: write_json(path, list(range(10_000))),
    "a.safetensors": lambda path: save_weights(path, nn.Linear(100, 100), {}),
    "a.b2nd": lambda path: write_array(path),
}


def write_array(path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(compress_array(noise(VOLUME), VOLUME.shape, "key"))


def write_shares(path: Path) -> None:
    with atomic(path) as temporary:
        write_nifti(temporary, noise(VOLUME), VOLUME, 1 / 255, path.with_name("image.nrrd"))


@pytest.mark.parametrize("limit", [1, 4096, 10_000, "one less"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_cut_short_is_not_written(tmp_path: Path, counts: Counts, name: str, limit: int | str) -> None:
    """The old file stays, the error says how much is needed; ITK reports nothing of it for most formats."""
    counts("faults survived")
    write, path = WRITERS[name], tmp_path / "in" / name
    write(path)
    before = path.read_bytes()
    with files_of_at_most(len(before) - 1 if isinstance(limit, str) else limit), pytest.raises(OSError) as caught:
        write(path)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path.parent)
    assert f"{name} needs " in str(caught.value.strerror) and "Raise the limit for files" in str(caught.value.strerror)
    assert [file.name for file in path.parent.iterdir()] == [name] and path.read_bytes() == before
    write(path)
    assert path.stat().st_size == len(before)


def test_lines_and_folders_that_do_not_fit(tmp_path: Path, counts: Counts) -> None:
    counts("faults survived", 3)
    with files_of_at_most(100):
        with pytest.raises(OSError, match=r"journal\.jsonl needs about"):
            append(tmp_path / "journal.jsonl", "x" * 200)
        with pytest.raises(OSError, match="each map needs 24 kB") as caught:
            array_on_disk(tmp_path, VOLUME.shape)
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(OSError, match="new needs more than"), scratch(tmp_path) as temporary:  # noqa: SIM117
            with must_fit(tmp_path / "new", temporary):
                (temporary / "a").write_bytes(bytes(200))
    assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]


def test_what_a_full_disk_says(tmp_path: Path) -> None:
    error = no_space(tmp_path, "a.json needs about", 84_000)
    assert error.filename == str(tmp_path)
    assert str(error.strerror).startswith("No space left on device: a.json needs about 84 kB, ")
    assert cut_short(tmp_path / "none") == 0
    with pytest.raises(ValueError, match="something else"), atomic(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ValueError("something else")
    with pytest.raises(OSError, match=r"a needs more than") as caught, atomic(tmp_path / "a"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as a library's own
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- kills, signals


def child(code: str, cwd: Path) -> subprocess.Popen[str]:
    """A process that is writing a file and a folder, as the command `nnlite`."""
    code = (
        "import sys; sys.argv = ['nnlite']\n"
        "import os, pathlib, time, nnunet_lite.files as w\n"
        "here = pathlib.Path()\n"
        "with w.atomic(here / 'a.json') as file, w.scratch(here) as folder:\n"
        "    file.write_text('half'); (folder / 'part').write_text('half'); print('there', flush=True)\n" + code
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup ignores it, and processes inherit that
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    return process


def test_only_temporary_files_of_killed_processes_are_swept(tmp_path: Path, counts: Counts) -> None:
    counts("faults survived", 2)
    foreign, below = tmp_path / ".tmp-of-mine", tmp_path / "below" / ".tmp-01234567-a.json"
    foreign.mkdir()
    below.parent.mkdir()
    below.touch()
    alive, killed = child("    input()", tmp_path), child("    input()", tmp_path)
    assert len(list(tmp_path.glob(".tmp-*"))) == 5
    killed.kill()
    killed.communicate()
    sweep(tmp_path)
    left = [path.name for path in tmp_path.glob(".tmp-*")]
    assert len(left) == 3 and foreign.name in left
    _, err = alive.communicate("\n")
    assert alive.returncode == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {foreign.name, "below", "a.json"} and below.exists()
    sweep(tmp_path / "missing")


def test_the_first_write_into_a_folder_sweeps_it(tmp_path: Path, counts: Counts) -> None:
    counts("faults survived", 2)
    child("    os._exit(1)", tmp_path).communicate()
    assert len(list(tmp_path.glob(".tmp-*"))) == 2
    write_json(tmp_path / "b.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    child("    os._exit(1)", tmp_path).communicate()
    sweep(tmp_path, alone=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("where", ["time.sleep(60)", "[sum(range(1000)) for _ in iter(int, 1)]"])
def test_a_signal_leaves_nothing_temporary(tmp_path: Path, counts: Counts, number: signal.Signals, where: str) -> None:
    """Even in a loop that takes every exception for the fault of one case."""
    counts("faults survived")
    code = f"    while True:\n        try: {where}\n        except Exception: pass"
    process = child(code, tmp_path)
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err == f"stopped by {number.name}; the same command resumes from here\n"
    assert list(tmp_path.iterdir()) == []


def test_maps_have_no_name_while_they_are_made(tmp_path: Path, counts: Counts) -> None:
    """So nothing of them can be left, however the process ends."""
    counts("faults survived")
    array = array_on_disk(tmp_path, (3, 4, 5))
    assert list(tmp_path.iterdir()) == [] and array.shape == (3, 4, 5) and not array.any()
    array[1] = 7
    assert int(array.sum()) == 7 * 20 and torch.from_numpy(array).sum() == 140


def test_files_are_written_without_locks_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked file could not be written there; what a killed process left is deleted only by whoever is alone."""
    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    with files.atomic(tmp_path / "a.json") as temporary, files.scratch(tmp_path) as folder:
        temporary.write_text("1")
        (folder / "b").write_text("2")
        files.sweep(tmp_path)
        assert temporary.exists() and (folder / "b").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / ".tmp-01234567").mkdir()
    files.sweep(tmp_path)
    assert (tmp_path / ".tmp-01234567").exists()
    files.sweep(tmp_path, alone=True)
    assert not (tmp_path / ".tmp-01234567").exists()


def test_waiting_for_a_lock_shows_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files.log, "_SECONDS_BETWEEN_LINES", 0.2)
    with files.locked(tmp_path, "preprocessing"):
        waiting = threading.Thread(target=lambda: files.locked(tmp_path, "preprocessing").__enter__())
        waiting.start()
        time.sleep(1.5)
    waiting.join()
    message, sign, *_ = capfd.readouterr().err.splitlines()
    assert f"another process is preprocessing here ({os.getpid()} on " in message
    assert sign.startswith("waiting for another process: ")


def test_waiting_for_a_lock_is_said_with_quiet_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files.log, "_verbosity", files.log.QUIET)
    with files.locked(tmp_path, "preprocessing"):
        waiting = threading.Thread(target=lambda: files.locked(tmp_path, "preprocessing").__enter__())
        waiting.start()
        time.sleep(0.5)
    waiting.join()
    assert "another process is preprocessing here" in capfd.readouterr().err


def test_only_what_is_known_to_be_read_only_is_refused(tmp_path: Path) -> None:
    files.must_be_writable(tmp_path / "new" / "folder")
    files.must_be_writable(tmp_path / ("x" * 300) / "folder")  # whose state cannot be read: making it says why
    assert not [*tmp_path.iterdir()]


def test_a_link_to_a_disk_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    (tmp_path / "workspace").symlink_to(tmp_path / "disk")
    for folder in (tmp_path / "workspace", tmp_path / "workspace" / "data"):
        with pytest.raises(UserError, match="workspace: is a link to a folder that does not exist"):
            write_json(folder / "a.json", 1)
        with pytest.raises(UserError, match="workspace: is a link to"), files.locked(folder, "training"):
            pass
    assert not (tmp_path / "disk").exists()
