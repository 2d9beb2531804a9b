"""One argument names a model in every command: a folder of nnlite or nnU-Net, one above it, a zip, or a name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from bad_inputs import edit, setting
from samples import FAST, NNUNET_MODELS, Command, Counts, sample_plan

import nnunet_lite
from nnunet_lite.commands.info import describe_model
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.members import find_members
from nnunet_lite.files import read_json, write_json
from nnunet_lite.models.argument import find_model, find_models, unpacked
from nnunet_lite.models.folder import model_folder, model_folders, stage_path
from nnunet_lite.models.lookup import read_model
from nnunet_lite.training.finetune import open_source
from nnunet_lite.training.splits import load_splits
from nnunet_lite.workspace import Paths

NAMES = {
    "3d_fullres": "Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres",
    "2d": "Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__2d",
}
CHECKPOINT = "fold_0/checkpoint_final.pth"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """nnU-Net's folder of results, with two models of one dataset."""
    for configuration, model in (("3d_fullres", "plain_3d"), ("2d", "residual_2d")):
        shutil.copytree(NNUNET_MODELS / model, tmp_path / "results" / NAMES[configuration])
    edit(tmp_path / "results" / NAMES["2d"] / "plans.json", setting(dataset_name="Dataset004_Hippocampus"))
    return tmp_path / "results"


@pytest.fixture
def exported(results: Path) -> Path:
    """The zip that nnU-Net's export makes of them, which has more files than predicting needs."""
    (results / NAMES["2d"] / "fold_0" / "progress.png").write_bytes(b"a picture")
    (results / "Dataset004_Hippocampus" / "inference_information.json").write_text("{}")
    return Path(shutil.make_archive(str(results.with_name("all")), "zip", results))


def test_every_way_to_name_a_model(results: Path, exported: Path, tmp_path: Path, monkeypatch: Any) -> None:
    full = results / NAMES["3d_fullres"]
    assert find_model(full, tmp_path) == full
    for above in (results, full.parent):
        assert find_model(above, tmp_path, configuration="3d_fullres") == full
        assert find_models(above, tmp_path) == [results / NAMES["2d"], full]
        with pytest.raises(UserError, match=r"could be 2 models: .*__2d, .*__3d_fullres\. Give one of these paths"):
            find_model(above, tmp_path)
    for place in (exported, exported / "Dataset004_Hippocampus"):
        assert find_model(place, tmp_path, configuration="2d") == exported / NAMES["2d"]
        assert find_models(place, tmp_path) == [exported / NAMES["2d"], exported / NAMES["3d_fullres"]]
    shutil.rmtree(results / NAMES["2d"])
    assert find_model(results, tmp_path) == find_model(full.parent, tmp_path) == full
    monkeypatch.setenv("nnUNet_results", str(results))
    assert find_model(NAMES["3d_fullres"], tmp_path) == full


def test_a_model_in_a_zip_of_nnunet_is_unpacked_alone(exported: Path, results: Path) -> None:
    with unpacked(exported / NAMES["2d"]) as folder:
        found = {path.relative_to(folder.parent) for path in folder.parent.rglob("*") if path.is_file()}
        name = Path(folder.name)
        assert found == {name / "plans.json", name / "dataset.json", name / CHECKPOINT, Path(".lock")}
        assert (folder / CHECKPOINT).read_bytes() == (results / NAMES["2d"] / CHECKPOINT).read_bytes()
    assert not folder.exists()
    with ZipFile(exported, "a") as archive:  # the scores of 500 cases with 100 labels
        archive.writestr(f"{NAMES['2d']}/fold_0/validation/summary.json", " " * 2**24 + "{}")
    with unpacked(exported / NAMES["2d"]) as folder:
        assert (folder / "fold_0" / "validation" / "summary.json").is_file()


