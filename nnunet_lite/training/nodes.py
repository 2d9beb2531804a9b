"""Which processes of a training on several machines are still there, told through the store where they met.

A process that is lost leaves the others in a collective operation, which ends with an error of the network's that names
nobody, or, where a machine lost its power, does not end. So each process counts up a number in the store, and who no
longer does is named by those that are left, before they end. The checkpoint is whole: it is written under another name.

Only for torchrun: of the processes that `distributed.launch` starts, it sees itself which one dies.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch

from nnunet_lite import log
from nnunet_lite.errors import Lost
from nnunet_lite.training.distributed import Ranks, any_rank, before_leaving, from_first

_BEAT = 2.0  # seconds between two counts
_SILENT = 90.0  # seconds without one after which a process is taken for lost: a machine may be busy
_ROLL_CALL = 4 * _BEAT  # seconds to hear of the others when a collective has failed
_FOR_ITSELF = 30.0  # seconds that the others get to end by themselves when one has failed
_LEFT, _FAILED = "left", "failed"  # in place of a count
_GO_ON = "The same nnlite command goes on from the last checkpoint, also with another number of processes or machines"


class Watch:
    """What this process hears of the others: the last count of each, and when it was new.

    One thread talks to the store, in which it may hang when the machine is lost that holds it; another one judges.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.meeting = from_first(secrets.token_hex(4), ranks)  # torchrun may start all again, with the same store
        self.ending = _LEFT
        self._ended = threading.Event()
        self._address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=_SILENT)
        self._store = torch.distributed.TCPStore(self._address, port, is_master=False, timeout=patience)
        self._store.set(self._key("host", ranks.rank), socket.gethostname())
        self._store.set(self._key("count", ranks.rank), "0")
        any_rank(0, ranks)  # now all have set theirs
        self._hosts = [host.decode() for host in self._store.multi_get(self._keys("host"))]
        self._reached = time.monotonic()
        self._heard = dict.fromkeys(range(ranks.world), ("0", self._reached))
        self._threads = [threading.Thread(target=each, name="nodes", daemon=True) for each in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Say that this process ends, and how."""
        self._ended.set()
        self._threads[0].join(_ROLL_CALL)

    def roll_call(self) -> list[int]:
        """The processes that have ended, in whatever way, or that nothing is heard of for some seconds."""
        time.sleep(_ROLL_CALL)
        return self._gone(_ROLL_CALL - _BEAT, left=0, failed=0)

    def verdict(self, gone: Sequence[int]) -> str:
        """Who is gone, in words: those of the first process that finds out, for it will be missed by the others too."""
        if time.monotonic() - self._reached > 2 * _BEAT:
            return f"the machine of process 0, {self._address}, is lost or the network is down. {_GO_ON}"
        failed = [rank for rank in gone if self._heard[rank][0] in (_LEFT, _FAILED)]
        lost = [rank for rank in gone if rank not in failed]
        parts = []
        if lost:
            parts.append(f"lost of {self.ranks.world} processes: {self._named(lost)} "
                         "(killed, or the machine or the network is down)")  # fmt: skip
        if failed:
            parts.append(f"ended before the others, and said why: {self._named(failed)}")
        words = f"{'; '.join(parts)}. {_GO_ON}"
        try:
            return self._store.compare_set(self._key("verdict", 0), "", words).decode()
        except RuntimeError:  # the store has gone meanwhile
            return words

    def _named(self, ranks: Sequence[int]) -> str:
        return " and ".join(f"process {rank} on {self._hosts[rank]}" for rank in ranks)

    def _gone(self, silence: float, left: float, failed: float) -> list[int]:
        """The others of which nothing new is heard for so many seconds; those that ended have limits of their own."""
        now, own = time.monotonic(), self.ranks.rank
        if now - self._reached > silence:
            return [0] if own else []  # the store is on its machine
        limits = {_LEFT: left, _FAILED: failed}
        over = {
            rank: now - last - limits.get(value, silence) for rank, (value, last) in self._heard.items() if rank != own
        }
        if max(over.values()) <= 0:
            return []
        return [rank for rank, seconds in over.items() if seconds > -2 * _BEAT]  # with one, its neighbours are lost

    def _talk(self) -> None:
        count = 0
        with suppress(RuntimeError):  # a connection that broke stays so: others judge by the time that has passed
            while not self._ended.wait(_BEAT):
                count += 1
                self._store.set(self._key("count", self.ranks.rank), str(count))
                counts = [value.decode() for value in self._store.multi_get(self._keys("count"))]
                now = time.monotonic()
                for rank, value in enumerate(counts):
                    if value != self._heard[rank][0]:
                        self._heard[rank] = value, now
                self._reached = now
            self._store.set(self._key("count", self.ranks.rank), self.ending)

    def _judge(self) -> None:
        while not self._ended.wait(_BEAT):
            if gone := self._gone(_SILENT, left=math.inf, failed=_FOR_ITSELF):
                log.last(f"error: {self.verdict(gone)}.")
                os._exit(1)  # the main thread waits in a collective, out of which Python knows no other way

    def _keys(self, what: str) -> list[str]:
        return [self._key(what, rank) for rank in range(self.ranks.world)]

    def _key(self, what: str, rank: int) -> str:
        return f"nnlite/{self.meeting}/{what}/{rank}"


_watch: Watch | None = None


def keep_watch(ranks: Ranks) -> None:
    """Hear of the others from now to the end of this process, which comes early when one of them is gone."""
    global _watch
    if _watch is None and ranks.world > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        _watch = Watch(ranks)
        before_leaving(_watch.stop)


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Turn an error of the network's that comes of the end of another process into one that says whose.

    Raises
    ------
    Lost : a process is gone.
    """
    try:
        yield
    except BaseException as error:
        if _watch is None:
            raise
        _watch.ending = _FAILED
        if not _of_the_network(error) or not (gone := _watch.roll_call()):
            raise
        raise Lost(_watch.verdict(gone)) from error


def _of_the_network(error: BaseException) -> bool:
    """gloo's errors have no class of their own; each begins with the name of its source file."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )
