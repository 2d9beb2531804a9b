"""What the second stage of a cascade is shown of the first: one-hot channels, damaged as nnU-Net damages them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt, label

from nnunet_lite.errors import UserError
from nnunet_lite.files import write_json
from nnunet_lite.inference.first_stage import find_holders, first_stage_folder
from nnunet_lite.models.folder import FORMAT
from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.cascade import LARGEST_RADIUS, OPERATIONS, CascadeDraw, append_previous, dilate, draw_cascade
from nnunet_lite.training.splits import Split
from nnunet_lite.workspace import Paths

DILATE, ERODE, CLOSE, OPEN = range(len(OPERATIONS))


def drawn(operations: list[int], radius: int, removed: list[float] | None = None) -> CascadeDraw:
    """One sample: an operation for each class in order, -1 for none."""
    n = len(operations)
    gone = [np.nan] * n if removed is None else removed
    return CascadeDraw(np.arange(1, n + 1)[None], np.array([operations]), np.full((1, n), radius), np.array([gone]))


def changed(classes: np.ndarray, draw: CascadeDraw) -> np.ndarray:
    """The label map that the one-hot channels of a drawn change say."""
    images = torch.zeros((1, 1, *classes.shape))
    channels = append_previous(images, torch.from_numpy(classes)[None], draw)[0, 1:].numpy()
    assert channels.sum(0).max(initial=0) <= 1, "a voxel has one label at most"
    return np.concatenate([np.full((1, *classes.shape), 0.5), channels]).argmax(0).astype(classes.dtype)


def ball_dilation(mask: np.ndarray, radius: int) -> np.ndarray:
    return distance_transform_edt(~mask) <= radius if mask.any() else mask


@pytest.fixture(scope="module")
def blobs(tiny_cases: list[Any]) -> np.ndarray:
    """A real label map of two structures that touch."""
    return tiny_cases[0].label[:]


@pytest.mark.parametrize("radius", [1, 3, LARGEST_RADIUS])
@pytest.mark.parametrize("cut", [(), (5,)])
def test_growing_is_dilation_by_a_ball(blobs: np.ndarray, radius: int, cut: tuple[int, ...]) -> None:
    mask = blobs[10:30, 15:40, 5:25] == 1  # touches the rim
    mask = mask[5:6] if cut else mask  # two-dimensional patches are one voxel thick
    assert mask.any() and not mask.all()
    np.testing.assert_array_equal(dilate(torch.from_numpy(mask), radius).numpy(), ball_dilation(mask, radius))


def test_operations_are_those_of_mathematical_morphology(blobs: np.ndarray) -> None:
    radius, first = 2, blobs == 1
    wide = np.pad(first, 8, mode="constant")  # its surroundings are far from the rim
    outcome = {
        DILATE: ball_dilation(wide, radius),
        ERODE: ~ball_dilation(~wide, radius),
        CLOSE: ~ball_dilation(~ball_dilation(wide, radius), radius),
        OPEN: ball_dilation(~ball_dilation(~wide, radius), radius),
    }
    for operation, expected in outcome.items():
        found = changed(np.pad(blobs, 8), drawn([operation, -1], radius))
        np.testing.assert_array_equal(found == 1, expected)
        gained = expected & ~wide
        np.testing.assert_array_equal(found == 2, (np.pad(blobs, 8) == 2) & ~gained)  # what it gains, the other loses


def test_erosion_does_not_start_at_the_rim_of_the_patch() -> None:
    classes = np.zeros((12, 12, 12), np.uint8)
    classes[:6] = 1
    found = changed(classes, drawn([ERODE], 2))
    assert (found[:4] == 1).all() and not found[4:].any()


def test_later_labels_overwrite_earlier_ones() -> None:
    classes = np.zeros((1, 1, 20), np.uint8)
    classes[..., 5:10], classes[..., 10:15] = 1, 2
    found = changed(classes, drawn([DILATE, DILATE], 2))[0, 0]
    # 1 grows to 3..11, then what is left of 2 (12..14) to 10..16
    np.testing.assert_array_equal(found, [0] * 3 + [1] * 7 + [2] * 7 + [0] * 3)


def test_one_small_component_of_a_label_is_removed(blobs: np.ndarray) -> None:
    classes = np.zeros((20, 20, 20), np.uint8)
    classes[:8, :13, :13] = 1  # 1352 voxels: more than 15 % of the patch
    classes[10, 10, 10] = classes[11, 11, 11] = 1  # they touch at a corner
    classes[15:17, 15:17, 15:17] = 1
    classes[18, 2, 2] = 2
    sizes = set()
    for share in (0.0, 0.49, 0.5, 0.999):
        found = changed(classes, drawn([-1, -1], 1, [share, np.nan]))
        assert found[18, 2, 2] == 2 and (found[:8, :13, :13] == 1).all()
        sizes.add(int((found != classes).sum()))
    assert sizes == {2, 8}
    assert changed(classes, drawn([-1, -1], 1, [np.nan, 0.5]))[18, 2, 2] == 0
    assert label(blobs == 2)[1] == 1 and not (changed(blobs, drawn([-1, -1], 1, [np.nan, 0.5])) == 2).any()


def test_a_drawn_change_is_as_frequent_as_in_nnunet() -> None:
    """A sample's labels are each changed with probability 0.4 * 0.5 and thinned out with 0.2 * 0.5."""
    settings, rng = AugmentationSettings(), np.random.default_rng(1)
    draw = draw_cascade(rng, settings, 20_000, 4)
    assert draw.n_classes == 4
    assert (draw.operation >= 0).mean() == pytest.approx(0.2, abs=0.01)
    assert (draw.operation >= 0).any(1).mean() == pytest.approx(0.4 * (1 - 0.5**3), abs=0.02)
    assert (~np.isnan(draw.removed)).mean() == pytest.approx(0.1, abs=0.01)
    assert sorted(np.unique(draw.operation)) == [-1, *range(len(OPERATIONS))]
    assert (draw.radius.min(), draw.radius.max()) == (1, LARGEST_RADIUS)
    assert (np.sort(draw.order, 1) == [1, 2, 3]).all() and len(np.unique(draw.order, axis=0)) == 6
    again = draw_cascade(np.random.default_rng(1), settings, 20_000, 4)
    np.testing.assert_array_equal(again.operation, draw.operation)
    np.testing.assert_array_equal(again.removed, draw.removed)


