"""From averaged windows to label maps on the image's own grid, and to maps of probabilities and uncertainty.

`predict_label_map` runs the sliding windows of an image; their slices are resampled and decided as soon as they are
finished. Several models vote with the mean of their probabilities on the image's grid, as nnU-Net's ensembles do. They
compute side by side, slab by slab: the probabilities of a whole image never exist.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch

from nnunet_lite import log
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.inference.memory import MemoryPlan, PredictionTask
from nnunet_lite.inference.sliding_window import average_windows, suggest_wider_type
from nnunet_lite.networks.devices import is_out_of_memory, release_memory
from nnunet_lite.preprocessing.pipeline import (
    cropped_shape,
    decode_logits,
    empty_map,
    output_values,
    predicted_part,
    require_finite,
)
from nnunet_lite.preprocessing.resampling import Block, operand, operators, resampled_rows, run_in_threads

T = TypeVar("T")

PROBABILITIES, ENTROPY, DISAGREEMENT = "probabilities", "uncertainty/entropy", "uncertainty/disagreement"
OF_MODELS = "uncertainty/disagreement_of_models"  # of each model as a whole: from this the quality is judged
STEPS = 255  # maps are stored as uint8, with 255 for 1

NewMap = Callable[[Sequence[int]], np.ndarray]
Slab = Callable[[], Iterator[tuple[slice, slice, Any]]]  # yields slices, rows, and logits (logits, slices, rows, x)


@dataclass(frozen=True)
class ExtraMaps:
    """The maps to write besides the label map.

    Parameters
    ----------
    probabilities : tuple of str
        Labels or regions whose probabilities are written.
    uncertainty : bool
        Write entropy, and the disagreement of the networks.
    disagreement : bool
        Whether there are several networks, which may disagree: each fold of each model, which takes more memory.
    of_models : bool
        Make a map of the disagreement of the models, each as a whole.
    """

    probabilities: tuple[str, ...] = ()
    uncertainty: bool = False
    disagreement: bool = True
    of_models: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the maps, such as "probabilities/liver"."""
        uncertainty = (ENTROPY, DISAGREEMENT)[: 1 + self.disagreement] if self.uncertainty else ()
        of_models = (OF_MODELS,) if self.of_models else ()
        return (*(f"{PROBABILITIES}/{name}" for name in self.probabilities), *uncertainty, *of_models)

    def __bool__(self) -> bool:
        return bool(self.names)


def parse_label_names(text: str, labels: Labels) -> tuple[str, ...]:
    """Return the names of labels in a list such as "liver,tumor"; of "all", all of them.

    Raises
    ------
    UserError
        A name is no label of the model.
    """
    known = output_names(labels)
    names = tuple(known) if text == "all" else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise UserError(f"{name!r} is no label of the model", fix=f"Its labels are: {', '.join(known)}.")
    return names


def output_names(labels: Labels) -> tuple[str, ...]:
    """Return the label or region of each output channel of the networks."""
    if labels.has_regions:
        return labels.region_names
    names = {value: name for name, value in labels.names.items()}
    return tuple(str(names.get(value, value)) for value in labels.values)


