"""Devices: the one of a run, its memory, and whether it computes what it should."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Network
from nnunet_lite.system import cpus, free_memory

_WRONG = 0.1  # of the spread of a result: bf16 rounds to less than a tenth of that


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name ("cuda:1", "cpu", "mps"); by default a GPU if there is one.

    Raises
    ------
    UserError
        This machine has no such device.
    """
    if name is None or name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.cuda.device_count():  # by the driver, which may be too old
            log.warn_once("torch cannot use the GPU of this machine, so the CPU computes; `nnlite doctor` says why")
        return torch.device("cpu")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    devices += ["mps"] if torch.backends.mps.is_available() and trains_unets(torch.device("mps")) else []
    devices += [f"xpu:{i}" for i in range(torch.xpu.device_count())]
    fix = f"This machine has: {', '.join(devices)}."
    if name not in (*devices, *(device.partition(":")[0] for device in devices)):
        reason = "there is no such device"
        if name.startswith("cuda") and not torch.backends.cuda.is_built():
            reason = "this PyTorch is built without CUDA"
        elif name == "mps" and torch.backends.mps.is_available():
            reason = "this PyTorch cannot train a 3D U-Net on it"
        raise UserError(f"--device {name}: {reason}", fix=fix)
    return torch.device(name)


def require_working(device: torch.device) -> torch.device:
    """Return a device that computes.

    Raises
    ------
    UserError
        It does not.
    """
    if fault := find_fault(device):
        fix = "Use --device cpu or another GPU, end other programs, or install a build of torch for this GPU."
        raise UserError(f"{device} does not compute: {fault}", fix=fix)
    return device


def find_fault(device: torch.device) -> str:
    """Return why a device does not compute: it is taken by others, or this torch has no code for it; "" if it does."""
    try:
        torch.ones(1, device=device).add(1).cpu()
    except RuntimeError as error:
        return str(error).splitlines()[0].rstrip(".")
    return ""


def free_device_memory(device: torch.device) -> int:
    """Return the bytes that this process may still use on a device.

    The allocator of torch keeps freed memory for the next tensors, so what it has reserved and not allocated is free
    too, although the driver counts it as used. On the CPU it is what `free_memory` returns.
    """
    if device.type in ("cuda", "xpu"):
        backend = getattr(torch, device.type)
        cached = backend.memory_reserved(device) - backend.memory_allocated(device)
        return int(backend.mem_get_info(device)[0] + cached)
    if device.type == "mps":  # its memory is that of the machine
        allocated = torch.mps.current_allocated_memory()
        cached = torch.mps.driver_allocated_memory() - allocated
        return max(0, min(torch.mps.recommended_max_memory() - allocated, free_memory() + cached))
    return free_memory()


def use_allowed_cpus() -> None:
    """Use the CPUs that this process may use (taskset, SLURM, containers), not all that the machine has."""
    if torch.get_num_threads() > (allowed := cpus()):
        torch.set_num_threads(allowed)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a computation failed for lack of memory, of a device or, with a limit such as ulimit, of a CPU."""
    # cuDNN finds no engine where there is no memory for the working space of any
    texts = ("out of memory", "allocate memory", "ALLOC_FAILED", "unable to find an engine")
    is_of_torch = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return is_of_torch or isinstance(error, torch.OutOfMemoryError | MemoryError)


def release_memory(device: torch.device) -> None:
    """Free what finished work has left on a device: tensors in cycles of references, graphs of torch.compile, caches.

    A network that was trained data-parallel or compiled, and its gradients, would stay until Python's next collection.
    """
    if "torch._dynamo" in sys.modules:  # graphs of another configuration would make the next ones dynamic
        torch._dynamo.reset()
    gc.collect()
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).empty_cache()


# ---------------------------------------------------------------------------------------------- does it compute right


def has_bf16(device: torch.device) -> bool:
    """Return whether a CUDA GPU, or a CPU of the x86 kind, has instructions for bf16."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def has_amx() -> bool:
    """Return whether the CPU has AMX, with which oneDNN 3.12 (of torch 2.13) computes convolutions in bf16 wrongly.

    Gradients of kernels are NaN, or written beyond their memory, if the slices of input and output are over 0.5 MB
    together, such as 48 channels of 80 x 80. Outputs of one voxel along the last axis are memory that was not written;
    cpu.py computes these in fp32, and then the forward pass is right.
    """
    return torch.cpu._is_amx_tile_supported()


