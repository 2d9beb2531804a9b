"""Make the pictures of the documentation, docs/pictures/*.png, in headless Chromium.

usage: python scripts/make_pictures.py [--epochs 10] [--work FOLDER] [--only terminal report viewer plots]

A small workspace of the bundled MRIs is planned and trained first: two folds of 3d_fullres and one of 2d, about 12
minutes on two quiet cores; with `--work` it is kept for the next time. Then come pictures of commands in a terminal,
of the report, of the viewer, and plots of the tables in scripts/results. Chromium must be installed; no network is
used.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "scripts" / "results"
NAME = "Task04_Hippocampus"
NNLITE = [sys.executable, "-m", "nnunet_lite"]
COLUMNS = 110
HOME = "/home/you"  # is shown instead of the real folder
FLAGS = ("--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
OURS, THEIRS = "#3f51b5", "#9e9e9e"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="of each fold, 50 steps each")
    parser.add_argument("--work", type=Path, help="folder that is kept for the next time")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    o = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, open_browser() as browser:
        work = prepare(o.work or Path(temporary), o.epochs)
        for part in o.only:
            PARTS[part](work, browser)
    total = sum(file.stat().st_size for file in PICTURES.glob("*.png"))
    print(f"{len(list(PICTURES.glob('*.png')))} pictures in {PICTURES.relative_to(ROOT)}, {total / 1e6:.1f} MB")


def prepare(work: Path, epochs: int) -> Path:
    """Plan, train and predict in a folder, unless that was done there before."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / NAME).exists():
        shutil.copytree(ROOT / "tests" / "data" / NAME, work / NAME)
    length = ["--recipe", "cpu", "--epochs", str(epochs), "--time-limit", "none"]
    for arguments in (
        ["plan", NAME],
        *(["train", "3d_fullres", str(fold), *length] for fold in (0, 1)),
        ["train", "2d", "0", *length],
        ["select"],
    ):
        subprocess.run([*NNLITE, *arguments], cwd=work, check=True)
    shutil.rmtree(work / "segmentations", ignore_errors=True)
    predict = ["predict", "-i", f"{NAME}/imagesTs", "-o", "segmentations", "--save-probabilities", "all"]
    predict += ["--save-uncertainty"]
    subprocess.run([*NNLITE, *predict], cwd=work, check=True)
    return work


@contextmanager
def open_browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        sys.exit("there is no Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, url: str, width: int, height: int, scheme: Any = "light") -> Iterator[Page]:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    yield page
    context.close()


def save(name: str, picture: bytes) -> None:
    (PICTURES / f"{name}.png").write_bytes(picture)
    print(f"{name}.png {len(picture) / 1000:.0f} KB")


# ------------------------------------------------------------------------------------------------------- terminal


def make_terminal_pictures(work: Path, browser: Browser) -> None:
    """What commands print, in colours; a training is stopped after some seconds, so that its bar is shown."""
    broken = work / "broken"
    if not broken.exists():
        shutil.copytree(ROOT / "tests" / "data" / NAME, broken)
        images = sorted((broken / "imagesTr").glob("*.nii.gz"))
        images[1].write_bytes(images[1].read_bytes()[:9000])
        sorted((broken / "labelsTr").glob("*.nii.gz"))[2].unlink()
    patients = work / "patients"
    for file in sorted((work / NAME / "imagesTr").glob("*.nii.gz")):
        folder = patients / file.name.removesuffix(".nii.gz").replace("hippocampus_", "P")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / "t1.nii.gz")
        shutil.copy(work / NAME / "labelsTr" / file.name, folder / "seg.nii.gz")
    shutil.rmtree(work / "raw", ignore_errors=True)
    in_work = {"segmentations": f"{NAME}/labelsTs"}
    for name, arguments, seconds in (
        ("help", "--help", None),
        ("help_train", "train --help", None),
        ("plan", f"plan {NAME}", None),
        ("check", "check broken", None),
        ("init", "init patients -w raw", None),
        ("progress", "train 3d_fullres 2 --recipe cpu --time-limit 10m --name demo", 60.0),
        ("predict", f"predict -i {NAME}/imagesTs -o again", None),
        ("evaluate", f"evaluate segmentations {in_work['segmentations']}", None),
        ("list", "list", None),
        ("info", "info 3d_fullres-cpu", None),
    ):
        shutil.rmtree(work / "again", ignore_errors=True)
        text = f"\x1b[1m$ nnlite {arguments}\x1b[0m\n{run_in_terminal(arguments.split(), work, seconds)}"
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        console.print(Text.from_ansi(text))
        style = "<style>body{margin:0;padding:14px 18px;background:#1e1e1e;color:#e0e0e0;width:fit-content}"
        style += "pre,code{font:13px/1.35 'DejaVu Sans Mono',monospace !important}</style>"
        code = re.sub(r"body \{[^}]*\}", "", console.export_html(theme=MONOKAI, inline_styles=True))
        with open_page(browser, "about:blank", 1000, 400) as page:
            page.set_content(code.replace("</head>", f"{style}</head>"))
            save(name, page.locator("body").screenshot())
    shutil.rmtree(work / "nnlite_workspace" / NAME / "models" / "demo", ignore_errors=True)


