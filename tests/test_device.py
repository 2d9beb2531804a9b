"""The host never waits for a GPU within an epoch or among windows: a dry run on a CUDA device that need not exist.

Under torch's FakeTensorMode tensors have a device, a shape and a type, but no values. Whatever needs a value on the
host (`item`, `bool`, `nonzero`, a mask as index) fails, and so does an operation on tensors of two devices. Copies from
the device, and copies to it that the host waits for, are refused in addition.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from random_models import planned, sliding
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_lite.data.labels import Labels
from nnunet_lite.inference.sliding_window import average_windows
from nnunet_lite.inference.windows import schedule
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.precision import ComputeFormat
from nnunet_lite.networks.unet import UNet, set_deep_supervision
from nnunet_lite.planning.memory import BATCHES, training_memory
from nnunet_lite.planning.schema import Configuration
from nnunet_lite.planning.swaps import ClassSwap
from nnunet_lite.preprocessing.resampling import blocks
from nnunet_lite.training import augmentation, dataloader, loss
from nnunet_lite.training.cache import load_case, move_case
from nnunet_lite.training.dataloader import make_batch
from nnunet_lite.training.job import Job
from nnunet_lite.training.learner import compute_loss, make_learner, train_step
from nnunet_lite.training.loss import pseudo_dice_counts

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
MakeJob = Callable[..., Job]


class NoWaiting(TorchDispatchMode):
    """Refuse copies between host and device that the host waits for; constants are copied in the first step."""

    def __init__(self, first_step: bool = False) -> None:
        super().__init__()
        self.first_step = first_step

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (aten._pin_memory.default, aten.pin_memory.default):  # a real one needs a driver
            if not args[0].is_contiguous():
                raise RuntimeError("the host waits for a copy that is not contiguous")
            return args[0]
        if torch.is_inference_mode_enabled() and function.namespace == "aten" and function._can_decompose():
            with self:
                return function.decompose(*args, **kwargs)
        if function is aten.grid_sampler_2d.default:  # torch replaces it by indexing
            return args[0].new_empty((*args[0].shape[:2], *args[1].shape[1:3]))
        if function in (aten._fused_sgd_.default, aten._fused_adamw_.default):  # change values only
            return None
        if function is aten._to_copy.default:
            source, target = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
            if source == "cuda" and target == "cpu":
                raise RuntimeError("the host reads a tensor of the device")
            if (source, target) == ("cpu", "cuda") and not kwargs.get("non_blocking") and not self.first_step:
                raise RuntimeError("the host waits for a copy to the device")
        return function(*args, **kwargs)


class WithoutDriver(TorchFunctionMode):
    """Do in Python what torch's C++ code does only with a driver: indexing, and the backward pass, as zeros."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            return self.index(*args)
        if function is Tensor.__setitem__:
            target, key, value = args
            if isinstance(key, Tensor):
                return aten.index_put_(target, [key], value)
            view = self.index(target, key)
            return aten.copy_(view, value) if isinstance(value, Tensor) else view.fill_(value)
        same = {Tensor.copy_: aten.copy_, Tensor.contiguous: aten.contiguous, Tensor.__invert__: aten.bitwise_not}
        function = same.get(function, function)
        if function is Tensor.backward and self.network is not None:
            for parameter in self.network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            return None
        return function(*args, **(kwargs or {}))

    def index(self, x: Tensor, key: Any) -> Tensor:
        keys = list(key) if isinstance(key, tuple) else [key]
        for i, part in enumerate(keys):
            if part is Ellipsis:
                taken = sum(other is not None for other in keys) - 1
                keys[i : i + 1] = [slice(None)] * (x.ndim - taken)
                break
        axis, indices = 0, []
        for part in keys:
            if part is None:
                x = x.unsqueeze(axis)
            elif isinstance(part, slice):
                x = aten.slice(x, axis, part.start, part.stop, part.step or 1)
            elif isinstance(part, Tensor):
                indices = [None] * axis + [part]
            else:
                x, axis = x.select(axis, int(part)), axis - 1
            axis += 1
        return aten.index(x, indices) if indices else x


