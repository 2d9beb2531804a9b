"""A model folder: what a run was made with, and whether a command may resume it.

3d_fullres-cpu/  plans.json dataset.json   what was trained, with the settings' changes to the plan
                 run.json                  configuration, settings, seed, versions
                 fold_0/                   checkpoint, metrics and weights, see training/loop.py

The rule for resuming: the same settings, or more epochs or time; `force` accepts other settings. A fold that has not
begun may have any length. A folder in which nothing was trained yet accepts anything.
"""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors import safe_open

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset, summarize_dataset
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError
from nnunet_lite.files import (
    hash_of,
    is_folder_name,
    is_locked,
    locked,
    must_be_known,
    must_fit,
    read_json,
    scratch,
    understood,
    write_json,
    write_text,
)
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, differences, load_settings, time_text, with_changes
from nnunet_lite.system import has_no_gpu
from nnunet_lite.workspace import Paths

FORMAT = "nnlite-model-1"
MODEL = "model.safetensors"  # a fold that has it is finished
CHECKPOINT = "checkpoint.safetensors"
VALIDATION = "validation"  # in a fold's folder: its held-out cases, predicted and scored
RECORD = "predictions.json"  # in a folder of label maps, `VALIDATION` too: what predicted them; inference/record.py
QUALITY = "quality.json"  # in a model folder what `nnlite select` calibrated, in a folder of label maps what to expect
CASES = "cases.json"  # in a fold's folder: how many cases it was trained on, and hashes of their ids and files
HELD_OUT = "held_out_images"  # in that file: hashes of the first images of the held-out cases
SEEN = "seen"  # hashes of the first images that its initial weights and its teachers have seen
LEARNED = "learned_from"  # teachers and first stage of a cascade: model -> fold -> fingerprint of its weights
PREVIEW = "preview.png"  # augmented samples, in a fold's folder
SUMMARY = "summary.json"  # the scores, in that folder
_RUN = "run.json"
_MODEL_FILES = {".lock", _RUN, "plans.json", "dataset.json"}  # besides the folders of its folds
_FIRST_FILES = {".lock", CASES, "metrics.jsonl", "metrics.csv"}  # of a fold before its first checkpoint
OLD = "old_"  # starts the names of folders that were set aside
EXPECTED = "A model is a folder with run.json, or with plans.json and fold_0/checkpoint_final.pth of nnU-Net, or a zip."
Checkpoint = Literal["final", "best"]  # of nnU-Net: after the last epoch, and after the epoch with the best validation
_N_FOLDS = 5  # by default; fewer cases are trained without folds
# settings that may differ between two calls of `train` without making it another run
_INCIDENTAL = (
    "training.workers", "training.cache", "training.compile", "training.logger", "training.limit_validation",
    "inference.",
)  # fmt: skip
_LENGTH = ("training.epochs", "training.time_limit")
_OPTIONS = ("epochs", "iterations", "time_limit", "batch_size", "seed", "init")  # settings of training with an option
_FINGERPRINT_BYTES = 1 << 22  # of a file of weights: its header says how they were trained, and all weights differ


# ------------------------------------------------------------------------------------------------ begin and resume


