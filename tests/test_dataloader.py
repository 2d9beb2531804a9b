"""Batches depend on seed, epoch and iteration only; patches are where nnU-Net puts them; prefetching keeps order."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.inference.windows import spans
from nnunet_lite.preprocessing.stored_case import CaseArrays, is_whole, read_stored_case, sample_voxels
from nnunet_lite.training import cache as cache_module
from nnunet_lite.training.cache import load_case, load_cases, move_case
from nnunet_lite.training.dataloader import (
    Location,
    Shape,
    build_batch,
    check_augmentation,
    draw_batch,
    draw_corner,
    draw_locations,
    make_batch,
    oversample_foreground,
    prefetch,
    read_box,
    read_patches,
    rng_for,
    source_shape,
    training_batches,
)
from nnunet_lite.training.job import Job
from nnunet_lite.training.launch import Ranks
from nnunet_lite.training.preview import draw_preview

LABELS = Labels(names={"background": 0, "a": 1, "b": 2})
CPU = torch.device("cpu")
INTENSITY = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted")
CHANCES = (*INTENSITY, "rotation", "scaling")
OFF = {f"augmentation.p_{name}": 0 for name in CHANCES}
ALL = dict.fromkeys(OFF, 1)
MakeJob = Callable[..., Job]
Makers = Iterator[Callable[[], tuple[int]]]


def make_case(shape: Shape, labels: Labels = LABELS, case_id: str = "case", previous: bool = False) -> CaseArrays:
    """Noise, with one voxel of class 2 in a corner and a block of class 1."""
    rng = np.random.default_rng(sum(shape))
    label = np.zeros(shape, np.uint8)
    label[shape[0] // 2 :, :2, :3] = 1
    label[0, -1, -1] = 2
    voxels = dict(sample_voxels(label, labels))
    before = rng.integers(0, 3, shape).astype(np.uint8) if previous else None
    return CaseArrays(case_id, rng.normal(size=(2, *shape)).astype(np.float16), label, voxels, None, before)


def box(array: Any, corner: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """As float32, from memory that was not empty before."""
    out = torch.full((*array.shape[: array.ndim - 3], *shape), 99.0)
    read_box(array, corner, out if isinstance(array, torch.Tensor) else out.numpy())
    return out.numpy()


@pytest.mark.parametrize(("n", "forced"), [(2, 1), (3, 1), (4, 1), (5, 2), (7, 2), (9, 3), (12, 4)])
def test_a_third_of_a_batch_is_forced_as_nnunet_rounds(n: int, forced: int) -> None:
    chosen = oversample_foreground(n, 0.33, rng_for(0))
    assert chosen == [False] * (n - forced) + [True] * forced


@pytest.mark.parametrize(("n", "share"), [(1, 0.33), (2, 0.1), (1, 0.0)])
def test_a_share_that_rounds_to_none_is_kept_over_many_batches(n: int, share: float) -> None:
    rng = rng_for(0)
    drawn = np.array([oversample_foreground(n, share, rng) for _ in range(2000)])
    assert drawn.mean() == pytest.approx(share, abs=0.03)
    assert not drawn[:, :-1].any()


@pytest.mark.parametrize(("n", "share"), [(2, 0.67), (2, 0.9), (7, 0.4), (4, 0.5), (3, 1.0)])
def test_a_share_above_that_of_nnunet_is_kept_over_many_batches(n: int, share: float) -> None:
    """Of two patches, 0.67 is more than 0.33, which nnU-Net rounds to one of them."""
    rng = rng_for(0)
    drawn = np.array([oversample_foreground(n, share, rng) for _ in range(2000)])
    assert drawn.mean() == pytest.approx(share, abs=0.03)
    assert (np.diff(drawn.astype(int), axis=1) >= 0).all(), "the last ones"


def test_forced_patches_show_their_class_of_all_classes_alike() -> None:
    case, patch, rng = make_case((20, 24, 28)), (8, 10, 12), rng_for(1, 0, 0)
    seen = [set(np.unique(box(case.label, draw_corner(case, patch, True, rng), patch))) - {0} for _ in range(200)]
    assert all(seen)
    share = np.mean([2 in classes for classes in seen])  # classes have equal chances, however few voxels one has
    assert 0.35 < share < 0.65


def test_unforced_patches_reach_every_place_inside() -> None:
    case, rng = make_case((5, 6, 7)), rng_for(1, 0, 0)
    corners = {draw_corner(case, (4, 4, 4), False, rng) for _ in range(500)}
    assert corners == {(z, y, x) for z in range(2) for y in range(3) for x in range(4)}


# lower corners of nnU-Net 2.8.1's nnUNetDataLoader.get_bbox, for patches that are not enlarged for rotation
@pytest.mark.parametrize(
    ("voxel", "shape", "corner"),
    [
        ((0, 0, 0), (5, 6, 20), (-4, -3, 0)),
        ((4, 5, 19), (5, 6, 20), (-2, -1, 13)),
        ((2, 3, 10), (5, 6, 20), (-4, -3, 4)),
        ((0, 0, 0), (20, 20, 20), (0, 0, 0)),
        ((19, 19, 19), (20, 20, 20), (13, 13, 13)),
    ],
)
def test_foreground_patches_lie_where_nnunet_puts_them(voxel: Shape, shape: Shape, corner: Shape) -> None:
    label = np.zeros(shape, np.uint8)
    label[voxel] = 1
    case = CaseArrays("case", label[None].astype(np.float16), label, {1: np.array([voxel])}, None)
    assert draw_corner(case, (12, 12, 12), True, rng_for(0, 0, 0)) == corner


@pytest.mark.parametrize("shape", [(5, 30, 30), (6, 9, 31), (4, 4, 4), (7, 16, 3)])
def test_an_image_smaller_than_the_patch_lies_as_in_the_sliding_window(shape: Shape) -> None:
    case, patch = make_case(shape), (12, 16, 16)
    before = [-spans(size, p, 1.0)[0].start for size, p in zip(shape, patch, strict=True)]
    corners = np.array([draw_corner(case, patch, False, rng_for(0, 0, i)) for i in range(30)])
    for found, size, p, start in zip(corners.T, shape, patch, before, strict=True):
        if size <= p:  # of two middles both are taken, as nnU-Net does
            assert set(-found) == {start, start + (p - size) % 2}


def test_patches_of_partly_annotated_cases_are_centred_on_annotated_voxels() -> None:
    labels = Labels(names={"background": 0, "a": 1}, ignore=9)
    label = np.full((20, 20, 20), labels.ignore_class, np.uint8)
    label[3:6, 10, 10] = 0
    voxels = dict(sample_voxels(label, labels))
    case = CaseArrays("case", np.zeros((1, 20, 20, 20), np.float16), label, {}, voxels[-1])
    for i in range(30):
        corner = draw_corner(case, (4, 4, 4), i % 2 == 0, rng_for(0, 0, i))
        assert (box(label, corner, (4, 4, 4)) == 0).any()


def test_reading_outside_the_image_equals_padding_with_zeros() -> None:
    array = np.random.default_rng(0).normal(size=(2, 5, 6, 7)).astype(np.float32)
    padded = np.pad(array, ((0, 0), (12, 12), (12, 12), (12, 12)))
    for corner in [(-3, -2, -1), (0, 0, 0), (2, 3, 4), (4, -4, 6), (-2, 5, -6), (-1, -1, -1), (9, 2, 2), (2, -9, 12)]:
        for shape in [(4, 4, 4), (9, 9, 9), (1, 2, 3)]:
            z, y, x = (c + 12 for c in corner)
            expected = padded[:, z : z + shape[0], y : y + shape[1], x : x + shape[2]]
            expected = np.pad(expected, [(0, w - n) for w, n in zip((2, *shape), expected.shape, strict=True)])
            np.testing.assert_array_equal(box(array, corner, shape), expected)
            np.testing.assert_array_equal(box(array[0], corner, shape), expected[0])


def test_the_box_of_a_turned_patch_holds_it_and_shares_its_centre() -> None:
    patch = (8, 9, 10)
    assert source_shape(np.eye(3), patch) == patch
    assert source_shape(0.5 * np.eye(3), patch) == (6, 5, 6)
    quarter = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    wide = source_shape(quarter, patch)
    assert wide == (8, 11, 10)
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix = rng.normal(size=(3, 3))
        wide = source_shape(matrix, patch)
        corners = np.stack(np.meshgrid(*[[-(p - 1) / 2, (p - 1) / 2] for p in patch]), -1).reshape(-1, 3) @ matrix.T
        assert (np.abs(corners).max(0) <= (np.array(wide) - 1) / 2 + 1e-6).all()
        assert all((w - p) % 2 == 0 for w, p in zip(wide, patch, strict=True))


@pytest.mark.parametrize("resident", [False, True])
def test_boxes_of_several_sizes_lie_in_the_middle_of_one(resident: bool) -> None:
    case, corner, patch = make_case((30, 30, 30), previous=True), (5, 9, 3), (8, 9, 10)
    places = [Location(0, corner, None), Location(0, corner, 1.3 * np.eye(3)), Location(0, (25, 9, 3), 0.6 * np.eye(3))]
    cases = [move_case(case, CPU)] if resident else [case]
    images, classes = read_patches(cases, places, patch, CPU)
    wide = source_shape(1.3 * np.eye(3), patch)
    assert images.shape == (3, 2, *wide)
    assert (images.dtype, classes.dtype) == (torch.float16, torch.uint8)
    for i, place in enumerate(places):
        size = patch if place.matrix is None else source_shape(place.matrix, patch)
        margin = [(w - s) // 2 for w, s in zip(wide, size, strict=True)]
        inner = (slice(None), *(slice(m, m + s) for m, s in zip(margin, size, strict=True)))
        at = [c - (s - p) // 2 for c, s, p in zip(place.corner, size, patch, strict=True)]
        np.testing.assert_array_equal(images[i][inner], box(case.image, at, size))
        np.testing.assert_array_equal(classes[i][inner][0], box(case.label, at, size))
        np.testing.assert_array_equal(classes[i][inner][1], box(case.previous, at, size))
        outside = torch.ones(images.shape[1:], dtype=torch.bool)
        outside[inner] = False
        assert not images[i][outside].any(), "nothing is read that is not needed"


def test_a_case_stored_more_precisely_keeps_its_precision() -> None:
    narrow = make_case((9, 9, 9))
    wide = CaseArrays("wide", np.full((2, 9, 9, 9), 1e6, np.float32), narrow.label, {}, None)
    places = [Location(0, (0, 0, 0), None), Location(1, (0, 0, 0), None)]
    images, _ = read_patches([narrow, wide], places, (9, 9, 9), CPU)
    np.testing.assert_array_equal(images[0], narrow.image)
    assert (images[1] == 1e6).all()


def test_cases_are_drawn_with_replacement_and_all_of_them() -> None:
    cases = [make_case((8, 8, 8), case_id=str(i)) for i in range(5)]
    drawn = [[p.case for p in draw_locations(cases, (4, 4, 4), 4, 0, None, rng_for(0, 0, i))] for i in range(60)]
    assert {number for batch in drawn for number in batch} == set(range(5))
    assert any(len(set(batch)) < len(batch) for batch in drawn)


def same(one: Any, other: Any) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_batch_has_the_shape_of_the_plan_and_depends_on_its_numbers_alone(job: MakeJob, configuration: str) -> None:
    run = job(configuration, **ALL)
    patch = run.planned.patch_size
    images, classes, ids = batch = make_batch(run, run.training, 3, 4, augment=True)
    assert (images.shape, images.dtype) == ((5, 1, *patch), torch.float32)
    assert (classes.shape, classes.dtype) == ((5, *patch), torch.uint8)
    assert set(ids) <= {case.case_id for case in run.training}
    assert same(batch, make_batch(run, run.training, 3, 4, augment=True))
    for stream, iteration in [(3, 5), (4, 4)]:
        assert not same(batch, make_batch(run, run.training, stream, iteration, augment=True))
    assert not same(batch, make_batch(replace(run, seed=6), run.training, 3, 4, augment=True))


@pytest.mark.parametrize("pipeline", ["native", "batchgenerators"])
def test_ranks_make_the_samples_that_one_process_would(job: MakeJob, pipeline: str) -> None:
    run = job(**{**ALL, "augmentation.pipeline": pipeline, "augmentation.extra": [{"name": "RicianNoiseTransform"}]})
    images, classes, ids = make_batch(run, run.training, 0, 0, augment=True)
    parts = [make_batch(replace(run, ranks=Ranks(r, 2, r)), run.training, 0, 0, augment=True) for r in (0, 1)]
    assert [len(part[0]) for part in parts] == [3, 2]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), images, atol=2e-4, rtol=1e-4)
    assert torch.equal(torch.cat([part[1] for part in parts]), classes)
    assert parts[0][2] + parts[1][2] == ids


def test_it_does_not_matter_where_the_cases_lie(job: MakeJob, tiny_cases: list[Any]) -> None:
    in_ram = [load_case(case) for case in tiny_cases]
    batches = [
        make_batch(run, run.training, 1, 1, augment=True)
        for run in (job(**ALL), job(cases=in_ram, **ALL), job(cases=[move_case(case, CPU) for case in in_ram], **ALL))
    ]
    assert same(batches[0], batches[1])
    assert same(batches[0], batches[2])


def test_without_augmentation_a_batch_is_what_is_stored(job: MakeJob) -> None:
    run = job(**{"training.foreground": 0})
    draw = draw_batch(run, run.training, 0, 0, augment=False)
    images, classes, _ = build_batch(run, run.training, draw)
    for place, image, label in zip(draw.locations, images, classes, strict=True):
        box = tuple(slice(max(c, 0), c + p) for c, p in zip(place.corner, run.patch, strict=True))
        stored = run.training[place.case]
        np.testing.assert_array_equal(
            np.unique(image), np.union1d(np.unique(stored.image[(0, *box)]), np.unique(image[image == 0]))
        )
        assert int(label.sum()) == int(stored.label[box].sum())
    switched_off = job(**{"training.foreground": 0, "augmentation.enabled": False})
    assert same((images, classes, ()), (*make_batch(switched_off, run.training, 0, 0, augment=True)[:2], ()))


def test_left_and_right_are_swapped_in_mirrored_samples(job: MakeJob) -> None:
    """One label on each side of the middle: after mirroring with a swap, each is still on its own side."""
    label = np.zeros((24, 32, 24), np.uint8)
    label[:, :, 2:8], label[:, :, 16:22] = 1, 2
    case = CaseArrays("sides", np.zeros((1, *label.shape), np.float16), label, {}, None)
    swap = {"augmentation.mirror_swap": [["Anterior", "Posterior"]], "augmentation.p_mirror": 0.5}
    swapped, plain = job(cases=[case], **OFF, **swap), job(cases=[case], **OFF)
    batches = [make_batch(run, run.training, 0, i, augment=True)[1] for run in (swapped, plain) for i in range(4)]
    left, right = torch.cat(batches[:4])[..., :12], torch.cat(batches[:4])[..., 12:]
    assert set(left.unique().tolist()) == {0, 1} and set(right.unique().tolist()) == {0, 2}
    assert set(torch.cat(batches[4:])[..., :12].unique().tolist()) == {0, 1, 2}


def test_a_second_stage_sees_the_first_ones_labels_moved_with_its_own(job: MakeJob, tiny_cases: list[Any]) -> None:
    """With the label itself as prediction and no damage, the further channels are the label in one-hot form."""
    loaded = [load_case(case) for case in tiny_cases[:4]]
    cases = [CaseArrays(c.case_id, c.image, c.label, c.foreground, c.annotated, c.label) for c in loaded]
    calm = {**ALL, "augmentation.p_cascade_morphology": 0, "augmentation.p_cascade_removal": 0}
    run = job(cases=cases, **calm)
    second = run.planned.model_copy(update={"previous_stage": "3d_lowres"})
    made = run.plan.model_copy(update={"configurations": {"3d_fullres": second}})
    for augment in (True, False):
        images, classes, _ = make_batch(replace(run, plan=made), cases, 0, 0, augment)
        assert images.shape[1] == 3
        torch.testing.assert_close(images[:, 1:], torch.stack([(classes == c).float() for c in (1, 2)], 1))


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_what_a_teacher_predicts_moves_with_the_image(job: MakeJob, tiny_cases: list[Any], configuration: str) -> None:
    """With one array as image and as probability, both stay equal unless intensities change, which only images do."""
    loaded = [load_case(case) for case in tiny_cases[:4]]
    cases = [
        replace(case, image=(case.label > 0)[None].astype(np.float16),
                teacher=np.stack([255 * (case.label > 0), 51 * (case.label > 0)]).astype(np.uint8))
        for case in loaded
    ]  # fmt: skip
    moved = {"augmentation.p_rotation": 1, "augmentation.p_scaling": 1, "augmentation.p_mirror": 0.5}
    for place in (cases, [move_case(case, CPU) for case in cases]):
        run = job(configuration, cases=place, **OFF | moved)
        images, _, _ = make_batch(run, place, 0, 0, augment=True)
        assert images.shape[1] == 3 and 0 < float(images[:, 0].mean()) < 1
        torch.testing.assert_close(images[:, 1], images[:, 0], atol=2e-3, rtol=0)
        torch.testing.assert_close(images[:, 2], images[:, 0] / 5, atol=2e-3, rtol=0)
    changed = job(configuration, cases=cases, **ALL)
    steady = job(configuration, cases=cases, **ALL | dict.fromkeys((f"augmentation.p_{n}" for n in INTENSITY), 0))
    draw = draw_batch(changed, cases, 0, 0, augment=True)
    one, other = (
        build_batch(run, cases, d)[0] for run, d in ((changed, draw), (steady, replace(draw, intensity=None)))
    )
    assert torch.equal(one[:, 1:], other[:, 1:]) and not torch.equal(one[:, 0], other[:, 0])


@pytest.mark.parametrize("pipeline", ["native", "batchgenerators", "extra"])
def test_what_was_normalised_in_a_mask_stays_zero_outside(job: MakeJob, tiny_cases: list[Any], pipeline: str) -> None:
    """Of one masked and one unmasked channel; the mask is that of the case, whatever values the channels have."""
    case, marker = load_case(tiny_cases[0]), job().plan.labels.outside_class
    image, label = np.concatenate([case.image, case.image + 1]), case.label.copy()
    image[0, :, :10], label[:, :10] = 1e-3, marker  # resampling leaves such values outside
    image[0, :, 12:14] = 0  # as it may be inside
    plain = job().plan.channels[0]
    channels = (plain.model_copy(update={"use_mask": True}), plain)
    settings = {**OFF, "augmentation.p_noise": 1, "augmentation.p_mirror": 0, "augmentation.noise_std": [0.1, 0.1],
                "training.foreground": 0}  # fmt: skip
    if pipeline == "extra":
        settings["augmentation.extra"] = [{"name": "GaussianNoiseTransform", "noise_variance": [0.1, 0.1]}]
    else:
        settings["augmentation.pipeline"] = pipeline
    run = job(cases=[replace(case, image=image, label=label)], plan={"channels": channels}, **settings)
    draw = draw_batch(run, run.training, 0, 0, augment=True)
    if pipeline != "batchgenerators":  # the first sample reaches over the lower border
        draw = replace(draw, locations=[replace(draw.locations[0], corner=(0, -4, 0)), *draw.locations[1:]])
    images, classes, _ = build_batch(run, run.training, draw)
    assert int(classes.max()) < marker
    for place, found in zip(draw.locations, images, strict=True):
        edge, slack = 10 - place.corner[1], 6 if pipeline == "batchgenerators" else 0  # which deforms the patch
        assert not found[0, :, : max(0, edge - slack)].any()
        assert found[1, :, : max(0, edge - slack)].all()
        assert found[0, :, max(0, edge + slack) :].all()
    calm = build_batch(run, run.training, draw_batch(run, run.training, 0, 0, augment=False))
    assert int(calm[1].max()) < marker and float(calm[0][:, 0].min()) < 0


def test_batches_come_without_end_and_from_the_middle_of_an_epoch(job: MakeJob) -> None:
    run = job(**{"training.accumulate": 2, "training.iterations": 2})
    found = list(islice(prefetch(training_batches(run, 7, 2), CPU, 2), 4))
    for batch, (epoch, iteration) in zip(found, [(7, 2), (7, 3), (8, 0), (8, 1)], strict=True):
        assert same(batch, make_batch(run, run.training, epoch, iteration, augment=True))


def test_mistakes_are_reported_before_training(job: MakeJob) -> None:
    check_augmentation(job(**{"augmentation.extra": [{"name": "RicianNoiseTransform", "p_per_sample": 0.1}]}))
    with pytest.raises(UserError, match=r"no label 'anterior'\. Did you mean 'Anterior'"):
        check_augmentation(job(**{"augmentation.mirror_swap": [["anterior", "Posterior"]]}))
    with pytest.raises(UserError, match="Did you mean 'RicianNoiseTransform'"):
        check_augmentation(job(**{"augmentation.extra": [{"name": "RicianNoise"}]}))
    check_augmentation(job(**{"augmentation.mirror_axes": [1, 2]}))
    with pytest.raises(UserError, match=r"mirror_axes = \[1, 2\]: 2 is not an axis of a patch with 2\."):
        check_augmentation(job("2d", **{"augmentation.mirror_axes": [1, 2]}))


# ------------------------------------------------------------------------------------------------ cache and preview


@pytest.mark.parametrize(("cache", "kind"), [("ram", np.ndarray), ("auto", np.ndarray), ("device", torch.Tensor)])
def test_loaded_cases_hold_what_is_on_disk(
    tiny_cases: list[Any], cache: Any, kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    by_id = {case.case_id: case for case in tiny_cases[:3]}
    found = load_cases(list(by_id), by_id.__getitem__, cache, CPU)
    for case, stored in zip(found, tiny_cases, strict=False):
        assert case.case_id == stored.case_id
        assert isinstance(case.image, kind) and isinstance(case.label, kind)
        np.testing.assert_array_equal(np.asarray(case.image), stored.image[:])
        np.testing.assert_array_equal(np.asarray(case.label), stored.label[:])
        assert case.foreground.keys() == stored.foreground.keys()
        assert case.previous is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "3 cases, " in said
    load_cases(list(by_id)[:1], by_id.__getitem__, cache, CPU)
    assert "1 case, " in capsys.readouterr().err


@pytest.fixture
def stored(tiny_cases: list[Any], tiny_workspace: Path, tmp_path: Path) -> dict[str, Any]:
    """Three cases on disk in a folder of their own."""
    cases = next(tiny_workspace.glob("*/preprocessed/cases"))
    keys = [case.key for case in tiny_cases[:3]]
    found = [read_stored_case(Path(shutil.copytree(cases / key, tmp_path / key)), key) for key in keys]
    return {case.case_id: case for case in found}


def test_cases_too_large_for_the_memory_stay_on_disk(
    stored: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "free_memory", lambda: 1000)
    for cache in ("auto", "disk"):
        assert load_cases(list(stored), stored.__getitem__, cache, CPU) == list(stored.values())
    assert "read from disk: only 1 kB of RAM" in capsys.readouterr().err


@pytest.mark.parametrize(("needed", "place"), [(2, "device"), (4, "ram"), (9, "disk")])
def test_cases_go_where_half_of_the_free_memory_holds_them(
    needed: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 GB of a GPU, training needs 4; of RAM, 16 GB are free."""
    monkeypatch.setattr(cache_module, "free_device_memory", lambda _: 10e9)
    monkeypatch.setattr(cache_module, "free_memory", lambda: 16e9)
    assert cache_module.choose_cache(int(needed * 1e9), torch.device("cuda"), 4.0)[0] == place


