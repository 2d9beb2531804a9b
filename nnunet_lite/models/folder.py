"""A model folder: what a run was made with, and whether a command goes on with it.

3d_fullres-cpu/  plans.json dataset.json   what was trained, with the settings' changes to the plan
                 run.json                  configuration, settings, seed, versions
                 fold_0/                   see loop.py
"""

from __future__ import annotations

import math
import platform
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.errors import Busy, UserError
from nnunet_lite.files import locked, must_be_known, read_json, understood, write_json, write_text
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, differences
from nnunet_lite.workspace import Paths

FORMAT = "nnlite-model-1"
MODEL = "model.safetensors"  # its presence says that a fold is finished
VALIDATION = "validation"  # in a fold's folder: its held-out cases, predicted and scored
SUMMARY = "summary.json"  # the scores, in that folder
_OLD = "old_"
_N_FOLDS = 5  # by default; fewer cases are trained without folds
# changing these between two calls of `train` does not make it another run
_INCIDENTAL = (
    "training.workers", "training.cache", "training.compile", "training.tensorboard", "training.limit_validation",
    "inference.",
)  # fmt: skip
_LENGTH = ("training.epochs", "training.time_limit")


def exclusive(folder: Path) -> AbstractContextManager[None]:
    """Only one process at a time trains in a folder.

    Raises
    ------
    Busy : another one does.
    """

    def refuse() -> None:
        raise Busy("another process is training here", folder, "Wait for it, or stop it.") from None

    return locked(folder, refuse)


def open_run(
    folder: Path,
    plan: Plan,
    dataset: Dataset,
    configuration: str,
    settings: Settings,
    force: bool = False,
    lengthen: Collection[str] = (),
    previous: str | None = None,
) -> int:
    """Make a model folder, or make sure that the one that is there was made with the same plan and settings.

    `lengthen` names the settings that may make the run longer. `force` takes over other changed settings too, if the
    network stays and no fold is finished with the old ones. `previous` is the name of the model folder of a cascade's
    first stage.

    Returns
    -------
    The seed of the run: the one that was set, else one drawn when the run began.

    Raises
    ------
    UserError : the folder holds a run with other settings or another plan; lists the differences.
    """
    with locked(folder, lambda: None):  # folds that are begun at once draw one seed
        return _open_run(folder, plan, dataset, configuration, settings, force, lengthen, previous)


def _open_run(
    folder: Path,
    plan: Plan,
    dataset: Dataset,
    configuration: str,
    settings: Settings,
    force: bool,
    lengthen: Collection[str],
    previous: str | None,
) -> int:
    file = folder / "run.json"
    if file.is_file():
        run, changes = read_run(folder), accepted_changes(folder, plan, configuration, settings, force, lengthen)
        old = Settings.model_validate(run["settings"])
        unheard = [change for change in differences(old, settings) if change.startswith("inference.")]
        if unheard and not changes:
            log.warn(f"{folder}: validation goes by the settings that the run began with, without "
                     f"{'; '.join(unheard)}; give them to `nnlite predict`")  # fmt: skip
        if changes:
            log.info(f"{folder}: goes on with {'; '.join(changes)}")
            write_text(folder / "plans.json", plan.to_json())
            history = [*run.get("changed", []), {"when": _now(), "changes": changes}]
            if settings.training.seed not in (None, old.training.seed):
                run["seed"] = settings.training.seed
            write_json(file, {**run, "settings": settings.model_dump(mode="json"), "changed": history})
        return int(run["seed"])
    seed = secrets.randbelow(2**31) if settings.training.seed is None else settings.training.seed
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "plans.json", plan.to_json())
    write_json(folder / "dataset.json", _about(dataset))
    run = {"format": FORMAT, "configuration": configuration, "seed": seed, "settings": settings.model_dump(mode="json")}
    run |= {} if previous is None else {"previous": previous}
    write_json(file, {**run, "began": _now(), "versions": versions()})
    return seed


def accepted_changes(
    folder: Path,
    plan: Plan,
    configuration: str,
    settings: Settings,
    force: bool = False,
    lengthen: Collection[str] = (),
    anew: str | None = None,
) -> list[str]:
    """What `open_run` would change about a model folder that is there; nothing is written.

    `anew` is the folder of a fold that is to be begun anew, so that it binds nothing.

    Raises
    ------
    UserError : as `open_run`.
    """
    old_plan, old = Plan.read(folder / "plans.json"), Settings.model_validate(read_run(folder)["settings"])
    changes = [change for change in differences(old, settings) if not change.startswith(_INCIDENTAL)]
    told = [change for change in changes if change.partition(":")[0] in lengthen]
    longer = told if _is_longer(length(old), length(settings)) else []
    if not old_plan.trains_as(plan) and len(changes) == len(longer):
        changes = [*changes, "the plan"]
    if len(changes) > len(longer):
        _refuse_changes(folder, changes, old_plan, plan, configuration, force)
        _refuse_finished(folder, changes, settings, anew)
    return changes


