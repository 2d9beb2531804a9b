"""A trained model predicts arrays, files and folders on their own grid, and one bad file stops no other."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import pytest
import torch
from bad_inputs import edit
from random_models import labels_of, placed, predict_preprocessed
from samples import FAST, sample_plan
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nnunet_lite
from nnunet_lite.commands.predict import Predictions
from nnunet_lite.data.cases import find_cases
from nnunet_lite.data.images import Image, read_image, read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json
from nnunet_lite.inference.folder import Outputs, _read_ahead, predict_cases
from nnunet_lite.inference.predictor import (
    Predictor,
    PreparedImage,
    _choose_arithmetic,
    _Trained,
    load,
    trained_folds,
)
from nnunet_lite.networks.build import build_network
from nnunet_lite.planning.schema import Plan
from nnunet_lite.planning.swaps import swap_of
from nnunet_lite.preprocessing.pipeline import Preprocessed, preprocess_image
from nnunet_lite.settings import AugmentationSettings, InferenceSettings


@pytest.fixture
def folder(tmp_path: Path, scans: list[Path]) -> Path:
    (tmp_path / "in").mkdir()
    for scan in scans:
        shutil.copy(scan, tmp_path / "in")
    return tmp_path / "in"


class Brightness(nn.Module):
    """Class 1 where the image is dark, 2 where it is bright: its output is known for every voxel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x, 0.5), -x, x], 1)


def by_brightness(model: Predictor, labels: Labels | None = None) -> Predictor:
    plan = model.plan.model_copy(update={"labels": labels or model.plan.labels})
    return replace(model, plan=plan, networks=(Brightness(),))  # type: ignore[arg-type]


def expected(model: Predictor, image: Image) -> np.ndarray:
    """The output of `Brightness` for an image that is neither resampled nor cropped."""
    x = preprocess_image(image, None, model.plan, model.configuration).image[0]
    return np.where(x > 0.5, 2, np.where(x < -0.5, 1, 0))


def test_a_model_is_loaded_as_it_was_trained(tiny_model: Path, tiny_settings: dict[str, Any]) -> None:
    model = load(tiny_model, device="cpu")
    assert model.folds == ("0",) and model.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert model.configuration_name == "3d_fullres"
    assert model.configuration.patch_size == tuple(tiny_settings["training.patch_size"])
    assert model.mirror_axes == (0, 1, 2)
    assert (model.settings.mirroring, model.settings.step_size) == (True, 0.5)
    assert not any(p.requires_grad for network in model.networks for p in network.parameters())
    assert not any(network.training for network in model.networks)
    fast = load(tiny_model, device="cpu", settings=FAST)
    assert (fast.settings.mirroring, fast.settings.step_size, fast.arithmetic.precision) == (False, 1.0, "fp32")


def test_a_setting_does_not_make_it_a_model_of_nnunet(tiny_model: Path) -> None:
    settings = {**FAST, "inference.sums": "float16"}
    assert not load(tiny_model, device="cpu", settings=settings).of_nnunet


def test_a_file_an_image_and_an_array_give_the_same(model: Predictor, scans: list[Path]) -> None:
    image, of_file = read_image(scans[0]), model(scans[0])
    spacing = image.geometry.spacing
    assert of_file.shape == image.geometry.shape
    for same in (model(str(scans[0])), model(image), model(image.array[0], spacing), model(image.array, spacing)):
        np.testing.assert_array_equal(same, of_file)


def test_the_spacing_of_an_array_is_used(model: Predictor, scans: list[Path]) -> None:
    image = read_image(scans[0])
    bright = by_brightness(model)
    np.testing.assert_array_equal(bright(image.array), expected(model, image))
    coarse = bright(image.array, (2.0, 2.0, 2.0))  # resampled to 1 mm, predicted there, and brought back
    assert coarse.shape == image.geometry.shape
    assert 0.9 < (coarse == expected(model, image)).mean() < 1


