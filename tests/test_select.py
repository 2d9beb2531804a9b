"""The best of what is trained is found, and predict does what was found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import FAST, Command, Counts, forget_plan, rewrite_nifti

import nnunet_lite
from nnunet_lite.data.dataset import map_labels, stored_dataset
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.comparison import choose_team
from nnunet_lite.evaluation.members import Member
from nnunet_lite.evaluation.postprocessing import Gain, Rule, apply_rules
from nnunet_lite.evaluation.selection import Candidate, Selection, read_selection
from nnunet_lite.evaluation.statistics import Margin
from nnunet_lite.files import read_json, write_json
from nnunet_lite.models.bundle import read_manifest
from nnunet_lite.models.folder import held_out_dice
from nnunet_lite.reporting.material import read_material
from nnunet_lite.workspace import Paths

LARGEST = Rule(largest_component=True)
LABELS = Labels(names={"background": 0, "Anterior": 1, "Posterior": 2})


@pytest.fixture
def paths(tiny_workspace: Path, tiny_model: Path, tmp_path: Path) -> Paths:
    """A workspace with the tiny model alone, which predicts fast."""
    workspace = tmp_path / "workspace"
    ours = Paths(workspace / "Task04_Hippocampus")
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models", "preprocessed"))
    shutil.copytree(tiny_model, ours.models / "tiny", ignore=shutil.ignore_patterns("checkpoint*", "*.png"))
    run = read_json(ours.models / "tiny" / "run.json")
    run["settings"]["inference"] |= {key.partition(".")[2]: value for key, value in FAST.items()}
    write_json(ours.models / "tiny" / "run.json", run)
    return ours


@pytest.fixture
def scan(hippocampus: Path) -> Path:
    return sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]


def select(paths: Paths, *models: str, **options: Any) -> Selection:
    options = {"quality": False, **options}  # test_calibration.py has it
    return nnunet_lite.select(models or None, workspace=paths.root.parent, device="cpu", **options)


def add_model(
    paths: Paths, name: str, change: Callable[[np.ndarray, int], np.ndarray], folds: int = 5, source: Path | None = None
) -> Path:
    """Add a model of some folds whose predictions are the references, changed: change(reference, number)."""
    source, folder = source or paths.models / "tiny", paths.models / name
    cases = {case.id: case for case in stored_dataset(paths.dataset).cases}
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("fold_*"))
    for fold, split in enumerate(read_json(paths.splits)[:folds]):
        (folder / f"fold_{fold}").mkdir()
        shutil.copy(source / "fold_0" / "model.safetensors", folder / f"fold_{fold}")
        for case_id in split["val"]:
            array, geometry, _ = read_label(cases[case_id].label)
            out = folder / f"fold_{fold}" / "validation" / cases[case_id].label.name
            write_label(out, change(array, sorted(cases).index(case_id)), geometry)
    return folder


def shifted(array: np.ndarray, number: int) -> np.ndarray:
    return np.roll(array, 1 + number % 2, axis=2)


def speckled(array: np.ndarray, number: int) -> np.ndarray:
    """Right, but for a false piece of the first label far away."""
    out = array.copy()
    free = np.argwhere(array == 0)
    z, y, x = free[np.abs(free - np.argwhere(array == 1).mean(axis=0)).sum(axis=1).argmax()]
    out[max(0, z - 2) : z + 2, max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = 1
    return np.where(array > 0, array, out)


def dice(a: np.ndarray, b: np.ndarray, value: int) -> float:
    return float(2 * ((a == value) & (b == value)).sum() / ((a == value).sum() + (b == value).sum()))


# -------------------------------------------------------------------------------------------------- single models


def test_the_better_one_is_selected_and_its_labels_are_cleaned(paths: Paths) -> None:
    shutil.rmtree(paths.models / "tiny" / "fold_0" / "validation")
    for name, change in (("a-good", speckled), ("b-bad", shifted)):
        add_model(paths, name, change)
    found = select(paths, "a-good", "b-bad", ensembles=False, workers=2)
    assert found.models == ("a-good",) and found.folds == tuple("01234")
    good, bad = found.candidates
    assert (good.name, bad.name, good.n_cases) == ("a-good", "b-bad", 10)

    cases = sorted(stored_dataset(paths.dataset).cases, key=lambda case: case.id)
    truth = [map_labels(read_label(case.label)[0], None) for case in cases if case.label]
    each = {}
    for name, change in (("a-good", speckled), ("b-bad", shifted)):
        each[name] = np.array([[dice(change(t, i), t, v) for v in (1, 2)] for i, t in enumerate(truth)])
    assert good.dice == pytest.approx(each["a-good"].mean())
    assert list(good.by_label.values()) == pytest.approx(each["a-good"].mean(axis=0).tolist())
    difference = each["a-good"].mean(axis=1) - each["b-bad"].mean(axis=1)
    assert bad.margin.mean == pytest.approx(difference.mean()) and bad.margin.low is not None
    assert difference.min() < bad.margin.low < difference.mean()
    assert good.margin == Margin(0, 0, 0)

    assert list(found.postprocessing) == ["Anterior"], "the other label has one component"
    assert found.notes == ()
    splits = read_json(paths.splits)
    others = {case_id for fold in (0, 2, 4) for case_id in splits[fold]["val"]}  # two of five folds chose the rule
    kept = [i for i, case in enumerate(cases) if case.id in others]
    assert found.postprocessing_gain["Anterior"].model_dump() == pytest.approx(
        {"before": each["a-good"][kept, 0].mean(), "after": 1.0, "n": 6}
    )
    line = f"postprocessing of Anterior: {found.postprocessing['Anterior']}, Dice "
    assert line in found.to_text() and found.to_text().endswith("-> 1.0000 on 6 cases that did not choose it")
    clean = apply_rules(speckled(truth[0], 0), (1.0, 1.0, 1.0), LABELS, found.postprocessing)
    assert np.array_equal(clean, truth[0])

    stored = read_json(paths.inference)
    assert stored["format"] == "nnlite-inference-1" and stored["models"] == ["a-good"]
    assert set(stored["postprocessing"]["Anterior"]) == {"largest_component", "min_size_mm3", "unit"}
    assert stored["candidates"][1]["margin"]["mean"] == bad.margin.mean
    assert read_selection(paths) == found
    again = select(paths, "a-good", "b-bad", ensembles=False, postprocess=False)
    assert again.postprocessing == {} and again.candidates == found.candidates


@pytest.mark.parametrize(("pages", "unit"), [(1, "px"), (6, "voxels")])
def test_sizes_without_a_spacing_are_pixels(
    pages: int, unit: str, tiny_model: Path, tmp_path: Path, command: Command
) -> None:
    """Pictures, and TIFF stacks without a spacing: neither select nor the report nor the plan speaks of mm."""
    root, ending = tmp_path / "cells", ".png" if pages == 1 else ".tif"
    rng = np.random.default_rng(0)
    spacing = (999.0 if pages == 1 else 1.0, 1.0, 1.0)
    place = Geometry((pages, 40, 48), spacing, dimensions=2 if pages == 1 else 3, calibrated=False)
    for i in range(12):
        label = np.zeros(place.shape, np.uint8)
        label[:, 4:16, 4 : 16 + i] = 1
        image = (60 * label + rng.integers(0, 60, label.shape)).astype(np.uint8)
        write_label(root / "images" / f"{i:02}{ending}", image, place)
        write_label(root / "labels" / f"{i:02}{ending}", label, place)
    nnunet_lite.plan(root, workspace=tmp_path / "ws", workers=0, folds=5)
    ours = Paths(tmp_path / "ws" / "cells")

    def with_speck(array: np.ndarray, number: int) -> np.ndarray:
        array = array.copy()
        array[0, 30:32, 40:46] = 1
        return array

    model = add_model(ours, "a", with_speck, source=tiny_model)
    shutil.copy(ours.plans, model / "plans.json")
    write_json(model / "run.json", read_json(model / "run.json") | {"configuration": "2d"})
    forget_plan(model)
    found = select(ours)
    words = f"no component below {14 * pages if pages == 1 else 86} {unit}"
    assert [str(rule) for rule in found.postprocessing.values()] == [words]
    assert words in found.to_text() and "mm" not in found.to_text()
    summary = read_json(model / "fold_0" / "validation" / "summary.json")
    assert summary["length_unit"] == "px" and summary["metric_per_case"][0]["metrics"]["1"]["reference_ml"] is None
    nnunet_lite.report(tmp_path / "page.html", workspace=tmp_path / "ws")
    page = (tmp_path / "page.html").read_text()
    assert words in page and " mm3" not in page
    assert "(ml)</th>" not in page and " ml in every case" not in page
    code, out, err = command("info", "-w", tmp_path / "ws", cwd=tmp_path)
    assert code == 0 and words in out, err
    if pages == 1:
        assert "spacing (px)" in out and "spacing   1x1 px" in out


def test_models_are_compared_on_the_folds_that_they_share(paths: Paths, command: Command) -> None:
    for name, folds in (("five", 5), ("two", 2)):
        add_model(paths, name, shifted, folds)
    (paths.models / "old_one").mkdir()
    whole = shutil.copytree(paths.models / "tiny", paths.models / "whole")
    (whole / "fold_0").rename(whole / "fold_all")
    plan = read_json(shutil.copytree(paths.models / "tiny", paths.models / "strange") / "plans.json")
    plan["labels"]["names"] = {"background": 0, "left": 1, "right": 3}
    write_json(paths.models / "strange" / "plans.json", plan)
    code, out, err = command(
        "select", "--no-ensembles", "--no-quality", "--json", "-w", paths.root.parent, cwd=paths.root
    )
    assert code == 0, err
    found = json.loads(out)
    assert {tuple(one["models"]) for one in found["candidates"]} == {("five",), ("two",), ("tiny",)}
    held_out = len(read_json(paths.splits)[0]["val"])
    assert {one["n_cases"] for one in found["candidates"]} == {held_out}
    notes = " ".join(found["notes"])
    assert "compared on fold 0, which all models have; five has 0, 1, 2, 3, 4; two has 0, 1" in notes
    assert "whole is left out: it was trained on every case" in notes
    assert "strange is left out: it was made for other labels" in notes
    assert found["models"] == ["five"] and found["folds"] == list("01234"), "of equals the first, with all its folds"
    code, out, err = command("select", "-c", "two", "-w", paths.root.parent, cwd=paths.root)
    assert code == 0 and json.loads(paths.inference.read_text())["candidates"][0]["n_cases"] == 2 * held_out, err
    head, row, *rest = out.splitlines()
    assert head.split()[:3] == ["candidate", "n", "Dice"] and row.split()[0] == "two" and "selected" in row
    why = "note: no postprocessing: 4 cases held out, 10 are needed to choose a rule and to confirm it"
    assert rest[-2:] == ["postprocessing: none", why]


def test_a_case_that_two_folds_hold_out_is_scored_as_in_the_report(paths: Paths) -> None:
    splits = read_json(paths.splits)
    case_id = splits[0]["val"][0]
    splits[1]["val"].append(splits[1]["train"].pop(splits[1]["train"].index(case_id)))
    write_json(paths.splits, splits)
    model = add_model(paths, "twice", shifted)
    reference, geometry, _ = read_label(next(c for c in stored_dataset(paths.dataset).cases if c.id == case_id).label)
    write_label(model / "fold_1" / "validation" / f"{case_id}.nii.gz", reference, geometry)
    found = select(paths, "twice", postprocess=False).candidates[0]
    assert found.dice == pytest.approx(held_out_dice(model, "01234")) and found.n_cases == 10
    (shown,) = (one for one in read_material(paths).models if one.name == "twice")
    assert found.dice == shown.dice.mean and shown.fold_of[case_id] == "0"


def test_what_cannot_be_compared_is_reported(paths: Paths) -> None:
    with pytest.raises(UserError, match=r"no model of Task04_Hippocampus is 3d_lowres\. Run `nnlite train .* -w /.*`"):
        select(paths, "3d_lowres")
    other = shutil.copytree(paths.models / "tiny", paths.models / "other")
    (other / "fold_0" / "cases.json").unlink()
    (other / "fold_0").rename(other / "fold_1")
    with pytest.raises(UserError, match=r"share no fold to be compared on \(other: 1; tiny: 0\)"):
        select(paths)
    write_json(other / "run.json", read_json(other / "run.json") | {"format": "nnlite-model-9"})
    found = select(paths, postprocess=False)
    assert found.models == ("tiny",) and "other is left out: " in found.notes[0] and "newer nnlite" in found.notes[0]
    with pytest.raises(UserError, match=r"no fold of .* is trained \(other is left out: .*newer nnlite"):
        select(paths, "other")
    shutil.rmtree(other)
    splits = read_json(paths.splits)
    splits[0], splits[1] = splits[1], splits[0]
    write_json(paths.splits, splits)
    with pytest.raises(UserError, match=r"tiny is left out: fold 0 was trained on other cases than splits\.json"):
        select(paths)
    cases = paths.models / "tiny" / "fold_0" / "cases.json"
    cases.write_text("[]")
    with pytest.raises(UserError, match=r"tiny is left out: fold 0 was trained on other cases than splits\.json"):
        select(paths)
    cases.unlink()
    write_json(paths.splits, [splits[0] | {"val": []}])
    with pytest.raises(UserError, match=r"splits\.json: the trained folds \(0\) hold out no case"):
        select(paths)
    shutil.rmtree(paths.models)
    with pytest.raises(UserError, match=r"no fold of Task04_Hippocampus is trained\. Run `nnlite train"):
        select(paths)


def test_damaged_models_stop_no_other(paths: Paths, scan: Path, tmp_path: Path, capfd: Any) -> None:
    """Neither where they are compared, nor where one is chosen without a selection."""
    for name in ("flipped_bit", "no_run", "no_weights", "no_scores"):
        shutil.copytree(paths.models / "tiny", paths.models / name)
    damaged = {"no_run": "run.json", "no_weights": "fold_0/model.safetensors"}
    for name, file in (damaged | {"no_scores": "fold_0/validation/summary.json"}).items():
        (paths.models / name / file).write_text("{")
    damaged = {"flipped_bit": "fold_0/model.safetensors", **damaged}
    flipped = paths.models / "flipped_bit" / "fold_0" / "model.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))
    shutil.rmtree(flipped.parent / "validation")  # it would have to predict
    nnunet_lite.predict(scan, tmp_path, workspace=paths.root.parent, device="cpu", configuration="tiny")
    err = capfd.readouterr().err
    assert "model no_run is left out: " in err and "model no_scores is left out: " in err
    found = select(paths, ensembles=False, postprocess=False)
    assert {one.name for one in found.candidates} == {"tiny", "no_scores"}  # those of the latter are made again
    for note, (name, file) in zip(found.notes, damaged.items(), strict=True):
        assert note.startswith(f"{name} is left out: {paths.models / name / file}: ")


def test_what_is_missing_is_predicted_or_scored(paths: Paths) -> None:
    out = paths.models / "tiny" / "fold_0" / "validation"
    first, second = sorted(out.glob("*.nii.gz"))
    before = first.stat().st_mtime_ns
    expected = select(paths).candidates[0]
    (out / "summary.json").unlink()
    scored = select(paths)
    assert scored.candidates[0] == expected and (out / "summary.json").is_file()
    second.unlink()
    select(paths)
    name = second.name.removesuffix(".nii.gz")
    scan = next(c for c in stored_dataset(paths.dataset).cases if c.id == name).images[0]
    by_model = nnunet_lite.load(paths.models / "tiny", [0], "cpu")(scan)
    assert np.array_equal(read_label(second)[0], by_model) and first.stat().st_mtime_ns == before


def test_held_out_cases_that_changed_are_scored_again(paths: Paths, tmp_path: Path, capfd: Any) -> None:
    """A new label map is compared with what was predicted; a new image is predicted again."""
    raw = shutil.copytree(stored_dataset(paths.dataset).root, tmp_path / "Task04_Hippocampus")
    plan = partial(nnunet_lite.plan, raw, workspace=paths.root.parent, workers=0)
    out = add_model(paths, "right", lambda reference, _: reference, folds=1) / "fold_0" / "validation"
    assert select(paths, "right").candidates[0].dice == 1
    plan()
    assert (out / "summary.json").is_file() and "their scores are deleted" not in capfd.readouterr().err
    first, second = sorted(out.glob("*.nii.gz"))
    rewrite_nifti(raw / "labelsTr" / first.name, lambda a: np.where(a > 0, 3 - a, 0).astype(a.dtype))
    plan()
    assert "changed since models were scored on them: their scores are deleted" in capfd.readouterr().err
    assert first.is_file() and not (out / "summary.json").is_file()
    assert select(paths, "right").candidates[0].dice == 0.5
    rewrite_nifti(raw / "imagesTr" / second.name, lambda a: a[::-1])
    plan()
    assert first.is_file() and not second.is_file()


# --------------------------------------------------------------------------------------------------------- ensembles


def test_pairs_are_predicted_once(paths: Paths) -> None:
    other = shutil.copytree(paths.models / "tiny", paths.models / "other")
    turn_round(other)
    found = select(paths)
    assert {one.models for one in found.candidates} == {("tiny",), ("other",), ("other", "tiny")}
    out = paths.ensembles / "other+tiny" / "fold_0" / "validation"
    case_id = read_json(paths.splits)[0]["val"][0]
    scan = next(c for c in stored_dataset(paths.dataset).cases if c.id == case_id).images[0]
    both = nnunet_lite.load([other, paths.models / "tiny"], ["0"], "cpu")
    assert np.array_equal(read_label(out / f"{case_id}.nii.gz")[0], both(scan))
    pair = next(one for one in found.candidates if len(one.models) == 2)
    assert pair.dice == read_json(out / "summary.json")["foreground_mean"]["Dice"]

    files = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert len(files) == len(read_json(paths.splits)[0]["val"])
    assert select(paths).candidates == found.candidates
    assert {path: path.stat().st_mtime_ns for path in files} == files
    next(iter(files)).unlink()  # as a run that was killed leaves it
    select(paths)
    assert sum(path.stat().st_mtime_ns == files[path] for path in out.glob("*.nii.gz")) == len(files) - 1
    turn_round(other)
    select(paths)
    assert all(path.stat().st_mtime_ns != made_at for path, made_at in files.items()), "other weights predict again"


def turn_round(folder: Path) -> None:
    """Change the weights of fold 0: its kernels upside down."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = folder / "fold_0" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        about = {key: value for key, value in opened.metadata().items() if key != "checksum"}
    save_file({k: v.flip(-1).contiguous() if v.ndim > 2 else v for k, v in load_file(file).items()}, file, about)


