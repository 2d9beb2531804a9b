"""A Dask scheduler with workers from a TOML file, on this machine or as jobs of SLURM, LSF or PBS."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_lite.errors import UserError
from nnunet_lite.settings import recipe_folder

_KINDS = {"local": "LocalCluster", "slurm": "SLURMCluster", "lsf": "LSFCluster", "pbs": "PBSCluster"}


@dataclass(frozen=True)
class Start:
    """What a file says: the kind of cluster, how many workers (jobs), and the options of Dask's class for it."""

    kind: str
    workers: int
    options: dict[str, Any] = field(default_factory=dict)


def read_start(name: str) -> Start:
    """The content of configs/cluster/NAME.toml, or of a file.

    Raises
    ------
    UserError : there is none, or it is not of that form.
    """
    known = {path.stem: path for path in sorted((recipe_folder() / "cluster").glob("*.toml"))}
    file = known.get(name, Path(name).expanduser())
    if not file.is_file():
        raise UserError(f"there is no cluster {name!r}", fix=f"There are: {', '.join(known)}; or give a TOML file.")
    try:
        start = Start(**tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"must be TOML with kind, workers and options ({error})", file) from None
    if start.kind not in _KINDS or not isinstance(start.workers, int) or start.workers < 0:
        raise UserError(f"kind must be one of {', '.join(_KINDS)}, and workers a number", file)
    return start


def start_cluster(start: Start) -> Any:
    """Start a Dask cluster; its workers start when the queue lets them. It is closed by `close`, or as a context.

    Raises
    ------
    UserError : the packages are not installed, an option is unknown, or its scheduler cannot be started.
    """
    try:
        if start.kind == "local":
            from distributed import LocalCluster as kind
        else:
            import dask_jobqueue

            kind = getattr(dask_jobqueue, _KINDS[start.kind])
    except ImportError as error:
        raise UserError(f"Dask is not installed ({error})", fix="`pip install 'nnunet-lite[cluster]'`.") from None
    try:
        return kind(**{"n_workers": start.workers, **start.options})
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"a {start.kind} cluster cannot be started: {error}") from None
