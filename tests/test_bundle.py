"""A model is packed into one zip: complete, described, without a trace of the machine; a zip with tricks is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import pytest
from bad_inputs import edit, setting
from samples import FAST, forget_plan

import nnunet_lite
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.inference.predictor import load
from nnunet_lite.models import bundle as bundles
from nnunet_lite.models.argument import unpacked
from nnunet_lite.models.bundle import MANIFEST, find_licence, pack, read_manifest, unpack
from nnunet_lite.models.folder import MODEL

WEIGHTS = f"tiny/fold_0/{MODEL}"
Files = dict[str, bytes]
Refuse = Callable[[Files | list[tuple[ZipInfo | str, bytes]] | bytes, str], None]


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "tiny.zip"
    pack(tiny_model, out, licence="CC-BY-4.0", note="ten hippocampi")
    return out


@pytest.fixture(scope="module")
def files(bundle: Path) -> Files:
    return contents(bundle)


@pytest.fixture
def refused(tmp_path: Path) -> Refuse:
    """A zip, of files or of bytes, is refused in one line, and nothing remains of it."""

    def check(content: Files | list[tuple[ZipInfo | str, bytes]] | bytes, words: str) -> None:
        file = tmp_path / "bad.zip"
        file.write_bytes(content) if isinstance(content, bytes) else write(file, content)
        (tmp_path / "new").mkdir(exist_ok=True)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=words) as error:
            unpack(file, tmp_path / "new" / "model")
        assert "\n" not in str(error.value) and str(file) in str(error.value)
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.fixture
def cascade(model_copy: Path) -> Path:
    """A second stage with its first one next to it: the trained weights twice, which is all that packing needs."""
    forget_plan(model_copy)
    first = model_copy.with_name("3d_lowres-tiny")
    shutil.copytree(model_copy, first)
    for folder, stage in ((model_copy, "3d_lowres"), (first, None)):
        plan, run = read_json(folder / "plans.json"), read_json(folder / "run.json")
        fullres = plan["configurations"].pop("3d_fullres")
        plan["configurations"] = {
            "3d_lowres": fullres, "3d_cascade_fullres": {**fullres, "previous_stage": "3d_lowres"}
        }  # fmt: skip
        run["configuration"] = "3d_lowres" if stage is None else "3d_cascade_fullres"
        write_json(folder / "plans.json", plan)
        write_json(folder / "run.json", run if stage is None else {**run, "previous": first.name})
    return model_copy


def contents(file: Path) -> Files:
    with ZipFile(file) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def listed(files: Files, **changes: Any) -> Files:
    """The files with a manifest that lists them correctly, and with some changes of the manifest."""
    sizes = {
        path: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        for path, content in files.items()
        if path != MANIFEST
    }
    return described(files, **{"files": sizes, **changes})


def described(files: Files, /, **changes: Any) -> Files:
    """The files with some changes of the manifest."""
    return {**files, MANIFEST: json.dumps({**json.loads(files[MANIFEST]), **changes}).encode()}


def write(file: Path, files: Files | list[tuple[ZipInfo | str, bytes]]) -> Path:
    with ZipFile(file, "w", ZIP_DEFLATED) as archive:
        for info, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(info, content)
    return file


# ------------------------------------------------------------------------------------------------ packed and unpacked


def test_an_unpacked_model_predicts_the_same(bundle: Path, tiny_model: Path, tmp_path: Path, scans: list[Path]) -> None:
    folder = unpack(bundle, tmp_path / "new" / "mine")
    expected = load(tiny_model, device="cpu", settings=FAST)(scans[0])
    np.testing.assert_array_equal(load(folder, device="cpu", settings=FAST)(scans[0]), expected)
    assert len(np.unique(expected)) > 1, "otherwise this shows nothing"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {MANIFEST, "plans.json", "dataset.json", "run.json", f"fold_0/{MODEL}", "fold_0/cases.json"}
    assert (folder / "run.json").stat().st_mode & 0o044, "others may read it"


def test_the_manifest_describes_the_model(bundle: Path, files: Files, model_copy: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    assert (manifest.licence, manifest.training_data) == ("CC-BY-4.0", "ten hippocampi")
    assert (manifest.dataset, manifest.models) == ("Task04_Hippocampus", ("tiny",))
    assert manifest.about["labels"] == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert 0 <= manifest.about["mean_dice"]["0"] <= 1
    assert json.loads(listed(files)[MANIFEST]) == json.loads(files[MANIFEST])
    pack(model_copy, tmp_path / "again.zip", licence="CC-BY-4.0", note="ten hippocampi")
    assert (tmp_path / "again.zip").read_bytes() == bundle.read_bytes(), "equal models make equal files"


def test_licence_and_note_stay_with_a_model(bundle: Path, tmp_path: Path) -> None:
    folder = unpack(bundle, tmp_path / "tiny")
    again = pack(folder, tmp_path / "again.zip", note="and a word more")
    assert (again.licence, again.training_data) == ("CC-BY-4.0", "and a word more")
    (tmp_path / "LICENCE").write_text("Do what you like.\n")
    assert pack(folder, tmp_path / "file.zip", licence=str(tmp_path / "LICENCE")).licence == "Do what you like.\n"
    (tmp_path / "LICENCE").write_text("© A. Müller", encoding="latin-1")
    with pytest.raises(UserError, match=r"LICENCE: is not UTF-8 text \(byte 0\)"):
        pack(folder, tmp_path / "latin.zip", licence=str(tmp_path / "LICENCE"))
    assert not (tmp_path / "latin.zip").exists()


def test_what_an_export_or_import_would_ignore_is_refused(bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--licence and --note are for a zip, and nnunet has no place for them"):
        nnunet_lite.export_model(tiny_model, output=tmp_path / "out", format="nnunet", licence="CC-BY-4.0")
    with pytest.raises(UserError, match="is a model of nnlite, which has one checkpoint"):
        nnunet_lite.import_model(bundle, checkpoint="best", workspace=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_name_of_the_machine_or_of_cases_is_packed(model_copy: Path, tmp_path: Path) -> None:
    first, cases = "/home/somebody/models/first", [{"image": "/home/somebody/hippocampus_001.nii.gz"}]
    edit(model_copy / "run.json", lambda run: run["settings"]["training"].update(init=first))
    edit(model_copy / "run.json", setting(changed=[{"when": "today", "changes": [f"training.init: null -> {first}"]}]))
    edit(model_copy / "dataset.json", setting(training=cases, description="hippocampi"))
    pack(model_copy, tmp_path / "out.zip")
    packed = contents(tmp_path / "out.zip")
    for word in ("somebody", str(model_copy.parent), str(Path(__file__).parents[1]), "hippocampus_0"):
        assert word.encode() not in b"\n".join(packed.values())
    assert json.loads(packed["tiny/run.json"])["settings"]["training"]["init"] == "first"
    assert json.loads(packed["tiny/dataset.json"])["description"] == "hippocampi"
    unpack(tmp_path / "out.zip", tmp_path / "new")


def test_the_first_stage_of_a_cascade_is_packed(cascade: Path, tmp_path: Path, refused: Refuse) -> None:
    assert pack(cascade, tmp_path / "out.zip").models == ("tiny", "3d_lowres-tiny")
    folder = unpack(tmp_path / "out.zip", tmp_path / "mine" / "second")
    assert (folder.with_name("3d_lowres-tiny") / "fold_0" / MODEL).is_file()
    with pytest.raises(UserError, match="3d_lowres-tiny: exists already"):
        unpack(tmp_path / "out.zip", folder.with_name("third"))
    with pytest.raises(UserError, match="first stage"):
        unpack(tmp_path / "out.zip", tmp_path / "other" / "3d_lowres-tiny")
    with unpacked(tmp_path / "out.zip") as copy:
        assert copy.with_name("3d_lowres-tiny").is_dir()
    assert not copy.exists()
    alone = {path: content for path, content in contents(tmp_path / "out.zip").items() if "lowres" not in path}
    refused(listed(alone, models=["tiny"]), "first stage")
    shutil.rmtree(cascade.with_name("3d_lowres-tiny"))
    with pytest.raises(UserError, match="3d_lowres-tiny: is no model folder"):
        pack(cascade, tmp_path / "none.zip")
    assert not (tmp_path / "none.zip").exists()


def test_an_existing_model_is_only_replaced_with_the_option(bundle: Path, tmp_path: Path) -> None:
    folder = nnunet_lite.import_model(bundle, workspace=tmp_path)
    assert folder == tmp_path / "Task04_Hippocampus" / "models" / "tiny"
    (folder / "mine.txt").write_text("notes")
    with pytest.raises(UserError, match="tiny: exists already"):
        unpack(bundle, folder)
    unpack(bundle, folder, replace=True)
    assert not (folder / "mine.txt").exists()
    assert (folder.with_name("old_tiny_1") / "mine.txt").is_file(), "set aside, not deleted"
    with pytest.raises(UserError, match=r"tiny\.zip: exists already"):
        pack(folder, bundle)


def test_code_and_untrained_models_are_not_packed(model_copy: Path, tmp_path: Path) -> None:
    edit(model_copy / "run.json", lambda run: run["settings"]["network"].update(factory="mine:network"))
    with pytest.raises(UserError, match="made by mine:network: code is not packed"):
        pack(model_copy, tmp_path / "out.zip")
    shutil.rmtree(model_copy / "fold_0")
    with pytest.raises(UserError, match="no trained fold"):
        pack(model_copy, tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def test_two_threads_predict_with_a_zip_in_place(bundle: Path, scans: list[Path], tiny_model: Path) -> None:
    model = load(bundle, device="cpu", settings=FAST)
    alone = [model(scan) for scan in scans]
    assert any(not np.array_equal(alone[0], other) for other in alone[1:])
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(model, scans * 3))
    for expected, found in zip(alone * 3, together, strict=True):
        np.testing.assert_array_equal(found, expected)
    with unpacked(tiny_model) as folder:
        assert folder == tiny_model


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "path",
    ["../evil.txt", "tiny/../../evil.txt", "/etc/evil.txt", "C:/evil.txt", "tiny\\..\\evil.txt", "tiny//evil.txt",
     "./tiny/evil.txt"],
)  # fmt: skip
def test_paths_out_of_the_folder_are_refused(files: Files, refused: Refuse, path: str) -> None:
    refused(listed({**files, path: b"evil"}), "no part of a model")
    for change in ({"models": [path]}, {"dataset": path}, {"models": [".hidden"]}, {"models": ["tiny", "tiny"]}):
        refused(described(files, **change), "no name|no part|lacks a model")


@pytest.mark.parametrize(
    ("path", "mode"),
    [("tiny/dataset.json", stat.S_IFLNK), ("tiny/device", stat.S_IFCHR), ("tiny/folder/", stat.S_IFDIR),
     ("tiny/setup.py", 0), ("elsewhere.txt", 0), ("tiny/plans.json", 0)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_only_listed_files_are_accepted(files: Files, refused: Refuse, path: str, mode: int) -> None:
    odd = ZipInfo(path)
    odd.external_attr = mode << 16
    others = [(name, content) for name, content in files.items() if name != path or "plans" in path]
    refused([*others, (odd, b"../../secret")], f"manifest.json lists: '{path}' differs")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFDIR])
def test_a_listed_file_is_a_plain_file(files: Files, refused: Refuse, kind: int) -> None:
    odd = ZipInfo("tiny/dataset.json")
    odd.external_attr = kind << 16
    others = [(name, content) for name, content in files.items() if name != odd.filename]
    refused([*others, (odd, files[odd.filename])], "'tiny/dataset.json', which is no plain file")


def test_changed_and_damaged_files_are_refused(bundle: Path, files: Files, refused: Refuse) -> None:
    weights = bytearray(files[WEIGHTS])
    weights[-1] ^= 1
    refused({**files, WEIGHTS: bytes(weights)}, "checksum")
    refused({**files, WEIGHTS: bytes(weights[:-4])}, f"'{WEIGHTS}' differs")
    refused({path: content for path, content in files.items() if path != "tiny/plans.json"}, "'tiny/plans.json' differ")
    whole = bytearray(bundle.read_bytes())
    encrypted = whole.copy()
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1  # the first entry's flags in the directory
    refused(bytes(encrypted), "encrypted")
    flipped = whole.copy()
    flipped[whole.index(b"tiny/fold_0") + 200] ^= 255
    refused(bytes(flipped), "damaged")  # the zip's own checksum
    for broken in (whole[:-40], whole[: len(whole) // 2], b"", b"this is no zip"):
        refused(bytes(broken), "no zip file|damaged")


def test_large_models_are_refused(files: Files, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(listed({**files, WEIGHTS: bytes(64 * 2**20)}), "as no model does")  # zeros shrink to a thousandth
    monkeypatch.setattr(bundles, "_JSON_LIMIT", 50_000)
    refused(listed({**files, "tiny/dataset.json": b" " * 50_001}), "tiny/dataset.json has 50001 bytes")
    refused(described(files, files={WEIGHTS: {"sha256": "0" * 64, "size": 10**15}}), "differs")
    usage = shutil._ntuple_diskusage(1, 1, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(bundles.shutil, "disk_usage", lambda _: usage)
    refused(files, "are free")
    monkeypatch.setattr(bundles, "LIMIT", 10_000)
    refused(files, "are allowed")


def test_more_bytes_than_declared_are_never_written(files: Files, refused: Refuse, tmp_path: Path) -> None:
    """A header declares a short file and long data follow; manifest and directory agree with the header."""
    run = files["tiny/run.json"]
    longer = listed({**files, "tiny/run.json": run + b" " * 10_000})
    whole = write(tmp_path / "bad.zip", {**longer, MANIFEST: listed({**files, "tiny/run.json": run})[MANIFEST]})
    long, declared = ((len(run) + more).to_bytes(4, "little") for more in (10_000, 0))
    assert whole.read_bytes().count(long) == 2  # local header and central directory
    refused(whole.read_bytes().replace(long, declared), "damaged|checksum")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "nnlite-bundle-2"}, "of a newer nnlite"),
        ({"format": "other-1"}, "unknown format"),
        ({"format": None}, "unknown format"),
        ({"models": []}, "manifest.json: is not as nnlite writes it"),
        ({"files": {"tiny/plans.json": {"sha256": "0", "size": 1}}}, "manifest.json: is not as nnlite writes it"),
        ({"files": {WEIGHTS: {"sha256": "0" * 64, "size": -1}}}, "manifest.json: is not as nnlite writes it"),
    ],
)
def test_other_manifests_are_refused(files: Files, refused: Refuse, change: dict[str, Any], words: str) -> None:
    refused(described(files, **change), words)


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{}", b"[" * 200_000, b"\xff\xfe", b'{"format": 1e999}'])
def test_broken_manifests_are_refused(files: Files, refused: Refuse, manifest: bytes) -> None:
    refused({**files, MANIFEST: manifest}, "manifest.json: is not as nnlite writes it|unknown format")
    refused({"readme.txt": b"hello"}, "no manifest.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: run["settings"]["network"].update(factory="os:system"), "names code, os:system"),
        (lambda run: run.update(format="nnlite-model-2"), "newer nnlite"),
        (lambda run: run.pop("settings"), "is not as nnlite writes it"),
        (lambda run: run.update(configuration="4d"), "no configuration '4d'"),
        (lambda run: run["settings"]["training"].update(freeze="everything"), "is not as nnlite writes it"),
    ],
)
def test_a_model_that_cannot_predict_is_refused(
    files: Files, refused: Refuse, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    run = json.loads(files["tiny/run.json"])
    change(run)
    refused(listed({**files, "tiny/run.json": json.dumps(run).encode()}), words)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"dataset.json": '{"license": "CC-BY-SA 4.0"}', "LICENSE": "MIT"}, "CC-BY-SA 4.0"),
        ({"manifest.json": '{"licence": null}', "LICENCE.txt": "\n  MIT License\n\nCopyright " + "x" * 99},
         "MIT License Copyright [...]"),
        ({"dataset.json": "[]", "README.md": "---\ntags: x\nlicense: cc-by-4.0\n---\n# A model"}, "cc-by-4.0"),
        ({"README.md": "# A model\nlicense: cc-by-4.0"}, None),
        ({"README.md": "---\ntags: x\n---\nlicense: cc-by-4.0"}, None),
        ({"LICENSE": ""}, None),
    ],
)  # fmt: skip
def test_the_licence_of_a_model(tmp_path: Path, files: dict[str, str], expected: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "LICENSES").mkdir()
    assert find_licence(tmp_path, {}) == expected
    assert find_licence(tmp_path, {"license": "Apache-2.0"}) == "Apache-2.0"
