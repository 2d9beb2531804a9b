"""`nnlite init`: from the files that people have to a dataset that plan, train and predict take."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from bad_inputs import edit
from PIL import Image
from samples import TINIEST, Command, as_options, blocks, save_arrays, scan
from test_dicom_masks import LABELS, box, patient, save_contours

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.data.cases import find_cases
from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.data.dicom_writers import write_dicom_seg
from nnunet_lite.data.images import read_image
from nnunet_lite.data.raw_files import reason_to_plan
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import Paths

CASES = range(1, 7)


def patients(root: Path) -> None:
    save_arrays(root, {f"P{i}/{name}.nii.gz": scan(10 * i + k) for i in CASES for k, name in enumerate(("t1", "t2"))})
    save_arrays(root, {f"P{i}/seg.nii.gz": blocks([1, 4]) for i in CASES})


def side_by_side(root: Path) -> None:
    save_arrays(root, {f"Zelle {i}.tif": scan(i) for i in CASES})
    save_arrays(root, {f"Zelle {i}_mask.tif": blocks([1] * 9).astype(bool) * np.uint8(255) for i in CASES})


def table(root: Path) -> None:
    save_arrays(root, {f"scan_{i}.nrrd": scan(i) for i in CASES} | {f"drawn_{i}.nrrd": blocks([2]) for i in CASES})
    rows = ["case,CT,label", *(f"p{i},scan_{i}.nrrd,drawn_{i}.nrrd" for i in CASES)]
    (root / "cases.csv").write_text("\n".join(rows))


def segmentations(root: Path) -> None:
    label = np.zeros((4, 12, 10), np.uint8)
    label[1:3, 2:7, 3:6], label[2, 7:10, 1:9] = 1, 2
    for i in CASES:
        series = patient(root, i)
        write_dicom_seg(series.parent / "seg.dcm", np.roll(label, i % 2, 1), series, LABELS)


def contours(root: Path) -> None:
    for i in CASES:
        series = patient(root, i)
        save_contours(series.parent / "rt.dcm", series, {"GTV": [box((1, 7), (2, 9), z) for z in (1, 2)]})


# how the data are made, what is given, and what is found: channels and labels
KINDS: dict[str, tuple[Callable[[Path], None], str, list[str], dict[str, int]]] = {
    "patients": (patients, "", ["t1", "t2"], {"background": 0, "label_1": 1, "label_4": 4}),
    "side by side": (side_by_side, "", ["image"], {"background": 0, "label_1": 1}),
    "table": (table, "/cases.csv", ["CT"], {"background": 0, "label_2": 2}),
    "segmentations": (segmentations, "", ["CT"], {"background": 0, "Anterior": 1, "Posterior": 2}),
    "contours": (contours, "", ["CT"], {"background": 0, "GTV": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_command_plans_the_dataset(command: Command, tmp_path: Path, kind: str) -> None:
    make, given, channels, labels = KINDS[kind]
    make(tmp_path / kind)
    before = sorted((tmp_path / kind).rglob("*"))
    code, _, err = command("init", f"{kind}s{given}", cwd=tmp_path)
    assert code == 2 and (given or f"Did you mean {tmp_path / kind}?" in err)
    code, out, err = command("init", f"{kind}{given}", cwd=tmp_path)
    assert (code, err) == (0, "") and sorted((tmp_path / kind).rglob("*")) == before, "nothing is written to the data"
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert out.startswith(f"{kind if not given else 'cases.csv'}: 6 cases\n")
    assert lines["channels"] == ", ".join(channels)
    assert lines["labels"] == ", ".join(f"{name} {value}" for name, value in labels.items())
    written = json.loads(Path(lines["written"]).read_text())
    assert written["labels"] == labels and list(written["channel_names"].values()) == channels
    next_command = shlex.split(lines["next"])
    assert next_command[:2] == ["nnlite", "plan"]
    code, out, err = command(*next_command[1:], cwd=tmp_path)
    assert code == 0 and "6 cases, 0 errors" in err, err
    dataset = read_dataset(tmp_path / next_command[2])
    assert dataset.layout == "explicit" and dataset.value_map == ({255: 1} if kind == "side by side" else None)


def test_from_dicom_to_a_prediction(command: Command, tmp_path: Path) -> None:
    """A folder of slices is an image like any other one; a changed slice is noticed."""
    contours(tmp_path / "clinic")
    assert command("init", "clinic", cwd=tmp_path)[0] == 0
    settings = as_options({**TINIEST, "training.patch_size": [4, 12, 12], "training.epochs": 1})
    assert command("plan", "nnlite_workspace/raw/clinic", cwd=tmp_path)[0] == 0
    assert command("train", "3d_fullres", 0, *settings, "--device", "cpu", cwd=tmp_path)[0] == 0
    code, _, err = command("predict", "-i", "clinic/patient1/scan", "-o", "out", "--device", "cpu", cwd=tmp_path)
    assert code == 0 and (tmp_path / "out" / "scan.nii.gz").is_file(), err
    paths, dataset = (
        Paths(tmp_path / "nnlite_workspace" / "clinic"),
        read_dataset(tmp_path / "nnlite_workspace/raw/clinic"),
    )
    assert reason_to_plan(dataset, paths) is None
    changed = sorted((tmp_path / "clinic" / "patient2" / "scan").iterdir())[2]
    with changed.open("ab") as file:
        file.write(b"\0\0")
    assert reason_to_plan(dataset, paths) == f"has changed since it was planned ({changed})"


def test_channels_inside_files(tmp_path: Path) -> None:
    """A picture has colours, and a file with a fourth dimension has channels."""
    for i in CASES:
        save_arrays(tmp_path / "rgb", {f"x{i}_mask.png": blocks([1])})
        colours = np.random.default_rng(i).integers(0, 255, (24, 28, 3)).astype(np.uint8)
        Image.fromarray(colours).save(tmp_path / "rgb" / f"x{i}.png")
        save_arrays(tmp_path / "4d", {f"P{i}/seg.nii": blocks([1])})
        voxels = np.random.default_rng(i).random((28, 24, 4, 2))
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "4d" / f"P{i}" / "flair.nii")
        for name, channels in (("ome", ["DAPI", "GFP"]), ("same", ["GFP", "GFP"])):
            save_arrays(tmp_path / name, {f"x{i}_mask.tif": blocks([1])[1]})
            stated: Any = {"axes": "CYX", "Channel": {"Name": channels}}
            stack = np.moveaxis(voxels[:, :, 0] * 255, 2, 0).swapaxes(1, 2).astype(np.uint8)
            tifffile.imwrite(tmp_path / name / f"x{i}.ome.tif", stack, photometric="minisblack", metadata=stated)
    expected = {"rgb": ["R", "G", "B"], "4d": ["flair_0", "flair_1"], "ome": ["DAPI", "GFP"]}
    for name, channels in {**expected, "same": ["image_0", "image_1"]}.items():
        about = nnunet_lite.init(tmp_path / name, workspace=tmp_path / "workspace")
        assert list(about.values["channel_names"].values()) == channels
        dataset = read_dataset(tmp_path / "workspace" / "raw" / name)
        assert all(read_image(case.images[0]).array.shape[0] == len(channels) for case in dataset.cases)


def test_masks_that_may_number_cells_are_pointed_out(command: Command, tmp_path: Path) -> None:
    for i in CASES:
        save_arrays(tmp_path / "cells", {f"x{i}.png": scan(i), f"x{i}_mask.png": blocks(range(1, 30 + i))})
    out = command("init", "cells", cwd=tmp_path)[1]
    assert "to do     if these 35 values number cells, set them to 1, see docs/howto/microscopy.md; otherwise " in out


def test_a_second_mask_that_became_a_channel_is_reported(command: Command, tmp_path: Path) -> None:
    side_by_side(tmp_path / "data")
    save_arrays(tmp_path / "data", {f"Zelle {i}_membrane.tif": blocks([1] * 9) * np.uint8(255) for i in CASES})
    assert command("init", "data", cwd=tmp_path)[0] == 0
    code, out, _ = command("check", "data", cwd=tmp_path)
    assert code == 0 and "warning: dataset.json: channel membrane holds two values in every case, as a mask does" in out
    assert "channel image" not in out


def test_masks_next_to_images_are_left_out_by_predict_and_compared_by_evaluate(tmp_path: Path) -> None:
    side_by_side(tmp_path / "data")
    assert [case.id for case in find_cases([tmp_path / "data"], 1)] == [f"Zelle {i}" for i in CASES]
    save_arrays(tmp_path / "out", {f"Zelle {i}.tif": blocks([1] * 9).astype(np.uint8) for i in CASES})
    scores = nnunet_lite.evaluate(tmp_path / "out", tmp_path / "data")
    assert scores.foreground().mean == 1


def test_folders_of_patients_are_predicted_and_evaluated(tmp_path: Path) -> None:
    """The masks in them are no images, and channels have the names that `nnlite init` gave them."""
    patients(tmp_path / "data")
    found = find_cases([tmp_path / "data"], 2, ["t1", "T2"])
    assert [[path.name for path in case.images] for case in found] == [["t1.nii.gz", "t2.nii.gz"]] * 6
    with pytest.raises(UserError, match=r"holds 3 images \(seg\.nii\.gz, which looks like a mask, t1\.nii\.gz, t2"):
        find_cases([tmp_path / "data"], 2, ["CT", "PET"])
    with pytest.raises(UserError, match=r"where it should hold one case: 0 files of channel flair\."):
        find_cases([tmp_path / "data"], 2, ["t1", "flair"])
    for folder in (tmp_path / "data").iterdir():  # numbered as nnU-Net does it, next to the mask
        for i, name in enumerate(("t1", "t2")):
            (folder / f"{name}.nii.gz").rename(folder / f"{folder.name}_000{i}.nii.gz")
    numbered = find_cases([tmp_path / "data"], 2, ["CT", "PET"])
    assert [[path.name[2:] for path in case.images] for case in numbered] == [["_0000.nii.gz", "_0001.nii.gz"]] * 6
    save_arrays(tmp_path / "out", {f"P{i}.nii.gz": blocks([1, 4]) for i in CASES})
    scores = nnunet_lite.evaluate(tmp_path / "out", tmp_path / "data")
    assert scores.foreground().mean == 1 and len(scores.rows) == 6


def test_folders_of_bids_are_predicted_and_evaluated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A prediction has the name of the patient's folder, and so its reference is found by it."""
    for i in (1, 2):
        anat = tmp_path / "data" / f"sub-0{i}" / "anat"
        save_arrays(anat, {f"sub-0{i}_rec-a_T2w.nii.gz": scan(i), f"sub-0{i}_rec-a_dseg.nii.gz": blocks([1])})
    cases = find_cases([tmp_path / "data"], 1)
    assert [(case.id, case.images[0].name[6:]) for case in cases] == [
        (f"sub-0{i}", "_rec-a_T2w.nii.gz") for i in (1, 2)
    ]
    assert capfd.readouterr().err.count("not predicted: by their names they are label maps") == 1
    save_arrays(tmp_path / "out", {f"{case.id}.nii.gz": blocks([1]) for case in cases})
    scores = nnunet_lite.evaluate(tmp_path / "out", tmp_path / "data")
    assert scores.foreground().mean == 1 and len(scores.rows) == 2
    (tmp_path / "data" / "sub-01" / "anat" / "sub-01_rec-a_dseg.nii.gz").unlink()
    (tmp_path / "data" / "sub-02" / "anat" / "sub-02_rec-a_dseg.nii.gz").unlink()
    with pytest.raises(UserError, match=r"no label map was found.* Give a folder of label maps that have the names of"):
        nnunet_lite.evaluate(tmp_path / "out", tmp_path / "data")


