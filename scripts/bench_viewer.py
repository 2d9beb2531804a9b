#!/usr/bin/env python3
"""Measure how long `nnlite view` takes to open a large case in headless Chromium without a GPU.

usage: taskset -c 0,1 python scripts/bench_viewer.py IMAGE LABEL [--size X Y Z]

The case is enlarged from a smaller one. Its prediction is the label map, moved by some voxels.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import zoom

import nnunet_lite

CHROMIUM = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-quic")
MOVED = (3, 2, 1)  # voxels
MARKS = {"coarse": "first picture", "full": "full resolution", "solid": "three dimensions"}  # of viewer.js


def enlarge(source: Path, target: Path, size: tuple[int, ...], moved: tuple[int, ...], order: int) -> None:
    """Write a NIfTI file, enlarged to a size in voxels and moved."""
    image = nibabel.load(source)
    voxels = np.asarray(image.dataobj).astype(np.uint8 if order == 0 else np.int16)
    factors = np.divide(size, voxels.shape)
    voxels = np.roll(zoom(voxels, factors, order=order), moved, (0, 1, 2))
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine @ np.diag([*(1 / factors), 1])), target)


def opening_seconds(url: str, picture: Path) -> dict[str, float]:
    """From the request for the page to the first picture, to all voxels, and to the three dimensions."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    seconds = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(CHROMIUM))
        tab = browser.new_page(viewport={"width": 1366, "height": 768})
        tab.goto(url)
        tab.wait_for_selector("html[data-solid]", timeout=300_000)
        for mark, what in MARKS.items():
            seconds[what] = tab.evaluate("(name) => performance.getEntriesByName(name)[0].startTime", mark) / 1000
        tab.screenshot(path=picture, timeout=120_000)
        browser.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("label", type=Path)
    parser.add_argument("--size", type=int, nargs=3, default=[512, 512, 300], help="voxels (x, y, z)")
    parser.add_argument("--picture", type=Path, help="where to write a screenshot")
    given = parser.parse_args()
    size = tuple(given.size)
    with tempfile.TemporaryDirectory() as scratch:
        image, reference, prediction = (
            Path(scratch) / f"{name}.nii.gz" for name in ("image", "reference", "prediction")
        )
        enlarge(given.image, image, size, (0, 0, 0), order=1)
        enlarge(given.label, reference, size, (0, 0, 0), order=0)
        enlarge(given.label, prediction, size, MOVED, order=0)
        start = time.perf_counter()
        with nnunet_lite.view(image, [reference, prediction], browser=False) as view:
            print(f"{' x '.join(map(str, size))} voxels, image and two label maps\n\n| until | seconds |\n|---|---|")
            print(f"| the files are read | {time.perf_counter() - start:.1f} |")
            for name, seconds in opening_seconds(view.url, given.picture or Path(scratch) / "view.png").items():
                print(f"| {name}, from the request for the page | {seconds:.1f} |")


if __name__ == "__main__":
    main()
