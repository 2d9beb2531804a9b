"""The compute format of a network: its number format (precision) and its memory format.

On a CPU it follows a rule, so that a model computes the same every time: bf16 where the CPU has right instructions for
it (AVX512-BF16 without AMX), otherwise fp32, in the channels-last format, for which our layers are made. On one
core with AVX512-BF16, bf16 takes 0.5 to 0.7 of the time of fp32. On a GPU the precision follows a rule as well; what is
fastest of the other choices depends on its generation, so each candidate runs a few steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from statistics import median
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_lite import log
from nnunet_lite.errors import describe
from nnunet_lite.networks.devices import has_amx, has_bf16, is_out_of_memory

_WARM_UPS, _TIMED = 2, 5  # steps of each format on a GPU
_COMPILE_GAIN = 0.95  # of the time of the fastest other format, which a compiled one may take at most
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ComputeFormat:
    """The number format and memory format in which a network computes, and how.

    Parameters
    ----------
    precision : str
        Number format of autocast: fp32, bf16 or fp16.
    channels_last : bool
        Whether images and weights have the channels-last memory format.
    compiled : bool
        Whether torch.compile makes kernels for the network.
    plain_norm : bool
        Whether instance norm is `PlainInstanceNorm` instead of torch's own.
    reason : str
        Why this format was chosen, for logs; empty if by a rule or a setting.
    """

    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    plain_norm: bool = False
    reason: str = field(default="", compare=False)

    def __str__(self) -> str:
        words = {"channels-last": self.channels_last, "compiled": self.compiled, "plain norm": self.plain_norm}
        return " ".join([self.precision, *(word for word, used in words.items() if used)])

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, DTYPES[self.precision], enabled=self.precision != "fp32")

    def search_algorithms(self) -> AbstractContextManager[Any]:
        """Let cuDNN search the fastest algorithms that predict in this precision."""
        tf32 = self.precision != "fp32"
        return torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32)

    def memory_format(self, dimensions: int) -> torch.memory_format:
        """Return the memory format of images with two or three dimensions."""
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last if dimensions == 2 else torch.channels_last_3d

    def arrange(self, x: Tensor) -> Tensor:
        """Return a batch of images (batch, channels, *positions) in the memory format."""
        return x.contiguous(memory_format=self.memory_format(x.ndim - 2))


def list_formats(
    device: torch.device, precision: str, channels_last: str | bool, right_with_amx: bool = False
) -> list[ComputeFormat]:
    """List the formats in which a network may compute, likely winners first.

    Parameters
    ----------
    device : torch.device
        Device of the run.
    precision : str
        fp32, bf16, fp16 or "auto". On a GPU with bf16, "auto" never tries fp16: bf16 needs no loss scaling and does not
        overflow. On a CPU bf16 is first if the CPU has AVX512-BF16, last if it has other AVX-512, and missing without
        AVX-512, where oneDNN has only its reference code, of which one step takes minutes, and with AMX if it is wrong
        there; if it is named nevertheless, a warning says so.
    channels_last : bool or str
        Whether to use the channels-last memory format; "auto" means both on CUDA GPUs and CPUs, else no.
    right_with_amx : bool
        Whether the network computes rightly in bf16 on a CPU with AMX: one of ours, without gradients.

    Returns
    -------
    list of ComputeFormat
        At least one; on a CPU the first one is used, and the others by runs that began with them.
    """
    wrong = device.type == "cpu" and has_amx() and not right_with_amx
    if precision != "auto":
        precisions = [precision]
        if precision == "bf16" and wrong:
            log.warn_once("on CPUs with AMX some convolutions in bf16 are wrong or end the program; fp32 is right")
    elif device.type == "cuda":
        precisions = ["bf16"] if has_bf16(device) else ["fp16"]
    elif device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not wrong:
        precisions = ["bf16", "fp32"] if has_bf16(device) else ["fp32", "bf16"]
    else:
        precisions = ["fp32"]
    both = device.type in ("cuda", "cpu")  # the time of others is not measured
    layouts = ([True, False] if both else [False]) if channels_last == "auto" else [bool(channels_last)]
    return [ComputeFormat(p, layout) for p in precisions for layout in layouts]


def pick_fastest(
    formats: list[ComputeFormat],
    prepare: Callable[[ComputeFormat], Callable[[], None]],
    device: torch.device,
    budget: float = math.inf,
) -> ComputeFormat:
    """Time each format and return the fastest; its reason lists the times.

    A step's time is the median of some steps after those in which cuDNN searches and the compiler works. A format that
    needs more memory than there is, or that cannot be compiled, is left out.

    Parameters
    ----------
    formats : list of ComputeFormat
        Candidates; a single one is returned without timing.
    prepare : callable
        Returns the work to time in a format; called before each timing, since the formats may share a network.
    device : torch.device
        Device of the work.
    budget : float
        Seconds after which the fastest of the formats timed so far is returned. The first format is timed in any case.
    """
    if len(formats) == 1:
        return formats[0]
    times: dict[ComputeFormat, float] = {}
    start, late = time.perf_counter(), ""
    with log.working("timing number and memory formats", len(formats)) as advance:
        for candidate in formats:
            if times and time.perf_counter() - start > budget:
                late = "; others were not timed, to keep the time limit"
                break
            try:
                work = prepare(candidate)
                for _ in range(_WARM_UPS):
                    work()
                times[candidate] = median(measure_seconds(work, device) for _ in range(_TIMED))
            except Exception as error:  # the compiler's own errors are of many kinds
                if is_out_of_memory(error):
                    log.info(f"{candidate} needs more memory than {device} has")
                elif candidate.compiled:
                    log.warn(f"torch.compile failed and is left out: {shorten(describe(error), 300)}")
                else:
                    raise
            advance(1)
    if not times:  # the first step of the run says why
        return formats[0]
    # a compiled network must be clearly faster, since each start compiles it again
    fastest = min(times, key=lambda candidate: times[candidate] / (_COMPILE_GAIN if candidate.compiled else 1))
    each = ", ".join(f"{name} {value:.3g}" for name, value in times.items())
    return replace(fastest, reason=f"seconds of a step: {each}{late}")


def measure_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Run some work and return the seconds it took, including those of the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------ instance norm


class _PlainNorm(torch.autograd.Function):
    """Instance norm in plain operations with sums in float32; it keeps the memory format of its input.

    torch's own normalizes (1, batch * channels, *positions), for which it copies a channels-last tensor twice. These
    operations copy nothing, and torch.compile fuses them with the activation that follows. Only the input and a mean
    and a deviation for each sample and channel are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        axes, shape = tuple(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        mean = x.mean(axes, keepdim=True, dtype=torch.float32)
        centred = x - mean
        rstd = (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        return (centred * (rstd * weight.view(shape)) + bias.view(shape)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        (grad,) = gradients
        axes = tuple(range(2, x.ndim))
        normalized = (x - mean) * rstd
        sum_grad = grad.sum(axes, keepdim=True, dtype=torch.float32)
        sum_product = (grad * normalized).sum(axes, keepdim=True)
        size = x[0, 0].numel()
        scale = rstd * weight.view(1, -1, *[1] * len(axes))
        dx = scale * (grad - sum_grad / size - normalized * (sum_product / size))
        return dx.to(x.dtype), sum_product.sum((0, *axes)), sum_grad.sum((0, *axes)), None


class PlainInstanceNorm(nn.InstanceNorm3d):
    """Instance normalisation, of two or three dimensions, in plain operations, see `_PlainNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return _PlainNorm.apply(x, self.weight, self.bias, self.eps)


def apply_format(network: nn.Module, compute: ComputeFormat, dimensions: int) -> None:
    """Give a network the memory format and the instance norm of a format, in place; its weights stay.

    Parameters
    ----------
    network : nn.Module
        The network.
    compute : ComputeFormat
        The format.
    dimensions : int
        Of the images, 2 or 3.
    """
    network.to(memory_format=compute.memory_format(dimensions))  # type: ignore[call-overload, unused-ignore]
    of_torch = nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d
    for layer in network.modules():
        if type(layer) in (of_torch, PlainInstanceNorm):
            layer.__class__ = PlainInstanceNorm if compute.plain_norm else of_torch
