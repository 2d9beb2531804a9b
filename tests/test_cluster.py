"""Steps on a real Dask scheduler with two worker processes on this machine, one of which is killed in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest
from bad_inputs import contents
from distributed import Client, LocalCluster
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import TINIEST, Command, Copy, start_fork_server, wait_until

import nnunet_lite
from nnunet_lite import cluster as c
from nnunet_lite.commands.steps import Journal, Step, run_steps
from nnunet_lite.errors import UserError

TINY = {**TINIEST, "training.epochs": 6, "training.iterations": 4, "training.patch_size": [16, 16, 16]}


def label_maps(folder: Path) -> dict[str, bytes | str]:
    """The files of a prediction, without its record, which has times."""
    return {name: content for name, content in contents(folder).items() if name != "predictions.json"}


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Two workers of one thread; one that dies is started again, a task that killed two is given up."""
    start_fork_server()
    as_forks = {"distributed.worker.multiprocessing-method": "forkserver"}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1, **as_forks}),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as local,
    ):
        yield local.scheduler_address


def kill_one(scheduler: str, when: Callable[[], bool], busy: str = "") -> threading.Thread:
    """SIGKILL for a worker, one that has a task of that name, once `when` says so."""

    def work() -> None:
        with Client(scheduler, set_as_default=False) as client:
            until = time.monotonic() + 240
            while not when() and time.monotonic() < until:
                time.sleep(0.005)
            has = client.processing()
            chosen = next(worker for worker, tasks in has.items() if any(busy in task for task in tasks) or not busy)
            os.kill(client.run(os.getpid, workers=[chosen])[chosen], signal.SIGKILL)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.fixture
def workspace(tmp_path: Path, hippocampus: Path) -> Path:
    """A workspace with the 32 cases planned."""
    nnunet_lite.plan(hippocampus, workspace=tmp_path / "ws", workers=0)
    return tmp_path / "ws"


def test_cases_are_made_on_workers_though_one_is_killed(scheduler: str, workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace, tmp_path / "here")
    here = nnunet_lite.preprocess(["3d_fullres"], workspace=tmp_path / "here", workers=0)
    folder = workspace / "Task04_Hippocampus" / "preprocessed"
    killer = kill_one(scheduler, lambda: len(list(folder.glob("cases/[!.]*"))) >= 3, "preprocess")
    there = nnunet_lite.preprocess(["3d_fullres"], workspace=workspace, scheduler=scheduler)
    killer.join()
    assert there.cases == here.cases == {"3d_fullres": 32}
    assert there.stored_bytes == here.stored_bytes
    expected = contents(tmp_path / "here" / "Task04_Hippocampus" / "preprocessed")
    assert contents(folder) == expected
    again = nnunet_lite.preprocess(["3d_fullres"], workspace=workspace, scheduler=scheduler)
    assert (again.made, again.kept) == (0, 32)
    assert not list(workspace.glob(".tmp-cluster-*"))


def test_a_case_that_is_broken_is_named_and_the_others_are_done(
    scheduler: str, copy_dataset: Copy, tmp_path: Path
) -> None:
    root = copy_dataset(5)
    nnunet_lite.plan(root, workspace=tmp_path / "ws", workers=0)
    broken = sorted((root / "imagesTr").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"1 of 5 cases could not be preprocessed") as error:
        nnunet_lite.preprocess(["3d_fullres"], workspace=tmp_path / "ws", scheduler=scheduler)
    assert broken.name.removesuffix(".nii.gz") in str(error.value)
    assert len(list((tmp_path / "ws" / "broken" / "preprocessed").glob("cases/*"))) == 4