@pytest.mark.parametrize("cache", ["disk", "ram"])
def test_several_processes_share_memory_maps_of_uncompressed_copies(
    stored: dict[str, Any],
    cache: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load() -> list[Any]:
        return load_cases(list(stored), stored.__getitem__, cache, CPU, processes=2)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "disk_usage", lambda _: SimpleNamespace(free=2**20))
        assert load() == list(stored.values()) and not list(tmp_path.glob("*/image.npy"))
        assert "uncompressed copies need" in capsys.readouterr().err
    found = load()
    for case, original in zip(found, stored.values(), strict=True):
        assert isinstance(case.image, np.memmap) and isinstance(case.label, np.memmap)
        np.testing.assert_array_equal(case.image, original.image[:])
        np.testing.assert_array_equal(case.label, original.label[:])
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/image.npy")}
    assert len(times) == 3 and all(is_whole(file.parent) for file in times)
    newer = next(iter(times)).with_suffix(".b2nd")
    os.utime(newer, ns=(time.time_ns(), time.time_ns()))
    load()
    changed = [file.with_suffix(".b2nd") for file, before in times.items() if file.stat().st_mtime_ns != before]
    assert changed == [newer], "a copy that is older than what it was made of is made again"


def test_a_loaded_case_keeps_no_file_open(tiny_cases: list[Any]) -> None:
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir()))
    loaded = [load_case(tiny_cases[0]) for _ in range(5)]
    assert len(loaded) == 5 and len(list(files.iterdir())) == before


