#!/usr/bin/env python3
"""How far can the expected quality and the label audit be trusted? Two tables.

usage: taskset -c 0,1 python scripts/bench_quality.py SET --minutes 2 [-c 3d_fullres] [--timed 20] [-w FOLDER]
           [--output TABLE.md]

SET     hippocampus (of --data), phantoms (made by make_phantoms.py), or the folder of a dataset

Trains 2d and 3d_fullres (or `-c`) on folds 0 and 1 with the recipe `cpu`, runs `nnlite select`, and predicts the
held-out images and degraded copies of them with the networks that have not seen them. The copies are made here, by
other means than those by which `select` calibrates. What is judged of a case was fitted without the case; in the column
"kind unknown", also without the most similar kind of copies of other cases.

Then errors are planted in the labels of a tenth of the held-out cases (plant_errors.py), and all is trained on these
labels; `nnlite audit` must rank the damaged cases first. With `--rounds` errors are planted that many times, and the
networks are those that were trained on the labels as they are: more errors, for less time.

Also: what the judging adds to the time of `nnlite predict`, measured in turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from make_phantoms import LABEL_MAP, make_dataset, read_anatomy
from plant_errors import damaged_maps, plant_errors
from scipy import ndimage
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.data.geometry import triple
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.evaluation.audit import audit_labels
from nnunet_lite.evaluation.calibration import find_held_out, fit_quality, split_by_case
from nnunet_lite.evaluation.calibration_rows import Row, predict_pair, predict_rows, read_labelled, training_ranges
from nnunet_lite.evaluation.comparison import load_team
from nnunet_lite.evaluation.degradation import Labelled
from nnunet_lite.evaluation.selection import read_selection
from nnunet_lite.files import read_json
from nnunet_lite.inference.quality import CaseQuality, Quality, judge
from nnunet_lite.system import cpus
from nnunet_lite.workspace import Paths

HERE = Path(__file__).absolute().parents[1]
SETS = {"hippocampus": "Task04_Hippocampus", "phantoms": "Dataset040_Phantoms"}
FOLDS = (0, 1)
FIRST = 0.15  # of the ranking of the audit
Random = np.random.Generator
Judged = list[tuple[Row, CaseQuality]]


def scale(pair: Labelled, change: Callable[[np.ndarray], np.ndarray]) -> Labelled:
    """Change intensities, given from 0 to 1."""
    array = pair.image.array.astype(np.float32)
    low, high = np.percentile(array, (1, 99))
    changed = change((array - low) / max(high - low, 1e-6)) * (high - low) + low
    return replace(pair, image=replace(pair.image, array=changed.astype(np.float32)))


def cut(pair: Labelled, inside: tuple[slice, ...], spacing: Sequence[float] | None = None) -> Labelled:
    reference = np.ascontiguousarray(pair.reference[inside])
    geometry = replace(pair.image.geometry, shape=triple(reference.shape))
    geometry = geometry if spacing is None else replace(geometry, spacing=triple(spacing))
    return Labelled(
        replace(pair.image, array=np.ascontiguousarray(pair.image.array[:, *inside]), geometry=geometry), reference
    )


def rician_noise(pair: Labelled, random: Random) -> Labelled:
    size = pair.image.array.shape
    return scale(pair, lambda x: np.hypot(x + random.normal(0, 0.15, size), random.normal(0, 0.15, size)))


def box_blur(pair: Labelled, random: Random) -> Labelled:
    return scale(pair, lambda x: ndimage.uniform_filter(x, (1, 5, 5, 5)))


def coil_bias(pair: Labelled, random: Random) -> Labelled:
    """One bright place, as next to a surface coil."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in pair.reference.shape), indexing="ij")
    far = sum((axis - place) ** 2 for axis, place in zip(axes, random.uniform(-1, 1, 3), strict=True))
    return scale(pair, lambda x: x * (0.4 + 1.8 * np.exp(-far)))


def motion_ghosts(pair: Labelled, random: Random) -> Labelled:
    axis = int(random.integers(1, 4))
    step = pair.image.array.shape[axis] // int(random.integers(2, 5))
    return scale(pair, lambda x: 0.7 * x + 0.3 * np.roll(x, step, axis))


