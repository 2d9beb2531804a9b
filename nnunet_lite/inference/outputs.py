"""From averaged windows to label maps on the image's own grid, and to maps of probabilities and uncertainty.

`open_stream` starts the sliding window of an image; its slices are resampled and decided as soon as they are finished.
Several models vote with the mean of their probabilities on the image's grid, as nnU-Net's ensembles do. They compute
side by side, slab by slab: the probabilities of a whole image never exist.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.inference.memory import MemoryPlan, PredictionTask
from nnunet_lite.inference.sliding_window import average_windows
from nnunet_lite.preprocessing.pipeline import (
    Placement,
    cropped_shape,
    decode_logits,
    empty_map,
    output_values,
    predicted_part,
)
from nnunet_lite.preprocessing.resampling import Block, operand, operators, resampled_rows, run_in_threads

PROBABILITIES, ENTROPY, DISAGREEMENT = "probabilities", "uncertainty/entropy", "uncertainty/disagreement"
STEPS = 255  # maps are stored as uint8, with 255 for 1

NewMap = Callable[[str], np.ndarray]  # folder/name of a map -> zeros (z, y, x), uint8, on the image's grid


@dataclass(frozen=True)
class ExtraMaps:
    """The maps to write besides the label map.

    Parameters
    ----------
    probabilities : tuple of str
        Labels or regions whose probabilities are written.
    uncertainty : bool
        Write entropy, and the disagreement of the networks.
    """

    probabilities: tuple[str, ...] = ()
    uncertainty: bool = False

    def __bool__(self) -> bool:
        return bool(self.probabilities) or self.uncertainty


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


# ---------------------------------------------------------------------------------------------------------- label maps


@dataclass(frozen=True)
class LogitStream:
    """A running prediction on the image's own grid.

    Parameters
    ----------
    finished : iterator of list of Block
        Blocks of slices along the first axis, in order. Use each list before you get the next one.
    pieces : callable
        Yields of a block the slice, its rows, and the channels (channels, rows, x), float32.
    head : ndarray or Tensor, shape (logits, channels), optional
        As in `SlidingWindow`, on the device of the sums.
    rounded : bool
        Round logits to float16 before the decision, as `decode_logits` does.
    threads : int, optional
        How many threads may work on blocks at once; by default one for each CPU.
    """

    finished: Iterator[list[Block]]
    pieces: Callable[[Block], Iterator[tuple[int, slice, Any]]]
    head: Any
    rounded: bool
    threads: int | None

    def logits(self, piece: Any) -> Any:
        """Return the logits (logits, rows, x) of a piece."""
        if self.head is None:
            return piece
        return (self.head @ piece.reshape(len(piece), -1)).reshape(-1, *piece.shape[1:])


def open_stream(task: PredictionTask, plan: MemoryPlan, *, skip_empty: bool = False) -> LogitStream:
    """Start the sliding window of an image.

    Parameters
    ----------
    task : PredictionTask
        The image and the networks.
    plan : MemoryPlan
        What is computed and kept at once.
    skip_empty : bool
        Windows that are zero are background, and are not computed.
    """
    window, placement = task.window, task.placement
    sums = torch.empty(plan.depth, window.channels, *placement.shape[1:], dtype=plan.dtype, device=plan.sums_device)
    used = sums[:, : window.outputs] if window.head is None else sums
    data: Any = used.numpy() if sums.is_cpu else used
    parts, y, x = operators(data, placement.shape, cropped_shape(placement.box), task.orders, plan.slab)
    return LogitStream(
        finished=average_windows(window, task.image, plan.tiling, parts, sums, plan.batch_size, skip_empty=skip_empty),
        pieces=lambda part: resampled_rows(data, part, y, x),
        head=None if window.head is None else operand(data, window.head),
        rounded=window.half,
        threads=None if sums.is_cpu else 1,
    )


def predict_label_map(stream: LogitStream, placement: Placement, labels: Labels) -> np.ndarray:
    """Return the label map of an image that one model predicts.

    Parameters
    ----------
    stream : LogitStream
        The running prediction.
    placement : Placement
        Where the preprocessed array is in the image.
    labels : Labels
        What is predicted.

    Returns
    -------
    ndarray, shape (z, y, x)
        Values of the dataset, on the image's own grid. It equals `restore_segmentation` of `predict_logits` but for
        rounding.
    """
    values = output_values(labels)
    out, inner = empty_map(placement, labels.background, values.dtype)

    def write(part: Block) -> None:
        for z, rows, piece in stream.pieces(part):
            inner[z, rows] = values[decode_logits(piece, labels, stream.head, rounded=stream.rounded)]

    for parts in stream.finished:
        run_in_threads(write, parts, stream.threads)
    return out


# ------------------------------------------------------------------------------------------- several models, and maps


def predict_maps(
    models: Sequence[Sequence[LogitStream]], placement: Placement, labels: Labels, maps: ExtraMaps, new_map: NewMap
) -> np.ndarray:
    """Return the label map of an image that several models predict, and write further maps.

    Entropy is that of the mean probabilities, as a share of the largest possible; of regions, the mean over regions.
    Disagreement is the share of streams that alone would decide otherwise than all together.

    Parameters
    ----------
    models : sequence of sequence of LogitStream
        For each model the streams whose logits are averaged: one for all folds, or one for each fold.
    placement : Placement
        Where the image is; that of all models differs only in spacing and shape.
    labels : Labels
        What is predicted.
    maps : ExtraMaps
        Maps to write besides the label map.
    new_map : callable
        Makes an empty map; called once for each.

    Returns
    -------
    ndarray, shape (z, y, x)
        The label map, values of the dataset, on the image's own grid.
    """
    label_values = output_values(labels)
    out, inner = empty_map(placement, labels.background, label_values.dtype)
    names = output_names(labels)
    channels = {f"{PROBABILITIES}/{name}": names.index(name) for name in maps.probabilities}
    views = {}
    for name in (*channels, *((ENTROPY, DISAGREEMENT) if maps.uncertainty else ())):
        array = new_map(name)
        if channels.get(name) == 0 and not labels.has_regions:
            array[:] = STEPS  # what was cropped away is background
        views[name] = predicted_part(array, placement)
    streams = [stream for model in models for stream in model]

    def write(parts: tuple[Block, ...]) -> None:
        for pieces in zip(*(stream.pieces(part) for stream, part in zip(streams, parts, strict=True)), strict=True):
            z, rows, _ = pieces[0]
            logits = iter([stream.logits(piece) for stream, (_, _, piece) in zip(streams, pieces, strict=True)])
            by_model = [[next(logits) for _ in model] for model in models]
            decided, values = _vote(by_model, labels, streams[0].rounded, channels, maps)
            inner[z, rows] = label_values[decided]
            for name, view in views.items():
                view[z, rows] = values[name]

    for parts in in_step([stream.finished for stream in streams]):
        run_in_threads(write, parts, streams[0].threads)
    return out


def in_step(streams: Sequence[Iterator[list[Block]]]) -> Iterator[list[tuple[Block, ...]]]:
    """Yield the blocks that all streams have finished; a stream continues only after its last blocks were used."""
    waiting: list[deque[Block]] = [deque() for _ in streams]
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
    shares = sum(_probabilities(mean, labels.has_regions) for mean in means) / len(means)
    alone = len(means) == 1  # then the decision is the same as without maps
    decided = decode_logits(means[0], labels, rounded=rounded) if alone else decode_logits(shares - 0.5, labels)
    values = {name: _as_steps(shares[channel]) for name, channel in channels.items()}
    if maps.uncertainty:
        votes = [decode_logits(logits, labels, rounded=rounded) != decided for folds in models for logits in folds]
        values[DISAGREEMENT] = _as_steps(np.mean(votes, axis=0))
        values[ENTROPY] = _as_steps(_entropy(_to_numpy(shares), labels.has_regions))
    return decided, values


def _probabilities(logits: Any, regions: bool) -> Any:
    """Return the probabilities of (channels, rows, x) logits.

    Where all logits are zero, every window was skipped as empty: that is background for certain.
    """
    if isinstance(logits, np.ndarray):
        from scipy.special import expit, softmax  # slow to load, and needed by few predictions

        shares = expit(logits) if regions else softmax(logits, axis=0)
    else:
        shares = logits.sigmoid() if regions else logits.softmax(dim=0)
    skipped = (logits == 0).all(0)
    shares[:, skipped] = 0
    if not regions:
        shares[0, skipped] = 1
    return shares


def _entropy(shares: np.ndarray, regions: bool) -> np.ndarray:
    """Return the entropy of (channels, rows, x) probabilities, between 0 and 1."""
    from scipy.special import entr  # slow to load, and needed by few predictions

    if regions:
        return (entr(shares) + entr(1 - shares)).mean(axis=0) / np.log(2)
    return entr(shares).sum(axis=0) / np.log(len(shares))


def _as_steps(values: Any) -> np.ndarray:
    return np.rint(_to_numpy(values) * STEPS).astype(np.uint8)


def _to_numpy(values: Any) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()
