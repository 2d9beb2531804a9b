"""Beside the label map: probabilities, and how sure the networks are; and the decision of several models at once.

Models vote with the mean of their probabilities on the image's own grid, as nnU-Net's ensembles do. All are streamed
side by side, slab by slab: no model's probabilities ever exist whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.preprocessing.pipeline import Placement, decode_logits, empty_map, output_values, predicted_part
from nnunet_lite.preprocessing.resampling import Block, run_in_threads

if TYPE_CHECKING:
    from nnunet_lite.inference.streaming import Stream

PROBABILITIES, ENTROPY, DISAGREEMENT = "probabilities", "uncertainty/entropy", "uncertainty/disagreement"
STEPS = 255  # maps are stored as uint8, 255 being one

NewMap = Callable[[str], np.ndarray]  # folder/name of a map -> zeros (z, y, x) uint8 on the image's grid


@dataclass(frozen=True)
class Wanted:
    """Maps that are asked for beside the label map: probabilities of these labels or regions, uncertainty."""

    probabilities: tuple[str, ...] = ()
    uncertainty: bool = False

    def __bool__(self) -> bool:
        return bool(self.probabilities) or self.uncertainty


def wanted_labels(asked: str, labels: Labels) -> tuple[str, ...]:
    """The names of labels in a list such as "liver,tumor", or all of them for "all".

    Raises
    ------
    UserError : a name that is no label of the model.
    """
    known = channel_names(labels)
    names = tuple(known) if asked == "all" else tuple(name.strip() for name in asked.split(","))
    for name in names:
        if name not in known:
            raise UserError(f"{name!r} is no label of the model", fix=f"There are: {', '.join(known)}.")
    return names


def channel_names(labels: Labels) -> tuple[str, ...]:
    """What each channel of the networks stands for."""
    if labels.has_regions:
        return labels.region_names
    names = {value: name for name, value in labels.names.items()}
    return tuple(str(names.get(value, value)) for value in labels.values)


def predict_maps(
    models: Sequence[Sequence[Stream]], placement: Placement, labels: Labels, wanted: Wanted, new_map: NewMap
) -> np.ndarray:
    """Label map (z, y, x) of an image that several models are predicting, and the maps that are wanted.

    Parameters
    ----------
    models : for each the streams whose logits are averaged: one for all of its folds, or one for each.
    placement : where the image lies; all models' are the same but for their spacing and shape.
    new_map : makes room for a map; called once for each.

    Entropy is that of the mean probabilities, as a share of the largest possible; of regions, the mean over regions.
    Disagreement is the share of streams that would have decided otherwise than all together.
    """
    written = output_values(labels)
    out, inner = empty_map(placement, labels.background, written.dtype)
    names = channel_names(labels)
    channels = {f"{PROBABILITIES}/{name}": names.index(name) for name in wanted.probabilities}
    views = {}
    for name in (*channels, *((ENTROPY, DISAGREEMENT) if wanted.uncertainty else ())):
        array = new_map(name)
        if channels.get(name) == 0 and not labels.has_regions:
            array[:] = STEPS  # what was cropped away is background
        views[name] = predicted_part(array, placement)
    streams = [stream for model in models for stream in model]

    def write(parts: tuple[Block, ...]) -> None:
        pieces = [stream.pieces(part) for stream, part in zip(streams, parts, strict=True)]
        for found in zip(*pieces, strict=True):
            z, rows, _ = found[0]
            logits = [_logits(stream, piece) for stream, (_, _, piece) in zip(streams, found, strict=True)]
            decided, values = _judged(_grouped(logits, models), labels, streams[0].rounded, channels, wanted)
            inner[z, rows] = written[decided]
            for name, view in views.items():
                view[z, rows] = values[name]

    for ready in together([stream.ready for stream in streams]):
        run_in_threads(write, ready, streams[0].threads)
    return out


def together(ready: Sequence[Iterator[list[Block]]]) -> Iterator[list[tuple[Block, ...]]]:
    """Blocks that all streams have ready; a stream goes on only once those that it gave are used."""
    waiting: list[deque[Block]] = [deque() for _ in ready]
    while True:
        for stream, queue in zip(ready, waiting, strict=True):
            while not queue:
                more = next(stream, None)
                if more is None:
                    return
                queue.extend(more)
        number = min(len(queue) for queue in waiting)
        yield [tuple(queue.popleft() for queue in waiting) for _ in range(number)]


def _logits(stream: Stream, piece: Any) -> Any:
    """(logits, rows, x) of what is held of a piece."""
    if stream.head is None:
        return piece
    return (stream.head @ piece.reshape(len(piece), -1)).reshape(-1, *piece.shape[1:])


def _grouped(logits: Sequence[Any], models: Sequence[Sequence[Stream]]) -> list[list[Any]]:
    left = iter(logits)
    return [[next(left) for _ in model] for model in models]


def _judged(
    models: Sequence[Sequence[Any]], labels: Labels, rounded: bool, channels: Mapping[str, int], wanted: Wanted
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What a piece is, as `decode_logits` says it, and its maps (uint8)."""
    means = [sum(folds) / len(folds) for folds in models]
    shares = sum(_probabilities(mean, labels.has_regions) for mean in means) / len(means)
    alone = len(means) == 1  # decides exactly as if no maps were wanted
    decided = decode_logits(means[0], labels, rounded=rounded) if alone else decode_logits(shares - 0.5, labels)
    values = {name: _stored(shares[channel]) for name, channel in channels.items()}
    if wanted.uncertainty:
        votes = [decode_logits(logits, labels, rounded=rounded) != decided for folds in models for logits in folds]
        values[DISAGREEMENT] = _stored(np.mean(votes, axis=0))
        values[ENTROPY] = _stored(_entropy(shares, labels.has_regions))
    return decided, values


def _probabilities(logits: Any, regions: bool) -> Any:
    """Of (channels, rows, x) logits. Where all are zero every window was skipped as empty: surely background."""
    if isinstance(logits, np.ndarray):
        from scipy.special import expit, softmax

        shares = expit(logits) if regions else softmax(logits, axis=0)
    else:
        shares = logits.sigmoid() if regions else logits.softmax(dim=0)
    skipped = (logits == 0).all(0)
    shares[:, skipped] = 0
    if not regions:
        shares[0, skipped] = 1
    return shares


def _entropy(shares: Any, regions: bool) -> np.ndarray:
    """Of (channels, rows, x) probabilities, between 0 and 1."""
    from scipy.special import entr

    shares = _on_cpu(shares)
    if regions:
        return (entr(shares) + entr(1 - shares)).mean(axis=0) / np.log(2)
    return entr(shares).sum(axis=0) / np.log(len(shares))


def _stored(values: Any) -> np.ndarray:
    return np.rint(_on_cpu(values) * STEPS).astype(np.uint8)


def _on_cpu(values: Any) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()
