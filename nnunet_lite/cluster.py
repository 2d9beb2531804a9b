"""Run functions on the workers of a Dask scheduler, and start such schedulers.

`connect` finds the workers of a scheduler. `Cluster.spread` calls a function with many items, such as the cases to
preprocess, and `Cluster.submit` calls one that takes a whole worker, such as the training of a fold. `start_cluster`
starts a scheduler and its workers from a TOML file.

All machines share one workspace. Only functions, file names, plans and settings travel through the scheduler; results
are files in the workspace. So another worker can take over the work of one that died, and continue from its files: the
cases that exist, the last checkpoint of a fold.

A case takes a thread of a worker. A fold or a prediction takes all of its threads, one after the other. If some workers
have the resource `GPU` (`dask worker --resources GPU=1`), these take the folds and predictions.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.errors import Busy, UserError, WorkersDied, describe, how_to_install
from nnunet_lite.files import first_problem, scratch
from nnunet_lite.settings import recipe_folder
from nnunet_lite.system import expand_home

_INSTALL = f"{how_to_install('cluster')}, here and for the workers."

try:
    import distributed
    from distributed import CancelledError, Client, Future, KilledWorker, as_completed
except ImportError as error:
    raise UserError(f"a cluster needs Dask ({error})", fix=_INSTALL) from None

T = TypeVar("T")
R = TypeVar("R")

_GPU = "GPU"  # the name of this resource among Dask users
_CONNECT = 10  # seconds to find the scheduler
_FIRST_WORKER = 600  # seconds to wait for one: a queue may be long
_FILE_DELAY = 20.0  # seconds until all machines see a new file in the workspace
_IN_FLIGHT = 1000  # tasks that the scheduler knows at a time, however many cases there are
_MOST_IN_A_TASK, _TASKS_PER_SLOT = 16, 4
_POLL, _LOOK = 0.02, 30.0  # seconds between looks for results, and for workers
_TRIES = 3  # of what may fail for a moment, such as a file server that does not answer
_BUSY = 600.0  # seconds that a fold waits for a worker that was considered dead and still trains it
_STOPPING = 120.0  # seconds that folds get to write their checkpoints
_whole_worker = threading.Lock()


# ------------------------------------------------------------------------------------------- what workers must have


@dataclass(frozen=True)
class SharedSetup:
    """What a worker must have in common with this process.

    Parameters
    ----------
    versions : tuple of (str, str)
        Packages and their versions. Builds of one version, such as for CPU and for GPU, are equal.
    token : Path
        A file in the workspace.
    """

    versions: tuple[tuple[str, str], ...]
    token: Path

    @classmethod
    def of_this_process(cls, token: Path) -> SharedSetup:
        packages = {name: metadata.version(name).partition("+")[0] for name in ("torch", "numpy", "distributed")}
        python = ".".join(platform.python_version_tuple()[:2])
        return cls(tuple({"nnunet_lite": nnunet_lite.__version__, "python": python, **packages}.items()), token)


def find_difference(setup: SharedSetup) -> str | None:
    """Return what this process, a worker, lacks of a setup; None if it has all."""
    own = dict(SharedSetup.of_this_process(setup.token).versions)
    for name, version in setup.versions:
        if own[name] != version:
            return f"has {name} {own[name]}, and here is {version}: install the same version on all machines"
    workspace, until = setup.token.parent, time.monotonic() + _FILE_DELAY
    while not setup.token.exists():
        if not workspace.is_dir() or time.monotonic() > until:
            return f"does not see the workspace {workspace}: it must be on a file system that all machines share"
        time.sleep(0.5)
    return None if os.access(workspace, os.W_OK) else f"may not write to the workspace {workspace}"


@lru_cache(maxsize=1)
def _check_worker(setup: SharedSetup) -> None:
    """Refuse to work in a worker that lacks something; it may have joined late.

    Raises
    ------
    UserError
        It lacks something.
    """
    if difference := find_difference(setup):
        raise UserError(f"the worker on {platform.node()} {difference}")


# ------------------------------------------------------------------------------------------------------ the cluster


@dataclass(frozen=True)
class Cluster:
    """A scheduler and workers with the same setup, some of which had a GPU when this process connected."""

    client: Client
    setup: SharedSetup
    had_gpus: bool

    @property
    def slots(self) -> int:
        """Threads of all workers."""
        return max(1, sum(self.client.nthreads().values()))

    def _resources(self) -> dict[str, int]:
        """The resources of a worker that a fold or a prediction takes."""
        if _has_gpus(self.client):
            return {_GPU: 1}
        if self.had_gpus:
            log.warn("no worker with a GPU is left: what is submitted now runs on workers without one")
        return {}

    def spread(
        self, function: Callable[[T], R], items: Sequence[T], what: str, *, heavy: bool = False
    ) -> Iterator[tuple[T, R | Exception]]:
        """Call a function with each item on the workers; yield each item with its result, or its error, as they end.

        Several items are one task, so that the scheduler has little to do for each. If the workers of a task die, its
        items are tried again at the end, one at a time. So an item that kills workers, mostly by using too much
        memory, is found out, and no other item of its task is blamed.

        Parameters
        ----------
        function : callable
            What to call; it is pickled.
        items : sequence
            Its arguments.
        what : str
            A name for the progress bar and the tasks.
        heavy : bool
            Whether an item takes a whole worker (with a GPU if there are some), instead of a thread.
        """
        yield from log.progress(self._spread(function, items, what, heavy), len(items), what)

    def _spread(
        self, function: Callable[[T], R], items: Sequence[T], what: str, heavy: bool
    ) -> Iterator[tuple[T, R | Exception]]:
        tasks = deque(_batches(items, self.slots))
        suspects: deque[T] = deque()  # their worker died; one of them may be the cause
        running: dict[Future, list[T]] = {}
        finished = as_completed(loop=self.client.loop)
        resources = self._resources() if heavy else {}
        while tasks or running or suspects:
            if alone := not (tasks or running):
                tasks.append([suspects.popleft()])
            while tasks and len(running) < _IN_FLIGHT:
                batch, key = tasks.popleft(), f"{what}-{secrets.token_hex(8)}"
                future = self.client.submit(
                    _call_with_each, self.setup, function, batch, heavy, key=key, resources=resources, pure=False
                )
                running[future] = batch
                finished.add(future)
            future = self._next_ended(finished)
            batch = running.pop(future)
            results = _result_or_error(future)
            if isinstance(results, WorkersDied) and not alone:
                log.info(f"{results} Each of {len(batch)} is tried again, alone, at the end")
                suspects.extend(batch)
            elif isinstance(results, Exception) and len(batch) > 1:  # of the worker, or of sending the results
                log.info(f"{describe(results)} Each of {len(batch)} is tried again")
                tasks.extend([item] for item in batch)
            else:
                yield from zip(batch, [results] if isinstance(results, Exception) else results, strict=True)

    def _next_ended(self, finished: as_completed) -> Future:
        """Return the next future that ends; warn meanwhile if no worker is left."""
        looked = time.monotonic()
        while not finished.has_ready():
            time.sleep(_POLL)
            if time.monotonic() - looked > _LOOK:
                self.warn_without_workers()
                looked = time.monotonic()
        return next(finished)

    def warn_without_workers(self) -> None:
        """Warn if no worker has a task, since nothing ends until one has: all ended, or have no GPU or no memory."""
        with suppress(TimeoutError, OSError), log.working("asking the scheduler"):  # if it ends, the futures report it
            if not any(self.client.processing().values()):
                why = "the logs of the workers say why they ended or paused"
                log.warn(f"no worker is left, waiting for one to join ({why}); after Ctrl-C, the same command resumes")

    def submit(self, function: Callable[[], Any], name: str) -> Future:
        """Call a function that takes a whole worker, such as the training of a fold, when one is free."""
        key = f"{name.replace(' ', '-')}-{secrets.token_hex(4)}"
        return self.client.submit(_call_alone, self.setup, function, key=key, resources=self._resources(), pure=False)

    def wait(self, futures: Sequence[Future], seconds: float) -> list[Future]:
        """Wait until a future ends; return those that ended, none if the time is over."""
        try:
            return list(distributed.wait(futures, timeout=seconds, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            return []

    def error_of(self, future: Future) -> Exception | None:
        """Return what a future that ended has raised; `WorkersDied` if its workers died.

        Raises
        ------
        UserError
            The scheduler ended.
        """
        result = _result_or_error(future)
        return result if isinstance(result, Exception) else None

    def stop(self, futures: Sequence[Future], stop_worker: Callable[[], None]) -> None:
        """Call a function on all workers that makes them stop, wait until they have, and cancel the futures."""
        with suppress(TimeoutError, OSError), log.working("waiting for the workers"):
            pending = [future for future in futures if future.status == "pending"]
            self.client.run(stop_worker)
            distributed.wait(pending, timeout=_STOPPING)
        self.client.cancel(list(futures), force=True)


def _has_gpus(client: Client) -> bool:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any(worker["resources"].get(_GPU) for worker in workers)


def _batches(items: Sequence[T], slots: int) -> Iterator[list[T]]:
    """Cut items into tasks, of many items at first and of few at the end, so that all workers end together."""
    start = 0
    while start < len(items):
        size = min(_MOST_IN_A_TASK, max(1, (len(items) - start) // (_TASKS_PER_SLOT * slots)))
        yield list(items[start : start + size])
        start += size


def _result_or_error(future: Future) -> Any:
    """Return the result of a future that ended, or what it has raised; `WorkersDied` if its workers died.

    Raises
    ------
    UserError
        The scheduler ended.
    """
    try:
        return future.result()
    except CancelledError:
        fix = "Type the same command to resume."
        raise UserError("the scheduler ended, and with it what was running", fix=fix) from None
    except KilledWorker:
        fix = "The usual cause is too little memory: see their logs."
        return WorkersDied("several workers died of it, one after the other", fix=fix)
    except Exception as error:
        return error


# ------------------------------------------------------------------------------------------------------ on a worker


def _call_with_each(
    setup: SharedSetup, function: Callable[[T], R], batch: Sequence[T], heavy: bool
) -> list[R | Exception]:
    """Call a function with each item, with one or all threads of this worker."""
    _check_worker(setup)
    results: list[R | Exception] = []
    with _all_threads() if heavy else nullcontext():
        for item in batch:
            try:
                results.append(_retry(partial(function, item)))
            except Exception as error:  # the other items are done nevertheless
                results.append(error)
    return results


def _call_alone(setup: SharedSetup, function: Callable[[], Any]) -> None:
    """Call a function with all threads of this worker; wait if a worker that was considered dead still does it."""
    _check_worker(setup)
    until = time.monotonic() + _BUSY
    with _all_threads():
        while True:
            try:
                function()
                return
            except Busy:
                if time.monotonic() > until:
                    raise
                time.sleep(5)


def _retry(function: Callable[[], R]) -> R:
    """Call a function again if it fails, which may be for a moment; a mistake of the user stays one."""
    for attempt in range(1, _TRIES):
        try:
            return function()
        except UserError:
            raise
        except Exception:
            time.sleep(2 * attempt)
    return function()


@contextmanager
def _all_threads() -> Iterator[None]:
    """Let one task of this process at a time use all threads of the worker."""
    import torch  # workers that preprocess do without

    with _whole_worker:
        torch.set_num_threads(distributed.get_worker().state.nthreads)
        yield


# ------------------------------------------------------------------------------------------------ connect and start


@contextmanager
def connect(address: str, workspace: Path) -> Iterator[Cluster]:
    """Connect to a scheduler, and wait for its first worker.

    Parameters
    ----------
    address : str
        Such as tcp://login1:8786, or the path of the file that the scheduler wrote (--scheduler-file).
    workspace : Path
        A folder that all machines share.

    Raises
    ------
    UserError
        No scheduler answers, no worker joins, or a worker has other versions or does not see the workspace.
    """
    file = expand_home(address)
    where = {"scheduler_file": str(file)} if file.is_file() else {"address": address}
    try:
        client = Client(**where, timeout=_CONNECT)
    except (OSError, ValueError) as error:
        fix = "Start one with `nnlite cluster CONFIG` or `dask scheduler`, and give the address that it prints."
        raise UserError(f"no Dask scheduler answers ({type(error).__name__})", address, fix) from None
    with client, scratch(workspace) as token:
        if not client.nthreads():
            log.info(f"{address}: waiting for the first worker")
        setup = SharedSetup.of_this_process(token)
        with log.working("waiting for the answers of the workers"):
            try:
                client.wait_for_workers(1, timeout=_FIRST_WORKER)
            except TimeoutError:
                raise UserError(f"no worker has joined in {log.duration(_FIRST_WORKER)}", address) from None
            answers = _retry(partial(client.run, find_difference, setup, on_error="return"))  # one may die meanwhile
        for worker, answer in answers.items():
            _check_answer(worker, answer)
        cluster = Cluster(client, setup, _has_gpus(client))
        log.info(f"{address}: {len(client.nthreads())} workers with {cluster.slots} threads")
        yield cluster


def _check_answer(worker: str, answer: Any) -> None:
    """Refuse a worker by its answer to `find_difference`, or by its error."""
    if isinstance(answer, AttributeError | ImportError):
        fix = f"It needs version {nnunet_lite.__version__} there. {how_to_install('cluster')}"
        raise UserError(f"the worker {worker} cannot import nnunet_lite ({answer})", fix=fix)
    if answer is not None:
        raise UserError(f"the worker {worker} {answer}")


class ClusterConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """A file of configs/cluster: the kind of cluster, its workers (jobs), and the options of Dask's class for it."""

    kind: Literal["local", "slurm", "lsf", "pbs"]
    workers: int = Field(ge=0)
    options: dict[str, Any] = {}


