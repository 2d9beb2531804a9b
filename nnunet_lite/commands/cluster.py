"""`nnlite cluster`: start a Dask scheduler and its workers."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from nnunet_lite import log
from nnunet_lite.cluster import read_cluster_config, start_cluster
from nnunet_lite.commands.options import About, FilePath


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
        FilePath, typer.Argument(help="local, slurm, lsf, pbs, or a TOML file like configs/cluster/*.toml.")
    ],
    *,
    workers: Annotated[int | None, typer.Option(min=1, help="How many, instead of the file's number.")] = None,
    script: Annotated[bool, typer.Option("--script", help="Only print the script of a worker's job.")] = False,
) -> RunningCluster | About:
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
    """
    settings = read_cluster_config(str(config))
    settings = settings.model_copy(update={"workers": 0 if script else workers or settings.workers})
    running = start_cluster(settings)
    if not script:
        return RunningCluster(running, settings.kind, settings.workers)
    with running:
        text = "workers are processes of this one" if settings.kind == "local" else running.job_script()
        return About({"script": text}, text)
