"""Convolution with fewer multiplications on a CPU: Winograd's minimal filtering along the first axis.

Four neighbouring outputs of a filter of three taps need twelve multiplications, or six after both, filter and inputs,
were transformed by small constant matrices: F(4, 3) of Lavin & Gray 2016 (arXiv:1509.09308). Here a 3x3x3 convolution
becomes six two-dimensional ones on a quarter of the slices each, so it does half of the arithmetic; the transforms are
matrix products along z. Without them nothing is left to gain there: the direct one runs at the peak of the processor.
In float32 both are equally far from the exact result, to a factor of three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_lite.networks.norm import is_channels_last
from nnunet_lite.networks.threads import in_shares

# The interpolation points are 0, 1, -1, 2, -2 and infinity.
_INPUTS = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
           (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))  # fmt: skip
_FILTER = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
           (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip
_OUTPUTS = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_POINTS, _TILE = 6, 4
_ONE = 1  # the point at which a constant, such as the bias, is seen in every output
_LEAST_SLICES, _LEAST_CHANNELS = 8, 16  # with less, transforming takes longer than what it saves
_LEAST_FORWARD = 48  # channels, where the forward pass is all and the CPU has no AVX-512 for its products
_BLOCK = 20  # slices that are transformed at once: few, so that they stay in the cache


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with filters of 3x3x3 and a border of zeros, in channels-last layout."""
    out: Tensor = _Winograd.apply(x, weight, bias)
    return out


def saves_time(layer: nn.Conv3d, x: Tensor) -> bool:
    """Whether `convolved` can do what the layer does with x, and is faster than torch."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and layer.kernel_size == (3, 3, 3)
        and layer.stride == (1, 1, 1)
        and x.shape[1] >= _least_channels()
        and x.shape[2] >= _LEAST_SLICES
        and is_channels_last(x)
        and not torch.compiler.is_compiling()
    )


def _least_channels() -> int:
    if torch.is_grad_enabled() or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return _LEAST_CHANNELS
    return _LEAST_FORWARD


@dataclass(frozen=True)
class _Block:
    """Some slices of the output, the slices of the input that they depend on, and the matrices between them."""

    inputs: slice
    outputs: slice
    shared: int  # slices of the input that the block before depends on, too
    take: Tensor  # (points x tiles, input slices)
    give: Tensor  # (output slices, points x tiles)


@lru_cache(maxsize=64)
def _blocks(depth: int) -> tuple[_Block, ...]:
    return tuple(_block(start, min(start + _BLOCK, depth), depth) for start in range(0, depth, _BLOCK))


def _block(start: int, stop: int, depth: int) -> _Block:
    n_tiles = -(-(stop - start) // _TILE)
    take = torch.zeros(_POINTS, n_tiles, _TILE * n_tiles + 2)
    give = torch.zeros(n_tiles, _TILE, _POINTS, n_tiles)
    for tile in range(n_tiles):
        take[:, tile, _TILE * tile : _TILE * tile + _POINTS] = torch.tensor(_INPUTS)
        give[tile, :, :, tile] = torch.tensor(_OUTPUTS)
    low, high = max(0, start - 1), min(depth, stop + 1)  # beyond them lie zeros, which need no columns
    columns = slice(low - start + 1, high - start + 1)
    return _Block(
        slice(low, high),
        slice(start, stop),
        2 if start else 0,
        take.flatten(0, 1)[:, columns].contiguous(),
        give.flatten(2).flatten(0, 1)[: stop - start],
    )


def _filters(weight: Tensor) -> list[Tensor]:
    """The two-dimensional filters, one for each point, from (out, in, 3, 3, 3)."""
    found = torch.einsum("pk,oikyx->poiyx", torch.tensor(_FILTER), weight)
    return [each.contiguous(memory_format=torch.channels_last) for each in found]


def _slices(x: Tensor) -> Tensor:
    """(batch, channels, z, y, x) in channels-last layout as (batch, z, y * x * channels)."""
    return x.movedim(1, -1).flatten(2)


def _images(transformed: Tensor, height: int, width: int) -> Tensor:
    """(points x tiles, y * x * channels) as (points, tiles, channels, y, x)."""
    return transformed.view(_POINTS, -1, height, width, transformed.shape[1] // (height * width)).movedim(-1, 2)


def _steps(samples: range, depth: int) -> Iterator[tuple[int, _Block]]:
    """One sample and one block at a time: what is transformed stays in the cache."""
    return ((i, block) for i in samples for block in _blocks(depth))


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        n, _, depth, height, width = x.shape
        filters, source = _filters(weight), _slices(x)
        # an output that is no view of another tensor, so that an activation may overwrite it
        result = torch.empty((n, len(weight), depth, height, width), memory_format=torch.channels_last_3d)
        out = _slices(result)

        def convolve(samples: range) -> None:
            for i, block in _steps(samples, depth):
                inputs = _images(block.take @ source[i, block.inputs], height, width)
                products = x.new_empty(len(block.take), out.shape[2])
                for point, into in enumerate(_images(products, height, width)):
                    into.copy_(F.conv2d(inputs[point], filters[point], bias if point == _ONE else None, padding=1))
                torch.mm(block.give, products, out=out[i, block.outputs])

        in_shares(n, convolve)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        n, _, depth, height, width = x.shape
        filters, source = _filters(weight), _slices(x)
        wanted = _slices(grad.contiguous(memory_format=torch.channels_last_3d))
        to_input, grad_x = ctx.needs_input_grad[0], torch.empty_like(source)

        def gradients(samples: range) -> tuple[Tensor, Tensor]:
            grad_filters, grad_bias = torch.zeros(_POINTS, *filters[0].shape), torch.zeros(len(weight))
            for i, block in _steps(samples, depth):
                inputs = block.take @ source[i, block.inputs]
                outputs = _images(block.give.t() @ wanted[i, block.outputs], height, width)
                for point, image in enumerate(_images(inputs, height, width)):
                    to_image, to_filter, to_bias = torch.ops.aten.convolution_backward(
                        outputs[point], image, filters[point], [len(weight)], (1, 1), (1, 1), (1, 1), False, (0, 0), 1,
                        (to_input, True, point == _ONE),
                    )  # fmt: skip
                    grad_filters[point] += to_filter
                    if point == _ONE:
                        grad_bias += to_bias
                    if to_input:
                        image.copy_(to_image)  # which is not needed any more
                if to_input:
                    into = grad_x[i, block.inputs]
                    shared = into[: block.shared].clone()
                    torch.mm(block.take.t(), inputs, out=into)
                    into[: block.shared] += shared
            return grad_filters, grad_bias

        grad_filters, grad_bias = (sum(parts[1:], parts[0]) for parts in zip(*in_shares(n, gradients), strict=True))
        grad_weight = torch.einsum("pk,poiyx->oikyx", torch.tensor(_FILTER), grad_filters)
        grad_x = grad_x.view(n, depth, height, width, -1).movedim(-1, 1)
        return grad_x if to_input else None, grad_weight, grad_bias if ctx.needs_input_grad[2] else None
