"""What users of nnU-Net v2 type, as arguments of nnlite: `translate_arguments` rewrites them before they are parsed.

nnlite takes the values `1 2` of `-f 1 2`, the dataset in front of the configuration, and options under nnU-Net's names.
Options that cannot be taken are answered in one line: with what does it here.
"""

from __future__ import annotations

import re
import shlex
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from nnunet_lite import log
from nnunet_lite.errors import UserError

# an option of nnU-Net: ours that takes the same values
_OURS = {
    "-device": "--device", "-gpu_memory_target": "--memory", "-np": "--workers", "-npfp": "--workers",
    "-num_gpus": "--gpus", "-o": "--output", "-overwrite_target_spacing": "--spacing", "-pretrained_weights": "--init",
    "-step_size": "--step-size",
    "--continue_prediction": "--continue", "--disable_ensembling": "--no-ensembles", "--disable_tta": "--no-mirroring",
    "--save_probabilities": "--save-probabilities",
}  # fmt: skip
_ORDER = "Without it: `nnlite evaluate PREDICTIONS REFERENCES`, in this order, which is not nnU-Net's."
# an option of nnU-Net that nothing depends on here: how many values it has, and why it is skipped
_SKIPPED = {
    "--c": (0, "the same command resumes"),
    "--chill": (0, "references without a prediction are listed, and not scored"),
    "--continue_training": (0, "the same command resumes"),
    "--clean": (0, "`plan` takes the fingerprint of the files as they are"),
    "--disable_checkpointing": (0, "one checkpoint is kept, which every epoch replaces"),
    "--disable_progress_bar": (0, "bars are shown on a terminal only"),
    "--no_overwrite": (0, "`select` keeps the predictions that exist"),
    "--no_pbar": (0, "bars are shown on a terminal only"),
    "--no_pp": (0, "`plan` preprocesses nothing; `preprocess` and `train` do"),
    "--not_on_device": (0, "what does not fit into the GPU's memory is computed in parts"),
    "-npp": (1, "the number of threads follows from the machine"),
    "-nps": (1, "the number of threads follows from the machine"),
    "--npz": (0, "`select` computes the probabilities that it needs"),
    "-prev_stage_predictions": (1, "the first stage of a cascade is predicted too"),
    "--use_compressed": (0, "compressed cases are unpacked where that is faster"),
    "--verify_dataset_integrity": (0, "`plan` always checks the dataset"),
}
_PLANS = (
    "nnUNetPlans",
    "`nnlite plan DATA --preset {preset}` or `nnlite train ... --recipe {preset}` makes such plans, and "
    "`nnlite predict -m MODEL` chooses a model.",
)
_CLASSES = "Nothing is chosen by the name of a class: normalization and resampling are fields of plans.json."
# an option of nnU-Net that something else does here: its default, which changes nothing, and what does it
_ANSWERS = {
    "-djfile": ("", _ORDER),
    "-f": ("", "All folds are taken. `nnlite predict -f 0 1` chooses some; so does a copy of the model's folder with "
           "only these."),
    "-fpe": ("DatasetFingerprintExtractor", _CLASSES),
    "-overwrite_plans_name": ("nnUNetPlans", "A workspace has one plan of a dataset; `-w FOLDER` takes another one."),
    "-p": _PLANS,
    "-pfile": ("", _ORDER),
    "-pl": ("ExperimentPlanner", "Give `nnlite plan DATA --preset {preset}`."),
    "-plans_name": _PLANS,
    "-preprocessor_name": ("DefaultPreprocessor", _CLASSES),
    "-tr": ("nnUNetTrainer", "What a trainer class changes is a setting: `nnlite train ... --epochs 100`, "
            "`--set loss.top_k=1` or `--recipe FILE.toml`; `nnlite predict -m MODEL` chooses a model."),
    "--val": ("", "The same command without it scores a finished fold that has no scores."),
    "--val_best": ("", "A fold has one model, that of its last epoch."),
}  # fmt: skip
# arguments of ours that are options of nnU-Net
_WORDS = {"-c": "configuration", "-d": "data", "-f": "fold"}
# the values that an option takes after its first one, where the command has arguments too
_MORE = {
    "fold": r"\d+|all(-folds)?", "configuration": r"[23]d\w*", "configurations": r"[23]d\w*", "spacing": r"[\d.]+",
    "settings": r"\w+\.\w+=.*", "at": r"\d+",
}  # fmt: skip
_RESENC = re.compile(r"nnUNet(?:Planner)?ResEnc(?:UNet)?(M|L|XL)(?:Plans)?")  # plans and planners of nnU-Net
_EPOCHS = re.compile(r"nnUNetTrainer_(\d+)epochs?")
# a command of nnU-Net, without nnUNetv2_: what does it here
_PREDICTS = "`nnlite predict` does it: it ensembles, and applies the postprocessing that `nnlite select` chose."
_COMMANDS = {
    "accumulate_crossval_results": "`nnlite select` does it.",
    "apply_postprocessing": _PREDICTS,
    "convert_MSD_dataset": "`nnlite plan` reads these datasets as they are.",
    "convert_old_nnUNet_dataset": "`nnlite plan` reads these datasets as they are.",
    "determine_postprocessing": "`nnlite select` does it.",
    "download_pretrained_model_by_url": "Download the zip, then `nnlite import MODEL.zip`.",
    "ensemble": _PREDICTS,
    "evaluate_folder": "`nnlite evaluate PREDICTIONS REFERENCES` does it.",
    "evaluate_simple": "`nnlite evaluate PREDICTIONS REFERENCES` does it.",
    "export_model_to_zip": "`nnlite export MODEL.zip` does it.",
    "extract_fingerprint": "`nnlite plan DATA` does it.",
    "find_best_configuration": "`nnlite select` does it.",
    "install_pretrained_model_from_zip": "`nnlite import MODEL.zip` does it.",
    "move_plans_between_datasets": "`nnlite plan DATA --plans plans.json` does it.",
    "plan_and_preprocess": "`nnlite plan DATA` does it, and `nnlite preprocess` or `nnlite train` preprocesses.",
    "plan_experiment": "`nnlite plan DATA` does it.",
    "plot_overlay_pngs": "`nnlite report` and `nnlite view CASE` do it.",
    "predict": "`nnlite predict -i IMAGES -o OUT` does it.",
    "predict_from_modelfolder": "`nnlite predict -i IMAGES -o OUT -m FOLDER` does it.",
    "preprocess": "`nnlite preprocess` does it.",
    "train": "`nnlite train` does it.",
}
_DATASET = re.compile(r"\d+|(Task|Dataset)\d+\w*")  # an id, or a name of nnU-Net
_CHECKPOINT = re.compile(r"checkpoint_(\w+)\.pth")


