"""Make a built network faster on CPUs; without this file everything works, only slower.

`speed_up_on_cpu` replaces layers by subclasses that compute the same with the same weights. Most of them need the
channels-last memory format, for which torch's own layers make copies:

FastConv2d, FastConv3d  oneDNN for a single small sample, where torch falls back to a slow kernel, in both directions;
                        winograd.py for 3x3x3
FastConvTranspose3d     the depthwise and pointwise ones of MedNeXt, as convolutions
FastInstanceNorm        batch normalization of one sample after the other, in both directions
FastUNet                upsampling as one matrix product that writes into the concatenation
ParallelSamples         the samples of a training batch at the same time, each with threads of its own
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_lite.networks.unet import EncoderDecoder, UNet, mixes_samples
from nnunet_lite.networks.winograd import convolve_winograd, is_channels_last, is_winograd_faster, thread_pool

_LEAST_OUTPUTS = 16  # of a pointwise convolution; with fewer, torch is as fast
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt(3)


def speed_up_on_cpu(network: nn.Module) -> None:
    """Replace the layers of a planned network by fast ones for CPUs, in place; a user's own and GPUs are not affected.

    Only the class of a layer changes: weights, their names, hooks and copies stay.
    """
    if isinstance(network, EncoderDecoder):
        for layer in network.modules():
            layer.__class__ = _FAST.get(type(layer), type(layer))


def keep_freed_memory() -> None:
    """Keep freed memory for the next step of a computation on the CPU; set for the whole process.

    glibc returns every freed block of over 32 MB, such as an activation, to the system and takes page faults to get
    it again: in a virtual machine that costs more than the arithmetic on it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


# ------------------------------------------------------------------------------------------------ convolution


class FastConv2d(nn.Conv2d):
    """A convolution that uses oneDNN where torch does not."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_wrong_in_bf16(self, x):
            return _leave_autocast(self, x)
        return _convolve_onednn(self, x) if _avoids_onednn(self, x) else super().forward(x)


class FastConv3d(nn.Conv3d):
    """A convolution by Winograd's filtering, a matrix product or own gradients where faster; or else by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_wrong_in_bf16(self, x):
            return _leave_autocast(self, x)
        if is_winograd_faster(self, x):
            return convolve_winograd(x, self.weight, self.bias)
        if _is_pointwise(self, x):
            return _mix_channels(_thin_out(x, self.stride), self.weight.flatten(1), self.bias)
        if _is_depthwise(self, x) and max(self.stride) == 1:
            return _convolve_depthwise(x, self.weight, self.bias)
        return _convolve_onednn(self, x) if _avoids_onednn(self, x) else super().forward(x)