@contextmanager
def dry_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors of the block have no values, on a device "cuda" that this machine need not have."""
    generator = torch.Generator
    with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        patch.setattr(torch, "Generator", lambda device=None: generator())  # one of CUDA needs a driver
        patch.setattr(nn.Module, "to", lambda module, *_, **__: module)  # networks are on the device
        try:
            yield
        finally:
            loss._constant.cache_clear()
            loss._membership.cache_clear()


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "two devices": lambda x: x + torch.ones(x.shape),
    "blocking copy": lambda x: torch.ones(3).to(x.device),
    "copy with gaps": lambda x: torch.ones(3, 4)[:, 1:].pin_memory().to(x.device, non_blocking=True),
}
RIGHT: dict[str, Callable[[Tensor], Any]] = {
    "where": lambda x: torch.where(x > 0, x, 0).sum(),
    "pinned": lambda x: torch.ones(x.shape).pin_memory().to(x.device, non_blocking=True) + x,
    "index": lambda x: x.index_copy_(0, torch.arange(2, device=x.device), x[:2])[..., None, 1:],
}


@pytest.mark.parametrize("name", [*WRONG, *RIGHT])
def test_a_dry_run_finds_what_waits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with dry_run(monkeypatch), WithoutDriver(), NoWaiting():
        x = torch.randn(3, 4, device=CUDA)
        if name in RIGHT:
            RIGHT[name](x)
            return
        with pytest.raises(Exception):  # noqa: B017 - torch has several
            WRONG[name](x)


CHANCES = (
    "noise",
    "blur",
    "brightness",
    "contrast",
    "low_resolution",
    "gamma",
    "gamma_inverted",
    "rotation",
    "scaling",
)
ALL = {f"augmentation.p_{name}": 1 for name in CHANCES} | {"augmentation.p_mirror": 0.5}
REGIONS = Labels(names={"background": 0, "whole": (1, 2), "Posterior": (2,)}, region_order=(1, 2))
KINDS: dict[str, dict[str, Any]] = {
    "3d": {},
    "2d": {"configuration": "2d"},
    "top-k and weights": {"loss.top_k": 1, "loss.bce": 1, "loss.class_weights": [1, 2, 3]},
    "regions": {"plan": {"labels": REGIONS}},
    "ignored voxels": {"plan": {"labels": Labels(names={"background": 0, "Anterior": 1}, ignore=2)}},
    "swap": {"augmentation.mirror_swap": [["Anterior", "Posterior"]], "optimizer.ema": 0.9},
    "adamw": {"optimizer.name": "adamw", "training.gradient_clip": None},
    "muon": {"optimizer.name": "muon"},
    "cascade": {"augmentation.p_cascade_morphology": 1, "augmentation.p_cascade_removal": 0},
}


def cuda_job(job: MakeJob, tiny_cases: list[Any], kind: str) -> Job:
    """A job whose cases are on the device; within `dry_run`."""
    run = job(**{**ALL, **KINDS[kind]})
    cases = [load_case(case) for case in tiny_cases[:2]]
    if kind == "cascade":
        cases = [replace(case, previous=case.label) for case in cases]
        second = run.planned.model_copy(update={"previous_stage": "3d_lowres"})
        run = replace(run, plan=run.plan.model_copy(update={"configurations": {"3d_fullres": second}}))
    on_device = [move_case(case, CUDA) for case in cases]
    return replace(run, device=CUDA, training=on_device, validation=on_device)


def on_device(network: nn.Module) -> nn.Module:
    """Give a network tensors on the device, without values."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty(weight.shape, device=CUDA))
    return network


