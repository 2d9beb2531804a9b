"""The fast layers for CPUs give the results and gradients of torch's, and leave weights and their names as they are."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import ENVIRONMENT
from torch import Tensor, nn

from nnunet_lite.networks.cpu import (
    FastConv2d,
    FastConv3d,
    FastConvTranspose3d,
    FastInstanceNorm,
    FastUNet,
    ParallelSamples,
    parallelize_samples,
    speed_up_on_cpu,
)
from nnunet_lite.networks.unet import UNet, set_deep_supervision
from nnunet_lite.networks.winograd import is_channels_last, limit_threads
from nnunet_lite.planning.schema import Plan

FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def memory_format(dimensions: int, channels_last: bool) -> torch.memory_format:
    return FORMATS[dimensions] if channels_last else torch.contiguous_format


def make_unet(plan: Plan, configuration: str = "3d_fullres", **changes: Any) -> UNet:
    """A U-Net of the plan with few features."""
    planned = plan.configuration(configuration).network
    torch.manual_seed(0)
    features = tuple(min(4 * 2**i, 16) for i in range(len(planned.features)))
    return UNet(planned.model_copy(update={"features": features, **changes}), 1, 3)


def run(network: nn.Module, forward: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of a batch, and the gradients of a loss over the whole batch."""
    network.zero_grad()
    found = forward(x)
    outputs = found if isinstance(found, list) else [found]
    axes = (0, *range(2, x.ndim))
    sum(y.softmax(1).square().mean(axes).log().sum() for y in outputs).backward()  # type: ignore[union-attr]
    return [y.detach() for y in outputs], [w.grad for w in network.parameters()]


def assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for output, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(output, other, rtol=1e-3, atol=1e-4)
    assert [g is None for g in found[1]] == [g is None for g in expected[1]]
    gradient, other = (
        torch.cat([g.flatten() for g in gradients if g is not None]) for _, gradients in (found, expected)
    )
    assert float((gradient - other).norm()) < 1e-2 * float(other.norm())  # tiny stages amplify rounding


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("changes", [{}, {"kind": "residual"}, {"norm": "none"}, {"norm": "batch"}])
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_a_network_is_the_same_without(
    tiny_plan: Plan, configuration: str, changes: dict[str, Any], channels_last: bool
) -> None:
    plain = make_unet(tiny_plan, configuration, **changes)
    size = (16, 32, 16) if configuration == "3d_fullres" else (32, 48)
    plain.to(memory_format=memory_format(len(size), channels_last))  # type: ignore[call-overload]
    set_deep_supervision(plain, True)
    fast = deepcopy(plain)
    speed_up_on_cpu(fast)
    assert isinstance(fast, FastUNet) and list(fast.state_dict()) == list(plain.state_dict())
    assert {nn.Conv2d, nn.Conv3d, nn.InstanceNorm2d, nn.InstanceNorm3d}.isdisjoint(map(type, fast.modules()))
    for n in (1, 2):
        x = torch.randn(n, 1, *size).contiguous(memory_format=memory_format(len(size), channels_last))
        assert_same(run(fast, fast, x), run(plain, plain, x))


