"""The same work on many machines: cases, folds and inputs spread over the workers of a Dask scheduler.

All machines see one workspace; nothing but names of files, plans and settings travels through the scheduler. What is
done lies in the workspace as ever, hence work whose worker died is given to another one, which goes on from what it
finds: cases that are there, the last checkpoint of a fold.

A case takes a thread of a worker, a fold or a prediction all of them, one after the other; where some workers have the
resource `GPU` (`dask worker --resources GPU=1`), folds and predictions go to these.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import distributed
from distributed import CancelledError, Client, KilledWorker, as_completed

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.errors import UserError, describe
from nnunet_lite.files import scratch

T = TypeVar("T")
R = TypeVar("R")

_GPU = "GPU"  # the name that Dask users give this resource
_CONNECT = 10  # seconds to find the scheduler
_FIRST_WORKER = 600  # seconds to wait for one: a queue may be long
_SEEN = 20.0  # seconds until a file in the workspace is seen by all machines
_IN_FLIGHT = 1000  # tasks that the scheduler knows at a time, however many cases there are
_MOST_IN_A_TASK, _TASKS_PER_SLOT = 16, 4
_TRIES = 3  # for what may pass, such as a file server that does not answer
_one_at_a_time = threading.Lock()


# ------------------------------------------------------------------------------------------- what workers must have


@dataclass(frozen=True)
class Place:
    """What a worker must have in common with this process: versions, and the workspace, in which `token` lies."""

    versions: tuple[tuple[str, str], ...]
    token: Path


def versions() -> tuple[tuple[str, str], ...]:
    """Of what must be the same everywhere; builds of one version, such as for CPU and for GPU, go together."""
    packages = {name: metadata.version(name).partition("+")[0] for name in ("torch", "numpy", "distributed")}
    python = ".".join(platform.python_version_tuple()[:2])
    return tuple({"nnunet_lite": nnunet_lite.__version__, "python": python, **packages}.items())


def unfit(place: Place) -> str | None:
    """Why this process can do no work of that place; None: it can."""
    mine = dict(versions())
    for name, wanted in place.versions:
        if mine[name] != wanted:
            return f"has {name} {mine[name]}, and here is {wanted}: install the same version on all machines"
    until = time.monotonic() + _SEEN
    while not place.token.exists():
        if not place.token.parent.is_dir() or time.monotonic() > until:
            return (
                f"does not see the workspace {place.token.parent}: it must lie on a file system that all machines share"
            )
        time.sleep(0.5)
    return None if os.access(place.token.parent, os.W_OK) else f"may not write to the workspace {place.token.parent}"


@lru_cache(maxsize=1)
def refuse_if_unfit(place: Place) -> None:
    """On a worker that may have come late, once for each place.

    Raises
    ------
    UserError : it is unfit.
    """
    if reason := unfit(place):
        raise UserError(f"the worker on {platform.node()} {reason}")


# ------------------------------------------------------------------------------------------------------ the cluster


@dataclass(frozen=True)
class Cluster:
    """A scheduler with workers that are fit."""

    client: Client
    place: Place

    @property
    def slots(self) -> int:
        """Threads of all workers."""
        return max(1, sum(self.client.nthreads().values()))

    def for_folds(self) -> dict[str, int]:
        """What a task that trains takes of a worker."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        return {_GPU: 1} if any(worker["resources"].get(_GPU) for worker in workers) else {}

    def spread(
        self, function: Callable[[T], R], items: Sequence[T], what: str, *, heavy: bool = False
    ) -> Iterator[tuple[T, R | Exception]]:
        """Call a function with each item on the workers, and give item and result, or why there is none, as they end.

        Several items are one task, so that the scheduler has little to do for each. Where a task's workers die, its
        items are tried at the end, each with nothing else on the workers, hence one item that kills workers, for want
        of memory, is known by its name, and none is blamed that lay beside it on a worker.

        Parameters
        ----------
        heavy : each needs a GPU, where there are some, or a whole worker; else one thread.
        """
        todo = deque(_batches(items, self.slots))
        run = f"{what}-{secrets.token_hex(4)}"
        yield from log.progress(self._spread(function, todo, run, heavy), len(items), what)

    def _spread(
        self, function: Callable[[T], R], todo: deque[list[T]], run: str, heavy: bool
    ) -> Iterator[tuple[T, R | Exception]]:
        flying, number = as_completed(loop=self.client.loop), 0
        batches: dict[Any, list[T]] = {}
        suspects: deque[T] = deque()
        resources = self.for_folds() if heavy else {}
        while todo or batches or suspects:
            if alone := not (todo or batches):
                todo.append([suspects.popleft()])
            while todo and len(batches) < _IN_FLIGHT:
                batch, number = todo.popleft(), number + 1
                future = self.client.submit(
                    _each, self.place, function, batch, heavy, key=f"{run}-{number}", resources=resources, pure=False
                )
                batches[future.key] = batch
                flying.add(future)
            future = next(flying)
            batch = batches.pop(future.key)
            try:
                results = future.result()
            except CancelledError:
                raise gone() from None
            except KilledWorker as error:
                if not alone:
                    log.info(f"{describe(told(error))} Each of {len(batch)} is tried again, alone, at the end")
                    suspects.extend(batch)
                    continue
                results = [told(error)]
            except Exception as error:  # of the worker, or of sending the results
                if len(batch) > 1:
                    log.info(f"{describe(error)} Each of {len(batch)} is tried again")
                    todo.extend([item] for item in batch)
                    continue
                results = [error]
            yield from zip(batch, results, strict=True)


