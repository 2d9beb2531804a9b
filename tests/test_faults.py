"""What goes wrong on real machines: a kill, a full disk, a damaged file, two processes at once, folders of others.

Nothing is lost and no partial file is used: the same command resumes, with the result of an undisturbed run.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from bad_inputs import copy_workspace
from safetensors.numpy import load_file
from samples import ENVIRONMENT, HIPPOCAMPUS, Command, Counts, Forked, first_cases, rewrite_nifti, wait_until

TINY = [
    f"--set={assignment}"
    for assignment in (
        "training.iterations=3", "training.validation_iterations=1", "training.patch_size=[24,32,24]",
        "training.batch_size=2", "training.precision=fp32", "training.channels_last=false",
        "network.features_base=4", "network.features_max=8", "inference.mirroring=false", "inference.step_size=1.0",
    )
]  # fmt: skip
WORK = ["run", "raw", "--recipe=default", "-c3d_fullres", "-f0,1", "--epochs=3", "--seed=1", "--device=cpu", *TINY]
TRAIN = ["train", "3d_fullres", "0", "--name", "new", "--epochs", "2", "--seed", "1", "--device", "cpu", *TINY]


def ended(process: Forked) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err, err
    return process.returncode, out, err


# ------------------------------------------------------------------------------------------------------------- kills


def results(workspace: Path) -> dict[str, Any]:
    """What a run leaves that must not depend on when it was stopped: weights, label maps, scores, plans, folds."""
    found: dict[str, Any] = {}
    for file in sorted(workspace.rglob("*")):
        name = str(file.relative_to(workspace))
        if file.name == "model.safetensors":
            found |= {f"{name} {key}": value for key, value in load_file(file).items()}
        elif file.name.endswith(".nii.gz"):
            found[name] = np.asarray(nibabel.load(file).dataobj)
        elif file.name in ("plans.json", "splits.json", "fingerprint.json"):
            found[name] = json.loads(file.read_text())
        elif file.name == "summary.json":
            found[name] = json.loads(file.read_text())["foreground_mean"]
    return found


def same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody killed, and its seconds."""
    place = tmp_path_factory.mktemp("undisturbed")
    first_cases(place / "raw", 6)
    begin = time.monotonic()
    code, _, err = ended(Forked(*WORK, cwd=place))
    assert code == 0, err
    return place, time.monotonic() - begin


def survive(place: Path, undisturbed: tuple[Path, float], kills: int, seed: int) -> int:
    """Kill a run at random moments and begin it again, until it ends by itself; the number of kills."""
    first_cases(place / "raw", 6)
    expected, seconds = undisturbed
    moments, killed = random.Random(seed), 0
    while True:
        process = Forked(*WORK, cwd=place)
        try:
            if killed < kills:
                process.communicate(moments.uniform(0.05, 1.0) * seconds * 0.8)
            code, _, err = ended(process)
            assert code == 0, err
            if killed >= kills:
                break
            shutil.rmtree(place / "nnlite_workspace")  # it was done before all kills: once more
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
    left, wanted = results(place / "nnlite_workspace"), results(expected / "nnlite_workspace")
    assert left.keys() == wanted.keys() and any(name.endswith(".nii.gz") for name in left)
    assert not [name for name in wanted if not same(left[name], wanted[name])]
    return killed


@pytest.mark.slow  # one kill of such a run is in test_run.py
def test_twenty_kills(tmp_path: Path, undisturbed: tuple[Path, float], counts: Counts) -> None:
    counts("kills survived", 20)
    assert survive(tmp_path, undisturbed, 20, seed=20) == 20


# --------------------------------------------------------------------------------------------------------- disk full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let its tests mount a disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Leave so many bytes free."""
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(0, free - leave)))
    return disk / "ballast"


MODEL = "nnlite_workspace/Task04_Hippocampus/models/tiny"
SCAN = HIPPOCAMPUS / "imagesTr" / "hippocampus_001.nii.gz"
PREDICT = ["predict", "-i", str(SCAN), "-o", "out", "-m", MODEL]
SCORE = ["evaluate", f"{MODEL}/fold_0/validation", str(HIPPOCAMPUS / "labelsTr"), "--output", "scores/all.json"]
ZIP, THEIRS = ["export", "model.zip", "-m", MODEL], ["export", "-o", "theirs", "--format", "nnunet", "-m", MODEL]
MAPS = [*PREDICT, "--save-probabilities"]
FULL = [
    (["plan", "raw"], 0), (["plan", "raw"], 70_000), (["preprocess", "3d_fullres"], 150_000),
    (["preprocess", "3d_fullres"], 1_000_000), (["preprocess", "3d_fullres"], 1_250_000), (TRAIN, 80_000),
    (TRAIN, 150_000), (PREDICT, 0), (PREDICT, 66_000), (MAPS, 120_000), (MAPS, 190_000), (SCORE, 0), (["select"], 0),
    (["report"], 60_000), (ZIP, 60_000), (THEIRS, 60_000),
]  # fmt: skip


