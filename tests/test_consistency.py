"""What values mean over all label maps: sound labels that must pass, and the values that say what they are."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from samples import blocks, described, save_maps

from nnunet_lite.data.check import check_dataset
from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.data.images import read_geometry, read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import Problem
from nnunet_lite.data.slicer import write_seg_nrrd


def problems(root: Path) -> list[Problem]:
    found = check_dataset(read_dataset(root), workers=0).problems
    return [problem for problem in found if problem.severity != "notice" and problem.kind != "few_cases"]


def kinds(root: Path) -> set[str]:
    return {problem.kind for problem in problems(root)}


def save(root: Path, *maps: np.ndarray, labels: dict[str, int] | None = None, ending: str = ".nii.gz") -> None:
    save_maps(root, maps, labels and described("grey", labels={"background": 0, **labels}, file_ending=ending), ending)


def nested(depth: int) -> np.ndarray:
    """An organ with a tumour inside, with a necrosis inside, ..."""
    label = np.zeros((4, 24, 28), np.uint8)
    for i in range(depth):
        label[:, 2 + 2 * i : 22 - 2 * i, 2 + 2 * i : 26 - 2 * i] = i + 1
    return label


def lacking(n: int, *missing: Iterable[int]) -> list[np.ndarray]:
    """Maps of n organs of which some are missing."""
    return [blocks(value if value not in absent else 0 for value in range(1, n + 1)) for absent in missing]


RNG = np.random.default_rng(0)
SOUND: dict[str, Sequence[np.ndarray]] = {
    "two organs in all cases": lacking(2, (), (), (), (), ()),
    "one of two organs missing in half": lacking(2, (), (2,), (), (2,), (2,), ()),
    "the last organ missing in most": lacking(6, (), (6,), (6,), (6,), (6,)),
    "the last organs missing in some": lacking(8, (), (8,), (7, 8), (), (), ()),
    "any of 40 organs missing": lacking(40, *(RNG.choice(np.arange(1, 41), RNG.integers(0, 15)) for _ in range(8))),
    "a part of the body, organs in order": lacking(24, range(9, 25), range(1, 9), range(17, 25), range(1, 17), ()),
    "an organ, with a tumour inside in half": [nested(1 + i % 2) for i in range(6)],
    "an organ, a tumour, its necrosis": [nested(n) for n in (1, 2, 3, 1, 2)],
    "lesions in pieces": [
        np.where(RNG.random((4, 24, 28)) < 0.1, RNG.integers(1, 2 + i, (4, 24, 28)), 0).astype(np.uint8)
        for i in range(5)
    ],
    "one case": [blocks(range(1, 30))],
    "labels as high as 255": lacking(3, (), ()) + [np.where(blocks((1, 2)) > 0, blocks((254, 255)), 0)] * 2,
}  # fmt: skip


@pytest.mark.parametrize("with_table", [False, True], ids=["plain", "dataset.json"])
@pytest.mark.parametrize("name", SOUND)
def test_classes_are_no_instances(tmp_path: Path, name: str, with_table: bool) -> None:
    values = sorted({int(value) for label in SOUND[name] for value in np.unique(label)} - {0})
    save(tmp_path, *SOUND[name], labels={f"label_{value}": value for value in values} if with_table else None)
    assert problems(tmp_path) == []


def test_instances_that_dataset_json_names(tmp_path: Path) -> None:
    cells = [blocks(range(1, n + 1)) for n in (15, 7, 12, 9, 20)]
    save(tmp_path, *cells, labels={f"cell_{i}": i for i in range(1, 21)})
    (problem,) = problems(tmp_path)
    assert (problem.kind, problem.severity, problem.file) == ("instances_likely", "warning", "labels")
    assert problem.found == "label maps hold 7 to 20 values, each of which is one piece, as instance masks do"
    save(tmp_path, *cells, labels={f"label_{i}": i for i in range(1, 21)})
    assert kinds(tmp_path) == {"instances"}, "`nnlite init` named them"


def test_components_of_a_thresholded_image(tmp_path: Path) -> None:
    """Pieces of any shape and size, numbered as scipy and scikit-image number them."""
    from scipy.ndimage import gaussian_filter, label

    rng = np.random.default_rng(1)
    maps = [label(gaussian_filter(rng.random((4, 24, 28)), 1.2) > level)[0] for level in (0.52, 0.53, 0.54, 0.55, 0.56)]
    assert len({found.max() for found in maps}) >= 3 and max(found.max() for found in maps) > 5
    save(tmp_path, *(found.astype(np.uint8) for found in maps))
    assert kinds(tmp_path) == {"instances"}


@pytest.mark.parametrize("labels", [None, {"a": 1}])
@pytest.mark.parametrize("others", [(1,), (1, 255)])
def test_255_in_some_and_1_in_others(tmp_path: Path, others: tuple[int, ...], labels: dict[str, int] | None) -> None:
    """255 may mean "not annotated" in a case without the label; the maps looked at first hold 0 and 255 only."""
    for values in ([(255,), others] * 2 + [(255,)], [(255,), others, others, (0,), (255,)]):
        save(tmp_path, *map(blocks, values), labels=labels)
        found = problems(tmp_path)
        assert {problem.kind for problem in found} <= {"label_void", "label_value"}
        assert any("255" in problem.found and '"ignore"' in problem.fix for problem in found)
        assert not any("255 is read as 1" in p.found for p in check_dataset(read_dataset(tmp_path), workers=0).problems)


@pytest.mark.parametrize("quality", [95, 30])
def test_masks_that_were_jpeg_once(tmp_path: Path, quality: int) -> None:
    """Values near 0 and 255 are no classes; `nnlite init` does not name them either."""
    save(tmp_path, *(blocks((255,)) for _ in range(5)), ending=".png")
    for path in (tmp_path / "labels").iterdir():
        with io.BytesIO() as buffer:
            Pillow.open(path).save(buffer, "JPEG", quality=quality)
            Pillow.open(buffer).save(path)
    assert kinds(tmp_path) == {"label_levels"}
    values = sorted({int(v) for path in (tmp_path / "labels").iterdir() for v in np.unique(read_label(path)[0])} - {0})
    table = described("grey", labels={"background": 0, **{f"label_{v}": v for v in values}}, file_ending=".png")
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    assert kinds(tmp_path) == {"label_levels"}


def away_from_the_border(value: int) -> np.ndarray:
    return np.roll(blocks((value,)), (9, 9), (1, 2))


@pytest.mark.parametrize("ending", [".nii.gz", ".png"])
def test_inverted_masks(tmp_path: Path, ending: str) -> None:
    """As 0 and 255, without dataset.json; an exchange of the names in one is understood."""
    save(tmp_path, *[255 - away_from_the_border(255)] * 5, ending=ending)
    (found,) = problems(tmp_path)
    assert found.kind == "inverted"
    assert found.found == "label label_1 surrounds the background (0) in 5 of 5 label maps, as in inverted masks"
    table = described("grey", labels={"cell": 0, "background": 255}, file_ending=ending)
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    assert problems(tmp_path) == []


def test_masks_that_are_not_inverted(tmp_path: Path) -> None:
    """Tissue with gaps that the image cuts, a few inverted masks, and voxels without annotation around an organ."""
    tissue, inverted = np.ones((4, 24, 28), np.uint8), 1 - away_from_the_border(1)
    tissue[:, ::8] = 0
    for maps, labels in (
        ([tissue] * 5, {"a": 1}),
        ([inverted] * 3 + [blocks((1,))] * 2, {"a": 1}),
        ([np.where(inverted, 9, 1)] * 5, {"a": 1, "ignore": 9}),
    ):
        save(tmp_path, *maps, labels=labels)
        assert "inverted" not in kinds(tmp_path)


def test_palettes_that_give_a_number_other_colours(tmp_path: Path) -> None:
    save(tmp_path, *(blocks((1,)) for _ in range(5)), ending=".png")
    for number, path in enumerate(sorted((tmp_path / "labels").iterdir())):
        picture = Pillow.fromarray(np.asarray(Pillow.open(path)), "P")
        picture.putpalette([0, 0, 0, 255, 0, 0, 9, 9, 9][: 6 + number])
        picture.save(path)
    assert kinds(tmp_path) == set()
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    picture.save(path)
    assert kinds(tmp_path) == set(), "no pixel has the number 2"
    picture.putpalette([255, 0, 0, 0, 0, 0])
    picture.save(path)
    (found,) = problems(tmp_path)
    assert (found.kind, found.file) == ("palettes", "labels/c4.png")
    assert found.found == "the number 0 is the colour #ff0000, and #000000 in c0.png"


def test_segments_of_slicer_whose_numbers_differ(tmp_path: Path) -> None:
    """3D Slicer numbers the segments of each file in their order."""
    maps = [blocks((1, 2)) for _ in range(5)]
    save(tmp_path, *maps)
    names = {"liver": 1, "tumour": 2}
    others = {"Segment_1": 1, "Tumour": 2}, {"liver": 1, "tumour of B": 2}
    for case, numbers in enumerate([names, *others, {"tumour": 1, "liver": 2}, names]):
        path = tmp_path / "labels" / f"c{case}.nii.gz"
        geometry = read_geometry(path)[0]
        write_seg_nrrd(
            path.with_name(f"c{case}.seg.nrrd"), maps[case], geometry, Labels(names={"background": 0, **numbers})
        )
        path.unlink()
    (found,) = [problem for problem in problems(tmp_path) if problem.kind not in ("extra_label", "few_cases")]
    assert (found.kind, found.severity, found.file) == ("segments", "error", "labels/c3.seg.nrrd")
    assert found.found == "the number 1 is tumour, which is 2 in c0.seg.nrrd"
    write_seg_nrrd(tmp_path / found.file, maps[3], geometry, Labels(names={"background": 0, **names}))
    (found,) = [problem for problem in problems(tmp_path) if problem.kind.startswith("segment")]
    assert (found.kind, found.severity) == ("segment_names", "warning")
    assert found.found == "the number 2 is tumour of B, and tumour in c0.seg.nrrd"
    described_as = {"liver": 2, "tumour": 1}
    cases = {f"c{i}": {"images": [f"images/c{i}.nii.gz"], "label": f"labels/c{i}.seg.nrrd"} for i in range(5)}
    table = described("grey", labels={"background": 0, **described_as}, file_ending=".nii.gz") | {"dataset": cases}
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    (found,) = [problem for problem in problems(tmp_path) if problem.kind == "segments"]
    assert found.found == "the number 1 is liver, which is 2 in the labels"


def test_255_as_ignore(tmp_path: Path) -> None:
    """What the message proposes is accepted, and 255 is no label."""
    maps = [blocks(values) for values in ((255,), (1, 255), (1, 2), (2, 255), (1,))]
    save(tmp_path, *maps, ending=".png")
    assert kinds(tmp_path) == {"label_void"}
    save(tmp_path, *maps, labels={"a": 1, "b": 2, "ignore": 255}, ending=".png")
    dataset = read_dataset(tmp_path)
    assert problems(tmp_path) == []
    assert (dataset.labels.values, dataset.labels.ignore, dataset.value_map) == ((0, 1, 2), 255, None)


def test_label_maps_that_cannot_be_read_are_no_missing_labels(tmp_path: Path) -> None:
    """Neither "no foreground" nor "no voxel in any case" is known then; also without dataset.json."""
    for damaged, expected in ((5, "unreadable"), (1, "unreadable"), (0, "label_absent")):
        save(tmp_path, *(blocks((1,)) for _ in range(5)), labels={"a": 1, "b": 2})
        for i in range(damaged):
            (tmp_path / f"labels/c{i}.nii.gz").write_bytes(b"")
        assert kinds(tmp_path) == {expected}
    (tmp_path / "dataset.json").unlink()
    for path in (tmp_path / "labels").iterdir():
        path.write_bytes(b"")
    assert kinds(tmp_path) == {"unreadable"}
