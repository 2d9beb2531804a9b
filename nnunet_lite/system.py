"""This process and its machine: standard streams and signals, then CPUs, memory and disk.

What only some systems have is used here and in files.py alone: macOS has no affinity and no cgroups, Windows no limits
of resources and fewer signals.

`nnunet_lite/__init__.py` imports this module first, so that a signal during the other imports is handled too. A program
that uses nnunet_lite as a library keeps its own streams and signals.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from nnunet_lite.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# -------------------------------------------------------------------------------------------------- streams and signals

_BEGIN = time.monotonic()  # this module is imported first
INTERRUPTED = 130  # the exit code that shells give a process that SIGINT ended
_CLEAN_UP = 5  # seconds

temporary_paths: set[Path] = set()  # files and folders to delete when a signal ends this process, see files.py
is_command = False  # see start_as_command
restarted = False  # whether --restart moved a run aside: typed again, it would move the new one aside
interrupted = False  # whether SIGINT came: a library may turn the KeyboardInterrupt into another exception


def _open_streams() -> None:
    """Open /dev/null for each of the streams 0 to 2 that is closed: otherwise the next opened file would become it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def _discard_messages() -> None:
    """Drop messages that standard error does not take, as on a full disk: Python would end with exit code 120."""
    if sys.stderr is None or sys.stderr.closed:
        return
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def how_to_resume(where: str = "here") -> str:
    """Return how the command that is stopped now resumes."""
    other = " without --restart" if restarted else " with --continue" * ("predict" in sys.argv[1:])
    return f"the same command{other} resumes from {where}"


def stop_at_once(number: int, frame: object = None) -> None:
    """End this process in any state, in imports or in a loop that catches exceptions; delete temporary files."""
    for path in list(temporary_paths):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        os.write(2, f"stopped by {signal.Signals(number).name}; {how_to_resume()}\n".encode())
    finally:  # the terminal may be closed
        os._exit(128 + number)


def raise_on_interrupt() -> None:
    """Let SIGINT raise KeyboardInterrupt from now on; the caller catches it."""
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable


def _interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt; a second Ctrl-C, or a clean-up that takes too long, ends the process at once.

    The clean-up waits for threads, and one of these may wait for a file server.
    """
    global interrupted
    if interrupted:
        stop_at_once(number)
    interrupted = True
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGALRM, lambda *_: stop_at_once(number))
        signal.alarm(_CLEAN_UP)
    raise KeyboardInterrupt


def stop_slowly() -> None:
    """Let the clean-up after Ctrl-C take its time; a second Ctrl-C ends it."""
    if hasattr(signal, "alarm"):
        signal.alarm(0)


def _unraisable(problem: sys.UnraisableHookArgs) -> None:
    """Stop where Python would only report a KeyboardInterrupt, in a destructor or a callback, and continue."""
    if problem.exc_type is KeyboardInterrupt:
        stop_at_once(signal.SIGINT, None)
    sys.__unraisablehook__(problem)


def signals_of(*names: str) -> list[signal.Signals]:
    """Return the signals of these names that the system has: Windows has no SIGHUP and no SIGQUIT."""
    return [signal.Signals[name] for name in names if hasattr(signal, name)]


def start_as_command() -> None:
    """Open closed streams and handle signals: this process is `nnlite`, not a program that uses nnunet_lite."""
    global is_command
    is_command = True
    _open_streams()
    atexit.register(gc.freeze)  # or Python's last collection looks at every object of torch, for a second and more
    atexit.register(_discard_messages)
    for number in signals_of("SIGINT", "SIGTERM", "SIGHUP"):
        # in the background and under nohup, signals are ignored, and stay so
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, stop_at_once)


@contextmanager
def calling_on_signal(react: Callable[[int], object]) -> Iterator[None]:
    """Call a function in a thread as soon as a signal arrives that Python handles.

    The handlers themselves run in the main thread, after the call that it is in: a step of a large network on a CPU
    takes many seconds.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def listen() -> None:
        while numbers := receiver.recv(1):
            react(numbers[0])

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.shutdown(socket.SHUT_WR)  # `close` would not end it in a process that was forked meanwhile
        sender.close()
        thread.join()
        receiver.close()


def has_no_gpu() -> bool:
    """Whether torch finds no GPU. Where it is not loaded, which takes seconds, the driver and its version say so."""
    if "torch" in sys.modules:
        return not sys.modules["torch"].cuda.is_available()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    drivers = (shutil.which("nvidia-smi"), *map(os.path.exists, ("/proc/driver/nvidia", "/dev/kfd")))
    return hidden or not any(drivers) or version("torch").endswith("+cpu")


# ------------------------------------------------------------------------------------------------ CPUs, memory and disk

