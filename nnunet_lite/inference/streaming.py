"""Prediction in bounded memory: the logits of an image never exist all at once.

Windows come in rows along the first axis. Once a row is done, no later window reaches the slices before the next row:
they are finished, resampled to the image's grid, decided, and dropped. What is held has the depth of a patch, however
long the image.

And it need not be logits. The last layer of a U-Net is linear in each voxel, as are the mean over windows, mirrored
copies and folds, and resampling: it may come last. With more classes than features, the features are held and
resampled, and the logits of a few thousand voxels at a time are made of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_lite.data.labels import Labels
from nnunet_lite.inference.memory import Footprint, Request, logits_orders, tiling_of
from nnunet_lite.inference.passes import Passes
from nnunet_lite.inference.tiles import Sides
from nnunet_lite.inference.windows import Flip, Span, Tiling, cut, mirrored, schedule, weight_of
from nnunet_lite.preprocessing.pipeline import (
    Placement,
    cropped_shape,
    decode_logits,
    empty_map,
    output_values,
    require_finite,
)
from nnunet_lite.preprocessing.resampling import Block, blocks, operand, operators, resampled_rows, run_in_threads

Place = tuple[Span, ...]  # of a window

_SLICES = 16  # of a whole prediction that are handed over at once


@dataclass(frozen=True)
class Stream:
    """A prediction under way on the image's own grid.

    Parameters
    ----------
    ready : blocks of slices along the first axis, in order, each list to be used before the next is asked for.
    pieces : of a block, the slice, its rows, and what is held of them, (held, rows, x), float32.
    head : (logits, held), as in `Passes`, where the sums lie. rounded : as `decode_logits` wants it.
    threads : that may work on blocks at once; None for one per CPU.
    """

    ready: Iterator[list[Block]]
    pieces: Callable[[Block], Iterator[tuple[int, slice, Any]]]
    head: Any
    rounded: bool
    threads: int | None


def opened(request: Request, image: Tensor, footprint: Footprint, *, skip_empty: bool = False) -> Stream:
    """Begin to predict a preprocessed image (channels, z, y, x), which lies on the CPU.

    Parameters
    ----------
    footprint : what is computed and held at once.
    skip_empty : windows that are zero are background.
    """
    passes, placement = request.passes, request.placement
    dtype, where = footprint.dtype, footprint.where
    held = torch.empty(footprint.depth, passes.held, *placement.shape[1:], dtype=dtype, device=where)
    sums = held[:, : passes.outputs] if passes.head is None else held
    data: Any = sums.numpy() if held.is_cpu else sums
    orders = logits_orders(placement, request.resampling)
    parts, y, x = operators(data, placement.shape, cropped_shape(placement.box), orders, footprint.slab)
    return Stream(
        ready=stream(passes, image, footprint.tiling, parts, held, footprint.batch_size, skip_empty=skip_empty),
        pieces=lambda part: resampled_rows(data, part, y, x),
        head=None if passes.head is None else operand(data, passes.head),
        rounded=passes.half,
        threads=None if held.is_cpu else 1,
    )


def predict_labels(prediction: Stream, placement: Placement, labels: Labels) -> np.ndarray:
    """Label map (z, y, x), values of the data set, on the image's own grid.

    Equals `restore_segmentation` of `predict_logits` but for rounding.
    """
    written = output_values(labels)
    out, inner = empty_map(placement, labels.background, written.dtype)

    def write(part: Block) -> None:
        for z, rows, piece in prediction.pieces(part):
            inner[z, rows] = written[decode_logits(piece, labels, prediction.head, rounded=prediction.rounded)]

    for ready in prediction.ready:
        run_in_threads(write, ready, prediction.threads)
    return out


def predict_logits(passes: Passes, image: Tensor, step: float = 0.5) -> Tensor:
    """Logits (channels, z, y, x) of a whole preprocessed image (channels, z, y, x), float32 on the CPU.

    `passes` have no head; `step` is the distance of two windows as a share of the patch.
    """
    depth, *plane = image.shape[1:]
    tiling, batch_size = tiling_of(passes, image.shape[1:], step, passes.at_once)
    parts = blocks(depth, depth, 1, _SLICES)
    out = torch.empty(passes.outputs, depth, *plane)
    dtype = torch.float16 if passes.half else torch.float32
    held = torch.empty(schedule(tiling.axes[0], parts)[1], passes.held, *plane, dtype=dtype)
    for ready in stream(passes, image, tiling, parts, held, batch_size):
        for part in ready:
            out[:, part.start : part.stop] = held[part.low : part.high, :-1].transpose(0, 1)
    return out


@torch.inference_mode()
def stream(
    passes: Passes,
    image: Tensor,
    tiling: Tiling,
    parts: Sequence[Block],
    held: Tensor,
    batch_size: int = 1,
    *,
    skip_empty: bool = False,
) -> Iterator[list[Block]]:
    """The weighted mean over overlapping windows, and the mean over mirrored copies, as far as it is finished.

    Parameters
    ----------
    parts : blocks of output slices along the first axis, in order, with the slices that they need.
    held : (slices, passes.held, y, x), as deep as `schedule` says: where windows are summed up, and their weights in
        the last channel; what is finished is the mean, and one, or zero where no window was computed.
    batch_size : how many windows and mirrored copies are computed at once.
    skip_empty : leave out windows that are zero; what no other window reaches is zero too.

    Yields
    ------
    The parts that can be made now, before the next are asked for, in terms of the slices of `held`.

    Raises
    ------
    UserError : what the networks say is NaN or infinite: a decision between such logits would be background.
    """
    weight, first, finished = weight_of(passes.patch, held.dtype).to(held.device), 0, 0
    held.zero_()
    for row in schedule(tiling.axes[0], parts)[0]:
        places = [(row.span, *place) for place in itertools.product(*tiling.axes[1:])]
        for place, sums in _windows(passes, image, places, tiling.flips, batch_size, skip_empty):
            z, y, x = place
            there = held[z.inside.start - first : z.inside.stop - first, :, y.inside, x.inside]
            _add(there, sums, weight, [span.within for span in place], len(tiling.flips))
        done = held[finished - first : row.finished - first]
        total = done[:, -1:]
        done[:, :-1].div_(total.where(total > 0, 1))
        total.copy_(total > 0)
        require_finite(done, _wider(passes, held.dtype))
        yield [replace(part, low=part.low - first, high=part.high - first) for part in row.parts]
        stop = row.span.inside.stop
        for number in range(stop - row.needed):
            held[number] = held[number + row.needed - first]
        held[stop - row.needed : stop - first] = 0
        first, finished = row.needed, row.finished


def _wider(passes: Passes, sums: torch.dtype) -> str:
    """What to do about logits that are NaN or infinite, a full sentence; `sums` is the type of those over windows."""
    wider = ["--precision fp32"] if passes.precision != "fp32" else []
    if sums == torch.float16:
        wider.append("--set inference.sums=float32" if passes.half else "more --max-memory")
    if wider:
        return f"Predict with {' and '.join(wider)}, so that larger numbers fit."
    return "They were computed in float32: look at the values of the image."


def _windows(
    passes: Passes,
    image: Tensor,
    places: Sequence[Place],
    flips: Sequence[Flip],
    batch_size: int,
    skip_empty: bool,
) -> Iterator[tuple[Place, dict[int, Tensor]]]:
    """What the networks say of each window, summed up over its copies: its first held channel -> (outputs, z, y, x)."""
    copies = _copies(image, places, flips, passes.sides, skip_empty)
    sums: dict[int, Tensor] = {}
    while batch := list(itertools.islice(copies, batch_size)):
        outputs = passes.forward(torch.stack([window for _, _, window in batch]).to(passes.device))
        for (place, flip, _), output in zip(batch, outputs, strict=True):
            channel, swapped = 0, passes.sides is not None and passes.sides.axis in flip
            if swapped and passes.head is not None:
                channel = passes.outputs
            elif swapped and passes.sides is not None:
                output = output[list(passes.sides.channels)]
            output = output.flip([axis + 1 for axis in flip]) if flip else output
            sums[channel] = sums[channel].add_(output) if channel in sums else output
            if flip == flips[-1]:
                yield place, sums
                sums = {}


def _copies(
    image: Tensor, places: Iterable[Place], flips: Sequence[Flip], sides: Sides | None, skip_empty: bool
) -> Iterator[tuple[Place, Flip, Tensor]]:
    for place in places:
        window = cut(image, place)
        if skip_empty and not window.any():
            continue
        for flip in flips:
            yield place, flip, mirrored(window, flip, sides)


def _add(there: Tensor, sums: Mapping[int, Tensor], weight: Tensor, within: Sequence[slice], n_copies: int) -> None:
    """Add what was said of one window, weighted, to where it lies in what is held: (z, channels, y, x)."""
    weight = weight[tuple(within[-weight.ndim :])]
    for channel, total in sums.items():
        seen = total.div_(n_copies)[(slice(None), *within)].to(there.device).mul_(weight)
        there[:, channel : channel + len(seen)].add_(seen.transpose(0, 1))
    there[:, -1].add_(weight)
