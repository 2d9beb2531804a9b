"""Which formats are timed and which are dropped, and instance norm in plain operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from nnunet_lite import log
from nnunet_lite.networks import precision
from nnunet_lite.networks.precision import ComputeFormat, apply_format, list_formats, pick_fastest

CPU, GPU = torch.device("cpu"), torch.device("mps")  # nothing is computed on it
FP32 = ComputeFormat()


@pytest.mark.parametrize(
    ("capability", "native", "amx", "precisions"),
    [
        ("AVX512", True, False, ["bf16", "fp32"]),
        ("AVX512", True, True, ["fp32"]),  # oneDNN's bf16 is wrong there
        ("AVX512", False, False, ["fp32", "bf16"]),
        ("AVX2", False, False, ["fp32"]),  # only reference code computes bf16, but a setting may name it
        ("DEFAULT", False, False, ["fp32"]),
    ],
)
def test_a_cpu_computes_in_bf16_if_it_has_instructions_for_it(
    capability: str,
    native: bool,
    amx: bool,
    precisions: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(precision, "has_bf16", lambda _: native)
    monkeypatch.setattr(precision, "has_amx", lambda: amx)
    log.warn_once.cache_clear()
    found = [(a.precision, a.channels_last) for a in list_formats(CPU, "auto", "auto")]
    assert found == [(name, last) for name in precisions for last in (True, False)]
    assert [a.precision for a in list_formats(CPU, "bf16", False)] == ["bf16"]
    assert ("on CPUs with AMX" in capfd.readouterr().err) is amx
    right = list_formats(CPU, "auto", False, right_with_amx=True)
    assert right[0].precision == ("bf16" if native else "fp32")
    assert [(a.precision, a.channels_last) for a in list_formats(CPU, "fp32", True)] == [("fp32", True)]


def test_formats_of_devices_whose_time_is_not_measured() -> None:
    assert list_formats(GPU, "auto", "auto") == [FP32]
    assert list_formats(GPU, "fp16", True) == [ComputeFormat("fp16", channels_last=True)]


def failing(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.fixture
def exact_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that returns how many seconds it takes, instead of taking them."""
    monkeypatch.setattr(precision, "measure_seconds", lambda work, device: work())


@pytest.mark.usefixtures("exact_clock")
def test_compiled_formats_are_timed_one_after_the_other_as_on_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    """The first two steps are those of the compiler and of cuDNN's search; of five the median counts."""
    formats = [ComputeFormat("bf16", last, compiled) for compiled in (False, True) for last in (False, True)]
    steps = {one: iter([9, 9, 5, 1, 1, 1, 1]) for one in formats} | {formats[1]: iter([0, 0, 2, 2, 3, 1, 2])}
    order: list[ComputeFormat] = []

    def prepare(candidate: ComputeFormat) -> Callable[[], Any]:
        def step() -> int:
            order.append(candidate)
            return next(steps[candidate])

        if candidate == formats[2]:
            return failing(RuntimeError("no C compiler\nwas found"))
        return failing(torch.OutOfMemoryError("too large")) if candidate == formats[3] else step

    best = pick_fastest(formats, prepare, GPU)
    assert best == formats[0] and order == [formats[0]] * 7 + [formats[1]] * 7
    assert best.reason == "seconds of a step: bf16 1, bf16 channels-last 2"
    messages = capfd.readouterr().err
    assert "torch.compile failed and is left out: RuntimeError: no C compiler was found" in messages
    assert "bf16 channels-last compiled needs more memory than mps has" in messages


@pytest.mark.usefixtures("exact_clock")
@pytest.mark.parametrize(("compiled_step", "compiled"), [(0.96, False), (0.94, True)])
def test_a_compiled_format_must_be_clearly_faster(compiled_step: float, compiled: bool) -> None:
    def prepare(candidate: ComputeFormat) -> Callable[[], Any]:
        return lambda: compiled_step if candidate.compiled else 1.0

    assert pick_fastest([FP32, ComputeFormat(compiled=True)], prepare, GPU).compiled == compiled


def test_where_nothing_fits_the_first_step_says_so() -> None:
    formats = [ComputeFormat(compiled=compiled) for compiled in (False, True)]
    assert pick_fastest(formats, lambda _: failing(torch.OutOfMemoryError()), GPU) == formats[0]


def test_a_single_candidate_is_not_timed() -> None:
    assert pick_fastest([FP32], lambda _: failing(AssertionError()), GPU) == FP32


@pytest.mark.parametrize("step", [0.0, 0.1])
def test_timing_ends_with_its_budget(step: float) -> None:
    """Seven steps of the first format take longer than it."""
    best = pick_fastest([FP32, ComputeFormat(channels_last=True)], lambda _: partial(time.sleep, step), GPU, 0.3)
    assert best.reason.endswith("; others were not timed, to keep the time limit") == (step > 0)
    assert step == 0 or best == FP32


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_memory_format_and_autocast(shape: tuple[int, ...]) -> None:
    last, first, x = ComputeFormat("bf16", True), ComputeFormat("fp32", False), torch.rand(shape)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    assert last.arrange(x).is_contiguous(memory_format=memory_format) and first.arrange(x).is_contiguous()
    assert torch.equal(last.arrange(x), x)
    linear = torch.nn.Linear(2, 2)
    for compute_format, dtype in ((last, torch.bfloat16), (first, torch.float32)):
        with compute_format.autocast(CPU):
            assert linear(torch.rand(1, 2)).dtype == dtype


# ------------------------------------------------------------------------------------------------------ instance norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 6, 9, 7), (2, 6, 5, 4, 7)])
def test_plain_norm_computes_what_torchs_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also where the mean is a hundred times the deviation."""
    dimensions = len(shape) - 2
    kind = torch.nn.InstanceNorm2d if dimensions == 2 else torch.nn.InstanceNorm3d
    layers = [torch.nn.Sequential(kind(6, affine=True)) for _ in range(2)]
    apply_format(layers[1], ComputeFormat(channels_last=True, plain_norm=True), dimensions)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) + (100.0 if dtype == torch.float32 else 3.0)
    weight, upstream = torch.randn(6, generator=generator), torch.randn(shape, generator=generator).to(dtype)
    results = []
    for layer, last in zip(layers, (False, True), strict=True):
        layout = ComputeFormat(channels_last=last).memory_format(dimensions)
        x = values.detach().to(dtype, memory_format=layout, copy=True).requires_grad_()
        with torch.no_grad():
            layer[0].weight.copy_(weight)
        y = layer(x)
        assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
        y.backward(upstream)
        assert x.grad is not None
        results.append([y, x.grad, layer[0].weight.grad, layer[0].bias.grad])
    tolerance = 2e-4 if dtype == torch.float32 else 3e-2
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_a_format_changes_the_norm_and_back() -> None:
    network = torch.nn.Sequential(torch.nn.InstanceNorm2d(2, affine=True), torch.nn.BatchNorm2d(2))
    weights = network.state_dict()
    apply_format(network, ComputeFormat(plain_norm=True), 2)
    assert [type(layer).__name__ for layer in network] == ["PlainInstanceNorm", "BatchNorm2d"]
    apply_format(network, ComputeFormat(), 2)
    assert type(network[0]) is torch.nn.InstanceNorm2d and network.state_dict().keys() == weights.keys()