def test_a_name_with_a_dataset_is_that_of_a_model_of_this_dataset(results: Path, tmp_path: Path) -> None:
    """Otherwise the model of another dataset would predict."""
    place, copy = tmp_path / "w", results / "Dataset009_Spleen" / Path(NAMES["2d"]).name
    shutil.copytree(results / NAMES["2d"], copy)
    edit(copy / "plans.json", setting(dataset_name="Dataset009_Spleen"))
    nnunet_lite.import_model(copy, name="spleen", workspace=place)
    nnunet_lite.import_model(results / NAMES["3d_fullres"], name="mine", workspace=place)
    assert find_model("mine", place).name == find_model("mine", place, "4").name == "mine"
    with pytest.raises(UserError, match=r"mine: is no model folder .*The models of Dataset009_Spleen in .* are spleen"):
        find_model("mine", place, "Dataset009")
    nnunet_lite.import_model(copy, name="mine", workspace=place)
    with pytest.raises(UserError, match=r"other: is no model folder .*The models in .* are mine, spleen\.$"):
        find_model("other", place, "Dataset009")
    with pytest.raises(UserError, match="no planned dataset called 'Dataset005'"):
        find_model("mine", place, "Dataset005")
    for name in ("a+b", "a,b", "a:b", "a\nb", "a\\b", "a" * 81):  # these separate names, those no zip may have
        with pytest.raises(UserError, match="is no name for a model folder"):
            nnunet_lite.import_model(copy, name=name, workspace=place)
    paths = Paths(place / "Dataset009_Spleen")
    (paths.models / "mine").rename(paths.models / "a:b")  # as a version that took the name left it
    assert model_folder(paths, "a:b") == paths.models / "a:b"


@pytest.mark.parametrize("folder", ["", "models/", "zenodo/7/weights/best of 3/"])
def test_a_model_at_any_depth_of_a_zip(results: Path, tmp_path: Path, folder: str) -> None:
    """Of whatever fold, with the nearest licence above it."""
    model, file = results / NAMES["3d_fullres"], tmp_path / "mine__x__3d_fullres.zip"
    licences = {"LICENSE": " Apache License\nVersion 2.0", "zenodo/7/LICENCE.md": "CC BY", "other/LICENSE": "none"}
    with ZipFile(file, "w") as archive:
        for part in ("plans.json", "dataset.json"):
            archive.write(model / part, folder + part)
        archive.write(model / CHECKPOINT, f"{folder}fold_3/checkpoint_best.pth")
        for name, text in licences.items():
            archive.writestr(name, text)
    assert find_model(file, tmp_path) == file / (folder or file.stem)
    plan = sample_plan(Labels(names={"background": 0, "lung": 1}))
    with open_source(str(file), tmp_path, plan, "0", "3d_fullres") as source:
        assert (source.fold, source.file.name) == ("3", "checkpoint_best.pth")
        assert source.licence == ("CC BY" if "zenodo" in folder else "Apache License Version 2.0")
        assert source.state["encoder.0.0.0.weight"].shape[:2] == (2, 1)


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "C:/out", "a\\..\\out", ".hidden"])
def test_paths_out_of_a_zip_of_nnunet_are_no_models(exported: Path, name: str, counts: Counts) -> None:
    counts("bad inputs refused in one line")
    with ZipFile(exported.with_name("odd.zip"), "w") as odd, ZipFile(exported) as good:
        for part in ("plans.json", "dataset.json", CHECKPOINT):
            odd.writestr(f"{name}/{part}", good.read(f"{NAMES['2d']}/{part}"))
    with pytest.raises(UserError, match=r"odd\.zip: is no zip of a model.* it contains '"):
        find_model(exported.with_name("odd.zip"), exported.parent)


def test_a_zip_bomb_of_nnunet_is_refused(exported: Path, counts: Counts) -> None:
    counts("bad inputs refused in one line")
    bomb = exported.with_name("bomb.zip")
    with ZipFile(bomb, "w", 8) as archive:
        archive.writestr("a/plans.json", "{}")
        archive.writestr(f"a/{CHECKPOINT}", bytes(2**26))
    with pytest.raises(UserError, match=r"bomb\.zip: would unpack .* as no model does"), unpacked(bomb / "a"):
        pass