@lru_cache
def computes_bf16(device: torch.device, shape: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """Return whether a convolution in bf16, forward and backward, is that in fp32 but for its rounding.

    cuDNN 9.8 to 9.10 computes large three-dimensional ones wrongly, without an error (pytorch#163539). The comparison
    takes a few tenths of a second on a GPU, and less memory than a training step. Where that is not free, the answer is
    yes.

    Parameters
    ----------
    device : torch.device
        A GPU.
    shape : tuple of int
        Of the input and the output: (batch, channels, *positions).
    kernel : tuple of int
        Size of the kernel, odd.
    """
    convolve: Callable[..., Tensor] = F.conv2d if len(kernel) == 2 else F.conv3d
    last = torch.channels_last if len(kernel) == 2 else torch.channels_last_3d
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).bfloat16()

    def results(dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, ...]:
        inputs = [value.to(dtype, memory_format=layout, copy=True).requires_grad_() for value in (x, weight)]
        y = convolve(*inputs, padding=[size // 2 for size in kernel])
        return y.detach(), *torch.autograd.grad(y, inputs, gradient.to(dtype))

    try:
        x, gradient, weight = random(*shape), random(*shape), random(shape[1], shape[1], *kernel)
        expected = results(torch.float32, torch.contiguous_format)
        for layout in (torch.contiguous_format, last):
            for found, right in zip(results(torch.bfloat16, layout), expected, strict=True):
                if not (found - right).abs().max() <= _WRONG * right.std():  # also where it is not finite
                    return False
    except RuntimeError as error:
        if not is_out_of_memory(error):  # the first step of the run says so
            raise
    return True


def describe_wrong_bf16() -> str:
    """Return what `computes_bf16` found, with the version of cuDNN."""
    return f"convolutions in bf16 are wrong with cuDNN {torch.backends.cudnn.version()} (pytorch#163539)"


def find_wrong_gpus() -> list[str]:
    """Return a line for each GPU that does not compute, or the bf16 convolutions of a usual 3D patch wrongly."""
    lines = []
    for gpu in (torch.device("cuda", number) for number in range(torch.cuda.device_count())):
        if fault := find_fault(gpu):
            lines.append(f"{gpu} does not compute: {fault}")
        elif has_bf16(gpu) and not computes_bf16(gpu, (1, 32, 128, 128, 128), (3, 3, 3)):
            lines.append(f"{gpu}: {describe_wrong_bf16()}; training uses fp16 instead")
    return lines


@lru_cache
def trains_unets(device: torch.device) -> bool:
    """Return whether augmentation, a step of training and a prediction of a small 3D U-Net work on a device."""
    levels = ((1, 1, 1), (2, 2, 2))
    spec = Network(features=(4, 8), strides=levels, kernels=((3, 3, 3),) * 2, blocks=(1, 1), decoder_convolutions=(1,))
    generator = torch.Generator().manual_seed(0)
    x, classes = torch.randn(2, 1, 8, 8, 8, generator=generator), torch.ones(2, 8, 8, 8, dtype=torch.int64)
    first, results = UNet(spec, 1, 2), []
    try:
        for where in (torch.device("cpu"), device):
            network = copy.deepcopy(first).to(where)
            for image in (x[:, 0], x):  # MPS has all of it since torch 2.13
                grid = torch.zeros(len(image), *image.shape[2:], image.ndim - 2, device=where)
                F.grid_sample(image.to(where), grid, padding_mode="border", align_corners=True)
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
            F.cross_entropy(network(x.to(where)), classes.to(where)).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
            optimizer.step()
            with torch.inference_mode():
                results.append(network.eval()(x.to(where)).cpu())
    except (RuntimeError, NotImplementedError, TypeError):  # torch's errors for what a device does not have
        return False
    return torch.allclose(results[0], results[-1], atol=1e-2)
