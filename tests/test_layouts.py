"""Datasets in common layouts, from `plan` to label maps, through the command line: pictures and volumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image
from samples import Command, described

TINY = (
    *("--epochs", 1, "--iterations", 2, "--batch-size", 2, "--device", "cpu", "--precision", "fp32"),
    *("--set", "training.validation_iterations=0", "--set", "inference.mirroring=false"),
    *("--set", "network.features_base=4", "--set", "network.features_max=8", "--set", "inference.step_size=1.0"),
)


def discs(rng: np.random.Generator, values: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A noisy grey picture (40, 48) with a disc for each value, brighter with each, and its label map."""
    y, x = np.mgrid[:40, :48]
    label = np.zeros((40, 48), np.uint8)
    grey = rng.normal(40, 5, label.shape)
    for i, value in enumerate(values):
        inside = (y - rng.integers(10, 30)) ** 2 + (x - rng.integers(10, 38)) ** 2 < 60
        label[inside] = value
        grey[inside] += 60 * (i + 1)
    for i, value in enumerate(values):  # whatever another disc hid
        label[i, :3] = value
    return np.clip(grey, 0, 255).astype(np.uint8), label


def pictures(root: Path, values: tuple[int, ...], colour: bool, names: tuple[str, str], ending: str = "") -> None:
    """Eight pictures with label maps as PNG, and two to predict."""
    rng = np.random.default_rng(0)
    for folder in (*names, "in"):
        (root / folder).mkdir(parents=True)
    for i in range(10):
        grey, label = discs(rng, values)
        image = Image.fromarray(np.stack([grey, 255 - grey, grey // 2], axis=-1) if colour else grey)
        image.save(root / (names[0] if i < 8 else "in") / f"cell_{i}{ending}.png")
        if i < 8:
            Image.fromarray(label).save(root / names[1] / f"cell_{i}.png")


def trained_and_predicted(command: Command, home: Path, configuration: str, patch: str) -> tuple[Path, str]:
    """plan -> train -> predict in one folder; the label maps, and what was said while planning and predicting."""
    code, _, said = command("plan", "data", cwd=home)
    assert code == 0, said
    code, out, err = command("train", configuration, 0, *TINY, "--patch-size", patch, cwd=home)
    assert code == 0 and "foreground mean" in out, err
    code, out, err = command("predict", "-i", "data/in", "-o", "out", cwd=home)
    assert code == 0, err
    return home / "out", said + err


@pytest.mark.parametrize(
    ("values", "colour", "in_json", "stored"),
    [
        ((1,), True, True, {0, 1}),
        ((1, 4), False, True, {0, 1, 4}),
        ((255,), True, False, {0, 1}),
        ((7, 8, 9), False, False, {0, 7, 8, 9}),
    ],
    ids=["nnunet_v2_rgb", "nnunet_v2_values_0_1_4", "plain_0_255", "plain_values_7_8_9"],
)
def test_pictures(
    command: Command, tmp_path: Path, values: tuple[int, ...], colour: bool, in_json: bool, stored: set[int]
) -> None:
    """Label maps are PNG of 8 bit and of the picture's size, and contain values of the dataset."""
    root = tmp_path / "data"
    if in_json:
        pictures(root, values, colour, ("imagesTr", "labelsTr"), "_0000")
        labels = {"background": 0, **{f"disc_{value}": value for value in values}}
        table = described(*("RGB" if colour else ["grey"]), labels=labels, numTraining=8, file_ending=".png")
        (root / "dataset.json").write_text(json.dumps(table))
    else:
        pictures(root, values, colour, ("images", "labels"))
    out, said = trained_and_predicted(command, tmp_path, "2d", "32x32")
    assert ("3 channels in one file" in said) == colour
    assert ("255 is read as 1" in said) == (values == (255,))
    assert f"cell_8.png contains 0 to {max(values) % 254}: it looks black" in said
    assert [path.name for path in sorted(out.glob("cell*"))] == ["cell_8.png", "cell_9.png"]
    for path in out.glob("cell*"):
        with Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("L", (48, 40))
            assert set(np.unique(np.asarray(picture))) <= stored
    planned = json.loads((tmp_path / "nnlite_workspace" / "data" / "plans.json").read_text())
    assert list(planned["configurations"]) == ["2d"] and len(planned["channels"]) == (3 if colour else 1)
    code, shown, err = command("evaluate", "nnlite_workspace/data/models/2d-default/fold_0/validation",
                               next(root.glob("labels*")), "--json", "--no-surface", cwd=tmp_path)  # fmt: skip
    assert code == 0, err
    own = json.loads((tmp_path / "nnlite_workspace/data/models/2d-default/fold_0/validation/summary.json").read_text())
    assert json.loads(shown)["foreground_mean"]["Dice"] == own["foreground_mean"]["Dice"], "0/255 references too"


def test_several_channels_in_nnunet_layout(command: Command, tmp_path: Path, hippocampus: Path) -> None:
    """`_0000` and `_0001` files per case; a missing second channel of an input is reported and stops no other."""
    root = tmp_path / "data"
    for folder in ("imagesTr", "labelsTr", "in"):
        (root / folder).mkdir(parents=True)
    for i, path in enumerate(sorted((hippocampus / "imagesTr").iterdir())[:7]):
        image = SimpleITK.Cast(SimpleITK.ReadImage(str(path)), SimpleITK.sitkFloat32)
        for channel, grey in enumerate((image, SimpleITK.Sqrt(image))):
            target = root / ("imagesTr" if i < 5 else "in") / f"case_{i}_{channel:04d}.nii.gz"
            SimpleITK.WriteImage(grey, str(target))
        label = SimpleITK.ReadImage(str(hippocampus / "labelsTr" / path.name))
        SimpleITK.WriteImage(label, str(root / ("labelsTr" if i < 5 else ".") / f"case_{i}.nii.gz"))
    labels = {"background": 0, "front": 1, "back": 2}
    (root / "dataset.json").write_text(json.dumps(described("T1", "T2", labels=labels, numTraining=5)))
    out, _ = trained_and_predicted(command, tmp_path, "3d_fullres", "32x32x32")
    assert [path.name for path in sorted(out.glob("case*"))] == ["case_5.nii.gz", "case_6.nii.gz"]
    code, shown, err = command("predict", "-i", "data/in/case_6_0001.nii.gz", "-o", "one", cwd=tmp_path)
    assert code == 0 and shown.endswith("label map in one\n") and (tmp_path / "one" / "case_6.nii.gz").is_file()
    (root / "in" / "case_6_0001.nii.gz").unlink()
    code, shown, err = command("predict", "-i", "data/in", "-o", "out2", cwd=tmp_path)
    assert code == 1 and [path.name for path in (tmp_path / "out2").glob("case*")] == ["case_5.nii.gz"]
    assert "failed: case_6: " in err and "case_6_0001.nii.gz" in err.splitlines()[-1]


def stacks(root: Path, channels: int, how: dict[str, Any], name: str) -> np.ndarray:
    """Six stacks (16, channels, 32, 40) with label maps, dataset.json, and one stack to predict, which is returned."""
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr", "in"):
        (root / folder).mkdir(parents=True)
    label = np.zeros((16, 32, 40), np.uint8)
    label[4:12, 5:20, 8:30] = 1
    for i in range(7):
        stack = rng.integers(0, 1000, (16, channels, 32, 40)).astype(np.uint16)
        stack[:, 0] += np.uint16(2000) * label
        stack = stack if channels > 1 else stack[:, 0]
        tifffile.imwrite(root / ("imagesTr" if i < 6 else "in") / name.format(i), stack, **how)
        if i < 6:
            tifffile.imwrite(root / "labelsTr" / f"cell_{i}.tif", label, photometric="minisblack")
    table = described(*(f"stain_{c}" for c in range(channels)), file_ending=".tif")
    (root / "dataset.json").write_text(json.dumps(table))
    return stack


def test_stacks_of_a_microscope(command: Command, tmp_path: Path) -> None:
    """ImageJ stacks of two channels and micrometres, label maps without a spacing: from check to label maps."""
    root = tmp_path / "data"
    micrometres = {"imagej": True, "metadata": {"axes": "ZCYX", "spacing": 0.8, "unit": "um"}, "resolution": (2.5, 2.5)}
    stack = stacks(root, 2, micrometres, "cell_{}.tif")
    out, said = trained_and_predicted(command, tmp_path, "3d_fullres", "16x32x32")
    assert "2 channels in one file" in said and "spacing" not in said.split("\n\n")[0]
    planned = json.loads((tmp_path / "nnlite_workspace" / "data" / "plans.json").read_text())
    assert planned["configurations"]["3d_fullres"]["spacing"] == pytest.approx([8e-4, 4e-4, 4e-4])
    assert tifffile.imread(out / "cell_6.tif").shape == (16, 32, 40)
    assert json.loads((out / "cell_6.json").read_text())["spacing"] == pytest.approx([8e-4, 4e-4, 4e-4])
    tifffile.imwrite(root / "in" / "cell_6.tif", stack, imagej=True, metadata={"axes": "ZCYX"})
    code, _, err = command("predict", "-i", "data/in", "-o", "out2", cwd=tmp_path)
    assert code == 2 and "states no spacing, and the model was trained on voxels of 0.0008 x 0.0004 x 0.0004 mm" in err
    (root / "imagesTr" / "cell_0.tif").write_bytes((root / "in" / "cell_6.tif").read_bytes())
    code, _, err = command("plan", "data", cwd=tmp_path)
    assert code == 2 and "error: imagesTr/cell_0.tif: states no spacing, and 5 of 6 images do" in err


def test_a_model_of_pixels_takes_stacks_with_micrometres_by_their_pixels(command: Command, tmp_path: Path) -> None:
    """As in nnU-Net, which ignores the spacing of ImageJ."""
    root = tmp_path / "data"
    stack = stacks(root, 1, {"photometric": "minisblack"}, "cell_{}_0000.tif")
    out, said = trained_and_predicted(command, tmp_path, "3d_fullres", "16x32x32")
    assert "no spacing known, 1x1x1 mm taken" in said
    assert [path.name for path in out.glob("cell*")] == ["cell_6.tif"], "no spacing is invented"
    micrometres = {"axes": "ZYX", "spacing": 0.8, "unit": "um"}
    tifffile.imwrite(root / "in/cell_6_0000.tif", stack, imagej=True, metadata=micrometres, resolution=(2.5, 2.5))
    code, _, err = command("predict", "-i", "data/in", "-o", "out2", cwd=tmp_path)
    assert code == 0 and "its spacing is not used: the model was trained on images without one" in err
    assert np.array_equal(tifffile.imread(tmp_path / "out2" / "cell_6.tif"), tifffile.imread(out / "cell_6.tif"))