def test_commands_take_a_zip_of_nnunet(
    command: Command, exported: Path, results: Path, scans: list[Path], hippocampus: Path
) -> None:
    place = exported.parent

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        found, out, err = command(*arguments, cwd=place)
        assert found == code and err.count("error: ") == bool(code), err
        return out, err

    about = json.loads(run("info", "all.zip", "--json")[0])
    assert [model["configuration"] for model in about["models"]] == ["2d", "3d_fullres"]
    flags = ("--device", "cpu")
    maps = []
    for model in (("-m", "all.zip", "-c", "3d_fullres"), ("-m", f"all.zip/{NAMES['3d_fullres']}")):
        run("predict", "-i", scans[0], "-o", "out", *model, *flags, "--no-mirroring", "--precision", "fp32")
        maps.append(read_label(place / "out" / scans[0].name)[0])
    assert np.array_equal(maps[0], maps[1]) and maps[0].any()
    run("export", "all.zip", "one.zip", "-c", "3d_fullres")
    image = sorted((hippocampus / "imagesTr").iterdir())[0]
    files = (image, hippocampus / "labelsTr" / image.name)
    given = ("one.zip", results / NAMES["3d_fullres"])
    found = [run("evaluate", *files, "-m", model, *flags, "--json")[0] for model in given]
    dice = [json.loads(scores)["foreground_mean"]["Dice"] for scores in found]
    assert 0 < dice[0] == pytest.approx(dice[1], abs=0.02)  # the precision is chosen by time
    model = nnunet_lite.load(place / "one.zip", device="cpu", settings=FAST)
    assert model.configuration_name == "3d_fullres"