def refused_for_space(code: int, out: str, err: str, words: Sequence[str]) -> str:
    """The one line of a step that had no space: the folder, what is needed, what to do; no case is blamed for it."""
    *before, last = err.splitlines()
    assert code in (1, 2) and last.startswith("error: /"), (code, out, err)
    assert any(word in last for word in words) and " needs " in last.replace(" need ", " needs "), last
    assert "space" in last or "ulimit" in last, last
    assert not [line for line in before if line.startswith(("error", "failed", "Traceback"))], err
    return last


def full_disk(command: Command, tiny_model: Path, disk: Path, step: list[str], room: int) -> bool:
    """Run a step with a number of free bytes, and again with more; whether it lacked space, and said so in one line.

    With space again, the same command ends as it would have.
    """
    tiny_workspace = tiny_model.parents[2]
    for entry in disk.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    copy_workspace(tiny_workspace, disk)
    if step[0] == "plan":
        first_cases(disk / "raw", 5)
    if step[0] == "preprocess":
        shutil.rmtree(disk / "nnlite_workspace" / "Task04_Hippocampus" / "preprocessed")
    ballast = fill(disk, room)
    ended = command(*step, cwd=disk)
    if ended[0]:
        refused_for_space(*ended, ["No space left on device: ", "are free"])
    assert not list(disk.rglob(".tmp*"))
    ballast.unlink()
    if step[0] == "export" and not ended[0]:
        return False  # what is exported already is not exported again
    code, _, err = command(*step, cwd=disk)
    assert code == 0, (step, err)
    assert not list(disk.rglob(".tmp*"))
    if step[0] == "preprocess":
        kept = tiny_workspace / "Task04_Hippocampus" / "preprocessed" / "cases"
        made = disk / "nnlite_workspace" / "Task04_Hippocampus" / "preprocessed" / "cases"
        arrays = [array for array in kept.glob("*/image.b2nd") if (made / array.parent.name).is_dir()]
        assert len(arrays) == 10
        assert all((made / array.parent.name / array.name).read_bytes() == array.read_bytes() for array in arrays)
    return ended[0] != 0


@pytest.mark.parametrize(("step", "room"), FULL, ids=[f"{step[0]} {room}" for step, room in FULL])
def test_full_disk(
    command: Command, tiny_model: Path, small_disk: Path, counts: Counts, step: list[str], room: int
) -> None:
    counts("faults survived")
    assert full_disk(command, tiny_model, small_disk, step, room)


@pytest.mark.slow
@pytest.mark.parametrize("step", [["plan", "raw"], ["preprocess", "3d_fullres"], TRAIN, MAPS, SCORE, ["select"],
                                  ["report"], ZIP, THEIRS], ids=lambda step: step[0])  # fmt: skip