GB = 1e9
FREE_SHARE = 0.8  # of the free memory: the rest is for what is not counted
_MOST_PAIRS = 8  # a large CT and its reference take about 1 GB
_CGROUP = Path("/sys/fs/cgroup")
_MACOS_FILES = 10240  # open files that macOS grants where it states no limit


def in_units(number: float) -> str:
    """Return bytes with three digits and a unit: 84 kB, 1.25 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(number) < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.0f} PB"


def cpus() -> int:
    """Return the CPUs that this process may use, by its affinity (taskset, SLURM) and the quotas of its cgroups."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([usable, *_cgroup_cpus(_membership())]))


def free_memory() -> int:
    """Return the bytes that this process may still use: the least of what machine, cgroups and ulimit leave."""
    import psutil  # `nnlite doctor` reports if it is missing

    process = psutil.Process()
    limits = [int(psutil.virtual_memory().available), *_cgroup_memory(_membership())]
    if hasattr(psutil, "RLIMIT_AS"):  # on Linux
        address_space, _ = process.rlimit(psutil.RLIMIT_AS)
        if address_space != psutil.RLIM_INFINITY:
            limits.append(address_space - process.memory_info().vms)
    return max(0, min(limits))


def process_age() -> float:
    """Return the seconds since this process began, if it is `nnlite`; otherwise 0."""
    return time.monotonic() - _BEGIN if is_command else 0.0


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had."""
    import psutil

    if resource is None:
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def allow_open_files() -> None:
    """Let this process open as many files as the system allows."""
    if resource is not None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        soft = min(hard, _MACOS_FILES) if sys.platform == "darwin" else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def file_size_limit() -> float:
    """Return the most bytes of a file that this process may write (`ulimit -f`), infinite without a limit."""
    limit = -1 if resource is None else resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return math.inf if resource is None or limit == resource.RLIM_INFINITY else limit


def cases_in_flight(largest: int, workers: int | None) -> int:
    """Return how many cases to work on at once, so that memory and CPUs suffice; at least one.

    Parameters
    ----------
    largest : int
        Bytes that the largest case needs.
    workers : int or None
        The most cases at once; None for the number of CPUs.
    """
    fitting = int(FREE_SHARE * free_memory() // max(1, largest))
    return max(1, min(cpus() if workers is None else workers, fitting))


def pairs_at_once(n: int, workers: int | None) -> int:
    """Return how many of n pairs of label maps to read and compare at once, in a thread each; at least one.

    Parameters
    ----------
    n : int
        Number of pairs.
    workers : int or None
        The most pairs at once; None for the number of CPUs, 0 or 1 for one.
    """
    return max(1, min(cpus() if workers is None else workers, n, _MOST_PAIRS))


def expand_home(path: str | Path) -> Path:
    """Return a path with the home folder of a ~ at its beginning; one that is no home, as in ~scan.nii.gz, stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises then


def require_space(folder: Path, needed: int) -> None:
    """Make sure that the disk of a folder has room for some bytes.

    Raises
    ------
    UserError
        It has not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"preprocessing needs about {in_units(needed)} here and {in_units(free)} are free"
        raise UserError(what, folder, "Free some space, or choose another --workspace.")


# joblib's cpu_count reads only the root cgroup: quotas of SLURM and systemd are set on the groups below it


def _membership() -> str:
    """Return the cgroups of this process; nothing if the system has no cgroups."""
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""


def _cgroups(membership: str, controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Iterate over the cgroups that may limit a controller, and those above them, with whether of version 2.

    In a container the root of the mounted tree is the container's own cgroup, whatever path is named.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        group = base / path.lstrip("/")
        for level in (group, *group.parents):
            if level.is_relative_to(base):
                yield level, not controllers


def _cgroup_cpus(membership: str, root: Path = _CGROUP) -> list[int]:
    """Return the CPUs that each cgroup allows, such as 4 for `docker run --cpus=4`; parts of a CPU are rounded up."""
    found = []
    for group, second in _cgroups(membership, "cpu", root):
        files = [group / name for name in (("cpu.max",) if second else ("cpu.cfs_quota_us", "cpu.cfs_period_us"))]
        if not all(file.is_file() for file in files):
            continue
        quota, period = " ".join(file.read_text() for file in files).split()
        if quota not in ("max", "-1"):
            found.append(math.ceil(int(quota) / int(period)))
    return found


def _cgroup_memory(membership: str, root: Path = _CGROUP) -> list[int]:
    """Return the bytes that each cgroup with a limit leaves: the limit less the memory that cannot be dropped."""
    found = []
    for group, second in _cgroups(membership, "memory", root):
        limit, usage = (
            ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        most = (group / limit).read_text().strip() if (group / limit).is_file() else "max"
        if most == "max" or int(most) >= 1 << 60:
            continue
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # version 1 counts the groups below in the usage, and in the statistics only under names of their own
        droppable = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
        found.append(int(most) - int((group / usage).read_text()) + int(droppable))
    return found