def run_in_terminal(arguments: list[str], folder: Path, seconds: float | None) -> str:
    """Return what a command shows in a terminal, at its end or after some seconds."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([*NNLITE, *arguments], cwd=folder, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    content, end = b"", time.monotonic() + (seconds or 600)
    while time.monotonic() < end:
        try:
            content += (read := os.read(ours, 4096))
        except OSError:  # the command has ended
            break
        if not read:
            break
    if process.poll() is None and seconds is not None:
        process.send_signal(signal.SIGKILL)
    process.wait()
    os.close(ours)
    return show_screen(content.decode(errors="replace").replace(str(folder.resolve()), HOME))


def show_screen(content: str) -> str:
    """Return the lines that a terminal of unlimited height would show: it obeys returns, line feeds and cursors up."""
    lines, row = [""], 0
    for part in re.split(r"(\r\n|\r|\n|\x1b\[\d*A|\x1b\[\d*K)", content):
        if part in ("\r\n", "\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b[") and part.endswith("A"):
            row = max(0, row - int(part[2:-1] or 1))
        elif part == "\r" or (part.startswith("\x1b[") and part.endswith("K")):
            lines[row] = ""
        else:
            lines[row] += part
    return "\n".join(lines).rstrip()


# --------------------------------------------------------------------------------------------------------- report


def make_report_pictures(work: Path, browser: Browser) -> None:
    subprocess.run([*NNLITE, "report", "-o", "report.html"], cwd=work, check=True)
    compare = ["report", "--compare", "3d_fullres-cpu", "2d-cpu", "-o", "comparison.html"]
    subprocess.run([*NNLITE, *compare], cwd=work, check=True)
    for file in (work / "report.html", work / "comparison.html"):
        file.write_text(file.read_text().replace(str(work.resolve()), HOME))
    with open_page(browser, (work / "comparison.html").resolve().as_uri(), 1366, 1000) as page:
        save("comparison", page.screenshot())
    url = (work / "report.html").resolve().as_uri()
    for name, width, height, scheme in (
        ("light", 1366, 860, "light"),
        ("dark", 1366, 860, "dark"),
        ("phone", 390, 844, "light"),
    ):
        with open_page(browser, url, width, height, scheme) as page:
            save(f"report_{name}", page.screenshot())
    with open_page(browser, url, 1366, 900) as page:
        for section in ("data", "plan", "training", "scores", "comparison", "methods"):
            place = page.locator(f"#{section}")
            box = place.bounding_box()
            if box is not None and box["height"] > 40:
                clip = {"x": box["x"], "y": box["y"], "width": box["width"], "height": min(box["height"], 1000)}
                save(f"report_{section}", page.screenshot(full_page=True, clip=clip))  # type: ignore[arg-type]
        example = page.locator(".worst").first
        if example.count():
            save("report_example", example.screenshot())


# --------------------------------------------------------------------------------------------------------- viewer


@contextmanager
def open_viewer(work: Path, *arguments: str) -> Iterator[str]:
    """Yield the address of `nnlite view` while it runs."""
    process = subprocess.Popen(
        [*NNLITE, "view", *arguments, "--no-browser", "--json"], cwd=work, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line.startswith("}"):
            break
    try:
        yield json.loads(text)["url"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def make_viewer_pictures(work: Path, browser: Browser) -> None:
    with open_viewer(work, "-m", "3d_fullres-cpu") as url:
        for name, width, height, scheme in (
            ("viewer", 1280, 800, "light"), ("viewer_dark", 1280, 800, "dark"), ("viewer_phone", 390, 844, "light"),
        ):  # fmt: skip
            with open_page(browser, url, width, height, scheme) as page:
                page.wait_for_load_state("networkidle")
                page.wait_for_timeout(3000)
                save(name, page.screenshot())
                if name == "viewer":
                    page.keyboard.press("e")
                    page.wait_for_timeout(3000)
                    save("viewer_errors", page.screenshot())
    image = f"{NAME}/imagesTs/hippocampus_025.nii.gz"
    with (
        open_viewer(work, image, "segmentations/hippocampus_025.nii.gz") as url,
        open_page(browser, url, 1280, 800) as page,
    ):
        page.wait_for_timeout(3000)
        names = page.locator("#maps option").all_text_contents()
        page.locator("#maps select").select_option(next(name for name in names if "entropy" in name))
        page.wait_for_timeout(3000)
        save("viewer_uncertainty", page.screenshot())


# ---------------------------------------------------------------------------------------------------------- plots


def read_rows(name: str) -> list[list[str]]:
    """Return the cells of all tables of a page in scripts/results."""
    lines = (RESULTS / f"{name}.md").read_text().splitlines()
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def make_plots(work: Path, browser: Browser) -> None:
    """Bars of both programs, from the tables."""
    names, groups = [], dict[str, list[tuple[float, float]]]()
    rows = read_rows("bench_preprocess")
    for row, below in pairwise(rows):
        if len(row) > 5 and row[1] == "nnU-Net" and below[1] == "nnlite":
            names.append(row[0].split(",")[0])
            for what, i in {"wall time (s)": 2, "memory (GB)": 4, "disk (MB)": 5}.items():
                groups.setdefault(what, []).append((float(row[i]), float(below[i])))
    draw_bars("bench_preprocess", "Planning and preprocessing", names, groups)
    rows = [row for row in read_rows("bench_train") if len(row) == 6 and row[2] == "with loading"]
    draw_bars("bench_train", "Training on two CPU cores", [f"{row[0]}, {row[1].split(',')[0]}" for row in rows],
              {"s per iteration": [(float(row[3]), float(row[4])) for row in rows]})  # fmt: skip
    rows, names, groups = read_rows("bench_predict"), [], {}
    for row, *below in zip(rows, rows[1:], rows[2:], rows[3:], strict=False):
        if len(row) == 5 and row[1] == "nnU-Net":
            ours = next(one for one in below if "nnlite" in one[1])
            names.append(row[0].split(" of ")[0])
            for what, i in {"wall time (s)": 2, "memory (GB)": 4}.items():
                groups.setdefault(what, []).append((float(row[i]), float(ours[i])))
    draw_bars("bench_predict", "Prediction on two CPU cores", names, groups)


def draw_bars(name: str, title: str, names: list[str], groups: dict[str, list[tuple[float, float]]]) -> None:
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 0.7 + 0.75 * len(names)), squeeze=False)
    for k, (axis, (what, pairs)) in enumerate(zip(axes[0], groups.items(), strict=True)):
        y = np.arange(len(names))
        for shift, values, colour, label in (
            (-0.2, [p[0] for p in pairs], THEIRS, "nnU-Net 2.8.1"), (0.2, [p[1] for p in pairs], OURS, "nnlite"),
        ):  # fmt: skip
            bars = axis.barh(y + shift, values, 0.38, color=colour, label=label)
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axis.set_yticks(y, names if k == 0 else [""] * len(names), fontsize=8)
        axis.invert_yaxis()
        axis.set_title(what, fontsize=9)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, frameon=False, ncols=2, loc="upper right")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(PICTURES / f"{name}.png", dpi=110)
    plt.close(figure)
    print(f"{name}.png")


PARTS: dict[str, Callable[[Path, Browser], None]] = {
    "terminal": make_terminal_pictures, "report": make_report_pictures, "viewer": make_viewer_pictures,
    "plots": make_plots,
}  # fmt: skip

if __name__ == "__main__":
    main()
