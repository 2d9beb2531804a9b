"""scripts/make_phantoms.py: the same voxels each time, labels of very different size, twins of equal intensity."""

from __future__ import annotations

import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from nnunet_lite.data.dataset import read_case, read_dataset

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "make_phantoms.py"))
SMALL = {"size": (32, 40, 40), "spacing": (6.0, 9.0)}


@cache
def anatomy() -> Any:
    return SCRIPT["read_anatomy"](SCRIPT["LABEL_MAP"])


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "Dataset040_Phantoms"
    SCRIPT["make_dataset"](root, anatomy(), cases=6, **SMALL)
    return root


def arrays(root: Path) -> list[tuple[np.ndarray, np.ndarray, tuple[float, ...]]]:
    """Image, label map and spacing (z, y, x) of each case."""
    dataset = read_dataset(root)
    cases = [read_case(case, dataset) for case in dataset.cases]
    return [(image.array[0], label, image.geometry.spacing) for image, label in cases if label is not None]


@pytest.mark.slow
def test_the_same_options_make_the_same_voxels(phantoms: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        SCRIPT["make_dataset"](tmp_path / str(seed), anatomy(), cases=1, seed=seed, **SMALL)
    (first, again, other) = (arrays(root)[0] for root in (phantoms, tmp_path / "0", tmp_path / "1"))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1]) and first[2] == again[2]
    assert first[2] != other[2]


def test_grids_have_the_least_size_and_varied_spacing(phantoms: Path) -> None:
    shapes, spacings = zip(*((image.shape, spacing) for image, _, spacing in arrays(phantoms)), strict=True)
    assert (np.min(shapes, 0) >= [32, 40, 40]).all()
    assert np.min(spacings) >= 6 and np.max(spacings) <= 9 and len(set(spacings)) == 6
    thickness = [z / x for z, _, x in spacings]
    assert min(thickness) < 1.15 and max(thickness) > 1.15  # some are anisotropic


def test_labels_differ_in_size_and_nodules_have_a_few_voxels(phantoms: Path) -> None:
    names = json.loads((phantoms / "dataset.json").read_text())["labels"]
    labels = [label for _, label, _ in arrays(phantoms)]
    voxels = np.sum([np.bincount(label.ravel(), minlength=len(names)) for label in labels], 0)
    assert 6 <= len(names) - 1 <= 8 and voxels.min() > 0
    assert voxels[names["liver"]] > 50 * voxels[names["adrenal_glands"]]
    nodules = [n for label in labels for n in np.bincount(ndimage.label(label == names["nodule"])[0].ravel())[1:]]
    assert len(nodules) > 12 and np.median(nodules) < 40 and min(nodules) < 10


def test_the_kidneys_differ_in_position_only(phantoms: Path) -> None:
    names = json.loads((phantoms / "dataset.json").read_text())["labels"]
    ratios, sizes, sides = [], [], []
    for image, label, _ in arrays(phantoms):
        right, left = (label == names["kidney_right"], label == names["kidney_left"])
        inside = [image[ndimage.binary_erosion(kidney)] for kidney in (right, left)]
        if min(map(len, inside)) < 5:
            continue  # cut off by the field of view
        ratios.append(np.median(inside[0]) / np.median(inside[1]))
        sizes.append(right.sum() / left.sum())
        sides.append(np.argwhere(right).mean(0)[2] - np.argwhere(left).mean(0)[2])
    assert len(ratios) >= 3 and 0.85 < np.median(ratios) < 1.15 and 0.6 < np.median(sizes) < 1.6
    assert len(set(np.sign(sides))) == 1


def test_an_intensity_belongs_to_no_label(phantoms: Path) -> None:
    names = json.loads((phantoms / "dataset.json").read_text())["labels"]
    medians = []
    for image, label, _ in arrays(phantoms):
        body = np.median(image[image > np.percentile(image, 60)])
        medians.append([np.median(image[label == names[name]]) / body for name in ("liver", "urinary_bladder")])
    assert min(np.ptp(medians, 0)) > 0.1


def test_the_dataset_names_its_source(phantoms: Path) -> None:
    about = json.loads((phantoms / "dataset.json").read_text())
    assert about["licence"] == "Apache-2.0" and "TotalSegmentator" in about["description"]