def read_run(folder: Path) -> dict[str, Any]:
    """The run.json of a model folder.

    Raises
    ------
    UserError : there is none, or it is of another format or lacks what every run has.
    """
    file = folder / "run.json"
    if not file.is_file():
        fix = models_near(folder) or "Train one with `nnlite train`."
        raise UserError("is no model folder (no run.json)", folder, fix)
    with understood(file):
        run = dict(read_json(file))
        must_be_known(str(run["format"]), FORMAT, file)
        Settings.model_validate(run["settings"])
        return {**run, "configuration": str(run["configuration"]), "seed": int(run["seed"])}


def is_model(folder: Path) -> bool:
    """Whether a folder is a model folder, ours or nnU-Net's."""
    theirs = (folder / "plans.json").is_file() and any(folder.glob("fold_*"))
    return theirs or (folder / "run.json").is_file()


def models_near(folder: Path) -> str:
    """Which model folder may be meant by one that is none, as a full sentence; "" where none is near."""
    if is_model(folder.absolute().parent):
        return f"Give {folder.parent}, the model folder."
    inside = [path.name for path in sorted(folder.iterdir()) if is_model(path)] if folder.is_dir() else []
    return f"Give a model folder in it: {', '.join(inside)}." if inside else ""


def told_lengths(changes: Mapping[str, Any] | None) -> frozenset[str]:
    """The settings among some changes that say how long a run is."""
    return frozenset(_LENGTH).intersection(changes or ())


