"""What may be given to a model from Python: arrays of every kind, with a spacing; what is no image is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import Image, read_image
from nnunet_lite.errors import UserError
from nnunet_lite.inference import cases
from nnunet_lite.inference.predictor import Predictor, load

FAST = {"inference.mirroring": False, "inference.step_size": 1.0, "inference.precision": "fp32"}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Predictor:
    return load(tiny_model, device="cpu", settings=FAST)


@pytest.fixture(scope="module")
def scans(hippocampus: Path) -> list[Path]:
    return sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[:3]


NUMBERS = [[[0.0, 1.0], [2.0, 3.0]], [[1.0, 0.0], [3.0, 2.0]]]
ARRAYS: dict[str, tuple[Any, Any, str]] = {
    "a spacing of 0": (NUMBERS, (1.0, 0.0, 1.0), "spacing of (1.0, 0.0, 1.0)"),
    "a spacing of NaN": (NUMBERS, (float("nan"), 1.0, 1.0), "spacing of (nan, 1.0, 1.0)"),
    "an infinite spacing": (NUMBERS, (float("inf"), 1.0, 1.0), "three positive numbers"),
    "a negative spacing": (NUMBERS, (-1.0, 1.0, 1.0), "three positive numbers"),
    "one number for the spacing": (NUMBERS, 1.0, "spacing of 1.0"),
    "four numbers for the spacing": (NUMBERS, (1.0, 1.0, 1.0, 1.0), "three positive numbers"),
    "digits for the spacing": (NUMBERS, "111", "spacing of '111'"),
    "words for the spacing": (NUMBERS, ("one", "1", "1"), "three positive numbers"),
    "an empty array": (np.zeros((0, 4, 4)), (1.0, 1.0, 1.0), "shape (0, 4, 4)"),
    "no channel": (np.zeros((0, 4, 4, 4)), (1.0, 1.0, 1.0), "shape (0, 4, 4, 4)"),
    "an empty list": ([], (1.0, 1.0, 1.0), "shape (0,)"),
    "complex numbers": (np.zeros((4, 4, 4), complex), (1.0, 1.0, 1.0), "complex128"),
    "objects": (np.full((4, 4, 4), None), (1.0, 1.0, 1.0), "object"),
    "numbers as objects": (np.zeros((4, 4, 4), object), (1.0, 1.0, 1.0), "astype('float32')"),
    "words": ([[["a"]]], (1.0, 1.0, 1.0), "no image"),
    "times": (np.zeros((4, 4, 4), "datetime64[s]"), (1.0, 1.0, 1.0), "datetime64"),
    "rows of other lengths": ([[[0.0, 1.0], [2.0]]], (1.0, 1.0, 1.0), "list is no array"),
    "nothing": (None, (1.0, 1.0, 1.0), "NoneType"),
    "a number": (7.0, (1.0, 1.0, 1.0), "shape ()"),
    "a dictionary": ({"image": 1}, (1.0, 1.0, 1.0), "dict"),
    "one slice without its axis": (np.zeros((4, 4)), (1.0, 1.0, 1.0), "array[None]"),
    "a batch": (np.zeros((1, 1, 4, 4, 4)), (1.0, 1.0, 1.0), "shape (1, 1, 4, 4, 4)"),
    "masked voxels": (np.ma.masked_equal(NUMBERS, 0.0), (1.0, 1.0, 1.0), "filled(0)"),
    "numbers beyond float32": (np.full((4, 4, 4), 1e300), (1.0, 1.0, 1.0), "as float32"),
    "infinite voxels": (np.full((4, 4, 4), np.inf, np.float16), (1.0, 1.0, 1.0), "64 voxels of channel MRI"),
    "channels too many": (np.zeros((2, 4, 4, 4)), (1.0, 1.0, 1.0), "2 channels"),
    "an image without voxels": (Image(np.zeros((1, 0, 4, 4)), Geometry((0, 4, 4), (1.0, 1.0, 1.0))), None, "shape"),
    "an image of spacing 0": (Image(np.zeros((1, 4, 4, 4)), Geometry((4, 4, 4), (0.0, 1.0, 1.0))), None, "positive"),
    "another geometry": (Image(np.zeros((1, 4, 4, 4)), Geometry((4, 4, 5), (1.0, 1.0, 1.0))), None, "geometry"),
    "a file with a spacing": ("scan.nii.gz", (1.0, 1.0, 1.0), "scan.nii.gz: a spacing is given"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_no_image_is_refused(model: Predictor, counts: Callable[..., None], name: str) -> None:
    counts("bad inputs refused in one line")
    array, spacing, says = ARRAYS[name]
    with pytest.raises(UserError) as error:
        model(array, spacing)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_arrays_of_every_kind_give_the_same(model: Predictor, scans: list[Path]) -> None:
    image = read_image(scans[0])
    whole, spacing = image.array[0].astype(np.int16), image.geometry.spacing
    wanted = model(whole, spacing)
    tensor = torch.from_numpy(whole.astype(np.float32)).requires_grad_()
    for same in (
        whole.tolist(), whole.astype(np.float64), np.asfortranarray(whole), whole[None].astype(np.longdouble),
        tensor, tensor.detach().int(), list(whole), np.ma.array(whole), whole.astype(">i4"),
    ):  # fmt: skip
        np.testing.assert_array_equal(model(same, list(spacing)), wanted)
    small = (whole // 512).astype(np.float16)  # which float16 and bfloat16 hold exactly
    wanted = model(small.astype(np.float32), spacing)
    np.testing.assert_array_equal(model(small, np.asarray(spacing)), wanted)
    np.testing.assert_array_equal(model(torch.from_numpy(small).bfloat16(), torch.tensor(spacing).double()), wanted)
    mask = whole > whole.mean()
    np.testing.assert_array_equal(model(mask, spacing), model(mask.astype(np.uint8), spacing))


def test_a_missing_spacing_is_reported_once(
    model: Predictor, scans: list[Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "_warn_about_spacing", cache(cases._warn_about_spacing.__wrapped__))
    array = read_image(scans[0]).array
    np.testing.assert_array_equal(model(array), model(array, (1.0, 1.0, 1.0)))
    model(array)
    assert capfd.readouterr().err.count("1 x 1 x 1 mm is used") == 1
