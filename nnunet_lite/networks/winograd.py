"""Convolution with fewer multiplications on a CPU: Winograd's minimal filtering along the first axis.

Four neighbouring outputs of a filter of three taps need twelve multiplications, or six after both, filter and inputs,
were transformed by small constant matrices: F(4, 3) of Lavin & Gray 2016 (arXiv:1509.09308). Here a 3x3x3 convolution
becomes six two-dimensional ones on a quarter of the slices each, so it does half of the arithmetic; the transforms are
matrix products along z. In float32 both are equally far from the exact result, to a factor of three.

Samples run at the same time, each with threads of its own: threads that share each layer of a small network wait for
each other after every layer. Where other programs run too, that makes it up to twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from threading import Barrier, local
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

T = TypeVar("T")

# The interpolation points are 0, 1, -1, 2, -2 and infinity.
_INPUTS = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
           (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))  # fmt: skip
_FILTER = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
           (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip
_OUTPUTS = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_POINTS, _TILE = 6, 4
_ONE = 1  # the point that passes a constant, such as the bias, to every output
_LEAST_SLICES, _LEAST_CHANNELS = 8, 16  # with fewer, transforming takes longer than what it saves
_LEAST_FORWARD = 48  # channels, for a forward pass alone on a CPU without AVX-512
_BLOCK = 20  # slices that are transformed together: few, so that they stay in the cache


def is_channels_last(x: Tensor) -> bool:
    """Return whether a tensor (batch, channels, *positions) has the channels-last memory format and no other."""
    memory_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=memory_format) and not x.is_contiguous()


def is_winograd_faster(layer: nn.Conv3d, x: Tensor) -> bool:
    """Return whether `convolve_winograd` can do what the layer does with x, and is faster than torch."""
    if torch.compiler.is_compiling() or not x.is_cpu:
        return False
    fast_for_few = torch.is_grad_enabled() or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    least = _LEAST_CHANNELS if fast_for_few else _LEAST_FORWARD
    return (
        x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and layer.kernel_size == (3, 3, 3)
        and layer.stride == (1, 1, 1)
        and layer.groups == 1
        and x.shape[1] >= least
        and x.shape[2] >= _LEAST_SLICES
        and is_channels_last(x)
    )


def convolve_winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with filters of 3x3x3 and a border of zeros, in the channels-last memory format.

    Parameters
    ----------
    x : Tensor, shape (batch, channels, z, y, x)
        Features.
    weight : Tensor, shape (outputs, channels, 3, 3, 3)
        Filters.
    bias : Tensor, shape (outputs,), optional
        Constant of each output.

    Returns
    -------
    Tensor, shape (batch, outputs, z, y, x)
    """
    out: Tensor = _Winograd.apply(x, weight, bias)
    return out


@dataclass(frozen=True)
class _Block:
    """Some output slices, the input slices that they depend on, and the matrices between them.

    Parameters
    ----------
    inputs, outputs : slice
        Of the input and the output.
    shared : int
        Number of input slices that the previous block depends on too.
    analysis : Tensor, shape (points x tiles, input slices)
        Transforms inputs.
    synthesis : Tensor, shape (output slices, points x tiles)
        Transforms products back to outputs.
    """

    inputs: slice
    outputs: slice
    shared: int
    analysis: Tensor
    synthesis: Tensor