def test_without_settings_the_map_is_appended_as_it_is(tiny_cases: list[Any]) -> None:
    box = (slice(5, 29), slice(5, 37), slice(5, 29))
    previous = torch.from_numpy(np.stack([case.label[box] for case in tiny_cases[:3]]))
    images = torch.randn(3, 2, *previous.shape[1:])
    inputs = append_previous(images, previous, draw_cascade(np.random.default_rng(0), None, 3, 3))
    assert inputs.shape == (3, 4, *previous.shape[1:]) and inputs.dtype == images.dtype
    torch.testing.assert_close(inputs[:, :2], images)
    for number in (1, 2):
        np.testing.assert_array_equal(inputs[:, 1 + number].numpy(), previous.numpy() == number)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_changes_the_map_as_the_cpu_does(tiny_cases: list[Any]) -> None:
    previous = torch.from_numpy(np.stack([case.label[:30, :40, :30] for case in tiny_cases[:4]]))
    images = torch.randn(4, 1, *previous.shape[1:])
    draw = draw_cascade(
        np.random.default_rng(3), AugmentationSettings(p_cascade_morphology=1, p_cascade_removal=1), 4, 3
    )
    expected = append_previous(images, previous, draw)
    found = append_previous(images.cuda(), previous.cuda(), draw)
    assert not torch.equal(
        expected, append_previous(images, previous, draw_cascade(np.random.default_rng(3), None, 4, 3))
    )
    torch.testing.assert_close(found.cpu(), expected)


def test_every_case_is_predicted_by_a_fold_that_held_it_out() -> None:
    splits = [Split("0", ("b", "c"), ("a",)), Split("1", ("a", "c"), ("b",)), Split("2", ("a", "b"), ("c",))]
    assert find_holders(splits[1], splits) == {"a": "0", "c": "2", "b": "1"}
    assert find_holders(Split("all", ("a", "b"), ("a", "b")), []) == {"a": "all", "b": "all"}
    with pytest.raises(UserError, match=r"no fold holds out case c\."):
        find_holders(splits[0], splits[:2])


def test_the_model_folder_of_the_first_stage(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    second = paths.models / "mine"

    def found(name: str | None) -> str:
        return first_stage_folder(paths, second, "3d_lowres", "cpu", name, ["0", "1"]).name

    assert (found(None), found("mine")) == ("3d_lowres-cpu", "3d_lowres-mine")
    for fold in ("fold_0", "fold_1"):
        assert found("mine") == "3d_lowres-mine"
        (paths.models / "3d_lowres-cpu" / fold).mkdir(parents=True)
        (paths.models / "3d_lowres-cpu" / fold / "model.safetensors").touch()
    assert found("mine") == "3d_lowres-cpu", "what is trained with the recipe is used"
    run = {"format": FORMAT, "configuration": "3d_cascade_fullres", "seed": 0, "settings": {}}
    write_json(second / "run.json", {**run, "previous": "3d_lowres-other"})
    assert found("mine") == found(None) == "3d_lowres-other", "what it was begun with is kept"
    write_json(paths.models / "3d_lowres-other" / "run.json", {**run, "configuration": "3d_lowest"})
    assert found("mine") == "3d_lowres-cpu", "its previous_stage was edited since"