def _is_longer(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether nothing that ends a run comes earlier than before; both as `length` gives them."""
    return bool(
        after["epochs"] >= before["epochs"] and (after["time_limit"] or math.inf) >= (before["time_limit"] or math.inf)
    )


def _refuse_changes(folder: Path, changes: list[str], old: Plan, new: Plan, configuration: str, force: bool) -> None:
    """Refuse to go on with other settings, unless they are forced and the weights still fit.

    Raises
    ------
    UserError : they are not, or the weights do not.
    """
    what = f"was begun with other settings: {'; '.join(changes)}"
    if not force:
        raise UserError(
            what, folder, f"Repeat the old settings to go on, {_beside(folder)}; --force goes on with the new ones."
        )
    same = (
        old.configuration(configuration).network == new.configuration(configuration).network
        and old.n_inputs(configuration) == new.n_inputs(configuration)
        and old.labels.n_channels == new.labels.n_channels
    )
    if not same:
        fix = _beside(folder)
        raise UserError(f"{what}; that is another network, which cannot go on from these weights", folder,
                        f"{fix[0].upper()}{fix[1:]}.")  # fmt: skip


def _beside(folder: Path) -> str:
    """What to do where a model folder cannot be gone on with. --restart of one fold of several leaves the others."""
    anew = "`all-folds --restart`" if len(list(folder.glob("fold_*"))) > 1 else "--restart"
    return f"use another --name to train beside it, or {anew} to begin anew"


def _refuse_finished(folder: Path, changes: list[str], settings: Settings, anew: str | None) -> None:
    """Refuse settings that a finished fold was not trained with, unless it goes on with them or is begun anew.

    Raises
    ------
    UserError : there is a fold that would stay as it is.
    """
    finished = [fold for fold in sorted(folder.glob("fold_*")) if is_finished(fold) and fold.name != anew]
    done = [fold.name for fold in finished if not _goes_on(fold, settings)]
    if done:
        what = f"has finished folds ({', '.join(done)}), of which this would not be true: {'; '.join(changes)}"
        raise UserError(
            what, folder, f"Make them longer too (--epochs, --time-limit) to go on from there; or {_beside(folder)}."
        )


def _goes_on(fold_folder: Path, settings: Settings) -> bool:
    """Whether the settings make a finished fold longer, and its checkpoint is there to go on from."""
    from nnunet_lite.models.checkpoint import CHECKPOINT, read_state

    before, after = read_state(fold_folder / MODEL).get("length"), length(settings)
    there = (fold_folder / CHECKPOINT).is_file()
    return there and before not in (None, after) and _is_longer(before, after)


def length(settings: Settings) -> dict[str, float | None]:
    """What a finished run was trained for: asked for more, it goes on."""
    return {"epochs": settings.training.epochs, "time_limit": settings.training.time_limit}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def model_folders(paths: Paths) -> list[Path]:
    """The model folders of a data set, without those that were set aside."""
    return sorted(file.parent for file in paths.models.glob("*/run.json") if not file.parent.name.startswith(_OLD))


def model_folder(paths: Paths, name: str) -> Path:
    """The folder of a model.

    Raises
    ------
    UserError : the name is not that of a folder inside models/.
    """
    if Path(name).name != name or name.startswith((".", _OLD)):
        raise UserError(f"{name!r} is no name for a model folder", fix="Use letters, digits, '-' and '_'.")
    return paths.models / name


def is_finished(fold_folder: Path) -> bool:
    """Whether there is a model, be it of a run that was made longer since."""
    return (fold_folder / MODEL).is_file()


def is_complete(fold_folder: Path, settings: Settings) -> bool:
    """Whether a fold is trained for as long as the settings say.

    Raises
    ------
    UserError : it was trained for less, and the checkpoint from which it could go on is gone.
    """
    from nnunet_lite.models.checkpoint import CHECKPOINT, read_state

    if not is_finished(fold_folder):
        return False
    if read_state(fold_folder / MODEL).get("length") in (None, length(settings)):  # what is imported has none
        return True
    if not (fold_folder / CHECKPOINT).is_file():
        raise UserError("was trained for less and cannot go on: its checkpoint is gone", fold_folder, "Use --restart.")
    return False


def refuse_lost_extension(fold_folder: Path, settings: Settings) -> None:
    """Make sure, before anything is written, that a finished fold which is asked for more can go on.

    Raises
    ------
    UserError : its checkpoint is gone.
    """
    from nnunet_lite.models.checkpoint import read_state

    before = read_state(fold_folder / MODEL).get("length") if is_finished(fold_folder) else None
    if before is not None and _is_longer(before, length(settings)):
        is_complete(fold_folder, settings)


def is_begun(fold_folder: Path) -> bool:
    """Whether there is something to go on from."""
    from nnunet_lite.models.checkpoint import CHECKPOINT

    return is_finished(fold_folder) or (fold_folder / CHECKPOINT).is_file()


def require_begun(fold_folder: Path, restart: object) -> None:
    """For --resume: make sure that there is something to go on from.

    Raises
    ------
    UserError : there is not, or --restart is asked for too.
    """
    if restart:
        raise UserError("--resume and --restart exclude each other")
    if not is_begun(fold_folder):
        raise UserError("there is nothing to resume", fold_folder, "Leave out --resume to begin.")


def trained_folds(folder: Path) -> list[str]:
    """The finished folds of a model folder; "all" only where there is no other."""
    found = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{MODEL}"))
    return [fold for fold in found if fold != "all"] or found


def validation_dice(folder: Path, fold: str) -> float | None:
    """Return the foreground Dice of the held-out cases of a fold; None if it was not validated."""
    file = folder / f"fold_{fold}" / VALIDATION / SUMMARY
    if not file.is_file():
        return None
    with understood(file, "Delete it: `nnlite train` makes it again."):
        return read_json(file)["foreground_mean"]["Dice"]


def first_training(paths: Paths) -> str:
    """The command that trains a first model of a planned data set."""
    plan = Plan.read(paths.plans)
    configuration = "3d_fullres" if "3d_fullres" in plan.configurations else next(iter(plan.configurations))
    return f"nnlite train {configuration} {0 if plan.n_cases >= _N_FOLDS else 'all'}{paths.option}"


def other_folds(folder: Path, fold: str) -> list[str]:
    """The folds of a model folder beside this one."""
    return sorted(path.name for path in folder.glob("fold_*") if path.name != f"fold_{fold}")


def set_aside(folder: Path) -> Path | None:
    """Move a model or fold folder, or a file, out of the way; nothing is deleted.

    Raises
    ------
    Busy : a fold in it is being trained.
    """
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{_OLD}{folder.name}_{number}")).exists():
        number += 1
    with ExitStack() as stack:
        for fold in (folder, *folder.glob("fold_*")):
            if fold.name.startswith("fold_"):
                stack.enter_context(exclusive(fold))
        shutil.move(folder, target)
    return target


def fold_seed(seed: int, fold: str) -> int:
    """A seed of its own for each fold, so that the networks of an ensemble do not all start alike."""
    number = int(fold) if fold.isdigit() else 1000
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    import torch

    return {
        "nnunet_lite": nnunet_lite.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _about(dataset: Dataset) -> dict[str, Any]:
    """The part of a data set's description that may travel with a model: no paths, no case ids."""
    order = dataset.labels.region_order
    return {
        "name": dataset.name,
        "channel_names": {str(i): name for i, name in enumerate(dataset.channels)},
        "labels": dataset.labels.to_json(),
        **({"regions_class_order": list(order)} if order else {}),
        "file_ending": dataset.file_ending,
        "numTraining": len(dataset.cases),
    }
