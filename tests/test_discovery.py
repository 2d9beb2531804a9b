"""Cases are found in folders as people have them, by names alone; what is not clear is refused with the candidates."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from nnunet_lite.data.discovery import Discovery, cases_by_name, cases_in_table, files_below
from nnunet_lite.errors import UserError


def each(*patterns: str, n: int = 3) -> list[str]:
    """The names of n cases: {} is the number of the case."""
    return [pattern.format(i) for pattern in patterns for i in range(1, n + 1)]


def fill(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"voxels")
    return root


def found_in(root: Path, **patterns: list[str]) -> Discovery:
    return cases_by_name(files_below(root), **patterns)


def as_text(found: Discovery, root: Path) -> list[str]:
    return sorted(
        f"{case.id}: {' '.join(str(path.relative_to(root)) for path in (*case.images, case.label) if path)}"
        for case in found.cases
    )


# names of files, patterns, channels, and the second case
UNDERSTOOD: dict[str, tuple[list[str], dict[str, list[str]], tuple[str, ...], str]] = {
    "a folder for each patient": (
        each("P00{}/t1.nii.gz", "P00{}/t2.nii.gz", "P00{}/seg.nii.gz"), {}, ("t1", "t2"),
        "P002: P002/t1.nii.gz P002/t2.nii.gz P002/seg.nii.gz"),
    "channels in other letter case": (
        [*each("P{}/T1.nii", "P{}/flair.nii", "P{}/seg.nii", n=1), "P2/t1.nii", "P2/FLAIR.nii", "P2/seg.nii"], {},
        ("T1", "flair"), "P2: P2/t1.nii P2/FLAIR.nii P2/seg.nii"),
    "the patient in names too": (
        each("BraTS_0{0}/BraTS_0{0}_t1.nii", "BraTS_0{0}/BraTS_0{0}_flair.nii", "BraTS_0{0}/BraTS_0{0}_seg.nii"), {},
        ("flair", "t1"), "BraTS_02: BraTS_02/BraTS_02_flair.nii BraTS_02/BraTS_02_t1.nii BraTS_02/BraTS_02_seg.nii"),
    "BIDS": (
        each("sub-0{0}/ses-01/anat/sub-0{0}_ses-01_T1w.nii.gz", "sub-0{0}/ses-01/anat/sub-0{0}_ses-01_dseg.nii.gz"), {},
        ("T1w",), "sub-02_ses-01: sub-02/ses-01/anat/sub-02_ses-01_T1w.nii.gz "
        "sub-02/ses-01/anat/sub-02_ses-01_dseg.nii.gz"),
    "BIDS with label maps in derivatives": (
        each("sub-0{0}/anat/sub-0{0}_T1w.nii.gz", "derivatives/manual/sub-0{0}/anat/sub-0{0}_label-lesion_mask.nii.gz"),
        {}, ("T1w",),
        "sub-02-lesion: sub-02/anat/sub-02_T1w.nii.gz derivatives/manual/sub-02/anat/sub-02_label-lesion_mask.nii.gz"),
    "visits": (
        each("P1/v{}/t1.mha", "P1/v{}/seg.mha", "P2/v{}/t1.mha", "P2/v{}/seg.mha"), {}, ("t1",),
        "P1_v2: P1/v2/t1.mha P1/v2/seg.mha"),
    "names of their own": (
        ["P1/7919.mha", "P2/X.mha", "P3/y-3.mha", *each("P{}/mask.mha")], {}, ("image",), "P2: P2/X.mha P2/mask.mha"),
    "masks next to images": (each("x{}.tif", "x{}_mask.tif"), {}, ("image",), "x2: x2.tif x2_mask.tif"),
    "3D Slicer, blanks and umlauts": (
        each("Fräulein Ü {}.nrrd", "Fräulein Ü {}-label.nrrd"), {}, ("image",),
        "Fräulein Ü 2: Fräulein Ü 2.nrrd Fräulein Ü 2-label.nrrd"),
    "numbers that occur in other names": (
        each("Case {}/1 ax T2.nrrd", "Case {}/Segmentation.seg.nrrd"), {}, ("1_ax_T2",),
        "Case 2: Case 2/1 ax T2.nrrd Case 2/Segmentation.seg.nrrd"),
    "numbered channels": (
        each("x{}_0000.nii", "x{}_0001.nii", "x{}_seg.nii"), {}, ("channel_0", "channel_1"),
        "x2: x2_0000.nii x2_0001.nii x2_seg.nii"),
    "words in front": (
        each("volume-{}.nii", "segmentation-{}.nii", n=12), {}, ("volume",), "10: volume-10.nii segmentation-10.nii"),
    "parallel folders": (
        each("scans/a{}.png", "annotated/a{}_mask.png"), {}, ("scans",), "a2: scans/a2.png annotated/a2_mask.png"),
    "a folder for each channel": (
        each("T1/c{}.nii", "T2/c{}.nii", "masks/c{}.nii"), {}, ("T1", "T2"), "c2: T1/c2.nii T2/c2.nii masks/c2.nii"),
    "folders of the plain layout": (
        each("Images/c{}.png", "labels/c{}.png"), {}, ("image",), "c2: Images/c2.png labels/c2.png"),
    "brackets": (
        each("benign/benign ({}).png", "benign/benign ({})_mask.png"), {}, ("image",),
        "benign (2): benign/benign (2).png benign/benign (2)_mask.png"),
    "OME-TIFF": (each("x{}.ome.tif", "x{}_mask.tif"), {}, ("image",), "x2: x2.ome.tif x2_mask.tif"),
    "other endings": (each("x{}.TIFF", "x{}_mask.png"), {}, ("image",), "x2: x2.TIFF x2_mask.png"),
    "what belongs to no operating system of ours": (
        [*each("x{}.mha", "._x{}.mha", "x{}_seg.mha"), ".DS_Store", "__MACOSX/._x1.mha", ".git/x4.mha"], {}, ("image",),
        "x2: x2.mha x2_seg.mha"),
    "two patterns": (
        each("P{}/t1.nii", "P{}/t2.nii", "P{}/old.nii", "P{}/lesion.nii"),
        {"images": ["t2*", "t1*"], "labels": ["lesion*"]}, ("t2", "t1"), "P2: P2/t2.nii P2/t1.nii P2/lesion.nii"),
    "what the star matches": (
        each("x{}.nii", "x{}-tumour_core.nii"), {"labels": ["*-tumour_core.nii"]}, ("image",),
        "x2: x2.nii x2-tumour_core.nii"),
    "one of many masks": (
        each("s{}/ct.nii", "s{}/segmentations/liver.nii", "s{}/segmentations/spleen.nii"),
        {"labels": ["segmentations/liver.nii"]}, ("ct",), "s2: s2/ct.nii s2/segmentations/liver.nii"),
    "chosen images of one mask": (
        each("sub-{0}/sub-{0}_T1w.nii", "sub-{0}/sub-{0}_FLAIR.nii", "sub-{0}/sub-{0}_T1w_dseg.nii"),
        {"images": ["*_T1w.nii", "*_FLAIR.nii"]}, ("T1w", "FLAIR"),
        "sub-2_T1w: sub-2/sub-2_T1w.nii sub-2/sub-2_FLAIR.nii sub-2/sub-2_T1w_dseg.nii"),
    "one case": (["t1.nii", "t2.nii", "seg.nii"], {}, ("t1", "t2"), "data: t1.nii t2.nii seg.nii"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood(tmp_path: Path, name: str) -> None:
    names, patterns, channels, second = UNDERSTOOD[name]
    root = fill(tmp_path / "data", names)
    found = found_in(root, **patterns)
    texts = as_text(found, root)
    assert found.channels == channels and second in texts
    assert len(texts) == len({path for path in names if "seg" in path or "mask" in path or "label" in path}) or patterns


REFUSED: dict[str, tuple[list[str], dict[str, list[str]], str]] = {  # names, patterns, what the message says
    "no word of a label map": (
        each("P{}/flair.nii", "P{}/lesion.nii"), {},
        r"no label map was found; images: flair\.nii \(3 files\), lesion\.nii \(3 files\)\. .*--label"),
    "two masks for a case": (
        each("P{}/ct.nii", "P{}/liver_mask.nii", "P{}/tumor_mask.nii"), {},
        r"0 of 6 label maps .*: liver_mask\.nii \(3 files\), tumor_mask\.nii \(3 files\); images: ct\.nii.*"
        r"Merge masks of several structures into one file .*: --label 'liver_mask\.nii'\."),
    "two label maps": (
        each("P{}/t1.nii", "P{}/seg.nii", "P{}/gt.nii"), {}, r"P1 has 2 label maps: P1/gt\.nii, P1/seg\.nii"),
    "another mask in each folder": (
        each("P{}/t1.nii", "P{}/seg.nii", "P{}/brain_mask.nii"), {}, r"3 of 6 label maps .*brain_mask\.nii \(3"),
    "an image in two formats": (
        each("x{}.nii", "x{}.nrrd", "x{}_seg.nii"), {}, r"x1 has two images called 'image': x1\.nii, x1\.nrrd"),
    "other images in half of the cases": (
        [*each("P{}/t1.nii", "P{}/seg.nii"), *each("Q{}/ct.nii", "Q{}/seg.nii")], {},
        "cases have different images: 3 cases with t1, 3 cases with ct"),
    "masks only": (each("x{}_mask.png"), {}, "0 of 3 label maps .*; images: none"),
    "no image at all": (
        ["notes.txt", "a.pdf"], {},
        r"no label map was found; images: none; of no supported format: 1 \.(txt|pdf) file, 1 \.(txt|pdf) file\."),
    "label maps of no supported format": (
        each("images/{}_test.tif", "manual/{}_mask.gif"), {},
        r"no label map was found; images: images/1_test\.tif, .*; of no supported format: 3 \.gif files\."),
    "a pattern of no supported format": (
        [*each("images/{}_test.tif", "manual/{}_mask.gif"), "readme.txt"], {"labels": ["manual/*"]},
        r"no file has a name like --label 'manual/\*'; of no supported format: 3 \.gif files\."),
    "two folders": (
        each("png/x{}.png", "drawn/left/x{}.png"), {},
        r" If drawn/left holds the images: --image 'drawn/left/\*' --label 'png/\*'\."),
    "a pattern of nothing": (each("x{}.nii", "x{}_seg.nii"), {"labels": ["*_lesion.nii"]}, "no file .* --label '"),
    "a channel that no case has": (
        each("P{}/t1.nii", "P{}/seg.nii"), {"images": ["t1*", "t2*"]}, "no case has all of t1, t2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_candidates(tmp_path: Path, name: str) -> None:
    names, patterns, says = REFUSED[name]
    with pytest.raises(UserError, match=f"(?i){says}") as refused:
        found_in(fill(tmp_path / "data", names), **patterns)
    assert "--label" in refused.value.fix and ("--image" in refused.value.fix or "Merge masks" in refused.value.fix)


def test_what_is_left_out_has_a_reason(tmp_path: Path) -> None:
    names = [
        *each("P{}/t1.nii", "P{}/t2.nii", "P{}/seg.nii", n=5),
        "P6/t1.nii",
        "P7/seg.nii",
        "P8/t1.nii",
        "P8/seg.nii",
    ]
    root = fill(tmp_path / "data", [*names, "P1/t1_old.nii", "P2/thesis.docx"])
    files = files_below(root)
    found = cases_by_name(files)
    assert len(found.cases) == 5 and [path.name for path in files.others] == ["thesis.docx"]
    assert {reason: left for reason, left in found.left_out.items() if left} == {
        "label maps of no image": ["P7/seg.nii"],
        "images without label map": ["P6/t1.nii"],
        "of cases without all of t1, t2, or more than these": ["P1/t1_old.nii", "P8/seg.nii", "P8/t1.nii"],
    }
    found = found_in(root, labels=["seg.nii"], images=["t2.nii"])
    assert "P1/t1_old.nii" in found.left_out["not chosen"] and found.channels == ("t2",)


def test_cases_with_no_label_map_are_no_channels_of_others(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", each("case_{}.nii", "case_{}_seg.nii", "control_{}.nii"))
    found = found_in(root)
    assert found.channels == ("image",) and len(found.left_out["images without label map"]) == 3


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", each("P{}/t1.nii", "P{}/seg.nii"))
    (tmp_path / "elsewhere").mkdir()
    fill(tmp_path / "elsewhere", ["t1.nii", "seg.nii"])
    (root / "P4").symlink_to(tmp_path / "elsewhere")
    (root / "P1" / "loop").symlink_to(root)
    assert [case.id for case in found_in(root).cases] == ["P1", "P2", "P3", "P4"]


def test_ten_thousand_cases_take_seconds(tmp_path: Path) -> None:
    """Names are compared by their rarest words; each with each would take minutes."""
    files = files_below(fill(tmp_path / "data", each("x{}.png", n=1)))
    files.images[:] = [files.root / name for name in each("img/cell_{}_a.png", "seg/cell_{}_a.png", n=10_000)]
    assert len(cases_by_name(files).cases) == 10_000


def table(root: Path, text: str) -> Discovery:
    fill(root, each("scans/p{}.nii", "scans/q{}.nii", "masks/p{}.nii"))
    (root / "cases.csv").write_text(text, encoding="utf-8-sig")
    return cases_in_table(root / "cases.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table(tmp_path: Path, separator: str) -> None:
    rows = ["Case,T1,age, CT ,Label", *(f"p{i},scans/p{i}.nii,7{i},scans/q{i}.nii,masks/p{i}.nii" for i in (1, 2))]
    rows += [",,,,", "p3,scans/p3.nii,73,scans/q3.nii,", "p4,scans/p4.nii,74,scans/q1.nii,masks/p1.nii"]
    found = table(tmp_path, "\n".join(rows).replace(",", separator))
    assert found.channels == ("T1", "CT") and as_text(found, tmp_path) == [
        "p1: scans/p1.nii scans/q1.nii masks/p1.nii",
        "p2: scans/p2.nii scans/q2.nii masks/p2.nii",
    ]
    assert found.left_out == {"rows without existing files": ["", "p3", "p4"], "columns without files": ["age"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no row with existing files"),
        ("case,image\np1,scans/p1.nii", r"has no column label\. Columns: case, image\. The first line names"),
        ("name,image,label\np1,scans/p1.nii,masks/p1.nii", r"has no column case\. Columns: name, image, label"),
        ("image,mask\nscans/p1.nii,masks/p1.nii", r"has no column case, label\. Columns: image, mask"),
        ("case,image,label\np1,p1.nii,masks/p1.nii", "no row with existing files"),
        ("case,image,label\np1,scans/p1.nii,m.nii", "no row with existing files"),
        ("case,image,label\np1,scans/p1.nii,masks/p1.nii\np1,scans/p2.nii,masks/p2.nii", "has several rows of p1"),
    ],
)
def test_a_table_that_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        table(tmp_path, text)
