"""Shared by all tests: the bundled data set, and broken copies of it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import FAST, HIPPOCAMPUS, TINY, Command, Copy, Counts, as_options, first_cases


def pytest_configure() -> None:
    """Let Ctrl-C end the processes of tests, although a shell lets programs in its background ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # pytest makes syntax trees of all files, in which collections look for garbage for twenty seconds


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_runtest_setup() -> None:
    """Let trainings, which collect garbage three times, not look at what libraries and earlier tests have made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """40 real cases in MSD layout: 32 in imagesTr and labelsTr, 8 in imagesTs and labelsTs. Not to be written to."""
    return HIPPOCAMPUS


@pytest.fixture(scope="session")
def scans(hippocampus: Path) -> list[Path]:
    """Three images without labels."""
    return sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[:3]


@pytest.fixture
def copy_dataset(tmp_path: Path) -> Copy:
    """Make a copy of the first cases that a test may break: copy_dataset(n=5, name="broken")."""

    def copy(n: int = 5, name: str = "broken") -> Path:
        return first_cases(tmp_path / name, n)

    return copy


@pytest.fixture
def copy_nnunet(copy_dataset: Copy) -> Copy:
    """The same in nnU-Net v2 layout (`_0000`, channel_names, file_ending), each image given once per channel."""

    def copy(n: int = 5, channels: tuple[str, ...] = ("T1",), name: str = "broken", **more: Any) -> Path:
        root = copy_dataset(n, name)
        for path in sorted((root / "imagesTr").iterdir()):
            stem = path.name.removesuffix(".nii.gz")
            for number in range(len(channels)):
                shutil.copy(path, path.with_name(f"{stem}_{number:04d}.nii.gz"))
            path.unlink()
        table = {
            "channel_names": {str(i): channel for i, channel in enumerate(channels)},
            "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
            "numTraining": n,
            "file_ending": ".nii.gz",
        }
        (root / "dataset.json").write_text(json.dumps(table | more))
        return root

    return copy


@pytest.fixture(scope="session")
def nnlite() -> Command:
    """The installed command in a process of its own: nnlite("train", "2d", 0, cwd=folder).

    Only what is given counts: the workspace of the person who runs the tests does not. One thread: those of a tiny
    network only wait for each other.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("NNLITE_WORKSPACE", "nnUNet_raw", "PYTHONPATH")}
    environment["OMP_NUM_THREADS"] = "1"

    def run(*arguments: object, cwd: Path) -> tuple[int, str, str]:
        command = [str(Path(sysconfig.get_path("scripts")) / "nnlite"), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The same in the process of the tests, which spares the imports where the process does not matter."""
    from nnunet_lite import cli, log

    def run(*arguments: object, cwd: Path) -> tuple[int, str, str]:
        monkeypatch.delenv("NNLITE_WORKSPACE", raising=False)
        monkeypatch.delenv("nnUNet_raw", raising=False)
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["nnlite", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        log.set_verbosity(log.NORMAL)  # --quiet and --verbose hold for a process
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def tiny_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with ten cases of the hippocampus data planned and preprocessed. Not to be written to."""
    import torch

    import nnunet_lite

    torch.set_num_threads(1)
    raw = tmp_path_factory.mktemp("raw") / "Task04_Hippocampus"
    first_cases(raw, 10)
    workspace = tmp_path_factory.mktemp("workspace")
    nnunet_lite.plan(raw, workspace=workspace, workers=0)
    nnunet_lite.preprocess(["2d", "3d_fullres"], workspace=workspace, workers=0)
    return workspace


@pytest.fixture(scope="session")
def tiny_model(tiny_workspace: Path) -> Path:
    """The folder of a model with a trained and validated fold 0 of `tiny_workspace`. Not to be written to.

    It predicts with the default settings.
    """
    import nnunet_lite

    usual = {key: value for key, value in TINY.items() if not key.startswith("inference.")}
    nnunet_lite.train("3d_fullres", 0, settings=usual, workspace=tiny_workspace, name="tiny", device="cpu")
    return tiny_workspace / "Task04_Hippocampus" / "models" / "tiny"


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> Any:
    """The predictor of `tiny_model` with the settings `FAST`, on the CPU."""
    from nnunet_lite.inference.predictor import load

    return load(tiny_model, device="cpu", settings=FAST)


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_model` that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "models" / "tiny"))


@pytest.fixture
def place(tiny_model: Path, hippocampus: Path, tmp_path: Path) -> Path:
    """A folder with a trained model and an image to predict: model, scan.nii.gz."""
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns(".lock", "validation"))
    shutil.copy(hippocampus / "imagesTr" / "hippocampus_001.nii.gz", tmp_path / "scan.nii.gz")
    return tmp_path


@pytest.fixture(scope="session")
def tiny_plan(tiny_workspace: Path) -> Any:
    """The `Plan` of `tiny_workspace`."""
    from nnunet_lite.planning.schema import Plan

    return Plan.read(tiny_workspace / "Task04_Hippocampus" / "plans.json")


@pytest.fixture(scope="session")
def tiny_cases(tiny_workspace: Path, tiny_plan: Any) -> list[Any]:
    """The ten cases of `tiny_workspace`, preprocessed; both configurations have the same arrays."""
    from nnunet_lite.data.dataset import stored_dataset
    from nnunet_lite.preprocessing.store import open_case
    from nnunet_lite.workspace import planned_paths

    paths = planned_paths(tiny_workspace)
    cases = stored_dataset(paths.dataset).cases
    return [open_case(paths.preprocessed, tiny_plan, "3d_fullres", case.id) for case in cases]


@pytest.fixture(scope="session")
def tiny_report(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `tiny_workspace` with `tiny_model`. Not to be written to."""
    import nnunet_lite

    return nnunet_lite.report(tmp_path_factory.mktemp("report") / "page.html", workspace=tiny_model.parents[2])


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    """Changes to the default recipe that make a run take seconds; with them, a run is the same to the bit each time."""
    return dict(TINY)


@pytest.fixture
def job(tmp_path: Path, tiny_plan: Any, tiny_cases: list[Any], tiny_settings: dict[str, Any]) -> Callable[..., Any]:
    """Make the `Job` of a fold: job(configuration, cases=..., plan=changes, **settings)."""
    import torch

    from nnunet_lite.settings import Settings, with_changes
    from nnunet_lite.training.job import Job, configure_plan

    def make(configuration: str = "3d_fullres", cases: Any = None, plan: Any = None, **changes: Any) -> Job:
        patch = {"training.patch_size": [32, 24]} if configuration == "2d" else {}
        settings = with_changes(Settings(), {**tiny_settings, **patch, "training.batch_size": 5, **changes})
        planned = tiny_plan.model_copy(update=plan or {})
        planned, chosen = configure_plan(planned, configuration, settings), tiny_cases if cases is None else cases
        return Job(planned, configuration, settings, 5, tmp_path, torch.device("cpu"), chosen, chosen)

    return make


@pytest.fixture
def train_three(tmp_path: Path, tiny_workspace: Path, tiny_settings: dict[str, Any]) -> list[str]:
    """The arguments of a training of a batch of three, in `tmp_path`; `samples.fold_of` is where it lands."""
    shutil.copytree(tiny_workspace, tmp_path / "workspace")
    changes = tiny_settings | {"training.batch_size": 3, "training.patch_size": [16, 16, 16]}
    return ["train", "3d_fullres", "0", "-w", str(tmp_path / "workspace"), "--device", "cpu", *as_options(changes)]


@pytest.fixture(scope="session")
def start_browser() -> Iterator[Callable[..., Any]]:
    """Start a headless Chromium with further flags: start_browser("--disable-gpu")."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    flags = ("--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")  # fmt: skip
    with sync_playwright() as playwright:
        yield lambda *more: playwright.chromium.launch(executable_path=program, args=[*flags, *more])


@pytest.fixture(scope="session")
def browser(start_browser: Callable[..., Any]) -> Iterator[Any]:
    """A headless Chromium, which draws WebGL without a GPU."""
    running = start_browser("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
    yield running
    running.close()


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with a number of torch threads: @pytest.mark.parametrize("threads", [2], indirect=True)."""
    import torch  # most tests do without

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def counts(record_property: Callable[[str, object], None]) -> Counts:
    """Something that is counted over all tests: counts("kills survived", 20); its sum is printed at the end."""
    return lambda what, n=1: record_property("counted", [what, n])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests counted, such as "20 of 20 kills survived": of how many that were tried the test passed."""
    tried: dict[str, int] = {}
    held: dict[str, int] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for what, n in (value for name, value in report.user_properties if name == "counted"):
                tried[what] = tried.get(what, 0) + n
                held[what] = held.get(what, 0) + n * (outcome == "passed")
    for what, n in tried.items():
        terminalreporter.write_line(f"{held[what]} of {n} {what}")