def test_networks_of_several_folds_are_averaged(model: Predictor, tiny_cases: list[Any]) -> None:
    image = tiny_cases[0].image[:, :24, :32, :24]
    other = load(model.folder, device="cpu", settings=FAST).networks[0]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    one, two, both = (
        predict_preprocessed(replace(model, networks=n), image)
        for n in (model.networks, (other,), (*model.networks, other))
    )
    assert both.shape == (3, *image.shape[1:]) and both.dtype == torch.float32 and torch.isfinite(both).all()
    assert not torch.allclose(one, two)
    torch.testing.assert_close(both, (one + two) / 2)


class Sided(nn.Module):
    """ "left" (1) in the left half of each window and "right" (2) in the other, for any input."""

    def forward(self, x: Tensor) -> Tensor:
        left = (torch.arange(x.shape[-1]) < x.shape[-1] // 2).expand_as(x[:, :1])
        return torch.cat([torch.zeros_like(x[:, :1]), left.float(), 1 - left.float()], 1)


class Copied(nn.Module):
    """Repeats the one-hot classes of a first stage."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([0.5 - x[:, 1:].sum(1, keepdim=True), x[:, 1:]], 1)


@pytest.mark.parametrize("swapped", [False, True])
def test_left_and_right_change_places_in_mirrored_copies(model: Predictor, swapped: bool) -> None:
    """As they did in training; or the copies would contradict each other."""
    settings = AugmentationSettings(mirror_swap=(("Anterior", "Posterior"),) if swapped else ())
    sides = swap_of(model.plan, settings, 3)
    assert (sides is not None) is swapped
    mirroring = model.settings.model_copy(update={"mirroring": True})
    image = np.zeros((1, 24, 32, 24), np.float32)
    sided = replace(model, networks=(Sided(),), settings=mirroring, swap=sides)
    logits = predict_preprocessed(sided, image)
    left, right = logits[1, ..., :12], logits[2, ..., :12]
    assert torch.allclose(left, torch.tensor(1.0 if swapped else 0.5), atol=1e-6)
    assert torch.allclose(right, torch.tensor(0.0 if swapped else 0.5), atol=1e-6)


def test_classes_of_a_first_stage_change_places_with_their_channels(model: Predictor) -> None:
    """A second stage sees, in a copy mirrored from left to right, the left organ on the other side and called right."""
    stages = {"3d_cascade_fullres": model.configuration.model_copy(update={"previous_stage": "3d_fullres"})}
    plan = model.plan.model_copy(update={"configurations": {**model.plan.configurations, **stages}})
    sides = swap_of(plan, AugmentationSettings(mirror_swap=(("Anterior", "Posterior"),)), 3)
    assert sides is not None and sides.table == (0, 2, 1, 3)
    mirroring = model.settings.model_copy(update={"mirroring": True})
    second = replace(model, plan=plan, configuration_name="3d_cascade_fullres", settings=mirroring, swap=sides)
    previous = np.random.default_rng(0).integers(0, 3, (30, 33, 26)).astype(np.uint8)
    for wrong in (False, True):
        seen = replace(sides, table=(0, 1, 2, 3)) if wrong else sides
        copied = replace(second, networks=(Copied(),), swap=seen)
        logits = predict_preprocessed(copied, np.zeros((1, *previous.shape), np.float32), previous)
        assert bool((logits.argmax(0).numpy() == previous).all()) is not wrong


def test_label_values_of_the_dataset_are_written(model: Predictor, folder: Path, tmp_path: Path) -> None:
    sparse = by_brightness(model, Labels(names={"background": 0, "core": 1, "enhancing": 4}))
    files, failed = predict_cases(sparse, find_cases([folder], 1), tmp_path / "out")
    assert not failed
    for file in files:
        values, geometry, _ = read_label(file)
        image = read_image(folder / file.name)
        np.testing.assert_array_equal(values, np.array([0, 1, 4])[expected(model, image)])
        assert geometry == image.geometry
        assert values.dtype == np.uint8


def test_existing_label_maps_are_skipped_with_the_option(
    model: Predictor, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, out = find_cases([folder], 1), tmp_path / "out"
    files, _ = predict_cases(model, cases[:1], out)
    before = files[0].stat().st_mtime_ns
    files, failed = predict_cases(model, cases, out, Outputs(skip_existing=True))
    assert (len(files), failed) == (3, {})
    assert "out: 1 label map kept, 2 to predict" in capsys.readouterr().err
    assert files[0].stat().st_mtime_ns == before
    predict_cases(model, cases[:1], out)
    assert files[0].stat().st_mtime_ns > before


def test_parts_share_the_images_and_one_output(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    def predict(part: int | None, parts: int) -> list[str]:
        done = nnunet_lite.predict(
            folder, tmp_path / "out", model=tiny_model, settings=FAST, device="cpu", num_parts=parts, part_id=part
        )
        assert isinstance(done, Predictions)
        return [file.name for file in done.files]

    names = sorted(path.name for path in folder.iterdir())
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(predict, (0, 1), (2, 2)))
    assert found == [names[0::2], names[1::2]]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == names
    assert len(read_json(tmp_path / "out" / "predictions.json")["predictions"]) == 3
    assert predict(3, 4) == [] and predict(0, 1) == names
    for part in (None, 2, -1):
        with pytest.raises(UserError, match="--num-parts 2 needs a --part-id from 0 to 1"):
            predict(part, 2)


@pytest.mark.parametrize(("most", "nbytes", "expected"), [(1, 10, 2), (3, 10, 4), (3, 10**15, 2)])
def test_images_are_read_ahead_as_memory_allows(most: int, nbytes: int, expected: int) -> None:
    """The one that is predicted, and the next ones; after an unreadable one too."""
    begun: list[int] = []

    def read(number: int) -> PreparedImage:
        begun.append(number)
        if number == 2:
            raise UserError("unreadable")
        array = np.broadcast_to(np.zeros(1, np.uint8), nbytes)  # which takes no memory
        return PreparedImage((Preprocessed(array, None, placed((1, 1, 1), (1, 1, 1))),))

    with ThreadPoolExecutor(most) as reader:
        found = []
        for _, source in _read_ahead(reader, read, range(8), most):  # type: ignore[arg-type]
            found.append(source.exception() is None)
            wait(reader.submit(int) for _ in range(most))
            assert len(begun) <= min(8, len(found) - 1 + expected)
        assert found == [number != 2 for number in range(8)] and sorted(begun) == list(range(8))


@pytest.mark.parametrize(
    ("has_it", "computes_right", "origin", "expected"),
    [
        (True, True, {}, "bf16"),
        (True, False, {}, "fp16"),
        (True, True, {"imported_from": "nnU-Net"}, "fp16"),
        (False, None, {}, "fp16"),
    ],
)
def test_the_number_format_on_a_gpu(
    has_it: bool, computes_right: bool | None, origin: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the training, if the GPU has it and cuDNN computes it right; a model of nnU-Net in fp16, as there.

    On a GPU without bf16 nothing is computed in it, which could fail.
    """
    plan = sample_plan(labels_of(3))
    header = {"device": "cuda", "arithmetic": {"precision": "bf16", "compiled": True, "plain_norm": True}}
    trained = _Trained(plan, {"configuration": "3d_fullres", **origin}, {"0": Brightness()}, {"0": header})

    def compute(*_: Any) -> bool:
        assert computes_right is not None, "there is no bf16"
        return computes_right

    monkeypatch.setattr("nnunet_lite.networks.precision.has_bf16", lambda _: has_it)
    monkeypatch.setattr("nnunet_lite.inference.predictor.has_bf16", lambda _: has_it)
    monkeypatch.setattr("nnunet_lite.inference.predictor.computes_bf16", compute)
    monkeypatch.setattr("nnunet_lite.inference.predictor.pick_fastest", lambda formats, *_: formats[0])
    with FakeTensorMode():
        found = _choose_arithmetic(trained, InferenceSettings(), torch.device("cuda"))
    assert found.precision == expected and not found.plain_norm, "which is made for compiled networks"


@pytest.mark.parametrize(
    ("native", "amx", "origin", "device", "precision", "expected"),
    [
        (True, False, {"imported_from": "nnU-Net"}, None, None, "fp32"),
        (True, False, {}, "cuda", "bf16", "bf16"),
        (False, False, {}, "cuda", "bf16", "fp32"),
        (True, False, {}, "cuda", "fp32", "fp32"),
        (False, False, {}, "cpu", "bf16", "bf16"),
        (True, True, {}, "cuda", "bf16", "fp32"),  # a network of others, whose layers are not ours
    ],
)
def test_the_number_format_on_a_cpu_is_no_matter_of_speed(
    native: bool,
    amx: bool,
    origin: dict[str, str],
    device: str | None,
    precision: str | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of the training on a CPU, bf16 only where the CPU has instructions for it, fp32 for a model of nnU-Net."""
    header = {} if device is None else {"device": device, "arithmetic": {"precision": precision, "channels_last": True}}
    trained = _Trained(
        sample_plan(labels_of(3)), {"configuration": "3d_fullres", **origin}, {"0": Brightness()}, {"0": header}
    )
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("nnunet_lite.networks.precision.has_bf16", lambda _: native)
    monkeypatch.setattr("nnunet_lite.networks.precision.has_amx", lambda: amx)
    monkeypatch.setattr("nnunet_lite.inference.predictor.pick_fastest", None)
    found = _choose_arithmetic(trained, InferenceSettings(), torch.device("cpu"))
    assert (found.precision, found.channels_last) == (expected, True)


def test_a_unet_predicts_in_bf16_on_a_cpu_with_amx(tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass is right there; only gradients are not."""
    header = {"device": "cuda", "arithmetic": {"precision": "bf16", "channels_last": True}}
    network = build_network(tiny_plan, "3d_fullres")
    trained = _Trained(tiny_plan, {"configuration": "3d_fullres"}, {"0": network}, {"0": header})
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("nnunet_lite.networks.precision.has_bf16", lambda _: True)
    monkeypatch.setattr("nnunet_lite.networks.precision.has_amx", lambda: True)
    assert _choose_arithmetic(trained, InferenceSettings(), torch.device("cpu")).precision == "bf16"


def test_fold_all_is_used_if_there_is_no_other(model_copy: Path) -> None:
    shutil.copytree(model_copy / "fold_0", model_copy / "fold_all")
    (model_copy / "fold_1").mkdir()  # begun and not finished
    assert trained_folds(model_copy) == ["0"]
    assert load(model_copy, device="cpu", settings=FAST).folds == ("0",)
    assert load(model_copy, ["all"], device="cpu", settings=FAST).folds == ("all",)
    shutil.rmtree(model_copy / "fold_0")
    assert trained_folds(model_copy) == ["all"]


@pytest.mark.parametrize(
    ("change", "axes"),
    [({}, (0, 1, 2)), ({"mirror_axes": [1]}, (1,)), ({"p_mirror": 0.0}, ()), ({"enabled": False}, ())],
)
def test_only_axes_mirrored_in_training_are_mirrored(
    model_copy: Path, change: dict[str, Any], axes: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(model_copy / "run.json", lambda run: run["settings"]["augmentation"].update(change))
    assert load(model_copy, device="cpu").mirror_axes == axes
    assert "--mirroring" not in capsys.readouterr().err
    load(model_copy, device="cpu", settings={"inference.mirroring": True})
    assert ("--mirroring changes nothing" in capsys.readouterr().err) == (not axes)


def test_a_fourth_dimension_is_channels(model: Predictor, scans: list[Path], tmp_path: Path) -> None:
    """As in training: of a 4D file, each volume is a channel."""
    image = nibabel.load(scans[0])
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine), tmp_path / "one.nii.gz")
    np.testing.assert_array_equal(model(tmp_path / "one.nii.gz"), model(scans[0]))


def test_threads_share_a_warm_model_without_child_processes(model: Predictor, scans: list[Path]) -> None:
    """So a script needs no `if __name__ == "__main__"`."""
    before = set(psutil.Process().children(recursive=True))
    alone = [model(scan) for scan in scans[:2]]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(model, scans[:2] * 2))
    for one, other in zip(alone * 2, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert set(psutil.Process().children(recursive=True)) <= before