def _batches(items: Sequence[T], slots: int) -> Iterator[list[T]]:
    """Items in the order given, many to a task at first and few at the end, so that all workers end together."""
    start = 0
    while start < len(items):
        size = min(_MOST_IN_A_TASK, max(1, (len(items) - start) // (_TASKS_PER_SLOT * slots)))
        yield list(items[start : start + size])
        start += size


def _each(place: Place, function: Callable[[T], R], batch: Sequence[T], whole: bool) -> list[R | Exception]:
    """On a worker, with one or all of its threads: call a function with each item.

    What may pass is tried again, a mistake of the user's is not.
    """
    refuse_if_unfit(place)
    with whole_worker() if whole else nullcontext():
        return [_insistent(function, item) for item in batch]


def _insistent(function: Callable[[T], R], item: T) -> R | Exception:
    for attempt in range(1, _TRIES):
        try:
            return function(item)
        except UserError as error:
            return error
        except Exception:  # any: it may pass
            time.sleep(attempt)
    try:
        return function(item)
    except Exception as error:  # any: the other items are done
        return error


@contextmanager
def connected(address: str, workspace: Path) -> Iterator[Cluster]:
    """The cluster of a scheduler, when at least one worker has come and all that have come are fit.

    Parameters
    ----------
    address : such as tcp://login1:8786, or the path of the file that the scheduler wrote (--scheduler-file).

    Raises
    ------
    UserError : nobody answers there, no worker comes, or one has other versions or does not see the workspace.
    """
    with _client(address) as client, scratch(workspace) as token:
        place = Place(versions(), token)
        if not client.nthreads():
            log.info(f"{address}: no worker has come yet, waiting for one")
        try:
            client.wait_for_workers(1, timeout=_FIRST_WORKER)
        except TimeoutError:
            raise UserError(f"no worker has come in {log.duration(_FIRST_WORKER)}", address) from None
        _refuse_unfit(_insistently(lambda: client.run(unfit, place, on_error="return")))
        cluster = Cluster(client, place)
        log.info(f"{address}: {len(client.nthreads())} workers with {cluster.slots} threads")
        yield cluster


def _insistently(ask: Callable[[], T]) -> T:
    """Ask all workers something, again where one of them dies meanwhile."""
    for attempt in range(1, _TRIES):
        try:
            return ask()
        except OSError:  # of a connection
            time.sleep(2 * attempt)
    return ask()


@contextmanager
def _client(address: str) -> Iterator[Client]:
    file = Path(address).expanduser()
    where = {"scheduler_file": str(file)} if file.is_file() else {"address": address}
    try:
        client = Client(**where, timeout=_CONNECT)
    except (OSError, ValueError) as error:
        fix = "Start one with `nnlite cluster CONFIG` or `dask scheduler`, and give the address that it prints."
        raise UserError(f"no Dask scheduler answers ({type(error).__name__})", address, fix) from None
    with client:
        yield client


def _refuse_unfit(answers: Mapping[str, Any]) -> None:
    for worker, answer in answers.items():
        if isinstance(answer, ModuleNotFoundError | AttributeError | ImportError):
            raise UserError(f"the worker {worker} cannot import nnunet_lite ({answer})",
                            fix=f"Install nnunet-lite[cluster] {nnunet_lite.__version__} there.")  # fmt: skip
        if answer is not None:
            raise UserError(f"the worker {worker} {answer if isinstance(answer, str) else told(answer)}")


@contextmanager
def whole_worker() -> Iterator[None]:
    """The only such work of this process at a time, with as many threads as the worker has."""
    import torch

    with _one_at_a_time:
        torch.set_num_threads(distributed.get_worker().state.nthreads)
        yield


def told(error: Exception, what: str = "") -> Exception:
    """An exception of Dask's in words; any other one as it is."""
    if not isinstance(error, KilledWorker):
        return error
    deaths = "several workers died of it, one after the other"
    return UserError(f"{what}: {deaths}" if what else deaths, fix="Mostly that is for want of memory: see their logs.")


def gone() -> UserError:
    return UserError("the scheduler is gone, and with it what was running", fix="The same command goes on from here.")
