"""Plans, settings, folds and the workspace's own files that are wrong, through `train` and `plan`: one line each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import Bad, Evil, copy_workspace, edit, refuse, setting
from samples import Command, Copy, Counts

HERE = "nnlite_workspace/Task04_Hippocampus"
TRAIN = "train 3d_fullres 0 --device cpu"
CASES = ("01", "08", "38", "45", "53")  # of the raw data
Change = Callable[[Any], Any]


def plan_with(change: Change, *says: str) -> Bad:
    """A change of the 3d_fullres configuration by hand."""
    return Bad(
        lambda place: edit(place / HERE / "plans.json", lambda plan: change(plan["configurations"]["3d_fullres"])),
        TRAIN,
        ("plans.json: ", *says),
    )


def network_with(change: Change, *says: str) -> Bad:
    return plan_with(lambda configuration: change(configuration["network"]), *says)


def whole_plan(change: Change, *says: str) -> Bad:
    return Bad(lambda place: edit(place / HERE / "plans.json", change), TRAIN, ("plans.json: ", *says))


def also(name: str, **fields: Any) -> Change:
    """Another configuration of a plan."""
    return lambda plan: plan["configurations"].update({name: fields})


def written(file: str, content: bytes | str, command: str = TRAIN, *says: str) -> Bad:
    """A file of the workspace that holds something else."""

    def make(place: Path) -> None:
        path = place / HERE / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return Bad(make, command, (Path(file).name, *says))


def folder_for(file: str, command: str = TRAIN) -> Bad:
    def make(place: Path) -> None:
        (place / HERE / file).unlink()
        (place / HERE / file).mkdir()

    return Bad(make, command, (Path(file).name,))


def recipe(text: str | bytes, *says: str) -> Bad:
    content = text if isinstance(text, bytes) else text.encode()
    return Bad(lambda place: (place / "mine.toml").write_bytes(content), f"{TRAIN} --recipe mine.toml", says)


def asked(command: str, *says: str) -> Bad:
    """Options that cannot be."""
    return Bad(lambda place: None, command, says)


def set_to(assignment: str, *says: str) -> Bad:
    return asked(f"{TRAIN} --set {assignment}", *says)


def two_recipes(place: Path) -> None:
    (place / "mine.toml").write_text('base = "other.toml"\n')
    (place / "other.toml").write_text('base = "mine.toml"\n')


def folds(content: Any, *says: str, file: str = "folds.json", command: str = "plan raw --splits folds.json") -> Bad:
    text = content if isinstance(content, str) else json.dumps(content)
    return Bad(lambda place: (place / file).write_text(text), command, (f"{Path(file).name}: ", *says))


def found_folds(content: Any, *says: str, command: str = "plan raw") -> Bad:
    """A splits_final.json in the folder of a dataset, which is taken without an option."""
    says = ("Correct or remove it: without it folds are made again", *says)
    return folds(content, *says, file="raw/splits_final.json", command=command)


def of_several(command: str) -> Bad:
    """A command without -d in a workspace with a second planned dataset."""

    def make(place: Path) -> None:
        shutil.copytree(place / HERE, place / "nnlite_workspace" / "Task09_Spleen", symlinks=True)

    says = ("has 2 planned datasets: Task04_Hippocampus, Task09_Spleen. Say which one with -d NAME",)
    return Bad(make, command, says)


def table(name: str, text: str, option: str, *says: str) -> Bad:
    return Bad(lambda place: (place / name).write_text(text), f"plan raw {option} {name}", (f"{name}: ", *says))


PLANS = {
    "a negative patch": plan_with(setting(patch_size=[-40, 56, 40]), "patch_size.0", "greater than 0", "-40"),
    "a patch of zero": plan_with(setting(patch_size=[0, 56, 40]), "patch_size.0"),
    "a patch of two numbers for three": plan_with(setting(patch_size=[56, 40]), "per axis of the patch"),
    "a patch of four numbers": plan_with(
        setting(patch_size=[8] * 4), "3d_fullres: patch_size = [8, 8, 8, 8] must have two or three axes"
    ),
    "a patch of text": plan_with(setting(patch_size="large"), "patch_size"),
    "a patch of fractions": plan_with(setting(patch_size=[40.5, 56, 40]), "patch_size.0"),
    "a patch that cannot be pooled": plan_with(
        setting(patch_size=[40, 55, 40]), "patch_size[1] = 55", "multiple of 8", "48 and 56"
    ),
    "a patch of 10^9 a side": Bad(plan_with(setting(patch_size=[2**30] * 3)).make, TRAIN, ("GB of memory",)),
    "a batch of nothing": plan_with(setting(batch_size=0), "batch_size"),
    "a batch of 10^12": Bad(plan_with(setting(batch_size=10**12)).make, TRAIN, ("GB of memory",)),
    "an unknown field": plan_with(setting(pach_size=[8, 8, 8]), "pach_size"),
    "a spacing of zero": plan_with(setting(spacing=[0, 1, 1]), "spacing.0"),
    "a spacing of NaN": plan_with(
        setting(spacing=[float("nan"), 1, 1]), "3d_fullres.spacing.0: ", "finite number (found nan)"
    ),
    "a spline of order 9": plan_with(
        setting(resampling={"image_order": 9}), "3d_fullres.resampling.image_order: ", "(found 9)"
    ),
    "a previous stage that is not there": plan_with(
        setting(previous_stage="3d_lwres"), "previous_stage = '3d_lwres' is no other", "there are: 2d"
    ),
    "its own previous stage": plan_with(
        setting(previous_stage="3d_fullres"), "3d_fullres.previous_stage = '3d_fullres' is no other"
    ),
    "no network": plan_with(lambda c: c.pop("network") and None, "network"),
    "no features": network_with(setting(features=[]), "features"),
    "negative features": network_with(lambda n: n["features"].__setitem__(0, -4), "features.0"),
    "fewer kernels than stages": network_with(
        lambda n: n["kernels"].pop() and None, "network: kernels has 3 entries for 4 stages"
    ),
    "a stride of zero": network_with(lambda n: n["strides"].__setitem__(1, [0, 2, 2]), "strides.1.0"),
    "an even kernel": network_with(
        lambda n: n["kernels"].__setitem__(1, [3, 2, 3]), "network.kernels.1.1: must be odd", "(found 2)"
    ),
    "another kind of network": network_with(setting(kind="transformer"), "kind"),
    "another norm": network_with(setting(norm="layer"), "norm"),
    "10^9 features": Bad(network_with(lambda n: n["features"].__setitem__(-1, 10**9)).make, TRAIN, ("GB of memory",)),
    "an unknown format": whole_plan(setting(format="nnlite-plan-99"), "format"),
    "an axis order of 0, 0, 1": whole_plan(
        setting(axis_order=[0, 0, 1]), "axis_order: must be a permutation of 0, 1, 2 (found [0, 0, 1])"
    ),
    "no channel": whole_plan(setting(channels=[]), "channels"),
    "another normalisation": whole_plan(lambda p: p["channels"][0].update(normalization="magic"), "normalization"),
    "statistics of text": whole_plan(lambda p: p["channels"][0]["statistics"].update(mean="big"), "mean"),
    "a configuration outside of the workspace": whole_plan(
        lambda p: p["configurations"].update({"../mine": {"inherits_from": "3d_fullres"}}), "has the name '../mine'"
    ),
    "no foreground label": whole_plan(lambda p: p["labels"].update(names={"background": 0}), "foreground"),
    "two labels of one value": whole_plan(lambda p: p["labels"].update(names={"a": 1, "b": 1}), "one value"),
    "a storage that is not there": whole_plan(setting(stored_as="float8"), "stored_as", "'float16' or 'float32'"),
    "no storage": whole_plan(setting(stored_as=None), "stored_as"),
    "a mask of text": whole_plan(lambda p: p["channels"][0].update(use_mask="inside"), "use_mask"),
    "percentiles the wrong way round, by hand": whole_plan(
        lambda p: p["channels"][0].update(clip_percentiles=[99, 1]), "clip_percentiles", "the lower first"
    ),
    "one percentile to clip to": whole_plan(lambda p: p["channels"][0].update(clip_percentiles=[99]), "clip"),
    "a percentile beyond 100": whole_plan(lambda p: p["channels"][0].update(clip_percentiles=[1, 250]), "clip"),
    "no configuration": whole_plan(setting(configurations={})),
    "configurations in a list": whole_plan(setting(configurations=[]), "configurations"),
    "a configuration that is a number": whole_plan(setting(configurations={"3d_fullres": 1})),
    "inheritance of itself": whole_plan(
        also("x", inherits_from="x"), "configurations.x.inherits_from goes in a circle: x -> x"
    ),
    "inheritance in a circle of two": whole_plan(
        lambda p: p["configurations"].update(x={"inherits_from": "y"}, y={"inherits_from": "x"}), "circle"
    ),
    "inheritance of nothing": whole_plan(
        also("x", inherits_from="2D"), "x.inherits_from '2D', which does not exist", "there are: 2d, 3d"
    ),
    "a plan that is a list": whole_plan(lambda plan: [plan]),
    "a plan that is null": written("plans.json", "null"),
    "an empty plan": written("plans.json", ""),
    "a plan cut off": written("plans.json", '{"format": "nnlite-plan-1", "dataset"', TRAIN, "invalid JSON at line 1"),
    "a plan in Latin-1": written("plans.json", '{"dataset": "L\xe4sion"}'.encode("latin-1"), TRAIN, "UTF-8"),
    "a plan in UTF-16": written("plans.json", '{"format": 1}'.encode("utf-16"), TRAIN, "UTF-8"),
    "a plan of brackets": written("plans.json", "[" * 200_000, TRAIN, "cannot be read"),
    "a plan of a long number": written("plans.json", '{"memory_gb": ' + "9" * 5000 + "}"),
    "options of another kind": whole_plan(setting(options=["--preset"]), "options"),
    "an unknown option": whole_plan(setting(options={"prest": "default"}), "options.prest"),
    "an option of another type": whole_plan(setting(options={"stored_as": "float8"}), "options.stored_as"),
    "negative memory among the options": whole_plan(setting(options={"memory_gb": -1}), "options.memory_gb"),
    "a folder for the plan": folder_for("plans.json"),
}

WORKSPACE = {
    "dataset.json is a list": written("dataset.json", "[]"),
    "dataset.json is nothing": written("dataset.json", "{}"),
    "dataset.json has cases of text": Bad(
        lambda place: edit(place / HERE / "dataset.json", setting(dataset=["a", "b"])), TRAIN, ("dataset.json",)
    ),
    "dataset.json is cut off": written("dataset.json", '{"name": "x"', TRAIN, "invalid JSON"),
    "a folder for dataset.json": folder_for("dataset.json"),
    "splits.json is a number": written("splits.json", "5", TRAIN, "train"),
    "splits.json is a string": written("splits.json", '"train"'),
    "splits.json is cut off": written("splits.json", "[{", TRAIN, "invalid JSON"),
    "splits.json of numbers": written("splits.json", '[{"train": [1], "val": [2]}]'),
    "splits.json of unknown cases": written(
        "splits.json", '[{"train": ["hippocampus_001"], "val": ["patient_7"]}]', TRAIN, "patient_7"
    ),
    "splits.json without the fold": Bad(
        written("splits.json", '[{"train": ["hippocampus_001"], "val": ["hippocampus_008"]}]').make,
        "train 3d_fullres 3",
        ("no fold '3'",),
    ),
    "splits.json with a case on both sides": written(
        "splits.json", '[{"train": ["hippocampus_001"], "val": ["hippocampus_001"]}]', TRAIN, "both sides"
    ),
    "the fingerprint is a list": written("fingerprint.json", "[]", f"{TRAIN} --recipe resenc_l"),
    "the fingerprint is cut off": written("fingerprint.json", '{"spacings": [[1', f"{TRAIN} --recipe resenc_l"),
    "the workspace is a file": Bad(lambda place: (place / "file").write_text(""), f"{TRAIN} -w file", ("file",)),
    "the workspace is not there": asked(f"{TRAIN} -w nowhere", "nnlite plan"),
    "no such data set": asked(f"{TRAIN} -d Task99", "Task99", "Task04_Hippocampus"),
}

SETTINGS = {
    "no such recipe": asked(f"{TRAIN} --recipe fats", "fats", "Did you mean 'fast'?"),
    "a recipe that is a folder": Bad(lambda p: (p / "a.toml").mkdir(), f"{TRAIN} --recipe a.toml", ("a.toml",)),
    "a recipe that builds on itself": recipe('base = "mine.toml"\n', "mine.toml: builds on itself"),
    "two recipes that build on each other": Bad(two_recipes, f"{TRAIN} --recipe mine.toml", ("builds on itself",)),
    "a recipe that builds on nothing": recipe('base = "nothing"\n', "nothing"),
    "a recipe that builds on a number": recipe("base = 5\n", "5"),
    "a recipe that is no TOML": recipe("epochs = = 3\n", "mine.toml: invalid TOML", "line 1, column 10"),
    "a recipe in UTF-16": recipe("[training]".encode("utf-16"), "UTF-8"),
    "a recipe with a key twice": recipe("[training]\nepochs = 1\nepochs = 2\n", "line 3"),
    "a recipe with an unknown section": recipe(
        "[trainings]\nepochs = 3\n", "mine.toml: unknown setting 'trainings.epochs'", "'training.epochs'"
    ),
    "a recipe with an unknown key": recipe("[training]\nepoch = 3\n", "training.epoch", "training.epochs"),
    "a recipe whose section is a number": recipe("training = 3\n", "training"),
    "a recipe whose value is a table": recipe("[training.epochs]\nx = 3\n", "training.epochs"),
    "a recipe with a date for a rate": recipe("[optimizer]\nlr = 2020-01-01\n", "optimizer.lr"),
    "a recipe with a rate of infinity": recipe("[optimizer]\nlr = inf\n", "optimizer.lr"),
    "no epochs": asked(f"{TRAIN} --epochs 0", "training.epochs"),
    "negative iterations": asked(f"{TRAIN} --iterations -5", "training.iterations"),
    "epochs of text": asked(f"{TRAIN} --epochs many", "'--epochs': "),
    "a time limit of text": asked(f"{TRAIN} --time-limit soon", "time_limit"),
    "a time limit in words": asked(f"{TRAIN} --time-limit 3minutes", "such as 90s, 3m or 8h"),
    "no time at all": asked(f"{TRAIN} --time-limit 0", "time_limit"),
    "less than no time": asked(f"{TRAIN} --time-limit -5m", "time_limit"),
    "a time limit without end": asked(f"{TRAIN} --time-limit inf", "time_limit"),
    "a time limit that is no number": asked(f"{TRAIN} --time-limit nan", "time_limit"),
    "a time limit of unknown unit": asked(f"{TRAIN} --time-limit 3w", "time_limit"),
    "a limit of validation of text": set_to("training.limit_validation=most", "training.limit_validation"),
    "windows in one place": set_to("inference.step_size=0", "inference.step_size"),
    "windows with gaps": set_to("inference.step_size=1.5", "inference.step_size"),
    "no batch to a step": set_to("training.accumulate=0", "training.accumulate"),
    "less than no pseudo-validation": set_to("training.validation_iterations=-1", "training.validation_iterations"),
    "no bad step": set_to("training.max_bad_steps=0", "training.max_bad_steps"),
    "noise the wrong way round": set_to("augmentation.noise_std=[0.2,0.1]", "augmentation.noise_std"),
    "a negative scaling": set_to("augmentation.scaling=[-0.7,1.4]", "augmentation.scaling"),
    "an average of all weights for ever": set_to("optimizer.ema=1", "optimizer.ema"),
    "a patch of too few voxels": set_to("training.patch_voxels=8", "training.patch_voxels"),
    "a patch of letters": asked(f"{TRAIN} --patch-size axb", "--patch-size", "Write 40x56x40"),
    "a negative patch for train": asked(f"{TRAIN} --patch-size -8x8x8", "-8"),
    "a patch of two sides": asked(f"{TRAIN} --patch-size 32x32", "32x32"),
    "a rate below nothing": asked(f"{TRAIN} --lr -1", "optimizer.lr = -1.0"),
    "another precision": asked(f"{TRAIN} --precision fp8", "training.precision"),
    "epochs of an option and of --set": asked(
        f"{TRAIN} --epochs 400 --set training.epochs=2",
        "--epochs is 400, and --set training.epochs=2 is another value of the same setting",
    ),
    "a time limit of an option and of --set": asked(
        f"{TRAIN} --time-limit 8h --set training.time_limit=1", "--time-limit is 8h, and --set training.time_limit=1"
    ),
    "a patch of an option and of --set": asked(
        f"{TRAIN} --patch-size 16x16x16 --set training.patch_size=[16,16,24]", "--patch-size", "training.patch_size"
    ),
    "a rate of an option and of --set for run": asked(
        "run raw --seed 1 --set training.seed=2", "--seed is 1, and --set training.seed=2"
    ),
    "no equals sign": set_to("training.epochs", "key=value"),
    "a section alone": set_to("training=3", "training"),
    "no key": set_to("=3", "unknown setting"),
    "a private name": set_to("__class__.x=3", "__class__"),
    "a share beyond one": set_to("training.foreground=1.5", "training.foreground"),
    "a seed below zero": set_to("training.seed=-1", "training.seed"),
    "another loss of nothing": set_to("loss.cross_entropy=0 --set loss.dice=0", "greater than 0"),
    "weights for other classes": set_to("loss.class_weights=[1,2]", "class_weights"),
    "a label that is not there": set_to('augmentation.mirror_swap=[["left","right"]]', "left"),
    "a fourth axis": set_to("augmentation.mirror_axes=[3]", "mirror_axes"),
    "a network from no file": set_to("network.factory=nofile.py:make", "nofile.py"),
    "a network from no function": set_to("network.factory=nofunction", "network.factory"),
    "a model to start from that is not there": asked(f"{TRAIN} --init nowhere", "nowhere"),
    "a checkpoint with code to start from": Bad(
        lambda place: torch.save({"network_weights": Evil()}, place / "pretrained.pth"),
        f"{TRAIN} --init pretrained.pth", ("pretrained.pth: names posix.mknod, ", "it was not run"),
    ),
    "frozen weights without any": asked(f"{TRAIN} --freeze everything", "freeze"),
    "a transform that is not there": set_to(
        'augmentation.extra=[{name="Nonsense"}] --set augmentation.pipeline=batchgenerators', "Nonsense"
    ),
    "no such configuration": asked("train 3d_fulres 0", "3d_fulres", "3d_fullres"),
    "a fold of text": asked("train 3d_fullres zero", "zero"),
    "a fold beyond the last": asked("train 3d_fullres 7", "7"),
    "a fold below zero": asked("train 3d_fullres -- -1", "-1"),
    "no such device": asked("train 3d_fullres 0 --device warp", "warp"),
    "a GPU that is not there": asked("train 3d_fullres 0 --device cuda:99", "cuda"),
    "a name that leads elsewhere": asked(f"{TRAIN} --name ../../evil", "../../evil"),
    "a hidden name": asked(f"{TRAIN} --name .hidden", ".hidden"),
    "nothing to resume": asked(f"{TRAIN} --resume", "nothing to resume"),
    "resume and restart": asked(f"{TRAIN} --resume --restart", "exclude each other"),
    "two kinds of strata": asked("plan raw --stratify --stratify-by strata.csv", "--stratify and --stratify-by"),
    "one fold": asked("plan raw --folds 1", "--folds"),
    "more folds than cases": asked("plan raw --folds 99", "5 cases cannot be split into 99 folds"),
    "no memory": asked("plan raw --memory 0", "memory"),
    "negative memory": asked("plan raw --memory -8", "memory"),
    "a negative spacing": asked("plan raw --spacing -2", "spacing", "greater than 0"),
    "a spacing of four axes": asked("plan raw --spacing 2 2 2 2", "one length in mm, or one for each axis"),
    "a spacing with a unit": asked("plan raw --spacing 2mm", "'--spacing'", "without a unit"),
    "a batch of text": asked("train --batch-size two", "'--batch-size': a whole number is needed"),
    "a speed that does not exist": asked("predict -i a -o b --speed fastest", "'--speed': 'fastest' is not one of"),
    "a spacing beyond the images, of a recipe": asked(f"{TRAIN} --set plan.spacing=500", "leaves no voxel along z"),
    "a spacing for pictures, of a recipe": asked(f"{TRAIN} --set plan.spacing=[1,2]", "2 numbers for images with 3"),
    "a storage for plan that is not there": asked("plan raw --store float8", "float8"),
    "no such preset": asked("plan raw --preset resenc_s", "resenc_s"),
    "percentiles the wrong way round": asked("plan raw --clip-percentiles 99 1", "99"),
    "percentiles beyond 100": asked("plan raw --clip-percentiles 1 101", "--clip-percentiles"),
    "a plan from no file": asked("plan raw --plans nowhere.json", "nowhere.json"),
    "groups by a broken expression": asked("plan raw --group-by (", "is no regular expression: missing )"),
    "groups by an expression that matches nothing": asked("plan raw --group-by patient", "matches nothing in cases"),
    "groups without a case": table("groups.csv", "case,group\nhippocampus_001,a\n", "--group-by", "has no group"),
    "groups of three columns": table("groups.csv", "a,b\na,b,c\n", "--group-by", "line 2 has 3 columns, not two: "),
    "groups that contradict": table(
        "groups.csv", "".join(f"hippocampus_0{n},{group}\n" for n in CASES for group in "ab"),
        "--group-by", "has more than one group for cases hippocampus_001, ",
    ),
    "folds from no file": asked("plan raw --splits nowhere.json", "nowhere.json"),
    "folds from no table": asked("plan raw --splits nowhere.csv", "nowhere.csv"),
    "splits_final.json of an unknown case, for run": found_folds(
        [{"train": ["hippocampus_001"], "val": ["x"]}], "unknown cases: x", command="run raw --recipe cpu"
    ),
    "a second dataset, and -d of neither": Bad(
        of_several(TRAIN).make, f"{TRAIN} -d Task05", ("It holds: Task04_Hippocampus, Task09_Spleen.",)
    ),
    "a folder for -d that was not planned": Bad(
        lambda place: (place / "other" / "Task04_Hippocampus").mkdir(parents=True),
        f"{TRAIN} -d other/Task04_Hippocampus",
        ("other/Task04_Hippocampus: is not planned: the dataset Task04_Hippocampus in the workspace",),
    ),
    "a fingerprint without its description": asked("plan --from-fingerprint x.json", "--dataset-json"),
    "nothing to plan": asked("plan", "nnlite plan"),
    "an option that is not there": asked("train 3d_fullres 0 --epoch 3", "--epoch"),
    "no such command": asked("trian 3d_fullres 0", "trian"),
    "a fold before its configuration": asked("train 0 3d_fullres", "no planned dataset called '0'"),
    "a dataset after its configuration": asked("train 3d_fullres 4 0", "4 is no configuration"),
    "two configurations to train": asked("train -c 2d 3d_fullres -f 0", "no planned dataset called '2d'"),
    "a number of no dataset": asked("train 5 3d_fullres 0", "no planned dataset called '5'"),
    "a trainer of nnU-Net": asked("train 4 3d_fullres 0 -tr nnUNetTrainerDiceCELoss", "-tr is an option", "--epochs"),
}  # fmt: skip


FOLDS: dict[str, tuple[Any, str]] = {
    "of an unknown case": ([{"train": ["hippocampus_001"], "val": ["x"]}], "fold 0 names unknown cases: x"),
    "with a case on both sides": ([{"train": ["hippocampus_001"], "val": ["hippocampus_001"]}], "on both sides"),
    "with a case twice": ([{"train": ["hippocampus_001"] * 2, "val": []}], "twice"),
    "without training": ([{"train": [], "val": ["hippocampus_001"]}], "no training case"),
    "that are cut off": ('[{"train": [', "invalid JSON at line 1"),
    "of an empty file": ("", "invalid JSON"),
    "of nothing": ([], "must be a list of"),
    "of numbers": ([{"train": [1], "val": [2]}], "must be a list of"),
    "in an object": ({"train": []}, "must be a list of"),
}
SEVERAL = (TRAIN, "train 3d_fullres all-folds", "preprocess", "predict -i raw/imagesTr -o out", "select",
           "select --no-ensembles", "export model.zip")  # fmt: skip
BAD = (
    PLANS
    | WORKSPACE
    | SETTINGS
    | {f"folds {name}": folds(content, says) for name, (content, says) in FOLDS.items()}
    | {f"found folds {name}": found_folds(content, says) for name, (content, says) in FOLDS.items()}
    | {f"a second dataset, for {command}": of_several(command) for command in SEVERAL}
)


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(
    command: Command,
    tiny_workspace: Path,
    tiny_model: Path,
    copy_dataset: Copy,
    tmp_path: Path,
    counts: Counts,
    name: str,
) -> None:
    counts("bad inputs refused in one line")
    copy_workspace(tiny_workspace, tmp_path)
    copy_dataset(5, "raw")
    refuse(BAD[name], command, tmp_path)
