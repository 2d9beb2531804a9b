"""Datasets whose names, folders or values are not what they should be, through `check`: the cause and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs import BadData, contents, refuse_dataset
from samples import Command, Counts, blocks, described, save_arrays, save_cases, save_maps, scan

Make = Callable[[Path], object]
ROOT = "."  # the dataset itself


def named(images: Sequence[str], labels: Sequence[str], table: dict[str, Any] | None = None) -> Make:
    """Five cases; `{}` in a name is the number of the case."""
    return lambda root: save_cases(root, images, labels, table=table, numbers=range(1, 6))


def bad(images: Sequence[str], labels: Sequence[str], file: str, *says: str, **more: Any) -> BadData:
    return BadData(named(images, labels, **more), file, says)


def surplus(
    images: str, labels: str, extra: str, array: np.ndarray, *says: str, file: str = "", **more: Any
) -> BadData:
    """One file beside five sound cases."""
    return BadData(
        and_then(named([images], [labels], **more), lambda root: save_arrays(root, {extra: array})), file or extra, says
    )


def deleted(make: Make, file: str, says: str) -> BadData:
    return BadData(and_then(make, lambda root: (root / file).unlink()), file, (says,))


def maps(*labels: np.ndarray, file: str = ROOT, says: Sequence[str] = (), **more: Any) -> BadData:
    """A case for each label map."""
    return BadData(lambda root: save_maps(root, labels, **more), file, tuple(says))


def values(*each: Iterable[int], **more: Any) -> BadData:
    """A case for each set of values in its label map, every value one block apart from the others."""
    return maps(*map(blocks, each), **more)


def instances(*labels: np.ndarray, says: Sequence[str] = (), **more: Any) -> BadData:
    return maps(*labels, file="labels", says=("instance masks", "Set every value above 0 to 1", *says), **more)


def and_then(make: Make, more: Make) -> Make:
    return lambda root: (make(root), more(root))


def renamed(folder: str, ending: str, *says: str) -> BadData:
    """Pictures and masks, those of one folder with an ending that nnlite does not read."""

    def rename(root: Path) -> None:
        for path in [*(root / folder).iterdir()]:
            path.rename(path.with_suffix(ending))

    return BadData(and_then(named(PICTURES, MASKS), rename), folder, says)


def touching_cells(width: int) -> np.ndarray:
    """Cells that fill the picture, as many as there is room for."""
    y, x = np.mgrid[:24, :28]
    return ((y // width) * (27 // width + 1) + x // width + 1).astype(np.uint8)


CASES, SEGMENTED = ["images/case_{}.nii.gz"], ["labels/case_{}.nii.gz"]
PICTURES, MASKS = ["images/c{}.png"], ["labels/c{}.png"]
LISTED = named(
    ["imagesTr/x{}.nii.gz"], ["labelsTr/x{}.nii.gz"],
    described("A", training=[
        {"image": f"imagesTr/x{i}.nii.gz", "label": f"labelsTr/x{i}.nii.gz"} for i in range(1, 6)]),
)  # fmt: skip
EXPLICIT = named(
    ["im/x{}_T1.nii.gz", "im/x{}_T2.nii.gz"], ["seg/x{}.nii.gz"],
    described("T1", "T2", dataset={
        f"x{i}": {"images": [f"im/x{i}_T1.nii.gz", f"im/x{i}_T2.nii.gz"], "label": f"seg/x{i}.nii.gz"}
        for i in range(1, 6)}),
)  # fmt: skip


def listed_channels(n: int) -> Make:
    """The list of the Medical Segmentation Decathlon with the first of several channels of each case."""
    entries = [{"image": f"imagesTr/c{i}_0000.nii.gz", "label": f"labelsTr/c{i}.nii.gz"} for i in range(1, 6)]
    images = [f"imagesTr/c{{}}_000{channel}.nii.gz" for channel in range(n)]
    return named(images, ["labelsTr/c{}.nii.gz"], described(*"ABC"[:n], training=entries))


NO_MATCH: dict[str, tuple[list[str], list[str], dict[str, Any] | None]] = {  # images, label maps, dataset.json
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
    "several masks of a case": (CASES, ["labels/case_{}_liver.nii.gz", "labels/case_{}_spleen.nii.gz"], None),
}  # fmt: skip
PAIRS = {  # what is proposed for the first case; nothing where it would be a guess
    "a modality in the image's name": "P001_T1.nii.gz with P001_seg.nii.gz",
    "two modalities": "P1_T1.nii.gz and P1_T2.nii.gz with P1_seg.nii.gz",
    "img and mask": "img_01.png with mask_01.png",
    "numbers with other zeros": "img1.nii.gz with label0001.nii.gz",
    "observers": "Image_1L.png with Image_1L_1stHO.png",
    "a dot before two channels": "c1.0000.nii.gz and c1.0001.nii.gz with c1.nii.gz",
}
NAMES = {
    name: bad(
        images,
        labels,
        labels[0].split("/")[0],
        "has the name of one of the",
        "CASE_0000",
        PAIRS.get(name, ""),
        table=table,
    )
    for name, (images, labels, table) in NO_MATCH.items()
}
FILES = {
    "two label maps of a case": surplus(
        *PICTURES, "labels/c{}_mask.png", "labels/c3_seg.png", blocks((1,)),
        "label map of case c3", "c3_mask.png is taken", "Remove one", "[ambiguous_label]"),
    "two formats of a label map": surplus(
        *PICTURES, *MASKS, "labels/c3.tif", blocks((1,)), "label map of case c3", "c3.png is taken"),
    "two formats of an image": surplus(
        *PICTURES, *MASKS, "images/c3.tif", scan(9), "2 cases have the id c3 (c3.png, c3.tif)", "[duplicate_id]",
        file="images/c3.png"),
    "a channel too many": surplus(
        "imagesTr/c{}_0000.nii.gz", "labelsTr/c{}.nii.gz", "imagesTr/c3_0001.nii.gz", scan(9),
        "a file for channel 1 of case c3", "expected 1 channel (A)", "[extra_channel]", table=described("A")),
    "an image of the list is deleted": deleted(LISTED, "imagesTr/x3.nii.gz", "no file for image of case x3"),
    "a label map of the list is deleted": deleted(LISTED, "labelsTr/x3.nii.gz", "no label map for case x3"),
    "a channel of nnU-Net's list is deleted": deleted(EXPLICIT, "im/x3_T2.nii.gz", "no file for T2 of case x3"),
    "a label map of nnU-Net's list is deleted": deleted(EXPLICIT, "seg/x3.nii.gz", "no label map for case x3"),
    "the first channel of an entry x_0000 is deleted": deleted(
        listed_channels(2), "imagesTr/c3_0000.nii.gz", "no file for A of"),
    "the second channel of an entry x_0000 is deleted": deleted(
        listed_channels(3), "imagesTr/c3_0001.nii.gz", "no file for B of"),
}  # fmt: skip
FOLDERS = {
    "a folder for each case, a mask for each structure": bad(
        CASES, ["labels/case_{}/liver.nii.gz", "labels/case_{}/spleen.nii.gz"], "labels",
        "no label map of a supported format, but case_1/ (liver.nii.gz, spleen.nii.gz)", "one for all structures"),
    "a folder for each structure": bad(
        CASES, ["labels/liver/case_{}.nii.gz", "labels/spleen/case_{}.nii.gz"], "labels",
        "but liver/ (case_1.nii.gz, case_2.nii.gz, case_3.nii.gz and 2 more), spleen/"),
    "a folder for each label map": bad(
        CASES, ["labels/case_{}/label.nii.gz"], "labels", "but case_1/ (label.nii.gz), case_2/", "Move"),
    "a folder for each image": bad(
        ["images/case_{}/T1.nii.gz", "images/case_{}/T2.nii.gz"], SEGMENTED, "images",
        "no image of a supported format, but case_1/ (T1.nii.gz, T2.nii.gz)", "CASE_0000.nii.gz"),
    "images in a folder too deep": bad(
        ["images/train/case_{}.nii.gz"], SEGMENTED, "images", "but train/ (case_1.nii.gz", "to images/"),
    "label maps in a folder too deep": bad(
        CASES, ["labels/final/case_{}.nii.gz"], "labels", "but final/ (case_1.nii.gz", "to labels/"),
    "a folder for each case with all its files": bad(
        ["B_{0}/B_{0}_t1.nii.gz"], ["B_{0}/B_{0}_seg.nii.gz"], ROOT, "it holds B_1/, B_2/, B_3/ and 2 more"),
    "a folder for each case with a folder of masks": bad(
        ["s000{}/ct.nii.gz"], ["s000{}/segmentations/liver.nii.gz", "s000{}/segmentations/spleen.nii.gz"], ROOT,
        "it holds s0001/, s0002/"),
    "images and label maps side by side": bad(
        ["c{}.png"], ["c{}_mask.png"], ROOT, "it holds c1.png, c1_mask.png", "the folders images/"),
    "label maps among the images": bad(
        PICTURES, ["images/c{}_mask.png"], ROOT, "it holds images/", "the folders images/ and labels/"),
    "no folder of label maps": bad(["Images/c{}.png"], [], ROOT, "it holds Images/"),
    "no folder of images": bad([], ["masks/c{}.png"], ROOT, "it holds masks/"),
    "no folder of label maps beside dataset.json": bad(
        ["imagesTr/c{}_0000.nii.gz"], [], "dataset.json", "it has no labelsTr/", table=described("A")),
    "two folders of label maps": bad(
        PICTURES, [*MASKS, "masks/c{}.png"], ROOT, "holds labels/ and masks/", "Keep one"),
    "two folders of images": bad([*PICTURES, "Image/c{}.png"], MASKS, ROOT, "holds Image/ and images/"),
    "the dataset is inside": bad(
        ["train/images/c{}.png"], ["train/masks/c{}.png"], ROOT, "is no dataset. Give", "train"),
    "an empty folder of label maps": BadData(
        and_then(named(PICTURES, []), lambda root: (root / "labels").mkdir()), "labels", ("it is empty",)),
    "label maps as WebP": renamed(
        "labels", ".webp", "no label map of a supported format, but 5 .webp files", ".nii.gz"),
    "images as arrays of numpy": renamed("images", ".npy", "no image of a supported format, but 5 .npy files"),
    "another file_ending": bad(
        ["imagesTr/c{}_0000.nrrd"], ["labelsTr/c{}.nrrd"], "imagesTr",
        "no image of a supported format that ends with .nii.gz, but 5 .nrrd files", "file_ending",
        table=described("A")),
}  # fmt: skip

RNG = np.random.default_rng(0)
CELLS = [blocks(range(1, n + 1)) for n in (15, 7, 12, 9, 20)]
LESIONS = [blocks(range(1, n + 1)) for n in (1, 3, 2, 0, 2)]
SLIDE = [blocks(RNG.choice(np.arange(1, 3000), n, replace=False)) for n in (6, 9, 5, 8, 7, 4)]
VOID = [(255,), (1, 255), (255,), (1, 255), (255,)]
RAMP = np.clip(np.linspace(-40, 295, 24 * 28), 0, 255).astype(np.uint8).reshape(24, 28)
NOISE = [np.random.default_rng(i).integers(1, 900, (4, 24, 28)).astype(np.int16) for i in range(5)]
TWO = described("A", labels={"background": 0, "a": 1, "b": 2})
VALUES = {
    "nothing but zeros": values((), (), file="labels", says=("anything but zeros", "1, 2, ... for the labels")),
    "values too far apart": values((1, 2**31), file="labels", says=["more than 1048576 apart"]),
    "numbered cells": instances(*CELLS, ending=".png", says=("7 to 20 values", "name them in dataset.json")),
    "numbered cells called one label": instances(*CELLS, table=described("grey")),
    "numbered cells that touch": instances(*map(touching_cells, (4, 5, 7, 9, 10)), ending=".png"),
    "numbered cells with gaps": instances(*(np.where(cells == 5, 0, cells) for cells in CELLS)),
    "cells of two pictures": instances(blocks(range(1, 16)), blocks(range(1, 43)), says=["15 to 42 values"]),
    "numbered cells, the small ones removed": instances(
        *(np.where(np.isin(cells, range(2, 30, 4)), 0, cells) for cells in CELLS)),
    "numbered lesions": instances(*LESIONS, says=["1 to 3 values"]),
    "numbered lesions called one label": instances(*LESIONS, table=described("FLAIR")),
    "numbers of a whole slide": instances(*SLIDE, ending=".png"),
    "255 beside labels": values(*[(1, 2, 3, 255)] * 5, says=("hold the value 255 besides 1, 2, 3", '"ignore": 255')),
    "255 beside twenty labels": values(
        *[(*range(1, 21), 255)] * 5, ending=".png", says=("besides 1, 2, 3 and 17 more", '"ignore": 255')),
    "255 beside 1 in some": values(*VOID, ending=".png", says=["value 255 besides 1."]),
    "255 beside 1 in some, with dataset.json": values(
        *VOID, table=described("A"), file="dataset.json", says=("hold the value 255, and some 1", '"ignore": 255')),
    "255 beside labels of dataset.json": values(
        (1, 2), (1, 2, 255), table=TWO, file="labels/c1.nii.gz", says=("label value 255", '"ignore" for voxels')),
    "-1 beside labels": values((1, 2, -1), (1, 2), says=("the value -1 besides 1, 2", '"ignore": -1')),
    "65535 beside labels": values((1, 2, 65535), (1, 2), says=["value 65535 besides 1, 2"]),
    "resized masks": maps(*[RAMP] * 5, ending=".png", says=("a smoothed mask does", "without interpolation")),
    "images for label maps": maps(*NOISE, says=["as an image or"]),
}  # fmt: skip
ALL = NAMES | FILES | FOLDERS | VALUES


@pytest.mark.parametrize("name", ALL)
def test_layout(command: Command, tmp_path: Path, counts: Counts, name: str) -> None:
    """The line also says what to do."""
    counts("bad inputs refused in one line")
    refuse_dataset(ALL[name], command, tmp_path / "broken")


@pytest.mark.parametrize("name", ["a modality in the image's name", "numbered cells", "255 beside labels"])
def test_plan_reports_what_check_reports(command: Command, tmp_path: Path, name: str) -> None:
    case = ALL[name]
    case.make(tmp_path / "broken")
    before = contents(tmp_path)
    code, out, err = command("plan", "broken", cwd=tmp_path)
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("error: ")
    assert all(word in err for word in case.says), err
    assert contents(tmp_path) == before