def open_run(
    folder: Path,
    plan: Plan,
    dataset: Dataset,
    configuration: str,
    settings: Settings,
    *,
    fold: str = "",
    force: bool = False,
    previous: str | None = None,
) -> int:
    """Create a model folder, or make sure that an existing one may be resumed with this plan and these settings.

    Parameters
    ----------
    folder : Path
        The model folder.
    plan : Plan
        What is trained, see `training.job.configure_plan`.
    dataset : Dataset
        Described in dataset.json without paths and case ids.
    configuration : str
        Of the plan.
    settings : Settings
        Of the run.
    fold : str
        The fold that is trained, such as "0".
    force : bool
        Accept other settings, as `check_resume` says.
    previous : str or None
        Name of the model folder of a cascade's first stage.

    Returns
    -------
    int
        The seed of the run: the one in the settings, otherwise one drawn when the run began.

    Raises
    ------
    UserError
        As `check_resume`.
    """
    with locked(folder, "opening a run"):  # folds that begin at the same time draw one seed
        file = folder / _RUN
        if not (file.is_file() and _is_bound(folder, plan, settings, fold)):
            seed = secrets.randbelow(2**31) if settings.training.seed is None else settings.training.seed
            new = {"configuration": configuration, "seed": seed, "settings": settings.model_dump(mode="json")}
            new |= {} if previous is None else {"previous": previous}
            write_description(folder, plan, summarize_dataset(dataset), new)
            return seed
        run = read_run(folder)
        changes = check_resume(folder, plan, configuration, settings, fold, force)
        old = Settings.model_validate(run["settings"])
        ignored = [change for change in differences(old, settings) if change.startswith("inference.")]
        if Plan.read(folder / "plans.json").labels != plan.labels:  # other names of labels
            write_json(folder / "dataset.json", summarize_dataset(dataset))
            write_text(folder / "plans.json", plan.to_json())
        if changes:
            log.info(f"{folder}: resumes with {'; '.join(changes)}")
            write_text(folder / "plans.json", plan.to_json())
            if settings.training.seed not in (None, old.training.seed):
                run["seed"] = settings.training.seed
            history = [*run.get("changed", []), {"when": now_as_text(), "changes": changes}]
            write_json(file, {**run, "settings": settings.model_dump(mode="json"), "changed": history})
        elif ignored:
            log.warn(f"{folder}: validation uses the settings that the run began with, without {'; '.join(ignored)}; "
                     "give them to `nnlite predict`")  # fmt: skip
        return int(run["seed"])


def _is_bound(folder: Path, plan: Plan, settings: Settings, fold: str) -> bool:
    """Whether run.json counts: it fits, or a fold was trained with it, or another process trains another fold now."""
    old = Settings.model_validate(read_run(folder)["settings"])
    if old == settings and Plan.read(folder / "plans.json") == plan:
        return True
    folds = folder.glob("fold_*")
    return any(is_begun(path) or (path.name != f"fold_{fold}" and is_locked(path)) for path in folds)


def check_resume(
    folder: Path,
    plan: Plan,
    configuration: str,
    settings: Settings,
    fold: str = "",
    force: bool = False,
    restart: bool = False,
) -> list[str]:
    """Return what `open_run` would change in an existing model folder; nothing is written.

    Parameters
    ----------
    folder, plan, configuration, settings, fold, force
        As for `open_run`.
    restart : bool
        The fold starts again, so what is left of it does not matter.

    Returns
    -------
    list of str
        "key: old -> new" for each setting that counts.

    Raises
    ------
    UserError
        The settings differ in more than a larger length and `force` is not given, or the weights do not fit any more,
        or a finished fold would keep weights of other settings. Lists the differences.
    """
    if not _is_bound(folder, plan, settings, fold):
        return []
    old_plan, old = Plan.read(folder / "plans.json"), Settings.model_validate(read_run(folder)["settings"])
    changes = [change for change in differences(old, settings) if not change.startswith(_INCIDENTAL)]
    only_length = all(change.partition(":")[0] in _LENGTH for change in changes)
    same_plan = old_plan.trains_as(plan)
    may_be_shorter = fold != "" and not is_begun(folder / f"fold_{fold}")
    if (
        same_plan
        and only_length
        and (may_be_shorter or not changes or _is_longer(run_length(old), run_length(settings)))
    ):
        return changes
    if only_length and not same_plan:
        why = few(old_plan.differences(plan))
        if old_plan.n_cases != plan.n_cases:
            why = f"{old_plan.n_cases} cases -> {plan.n_cases}; see --exclude"
        changes.append(f"the plan ({why})")

    several = len(list(folder.glob("fold_*"))) > 1  # --restart of one fold keeps the others
    restarting = "`all-folds --restart`" if several else "--restart"
    elsewhere = f"use another --name to keep both, or {restarting} to begin again"
    what = f"was trained with other settings: {'; '.join(changes)}"
    if not force:
        forcing = "" if settings.training.teachers else "; --force resumes with the new ones"  # distill has no --force
        raise UserError(what, folder, f"Repeat the old settings to resume, {elsewhere}{forcing}.")
    same_network = (
        old_plan.configuration(configuration).network == plan.configuration(configuration).network
        and old_plan.n_inputs(configuration) == plan.n_inputs(configuration)
        and old_plan.labels.n_channels == plan.labels.n_channels
        and (old.network.factory is None) == (settings.network.factory is None)
    )
    if not same_network:
        what += "; that is another network, which cannot resume from these weights"
        raise UserError(what, folder, f"{elsewhere[0].upper()}{elsewhere[1:]}.")
    begins = restart or (fold and _can_extend(folder / f"fold_{fold}", settings))
    names = other_folds(folder, fold if begins else "")
    if finished := [name for name in names if is_finished(folder / name)]:
        what = f"has finished folds ({', '.join(finished)}), which were trained without {'; '.join(changes)}"
        fix = f"Add --epochs or --time-limit to resume a finished fold; or {elsewhere}."
        raise UserError(what, folder, fix)
    return changes


