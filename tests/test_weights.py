"""Models of nnU-Net v2: read without running what they carry, equal in what they predict, and written back.

tests/data/nnunet_models holds two that nnU-Net 2.8.1 wrote: a plain 3D U-Net with anisotropic kernels, and a residual
2D one for regions of two channels, trained with batch norm where the plan says instance norm.
"""

from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnunet_lite
from nnunet_lite.data.images import read_label
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.inference.predictor import load, read_model
from nnunet_lite.models.checkpoint import load_weights
from nnunet_lite.models.nnunet import export_model, import_model
from nnunet_lite.models.unpickle import read_checkpoint
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.unet import set_deep_supervision

MODELS = Path(__file__).parent / "data" / "nnunet_models"
CHECKPOINT = "fold_0/checkpoint_final.pth"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def theirs(tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may change."""

    def copy(name: str = "plain_3d") -> Path:
        return Path(shutil.copytree(MODELS / name, tmp_path / "theirs" / name))

    return copy


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit a checkpoint; these are our own files."""
    checkpoint = torch.load(folder / CHECKPOINT, weights_only=False)
    edit(checkpoint)
    torch.save(checkpoint, folder / CHECKPOINT)


def logits(model: Path, image: np.ndarray) -> list[np.ndarray]:
    plan, run = read_model(model)
    network = build_network(plan, run["configuration"])
    load_weights(model / "fold_0" / "model.safetensors", network)
    set_deep_supervision(network.eval(), True)
    with torch.inference_mode():
        return [output.numpy() for output in network(torch.from_numpy(image))]


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["plain_3d", "residual_2d"])
def test_an_imported_network_has_nnunets_logits(
    theirs: Callable[[str], Path], tmp_path: Path, name: str, prefix: str
) -> None:
    folder, expected = theirs(name), np.load(MODELS / name / "logits.npz")

    def wrap(checkpoint: dict[str, Any]) -> None:
        checkpoint["network_weights"] = {prefix + k: v for k, v in checkpoint["network_weights"].items()}

    if prefix:
        change(folder, wrap)
    import_model(folder, tmp_path / "ours")
    found = logits(tmp_path / "ours", expected["image"])
    assert len(found) == len(expected.files) - 1
    for i, output in enumerate(found):
        np.testing.assert_allclose(output, expected[f"head_{i}"], atol=1e-5, rtol=1e-4)


def test_plan_run_and_training_are_taken_over(tmp_path: Path) -> None:
    import_model(MODELS / "residual_2d", tmp_path / "ours")
    plan, run = read_model(tmp_path / "ours")
    assert plan.configuration("2d").network.norm == "batch"
    assert plan.labels.region_names == ("whole", "core", "enhancing") and plan.labels.region_order == (1, 2, 3)
    assert [c.name for c in plan.channels] == ["T1", "FLAIR"]
    assert (run["configuration"], run["settings"]["recipe"]) == ("2d", "nnUNetTrainerBN")
    model = load(tmp_path / "ours", device="cpu")
    assert model.mirror_axes == (0, 1)
    network = build_network(plan, "2d")
    about = load_weights(tmp_path / "ours" / "fold_0" / "model.safetensors", network)
    assert (about["epochs"], about["seconds"]) == (2, 15.0)