def test_many_classes_and_previous_stages_go_to_the_device(tiny_cases: list[Any]) -> None:
    case = load_case(tiny_cases[0])
    wide = replace(case, label=case.label.astype(np.uint16) + 1000, previous=case.label)
    found = move_case(wide, CPU)
    assert isinstance(found.label, torch.Tensor) and isinstance(found.previous, torch.Tensor)
    assert (found.image.dtype, found.label.dtype, found.previous.dtype) == (torch.float16, torch.int32, torch.uint8)
    np.testing.assert_array_equal(found.label.numpy(), wide.label)


@pytest.mark.parametrize(("configuration", "pipeline"), [("3d_fullres", "native"), ("2d", "batchgenerators")])
def test_a_picture_is_drawn_and_the_same_again(job: MakeJob, configuration: str, pipeline: str) -> None:
    run = job(configuration, **{"augmentation.pipeline": pipeline})
    files = [run.folder / "one.png", run.folder / "other.png"]
    for file in files:
        draw_preview(run, file, samples=2, versions=2)
    picture = imread(files[0])
    assert picture.shape[0] > 400 and picture.shape[1] > 600
    np.testing.assert_array_equal(picture, imread(files[1]))
    assert picture[..., :3].std(axis=-1).max() > 0.2, "the outlines of the labels are in colour"
    assert sorted(run.folder.iterdir()) == sorted(files)


