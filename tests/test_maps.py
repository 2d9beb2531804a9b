"""Several models decide together what the mean of their probabilities says, and their maps are what they claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_streaming import CPU, FP32, configured, labels_of, noise, placed, random_networks

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.inference.memory import PredictionTask, plan_memory
from nnunet_lite.inference.outputs import (
    ExtraMaps,
    _vote,
    in_step,
    open_stream,
    output_names,
    parse_label_names,
    predict_label_map,
    predict_maps,
)
from nnunet_lite.inference.predictor import load
from nnunet_lite.inference.sliding_window import SlidingWindow, build_sliding_window, predict_logits
from nnunet_lite.planning.schema import Resampling
from nnunet_lite.preprocessing.pipeline import Placement, decode_logits, output_values
from nnunet_lite.preprocessing.resampling import Block, resample_image

REGIONS = Labels(names={"background": 0, "whole": (1, 2), "core": 2}, region_order=(1, 2))
TARGET = (21, 30, 26)
SHAPES = ((30, 22, 25), (13, 30, 26), (21, 16, 31))  # three spacings of one image


def logits_on_grid(passes: SlidingWindow, image: torch.Tensor) -> np.ndarray:
    """The logits of the whole image, by the operators that resample images."""
    return resample_image(predict_logits(passes, image).numpy(), TARGET, (1, 1, 1), (1, 1, 1), 1, 1, separate_z=False)


def probabilities(logits: np.ndarray, labels: Labels) -> np.ndarray:
    tensor = torch.from_numpy(logits)
    return (tensor.sigmoid() if labels.has_regions else tensor.softmax(0)).numpy()


def asked(n_folds: int, labels: Labels, margin: bool = False) -> tuple[list[list[SlidingWindow]], list[PredictionTask]]:
    """Three models of folds each, and what is asked of them: the passes to see whole, the requests to stream."""
    configuration, whole, requests = configured((16, 16, 16)), [], []
    for number, shape in enumerate(SHAPES):
        torch.manual_seed(number)
        networks = random_networks(configuration, labels.n_channels, n_folds)
        for i, network in enumerate(networks):
            for parameter in network.parameters():
                parameter.mul_(1 + 0.3 * (number + i))
        made = [
            [build_sliding_window([n], configuration, labels.n_channels, FP32, CPU, whole=w) for n in networks]
            for w in (True, False)
        ]
        whole.append(made[0])
        place = placed(shape, TARGET, order=(0, 2, 1) if margin else (0, 1, 2))
        requests += [PredictionTask(passes, noise(shape), place, Resampling()) for passes in made[1]]
    return whole, requests


@pytest.mark.parametrize("labels", [labels_of(3), labels_of(20), REGIONS])
def test_models_vote_with_their_mean_probability(labels: Labels) -> None:
    whole, requests = asked(2, labels)
    footprints = plan_memory(requests, labels, 0.5)
    names = output_names(labels)
    streams = [open_stream(*one) for one in zip(requests, footprints, strict=True)]
    maps: dict[str, np.ndarray] = {}

    def new_map(name: str) -> np.ndarray:
        assert name not in maps
        maps[name] = np.zeros(TARGET, np.uint8)
        return maps[name]

    wanted = ExtraMaps(names[1:], uncertainty=True)
    models = [streams[:2], streams[2:4], streams[4:]]
    found = predict_maps(models, requests[0].placement, labels, wanted, new_map)

    folds = [[logits_on_grid(p, noise(shape)) for p in model] for model, shape in zip(whole, SHAPES, strict=True)]
    shares = np.mean([probabilities(np.mean(logits, axis=0), labels) for logits in folds], axis=0)
    expected = decode_logits(shares - 0.5, labels)
    assert (found == output_values(labels)[expected]).mean() > 0.9999
    assert len(np.unique(found)) > 1
    for name in names[1:]:
        close = np.abs(maps.pop(f"probabilities/{name}") / 255 - shares[names.index(name)])
        assert close.max() < 0.5 / 255 + 1e-4
    votes = np.mean([decode_logits(logits, labels) != expected for model in folds for logits in model], axis=0)
    assert (np.abs(maps.pop("uncertainty/disagreement") / 255 - votes) < 0.01).mean() > 0.999
    assert 0 < votes.mean() < 1
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
    _, requests = asked(1, labels, margin=True)
    request = requests[0]
    (footprint,) = plan_memory([request], labels, 0.5)
    place: Placement = request.placement
    alone = predict_label_map(open_stream(request, footprint), place, labels)
    maps: dict[str, np.ndarray] = {}
    wanted = ExtraMaps(("background", "label 3"))
    shape = place.geometry.shape
    found = predict_maps(
        [[open_stream(request, footprint)]],
        place,
        labels,
        wanted,
        lambda name: maps.setdefault(name, np.zeros(shape, np.uint8)),
    )
    assert np.array_equal(found, alone)
    corner = tuple(0 for _ in shape)
    assert alone[corner] == 0
    assert (maps["probabilities/background"][corner], maps["probabilities/label 3"][corner]) == (255, 0)
    assert maps["probabilities/background"].min() < 100


def test_streams_wait_for_each_other() -> None:
    def blocks(sizes: list[int]) -> list[list[Block]]:
        starts = iter(range(sum(sizes)))
        return [[Block(i, i + 1, 0, 1, None) for i in (next(starts) for _ in range(size))] for size in sizes]

    taken: list[int] = []

    def watched(parts: list[list[Block]]) -> object:
        for some in parts:
            yield some
            taken.append(len(some))

    streams = [iter(blocks([0, 3, 0, 4])), watched(blocks([1, 1, 5]))]
    out = [pair for parts in in_step(streams) for pair in parts]  # type: ignore[arg-type]
    assert [(a.start, b.start) for a, b in out] == [(i, i) for i in range(7)]
    assert taken[:2] == [1, 1]


def test_memory_is_shared_among_models() -> None:
    labels = labels_of(4)
    _, requests = asked(1, labels)
    alone = [plan_memory([request], labels, 0.5)[0].host for request in requests]
    together_ = plan_memory(requests, labels, 0.5, limit=2 * sum(alone))
    assert sum(footprint.host for footprint in together_) <= 2 * sum(alone)
    assert len({footprint.slab for footprint in together_}) == 1
    with pytest.raises(UserError, match=r"[kM]B of memory at least"):
        plan_memory(requests, labels, 0.5, limit=min(alone) // 20)


def test_names_of_labels() -> None:
    labels = Labels(names={"background": 0, "liver": 1, "tumor": 4})
    assert parse_label_names("all", labels) == ("background", "liver", "tumor")
    assert parse_label_names("tumor, liver", labels) == ("tumor", "liver")
    assert parse_label_names("all", REGIONS) == ("whole", "core")
    with pytest.raises(UserError, match=r"'lever' is no label of the model. Its labels are: background, liver, tumor"):
        parse_label_names("lever", labels)


def test_a_trained_model_and_itself_agree(tiny_model: Path, hippocampus: Path) -> None:
    """The mean of equal probabilities decides as the logits do, but for rounding."""
    from nnunet_lite.data.images import read_image

    model = load(tiny_model, device="cpu", settings={"inference.mirroring": False, "inference.precision": "fp32"})
    image = read_image(sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0])
    twice = replace(model, partners=(model,))
    assert (twice(image) == model(image)).mean() > 0.9999


@pytest.mark.parametrize("labels", [labels_of(3), REGIONS])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_skipped_windows_are_surely_background(labels: Labels, kind: Callable[[np.ndarray], Any]) -> None:
    logits = np.zeros((labels.n_channels, 4, 5), np.float32)
    logits[:, 1:] = 0.25
    names = {name: number for number, name in enumerate(output_names(labels))}
    decided, values = _vote([[kind(logits)]], labels, False, names, ExtraMaps(uncertainty=True))
    expected = np.zeros(labels.n_channels) if labels.has_regions else np.eye(labels.n_channels)[0] * 255
    assert [int(values[name][0, 0]) for name in names] == expected.tolist()
    assert (values["uncertainty/entropy"][0] == 0).all() and (values["uncertainty/entropy"][1:] > 200).all()
    assert (np.asarray(decided)[0] == 0).all()