def team(*configurations: str) -> tuple[Member, ...]:
    folder = Path("models")
    return tuple(Member(folder / name, name, None, None, ("0",)) for name in configurations)  # type: ignore[arg-type]


def test_a_pair_wins_only_where_it_is_really_better() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.9, (40, 2))
    flat, deep, both = team("2d"), team("3d_fullres"), team("2d", "3d_fullres")
    noise = rng.normal(0, 0.02, (40, 2))
    assert choose_team({flat: base, deep: base + 0.01, both: base + 0.012 + noise}) == deep
    assert choose_team({flat: base, deep: base + 0.01, both: base + 0.03 + noise}) == both
    assert choose_team({deep: base, flat: base, both: base}) == flat, "of equals the simplest"
    assert choose_team({flat: base[:1], both: base[:1] + 0.05}) == flat, "one case proves nothing"
    lowres, cascade = team("3d_lowres"), team("3d_cascade_fullres")
    assert choose_team({cascade: base, deep: base, lowres: base}) == lowres
    gap = np.where(rng.random((40, 2)) < 0.1, np.nan, base)
    assert choose_team({flat: gap, deep: gap - 0.01}) == flat


# ----------------------------------------------------------------------------------------------------------- predict


def selected(paths: Paths, **changes: Any) -> Selection:
    """A selection of the tiny model with rules that remove most, written by hand but for its weights."""
    found = select(paths, "tiny", postprocess=False)
    rules = {"Anterior": LARGEST, "Posterior": Rule(min_size_mm3=1e6)}
    value = found.to_json() | {"postprocessing": {k: rule.model_dump() for k, rule in rules.items()}} | changes
    value["postprocessing_gain"] = {k: {"before": 0.5, "after": 0.6, "n": 20} for k in rules}
    write_json(paths.inference, value)
    selection = read_selection(paths)
    assert selection is not None
    return selection


