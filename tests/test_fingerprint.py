"""The fingerprint against a straightforward computation of what nnU-Net defines."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
from samples import Copy

from nnunet_lite.data.dataset import read_case, read_dataset
from nnunet_lite.data.geometry import nonzero_mask
from nnunet_lite.errors import UserError
from nnunet_lite.planning import fingerprint as module
from nnunet_lite.planning.fingerprint import BLOCK, SEED, Fingerprint, RandomBlocks, check_and_fingerprint


def take(root: Path, workers: int | None = 2) -> Fingerprint:
    report, fingerprint = check_and_fingerprint(read_dataset(root), workers)
    assert report.ok and fingerprint is not None
    return fingerprint


def test_fingerprint_equals_its_definition(copy_dataset: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES", 1_000_000)
    root = copy_dataset(5)
    dataset = read_dataset(root)
    shapes, relative, drawn = [], [], []
    for case in dataset.cases:
        image, label = read_case(case, dataset)
        assert label is not None
        inside = np.argwhere(nonzero_mask(image.array))
        low, high = inside.min(axis=0), inside.max(axis=0) + 1
        shapes.append(tuple(int(n) for n in high - low))
        relative.append(np.prod(high - low) / label.size)
        pixels = image.array[0][label > 0].astype(np.float32)
        drawn.append(np.random.RandomState(1234).choice(pixels, 200_000, replace=True))
    everything = np.concatenate(drawn).astype(np.float64)
    found = take(root)
    assert found.case_ids == tuple(case.id for case in dataset.cases)
    assert found.shapes_after_crop == tuple(shapes)
    assert found.spacings == ((1.0, 1.0, 1.0),) * 5
    assert found.median_relative_size_after_cropping == np.median(relative)
    statistics = found.intensities[0].model_dump()
    expected = {
        "mean": everything.mean(),
        "median": np.median(everything),
        "std": everything.std(),
        "min": everything.min(),
        "max": everything.max(),
        "percentile_00_5": np.percentile(everything, 0.5),
        "percentile_99_5": np.percentile(everything, 99.5),
    }
    assert statistics == pytest.approx(expected, rel=1e-9)


def test_case_with_more_foreground_than_samples(copy_dataset: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES", 50)
    found = take(copy_dataset(5)).intensities[0]
    assert found.min < found.median < found.max


def test_threads_and_merging_on_the_way_change_nothing(hippocampus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = take(hippocampus, 0)
    assert take(hippocampus, 3) == at_once
    joined = []
    monkeypatch.setattr(module, "_join", lambda parts, join=module._join: joined.append(1) or join(parts))
    monkeypatch.setattr(module, "_bound", lambda drawn: drawn)
    monkeypatch.setattr(module, "_MANY", 1000)
    assert take(hippocampus) == at_once and len(joined) > 1


def test_many_distinct_values_are_rounded_but_hardly(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.sort(np.random.default_rng(0).normal(100, 30, 200_000).astype(np.float32))
    exact = module._statistics(module._distinct(values, np.ones(values.size, np.int64)))
    monkeypatch.setattr(module, "_MANY", 150_000)
    rounded = module._bound(module._distinct(values, np.ones(values.size, np.int64)))
    assert rounded.values.size <= 150_000 and rounded.counts.sum() == values.size
    assert module._statistics(rounded).model_dump() == pytest.approx(exact.model_dump(), rel=1e-4)


def test_round_trip_and_bad_files(hippocampus: Path, tmp_path: Path) -> None:
    fingerprint = take(hippocampus)
    path = tmp_path / "fingerprint.json"
    path.write_text(fingerprint.model_dump_json())
    assert Fingerprint.read(path) == fingerprint
    for text, problem in (
        ('{"spacings": []}', "is no fingerprint: shapes_after_crop: Field required"),
        ("{", "invalid JSON at line 1"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"fingerprint\.json: {problem}"):
            Fingerprint.read(path)


def test_no_fingerprint_of_broken_data(copy_dataset: Copy) -> None:
    root = copy_dataset(5)
    next((root / "labelsTr").iterdir()).unlink()
    report, fingerprint = check_and_fingerprint(read_dataset(root), 2)
    assert not report.ok and fingerprint is None


def test_labels_only_where_images_are_zero_are_refused(copy_dataset: Copy) -> None:
    root = copy_dataset(2)
    for file in sorted((root / "imagesTr").iterdir()):
        scan = nibabel.load(file)
        array = scan.get_fdata()
        array[2:] = 0  # the hippocampus is further inside
        nibabel.save(nibabel.Nifti1Image(array, scan.affine), file)
    with pytest.raises(UserError, match=f"{root}: every label is outside of the box"):
        check_and_fingerprint(read_dataset(root), 0)


DRAWN = (100_000, 3, 700_000, BLOCK)  # one after the other from the same numbers


def expected(size: int) -> list[np.ndarray]:
    random = np.random.RandomState(SEED)
    return [np.bincount(random.randint(0, size, n), minlength=size) for n in DRAWN]


def draw_all(blocks: RandomBlocks, size: int) -> list[np.ndarray]:
    found, position = [], 0
    for samples in DRAWN:
        counts, position = blocks.draw(size, samples, position)
        found.append(counts)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1024, 1025, 40_000, 65_536, 65_537, 300_000])
def test_counts_are_those_of_numpy(size: int) -> None:
    found = draw_all(RandomBlocks(), size)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected(size), strict=True))


def test_cases_share_numbers_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 2)  # later blocks are made again
    sizes = (900, 100_000, 30_000, 900, 5_000)
    with ThreadPoolExecutor(3) as pool:
        for size, found in zip(sizes, pool.map(partial(draw_all, RandomBlocks()), sizes), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(found, expected(size), strict=True))


def test_a_count_of_low_bits_fits_into_a_byte() -> None:
    blocks = RandomBlocks()
    for block in range(40):
        assert blocks.counts(block, 16).sum() == BLOCK
