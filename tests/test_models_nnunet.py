"""Models of nnU-Net v2: read without running code in them, equal in what they predict, and written back.

tests/data/nnunet_models contains two that nnU-Net 2.8.1 wrote: a plain 3D U-Net with anisotropic kernels, and a
residual 2D one for regions of two channels, trained with batch norm where the plan says instance norm.
"""

from __future__ import annotations

import builtins
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_inputs import edit, setting
from safetensors.torch import load_file
from samples import FAST, NNUNET_MODELS, Command, Copy, Counts, forget_plan

import nnunet_lite
from nnunet_lite.data.images import read_label
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json
from nnunet_lite.inference.predictor import load
from nnunet_lite.models.checkpoint import load_weights
from nnunet_lite.models.lookup import read_model
from nnunet_lite.models.nnunet import export_nnunet, import_nnunet, read_checkpoint, read_nnunet_fold
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.unet import set_deep_supervision

CHECKPOINT = "fold_0/checkpoint_final.pth"
BOTH = pytest.mark.parametrize("name", ["plain_3d", "residual_2d"])


@pytest.fixture
def theirs(tmp_path: Path) -> Copy:
    """A copy of a model of nnU-Net that a test may change."""

    def copy(name: str = "plain_3d") -> Path:
        return Path(shutil.copytree(NNUNET_MODELS / name, tmp_path / "theirs" / name))

    return copy


@pytest.fixture
def three_folds(theirs: Copy) -> Path:
    """Fold 0 is finished, fold 1 is in training, fold 2 has both checkpoints, and fold 3 has none."""
    folder = theirs()
    for fold in ("fold_1", "fold_2"):
        shutil.copytree(folder / "fold_0", folder / fold)
    (folder / "fold_1" / "checkpoint_final.pth").rename(folder / "fold_1" / "checkpoint_best.pth")
    shutil.copy(folder / CHECKPOINT, folder / "fold_2" / "checkpoint_best.pth")
    (folder / "fold_3").mkdir()
    return folder


def change(folder: Path, edit: Callable[[dict[str, Any]], object], **options: Any) -> None:
    """Edit a checkpoint; these are our own files."""
    checkpoint = torch.load(folder / CHECKPOINT, weights_only=False)
    edit(checkpoint)
    torch.save(checkpoint, folder / CHECKPOINT, **options)


