"""A model travels as one zip: whole, self-describing, without a trace of the machine; a zip that lies is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import pytest

import nnunet_lite
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.inference.predictor import load
from nnunet_lite.models import bundle as bundles
from nnunet_lite.models.bundle import MANIFEST, pack, read_licence, read_manifest, unpack, unpacked
from nnunet_lite.models.folder import MODEL

FAST = {"inference.mirroring": False, "inference.step_size": 1.0, "inference.precision": "fp32"}
WEIGHTS = f"tiny/fold_0/{MODEL}"
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "tiny.zip"
    pack(tiny_model, out, licence="CC-BY-4.0", note="ten hippocampi")
    return out


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """The model folder, to be changed."""
    shutil.copytree(tiny_model, tmp_path / "models" / "tiny")
    return tmp_path / "models" / "tiny"


@pytest.fixture
def cascade(copy: Path) -> Path:
    """A second stage with its first one beside it: the trained weights twice, which is all that travelling needs."""
    first = copy.with_name("3d_lowres-tiny")
    shutil.copytree(copy, first)
    for folder, stage in ((copy, "3d_lowres"), (first, None)):
        plan, run = read_json(folder / "plans.json"), read_json(folder / "run.json")
        fullres = plan["configurations"].pop("3d_fullres")
        second = {**fullres, "previous_stage": "3d_lowres"}
        plan["configurations"] = {"3d_lowres": fullres, "3d_cascade_fullres": second}
        run["configuration"] = "3d_lowres" if stage is None else "3d_cascade_fullres"
        write_json(folder / "plans.json", plan)
        write_json(folder / "run.json", run if stage is None else {**run, "previous": first.name})
    return copy


def contents(file: Path) -> Files:
    with ZipFile(file) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def listed(files: Files, **changes: Any) -> Files:
    """With a manifest that is true of the files, but for the changes."""
    manifest = json.loads(files[MANIFEST])
    manifest["files"] = {
        path: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        for path, content in files.items()
        if path != MANIFEST
    }
    return {**files, MANIFEST: json.dumps({**manifest, **changes}).encode()}


def write(file: Path, files: Files | list[tuple[ZipInfo | str, bytes]]) -> Path:
    with ZipFile(file, "w", ZIP_DEFLATED) as archive:
        for info, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(info, content)
    return file


def refused(file: Path, words: str, out: Path, **options: Any) -> None:
    """A zip is refused in one line, and nothing is left of it."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError, match=words) as error:
        unpack(file, out, **options)
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    assert sorted(out.parent.rglob("*")) == before


def test_a_model_comes_back_and_predicts_the_same(
    bundle: Path, tiny_model: Path, tmp_path: Path, hippocampus: Path
) -> None:
    scan = sorted((hippocampus / "imagesTs").iterdir())[0]
    folder = unpack(bundle, tmp_path / "new" / "mine")
    expected = load(tiny_model, device="cpu", settings=FAST)(scan)
    np.testing.assert_array_equal(load(folder, device="cpu", settings=FAST)(scan), expected)
    assert len(np.unique(expected)) > 1, "or this would say nothing"
    held = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert held == {MANIFEST, "plans.json", "dataset.json", "run.json", f"fold_0/{MODEL}"}
    assert (folder / "run.json").stat().st_mode & 0o044, "others may read it"


