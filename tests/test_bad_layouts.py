"""Datasets whose names, folders or values are not what they should be, through `check`: the cause and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import BadData, Command, contents, refuse_dataset
from samples import blocks, save_arrays, scan

Make = Callable[[Path], object]
ROOT = "."  # the dataset itself


def named(
    images: Sequence[str],
    labels: Sequence[str],
    values: Iterable[int] = (1,),
    table: dict[str, object] | None = None,
) -> Make:
    """Five cases: `{}` in a name is the number of the case, `{c}` that of a channel."""

    def make(root: Path) -> None:
        for i in range(1, 6):
            save_arrays(root, {name.format(i): scan(i) for name in images})
            save_arrays(root, {name.format(i): blocks(values) for name in labels})
        if table is not None:
            (root / "dataset.json").write_text(json.dumps(table))

    return make


def described(*channels: str, labels: dict[str, int] | None = None, **more: object) -> dict[str, object]:
    """A dataset.json of nnU-Net v2."""
    names = {str(i): name for i, name in enumerate(channels)}
    return {"channel_names": names, "labels": labels or {"background": 0, "a": 1}, "file_ending": ".nii.gz", **more}


def with_values(*each: Iterable[int], table: dict[str, object] | None = None, ending: str = ".nii.gz") -> Make:
    """A case for each set of values in its label map, every value one block apart from the others."""

    def make(root: Path) -> None:
        for i, values in enumerate(each):
            save_arrays(root, {f"images/c{i}{ending}": scan(i), f"labels/c{i}{ending}": blocks(values)})
        if table is not None:
            (root / "dataset.json").write_text(json.dumps(table))

    return make


def without(make: Make, file: str) -> Make:
    return and_then(make, lambda root: (root / file).unlink())


def and_then(make: Make, more: Make) -> Make:
    return lambda root: (make(root), more(root))


def renamed(folder: str, ending: str) -> Make:
    """Pictures and masks, those of one folder with an ending that nnlite does not read."""

    def rename(root: Path) -> None:
        for path in [*(root / folder).iterdir()]:
            path.rename(path.with_suffix(ending))

    return and_then(named(["images/c{}.png"], ["labels/c{}.png"]), rename)


def smoothed(root: Path) -> None:
    """Masks of 0 and 255 that were resized with interpolation."""
    for i in range(5):
        ramp = np.clip(np.linspace(-40, 295, 24 * 28), 0, 255).astype(np.uint8).reshape(24, 28)
        save_arrays(root, {f"images/c{i}.png": scan(i), f"labels/c{i}.png": ramp})


def exchanged(root: Path) -> None:
    """Images where label maps should be."""
    for i in range(5):
        noise = np.random.default_rng(i).integers(1, 900, scan(i).shape).astype(np.int16)
        save_arrays(root, {f"images/c{i}.nii.gz": scan(i), f"labels/c{i}.nii.gz": noise})


def touching_cells(root: Path) -> None:
    """Cells that fill the picture, as many as there is room for."""
    for i, width in enumerate((4, 5, 7, 9, 10)):
        y, x = np.mgrid[:24, :28]
        cells = (y // width) * (27 // width + 1) + x // width + 1
        save_arrays(root, {f"images/c{i}.png": scan(i), f"labels/c{i}.png": cells.astype(np.uint8)})


def ids_from_a_whole_slide(root: Path) -> None:
    """Crops of a slide whose nuclei were numbered as a whole."""
    rng = np.random.default_rng(0)
    for i, n in enumerate((6, 9, 5, 8, 7, 4)):
        values = rng.choice(np.arange(1, 3000), n, replace=False)
        save_arrays(root, {f"images/c{i}.png": scan(i), f"labels/c{i}.png": blocks(values)})


def listed(root: Path) -> None:
    """The list of the Medical Segmentation Decathlon."""
    entries = [{"image": f"imagesTr/x{i}.nii.gz", "label": f"labelsTr/x{i}.nii.gz"} for i in range(1, 6)]
    named(["imagesTr/x{}.nii.gz"], ["labelsTr/x{}.nii.gz"], table=described("A", training=entries))(root)


def listed_channels(n: int) -> Make:
    """The same list, with the first of several channels of each case."""
    entries = [{"image": f"imagesTr/c{i}_0000.nii.gz", "label": f"labelsTr/c{i}.nii.gz"} for i in range(1, 6)]
    images = [f"imagesTr/c{{}}_000{channel}.nii.gz" for channel in range(n)]
    return named(images, ["labelsTr/c{}.nii.gz"], table=described(*"ABC"[:n], training=entries))


def explicit(root: Path) -> None:
    """The list of nnU-Net v2, with names of two modalities."""
    entries = {
        f"x{i}": {"images": [f"im/x{i}_T1.nii.gz", f"im/x{i}_T2.nii.gz"], "label": f"seg/x{i}.nii.gz"}
        for i in range(1, 6)
    }
    table = described("T1", "T2", dataset=entries)
    named(["im/x{}_T1.nii.gz", "im/x{}_T2.nii.gz"], ["seg/x{}.nii.gz"], table=table)(root)


SEGMENTED = ["labels/case_{}.nii.gz"]
INSTANCES = ("instance masks", "Set every value above 0 to 1")

NO_MATCH: dict[str, tuple[list[str], list[str], dict[str, object] | None]] = {  # images, label maps, dataset.json
    "a modality in the image's name": (["images/P00{}_T1.nii.gz"], ["labels/P00{}_seg.nii.gz"], None),
    "two modalities": (["images/P{}_T1.nii.gz", "images/P{}_T2.nii.gz"], ["labels/P{}_seg.nii.gz"], None),
    "img and mask": (["images/img_0{}.png"], ["masks/mask_0{}.png"], None),
    "volume and segmentation": (["images/volume-{}.nii"], ["labels/segmentation-{}.nii"], None),
    "numbers with other zeros": (["images/img{}.nii.gz"], ["labels/label000{}.nii.gz"], None),
    "observers": (["images/Image_{}L.png", "images/Image_{}R.png"],
                  ["labels/Image_{}L_1stHO.png", "labels/Image_{}R_1stHO.png"], None),
    "another word than image": (["images/{}_training.tif"], ["labels/{}_manual1.tif"], None),
    "upper and lower case": (["images/Case{}.png"], ["labels/case{}.png"], None),
    "nothing in common": (["images/a{}.png"], ["labels/x{}.png"], None),
    "a dot before the channel": (["imagesTr/case{}.0000.nii.gz"], ["labelsTr/case{}.nii.gz"], described("A")),
    "a dot before two channels": (["imagesTr/c{}.0000.nii.gz", "imagesTr/c{}.0001.nii.gz"], ["labelsTr/c{}.nii.gz"],
                                  described("A", "B")),
    "a hyphen before the channel": (["images/case_{}-0000.nii.gz", "images/case_{}-0001.nii.gz"], SEGMENTED, None),
    "a blank before the channel": (["images/case_{} 0000.nii.gz", "images/case_{} 0001.nii.gz"], SEGMENTED, None),
    "channels of three digits": (["imagesTr/c{}_000.nii.gz", "imagesTr/c{}_001.nii.gz"], ["labelsTr/c{}.nii.gz"],
                                 described("A", "B")),
    "channels of one digit": (["images/case_{}_0.nii.gz", "images/case_{}_1.nii.gz"], SEGMENTED, None),
    "several masks of a case": (["images/case_{}.nii.gz"],
                                ["labels/case_{}_liver.nii.gz", "labels/case_{}_spleen.nii.gz"], None),
}  # fmt: skip
SURPLUS = {  # files beside five sound cases
    "two label maps of a case": BadData(
        and_then(named(["images/c{}.png"], ["labels/c{}_mask.png"]),
                 lambda root: save_arrays(root, {"labels/c3_seg.png": blocks((1,))})), "labels/c3_seg.png",
        ("label map of case c3", "c3_mask.png is taken", "Remove one"),
    ),
    "two formats of a label map": BadData(
        and_then(named(["images/c{}.png"], ["labels/c{}.png"]),
                 lambda root: save_arrays(root, {"labels/c3.tif": blocks((1,))})), "labels/c3.tif",
        ("label map of case c3", "c3.png is taken"),
    ),
    "two formats of an image": BadData(
        and_then(named(["images/c{}.png"], ["labels/c{}.png"]),
                 lambda root: save_arrays(root, {"images/c3.tif": scan(9)})), "images/c3.png",
        ("2 cases have the id c3 (c3.png, c3.tif)",),
    ),
    "a channel too many": BadData(
        and_then(named(["imagesTr/c{}_0000.nii.gz"], ["labelsTr/c{}.nii.gz"], table=described("A")),
                 lambda root: save_arrays(root, {"imagesTr/c3_0001.nii.gz": scan(9)})), "imagesTr/c3_0001.nii.gz",
        ("a file for channel 1 of case c3", "expected 1 channel (A)"),
    ),
}  # fmt: skip
DELETED: dict[str, tuple[Make, str, str]] = {  # a dataset that lists its files, the deleted one, and what is said
    "an image of the list": (listed, "imagesTr/x3.nii.gz", "no file for image of case x3"),
    "a label map of the list": (listed, "labelsTr/x3.nii.gz", "no label map for case x3"),
    "a channel of nnU-Net's list": (explicit, "im/x3_T2.nii.gz", "no file for T2 of case x3"),
    "a label map of nnU-Net's list": (explicit, "seg/x3.nii.gz", "no label map for case x3"),
    "the first channel of an entry x_0000": (listed_channels(2), "imagesTr/c3_0000.nii.gz", "no file for A of"),
    "the second channel of an entry x_0000": (
        listed_channels(3),
        "imagesTr/c3_0001.nii.gz",
        "no file for B of",
    ),
}

CASES = ["images/case_{}.nii.gz"]
PICTURES, MASKS = ["images/c{}.png"], ["labels/c{}.png"]
FOLDERS = {
    "a folder for each case, a mask for each structure": BadData(
        named(CASES, ["labels/case_{}/liver.nii.gz", "labels/case_{}/spleen.nii.gz"]), "labels",
        ("no label map of a supported format, but case_1/ (liver.nii.gz, spleen.nii.gz)", "one for all structures")),
    "a folder for each structure": BadData(
        named(CASES, ["labels/liver/case_{}.nii.gz", "labels/spleen/case_{}.nii.gz"]), "labels",
        ("but liver/ (case_1.nii.gz, case_2.nii.gz, case_3.nii.gz and 2 more), spleen/",)),
    "a folder for each label map": BadData(
        named(CASES, ["labels/case_{}/label.nii.gz"]), "labels", ("but case_1/ (label.nii.gz), case_2/", "Move")),
    "a folder for each image": BadData(
        named(["images/case_{}/T1.nii.gz", "images/case_{}/T2.nii.gz"], SEGMENTED), "images",
        ("no image of a supported format, but case_1/ (T1.nii.gz, T2.nii.gz)", "CASE_0000.nii.gz")),
    "images in a folder too deep": BadData(
        named(["images/train/case_{}.nii.gz"], SEGMENTED), "images", ("but train/ (case_1.nii.gz", "to images/")),
    "label maps in a folder too deep": BadData(
        named(CASES, ["labels/final/case_{}.nii.gz"]), "labels", ("but final/ (case_1.nii.gz", "to labels/")),
    "a folder for each case with all its files": BadData(
        named(["B_{0}/B_{0}_t1.nii.gz"], ["B_{0}/B_{0}_seg.nii.gz"]), ROOT, ("it holds B_1/, B_2/, B_3/ and 2 more",)),
    "a folder for each case with a folder of masks": BadData(
        named(["s000{}/ct.nii.gz"], ["s000{}/segmentations/liver.nii.gz", "s000{}/segmentations/spleen.nii.gz"]), ROOT,
        ("it holds s0001/, s0002/",)),
    "images and label maps side by side": BadData(
        named(["c{}.png"], ["c{}_mask.png"]), ROOT, ("it holds c1.png, c1_mask.png", "the folders images/")),
    "label maps among the images": BadData(
        named(PICTURES, ["images/c{}_mask.png"]), ROOT, ("it holds images/", "the folders images/ and labels/")),
    "no folder of label maps": BadData(named(["Images/c{}.png"], []), ROOT, ("it holds Images/",)),
    "no folder of images": BadData(named([], ["masks/c{}.png"]), ROOT, ("it holds masks/",)),
    "no folder of label maps beside dataset.json": BadData(
        named(["imagesTr/c{}_0000.nii.gz"], [], table=described("A")), "dataset.json", ("it has no labelsTr/",)),
    "two folders of label maps": BadData(
        named(PICTURES, [*MASKS, "masks/c{}.png"]), ROOT, ("holds labels/ and masks/", "Keep one")),
    "two folders of images": BadData(named([*PICTURES, "Image/c{}.png"], MASKS), ROOT, ("holds Image/ and images/",)),
    "the dataset is inside": BadData(
        named(["train/images/c{}.png"], ["train/masks/c{}.png"]), ROOT, ("is no dataset. Give", "train")),
    "an empty folder of label maps": BadData(
        and_then(named(PICTURES, []), lambda root: (root / "labels").mkdir()), "labels", ("it is empty",)),
    "label maps as WebP": BadData(
        renamed("labels", ".webp"), "labels", ("no label map of a supported format, but 5 .webp files", ".nii.gz")),
    "images as arrays of numpy": BadData(
        renamed("images", ".npy"), "images", ("no image of a supported format, but 5 .npy files",)),
    "another file_ending": BadData(
        named(["imagesTr/c{}_0000.nrrd"], ["labelsTr/c{}.nrrd"], table=described("A")), "imagesTr",
        ("no image of a supported format that ends with .nii.gz, but 5 .nrrd files", "file_ending")),
}  # fmt: skip

CASES_1_TO_N = [range(1, n + 1) for n in (15, 7, 12, 9, 20)]
LESIONS = [range(1, n + 1) for n in (1, 3, 2, 0, 2)]
VOID_IN_SOME = [(255,), (1, 255), (255,), (1, 255), (255,)]
VALUES = {
    "nothing but zeros": BadData(with_values((), ()), "labels", ("anything but zeros", "1, 2, ... for the labels")),
    "values too far apart": BadData(with_values((1, 2**31)), "labels", ("more than 1048576 apart",)),
    "numbered cells": BadData(
        with_values(*CASES_1_TO_N, ending=".png"), "labels", (*INSTANCES, "7 to 20 values", "name them in dataset.json")
    ),
    "numbered cells called one label": BadData(
        with_values(*CASES_1_TO_N, table=described("grey", labels={"background": 0, "cell": 1})), "labels", INSTANCES
    ),
    "numbered cells that touch": BadData(touching_cells, "labels", INSTANCES),
    "numbered cells with gaps": BadData(
        with_values(*(set(v) - {5} for v in CASES_1_TO_N)), "labels", INSTANCES
    ),
    "cells of two pictures": BadData(
        with_values(range(1, 16), range(1, 43)), "labels", (*INSTANCES, "15 to 42 values")
    ),
    "numbered lesions": BadData(with_values(*LESIONS), "labels", (*INSTANCES, "1 to 3 values")),
    "numbered lesions called one label": BadData(with_values(*LESIONS, table=described("FLAIR")), "labels", INSTANCES),
    "numbers of a whole slide": BadData(ids_from_a_whole_slide, "labels", INSTANCES),
    "255 beside labels": BadData(
        with_values(*[(1, 2, 3, 255)] * 5), ROOT,
        ("hold the value 255 besides 1, 2, 3", '"ignore": 255'),
    ),
    "255 beside twenty labels": BadData(
        with_values(*[(*range(1, 21), 255)] * 5, ending=".png"), ROOT, ("besides 1, 2, 3 and 17 more", '"ignore": 255')
    ),
    "255 beside 1 in some": BadData(with_values(*VOID_IN_SOME, ending=".png"), ROOT, ("value 255 besides 1.",)),
    "255 beside 1 in some, with dataset.json": BadData(
        with_values(*VOID_IN_SOME, table=described("A")), "labels/c1.nii.gz, labels/c3.nii.gz",
        ("label value 255", '"ignore" for voxels'),
    ),
    "255 beside labels of dataset.json": BadData(
        with_values((1, 2), (1, 2, 255), table=described("A", labels={"background": 0, "a": 1, "b": 2})),
        "labels/c1.nii.gz", ("label value 255", '"ignore" for voxels'),
    ),
    "-1 beside labels": BadData(with_values((1, 2, -1), (1, 2)), ROOT, ("the value -1 besides 1, 2", '"ignore": -1')),
    "65535 beside labels": BadData(with_values((1, 2, 65535), (1, 2)), ROOT, ("value 65535 besides 1, 2",)),
    "resized masks": BadData(smoothed, ROOT, ("a smoothed mask does", "without interpolation")),
    "images for label maps": BadData(exchanged, ROOT, ("as an image or",)),
}  # fmt: skip


NAMES = {
    name: BadData(
        named(images, labels, table=table), labels[0].split("/")[0], ("has the name of one of the", "CASE_0000")
    )
    for name, (images, labels, table) in NO_MATCH.items()
}
DELETIONS = {
    f"{name} is deleted": BadData(without(make, file), file, (says,)) for name, (make, file, says) in DELETED.items()
}
ALL = NAMES | SURPLUS | DELETIONS | FOLDERS | VALUES


@pytest.mark.parametrize("name", ALL)
def test_layout(command: Command, tmp_path: Path, counts: Callable[..., None], name: str) -> None:
    """The line also says what to do."""
    counts("bad inputs refused in one line")
    refuse_dataset(ALL[name], command, tmp_path / "broken")


@pytest.mark.parametrize("name", ["a modality in the image's name", "numbered cells", "255 beside labels"])
def test_plan_reports_what_check_reports(command: Command, tmp_path: Path, name: str) -> None:
    bad = ALL[name]
    bad.make(tmp_path / "broken")
    before = contents(tmp_path)
    code, out, err = command("plan", "broken", cwd=tmp_path)
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("error: ")
    assert all(word in err for word in bad.says), err
    assert contents(tmp_path) == before
