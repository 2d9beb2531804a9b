"""How much this process may use: CPUs, memory (cgroup and ulimit included) and disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nnunet_lite.errors import UserError

GB = 1e9
_SHARE = 0.8  # of the free memory: the rest is for what is not counted
_MOST_PAIRS = 8  # a large CT and its reference take about 1 GB
_CGROUP = Path("/sys/fs/cgroup")


def in_units(number: float) -> str:
    """Bytes with three digits, in the unit that suits them: 84 kB, 1.25 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(number) < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.0f} PB"


def cpus() -> int:
    """CPUs that this process may use: those that it may run on (taskset, SLURM), or fewer by the quota of a cgroup."""
    return max(1, min([len(os.sched_getaffinity(0)), *_cgroup_cpus(_membership())]))


def free_memory() -> int:
    """Bytes that this process may still take: the least of what the machine, its cgroups and its ulimit leave."""
    import psutil

    process = psutil.Process()
    limits = [int(psutil.virtual_memory().available), *_cgroup_rooms(_membership())]
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
            f"preprocessing needs about {in_units(needed)} here and {in_units(free)} are free",
            folder,
            "Free some space, or choose another --workspace.",
        )


def _membership() -> str:
    """The cgroups of this process; none where the kernel has no cgroups."""
    file = Path("/proc/self/cgroup")
    return file.read_text() if file.is_file() else ""


def _cgroups(membership: str, controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """The cgroups of a /proc/self/cgroup that may limit something, and those above them, with whether of version 2.

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
    """CPUs whose time each cgroup allows, such as 4 for `docker run --cpus=4`; parts of a CPU are rounded up."""
    found = []
    for group, second in _cgroups(membership, "cpu", root):
        files = [group / name for name in (("cpu.max",) if second else ("cpu.cfs_quota_us", "cpu.cfs_period_us"))]
        if not all(file.is_file() for file in files):
            continue
        quota, period = " ".join(file.read_text() for file in files).split()
        if quota not in ("max", "-1"):
            found.append(math.ceil(int(quota) / int(period)))
    return found


def _cgroup_rooms(membership: str, root: Path = _CGROUP) -> list[int]:
    """Bytes left in each memory cgroup, version 2 or 1."""
    rooms = []
    for group, second in _cgroups(membership, "memory", root):
        names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        rooms += _room(group, *names)
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
    # version 1 counts the groups below in the usage, and in the statistics only under names of their own
    droppable = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
    return [int(most) - used + int(droppable)]