def test_a_model_without_mirroring_is_not_mirrored(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = theirs("plain_3d")
    change(folder, lambda checkpoint: checkpoint.update(inference_allowed_mirroring_axes=None))
    import_model(folder, tmp_path / "ours")
    assert load(tmp_path / "ours", device="cpu").mirror_axes == ()


def test_heads_of_deep_supervision_may_be_missing(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    folder, expected = theirs("plain_3d"), np.load(MODELS / "plain_3d" / "logits.npz")

    def prune(checkpoint: dict[str, Any]) -> None:
        for part in ("weight", "bias"):
            del checkpoint["network_weights"][f"decoder.seg_layers.0.{part}"]

    change(folder, prune)
    import_model(folder, tmp_path / "ours")
    found = logits(tmp_path / "ours", expected["image"])
    np.testing.assert_allclose(found[0], expected["head_0"], atol=1e-5, rtol=1e-4)
    assert not found[-1].any()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("decoder.seg_layers.1.weight"), "does not hold decoder.seg_layers.1.weight"),
        (lambda w: w.update({"attention.weight": torch.zeros(1)}), "holds attention.weight, which the plan's network"),
        (lambda w: w.update({"decoder.transpconvs.0.bias": torch.zeros(1)}), r"transpconvs.0.bias is of shape \(1,\)"),
    ],
)
def test_another_network_is_refused(
    theirs: Callable[[str], Path], tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = theirs("plain_3d")
    change(folder, lambda checkpoint: edit(checkpoint["network_weights"]))
    with pytest.raises(UserError, match=message):
        import_model(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


class Runs:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["init_args", "network_weights", "logging"])
@pytest.mark.parametrize(
    ("function", "text"),
    [(os.system, "touch {}"), (builtins.eval, "open('{}', 'w')"), (builtins.exec, "open('{}', 'w')")],
)
def test_a_checkpoint_that_carries_code_is_refused_and_nothing_runs(
    theirs: Callable[[str], Path],
    command: Command,
    tmp_path: Path,
    function: Callable[..., Any],
    text: str,
    place: str,
    protocol: int,
) -> None:
    folder, mark = theirs("plain_3d"), tmp_path / "ran"
    checkpoint = torch.load(folder / CHECKPOINT, weights_only=False)
    checkpoint[place] = {"x": Runs(function, text.format(mark))}
    torch.save(checkpoint, folder / CHECKPOINT, pickle_protocol=protocol)
    code, out, err = command("import", folder, "-o", tmp_path / "ours", cwd=tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"{CHECKPOINT}: names " in err and f".{function.__name__}, which no checkpoint needs" in err
    assert not mark.exists() and not (tmp_path / "ours").exists()


def test_a_pickle_without_an_archive_is_refused_unread(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    folder, mark = theirs("plain_3d"), tmp_path / "ran"
    (folder / CHECKPOINT).write_bytes(pickle.dumps(Runs(os.system, f"touch {mark}")))
    with pytest.raises(UserError, match=r"is no checkpoint that torch\.save wrote"):
        import_model(folder, tmp_path / "ours")
    assert not mark.exists()


def test_damage_is_told_in_one_line(theirs: Callable[[str], Path]) -> None:
    file = theirs("plain_3d") / CHECKPOINT
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is no checkpoint"):
        read_checkpoint(file, "network_weights")
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"is no readable checkpoint \(KeyError: 'weights'\)"):
        read_checkpoint(file, "weights")
    with zipfile.ZipFile(MODELS / "plain_3d" / CHECKPOINT) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (b"more" if "/data/" in name else b""))
    with pytest.raises(UserError, match=r"is no readable checkpoint \(ValueError: .* bytes"):
        read_checkpoint(file, "network_weights")


@pytest.mark.parametrize("name", ["plain_3d", "residual_2d"])
def test_an_exported_model_is_what_was_imported(tmp_path: Path, name: str) -> None:
    """All tensors under all of nnU-Net's names, and a plan that says the same."""
    import_model(MODELS / name, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    old, new = (torch.load(f / CHECKPOINT, weights_only=False) for f in (MODELS / name, tmp_path / "back"))
    assert old["network_weights"].keys() == new["network_weights"].keys()
    assert all(torch.equal(value, new["network_weights"][k]) for k, value in old["network_weights"].items())
    assert new["trainer_name"] == "nnUNetTrainer" and old.keys() == new.keys()
    for key in ("inference_allowed_mirroring_axes", "current_epoch"):
        assert new[key] == old[key]
    assert {k: new["init_args"][k] for k in ("configuration", "fold")} == {
        k: old["init_args"][k] for k in ("configuration", "fold")
    }
    plans, written = (read_json(f / "plans.json") for f in (MODELS / name, tmp_path / "back"))
    kwargs = plans["configurations"][old["init_args"]["configuration"]]["architecture"]["arch_kwargs"]
    if name == "residual_2d":
        kwargs["norm_op"] = kwargs["norm_op"].replace("instancenorm.Instance", "batchnorm.Batch")
    assert written == plans
    import_model(tmp_path / "back", tmp_path / "again")
    image = np.load(MODELS / name / "logits.npz")["image"]
    for a, b in zip(logits(tmp_path / "ours", image), logits(tmp_path / "again", image), strict=True):
        assert np.array_equal(a, b)


def test_a_model_of_ours_goes_to_nnunet_and_back(tiny_model: Path, hippocampus: Path, tmp_path: Path) -> None:
    export_model(tiny_model, tmp_path / "theirs")
    scan = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]
    changes = {"inference.mirroring": False, "inference.precision": "fp32", "inference.sums": "float32"}
    maps = [nnunet_lite.load(f, device="cpu", settings=changes)(scan) for f in (tiny_model, tmp_path / "theirs")]
    assert (maps[0] == maps[1]).mean() > 0.9999 and len(np.unique(maps[0])) > 1


def test_labels_are_numbered_as_nnunet_numbers_them(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "ours"
    shutil.copytree(tiny_model, ours)
    plan = read_json(ours / "plans.json")
    plan["labels"] |= {"names": {"background": 0, "Posterior": 7, "Anterior": 4}, "ignore": 9}
    write_json(ours / "plans.json", plan)
    export_model(ours, tmp_path / "theirs")
    expected = {"background": 0, "Anterior": 1, "Posterior": 2, "ignore": 3}
    assert read_json(tmp_path / "theirs" / "dataset.json")["labels"] == expected
    assert "will write: Anterior 4 -> 1, Posterior 7 -> 2" in capfd.readouterr().err


def test_nnunet_does_not_mirror_left_and_right_of_a_model_that_swaps_them(tiny_model: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    shutil.copytree(tiny_model, ours)
    run = read_json(ours / "run.json")
    run["settings"]["augmentation"] |= {"mirror_axes": [0, 2], "mirror_swap": [["Anterior", "Posterior"]]}
    write_json(ours / "run.json", run)
    export_model(ours, tmp_path / "theirs")
    checkpoint = torch.load(tmp_path / "theirs" / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] == (0,)


def test_what_nnunet_cannot_do_is_not_exported(tiny_model: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    shutil.copytree(tiny_model, ours)
    plan, run = read_json(ours / "plans.json"), read_json(ours / "run.json")
    plan["channels"][0]["clip_percentiles"] = [1, 99]
    write_json(ours / "plans.json", plan)
    with pytest.raises(UserError, match="clips images to percentiles"):
        export_model(ours, tmp_path / "theirs")
    run["settings"]["network"]["factory"] = "mine:make"
    write_json(ours / "run.json", run)
    with pytest.raises(UserError, match="a network made by mine:make"):
        export_model(ours, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_commands_import_predict_and_export(
    command: Command, theirs: Callable[[str], Path], hippocampus: Path, tmp_path: Path
) -> None:
    """nnU-Net's own folder predicts what the imported one does."""
    folder = theirs("plain_3d")
    scan = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]
    code, out, _ = command("import", folder, "-w", "w", cwd=tmp_path)
    models = tmp_path / "w" / "Dataset004_Hippocampus" / "models"
    made = models / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert code == 0 and str(made) in out and (made / "run.json").is_file()
    code, out, err = command("import", folder, "-w", "w", cwd=tmp_path)
    assert code == 2 and "is there already" in err
    code, _, err = command("import", folder, "-w", "w", "--replace", cwd=tmp_path)
    assert code == 0 and f"kept in {models / 'old_nnUNetTrainer__nnUNetPlans__3d_fullres_1'}" in err
    flags = ("-i", scan, "--no-mirroring", "--precision", "fp32", "--device", "cpu")
    for source, target in ((folder, "a"), (made, "b")):
        code, _, err = command("predict", "-m", source, "-o", target, *flags, cwd=tmp_path)
        assert code == 0 and str(source) in err and "/nnlite-" not in err
    maps = [read_label(tmp_path / target / scan.name)[0] for target in ("a", "b")]
    assert (maps[0] == maps[1]).mean() > 0.999
    code, out, _ = command("export", "-m", made, "--format", "nnunet", "-o", "back", "--json", cwd=tmp_path)
    assert code == 0 and json.loads(out)["output"] == "back" and (tmp_path / "back" / CHECKPOINT).is_file()


def test_the_first_stage_of_a_cascade_comes_along(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    """As nnU-Net lays them out: two folders beside each other that are called trainer__plans__configuration."""
    folder = theirs("plain_3d")
    plans = read_json(folder / "plans.json")
    full = plans["configurations"]["3d_fullres"]
    plans["configurations"] = {
        "3d_lowres": full | {"next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": full | {"previous_stage": "3d_lowres"},
    }
    write_json(folder / "plans.json", plans)
    stages = {name: folder.with_name(f"nnUNetTrainer__nnUNetPlans__{name}") for name in plans["configurations"]}
    for name, target in stages.items():
        shutil.copytree(folder, target)

        def edit(checkpoint: dict[str, Any], name: str = name) -> None:
            checkpoint["init_args"]["configuration"] = name
            for key, value in checkpoint["network_weights"].items():
                if "encoder.stages.0.0.convs.0." in key and value.ndim == 5 and name == "3d_cascade_fullres":
                    checkpoint["network_weights"][key] = torch.cat([value] * 3, 1)  # two foreground labels

        change(target, edit)
    second = stages["3d_cascade_fullres"]
    import_model(second, tmp_path / "models" / "second")
    names = sorted(path.name for path in (tmp_path / "models").iterdir())
    assert names == sorted([stages["3d_lowres"].name, "second"])
    model = nnunet_lite.load(second, device="cpu", settings={"inference.precision": "fp32"})
    assert model.previous is not None and model.previous.folder == stages["3d_lowres"]
    assert model.plan.n_inputs("3d_cascade_fullres") == 3


def test_what_is_no_model_of_nnunet_is_told(theirs: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no model of nnU-Net"):
        import_model(tmp_path, tmp_path / "ours")
    folder = theirs("plain_3d")
    write_json(folder / "plans.json", read_json(folder / "plans.json") | {"dataset_name": "../outside"})
    with pytest.raises(UserError, match=r"dataset_name '\.\./outside' is no name for a folder"):
        nnunet_lite.import_model(folder, workspace=tmp_path / "w")
    change(folder, lambda checkpoint: checkpoint.pop("trainer_name"))
    with pytest.raises(UserError, match=r"is no checkpoint of nnU-Net v2 \(lacks 'trainer_name'\)"):
        import_model(folder, tmp_path / "ours")
