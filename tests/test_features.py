"""Features tell noise from blur and a slope from none, and the stated error is the one that the entropy implies."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_lite.data.geometry import Geometry, Turn
from nnunet_lite.data.labels import Labels
from nnunet_lite.inference import features
from nnunet_lite.inference.features import describe_image, describe_labels, describe_prediction
from nnunet_lite.inference.outputs import ENTROPY, OF_MODELS, STEPS
from nnunet_lite.preprocessing.pipeline import Placement, Preprocessed

LABELS = Labels(names={"background": 0, "cube": 1, "bar": 2})
GEOMETRY = Geometry((24, 30, 36), (2.0, 1.0, 1.0))


@pytest.fixture
def image() -> np.ndarray:
    z, y, x = np.indices(GEOMETRY.shape)
    return np.sin(z / 4) + np.cos(y / 5) * np.sin(x / 6)


@pytest.fixture
def label_map() -> np.ndarray:
    made = np.zeros(GEOMETRY.shape, np.uint8)
    made[4:12, 5:15, 5:15] = 1
    made[0:2, 20:22, 3:30] = 2
    return made


def test_noise_blur_slopes_and_ghosts_move_their_features(image: np.ndarray) -> None:
    random = np.random.default_rng(0)
    found = describe_image(image[None], GEOMETRY)
    noisy = describe_image((image + random.normal(0, 0.2, image.shape))[None], GEOMETRY)
    assert all(
        noisy[f"0/{what}/{axis}"] > found[f"0/{what}/{axis}"] + 0.3 for what in ("step", "noise") for axis in "zyx"
    )
    sloping = describe_image((image + np.linspace(-3, 3, 36))[None], GEOMETRY)
    assert sloping["0/trend/x"] > found["0/trend/x"] + 0.5
    rough = image + random.normal(0, 0.05, image.shape)
    lines = np.ones(30)
    lines[::2] = 0.3
    ghosts = np.fft.ifft(np.fft.fft(rough, axis=1) * lines[:, None], axis=1).real
    assert describe_image(ghosts[None], GEOMETRY)["0/comb/y"] > describe_image(rough[None], GEOMETRY)["0/comb/y"] + 0.2
    assert found["spacing/z"] == pytest.approx(np.log(2)) and found["extent/x"] == pytest.approx(np.log(36))


def test_a_constant_image_and_a_picture_have_finite_features() -> None:
    for shape in ((24, 30, 36), (1, 30, 36), (2, 3, 4)):
        found = describe_image(np.ones((2, *shape), np.float32), Geometry(shape, (1.0, 1.0, 1.0)))
        assert np.isfinite(list(found.values())).all()


def test_labels_are_described_in_mm(label_map: np.ndarray) -> None:
    found = describe_labels(label_map, {ENTROPY: np.zeros_like(label_map)}, GEOMETRY, LABELS)
    cube, bar = found["cube"], found["bar"]
    assert np.exp(cube["volume"]) == pytest.approx(8 * 10 * 10 * 2) and cube["voxels"] == 800
    assert np.exp(cube["length/z"]) == pytest.approx(16) and np.exp(cube["length/x"]) == pytest.approx(10)
    assert cube["edge"] == 0 and bar["edge"] == pytest.approx(0.5)  # one of its two slices is the first of the image
    assert cube["scattered"] == 0 and bar["compactness"] > cube["compactness"]
    assert bar["position/y"] - cube["position/y"] == pytest.approx(20.5 - 9.5)


def test_the_error_is_what_the_entropy_implies(label_map: np.ndarray) -> None:
    """Every voxel of the cube is wrong with a probability of 10 %, as is none outside: Dice 1.8 / 1.9."""
    bits = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)) / np.log2(3)
    entropy = np.where(label_map == 1, round(bits * STEPS), 0).astype(np.uint8)
    found = describe_labels(label_map, {ENTROPY: entropy, OF_MODELS: entropy}, GEOMETRY, LABELS)
    assert found["cube"]["error"] == pytest.approx(1 - 1.8 / 1.9, abs=1e-3)
    assert found["cube"]["inner"] == pytest.approx(0.1, abs=2e-3) and found["bar"]["error"] == pytest.approx(
        0, abs=1e-6
    )
    assert found["cube"]["disagreement"] == pytest.approx(bits, abs=2e-3)


def test_slabs_make_no_difference(label_map: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    label_map[random.random(label_map.shape) < 0.1] = 2
    maps = {name: random.integers(0, STEPS, label_map.shape).astype(np.uint8) for name in (ENTROPY, OF_MODELS)}
    whole = describe_labels(label_map, maps, GEOMETRY, LABELS)
    for n in (1, 3 * label_map[0].size):  # one slice at a time, and three
        monkeypatch.setattr(features, "_SLAB", n)
        found = describe_labels(label_map, maps, GEOMETRY, LABELS)
        assert all(found[name] == pytest.approx(whole[name], rel=1e-12) for name in whole)


def test_a_label_that_is_not_there_has_no_features(label_map: np.ndarray) -> None:
    label_map[label_map == 2] = 0
    assert describe_labels(label_map, {ENTROPY: np.zeros_like(label_map)}, GEOMETRY, LABELS)["bar"] == {}
    label_map[:] = 0
    assert describe_labels(label_map, {ENTROPY: np.zeros_like(label_map)}, GEOMETRY, LABELS) == {"cube": {}, "bar": {}}


def test_a_large_image_may_lack_a_label(label_map: np.ndarray) -> None:
    """And a label is described as in a small one, but for its place."""
    label_map[label_map == 1] = 0
    large = np.pad(label_map, ((0, 50), (0, 60), (0, 60)))
    geometry = Geometry(large.shape, GEOMETRY.spacing)
    found = describe_labels(large, {ENTROPY: np.zeros_like(large)}, geometry, LABELS)
    assert found["cube"] == {}
    assert found == describe_labels(label_map, {ENTROPY: np.zeros_like(label_map)}, GEOMETRY, LABELS)


def test_regions_are_described_one_by_one() -> None:
    regions = Labels(names={"background": 0, "whole": (1, 2), "core": 2}, region_order=(1, 2))
    label_map = np.zeros(GEOMETRY.shape, np.uint8)
    label_map[4:12, 4:12, 4:12] = 1
    label_map[6:8, 6:8, 6:8] = 2
    found = describe_labels(label_map, {ENTROPY: np.zeros_like(label_map)}, GEOMETRY, regions)
    assert found["whole"]["voxels"] == 512 and found["core"]["voxels"] == 8


def test_values_may_be_negative_and_the_background_any(label_map: np.ndarray) -> None:
    labels = Labels(names={"background": 3, "cube": 0, "bar": -2})
    maps = {ENTROPY: np.zeros_like(label_map)}
    found = describe_labels(np.array([3, 0, -2], np.int8)[label_map], maps, GEOMETRY, labels)
    assert found == describe_labels(label_map, maps, GEOMETRY, LABELS)


def test_a_turned_image_is_described_as_the_network_takes_it(image: np.ndarray, label_map: np.ndarray) -> None:
    turn = Turn((1, 0, 2), (False, True, False))
    array, box = turn.apply(image[None]), ((0, 30), (0, 24), (0, 36))
    placement = Placement(GEOMETRY, turn, box, (1.0, 2.0, 1.0), (1.0, 2.0, 1.0), array.shape[1:])
    prepared = Preprocessed(array, None, placement)
    found = describe_prediction(prepared, label_map, {ENTROPY: np.zeros_like(label_map)}, LABELS)
    assert found.axes == ("y", "z", "x") and found.image["spacing/y"] == pytest.approx(np.log(2))
    assert found.labels["cube"]["length/y"] == pytest.approx(np.log(16))