def run_length(settings: Settings) -> dict[str, float | None]:
    """Return what decides how long a run is; it is stored with the weights, so that more of it resumes the run."""
    return {"epochs": settings.training.epochs, "time_limit": settings.training.time_limit}


def _is_longer(before: dict[str, float | None], after: dict[str, float | None]) -> bool:
    """Whether a run is to be longer: neither fewer epochs nor less time. A limit that is dropped is not more time."""
    pairs = [(before[key], after[key]) for key in ("epochs", "time_limit")]
    return before != after and all(old == new or (old is not None and new is not None and new > old)
                                   for old, new in pairs)  # fmt: skip


def _can_extend(fold_folder: Path, settings: Settings) -> bool:
    """Whether a finished fold is to be longer, and has the checkpoint for it."""
    before = read_weights_header(fold_folder / MODEL).get("length") if is_finished(fold_folder) else None
    longer = before is not None and _is_longer(before, run_length(settings))
    return longer and (fold_folder / CHECKPOINT).is_file()


def fold_seed(seed: int, fold: str) -> int:
    """Return a seed of its own for each fold, so that the networks of an ensemble start differently."""
    number = int(fold) if fold.isdigit() else 1000
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def now_as_text() -> str:
    """Return date and time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------------------- models and runs


def write_description(folder: Path, plan: Plan, dataset: dict[str, Any], run: dict[str, Any]) -> None:
    """Write plans.json, dataset.json and run.json of a new model.

    Parameters
    ----------
    folder : Path
        The model folder.
    plan : Plan
        What is trained.
    dataset : dict
        The content of dataset.json.
    run : dict
        The content of run.json, without format, date and the versions of what a result depends on.
    """
    write_text(folder / "plans.json", plan.to_json())
    write_json(folder / "dataset.json", dataset)
    write_json(folder / _RUN, {"format": FORMAT, **run, "began": now_as_text(), "versions": versions_in_use()})


def versions_in_use() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    versions = {"nnunet_lite": nnunet_lite.__version__, "python": platform.python_version()}
    return versions | {name: version(name) for name in ("torch", "numpy")}


def read_run(folder: Path) -> dict[str, Any]:
    """Return the run.json of a model folder.

    Raises
    ------
    UserError
        There is none, or it has another format or lacks what every run has.
    """
    file = folder / _RUN
    if not file.is_file():
        why = "no run.json" if folder.exists() else "it does not exist"
        raise UserError(f"is no model folder ({why})", folder, EXPECTED)
    with understood(file):
        run = dict(read_json(file))
        must_be_known(str(run["format"]), FORMAT, file)
        Settings.model_validate(run["settings"])
        return {**run, "configuration": str(run["configuration"]), "seed": int(run["seed"])}


def is_taken(out: Path, replace: bool = False) -> bool:
    """Whether the place of a new model folder is taken.

    Raises
    ------
    UserError
        It is, and `replace` is not set.
    """
    taken = out.exists() and (out.is_file() or any(out.iterdir()))
    if taken and not replace:
        fix = "Choose another --output, or delete it; `import` has --name and --replace, too."
        raise UserError("exists already", out, fix)
    return taken


@contextmanager
def new_model_folder(out: Path, replace: bool = False, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary folder that is moved to `out` at the end of the block, and deleted if the block fails.

    Parameters
    ----------
    out : Path
        The new folder.
    replace : bool
        Set an existing folder aside instead of refusing.
    needed : int, optional
        Bytes that will be written, for the message if they do not fit.

    Raises
    ------
    UserError
        `out` exists already, and `replace` is not set.
    """
    taken = is_taken(out, replace)
    with scratch(out.absolute().parent) as temporary:
        partial = temporary / out.name
        partial.mkdir()
        with must_fit(out, partial, needed):
            yield partial
        if taken:
            log.info(f"the previous model is kept in {set_aside(out)}")
        partial.replace(out)