def test_further_masks_of_a_case_are_said_to_be_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Pictures of the breast (BUSI) have a mask for each lesion: x_mask.png, x_mask_1.png."""
    side_by_side(tmp_path / "data")
    shutil.copy(tmp_path / "data" / "Zelle 1_mask.tif", tmp_path / "data" / "Zelle 1_mask_1.tif")
    shutil.copy(tmp_path / "data" / "Zelle 1_mask.tif", tmp_path / "data" / "Zelle 9_mask.tif")
    nnunet_lite.init(tmp_path / "data", output=tmp_path / "out")
    warning = capfd.readouterr().err.splitlines()[-1]
    assert "Zelle 1_mask_1.tif: a further mask of a case, which is trained without it" in warning
    assert "Zelle 9" not in warning


def test_numbered_pictures_of_three_colours_are_cases(tmp_path: Path) -> None:
    """x_0000.png and x_0001.png are two cases that the dataset.json lists, not channels of the first."""
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (24, 28, 3)).astype(np.uint8)
        (tmp_path / "frames").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "frames" / f"x_{i:04d}.png")
        save_arrays(tmp_path / "frames", {f"x_{i:04d}_mask.png": blocks([1])})
    nnunet_lite.init(tmp_path / "frames", output=tmp_path / "out")
    assert [len(case.images) for case in read_dataset(tmp_path / "out").cases] == [1, 1, 1]


def test_nothing_is_overwritten_or_half_written(command: Command, tmp_path: Path) -> None:
    patients(tmp_path / "data")
    assert command("init", "data", "-o", "data", cwd=tmp_path)[0] == 0
    table = (tmp_path / "data" / "dataset.json").read_text()
    assert '"P1/t1.nii.gz"' in table, "paths inside the dataset are relative"
    code, out, _ = command("init", "data", "-o", "data", cwd=tmp_path)
    assert code == 0 and "unchanged the list of cases is the same as before" in out
    code, _, err = command("init", "data", cwd=tmp_path)
    assert code == 2 and "data: is a dataset already. Run `nnlite plan data`." in err
    assert (tmp_path / "data" / "dataset.json").read_text() == table
    shutil.move(tmp_path / "data" / "P2" / "seg.nii.gz", tmp_path / "data" / "P2" / "t3.nii.gz")
    (tmp_path / "data" / "dataset.json").unlink()
    shutil.copy(tmp_path / "data" / "P1" / "seg.nii.gz", tmp_path / "data" / "P1" / "mask.nii.gz")
    code, out, err = command("init", "data", "-w", "ws", cwd=tmp_path)
    assert (code, out) == (2, "") and "P1 has 2 label maps: P1/mask.nii.gz, P1/seg.nii.gz" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    code, out, _ = command("init", "data", "-w", "ws", "--label", "seg*", "--json", cwd=tmp_path)
    about = json.loads(out)
    assert code == 0 and about["left_out"]["images without label map"] == [
        "P2/t1.nii.gz",
        "P2/t2.nii.gz",
        "P2/t3.nii.gz",
    ]
    assert about["next"] == "nnlite plan ws/raw/data -w ws" and len(about["dataset"]) == 5


def test_the_list_of_cases_is_updated_and_the_names_stay(command: Command, tmp_path: Path) -> None:
    patients(tmp_path / "data")
    code, out, err = command("init", "data", cwd=tmp_path)
    table = tmp_path / "nnlite_workspace" / "raw" / "data" / "dataset.json"
    assert (code, err) == (0, "") and f"\nto do     name the labels in {table} before you plan\n" in out
    table.write_text(table.read_text().replace("label_1", "liver").replace("label_4", "tumour").replace('"t1"', '"CT"'))
    (tmp_path / "data" / "P2" / "seg.nii.gz").unlink()
    shutil.copytree(tmp_path / "data" / "P1", tmp_path / "data" / "P9")
    code, out, err = command("init", "data", cwd=tmp_path)
    assert code == 0 and "added     1: P9\n" in out and "removed   1: P2\n" in out and "to do" not in out
    assert err == "warning: 1 of 7 patients left out: P2/t1.nii.gz, P2/t2.nii.gz have no mask\n"
    written = json.loads(table.read_text())
    assert written["labels"] == {"background": 0, "liver": 1, "tumour": 4} and written["numTraining"] == 6
    assert written["channel_names"] == {"0": "CT", "1": "t2"} and "P9" in written["dataset"]
    shutil.copytree(tmp_path / "data" / "P1", tmp_path / "data" / "P8")
    for name in (".DS_Store", "README"):
        (tmp_path / "data" / name).write_text("no image")
    what = (
        f"3 files came after `nnlite init` listed the cases in {table}, and are not in the dataset; run `nnlite init "
    )
    warning = f"warning: {tmp_path / 'data'}: {what}{tmp_path / 'data'}` again"
    assert command("run", "data", "-c", "3d", cwd=tmp_path)[2].count(warning) == 1, "`run` and `plan` look for them"
    log.warn_once.cache_clear()
    assert command("init", "data", cwd=tmp_path)[0] == 0 and what not in command("check", "data", cwd=tmp_path)[2]
    scan = tmp_path / "data" / "P1" / "scan"
    scan.write_bytes(bytes(128) + b"DICM")  # new files are not looked for from now on
    assert command("init", "data", cwd=tmp_path)[0] == 0 and "source" not in json.loads(table.read_text())
    scan.unlink()
    edit(table, lambda content: content.update(source={"url": "https://example.org"}))  # of another program
    assert command("check", "data", cwd=tmp_path)[0] == 0
    before = table.read_bytes()
    save_arrays(tmp_path / "data", {"P9/seg.nii.gz": blocks([7])})
    code, _, err = command("init", "data", cwd=tmp_path)
    assert code == 2 and "there are other label values [7] now" in err and table.read_bytes() == before
    patients(tmp_path / "elsewhere" / "data")
    code, _, err = command("init", "elsewhere/data", cwd=tmp_path)
    assert code == 2 and "lists other files. Delete it" in err and table.read_bytes() == before
    table.write_text("[]")
    code, _, err = command("init", "data", cwd=tmp_path)
    assert code == 2 and "lists other files. Delete it" in err and table.read_text() == "[]"


def test_the_workspace_is_not_searched(command: Command, tmp_path: Path) -> None:
    patients(tmp_path)
    save_arrays(tmp_path / "nnlite_workspace", {"P9/t1.nii": scan(1), "P9/t2.nii": scan(2), "P9/seg.nii": blocks([1])})
    code, out, _ = command("init", ".", cwd=tmp_path)
    assert code == 0 and f"{tmp_path.name}: 6 cases" in out
    code, _, err = command("plan", tmp_path.name, cwd=tmp_path)
    assert code == 0 and "6 cases, 0 errors" in err, "its name is enough"


def test_other_commands_point_to_it(command: Command, tmp_path: Path) -> None:
    patients(tmp_path / "my data")
    for name in ("plan", "check"):
        code, out, err = command(name, "my data", cwd=tmp_path)
        assert code == 2 and f"`nnlite init '{tmp_path / 'my data'}'`" in out + err
    (tmp_path / "cases.csv").write_text("case,image,label\n")
    code, _, err = command("plan", "cases.csv", cwd=tmp_path)
    assert code == 2 and "Of a CSV file `nnlite init` makes one" in err


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: shutil.rmtree(root), "there is no such file or folder"),
        (lambda root: [save_arrays(root, {f"P{i}/seg.nii.gz": blocks([])}) for i in CASES], "anything but zeros"),
        (
            lambda root: save_arrays(root, {f"P1/{name}_mask.nii.gz": blocks([1]) for name in ("seg", "label")}),
            "P1 has 3 label maps.*Merge masks of several structures into one file",
        ),
        (
            lambda root: [(shutil.rmtree(root), save_arrays(root, {f"{a}/1.nii": scan(1) for a in ("Bild", "Ziel")}))],
            r"--image 'Bild/\*' --label 'Ziel/\*'",
        ),
    ],
)
def test_refused(tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    patients(tmp_path / "data")
    spoil(tmp_path / "data")
    with pytest.raises(UserError, match=says):
        nnunet_lite.init(tmp_path / "data", workspace=tmp_path / "ws")
    assert not (tmp_path / "ws").exists()
