"""Winograd convolution equals the direct one, forward and backward; samples are divided over threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lite.networks.cpu import FastConv3d
from nnunet_lite.networks.winograd import is_channels_last, map_samples

LAYOUT = torch.channels_last_3d


def gradients(y: Tensor, of: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, of, grad.to(y.dtype))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("depth", [8, 10, 20, 40, 50])  # whole tiles and not, one block and several
def test_equals_the_exact_convolution(depth: int) -> None:
    torch.manual_seed(depth)
    convolution = FastConv3d(16, 24, 3, padding=1)
    x = torch.randn(2, 16, depth, 6, 5).contiguous(memory_format=LAYOUT).requires_grad_()
    grad = torch.randn(2, 24, depth, 6, 5)
    y = convolution(x)
    assert y.grad_fn is not None and "Winograd" in y.grad_fn.name()
    assert is_channels_last(y)
    assert convolution.bias is not None
    leaves = (x, convolution.weight, convolution.bias)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    expected = F.conv3d(*exact, padding=1)
    assert distance(y, expected) < 1e-5
    for found, wanted in zip(gradients(y, leaves, grad), gradients(expected, exact, grad), strict=True):
        assert distance(found, wanted) < 1e-5


def test_gradient_of_the_weights_alone_and_no_bias() -> None:
    torch.manual_seed(0)
    convolution = FastConv3d(16, 16, 3, padding=1, bias=False)
    x = torch.randn(1, 16, 16, 4, 4).contiguous(memory_format=LAYOUT)
    grad = torch.randn(1, 16, 16, 4, 4)
    (found,) = gradients(convolution(x), (convolution.weight,), grad)
    (wanted,) = gradients(F.conv3d(x, convolution.weight, padding=1), (convolution.weight,), grad)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "layout"),
    [
        ((1, 16, 16, 4, 4), 3, 1, torch.contiguous_format),
        ((1, 16, 7, 4, 4), 3, 1, LAYOUT),  # few slices
        ((1, 8, 16, 4, 4), 3, 1, LAYOUT),  # few channels
        ((1, 16, 16, 4, 4), 3, 2, LAYOUT),
        ((1, 16, 16, 4, 4), (1, 3, 3), 1, LAYOUT),
    ],
)
def test_other_convolutions_go_to_torch(
    shape: tuple[int, ...], kernel: int, stride: int, layout: torch.memory_format
) -> None:
    sizes = (kernel,) * 3 if isinstance(kernel, int) else kernel
    convolution = FastConv3d(shape[1], 4, kernel, stride=stride, padding=[k // 2 for k in sizes])
    y = convolution(torch.randn(shape).contiguous(memory_format=layout))
    assert y.grad_fn is not None and "Winograd" not in y.grad_fn.name()


def test_low_precision_goes_to_torch() -> None:
    x = torch.randn(1, 16, 16, 4, 4).contiguous(memory_format=LAYOUT)
    with torch.autocast("cpu", torch.bfloat16):
        assert FastConv3d(16, 16, 3, padding=1)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_the_result_does_not_depend_on_the_threads(threads: None) -> None:
    """Five samples in two parts of two and a rest of one, and in three of one and a rest of two."""
    torch.manual_seed(0)
    convolution = FastConv3d(16, 16, 3, padding=1)
    x = torch.randn(5, 16, 12, 4, 4).contiguous(memory_format=LAYOUT).requires_grad_()
    assert convolution.bias is not None
    leaves, grad = (x, convolution.weight, convolution.bias), torch.randn(5, 16, 12, 4, 4)
    found, again = (gradients(convolution(x), leaves, grad) for _ in range(2))
    with torch.inference_mode():
        y = convolution(x.detach())
    exact = F.conv3d(x, convolution.weight, convolution.bias, padding=1)
    assert distance(y, exact) < 1e-5
    for one, other, wanted in zip(found, again, gradients(exact, leaves, grad), strict=True):
        assert distance(one, wanted) < 1e-5
        assert torch.equal(one, other), "the order of sums does not depend on which part ends first"


@pytest.mark.parametrize("n", [1, 2])
def test_an_activation_may_overwrite_the_output(n: int) -> None:
    """As in a network without normalisation."""
    torch.manual_seed(0)
    convolution = FastConv3d(16, 16, 3, padding=1)
    x = torch.randn(n, 16, 16, 4, 4).contiguous(memory_format=LAYOUT).requires_grad_()
    grad = torch.randn(n, 16, 16, 4, 4)
    leaves = (x, convolution.weight)
    y = F.leaky_relu(convolution(x), 0.01, inplace=True)
    expected = F.leaky_relu(F.conv3d(x, convolution.weight, convolution.bias, padding=1), 0.01)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(gradients(y, leaves, grad), gradients(expected, leaves, grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize(
    ("n", "expected"), [(1, [[0]]), (2, [[0], [1]]), (3, [[0], [1], [2]]), (8, [[0, 1], [2, 3], [4, 5], [6, 7]])]
)
def test_parts_are_equal_and_the_rest_comes_last(n: int, expected: list[list[int]], threads: None) -> None:
    assert map_samples(n, list) == expected


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_each_part_has_its_own_threads_and_the_mode_of_the_caller(threads: None) -> None:
    assert map_samples(3, lambda samples: torch.get_num_threads()) == [1, 1, 1]
    assert map_samples(3, lambda samples: map_samples(3, list)) == [[[0, 1, 2]]] * 3, "parts are not divided again"
    assert torch.get_num_threads() == 3
    assert map_samples(3, lambda samples: torch.is_grad_enabled()) == [False] * 3
    with torch.inference_mode():
        assert map_samples(4, lambda samples: torch.is_inference_mode_enabled()) == [True] * 4
    with pytest.raises(ZeroDivisionError):
        map_samples(6, lambda samples: 1 // (samples.start - 2))


def test_a_process_without_room_for_threads_ends() -> None:
    code = """
import resource, threading
import psutil, torch
from nnunet_lite.networks.winograd import map_samples
torch.set_num_threads(4)
threading.stack_size(64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (150 << 20), -1))
map_samples(4, list)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: can't start new thread\n")