def change_weights(folder: Path, edit: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Replace each tensor of a checkpoint by those that `edit` makes of it."""

    def all_of(checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["network_weights"]
        checkpoint["network_weights"] = {k: v for key, value in weights.items() for k, v in edit(key, value).items()}

    change(folder, all_of)


def imported_logits(folder: Path, out: Path, image: np.ndarray) -> list[np.ndarray]:
    """Import a model of nnU-Net, and return what its heads compute, without the coarsest one."""
    import_nnunet(folder, out)
    plan, run = read_model(out)
    network = build_network(plan, run["configuration"])
    load_weights(out / "fold_0" / "model.safetensors", network)
    set_deep_supervision(network.eval(), True)
    with torch.inference_mode():
        return [output.numpy() for output in network(torch.from_numpy(image))]


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@BOTH
def test_an_imported_network_has_the_logits_of_nnunet(theirs: Copy, tmp_path: Path, name: str, prefix: str) -> None:
    folder, expected = theirs(name), np.load(NNUNET_MODELS / name / "logits.npz")
    change_weights(folder, lambda key, value: {prefix + key: value})
    found = imported_logits(folder, tmp_path / "ours", expected["image"])
    assert len(found) == len(expected.files) - 2
    for i, output in enumerate(found):
        np.testing.assert_allclose(output, expected[f"head_{i}"], atol=1e-5, rtol=1e-4)


@BOTH
def test_a_model_in_memory_equals_the_imported_one(tmp_path: Path, name: str) -> None:
    import_nnunet(NNUNET_MODELS / name, tmp_path / "ours")
    read, imported = load(NNUNET_MODELS / name, device="cpu"), load(tmp_path / "ours", device="cpu")
    assert (read.plan, read.settings, read.folds) == (imported.plan, imported.settings, imported.folds)
    assert (read.mirror_axes, read.swap) == (imported.mirror_axes, imported.swap)
    exact = load(tmp_path / "ours", device="cpu", settings={"inference.sums": "float32"})
    assert read.of_nnunet and imported.of_nnunet and exact.of_nnunet
    other = imported.networks[0].state_dict()
    assert all(torch.equal(value, other[key]) for key, value in read.networks[0].state_dict().items())


def test_plan_run_and_training_are_imported(theirs: Copy, tmp_path: Path) -> None:
    import_nnunet(NNUNET_MODELS / "residual_2d", tmp_path / "ours")
    plan, run = read_model(tmp_path / "ours")
    assert plan.configuration("2d").network.norm == "batch"
    assert plan.labels.region_names == ("whole", "core", "enhancing") and plan.labels.region_order == (1, 2, 3)
    assert [c.name for c in plan.channels] == ["T1", "FLAIR"]
    assert (run["configuration"], run["settings"]["recipe"]) == ("2d", "nnUNetTrainerBN")
    assert load(tmp_path / "ours", device="cpu").mirror_axes == (0, 1)
    about = load_weights(tmp_path / "ours" / "fold_0" / "model.safetensors", build_network(plan, "2d"))
    assert (about["epochs"], about["seconds"]) == (2, 15.0)

    folder = theirs()
    change(folder, lambda checkpoint: checkpoint.update(inference_allowed_mirroring_axes=None))
    assert load(folder, device="cpu").mirror_axes == ()


def test_heads_of_deep_supervision_may_be_missing(theirs: Copy, tmp_path: Path) -> None:
    folder, expected = theirs(), np.load(NNUNET_MODELS / "plain_3d" / "logits.npz")
    change_weights(folder, lambda key, value: {} if key.startswith("decoder.seg_layers.0.") else {key: value})
    found = imported_logits(folder, tmp_path / "ours", expected["image"])
    np.testing.assert_allclose(found[0], expected["head_0"], atol=1e-5, rtol=1e-4)
    assert not load_file(tmp_path / "ours" / "fold_0" / "model.safetensors")["heads.0.weight"].any()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("decoder.seg_layers.1.weight"), "lacks decoder.seg_layers.1.weight"),
        (lambda w: w.update({"attention.weight": torch.zeros(1)}), "contains attention.weight, which the plan's"),
        (lambda w: w.update({"decoder.transpconvs.0.bias": torch.zeros(1)}), r"transpconvs.0.bias has shape \(1,\)"),
    ],
)
def test_another_network_is_refused(
    theirs: Copy, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = theirs()
    change(folder, lambda checkpoint: edit(checkpoint["network_weights"]))
    with pytest.raises(UserError, match=message):
        import_nnunet(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


class Runs:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["init_args", "network_weights", "logging"])
@pytest.mark.parametrize(
    ("function", "text"),
    [(os.system, "touch {}"), (builtins.eval, "open('{}', 'w')"), (builtins.exec, "open('{}', 'w')")],
)
def test_a_checkpoint_with_code_is_refused_and_nothing_runs(
    theirs: Copy, tmp_path: Path, function: Callable[..., Any], text: str, where: str, protocol: int
) -> None:
    """torch.save writes protocol 2; of others torch says that it reads none of their instructions."""
    folder, mark = theirs(), tmp_path / "was_run"
    code = {"x": Runs(function, text.format(mark))}
    change(folder, lambda checkpoint: checkpoint.update({where: code}), pickle_protocol=protocol)
    says = f"{function.__name__}, which could run any code" if protocol == 2 else "is no readable checkpoint"
    with pytest.raises(UserError, match=f"^{re.escape(f'{folder}/{CHECKPOINT}: ')}.*{says}"):
        import_nnunet(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_damaged_checkpoints_are_refused(theirs: Copy, tmp_path: Path) -> None:
    file, mark = theirs() / CHECKPOINT, tmp_path / "was_run"
    whole, longer = file.read_bytes(), tmp_path / "longer.pth"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(longer, "w") as new:
        largest = max((info for info in old.infolist() if "/data/" in info.filename), key=lambda info: info.file_size)
        for name in old.namelist():
            new.writestr(name, old.read(name) + (b"more" if "/data/" in name else b""))
    flipped = bytearray(whole)
    flipped[largest.header_offset + 200] ^= 1
    for content, says in (
        (whole[: len(whole) // 2], r"is no checkpoint of torch 1\.6 or later"),
        (pickle.dumps(Runs(os.system, f"touch {mark}")), r"is no checkpoint of torch 1\.6 or later"),
        (longer.read_bytes(), r"is no readable checkpoint \(.*record size .* does not match"),
        (flipped, r"is damaged: the checksum of .*/data/.* differs"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=says):
            read_checkpoint(file)
    assert not mark.exists()
    file.write_bytes(whole)
    for key in ("network_weights", "trainer_name"):
        change(file.parents[1], lambda checkpoint, key=key: checkpoint.pop(key))  # type: ignore[misc]
        with pytest.raises(UserError, match=rf"is no checkpoint of nnU-Net v2 \(lacks '{key}', contains "):
            read_nnunet_fold(file)
        file.write_bytes(whole)


def test_what_is_no_model_of_nnunet_is_refused(theirs: Copy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no model of nnU-Net"):
        import_nnunet(tmp_path, tmp_path / "ours")
    folder = theirs()
    edit(folder / "plans.json", setting(dataset_name="../outside"))
    with pytest.raises(UserError, match=r"plans\.json: dataset_name '\.\./outside' is no name for a"):
        nnunet_lite.import_model(folder, workspace=tmp_path / "w")


def test_stages_in_a_circle_are_refused(theirs: Copy, tmp_path: Path, counts: Counts) -> None:
    counts("bad inputs refused in one line")
    folder = theirs()
    full = read_json(folder / "plans.json")["configurations"]["3d_fullres"]
    circle = {"3d_fullres": {**full, "previous_stage": "b"}, "b": {**full, "previous_stage": "3d_fullres"}}
    edit(folder / "plans.json", setting(configurations=circle))
    with pytest.raises(UserError, match="the previous stages of 3d_fullres are a circle"):
        nnunet_lite.import_model(folder, workspace=tmp_path / "w")


def test_the_first_stage_of_a_cascade_is_imported(
    theirs: Copy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As nnU-Net writes them: two folders next to each other that are called trainer__plans__configuration."""
    folder = theirs()
    full = read_json(folder / "plans.json")["configurations"]["3d_fullres"]
    configurations = {
        "3d_lowres": {**full, "next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {**full, "previous_stage": "3d_lowres"},
    }
    edit(folder / "plans.json", setting(configurations=configurations))
    stages = {name: folder.with_name(f"nnUNetTrainer__nnUNetPlans__{name}") for name in configurations}
    for name, target in stages.items():
        shutil.copytree(folder, target)
        change(target, lambda checkpoint, name=name: checkpoint["init_args"].update(configuration=name))  # type: ignore[misc]

    def of_second(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        is_first_layer = "encoder.stages.0.0.convs.0." in key and value.ndim == 5
        return {key: torch.cat([value] * 3, 1) if is_first_layer else value}  # two foreground labels

    change_weights(stages["3d_cascade_fullres"], of_second)
    second = stages["3d_cascade_fullres"]
    import_nnunet(second, tmp_path / "models" / "second")
    found = sorted(path.name for path in (tmp_path / "models").iterdir())
    assert found == sorted([stages["3d_lowres"].name, "second"])
    for folder in (second, tmp_path / "models" / "second"):
        model = load(folder, device="cpu", settings={"inference.precision": "fp32"})
        assert model.first_stage is not None and model.first_stage.folder == folder.with_name(stages["3d_lowres"].name)
        assert model.plan.n_inputs("3d_cascade_fullres") == 3
    export_nnunet(tmp_path / "models" / "second", tmp_path / "back")
    beside = tmp_path / "__3d_lowres"  # as for a name that is not TRAINER__PLANS__CONFIGURATION
    assert f"{tmp_path / 'back'} is only the second stage: " in (said := capfd.readouterr().err) and str(beside) in said
    nnunet_lite.import_model(tmp_path / "back", output=tmp_path / "alone")
    assert (
        f"{tmp_path / 'alone'} predicts only with its first stage: import that too, as {beside}"
        in capfd.readouterr().err
    )
    export_nnunet(tmp_path / "models" / stages["3d_lowres"].name, beside)
    assert load(tmp_path / "back", device="cpu").first_stage is not None


# ------------------------------------------------------------------------------------------------ folds and checkpoints


def test_folds_without_the_checkpoint_are_left_out(three_folds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert load(three_folds, device="cpu").folds == ("0", "2")
    assert [line for line in capfd.readouterr().err.splitlines() if "fold" in line] == [
        f"warning: {three_folds}: fold 0, 2 used (checkpoint_final.pth), fold 1 left out (no checkpoint_final.pth). "
        "--checkpoint best takes checkpoint_best.pth, which fold 1 has."
    ]
    assert load(three_folds, device="cpu", checkpoint="best").folds == ("1", "2")
    assert "fold 1, 2 used (checkpoint_best.pth), fold 0 left out" in capfd.readouterr().err
    assert load(three_folds, 2, "cpu").folds == ("2",)
    assert "left out" not in capfd.readouterr().err, "the fold was given"
    nnunet_lite.import_model(three_folds, workspace=three_folds.parent / "w")
    assert capfd.readouterr().err.count("left out") == 1
    shutil.copytree(three_folds / "fold_0", three_folds / "fold_all")
    assert load(three_folds, device="cpu").folds == ("0", "2")
    assert load(three_folds, "all", "cpu").folds == ("all",)


def test_the_given_checkpoint_is_read(three_folds: Path) -> None:
    """The best one of fold 2 has other weights here."""
    change_weights(three_folds, lambda key, value: {key: value + 1})
    shutil.move(three_folds / CHECKPOINT, three_folds / "fold_2" / "checkpoint_best.pth")
    one = load(three_folds, 2, "cpu").networks[0].state_dict()
    other = load(three_folds, 2, "cpu", checkpoint="best").networks[0].state_dict()
    assert all(torch.equal(other[name], one[name] + 1) for name in one)


@pytest.mark.parametrize(
    ("folds", "checkpoint", "says"),
    [
        ([1], "final", r"fold 1 has no checkpoint_final\.pth\. --checkpoint best takes .* which fold 1 has"),
        ([0], "best", r"fold 0 has no checkpoint_best\.pth\. --checkpoint final takes"),
        ([3], "final", r"fold 3 has no checkpoint_final\.pth\. Trained folds: 0, 2"),
        ([], "final", r"no fold is given\. Trained folds: 0, 2"),
        (None, "latest", r"there is no checkpoint 'latest'\. Give \"final\" or \"best\""),
        (["zero"], "best", r"fold zero has no checkpoint_best\.pth\. Trained folds: 1, 2"),
    ],
)
def test_missing_folds_are_refused(three_folds: Path, folds: Any, checkpoint: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(three_folds, folds, "cpu", checkpoint=checkpoint)


def test_a_model_without_any_final_checkpoint_needs_the_option(
    three_folds: Path, command: Command, scans: list[Path], tmp_path: Path
) -> None:
    for fold in ("fold_0", "fold_2"):
        shutil.rmtree(three_folds / fold)
    predict = ("predict", "-i", scans[0], "-o", "out", "--device", "cpu", "--no-mirroring", "-m")
    commands = [(*predict, three_folds), ("import", three_folds, "-o", "new"), ("info", three_folds),
                ("export", three_folds, "model.zip")]  # fmt: skip
    for arguments in commands:
        code, out, err = command(*arguments, cwd=tmp_path)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "no fold has a checkpoint_final.pth" in err, err
        assert "--checkpoint best takes checkpoint_best.pth, which fold 1 has" in err
    for arguments, option in zip(commands, ("-chk", "-chk", "--checkpoint", "-chk"), strict=True):
        assert command(*arguments, option, "best", cwd=tmp_path)[0] == 0
    assert {"out", "new", "model.zip"} <= {path.name for path in tmp_path.iterdir()}
    for ours in ("new", "model.zip"):
        code, _, err = command("info", ours, "-chk", "best", cwd=tmp_path)
        assert code == 2 and f"error: {ours}: is a model of nnlite, which has one checkpoint. Leave out " in err
        assert "`nnlite import FOLDER -chk best`, or `-m FOLDER -chk best`" in err and err.count("\n") == 1
    code, out, _ = command("info", "new/fold_1/model.safetensors", cwd=tmp_path)
    assert code == 0 and "2 epochs in" in out
    assert command("info", three_folds / "fold_1" / "checkpoint_best.pth", cwd=tmp_path)[0] == 0
    for model in ("new", "model.zip"):
        code, _, err = command("view", model, "--no-browser", cwd=tmp_path)
        assert (
            code == 2 and err == f"error: {model}: is a model. See what it predicts: `nnlite view CASE -m {model}`.\n"
        )


# ------------------------------------------------------------------------------------------------------------- writing


@BOTH
def test_an_exported_model_is_what_was_imported(tmp_path: Path, name: str) -> None:
    """All tensors under all names of nnU-Net, and an equal plan."""
    image = np.load(NNUNET_MODELS / name / "logits.npz")["image"]
    first = imported_logits(NNUNET_MODELS / name, tmp_path / "ours", image)
    export_nnunet(tmp_path / "ours", tmp_path / "back")
    old, new = (torch.load(f / CHECKPOINT, weights_only=False) for f in (NNUNET_MODELS / name, tmp_path / "back"))
    assert old["network_weights"].keys() == new["network_weights"].keys()
    assert all(torch.equal(value, new["network_weights"][k]) for k, value in old["network_weights"].items())
    assert new["trainer_name"] == "nnUNetTrainer" and old.keys() == new.keys()
    for key in ("inference_allowed_mirroring_axes", "current_epoch"):
        assert new[key] == old[key]
    assert all(new["init_args"][key] == old["init_args"][key] for key in ("configuration", "fold"))
    plans, written = (read_json(f / "plans.json") for f in (NNUNET_MODELS / name, tmp_path / "back"))
    kwargs = plans["configurations"][old["init_args"]["configuration"]]["architecture"]["arch_kwargs"]
    if name == "residual_2d":
        kwargs["norm_op"] = kwargs["norm_op"].replace("instancenorm.Instance", "batchnorm.Batch")
    assert written == plans
    for a, b in zip(first, imported_logits(tmp_path / "back", tmp_path / "again", image), strict=True):
        assert np.array_equal(a, b)


def test_a_model_of_ours_goes_to_nnunet_and_back(tiny_model: Path, scans: list[Path], tmp_path: Path) -> None:
    export_nnunet(tiny_model, tmp_path / "theirs")
    settings = FAST | {"inference.sums": "float32"}
    maps = [load(f, device="cpu", settings=settings)(scans[0]) for f in (tiny_model, tmp_path / "theirs")]
    assert (maps[0] == maps[1]).mean() > 0.9999 and len(np.unique(maps[0])) > 1


def test_labels_and_mirror_axes_are_those_of_nnunet(
    model_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Labels are numbered from 0, and nnU-Net does not mirror left and right of a model that swaps labels."""
    names = {"background": 0, "Posterior": 7, "Anterior": 4}
    swap = {"mirror_axes": [0, 2], "mirror_swap": [["Anterior", "Posterior"]]}
    edit(model_copy / "plans.json", lambda plan: plan["labels"].update(names=names, ignore=9))
    edit(model_copy / "run.json", lambda run: run["settings"]["augmentation"].update(swap))
    export_nnunet(model_copy, tmp_path / "theirs")
    expected = {"background": 0, "Anterior": 1, "Posterior": 2, "ignore": 3}
    assert read_json(tmp_path / "theirs" / "dataset.json")["labels"] == expected
    assert "will write: Anterior 4 -> 1, Posterior 7 -> 2" in capfd.readouterr().err
    checkpoint = torch.load(tmp_path / "theirs" / CHECKPOINT, weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] == (0,)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("plans.json", lambda plan: plan["channels"][0].update(clip_percentiles=[1, 99]), "clips images to percentil"),
        ("run.json", lambda run: run["settings"]["network"].update(factory="mine:make"), "a network made by mine:make"),
    ],
)
def test_what_nnunet_lacks_is_not_exported(model_copy: Path, tmp_path: Path, file: str, change: Any, says: str) -> None:
    forget_plan(model_copy)
    edit(model_copy / file, change)
    with pytest.raises(UserError, match=says):
        export_nnunet(model_copy, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


# ------------------------------------------------------------------------------------------------------------ commands


def test_commands_import_predict_and_export(command: Command, theirs: Copy, scans: list[Path], tmp_path: Path) -> None:
    """In a workspace without a planned dataset; the imported model predicts what nnU-Net's own folder does."""
    folder = theirs().rename(tmp_path / "theirs" / "model")
    place, name = tmp_path / "nnlite_workspace" / "Dataset004_Hippocampus", "3d_fullres-nnunet"
    made = place / "models" / name

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        found, out, err = command(*arguments, cwd=tmp_path)
        assert found == code and err.count("error: ") == bool(code), err
        return out, err

    assert str(made) in run("import", folder)[0] and (made / "run.json").is_file()
    assert "exists already" in run("import", folder, code=2)[1]
    assert f"kept in {place / 'models' / f'old_{name}_1'}" in run("import", folder, "--replace")[1]
    about = json.loads(run("info", "--json")[0])
    assert about["dataset"] == place.name and [model["model"] for model in about["models"]] == [str(made)]
    out, _ = run("info")
    assert out.startswith(f"{place.name}: only models") and "3d_fullres of Dataset004_Hippocampus" in out

    flags = ("--no-mirroring", "--device", "cpu", "--precision", "fp32", "-i", scans[0])
    maps = []
    for model, source in ((["-m", folder], folder), (["-m", name], made), ([], made)):
        out, err = run("predict", *model, "-o", "out", *flags)
        assert out == "1 label map in out\n" and str(source) in err and "/.tmp" not in err
        maps.append(read_label(tmp_path / "out" / scans[0].name)[0])
    assert (maps[0] == maps[1]).mean() > 0.999 and np.array_equal(maps[1], maps[2])
    _, err = run("predict", *flags, "-o", "out", "-c", "2d", code=2)
    assert f"no 2d model of {place.name} is trained. Trained: {name} (3d_fullres)." in err
    for step in (("train", "3d_fullres", "0"), ("select",), ("report",)):  # which need the dataset itself
        assert "no dataset is planned" in run(*step, code=2)[1]
    assert json.loads(run("export", "-m", made, "--format", "nnunet", "-o", "back", "--json")[0]) == {"path": "back"}
    run("export", name, "by_name", "--format", "nnunet")
    assert all((tmp_path / target / CHECKPOINT).is_file() for target in ("back", "by_name"))
    run("export", "model.zip")
    assert "where to write it is not given" in run("export", name, "--format", "nnunet", code=2)[1]
    assert not (tmp_path / name).exists(), "the name of a model is no target"

    other = theirs("residual_2d")
    edit(other / "plans.json", setting(dataset_name="Dataset005_Other"))
    run("import", other)
    for step in (("info",), ("predict", *flags, "-o", "out")):
        _, err = run(*step, code=2)
        assert "models of several datasets. Choose with -d: Dataset004_Hippocampus, Dataset005" in err
    assert place.name in run("info", "-d", "Dataset004")[0]


def test_info_of_a_model(command: Command, tmp_path: Path) -> None:
    """Of nnU-Net's folder, of a zip made of it, and of what was imported."""
    folder = NNUNET_MODELS / "residual_2d"
    assert command("export", folder, "net.zip", cwd=tmp_path)[0] == 0
    assert command("import", "net.zip", cwd=tmp_path)[0] == 0
    imported = next((tmp_path / "nnlite_workspace").glob("*/models/residual_2d"))
    for given, model in (([folder], folder), (["net.zip"], "net.zip"), (["residual_2d"], imported)):
        code, out, err = command("info", *given, "--json", cwd=tmp_path)
        about = json.loads(out)
        assert code == 0 and about["channels"] == ["T1", "FLAIR"] and list(about["folds"]) == ["0"], err
        assert about["model"] == str(model)
