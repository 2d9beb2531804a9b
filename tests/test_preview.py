"""The picture is drawn for every kind of configuration and pipeline, and its titles name the transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training.augmentation import rotation
from nnunet_lite.training.dataloader import Location, draw_batch
from nnunet_lite.training.job import Job, configure_plan
from nnunet_lite.training.preview import describe_sample, draw_preview
from nnunet_lite.workspace import planned_paths

MakeJob = Callable[..., Job]


@pytest.fixture
def job(tmp_path: Path, tiny_workspace: Path, tiny_cases: list[Any], tiny_settings: dict[str, Any]) -> MakeJob:
    def make(configuration: str = "3d_fullres", **changes: Any) -> Job:
        patch = {"training.patch_size": [32, 24]} if configuration == "2d" else {}
        settings = with_changes(Settings(), {**tiny_settings, **patch, **changes})
        made = configure_plan(Plan.read(planned_paths(tiny_workspace).plans), configuration, settings)
        return Job(made, configuration, settings, 5, tmp_path, torch.device("cpu"), tiny_cases, tiny_cases)

    return make


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


def test_words_tell_what_is_applied(job: MakeJob) -> None:
    off = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted", "mirror")
    calm = {f"augmentation.p_{name}": 0 for name in off}
    run = job(**calm)
    draw = draw_batch(run, run.training, 0, 0, augment=True)

    def words(matrix: Any, run: Job = run, **changes: Any) -> list[str]:
        place = draw.locations[0]
        return describe_sample(run, replace(draw, locations=[Location(place.case, place.corner, matrix)], **changes), 0)

    assert words(None) == ["unchanged"]
    assert words(rotation(1, 20)) == ["rotated 20°"]
    assert words(0.8 * rotation(0, 12) @ rotation(2, 0)) == ["rotated 12°", "scaled 0.80"]
    assert words(1.25 * np.eye(3), flips=np.array([[True, False, True]])) == ["scaled 1.25", "mirrored zx"]
    assert words(None, flips=None) == []
    noisy = job(**calm | {"augmentation.p_noise": 1, "augmentation.noise_std": [0.05, 0.05]})
    assert describe_sample(noisy, replace(draw_batch(noisy, noisy.training, 0, 0, True)), 1)[-1] == "noise 0.05"
    flat = job("2d", **calm)
    flat_draw = replace(draw_batch(flat, flat.training, 0, 0, augment=True))
    turned = replace(flat_draw, locations=[Location(0, (0, 0, 0), np.diag([1, 0.9, 0.9]) @ rotation(0, 150))])
    assert describe_sample(flat, turned, 0) == ["rotated 150°", "scaled 0.90"]
