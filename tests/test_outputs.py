"""Label maps slab by slab equal those of whole images, in memory that is planned; several models vote."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from random_models import (
    REGIONS,
    Shape,
    labels_of,
    noise,
    placed,
    planned,
    predict_logits,
    random_networks,
    sliding,
)
from torch import Tensor

from nnunet_lite.data.images import read_image
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.inference import outputs
from nnunet_lite.inference.memory import PredictionTask, plan_memory
from nnunet_lite.inference.outputs import (
    ExtraMaps,
    _vote,
    in_step,
    output_names,
    parse_label_names,
    predict_label_map,
)
from nnunet_lite.inference.predictor import load
from nnunet_lite.inference.sliding_window import SlidingWindow
from nnunet_lite.networks.devices import is_out_of_memory
from nnunet_lite.planning.schema import Configuration, Resampling
from nnunet_lite.planning.swaps import ClassSwap
from nnunet_lite.preprocessing.pipeline import (
    Placement,
    decode_logits,
    output_values,
    preprocess_image,
    restore_segmentation,
)
from nnunet_lite.preprocessing.resampling import Block, resample_image

ISOTROPIC, COARSE = (1.0, 1.0, 1.0), (5.0, 1.0, 1.0)
CUBE = planned((16, 16, 16))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other
    yield
    torch.set_num_threads(before)


def label_map(task: PredictionTask, labels: Labels, dtype: torch.dtype | None = None, **options: Any) -> np.ndarray:
    ((plan,), *_) = plan_memory([task], labels, 0.5)
    plan = plan if dtype is None else replace(plan, dtype=dtype)
    return predict_label_map([[task]], [[plan]], labels, **options)[0]


def agreement(
    configuration: Configuration,
    place: Placement,
    labels: Labels,
    how: dict[str, Any] | None = None,
    folds: int = 1,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> float:
    """The share of voxels on which streaming and the logits of the whole image agree."""
    networks, image = random_networks(configuration, labels.n_channels, folds), noise(place.shape)
    resampling = Resampling(**(how or {}))
    window = sliding(networks, configuration, labels.n_channels, **options)
    expected = restore_segmentation(predict_logits(window, image), place, labels, resampling)
    assert len(np.unique(expected)) > 2
    found = label_map(PredictionTask(window, image, place, resampling), labels, dtype)
    assert found.shape == place.geometry.shape and found.dtype == expected.dtype
    return float((found == expected).mean())


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((37, 20, 22), (60, 31, 41)),  # to a finer grid
        ((37, 20, 22), (19, 13, 15)),  # to a coarser one
        ((50, 17, 20), (50, 17, 20)),
        ((9, 30, 12), (23, 25, 12)),  # smaller than the patch, and not resampled along one axis
        ((1, 24, 24), (1, 30, 30)),  # a single slice
        ((50, 16, 16), (3, 16, 16)),  # slices that nothing needs
    ],
)
@pytest.mark.parametrize("labels", [labels_of(4), REGIONS, labels_of(20)])
def test_slabs_equal_the_whole(shape: Shape, target: Shape, labels: Labels) -> None:
    assert agreement(CUBE, placed(shape, target), labels) > 0.9999


@pytest.mark.parametrize("spacing", [COARSE, (1.0, 5.0, 1.0), (1.0, 1.0, 5.0)])
@pytest.mark.parametrize("how", [{}, {"logits_order_z": 1}, {"separate_z": False}, {"logits_order": 3}])
def test_coarse_axes_and_other_orders(spacing: tuple[float, float, float], how: dict[str, Any]) -> None:
    place = placed((24, 21, 19), (40, 33, 30), spacing)
    assert agreement(planned((8, 16, 16)), place, labels_of(4), how) > 0.9999


@pytest.mark.parametrize("order", [2, 3, 5])
def test_splines_that_reach_far_along_the_first_axis(order: int) -> None:
    place = placed((90, 12, 13), (131, 17, 12))
    assert agreement(planned((8, 16, 16)), place, labels_of(3), {"logits_order": order}) > 0.9999


@pytest.mark.parametrize(("n_classes", "at_once"), [(3, 1), (3, 100), (20, 4)])
def test_two_dimensions(n_classes: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlidingWindow, "at_once", at_once)
    place = placed((9, 40, 37), (9, 31, 50), COARSE)
    assert agreement(planned((16, 24)), place, labels_of(n_classes), mirror_axes=(0, 1)) > 0.9999


@pytest.mark.parametrize(
    ("n_classes", "options"),
    [
        (4, {"order": (2, 0, 1)}),  # axes are put back, and the margin is background
        (20, {"order": (2, 0, 1), "mirror_axes": (0, 2), "folds": 2}),
        (4, {"mirror_axes": (1, 2), "folds": 2, "swap": True}),
        (40, {"mirror_axes": (1, 2), "folds": 2, "swap": True}),  # features of swapped copies are summed apart
    ],
)
def test_other_axes_mirrored_copies_and_swapped_labels(n_classes: int, options: dict[str, Any]) -> None:
    if options.pop("swap", False):
        options["swap"] = ClassSwap(2, *[(0, 2, 1, *range(3, n_classes))] * 2)
    place = placed((20, 18, 22), (25, 30, 20), order=options.pop("order", (0, 1, 2)))
    assert agreement(CUBE, place, labels_of(n_classes), **options) > 0.9999


@pytest.mark.parametrize("n_classes", [4, 20])
def test_float16_if_memory_is_short(n_classes: int) -> None:
    found = agreement(CUBE, placed((37, 20, 22), (60, 31, 41)), labels_of(n_classes), dtype=torch.float16)
    assert 0.995 < found < 1, "of a random network, whose logits are close to each other"


def test_trained_networks(tiny_model: Path, scans: list[Path]) -> None:
    model = load(tiny_model, device="cpu", settings={"inference.mirroring": False, "inference.precision": "fp32"})
    labels, how = model.plan.labels, model.configuration.resampling
    window = sliding(model.networks, model.configuration, labels.n_channels)
    for scan, spacing in zip(scans, [ISOTROPIC, (1.2, 0.7, 0.9)], strict=False):
        image = read_image(scan)
        image = replace(image, geometry=replace(image.geometry, spacing=spacing))
        given = preprocess_image(image, None, model.plan, model.configuration)
        expected = restore_segmentation(predict_logits(window, given.image), given.placement, labels, how)
        found = label_map(PredictionTask(window, given.image, given.placement, how), labels)
        assert len(np.unique(found)) > 1 and (found == expected).mean() > 0.9999


def test_empty_windows_may_be_left_out() -> None:
    configuration, place = planned((8, 8, 8)), placed((40, 12, 12), (50, 12, 12))
    image = noise(place.shape)
    image[:, 12:] = 0
    for n_classes in (4, 20):
        counts: list[int] = []
        (network,) = random_networks(configuration, n_classes)
        network.register_forward_pre_hook(lambda _, given, counts=counts: counts.append(len(given[0])))
        task = PredictionTask(sliding([network], configuration, n_classes), image, place, Resampling())
        full, less = (label_map(task, labels_of(n_classes), skip_empty=skip) for skip in (False, True))
        assert sum(counts) == 9 * 4 + 3 * 4, "two windows reach slices 8 to 12, and none those from 16 on"
        assert np.array_equal(less[:9], full[:9])
        assert not less[26:].any() and full[26:].any()


# -------------------------------------------------------------------------------------------------------------- memory


def test_the_fastest_way_that_fits_is_chosen_and_what_does_not_fit_is_refused() -> None:
    place, labels, configuration = placed((100, 60, 60), (200, 120, 120)), labels_of(20), planned((32, 32, 32))
    window = sliding(random_networks(configuration, 20), configuration, 20)
    task = PredictionTask(window, noise(place.shape), place, Resampling())
    ((largest,), *_) = plan_memory([task], labels, 0.5)
    assert (largest.batch_size, largest.dtype) == (window.at_once, torch.float32)
    found, limit = [largest], largest.host
    with pytest.raises(UserError, match=r"needs [\d.]+ MB of memory at least, [\d.]+ MB may be used\. Raise --max-mem"):
        while limit := int(0.98 * limit):
            found += plan_memory([task], labels, 0.5, limit)[0]
            assert found[-1].host <= limit
    assert (found[-1].batch_size, found[-1].dtype) == (1, torch.float16)
    assert {plan.batch_size for plan in found} == {8, 4, 2, 1}


MEASURED = """
import gc
import os
import torch
from random_models import labels_of, placed, planned, random_networks, sliding
from nnunet_lite.inference.memory import PredictionTask, plan_memory
from nnunet_lite.inference.outputs import predict_label_map
from nnunet_lite.networks.cpu import speed_up_on_cpu
from nnunet_lite.planning.schema import Resampling

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(1)
for n_folds, n_classes, features, slices in (
    (1, 3, 4, 48), (1, 3, 16, 48), (1, 118, 16, 48), (3, 118, 16, 48), (1, 40, 8, 96), (1, 40, 8, 384)
):
    configuration, labels = planned((48, 48, 48), (features, features)), labels_of(n_classes)
    networks = random_networks(configuration, n_classes, n_folds)
    for network in networks:
        speed_up_on_cpu(network.to(memory_format=torch.channels_last_3d))
    place = placed((slices, 72, 72), (slices * 3 // 2, 96, 96))
    image = torch.zeros(1, *place.shape).normal_().numpy()
    task = PredictionTask(sliding(networks, configuration, n_classes), image, place, Resampling())
    ((plan,), *_) = plan_memory([task], labels, 1.0)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # what follows is the peak from here on
    before = status("VmRSS")
    out, _ = predict_label_map([[task]], [[plan]], labels)
    print(status("VmHWM") - before, plan.host, out.nbytes)
"""


@pytest.mark.slow  # large images; test_memory.py has the arithmetic
def test_memory_is_as_planned_and_does_not_grow_with_the_image() -> None:
    """For one fold and three, few classes and many; the first prediction loads libraries too."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "200000"},  # freed memory goes back at once
    )  # fmt: skip
    _, *rows = ([int(n) for n in line.split()] for line in done.stdout.splitlines())
    assert len(rows) == 5
    for taken, planned_bytes, _ in rows:  # without AVX-512 other kernels are chosen, which take less
        assert 0.85 < planned_bytes / taken < 1.25, rows
    (double, _, of_double), (long, _, of_long) = rows[-2:]
    assert long - of_long < double - of_double + 2_000_000, "besides the label map nothing grows"


def stop_at(n: int, batch: int) -> Callable[..., None]:
    """Let a network be out of memory from its nth call on, for batches that are larger."""
    calls = itertools.count()

    def check(_: object, given: tuple[Tensor]) -> None:
        if len(given[0]) > batch and next(calls) >= n:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return check


@pytest.mark.parametrize("maps", [ExtraMaps(), ExtraMaps(("label 1",))])
def test_out_of_memory_continues_with_a_smaller_batch(
    maps: ExtraMaps, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the slabs that are finished, without the sums of before; only the smallest way that fails is an error."""
    in_use: list[int] = []

    def count_sums(_: torch.device) -> None:
        """Each `resample` refers to the sums that it resamples."""
        functions = [item for item in gc.get_objects() if type(item) is FunctionType]
        in_use.append(sum(function.__qualname__.endswith("<locals>.resample") for function in functions))

    monkeypatch.setattr("nnunet_lite.inference.outputs.release_memory", count_sums)
    configuration, labels, place = planned((8, 8, 8)), labels_of(4), placed((60, 12, 12), (90, 12, 12))
    calls: list[int] = []

    def predict(n: int, batch: int) -> np.ndarray:
        (network,) = random_networks(configuration, 4)
        task = PredictionTask(sliding([network], configuration, 4), noise(place.shape), place, Resampling())
        plans = plan_memory([task], labels, 0.5)
        calls.clear()
        network.register_forward_pre_hook(stop_at(n, batch))
        network.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
        return predict_label_map([[task]], plans, labels, maps)[0]

    expected = predict(1000, 0)
    n_windows = sum(calls)
    assert max(calls) == 4 and n_windows == 14 * 4, "the windows of a row"
    assert (predict(9, 2) == expected).all()
    assert calls[:9] == [4] * 9 and set(calls[9:]) == {2}
    assert n_windows < sum(calls) <= n_windows + 6 * 4, "what was finished is not computed again"
    assert "memory is short; the rest of this image is predicted with 2 windows at once" in capfd.readouterr().err
    with pytest.raises(UserError, match="memory is too short for this image"):
        predict(9, 0)
    assert len(in_use) > 3 and not any(in_use)


def test_out_of_memory_frees_the_sums_before_it_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may fill the device; slabs that are written already must not keep them."""
    configuration, place, (network,) = planned((8, 8, 8)), placed((60, 12, 12), (90, 12, 12)), random_networks(CUBE, 4)
    task = PredictionTask(sliding([network], configuration, 4), noise(place.shape), place, Resampling())
    network.register_forward_pre_hook(stop_at(9, 2))
    used: list[weakref.ref[Any]] = []
    kept: list[Any] = []

    def watch(streams: Any) -> Iterator[Any]:
        for slabs in in_step(streams):
            used.append(weakref.ref(slabs[0][0].func))  # its closure has the sums
            yield slabs

    monkeypatch.setattr(outputs, "in_step", watch)
    monkeypatch.setattr(outputs, "release_memory", lambda _: kept.append([ref() for ref in used]))
    predict_label_map([[task]], plan_memory([task], labels_of(4), 0.5), labels_of(4))
    assert kept[0] and not any(any(functions) for functions in kept)


def test_other_errors_of_a_network_are_not_taken_for_lack_of_memory() -> None:
    texts = (
        "DefaultCPUAllocator: can't allocate memory",
        "GET was unable to find an engine to execute this computation",
    )
    for error in (MemoryError(), torch.OutOfMemoryError(), *map(RuntimeError, texts)):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_the_plan_for_a_gpu_counts_what_the_allocator_keeps_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second image, and the validation after training, are planned as the first image is."""
    configuration, labels, place = planned((32, 32, 32)), labels_of(4), placed((100, 60, 60), (200, 120, 120))
    window = replace(sliding(random_networks(configuration, 4), configuration, 4), device=torch.device("cuda"))
    task = PredictionTask(window, noise(place.shape), place, Resampling())
    gpu = {"mem_get_info": (8 << 30, 10 << 30), "memory_reserved": 0, "memory_allocated": 0}
    for name in gpu:
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name: gpu[name])
    first = plan_memory([task], labels, 0.5)
    assert first[0][0].sums_device.type == "cuda" and 500e6 < first[0][0].device < 1e9 and first[0][0].slab == 64
    assert [plan.sums_device.type for (plan,) in first[-2:]] == ["cpu", "cpu"], "the smallest ones sum on the CPU"
    gpu |= {"mem_get_info": (1 << 20, 10 << 30), "memory_reserved": 8 << 30, "memory_allocated": 1 << 20}
    assert plan_memory([task], labels, 0.5) == first
    gpu["memory_allocated"] = 8 << 30
    with pytest.raises(UserError, match="of GPU memory at least"):
        plan_memory([task], labels, 0.5)


# ------------------------------------------------------------------------------------------- several models, and maps

VOTED = Labels(names={"background": 0, "whole": (1, 2), "core": 2}, region_order=(1, 2))
TARGET = (21, 30, 26)
SHAPES = ((30, 22, 25), (13, 30, 26), (21, 16, 31))  # three spacings of one image


def logits_on_grid(window: SlidingWindow, image: np.ndarray) -> np.ndarray:
    """The logits of the whole image, by the operators that resample images."""
    return resample_image(predict_logits(window, image).numpy(), TARGET, (1, 1, 1), (1, 1, 1), 1, 1, separate_z=False)


def probabilities(logits: np.ndarray, labels: Labels) -> np.ndarray:
    tensor = torch.from_numpy(logits)
    return (tensor.sigmoid() if labels.has_regions else tensor.softmax(0)).numpy()


def three_models(n_folds: int, labels: Labels, margin: bool = False) -> list[list[PredictionTask]]:
    """Three models, with a task for each of some folds."""
    models = []
    for number, shape in enumerate(SHAPES):
        networks = random_networks(CUBE, labels.n_channels, n_folds)
        for i, network in enumerate(networks):
            for parameter in network.parameters():
                parameter.mul_(1 + 0.3 * (number + i))
        place = placed(shape, TARGET, order=(0, 2, 1) if margin else (0, 1, 2))
        windows = [sliding([network], CUBE, labels.n_channels) for network in networks]
        models.append([PredictionTask(window, noise(shape), place, Resampling()) for window in windows])
    return models


@pytest.mark.parametrize("labels", [labels_of(3), labels_of(20), VOTED])
def test_models_vote_with_their_mean_probability(labels: Labels) -> None:
    models, names = three_models(2, labels), output_names(labels)
    plans = plan_memory([task for model in models for task in model], labels, 0.5)
    found, maps = predict_label_map(models, plans, labels, ExtraMaps(names[1:], uncertainty=True, of_models=True))

    folds = [[logits_on_grid(task.window, task.image) for task in model] for model in models]
    shares = np.mean([probabilities(np.mean(logits, axis=0), labels) for logits in folds], axis=0)
    expected = decode_logits(shares - 0.5, labels)
    assert (found == output_values(labels)[expected]).mean() > 0.9999 and len(np.unique(found)) > 1
    for name in names[1:]:
        difference = np.abs(maps.pop(f"probabilities/{name}") / 255 - shares[names.index(name)])
        assert difference.max() < 0.5 / 255 + 1e-4
    votes = np.mean([decode_logits(logits, labels) != expected for model in folds for logits in model], axis=0)
    assert (np.abs(maps.pop("uncertainty/disagreement") / 255 - votes) < 0.01).mean() > 0.999
    assert 0 < votes.mean() < 1
    votes = np.mean([decode_logits(np.mean(model, axis=0), labels) != expected for model in folds], axis=0)
    assert (np.abs(maps.pop("uncertainty/disagreement_of_models") / 255 - votes) < 0.01).mean() > 0.999
    p = np.clip(shares.astype(float), 1e-12, 1)
    if labels.has_regions:
        q = np.clip(1 - shares.astype(float), 1e-12, 1)
        entropy = -(p * np.log2(p) + q * np.log2(q)).mean(axis=0)
    else:
        entropy = -(p * np.log(p)).sum(axis=0) / np.log(len(p))
    assert np.abs(maps.pop("uncertainty/entropy") / 255 - entropy).max() < 0.5 / 255 + 1e-3
    assert not maps


def test_one_model_decides_as_without_maps() -> None:
    labels = labels_of(20)
    ((task,), *_) = three_models(1, labels, margin=True)
    alone, plans = label_map(task, labels), plan_memory([task], labels, 0.5)
    found, maps = predict_label_map([[task]], plans, labels, ExtraMaps(("background", "label 3")))
    assert np.array_equal(found, alone) and alone[0, 0, 0] == 0
    assert {name: array[0, 0, 0] for name, array in maps.items()} == {
        "probabilities/background": 255, "probabilities/label 3": 0
    }  # fmt: skip
    assert maps["probabilities/background"].min() < 100


def test_streams_wait_for_each_other() -> None:
    def blocks(sizes: Sequence[int]) -> list[list[Block]]:
        starts = iter(range(sum(sizes)))
        return [[Block(i, i + 1, 0, 1, None) for i in (next(starts) for _ in range(size))] for size in sizes]

    used: list[int] = []

    def watched(parts: list[list[Block]]) -> Iterator[list[Block]]:
        for some in parts:
            yield some
            used.append(len(some))

    pairs = [pair for parts in in_step([iter(blocks([0, 3, 0, 4])), watched(blocks([1, 1, 5]))]) for pair in parts]
    assert [(a.start, b.start) for a, b in pairs] == [(i, i) for i in range(7)]
    assert used[:2] == [1, 1]


def test_memory_is_shared_among_models() -> None:
    labels = labels_of(4)
    tasks = [task for (task,) in three_models(1, labels)]
    alone = [plan_memory([task], labels, 0.5)[0][0].host for task in tasks]
    plans = plan_memory(tasks, labels, 0.5, limit=2 * sum(alone))[0]
    assert sum(plan.host for plan in plans) <= 2 * sum(alone) and len({plan.slab for plan in plans}) == 1
    with pytest.raises(UserError, match=r"[kM]B of memory at least"):
        plan_memory(tasks, labels, 0.5, limit=min(alone) // 20)


def test_names_of_labels() -> None:
    labels = Labels(names={"background": 0, "liver": 1, "tumor": 4})
    assert parse_label_names("all", labels) == ("background", "liver", "tumor")
    assert parse_label_names("tumor, liver", labels) == ("tumor", "liver")
    assert parse_label_names("all", VOTED) == ("whole", "core")
    with pytest.raises(UserError, match=r"'lever' is no label of the model. Its labels are: background, liver, tumor"):
        parse_label_names("lever", labels)


@pytest.mark.parametrize("labels", [labels_of(3), VOTED])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_skipped_windows_are_background_for_certain(labels: Labels, kind: Callable[[np.ndarray], Any]) -> None:
    logits = np.zeros((labels.n_channels, 4, 5), np.float32)
    logits[:, 1:] = 0.25
    names = {name: number for number, name in enumerate(output_names(labels))}
    decided, values = _vote([[kind(logits)]], labels, False, names, ExtraMaps(uncertainty=True))
    expected = np.zeros(labels.n_channels) if labels.has_regions else np.eye(labels.n_channels)[0] * 255
    assert [int(values[name][0, 0]) for name in names] == expected.tolist()
    assert (values["uncertainty/entropy"][0] == 0).all() and (values["uncertainty/entropy"][1:] > 200).all()
    assert (np.asarray(decided)[0] == 0).all()
