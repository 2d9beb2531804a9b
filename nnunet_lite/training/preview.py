"""A picture of training samples: patches of the training set, and what augmentation makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunet_lite.files import atomic
from nnunet_lite.settings import with_changes
from nnunet_lite.training.dataloader import BatchDraw, Location, build_batch, draw_batch
from nnunet_lite.training.job import Job
from nnunet_lite.training.launch import ALONE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STREAM = 2**31 + 1  # differs from all epochs
_MOST_NAMES = 24  # labels in the legend


def draw_preview(job: Job, path: Path, samples: int = 4, versions: int = 5) -> None:
    """Draw patches around foreground voxels, as they are and augmented, to a PNG.

    Each row has one sample, first without augmentation, then with different draws: the middle slice of the first
    channel with the outlines of the labels. Grey levels are those of the original.

    Parameters
    ----------
    job : Job
        Fold that is trained.
    path : Path
        PNG file to write.
    samples, versions : int
        Numbers of rows, and of augmented columns.
    """
    from matplotlib import figure, lines  # slow to import, and few runs draw a preview

    planned = job.planned.model_copy(update={"batch_size": samples})
    plan = job.plan.with_configuration(job.configuration, planned)
    job = replace(job, plan=plan, settings=with_changes(job.settings, {"training.foreground": 1.0}), ranks=ALONE)
    original = draw_batch(job, job.training, _STREAM, 0, augment=False)
    draws = [original]
    for version in range(1, versions + 1):
        draw = draw_batch(job, job.training, _STREAM, version, augment=True)
        pairs = zip(original.locations, draw.locations, strict=True)
        draws.append(replace(draw, locations=[Location(at.case, at.corner, new.matrix) for at, new in pairs]))
    slices = [_middle_slices(job, draw) for draw in draws]
    picture = figure.Figure(figsize=(2.3 * (versions + 1), 2.8 * samples), layout="constrained")
    grid = picture.subplots(samples, versions + 1, squeeze=False)
    for row, location in enumerate(original.locations):
        low, high = np.percentile(slices[0][0][row], (0.5, 99.5))
        for axes, (images, classes) in zip(grid[row], slices, strict=True):
            _show(axes, job, images[row], classes[row], float(low), float(high))
        grid[row][0].set_title(job.training[location.case].case_id, fontsize=8)
    named = zip(_colours(job), job.plan.labels.class_names[1:], strict=False)
    handles = [lines.Line2D([], [], color=colour, label=name) for colour, name in named]
    columns = min(6, len(handles))
    picture.legend(handles=handles[:_MOST_NAMES], loc="outside lower center", ncols=columns, fontsize=8)
    with atomic(path) as temporary:
        picture.savefig(temporary, dpi=100, format="png")


def _middle_slices(job: Job, draw: BatchDraw) -> tuple[np.ndarray, np.ndarray]:
    """The middle slices (samples, y, x) of the first channel and of the classes."""
    images, classes, _ = build_batch(job, job.training, draw)
    image = images[:, 0]
    if job.dimensions == 3:
        image, classes = image[:, job.patch[0] // 2], classes[:, job.patch[0] // 2]
    return image.float().cpu().numpy(), classes.cpu().numpy()


def _show(axes: Axes, job: Job, image: np.ndarray, label: np.ndarray, low: float, high: float) -> None:
    height, width = job.planned.spacing[-2:]
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=height / width)
    for number, colour in enumerate(_colours(job), 1):
        if (label == number).any():
            axes.contour(label == number, [0.5], colors=[colour], linewidths=1)
    axes.set_axis_off()


def _colours(job: Job) -> list[str]:
    """One colour for each foreground class, and grey for the ignore label."""
    labels = job.plan.labels
    return [f"C{i % 10}" for i in range(labels.n_classes - 1)] + ["grey"] * (labels.ignore is not None)
