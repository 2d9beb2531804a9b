"""scripts/bench_gpu.py: every part of it runs, on a CPU and small sizes; a part without time is a row that says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from samples import ENVIRONMENT

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_gpu.py"


def run(tmp_path: Path, *options: str) -> dict[str, list[str]]:
    """The cells of each row of the table, by the name of its part."""
    table = tmp_path / "table.md"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--output", str(table), *options]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert table.read_text().startswith("# cpu\n")
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    rows = run(tmp_path, "--skip-tests", "--budget", "400")
    assert not [row for row in rows.values() if "failed" in row[-1] or "stopped" in row[-1]]
    for configuration in ("3d_fullres", "2d"):
        seconds, on_device, waiting, _, predicted, tflops, share, _ = rows[f"train {configuration}, plain"]
        assert float(seconds) > 0 and float(on_device) > 0 and float(predicted) > 0 and float(tflops) > 0
        assert waiting.endswith("%") and share.endswith("%")
    assert all(float(rows[f"predict, {n} classes"][0]) > 0 for n in (3, 60)) and "skipped" in rows["compiled"][-1]


def test_without_time_each_part_says_so(tmp_path: Path) -> None:
    rows = run(tmp_path, "--budget", "1.5")
    remarks = [rows[part][-1] for part in ("tests", "data", "train 2d, plain", "predict, 3 classes")]
    assert all(remark.startswith("skipped: ") for remark in remarks)
