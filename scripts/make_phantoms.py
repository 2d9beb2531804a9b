#!/usr/bin/env python3
"""Make a dataset of synthetic body scans, which is hard in known ways and may be passed on.

usage: python scripts/make_phantoms.py OUTPUT [--cases 40] [--seed 0] [--size 128 160 160] [--spacing 1.5 3]

Each case is the label map of one CT, turned, scaled and bent at random, on a grid of its own; every third grid has
thick slices. Of its 60 structures six are labels, from the liver to the adrenal glands, and nodules of a few voxels are
added; the other structures are background. Each structure of each case has an intensity of its own, near to that of
other structures. Voxels at borders are mixed (the mean of eight samples), a bias field and noise are added. The left
kidney is a copy of the right one with the same intensity: the two differ in position only.

The same options make the same voxels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

LABEL_MAP = Path(__file__).parent.parent / "tests" / "data" / "ct_labels" / "label_map.nii.gz"
# a label of ours -> classes of the label map
LABELS = {
    "liver": (5,),
    "urinary_bladder": (21,),
    "kidney_right": (2,),
    "kidney_left": (3,),
    "aorta": (52,),
    "adrenal_glands": (8, 9),
    "nodule": (119,),
}
RIGHT, LEFT = 2, 3  # kidneys
BODY, NODULE = 118, 119  # tissue that has no class, and balls in it
SAMPLES = list(product((0, 1), repeat=3))  # of a voxel
ATTRIBUTION = "Made from a label map among the test files of TotalSegmentator (Wasserthal et al. 2023)."


def read_anatomy(file: Path) -> sitk.Image:
    """The classes of a label map with smooth surfaces in a body around them, on a grid of half its spacing."""
    image = sitk.ReadImage(str(file))
    classes = sitk.GetArrayFromImage(image)
    near = np.pad(ndimage.distance_transform_edt(classes == 0) < 10, ((0, 0), (10, 10), (10, 10)))
    body = ndimage.distance_transform_edt(near)[:, 10:-10, 10:-10] > 7  # gaps are closed, and a skin is left
    right, left = np.argwhere(classes == RIGHT), np.argwhere(classes == LEFT)
    classes[classes == LEFT] = 0
    classes[tuple((right + np.rint(left.mean(0) - right.mean(0)).astype(int)).T)] = LEFT
    classes[body & (classes == 0)] = BODY
    fine = np.zeros([2 * n for n in classes.shape], np.uint8)
    largest = np.zeros(fine.shape, np.float32)
    for value, box in enumerate(ndimage.find_objects(classes.astype(int) + 1)):
        if box is not None:
            box = tuple(slice(max(0, axis.start - 2), axis.stop + 2) for axis in box)
            share = ndimage.gaussian_filter((classes[box] == value).astype(np.float32), 0.6)
            share = ndimage.zoom(share, 2, order=1, grid_mode=True, mode="nearest")
            there = tuple(slice(2 * axis.start, 2 * axis.stop) for axis in box)
            wins = share > largest[there]
            fine[there][wins], largest[there][wins] = value, share[wins]
    anatomy = sitk.GetImageFromArray(fine)
    anatomy.SetDirection(image.GetDirection())
    anatomy.SetSpacing([s / 2 for s in image.GetSpacing()])
    anatomy.SetOrigin(image.TransformContinuousIndexToPhysicalPoint([-0.25] * 3))
    return anatomy


def centre_of(image: sitk.Image) -> np.ndarray:
    return np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))


def smooth_noise(rng: np.random.Generator, knots: int) -> np.ndarray:
    """Noise of unit variance at some knots along each axis, on a grid five times as fine."""
    return ndimage.zoom(rng.normal(size=[knots] * 3), 5, order=3, mode="nearest", grid_mode=True)


def draw_deformation(rng: np.random.Generator, centre: np.ndarray) -> sitk.Transform:
    """A rotation, a scaling and a smooth displacement about a point, in mm."""
    affine = sitk.ScaleVersor3DTransform()
    affine.SetCenter(centre)
    affine.SetRotation(rng.normal(size=3), float(np.radians(rng.uniform(0, 12))))
    affine.SetScale(1 / rng.uniform(0.85, 1.1, 3))
    shifts = np.stack([7 * smooth_noise(rng, 13) for _ in range(3)], -1)
    field = sitk.GetImageFromArray(shifts, isVector=True)
    field.SetSpacing([8.0] * 3)  # 40 mm from knot to knot
    field.SetOrigin(centre - 8 * (len(shifts) - 1) / 2)
    return sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))])


def draw_grid(
    rng: np.random.Generator, anatomy: sitk.Image, size: Sequence[int], spacing: Sequence[float], thick: bool
) -> sitk.Image:
    """An empty image that shows most of the body; size along (z, y, x), smallest and largest spacing."""
    low, high = spacing
    in_plane = rng.uniform(low, (low + high) / 2)
    between = rng.uniform(0.85 * high, high) if thick else min(high, in_plane * rng.uniform(1, 1.15))
    steps = np.array([in_plane, in_plane, between])
    body = np.multiply(anatomy.GetSize(), anatomy.GetSpacing())
    shown = rng.uniform(0.8, 1.0, 3) * body
    counts = np.maximum(size[::-1], np.rint(shown / steps)).astype(int)
    image = sitk.Image(counts.tolist(), sitk.sitkUInt8)
    image.SetSpacing(steps)
    image.SetDirection(anatomy.GetDirection())
    shift = rng.uniform(-0.5, 0.5, 3) * np.maximum(0, body - counts * steps)
    image.SetOrigin(centre_of(anatomy) + shift - centre_of(image))
    return image


def add_nodules(rng: np.random.Generator, classes: np.ndarray, spacing: np.ndarray) -> None:
    """Put balls with radii of 0.8 to 2.2 voxels into the body; `spacing` is that of the samples, along (z, y, x)."""
    voxel = 2 * np.prod(spacing) ** (1 / 3)
    margin = np.ceil(2.2 * voxel / spacing).astype(int)
    box = np.stack(np.meshgrid(*(np.arange(-m, m + 1) for m in margin), indexing="ij"), -1)
    distances = np.linalg.norm(box * spacing, axis=-1)
    places = rng.integers(margin, np.array(classes.shape) - margin, (1000, 3))
    places = places[classes[tuple(places.T)] == BODY][: rng.integers(5, 13)]
    for place in places:
        ball = box[distances < voxel * rng.uniform(0.8, 2.2)] + place
        classes[tuple(ball.T)] = NODULE


def add_samples(samples: np.ndarray) -> np.ndarray:
    """The sum of the samples of each voxel."""
    return sum(samples[i::2, j::2, k::2] for i, j, k in SAMPLES)


def make_case(
    anatomy: sitk.Image, levels: np.ndarray, rng: np.random.Generator, grid: sitk.Image
) -> tuple[sitk.Image, sitk.Image]:
    """An image and its label map; `levels` are the intensities of the classes over all cases."""
    fine = sitk.Image([2 * n for n in grid.GetSize()], sitk.sitkUInt8)
    fine.SetDirection(grid.GetDirection())
    fine.SetSpacing([s / 2 for s in grid.GetSpacing()])
    fine.SetOrigin(grid.TransformContinuousIndexToPhysicalPoint([-0.25] * 3))
    deformation = draw_deformation(rng, centre_of(anatomy))
    classes = sitk.GetArrayFromImage(sitk.Resample(anatomy, fine, deformation, sitk.sitkNearestNeighbor, 0))
    add_nodules(rng, classes, np.array(fine.GetSpacing()[::-1]))
    levels = levels + rng.normal(0, 0.12, len(levels))
    levels[0], levels[LEFT], levels[NODULE] = 0, levels[RIGHT], levels[BODY] + rng.uniform(0.25, 0.4)
    image = add_samples((levels / len(SAMPLES)).astype(np.float32)[classes])
    bias = np.exp(0.15 * smooth_noise(rng, 4))
    image *= ndimage.zoom(bias, np.divide(image.shape, bias.shape), order=1, mode="nearest", grid_mode=True)
    image += rng.normal(0, rng.uniform(0.03, 0.08), image.shape)
    image *= rng.uniform(500, 2000)
    values = np.zeros(len(levels), np.uint8)
    for label, members in enumerate(LABELS.values(), 1):
        values[list(members)] = label
    labels = values[classes]
    shares = np.stack([add_samples((labels == label).view(np.uint8)) for label in range(len(LABELS) + 1)])
    both = sitk.GetImageFromArray(image.astype(np.int16)), sitk.GetImageFromArray(shares.argmax(0).astype(np.uint8))
    for made in both:
        made.CopyInformation(grid)
    return both


def make_dataset(
    root: Path,
    anatomy: sitk.Image,
    cases: int = 40,
    seed: int = 0,
    size: Sequence[int] = (128, 160, 160),
    spacing: Sequence[float] = (1.5, 3.0),
) -> None:
    """Write the dataset in the layout of nnU-Net."""
    levels = np.random.default_rng(seed).uniform(0.2, 0.9, NODULE + 1)
    levels[BODY] = 0.35
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for case in range(cases):
        rng = np.random.default_rng([seed, case])
        grid = draw_grid(rng, anatomy, size, spacing, thick=case % 3 == 2)
        image, labels = make_case(anatomy, levels, rng, grid)
        sitk.WriteImage(image, str(root / "imagesTr" / f"phantom_{case:03d}_0000.nii.gz"), True, 1)
        sitk.WriteImage(labels, str(root / "labelsTr" / f"phantom_{case:03d}.nii.gz"), True, 1)
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0} | {name: label for label, name in enumerate(LABELS, 1)},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        "description": f"Synthetic; seed {seed}. {ATTRIBUTION}",
        "reference": "https://github.com/wasserth/TotalSegmentator",
        "licence": "Apache-2.0",
    }
    (root / "dataset.json").write_text(json.dumps(about, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the dataset, such as Dataset040_Phantoms")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=3, default=(128, 160, 160), help="least voxels along z, y, x")
    parser.add_argument("--spacing", type=float, nargs=2, default=(1.5, 3.0), help="smallest and largest, in mm")
    o = parser.parse_args()
    make_dataset(o.output, read_anatomy(LABEL_MAP), o.cases, o.seed, o.size, o.spacing)


if __name__ == "__main__":
    main()
