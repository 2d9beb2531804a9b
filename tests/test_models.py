"""Models are chosen, loaded and brought together; those that cannot vote together are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nnunet_lite
from nnunet_lite.errors import UserError
from nnunet_lite.inference.predictor import read_model
from nnunet_lite.models import first_fold

QUICK = {"inference.mirroring": False, "inference.step_size": 1.0, "inference.precision": "fp32"}


@pytest.fixture
def other(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "other"))


def change(folder: Path, **values: Any) -> None:
    plan = json.loads((folder / "plans.json").read_text())
    (folder / "plans.json").write_text(json.dumps({**plan, **values}))


def test_several_models_are_one(tiny_model: Path, other: Path, hippocampus: Path) -> None:
    scan = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]
    both = nnunet_lite.load([tiny_model, other], device="cpu", changes=QUICK)
    alone = nnunet_lite.load(tiny_model, device="cpu", changes=QUICK)
    assert str(both) == f"{tiny_model} (fold 0) and {other} (fold 0)"
    assert (both(scan) == alone(str(scan))).mean() > 0.9999


def test_models_of_other_labels_or_axes_cannot_vote(tiny_model: Path, other: Path) -> None:
    plan = read_model(other)[0]
    labels = plan.labels.model_dump(mode="json")
    change(other, labels={**labels, "names": {"background": 0, "left": 1, "right": 2}})
    with pytest.raises(UserError, match=rf"{other}: has other labels than {tiny_model}"):
        nnunet_lite.load([tiny_model, other], device="cpu")
    change(other, labels=labels, axis_order=[1, 0, 2])
    with pytest.raises(UserError, match="has other axis order than"):
        nnunet_lite.load([tiny_model, other], device="cpu")


def test_first_fold(tiny_model: Path, other: Path) -> None:
    (other / "fold_0").rename(other / "fold_2")
    assert first_fold([tiny_model]) == ["0"]
    assert first_fold([other]) == ["2"]
    assert first_fold([tiny_model, other]) is None


def test_predict_with_all_options(
    tiny_model: Path, other: Path, hippocampus: Path, tmp_path: Path, command: Any
) -> None:
    import nibabel

    scans = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))
    (tmp_path / "in").mkdir()
    shutil.copy(scans[0], tmp_path / "in")
    source = ["-i", tmp_path / "in", "-i", scans[1]]
    common = [*source, "--device", "cpu", "--precision", "fp32", "--speed", "fast", "--max-memory", "4"]
    code, _, err = command(
        "predict", "-m", tiny_model, "-m", other, *common, "-o", tmp_path / "out", "--save-uncertainty",
        "--save-probabilities", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, err
    names = [scan.name.removesuffix(".nii.gz") for scan in scans[:2]]
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    kinds = [f"probabilities/{{}}_{label}" for label in ("background", "Anterior", "Posterior")]
    kinds += ["uncertainty/{}_entropy", "uncertainty/{}_disagreement", "{}"]
    assert written == {f"{kind.format(name)}.nii.gz" for kind in kinds for name in names}
    shares = [
        nibabel.load(tmp_path / "out" / f"{kind.format(names[0])}.nii.gz").get_fdata()  # type: ignore[attr-defined]
        for kind in kinds[:3]
    ]
    assert np.abs(sum(shares) - 1).max() < 2 / 255
    label = nibabel.load(tmp_path / "out" / f"{names[0]}.nii.gz")
    certain = np.max(shares, axis=0) > 0.51
    assert np.array_equal(np.argmax(shares, axis=0)[certain], np.asarray(label.dataobj)[certain])  # type: ignore[attr-defined]
    image = nibabel.load(scans[0])
    assert np.allclose(image.affine, label.affine)  # type: ignore[attr-defined]

    code, _, err = command("predict", "-m", tiny_model, *common, "-o", tmp_path / "o", "--dicom-seg", cwd=tmp_path)
    assert code == 2 and "is no DICOM series" in err
    (tmp_path / "more").mkdir()
    shutil.copy(scans[2], tmp_path / "more" / scans[0].name)
    twice = ["-i", tmp_path / "in", "-i", tmp_path / "more", "-o", tmp_path / "o", "-m", tiny_model]
    code, _, err = command("predict", *twice, cwd=tmp_path)
    assert code == 2 and f"holds case '{names[0]}', and so does" in err
    code, _, err = command("predict", "-m", tiny_model, *common[:-1], "0.0001", "-o", tmp_path / "o2", cwd=tmp_path)
    assert code == 2 and "B of memory at least, 1 kB may be used. Raise --max-memory" in err
    assert not any((tmp_path / "o2").iterdir())