def is_model(folder: Path) -> bool:
    """Whether a folder is a model folder, ours or nnU-Net's."""
    nnunet = (folder / "plans.json").is_file() and any(folder.glob("fold_*/"))  # not the fold_0.onnx of an export
    return nnunet or (folder / _RUN).is_file()


def stage_path(folder: Path, run: Mapping[str, Any]) -> Path | None:
    """Return the model folder of a cascade's first stage, next to that of the second; None for other models.

    Parameters
    ----------
    folder : Path
        The model folder of the second stage.
    run : mapping
        Its run.json.
    """
    return folder.absolute().with_name(Path(run["previous"]).name) if run.get("previous") else None


def model_folders(paths: Paths) -> list[Path]:
    """Return the model folders of a dataset, without those that were set aside."""
    return sorted(file.parent for file in paths.models.glob(f"*/{_RUN}") if not file.parent.name.startswith(OLD))


def model_folder(paths: Paths, name: str) -> Path:
    """Return the folder of a model.

    Raises
    ------
    UserError
        The name is not that of a folder inside models/. One that an earlier version took is, if the folder exists.
    """
    folder = paths.models / name
    is_legal = is_folder_name(name) or folder in model_folders(paths)
    if not is_legal or name.startswith(OLD) or {*"+,"} & {*name}:  # these separate names
        raise UserError(f"{name!r} is no name for a model folder", fix="Use letters, digits, '-' and '_'.")
    return folder


def first_training(paths: Paths, configuration: str | None = None) -> str:
    """Return the command that trains a first model (of a configuration) of a planned dataset on this machine."""
    plan = Plan.read(paths.plans)
    wanted = (name for name in (configuration, "3d_fullres") if name in plan.configurations)
    configuration = next(wanted, next(iter(plan.configurations)))
    recipe = " --recipe cpu" if has_no_gpu() else ""
    fold = 0 if plan.n_cases >= _N_FOLDS or paths.splits.is_file() else "all"  # --folds 3 makes folds of three cases
    return f"nnlite train {configuration} {fold}{recipe}{paths.option}"


def training_command(folder: Path, fold: str, changes: Mapping[str, Any] | None = None) -> str:
    """Return the command that trains a fold with the settings that its model has.

    Parameters
    ----------
    folder : Path
        The model folder.
    fold : str
        Such as "0".
    changes : mapping, optional
        Key to value of settings that are to be others, such as a longer run.
    """
    run = read_run(folder)
    settings = with_changes(Settings.model_validate(run["settings"]), changes or {})
    try:
        base, recipe = load_settings(settings.recipe), settings.recipe
        if base.training.epochs != settings.training.epochs:  # --epochs drops the recipe's time limit
            base = load_settings(recipe, {"training.epochs": base.training.epochs})
    except UserError:  # a recipe of the user, whose file may be anywhere
        base, recipe = Settings.model_validate(run["settings"]), f"{settings.recipe}.toml"
    words = ["nnlite", "train", run["configuration"], fold]
    words += ["--recipe", recipe] if recipe != "default" else []
    for key in (change.partition(":")[0] for change in differences(base, settings)):
        section, _, name = key.partition(".")
        value = settings.model_dump(mode="json")[section][name]
        text = value if isinstance(value, str) else json.dumps(value)
        text = ("none" if value is None else time_text(value)) if name == "time_limit" else text
        has_option = section == "training" and name in _OPTIONS
        words += [f"--{name.replace('_', '-')}", text] if has_option else ["--set", f"{key}={text}"]
    words += [] if folder.name == f"{run['configuration']}-{settings.recipe}" else ["--name", folder.name]
    return shlex.join(words)


# ------------------------------------------------------------------------------------------------------------ folds


def read_weights_header(file: Path) -> dict[str, Any]:
    """Return the JSON in the header of a checkpoint or model file, without its tensors.

    Raises
    ------
    UserError
        There is no such file, or it is no safetensors file.
    """
    try:
        with safe_open(file, "np") as opened:
            return dict(json.loads((opened.metadata() or {}).get("state", "{}")))
    except FileNotFoundError:
        raise UserError("no such file", file) from None
    except Exception as error:  # safetensors raises its own SafetensorError, which has no public name
        raise UserError(f"is no safetensors file ({error})", file, "Get it again, or train with --restart.") from None


