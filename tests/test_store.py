"""The store of preprocessed cases on the bundled hippocampus data."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import contents
from samples import FORKS, Copy, rewrite_nifti, sample_plan, start_fork_server, wait_until

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset, read_dataset
from nnunet_lite.data.geometry import slices
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.preprocessing.store import open_case, preprocess_dataset
from nnunet_lite.preprocessing.stored_case import chunks_and_blocks, sample_voxels

BOTH = ["2d", "3d_fullres"]


@pytest.fixture
def five(copy_dataset: Copy) -> Dataset:
    return read_dataset(copy_dataset(5))


def test_arrays_come_back_as_made(five: Dataset, tmp_path: Path) -> None:
    plan = sample_plan(five.labels)
    preprocess_dataset(five, plan, ["3d_fullres"], tmp_path / "pre")
    for case in five.cases:
        assert case.label is not None
        stored = open_case(tmp_path / "pre", plan, "3d_fullres", case.id)
        values, geometry, _ = read_label(case.label)
        box = slices(stored.placement.box)
        assert stored.case_id == case.id and stored.placement.geometry == geometry
        assert np.array_equal(stored.label[:], five.labels.encode(values)[box]) and stored.label.dtype == np.uint8
        patch = stored.image[:, 3:9, 10:20, 5:30]
        assert isinstance(patch, np.ndarray) and patch.dtype == np.float16 and patch.shape == (1, 6, 10, 25)
        whole = stored.image[:].astype(np.float64)
        assert np.array_equal(patch, stored.image[:][:, 3:9, 10:20, 5:30])
        assert abs(whole.mean()) < 1e-3 and abs(whole.std() - 1) < 1e-3
        for number in (1, 2):
            voxels = stored.foreground[number]
            assert len(voxels) == (stored.label[:] == number).sum() > 0
            assert (stored.label[:][tuple(voxels.T)] == number).all()
            assert voxels.dtype == np.int16 and voxels[0][0] - 100 < 0  # signed: corners may lie outside
        assert stored.annotated is None


def test_equal_configurations_share_one_copy(five: Dataset, tmp_path: Path) -> None:
    summary = preprocess_dataset(five, sample_plan(five.labels), BOTH, tmp_path)
    assert summary.cases == {"2d": 5, "3d_fullres": 5} and summary.made == 5
    assert len(list((tmp_path / "cases").iterdir())) == 5
    assert summary.stored_bytes == sum(p.stat().st_size for p in tmp_path.glob("cases/*/*"))
    assert summary.raw_bytes == sum(p.stat().st_size for c in five.cases for p in (*c.images, c.label) if p)
    assert "5 arrays made" in summary.to_text() and summary.estimate > 0
    other = preprocess_dataset(five, sample_plan(five.labels, (1.3, 1.0, 1.0)), BOTH, tmp_path)
    assert other.made == 5 and other.kept == 5  # 2d keeps the spacing of the first axis: those are there


def test_only_what_changed_is_made_again(five: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = sample_plan(five.labels)
    assert preprocess_dataset(five, plan, BOTH, tmp_path).made == 5
    before = contents(tmp_path)
    assert preprocess_dataset(five, plan, BOTH, tmp_path).made == 0
    assert preprocess_dataset(five, sample_plan(five.labels, patch=(16, 16, 16)), BOTH, tmp_path).made == 0
    assert contents(tmp_path) == before
    label = five.cases[2].label
    assert label is not None
    values, geometry, _ = read_label(label)
    values[0, 0, 0] = 1
    write_label(label, values, geometry)
    assert preprocess_dataset(five, plan, BOTH, tmp_path).made == 1
    assert open_case(tmp_path, plan, "2d", five.cases[2].id).label[0, 0, 0] == 1
    assert f"the raw files of case {five.cases[2].id} have changed" in capfd.readouterr().err
    write_label(label, values - (values == 1), geometry)
    assert preprocess_dataset(five, sample_plan(five.labels, (3.0, 1.0, 1.0)), ["3d_fullres"], tmp_path).made == 5
    capfd.readouterr()
    write_label(label, values, geometry)
    assert preprocess_dataset(five, plan, BOTH, tmp_path).made == 0
    assert "have changed" not in capfd.readouterr().err, "the arrays of the former file are still there"
    assert preprocess_dataset(five, sample_plan(five.labels, (2.0, 1.5, 1.5)), ["3d_fullres"], tmp_path).made == 5
    assert preprocess_dataset(five, sample_plan(five.labels, scheme="none"), ["3d_fullres"], tmp_path).made == 5


def test_unchanged_files_are_not_read_again(five: Dataset, tmp_path: Path) -> None:
    plan = sample_plan(five.labels)
    preprocess_dataset(five, plan, BOTH, tmp_path)
    image = five.cases[0].images[0]
    stat = image.stat()
    image.write_bytes(b"x" * stat.st_size)  # would be refused if it were read
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert preprocess_dataset(five, plan, BOTH, tmp_path).made == 0


def test_workers_do_not_change_the_files_and_none_means_no_thread(
    five: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def progress(items, total, what):  # type: ignore[no-untyped-def]
        for item in items:
            names = [thread.name for thread in threading.enumerate() if "preprocess" in thread.name]
            threads.append((what, total, names))
            yield item

    monkeypatch.setattr(log, "progress", progress)
    plan = sample_plan(five.labels, (1.5, 1.2, 0.8))
    preprocess_dataset(five, plan, BOTH, tmp_path / "0", 0)
    assert threads == [("files", 5, [])] * 5 + [("preprocess", 5, [])] * 5
    for workers in (1, 3, None):
        preprocess_dataset(five, plan, BOTH, tmp_path / str(workers), workers)
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "0")


def preprocess_in_two_threads(root: Path, store: Path) -> None:
    dataset = read_dataset(root)
    preprocess_dataset(dataset, sample_plan(dataset.labels, (0.7, 0.8, 0.9)), BOTH, store, 2)


def test_killed_at_any_point_it_continues_to_the_same_files(copy_dataset: Copy, tmp_path: Path) -> None:
    root = copy_dataset(6)
    start_fork_server()
    start = time.monotonic()
    preprocess_in_two_threads(root, tmp_path / "undisturbed")
    whole = time.monotonic() - start
    left = []
    for share in (0.1, 0.4, 0.7, 0.9):
        process = FORKS.Process(target=preprocess_in_two_threads, args=(root, tmp_path / "killed"))
        process.start()
        wait_until((tmp_path / "killed").is_dir)
        time.sleep(whole * share)
        process.kill()
        process.join()
        left.append(len(list((tmp_path / "killed").glob("cases/*-*"))))
    assert min(left) < 12
    preprocess_in_two_threads(root, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_a_bad_case_is_named_and_the_others_are_done(five: Dataset, tmp_path: Path) -> None:
    plan = sample_plan(five.labels)
    bad, infinite, missing = five.cases[1:4]
    rewrite_nifti(infinite.images[0], lambda a: np.where(a == a.max(), np.inf, a).astype(np.float32))
    assert bad.label is not None
    values, geometry, _ = read_label(bad.label)
    values[0, 0, 0] = 9
    write_label(bad.label, values, geometry)
    missing.images[0].unlink()
    with pytest.raises(UserError) as error:
        preprocess_dataset(five, plan, BOTH, tmp_path / "pre")
    text = str(error.value)
    assert text.startswith("3 of 5 cases could not be preprocessed: ") and "\n" not in text
    assert f"{bad.id} ({bad.images[0]}): label values" in text and str(missing.images[0]) in text
    assert f"{infinite.id} ({infinite.images[0]}): NaN or infinite: 1 voxel of channel" in text
    assert len(list((tmp_path / "pre" / "cases").iterdir())) == 2
    assert open_case(tmp_path / "pre", plan, "2d", five.cases[0].id).label is not None
    with pytest.raises(UserError, match=f"case {bad.id} is not preprocessed for 2d"):
        open_case(tmp_path / "pre", plan, "2d", bad.id)


def test_open_case_says_what_to_do(five: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not preprocessed for 3d_fullres\. Run `nnlite preprocess`\."):
        open_case(tmp_path, sample_plan(five.labels), "3d_fullres", five.cases[0].id)
    with pytest.raises(UserError, match="has no configuration '3d_lowres'"):
        preprocess_dataset(five, sample_plan(five.labels), ["3d_lowres"], tmp_path)


def test_many_threads_read_one_case(five: Dataset, tmp_path: Path) -> None:
    plan = sample_plan(five.labels, (0.5, 0.5, 0.5))
    preprocess_dataset(five, plan, ["3d_fullres"], tmp_path)
    case = open_case(tmp_path, plan, "3d_fullres", five.cases[0].id)
    whole = case.image[:]

    def same(seed: int) -> bool:
        z, y, x = np.random.default_rng(seed).integers(0, 30, 3)
        box = (slice(None), slice(z, z + 20), slice(y, y + 25), slice(x, x + 30))
        return np.array_equal(case.image[box], whole[box])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(400)))


def test_images_are_stored_as_the_plan_says_or_as_float32_beyond_float16(five: Dataset, tmp_path: Path) -> None:
    half, full = (sample_plan(five.labels, stored_as=kind) for kind in ("float16", "float32"))
    images = []
    for plan in (half, full):
        preprocess_dataset(five, plan, ["3d_fullres"], tmp_path)
        images.append(open_case(tmp_path, plan, "3d_fullres", five.cases[0].id).image[:])
    assert [image.dtype for image in images] == ["float16", "float32"]
    assert np.array_equal(images[1].astype(np.float16), images[0]) and not np.array_equal(*images)
    values, geometry, _ = read_label(five.cases[0].images[0])
    write_label(five.cases[0].images[0], values.astype(np.int32) * 1000, geometry)
    raw = sample_plan(five.labels, scheme="none", stored_as="float16")
    preprocess_dataset(five, raw, ["3d_fullres"], tmp_path)
    large = open_case(tmp_path, raw, "3d_fullres", five.cases[0].id).image
    assert large.dtype == np.float32 and large[:].max() == int(values.max()) * 1000 > 65504


@pytest.mark.parametrize(("scheme", "exact"), [("none", True), ("rescale_0_1", True), ("rgb_0_1", False)])
def test_values_that_are_not_standardised_keep_their_digits(
    copy_dataset: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str, exact: bool
) -> None:
    """16-bit values from 16 384 on are 16 and more apart in float16; bytes are well within its 11 bits."""
    dataset = read_dataset(copy_dataset(1))
    values, geometry, _ = read_label(dataset.cases[0].images[0])
    if exact:
        values = values.astype(np.uint16) * 200 + 17_001
        write_label(dataset.cases[0].images[0], values, geometry)
    plan = sample_plan(dataset.labels, scheme=scheme)
    preprocess_dataset(dataset, plan, ["3d_fullres"], tmp_path / "pre")
    assert "float16" not in capsys.readouterr().err
    stored = open_case(tmp_path / "pre", plan, "3d_fullres", dataset.cases[0].id)
    low, high = (values.min(), values.max()) if scheme == "rescale_0_1" else (0, 255 if scheme == "rgb_0_1" else 1)
    box = slices(stored.placement.box)
    error = np.abs(stored.image[0].astype(np.float64) * (float(high) - low) + low - values[box]).max()
    assert error < (0.01 if exact else 0.1)
    coarse = plan.model_copy(update={"stored_as": "float16"})
    preprocess_dataset(dataset, coarse, ["3d_fullres"], tmp_path / "half")
    assert open_case(tmp_path / "half", coarse, "3d_fullres", dataset.cases[0].id).image.dtype == np.float16
    assert ("rounds 16-bit values that are not standardised by up to 16" in capsys.readouterr().err) == exact


def test_a_second_process_waits(five: Dataset, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(preprocess_dataset, five, sample_plan(five.labels), BOTH, tmp_path)
            time.sleep(0.3)
            assert not waiting.done() and not (tmp_path / "cases").exists()
            fcntl.flock(file, fcntl.LOCK_UN)
            assert waiting.result(60).made == 5


def test_foreground_of_regions_and_of_what_is_annotated() -> None:
    classes = np.random.default_rng(0).integers(0, 5, (12, 40, 50)).astype(np.uint8)
    regions = Labels(names={"background": 0, "all": (1, 2, 3), "core": (3,)}, ignore=4, region_order=(1, 3))
    found = dict(sample_voxels(classes, regions))
    members = {1: (1, 2, 3), 2: (3,), -1: (0, 1, 2, 3)}
    assert list(found) == list(members)
    for number, voxels in found.items():
        assert np.isin(classes[tuple(voxels.T)], members[number]).all()
        assert len(voxels) == min(10_000, np.isin(classes, members[number]).sum())
        assert len(np.unique(voxels, axis=0)) == len(voxels)
    assert all(np.array_equal(v, dict(sample_voxels(classes, regions))[n]) for n, v in found.items())


def test_samples_of_a_large_class_are_spread_evenly() -> None:
    classes = np.zeros((70, 200, 200), np.uint8)
    classes[5:65, 10:190, 10:190] = 1  # more than one slab
    labels = Labels(names={"background": 0, "a": 1, "absent": 2})
    found = dict(sample_voxels(classes, labels))
    assert list(found) == [1] and len(found[1]) == 19_440  # a hundredth, as nnU-Net 2.8.1 keeps
    assert np.abs(found[1].mean(axis=0) - (34.5, 99.5, 99.5)).max() < 1.5
    assert (classes[tuple(found[1].T)] == 1).all()


def test_chunks_are_fitted_to_the_patch() -> None:
    chunks, blocks = chunks_and_blocks((1, 36, 50, 35), (40, 56, 40), 2)
    assert chunks == [1, 36, 50, 35] and blocks == [1, 36, 25, 35]
    chunks, blocks = chunks_and_blocks((2, 200, 512, 512), (128, 128, 128), 2)
    assert chunks == [2, 128, 128, 128] and np.prod(blocks) * 2 <= 1 << 16
    chunks, blocks = chunks_and_blocks((200, 512, 512), (1, 512, 512), 1)
    assert chunks == [1, 512, 512] and blocks[0] == 1


def test_a_case_may_have_a_name_of_255_bytes(copy_dataset: Copy, tmp_path: Path) -> None:
    """Its folder has a shorter name, and two cases that differ in their last letter have one each."""
    root = copy_dataset(5)
    table = json.loads((root / "dataset.json").read_text())
    for entry, letter in zip(table["training"][:2], "ab", strict=True):
        for key, file in entry.items():
            name = "脑" * 82 + f"{letter}.nii.gz"
            assert len(name.encode()) == 254
            (root / file).rename((root / file).with_name(name))
            entry[key] = f"./{Path(file).parent.name}/{name}"
    (root / "dataset.json").write_text(json.dumps(table))
    dataset = read_dataset(root)
    plan = sample_plan(dataset.labels)
    assert preprocess_dataset(dataset, plan, BOTH, tmp_path / "pre").made == 5
    long = [case.id for case in dataset.cases if len(case.id) > 80]
    keys = {open_case(tmp_path / "pre", plan, "3d_fullres", case_id).key for case_id in long}
    assert len(long) == len(keys) == 2
