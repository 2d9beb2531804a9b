"""Images are predicted into a folder, or refused: logits that are not finite, names, voxels of another unit."""

from __future__ import annotations

import shutil
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from samples import sample_plan
from torch import Tensor, nn

from nnunet_lite.data.cases import Case
from nnunet_lite.data.images import Image, read_image, write_label
from nnunet_lite.errors import UserError
from nnunet_lite.inference import folder
from nnunet_lite.inference.cases import read_case_image
from nnunet_lite.inference.folder import Outputs, predict_cases
from nnunet_lite.inference.outputs import ExtraMaps
from nnunet_lite.inference.predictor import Predictor, PreparedImage, prepare_image, segment
from nnunet_lite.networks.precision import ComputeFormat


class Overflowing(nn.Module):
    """One value of one class in the first voxel of each window, or in all."""

    def __init__(self, value: float, n_voxels: int | None = 1) -> None:
        super().__init__()
        self.value, self.n_voxels = value, n_voxels

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.cat([x, x, x], 1)
        logits[:, 2].flatten(1)[:, : self.n_voxels] = self.value
        return logits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_no_background(
    model: Predictor,
    scans: list[Path],
    tmp_path: Path,
    value: float,
    counts: Callable[..., None],
) -> None:
    counts("bad inputs refused in one line")
    broken = replace(model, networks=(Overflowing(value),))  # type: ignore[arg-type]
    cases = [Case(path.name.removesuffix(".nii.gz"), (path,), None) for path in scans]
    done, failed = predict_cases(broken, cases, tmp_path / "out")
    assert done == [] and sorted(failed) == [case.id for case in cases]
    assert all("NaN or infinite" in why and "\n" not in why for why in failed.values())
    scan = scans[0]
    with pytest.raises(UserError, match=f"^{scan}: .*NaN or infinite.*computed in float32: look at the values"):
        broken(scan)
    half = replace(broken, arithmetic=ComputeFormat(precision="bf16"))
    with pytest.raises(UserError, match="Predict with --precision fp32"):
        half(scan)
    for wanted in (ExtraMaps(("Anterior",)), ExtraMaps(uncertainty=True)):
        _, failed = predict_cases(broken, cases[:1], tmp_path / "out", Outputs(maps=wanted))
        assert "NaN or infinite" in failed[cases[0].id]
    voting = replace(model, partners=(broken,))
    with pytest.raises(UserError, match="NaN or infinite"):
        voting(scan)


