"""A picture of what the network is shown: patches of the training set, and what augmentation makes of them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunet_lite.files import atomic
from nnunet_lite.settings import with_changes
from nnunet_lite.training.augmentation import is_in_plane
from nnunet_lite.training.batches import Draw, build_batch, draw_batch
from nnunet_lite.training.distributed import ALONE
from nnunet_lite.training.job import Job
from nnunet_lite.training.sampler import Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STREAM = 2**31 + 1  # no epoch's
_NAMES = 24  # of labels that fit below the picture


def draw_preview(job: Job, path: Path, samples: int = 4, versions: int = 5) -> None:
    """Draw patches around foreground voxels, as they are and augmented, to a PNG.

    A row for each of the `samples`, all columns but the first augmented by draws of their own; the middle slice of the
    first channel, with the outlines of the labels; above each what was applied. Grey levels are those of the original.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    job = _for_preview(job, samples)
    original = draw_batch(job, job.training, _STREAM, 0, augment=False)
    draws = [original]
    for version in range(1, versions + 1):
        draw = draw_batch(job, job.training, _STREAM, version, augment=True)
        pairs = zip(original.places, draw.places, strict=True)
        draws.append(replace(draw, places=[Place(at.case, at.corner, new.matrix) for at, new in pairs]))
    batches = [_middles(job, draw) for draw in draws]
    figure = Figure(figsize=(2.3 * (versions + 1), 2.8 * samples), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(samples, versions + 1, squeeze=False)
    for row, place in enumerate(original.places):
        levels = np.percentile(batches[0][0][row], (0.5, 99.5))
        for column, (axes, draw, (images, labels)) in enumerate(zip(grid[row], draws, batches, strict=True)):
            _show(axes, job, images[row], labels[row], (float(levels[0]), float(levels[1])))
            lines = applied(job, draw, row) if column else [job.training[place.case].case_id]
            axes.set_title("\n".join(lines), fontsize=8)
    _legend(figure, job)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _for_preview(job: Job, samples: int) -> Job:
    """The same with a batch of foreground patches."""
    planned = job.planned.model_copy(update={"batch_size": samples})
    plan = job.plan.model_copy(update={"configurations": {**job.plan.configurations, job.configuration: planned}})
    return replace(job, plan=plan, settings=with_changes(job.settings, {"training.foreground": 1.0}), ranks=ALONE)


def _middles(job: Job, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """The middle slice (samples, y, x) of the first channel and of the classes."""
    images, classes, _ = build_batch(job, job.training, draw)
    middle = job.patch[0] // 2
    shown = (images[:, 0], classes) if job.dimensions == 2 else (images[:, 0, middle], classes[:, middle])
    return shown[0].float().cpu().numpy(), shown[1].cpu().numpy()


def applied(job: Job, draw: Draw, sample: int) -> list[str]:
    """What augmentation does to a sample, in words; factors are those of the settings."""
    if draw.flips is None:
        return []
    words = _motion(draw.places[sample].matrix, is_in_plane(job.patch))
    if draw.intensity:
        for field in fields(draw.intensity):
            value = np.ravel(getattr(draw.intensity, field.name)[sample])[0]
            if field.name != "seed" and not np.isnan(value):
                words.append(f"{field.name.replace('_', ' ')} {value:.2f}")
    else:
        words.append("batchgenerators")
    mirrored = "".join(axis for axis, flip in zip("zyx", draw.flips[sample], strict=True) if flip)
    words += [f"mirrored {mirrored}"] if mirrored else []
    words += [entry["name"].removesuffix("Transform") for entry in job.settings.augmentation.extra]
    return words or ["as it is"]


def _motion(matrix: np.ndarray | None, in_plane: bool) -> list[str]:
    """The angle and the factor of a matrix."""
    if matrix is None:
        return []
    words, turned = [], matrix[1:, 1:] if in_plane else matrix
    factor = float(np.linalg.det(turned) ** (1 / len(turned)))
    cosine = (np.trace(turned / factor) - (not in_plane)) / 2
    angle = float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    if angle > 1e-3:
        words.append(f"rotated {angle:.0f}°")
    if abs(factor - 1) > 1e-6:
        words.append(f"scaled {factor:.2f}")
    return words


def _show(axes: Axes, job: Job, image: np.ndarray, label: np.ndarray, levels: tuple[float, float]) -> None:
    height, width = job.planned.spacing[-2:]
    axes.imshow(image, cmap="gray", vmin=levels[0], vmax=levels[1], aspect=height / width)
    for number, colour in enumerate(_colours(job), 1):
        if (label == number).any():
            axes.contour(label == number, [0.5], colors=[colour], linewidths=1)
    axes.set_axis_off()


def _legend(figure: Figure, job: Job) -> None:
    from matplotlib.lines import Line2D

    labels = job.plan.labels
    values = [str(v) for v in labels.values[1:]]
    names = values if labels.has_regions else list(labels.region_names)
    lines = [Line2D([], [], color=colour, label=name) for colour, name in zip(_colours(job), names, strict=False)]
    figure.legend(handles=lines[:_NAMES], loc="outside lower center", ncols=min(6, len(lines)), fontsize=8)


def _colours(job: Job) -> list[str]:
    """One for each foreground class, and grey for what is ignored."""
    labels = job.plan.labels
    return [f"C{i % 10}" for i in range(labels.n_classes - 1)] + ["grey"] * (labels.ignore is not None)