def test_predict_obeys(paths: Paths, scan: Path, tmp_path: Path, command: Command) -> None:
    chosen = selected(paths)
    raw = nnunet_lite.load(paths.models / "tiny", [0], "cpu")(scan)
    clean = apply_rules(raw, (1.0, 1.0, 1.0), LABELS, chosen.postprocessing)
    assert (raw == 2).any() and not (clean == 2).any()
    common = ["predict", "-i", scan, "--device", "cpu", "-w", paths.root.parent, "--json"]

    def predicted(*options: object) -> tuple[np.ndarray, str, dict[str, Any]]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, out, err = command(*common, "-o", tmp_path / "out", *options, cwd=tmp_path)
        assert code == 0, err
        return read_label(tmp_path / "out" / scan.name)[0], err, json.loads(out)

    line = "tiny, fold 0; postprocessing: Anterior: the largest component; Posterior: no component below 1e+06 mm3\n"
    for options in ([], ["-c", "3d_fullres"], ["-m", paths.models / "tiny"], ["-f", "0"]):
        array, err, result = predicted(*options)
        assert np.array_equal(array, clean), options
        assert f"{paths.inference}: {line}" in err and "warning" not in err
        assert result["postprocessing"]["Anterior"] == "the largest component" and result["folds"] == ["0"]
    array, err, result = predicted("--no-postprocess")
    assert np.array_equal(array, raw) and "tiny, fold 0; postprocessing: none\n" in err
    assert result["postprocessing"] == {}
    assert result["labels"] == {"background": 0, "Anterior": 1, "Posterior": 2}

    other = shutil.copytree(paths.models / "tiny", paths.models / "other")
    for options in (["-m", other], ["-c", "other"], ["-m", other, "-m", paths.models / "tiny"]):
        array, err, result = predicted(*options)
        assert result["postprocessing"] == {} and (array == raw).mean() > 0.999 and "postprocessing" not in err
    shutil.copytree(paths.models / "tiny", tmp_path / "elsewhere")
    assert predicted("-m", tmp_path / "elsewhere")[2]["postprocessing"] == {}

    changed = f"warning: tiny changed since that was selected ({chosen.made}); `nnlite select` compares them again\n"
    later = shutil.copytree(paths.models / "tiny" / "fold_0", paths.models / "tiny" / "fold_1")
    _, err, result = predicted()
    assert changed in err and result["folds"] == ["0"], "a fold that was trained since does not predict"
    shutil.rmtree(later)
    turn_round(paths.models / "tiny")
    _, err, _ = predicted()
    assert changed in err
    assert read_material(paths).notes[0].startswith("tiny changed since the comparison; `nnlite select`")
    shutil.rmtree(paths.models / "tiny")
    code, _, err = command(*common, "-o", tmp_path / "out", cwd=tmp_path)
    what = "names fold 0 of the model tiny, which does not exist any more. Run `nnlite select` again"
    assert code == 2 and f"inference.json: {what}" in err
    assert predicted("-c", "other")[2]["models"] == [str(other)]


