"""How much this process may use: CPUs, memory (cgroup and ulimit included) and disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nnunet_lite.errors import UserError

GB = 1e9
_SHARE = 0.8  # of the free memory: the rest is for what is not counted
_MOST_PAIRS = 8  # a large CT and its reference take about 1 GB
_CGROUP = Path("/sys/fs/cgroup")


def cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def free_memory() -> int:
    """Bytes that this process may still take: the least of what the machine, its cgroups and its ulimit leave."""
    import psutil

    process = psutil.Process()
    limits = [int(psutil.virtual_memory().available), *_cgroup_rooms(Path("/proc/self/cgroup").read_text())]
    address_space, _ = process.rlimit(psutil.RLIMIT_AS)
    if address_space != psutil.RLIM_INFINITY:
        limits.append(address_space - process.memory_info().vms)
    return max(0, min(limits))


def cases_in_flight(largest: int, workers: int | None) -> int:
    """How many cases to work on at once, so that memory and CPUs suffice; at least one.

    Parameters
    ----------
    largest : bytes that the largest case needs.
    workers : the most cases at once; None for as many as there are CPUs.
    """
    fitting = int(_SHARE * free_memory() // max(1, largest))
    return max(1, min(cpus() if workers is None else workers, fitting))


def pairs_at_once(n: int, workers: int | None) -> int:
    """How many of n pairs of label maps to read and compare at once, in a thread each; at least one.

    Parameters
    ----------
    workers : the most; None for as many as there are CPUs, 0 or 1 for one.
    """
    return max(1, min(cpus() if workers is None else workers, n, _MOST_PAIRS))


def require_space(folder: Path, needed: int) -> None:
    """Make sure that a disk has room.

    Raises
    ------
    UserError : it has not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"preprocessing needs about {needed / GB:.1f} GB here and {free / GB:.1f} GB are free",
            folder,
            "Free some space, or choose another --workspace.",
        )


def _cgroup_rooms(membership: str, root: Path = _CGROUP) -> list[int]:
    """Bytes left in each memory cgroup, version 2 or 1, that a /proc/self/cgroup names, and in those above it."""
    rooms = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = base / path.lstrip("/")
        for level in (group, *group.parents):
            if level.is_relative_to(base):
                rooms += _room(level, *names)
    return rooms


def _room(group: Path, limit: str, usage: str) -> list[int]:
    """The limit less what is used and cannot be dropped; nothing where there is no limit."""
    if not (group / limit).is_file():
        return []
    most = (group / limit).read_text().strip()
    if most == "max" or int(most) >= 1 << 60:
        return []
    used = int((group / usage).read_text())
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return [int(most) - used + int(statistics.get("inactive_file", 0))]
