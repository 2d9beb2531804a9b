#!/usr/bin/env python3
"""Time making augmented training batches on one CPU core: nnlite's two pipelines, and nnU-Net's transforms.

  bench_augment.py WORKSPACE [--nnunet-python PYTHON] [--batches 10]

WORKSPACE         where a data set is planned and preprocessed for 2d and 3d_fullres
--nnunet-python   interpreter of an environment with nnunetv2

nnlite's figures are those of whole batches: drawn, read from RAM (or from disk), augmented. nnU-Net's are those of its
trainer's transforms alone, applied to patches that lie ready, as its worker processes apply them, sample by sample.
Milliseconds of CPU time per batch, mean (smallest) over the batches: most samples get few of the transforms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import zoom

from nnunet_lite.data.dataset import dataset_from_json
from nnunet_lite.files import read_json
from nnunet_lite.networks.cpu import keep_freed_memory
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.store import open_case
from nnunet_lite.preprocessing.stored_case import CaseArrays
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training.augmentation import is_in_plane, rotation_limit
from nnunet_lite.training.batchgenerators import oversize
from nnunet_lite.training.cache import load_case
from nnunet_lite.training.dataloader import draw_locations, enlarge, make_batch, read_patches, rng_for
from nnunet_lite.training.job import Job, configure_plan
from nnunet_lite.workspace import planned_paths

CPU = torch.device("cpu")
NNUNET = """
import json, sys, time
import numpy as np, torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
torch.set_num_threads(1)
given = np.load(sys.argv[1])
images, classes = given["images"], given["classes"]
patch, in_plane, limit, size, batches = (given[k].tolist() for k in ("patch", "in_plane", "limit", "size", "batches"))
transforms = nnUNetTrainer.get_training_transforms(
    np.array(patch), (-limit, limit), None, tuple(range(len(patch))), in_plane and len(patch) == 3,
    use_mask_for_norm=[False], is_cascaded=False, foreground_labels=[1, 2])
seconds = []
for batch in range(batches):
    start = time.process_time()
    for i in range(size):
        k = (batch * size + i) % len(images)
        transforms(image=torch.from_numpy(images[k]), segmentation=torch.from_numpy(classes[k]))
    seconds.append(time.process_time() - start)
print(json.dumps(seconds))
"""


def cpu_ms(make: Callable[[int], Any], batches: int) -> list[float]:
    make(batches)  # imports, first allocations
    found = []
    for i in range(batches):
        start = time.process_time()
        make(i)
        found.append(1e3 * (time.process_time() - start))
    return found


def figure(ms: Sequence[float]) -> str:
    return f"{np.mean(ms):.0f} ({min(ms):.0f})"


def jobs(workspace: Path) -> dict[str, Job]:
    """Both configurations of the data set, and noise with patches of 128^3."""
    paths = planned_paths(workspace)
    plan, cases = Plan.read(paths.plans), dataset_from_json(read_json(paths.dataset)).cases

    def job(configuration: str, stored: list[Any], **changes: Any) -> Job:
        settings = with_changes(Settings(), changes)
        made, loaded = configure_plan(plan, configuration, settings), [load_case(case) for case in stored]
        return Job(made, configuration, settings, 5, workspace, CPU, loaded, stored)

    rng, noise = np.random.default_rng(0), []
    for i in range(3):
        image = rng.normal(size=(1, 220, 240, 240)).astype(np.float16)
        label = (zoom(rng.normal(size=(22, 24, 24)), 10, order=1) > 0.3).astype(np.uint8)
        noise.append(CaseArrays(str(i), image, label, {1: np.argwhere(label)[::1000]}, None))
    large: dict[str, Any] = {"training.patch_size": [128, 128, 128], "training.batch_size": 2}
    planned = {
        f"{plan.dataset} {c}": job(c, [open_case(paths.preprocessed, plan, c, case.id) for case in cases])
        for c in ("3d_fullres", "2d")
    }
    return {**planned, "noise": job("3d_fullres", noise, **large)}


def nnunet_ms(python: str, job: Job, batches: int) -> list[float]:
    """nnU-Net's transforms on oversized patches of the same cases."""
    settings = job.settings.augmentation
    wide, count = oversize(settings, job.patch), min(64, 4 * job.planned.batch_size)
    places = draw_locations(job.training, job.patch, count, 0.33, None, rng_for(0, 0, 0))
    patches = read_patches(job.training, [enlarge(place, job.patch, wide) for place in places], wide, CPU)
    first = 3 - job.dimensions
    images, classes = (x[:, :, 0].numpy() if first else x.numpy() for x in patches)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "patches.npz"
        np.savez(
            file,
            images=images,
            classes=classes.astype(np.int16),
            patch=job.patch[first:],
            in_plane=is_in_plane(job.patch),
            limit=np.deg2rad(rotation_limit(settings, job.patch)),
            size=job.planned.batch_size,
            batches=batches,
        )
        done = subprocess.run([python, "-c", NNUNET, str(file)], capture_output=True, text=True, check=True)
    return [1e3 * seconds for seconds in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--nnunet-python")
    parser.add_argument("--batches", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print("| batch | plain | native | native, from disk | batchgenerators, as in paper2018 | nnU-Net |")
    print("|---|---|---|---|---|---|")
    for name, job in jobs(arguments.workspace).items():
        recipe = with_changes(job.settings, {"augmentation.pipeline": "batchgenerators", "augmentation.rotation": 15.0})
        original = Job(job.plan, job.configuration, recipe, 5, job.folder, CPU, job.training, job.validation)
        n = arguments.batches
        rows = [
            cpu_ms(lambda i, job=job: make_batch(job, job.training, 0, i, augment=False), n),
            cpu_ms(lambda i, job=job: make_batch(job, job.training, 0, i, augment=True), n),
            cpu_ms(lambda i, job=job: make_batch(job, job.validation, 0, i, augment=True), n),
            cpu_ms(lambda i, job=original: make_batch(job, job.training, 0, i, augment=True), max(2, n // 4)),
        ]
        if arguments.nnunet_python:
            rows.append(nnunet_ms(arguments.nnunet_python, job, n))
        size = "x".join(map(str, job.planned.patch_size))
        print(f"| {name}: {job.planned.batch_size} of {size} | {' | '.join(map(figure, rows))} |", flush=True)


if __name__ == "__main__":
    main()
