"""`nnlite doctor` and `nnlite cluster`: describe this machine, and start workers on others.

The doctor describes installations that are broken too: imports of packages that may be missing are in functions.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import threading
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from nnunet_lite import __version__, log
from nnunet_lite.commands import options
from nnunet_lite.system import GB, cpus, free_memory, in_units
from nnunet_lite.workspace import workspace_folder

_MIN_DISK = 1 * GB  # `nnlite preprocess` checks what a dataset needs; with less, even a small one may not fit


def doctor(*, workspace: options.Workspace = None) -> options.About:
    """Describe this machine: versions, CPUs, memory, GPUs, disk; and its problems.

    Parameters
    ----------
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    About
        The description. The command exits with code 1 if there is a problem.

    Examples
    --------
    nnlite doctor
    nnlite doctor --json
    """
    folder = workspace_folder(workspace)
    versions = _package_versions()
    problems = [f"{name} is not installed: pip install {name}" for name, version in versions.items() if not version]
    total = free = instructions = cuda = cudnn = None
    gpus: list[dict[str, Any]] = []
    if psutil := _import("psutil", problems):
        total, free = round(psutil.virtual_memory().total / GB, 1), round(free_memory() / GB, 1)
    if torch := _import("torch", problems):
        instructions = torch.backends.cpu.get_cpu_capability()
        cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
        found, seen = [], torch.cuda.device_count()
        try:
            found = [torch.cuda.get_device_properties(i) for i in range(seen)]
        except RuntimeError as error:  # the driver counts GPUs that this torch cannot use, as where it is too old
            problems.append(f"torch cannot use the GPU: {str(error).splitlines()[0]}")
        gpus = [{"name": gpu.name, "memory_gb": round(gpu.total_memory / GB, 1)} for gpu in found]
        if gpus:
            problems += import_module("nnunet_lite.networks.devices").find_wrong_gpus()
        elif not seen and shutil.which("nvidia-smi"):
            problems.append("there is an NVIDIA driver but torch sees no GPU: install the CUDA build of torch")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    disk = shutil.disk_usage(existing).free
    if disk < _MIN_DISK:
        problems.append(f"only {in_units(disk)} are free where the workspace is ({existing})")
    if not existing.is_dir():
        problems.append(f"the workspace is a file, or in one ({existing})")
    elif not os.access(existing, os.W_OK):
        problems.append(f"the workspace cannot be written ({existing})")
    values = {
        "nnunet_lite": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "cpus": cpus(),
        "cpu_capability": instructions,
        "memory_gb": total,
        "memory_free_gb": free,
        "gpus": gpus,
        "cuda": cuda,
        "cudnn": cudnn,
        "workspace": str(folder),
        "disk_free_gb": round(disk / GB, 1),
        "problems": problems,
    }
    names = ", ".join(f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in gpus)
    lines = [
        f"nnunet_lite {__version__}, Python {values['python']}, {values['system']}",
        ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()),
        f"CPU     {values['cpus']} cores to use, {instructions or 'instruction set unknown'}",
        f"memory  {free} of {total} GB free" if total else "memory  unknown",
        f"GPU     {names}; CUDA {cuda}, cuDNN {cudnn}" if gpus else "GPU     none: use --recipe cpu, or expect days",
        f"disk    {in_units(disk)} free for the workspace {folder}",
        *(f"problem: {problem}" for problem in problems),
    ]
    return options.About(values, "\n".join(lines + ([] if problems else ["no problem found"])), 1 if problems else 0)


def _package_versions() -> dict[str, str | None]:
    """The packages that nnunet_lite needs and their versions; None for a missing one."""
    versions: dict[str, str | None] = {}
    try:
        needed = metadata.requires("nnunet_lite") or []
    except metadata.PackageNotFoundError:  # it runs from its folder
        needed = ["nnunet_lite"]
    for requirement in needed:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if "extra ==" not in requirement:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = None
    return versions


def _import(name: str, problems: list[str]) -> Any:
    """Import a package; one that cannot be imported becomes a problem."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library is missing or is another version
        problems.append(f"{name} cannot be imported: {error}")
        return None


# ------------------------------------------------------------------------------------------------------------ a cluster


@dataclass(frozen=True)
class RunningCluster:
    """A Dask scheduler and its workers, until `close` or the end of the process."""

    cluster: Any
    kind: str
    workers: int

    @property
    def scheduler(self) -> str:
        """The address of the scheduler."""
        return str(self.cluster.scheduler_address)

    def to_text(self) -> str:
        return self.scheduler

    def to_json(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "kind": self.kind, "workers": self.workers}

    def wait(self) -> None:
        """Block; the scheduler runs in threads of this process."""
        log.info(f"{self.workers} workers of kind {self.kind} start; Ctrl-C ends them. In another terminal: "
                 f"nnlite run DATA --scheduler {self.scheduler}")  # fmt: skip
        threading.Event().wait()

    def close(self) -> None:
        """End the workers and the scheduler."""
        self.cluster.close()


def cluster(
    config: Annotated[
        str | Path, typer.Argument(help="local, slurm, lsf, pbs, or a TOML file like configs/cluster/*.toml.")
    ],
    *,
    workers: Annotated[
        int | None, options.hardware(min=1, help="Number of workers.", show_default="the file's number")
    ] = None,
    script: Annotated[bool, options.output("--script", help="Only print the script of a worker's job.")] = False,
) -> RunningCluster | options.About:
    """Start a Dask scheduler and workers; run, train, preprocess and predict take its address with --scheduler.

    Parameters
    ----------
    config : str or Path
        A kind of cluster, or a TOML file.
    workers : int, optional
        How many, instead of the file's number.
    script : bool
        Start nothing, and return the script of a worker's job.

    Returns
    -------
    RunningCluster or About
        The cluster; with `script` the text of a job.

    Raises
    ------
    UserError
        There is no such cluster, Dask is not installed, or its scheduler cannot be started.

    Examples
    --------
    nnlite cluster local --workers 4
    nnlite cluster slurm --script
    """
    from nnunet_lite.cluster import read_cluster_config, start_cluster  # an optional extra

    settings = read_cluster_config(str(config))
    settings = settings.model_copy(update={"workers": 0 if script else workers or settings.workers})
    running = start_cluster(settings)
    if not script:
        return RunningCluster(running, settings.kind, settings.workers)
    with running:
        text = "workers are processes of this one" if settings.kind == "local" else running.job_script()
        return options.About({"script": text}, text)
