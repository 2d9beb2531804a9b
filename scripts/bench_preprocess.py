#!/usr/bin/env python3
"""Time planning and preprocessing (2d and 3d_fullres) of nnU-Net and of nnlite on the same data and the same cores.

  bench_preprocess.py NNUNET_VENV DATA [DATA ...] [--cores 0,1] [--ct IMAGE LABEL]

NNUNET_VENV  virtual environment with nnunetv2, such as ~/venvs/nnunet
DATA         data sets in MSD or nnU-Net layout; nnU-Net gets links to their files, or their 4D files split
--ct         also two CT volumes of 512 x 512 x 200, made from this small CT and its label map by resampling to about
             0.8 x 0.8 x 1.5 mm; the labels are merged into five

nnU-Net runs `nnUNetv2_plan_and_preprocess --verify_dataset_integrity` with one process per core, nnlite `plan` (which
checks) and `preprocess`. Memory is the largest sum over all their processes of the proportional set size (PSS), looked
at up to five times a second; CPU is that of all their processes; disk is what they store.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import SimpleITK as sitk

from nnunet_lite.data.dataset import Dataset, read_dataset, summarize_dataset
from nnunet_lite.data.images import read_images
from nnunet_lite.data.names import PICTURES

CONFIGURATIONS = ("2d", "3d_fullres")
LABELS = 5  # of the CT


@dataclass(frozen=True)
class Cost:
    """Wall and CPU seconds, peak memory and disk in bytes."""

    wall: float
    cpu: float
    memory: int
    disk: int


def measure(commands: list[list[str]], cores: list[int], environment: dict[str, str], stored: Path) -> Cost:
    """Run commands one after the other on some cores."""
    before, start, peak = _cpu_seconds(), time.perf_counter(), 0
    for command in commands:
        with tempfile.TemporaryFile("w+") as output:
            process = psutil.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
            process.cpu_affinity(cores)
            while process.poll() is None:
                looked = time.perf_counter()
                peak = max(peak, _tree_memory(process))
                time.sleep(max(0.2, 20 * (time.perf_counter() - looked)))  # to look takes long where much is used
            if process.returncode:
                output.seek(0)
                sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{output.read()[-3000:]}")
    wall = time.perf_counter() - start
    disk = sum(path.stat().st_size for path in stored.rglob("*") if path.is_file())
    return Cost(wall, _cpu_seconds() - before, peak, disk)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _tree_memory(process: psutil.Process) -> int:
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue  # it ended between being listed and being looked at
    return total


def nnunet_layout(dataset: Dataset, number: int, raw: Path) -> None:
    """The data set as nnU-Net v2 wants it, by links; several channels in one file are written out one by one."""
    root = raw / f"Dataset{number:03d}_{dataset.name.split('_')[-1]}"
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    for case in dataset.cases:
        if len(case.images) == len(dataset.channels) or dataset.file_ending in PICTURES:
            for channel, path in enumerate(case.images):
                (root / "imagesTr" / f"{case.id}_{channel:04d}{dataset.file_ending}").symlink_to(path.absolute())
        else:
            image = read_images(case.images)
            for channel, array in enumerate(image.array):
                single = sitk.GetImageFromArray(array)
                single.SetSpacing(image.geometry.spacing[::-1])
                single.SetOrigin(image.geometry.origin)
                single.SetDirection(image.geometry.direction)
                sitk.WriteImage(single, str(root / "imagesTr" / f"{case.id}_{channel:04d}{dataset.file_ending}"))
        assert case.label is not None
        (root / "labelsTr" / f"{case.id}{dataset.file_ending}").symlink_to(case.label.absolute())
    (root / "dataset.json").write_text(json.dumps(summarize_dataset(dataset)))


def make_ct(image: Path, label: Path, root: Path) -> Path:
    """Two CT-sized cases of unlike spacing, so that both are resampled, with the labels merged into five."""
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    small = sitk.Cast(sitk.ReadImage(str(image)), sitk.sitkInt16)
    values, classes = np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(label))), return_inverse=True)
    merged = -(-classes * LABELS // (len(values) - 1))  # 0 stays background
    mask = sitk.GetImageFromArray(merged.reshape(small.GetSize()[::-1]).astype(np.uint8))
    mask.CopyInformation(small)
    for case, factor in enumerate((0.95, 1.05)):
        for part, source, how, outside in (
            (f"imagesTr/ct_{case}_0000.nii.gz", small, sitk.sitkLinear, -1024),
            (f"labelsTr/ct_{case}.nii.gz", mask, sitk.sitkNearestNeighbor, 0),
        ):
            size, spacing = (512, 512, 200), (0.8 * factor, 0.8 * factor, 1.5 * factor)
            where = (sitk.Transform(), how, small.GetOrigin(), spacing, small.GetDirection(), outside)
            sitk.WriteImage(sitk.Resample(source, size, *where), str(root / part))
    labels = {"background": 0, **{f"organs {i}": i for i in range(1, LABELS + 1)}}
    about = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def run(venv: Path, data: Path, number: int, cores: list[int], scratch: Path) -> tuple[Cost, Cost]:
    """nnU-Net's cost and ours for one data set; the files are in the page cache for both."""
    dataset = read_dataset(data)
    for folder in ("raw", "pre", "results"):
        (scratch / folder).mkdir(parents=True)
    nnunet_layout(dataset, number, scratch / "raw")
    for case in dataset.cases:
        for path in (*case.images, case.label):
            assert path is not None
            path.read_bytes()
    threads = str(len(cores))
    theirs = [str(venv / "bin" / "nnUNetv2_plan_and_preprocess"), "-d", str(number), "--verify_dataset_integrity"]
    theirs += ["-c", *CONFIGURATIONS, "-npfp", threads, "-np", *[threads] * len(CONFIGURATIONS)]
    folders = {f"nnUNet_{name}": str(scratch / name) for name in ("raw", "results")}
    folders["nnUNet_preprocessed"] = str(scratch / "pre")
    nnunet = measure([theirs], cores, folders | {"OMP_NUM_THREADS": "1"}, scratch / "pre")
    nnlite = str(Path(sys.executable).with_name("nnlite"))
    ours = [[nnlite, "plan", str(data), "-w", str(scratch / "ws")]]
    ours.append([nnlite, "preprocess", *CONFIGURATIONS, "-w", str(scratch / "ws")])
    return nnunet, measure(ours, cores, {}, scratch / "ws")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path)
    parser.add_argument("data", type=Path, nargs="*")
    parser.add_argument("--cores", default="0,1", help="default: 0,1")
    parser.add_argument("--ct", type=Path, nargs=2, metavar=("IMAGE", "LABEL"))
    args = parser.parse_args()
    cores = [int(core) for core in args.cores.split(",")]
    scratch = Path(tempfile.mkdtemp(prefix="bench_preprocess-"))
    try:
        sets = list(args.data)
        if args.ct:
            sets.append(make_ct(*args.ct, scratch / "CT512"))
        print(f"{'data set':24} {'':8} {'wall s':>8} {'CPU s':>8} {'memory GB':>10} {'disk MB':>8}")
        for number, data in enumerate(sets, 901):
            costs = run(args.venv, data, number, cores, scratch / str(number))
            for who, cost in zip(("nnU-Net", "nnlite"), costs, strict=True):
                numbers = f"{cost.wall:8.1f} {cost.cpu:8.1f} {cost.memory / 1e9:10.2f} {cost.disk / 1e6:8.1f}"
                print(f"{data.name if who == 'nnU-Net' else '':24} {who:8} {numbers}", flush=True)
            nnunet, nnlite = costs
            wall, cpu, memory, disk = (
                getattr(nnunet, what) / getattr(nnlite, what) for what in ("wall", "cpu", "memory", "disk")
            )
            print(f"{'':24} {'ratio':8} {wall:8.1f} {cpu:8.1f} {memory:10.1f} {disk:8.1f}")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
