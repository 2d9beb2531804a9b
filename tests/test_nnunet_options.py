"""What users of nnU-Net v2 type is understood, or answered in one line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from samples import Command

from nnunet_lite import cli
from nnunet_lite.commands import nnunet_options
from nnunet_lite.commands.nnunet_options import translate_arguments
from nnunet_lite.errors import UserError

# nnU-Net 2.8.1: `nnUNetv2_... -h`, without those that take the same letter or name here
OPTIONS = {
    "train": "-tr -p -pretrained_weights -num_gpus --npz --c --val --val_best --disable_checkpointing -device",
    "predict": "-i -o -d -p -tr -c -f -step_size --disable_tta --verbose --save_probabilities --continue_prediction "
               "-chk -npp -nps -prev_stage_predictions -num_parts -part_id -device --disable_progress_bar "
               "--not_on_device",
    "plan": "-d -fpe -npfp --verify_dataset_integrity --no_pp --clean -pl -gpu_memory_target -preprocessor_name "
            "-overwrite_target_spacing -overwrite_plans_name -c -np --verbose --no_pbar",
    "evaluate": "-djfile -pfile -o -np --chill",
    "select": "-p -c -f -tr -np --disable_ensembling --no_overwrite",
}  # fmt: skip


def translated(line: str) -> str:
    name, *arguments = line.split()
    group: Any = typer.main.get_command(cli.app)
    return " ".join(translate_arguments(group.get_command(None, name), arguments))


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("train 4 3d_fullres 0 --npz --c", "3d_fullres 0 -d 4"),
        ("train Dataset004_X 3d_fullres 0 -num_gpus 2", "3d_fullres 0 --gpus 2 -d Dataset004_X"),
        ("train Liver 3d_fullres 0", "3d_fullres 0 -d Liver"),
        ("train 4", "-d 4"),
        ("train 4 3d_fullres -d 5", "4 3d_fullres -d 5"),
        ("train 3d_fullres all-folds --set loss.top_k=1", "3d_fullres all-folds --set loss.top_k=1"),
        ("train 2d 0 --set loss.top_k=1 loss.dice=0 -w w", "2d 0 --set loss.top_k=1 --set loss.dice=0 -w w"),
        (
            "predict -i a --set inference.sums=float32 inference.precision=fp32",
            "-i a --set inference.sums=float32 --set inference.precision=fp32",
        ),
        ("run --set loss.top_k=1 loss.dice=0 4", "4 --set loss.top_k=1 --set loss.dice=0"),
        ("train --set loss.top_k=1 3d_fullres 0", "3d_fullres 0 --set loss.top_k=1"),
        ("train -f 0 1 2 -c 3d_fullres -d 4 --lr -1", "3d_fullres 0,1,2 -d 4 --lr -1"),
        ("train 3d_fullres 0 -pretrained_weights=x.pth", "3d_fullres 0 --init x.pth"),
        ("train 2d 0 -tr nnUNetTrainer -p=nnUNetPlans --epochs", "2d 0 --epochs"),
        ("predict -i a b -o out -f 0 1 -c 2d my_own", "-i a -i b -o out -f 0 -f 1 -c 2d -c my_own"),
        ("predict -i a -chk checkpoint_best.pth -npp 3", "-i a -chk best"),
        ("predict -i a -o b -chk best", "-i a -o b -chk best"),
        ("predict --save_probabilities --disable_tta", "--save-probabilities all --no-mirroring"),
        ("predict --save-probabilities liver -step_size=1", "--save-probabilities liver --step-size 1"),
        ("predict -d 4 -i a -f", "-d 4 -i a -f"),
        ("plan -d 4 --verify_dataset_integrity -np 2", "4 --workers 2"),
        ("preprocess 4 -c 2d 3d_fullres", "2d 3d_fullres -d 4"),
        ("preprocess 2d 3d_fullres", "2d 3d_fullres"),
        ("preprocess 4 -c 2d -np 2 -plans_name nnUNetPlans", "2d --workers 2 -d 4"),
        ("plan 4 -c 2d 3d_fullres --verify_dataset_integrity", "4 -c 2d -c 3d_fullres"),
        ("train 4 2d 0 -tr nnUNetTrainer_100epochs --continue_training", "2d 0 --epochs 100 -d 4"),
        ("run -f 0 1 -c 2d Task04", "Task04 -f 0 -f 1 -c 2d"),
        ("train -c=2d -f=0 -d=4", "2d 0 -d 4"),
        ("plan -d=4", "4"),
        ("plan -d 4 -overwrite_target_spacing 2.5 1 1", "4 --spacing 2.5 --spacing 1 --spacing 1"),
        ("plan --spacing 2.5 Task04", "Task04 --spacing 2.5"),
        ("run -c 3d_fullres 3d_hearts", "3d_hearts -c 3d_fullres"),
        ("run -f 0 4 --epochs 3", "4 -f 0 --epochs 3"),
        ("run -f 0 1 4 -c 2d", "4 -f 0 -f 1 -c 2d"),
        ("predict -i a b", "-i a -i b"),
        ("select 4 -c 2d 3d_fullres --disable_ensembling", "-c 2d -c 3d_fullres --no-ensembles -d 4"),
        ("view -m a case", "case -m a"),
        ("view 4", "4"),
        ("view a --at 12 30 17 b", "a b --at 12 --at 30 --at 17"),
        ("evaluate a b -o x.json", "a b --output x.json"),
        ("info -- -odd", "-- -odd"),
    ],
)
def test_what_is_typed_becomes_ours(typed: str, ours: str) -> None:
    assert translated(typed) == ours


@pytest.mark.parametrize(("name", "option"), [(name, o) for name, text in OPTIONS.items() for o in text.split()])
def test_every_option_of_nnunet_is_taken_or_answered(name: str, option: str) -> None:
    """With a value, as with most: what is left is known to the command, or is that value."""
    group: Any = typer.main.get_command(cli.app)
    command = group.get_command(None, name)
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    try:
        out = translate_arguments(command, [option, "5"])
    except UserError as error:
        starts = f"{option} is an option of nnU-Net. ", f"`nnlite {name}` takes no -f. "
        assert str(error).startswith(starts) and str(error).count("\n") == 0
    else:
        assert {word for word in out if word.startswith("-")} <= known, out


def test_what_the_answers_name_exists() -> None:
    """Options and commands between backticks."""
    group: Any = typer.main.get_command(cli.app)
    texts = [answer for _, answer in nnunet_options._ANSWERS.values()]
    texts += [reason for _, reason in nnunet_options._SKIPPED.values()]
    texts += nnunet_options._COMMANDS.values()
    for line in re.findall(r"`nnlite ([^`]+)`", " ".join(texts)):
        name, *words = line.split()
        flags = {flag for p in group.get_command(None, name).params for flag in (*p.opts, *p.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= flags, line
    ours = set(nnunet_options._OURS.values())
    everything = {f for name in cli.COMMANDS for p in group.get_command(None, name).params
                  for f in (*p.opts, *p.secondary_opts)}  # fmt: skip
    assert ours <= everything


def test_a_skipped_option_says_why_and_an_answer_ends_the_command(command: Command, tmp_path: Path) -> None:
    code, out, err = command("train", "4", "3d_fullres", "0", "--npz", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("--npz is skipped: `select` computes the probabilities that it needs\nerror: the workspace ")
    for typed, says in {
        "train 4 2d 0 -p nnUNetResEncUNetMPlans": "`nnlite plan DATA --preset resenc_m`",
        "plan 4 -pl nnUNetPlannerResEncXL": "`nnlite plan DATA --preset resenc_xl`",
        "preprocess 4 -plans_name myPlans": "--preset resenc_m|resenc_l|resenc_xl`",
        "predict -d 4 -tr nnUNetTrainer_100epochs": "`nnlite predict -m MODEL` chooses a model",
        "export m.zip -f 0 1": "`nnlite export` takes no -f. All folds are taken. `nnlite predict -f 0 1` chooses some",
        "nnUNetv2_plan_and_preprocess -d 4": "is a command of nnU-Net. `nnlite plan 4` does it",
        "plan_and_preprocess": "`nnlite plan DATA` does it",
        "evaluate_folder refs 'my out' -djfile x": "`nnlite evaluate 'my out' refs` does it",
        "evaluate refs out -djfile x": "`nnlite evaluate PREDICTIONS REFERENCES`, in this order",
        "train 4 2d 0 --val": "The same command without it scores a finished fold",
        "find_best_configuration 4": "is a command of nnU-Net. `nnlite select` does it",
    }.items():
        code, out, err = command(*shlex.split(typed), cwd=tmp_path)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []
    for typed, says in {
        "train 4 2d 0 -tr nnUNetTrainer_5epochs": "-tr nnUNetTrainer_5epochs is --epochs 5\n",
        "train 4 2d 0 -p nnUNetPlans": "-p nnUNetPlans is skipped: it is the default\n",
        "predict -d 4 -i a -o b -tr nnUNetTrainer": "-tr nnUNetTrainer is skipped: -m MODEL chooses a model\n",
    }.items():
        code, _, err = command(*typed.split(), cwd=tmp_path)
        assert code == 2 and err.startswith(says), err
