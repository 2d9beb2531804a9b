"""The picture is drawn for every kind of configuration and pipeline, twice the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.image import imread

from nnunet_lite.training.job import Job
from nnunet_lite.training.preview import draw_preview

MakeJob = Callable[..., Job]


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