def read_cluster_config(name: str) -> ClusterConfig:
    """Read configs/cluster/NAME.toml, or a file.

    Raises
    ------
    UserError
        There is none, or it has another form.
    """
    known = {path.stem: path for path in sorted((recipe_folder() / "cluster").glob("*.toml"))}
    file = known.get(name, expand_home(name))
    if not file.is_file():
        raise UserError(f"there is no cluster {name!r}", fix=f"There are: {', '.join(known)}; or give a TOML file.")
    try:
        return ClusterConfig.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        reason = first_problem(error)
    except ValueError as error:  # no text, or no TOML
        reason = " ".join(str(error).split())
    raise UserError(f"must be TOML with kind, workers and options ({reason:.200})", file)


def start_cluster(config: ClusterConfig) -> Any:
    """Start a Dask cluster; its workers start when the queue lets them. It is closed by `close`, or as a context.

    Raises
    ------
    UserError
        The packages are not installed, an option is unknown, or its scheduler cannot be started.
    """
    if config.kind == "local":
        kind = distributed.LocalCluster
    else:
        try:
            import dask_jobqueue
        except ImportError as error:
            raise UserError(f"a {config.kind} cluster needs dask-jobqueue ({error})", fix=_INSTALL) from None
        kind = getattr(dask_jobqueue, f"{config.kind.upper()}Cluster")
    try:
        with log.working("starting the cluster"):
            return kind(**{"n_workers": config.workers, **config.options})
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"a {config.kind} cluster cannot be started: {error}") from None