def refuse_command(name: str, arguments: Sequence[str]) -> None:
    """Say what does here what a command of nnU-Net does, with the dataset or the two folders that were typed.

    Raises
    ------
    UserError
        The name is one of nnU-Net's commands, with or without nnUNetv2_.
    """
    if answer := _COMMANDS.get(name.removeprefix("nnUNetv2_")):
        typed = dict(pairwise(arguments))
        if data := typed.get("-d") or next((word for word in arguments if _DATASET.fullmatch(word)), None):
            answer = answer.replace("DATA", data)
        if len(arguments) > 1 and not any(word.startswith("-") for word in arguments[:2]):
            answer = answer.replace("PREDICTIONS REFERENCES", shlex.join((arguments[1], arguments[0])))
        raise UserError(f"{name} is a command of nnU-Net", fix=answer)


def translate_arguments(command: Any, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command with those of nnU-Net as ours: first words, then options.

    Parameters
    ----------
    command : click.Command
        The command; its own options keep their meaning.
    arguments : sequence of str
        What was typed after its name.

    Raises
    ------
    UserError
        An option of nnU-Net is something else here.
    """
    own = {flag: p for p in command.params for flag in (*p.opts, *p.secondary_opts) if p.param_type_name == "option"}
    places = {p.name: p.nargs for p in command.params if p.param_type_name == "argument"}
    left, options, words, folds, rest = deque(arguments), list[str](), list[str](), list[str](), list[str]()
    n_required, spare = sum(p.required for p in command.params if p.name in places), 0
    while left:
        word = left.popleft()
        typed, equals, value = word.partition("=")
        name = typed if typed in own else _OURS.get(typed, typed)
        if word == "--":
            rest = [word, *left]
            break
        has_values = name in own and not own[name].is_flag
        if equals and (has_values or name in _SKIPPED or name in _ANSWERS or _WORDS.get(name) in places):
            left.appendleft(value)
        if has_values:
            given = _with_values(name, own[name], left, has_words=bool(places))
            options += given
            spare = len(options) if len(given) > 2 and own[name].multiple and name != "--set" else spare
        elif _WORDS.get(name) in places:
            (folds if name == "-f" else words).extend(_take(left, 1, _MORE.get(_WORDS[name])))
        elif name in _SKIPPED:
            n_values, reason = _SKIPPED[name]
            _take(left, n_values)
            log.info(f"{name} is skipped: {reason}")
        elif name in _ANSWERS:
            options += _answered(name, left, own, command.name)
        elif word.startswith("-") and word != "-":
            options.append(word if name == typed else name)
        else:
            words.append(word)
    words += [",".join(folds)] if folds else []
    if len(words) < n_required and spare:  # the last of several values is the argument
        words.append(options[spare - 1])
        del options[spare - 2 : spare]
    too_many = len(words) > sum(places.values()) and -1 not in places.values()
    takes_dataset = "-d" in own and "-d" not in options and next(iter(places), "configuration") == "configuration"
    if words and takes_dataset and (too_many or _DATASET.fullmatch(words[0])):
        options += ["-d", words.pop(0)]
    return [*words, *options, *rest]


def _with_values(name: str, option: Any, left: deque[str], has_words: bool) -> list[str]:
    """Return an option with its values, which are taken from `left`; once for each value if it may be repeated."""
    if option.multiple:
        values = _take(left, 1, _MORE.get(option.name) if has_words or option.name == "settings" else ".*")
        return [part for value in values for part in (name, value)] or [name]
    if name == "--save-probabilities" and (not left or left[0].startswith("-")):
        return [name, "all"]
    values = _take(left, option.nargs)
    return [name, *(_CHECKPOINT.sub(r"\1", value) if option.name == "checkpoint" else value for value in values)]


def _answered(name: str, left: deque[str], own: Mapping[str, Any], command: str) -> list[str]:
    """Return our options for one of `_ANSWERS`: none for its default, --epochs for a trainer with another number.

    Raises
    ------
    UserError
        It is another value.
    """
    default, answer = _ANSWERS[name]
    value = next(iter(_take(left)), "")
    if name == "-tr" and "--epochs" in own and (epochs := _EPOCHS.fullmatch(value)):
        log.info(f"{name} {value} is --epochs {epochs[1]}")
        return ["--epochs", epochs[1]]
    if default and value == default:
        log.info(f"{name} {value} is skipped: {'-m MODEL chooses a model' if '-m' in own else 'it is the default'}")
        return []
    size = _RESENC.fullmatch(value)
    preset = f"resenc_{size[1].lower()}" if size else "resenc_m|resenc_l|resenc_xl"
    what = f"`nnlite {command}` takes no {name}" if name in _WORDS else f"{name} is an option of nnU-Net"
    raise UserError(what, fix=answer.format(preset=preset))


def _take(left: deque[str], n: int = 1, more: str | None = None) -> list[str]:
    """Take n values from `left`, and those that follow and match `more`."""
    values = [left.popleft() for _ in range(min(n, len(left)))]
    while more and left and not left[0].startswith("-") and re.fullmatch(more, left[0]):
        values.append(left.popleft())
    return values
