"""Segmentations of 3D Slicer are read back by SimpleITK and pynrrd, with their names, colours and geometry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from test_dicom import GRID

from nnunet_lite.data.geometry import PICTURE_SPACING, Geometry
from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels, label_colours
from nnunet_lite.data.slicer import segment_names, write_seg_nrrd
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.scores import score_files

LABELS = Labels(names={"background": 0, "Anterior": 1, "Tumör 肝": 7, "never found": 300, "one voxel": 12})
REGIONS = Labels(names={"background": 0, "whole": (1, 2), "core": 2}, region_order=(1, 2))


def written(path: Path, values: list[int], labels: Labels, grid: Geometry = GRID) -> tuple[np.ndarray, Any]:
    """A label map that was written, and the file as SimpleITK reads it."""
    label_map = np.random.default_rng(0).choice(values, grid.shape).astype(np.int16)
    label_map[0, 3, 4] = values[-1]
    write_seg_nrrd(path, label_map, grid, labels)
    return label_map, sitk.ReadImage(str(path))


def segments(image: Any) -> list[dict[str, str]]:
    """The fields of each segment."""
    found: dict[int, dict[str, str]] = {}
    for key in image.GetMetaDataKeys():
        number, _, field = key.partition("_")
        if number.removeprefix("Segment").isdigit():
            found.setdefault(int(number.removeprefix("Segment")), {})[field] = image.GetMetaData(key)
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in sorted(found)]


def test_a_label_map_comes_back_with_names_and_colours(tmp_path: Path) -> None:
    label_map, image = written(tmp_path / "a.seg.nrrd", [0, 1, 7], LABELS)
    label_map[4, 4, 4] = 12
    write_seg_nrrd(tmp_path / "a.seg.nrrd", label_map, GRID, LABELS)
    image = sitk.ReadImage(str(tmp_path / "a.seg.nrrd"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), label_map)
    np.testing.assert_allclose(image.GetSpacing(), GRID.spacing[::-1], rtol=1e-9)
    np.testing.assert_allclose(image.GetOrigin(), GRID.origin)
    np.testing.assert_allclose(image.GetDirection(), GRID.direction, atol=1e-9)
    found = segments(image)
    assert [(one["Name"], int(one["LabelValue"])) for one in found] == [
        ("Anterior", 1), ("Tumör 肝", 7), ("one voxel", 12), ("never found", 300)
    ]  # fmt: skip
    assert {one["Layer"] for one in found} == {"0"} and {one["Extent"] for one in found} == {"0 34 0 49 0 7"}
    colours = [[round(255 * float(part)) for part in one["Color"].split()] for one in found]
    assert colours == [list(colour) for colour in label_colours(4)]
    assert len({one["ID"] for one in found}) == 4
    array, geometry, _ = read_label(tmp_path / "a.seg.nrrd")
    assert np.array_equal(array, label_map) and not geometry.differences(GRID), "by our reader"


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (REGIONS, [0, 1, 2]),
        (Labels(names={"background": 255, "zero": 0, "one": 1}), [255, 0, 1]),
        (Labels(names={"background": 0, "below": -3, "one": 1}), [0, -3, 1]),
    ],
)
def test_what_shares_voxels_or_is_no_label_of_slicer_has_a_layer(
    tmp_path: Path, labels: Labels, values: list[int]
) -> None:
    label_map, image = written(tmp_path / "a.seg.nrrd", values, labels)
    layers = sitk.GetArrayFromImage(image)
    np.testing.assert_allclose(image.GetDirection(), GRID.direction, atol=1e-9)
    found = segments(image)
    assert [one["Name"] for one in found] == list(labels.segments)
    for one, covered in zip(found, labels.segments.values(), strict=True):
        np.testing.assert_array_equal(
            layers[..., int(one["Layer"])] == int(one["LabelValue"]), np.isin(label_map, covered)
        )


def test_a_picture_is_one_slice(tmp_path: Path) -> None:
    grid = Geometry((1, 20, 30), PICTURE_SPACING, dimensions=2, calibrated=False)
    label_map, image = written(tmp_path / "a.seg.nrrd", [0, 1, 7], LABELS, grid)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), label_map)
    assert image.GetSpacing() == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("labels", [LABELS, REGIONS])
def test_pynrrd_reads_it(tmp_path: Path, labels: Labels) -> None:
    nrrd = pytest.importorskip("nrrd")
    grid = replace(GRID, shape=(4, 9, 7))
    label_map, _ = written(tmp_path / "a.seg.nrrd", [0, 1, 2], labels, grid)
    array, header = nrrd.read(str(tmp_path / "a.seg.nrrd"))
    matrix = np.reshape(grid.direction, (3, 3)) * grid.spacing[::-1]
    assert header["space"] == "left-posterior-superior"
    np.testing.assert_allclose(header["space directions"][-3:], matrix.T, atol=1e-9)
    np.testing.assert_allclose(header["space origin"], grid.origin)
    if labels is REGIONS:
        np.testing.assert_array_equal(array, np.stack([label_map.T > 0, label_map.T == 2]))
    else:
        np.testing.assert_array_equal(array, label_map.T)
    assert header["Segment0_Name"] == next(iter(labels.segments))


def test_references_whose_numbers_mean_other_labels_are_not_scored(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = (Labels(names={"background": 0, **names}) for names in ({"L": 1, "R": 2}, {"R": 1, "l": 2}))
    label_map, _ = written(tmp_path / "a" / "scan.seg.nrrd", [0, 1, 2], ours)
    write_seg_nrrd(tmp_path / "b" / "scan.seg.nrrd", label_map, GRID, ours)
    assert score_files(tmp_path / "a", tmp_path / "b", ours).foreground().mean == 1
    write_seg_nrrd(tmp_path / "b" / "scan.seg.nrrd", label_map, GRID, theirs)
    with pytest.raises(UserError, match=r"b/scan.seg.nrrd: the number 1 is R, which is 2 in the labels. Export it"):
        score_files(tmp_path / "a", tmp_path / "b", ours)


def test_segments_without_voxels_or_a_name_mean_nothing(tmp_path: Path) -> None:
    """3D Slicer writes an empty extent, and any number, for a segment that was not drawn."""
    file = tmp_path / "a.seg.nrrd"
    written(file, [1, 2, 3], Labels(names={"background": 0, "L": 1, "Segment_2": 2, "R": 3}))
    image = sitk.ReadImage(str(file))
    image.SetMetaData("Segment2_Extent", "0 -1 0 -1 0 -1")
    sitk.WriteImage(image, str(file))
    assert segment_names(file) == {1: "L"}


def test_layers_are_no_label_map(tmp_path: Path) -> None:
    written(tmp_path / "a.seg.nrrd", [0, 1, 2], REGIONS)
    with pytest.raises(UserError, match="is a segmentation of 3D Slicer in layers: it has a fourth dimension"):
        read_label(tmp_path / "a.seg.nrrd")