def test_rules_of_an_older_selection_are_not_applied(
    paths: Paths, scan: Path, tmp_path: Path, command: Command
) -> None:
    """An inference.json of a version whose rules nothing confirmed: its sizes are mm3, its gains have no n."""
    chosen = selected(paths)
    value = chosen.to_json()
    value["postprocessing"] = {"Posterior": {"largest_component": False, "min_size_mm3": 1e6}}
    value["postprocessing_gain"] = {"Posterior": {"before": 0.5, "after": 0.6}}
    write_json(paths.inference, value)
    common = ["predict", "-i", scan, "-o", tmp_path / "out", "--device", "cpu", "-w", paths.root.parent]
    code, _, err = command(*common, cwd=tmp_path)
    assert code == 0 and "postprocessing: none\n" in err
    assert "the postprocessing of Posterior was chosen and measured on the same cases, and is not applied; `nnl" in err
    assert (read_label(tmp_path / "out" / scan.name)[0] == 2).any()
    assert "warning" not in command(*common, "--no-postprocess", cwd=tmp_path)[2]
    assert "Dice 0.5000 -> 0.6000 on the cases that chose it" in read_selection(paths).to_text()


def test_the_selected_model_is_exported(paths: Paths, tmp_path: Path, command: Command) -> None:
    """Though another one has more folds; of two that vote, none is exported for both."""
    selected(paths)
    other = Path(shutil.copytree(paths.models / "tiny", paths.models / "other"))
    shutil.copytree(other / "fold_0", other / "fold_1")
    place = ["-w", paths.root.parent]
    assert command("export", "tiny.zip", *place, cwd=tmp_path)[0] == 0
    manifest = read_manifest(tmp_path / "tiny.zip")
    assert manifest.models == ("tiny",) and set(manifest.about["postprocessing"]) == {"Anterior", "Posterior"}
    selected(paths, models=["tiny", "other"], weights={})
    code, _, err = command("export", "both.zip", *place, cwd=tmp_path)
    assert code == 2 and "error: tiny and other are selected together, and an export has one model. Export each" in err
    assert "their postprocessing is not in them (Anterior: the largest component;" in err
    assert not (tmp_path / "both.zip").exists()
    assert command("export", "other.zip", "-m", "other", *place, cwd=tmp_path)[0] == 0


