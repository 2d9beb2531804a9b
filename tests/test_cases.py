"""What may be given to a model, where label maps are written, and the headers of the maps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from bad_inputs import Bad, copies_of_scan, refuse
from samples import Command, Counts, Forked, sample_plan, save_arrays, wait_until

from nnunet_lite import log
from nnunet_lite.data.cases import Case, find_cases
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import Image, read_geometry, read_image, read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.nifti import write_nifti
from nnunet_lite.errors import UserError
from nnunet_lite.inference.cases import check_channels, check_output, use_trained_unit
from nnunet_lite.inference.predictor import Predictor

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
    "numbers as objects": (np.zeros((4, 4, 4), object), (1.0, 1.0, 1.0), "Give real numbers"),
    "words": ([[["a"]]], (1.0, 1.0, 1.0), "shape"),
    "times": (np.zeros((4, 4, 4), "datetime64[s]"), (1.0, 1.0, 1.0), "datetime64"),
    "rows of other lengths": ([[[0.0, 1.0], [2.0]]], (1.0, 1.0, 1.0), "list of type object"),
    "nothing": (None, (1.0, 1.0, 1.0), "NoneType"),
    "a number": (7.0, (1.0, 1.0, 1.0), "shape ()"),
    "a dictionary": ({"image": 1}, (1.0, 1.0, 1.0), "dict"),
    "one slice without its axis": (np.zeros((4, 4)), (1.0, 1.0, 1.0), "array[None]"),
    "a batch": (np.zeros((1, 1, 4, 4, 4)), (1.0, 1.0, 1.0), "shape (1, 1, 4, 4, 4)"),
    "masked voxels": (np.ma.masked_equal(NUMBERS, 0.0), (1.0, 1.0, 1.0), "filled(0)"),
    "numbers beyond float32": (np.full((4, 4, 4), 1e300), (1.0, 1.0, 1.0), "as float32"),
    "infinite voxels": (np.full((4, 4, 4), np.inf, np.float16), (1.0, 1.0, 1.0), "64 voxels of channel MRI"),
    "channels too many": (
        np.zeros((2, 4, 4, 4)), (1.0, 1.0, 1.0),
        "has 2 channels, the model expects 1 (MRI). Give an array (channels, z, y, x)"),
    "voxels of a kilometre": (NUMBERS, (1e6, 1e6, 1e6), "more than fit into memory"),
    "an image without voxels": (Image(np.zeros((1, 0, 4, 4)), Geometry((0, 4, 4), (1.0, 1.0, 1.0))), None, "shape"),
    "an image of spacing 0": (Image(np.zeros((1, 4, 4, 4)), Geometry((4, 4, 4), (0.0, 1.0, 1.0))), None, "positive"),
    "another geometry": (Image(np.zeros((1, 4, 4, 4)), Geometry((4, 4, 5), (1.0, 1.0, 1.0))), None, "geometry"),
    "a file with a spacing": ("scan.nii.gz", (1.0, 1.0, 1.0), "scan.nii.gz: a spacing is given"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_no_image_are_refused(model: Predictor, counts: Counts, name: str) -> None:
    counts("bad inputs refused in one line")
    array, spacing, says = ARRAYS[name]
    with pytest.raises(UserError) as error:
        model(array, spacing)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_picture_of_other_colours_is_answered_with_the_ones_to_save(model: Predictor) -> None:
    picture = Image(np.zeros((3, 1, 16, 16), np.uint8), Geometry((1, 16, 16), (1.0, 1.0, 1.0), dimensions=2))
    with pytest.raises(
        UserError, match=r"has 3 channels, the model expects 1 \(MRI\)\. Save the picture as grey first"
    ):
        model(picture)


def test_a_picture_of_one_channel_is_answered_with_the_names_of_files(model: Predictor) -> None:
    """A picture cannot be saved as DAPI and GFP: the other channel is in another file."""
    plan = model.plan.model_copy(update={"channels": model.plan.channels * 2})
    picture = Image(np.zeros((1, 1, 16, 16), np.uint8), Geometry((1, 16, 16), (1.0, 1.0, 1.0), dimensions=2))
    with pytest.raises(UserError, match=r"has 1 channel, .* expects 2 \(MRI, MRI\)\. Number the files of a case"):
        check_channels(picture, plan, Path("p0_DAPI.png"))


def test_a_series_over_time_is_answered_with_what_to_do(command: Command, place: Path) -> None:
    image = nibabel.load(place / "scan.nii.gz")
    series = np.stack([np.asarray(image.dataobj)] * 3, axis=-1)
    nibabel.save(nibabel.Nifti1Image(series, image.affine), place / "bold.nii.gz")
    code, _, err = command("predict", "-i", "bold.nii.gz", "-o", "o", "-m", "model", "--device", "cpu", cwd=place)
    assert code == 2 and "has 3 channels, the model expects 1 (MRI). Of a series over time (cine, fMRI)" in err


def test_too_few_channels_are_no_series(model: Predictor) -> None:
    plan = model.plan.model_copy(update={"channels": model.plan.channels * 3})
    with pytest.raises(UserError, match=r"has 2 channels, the model expects 3 \(MRI, MRI, MRI\)\. Number the files"):
        check_channels(Image(np.zeros((2, 4, 4, 4)), Geometry((4, 4, 4), (1.0, 1.0, 1.0))), plan, Path("scan.nii.gz"))


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
    model: Predictor, scans: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    log.warn_once.cache_clear()
    array = read_image(scans[0]).array
    np.testing.assert_array_equal(model(array), model(array, (1.0, 1.0, 1.0)))
    model(array)
    assert capfd.readouterr().err.count("1 x 1 x 1 mm is used") == 1


# -------------------------------------------------------------------------------------------------------------- outputs


def linked(place: Path) -> None:
    copies_of_scan("in/a_0000.nii.gz")(place)
    (place / "other").symlink_to("in")


def bad_output(options: str, *says: str, make: Callable[[Path], object] = lambda place: None) -> Bad:
    return Bad(make, f"predict -m model {options}", says)


def write_other_record(place: Path) -> None:
    (place / "taken").mkdir()
    (place / "taken" / "predictions.json").write_text('{"format": "other"}')


AMONG = "would contain images and label maps"
TWO, ONE = copies_of_scan("in/a.nii.gz", "in/b.nii.gz"), copies_of_scan("in/a_0000.nii.gz")
NESTED = copies_of_scan("in/a/t1.nii.gz")

OUTPUTS = {
    "a name that no label map has": bad_output("-i scan.nii.gz -o seg.npy", "seg.npy", "cannot be written as .npy"),
    "one file for two images": bad_output("-i in -o seg.nii.gz", "seg.nii.gz", "2 images", "Give a folder", make=TWO),
    "a format that label maps do not have": bad_output("-i scan.nii.gz -o new/seg.jpg", "seg.jpg", "Use .png"),
    "a header alone": bad_output("-i scan.nii.gz -o seg.mhd", "Use .mha"),
    "a picture for a volume": bad_output("-i scan.nii.gz -o seg.png", "seg.png", "cannot be written", "Use .nii.gz"),
    "DICOM of a NIfTI image": bad_output("-i scan.nii.gz -o seg.dcm", "scan.nii.gz", "is no DICOM series"),
    "contours of a NIfTI image": bad_output("-i scan.nii.gz -o new --format rtstruct", "Use --format nifti"),
    "NIfTI for a DICOM segmentation": bad_output("-i scan.nii.gz -o seg.nii.gz --format dicom-seg", "end in .dcm"),
    "a DICOM segmentation for contours": bad_output("-i scan.nii.gz -o seg.dcm --format rtstruct", ".rtstruct.dcm"),
    "an unknown format": bad_output("-i scan.nii.gz -o new --format stl", "stl", "seg.nrrd"),
    "a folder with another record": bad_output(
        "-i scan.nii.gz -o taken", "predictions.json", "is of an unknown format", make=write_other_record
    ),
    "into the folder of the images": bad_output("-i in -o in", AMONG, "--output", make=ONE),
    "into it by another path": bad_output("-i in -o in/../in/.", AMONG, make=ONE),
    "into it by a link": bad_output("-i in -o other", AMONG, make=linked),
    "from it by a link": bad_output("-i other -o in", AMONG, make=linked),
    "a file among the images": bad_output("-i in -o in/seg.nii.gz", AMONG, make=ONE),
    "into one of two folders": bad_output(
        "-i in -i more -o more", AMONG, make=copies_of_scan("in/a_0000.nii.gz", "more/b_0000.nii.gz")
    ),
    "among the folders of cases": bad_output("-i in -o in/out", AMONG, make=NESTED),
    "into the folder of a case": bad_output("-i in -o in/a", AMONG, make=NESTED),
    "a file among the folders of cases": bad_output("-i in -o in/new/seg.nii.gz", AMONG, make=NESTED),
    "over the image by a link": bad_output(
        "-i scan.nii.gz -o link.nii.gz", "overwritten", make=lambda place: (place / "link.nii.gz").symlink_to(
            "scan.nii.gz")
    ),
    "a pipe as the image": bad_output(
        "-i pipe.nii.gz -o out", "is a pipe or a device", make=lambda place: os.mkfifo(place / "pipe.nii.gz")
    ),
    "a name that is a file": bad_output(
        "-i scan.nii.gz -o taken", "taken", make=lambda place: (place / "taken").touch()
    ),
    **{
        f"a device called {name}": bad_output(f"-i scan.nii.gz -o out --device {name}", f"--device {name}", "cpu")
        for name in ("mps", "cuda:99", "xpu", "meta", "nonsense", "vulkan", "hpu", "cuda:x", "CPU", "cpu:3", "-1")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_or_device_that_cannot_be(command: Command, place: Path, counts: Counts, name: str) -> None:
    counts("bad inputs refused in one line")
    refuse(OUTPUTS[name], command, place)
    assert not (place / "new").exists(), "no folder is made for it"


def test_the_only_device_of_a_machine_without_a_gpu_is_named(command: Command, place: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    _, _, err = command("predict", "-m", "model", "-i", "scan.nii.gz", "-o", "out", "--device", "cuda", cwd=place)
    reason = "there is no such device" if torch.backends.cuda.is_built() else "this PyTorch is built without CUDA"
    assert err == f"error: --device cuda: {reason}. This machine has: cpu.\n"


@pytest.mark.parametrize("out", ["seg.nii.gz", "new/seg.nrrd", "seg.mha", "in.nii.gz", "new/sub/x_0000.nii"])
def test_the_name_of_a_file_is_the_label_map(command: Command, place: Path, out: str) -> None:
    options = ("predict", "-m", "model", "-i", "scan.nii.gz", "--no-mirroring", "--save-probabilities", "Anterior")
    code, _, err = command(*options, "-o", out, cwd=place)
    assert code == 0 and (place / out).is_file(), err
    name = Path(out).name.split(".")[0]
    assert (place / out).parent.joinpath("probabilities", f"{name}_Anterior.nii.gz").is_file()
    assert command(*options, "-o", "folder", cwd=place)[0] == 0
    expected, geometry, _ = read_label(place / "folder" / "scan.nii.gz")
    found, place_of_it, _ = read_label(place / out)
    assert np.array_equal(found, expected) and not place_of_it.differences(geometry)
    changed = (place / out).stat().st_mtime_ns
    assert command(*options, "-o", out, "--continue", cwd=place)[0] == 0
    assert (place / out).stat().st_mtime_ns == changed


@pytest.mark.parametrize(
    ("source", "out", "made"),
    [
        ("in", "in/out", copies_of_scan("in/a_0000.nii.gz")),  # images are looked for in the folder itself
        ("in/deep", "in", copies_of_scan("in/deep/a_0000.nii.gz")),
        ("scan_0000.nii.gz", "seg.nii.gz", copies_of_scan("scan_0000.nii.gz")),
        ("in", "out", copies_of_scan("in/a/t1.nii.gz")),
    ],
)
def test_the_same_command_again_finds_the_same_images(
    command: Command, place: Path, source: str, out: str, made: Callable[[Path], None]
) -> None:
    made(place)
    ended = [command("predict", "-m", "model", "-i", source, "-o", out, "--no-mirroring", cwd=place) for _ in range(2)]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert ended[0][1] == ended[1][1] == f"1 label map in {out}\n"


def test_a_label_map_beside_the_channels_that_would_be_one_of_them(tmp_path: Path) -> None:
    """`a.nii.gz` beside `a_0000.nii.gz` and `a_0001.nii.gz` is a case of its own the next time."""
    images = tuple(tmp_path / f"a_{number:04d}.nii.gz" for number in (0, 1))
    for image in images:
        nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), image)
    cases, labels = find_cases([images[0]], 2), Labels(names={"background": 0, "organ": 1})
    assert cases == [Case("a", images)]
    with pytest.raises(UserError, match=AMONG):
        check_output([images[0]], cases, tmp_path, labels)
    with pytest.raises(UserError, match=AMONG):
        check_output([images[0]], cases, tmp_path / "a.nii.gz", labels)
    check_output([images[0]], cases, tmp_path / "seg.nii.gz", labels)
    check_output([images[0]], cases, tmp_path / "out", labels)


@pytest.mark.parametrize(
    ("files", "channels"),
    [
        (("t1_to_flair", "flair_to_t1"), ("t1", "flair")),
        (("P1_T1_to_FLAIR", "P1_FLAIR"), ("t1", "flair")),
        (("sub-1_T1w_space-FLAIR", "sub-1_FLAIR"), ("T1w", "FLAIR")),
        (("t2", "t2_flair"), ("t2", "flair")),
        (("t1", "t1_to_flair"), ("t1", "t1_to_flair")),
        (("t1", "ce_t1"), ("t1", "ce_t1")),
    ],
)
def test_an_image_on_the_grid_of_another_is_the_channel_that_moved(
    files: tuple[str, str], channels: tuple[str, str], tmp_path: Path
) -> None:
    """Such as t1_to_flair.nii.gz, which was registered to FLAIR and was read as FLAIR."""
    save_arrays(tmp_path, {f"P1/{name}.nii.gz": np.zeros((4, 4, 4)) for name in files})
    (case,) = find_cases([tmp_path], 2, channels)
    assert case.images == tuple(tmp_path / "P1" / f"{name}.nii.gz" for name in files)


@pytest.mark.slow  # one kill of a command is in test_store.py
def test_killed_while_it_writes_maps_it_leaves_nothing_temporary(command: Command, place: Path, counts: Counts) -> None:
    """By SIGKILL in the middle of predictions with maps; the same command with --continue does the rest."""
    counts("faults survived", 1)
    names = [f"in/{letter}_0000.nii.gz" for letter in "abcd"]
    copies_of_scan(*names)(place)
    arguments = ["predict", "-m", "model", "-i", "in", "-o", "out", "--continue", "--no-mirroring", "--device", "cpu"]
    maps = ["--save-probabilities", "--save-uncertainty"]
    process = Forked(*arguments, *maps, cwd=place)
    wait_until(lambda: len(list(place.glob("out/*.nii.gz"))) >= 1, process)
    process.kill()
    process.communicate()
    assert not [path for path in (place / "out").glob(".tmp*") if path.is_dir()]
    (place / "out/uncertainty/.tmp-01234567-a_entropy.nii.gz").touch()
    assert command(*arguments, cwd=place)[0] == 0
    assert not list(place.rglob(".tmp*"))
    for file in place.glob("out/*.nii.gz"):
        file.unlink()
    code, _, err = command(*arguments, *maps, cwd=place)
    assert code == 0 and len(list(place.glob("out/*.nii.gz"))) == 4, err
    assert len(list(place.glob("out/probabilities/*_Posterior.nii.gz"))) == 4
    assert not list(place.rglob(".tmp*"))


# ------------------------------------------------------------------------------------------------- headers of maps


def write_images(scan: Path, folder: Path) -> None:
    """Write the scan with headers of many kinds: codes, axes, units, scales, and formats."""
    folder.mkdir()
    loaded = nibabel.load(scan)
    voxels, affine = np.asarray(loaded.dataobj), np.asarray(loaded.affine)
    oblique = np.diag([0.9, 1.1, 1.5, 1.0])
    oblique[:2, :2] = [[0.9 * np.cos(0.3), -1.1 * np.sin(0.3)], [0.9 * np.sin(0.3), 1.1 * np.cos(0.3)]]
    oblique[:3, 3] = (-12.5, 30.25, 7)
    beside = affine.copy()
    beside[0, 3] += 30
    for name, form, qform, sform in (
        ("ras", affine, 1, 2),
        ("las", affine @ np.diag([-1, 1, 1, 1]), 4, 0),
        ("lps", affine @ np.diag([-1, -1, 1, 1]), 0, 3),
        ("oblique", oblique, 1, 1),
        ("two_forms", affine, 1, 4),
    ):
        image = nibabel.Nifti1Image(voxels, form)
        image.set_qform(form, qform)
        image.set_sform(beside if name == "two_forms" else form, sform)
        image.header.set_xyzt_units("mm", "sec")
        image.header["cal_max"] = 77  # the window of the image
        nibabel.save(image, folder / f"{name}.nii.gz")
    metres = nibabel.Nifti1Image(voxels, np.diag([1e-3, 1e-3, 1e-3, 1]) @ affine)
    metres.header.set_xyzt_units("meter")
    nibabel.save(metres, folder / "metres.nii")
    nibabel.save(nibabel.Nifti2Image(voxels, affine), folder / "second.nii.gz")
    loaded.header.set_slope_inter(2.5, -7)
    nibabel.save(nibabel.Nifti1Image(voxels, None, loaded.header), folder / "scaled.nii.gz")
    image = sitk.GetImageFromArray(voxels.T)
    image.SetDirection((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1))
    image.SetSpacing((1.0, 1.1, 1.3))
    image.SetOrigin((5.0, -6.0, 7.0))
    for name in ("itk.nrrd", "itk2.mha", "itk3.nii"):
        sitk.WriteImage(image, str(folder / name))


def test_label_maps_and_other_maps_have_the_geometry_of_the_image(command: Command, place: Path) -> None:
    write_images(place / "scan.nii.gz", place / "in")
    options = ("--save-probabilities", "Anterior", "--save-uncertainty", "--no-mirroring")
    code, _, err = command("predict", "-m", "model", "-i", "in", "-o", "out", *options, cwd=place)
    assert code == 0, err
    images = sorted((place / "in").iterdir())
    assert [path.name for path in sorted((place / "out").glob("*.[!j]*"))] == [image.name for image in images]
    for image in images:
        geometry, label, name = read_geometry(image)[0], place / "out" / image.name, image.name.partition(".")[0]
        assert not read_geometry(label)[0].differences(geometry)
        for kind in ("probabilities/{}_Anterior", "uncertainty/{}_entropy"):
            file = place / "out" / f"{kind.format(name)}.nii.gz"
            found = nibabel.load(file)
            assert not read_geometry(file)[0].differences(geometry)
            assert found.dataobj.slope == pytest.approx(1 / 255) and found.dataobj.inter == 0
            assert found.get_data_dtype() == np.uint8 and 0 <= np.asarray(found.dataobj).max() <= 1.0001
            if ".nii" in image.name:
                theirs, ours = nibabel.load(image).header, found.header
                assert type(theirs) is type(ours) and ours["cal_max"] == 0
                for field in ("qform_code", "sform_code", "xyzt_units", "quatern_b", "qoffset_x", "srow_x", "pixdim"):
                    np.testing.assert_array_equal(ours[field], theirs[field], field)
            else:
                assert (int(found.header["qform_code"]), int(found.header["sform_code"])) == (1, 1)
                np.testing.assert_allclose(found.get_qform(), found.get_sform(), atol=1e-5)
                assert found.header.get_xyzt_units()[0] == "mm"
        if ".nii" in image.name:
            theirs, ours = nibabel.load(image), nibabel.load(label)
            assert theirs.shape == ours.shape and theirs.header["xyzt_units"] == ours.header["xyzt_units"]
            for form in ("get_qform", "get_sform"):
                (first, code), (second, same) = (getattr(file, form)(coded=True) for file in (theirs, ours))
                assert code == same and (code == 0 or np.allclose(first, second, atol=1e-5)), (name, form)


def two_dimensional(path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (20, 30)).astype(np.uint8)  # (y, x)
    if path.name.startswith("nibabel"):
        nibabel.save(nibabel.Nifti1Image(array.T, np.diag([-0.5, 0.7, 1, 1])), path)
        return
    image = sitk.GetImageFromArray(array)
    if not path.name.startswith("picture"):
        image.SetSpacing((0.5, 0.7))
        image.SetOrigin((3.0, 4.0))
        image.SetDirection((0.0, -1.0, 1.0, 0.0))
    sitk.WriteImage(image, str(path))


@pytest.mark.parametrize("flat", [True, False], ids=["pictures", "volumes"])
def test_a_picture_without_a_spacing_is_refused_with_what_the_model_takes(flat: bool, tmp_path: Path) -> None:
    plan = sample_plan(Labels(names={"background": 0, "cell": 1}), spacing=(0.0005, 0.0005, 0.0005))
    if flat:
        plan = plan.model_copy(update={"configurations": {"2d": plan.configurations["2d"]}})
    picture = Image(np.zeros((1, 1, 9, 9), np.uint8), Geometry((1, 9, 9), (999, 1, 1), dimensions=2, calibrated=False))
    with pytest.raises(UserError, match="the model was trained on voxels") as error:
        use_trained_unit(plan, picture, tmp_path / "a.png")
    assert ("Give a TIFF file, and put <case>.json into its folder" if flat else "Give a volume.") in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["nibabel.nii.gz", "itk.nii.gz", "itk.nii", "itk.nrrd", "itk.mha", "picture.png", "picture.tif", "picture.bmp"],
)
def test_a_map_of_two_dimensions_has_two_and_no_spacing_of_999(tmp_path: Path, name: str) -> None:
    image, target = tmp_path / name, tmp_path / "map.nii.gz"
    two_dimensional(image)
    geometry, _ = read_geometry(image)
    shares = np.random.default_rng(1).integers(0, 256, geometry.shape).astype(np.uint8)
    write_nifti(target, shares, geometry, 1 / 255, image)
    found = nibabel.load(target)
    assert found.shape == (30, 20) and found.header["pixdim"].max() <= 1 and np.abs(found.affine).max() < 10
    np.testing.assert_allclose(np.asarray(found.dataobj), shares[0].T / 255, atol=1e-6)
    assert not read_geometry(target)[0].differences(geometry)
    as_itk, theirs = sitk.ReadImage(str(target)), sitk.ReadImage(str(image))
    for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        if name.startswith("picture") and what == "GetSpacing":  # ITK reads the dots per inch of some
            continue
        np.testing.assert_allclose(getattr(as_itk, what)(), getattr(theirs, what)(), atol=1e-6, err_msg=what)