def predict_label_map(
    models: Sequence[Sequence[PredictionTask]],
    plans: Sequence[Sequence[MemoryPlan]],
    labels: Labels,
    maps: ExtraMaps = ExtraMaps(),
    new_map: NewMap = partial(np.zeros, dtype=np.uint8),
    *,
    skip_empty: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the label map of an image, and further maps.

    Entropy is that of the mean probabilities, as a share of the largest possible; of regions, the mean over regions.
    Disagreement is the share of tasks that alone would decide otherwise than all together.

    Parameters
    ----------
    models : sequence of sequence of PredictionTask
        For each model the tasks whose logits are averaged: one for all folds, or one for each fold. Their placements
        differ only in spacing and shape.
    plans : sequence of sequence of MemoryPlan
        For each task what is computed and kept at once; and smaller ones, in case that memory is short.
    labels : Labels
        What is predicted.
    maps : ExtraMaps
        Maps to make besides the label map.
    new_map : callable
        Returns zeros (z, y, x), uint8, of a shape.
    skip_empty : bool
        Windows that are zero are background, and are not computed.

    Returns
    -------
    label_map : ndarray, shape (z, y, x)
        Values of the dataset, on the image's own grid.
    extra : dict of str to ndarray, shape (z, y, x)
        Folder/name of each further map, uint8, with 255 for 1.

    Raises
    ------
    UserError
        The networks compute values that are NaN or infinite, or memory is too short for the smallest plan.
    """
    tasks = [task for model in models for task in model]
    placement, rounded, label_values = tasks[0].placement, tasks[0].window.half, output_values(labels)
    are_classes = np.array_equal(label_values, np.arange(len(label_values)))
    out, inner = empty_map(placement, labels.background, label_values.dtype)
    names = output_names(labels)
    channels = {f"{PROBABILITIES}/{name}": names.index(name) for name in maps.probabilities}
    extra = {name: new_map(out.shape) for name in maps.names}
    if not labels.has_regions and (background := f"{PROBABILITIES}/{names[0]}") in extra:
        extra[background][:] = STEPS  # what was cropped away is background
    views = {name: predicted_part(array, placement) for name, array in extra.items()}

    def write(slabs: tuple[Slab, ...]) -> None:
        for pieces in zip(*(slab() for slab in slabs), strict=True):
            z, rows, logits = pieces[0]
            if len(tasks) == 1 and not maps:
                decided = decode_logits(logits, labels, rounded=rounded)
                inner[z, rows] = decided if are_classes else label_values[decided]
                continue
            of_tasks = iter([logits for _, _, logits in pieces])
            by_model = [[next(of_tasks) for _ in model] for model in models]
            decided, values = _vote(by_model, labels, rounded, channels, maps)
            inner[z, rows] = label_values[decided]
            for name, view in views.items():
                view[z, rows] = values[name]

    n_written = 0

    def run(chosen: Sequence[MemoryPlan]) -> None:
        nonlocal n_written
        with log.working("windows", sum(prod(map(len, plan.tiling)) for plan in chosen)) as advance:
            pairs = zip(tasks, chosen, strict=True)
            streams = [_finished_slabs(*pair, n_written, skip_empty, advance) for pair in pairs]
            for slabs in in_step(streams):
                run_in_threads(write, slabs, None if chosen[0].sums_device.type == "cpu" else 1)
                n_written += len(slabs)

    for chosen, smaller in zip(plans, [*plans[1:], None], strict=True):
        try:
            run(chosen)
            return out, extra
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory(tasks[0].window.device)  # here, since the error refers to what it was raised in
        if smaller is not None:
            log.warn(f"memory is short; the rest of this image is predicted with {smaller[0]}")
    raise UserError("memory is too short for this image", fix="End other programs, or use a machine with more memory.")


def _finished_slabs(
    task: PredictionTask, plan: MemoryPlan, n_written: int, skip_empty: bool, advance: Callable[[int], object]
) -> Iterator[list[Slab]]:
    """Run the sliding window, and yield slabs of output slices, in order, as soon as they can be computed.

    Those that are written already are left out, and the windows that only they need.
    """
    window, shape = task.window, task.placement.shape
    sums = torch.empty(plan.depth, window.channels, *shape[1:], dtype=plan.dtype, device=plan.sums_device)
    used = sums[:, : window.outputs] if window.head is None else sums
    data: Any = used.numpy() if sums.is_cpu else used
    parts, y, x = operators(data, shape, cropped_shape(task.placement.box), task.orders, plan.slab)
    head = None if window.head is None else operand(data, window.head)

    def resample(part: Block) -> Iterator[tuple[slice, slice, Any]]:
        for slices, rows, piece in resampled_rows(data, part, y, x):
            logits = piece if head is None else head @ piece.reshape(len(piece), -1)
            yield slices, rows, logits.reshape(-1, *piece.shape[1:])

    left = parts[n_written:]
    windows = average_windows(
        window, task.image, plan.tiling, left, sums, plan.batch_size, skip_empty=skip_empty, advance=advance
    )
    for finished, values in windows:
        require_finite(values, suggest_wider_type(window, plan.dtype))
        yield [partial(resample, part) for part in finished]


def in_step(streams: Sequence[Iterator[list[T]]]) -> Iterator[list[tuple[T, ...]]]:
    """Yield the slabs that all streams have finished; a stream continues only after its last slabs were used."""
    waiting: list[deque[T]] = [deque() for _ in streams]
    while True:
        for stream, queue in zip(streams, waiting, strict=True):
            while not queue:
                more = next(stream, None)
                if more is None:
                    return
                queue.extend(more)
        number = min(len(queue) for queue in waiting)
        yield [tuple(queue.popleft() for queue in waiting) for _ in range(number)]


def _vote(
    models: Sequence[Sequence[Any]], labels: Labels, rounded: bool, channels: Mapping[str, int], maps: ExtraMaps
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Decide a piece from the logits of all folds of all models, as `decode_logits`; and compute its maps (uint8)."""
    means = [sum(folds) / len(folds) for folds in models]
    alone = len(means) == 1  # then the decision is the same as without maps, which torch makes faster than scipy
    each = [torch.as_tensor(means[0])] if alone else means
    shares = sum(_probabilities(mean, labels.has_regions) for mean in each) / len(each)
    decided = decode_logits(means[0], labels, rounded=rounded) if alone else decode_logits(shares - 0.5, labels)
    values = {name: _as_steps(shares[channel]) for name, channel in channels.items()}
    voters = {DISAGREEMENT: [logits for folds in models for logits in folds], OF_MODELS: means}
    for name in voters.keys() & set(maps.names):
        votes = [decode_logits(logits, labels, rounded=rounded) != decided for logits in voters[name]]
        values[name] = _as_steps(np.mean(votes, axis=0))
    if maps.uncertainty:
        values[ENTROPY] = _as_steps(_entropy(shares, labels.has_regions))
    return decided, values


def _probabilities(logits: Any, regions: bool) -> Any:
    """Return the probabilities of (channels, *positions) logits.

    Where all logits are zero, every window was skipped as empty: that is background for certain.
    """
    if isinstance(logits, np.ndarray):
        from scipy.special import expit, softmax  # slow to load, and needed by few predictions

        shares = expit(logits) if regions else softmax(logits, axis=0)
    else:
        shares = logits.sigmoid() if regions else logits.softmax(dim=0)
    skipped = (logits == 0).all(0)
    shares *= ~skipped
    if not regions:
        shares[0] += skipped
    return shares


def _entropy(shares: Any, regions: bool) -> Any:
    """Return the entropy of (channels, *positions) probabilities, between 0 and 1; on a GPU there."""
    entr: Callable[[Any], Any] = torch.special.entr
    if isinstance(shares, np.ndarray):
        from scipy import special  # slow to load, and needed by few predictions

        entr = special.entr
    if regions:
        return (entr(shares) + entr(1 - shares)).mean(0) / np.log(2)
    return entr(shares).sum(0) / np.log(len(shares))


def _as_steps(values: Any) -> np.ndarray:
    array = values if isinstance(values, np.ndarray) else values.cpu().numpy()
    return np.rint(array * STEPS).astype(np.uint8)
