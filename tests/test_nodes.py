"""Training on two nodes: two groups of processes, each started by a torchrun of its own, one of which is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from samples import fold_of

from nnunet_lite.models.folder import CHECKPOINT
from nnunet_lite.models.folder import MODEL
from nnunet_lite.training.record import METRICS

EPOCHS = 12
# as `python -m nnunet_lite`, with less patience
IMPATIENT = "from nnunet_lite import cli; from nnunet_lite.training import nodes; nodes._SILENT = 5.0; cli.main()"


@pytest.fixture
def start_nodes(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Starts a torchrun for each node, in a session of its own, with one process each."""
    started: list[subprocess.Popen[str]] = []

    def start(arguments: list[str], backend: str = "static") -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meet = ["--rdzv-backend", backend, "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
        if backend == "static":
            meet = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        for node in range(2):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)]
            each = ["--nproc-per-node", "1", "--monitor-interval", "0.2"]
            started.append(
                subprocess.Popen(
                    [*torchrun, *each, *meet, *arguments],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=(tmp_path / f"node_{node}.log").open("w"),
                    text=True,
                    start_new_session=True,
                )
            )
        return started

    yield start
    for process in started:
        for group in groups_of(process):
            os.killpg(group, signal.SIGKILL)
        process.wait()


def groups_of(node: subprocess.Popen[str]) -> set[int]:
    """torchrun gives each of its processes a session of its own: the groups of them all."""
    if node.poll() is not None:
        return set()
    return {os.getpgid(p.pid) for p in (psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True))}


def epochs(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    file = fold_of(tmp_path, name) / METRICS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def alone(arguments: list[str], name: str) -> str:
    nnlite = [sys.executable, "-m", "nnunet_lite", *arguments, "--name", name]
    done = subprocess.run(
        nnlite, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(tmp_path: Path, name: str) -> list[float]:
    return [row["train_loss"] for row in epochs(tmp_path, name)]


def test_two_nodes_learn_what_one_process_learns(
    tmp_path: Path, train_three: list[str], start_nodes: Callable[..., list[subprocess.Popen[str]]]
) -> None:
    nodes = start_nodes(["-m", "nnunet_lite", *train_three, "--name", "two"], backend="c10d")
    alone(train_three, "one")
    assert [node.wait(timeout=240) for node in nodes] == [0, 0], (tmp_path / "node_0.log").read_text()
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), abs=2e-5)
    a, b = (load_file(fold_of(tmp_path, name) / MODEL) for name in ("one", "two"))
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


@pytest.mark.parametrize(
    ("lost", "how"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_lost_node_is_named_and_another_number_of_processes_goes_on(
    tmp_path: Path,
    train_three: list[str],
    start_nodes: Callable[..., list[subprocess.Popen[str]]],
    lost: int,
    how: signal.Signals,
) -> None:
    """Killed, its connections break; stopped, as if the machine lost its power, nothing is heard of it."""
    train_three = [*train_three, "--set", f"training.epochs={EPOCHS}"]
    script = tmp_path / "nnlite.py"
    script.write_text(IMPATIENT)
    nnlite = [str(script)] if how == signal.SIGSTOP else ["-m", "nnunet_lite"]
    nodes = start_nodes([*nnlite, *train_three, "--name", "lost"])
    until = time.monotonic() + 200
    while not (fold_of(tmp_path, "lost") / CHECKPOINT).is_file():
        assert all(node.poll() is None for node in nodes), (tmp_path / "node_0.log").read_text()
        assert time.monotonic() < until
        time.sleep(0.02)
    for group in groups_of(nodes[lost]):
        os.killpg(group, how)
    left = 1 - lost
    assert nodes[left].wait(timeout=60) == 1
    said = (tmp_path / f"node_{left}.log").read_text()
    named = f"error: lost of 2 processes: process {lost} on {socket.gethostname()}"
    assert (named if lost else "error: the machine of process 0, 127.0.0.1, is lost") in said
    assert "The same nnlite command goes on from the last checkpoint" in said
    for group in groups_of(nodes[lost]):
        os.killpg(group, signal.SIGKILL)
    before = len(epochs(tmp_path, "lost"))
    assert before < EPOCHS
    assert "going on from epoch" in alone(train_three, "lost")
    assert [row["epoch"] for row in epochs(tmp_path, "lost")] == list(range(1, EPOCHS + 1))
    if how == signal.SIGKILL and lost:
        alone(train_three, "undisturbed")
        # sums are rounded otherwise by two processes than by one, and training makes the difference grow
        assert losses(tmp_path, "lost") == pytest.approx(losses(tmp_path, "undisturbed"), abs=1e-3)


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
def test_an_error_that_is_no_loss_is_told_where_it_happens(
    tmp_path: Path, train_three: list[str], start_nodes: Callable[..., list[subprocess.Popen[str]]], ranks: str
) -> None:
    """A network of the user's that fails in one process, or in both: its traceback is there, nobody is called lost."""
    (tmp_path / "my_network.py").write_text(BROKEN.replace("RANKS", repr(ranks)))
    factory = ["--set", f"network.factory={tmp_path / 'my_network.py'}:make"]
    nodes = start_nodes(["-m", "nnunet_lite", *train_three, *factory, "--name", "broken"])
    assert [node.wait(timeout=120) for node in nodes] == [1, 1]
    logs = [(tmp_path / f"node_{node}.log").read_text() for node in range(2)]
    assert all("RuntimeError: it broke" in logs[int(rank)] for rank in ranks)
    assert not any("lost of 2" in log or "is lost" in log for log in logs)
    if ranks == "1":
        assert f"error: ended before the others, and said why: process 1 on {socket.gethostname()}" in logs[0]
