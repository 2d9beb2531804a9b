"""Run networks on overlapping windows and average their outputs, in memory that does not grow with the image.

`SlidingWindow` is the networks of all folds as one function. `average_windows` runs it on the windows of an image, row
after row along the first axis: slices that no later row reaches are finished, and the caller uses them before it asks
for the next. What is in memory is as deep as a patch.

What is averaged need not be logits. The last layer of a U-Net is linear in each voxel, as are the means over windows,
mirrored copies and folds, and resampling, so it can be applied last. If there are more classes than features, features
are averaged and resampled, and the logits of a few thousand voxels at a time are computed from them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_lite.inference.windows import Flip, Place, Span, gaussian_weight, mirrorings, schedule, tile
from nnunet_lite.networks.precision import DTYPES, ComputeFormat
from nnunet_lite.networks.unet import EncoderDecoder, one_hot
from nnunet_lite.networks.winograd import thread_pool
from nnunet_lite.planning.schema import Configuration
from nnunet_lite.planning.swaps import ClassSwap
from nnunet_lite.planning.topology import EXPANSION
from nnunet_lite.preprocessing.resampling import Block

_FEATURE_TENSORS = 5  # of the size of its first stage, that a U-Net has in memory at once: in its last norm
_MIN_SAMPLES = 2  # torch upsamples a single small sample on a CPU without oneDNN, which is slower
_CPU_VOXELS = 1 << 18  # of the windows that a thread computes at once; more does not fit its cache
_SMALL, _LARGE = 75_000_000, 600_000_000  # bytes that a network needs for a window: a small and a large one


@dataclass(frozen=True, eq=False)
class SlidingWindow:
    """The networks of a model as one function of windows, and the mirrored copies that are averaged.

    Parameters
    ----------
    networks : tuple of Module
        Of the folds, on `device`, in evaluation mode, without deep supervision.
    configuration : Configuration
        Planned patch and network. A two-dimensional network computes each slice of a window alone.
    n_logits : int
        Number of output channels of a network.
    arithmetic : ComputeFormat
        Precision and memory format.
    device : torch.device
        Where the networks are.
    mirror_axes : tuple of int
        Axes of the patch along which mirrored copies are averaged.
    swap : ClassSwap, optional
        Labels that change places in mirrored copies.
    n_classes : int, optional
        Number of classes of a first stage, if the last input channel contains them; networks get them one-hot.
    sums : torch.dtype
        Type in which logits are summed over windows, unless memory is short: float32; or float16, as nnU-Net does. The
        results differ only in close decisions, but a model of nnU-Net must decide them as nnU-Net does.
    compiled : bool
        Whether torch.compile made the networks; then one thread calls them.
    """

    networks: tuple[nn.Module, ...]
    configuration: Configuration
    n_logits: int
    arithmetic: ComputeFormat
    device: torch.device
    mirror_axes: tuple[int, ...] = ()
    swap: ClassSwap | None = None
    n_classes: int | None = None
    sums: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def patch(self) -> tuple[int, ...]:
        """Size of a window: three axes, or two for a two-dimensional network."""
        return self.configuration.patch_size

    @property
    def flips(self) -> tuple[Flip, ...]:
        """The mirrored copies that are averaged, by the axes (of three) that they flip."""
        return tuple(mirrorings([axis + 3 - len(self.patch) for axis in self.mirror_axes]))

    @cached_property
    def head(self) -> np.ndarray | None:
        """The last layers of all folds as one matrix (logits, channels); None if there are fewer logits than features.

        Channels are the features of all folds, those of swapped copies (with `swap`), and the weight, which the bias
        multiplies. Features of a copy with swapped labels give other logits: those of the label on the other side.
        """
        planned = [network for network in self.networks if isinstance(network, EncoderDecoder)]
        swapped = 0.0
        if self.swap is not None:
            swapped = sum(self.swap.axis in flip for flip in self.flips) / len(self.flips)
        n_features = sum(network.spec.features[0] for network in planned)
        if len(planned) < len(self.networks) or (2 if swapped else 1) * n_features + 1 >= self.n_logits:
            return None
        layers = [network.heads[-1].state_dict() for network in planned]
        weight = torch.cat([layer["weight"].flatten(1) for layer in layers], 1).cpu().numpy() / len(layers)
        bias = torch.stack([layer["bias"] for layer in layers]).mean(0).cpu().numpy()[:, None]
        if swapped and self.swap is not None:
            order = list(self.swap.channels)
            weight, bias = np.hstack([weight, weight[order]]), (1 - swapped) * bias + swapped * bias[order]
        return np.ascontiguousarray(np.hstack([weight, bias]), np.float32)

    @cached_property
    def _bodies(self) -> list[nn.Module]:
        """The networks; with a head, they return the features of their finest decoder stage."""
        if self.head is None:
            return list(self.networks)
        bodies = [copy.copy(network) for network in self.networks]
        for body, network in zip(bodies, self.networks, strict=True):
            heads = nn.ModuleList([*network.get_submodule("heads").children()][:-1]).append(nn.Identity())
            body._modules = {**network._modules, "heads": heads}
        return bodies

    @cached_property
    def _swap_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """The `channels` of the swapped labels, and their `table` if an input has classes, on the device, or None."""
        if self.swap is None:
            return None, None
        table = None if self.n_classes is None else torch.tensor(self.swap.table).float().to(self.device)
        return torch.tensor(self.swap.channels).to(self.device), table

    @property
    def outputs(self) -> int:
        """Number of channels that `forward` returns: the logits or, with a head, the features of all folds."""
        return self.n_logits if self.head is None else len(self.networks) * self.configuration.network.features[0]

    @property
    def channels(self) -> int:
        """Number of channels that are summed over windows, the weights as the last one."""
        return self.outputs + 1 if self.head is None else self.head.shape[1]

    @property
    def half(self) -> bool:
        """Whether logits are summed and rounded as nnU-Net does it."""
        return self.sums == torch.float16 and self.head is None

    @property
    def window_bytes(self) -> int:
        """Memory that the activations of a network need for a window, or for a slice of one."""
        item, network = DTYPES[self.arithmetic.precision].itemsize, self.configuration.network
        tensors = _FEATURE_TENSORS
        if network.kind in EXPANSION:  # before and after the GELU of the last upsampling, which has twice the channels
            tensors = 4 * EXPANSION[network.kind][0] + 2
        return tensors * network.features[0] * prod(self.patch) * item

    @property
    def at_once(self) -> int:
        """How many windows and mirrored copies are fastest together.

        On a GPU as many as in a training step. On a CPU at least two for each thread, or for all threads together if
        they are not small.
        """
        if self.device.type != "cpu":
            return self.configuration.batch_size
        if self.window_bytes < _SMALL:
            return int(np.clip(_CPU_VOXELS // prod(self.patch), _MIN_SAMPLES, 64)) * torch.get_num_threads()
        return _MIN_SAMPLES if self.window_bytes < _LARGE else 1

    def tile(self, shape: Sequence[int], step: float, at_once: int) -> tuple[tuple[tuple[Span, ...], ...], int]:
        """Return the windows of an image (z, y, x) along each axis, and how many windows and copies form a batch.

        Windows of a two-dimensional network are `at_once` slices thick, and at most as thick as the image.
        """
        slices = min(at_once, shape[0]) if len(self.patch) == 2 else 1
        return tile(shape, self.patch, step, slices), max(1, at_once // slices)

    @torch.inference_mode()
    def forward(self, windows: Tensor, n_samples: int = 0) -> Tensor:
        """Map windows (batch, inputs, z, y, x) to logits or features (batch, outputs, z, y, x), float32.

        On a CPU, samples of a small network are computed in equal shares, each in threads of its own: threads that
        share each layer wait for each other after each layer. Where other programs run too, that is twice as fast. On a
        GPU, fewer than `n_samples` are filled up with zeros: cuDNN searches the fastest algorithm for each number.
        """
        flat = len(self.patch) == 2
        x = windows.transpose(1, 2).flatten(0, 1) if flat else windows
        n, threads = len(x), torch.get_num_threads()
        workers = min(threads, n // _MIN_SAMPLES)
        if self.device.type == "cuda":
            x = torch.cat([x, x.new_zeros(max(0, n_samples - n), *x.shape[1:])])
            with self.arithmetic.search_algorithms():
                out = self._mean_of_folds(x)[:n]
        elif workers < 2 or self.device.type != "cpu" or self.compiled or self.window_bytes >= _SMALL:
            out = self._mean_of_folds(x)
        else:
            pool = thread_pool(workers, threads // workers)
            out = torch.cat(list(pool.map(self._mean_of_folds, x.tensor_split(workers))))
        return out.unflatten(0, (len(windows), -1)).transpose(1, 2) if flat else out

    @torch.inference_mode()
    def _mean_of_folds(self, x: Tensor) -> Tensor:
        """Compute samples (batch, inputs, *patch); logits are averaged, features of all folds are channels."""
        if self.n_classes is not None:
            x = torch.cat([x[:, :-1], one_hot(x[:, -1], self.n_classes).to(x.dtype)], 1)
        x = self.arithmetic.arrange(x)
        with self.arithmetic.autocast(self.device):
            if len(self.networks) == 1:
                output: Tensor = self._bodies[0](x).float()
                return output
            total = torch.zeros(len(x), self.outputs, *x.shape[2:], device=x.device)
            n_each = self.n_logits if self.head is None else self.outputs // len(self.networks)
            for number, network in enumerate(self._bodies):
                first = 0 if self.head is None else number * n_each
                total[:, first : first + n_each] += network(x)  # without a name, it is freed before the next one
        return total.div_(len(self.networks)) if self.head is None else total


@torch.inference_mode()
def average_windows(
    window: SlidingWindow,
    image: np.ndarray,
    tiling: Sequence[Sequence[Span]],
    parts: Sequence[Block],
    sums: Tensor,
    batch_size: int = 1,
    *,
    skip_empty: bool = False,
    advance: Callable[[int], object] = lambda n_windows: None,
) -> Iterator[tuple[list[Block], Tensor]]:
    """Run the networks on all windows, and yield blocks of slices as soon as their weighted means are finished.

    Nothing here waits for a GPU: windows are computed while the ones after them are cut out.

    Parameters
    ----------
    window : SlidingWindow
        The networks.
    image : ndarray, shape (channels, z, y, x)
        The preprocessed image, float32. The slices of a row of windows go to the device at once.
    tiling : sequence of sequence of Span
        The windows along each axis, from `SlidingWindow.tile`.
    parts : sequence of Block
        Blocks of output slices along the first axis, in order, with the slices that they need.
    sums : Tensor, shape (slices, channels, y, x)
        Where windows are summed, as deep as `schedule` returns; weights are the last channel. Finished slices contain
        the mean, and the weight 1, or 0 where no window was computed.
    batch_size : int
        How many windows and mirrored copies are computed at once.
    skip_empty : bool
        Leave out windows that are zero; the outputs that no other window reaches are zero too.
    advance : callable
        Called with the number of windows that were computed or left out, as `log.working` gives it.

    Yields
    ------
    parts : list of Block
        Those that can be computed now, before the next ones are computed, in terms of the slices of `sums`.
    finished : Tensor, shape (slices, channels, y, x)
        The slices of `sums` that are finished now, and were not before.
    """
    weight = torch.from_numpy(gaussian_weight(window.patch, sums.dtype == torch.float16)).to(sums.device)
    n_samples = batch_size * (tiling[0][0].size if len(window.patch) == 2 else 1)
    rows, _ = schedule(tiling[0], parts)
    first = finished = rows[0].span.inside.start
    sums.zero_()
    for row in rows:
        inside = row.span.inside
        places = [(row.span, *place) for place in itertools.product(*tiling[1:])]
        if skip_empty:
            places = [place for place in places if image[:, *(span.inside for span in place)].any()]
        advance(prod(map(len, tiling[1:])) - len(places))
        slab = torch.from_numpy(image[:, inside])
        if window.device.type == "cuda":  # the host waits where a copy is not contiguous, as of several channels
            slab = slab.contiguous().pin_memory().to(window.device, non_blocking=True)
        for place, total in _window_outputs(window, slab.to(window.device), places, batch_size, n_samples):
            _, y, x = place
            within = [span.within for span in place]
            target = sums[inside.start - first : inside.stop - first, :, y.inside, x.inside]
            weight_inside = weight[tuple(within[-weight.ndim :])]
            mean = total.div_(len(window.flips))[(slice(None), *within)].to(sums.device).mul_(weight_inside)
            target[:, :-1].add_(mean.transpose(0, 1))
            target[:, -1].add_(weight_inside)
            advance(1)
        done = sums[finished - first : row.finished - first]
        covered = done[:, -1:]
        done[:, :-1].div_(covered.where(covered > 0, 1))
        covered.copy_(covered > 0)
        yield [replace(part, low=part.low - first, high=part.high - first) for part in row.parts], done
        kept, shift = inside.stop - row.needed, row.needed - first
        for start in range(0, kept if shift else 0, max(1, shift)):  # ranges that do not overlap
            stop = min(start + shift, kept)
            sums[start:stop] = sums[start + shift : stop + shift]
        sums[kept : inside.stop - first] = 0
        first, finished = row.needed, row.finished


def _window_outputs(
    window: SlidingWindow, slab: Tensor, places: Sequence[Place], batch_size: int, n_samples: int
) -> Iterator[tuple[Place, Tensor]]:
    """Yield the outputs of each window in a slab, summed over its mirrored copies: (channels but weight, z, y, x)."""
    (order, table), flips = window._swap_tables, window.flips
    total = torch.empty(0)
    copies = itertools.product(places, flips)
    while batch := list(itertools.islice(copies, batch_size)):
        swapped = [window.swap is not None and window.swap.axis in flip for _, flip in batch]
        samples = [_cut_window(slab, *copy, table if swap else None) for copy, swap in zip(batch, swapped, strict=True)]
        outputs = window.forward(torch.stack(samples), n_samples)
        for number, (place, flip) in enumerate(batch):
            output, channel = outputs[number], 0
            if swapped[number] and window.head is not None:  # features of swapped copies are summed apart
                channel = window.outputs
            elif swapped[number]:
                output = output[order]
            if flip:
                output = output.flip([axis + 1 for axis in flip])
            if flip == flips[0]:
                total = output.new_zeros(window.channels - 1, *output.shape[1:])
            total[channel : channel + len(output)] += output
            if flip == flips[-1]:
                yield place, total
        del output, outputs, samples  # or they would be in memory beside the next ones


def _cut_window(slab: Tensor, place: Place, flip: Flip, classes: Tensor | None = None) -> Tensor:
    """Cut a window (channels, z, y, x) out of its slab, with zeros outside of the image, and mirror it.

    `classes` : for each class in the last channel, the one that takes its place.
    """
    z, y, x = place
    window = slab[:, :, y.inside, x.inside]
    if any((*z.outside, *y.outside, *x.outside)):
        window = F.pad(window, (*x.outside, *y.outside, *z.outside))
    if flip:
        window = window.flip([axis + 1 for axis in flip])
    if classes is not None:
        window[-1] = classes[window[-1].long()]
    return window


def suggest_wider_type(window: SlidingWindow, sums: torch.dtype) -> str:
    """Return what to do about logits that are NaN or infinite; `sums` is the type of the sums over windows."""
    wider = ["--precision fp32"] if window.arithmetic.precision != "fp32" else []
    if sums == torch.float16:
        wider.append("--set inference.sums=float32" if window.half else "more --max-memory")
    if wider:
        return f"Predict with {' and '.join(wider)}, so that larger numbers fit."
    return "They were computed in float32: look at the values of the image."