def _is_wrong_in_bf16(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> bool:
    """Return whether oneDNN 3.12 may return memory that it has not written, in bf16.

    It does for gradients of layers with fewer slices than their kernel, and with AMX for outputs of one voxel along the
    last axis.
    """
    axes = zip(x.shape[2:], layer.kernel_size, layer.stride, strict=True)
    return (
        x.is_cpu
        and torch.is_autocast_enabled("cpu")
        and any(size < kernel or size <= step > 1 for size, kernel, step in axes)
    )


def _leave_autocast(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Compute a layer in fp32 within autocast."""
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        return layer.forward(x.float()).to(dtype)


def _avoids_onednn(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> bool:
    """Return whether torch might compute the layer, or its gradient, without oneDNN, its fast library for CPUs.

    It does so for one float32 sample of a few thousand values, and then takes four times as long at the sizes of a
    U-Net. The gradient of a kernel of one voxel is slow in both.
    """
    return (
        not torch.compiler.is_compiling()  # first: it exports graphs for any batch
        and (len(x) == 1 or layer.weight[0, 0].numel() == 1)
        and x.is_cpu
        and x.dtype == torch.float32
        and layer.groups == 1
        and max(layer.dilation) == 1
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )


def _convolve_onednn(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    assert not isinstance(layer.padding, str)
    stride = layer.stride
    if layer.weight[0, 0].numel() == 1:  # else oneDNN writes beyond its memory: uxlfoundation/oneDNN#6035
        x, stride = _thin_out(x, stride), (1,) * len(stride)
    y: Tensor = _OneDnnConvolution.apply(x, layer.weight, layer.bias, layer.padding, stride)
    return y


def _thin_out(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Return every n-th voxel along each axis, a view: what a strided kernel of one voxel sees."""
    places: Any = (..., *(slice(None, None, step) for step in stride))
    return x[places]


class _OneDnnConvolution(torch.autograd.Function):
    """A convolution by oneDNN whose gradient does not depend on what torch chooses for a single sample."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.stride = padding, stride
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1,) * len(stride), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if weight[0, 0].numel() == 1:
            gradients = _differentiate_product(x, weight, grad, ctx.needs_input_grad[0])
        elif len(x) == 1 and grad.shape[2] > 1:
            gradients = _differentiate_halves(x, weight, grad, ctx.padding, ctx.stride, ctx.needs_input_grad[0])
        else:
            gradients = _differentiate(x, weight, grad, ctx.padding, ctx.stride, ctx.needs_input_grad[0])
        needs_bias = ctx.needs_input_grad[2]
        return *gradients[:2], gradients[2] if needs_bias else None, None, None


Gradients = tuple[Tensor | None, Tensor, Tensor]  # of the input, the weight and the bias


def _differentiate(
    x: Tensor, weight: Tensor, grad: Tensor, padding: tuple[int, ...], stride: tuple[int, ...], needs_x: bool
) -> Gradients:
    axes = len(stride)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], stride, padding, (1,) * axes, False, (0,) * axes, 1, (needs_x, True, True)
    )


def _differentiate_product(x: Tensor, weight: Tensor, grad: Tensor, needs_x: bool) -> Gradients:
    """The gradient of a kernel of one voxel, as matrix products over all positions."""
    inputs, outputs = (values.movedim(1, -1).flatten(0, -2) for values in (x, grad))
    to_x = (outputs @ weight.flatten(1)).view(len(x), *x.shape[2:], -1).movedim(-1, 1) if needs_x else None
    return to_x, (outputs.t() @ inputs).view_as(weight), outputs.sum(0)


def _differentiate_halves(
    x: Tensor, weight: Tensor, grad: Tensor, padding: tuple[int, ...], stride: tuple[int, ...], needs_x: bool
) -> Gradients:
    """The gradient of one sample as a batch of two, for which torch always uses oneDNN: the halves of the first axis.

    Both halves have their own copy of the input slices that they share.
    """
    half = -(-grad.shape[2] // 2)
    size = stride[0] * (half - 1) + weight.shape[2]  # input slices of a half
    halves = x.new_zeros(2, size, *x.shape[3:], x.shape[1]).movedim(-1, 1)
    places = []
    for start, target in zip((-padding[0], stride[0] * half - padding[0]), halves, strict=True):
        low, high = max(0, start), min(start + size, x.shape[2])
        places.append((slice(low, high), slice(low - start, high - start)))
        target[:, places[-1][1]] = x[0, :, places[-1][0]]
    missing = (0, 0) * (len(stride) - 1) + (0, 2 * half - grad.shape[2])
    grads = F.pad(grad, missing)[0].unflatten(1, (2, half)).movedim(1, 0)
    to_halves, to_weight, to_bias = _differentiate(halves, weight, grads, (0, *padding[1:]), stride, needs_x)
    if to_halves is None:
        return None, to_weight, to_bias
    to_x = torch.zeros_like(x)
    for (source, target), part in zip(places, to_halves, strict=True):
        to_x[0, :, source] += part[:, target]
    return to_x, to_weight, to_bias


# ------------------------------------------------------------------------------------------------ depthwise


class FastConvTranspose3d(nn.ConvTranspose3d):
    """A depthwise or pointwise transposed convolution: a convolution of voxels with zeros between them."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if _is_depthwise(self, x):
            return _convolve_depthwise(_spread(x, self.stride), self.weight.flip(2, 3, 4), self.bias)
        if _is_pointwise(self, x) and self.bias is not None:
            y = _spread(_mix_channels(x, self.weight.flatten(1).t()), self.stride)
            return y + self.bias.view(-1, 1, 1, 1).to(y.dtype)
        return super().forward(x, output_size)


def _is_pointwise(layer: nn.Conv3d | nn.ConvTranspose3d, x: Tensor) -> bool:
    """Return whether a layer only mixes the channels of each voxel; of a single channel both formats are the same."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and layer.groups == max(layer.kernel_size) == 1
        and layer.out_channels >= _LEAST_OUTPUTS
        and (layer.in_channels == 1 or is_channels_last(x))
    )


def _mix_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the channels of each voxel by a matrix, which copies nothing in the channels-last format."""
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def _is_depthwise(layer: nn.Conv3d | nn.ConvTranspose3d, x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling() and x.is_cpu and layer.groups == layer.in_channels > 1 and is_channels_last(x)
    )


def _convolve_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        x, weight = x.to(torch.get_autocast_dtype("cpu")), weight.to(torch.get_autocast_dtype("cpu"))
    return _Depthwise.apply(x, weight, bias)


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Put zeros between the voxels of x, so that they are a stride apart."""
    batch, channels, *shape = x.shape
    size = [(n - 1) * step + 1 for n, step in zip(shape, stride, strict=True)]
    out = x.new_zeros((batch, *size, channels)).movedim(-1, 1)
    _thin_out(out, stride).copy_(x)
    return out


class _Depthwise(torch.autograd.Function):
    """A depthwise 3D convolution in the channels-last format, whose gradients oneDNN has no fast kernel for.

    That of the input is a convolution with the flipped kernel. That of the kernel is computed slice by slice as that of
    depthwise 2D convolutions, which have one: the slices of a sample are a batch of 2D images in the same memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.conv3d(x, weight, bias, padding=[n // 2 for n in weight.shape[2:]], groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        channels, border = len(weight), [n // 2 for n in weight.shape[2:]]
        dx = F.conv3d(grad, weight.flip(2, 3, 4), padding=border, groups=channels)
        dw = torch.zeros_like(weight, dtype=torch.float32)
        for inputs, outputs in zip(x.transpose(1, 2), grad.transpose(1, 2), strict=True):
            for i in range(weight.shape[2]):  # the slice i of the kernel sees inputs that are `shift` slices further
                shift, n = i - border[0], len(inputs)
                sources, targets = inputs[max(0, shift) : n + shift], outputs[max(0, -shift) : n - shift]
                _, slice_dw, _ = torch.ops.aten.convolution_backward(
                    targets, sources, weight[:, :, i], None, (1, 1), border[1:], (1, 1), False, (0, 0), channels,
                    (False, True, False),
                )  # fmt: skip
                dw[:, :, i] += slice_dw
        db = None if ctx.bias_dtype is None else grad.sum((0, 2, 3, 4), dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw.to(weight.dtype), db


# ------------------------------------------------------------------------------------------------ instance norm


class FastInstanceNorm(nn.InstanceNorm3d):
    """Instance normalisation, of two or three dimensions, that keeps the channels-last format."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and is_channels_last(x):
            return _ChannelsLastNorm.apply(x, self.weight, self.bias, self.eps)
        y = F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        if y.requires_grad and len(y) == 1 and not torch.compiler.is_compiling():
            y.register_hook(Tensor.contiguous)  # torch 2.13's gradient of one sample is wrong in channels-last format
        return y


class _ChannelsLastNorm(torch.autograd.Function):
    """y = (x - mean) * rstd * weight + bias.

    Both passes are batch normalization of one sample after the other, which is the same and has kernels for
    channels-last tensors, with sums in float32. Group normalization with one channel a group would be faster, but adds
    up values and squares in one pass: it loses all digits where a channel's mean is a hundred times its deviation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        batch, channels = x.shape[:2]
        y, mean, rstd = torch.empty_like(x), weight.new_empty(batch, channels), weight.new_empty(batch, channels)
        for i in range(batch):
            out = (y[i : i + 1], mean[i], rstd[i])
            torch.native_batch_norm(x[i : i + 1], weight, bias, None, None, True, 0.0, eps, out=out)
        ctx.save_for_backward(x, weight, mean.float(), rstd.float())
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        (grad,) = gradients
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                grad[i : i + 1], x[i : i + 1], weight, None, None, mean[i], rstd[i], True, 0.0, [True] * 3
            )
            for i in range(len(x))
        ]
        dx, of_weight, of_bias = zip(*parts, strict=True)
        return dx[0] if len(x) == 1 else torch.cat(dx), sum(of_weight), sum(of_bias), None


# ------------------------------------------------------------------------------------------------ upsampling


class FastUNet(UNet):
    @staticmethod
    def join(up: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        """Upsample the coarser features and append those of the skip connection.

        A transposed convolution whose kernel is as large as its stride spreads every voxel over a block of its own: it
        is one matrix product and a rearrangement. Its gradient takes half of the time of oneDNN's, and the
        rearrangement writes straight into the concatenation.
        """
        if not (x.is_cpu and is_channels_last(x)):
            return UNet.join(up, x, skip)
        weight, bias = up.get_parameter("weight"), up.get_parameter("bias")
        (batch, _, *positions), (_, _, *kernel) = x.shape, weight.shape
        axes, rows = len(kernel), x.movedim(1, -1).flatten(0, -2)
        blocks = torch.addmm(bias.repeat(prod(kernel)), rows, weight.movedim(1, -1).flatten(1))
        # each axis of positions is followed by its axis of the kernel: (batch, z, kernel z, y, kernel y, ..., channels)
        order = [axis for i in range(1, axes + 1) for axis in (i, i + axes)]
        upsampled = blocks.view(batch, *positions, *kernel, -1).permute(0, *order, -1)
        both = torch.cat((upsampled, skip.movedim(1, -1).reshape(*upsampled.shape[:-1], -1)), -1)
        return both.view(batch, *skip.shape[2:], -1).movedim(-1, 1)


# ------------------------------------------------------------------------------------------------ training


class ParallelSamples(nn.Module):
    """A network that computes the samples of a batch at the same time, each with threads of its own.

    Threads that share each layer of a small network wait for each other after every layer, forward and backward.
    Outputs and gradients are those of the network. The calling thread computes nothing.

    Parameters
    ----------
    network : EncoderDecoder
        Its samples do not depend on each other.
    threads : int
        Of all samples together. A batch is divided into as many equal parts as divide the threads, too.
    """

    def __init__(self, network: EncoderDecoder, threads: int) -> None:
        super().__init__()
        self.network, self.threads = network, threads

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if torch.is_grad_enabled():
            weights = [weight for weight in self.network.parameters() if weight.requires_grad]
            outputs = _ParallelSamples.apply(self, x, *weights)
        else:
            outputs = _join_parts(self.compute_parts(x))
        return list(outputs) if self.network.deep_supervision else outputs[0]

    def pool(self, batch: int) -> tuple[ThreadPoolExecutor, int]:
        """Return the threads for a batch, and the number of parts into which it is divided."""
        parts = gcd(self.threads, batch)
        return thread_pool(parts, self.threads // parts), parts

    def compute_parts(self, x: Tensor) -> list[list[Tensor]]:
        """Return the outputs of each part, computed in the modes of the calling thread."""
        autocast = partial(torch.autocast, "cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))
        inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def compute(part: Tensor) -> list[Tensor]:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients), autocast():
                output = self.network(part)
            return output if isinstance(output, list) else [output]

        threads, parts = self.pool(len(x))
        return list(threads.map(compute, x.tensor_split(parts)))


def parallelize_samples(network: nn.Module) -> nn.Module:
    """Return `ParallelSamples` of a planned network whose samples do not depend on each other, others as they are."""
    if isinstance(network, EncoderDecoder) and not mixes_samples(network):
        return ParallelSamples(network, torch.get_num_threads())
    return network


def _join_parts(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat([output.detach() for output in outputs]) for outputs in zip(*parts, strict=True))


class _ParallelSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, samples: ParallelSamples, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # an output that the loss leaves out gives its weights no gradient
        ctx.threads, ctx.weights = samples.pool(len(x))[0], weights
        with torch.enable_grad():
            ctx.parts = samples.compute_parts(x)
        return _join_parts(ctx.parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        used = [(i, grad.tensor_split(len(ctx.parts))) for i, grad in enumerate(grads) if grad is not None]

        def compute(number: int) -> Sequence[Tensor | None]:
            outputs = [ctx.parts[number][i] for i, _ in used]
            upstream = [parts[number] for _, parts in used]
            return torch.autograd.grad(outputs, ctx.weights, upstream, allow_unused=True)

        found = list(ctx.threads.map(compute, range(len(ctx.parts))))
        return None, None, *(_sum(parts) for parts in zip(*found, strict=True))


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Add up in order, whichever thread ended first, so that sums are the same each time."""
    tensors = [part for part in parts if part is not None]
    return sum(tensors[1:], tensors[0]) if tensors else None


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    UNet: FastUNet,
    nn.Conv2d: FastConv2d,
    nn.Conv3d: FastConv3d,
    nn.ConvTranspose3d: FastConvTranspose3d,
    nn.InstanceNorm2d: FastInstanceNorm,
    nn.InstanceNorm3d: FastInstanceNorm,
}