def test_every_fill_level(tiny_model: Path, small_disk: Path, counts: Counts, step: list[str]) -> None:
    """Every 8 kB of free space, up to the one that suffices; in processes, at whose end no file stays open."""

    def command(*arguments: object, cwd: Path) -> tuple[int, str, str]:
        return ended(Forked(*arguments, cwd=cwd))

    room = 0
    while full_disk(command, tiny_model, small_disk, step, room):
        room += 8192
    counts("faults survived", room // 8192)
    assert room > 0


LIMITED = {
    "plan": (["plan", "raw"], 2_000), "preprocess": (["preprocess", "3d_fullres"], 20_000),
    "train": (TRAIN, 20_000), "predict": (PREDICT, 2_000),
    "maps": ([*PREDICT, "--save-probabilities"], 4_000), "evaluate": (SCORE, 2_000), "report": (["report"], 4_000),
    "export": (ZIP, 4_000), "export for nnU-Net": (THEIRS, 4_000),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITED)
def test_a_limit_for_files(command: Command, tiny_model: Path, tmp_path: Path, counts: Counts, name: str) -> None:
    """The same by `ulimit -f`, which needs no rights: a file is cut short as on a full disk, and none is taken."""
    step, limit = LIMITED[name]
    root = copy_workspace(tiny_model.parents[2], tmp_path)
    if step[0] == "plan":
        first_cases(tmp_path / "raw", 10)
    if step[0] == "preprocess":
        shutil.rmtree(root / "preprocessed")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        ended = command(*step, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    counts("faults survived")
    refused_for_space(*ended, ["File too large: "])
    assert not list(tmp_path.rglob(".tmp*"))
    code, _, err = command(*step, cwd=tmp_path)
    assert code == 0, err


# ------------------------------------------------------------------------------------------------------ damaged files


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def case_file(name: str) -> Callable[[Path], Path]:
    return lambda root: sorted(root.glob(f"preprocessed/cases/*/{name}"))[0]


def index_file(root: Path) -> Path:
    return next(root.glob("preprocessed/3d_fullres-*.json"))


DAMAGED = {
    f"{kind.__name__} {name}": (kind, find)
    for kind in (cut, flip, Path.unlink)
    for name, find in {
        "an image": case_file("image.b2nd"),
        "a label map": case_file("label.b2nd"),
        "foreground voxels": case_file("foreground.npy"),
        "the description": case_file("case.json"),
        "the index": index_file,
        "what is known of the raw files": lambda root: root / "preprocessed" / "raw.json",
    }.items()
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_array(command: Command, tiny_workspace: Path, tmp_path: Path, counts: Counts, name: str) -> None:
    """What is damaged is made again, and only that."""
    counts("faults survived")
    damage, find = DAMAGED[name]
    root = copy_workspace(tiny_workspace, tmp_path)
    file = find(root)
    before = file.read_bytes()
    damage(file)
    if name == "flip an image":  # a moment later than the file that says what it was
        os.utime(file)
    code, out, err = command("preprocess", "3d_fullres", "--json", cwd=tmp_path)
    assert code == 0, err
    assert json.loads(out)["made"] == ("case" in str(file.parent.parent.name) or 0)
    assert file.read_bytes() == before or file.name == "case.json"


def test_changed_label(command: Command, tiny_workspace: Path, tmp_path: Path, counts: Counts) -> None:
    """A label map that was changed since redoes one case."""
    counts("faults survived")
    root = copy_workspace(tiny_workspace, tmp_path)
    first_cases(tmp_path / "raw", 6)
    table = json.loads((root / "dataset.json").read_text())
    label = tmp_path / "raw" / "labelsTr" / Path(table["dataset"][0]["label"]).name
    rewrite_nifti(label, lambda array: np.where(np.arange(array.size).reshape(array.shape) == 0, 1, array))
    table["dataset"][0]["label"] = str(label)
    (root / "dataset.json").write_text(json.dumps(table))
    code, out, err = command("preprocess", "3d_fullres", "--json", cwd=tmp_path)
    assert code == 0 and json.loads(out)["made"] == 1, err


@pytest.mark.parametrize("damage", [cut, flip])
def test_damaged_checkpoint(
    command: Command, tiny_model: Path, tmp_path: Path, counts: Counts, damage: Callable[[Path], None]
) -> None:
    """Named in one line with what to do; a flipped weight is found by the checksum."""
    counts("faults survived")
    root = copy_workspace(tiny_model.parents[2], tmp_path)
    code, _, err = command(*TRAIN, cwd=tmp_path)
    assert code == 0, err
    checkpoint = root / "models" / "new" / "fold_0" / "checkpoint.safetensors"
    damage(checkpoint)
    code, out, err = command(*[*TRAIN[:5], "--epochs", "3", *TRAIN[7:]], cwd=tmp_path)
    assert (code, out) == (2, ""), err
    assert err.splitlines()[-1].startswith(f"error: {checkpoint}: ") and "--restart" in err.splitlines()[-1]


# ------------------------------------------------------------------------------------------- two at once, and others


def test_two_preprocess_one_data_set(tiny_workspace: Path, tmp_path: Path, counts: Counts) -> None:
    """The second waits, and finds the work done."""
    counts("faults survived")
    root = copy_workspace(tiny_workspace, tmp_path)
    shutil.rmtree(root / "preprocessed")
    both = [Forked("preprocess", "3d_fullres", "--json", cwd=tmp_path) for _ in range(2)]
    codes, made = zip(*[(code, json.loads(out)["made"]) for code, out, _ in map(ended, both)], strict=True)
    assert codes == (0, 0) and sorted(made) == [0, 10]
    assert len(list((root / "preprocessed" / "cases").iterdir())) == 10


def test_two_train_one_fold(
    command: Command, tiny_workspace: Path, tiny_model: Path, tmp_path: Path, counts: Counts
) -> None:
    """The second is refused, or comes after; two folds train side by side."""
    counts("faults survived", 2)
    root = copy_workspace(tiny_workspace, tmp_path)
    fold = root / "models" / "new" / "fold_0"
    process = Forked(*TRAIN, cwd=tmp_path)
    wait_until((fold / ".lock").is_file, process)
    second, beside = (command(*TRAIN[:2], number, *TRAIN[3:], cwd=tmp_path) for number in "01")
    both = [ended(process), second]
    assert sorted(code for code, _, _ in both) in ([0, 0], [0, 2])
    assert all("another process is training here" in err for code, _, err in both if code == 2)
    assert beside[0] == 0
    assert len((fold / "metrics.jsonl").read_text().splitlines()) == 2
    assert (root / "models" / "new" / "fold_1" / "model.safetensors").is_file()
    contended, alone = (load_file(path / "model.safetensors") for path in (fold, tiny_model / "fold_0"))
    assert all(np.array_equal(contended[name], alone[name]) for name in alone)


def test_two_predict_into_one_folder(
    command: Command, tiny_model: Path, hippocampus: Path, tmp_path: Path, counts: Counts
) -> None:
    """Label maps are whole, whoever wrote them last."""
    counts("faults survived")
    shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("001", "008"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(hippocampus / "imagesTr" / f"hippocampus_{name}.nii.gz", tmp_path / "in")
    arguments = ["predict", "-i", "in", "-m", "model", "--no-mirroring", "--device", "cpu", "-o"]
    process = Forked(*arguments, "out", cwd=tmp_path)
    wait_until((tmp_path / "out").is_dir, process)
    assert [command(*arguments, out, cwd=tmp_path)[0] for out in ("out", "alone")] == [0, 0]
    assert ended(process)[0] == 0
    for file in (tmp_path / "alone").glob("*.nii.gz"):
        assert gzip.decompress((tmp_path / "out" / file.name).read_bytes()) == gzip.decompress(file.read_bytes())
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]) == 2
    assert len(list((tmp_path / "out").iterdir())) == 3


COMMANDS = """
import sys
from nnunet_lite import cli
for command in sys.argv[1:]:
    sys.argv = ["nnlite", *command.split()]
    try:
        cli.main()
    except SystemExit as end:
        print("exit code", end.code or 0)
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, to be someone else")
def test_inputs_that_may_only_be_read(tiny_model: Path, hippocampus: Path, tmp_path: Path, counts: Counts) -> None:
    """Data set, model and images belong to someone else: planning, preprocessing and predicting write elsewhere.

    A file that may not be read is a line of the check, beside its other problems. A folder that may not be written is
    named, before long work, and no temporary file in it.
    """
    counts("faults survived", 4)
    first_cases(tmp_path / "raw", 6)
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns(".lock"))
    theirs = copy_workspace(tiny_model.parents[2], tmp_path / "theirs")
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.chown(mine, 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents):  # others may pass to get there
        if folder.stat().st_uid == 0 and folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o055)
    subprocess.run(["chmod", "-R", "a+rX,a-w", *(tmp_path / name for name in ("raw", "model", "theirs"))], check=True)
    shutil.copytree(tmp_path / "raw", tmp_path / "hidden")
    for file in ("imagesTr/hippocampus_001.nii.gz", "labelsTr/hippocampus_008.nii.gz"):
        (tmp_path / "hidden" / file).chmod(0)
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", COMMANDS]
    image = tmp_path / "raw" / "imagesTr" / "hippocampus_001.nii.gz"
    commands = ("plan ../raw", "preprocess 3d_fullres", f"predict -i {image} -o out -m ../model --no-mirroring")
    commands += ("check ../hidden",)
    refused = {
        "plan ../raw -w ../model": tmp_path / "model",
        f"plan ../raw -w new --output {tmp_path}/raw/new/p.json": tmp_path / "raw",
        f"predict -i {image} -o ../raw/out -m ../model": tmp_path / "raw",
        f"predict -i {image} -o ../raw/out.nii.gz -m ../model": tmp_path / "raw",
        "evaluate ../raw/labelsTr ../raw/labelsTr --output ../raw/new/scores.csv": tmp_path / "raw",
        f"report -w {theirs.parent}": theirs,
        f"train 3d_fullres 1 -w {theirs.parent}": theirs / "models",
        "export ../raw/model.zip -m ../model": tmp_path / "raw",
        "export -o ../raw/nnunet --format nnunet -m ../model": tmp_path / "raw",
    }
    commands += tuple(refused)
    who = {**ENVIRONMENT, "HOME": str(mine)}
    done = subprocess.run([*as_nobody, *commands], cwd=mine, env=who, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("exit code 0\n")) == (0, 3) and "Traceback" not in done.stderr, done
    assert (mine / "out" / image.name).is_file()
    hidden = "imagesTr/hippocampus_001.nii.gz, labelsTr/hippocampus_008.nii.gz: cannot be opened (Permission denied)."
    assert f"error: {hidden} [unreadable]\n" in done.stdout
    assert done.stdout.count("exit code 2\n") == 1 + len(refused)
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error", "failed"))]
    assert not [line for line in errors if ": is read-only for you. " not in line]
    named = [line.removeprefix("error: ").partition(": ")[0] for line in errors]
    assert [Path(folder).resolve() for folder in named] == [folder.resolve() for folder in refused.values()]