def slice_gaps(pair: Labelled, random: Random) -> Labelled:
    """Every fourth slice, with nothing between them."""
    axis = int(random.integers(3))
    inside = tuple(slice(1, None, 4) if a == axis else slice(None) for a in range(3))
    return cut(pair, inside, [s * (4 if a == axis else 1) for a, s in enumerate(pair.image.geometry.spacing)])


def small_box(pair: Labelled, random: Random) -> Labelled:
    """A box of 70 % of each axis."""
    starts = [int(random.integers(0, n - round(0.7 * n) + 1)) for n in pair.reference.shape]
    return cut(pair, tuple(slice(s, s + round(0.7 * n)) for s, n in zip(starts, pair.reference.shape, strict=True)))


def flipped(pair: Labelled, random: Random) -> Labelled:
    axis = int(random.integers(3))
    array = np.ascontiguousarray(np.flip(pair.image.array, axis + 1))
    return Labelled(replace(pair.image, array=array), np.ascontiguousarray(np.flip(pair.reference, axis)))


def other_contrast(pair: Labelled, random: Random) -> Labelled:
    """The middle of the scale becomes bright, both ends dark."""
    return scale(pair, lambda x: np.exp(-(((x - random.uniform(0.3, 0.6)) / 0.3) ** 2)))


# the kind, and the most similar one among the copies of `nnlite select`
DEGRADED = {
    "noise": (rician_noise, "noise"),
    "blur": (box_blur, "blur"),
    "bias field": (coil_bias, "bias field"),
    "ghosting": (motion_ghosts, "ghosts"),
    "thick slices": (slice_gaps, "thick slices"),
    "cropped": (small_box, "cropped"),
    "flipped": (flipped, "flipped"),
    "another contrast": (other_contrast, "contrast"),
}


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", "nnunet_lite", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train(root: Path, workspace: Path, configurations: Sequence[str], minutes: float) -> Paths:
    """Plan, train two folds of each configuration, and select; what is there already is kept."""
    paths = Paths(workspace / root.name)
    if not paths.plans.is_file():
        run("plan", root, "-w", workspace)
    for configuration in configurations:
        for fold in FOLDS:
            if not (paths.models / f"{configuration}-cpu" / f"fold_{fold}" / "validation" / "summary.json").is_file():
                run("train", configuration, fold, "--recipe", "cpu", "--time-limit", minutes, "-w", workspace)
    if not paths.inference.is_file():
        run("select", "-w", workspace)
    return paths


# ------------------------------------------------------------------------------------------------- the expected quality


def degraded_rows(paths: Paths) -> list[Row]:
    """Predict three degraded copies of each held-out case, all kinds equally often."""
    dataset, selection = stored_dataset(paths.dataset), read_selection(paths)
    assert selection is not None
    held_out, team = find_held_out(paths, dataset, selection, None, None)
    cases = {case.id: case for case in dataset.cases}
    rows, kinds = [], list(DEGRADED)
    for split in held_out.splits:
        predictor = load_team(held_out, team, split.name)
        for number, name in enumerate(split.validation):
            pair = read_labelled(predictor, cases[name], dataset)
            for kind in {kinds[(3 * number + copy) % len(kinds)] for copy in range(3)}:
                random = np.random.default_rng(zlib.crc32(f"{name} {kind} bench".encode()))
                rows.append(predict_pair(predictor, DEGRADED[kind][0](pair, random), name, kind))
    return rows


def judge_all(paths: Paths, copies: Sequence[Row]) -> tuple[Judged, Judged]:
    """Judge held-out cases and copies by what other cases say; the copies also without their kind among these."""
    dataset, selection = stored_dataset(paths.dataset), read_selection(paths)
    assert selection is not None
    held_out, team = find_held_out(paths, dataset, selection, None, None)
    known = predict_rows(held_out, team)
    ranges = training_ranges(held_out, team[0].plan)

    def fit(rows: Sequence[Row]) -> Quality:
        return fit_quality(rows, ranges, {"bench": {}}, dataset.channels)

    judged, unknown = [], []
    for train_rows, test in split_by_case(known):
        others, names = [known[i] for i in train_rows], {known[i].case for i in test}
        of_part = [row for row in copies if row.case in names]
        quality = fit(others)
        clean = [known[i] for i in test if known[i].kind == "clean"]
        judged += [(row, judge(quality, row.features)) for row in (*clean, *of_part)]
        for kind, (_, similar) in DEGRADED.items():
            without = fit([row for row in others if row.kind != similar])
            unknown += [(row, judge(without, row.features)) for row in of_part if row.kind == kind]
    return judged, unknown