def train_steps(run: Job) -> Tensor:
    """Do two steps, of which the second may not wait, and count hits of the pseudo-validation."""
    network = build_network(run.plan, run.configuration)
    set_deep_supervision(network, True)
    labels = run.plan.labels
    with WithoutDriver(network):
        own = make_learner(run, on_device(network), ComputeFormat())
        for i in range(2):
            with NoWaiting(first_step=i == 0):
                batch = make_batch(run, run.training, 0, i, augment=True)
                step_loss, updated = train_step(run, own, [batch], 0.01, i)
                outputs = compute_loss(run, own, batch)[1]
                counts = pseudo_dice_counts(outputs[0], batch[1], labels)
    assert {tensor.device for tensor in (*batch[:2], step_loss, updated, counts)} == {CUDA}
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_does_not_wait(
    job: MakeJob, tiny_cases: list[Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Batches, augmentation, network, loss, optimizer; what a cascade removes, which the host finds, is left out."""
    with dry_run(monkeypatch):
        run = cuda_job(job, tiny_cases, kind)
        assert train_steps(run).shape == (3, len(run.plan.labels.region_names))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (augmentation, "apply_intensity"),
        (augmentation, "apply_mirror"),
        (augmentation, "vote"),
        (dataloader, "read_box"),
        (loss, "class_sums"),
        (loss, "downsample_classes"),
    ],
)
def test_a_step_that_waits_is_found(
    job: MakeJob, tiny_cases: list[Any], monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    """An `item` anywhere in a step fails the test above."""
    original = getattr(module, name)

    def wait(*arguments: Any, **options: Any) -> Any:
        torch.ones((), device=CUDA).item()
        return original(*arguments, **options)

    with dry_run(monkeypatch):
        run = cuda_job(job, tiny_cases, "3d")
        monkeypatch.setattr(module, name, wait)
        with pytest.raises(DataDependentOutputException):
            train_steps(run)


class Peak(TorchDispatchMode):
    """Sum the bytes of the tensors of a device that exist at the same time, each memory once."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.bytes, self.peak = Counter[int](), 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.device == CUDA:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.bytes += 0 if self.users[key] else size
                self.users[key] += 1
                weakref.finalize(tensor, self.release, key, size)
        self.peak = max(self.peak, self.bytes)
        return result

    def release(self, key: int, size: int) -> None:
        self.users[key] -= 1
        self.bytes -= 0 if self.users[key] else size


@pytest.mark.parametrize(("kind", "channels"), [("3d", 1), ("3d", 4), ("2d", 1), ("cascade", 1)])
def test_the_memory_of_a_batch_is_counted(
    job: MakeJob, tiny_cases: list[Any], monkeypatch: pytest.MonkeyPatch, kind: str, channels: int
) -> None:
    """In the making, all its samples rotated and scaled; the other batches of the plan are finished ones."""
    with dry_run(monkeypatch), WithoutDriver(), NoWaiting(first_step=True), Peak() as peak:
        run = cuda_job(job, tiny_cases, kind)
        cases = [replace(case, image=case.image.expand(channels, -1, -1, -1)) for case in run.training]
        run = replace(run, plan=run.plan.model_copy(update={"channels": run.plan.channels * channels}))
        before, taken = peak.bytes, []
        for i in range(5):
            peak.peak = before
            make_batch(run, cases, 0, i, augment=True)
            taken.append(peak.peak - before)
    previous = run.plan.labels.n_classes - 1 if kind == "cascade" else 0
    c, finished = run.planned, (BATCHES - 1) * (4 * (channels + previous) + 1)
    predicted = training_memory(c.network, c.patch_size, c.batch_size, channels, 3, previous)["batches"]
    counted = predicted - finished * c.batch_size * prod(c.patch_size)
    least = 0.4 if kind == "2d" else 0.6  # in two dimensions four neighbours vote, not eight
    assert least * counted < median(taken) < 1.15 * counted


@pytest.mark.parametrize("kind", ["3d", "2d", "top-k and weights", "regions", "ignored voxels"])
def test_the_backward_pass_does_not_wait(job: MakeJob, kind: str) -> None:
    """On torch's device "meta", whose tensors have no values either."""
    run = job(**KINDS[kind])
    with torch.device("meta"):
        network = build_network(run.plan, run.configuration)
        set_deep_supervision(network, True)
        outputs = network(torch.randn(5, 1, *run.planned.patch_size))
        classes = torch.zeros((5, *run.planned.patch_size), dtype=torch.uint8)
        found = loss.deep_supervision_loss(outputs, classes, run.plan, run.configuration, run.settings.loss)
    found.backward()
    trained = [parameter for name, parameter in network.named_parameters() if not name.startswith("heads.0")]
    assert all(parameter.grad is not None for parameter in trained)


# ---------------------------------------------------------------------------------------------------------- predicting

WINDOWS: dict[str, tuple[Configuration, int, dict[str, Any]]] = {
    "3d": (planned((16, 16, 16)), 4, {"mirror_axes": (0, 1, 2), "swap": ClassSwap(2, (0, 2, 1, 3), (0, 2, 1, 3))}),
    "2d": (planned((16, 16)), 4, {"mirror_axes": (0, 1)}),
    "features": (
        planned((16, 16, 16)),
        40,
        {"mirror_axes": (2,), "swap": ClassSwap(2, *[(0, 2, 1, *range(3, 40))] * 2)},
    ),
    "cascade": (
        planned((16, 16, 16)),
        3,
        {"n_classes": 3, "mirror_axes": (2,), "swap": ClassSwap(2, *[(0, 2, 1)] * 2)},
    ),
}


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("n_folds", [1, 2])
def test_the_windows_of_an_image_do_not_wait(monkeypatch: pytest.MonkeyPatch, kind: str, n_folds: int) -> None:
    """Constants go to the device with the first windows; the slices of a row are copied while others are computed."""
    configuration, n_logits, options = WINDOWS[kind]
    image = np.ones((2 if kind == "cascade" else 1, 24, 24, 24), np.float32)
    n_inputs = 3 if kind == "cascade" else 1  # the image, and two classes
    networks = [UNet(configuration.network, n_inputs, n_logits).eval() for _ in range(n_folds)]
    head = sliding(networks, configuration, n_logits, **options).head
    assert (head is not None) == (kind == "features")
    with dry_run(monkeypatch), WithoutDriver():
        window = sliding([on_device(network) for network in networks], configuration, n_logits, **options)
        window = replace(window, device=CUDA)
        window.__dict__["head"] = head  # from weights on the CPU, as it is made before the first window
        tiling, batch_size = window.tile(image.shape[1:], 0.5, 4)
        parts = blocks(24, 36, 1, 8)
        sums = torch.empty(schedule(tiling[0], parts)[1], window.channels, 24, 24, device=CUDA)
        rows = average_windows(window, image, tiling, parts, sums, batch_size)
        for number in range(len(tiling[0])):
            with NoWaiting(first_step=number == 0):
                _, finished = next(rows)
                assert finished.device == CUDA
