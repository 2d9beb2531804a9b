"""The command that does all, and the one that starts workers for it."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any

import typer

from nnunet_lite import api, log
from nnunet_lite.commands.options import (
    AcceptGeometry,
    AsJson,
    Device,
    Folds,
    GroupBy,
    Scheduler,
    SetOptions,
    Splits,
    Stratify,
    StratifyBy,
    Workers,
    Workspace,
    changes_of,
    show,
)


def run(
    data: Annotated[str, typer.Argument(help="Folder of the raw data, or its name.")],
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a TOML file.")] = "default",
    configurations: Annotated[
        list[str] | None,
        typer.Option("-c", "--configurations", help="Which to train, as in 2d,3d_fullres [all of the plan]."),
    ] = None,
    fold: Annotated[
        list[str] | None, typer.Option("-f", "--fold", help='Which folds, as in 0,1; "all": on every case [each].')
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Length of a fold [the recipe's, as what follows].")] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="Of a fold, such as 8h, 90m or 20s (plain: minutes); the schedule fits itself.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes two runs identical on the CPU.")] = None,
    folds: Folds = None,
    group_by: GroupBy = None,
    stratify: Stratify = False,
    stratify_by: StratifyBy = None,
    splits: Splits = None,
    accept_geometry: AcceptGeometry = False,
    device: Device = None,
    scheduler: Scheduler = None,
    assignments: SetOptions = None,
    workers: Workers = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Check, plan, preprocess, train every fold, select and report. The same command again goes on where it stopped."""
    flags: dict[str, Any] = {"training.epochs": epochs, "training.time_limit": time_limit, "training.seed": seed}
    done = api.run(
        data, recipe=recipe, changes=changes_of(flags, assignments), configurations=_listed(configurations),
        fold=_listed(fold), folds=folds, group_by=group_by, stratify=stratify_by or stratify, splits=splits,
        accept_geometry=accept_geometry, device=device, scheduler=scheduler, workspace=workspace, workers=workers,
    )  # fmt: skip
    show(done.to_json(), done.to_text(), as_json)


def cluster(
    config: Annotated[str, typer.Argument(help="local, slurm, lsf, pbs, or a TOML file like configs/cluster/*.toml.")],
    workers: Annotated[int | None, typer.Option(min=1, help="How many, instead of the file's number.")] = None,
    script: Annotated[bool, typer.Option("--script", help="Only print the script of a worker's job.")] = False,
) -> None:
    """Start a Dask scheduler and workers; run, train, preprocess and predict take its address with --scheduler."""
    from nnunet_lite.cluster_start import read_start, started

    start = read_start(config)
    start = replace(start, workers=0 if script else workers or start.workers)
    with started(start) as running:
        if script:
            log.answer(running.job_script() if start.kind != "local" else "workers are processes of this one")
            return
        log.answer(running.scheduler_address)
        log.info(f"{start.workers} workers of kind {start.kind} come; Ctrl-C ends them. In another terminal: "
                 f"nnlite run DATA --scheduler {running.scheduler_address}")  # fmt: skip
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


def _listed(given: list[str] | None) -> list[str] | None:
    """Options that may be repeated, and hold several with commas."""
    return [name.strip() for text in given or [] for name in text.split(",") if name.strip()] or None