def is_finished(fold_folder: Path) -> bool:
    """Whether a fold has a model, even if the run was made longer since."""
    return (fold_folder / MODEL).is_file()


def is_at_end(fold_folder: Path) -> bool:
    """Whether a fold has a model, and was not resumed since then for a longer run."""
    if not is_finished(fold_folder):
        return False
    checkpoint = fold_folder / CHECKPOINT
    reached = read_weights_header(checkpoint) if checkpoint.is_file() else {}
    epochs = read_weights_header(fold_folder / MODEL).get("epochs") or 0
    return (reached.get("epoch", 0), reached.get("iteration", 0)) <= (epochs, 0)


def is_begun(fold_folder: Path) -> bool:
    """Whether a fold has something to resume from."""
    return is_finished(fold_folder) or (fold_folder / CHECKPOINT).is_file()


def remove_unbegun(fold_folder: Path) -> None:
    """Delete what was written of a fold that has nothing to resume from, and its model folder if that was all in it.

    A folder that contains anything else than the files of a beginning stays as it is.
    """
    if not is_begun(fold_folder):
        for folder, names in ((fold_folder, _FIRST_FILES), (fold_folder.parent, _MODEL_FILES)):
            files = list(folder.iterdir()) if folder.is_dir() else []
            if not {file.name for file in files} <= names:
                return
            for file in files:
                file.unlink(missing_ok=True)
            with suppress(OSError):  # another process has begun there
                folder.rmdir()


def is_complete(fold_folder: Path, settings: Settings) -> bool:
    """Whether a fold is trained for as long as the settings say.

    Raises
    ------
    UserError
        It was trained for less, and the checkpoint from which it could resume does not exist.
    """
    if not is_finished(fold_folder):
        return False
    length = read_weights_header(fold_folder / MODEL).get("length")
    if length in (None, run_length(settings)):  # an imported model has none
        return True
    if not (fold_folder / CHECKPOINT).is_file():
        raise UserError("was trained for less and cannot resume: its checkpoint is gone", fold_folder, "Use --restart.")
    return False


def is_nnunet(folder: Path) -> bool:
    """Whether nnU-Net wrote this model folder; one with a run.json is of nnlite."""
    if (folder / _RUN).is_file() or not (folder / "plans.json").is_file():
        return False
    return any(folder.glob("fold_*/checkpoint_*.pth"))


def nnunet_file(checkpoint: Checkpoint) -> str:
    """Return nnU-Net's file name of a checkpoint."""
    if checkpoint not in get_args(Checkpoint):
        raise UserError(f"there is no checkpoint {checkpoint!r}", fix='Give "final" or "best".')
    return f"checkpoint_{checkpoint}.pth"


def weight_files(folder: Path, checkpoint: Checkpoint = "final") -> dict[str, Path]:
    """Return the weights of each finished fold of a model folder; of nnU-Net's, the folds that have this checkpoint."""
    name = nnunet_file(checkpoint) if is_nnunet(folder) else MODEL
    return {path.parent.name.removeprefix("fold_"): path for path in sorted(folder.glob(f"fold_*/{name}"))}


def add_weights(digest: Any, file: Path) -> None:
    """Add a file of weights to a hash: its size and first megabytes, which differ between any two trainings."""
    digest.update(str(file.stat().st_size).encode())
    with file.open("rb") as content:
        digest.update(content.read(_FINGERPRINT_BYTES))


def weights_fingerprint(folder: Path, fold: str) -> str:
    """Hash the weights of a fold, of a cascade with those of its first stage; "" if there are none.

    Parameters
    ----------
    folder : Path
        The model folder.
    fold : str
        Name of the fold.
    """
    run = read_run(folder) if (folder / "run.json").is_file() else {}
    stages = filter(None, (folder, stage_path(folder, run)))
    digest = hashlib.sha256()
    for stage in stages:
        file = stage / f"fold_{fold}" / MODEL
        if not file.is_file():
            return ""
        add_weights(digest, file)
    return digest.hexdigest()[:16]