def expected_and_real(pairs: Judged) -> np.ndarray:
    """Return expected Dice, both ends of the interval, and the real Dice, of each label (n, 4)."""
    return np.array(
        [
            (one.dice, one.low, one.high, dice)
            for row, judged in pairs
            for label, dice in row.dice.items()
            if dice is not None and (one := judged.expected[label]) is not None
        ]
    ).reshape(-1, 4)


def quality_lines(judged: Judged, unknown: Judged) -> list[str]:
    head = (
        "| images | n | real Dice | mean error | kind unknown | in the 90 % interval | flagged | AUROC | kind unknown |"
    )
    lines = [head, "|" + "---|" * 9]
    clean = [pair for pair in judged if pair[0].kind == "clean"]

    def auroc(pairs: Judged) -> float:
        scores = [one.unusual for _, one in (*clean, *pairs)]
        return float(roc_auc_score([False] * len(clean) + [True] * len(pairs), scores))

    def line(name: str, pairs: Judged, others: Judged) -> str:
        expected, low, high, real = expected_and_real(pairs).T
        error = np.abs(expected - real).mean()
        flagged = np.mean([bool(one.flags) for _, one in pairs])
        covered = np.mean((low <= real) & (real <= high))
        error_unknown = np.abs(np.subtract(*expected_and_real(others).T[[0, 3]])).mean() if others else np.nan
        curves = (auroc(pairs), auroc(others)) if others else (np.nan, np.nan)
        cells = [name, str(len(pairs)), f"{real.mean():.3f}", f"{error:.3f}", f"{error_unknown:.3f}", f"{covered:.0%}",
                 f"{flagged:.0%}", *(f"{one:.3f}" for one in curves)]  # fmt: skip
        return "| " + " | ".join(cells).replace("nan", "") + " |"

    lines.append(line("held-out", clean, []))
    for kind in DEGRADED:
        lines.append(line(kind, *([pair for pair in of if pair[0].kind == kind] for of in (judged, unknown))))
    lines.append(line("all degraded", [pair for pair in judged if pair[0].kind != "clean"], unknown))
    expected, _, _, real = expected_and_real(judged).T
    means = np.array([(one.mean or 0.0, row.mean_dice or 0.0) for row, one in judged])
    errors = np.abs(expected - real).mean(), np.abs(means[:, 0] - means[:, 1]).mean()
    ranks = spearmanr(expected, real)[0], spearmanr(*means.T)[0], spearmanr(*expected_and_real(clean).T[[0, 3]])[0]
    return [
        *lines,
        "",
        f"All images together: mean error of a label {errors[0]:.3f}, of the mean of a case {errors[1]:.3f}; Spearman "
        f"correlation {ranks[0]:.2f} by label, {ranks[1]:.2f} by case; {ranks[2]:.2f} by label of held-out ones only.",
    ]


def time_judging(paths: Paths, folder: Path, images: int, rounds: int = 5) -> str:
    """What judging adds to the time of `nnlite predict`, the start of the program included."""
    cases = stored_dataset(paths.dataset).cases[:images]
    given = [argument for case in cases for argument in ("-i", case.images[0])]
    seconds: dict[str, list[float]] = {"--quality": [], "--no-quality": []}
    for _ in range(rounds):
        for option, times in seconds.items():
            began = time.monotonic()
            run("predict", *given, "-o", folder / option.strip("-"), "-w", paths.root.parent, option)
            times.append(time.monotonic() - began)
    with_it, without = (min(times) for times in seconds.values())
    return f"`nnlite predict` of {len(cases)} images takes {with_it:.1f} s, {without:.1f} s with --no-quality."


# ------------------------------------------------------------------------------------------------------------ the audit


def audit_lines(paths: Paths, planted: dict[str, str]) -> list[str]:
    """Return how many of the damaged held-out cases are among the first of the ranking, by kind."""
    run("audit", "-w", paths.root.parent)
    ranking = [entry["case"] for entry in read_json(paths.root / "audit.json")["cases"]]
    return kind_lines(found_first(ranking, planted))


