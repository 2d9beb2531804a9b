#!/usr/bin/env python3
"""The ablations of the original paper on one split, with one budget each: how much Dice does each part give?

usage: taskset -c 0,1 python scripts/ablation.py DATA --recipe cpu --minutes 3 -w WORKSPACE [--output TABLE.md]
                                                  --iterations 500   steps instead of minutes: equal work, not time

Trains the base recipe and each ablation of configs/ablations on top of it from the same seed, scores the held-out
images whole, and prints Dice for each label and its change against the base in percent. What is trained stays in the
workspace, so that the same command resumes after an interruption and another --only adds rows.
"""

from __future__ import annotations

import argparse
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from compare_training import interval, known

import nnunet_lite
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.scores import Scores
from nnunet_lite.settings import load_settings, recipes

BASE = "base"


def ablations() -> dict[str, dict[str, Any]]:
    """What each recipe of configs/ablations changes: name -> setting -> value."""
    found = {}
    for recipe, file in recipes().items():
        if recipe.startswith("ablations/"):
            tree = tomllib.loads(file.read_text())
            sections = {key: value for key, value in tree.items() if key != "base"}
            found[Path(recipe).name] = {f"{s}.{key}": v for s, values in sections.items() for key, v in values.items()}
    return found


def budget(recipe: str, minutes: float | None, iterations: int | None) -> dict[str, Any]:
    """The settings that end a run after some minutes or steps; what the recipe says where both are None."""
    if iterations is not None:
        epochs = -(-iterations // load_settings(recipe).training.iterations)
        return {"training.time_limit": None, "training.iterations": -(-iterations // epochs), "training.epochs": epochs}
    return {} if minutes is None else {"training.time_limit": minutes}


def percent(difference: float, reference: float) -> str:
    return f"{difference / reference:+.1%}" if reference else "n/a"


def row(name: str, scores: Scores, base: Scores) -> list[str]:
    """Dice of each label and their mean, each with its change, and the interval of the last over cases."""
    dice, reference = ([*np.nanmean(s.values(), 0), s.foreground().mean] for s in (scores, base))
    if scores is base:
        return [name, *(f"{value:.4f}" for value in dice), ""]
    limits = interval(known(np.nanmean(scores.values() - base.values(), 1)))
    cells = [f"{d:.4f} ({percent(d - r, r)})" for d, r in zip(dice, reference, strict=True)]
    return [name, *cells, " to ".join(percent(limit, reference[-1]) for limit in limits)]


def main() -> None:
    changes = ablations()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", default="paper2018", help="the base; default: paper2018")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--minutes", type=float, help="of each training; default: what the recipe says")
    limit.add_argument("--iterations", type=int, help="of each training")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=changes, default=list(changes), metavar="ABLATION",
                        help=f"default: {' '.join(changes)}")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all runs")
    parser.add_argument("--device")
    parser.add_argument("-w", "--workspace", type=Path, default=Path("ablation"))
    parser.add_argument("--output", type=Path, help="write the table here too")
    o = parser.parse_args()
    dataset = o.data.resolve().name
    if not (o.workspace / dataset / "plans.json").is_file():
        nnunet_lite.plan(o.data, workspace=o.workspace)
    overrides = dict(change.split("=", 1) for change in o.set)
    common = {**budget(o.recipe, o.minutes, o.iterations), "training.seed": o.seed, **overrides}
    found: dict[str, Scores] = {}
    for name in (BASE, *o.only):
        trained = nnunet_lite.train(
            o.configuration, o.fold, recipe=o.recipe, settings={**common, **changes.get(name, {})},
            name=f"{o.recipe}-{name}", dataset=dataset, device=o.device, workspace=o.workspace)  # fmt: skip
        (found[name],) = trained.scores.values()
    each = "its own length" if o.minutes is None else f"{o.minutes} minutes"
    if o.iterations is not None:
        each = f"{int(common['training.epochs']) * int(common['training.iterations'])} steps"
    head = [f"{o.recipe}, {each}", *found[BASE].labels.region_names, "mean", "95 % interval"]
    lines = [head, ["---"] * len(head), *(row(name, scores, found[BASE]) for name, scores in found.items())]
    n_cases = len(found[BASE].rows)
    text = f"{o.data.name}, {o.configuration}, fold {o.fold}, {n_cases} held-out cases, {time.strftime('%Y-%m-%d')}\n\n"
    text += "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(text)
    if o.output:
        o.output.write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