@pytest.mark.slow  # test_everything_is_done_on_workers trains there too
def test_folds_train_on_workers_though_one_is_killed(scheduler: str, tiny_workspace: Path, tmp_path: Path) -> None:
    """SIGKILL for the worker of a fold that has a checkpoint: the networks are those that one process trains."""
    # its folds are its own: those of `tiny_model` may be there already
    shutil.copytree(tiny_workspace, tmp_path / "ws", ignore=shutil.ignore_patterns("models", "splits*.json"))
    shutil.copytree(tmp_path / "ws", tmp_path / "here")
    models = tmp_path / "ws" / "Task04_Hippocampus" / "models" / "3d_fullres-default"
    options: dict[str, Any] = {"settings": TINY, "device": "cpu", "folds": 2}
    killer = kill_one(scheduler, (models / "fold_1" / "checkpoint.safetensors").is_file, "train-3d_fullres-fold-1")
    scored = nnunet_lite.train("3d_fullres", "all-folds", scheduler=scheduler, workspace=tmp_path / "ws", **options)
    killer.join()
    assert set(scored.scores) == {"0", "1"}
    rows = [json.loads(line) for line in (models / "fold_1" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 7)), "it resumed where the killed one stopped"
    nnunet_lite.train("3d_fullres", 1, workspace=tmp_path / "here", **options)
    there = load_file(models / "fold_1" / "model.safetensors")
    here = tmp_path / "here" / models.relative_to(tmp_path / "ws") / "fold_1"
    assert all(value.equal(there[key]) for key, value in load_file(here / "model.safetensors").items())


def test_everything_is_done_on_workers(scheduler: str, copy_dataset: Copy, tmp_path: Path) -> None:
    """`nnlite run`, from raw data to what predicts: as without a cluster."""
    raw, ended = copy_dataset(6, name="raw"), {}
    for place, where in (("here", None), ("there", scheduler)):
        ended[place] = nnunet_lite.run(
            raw, configurations=["3d_fullres"], folds=2, settings={**TINY, "training.epochs": 2}, device="cpu",
            recipe="default", workers=0, scheduler=where, workspace=tmp_path / place,
        )  # fmt: skip
    here, there = ([(step.step, step.state) for step in ended[place].steps] for place in ended)
    assert there == here
    assert (tmp_path / "there" / "raw" / "report.html").is_file()
    for fold in range(2):
        name = f"raw/models/3d_fullres-default/fold_{fold}/model.safetensors"
        one, other = (load_file(tmp_path / place / name) for place in ended)
        assert all(one[key].equal(other[key]) for key in one)
    one, other = (json.loads((tmp_path / place / "raw" / "inference.json").read_text()) for place in ended)
    assert one.pop("weights").keys() == other.pop("weights").keys()  # checksums of files, in which seconds are noted
    assert one == other


