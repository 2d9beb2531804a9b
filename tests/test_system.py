"""What this machine has: CPUs, memory and disk, also inside a container."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from samples import TINIEST, Forked, as_options, first_cases

from nnunet_lite import system
from nnunet_lite.errors import UserError


def test_too_little_disk_is_refused(tmp_path: Path) -> None:
    system.require_space(tmp_path, 1)
    with pytest.raises(UserError, match=r"preprocessing needs about 1,000 PB here and [\d.]+ [MGT]B are free"):
        system.require_space(tmp_path, 10**18)


def test_cases_in_flight_follow_memory_and_cpus() -> None:
    cpus = system.cpus()
    assert system.cases_in_flight(1, None) == cpus and system.cases_in_flight(1, 3) == 3
    assert system.cases_in_flight(10**15, None) == system.cases_in_flight(1, 0) == 1
    assert system.cases_in_flight(int(system.free_memory() * 0.5), None) == 1


class WithoutPosix(Forked):
    """`without_posix.py` in a process of its own, in which other packages than ours are imported."""

    def run(self) -> None:
        self.prepare()
        runpy.run_path(str(Path(__file__).with_name("without_posix.py")), run_name="__main__")


def test_a_model_is_made_without_what_only_posix_has(hippocampus: Path, tmp_path: Path) -> None:
    """Every module is imported, and help, check, plan, train and predict work, with threads and without."""
    data, images = first_cases(tmp_path / "data", 5), tmp_path / "images"
    images.mkdir()
    for name in ("hippocampus_025.nii.gz", "hippocampus_074.nii.gz"):
        shutil.copy(hippocampus / "imagesTs" / name, images)
    (images / "hippocampus_074.nii.gz").rename(images / "other.NII.GZ")  # is read under another name
    settings = " ".join(as_options(TINIEST | {"training.epochs": 1, "training.iterations": 2}))
    train = f"train 3d_fullres --recipe cpu {settings}"
    commands = f"--help then check {data} then plan {data} --workers 0 then {train} 0 --workers 0 then {train} 1"
    commands += f" then predict -i {images} -o out --save-uncertainty then doctor"
    process = WithoutPosix(*commands.split(), cwd=tmp_path)
    errors = process.communicate()[1]
    assert process.returncode == 0 and "this file system has no locks (fcntl is unavailable)" in errors, errors
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"hippocampus_025.nii.gz", "other.nii.gz"}
    assert not [path for path in tmp_path.rglob("*") if set(path.name) & set('<>:"|?*\\')], "Windows has no such names"


def test_a_ulimit_counts_as_memory() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30));"
        "from nnunet_lite.system import free_memory; print(free_memory())"
    )
    assert 0 < int(subprocess.check_output([sys.executable, "-c", code])) < 3 << 30


def test_cgroups_of_both_versions_count_as_memory(tmp_path: Path) -> None:
    second, first = tmp_path / "two" / "job", tmp_path / "one" / "memory" / "job"
    for group, names in (
        (second, ("memory.max", "memory.current")),
        (first, ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ):
        for level, limit in ((group, "8000000000"), (group.parent, "5000000000")):
            level.mkdir(parents=True, exist_ok=True)
            (level / names[0]).write_text(limit + "\n")
            (level / names[1]).write_text("2000000000\n")
            (level / "memory.stat").write_text("anon 5\ninactive_file 500000000\n")
    rooms = system._cgroup_memory("0::/job\n", tmp_path / "two")
    assert rooms == [6_500_000_000, 3_500_000_000]
    assert system._cgroup_memory("5:cpu:/job\n4:memory:/job\n", tmp_path / "one") == rooms
    (second / "memory.max").write_text("max\n")
    assert system._cgroup_memory("0::/job\n", tmp_path / "two") == [3_500_000_000]


def test_cpu_quotas_of_cgroups_of_both_versions_count(tmp_path: Path) -> None:
    """`docker --cpus=4` on 64 cores counts 4, also of a group above; parts of a CPU are rounded up."""
    second, first = tmp_path / "two" / "job", tmp_path / "one" / "cpu" / "job"
    for folder in (second, first):
        folder.mkdir(parents=True)
    (second / "cpu.max").write_text("max 100000\n")
    (second.parent / "cpu.max").write_text("400000 100000\n")
    assert system._cgroup_cpus("0::/job\n", tmp_path / "two") == [4]
    assert system._cgroup_cpus("0::/docker/a1b2\n", tmp_path / "two") == [4]  # a path of the host, in a container
    (second / "cpu.max").write_text("150000 100000\n")
    assert system._cgroup_cpus("0::/job\n", tmp_path / "two") == [2, 4]
    for group, quota in ((first, "-1"), (first.parent, "50000")):
        (group / "cpu.cfs_quota_us").write_text(quota + "\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")
    assert system._cgroup_cpus("4:memory:/job\n3:cpu,cpuacct:/job\n2:cpuset:/job\n0::/\n", tmp_path / "one") == [1]
    assert system._cgroup_cpus("", tmp_path) == []


def test_the_quota_of_a_real_cgroup_counts() -> None:
    """A process in a group of this machine with half a CPU and 300 MB; where tests may not make one, it is skipped."""
    second = Path("/sys/fs/cgroup/cgroup.controllers").is_file()
    name = f"nnlite-test-{os.getpid()}"
    groups = [Path("/sys/fs/cgroup", *part, name) for part in ([()] if second else [("cpu",), ("memory",)])]
    limits = {"cpu.max": "50000 100000", "memory.max": "300000000"} if second else {}
    limits |= {} if second else {"cpu.cfs_quota_us": "50000", "memory.limit_in_bytes": "300000000"}
    try:
        for group in groups:
            group.mkdir()
            for file, limit in limits.items():
                if second or file.startswith(group.parent.name):
                    (group / file).write_text(limit)
        code = (
            "import os, sys, pathlib\n"
            "for group in sys.argv[1:]: (pathlib.Path(group) / 'cgroup.procs').write_text(str(os.getpid()))\n"
            "from nnunet_lite import system\n"
            "print(system.cpus(), system.free_memory())"
        )
        out = subprocess.check_output([sys.executable, "-c", code, *map(str, groups)], text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let its tests make a cgroup")
    finally:
        for group in groups:
            if group.is_dir():
                group.rmdir()
    cpus, memory = map(int, out.split())
    assert cpus == 1 and 0 < memory < 300_000_000


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"), (999, "999 B"), (84_000, "84 kB"), (999_499, "999 kB"), (999_600, "1 MB"), (1_250_000, "1.25 MB"),
        (3_094_000_000, "3.09 GB"), (2e12, "2 TB"), (10**18, "1,000 PB"),
    ],
)  # fmt: skip
def test_bytes_are_written_with_three_digits(number: float, text: str) -> None:
    assert system.in_units(number) == text


def test_a_gpu_is_looked_for_without_torch() -> None:
    code = "import sys; from nnunet_lite.system import has_no_gpu; print(has_no_gpu(), 'torch' in sys.modules)"
    for hidden, expected in ((None, not torch.cuda.is_available()), ("", True)):
        here = os.environ if hidden is None else {**os.environ, "CUDA_VISIBLE_DEVICES": hidden}
        found = subprocess.run([sys.executable, "-c", code], env=here, check=True, capture_output=True, text=True)
        assert found.stdout == f"{expected} False\n"


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_does_not_wait_long_for_threads(times: int) -> None:
    """As for one that waits for a file server: it has three seconds here, or until Ctrl-C comes again."""
    code = (
        "import sys, time; sys.argv = ['nnlite']\nimport nnunet_lite\n"
        "from nnunet_lite import log, system\nsystem._CLEAN_UP = 3\nsystem.raise_on_interrupt()\n"
        "print('begins', flush=True)\n"
        "log.map_in_threads(time.sleep, [60], 1, 'reading')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begins\n"
    for _ in range(times):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert process.communicate(timeout=30)[1] == "stopped by SIGINT; the same command resumes from here\n"
    assert process.returncode == 130
    assert time.monotonic() - begin < (10 if times == 1 else 2.5)


def test_a_process_that_was_forked_keeps_nobody_waiting() -> None:
    code = """
import os
from nnunet_lite.system import calling_on_signal
with calling_on_signal(print):
    child = os.fork()
    if child == 0:
        os.read(os.pipe()[0], 1)
os.kill(child, 9)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
