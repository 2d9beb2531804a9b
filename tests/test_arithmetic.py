"""What is timed, what is dropped, and what a wrong device is answered."""

from __future__ import annotations

import re
import time
from functools import partial

import pytest
import torch

from nnunet_lite.errors import UserError
from nnunet_lite.networks.precision import Arithmetic, as_layout, candidates, fastest, pick_device, use_allowed_cpus

CPU = torch.device("cpu")


@pytest.fixture
def avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU for which bf16 is tried, whatever this one is."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_bf16_is_not_tried_where_only_reference_code_computes_it(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert [a.precision for a in candidates(CPU, "auto", "auto")] == ["fp32", "fp32"]
    assert [a.precision for a in candidates(CPU, "bf16", False)] == ["bf16"], "but it may be asked for"


@pytest.mark.usefixtures("avx512")
def test_candidates_are_all_combinations_or_what_is_set() -> None:
    both = candidates(CPU, "auto", "auto")
    assert {(a.precision, a.channels_last) for a in both} == {(p, c) for p in ("bf16", "fp32") for c in (True, False)}
    assert [(a.precision, a.channels_last) for a in candidates(CPU, "fp32", True)] == [("fp32", True)]
    assert [a.precision for a in candidates(CPU, "auto", False)] == ["bf16", "fp32"]


@pytest.mark.parametrize(("budget", "timed"), [(0.0, 1), (0.25, 2), (0.55, 3), (60.0, 3)])
def test_timing_ends_when_its_time_is_over(budget: float, timed: int) -> None:
    """Of three options that take 0.2 s each, 0.6 s with what a first call takes more."""
    options, calls = [Arithmetic("bf16"), Arithmetic("fp32"), Arithmetic("fp16")], []

    def step(arithmetic: Arithmetic) -> None:
        calls.append(arithmetic)
        time.sleep(0.2 if budget < 60 else 0.01)

    start = time.perf_counter()
    best = fastest(options, lambda a: partial(step, a), CPU, budget)
    assert time.perf_counter() - start < budget + 0.5
    assert best.reason.count(" s") == timed and len(calls) >= timed and len(calls) == timed * (4 if budget == 60 else 1)


@pytest.mark.usefixtures("avx512")
def test_the_fastest_is_taken_and_the_reason_names_the_times() -> None:
    seconds = {("bf16", True): 0.03, ("bf16", False): 0.02, ("fp32", True): 0.005, ("fp32", False): 0.03}
    options = candidates(CPU, "auto", "auto")
    best = fastest(options, lambda a: partial(time.sleep, seconds[a.precision, a.channels_last]), CPU)
    assert (best.precision, best.channels_last) == ("fp32", True)
    assert re.fullmatch(r"fastest of bf16 channels-last [\d.]+ s, bf16 [\d.]+ s, fp32 .* s, fp32 [\d.]+ s", best.reason)


@pytest.mark.usefixtures("avx512")
def test_a_slow_warm_up_is_enough_to_drop_a_candidate() -> None:
    runs: list[str] = []

    def step(option: Arithmetic) -> None:
        runs.append(option.precision)
        time.sleep(0.5 if option.precision == "fp32" else 0.005)

    assert fastest(candidates(CPU, "auto", False), lambda a: partial(step, a), CPU).precision == "bf16"
    assert runs.count("fp32") == 1
    assert runs.count("bf16") > 1


def test_a_long_step_that_is_clearly_slower_is_not_repeated() -> None:
    runs: list[str] = []

    def step(option: Arithmetic) -> None:
        runs.append(option.precision)
        time.sleep({"bf16": 1.01, "fp32": 2.0, "fp16": 1.1}[option.precision])

    best = fastest([Arithmetic("bf16"), Arithmetic("fp32"), Arithmetic("fp16")], lambda a: partial(step, a), CPU)
    assert best.precision == "bf16"
    assert runs == ["bf16", "fp32", "fp16", "bf16", "fp16"]


def test_a_slow_first_call_is_not_held_against_a_candidate() -> None:
    runs: list[str] = []

    def step(option: Arithmetic) -> None:
        first = option.precision not in runs
        time.sleep(0.5 if first and option.precision == "bf16" else 0.005 if option.precision == "bf16" else 0.1)
        runs.append(option.precision)

    assert fastest([Arithmetic("bf16"), Arithmetic("fp32")], lambda a: partial(step, a), CPU).precision == "bf16"


def test_a_single_candidate_is_not_timed() -> None:
    def step(option: Arithmetic) -> None:
        raise AssertionError("there is nothing to compare")

    assert fastest([Arithmetic("fp32")], lambda a: partial(step, a), CPU) == Arithmetic("fp32")


def test_layouts_and_autocast_do_what_they_say() -> None:
    last, first = Arithmetic("bf16", True), Arithmetic("fp32", False)
    for x, layout in [
        (torch.rand(2, 3, 4, 5), torch.channels_last),
        (torch.rand(2, 3, 4, 5, 6), torch.channels_last_3d),
    ]:
        assert as_layout(x, last).is_contiguous(memory_format=layout)
        assert as_layout(x, first).is_contiguous()
        assert torch.equal(as_layout(x, last), x)
    linear = torch.nn.Linear(2, 2)
    with last.autocast(CPU):
        assert linear(torch.rand(1, 2)).dtype == torch.bfloat16
    with first.autocast(CPU):
        assert linear(torch.rand(1, 2)).dtype == torch.float32
    assert Arithmetic(**last.to_json()) == last


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "vulkan:77"])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}: .*This machine has: cpu") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)


def test_devices_by_name() -> None:
    assert pick_device("cpu") == CPU
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device(None).type == pick_device("auto").type == expected


def test_tuning_never_raises_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    use_allowed_cpus()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