def test_sums_that_are_too_large_for_float16_are_no_background(model: Predictor, scans: list[Path]) -> None:
    """Each logit is a number, but not so its sum over windows in float16."""
    settings = model.settings.model_copy(update={"sums": "float16"})
    large = replace(model, networks=(Overflowing(60000.0, None),), settings=settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Predict with --set inference\.sums=float32"):
        large(scans[0])


def test_maps_whose_names_are_too_long_are_refused_before_the_prediction(
    model: Predictor, scans: list[Path], tmp_path: Path, counts: Callable[..., None]
) -> None:
    counts("bad inputs refused in one line")
    scan = shutil.copy(scans[0], tmp_path / f"{'n' * 240}.nii.gz")
    cases = [Case("n" * 240, (scan,), None)]
    with pytest.raises(UserError, match=r"n_Posterior\.nii\.gz: has a longer name than file systems allow"):
        predict_cases(model, cases, tmp_path / "out", Outputs(maps=ExtraMaps(("Posterior",))))
    assert not (tmp_path / "out").exists()
    (file,), failed = predict_cases(model, cases, tmp_path / "out")
    assert file.is_file() and not failed
    with pytest.raises(UserError, match=r"nii\.gz: has a longer name than file systems allow .* Rename the image\.$"):
        predict_cases(model, [replace(cases[0], id="n" * 249)], tmp_path / "out")


def test_a_label_map_that_is_replaced_is_deleted_first(model: Predictor, scans: list[Path], tmp_path: Path) -> None:
    cases = [Case("a", (scans[0],), None)]
    (file,), _ = predict_cases(model, cases, tmp_path)
    there: list[bool] = []
    predict_cases(model, cases, tmp_path, Outputs(per_label=True), report=lambda _: there.append(file.exists()))
    assert there == [False] and file.exists()


def test_an_image_is_freed_before_the_next_is_read(
    model: Predictor, scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[weakref.ref[PreparedImage]] = []
    is_predicted = threading.Event()
    freed: list[bool] = []

    def prepare(predictor: Predictor, image: Image) -> PreparedImage:
        if first:  # the second image takes longer to read than the first one to predict
            is_predicted.wait(60)
            freed.append(any(first[0]() is None or time.sleep(0.01) for _ in range(500)))
        prepared = prepare_image(predictor, image)
        first.append(weakref.ref(prepared))
        return prepared

    def predict(*arguments: Any) -> Any:
        found = segment(*arguments)
        is_predicted.set()
        return found

    monkeypatch.setattr(folder, "prepare_image", prepare)
    monkeypatch.setattr(folder, "segment", predict)
    files, _ = predict_cases(model, [Case(name, (scans[0],), None) for name in "abc"], tmp_path)
    assert len(files) == 3 and freed == [True, True]


def test_label_maps_are_kept_unless_their_maps_are_missing(
    model: Predictor, scans: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, maps = [Case(name, (scans[0],), None) for name in ("a", "b")], ExtraMaps(("Anterior",))
    predict_cases(model, cases, tmp_path, Outputs(maps=maps))
    written = [(tmp_path / f"{name}.nii.gz").stat().st_mtime_ns for name in ("a", "b")]
    (tmp_path / "probabilities" / "b_Anterior.nii.gz").unlink()
    capsys.readouterr()
    files, failed = predict_cases(model, cases, tmp_path, Outputs(maps=maps, skip_existing=True, per_label=True))
    assert len(files) == 2 and not failed and len(list(tmp_path.glob("segmentations/*/*.nii.gz"))) == 4
    assert "1 label map will be replaced; files that are made with them are missing" in capsys.readouterr().err
    kept = [(tmp_path / f"{name}.nii.gz").stat().st_mtime_ns for name in ("a", "b")]
    assert kept[0] == written[0] and kept[1] != written[1]
    shutil.rmtree(tmp_path / "segmentations")
    other = replace(cases[0], images=(scans[1],))
    _, failed = predict_cases(model, [other], tmp_path, Outputs(skip_existing=True, per_label=True))
    assert "is the label map of another image" in failed["a"]


@pytest.mark.parametrize(("ids", "maps"), [(("a", "A"), ExtraMaps()), (("a", "a_b"), ExtraMaps(("b_c", "c")))])
def test_two_cases_never_share_a_file(
    model: Predictor, scans: list[Path], tmp_path: Path, ids: tuple[str, ...], maps: ExtraMaps
) -> None:
    cases = [Case(name, (scans[0],), None) for name in ids]
    with pytest.raises(UserError, match=r"would be written twice, for two cases or labels\. Rename one\."):
        predict_cases(model, cases, tmp_path / "out", Outputs(maps=maps))
    assert not (tmp_path / "out").exists()


def test_voxels_of_another_unit_are_reported(
    model: Predictor, scans: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Voxels of 1e-6 mm, for a model of voxels of 1 mm: micrometres or metres that were taken for millimetres."""
    image = read_image(scans[0])
    for size, reported in ((1e-6, True), (0.3, False)):
        geometry = replace(image.geometry, spacing=(size, size, size), shape=(2, 2, 2))
        write_label(tmp_path / "scan.nii.gz", image.array[0, :2, :2, :2], geometry)
        read_case_image(model.plan, Case("scan", (tmp_path / "scan.nii.gz",), None))
        said = f"has voxels of {size:.3g} mm, the training images of 1 mm; is its unit right?"
        assert (said in capsys.readouterr().err) is reported


@pytest.mark.parametrize("spacing", [(3, 3, 3), (5, 1, 1), (1, 1, 4), (2, 1, 1), (0.2, 0.2, 0.2), (2, 2, 2)])
def test_voxels_that_are_much_coarser_are_reported(
    model: Predictor, scans: list[Path], tmp_path: Path, capsys: Any, spacing: tuple[float, float, float]
) -> None:
    image = read_image(scans[0])
    write_label(tmp_path / "scan.nii.gz", image.array[0], replace(image.geometry, spacing=spacing))
    read_case_image(model.plan, Case("scan", (tmp_path / "scan.nii.gz",), None))
    said = f"has voxels of {' x '.join(map(str, spacing))} mm, and most training images of 1 x 1 x 1 mm: its label map"
    assert (said in capsys.readouterr().err) is (max(spacing) > 2.5)
    label = tmp_path / "label.nii.gz"
    read_case_image(model.plan, Case("scan", (tmp_path / "scan.nii.gz",), label))
    assert "warning" not in capsys.readouterr().err, "a case of the training is validated"


def test_a_single_slice_and_axes_that_are_sheared_are_reported(
    model: Predictor, scans: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = nib.load(scans[0])
    voxels, affine = np.asarray(image.dataobj), np.array(image.affine)
    sheared = affine.copy()
    sheared[2, 1] += 0.4
    cases = {"plain": (voxels, affine), "slice": (voxels[:, :, :1], affine), "tilted": (voxels, sheared)}
    said = {}
    for name, (array, place) in cases.items():
        nib.save(nib.Nifti1Image(array, place), tmp_path / f"{name}.nii.gz")
        for label in (None, tmp_path / "label.nii.gz"):  # a case of the training was checked
            read_case_image(model.plan, Case(name, (tmp_path / f"{name}.nii.gz",), label))
        said[name] = capsys.readouterr().err
    place = f"warning: {tmp_path}"
    what = "is one slice, and the model was trained on volumes: its label map may be wrong"
    assert said["plain"] == "" and said["slice"] == f"{place}/slice.nii.gz: {what}\n"
    assert said["tilted"].startswith(f"{place}/tilted.nii.gz: two axes are 21.8 degrees from a right angle")
    assert said["tilted"].count("\n") == 1


def test_a_ct_that_is_not_in_hounsfield_units_is_reported(
    model: Predictor, scans: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its offset of 1024 was lost on export: each voxel is clipped to the brightest tissue of the training."""
    image = read_image(scans[0])
    of_ct, of_offset = (sample_plan(model.plan.labels, scheme="ct", minimum=minimum) for minimum in (-100, 0))
    for plan, low, reported in ((of_ct, 0, True), (of_ct, -1000, False), (of_offset, 0, False), (model.plan, 0, False)):
        array = image.array[0].astype(int)
        array[0, 0, 0] = low
        write_label(tmp_path / "scan.nii.gz", array, image.geometry)
        read_case_image(plan, Case("scan", (tmp_path / "scan.nii.gz",), None))
        said = "has no value below 0, and the model expects Hounsfield units"
        assert (said in capsys.readouterr().err) is reported


def test_an_image_of_one_value_is_reported(
    model: Predictor, scans: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a case of the training, the check says so. A channel that was empty in the training may be empty."""
    image, file = read_image(scans[0]), tmp_path / "scan.nii.gz"
    write_label(file, image.array[0].astype("u1") * 0 + 7, image.geometry)
    for scheme in ("zscore", "ct"):
        plan = sample_plan(model.plan.labels, scheme=scheme, minimum=-100)
        read_case_image(plan, Case("scan", (file,), None))
        said = f"warning: {file}: all voxels of channel MRI (7) are equal: its label map may be wrong\n"
        assert capsys.readouterr().err == said
        (channel,), label = plan.channels, tmp_path / "label.nii.gz"
        statistics = channel.statistics.model_copy(update={"max": channel.statistics.min})
        empty = channel.model_copy(update={"statistics": statistics})
        for of, path in ((plan, label), (plan.model_copy(update={"channels": (empty,)}), None)):
            read_case_image(of, Case("scan", (file,), path))
            assert ": all voxels of" not in capsys.readouterr().err


def test_an_image_that_is_measured_is_reported_once(
    model: Predictor, scans: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is read a second time, for its intensities."""
    image = read_image(scans[0])
    geometry = replace(image.geometry, spacing=(0.01, 0.01, 0.01))
    write_label(tmp_path / "scan.nii.gz", image.array[0], geometry)
    case = Case("scan", (tmp_path / "scan.nii.gz",), None)
    assert not predict_cases(model, [case], tmp_path / "out", Outputs(statistics=True))[1]
    assert capsys.readouterr().err.count("is its unit right?") == 1
