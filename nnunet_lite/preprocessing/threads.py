"""Many small matrix products at once: threads of ours, while BLAS has one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock, Thread
from typing import Any, TypeVar

from nnunet_lite.system import cpus

T = TypeVar("T")

_blas_limits: list[Any] = []  # one for each caller that is inside now, all the same
_blas_lock = Lock()


def in_threads(work: Callable[[T], None], parts: Sequence[T], threads: int | None = None) -> None:
    """Work on all parts, in one thread per CPU unless told otherwise."""
    threads = min(threads or cpus(), len(parts))
    with one_blas_thread():  # its own would wait for each other after each of many small products
        if threads < 2:
            for part in parts:
                work(part)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, parts):
                pass


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """numpy's BLAS in one thread, a limit of the process: callers share it, and the last one to leave lifts it.

    With a limit for each, one would put back what another had set, and leave it so. threadpoolctl heeds one living
    thread alone, which may not be the one that leaves last, so a thread of its own sets and lifts it.
    """
    with _blas_lock:
        if not _blas_limits:
            _apart(lambda: _blas_limits.append(_blas().limit(limits=1)))
        else:
            _blas_limits.append(_blas_limits[0])
    try:
        yield
    finally:
        with _blas_lock:
            limit = _blas_limits.pop()
            if not _blas_limits:
                _apart(limit.restore_original_limits)


def _apart(work: Callable[[], None]) -> None:
    thread = Thread(target=work)
    thread.start()
    thread.join()


@lru_cache(maxsize=1)
def _blas() -> Any:
    """The handle on numpy's BLAS and its threads."""
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController().select(user_api="blas")
