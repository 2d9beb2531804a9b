"""Which device is used, what it has free, and how a device that computes wrongly is found out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from nnunet_lite.errors import UserError
from nnunet_lite.networks import devices
from nnunet_lite.networks.devices import (
    computes_bf16,
    free_device_memory,
    pick_device,
    release_memory,
    require_working,
    trains_unets,
    use_allowed_cpus,
)
from nnunet_lite.system import free_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "vulkan:77"])
def test_a_missing_device_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}: .*This machine has: cpu") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)


def test_devices_by_name() -> None:
    assert pick_device("cpu") == CPU
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device(None).type == pick_device("auto").type == expected


def test_a_gpu_that_torch_cannot_use_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None) == CPU and capsys.readouterr().err == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device(None) == CPU
    assert "warning: torch cannot use the GPU of this machine" in capsys.readouterr().err


def test_a_device_that_does_not_compute_is_one_line() -> None:
    """As a GPU for which torch has no code, or that others hold: it can be found, and tensors can be made on it."""
    assert require_working(CPU) == CPU
    with pytest.raises(UserError, match=r"^meta does not compute: .* no data.*--device cpu") as caught:
        require_working(torch.device("meta"))
    assert "\n" not in str(caught.value)


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


def test_memory_of_finished_work_is_released() -> None:
    """A network and what trains it refer to each other: without a collection they stay."""
    parts: list[Any] = [torch.nn.Linear(2, 2)]
    parts.append(parts)
    left = weakref.ref(parts[0])
    del parts
    assert left() is not None
    release_memory(CPU)
    assert left() is None


# -------------------------------------------------------------------------------------------------- wrong arithmetic


@pytest.fixture(autouse=True)
def ask_again() -> Iterator[None]:
    computes_bf16.cache_clear()
    yield
    computes_bf16.cache_clear()


Convolve = Callable[..., torch.Tensor]


def cut_forward(convolve: Convolve) -> Convolve:
    """In bf16 the last slices of a large output are zero."""

    def wrong(x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        y = convolve(x, *others, **options)
        return torch.cat((y[:, :, :-1], torch.zeros_like(y[:, :, -1:])), 2) if x.dtype == torch.bfloat16 else y

    return wrong


def cut_gradient(index: int) -> Callable[[Convolve], Convolve]:
    """In bf16 a part of the gradient of the input or the weights is lost."""

    def of(convolve: Convolve) -> Convolve:
        def wrong(*inputs: torch.Tensor, **options: Any) -> torch.Tensor:
            used = list(inputs)
            if used[0].dtype == torch.bfloat16:
                used[index] = torch.cat((used[index][:, :-1], used[index][:, -1:].detach()), 1)
            return convolve(*used, **options)

        return wrong

    return of


@pytest.mark.parametrize("fault", [None, cut_forward, cut_gradient(0), cut_gradient(1)])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_wrong_convolutions_in_bf16_are_found(
    fault: Callable[[Convolve], Convolve] | None, dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault is not None:
        name = f"conv{dimensions}d"
        monkeypatch.setattr(F, name, fault(getattr(F, name)))
    assert computes_bf16(CPU, (2, 8, *[12] * dimensions), (3,) * dimensions) == (fault is None)


def test_too_little_memory_for_the_comparison_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(F, "conv3d", full)
    assert computes_bf16(CPU, (1, 4, 8, 8, 8), (3, 3, 3))


def test_a_device_must_train_and_predict_to_be_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trains_unets(CPU) and not trains_unets(torch.device("meta"))  # which computes nothing
    with monkeypatch.context() as patch:
        error = RuntimeError("MPS: Unsupported Border padding mode")  # before torch 2.13
        patch.setattr(F, "grid_sample", Mock(side_effect=error))
        assert not trains_unets.__wrapped__(CPU)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(devices, "trains_unets", lambda device: False)
    with pytest.raises(UserError, match=r"--device mps: this PyTorch cannot train a 3D U-Net on it.*has: cpu"):
        pick_device("mps")