def test_other_networks_stay_as_they_are() -> None:
    own = nn.Sequential(nn.Conv3d(1, 3, 1))
    speed_up_on_cpu(own)
    assert type(own[0]) is nn.Conv3d and parallelize_samples(own) is own


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_parallel_samples_give_the_gradients_of_the_batch(
    tiny_plan: Plan, deep: bool, channels_last: bool, threads: None
) -> None:
    layout = memory_format(3, channels_last)
    network = make_unet(tiny_plan).to(memory_format=layout)  # type: ignore[call-overload]
    speed_up_on_cpu(network)
    set_deep_supervision(network, deep)
    next(network.parameters()).requires_grad_(False)
    x = torch.randn(4, 1, 16, 32, 16).contiguous(memory_format=layout)
    parallel = parallelize_samples(network)
    found = run(network, parallel, x)
    assert len(found[0]) == (len(network.heads) - 1 if deep else 1)
    assert_same(found, run(network, network, x))
    again = run(network, parallel, x)[1]
    assert all(a is b or torch.equal(a, b) for a, b in zip(found[1], again, strict=True) if a is not None)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parallel_samples_compute_in_16_bits_where_the_batch_does(
    tiny_plan: Plan, dtype: torch.dtype, threads: None
) -> None:
    network = make_unet(tiny_plan).to(memory_format=memory_format(3, True))  # type: ignore[call-overload]
    set_deep_supervision(network, False)
    x = torch.randn(2, 1, 16, 32, 16).contiguous(memory_format=memory_format(3, True))
    with torch.autocast("cpu", dtype):
        found, expected = parallelize_samples(network)(x), network(x)
    assert found.dtype == expected.dtype == torch.float32  # of the head; the layers before it compute in 16 bits
    assert not torch.equal(found, network(x))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_networks_that_mix_samples_are_not_parallel(tiny_plan: Plan) -> None:
    mixing = make_unet(tiny_plan, norm="batch")
    assert parallelize_samples(mixing) is mixing


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_parallel_samples_without_gradients_and_of_odd_batches(tiny_plan: Plan, n: int, threads: None) -> None:
    network = make_unet(tiny_plan)
    parallel = parallelize_samples(network)
    assert isinstance(parallel, ParallelSamples)
    x = torch.randn(n, 1, 16, 32, 16)
    assert_same(run(network, parallel, x), run(network, network, x))
    with torch.inference_mode():
        output = parallel(x)
        assert output.is_inference() and not output.requires_grad
        torch.testing.assert_close(output, network(x))
    with torch.no_grad(), limit_threads(1):  # the calling thread's number does not matter
        assert torch.get_num_threads() == 1
        assert torch.equal(parallel(x), output)
    assert torch.get_num_threads() == 2