def test_a_pair_that_was_selected_predicts(paths: Paths, scan: Path, tmp_path: Path) -> None:
    other = shutil.copytree(paths.models / "tiny", paths.models / "other")
    turn_round(other)
    selected(paths, models=["tiny", "other"], weights={})
    done = nnunet_lite.predict(scan, tmp_path / "out", workspace=paths.root.parent, device="cpu", postprocess=False)
    assert [folder.name for folder in done.models] == ["tiny", "other"] and done.folds == ("0",)
    both = nnunet_lite.load([paths.models / "tiny", other], [0], "cpu")
    assert np.array_equal(read_label(done.files[0])[0], both(scan))
    fast = nnunet_lite.predict(scan, tmp_path / "out", workspace=paths.root.parent, device="cpu", speed="fast")
    assert fast.folds == ("0",) and set(fast.postprocessing) == {"Anterior", "Posterior"}


def test_info_shows_what_is_selected(paths: Paths, command: Command) -> None:
    chosen = selected(paths)
    code, out, err = command("info", "-w", paths.root.parent, cwd=paths.root)
    assert code == 0, err
    assert "selected  tiny, fold 0; postprocessing: Anterior: the largest component; " in out
    turn_round(paths.models / "tiny")
    assert (
        "tiny changed since: run `nnlite select` again" in command("info", "-w", paths.root.parent, cwd=paths.root)[1]
    )
    about = json.loads(command("info", "--json", "-w", paths.root.parent, cwd=paths.root)[1])
    assert about["selection"]["models"] == list(chosen.models) and about["selection"]["changed_since"] == ["tiny"]


