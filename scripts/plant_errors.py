#!/usr/bin/env python3
"""Copy a dataset and plant one label error in each of a share of its cases, to measure `nnlite audit`.

usage: python scripts/plant_errors.py DATASET OUT [--share 0.1] [--seed 0]

The kinds of errors are taken in turn: two labels swapped, a label removed, the map flipped along an axis, shifted by
three voxels, replaced by that of another case, and six slices emptied. Files are hard links where the disk allows it;
damaged label maps are new files. OUT/planted.json has the kind of each damaged case.

The same options plant the same errors.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.files import write_json

SHIFT = 3  # voxels
EMPTIED = 6  # slices
Damage = Callable[[np.ndarray, np.ndarray, Labels, np.random.Generator], np.ndarray]


def swap_labels(label: np.ndarray, other: np.ndarray, labels: Labels, rng: np.random.Generator) -> np.ndarray:
    present = foreground_values(label, labels)
    if len(present) < 2:
        return label
    first, second = rng.choice(present, 2, replace=False)
    return np.where(label == first, second, np.where(label == second, first, label)).astype(label.dtype)


def remove_label(label: np.ndarray, other: np.ndarray, labels: Labels, rng: np.random.Generator) -> np.ndarray:
    present = foreground_values(label, labels)
    if not present:
        return label
    return np.where(label == rng.choice(present), labels.background, label).astype(label.dtype)


def flip_map(label: np.ndarray, other: np.ndarray, labels: Labels, rng: np.random.Generator) -> np.ndarray:
    return np.flip(label, rng.choice(long_axes(label, 1)))


def shift_map(label: np.ndarray, other: np.ndarray, labels: Labels, rng: np.random.Generator) -> np.ndarray:
    axis, forward = rng.choice(long_axes(label, SHIFT)), rng.random() < 0.5
    moved = np.roll(label, SHIFT if forward else -SHIFT, axis)
    np.moveaxis(moved, axis, 0)[slice(SHIFT) if forward else slice(-SHIFT, None)] = labels.background
    return moved


def take_other_map(label: np.ndarray, other: np.ndarray, labels: Labels, rng: np.random.Generator) -> np.ndarray:
    """The map of another case, cropped or padded around its centre."""
    out = np.full_like(label, labels.background)
    pairs = list(zip(label.shape, other.shape, strict=True))
    to = tuple(slice((n - min(n, m)) // 2, (n - min(n, m)) // 2 + min(n, m)) for n, m in pairs)
    source = tuple(slice((m - min(n, m)) // 2, (m - min(n, m)) // 2 + min(n, m)) for n, m in pairs)
    out[to] = other[source]
    return out


def empty_slices(label: np.ndarray, other: np.ndarray, labels: Labels, rng: np.random.Generator) -> np.ndarray:
    """Slices inside the object along an axis on which it is long enough, otherwise along its longest."""
    inside = np.isin(label, foreground_values(label, labels))
    if not inside.any():
        return label
    ends = [(int(places.min()), int(places.max()) + 1) for places in np.nonzero(inside)]
    fitting = [axis for axis, (start, stop) in enumerate(ends) if stop - start >= EMPTIED + 2]
    axis = int(rng.choice(fitting or [int(np.argmax([stop - start for start, stop in ends]))]))
    start, stop = ends[axis]
    first = int(rng.integers(start + 1, max(start + 2, stop - EMPTIED)))
    out = label.copy()
    np.moveaxis(out, axis, 0)[first : first + EMPTIED] = labels.background
    return out


KINDS: dict[str, Damage] = {
    "swapped labels": swap_labels,
    "removed label": remove_label,
    "flipped map": flip_map,
    "shifted map": shift_map,
    "map of another case": take_other_map,
    "emptied slices": empty_slices,
}


def foreground_values(label: np.ndarray, labels: Labels) -> list[int]:
    """The values in a label map that are neither background nor ignored."""
    return [int(value) for value in np.unique(label) if value not in (labels.background, labels.ignore)]


def long_axes(label: np.ndarray, least: int) -> list[int]:
    """The axes with more voxels than `least`; pictures have one voxel along z."""
    return [axis for axis, n in enumerate(label.shape) if n > least]


def damaged_maps(files: dict[str, Path], labels: Labels, share: float, seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """Damage a share of the label maps in memory: case id -> kind and map. A kind that changes nothing is skipped.

    The seed chooses the cases, the errors, and the kind that comes first.
    A case that a kind does not change (such as a map of one label, whose labels cannot be swapped) gets the next kind.
    """
    rng, planted, turn = np.random.default_rng(seed), dict[str, tuple[str, np.ndarray]](), seed
    order = [[*files][i] for i in rng.permutation(len(files))]
    number = round(share * len(files))
    for i, case in enumerate(order):
        if len(planted) == number:
            break
        label, geometry, _ = read_label(files[case])
        other, _, _ = read_label(files[order[i - 1]], geometry)
        for kind in [*KINDS][turn % len(KINDS) :] + [*KINDS][: turn % len(KINDS)]:
            damaged = KINDS[kind](label, other, labels, rng)
            if not np.array_equal(damaged, label):
                planted[case] = kind, damaged
                turn = [*KINDS].index(kind) + 1
                break
    return planted


def plant_errors(
    dataset: Path, out: Path, share: float = 0.1, seed: int = 0, only: Sequence[str] = ()
) -> dict[str, str]:
    """Write the damaged copy of a dataset, and its planted.json.

    Parameters
    ----------
    dataset : Path
        A raw dataset with label maps in NIfTI, or another format that can be written.
    out : Path
        The folder to make.
    share : float
        Share of the cases that get an error.
    seed : int
        Chooses cases and errors.
    only : sequence of str
        Damage a share of these cases; empty for all.
    """
    found = read_dataset(dataset)
    files = {case.id: case.label for case in found.cases if case.label is not None and (not only or case.id in only)}
    planted = damaged_maps(files, found.labels, share, seed)
    shutil.copytree(found.root, out, copy_function=link_or_copy)
    for case, (_, damaged) in planted.items():
        _, geometry, _ = read_label(files[case])
        write_label(out / files[case].relative_to(found.root), damaged, geometry, like=files[case])
    kinds = {name: planted[name][0] for name in sorted(planted)}
    write_json(out / "planted.json", kinds)
    return kinds


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path, help="folder to make; it must not exist")
    parser.add_argument("--share", type=float, default=0.1, help="of the cases (default 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    for case, kind in plant_errors(o.dataset, o.out, o.share, o.seed).items():
        print(f"{case}: {kind}")


if __name__ == "__main__":
    main()