def audit_rounds(paths: Paths, folder: Path, rounds: int) -> list[str]:
    """Return the same of errors that are planted several times, with networks that were trained on correct labels."""
    dataset, found = stored_dataset(paths.dataset), list[tuple[str, bool]]()
    held_out = [case for fold in read_json(paths.splits)[: len(FOLDS)] for case in fold["val"]]
    files = {case.id: case.label for case in dataset.cases if case.label is not None and case.id in held_out}
    for seed in range(rounds):
        planted = damaged_maps(files, dataset.labels, 0.1, seed)
        changed = {}
        for case, (_, label_map) in planted.items():
            changed[case] = folder / f"{seed}" / files[case].name
            changed[case].parent.mkdir(parents=True, exist_ok=True)
            write_label(changed[case], label_map, read_label(files[case])[1], like=files[case])
        cases = tuple(replace(case, label=changed.get(case.id, case.label)) for case in dataset.cases)
        audit = audit_labels(paths, replace(dataset, cases=cases), None, None, 1)
        found += found_first([case.case for case in audit.cases], {case: kind for case, (kind, _) in planted.items()})
    return kind_lines(found)


def found_first(ranking: Sequence[str], planted: dict[str, str]) -> list[tuple[str, bool]]:
    """Return the kind of each damaged case, and whether it is among the first of a ranking."""
    first = ranking[: round(FIRST * len(ranking))]
    return [(kind, case in first) for case, kind in planted.items() if case in ranking]


def kind_lines(found: Sequence[tuple[str, bool]]) -> list[str]:
    lines = ["| planted error | cases | among the first 15 % |", "|---|---|---|"]
    for kind in dict.fromkeys(kind for kind, _ in found):
        of_kind = [first for own, first in found if own == kind]
        lines.append(f"| {kind} | {len(of_kind)} | {sum(of_kind)} |")
    return [*lines, f"| all | {len(found)} | {sum(first for _, first in found)} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", metavar="SET")
    parser.add_argument("--minutes", type=float, default=2.0, help="of each training; default: 2")
    parser.add_argument(
        "-c", "--configurations", nargs="+", default=["2d", "3d_fullres"], help="default: 2d 3d_fullres"
    )
    parser.add_argument("--data", type=Path, default=HERE.parent / "shared" / "data", help="default: ../shared/data")
    parser.add_argument(
        "--timed", type=int, default=20, help="images that are predicted ten times for the times; default: 20"
    )
    parser.add_argument("--no-audit", action="store_true", help="leave out the second table")
    parser.add_argument("--rounds", type=int, default=0, help="plant errors so many times; nothing is trained for it")
    parser.add_argument("-w", "--workspace", type=Path, default=Path("bench_quality"))
    parser.add_argument("--output", type=Path, help="write the tables here too")
    o = parser.parse_args()
    where = o.workspace / "data" if o.set == "phantoms" else o.data
    root = where / SETS[o.set] if o.set in SETS else Path(o.set)
    if o.set == "phantoms" and not (root / "dataset.json").is_file():
        make_dataset(root, read_anatomy(LABEL_MAP))
    paths = train(root, o.workspace.absolute() / "clean", o.configurations, o.minutes)
    judged, unknown = judge_all(paths, degraded_rows(paths))
    selection = read_selection(paths)
    assert selection is not None
    head = (
        f"{root.name}, {' and '.join(selection.models)}, folds 0 and 1, {o.minutes:g} minutes of training each, "
        f"{cpus()} cores, {time.strftime('%Y-%m-%d')}"
    )
    lines: list[str] = []

    def show(*new: str) -> None:
        lines.extend(new)
        print("\n".join(new), flush=True)

    show(head, "", *quality_lines(judged, unknown))
    if o.timed:
        show("", time_judging(paths, o.workspace / "timed", o.timed))
    if o.rounds:
        show("", *audit_rounds(paths, o.workspace.absolute() / "rounds" / root.name, o.rounds))
    if not o.no_audit:
        damaged = o.workspace / "damaged" / root.name
        if not damaged.is_dir():
            held_out = [case for fold in read_json(paths.splits)[: len(FOLDS)] for case in fold["val"]]
            plant_errors(root, damaged, only=held_out)
        again = train(damaged, o.workspace.absolute() / "audited", o.configurations, o.minutes)
        show("", *audit_lines(again, read_json(damaged / "planted.json")))
    if o.output:
        o.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
