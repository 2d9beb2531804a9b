"""The processes that train together: how `nnlite train --gpus N` starts them on one machine, and which one this is.

This module does not import torch, which the process that only waits for the others does not need.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from nnunet_lite import log, system

RENDEZVOUS = "NNLITE_RENDEZVOUS"  # environment variable: where the processes meet
_LAUNCHER = "NNLITE_LAUNCHER"  # environment variable: the process that started them
_GRACE = 20.0  # seconds in which the others may end by themselves after one process failed
_POLL = 0.2
_FORWARDED = system.signals_of("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")


@dataclass(frozen=True)
class Ranks:
    """The position of this process among those that train together.

    Parameters
    ----------
    rank : int
        Number of this process.
    world : int
        Number of processes.
    local : int
        Number of this process on its machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0


ALONE = Ranks()


def current_ranks() -> Ranks:
    """Return the position of this process by torchrun's environment variables; ALONE without them."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    return Ranks(*(int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def launch(number: int) -> None:
    """Run this command in several processes that train together, and exit; in one of them, do nothing.

    The first process prints its output here. If another one dies, the rest are stopped and its number, its error and
    how it ended are reported. Signals are forwarded.

    Parameters
    ----------
    number : int
        Number of processes.
    """
    if current_ranks().world > 1:
        if launcher := os.environ.get(_LAUNCHER):
            _end_with(int(launcher))
        return
    if system.has_no_gpu():
        log.warn(f"--gpus {number}: there is no GPU, and {number} processes share the CPUs of this machine")
    processes: list[subprocess.Popen[str]] = []

    def forward(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    with TemporaryDirectory(prefix="nnlite-") as folder:
        errors = [Path(folder, f"stderr_{rank}") for rank in range(number)]
        for signal_number in _FORWARDED:
            if signal.getsignal(signal_number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(signal_number, forward)
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, system.cpus() // number)))
        shared = {"WORLD_SIZE": str(number), "OMP_NUM_THREADS": threads, RENDEZVOUS: f"file://{folder}/rendezvous"}
        shared[_LAUNCHER] = str(os.getpid())
        try:
            for rank, error in enumerate(errors):
                # the first process prints; a process group of its own receives each signal once, from `forward`
                with error.open("w") as output:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "nnunet_lite", *sys.argv[1:]],
                        env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=subprocess.DEVNULL if rank else None,
                        stderr=output if rank else None,
                        text=True,
                        process_group=0,
                    )
                processes.append(process)
            code = _wait(processes, errors)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    raise SystemExit(code)


def _end_with(launcher: int) -> None:
    """Send this process SIGTERM when the one that launched it is gone, as after SIGKILL."""

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


def _wait(processes: Sequence[subprocess.Popen[str]], errors: Sequence[Path]) -> int:
    """Wait until all processes ended, or one failed; return the exit code."""
    while all(process.poll() in (None, 0) for process in processes):
        if all(process.poll() == 0 for process in processes):
            return 0
        time.sleep(_POLL)
    rank, code = next((i, p.returncode) for i, p in enumerate(processes) if p.poll() not in (None, 0))
    deadline = time.monotonic() + (_GRACE if code > 0 else 0)  # after a kill the others would wait in vain
    while processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL)
    if processes[0].poll() is not None and processes[0].returncode > 0:
        return processes[0].returncode  # it printed the reason
    if rank:
        log.error(errors[rank].read_text().rstrip())
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    log.error(f"error: process {rank} of {len(processes)} {how}; the others are stopped. "
             "The same command resumes from the last checkpoint.")  # fmt: skip
    return code if code > 0 else 128 - code if -code in _FORWARDED else 1  # a signal while it started
