"""The picture is drawn for every kind of configuration and pipeline, twice the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training.job import Job, configure_plan
from nnunet_lite.training.preview import draw_preview
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