# ------------------------------------------------------------------------------------------------ prefetching


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def slow(i: int) -> tuple[int]:
    time.sleep(0.02 if i % 3 == 0 else 0.001)  # every third is overtaken by the next
    return (i,)


@pytest.mark.parametrize("workers", [None, 0, 1, 4])
def test_all_items_come_in_order_and_the_threads_end(workers: int | None) -> None:
    makers: Makers = (partial(slow, i) for i in range(20))
    assert list(prefetch(makers, CPU, workers)) == [(i,) for i in range(20)]
    assert threads() == []


def test_threads_make_several_items_at_once() -> None:
    both = threading.Barrier(2, timeout=10)  # passed only if two wait for it together

    def meet() -> tuple[int]:
        return (both.wait(),)

    found = list(prefetch((meet for _ in range(6)), CPU, 2))
    assert sorted(i for (i,) in found) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("workers", "most"), [(0, 1), (1, 3), (3, 5)])
def test_little_is_prepared_ahead_and_nothing_in_line(workers: int, most: int) -> None:
    made: list[int] = []

    def make(i: int) -> tuple[int]:
        made.append(i)
        return (i,)

    ahead = prefetch((partial(make, i) for i in range(1000)), CPU, workers)
    assert next(ahead) == (0,)
    assert bool(threads()) is (workers > 0)
    ahead.close()
    assert len(made) <= most
    assert threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_after_the_items_before_it(workers: int) -> None:
    def fail() -> tuple[int]:
        raise OSError("disk gone")

    ahead = prefetch(iter([partial(slow, 0), fail, partial(slow, 2)]), CPU, workers)
    assert next(ahead) == (0,)
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    assert threads() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_training_stream_sees_finished_batches() -> None:
    device = torch.device("cuda")

    def make(i: int) -> tuple[torch.Tensor]:
        x = torch.full((512, 512), float(i), pin_memory=True).to(device, non_blocking=True)
        for _ in range(20):
            x = x @ torch.eye(512, device=device)
        return (x,)

    sums = [x.sum() for (x,) in prefetch((partial(make, i) for i in range(30)), device, None)]
    assert [round(float(s) / 512**2) for s in sums] == list(range(30))