def warn_of_other_weights(fold_folder: Path, source: Path, learned: Mapping[str, str]) -> None:
    """Warn of weights from which a fold has learned, and which were trained again since.

    Parameters
    ----------
    fold_folder : Path
        Of the fold that has learned.
    source : Path
        The model folder of a teacher, or of the first stage of a cascade.
    learned : mapping of str to str
        Folds of that model, and the fingerprints that their weights had.
    """
    if changed := [fold for fold, weights in learned.items() if weights_fingerprint(source, fold) not in ("", weights)]:
        model, fold = fold_folder.parent, fold_folder.name.replace("_", " ")
        role = "its first stage" if read_run(model).get("previous") == source.name else "its teacher"
        what = f"{fold} of {model.name} learned from other weights of {source.name}, {role}"
        log.warn(f"{what} (fold {', '.join(changed)}); train it again with --restart to learn from the present ones")


def trained_folds(folder: Path, checkpoint: Checkpoint = "final") -> list[str]:
    """Return the folds to predict with: those of `weight_files`, fold "all" only if there is no other."""
    folds = list(weight_files(folder, checkpoint))
    return [fold for fold in folds if fold != "all"] or folds


def held_out_fingerprint(case_ids: Iterable[str]) -> dict[str, Any]:
    """Return the content of cases.json where only the held-out cases of a fold are known: their number and a hash.

    Parameters
    ----------
    case_ids : iterable of str
        Ids of the held-out cases, in any order.
    """
    ids = sorted(case_ids)
    return {"validation": len(ids), "held_out_sha256": hash_of(ids)}


def read_cases(fold_folder: Path) -> dict[str, Any]:
    """Return the cases.json of a fold; nothing if it has none."""
    file = fold_folder / CASES
    known = read_json(file) if file.is_file() else {}
    return known if isinstance(known, dict) else {}


def why_not_held_out(fold_folder: Path) -> str:
    """Return why the scores of a fold's held-out cases are too high: weights that it is made of have seen some.

    Returns
    -------
    str
        "fold 0 holds out 4 cases that ...", or nothing.
    """
    known = read_cases(fold_folder)
    with understood(fold_folder / CASES):
        n = len(set(known.get(SEEN, ())).intersection(known.get(HELD_OUT, ())))
    cases, fold = plural(n, "case"), fold_folder.name.replace("_", " ")
    return f"{fold} holds out {cases} that its initial weights or teachers have seen" if n else ""


def held_out_dice(folder: Path, folds: Iterable[str]) -> float | None:
    """Return the foreground Dice of the held-out cases of folds, as `select` and the report have it; None if unknown.

    Folds whose held-out cases were seen before do not count, see `why_not_held_out`.
    It is the mean over labels of their means over all cases: means of folds that lack a label cannot be averaged.
    """
    by_label, seen = defaultdict[str, list[float]](list), set[str]()
    for fold in (fold for fold in folds if not why_not_held_out(folder / f"fold_{fold}")):
        file = folder / f"fold_{fold}" / VALIDATION / SUMMARY
        with understood(file, "Delete it: `nnlite train` makes it again."):
            entries = read_json(file)["metric_per_case"] if file.is_file() else []
            metrics_of = {Path(entry["prediction_file"]).name: entry["metrics"] for entry in entries}
            for case in sorted(metrics_of.keys() - seen):
                for label, values in metrics_of[case].items():
                    if values["Dice"] is not None and isfinite(values["Dice"]):  # nnU-Net writes NaN
                        by_label[label].append(values["Dice"])
            seen |= metrics_of.keys()
    means = [sum(values) / len(values) for values in by_label.values()]
    return sum(means) / len(means) if means else None


def other_folds(folder: Path, fold: str) -> list[str]:
    """Return the folder names of all folds but one."""
    return sorted(path.name for path in folder.glob("fold_*") if path.name != f"fold_{fold}")


def lock_fold(fold_folder: Path) -> AbstractContextManager[None]:
    """Let only one process at a time train in a folder.

    Parameters
    ----------
    fold_folder : Path
        The folder of the fold.

    Raises
    ------
    Busy
        Another process trains there.
    """
    return locked(fold_folder, "training", wait=False)


def set_aside(folder: Path) -> Path | None:
    """Rename a model or fold folder, or a file, to old_..., and return its new path; nothing is deleted.

    Raises
    ------
    Busy
        A fold in it is being trained.
    """
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{OLD}{folder.name}_{number}")).exists():
        number += 1
    with ExitStack() as stack:
        for fold in (folder, *folder.glob("fold_*")):
            if fold.name.startswith("fold_"):
                stack.enter_context(lock_fold(fold))
        shutil.move(folder, target)
    return target
