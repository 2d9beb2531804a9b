"""Warn of a target spacing that was set by hand: finer than images were recorded, or too coarse for small labels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset, map_labels
from nnunet_lite.data.images import read_label_image
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import few
from nnunet_lite.planning.schema import Plan

_FINEST = 0.5  # of the data's spacing
_SMALLEST = 4  # voxels: resampling may lose a smaller component, depending on its place between the voxels
_CASES = 10  # whose label maps are read


def warn_of_spacing(plan: Plan, spacing: Sequence[float], dataset: Dataset) -> None:
    """Warn of a spacing that adds voxels without detail, and of labels that it is too coarse for.

    Parameters
    ----------
    plan : Plan
        The plan of the dataset.
    spacing : sequence of float
        Target spacing in mm, in the plan's order of axes; (y, x) in 2D.
    dataset : Dataset
        The raw cases; a few label maps are read if the spacing is coarser than the data's.
    """
    own = plan.median_spacing[-len(spacing) :]
    pairs = list(zip(spacing, own, strict=True))
    if fine := [f"{new:.4g} mm for {old:.4g} mm" for new, old in pairs if new < _FINEST * old]:
        log.warn(f"the spacing is finer than half of the data's ({', '.join(fine)}): more voxels, not more detail")
    if prod(spacing) <= prod(own):
        return
    voxel = prod((*plan.median_spacing[: 3 - len(spacing)], *spacing))
    step = max(1, len(dataset.cases) // _CASES)
    files = [case.label for case in dataset.cases[::step] if case.label is not None][:_CASES]
    sizes = median_components(files, plan.labels, dataset.value_map)
    small = [f"{name} {size / voxel:.2g}" for name, size in sizes.items() if size < _SMALLEST * voxel]
    if small:
        log.warn(f"the spacing may lose labels; voxels that their median component would have: {few(small)}")


def median_components(files: Sequence[Path], labels: Labels, value_map: dict[int, int] | None) -> dict[str, float]:
    """Return the median volume (mm3) of the connected components of each label or region.

    Parameters
    ----------
    files : sequence of Path
        Label maps.
    labels : Labels
        Of the dataset.
    value_map : dict of int to int or None
        Value in a file -> value of the dataset.
    """
    from scipy import ndimage  # a fifth of a second, and only a spacing that was set by hand needs it

    volumes: dict[str, list[float]] = {name: [] for name in labels.region_names}
    for file in files:
        label = read_label_image(file)
        values, voxel = map_labels(label.array[0], value_map), prod(label.geometry.spacing)
        classes = labels.encode(values)
        boxes = ndimage.find_objects(classes)
        for name, members in zip(volumes, labels.region_classes, strict=True):
            found = [boxes[c - 1] for c in members if c <= len(boxes) and boxes[c - 1] is not None]
            if not found:
                continue
            box = tuple(
                slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*found, strict=True)
            )
            numbers, _ = ndimage.label(np.isin(classes[box], members), np.ones((3, 3, 3)))
            volumes[name] += (np.bincount(numbers.ravel())[1:] * voxel).tolist()
    return {name: float(np.median(each)) for name, each in volumes.items() if each}
