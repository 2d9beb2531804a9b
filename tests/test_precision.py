"""Which formats are timed and which are dropped, and the message for a wrong device."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from nnunet_lite.errors import UserError
from nnunet_lite.networks.precision import (
    ComputeFormat,
    free_device_memory,
    list_formats,
    pick_device,
    pick_fastest,
    use_allowed_cpus,
)
from nnunet_lite.system import free_memory

CPU = torch.device("cpu")
BF16, FP32, FP16 = (ComputeFormat(name) for name in ("bf16", "fp32", "fp16"))


@pytest.fixture
def avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU for which bf16 is tried, on any machine."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def sleeping(seconds: Callable[[ComputeFormat, bool], float]) -> tuple[list[str], Callable[..., Callable[[], None]]]:
    """A list of the formats that ran, and `prepare` for work that sleeps seconds(format, whether it is the first)."""
    runs: list[str] = []

    def step(candidate: ComputeFormat) -> None:
        first = candidate.precision not in runs
        runs.append(candidate.precision)
        time.sleep(seconds(candidate, first))

    return runs, lambda candidate: partial(step, candidate)


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_bf16_is_not_tried_where_only_reference_code_computes_it(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert [a.precision for a in list_formats(CPU, "auto", "auto")] == ["fp32", "fp32"]
    assert [a.precision for a in list_formats(CPU, "bf16", False)] == ["bf16"], "but a setting may name it"


@pytest.mark.usefixtures("avx512")
def test_candidates_are_all_combinations_or_the_settings() -> None:
    both = list_formats(CPU, "auto", "auto")
    assert {(a.precision, a.channels_last) for a in both} == {(p, c) for p in ("bf16", "fp32") for c in (True, False)}
    assert [(a.precision, a.channels_last) for a in list_formats(CPU, "fp32", True)] == [("fp32", True)]
    assert [a.precision for a in list_formats(CPU, "auto", False)] == ["bf16", "fp32"]


@pytest.mark.parametrize(("budget", "timed"), [(0.0, 1), (0.25, 2), (0.55, 3), (60.0, 3)])
def test_timing_ends_with_its_budget(budget: float, timed: int) -> None:
    """Of three formats that take 0.2 s each, 0.6 s with their warm-up."""
    runs, prepare = sleeping(lambda *_: 0.2 if budget < 60 else 0.01)
    start = time.perf_counter()
    best = pick_fastest([BF16, FP32, FP16], prepare, CPU, budget)
    assert time.perf_counter() - start < budget + 0.5
    assert best.reason.count(" s") == timed and len(runs) == timed * (4 if budget == 60 else 1)


@pytest.mark.usefixtures("avx512")
def test_the_fastest_is_chosen_and_the_reason_names_the_times() -> None:
    seconds = {("bf16", True): 0.03, ("bf16", False): 0.02, ("fp32", True): 0.005, ("fp32", False): 0.03}
    _, prepare = sleeping(lambda candidate, _: seconds[candidate.precision, candidate.channels_last])
    best = pick_fastest(list_formats(CPU, "auto", "auto"), prepare, CPU)
    assert (best.precision, best.channels_last) == ("fp32", True)
    assert re.fullmatch(r"fastest of bf16 channels-last [\d.]+ s, bf16 [\d.]+ s, fp32 .* s, fp32 [\d.]+ s", best.reason)


def test_a_slow_warm_up_is_enough_to_drop_a_candidate() -> None:
    runs, prepare = sleeping(lambda candidate, _: 0.5 if candidate == FP32 else 0.005)
    assert pick_fastest([BF16, FP32], prepare, CPU).precision == "bf16"
    assert runs.count("fp32") == 1 and runs.count("bf16") > 1


def test_a_long_step_that_is_clearly_slower_is_not_repeated() -> None:
    runs, prepare = sleeping(lambda candidate, _: {"bf16": 1.01, "fp32": 2.0, "fp16": 1.1}[candidate.precision])
    assert pick_fastest([BF16, FP32, FP16], prepare, CPU).precision == "bf16"
    assert runs == ["bf16", "fp32", "fp16", "bf16", "fp16"]


def test_a_slow_first_call_does_not_count() -> None:
    _, prepare = sleeping(lambda candidate, first: 0.1 if candidate == FP32 else 0.5 if first else 0.005)
    assert pick_fastest([BF16, FP32], prepare, CPU).precision == "bf16"


def test_a_single_candidate_is_not_timed() -> None:
    runs, prepare = sleeping(lambda *_: 0.0)
    assert pick_fastest([FP32], prepare, CPU) == FP32 and not runs


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


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "vulkan:77"])
def test_a_missing_device_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}: .*This machine has: cpu") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)


def test_devices_by_name() -> None:
    assert pick_device("cpu") == CPU
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device(None).type == pick_device("auto").type == expected


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_the_number_of_threads_is_never_raised(threads: None) -> None:
    use_allowed_cpus()
    assert torch.get_num_threads() == 1


def test_what_the_allocator_keeps_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an image, or a day of training, the driver says that nearly all is used."""
    for name, value in {"mem_get_info": (20, 80), "memory_reserved": 60, "memory_allocated": 10}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert free_device_memory(torch.device("cuda")) == 70


def test_memory_of_apple_gpus_and_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"recommended_max_memory": 5000, "driver_allocated_memory": 3000, "current_allocated_memory": 1000}
    for name, value in sizes.items():
        monkeypatch.setattr(torch.mps, name, lambda value=value: value)
    assert free_device_memory(torch.device("mps")) == 4000
    assert free_device_memory(CPU) == pytest.approx(free_memory(), rel=0.2)
