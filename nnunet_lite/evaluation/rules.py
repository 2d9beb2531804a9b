"""Rules for the components of a label, and what they remove from a label map.

A rule keeps a label's largest component, or those of a size, or both. Of a region (a set of labels that overlaps
others) what is removed becomes the innermost region around it that is left, or background. Rules apply one after the
other, in the order of `labels.region_names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import numpy as np

from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation.components import components
from nnunet_lite.evaluation.joint import Box, is_picture

UNITS = ("mm3", "mm2", "voxels", "px")


@dataclass(frozen=True)
class Rule:
    """What stays of a label: its largest component (the first one of equals), and none below a size.

    Parameters
    ----------
    min_size_mm3 : in mm3; of two-dimensional images in mm2, and where no spacing is known in voxels or pixels.
    unit : what the size is called, one of `UNITS`.
    """

    largest_component: bool = False
    min_size_mm3: float | None = None
    unit: str = "mm3"

    def checked(self) -> Rule:
        """Itself, as it may come from a file.

        Raises
        ------
        ValueError : a value is of another type, or a size that cannot be.
        """
        size = self.min_size_mm3
        if size is not None and (type(size) not in (int, float) or not 0 <= size < inf):
            raise ValueError(f"min_size_mm3 is {size!r}")
        if type(self.largest_component) is not bool:
            raise ValueError(f"largest_component is {self.largest_component!r}")
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit!r}, not one of {', '.join(UNITS)}")
        return self

    def __str__(self) -> str:
        size = "" if self.min_size_mm3 is None else f"{self.min_size_mm3:g} {self.unit}"
        if not self.largest_component:
            return f"no component below {size}" if size else "all components"
        return "the largest component" + (f", from {size}" if size else "")


def apply_rules(
    segmentation: np.ndarray, spacing: tuple[float, float, float], labels: Labels, rules: Mapping[str, Rule]
) -> np.ndarray:
    """A label map (z, y, x) without the components that the rules (by name of label or region) remove.

    The array that was given is left as it is, and returned where nothing is removed.
    """
    out, voxel = segmentation, voxel_size(segmentation.shape, spacing)
    for name, members in zip(labels.region_names, labels.region_values, strict=True):
        if name not in rules:
            continue
        mask = out == members[0] if len(members) == 1 else np.isin(out, members)
        box = _box_of(mask)
        if box is None:
            continue
        numbers, count = components(mask[box])
        removed = removed_by(np.bincount(numbers.ravel(), minlength=count + 1)[1:] * voxel, rules[name])
        if removed.any():
            out = segmentation.copy() if out is segmentation else out
            part, gone = out[box], np.concatenate([[False], removed])[numbers]
            before = part[gone]
            for value, instead in instead_of(labels, members).items():
                part[gone] = np.where(before == value, np.asarray(instead, out.dtype), part[gone])
    return out


def removed_by(sizes: np.ndarray, rule: Rule) -> np.ndarray:
    """Which components of these sizes (mm3) a rule removes."""
    removed = np.zeros(len(sizes), bool)
    if rule.largest_component and len(sizes):
        removed[:] = True
        removed[sizes.argmax()] = False
    return removed if rule.min_size_mm3 is None else removed | (sizes < rule.min_size_mm3)


def instead_of(labels: Labels, members: tuple[int, ...]) -> dict[int, int]:
    """What each value of a region becomes where the region is removed: the innermost other region, or background."""
    found = dict.fromkeys(members, labels.background)
    for others, written in zip(labels.region_values, labels.region_order or (), strict=False):
        if written in others and written not in members:
            found |= {value: written for value in members if value in others}
    return found


def voxel_size(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> float:
    """The size of a voxel in mm3, of a two-dimensional image in mm2."""
    return float(np.prod(spacing[1:] if is_picture(shape, spacing) else spacing))


def _box_of(mask: np.ndarray) -> Box | None:
    """The box around the set voxels of a mask (z, y, x)."""
    slices = np.flatnonzero(mask.any(axis=(1, 2)))
    if not len(slices):
        return None
    z = slice(slices[0], slices[-1] + 1)
    y, x = (np.flatnonzero(mask[z].any(axis=(0, axis))) for axis in (2, 1))
    return z, slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)
