"""The command that trains."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from nnunet_lite import api, log
from nnunet_lite.commands.options import (
    AsJson,
    Dataset,
    Device,
    Folds,
    GroupBy,
    Precision,
    Scheduler,
    SetOptions,
    Splits,
    Stratify,
    StratifyBy,
    Workspace,
    changes_of,
    numbers_of,
)
from nnunet_lite.errors import UserError


def train(
    configuration: Annotated[str, typer.Argument(help="2d, 3d_fullres, ...")],
    fold: Annotated[str, typer.Argument(help='0 to 4, "all-folds" for each of them, "all" to train on every case.')],
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a TOML file.")] = "default",
    epochs: Annotated[int | None, typer.Option(help="Length of the run [the recipe's, as all that follows].")] = None,
    iterations: Annotated[int | None, typer.Option(help="Per epoch.")] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="Such as 8h or 90m (plain: minutes); the schedule fits itself to it.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Patches per step.")] = None,
    patch_size: Annotated[str | None, typer.Option(help="Such as 40x56x40.")] = None,
    lr: Annotated[float | None, typer.Option(help="Initial learning rate.")] = None,
    precision: Precision = None,
    seed: Annotated[int | None, typer.Option(help="Makes two runs identical on the CPU.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Threads that prepare batches ahead; 0: none.")] = None,
    cache: Annotated[str | None, typer.Option(help="Where cases lie: auto, device, ram or disk.")] = None,
    init: Annotated[str | None, typer.Option(help="Model to start from, ours or nnU-Net's: fine-tuning.")] = None,
    freeze: Annotated[str | None, typer.Option(help="Weights that stay: encoder or all-but-head.")] = None,
    folds: Folds = None,
    group_by: GroupBy = None,
    stratify: Stratify = False,
    stratify_by: StratifyBy = None,
    splits: Splits = None,
    gpus: Annotated[int, typer.Option(min=1, help="Train on so many GPUs of this machine.")] = 1,
    scheduler: Scheduler = None,
    device: Device = None,
    name: Annotated[str | None, typer.Option(help="Of the model folder [CONFIGURATION-RECIPE].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only go on; an error if nothing was begun.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although settings were changed.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; what is there is moved aside.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Draw augmented samples to preview.png first.")] = False,
    assignments: SetOptions = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Train a fold and score its held-out cases. The same command again goes on where it stopped."""
    if gpus > 1:
        from nnunet_lite.training.distributed import current_ranks, launch

        if current_ranks().world == 1:
            raise typer.Exit(launch(gpus, sys.argv[1:]))
    flags = {
        "training.epochs": epochs,
        "training.iterations": iterations,
        "training.time_limit": time_limit,
        "training.batch_size": batch_size,
        "training.patch_size": None if patch_size is None else numbers_of(patch_size, "--patch-size"),
        "optimizer.lr": lr,
        "training.precision": precision,
        "training.seed": seed,
        "training.workers": workers,
        "training.cache": cache,
        "training.init": init,
        "training.freeze": freeze,
    }
    how: dict[str, Any] = {"folds": folds, "group_by": group_by, "stratify": stratify_by or stratify, "splits": splits}
    results = {}
    if scheduler is not None:
        if fold != "all-folds" or name or restart or resume or force or preview or gpus > 1:
            what = (
                "--scheduler spreads folds: it goes with `all-folds`, and without --gpus, --name, --restart, --resume,"
            )
            raise UserError(f"{what} --force and --preview")
        on_workers = api.train_on(
            scheduler, configuration, **how, recipe=recipe, changes=changes_of(flags, assignments), dataset=dataset,
            device=device, workspace=workspace,
        )  # fmt: skip
        log.answer(json.dumps(on_workers, indent=1) if as_json else _mean_dice(on_workers))
        return
    names = api.fold_names(**how, dataset=dataset, workspace=workspace) if fold == "all-folds" else [fold]
    for one in names:
        scores = api.train(
            configuration, one, **how, recipe=recipe, changes=changes_of(flags, assignments), dataset=dataset,
            name=name, device=device, restart=restart and ("model" if len(names) > 1 else True),
            resume=resume and one == names[0],  # later folds need not be begun
            force=force, preview=preview, workspace=workspace,
        )  # fmt: skip
        restart = False  # the first fold has set all of them aside
        if scores is not None:
            results[one] = scores.to_json()
            if not as_json:
                log.answer(f"fold {one}, whole images:\n{scores.table()}")
    if as_json:
        log.answer(json.dumps(results, indent=1))
    from nnunet_lite.training.distributed import leave_group  # torch is there by now

    leave_group()


def _mean_dice(summaries: dict[str, Any]) -> str:
    """A line for each fold."""
    means = {fold: summary["foreground_mean"]["Dice"] for fold, summary in summaries.items()}
    return "\n".join(f"fold {fold}, whole images: mean Dice {_shown(dice)}" for fold, dice in means.items())


def _shown(dice: float | None) -> str:
    return "n/a" if dice is None else f"{dice:.4f}"
