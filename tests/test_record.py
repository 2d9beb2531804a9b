"""A folder of predictions says what made it, and how large the labels are, whoever writes there and however often."""

from __future__ import annotations

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import FAST

import nnunet_lite
from nnunet_lite.data.cases import Case
from nnunet_lite.data.images import read_image, read_label
from nnunet_lite.errors import UserError
from nnunet_lite.files import locked
from nnunet_lite.inference.predictor import Predictor, load
from nnunet_lite.inference.record import CaseResult, PredictionRecord, describe_predictor


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "predictions.json").read_text())


@pytest.fixture
def predict(tiny_model: Path) -> Any:
    return partial(nnunet_lite.predict, model=tiny_model, device="cpu", settings=FAST)


def test_a_record_is_extended(predict: Any, tiny_model: Path, scans: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(scans[:1], out)
    record = record_of(out)
    (run,) = record["runs"]
    (model,) = run["models"]
    assert record["format"] == "nnlite-predictions-1" and run["device"] == "cpu" and run["precision"] == "fp32"
    assert model["name"] == "tiny" and model["path"] == str(tiny_model) and model["folds"] == ["0"]
    assert model["hash"] == load(tiny_model, device="cpu").fingerprint and len(model["hash"]) == 16
    assert run["settings"]["step_size"] == 1.0 and run["settings"]["mirroring"] is False
    assert run["versions"].keys() == {"nnunet_lite", "python", "torch", "numpy"} and run["checkpoint"] == "final"
    entry = record["predictions"].pop(scans[0].name)
    assert entry.pop("seconds") > 0 and not record["predictions"]
    assert entry == {"run": 0, "case": scans[0].name[:-7], "images": [str(scans[0])], "result": "written"}

    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    predict([*scans[:2], broken], out, skip_existing=True, settings={**FAST, "inference.step_size": 0.9})
    record = record_of(out)
    assert [run["settings"]["step_size"] for run in record["runs"]] == [1.0, 0.9]
    assert {name: (one["run"], one["result"][:7]) for name, one in record["predictions"].items()} == {
        scans[0].name: (0, "written"), scans[1].name: (1, "written"), broken.name: (1, "failed:")
    }  # fmt: skip
    before = (out / "predictions.json").read_bytes()
    predict(scans[:2], out, skip_existing=True)
    assert (out / "predictions.json").read_bytes() == before, "nothing was predicted"
    predict(scans[0], out / "one.seg.nrrd")
    assert record_of(out)["predictions"]["one.seg.nrrd"]["case"] == scans[0].name[:-7]
    assert not (out / ".lock").exists()


def test_the_label_map_of_another_image_of_the_same_name_stays(predict: Any, scans: list[Path], tmp_path: Path) -> None:
    """As of the folders P1/CT and P2/CT of two patients; an image that was moved is the same one."""
    first, second, out = tmp_path / "P1" / "CT.nii.gz", tmp_path / "P2" / "CT.nii.gz", tmp_path / "out"
    for file, scan in zip((first, second), scans, strict=False):
        file.parent.mkdir()
        shutil.copy(scan, file)
    predict(first, out)
    before = (out / first.name).read_bytes()
    for keep in (False, True):
        with pytest.raises(UserError, match=rf"is the label map of {first}, and that of {second} has the same name"):
            predict(second, out, skip_existing=keep)
    assert (out / first.name).read_bytes() == before
    (tmp_path / "link").symlink_to(first.parent)
    predict(tmp_path / "link" / first.name, out, skip_existing=True)
    first.rename(tmp_path / first.name)
    assert predict(tmp_path / first.name, out, skip_existing=True).files == (out / first.name,)


def test_a_file_among_those_of_others_begins_no_record(predict: Any, scans: list[Path], tmp_path: Path) -> None:
    (tmp_path / "predictions.json").write_text("mine")
    (tmp_path / "statistics.json").write_text("mine")
    predict(scans[0], tmp_path / "seg.nii.gz")
    (tmp_path / "new").mkdir()
    with locked(tmp_path / "new", "working", leave=False):  # as `nnlite evaluate -m` does
        predict(scans[0], tmp_path / "new" / "seg.nii.gz")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["seg.nii.gz"]
    assert {(tmp_path / f"{name}.json").read_text() for name in ("predictions", "statistics")} == {"mine"}


def test_a_record_of_others_is_found_before_the_model_is_loaded(
    predict: Any, scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnunet_lite.commands.predict.load", None)
    (tmp_path / "statistics.json").write_text("mine")
    with pytest.raises(UserError, match=r"statistics\.json: invalid JSON"):
        predict(scans[:1], tmp_path, statistics=True)


def test_statistics_of_the_label_maps(predict: Any, scans: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(scans[:1], out)
    written = (out / scans[0].name).stat().st_mtime_ns
    changed = {**FAST, "inference.step_size": 0.9}
    predict(scans[:2], out, skip_existing=True, statistics=True, settings=changed)
    found = json.loads((out / "statistics.json").read_text())
    assert sorted(found) == [scan.name[:-7] for scan in scans[:2]], "also of the case that was predicted before"
    with (out / "statistics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["label"]) for row in rows] == [(case, label) for case in found for label in found[case]]
    for scan in scans[:2]:
        image, label_map = read_image(scan), read_label(out / scan.name)[0]
        for value, label in enumerate(("Anterior", "Posterior"), 1):
            row, mask = found[scan.name[:-7]][label], label_map == value
            assert row["voxels"] == mask.sum()
            assert row["volume_ml"] == pytest.approx(mask.sum() * np.prod(image.geometry.spacing) / 1000, rel=1e-5)
            assert row["mean_MRI"] == (pytest.approx(image.array[0][mask].mean(), rel=1e-5) if mask.any() else None)
    assert (out / scans[0].name).stat().st_mtime_ns == written, "it is kept"
    assert [entry["run"] for entry in record_of(out)["predictions"].values()] == [0, 1]
    saved = (out / "statistics.json").stat().st_mtime_ns
    predict(scans[:2], out, skip_existing=True, statistics=True)
    assert (out / "statistics.json").stat().st_mtime_ns == saved


def test_statistics_are_those_of_the_label_map(
    predict: Any, model: Predictor, scans: list[Path], tmp_path: Path
) -> None:
    predict(scans[:2], tmp_path, statistics=True)
    first, other = (scan.name[:-7] for scan in scans[:2])
    complete = (tmp_path / "statistics.json").read_bytes()
    predict(scans[:1], tmp_path)
    assert list(json.loads((tmp_path / "statistics.json").read_text())) == [other]
    assert first not in (tmp_path / "statistics.csv").read_text()
    predict(scans[:1], tmp_path, statistics=True, skip_existing=True)
    assert json.loads((tmp_path / "statistics.json").read_text()) == json.loads(complete)
    case = Case(first, (scans[0],), None)
    PredictionRecord(tmp_path).add(CaseResult(tmp_path / scans[0].name, case, "failed: it"), {})
    assert list(json.loads((tmp_path / "statistics.json").read_text())) == [other]


def test_files_that_take_long_are_not_written_for_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_lite.inference.record._LONG", 0.0)
    monkeypatch.setattr("nnunet_lite.inference.record._PAUSE", 1e6)
    results = [CaseResult(tmp_path / f"{n}.nii.gz", Case(str(n), (), None), "written") for n in range(3)]
    with pytest.raises(KeyboardInterrupt), PredictionRecord(tmp_path) as record:
        for result in results:
            record.add(result, {})
        assert len(record_of(tmp_path)["predictions"]) == 1
        raise KeyboardInterrupt
    assert len(record_of(tmp_path)["predictions"]) == 3, "the others at the end, whatever ends the process"


def test_calls_that_share_a_folder_lose_no_entry(model: Predictor, tmp_path: Path) -> None:
    def call(part: int) -> None:
        with PredictionRecord(tmp_path) as record:
            for number in range(part, 40, 4):
                case = Case(f"case{number}", (tmp_path / "x.nii.gz",), None)
                statistics = {"organ": {"voxels": number}}
                result = CaseResult(tmp_path / f"case{number}.nii.gz", case, "written", 0.1, statistics)
                record.add(result, {"part": part, **describe_predictor(model)})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert not (tmp_path / ".lock").exists()
    assert len(record_of(tmp_path)["predictions"]) == len(json.loads((tmp_path / "statistics.json").read_text())) == 40
    assert len(record_of(tmp_path)["runs"]) == 4


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("predictions.json", "{", "invalid JSON"),
        ("predictions.json", "[1]", "is not as nnlite writes it"),
        ("predictions.json", '{"format": "nnlite-predictions-9"}', "is of a newer nnlite"),
        ("statistics.json", '{"liver": {"volume": 3.0}}', r"is not as nnlite writes it.*Move it elsewhere"),
        ("statistics.csv", "case,volume", "is not of nnlite.*Move it elsewhere"),
        ("quality.csv", "scan,artefacts", "is not of nnlite.*Move it elsewhere"),
    ],
)
def test_files_of_others_are_not_overwritten(
    predict: Any, scans: list[Path], tmp_path: Path, counts: Any, name: str, content: str, says: str
) -> None:
    counts("bad inputs refused in one line")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        predict(scans[:1], tmp_path, statistics=True)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == content


def test_the_hash_is_that_of_plan_and_weights(tiny_model: Path, model_copy: Path, tmp_path: Path) -> None:
    def hash_now(path: Path) -> str:
        return load(path, device="cpu").fingerprint

    known = hash_now(tiny_model)
    nnunet_lite.export_model([model_copy, tmp_path / "m.zip"])
    assert hash_now(model_copy) == hash_now(tmp_path / "m.zip") == known, "wherever it is"
    plans = json.loads((model_copy / "plans.json").read_text())
    (model_copy / "plans.json").write_text(json.dumps({**plans, "dataset": "other"}))
    other_plan = hash_now(model_copy)
    file = model_copy / "fold_0" / "model.safetensors"
    with safe_open(file, "pt") as content:
        about = {key: text for key, text in content.metadata().items() if key != "checksum"}
    save_file({name: value.neg() for name, value in load_file(file).items()}, file, about)
    assert len({known, other_plan, hash_now(model_copy)}) == 3
