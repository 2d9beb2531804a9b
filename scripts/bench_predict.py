#!/usr/bin/env python3
"""Time prediction and look at its memory: nnU-Net and nnlite in turn, with one model, on the same images and cores.

  bench_predict.py maps NNUNET_VENV MODEL IMAGES [--cases 60]      many small images
  bench_predict.py ct NNUNET_VENV IMAGE [--slices 300]             one large image, 60 classes
  bench_predict.py large IMAGE [--slices 800] [--classes 118]      nnlite alone: memory above the image
  bench_predict.py flat IMAGE                                      nnlite alone: memory of 400 and of 1600 slices
  bench_predict.py row MODEL IMAGES [--cases 20]                   nnlite alone: memory from case to case
  bench_predict.py export IMAGE [--slices 300]                     nnlite alone: which share of the time is no network's

NNUNET_VENV  virtual environment with nnunetv2, such as ~/venvs/nnunet
MODEL        model folder of nnU-Net, with fold_0
IMAGES       folder of NIfTI files of one channel, named without `_0000`
IMAGE        a small CT, enlarged to 512 x 512 x slices of 0.8 x 0.8 x 1.0 mm

The model of large images has random weights: a U-Net of 8, 16 and 32 features, 1.5 mm, patches of 128^3, no mirroring.
Memory is the largest sum over all processes of the proportional set size (PSS), looked at up to five times a second.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from bench_gpu import random_model
from bench_preprocess import Cost, measure

from nnunet_lite.inference import outputs, predictor
from nnunet_lite.log import info
from nnunet_lite.models.nnunet import export_nnunet
from nnunet_lite.networks.devices import has_bf16

NNLITE = [sys.executable, "-m", "nnunet_lite", "predict", "--device", "cpu"]


def maps(venv: Path, model: Path, images: Path, cores: list[int], n: int, scratch: Path) -> None:
    """Wall time and memory of both for many small images, at either precision, and the Dice between their maps."""
    cases = sorted(images.glob("*.nii.gz"))[:n]
    for case in cases:
        for name in (f"nnunet/{case.name.removesuffix('.nii.gz')}_0000.nii.gz", f"nnlite/{case.name}"):
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).symlink_to(case.absolute())
    shown(f"nnU-Net, {len(cases)} images", theirs := nnunet(venv, model, scratch / "nnunet", cores, scratch / "t"))
    for precision in ("auto", "fp32", *(["bf16"] if has_bf16(torch.device("cpu")) else [])):
        out = scratch / precision
        command = [*NNLITE, "-m", str(model), "-i", str(scratch / "nnlite"), "-o", str(out), "--precision", precision]
        shown(f"nnlite --precision {precision}", measure([command], cores, {}, out), theirs)
        info(f"  {agreement(scratch / 't', out)}")


def ct(venv: Path, image: Path, cores: list[int], slices: int, scratch: Path) -> None:
    """Both for one large image of 60 classes."""
    ours = random_model(scratch / "ours", 60)
    export_nnunet(ours, scratch / "theirs")
    enlarged(image, slices, scratch / "images" / "ct_0000.nii.gz")
    out = scratch / "lite"
    command = [*NNLITE, "-m", str(ours), "-i", str(scratch / "images"), "-o", str(out), "--precision", "fp32"]
    mine = measure([command], cores, {}, out)
    theirs = nnunet(venv, scratch / "theirs", scratch / "images", cores, scratch / "t")
    shown(f"nnU-Net, 512 x 512 x {slices}, 60 classes", theirs)
    shown("nnlite --precision fp32", mine, theirs)
    info(f"  {agreement(scratch / 't', out)}")


def alone(image: Path, cores: list[int], slices: int, classes: int, scratch: Path) -> int:
    """Peak memory of nnlite for one large image, above the image as it lies in the file."""
    model = random_model(scratch / f"model_{classes}", classes)
    file = enlarged(image, slices, scratch / f"images_{slices}" / "ct_0000.nii.gz")
    out = scratch / f"out_{slices}_{classes}"
    cost = measure([[*NNLITE, "-m", str(model), "-i", str(file), "-o", str(out)]], cores, {}, out)
    voxels = 512 * 512 * slices * 2
    shown(f"nnlite, 512 x 512 x {slices}, {classes} classes", cost)
    info(f"  {(cost.memory - voxels) / 1e9:.2f} GB above the image's {voxels / 1e9:.2f} GB of int16")
    return cost.memory - voxels


def row(model: Path, images: Path, n: int) -> None:
    """Memory of this process after each of several cases."""
    from nnunet_lite.networks.cpu import keep_freed_memory

    keep_freed_memory()  # as `nnlite predict` does
    loaded, sizes = predictor.load(model, device="cpu"), []
    for case in sorted(images.glob("*.nii.gz"))[:n]:
        loaded(case)
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    info("MB after each case: " + " ".join(f"{size / 1e6:.0f}" for size in sizes))
    info(f"after the last {sizes[-1] / sizes[1]:.3f} of what it was after the second")


def export(image: Path, slices: int, scratch: Path) -> None:
    """The share of a prediction that resampling and deciding takes, and that of the rest."""
    model = predictor.load(random_model(scratch / "model", 60), device="cpu")
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(enlarged(image, slices, scratch / "ct.nii.gz"))))
    spent, in_threads = [0.0], outputs.run_in_threads

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        in_threads(*arguments)
        spent[0] += time.perf_counter() - start

    outputs.run_in_threads = timed
    start = time.perf_counter()
    model(array, (1.0, 0.8, 0.8))
    total = time.perf_counter() - start
    info(f"prediction {total:.1f} s, of which resampling and labels {spent[0]:.1f} s: {spent[0] / total:.1%}")


def nnunet(venv: Path, model: Path, images: Path, cores: list[int], out: Path) -> Cost:
    command = [str(venv / "bin" / "nnUNetv2_predict_from_modelfolder"), "-i", str(images), "-o", str(out), "-m",
               str(model), "-f", "0", "-device", "cpu", "-npp", "2", "-nps", "2"]  # fmt: skip
    return measure([command], cores, {}, out)


def enlarged(small: Path, slices: int, target: Path) -> Path:
    """A CT of 512 x 512 x slices, 0.8 x 0.8 x 1.0 mm, int16, that shows the whole of a small one."""
    image = sitk.Cast(sitk.ReadImage(str(small)), sitk.sitkInt16)
    size = (512, 512, slices)
    spacing = [s * n / m for s, n, m in zip(image.GetSpacing(), image.GetSize(), size, strict=True)]
    where = (sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), spacing, image.GetDirection())
    large = sitk.Resample(image, size, *where)
    large.SetSpacing((0.8, 0.8, 1.0))
    target.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(large, str(target), True, 1)
    return target


def agreement(theirs: Path, ours: Path) -> str:
    """Voxels that are equal and the Dice of all labels, over all images."""
    equal, total, dices = 0, 0, []
    for file in sorted(theirs.glob("*.nii.gz")):
        first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / file.name))) for folder in (theirs, ours))
        equal, total = equal + int((first == second).sum()), total + first.size
        counts = [np.bincount(a.ravel(), minlength=256) for a in (first, second, first[first == second])]
        dices += [2 * c / (a + b) for a, b, c in zip(*counts, strict=True) if a + b][1:]
    return f"{equal / total:.6f} of the voxels are equal; Dice {np.mean(dices):.5f}, lowest {min(dices):.5f}"


def shown(who: str, cost: Cost, than: Cost | None = None) -> None:
    ratio = ""
    if than is not None:
        ratio = f"  {than.wall / cost.wall:.1f} times faster, {than.memory / cost.memory:.1f} times less memory"
    info(f"{who:40} {cost.wall:7.1f} s {cost.cpu:7.1f} s CPU {cost.memory / 1e9:6.2f} GB{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["maps", "ct", "large", "flat", "row", "export"])
    parser.add_argument("paths", type=Path, nargs="+", help="see above")
    parser.add_argument("--cases", type=int)
    parser.add_argument("--slices", type=int)
    parser.add_argument("--classes", type=int, default=118)
    parser.add_argument("--cores", default="0,1", help="default: 0,1")
    args = parser.parse_args()
    cores = [int(core) for core in args.cores.split(",")]
    os.sched_setaffinity(0, cores)
    scratch = Path(tempfile.mkdtemp(prefix="bench_predict-"))
    try:
        match args.mode:
            case "maps":
                maps(*args.paths, cores, args.cases or 60, scratch)
            case "ct":
                ct(*args.paths, cores, args.slices or 300, scratch)
            case "large":
                alone(*args.paths, cores, args.slices or 800, args.classes, scratch)
            case "flat":
                short, long = (alone(*args.paths, cores, slices, args.classes, scratch) for slices in (400, 1600))
                info(f"above the image, 1600 slices take {long / short:.3f} of what 400 take")
            case "row":
                row(*args.paths, args.cases or 20)
            case "export":
                export(*args.paths, args.slices or 300, scratch)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