@lru_cache(maxsize=64)
def _blocks(depth: int) -> list[_Block]:
    blocks = []
    for start in range(0, depth, _BLOCK):
        stop = min(start + _BLOCK, depth)
        n_tiles = -(-(stop - start) // _TILE)
        analysis = torch.zeros(_POINTS, n_tiles, _TILE * n_tiles + 2)
        synthesis = torch.zeros(n_tiles, _TILE, _POINTS, n_tiles)
        for tile in range(n_tiles):
            analysis[:, tile, _TILE * tile : _TILE * tile + _POINTS] = torch.tensor(_INPUTS)
            synthesis[tile, :, :, tile] = torch.tensor(_OUTPUTS)
        low, high = max(0, start - 1), min(depth, stop + 1)  # slices beyond are zero and need no columns
        analysis = analysis.flatten(0, 1)[:, low - start + 1 : high - start + 1].contiguous()
        synthesis = synthesis.flatten(2).flatten(0, 1)[: stop - start]
        blocks.append(_Block(slice(low, high), slice(start, stop), 2 if start else 0, analysis, synthesis))
    return blocks


def _filters(weight: Tensor) -> list[Tensor]:
    """The two-dimensional filters of the points, from (outputs, channels, 3, 3, 3)."""
    filters = torch.einsum("pk,oikyx->poiyx", torch.tensor(_FILTER), weight)
    return [point.contiguous(memory_format=torch.channels_last) for point in filters]


def _slices(x: Tensor) -> Tensor:
    """(batch, channels, z, y, x) in channels-last format as (batch, z, y * x * channels)."""
    return x.movedim(1, -1).flatten(2)


def _images(transformed: Tensor, height: int, width: int) -> Tensor:
    """(points x tiles, y * x * channels) as (points, tiles, channels, y, x)."""
    return transformed.view(_POINTS, -1, height, width, transformed.shape[1] // (height * width)).movedim(-1, 2)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        n, _, depth, height, width = x.shape
        filters, source = _filters(weight), _slices(x)
        ctx.filters = filters
        # not a view of another tensor, so that an activation may overwrite it
        result = torch.empty((n, len(weight), depth, height, width), memory_format=torch.channels_last_3d)
        out = _slices(result)

        def convolve(samples: range) -> None:
            for i, block in product(samples, _blocks(depth)):  # so that transformed slices stay in the cache
                inputs = _images(block.analysis @ source[i, block.inputs], height, width)
                products = x.new_empty(len(block.analysis), out.shape[2])
                for point, image in enumerate(_images(products, height, width)):
                    image.copy_(F.conv2d(inputs[point], filters[point], bias if point == _ONE else None, padding=1))
                torch.mm(block.synthesis, products, out=out[i, block.outputs])

        map_samples(n, convolve)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        n, _, depth, height, width = x.shape
        filters, source = ctx.filters, _slices(x)
        upstream = _slices(grad.contiguous(memory_format=torch.channels_last_3d))
        needs_x, grad_x = ctx.needs_input_grad[0], torch.empty_like(source)

        def differentiate(samples: range) -> tuple[Tensor, Tensor]:
            grad_filters, grad_bias = torch.zeros(_POINTS, *filters[0].shape), torch.zeros(len(weight))
            for i, block in product(samples, _blocks(depth)):
                inputs = block.analysis @ source[i, block.inputs]
                outputs = _images(block.synthesis.t() @ upstream[i, block.outputs], height, width)
                for point, image in enumerate(_images(inputs, height, width)):
                    to_image, to_filter, to_bias = torch.ops.aten.convolution_backward(
                        outputs[point], image, filters[point], [len(weight)], (1, 1), (1, 1), (1, 1), False, (0, 0), 1,
                        (needs_x, True, point == _ONE),
                    )  # fmt: skip
                    grad_filters[point] += to_filter
                    if point == _ONE:
                        grad_bias += to_bias
                    if needs_x:
                        image.copy_(to_image)  # the inputs are not needed any more
                if needs_x:
                    target = grad_x[i, block.inputs]
                    shared = target[: block.shared].clone()
                    torch.mm(block.analysis.t(), inputs, out=target)
                    target[: block.shared] += shared
            return grad_filters, grad_bias

        parts = zip(*map_samples(n, differentiate), strict=True)
        grad_filters, grad_bias = (sum(tensors[1:], tensors[0]) for tensors in parts)
        grad_weight = torch.einsum("pk,poiyx->oikyx", torch.tensor(_FILTER), grad_filters)
        grad_x = grad_x.view(n, depth, height, width, -1).movedim(-1, 1)
        return grad_x if needs_x else None, grad_weight, grad_bias if ctx.needs_input_grad[2] else None


# ------------------------------------------------------------------------------------------------ threads

_thread = local()  # in_pool: whether this thread is one of several of a pool


@lru_cache(maxsize=4)
def thread_pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Make a pool of workers, each of which computes with its own number of torch threads.

    When a thread first asks torch for its number of threads, it inherits the number that any thread set last. So each
    worker asks before it sets its number, and this thread restores its own.
    """
    previous, started = torch.get_num_threads(), Barrier(workers)

    def start() -> None:
        torch.get_num_threads()
        torch.set_num_threads(threads)
        _thread.in_pool = workers > 1

    pool = ThreadPoolExecutor(workers, initializer=start)
    try:
        list(pool.map(lambda _: started.wait(), range(workers)))
    except RuntimeError:  # the system starts no more threads; those that wait would not let this process end
        started.abort()
        raise
    torch.set_num_threads(previous)
    return pool


@contextmanager
def limit_threads(n: int) -> Iterator[None]:
    """Let this thread compute with n torch threads for the duration of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def map_samples(n: int, work: Callable[[range], T]) -> list[T]:
    """Work on n samples in equal parts at the same time, then on the rest with all threads.

    `work` records no gradients. Inside a worker of a pool samples are not divided again.

    Returns
    -------
    list
        The result of each part in order, so that sums over them do not depend on which part ended first.
    """
    threads = torch.get_num_threads()
    workers = 1 if getattr(_thread, "in_pool", False) else min(threads, n)
    size = n // workers if workers > 1 else 0
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad  # each thread has its own

    def work_in_mode(samples: range) -> T:
        with mode():
            return work(samples)

    parts = [range(k * size, (k + 1) * size) for k in range(workers)] if size else []
    results = list(thread_pool(workers, threads // workers).map(work_in_mode, parts)) if parts else []
    rest = range(size * workers, n)
    return [*results, work(rest)] if rest else results