@pytest.mark.slow  # slow under the checks of glibc
def test_a_strided_kernel_of_one_voxel_with_few_channels_stays_in_its_memory() -> None:
    """As in a MedNeXt of 4 features: the gradient of oneDNN writes beyond its memory, as glibc can check."""
    code = """if True:
        import torch
        from nnunet_lite.networks.cpu import FastConv2d, FastConv3d
        for fast, size, layout in ((FastConv2d, (64, 64), torch.channels_last),
                                   (FastConv3d, (16, 16, 16), torch.channels_last_3d)):
            layer = fast(4, 8, 1, stride=2).to(memory_format=layout)
            for _ in range(8):
                x = torch.randn(2, 4, *size).to(memory_format=layout).requires_grad_()
                layer(x).square().sum().backward()
    """
    checked = ENVIRONMENT | {"MALLOC_CHECK_": "3", "LD_PRELOAD": "libc_malloc_debug.so.0"}
    assert subprocess.run([sys.executable, "-c", code], env=checked, check=False).returncode == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize("size", [(5, 9, 12), (8, 6, 4), (1, 9, 12), (9, 12), (6, 5)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_one_small_sample_goes_to_onednn(
    size: tuple[int, ...], kernel: int, stride: int, bias: bool, channels_last: bool
) -> None:
    torch.manual_seed(0)
    fast, plain = ((FastConv2d, nn.Conv2d), (FastConv3d, nn.Conv3d))[len(size) - 2]
    layout = memory_format(len(size), channels_last)
    layer = fast(6, 8, kernel, stride, padding=kernel // 2, bias=bias).to(memory_format=layout)  # type: ignore[call-overload]
    other = plain(6, 8, kernel, stride, padding=kernel // 2, bias=bias)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 6, *size).contiguous(memory_format=layout).requires_grad_()
    found, expected = layer(x), other(x)
    assert "OneDnn" in found.grad_fn.name()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad(y, (x, *of.parameters()), upstream) for y, of in ((found, layer), (expected, other))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    (of_weight,) = torch.autograd.grad(layer(x.detach()), layer.weight, upstream)
    torch.testing.assert_close(of_weight, gradients[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, FORMATS[3]])
def test_a_kernel_of_one_voxel_has_its_gradient_from_matrix_products(layout: torch.memory_format) -> None:
    layer = FastConv3d(6, 3, 1)
    x = torch.randn(2, 6, 5, 4, 3).contiguous(memory_format=layout).requires_grad_()
    upstream, leaves = torch.randn(2, 3, 5, 4, 3), (x, layer.weight, layer.bias)
    assert layer.bias is not None
    found = torch.autograd.grad(layer(x), leaves, upstream)
    expected = torch.autograd.grad(F.conv3d(x, layer.weight, layer.bias), leaves, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (FastConv2d(4, 5, 3, 2, 1), (1, 4, 80, 1)),
        (FastConv2d(4, 8, 1, 2), (2, 4, 80, 2)),
        (FastConv3d(2, 1, 3, 2, 1), (4, 2, 64, 40, 2)),
        (FastConv3d(8, 16, (1, 3, 3), (1, 2, 2), (0, 1, 1)), (4, 8, 16, 16, 1)),
        (FastConv3d(5, 48, 3, 1, 1), (1, 5, 1, 16, 16)),
    ],
)
def test_in_16_bits_outputs_of_one_voxel_are_right(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """With AMX, oneDNN 3.12 returned memory that it had not written: here it is full of large numbers."""
    x = torch.randn(shape).contiguous(memory_format=FORMATS[len(shape) - 2])
    with torch.inference_mode():
        expected = layer(x)
        unwritten = [torch.full((n * expected.numel() // 2,), 1e9) for n in (1, 2, 4)]
        del unwritten
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_groups_of_channels_have_kernels_of_one_voxel_too() -> None:
    layer = FastConv3d(24, 24, 1, groups=24)
    x = torch.randn(2, 24, 5, 4, 3).contiguous(memory_format=FORMATS[3])
    torch.testing.assert_close(layer(x), F.conv3d(x, layer.weight, layer.bias, groups=24))


def test_several_samples_and_other_types_go_to_torch() -> None:
    layer = FastConv2d(6, 8, 3)
    assert "OneDnn" not in layer(torch.randn(2, 6, 9, 9)).grad_fn.name()
    assert layer.double()(torch.randn(1, 6, 9, 9).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(torch.randn(1, 6, 9, 9)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 5, 6, 7, 4), (3, 4, 9, 8), (1, 3, 11, 10, 12), (1, 3, 40, 30)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_instance_norm_equals_torch(shape: tuple[int, ...], channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 2
    gradient = torch.randn(shape, generator=generator)
    norm = FastInstanceNorm(shape[1], affine=True)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    given = leaf.contiguous(memory_format=memory_format(x.ndim - 2, channels_last))
    assert is_channels_last(given) == channels_last
    y = norm(given)
    y.backward(gradient.contiguous(memory_format=FORMATS[x.ndim - 2]))  # torch's own is wrong for one such sample
    weight, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    expected = F.instance_norm(other, weight=weight, bias=bias, eps=1e-5)
    expected.backward(gradient)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for a, b in ((leaf.grad, other.grad), (norm.weight.grad, weight.grad), (norm.bias.grad, bias.grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert is_channels_last(y) == channels_last


@pytest.mark.parametrize("side", [4, 12])
def test_a_constant_image_is_normalized_to_the_shift(side: int) -> None:
    """Rounding must not make its variance negative."""
    x = torch.full((2, 3, side, side, side), 1234.5).contiguous(memory_format=FORMATS[3]).requires_grad_()
    norm = FastInstanceNorm(3, affine=True)
    nn.init.constant_(norm.bias, 0.25)
    y = norm(x)
    y.sum().backward()
    assert (y - 0.25).abs().max() < 1
    assert torch.isfinite(y).all() and x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
def test_a_channel_far_from_zero_keeps_its_digits(mean: float) -> None:
    """A kernel that reads the values once is off by 0.15 at a mean of 100 deviations."""
    x = torch.randn(1, 8, 40, 48, 40, generator=torch.Generator().manual_seed(0)) + mean
    found = FastInstanceNorm(8, affine=True)(x.contiguous(memory_format=FORMATS[3]))
    assert (found - F.instance_norm(x.double())).abs().max() < 1e-3


def test_instance_norm_of_low_precision_has_statistics_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 4, 9, 8, generator=generator) * 3 + 2).contiguous(memory_format=FORMATS[2])
    low, norm = x.bfloat16().requires_grad_(), FastInstanceNorm(4, affine=True)
    y, upstream = norm(low), torch.randn(x.shape, generator=generator).bfloat16()
    y.backward(upstream)
    assert y.dtype == torch.bfloat16 and low.grad is not None and low.grad.dtype == torch.bfloat16
    exact = low.detach().double().requires_grad_()
    expected = F.instance_norm(exact)
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(low.grad.double(), exact.grad, rtol=0.01, atol=0.01)
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kernel", [(2, 2), (1, 2), (2, 2, 2), (1, 2, 2), (4, 2, 1)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_upsampling_equals_torch(kernel: tuple[int, ...], channels_last: bool) -> None:
    torch.manual_seed(0)
    axes = len(kernel)
    layout = memory_format(axes, channels_last)
    up = (nn.ConvTranspose2d if axes == 2 else nn.ConvTranspose3d)(6, 4, kernel, kernel).to(memory_format=layout)  # type: ignore[call-overload]
    positions = (3, 5, 4)[:axes]
    finer = [p * k for p, k in zip(positions, kernel, strict=True)]
    x = torch.randn(2, 6, *positions).contiguous(memory_format=layout).requires_grad_()
    skip = torch.randn(2, 3, *finer).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(2, 7, *finer)
    found, expected = FastUNet.join(up, x, skip), UNet.join(up, x, skip)
    torch.testing.assert_close(found, expected)
    assert is_channels_last(found) == channels_last
    leaves = (x, skip, up.weight, up.bias)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_upsampling_in_low_precision() -> None:
    up = nn.ConvTranspose2d(6, 4, 2, 2)
    x, skip = (torch.randn(1, c, n, n).contiguous(memory_format=FORMATS[2]) for c, n in ((6, 4), (3, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        y = FastUNet.join(up, x.bfloat16(), skip.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), UNet.join(up, x, skip), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("kernel", "stride", "depthwise", "up", "shape"),
    [
        (3, 1, True, False, (2, 24, 6, 7, 9)),
        (5, 1, True, False, (1, 24, 3, 8, 2)),
        ((1, 3, 3), 1, True, False, (2, 24, 4, 7, 9)),
        (5, 1, True, False, (2, 24, 1, 1, 2)),
        (3, 2, True, False, (2, 24, 6, 8, 10)),
        (5, 2, True, False, (1, 24, 4, 8, 8)),
        (3, (1, 2, 2), True, False, (2, 24, 2, 8, 8)),
        (3, 1, False, False, (2, 16, 2, 9, 9)),
        (1, (1, 2, 2), False, False, (2, 24, 6, 8, 10)),
        (1, 1, False, False, (2, 1, 6, 8, 10)),
        (3, 2, True, True, (2, 24, 3, 4, 5)),
        (5, (1, 2, 2), True, True, (1, 24, 3, 4, 5)),
        (1, (1, 2, 2), False, True, (2, 24, 3, 4, 5)),
    ],
)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("low", [False, True])
def test_layers_of_mednext_equal_torch(
    kernel: Any, stride: Any, depthwise: bool, up: bool, shape: tuple[int, ...], channels_last: bool, low: bool
) -> None:
    torch.manual_seed(0)
    layout = memory_format(3, channels_last)
    fast, plain = (FastConvTranspose3d, nn.ConvTranspose3d) if up else (FastConv3d, nn.Conv3d)
    padding = kernel // 2 if isinstance(kernel, int) else tuple(n // 2 for n in kernel)
    options = {"stride": stride, "padding": padding, "groups": 24 if depthwise else 1}
    expected: Any = plain(shape[1], 24, kernel, **options)
    layer: Any = fast(shape[1], 24, kernel, **options).to(memory_format=layout)
    layer.load_state_dict(expected.state_dict())
    x = torch.randn(shape).contiguous(memory_format=layout)
    inputs, rtol = (x.clone().requires_grad_(), x.contiguous().requires_grad_()), 0.03 if low else 1e-4
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = layer(inputs[0])
    other = expected(inputs[1])
    assert y.dtype == (torch.bfloat16 if low else torch.float32)
    upstream = torch.randn_like(other)
    y.backward(upstream.to(y.dtype))
    other.backward(upstream)
    pairs = [(y, other), (inputs[0].grad, inputs[1].grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), expected.parameters(), strict=True)]
    for found, right in pairs:
        assert float((found.float() - right).detach().norm()) <= rtol * float(right.detach().norm())
