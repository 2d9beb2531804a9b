"""Run networks on overlapping windows and average their outputs, in memory that does not grow with the image.

`build_sliding_window` makes one function of the networks of all folds. `average_windows` runs it on the windows of an
image, row after row along the first axis: slices that no later row reaches are finished, and the caller uses them
before it asks for the next. What is in memory is as deep as a patch.

What is averaged need not be logits. The last layer of a U-Net is linear in each voxel, as are the means over windows,
mirrored copies and folds, and resampling, so it can be applied last. If there are more classes than features, features
are averaged and resampled, and the logits of a few thousand voxels at a time are computed from them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_lite.inference.windows import (
    Flip,
    LabelSwap,
    Place,
    Tiling,
    cut_window,
    gaussian_weight,
    mirror_window,
    mirrorings,
    schedule,
    tile,
)
from nnunet_lite.networks.precision import DTYPES, ComputeFormat
from nnunet_lite.networks.unet import UNet, one_hot
from nnunet_lite.networks.winograd import thread_pool
from nnunet_lite.planning.schema import Configuration
from nnunet_lite.preprocessing.pipeline import require_finite
from nnunet_lite.preprocessing.resampling import Block, blocks

Function = Callable[[Tensor], Tensor]

_FEATURE_TENSORS = 9  # a U-Net has at most this many tensors of the size of its first stage in memory at once
_MIN_SAMPLES = 2  # torch upsamples a single small sample on a CPU without oneDNN, which is slower
_CPU_VOXELS = 1 << 18  # of the windows that a thread computes at once; more does not fit its cache
_SMALL, _LARGE = 1 << 27, 1 << 30  # bytes that a network needs for a window, below or from which it counts as such
_SLICES = 16  # of a whole prediction that are finished at once


@dataclass(frozen=True)
class SlidingWindow:
    """The networks of a model as one function of windows, and the mirrored copies that are averaged.

    Parameters
    ----------
    forward : callable
        Maps windows (batch, inputs, z, y, x) to (batch, outputs, z, y, x), float32, on `device`.
    outputs : int
        Number of channels that it returns: the logits or, with a head, the features of all folds.
    patch : tuple of int
        Size of a window: three axes, or two for a two-dimensional network, which computes each slice alone.
    flips : tuple of tuple of int
        The mirrored copies that are averaged.
    device : torch.device
        Where it computes.
    at_once : int
        How many windows and mirrored copies are fastest together.
    window_bytes : int
        Memory that a network needs for each of them.
    head : ndarray, shape (logits, channels), optional
        The last layers of the networks, float32, if `forward` returns features. Channels are the features, those of
        swapped copies (with `swap`), and the weight, which the bias multiplies.
    swap : LabelSwap, optional
        Labels that change places in mirrored copies.
    half : bool
        Sum logits in float16, as nnU-Net does. The result differs from float32 only in close decisions, but a model of
        nnU-Net must decide them as nnU-Net does.
    precision : str
        Of the networks' arithmetic.
    """

    forward: Function
    outputs: int
    patch: tuple[int, ...]
    flips: tuple[Flip, ...]
    device: torch.device
    at_once: int
    window_bytes: int
    head: np.ndarray | None = None
    swap: LabelSwap | None = None
    half: bool = False
    precision: str = "fp32"

    @property
    def channels(self) -> int:
        """Number of channels that are summed over windows, the weights as the last one."""
        return self.outputs + 1 if self.head is None else self.head.shape[1]

    def tile(self, shape: Sequence[int], step: float, at_once: int) -> tuple[Tiling, int]:
        """Return the windows of an image (z, y, x), and how many windows and copies form a batch.

        Windows of a two-dimensional network are `at_once` slices thick, and at most as thick as the image.
        """
        slices = min(at_once, shape[0]) if len(self.patch) == 2 else 1
        return tile(shape, self.patch, step, self.flips, slices), max(1, at_once // slices)


def build_sliding_window(
    networks: Sequence[nn.Module],
    configuration: Configuration,
    n_logits: int,
    arithmetic: ComputeFormat,
    device: torch.device,
    *,
    mirror_axes: Sequence[int] = (),
    swap: LabelSwap | None = None,
    n_previous: int | None = None,
    whole: bool = False,
    half: bool = False,
    compiled: bool = False,
) -> SlidingWindow:
    """Make one function of the networks of a model's folds, which averages their logits.

    Parameters
    ----------
    networks : sequence of Module
        On `device`, in evaluation mode, without deep supervision.
    configuration : Configuration
        Planned patch and network.
    n_logits : int
        Number of output channels.
    arithmetic : ComputeFormat
        Precision and memory format.
    device : torch.device
        Where the networks are.
    mirror_axes : sequence of int
        Axes of the patch along which mirrored copies are averaged.
    swap : LabelSwap, optional
        Labels that change places in mirrored copies.
    n_previous : int, optional
        Number of classes of the previous stage, if the last input channel contains them; networks get them one-hot.
    whole : bool
        Always return logits; otherwise features, if there are fewer of them.
    half : bool
        Sum logits in float16, as in `SlidingWindow`.
    compiled : bool
        Whether torch.compile made the networks; then one thread calls them.
    """
    patch, flat = configuration.patch_size, configuration.dimensions == 2
    flips = tuple(mirrorings([axis + flat for axis in mirror_axes]))
    unets = [network for network in networks if isinstance(network, UNet)]
    head = None if whole or len(unets) < len(networks) else _head(unets, n_logits, flips, swap)
    bodies: Sequence[nn.Module] = networks if head is None else [_without_head(network) for network in unets]

    @torch.inference_mode()
    def forward(x: Tensor) -> Tensor:
        if n_previous is not None:
            x = torch.cat([x[:, :-1], one_hot(x[:, -1], n_previous).to(x.dtype)], 1)
        x = arithmetic.arrange(x)
        with arithmetic.autocast(device):
            outputs = [network(x).float() for network in bodies]
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs, 1) if head is not None else torch.stack(outputs).mean(0)

    item = DTYPES[arithmetic.precision].itemsize
    size = _FEATURE_TENSORS * configuration.network.features[0] * prod(patch) * item
    function = _by_slice(forward) if flat else forward
    if size < _SMALL and device.type == "cpu" and not compiled:
        function = _in_shares(function, torch.get_num_threads())
    return SlidingWindow(
        forward=function,
        outputs=n_logits if head is None else sum(network.spec.features[0] for network in unets),
        patch=patch,
        flips=flips,
        device=device,
        at_once=_windows_at_once(configuration, size, device),
        window_bytes=size,
        head=head,
        swap=swap,
        half=half and head is None,
        precision=arithmetic.precision,
    )


def _by_slice(forward: Function) -> Function:
    """Make a function of (batch, channels, z, y, x) of one of (batch, channels, y, x), which gets each slice alone."""

    def slices(x: Tensor) -> Tensor:
        batch, channels, depth, *plane = x.shape
        out = forward(x.transpose(1, 2).reshape(batch * depth, channels, *plane))
        return out.reshape(batch, depth, *out.shape[1:]).transpose(1, 2)

    return slices


def _in_shares(forward: Function, threads: int) -> Function:
    """Compute the samples of a batch in equal shares, each in threads of its own, on a CPU.

    Threads that share each layer of a small network wait for each other after each layer. Where other programs run too,
    shares are twice as fast.
    """

    def shares(x: Tensor) -> Tensor:
        workers = min(threads, len(x) // _MIN_SAMPLES)
        if workers < 2:
            return forward(x)
        return torch.cat(list(thread_pool(workers, threads // workers).map(forward, x.tensor_split(workers))))

    return shares


def _windows_at_once(configuration: Configuration, size: int, device: torch.device) -> int:
    """Return how many windows are fastest together; a network needs `size` bytes for each.

    On a GPU as many as in a training step. On a CPU at least two for each thread, or for all threads together if they
    are not small.
    """
    if device.type != "cpu":
        return configuration.batch_size
    few = int(np.clip(_CPU_VOXELS // prod(configuration.patch_size), _MIN_SAMPLES, 64))
    if size < _SMALL:
        return few * torch.get_num_threads()
    return _MIN_SAMPLES if size < _LARGE else 1


def _head(unets: Sequence[UNet], n_logits: int, flips: Sequence[Flip], swap: LabelSwap | None) -> np.ndarray | None:
    """Return the last layers of all folds as one matrix, as in `SlidingWindow`; None if there are fewer logits.

    The features of a copy with swapped labels give other logits: those of the label on the other side.
    """
    swapped = 0.0 if swap is None else sum(swap.axis in flip for flip in flips) / len(flips)
    n_features = sum(network.spec.features[0] for network in unets)
    if (2 if swapped else 1) * n_features + 1 >= n_logits:
        return None
    layers = [network.heads[-1].state_dict() for network in unets]
    weight = torch.cat([layer["weight"].flatten(1) for layer in layers], 1).cpu().numpy() / len(layers)
    bias = torch.stack([layer["bias"] for layer in layers]).mean(0).cpu().numpy()[:, None]
    if swapped and swap is not None:
        order = list(swap.channels)
        weight, bias = np.hstack([weight, weight[order]]), (1 - swapped) * bias + swapped * bias[order]
    return np.ascontiguousarray(np.hstack([weight, bias]), np.float32)


def _without_head(network: UNet) -> UNet:
    """Return the same network, with the same weights, that returns the features of its finest decoder stage."""
    body = copy.copy(network)
    body._modules = {**network._modules, "heads": nn.ModuleList([*network.heads[:-1], nn.Identity()])}
    return body


def predict_logits(window: SlidingWindow, image: np.ndarray, step: float = 0.5) -> Tensor:
    """Predict the logits of a whole preprocessed image.

    Parameters
    ----------
    window : SlidingWindow
        Without a head.
    image : ndarray, shape (channels, z, y, x)
        The preprocessed image, float32.
    step : float
        Distance of two windows, as a share of the patch.

    Returns
    -------
    Tensor, shape (logits, z, y, x)
        float32, on the CPU.
    """
    depth, *plane = image.shape[1:]
    tiling, batch_size = window.tile(image.shape[1:], step, window.at_once)
    parts = blocks(depth, depth, 1, _SLICES)
    out = torch.empty(window.outputs, depth, *plane)
    dtype = torch.float16 if window.half else torch.float32
    sums = torch.empty(schedule(tiling.axes[0], parts)[1], window.channels, *plane, dtype=dtype)
    for finished in average_windows(window, image, tiling, parts, sums, batch_size):
        for part in finished:
            out[:, part.start : part.stop] = sums[part.low : part.high, :-1].transpose(0, 1)
    return out


@torch.inference_mode()
def average_windows(
    window: SlidingWindow,
    image: np.ndarray,
    tiling: Tiling,
    parts: Sequence[Block],
    sums: Tensor,
    batch_size: int = 1,
    *,
    skip_empty: bool = False,
) -> Iterator[list[Block]]:
    """Run the networks on all windows, and yield blocks of slices as soon as their weighted means are finished.

    Parameters
    ----------
    window : SlidingWindow
        The networks.
    image : ndarray, shape (channels, z, y, x)
        The preprocessed image, float32.
    tiling : Tiling
        The windows.
    parts : sequence of Block
        Blocks of output slices along the first axis, in order, with the slices that they need.
    sums : Tensor, shape (slices, channels, y, x)
        Where windows are summed, as deep as `schedule` returns; weights are the last channel. Finished slices contain
        the mean, and the weight 1, or 0 where no window was computed.
    batch_size : int
        How many windows and mirrored copies are computed at once.
    skip_empty : bool
        Leave out windows that are zero; the outputs that no other window reaches are zero too.

    Yields
    ------
    list of Block
        The parts that can be computed now, before the next ones are computed, in terms of the slices of `sums`.

    Raises
    ------
    UserError
        Outputs of the networks are NaN or infinite; a decision between such logits would be background.
    """
    weight = torch.from_numpy(gaussian_weight(window.patch, sums.dtype == torch.float16)).to(sums.device)
    first, finished = 0, 0
    sums.zero_()
    for row in schedule(tiling.axes[0], parts)[0]:
        places = [(row.span, *place) for place in itertools.product(*tiling.axes[1:])]
        for place, outputs in _window_outputs(window, image, places, tiling.flips, batch_size, skip_empty):
            z, y, x = place
            target = sums[z.inside.start - first : z.inside.stop - first, :, y.inside, x.inside]
            _add_window(target, outputs, weight, [span.within for span in place], len(tiling.flips))
        done = sums[finished - first : row.finished - first]
        total = done[:, -1:]
        done[:, :-1].div_(total.where(total > 0, 1))
        total.copy_(total > 0)
        require_finite(done, _suggest_wider_type(window, sums.dtype))
        yield [replace(part, low=part.low - first, high=part.high - first) for part in row.parts]
        stop = row.span.inside.stop
        for number in range(stop - row.needed):
            sums[number] = sums[number + row.needed - first]
        sums[stop - row.needed : stop - first] = 0
        first, finished = row.needed, row.finished


def _window_outputs(
    window: SlidingWindow,
    image: np.ndarray,
    places: Sequence[Place],
    flips: Sequence[Flip],
    batch_size: int,
    skip_empty: bool,
) -> Iterator[tuple[Place, dict[int, Tensor]]]:
    """Yield the outputs of each window, summed over its copies: first channel in the sums -> (outputs, z, y, x)."""
    cut = ((place, cut_window(image, place)) for place in places)
    kept = ((place, voxels) for place, voxels in cut if not skip_empty or voxels.any())
    copies = ((place, flip, mirror_window(voxels, flip, window.swap)) for place, voxels in kept for flip in flips)
    outputs: dict[int, Tensor] = {}
    while batch := list(itertools.islice(copies, batch_size)):
        computed = window.forward(torch.from_numpy(np.stack([sample for _, _, sample in batch])).to(window.device))
        for (place, flip, _), output in zip(batch, computed, strict=True):
            channel, swapped = 0, window.swap is not None and window.swap.axis in flip
            if swapped and window.head is not None:
                channel = window.outputs
            elif swapped and window.swap is not None:
                output = output[list(window.swap.channels)]
            output = output.flip([axis + 1 for axis in flip]) if flip else output
            outputs[channel] = outputs[channel].add_(output) if channel in outputs else output
            if flip == flips[-1]:
                yield place, outputs
                outputs = {}


def _add_window(
    target: Tensor, outputs: Mapping[int, Tensor], weight: Tensor, within: Sequence[slice], n_copies: int
) -> None:
    """Add the weighted outputs of one window to its place in the sums, (z, channels, y, x)."""
    weight = weight[tuple(within[-weight.ndim :])]
    for channel, total in outputs.items():
        mean = total.div_(n_copies)[(slice(None), *within)].to(target.device).mul_(weight)
        target[:, channel : channel + len(mean)].add_(mean.transpose(0, 1))
    target[:, -1].add_(weight)


def _suggest_wider_type(window: SlidingWindow, sums: torch.dtype) -> str:
    """Return what to do about logits that are NaN or infinite; `sums` is the type of the sums over windows."""
    wider = ["--precision fp32"] if window.precision != "fp32" else []
    if sums == torch.float16:
        wider.append("--set inference.sums=float32" if window.half else "more --max-memory")
    if wider:
        return f"Predict with {' and '.join(wider)}, so that larger numbers fit."
    return "They were computed in float32: look at the values of the image."