def test_images_are_predicted_on_workers(
    scheduler: str, tiny_model: Path, hippocampus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The label maps are to the byte those of one process; a relative path is one of this folder."""
    (tmp_path / "in").mkdir()
    for image in sorted((hippocampus / "imagesTs").iterdir())[:3]:
        shutil.copy(image, tmp_path / "in" / image.name)
    (tmp_path / "in" / "broken.nii.gz").write_bytes(b"not an image")
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"model": tiny_model, "device": "cpu", "settings": {"inference.mirroring": False}}
    here = nnunet_lite.predict("in", "here", **options)
    there = nnunet_lite.predict("in", "there", scheduler=scheduler, **options)
    assert len(there.files) == 3
    assert list(there.failed) == list(here.failed) == ["broken"]
    assert label_maps(tmp_path / "there") == label_maps(tmp_path / "here")
    records = [json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("here", "there")]
    here_run, there_run = ({**record["runs"][0], "date": ""} for record in records)
    assert here_run == there_run and len(records[1]["runs"]) == 1
    assert {one["result"] == "written" for one in records[1]["predictions"].values()} == {True, False}
    assert records[0]["predictions"].keys() == records[1]["predictions"].keys()
    assert there.folds == here.folds
    nnunet_lite.predict("in", "none", scheduler=scheduler, **{**options, "device": "cuda:77"})
    record = json.loads((tmp_path / "none" / "predictions.json").read_text())["predictions"]
    assert len(record) == 4 and all("failed" in one["result"] and "cuda:77" in one["result"] for one in record.values())


def test_workers_that_live_on_see_that_a_model_was_trained_again(
    scheduler: str, tiny_model: Path, hippocampus: Path, tmp_path: Path
) -> None:
    image, model = sorted((hippocampus / "imagesTs").iterdir())[0], tmp_path / "model"
    shutil.copytree(tiny_model, model)
    changes = {"inference.mirroring": False}
    nnunet_lite.predict(image, tmp_path / "before", model=model, device="cpu", settings=changes, scheduler=scheduler)
    file = model / "fold_0" / "model.safetensors"
    with safe_open(file, "pt") as content:
        about = {key: text for key, text in content.metadata().items() if key != "checksum"}
    save_file({name: value.neg() for name, value in load_file(file).items()}, file, about)
    nnunet_lite.predict(image, tmp_path / "after", model=model, device="cpu", settings=changes, scheduler=scheduler)
    nnunet_lite.predict(image, tmp_path / "here", model=model, device="cpu", settings=changes)
    assert label_maps(tmp_path / "after") == label_maps(tmp_path / "here") != label_maps(tmp_path / "before")


@pytest.mark.parametrize(
    ("name", "line"),
    [("slurm", "#SBATCH --gres=gpu:1"), ("lsf", "#BSUB -gpu num=1"), ("local", "workers are processes of this one"),
     ("pbs", "#PBS -l select=1:ncpus=8:mem=64GB:ngpus=1")],
)  # fmt: skip
def test_each_configuration_gives_the_script_of_a_job(name: str, line: str, command: Command, tmp_path: Path) -> None:
    assert c.read_cluster_config(name).workers > 0
    code, script, err = command("cluster", name, "--script", cwd=tmp_path)
    assert code == 0, err
    assert line in script
    assert name == "local" or "--resources GPU=1" in script


def test_a_wrong_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no cluster 'sge'.*local, lsf, pbs, slurm"):
        c.read_cluster_config("sge")
    (tmp_path / "mine.toml").write_text("kind = 'slurm'\nworker = 3\n")
    with pytest.raises(UserError, match=r"mine\.toml: must be TOML with kind, workers and options"):
        c.read_cluster_config(str(tmp_path / "mine.toml"))


# ------------------------------------------------------------------------------------------------- the parts of it


def test_an_item_that_kills_workers_is_found_out(scheduler: str, tmp_path: Path) -> None:
    def square(number: int) -> int:  # here, so that the workers do not import this file
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 7:
            raise UserError("seven is no good")
        return number * number

    with c.connect(scheduler, tmp_path) as cluster:
        found = dict(cluster.spread(square, range(40), "square"))
    assert {n: r for n, r in found.items() if n not in (5, 7)} == {n: n * n for n in range(40) if n not in (5, 7)}
    assert "seven is no good" in str(found[7])
    assert "several workers died of it" in str(found[5])


def test_waiting_without_a_worker_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It continues when a worker joins."""
    monkeypatch.setattr(c, "_LOOK", 0.3)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as local,
        c.connect(local.scheduler_address, tmp_path) as cluster,
    ):
        local.scale(0)
        while cluster.client.nthreads():
            time.sleep(0.05)
        joining = threading.Timer(1.5, local.scale, (1,))
        joining.start()
        found = dict(cluster.spread(abs, [-1, -2], "abs"))
        joining.join()
    assert found == {-1: 1, -2: 2}
    assert "warning: no worker is left, waiting for one to join" in capsys.readouterr().err


def test_a_task_that_no_worker_can_take_is_reported(scheduler: str, tmp_path: Path, capsys: Any) -> None:
    """The workers with a GPU are gone, and others are left."""
    with c.connect(scheduler, tmp_path) as cluster:
        future = cluster.client.submit(abs, -1, resources={"GPU": 1}, pure=False)
        assert cluster.wait([future], 0.5) == []
        cluster.warn_without_workers()
    assert "warning: no worker is left, waiting for one to join" in capsys.readouterr().err


