"""The steps of a run on a cluster: those that may be done anywhere, such as folds, on its workers, the others here."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import distributed
from distributed import CancelledError, Future, KilledWorker

from nnunet_lite import log
from nnunet_lite.cluster import Cluster, Place, gone, refuse_if_unfit, told, whole_worker
from nnunet_lite.errors import Busy, Stopped, describe
from nnunet_lite.workflow import Ended, Journal, Step
from nnunet_lite.workflow import execute as execute_here

_BUSY = 600.0  # seconds that a fold waits for a worker that was taken for dead and still trains it
_STOPPING = 120.0  # seconds that folds get to write their checkpoints
_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class _Begun:
    """A step that the workers have; `progress` is how much of it was done before."""

    step: Step
    progress: float
    start: float


def execute(cluster: Cluster, steps: Sequence[Step], journal: Journal) -> list[Ended]:
    """Do the steps that are not done, those that may be done anywhere on the workers, as many at once as these take.

    What a worker that died had begun, another one goes on with. A step that fails stops those that need it, not others.

    Raises
    ------
    What the first step raised that failed; Stopped after Ctrl-C, when the folds have written their checkpoints.
    """
    todo = [step for step in steps if not step.is_done()]
    ended = {step.name: Ended(step.name, "kept") for step in steps if step not in todo}
    running: dict[Future, _Begun] = {}
    failed: dict[str, Exception] = {}
    try:
        while todo or running:
            not_done = {step.name for step in todo} | {begun.step.name for begun in running.values()} | failed.keys()
            ready = [step for step in todo if not_done.isdisjoint(step.needs)]
            for step in ready:
                if step.anywhere:
                    running[_submit(cluster, step)] = _Begun(step, step.progress(), time.monotonic())
            todo = [step for step in todo if not (step in ready and step.anywhere)]
            here = [step for step in ready if not step.anywhere]
            if running:
                ended |= {each.step: each for each in _wait(cluster, running, failed, journal)}
            elif here:
                ended |= {each.step: each for each in execute_here(here[:1], journal)}
                todo.remove(here[0])
            else:
                break  # what is left needs what has failed
    except KeyboardInterrupt:
        _stop(cluster, running)
        raise Stopped("stopped by SIGINT; the same command goes on from here", signal.SIGINT) from None
    if failed:
        raise next(iter(failed.values()))
    return [ended[step.name] for step in steps]


def _submit(cluster: Cluster, step: Step) -> Future:
    log.info(f"{step.name}: given to the workers")
    key = f"{step.name.replace(' ', '-')}-{secrets.token_hex(4)}"
    return cluster.client.submit(_fold, cluster.place, step.run, key=key, resources=cluster.for_folds(), pure=False)


def _fold(place: Place, run: Callable[[], Any]) -> None:
    """On a worker: train a fold with all of its threads; one that was taken for dead and is not is waited for."""
    refuse_if_unfit(place)
    until = time.monotonic() + _BUSY
    with whole_worker():
        while True:
            try:
                run()
            except Busy:
                if time.monotonic() > until:
                    raise
                time.sleep(5)
            else:
                return


def _wait(
    cluster: Cluster, running: dict[Future, _Begun], failed: dict[str, Exception], journal: Journal
) -> list[Ended]:
    """Wait until a step ends, or for a while; what has ended leaves `running`, what has failed comes to `failed`."""
    try:
        done = distributed.wait(list(running), timeout=_BETWEEN_LINES, return_when="FIRST_COMPLETED").done
    except TimeoutError:
        log.info("running: " + ", ".join(f"{b.step.name} {b.step.progress():.0%}" for b in running.values()))
        return []
    ended = []
    for future in done:
        begun = running.pop(future)
        seconds = time.monotonic() - begun.start
        try:
            future.result()
        except CancelledError:
            raise gone() from None
        except KilledWorker as error:
            if (progress := begun.step.progress()) > begun.progress:  # a machine that is taken away is no failure
                running[_submit(cluster, begun.step)] = _Begun(begun.step, progress, time.monotonic())
                continue
            failed[begun.step.name] = told(error, begun.step.name)
        except Exception as error:  # any: the others go on
            failed[begun.step.name] = error
        else:
            journal.add(begun.step, seconds, 1 - begun.progress)
            ended.append(Ended(begun.step.name, "done", round(seconds, 2)))
            log.info(f"{begun.step.name}: done in {log.duration(seconds)}")
            continue
        log.info(f"{begun.step.name}: failed: {describe(failed[begun.step.name])}")
    return ended


def _stop(cluster: Cluster, running: Mapping[Future, _Begun]) -> None:
    """Ask the folds to stop, and wait until they have written their checkpoints."""
    if not running:
        return
    log.info(f"asking {len(running)} folds to write a checkpoint and stop")
    with suppress(TimeoutError, OSError):
        waiting = [future for future in running if future.status == "pending"]
        cluster.client.run(_ask_to_stop)
        distributed.wait(waiting, timeout=_STOPPING)
    cluster.client.cancel(list(running), force=True)


def _ask_to_stop() -> None:
    from nnunet_lite.training.limits import stop_threads  # imports torch, which workers that preprocess do without

    stop_threads()
