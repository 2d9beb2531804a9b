"""Which processes of a training on several machines are still there, told through the store where they met.

A process that is lost leaves the others in a collective operation, which ends with an error of the network's that names
nobody, or, where a machine lost its power, does not end. So each process counts up a number in the store, and who no
longer does is named by those that are left, before they end. The checkpoint is whole: it is written under another name.

Only for torchrun: of the processes that `distributed.launch` starts, it sees itself which one dies.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch

from nnunet_lite.errors import Lost
from nnunet_lite.training.distributed import Ranks, before_leaving

_BEAT = 2.0  # seconds between two counts
_SILENT = 90.0  # seconds without one after which a process is taken for lost: a machine may be busy
_ROLL_CALL = 3 * _BEAT  # the same when a collective has failed: those that are there count on while they wait
_LEFT = "left"
_GO_ON = "The same command goes on from the last checkpoint, also with another number of processes"


def keep_watch(ranks: Ranks) -> None:
    """Count up in the store from now to the end of this process, which comes early when another one falls silent."""
    if not _watched(ranks):
        return
    store, ended = _store(_SILENT), threading.Event()
    store.set(_key("host", ranks.rank), socket.gethostname())
    store.set(_key("count", ranks.rank), "0")
    thread = threading.Thread(target=_watch, args=(store, ranks, ended), name="nodes", daemon=True)

    def stop() -> None:
        ended.set()
        thread.join()

    before_leaving(stop)
    thread.start()


def _watch(store: torch.distributed.TCPStore, ranks: Ranks, ended: threading.Event) -> None:
    heard: dict[int, tuple[str, float]] = {}  # the last count of each process, and when it was new
    reached, count = time.monotonic(), 0
    while not ended.wait(_BEAT):
        now, count = time.monotonic(), count + 1
        with suppress(RuntimeError):  # of the network: how long it lasts is what matters
            store.set(_key("count", ranks.rank), str(count))
            for rank, value in _counts(store, ranks).items():
                if value == _LEFT or heard.get(rank, (None,))[0] != value:
                    heard[rank] = value, now
            reached = now
        silent = [rank for rank, (_, last) in heard.items() if now - last > _SILENT]
        if silent or now - reached > _SILENT:
            if ranks.local == 0:
                print(f"error: {_verdict(ranks, silent)}.", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread waits in a collective, out of which Python knows no other way
    with suppress(RuntimeError):  # the store is another process's, which may have ended before
        store.set(_key("count", ranks.rank), _LEFT)


@contextmanager
def naming_the_lost(ranks: Ranks) -> Iterator[None]:
    """Turn an error that comes of the loss of another process into one that says whose.

    Raises
    ------
    Lost : a process is gone; told by one process of each machine.
    """
    try:
        yield
    except RuntimeError as error:
        if not _watched(ranks) or not (gone := _gone(ranks)):
            raise
        if ranks.local:
            raise SystemExit(1) from None
        raise Lost(_verdict(ranks, gone)) from error


def _watched(ranks: Ranks) -> bool:
    return ranks.world > 1 and "TORCHELASTIC_RUN_ID" in os.environ


def _gone(ranks: Ranks) -> list[int]:
    """The processes that do not count any more, or have left."""
    try:
        store = _store(_ROLL_CALL)
        before = _counts(store, ranks)
        time.sleep(_ROLL_CALL)
        after = _counts(store, ranks)
    except RuntimeError:
        return [0]  # the store is on its machine
    return [rank for rank, value in after.items() if value in (before[rank], _LEFT)]


def _verdict(ranks: Ranks, gone: Sequence[int]) -> str:
    """Who is lost, in words: those of the first process that finds out, for it will be missed by the others too."""
    try:
        store = _store(_ROLL_CALL)
        hosts = store.multi_get([_key("host", rank) for rank in gone])
        who = " and ".join(f"{rank} on {host.decode()}" for rank, host in zip(gone, hosts, strict=True))
        what = f"lost of {ranks.world} processes: {who} (killed, or the machine or the network is down). {_GO_ON}"
        return store.compare_set(_key("verdict", 0), "", what).decode()
    except RuntimeError:
        return f"the machine of process 0, {os.environ['MASTER_ADDR']}, is lost or the network is down. {_GO_ON}"


def _counts(store: torch.distributed.TCPStore, ranks: Ranks) -> dict[int, str]:
    counts = store.multi_get([_key("count", rank) for rank in range(ranks.world)])
    return {rank: count.decode() for rank, count in enumerate(counts)}


def _key(what: str, rank: int) -> str:
    """One of this start: torchrun may start all processes again, with the same store."""
    return f"nnlite/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{what}/{rank}"


def _store(seconds: float) -> torch.distributed.TCPStore:
    """A connection of its own to the store where the processes met."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds))
