"""A batch is decided by seed, epoch and iteration: not by who makes it, where the cases lie, or how many share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training.cache import LoadedCase, load_case, move_case
from nnunet_lite.training.dataloader import (
    build_batch,
    check_augmentation,
    draw_batch,
    make_batch,
    prefetch,
    training_batches,
)
from nnunet_lite.training.distributed import Ranks
from nnunet_lite.training.job import Job, configure_plan
from nnunet_lite.workspace import planned_paths

CPU = torch.device("cpu")
CHANCES = (
    "noise",
    "blur",
    "brightness",
    "contrast",
    "low_resolution",
    "gamma",
    "gamma_inverted",
    "rotation",
    "scaling",
)
OFF = {f"augmentation.p_{name}": 0 for name in CHANCES}
ALL = dict.fromkeys(OFF, 1)
MakeJob = Callable[..., Job]


@pytest.fixture
def job(tmp_path: Path, tiny_workspace: Path, tiny_cases: list[Any], tiny_settings: dict[str, Any]) -> MakeJob:
    """A fold: job(configuration, cases=..., plan=changes, **settings)."""

    def make(configuration: str = "3d_fullres", cases: Any = None, plan: Any = None, **changes: Any) -> Job:
        patch = {"training.patch_size": [32, 24]} if configuration == "2d" else {}
        settings = with_changes(Settings(), {**tiny_settings, **patch, "training.batch_size": 5, **changes})
        made = Plan.read(planned_paths(tiny_workspace).plans).model_copy(update=plan or {})
        chosen = tiny_cases if cases is None else cases
        return Job(
            configure_plan(made, configuration, settings), configuration, settings, 5, tmp_path, CPU, chosen, chosen
        )

    return make


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
    case = LoadedCase("sides", np.zeros((1, *label.shape), np.float16), label, {}, None)
    swap = {"augmentation.mirror_swap": [["Anterior", "Posterior"]], "augmentation.p_mirror": 0.5}
    swapped, plain = job(cases=[case], **OFF, **swap), job(cases=[case], **OFF)
    batches = [make_batch(run, run.training, 0, i, augment=True)[1] for run in (swapped, plain) for i in range(4)]
    left, right = torch.cat(batches[:4])[..., :12], torch.cat(batches[:4])[..., 12:]
    assert set(left.unique().tolist()) == {0, 1} and set(right.unique().tolist()) == {0, 2}
    assert set(torch.cat(batches[4:])[..., :12].unique().tolist()) == {0, 1, 2}


def test_a_second_stage_sees_the_first_ones_labels_moved_with_its_own(job: MakeJob, tiny_cases: list[Any]) -> None:
    """With the label itself as prediction and no damage, the further channels are the label in one-hot form."""
    loaded = [load_case(case) for case in tiny_cases[:4]]
    cases = [LoadedCase(c.case_id, c.image, c.label, c.foreground, c.annotated, c.label) for c in loaded]
    calm = {**ALL, "augmentation.p_cascade_morphology": 0, "augmentation.p_cascade_removal": 0}
    run = job(cases=cases, **calm)
    second = run.planned.model_copy(update={"previous_stage": "3d_lowres"})
    made = run.plan.model_copy(update={"configurations": {"3d_fullres": second}})
    for augment in (True, False):
        images, classes, _ = make_batch(replace(run, plan=made), cases, 0, 0, augment)
        assert images.shape[1] == 3
        torch.testing.assert_close(images[:, 1:], torch.stack([(classes == c).float() for c in (1, 2)], 1))


@pytest.mark.parametrize("pipeline", ["native", "batchgenerators"])
def test_what_was_normalised_in_a_mask_stays_zero_outside(job: MakeJob, tiny_cases: list[Any], pipeline: str) -> None:
    """Of one masked and one unmasked channel; the mask is that of the case, whatever values the channels have."""
    case, marker = load_case(tiny_cases[0]), job().plan.labels.outside_class
    image, label = np.concatenate([case.image, case.image + 1]), case.label.copy()
    image[0, :, :10], label[:, :10] = 1e-3, marker  # resampling leaves such values outside
    image[0, :, 12:14] = 0  # as it may be inside
    plain = job().plan.channels[0]
    channels = (plain.model_copy(update={"use_mask": True}), plain)
    settings = {**OFF, "augmentation.p_noise": 1, "augmentation.p_mirror": 0, "augmentation.pipeline": pipeline,
                "augmentation.noise_std": [0.1, 0.1], "training.foreground": 0}  # fmt: skip
    run = job(cases=[replace(case, image=image, label=label)], plan={"channels": channels}, **settings)
    draw = draw_batch(run, run.training, 0, 0, augment=True)
    if pipeline == "native":  # the first sample reaches over the lower border
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


def test_mistakes_are_told_before_training(job: MakeJob) -> None:
    check_augmentation(job(**{"augmentation.extra": [{"name": "RicianNoiseTransform", "p_per_sample": 0.1}]}))
    with pytest.raises(UserError, match=r"no label 'anterior'\. Did you mean 'Anterior'"):
        check_augmentation(job(**{"augmentation.mirror_swap": [["anterior", "Posterior"]]}))
    with pytest.raises(UserError, match="Did you mean 'RicianNoiseTransform'"):
        check_augmentation(job(**{"augmentation.extra": [{"name": "RicianNoise"}]}))
    check_augmentation(job(**{"augmentation.mirror_axes": [1, 2]}))
    with pytest.raises(UserError, match=r"mirror_axes = \[1, 2\]: 2 is not an axis of a patch with 2\."):
        check_augmentation(job("2d", **{"augmentation.mirror_axes": [1, 2]}))
