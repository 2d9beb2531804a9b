"""`nnlite doctor`: describe this machine, and the problems that it has."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import nnunet_lite
from nnunet_lite.commands.options import About, Workspace
from nnunet_lite.system import GB, cpus, free_memory, in_units
from nnunet_lite.workspace import workspace_folder

# what pyproject.toml asks for
_PACKAGES = (
    "torch", "numpy", "scipy", "SimpleITK", "nibabel", "pillow", "tifffile", "imagecodecs", "batchgenerators", "tqdm",
    "blosc2", "safetensors", "pydantic", "typer", "psutil", "matplotlib", "jinja2", "scikit-learn",
    "connected-components-3d", "threadpoolctl",
)  # fmt: skip
_LITTLE_DISK = 5 * GB


def doctor(*, workspace: Workspace = None) -> About:
    """Describe this machine: versions, CPUs, memory, GPUs, disk; and its problems.

    Returns
    -------
    About
        The description. The command exits with code 1 if there is a problem.
    """
    return describe_machine(workspace_folder(workspace))


def describe_machine(workspace: Path) -> About:
    """Versions, CPUs, memory, GPUs, disk, and what stands in the way of a good run, missing packages included."""
    versions = {name: _version(name) for name in _PACKAGES}
    problems = [f"{name} is not installed: pip install {name}" for name, version in versions.items() if not version]
    total, free = _memory_gb(problems)
    cpu_capability, gpus = _torch(problems)
    folder = next(p for p in (workspace, *workspace.parents) if p.exists())
    disk = shutil.disk_usage(folder).free
    if disk < _LITTLE_DISK:
        problems.append(f"only {in_units(disk)} are free where the workspace is ({folder})")
    if not os.access(folder, os.W_OK):
        problems.append(f"the workspace cannot be written ({folder})")
    values = {
        "nnunet_lite": nnunet_lite.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "cpus": cpus(),
        "cpu_capability": cpu_capability,
        "memory_gb": total,
        "memory_free_gb": free,
        "gpus": gpus,
        "workspace": str(workspace),
        "disk_free_gb": round(disk / GB, 1),
        "problems": problems,
    }
    shown = [f"{g['name']} ({g['memory_gb']} GB)" for g in gpus] or ["none: use --recipe cpu, or expect days"]
    lines = [
        f"nnunet_lite {nnunet_lite.__version__}, Python {values['python']}, {values['system']}",
        ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()),
        f"CPU     {values['cpus']} cores to use, {cpu_capability or 'instruction set unknown'}",
        f"memory  {free} of {total} GB free" if total else "memory  unknown",
        f"GPU     {', '.join(shown)}",
        f"disk    {in_units(disk)} free for the workspace {workspace}",
        *(f"problem: {problem}" for problem in problems),
    ]
    return About(values, "\n".join(lines + ([] if problems else ["no problem found"])), 1 if problems else 0)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory_gb(problems: list[str]) -> tuple[float | None, float | None]:
    """Memory of this machine and what is free of it; None without psutil, which is added to the problems."""
    try:
        import psutil
    except ImportError as error:
        problems.append(f"psutil cannot be imported: {error}")
        return None, None
    memory = psutil.virtual_memory()
    return round(memory.total / GB, 1), round(free_memory() / GB, 1)


def _torch(problems: list[str]) -> tuple[str | None, list[dict[str, Any]]]:
    """What torch sees, the CPU's instruction set and the GPUs; what is wrong with it is added to the problems."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library is missing or is another version
        problems.append(f"torch cannot be imported: {error}")
        return None, []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [{"name": gpu.name, "memory_gb": round(gpu.total_memory / GB, 1)} for gpu in found]
    if not gpus and shutil.which("nvidia-smi"):
        problems.append("there is an NVIDIA driver but torch sees no GPU: install the CUDA build of torch")
    return torch.backends.cpu.get_cpu_capability(), gpus