def test_that_all_gpus_are_gone_is_said(scheduler: str, tmp_path: Path, capsys: Any) -> None:
    """A fold is then submitted to workers without one."""

    async def start() -> Any:
        return await distributed.Worker(scheduler, resources={"GPU": 1}, nthreads=1)

    with Client(scheduler, set_as_default=False) as client:
        worker = client.sync(start)
        with c.connect(scheduler, tmp_path) as cluster:
            assert cluster._resources() == {"GPU": 1}
            client.sync(worker.close)
            wait_until(lambda: worker.address not in cluster.client.nthreads())
            assert cluster._resources() == {}
    assert "warning: no worker with a GPU is left" in capsys.readouterr().err


def test_a_worker_that_does_not_answer_shows_signs(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(c.log, "_SECONDS_BETWEEN_LINES", 0.2)
    with Client(scheduler, set_as_default=False) as client:
        worker = next(iter(client.run(os.getpid).values()))
    os.kill(worker, signal.SIGSTOP)
    threading.Timer(1.5, os.kill, (worker, signal.SIGCONT)).start()
    with c.connect(scheduler, tmp_path):
        assert "waiting for the answers of the workers: " in capfd.readouterr().err


def test_tasks_grow_smaller_towards_the_end() -> None:
    batches = list(c._batches(range(200), 2))
    assert [item for batch in batches for item in batch] == list(range(200))
    sizes = [len(batch) for batch in batches]
    assert (sizes[0], sizes[-1]) == (16, 1)
    assert sizes == sorted(sizes, reverse=True)
    assert len(list(c._batches(range(10_000), 16))) < 1000
    assert list(c._batches([], 2)) == []


def test_a_step_that_fails_stops_those_that_need_it_only(scheduler: str, tmp_path: Path) -> None:
    def step(name: str, run: Callable[[], Any], *needs: str, anywhere: bool = True) -> Step:
        return Step(name, name, (tmp_path / name).is_file, run, needs, anywhere)

    def fail(file: Path) -> None:
        raise UserError("the disk is full", file)

    steps = [
        step("first", partial((tmp_path / "first").touch)),
        step("bad", partial(fail, tmp_path / "bad"), "first"),
        step("good", partial((tmp_path / "good").touch), "first"),
        step("last", partial((tmp_path / "last").touch), "bad", "good", anywhere=False),
    ]
    with c.connect(scheduler, tmp_path) as cluster:
        with pytest.raises(UserError, match="bad: the disk is full"):
            run_steps(steps, Journal(tmp_path / "steps.jsonl"), cluster)
        assert (tmp_path / "good").is_file()
        assert not (tmp_path / "last").exists()
        (tmp_path / "bad").touch()
        ended = run_steps(steps, Journal(tmp_path / "steps.jsonl"), cluster)
    assert {e.step: e.state for e in ended} == {"first": "kept", "bad": "kept", "good": "kept", "last": "done"}


def test_other_versions_and_another_workspace_are_refused(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    setup = c.SharedSetup.of_this_process(tmp_path / "token")
    assert c.find_difference(setup) is None
    other = c.SharedSetup(tuple({**dict(setup.versions), "torch": "1.0"}.items()), setup.token)
    assert "and here is 1.0: install the same version" in str(c.find_difference(other))
    elsewhere = c.SharedSetup(setup.versions, tmp_path / "nowhere" / "token")
    assert str(c.find_difference(elsewhere)).startswith("does not see the workspace")
    for answer, says in (("does not see the workspace /x", "does"), (ModuleNotFoundError("x"), "cannot import")):
        with pytest.raises(UserError, match=rf"the worker tcp://a:1 {says}"):
            c._check_answer("tcp://a:1", answer)


def test_a_missing_scheduler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c, "_CONNECT", 0.5)
    with (
        pytest.raises(UserError, match=r"tcp://127\.0\.0\.1:9: no Dask scheduler answers"),
        c.connect("tcp://127.0.0.1:9", tmp_path),
    ):
        raise AssertionError("a scheduler answered")
