"""scripts/bench_recipes.py: trains rows in processes of their own, prints their paired table, and repeats no run."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import ENVIRONMENT, TINIEST, first_cases

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_recipes.py"
TINY_PATCH = TINIEST | {"training.patch_size": [16, 16, 16], "training.validation_iterations": 0}
NOT_SHARED = ("training.epochs", "training.iterations", "training.seed")  # the script's own


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_table_of_two_recipes(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", ENVIRONMENT["OMP_NUM_THREADS"])
    data, table = first_cases(tmp_path / "Task04_Hippocampus", 6), tmp_path / "table.md"
    changes = [f"--set={key}={str(value).lower()}" for key, value in TINY_PATCH.items() if key not in NOT_SHARED]
    options = ["--steps", "2", "--seeds", "1", "-w", str(tmp_path / "runs"), "--output", str(table), *changes]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(data), "cpu", "cpu+relu:optimizer.lr=1e-3", *options])
    script["main"]()
    weights = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/*/*/models/*/fold_0/model.safetensors")}
    first = table.read_text()
    assert len(weights) == 2 and first == capsys.readouterr().out
    assert "2 held-out cases, 2 steps of training, seeds 0 to 0, fp32" in first
    *_, head, _, base, other = first.splitlines()
    assert head.startswith("| recipe | Dice |") and head.endswith("| Anterior | Posterior |")
    assert re.match(r"\| cpu \| 0\.\d{4} \|  \|  \| 2 \| \d+ \| 0\.\d{4} \|", base)
    assert re.match(
        r"\| cpu\+relu:optimizer.lr=1e-3 \| 0\.\d{4} \|  \| [+-]0\.\d{4} \([+-].* to [+-].*\) \| 2 \|", other
    )

    script["main"]()
    assert table.read_text().splitlines()[2:] == first.splitlines()[2:]
    assert {file: file.stat().st_mtime_ns for file in weights} == weights


def test_differences_are_paired_by_case_over_the_mean_of_seeds(script: dict[str, Any]) -> None:
    hard = np.array([[0.9, 0.8], [0.5, 0.4], [0.7, np.nan]])

    def results(*gains: float) -> list[Any]:
        return [script["Result"](hard + gain, ("a", "b", "c"), 10, 3.0) for gain in gains]

    *_, base, better = script["table"]({"base": results(0.01, -0.01), "better": results(0.03, 0.05)}, "xy").splitlines()
    assert base == "| base | 0.6500 | 0.0141 |  | 10 | 3 | 0.7000 | 0.6000 |"
    # every case gains as much: the interval has no width, although cases and seeds differ
    assert better == "| better | 0.6900 | 0.0141 | +0.0400 (+0.0400 to +0.0400) | 10 | 3 | 0.7400 | 0.6400 |"
    others = [script["Result"](hard, ("a", "b", "d"), 10, 3.0)]
    with pytest.raises(SystemExit, match="other holds out other cases than base"):
        script["table"]({"base": results(0.0), "other": others}, "xy")


def test_a_row_names_recipe_changes_and_checkout(script: dict[str, Any], tmp_path: Path) -> None:
    parse = script["parse_row"]
    assert parse("cpu") == ("cpu", [], script["HERE"])
    recipe, changes, checkout = parse("cpu+no_norm:training.patch_size=[8,8],optimizer.lr=1e-3@other")
    assert (recipe, checkout) == ("cpu", Path.cwd() / "other")
    assert changes == ['network.norm="none"', "training.patch_size=[8,8]", "optimizer.lr=1e-3"]
    (tmp_path / "mine.toml").write_text('base = "default"\n[loss]\ndice = 0.5\n')
    assert parse(f"{tmp_path}/mine.toml+{tmp_path}/mine.toml")[:2] == (f"{tmp_path}/mine.toml", ["loss.dice=0.5"])