def test_the_manifest_tells_what_it_is(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert (manifest.licence, manifest.training_data) == ("CC-BY-4.0", "ten hippocampi")
    assert (manifest.dataset, manifest.models) == ("Task04_Hippocampus", ("tiny",))
    assert manifest.about["labels"] == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert 0 <= manifest.about["mean_dice"]["0"] <= 1
    files = contents(bundle)
    assert set(manifest.files) == set(files) - {MANIFEST}
    for path, file in manifest.files.items():
        assert (file.size, file.sha256) == (len(files[path]), hashlib.sha256(files[path]).hexdigest())


def test_equal_models_make_equal_files(bundle: Path, copy: Path, tmp_path: Path) -> None:
    pack(copy, tmp_path / "again.zip", licence="CC-BY-4.0", note="ten hippocampi")
    assert (tmp_path / "again.zip").read_bytes() == bundle.read_bytes()


def test_licence_and_note_stay_with_a_model(bundle: Path, tmp_path: Path) -> None:
    folder = unpack(bundle, tmp_path / "tiny")
    again = pack(folder, tmp_path / "again.zip", note="and a word more")
    assert (again.licence, again.training_data) == ("CC-BY-4.0", "and a word more")
    (tmp_path / "LICENCE").write_text("Do what you like.\n")
    assert read_licence(str(tmp_path / "LICENCE")) == "Do what you like.\n"
    assert read_licence("Apache-2.0") == "Apache-2.0"


def test_nothing_of_the_machine_or_the_cases_travels(copy: Path, tmp_path: Path) -> None:
    run, dataset = read_json(copy / "run.json"), read_json(copy / "dataset.json")
    run["settings"]["training"]["init"] = "/home/somebody/models/first"
    run["changed"] = [{"when": "today", "changes": ["training.init: null -> /home/somebody/models/first"]}]
    dataset |= {"training": [{"image": "/home/somebody/hippocampus_001.nii.gz"}], "description": "hippocampi"}
    write_json(copy / "run.json", run)
    write_json(copy / "dataset.json", dataset)
    pack(copy, tmp_path / "out.zip")
    files = contents(tmp_path / "out.zip")
    everything = b"\n".join(files.values())
    for word in ("somebody", str(copy.parent), str(Path(__file__).parents[1]), "hippocampus_0"):
        assert word.encode() not in everything
    assert json.loads(files["tiny/run.json"])["settings"]["training"]["init"] == "first"
    assert json.loads(files["tiny/dataset.json"])["description"] == "hippocampi"
    unpack(tmp_path / "out.zip", tmp_path / "new")


def test_a_cascade_takes_its_first_stage_along(cascade: Path, tmp_path: Path) -> None:
    manifest = pack(cascade, tmp_path / "out.zip")
    assert manifest.models == ("tiny", "3d_lowres-tiny")
    folder = unpack(tmp_path / "out.zip", tmp_path / "new" / "mine")
    assert (folder.with_name("3d_lowres-tiny") / "fold_0" / MODEL).is_file()
    before = (folder.with_name("3d_lowres-tiny") / "run.json").stat().st_mtime_ns
    unpack(tmp_path / "out.zip", folder.with_name("second"))  # the first stage exists already, and the same
    assert (folder.with_name("3d_lowres-tiny") / "run.json").stat().st_mtime_ns == before
    (folder.with_name("3d_lowres-tiny") / "fold_0" / MODEL).write_bytes(b"another")
    with pytest.raises(UserError, match=r"3d_lowres-tiny: exists already"):
        unpack(tmp_path / "out.zip", folder.with_name("third"))
    with pytest.raises(UserError, match="first stage"):
        unpack(tmp_path / "out.zip", tmp_path / "other" / "3d_lowres-tiny")
    with unpacked(tmp_path / "out.zip") as ours:
        assert ours.with_name("3d_lowres-tiny").is_dir()
    files = {path: content for path, content in contents(tmp_path / "out.zip").items() if "lowres" not in path}
    alone = write(tmp_path / "alone.zip", listed(files, models=["tiny"]))
    refused(alone, "first stage", tmp_path / "alone")
    shutil.rmtree(cascade.with_name("3d_lowres-tiny"))
    with pytest.raises(UserError, match="3d_lowres-tiny: is no model folder"):
        pack(cascade, tmp_path / "none.zip")
    assert not (tmp_path / "none.zip").exists()


def test_a_model_that_is_there_is_only_replaced_on_request(bundle: Path, tmp_path: Path) -> None:
    folder = unpack(bundle, tmp_path / "tiny")
    (folder / "mine.txt").write_text("notes")
    with pytest.raises(UserError, match=r"tiny: exists already"):
        unpack(bundle, folder)
    unpack(bundle, folder, replace=True)
    assert not (folder / "mine.txt").exists()
    assert (tmp_path / "old_tiny_1" / "mine.txt").is_file(), "set aside, not deleted"
    with pytest.raises(UserError, match=r"tiny\.zip: exists already"):
        pack(folder, bundle)


def test_an_imported_model_has_a_name_that_says_something(copy: Path, tmp_path: Path) -> None:
    """As it was called when it was packed; where that is `model`, as the zip, or as its configuration and recipe."""
    models = tmp_path / "w" / "Task04_Hippocampus" / "models"
    model = copy.rename(copy.with_name("model"))
    for file, name in (("hippo_v2.zip", "hippo_v2"), ("model.zip", "3d_fullres-default")):
        pack(model, tmp_path / file)
        assert nnunet_lite.import_model(tmp_path / file, workspace=tmp_path / "w").model == models / name
    pack(model.rename(model.with_name("mine")), tmp_path / "Model_3.zip")
    assert nnunet_lite.import_model(tmp_path / "Model_3.zip", workspace=tmp_path / "w").model == models / "mine"


def test_what_cannot_travel_is_told(copy: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out.zip", read_json(copy / "run.json")
    run["settings"]["network"]["factory"] = "mine:network"
    write_json(copy / "run.json", run)
    with pytest.raises(UserError, match="made by mine:network: code is not packed"):
        pack(copy, out)
    shutil.rmtree(copy / "fold_0")
    with pytest.raises(UserError, match="no trained fold"):
        pack(copy, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "path",
    ["../evil.txt", "tiny/../../evil.txt", "/etc/evil.txt", "C:/evil.txt", "tiny\\..\\evil.txt", "tiny//evil.txt",
     "./tiny/evil.txt"],
)  # fmt: skip
def test_paths_that_lead_elsewhere_are_refused(bundle: Path, tmp_path: Path, path: str) -> None:
    files = contents(bundle)
    bad = write(tmp_path / "bad.zip", listed({**files, path: b"evil"}))
    refused(bad, "out of its folder", tmp_path / "new" / "model")
    manifest = json.loads(files[MANIFEST])
    for lie in ({"models": [path]}, {"dataset": path}, {"models": [".hidden"]}, {"models": ["tiny", "tiny"]}):
        lying = {**files, MANIFEST: json.dumps({**manifest, **lie}).encode()}
        refused(write(tmp_path / "lie.zip", lying), "no name|no part|lacks a model", tmp_path / "new" / "model")


def special(path: str, mode: int = 0, compression: int = ZIP_DEFLATED) -> ZipInfo:
    info = ZipInfo(path)
    info.external_attr = mode << 16
    info.compress_type = compression
    return info


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (special("tiny/dataset.json", stat.S_IFLNK | 0o777), "a link"),
        (special("tiny/device", stat.S_IFCHR | 0o666), "a link"),
        (special("tiny/folder/", stat.S_IFDIR | 0o755), "a folder"),
        (special("tiny/packed.json", compression=ZIP_BZIP2), "another way"),
        (special("tiny/setup.py"), r"contains 'tiny/setup.py', against"),
        (special("elsewhere.txt"), r"contains 'elsewhere.txt', against"),
        (special("tiny/plans.json"), "twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_no_listed_plain_file_is_refused(bundle: Path, tmp_path: Path, odd: ZipInfo, words: str) -> None:
    files = {path: content for path, content in contents(bundle).items() if path != odd.filename or "plans" in path}
    bad = write(tmp_path / "bad.zip", [*files.items(), (odd, b"../../secret")])
    refused(bad, words, tmp_path / "new" / "model")


def test_an_encrypted_zip_is_refused(bundle: Path, tmp_path: Path) -> None:
    whole = bytearray(bundle.read_bytes())
    whole[whole.index(b"PK\x01\x02") + 8] |= 1  # the first entry's flags in the directory
    (tmp_path / "bad.zip").write_bytes(whole)
    refused(tmp_path / "bad.zip", "encrypted", tmp_path / "new" / "model")


def test_files_that_were_changed_are_refused(bundle: Path, tmp_path: Path) -> None:
    files, out = contents(bundle), tmp_path / "new" / "model"
    weights = bytearray(files[WEIGHTS])
    weights[-1] ^= 1
    refused(write(tmp_path / "a.zip", {**files, WEIGHTS: bytes(weights)}), "checksum", out)
    refused(write(tmp_path / "b.zip", {**files, WEIGHTS: bytes(weights[:-4])}), "bytes", out)
    lacking = {path: content for path, content in files.items() if path != "tiny/plans.json"}
    refused(write(tmp_path / "c.zip", lacking), r"lacks 'tiny/plans.json'", out)
    whole = bundle.read_bytes()
    start = whole.index(b"tiny/fold_0") + 200
    (tmp_path / "d.zip").write_bytes(whole[:start] + bytes([whole[start] ^ 255]) + whole[start + 1 :])
    refused(tmp_path / "d.zip", "damaged", out)  # the zip's own checksum
    for i, broken in enumerate((whole[:-40], whole[: len(whole) // 2], b"", b"this is no zip")):
        (tmp_path / f"{i}.zip").write_bytes(broken)
        refused(tmp_path / f"{i}.zip", "no zip file|damaged", out)


def test_what_is_too_large_is_refused(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, out = contents(bundle), tmp_path / "new" / "model"
    refused(bundle, "are allowed", out, limit=10_000)
    bomb = listed({**files, WEIGHTS: bytes(64 * 2**20)})  # zeros shrink to a thousandth
    refused(write(tmp_path / "bomb.zip", bomb), "as no model does", out)
    large = listed({**files, "tiny/dataset.json": b" " * (16 * 2**20 + 1)})
    refused(write(tmp_path / "large.zip", large), "tiny/dataset.json has 16777217 bytes", out)
    manifest = json.loads(files[MANIFEST])
    manifest["files"][WEIGHTS]["size"] = 10**15  # says more than there is
    refused(write(tmp_path / "lie.zip", {**files, MANIFEST: json.dumps(manifest).encode()}), "bytes", out)
    monkeypatch.setattr(bundles.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    refused(bundle, "are free", out)


def test_more_bytes_than_declared_are_never_written(bundle: Path, tmp_path: Path) -> None:
    """A header that declares a short file in front of long data, manifest and directory agreeing with it."""
    files, short = contents(bundle), len(contents(bundle)["tiny/run.json"])
    file = write(tmp_path / "bad.zip", listed({**files, "tiny/run.json": files["tiny/run.json"] + b" " * 10_000}))
    manifest = json.loads(contents(file)[MANIFEST])
    manifest["files"]["tiny/run.json"]["size"] = short
    write(file, {**contents(file), MANIFEST: json.dumps(manifest).encode()})
    long, cut = (short + 10_000).to_bytes(4, "little"), short.to_bytes(4, "little")
    whole = file.read_bytes()
    assert whole.count(long) == 2  # local header and central directory
    file.write_bytes(whole.replace(long, cut))
    refused(file, "damaged|checksum", tmp_path / "new" / "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "nnlite-bundle-2"}, "of a newer nnlite"),
        ({"format": "other-1"}, "unknown format"),
        ({"format": None}, "unknown format"),
        ({"models": []}, "manifest.json is not as nnlite writes it"),
        ({"files": {"tiny/plans.json": {"sha256": "0", "size": 1}}}, "manifest.json is not as nnlite writes it"),
        ({"files": {WEIGHTS: {"sha256": "0" * 64, "size": -1}}}, "manifest.json is not as nnlite writes it"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    bundle: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    files = contents(bundle)
    other = {**json.loads(files[MANIFEST]), **change}
    file = write(tmp_path / "bad.zip", {**files, MANIFEST: json.dumps(other).encode()})
    refused(file, words, tmp_path / "new" / "model")


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{}", b"[" * 200_000, b"\xff\xfe", b'{"format": 1e999}'])
def test_a_manifest_that_is_none_is_refused(bundle: Path, tmp_path: Path, manifest: bytes) -> None:
    file = write(tmp_path / "bad.zip", {**contents(bundle), MANIFEST: manifest})
    refused(file, "manifest.json is not as nnlite writes it|unknown format", tmp_path / "new" / "model")
    refused(write(tmp_path / "none.zip", {"readme.txt": b"hello"}), "no manifest.json", tmp_path / "new" / "model")


def with_factory(run: dict[str, Any]) -> None:
    run["settings"]["network"]["factory"] = "os:system"


def newer(run: dict[str, Any]) -> None:
    run["format"] = "nnlite-model-2"


def without_settings(run: dict[str, Any]) -> None:
    del run["settings"]


def of_another_configuration(run: dict[str, Any]) -> None:
    run["configuration"] = "4d"


def with_unknown_settings(run: dict[str, Any]) -> None:
    run["settings"]["training"]["freeze"] = "everything"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_factory, "names code, os:system"),
        (newer, "newer nnlite"),
        (without_settings, "is not as nnlite writes it"),
        (of_another_configuration, "no configuration '4d'"),
        (with_unknown_settings, "is not as nnlite writes it"),
    ],
)
def test_a_model_that_could_not_predict_is_refused(
    bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    files = contents(bundle)
    run = json.loads(files["tiny/run.json"])
    change(run)
    changed = listed({**files, "tiny/run.json": json.dumps(run).encode()})
    refused(write(tmp_path / "bad.zip", changed), words, tmp_path / "new" / "model")


def test_a_zip_is_used_in_place_by_two_threads(bundle: Path, hippocampus: Path) -> None:
    """One model from a zip that is not there any more, two threads: each gets what it would have got alone."""
    scans = sorted((hippocampus / "imagesTs").iterdir())[:4]
    with unpacked(bundle) as folder:
        model = load(folder, device="cpu", settings=FAST)
    assert not folder.exists()
    alone = [model(scan) for scan in scans]
    assert any(not np.array_equal(alone[0], other) for other in alone[1:])
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(model, scans * 3))
    for expected, found in zip(alone * 3, together, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_folder_is_used_as_it_is(tiny_model: Path) -> None:
    with unpacked(tiny_model) as folder:
        assert folder == tiny_model