def test_an_import_of_two_datasets_says_how_to_choose(command: Command, results: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(results / NAMES["2d"], results / "Dataset009_Spleen" / Path(NAMES["2d"]).name)
    edit(copy / "plans.json", setting(dataset_name="Dataset009_Spleen"))
    code, _, err = command("import", results, cwd=tmp_path)
    assert code == 0 and err.endswith("-o OUT -d Dataset004_Hippocampus\n"), err


def test_an_import_names_and_registers_all_models(command: Command, exported: Path, scans: list[Path]) -> None:
    place = exported.parent
    code, out, err = command("import", "all.zip", cwd=place)
    paths = Paths(place / "nnlite_workspace" / "Dataset004_Hippocampus")
    assert code == 0 and out == f"{paths.models}\n"
    assert [folder.name for folder in model_folders(paths)] == ["2d-nnunet", "3d_fullres-nnunet"]
    assert err.splitlines()[-1] == "predict with: nnlite predict -i IMAGES -o OUT"
    code, _, err = command("import", "all.zip", cwd=place)
    assert code == 2 and "2d-nnunet: exists already. Choose another --output, or delete it; `import` has --name" in err
    code, _, err = command("import", "all.zip", "--replace", cwd=place)
    assert code == 0 and err.endswith("OUT\n"), "models that were set aside need no -m"
    code, _, err = command("import", f"all.zip/{NAMES['2d']}", "--name", "mine", cwd=place)
    assert code == 0 and err.endswith(f"OUT -m {paths.models / 'mine'}\n")
    code, _, err = command("export", "two.zip", "-c", "2d", cwd=place)
    assert code == 0 and "is used: most folds (1). -m chooses another one" in err, err
    code, _, err = command("predict", "-i", scans[0], "-o", "out", "-c", "3d_fullres", "--device", "cpu", cwd=place)
    assert code == 0 and "3d_fullres-nnunet (fold 0)" in err
    plan = read_model(paths.models / "3d_fullres-nnunet")[0].model_copy(update={"dataset": "Other"})
    with open_source("3d_fullres-nnunet", paths.root.parent, plan, "0", "3d_fullres") as source:
        assert source.file == paths.models / "3d_fullres-nnunet" / "fold_0" / "model.safetensors"
    with open_source(str(exported), paths.root.parent, plan, "0", "2d") as source:
        assert source.configuration == "2d" and source.file.is_file()
    with open_source(str(exported), paths.root.parent, plan, "0", "3d_fullres") as source:
        assert source.configuration == "3d_fullres"
    assert not source.file.exists()


def test_models_of_other_plans_and_trainers_get_other_names(results: Path, tmp_path: Path) -> None:
    full, paths = results / NAMES["3d_fullres"], Paths(tmp_path / "w" / "Dataset004_Hippocampus")
    for name in ("nnUNetTrainer__nnUNetResEncUNetLPlans__3d_fullres", "nnUNetTrainer_5epochs__nnUNetPlans__3d_fullres"):
        shutil.copytree(full, full.with_name(name))
    nnunet_lite.import_model(full, workspace=tmp_path / "w")
    with pytest.raises(UserError, match="3d_fullres-nnunet: exists already"):  # the second one
        nnunet_lite.import_model(results, workspace=tmp_path / "w")
    assert [folder.name for folder in model_folders(paths)] == ["3d_fullres-nnunet"]
    nnunet_lite.import_model(results, workspace=tmp_path / "w", replace=True)
    names = ["2d-nnunet", "3d_fullres-nnunet", "3d_fullres-nnunet-5epochs", "3d_fullres-nnunet-ResEncUNetL"]
    assert [folder.name for folder in model_folders(paths)] == names
    shutil.copytree(full.parent, results / "copy")
    with pytest.raises(UserError, match=r"/copy/.*: would become .*-nnunet.*, as .*4_Hippocampus/.* would\. Import"):
        nnunet_lite.import_model(results, workspace=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_configuration_chooses_among_all_models(
    results: Path, tiny_model: Path, tmp_path: Path, counts: Counts
) -> None:
    nnunet_lite.export_model([tiny_model, tmp_path / "tiny.zip"])
    shutil.copytree(results / NAMES["3d_fullres"], tmp_path / "renamed")
    for model in (tiny_model, tmp_path / "tiny.zip", tmp_path / "renamed", results / NAMES["3d_fullres"]):
        assert find_model(model, tmp_path, configuration="3d_fullres") == model
        counts("bad inputs refused in one line")
        with pytest.raises(UserError, match="has no model of 2d, only of 3d_fullres"):
            find_model(model, tmp_path, configuration="2d")
        assert find_model(model, tmp_path, configuration="2d", required=False) == model, "to fine-tune"


def add_cascade(results: Path) -> None:
    full = read_json(results / NAMES["3d_fullres"] / "plans.json")["configurations"]["3d_fullres"]
    configurations = {
        "3d_fullres": full,
        "3d_lowres": {**full, "next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {**full, "previous_stage": "3d_lowres"},
    }
    for name in ("3d_lowres", "3d_cascade_fullres"):
        folder = results / NAMES["3d_fullres"].replace("3d_fullres", name)
        shutil.copytree(results / NAMES["3d_fullres"], folder)
        edit(folder / "plans.json", setting(configurations=configurations))
        checkpoint = torch.load(folder / CHECKPOINT, weights_only=False)
        checkpoint["init_args"]["configuration"] = name
        if name == "3d_cascade_fullres":  # the first layer has channels for two foreground labels
            weights = checkpoint["network_weights"]
            for key in [key for key in weights if "encoder.stages.0.0.convs.0." in key and weights[key].ndim == 5]:
                weights[key] = torch.cat([weights[key]] * 3, 1)
        torch.save(checkpoint, folder / CHECKPOINT)


def test_a_first_stage_that_was_imported_before_is_kept(results: Path, tmp_path: Path) -> None:
    add_cascade(results)
    first, second = (results / NAMES["2d"].replace("2d", name) for name in ("3d_lowres", "3d_cascade_fullres"))
    nnunet_lite.import_model(first, workspace=tmp_path / "w")
    for replace in (False, True):
        nnunet_lite.import_model(second, workspace=tmp_path / "w", replace=replace)
    models = tmp_path / "w" / "Dataset004_Hippocampus" / "models"
    kept = {"3d_cascade_fullres-nnunet", "3d_lowres-nnunet"}
    assert {folder.name for folder in models.iterdir()} == {*kept, "old_3d_cascade_fullres-nnunet_1"}
    shutil.rmtree(models / "3d_cascade_fullres-nnunet")
    checkpoint = torch.load(first / CHECKPOINT, weights_only=False)
    checkpoint["network_weights"] = {key: value + 1 for key, value in checkpoint["network_weights"].items()}
    torch.save(checkpoint, first / CHECKPOINT)
    for source in (second, results):  # of the folder, 2d comes first
        with pytest.raises(UserError, match="3d_lowres-nnunet: exists already"):
            nnunet_lite.import_model(source, workspace=tmp_path / "w")
        assert {folder.name for folder in models.iterdir()} == {"3d_lowres-nnunet", "old_3d_cascade_fullres-nnunet_1"}


def test_the_first_stage_is_imported_once_and_gets_a_name(results: Path, tmp_path: Path) -> None:
    """A zip of nnU-Net with a cascade, its first stage and another model."""
    add_cascade(results)
    shutil.rmtree(results / NAMES["2d"])
    file = shutil.make_archive(str(tmp_path / "cascade"), "zip", results)
    nnunet_lite.import_model(file, workspace=tmp_path / "w")
    paths = Paths(tmp_path / "w" / "Dataset004_Hippocampus")
    names = ["3d_cascade_fullres-nnunet", "3d_fullres-nnunet", "3d_lowres-nnunet"]
    assert [folder.name for folder in model_folders(paths)] == names
    assert stage_path(paths.models / names[0], read_model(paths.models / names[0])[1]) == paths.models / names[2]
    inside = Path(file) / NAMES["3d_fullres"].replace("3d_fullres", "3d_cascade_fullres")
    model = nnunet_lite.load(inside, device="cpu", settings=FAST)
    assert model.first_stage is not None and model.first_stage.configuration_name == "3d_lowres"
    about = describe_model(paths.models / names[0])
    assert about.values["first_stage"] == names[2] and f"cascade   after {names[2]}" in about.text
    made = nnunet_lite.import_model(inside, name="mine", workspace=tmp_path / "w")
    assert made == paths.models / "mine" and (paths.models / "3d_lowres-mine" / "fold_0").is_dir()


@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
def test_select_judges_imported_models_by_the_cases_that_they_held_out(
    tiny_workspace: Path, tiny_model: Path, as_zip: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The summary.json of nnU-Net's validation names them, and cases.json in a zip of nnlite has a hash of them."""
    shutil.copytree(tiny_workspace, tmp_path / "w", ignore=shutil.ignore_patterns("preprocessed"))
    paths = Paths(tmp_path / "w" / tiny_model.parents[1].name)
    dataset, held_out = stored_dataset(paths.dataset), [split.validation for split in load_splits(paths.splits)]
    nnunet_lite.export_model([tiny_model, tmp_path / "ours.zip"])
    nnunet_lite.import_model(tmp_path / "ours.zip", name="ours", workspace=tmp_path / "w")
    for name, cases in (("same", held_out[0]), ("other", held_out[1]), ("unknown", None)):
        folder = tmp_path / name
        nnunet_lite.export_model([tiny_model, folder], format="nnunet")
        if cases is not None:  # on Windows and elsewhere
            files = [f"{parent}{case}.nii.gz" for case, parent in zip(cases, ("/v/", "C:\\v\\"), strict=False)]
            rows = {"metric_per_case": [{"prediction_file": file} for file in files]}
            write_json(folder / "fold_0" / "validation" / "summary.json", rows)
        if as_zip:
            folder = Path(shutil.make_archive(str(folder), "zip", tmp_path, name))
        nnunet_lite.import_model(folder, name=name, workspace=tmp_path / "w")
    if not as_zip:  # what it holds besides is not needed
        (folder / "fold_0" / "validation").mkdir()
        (folder / "fold_0" / "validation" / "summary.json").write_text('{"metric_per_case": [')
        capfd.readouterr()
        nnunet_lite.import_model(folder, name="unknown", workspace=tmp_path / "w", replace=True)
        err = capfd.readouterr().err
        assert "summary.json: invalid JSON at line 1" in err and "which cases fold_0 held out is unknown" in err
    members, notes = find_members(paths, dataset)
    assert [member.name for member in members] == ["ours", "same", "tiny", "unknown"]
    assert notes == [
        "other is left out: fold 0 was trained on other cases than splits.json has now",
        "unknown does not say which cases it held out (fold_k/cases.json): its scores count only if these are those of "
        "splits.json",
    ]
