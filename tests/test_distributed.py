"""Several processes train one network as one process does; the end of one of them ends the run with its cause."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from samples import ENVIRONMENT, Command, Forked, fold_of, read_metrics, start_nnlite, wait_until

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.models.folder import CHECKPOINT, MODEL
from nnunet_lite.training import distributed
from nnunet_lite.training.distributed import (
    SYNC_EVERY,
    Clock,
    from_first,
    max_over_ranks,
    rank_device,
    rank_share,
)
from nnunet_lite.training.launch import ALONE, RENDEZVOUS, Ranks, current_ranks

LONG = ["--set", "training.epochs=400"]  # the last `--set` of a key decides, and `train_three` has one
EPOCHS = 12
LOST = (
    "error: another process of this training ended, or its machine or the network is down",
    "The same nnlite command resumes from the last checkpoint",
)


@pytest.mark.parametrize(("batch", "world"), [(7, 2), (2, 2), (9, 4), (5, 1)])
def test_shares_cover_a_batch_and_differ_by_one_at_most(batch: int, world: int) -> None:
    shares = [rank_share(batch, Ranks(rank, world, rank)) for rank in range(world)]
    assert [i for part in shares for i in range(batch)[part]] == list(range(batch))
    sizes = [part.stop - part.start for part in shares]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    with pytest.raises(UserError, match=r"batch of 2 is too small for 3 processes.*--gpus"):
        rank_share(2, Ranks(0, 3, 0))


def test_a_process_is_alone_unless_torchrun_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert current_ranks() == ALONE
    assert from_first("x", ALONE) == "x"
    assert max_over_ranks(3, ALONE) == 3
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert current_ranks() == Ranks(5, 8, 1)
    assert rank_device(Ranks(5, 8, 1), torch.device("cpu")) == torch.device("cpu")


def test_several_processes_share_the_clock_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 <= Clock(ALONE, 99.0).after(5) < 5
    monkeypatch.setattr(distributed, "from_first", lambda value, ranks: 7.0)  # what the first process says
    clock = Clock(Ranks(1, 2, 1), 0.5)
    assert [clock.after(step) for step in (0, 1, SYNC_EVERY - 1)] == [0, 0.5, 0.5 * (SYNC_EVERY - 1)]
    assert [clock.after(step) for step in (SYNC_EVERY, SYNC_EVERY + 2)] == [7, 8]
    assert Clock(Ranks(1, 2, 1), 0.0).after(3) == 0  # in the first epoch, before the first comparison


# ------------------------------------------------------------------------------------------------- nnlite --gpus N


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    """What a command that ends with this exit code prints, and its messages."""
    process = start_nnlite(*arguments)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert code == 0 or "Traceback" not in err
    return out, err


def has_content(file: Path) -> Callable[[], bool]:
    return lambda: file.is_file() and file.stat().st_size > 0


class Rank(Forked):
    """One of two processes, as `--gpus 2` or torchrun on another machine starts it, without the imports."""

    def __init__(self, rank: int, meet: dict[str, str], *arguments: str) -> None:
        super().__init__(*arguments, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", **meet)


def start_ranks(meet: dict[str, str], *arguments: str) -> list[Rank]:
    return [Rank(rank, meet, *arguments) for rank in range(2)]


def by_file(tmp_path: Path) -> dict[str, str]:
    """How processes of `--gpus N` meet."""
    return {RENDEZVOUS: f"file://{tmp_path}/rendezvous"}


def by_port() -> dict[str, str]:
    """How processes of torchrun meet."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def assert_same_weights(tmp_path: Path, one: str, two: str) -> None:
    a, b = (load_file(fold_of(tmp_path, name) / MODEL) for name in (one, two))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_two_processes_learn_what_one_learns(tmp_path: Path, train_three: list[str], command: Command) -> None:
    """`--gpus 2` has nothing left to train then, and the first of its processes shows the scores."""
    arguments = [*train_three, "--set", "training.accumulate=2", "--set", "optimizer.ema=0.9"]
    ranks = start_ranks(by_file(tmp_path), *arguments, "--name", "two")
    assert command(*arguments, "--name", "one", cwd=tmp_path)[0] == 0
    (first, errors), second = (rank.communicate(timeout=240) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert first.count("fold 0, whole images") == 1 and second[0] == ""
    one, two = (read_metrics(fold_of(tmp_path, name)) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        for name, tolerance in {"train_loss": 2e-5, "validation_loss": 2e-5, "dice": 2e-3, "lr": 0}.items():
            assert a[name] == pytest.approx(b[name], abs=tolerance)
    assert_same_weights(tmp_path, "one", "two")
    out, errors = run(*arguments, "--gpus", "2", "--name", "two")
    assert out == first and errors.count("training is finished") == 1
    assert torch.cuda.is_available() or "--gpus 2: there is no GPU, and 2 processes share the CPUs" in errors


@pytest.mark.slow  # the first half of it is above, with processes that are started otherwise
def test_what_the_command_starts_learns_what_one_learns(
    tmp_path: Path, train_three: list[str], command: Command
) -> None:
    assert command(*train_three, "--name", "one", cwd=tmp_path)[0] == 0
    assert run(*train_three, "--gpus", "2", "--name", "two")[0].count("fold 0, whole images") == 1
    assert_same_weights(tmp_path, "one", "two")


Started = tuple[subprocess.Popen[str], list[psutil.Process]]


@pytest.fixture
def start_two(tmp_path: Path, train_three: list[str]) -> Iterator[Callable[[str, bool], Started]]:
    """Starts a long training in two processes, and waits until they import torch, or for their first checkpoint.

    It returns the command and its processes.
    """
    started: list[subprocess.Popen[str]] = []
    log = tmp_path / "stderr.log"

    def start(name: str, trains: bool) -> Started:
        started.append(start_nnlite(*train_three, *LONG, "--gpus", "2", "--name", name, stderr=log.open("w")))
        children = psutil.Process(started[-1].pid).children
        wait_until(lambda: len(children()) == 2 and all(map(has_torch, children())), *started)
        if trains:  # a thread writes it after the metrics
            wait_until(has_content(fold_of(tmp_path, name) / CHECKPOINT), *started)
        return started[-1], sorted(children(), key=lambda child: int(child.environ()["RANK"]))

    yield start
    for process in started:
        process.kill()
        process.wait()


def has_torch(process: psutil.Process) -> bool:
    """Whether it has begun to import torch: it handles signals, and knows which process started it."""
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


WHILE_IT = pytest.mark.parametrize(
    "trains", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["while it starts", "while it trains"]
)


@WHILE_IT
@pytest.mark.parametrize(
    ("rank", "number", "code", "message"),
    [(1, signal.SIGKILL, 1, "error: process 1 of 2 was killed by SIGKILL"), (None, signal.SIGINT, 130, "stopped")],
    ids=["a process is killed", "the command gets a signal"],
)
def test_what_ends_one_process_ends_all(
    tmp_path: Path, start_two: Any, rank: int | None, number: signal.Signals, code: int, message: str, trains: bool
) -> None:
    process, ranks = start_two("stopped", trains)
    assert all(os.getpgid(child.pid) == child.pid for child in ranks)  # Ctrl-C reaches the command alone
    assert not has_torch(psutil.Process(process.pid)), "it only waits"
    (process if rank is None else ranks[rank]).send_signal(number)
    begin = time.monotonic()
    assert process.wait(timeout=60) == code
    assert time.monotonic() - begin < 30
    assert (tmp_path / "stderr.log").read_text().count(f"\n{message}") == 1
    assert not ranks[0].is_running() and (rank is not None or not ranks[1].is_running())
    assert (fold_of(tmp_path, "stopped") / CHECKPOINT).is_file() == trains


@WHILE_IT
def test_all_processes_end_if_the_command_is_killed(tmp_path: Path, start_two: Any, trains: bool) -> None:
    process, ranks = start_two("killed", trains)
    process.kill()
    _, left = psutil.wait_procs(ranks, timeout=60)
    for rank in left:
        rank.kill()
    assert not left and (tmp_path / "stderr.log").read_text().count("stopped by SIGTERM") == 1


def test_a_signal_stops_two_that_train_after_the_same_step(tmp_path: Path, train_three: list[str]) -> None:
    fold = fold_of(tmp_path, "stopped")
    ranks = start_ranks(by_file(tmp_path), *train_three, *LONG, "--name", "stopped")
    wait_until(has_content(fold / CHECKPOINT), *ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [130, 130], said
    stopped = [text.splitlines()[-1] for text in said]
    assert stopped[0] == stopped[1] and stopped[0].startswith("stopped by SIGINT after epoch"), said
    assert read_metrics(fold)


def test_a_mistake_is_one_line_of_one_process(tmp_path: Path, train_three: list[str]) -> None:
    """One that shows before torch is imported, and one that shows before cases are loaded."""
    _, errors = run(*train_three, "--set", "training.wrong=1", "--gpus", "2", "--name", "wrong", code=2)
    assert errors.count("unknown setting 'training.wrong'") == 1
    ranks = start_ranks(by_file(tmp_path), *train_three, "--set", "training.batch_size=1", "--name", "wrong")
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert said[0].count("a batch of 1 is too small for 2 processes") == 1 and " cases, " not in said[0]


def test_python_does_not_start_processes(tiny_workspace: Path) -> None:
    with pytest.raises(UserError, match=r"gpus=2 needs one process for each GPU\. Start your script with `torchrun"):
        nnunet_lite.train("3d_fullres", 0, gpus=2, workspace=tiny_workspace)


def test_batch_norm_over_processes_is_refused_on_cpus(
    tmp_path: Path, train_three: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first of two processes, before it waits for the other one."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, errors = command(*train_three, "--set", "network.norm=batch", "--name", "wrong", cwd=tmp_path)
    assert code == 2 and errors.count("batch normalisation over several processes needs GPUs") == 1
    assert not fold_of(tmp_path, "wrong").exists()


# --------------------------------------------------------------------------------------------------------- torchrun

Nodes = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start_nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Starts two nodes: a torchrun for each, in a session of its own, with one process."""
    started: list[subprocess.Popen[str]] = []

    def start(arguments: list[str], backend: str = "static") -> list[subprocess.Popen[str]]:
        port = free_port()
        meet = ["--rdzv-backend", backend, "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
        if backend == "static":
            meet = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        for node in range(2):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)]
            options = ["--nproc-per-node", "1", "--monitor-interval", "0.2", *meet]
            log = (tmp_path / f"node_{node}.log").open("w")
            outputs: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": log, "text": True}
            command = [*torchrun, *options, *arguments]
            started.append(subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **outputs))
        return started

    yield start
    for process in started:
        signal_node(process, signal.SIGKILL)
        process.wait()


def signal_node(node: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to torchrun and its processes, each of which has a session of its own."""
    if node.poll() is None:
        family = (psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True))
        for group in {os.getpgid(process.pid) for process in family}:
            os.killpg(group, number)


def node_logs(tmp_path: Path) -> str:
    return "\n".join((tmp_path / f"node_{node}.log").read_text() for node in range(2))


@pytest.mark.slow
def test_two_nodes_learn_what_one_process_learns(
    tmp_path: Path, train_three: list[str], start_nodes: Nodes, command: Command
) -> None:
    nodes = start_nodes(["-m", "nnunet_lite", *train_three, "--name", "two"], backend="c10d")
    assert command(*train_three, "--name", "one", cwd=tmp_path)[0] == 0
    assert [node.wait(timeout=240) for node in nodes] == [0, 0], node_logs(tmp_path)
    one, two = ([row["train_loss"] for row in read_metrics(fold_of(tmp_path, name))] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=2e-5)
    assert_same_weights(tmp_path, "one", "two")


PATIENT = """
import time
from datetime import timedelta
from nnunet_lite import cli
from nnunet_lite.commands import train
from nnunet_lite.training import distributed

distributed._TIMEOUT = timedelta(seconds=5)
validate_fold = train.validate_fold

def validate_slowly(*arguments, **options):
    time.sleep(8)
    return validate_fold(*arguments, **options)

train.validate_fold = validate_slowly
cli.main()
"""


@pytest.mark.slow
def test_others_wait_longer_for_a_validation_than_for_an_answer(
    tmp_path: Path, train_three: list[str], start_nodes: Nodes
) -> None:
    """The first process validates each fold alone; the next fold begins after that, whatever the timeout is."""
    script = tmp_path / "nnlite.py"
    script.write_text(PATIENT)
    more = ["--folds", "2", "--set", "training.epochs=1", "--name", "two"]
    nodes = start_nodes([str(script), *train_three[:2], "all-folds", *train_three[3:], *more])
    assert [node.wait(timeout=120) for node in nodes] == [0, 0], node_logs(tmp_path)
    assert all((fold_of(tmp_path, "two").with_name(f"fold_{fold}") / MODEL).is_file() for fold in range(2))


FAILING = """
from nnunet_lite import cli
from nnunet_lite.commands import train
from nnunet_lite.errors import UserError

def validate(*arguments, **options):
    raise UserError("an image is gone")

train.validate_fold = validate
cli.main()
"""


@pytest.mark.slow
def test_others_end_when_the_validation_of_the_first_one_fails(
    tmp_path: Path, train_three: list[str], start_nodes: Nodes
) -> None:
    script = tmp_path / "nnlite.py"
    script.write_text(FAILING)
    nodes = start_nodes([str(script), *train_three, "--name", "failing"])
    assert [node.wait(timeout=60) for node in nodes] == [1, 1]
    assert "error: an image is gone" in (tmp_path / "node_0.log").read_text()
    assert "error: another process of this training ended" in (tmp_path / "node_1.log").read_text()


class Waiting(Rank):
    """One that ends, or waits for the first one, without training."""

    def run(self) -> None:
        self.prepare()
        ranks, _ = distributed.join_group("cpu")
        if ranks.rank:
            distributed.wait_for_first(lambda: False)


def test_nobody_waits_for_a_first_process_that_ended() -> None:
    meet = by_port()
    processes = [Waiting(rank, meet) for rank in range(2)]
    first, second = (process.communicate(timeout=60)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 1], first + second
    assert "Lost: another process of this training ended" in second


class Talking(Rank):
    """One that does not wait long until it shows that it waits."""

    def run(self) -> None:
        log._SECONDS_BETWEEN_LINES = 0.2
        super().run()


def test_waiting_for_other_processes_is_shown_and_ends_by_ctrl_c(train_three: list[str]) -> None:
    process = Talking(0, by_port(), *train_three, "--name", "alone")
    written = Path(f"/proc/{process.pid}/fd/2")
    wait_until(lambda: "connecting 2 processes: " in written.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].endswith("stopped by SIGINT; the same command resumes from here\n")
    assert process.returncode == 130


class Impatient(Rank):
    """One whose collective operations give up early."""

    def run(self) -> None:
        distributed._TIMEOUT = timedelta(seconds=5)
        super().run()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_machine_ends_the_others_and_another_number_of_processes_resumes(
    tmp_path: Path, train_three: list[str], command: Command, lost: int, how: signal.Signals
) -> None:
    """A killed one closes its connections; a stopped one does not answer, like a machine without power."""
    arguments = [*train_three, "--set", f"training.epochs={EPOCHS}", "--name", "lost"]
    meet, kind = by_port(), Impatient if how == signal.SIGSTOP else Rank
    ranks = [kind(rank, meet, *arguments) for rank in range(2)]
    wait_until(has_content(fold_of(tmp_path, "lost") / CHECKPOINT), *ranks)
    ranks[lost].send_signal(how)
    left = ranks[1 - lost]
    errors = left.communicate(timeout=60)[1]
    assert left.returncode == 1, errors
    assert all(line in errors for line in LOST) or not lost, errors
    ranks[lost].kill()
    ranks[lost].join()
    assert len(read_metrics(fold_of(tmp_path, "lost"))) < EPOCHS
    code, _, errors = command(*arguments, cwd=tmp_path)
    assert code == 0 and "resuming from epoch" in errors
    assert [row["epoch"] for row in read_metrics(fold_of(tmp_path, "lost"))] == list(range(1, EPOCHS + 1))
    if how == signal.SIGKILL and lost:
        assert command(*arguments[:-1], "undisturbed", cwd=tmp_path)[0] == 0
        # two processes round sums differently than one, and training makes the difference grow
        losses, others = (
            [row["train_loss"] for row in read_metrics(fold_of(tmp_path, name))] for name in ("lost", "undisturbed")
        )
        assert losses == pytest.approx(others, abs=1e-3)


@pytest.mark.slow  # the same without torchrun is above
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_of_torchrun_ends_the_other(
    tmp_path: Path, train_three: list[str], start_nodes: Nodes, lost: int
) -> None:
    nodes = start_nodes(["-m", "nnunet_lite", *train_three, *LONG, "--name", "lost"])
    wait_until(has_content(fold_of(tmp_path, "lost") / CHECKPOINT), *nodes)
    signal_node(nodes[lost], signal.SIGKILL)
    assert nodes[1 - lost].wait(timeout=60) == 1
    assert all(line in (tmp_path / f"node_{1 - lost}.log").read_text() for line in LOST)


BROKEN = """
import os
from torch import nn


class Network(nn.Conv3d):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 4 and os.environ.get("RANK", "none") in RANKS:
            raise RuntimeError("it broke")
        return super().forward(x)


def make(planned, inputs, outputs):
    return Network(inputs, outputs, 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "01"])
def test_an_error_in_a_network_is_shown_where_it_happens(
    tmp_path: Path, train_three: list[str], start_nodes: Nodes, ranks: str
) -> None:
    """A network of the user's fails in one process, or in both: its traceback is in their output."""
    (tmp_path / "my_network.py").write_text(BROKEN.replace("RANKS", repr(ranks)))
    factory = ["--set", f"network.factory={tmp_path / 'my_network.py'}:make"]
    nodes = start_nodes(["-m", "nnunet_lite", *train_three, *factory, "--name", "broken"])
    assert [node.wait(timeout=120) for node in nodes] == [1, 1]
    logs = [(tmp_path / f"node_{node}.log").read_text() for node in range(2)]
    assert all("RuntimeError: it broke" in logs[int(rank)] for rank in ranks)
    assert ("another process of this training ended" in logs[0]) == (ranks == "1")