def handwritten(rules: dict[str, Any] | None = None, gains: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of an inference.json that predicts with the tiny model."""
    return {"format": "nnlite-inference-1", "models": ["tiny"], "folds": ["0"], "postprocessing": rules or {},
            "postprocessing_gain": gains or {}, "candidates": [], "made": "2026-01-01", "version": "1"}  # fmt: skip


BAD_RULES: dict[str, tuple[dict[str, Any], str]] = {
    "size_is_text": ({"min_size_mm3": "30"}, "min_size_mm3: Input should be a valid number"),
    "size_is_negative": ({"min_size_mm3": -1}, "min_size_mm3: Input should be greater than or equal to 0"),
    "size_is_endless": ({"min_size_mm3": float("inf")}, "min_size_mm3: Input should be a finite number"),
    "size_is_nan": ({"min_size_mm3": float("nan")}, "min_size_mm3: Input should be a finite number"),
    "largest_is_text": ({"largest_component": "no"}, "largest_component: Input should be a valid boolean"),
    "unknown_unit": ({"unit": "ml"}, "unit: Input should be 'mm3', 'mm2', 'voxels' or 'px'"),
    "unknown_key": ({"hole": 3}, "hole: Extra inputs are not permitted"),
}
BAD_GAINS = ({"before": "0.5", "after": 1.0}, {"before": 0.5}, {"before": 0.5, "after": None})  # text, half, null
KEEP = {"largest_component": True}
BROKEN: dict[str, tuple[Any, str]] = {
    "no_object": ([], "valid dictionary"),
    "another_format": ({"format": "nnlite-inference-0"}, "format: Input should be 'nnlite-inference-1'"),
    "nothing_else": ({"format": "nnlite-inference-1"}, "models: Field required"),
    **{k: (handwritten({"Anterior": KEEP | r}), f"postprocessing.Anterior.{why}") for k, (r, why) in BAD_RULES.items()},
    **{str(g): (handwritten({"Anterior": KEEP}, {"Anterior": g}), "postprocessing_gain.Anter") for g in BAD_GAINS},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_selection_is_refused(paths: Paths, name: str, scan: Path, command: Command, counts: Counts) -> None:
    """An inference.json that was changed by hand."""
    content, why = BROKEN[name]
    paths.inference.write_text(json.dumps(content))
    for arguments in (["predict", "-i", scan, "-o", paths.root / "out"], ["info"]):
        code, _, err = command(*arguments, "-w", paths.root.parent, cwd=paths.root)
        (line,) = [line for line in err.splitlines() if line.startswith("error")]
        assert code == 2 and why in line and "inference.json: is no selection" in line
        assert "Run `nnlite select` again" in line
    assert not (paths.root / "out").exists()
    counts("bad inputs refused in one line")


def test_rules_for_an_unknown_label_are_refused(paths: Paths, scan: Path, command: Command, counts: Counts) -> None:
    gains = {"Anteriorr": {"before": 0.8, "after": 0.9, "n": 12}}
    write_json(paths.inference, handwritten({"Anteriorr": {"largest_component": True}}, gains))
    common = ["predict", "-i", scan, "-o", paths.root / "out", "-w", paths.root.parent, "--device", "cpu"]
    code, _, err = command(*common, cwd=paths.root)
    assert code == 2 and "the selection postprocesses Anteriorr, which is no label of the model" in err
    assert not list((paths.root / "out").glob("*"))
    assert command(*common, "--no-postprocess", cwd=paths.root)[0] == 0
    counts("bad inputs refused in one line")


def test_how_a_selection_reads() -> None:
    by_label = {"left": 0.9, "right": None}
    best = Candidate(models=("a<b", "c"), n_cases=40, dice=0.91, low=0.9, high=0.92, by_label=by_label,
                     margin=Margin(0, 0, 0))  # fmt: skip
    worse = best.model_copy(update={"models": ("c",), "dice": 0.9, "margin": Margin(0.01, 0.005, 0.015)})
    found = Selection.model_validate(
        handwritten({"left": LARGEST}, {"left": Gain(before=0.9, after=0.93, n=1)})
        | {"candidates": (best, worse), "notes": ("x",)}
    )
    lines = found.to_text().splitlines()
    assert lines[1].startswith("a<b + c") and "selected" in lines[1]
    assert lines[2].endswith("+0.0100  +0.0050 to +0.0150") and "n/a" in lines[2]
    gain = "Dice 0.9000 -> 0.9300 on 1 case that did not choose it"
    assert lines[3:] == [f"postprocessing of left: the largest component, {gain}", "note: x"]
    html = found._repr_html_()
    assert "a&lt;b + c" in html and "a<b" not in html and html.startswith("<table>")


def test_a_changed_reference_is_named(paths: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    """Its old scores are stored, and look as good as new ones."""
    assert select(paths).candidates and "changed since" not in capfd.readouterr().err
    stamps = read_json(paths.raw)
    cases = stored_dataset(paths.dataset).cases
    stamps[cases[1].id]["files"][-1] |= {"changed": 0, "digest": "0" * 64}  # as if the file were another one by now
    write_json(paths.raw, stamps)
    assert select(paths).candidates
    assert f"warning: {cases[1].label} changed since it was planned, and scores may be" in capfd.readouterr().err
    paths.dataset.write_text(paths.dataset.read_text().replace(cases[0].images[0].name, "gone.nii.gz"))
    with pytest.raises(UserError, match="there is no such file"):
        select(paths)
    assert "changed since" not in capfd.readouterr().err


def test_a_zip_and_what_is_imported_from_it_postprocess_too(
    paths: Paths, scan: Path, tmp_path: Path, command: Command
) -> None:
    chosen, there = selected(paths), tmp_path / "there"
    raw = nnunet_lite.load(paths.models / "tiny", [0], "cpu")(scan)
    clean = apply_rules(raw, (1.0, 1.0, 1.0), LABELS, chosen.postprocessing)

    def run(*words: object) -> str:
        code, _, err = command(*words, cwd=tmp_path)
        assert code == 0, err
        return err

    run("export", paths.models / "tiny", "tiny.zip")
    described = command("info", "tiny.zip", cwd=tmp_path)[1]
    assert "postprocessing  Anterior: the largest component; " in described and "quality" not in described
    imported = there / paths.name / "models" / "tiny"
    run("import", "tiny.zip", "-w", there)
    for options in (["-m", "tiny.zip"], ["-w", there], ["-m", imported]):
        err = run("predict", "-i", scan, "-o", "out", "--device", "cpu", *options)
        assert np.array_equal(read_label(tmp_path / "out" / scan.name)[0], clean), options
        assert "postprocessing: Anterior: the largest component; Posterior: no component below 1e+06 mm3\n" in err
    run_of_last = read_json(tmp_path / "out" / "predictions.json")["runs"][-1]
    assert run_of_last["postprocessing"]["Anterior"] == "the largest component"
    run("predict", "-i", scan, "-o", "raw", "-m", "tiny.zip", "--no-postprocess", "--device", "cpu")
    assert np.array_equal(read_label(tmp_path / "raw" / scan.name)[0], raw)
    assert "nnunet has no place for the postprocessing of `nnlite predict`: Anterior: the largest" in run(
        "export", imported, "--format", "nnunet", "-o", "of_nnunet"
    )
    manifest = read_json(imported / "manifest.json")
    manifest["about"]["postprocessing"]["Anterior"] = {"smallest": True}
    write_json(imported / "manifest.json", manifest)
    code, _, err = command("predict", "-i", scan, "-o", "out", "-w", there, cwd=tmp_path)
    assert code == 2 and f"error: {imported / 'manifest.json'}: is not as nnlite writes it" in err
