"""What one call of `train` trains: `prepare_run` finds it out and refuses mistakes before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_lite.data.dataset import Dataset, stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.inference.first_stage import FirstStage, find_first_stage
from nnunet_lite.models.folder import SUMMARY, VALIDATION, check_resume, is_begun, is_complete, model_folder
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.planner import make_plan
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings
from nnunet_lite.training.finetune import adopt_plan, find_source
from nnunet_lite.training.job import configure_plan
from nnunet_lite.training.splits import ALL, DEFAULT_RULE, FoldRule, Split, read_split, refuse_other_cases
from nnunet_lite.workspace import Paths


@dataclass(frozen=True)
class TrainingRun:
    """One fold of a model: what is trained, on which cases, and where it goes.

    Parameters
    ----------
    paths, dataset : Paths, Dataset
        The planned dataset.
    plan, configuration, settings : Plan, str, Settings
        What is trained; the plan has the settings' batch, patch and network.
    split, rule : Split, FoldRule
        Its cases, and the options for folds.
    folder : Path
        The model folder.
    name : str or None
        Of the model folder, if the user gave one.
    first : FirstStage or None
        Of a cascade.
    device : str or None
        Where to train.
    """

    paths: Paths
    dataset: Dataset
    plan: Plan
    configuration: str
    settings: Settings
    split: Split
    rule: FoldRule
    folder: Path
    name: str | None
    first: FirstStage | None
    device: str | None

    @property
    def fold_folder(self) -> Path:
        return self.folder / f"fold_{self.split.name}"

    def is_done(self) -> bool:
        """Whether the fold is trained for as long as the settings say, and its held-out cases are scored."""
        scored = self.split.name == ALL or (self.fold_folder / VALIDATION / SUMMARY).is_file()
        return scored and is_complete(self.fold_folder, self.settings)

    def check_resume(self, force: bool = False, restart: bool = False) -> None:
        """Make sure that the model folder, if it exists, may be resumed with this plan, these settings and these cases.

        Parameters
        ----------
        force : bool
            Accept other settings.
        restart : bool
            This fold starts again, other folds stay.

        Raises
        ------
        UserError
            It may not.
        """
        refuse_other_cases(self.folder, self.split, self.paths.splits, restart=restart)
        if (self.folder / "run.json").is_file():
            check_resume(self.folder, self.plan, self.configuration, self.settings, self.split.name, force, restart)
        if not restart:
            is_complete(self.fold_folder, self.settings)


def prepare_run(
    paths: Paths,
    configuration: str,
    fold: str,
    settings: Settings,
    *,
    rule: FoldRule = DEFAULT_RULE,
    name: str | None = None,
    device: str | None = None,
    restart: bool = False,
) -> TrainingRun:
    """Find out what is to be trained, and refuse mistakes before anything is changed.

    Parameters
    ----------
    paths : Paths
        Of the planned dataset.
    configuration, fold : str
        Such as "3d_fullres" and "0".
    settings : Settings
        Of the run.
    rule : FoldRule
        For splits.json if that does not exist yet.
    name : str or None
        Of the model folder; default: CONFIGURATION-RECIPE.
    device : str or None
        Where to train.
    restart : bool
        The fold starts again.

    Raises
    ------
    UserError
        There is no such configuration or fold, or the settings do not fit the plan.
    """
    dataset = stored_dataset(paths.dataset)
    folder = model_folder(paths, name or f"{configuration}-{settings.recipe}")
    source_plan = _starting_plan(paths, configuration, fold, settings, folder, dataset.name, restart)
    plan = configure_plan(source_plan, configuration, settings)
    split = read_split(paths.splits, dataset, fold, rule)
    first = find_first_stage(paths, plan, configuration, split, folder, settings.recipe, name)
    return TrainingRun(paths, dataset, plan, configuration, settings, split, rule, folder, name, first, device)


def plan_for_settings(paths: Paths, settings: Settings) -> Plan:
    """Return the plan of a dataset, or the one that a recipe's preset makes from its fingerprint.

    What was changed by hand about the channels (normalization, clipping) and the storage stays.
    """
    plan, preset = Plan.read(paths.plans), settings.plan.preset
    if preset in (None, plan.preset) and settings.plan.memory in (None, plan.memory_gb):
        return plan
    channels = tuple(channel.name for channel in plan.channels)
    fingerprint = Fingerprint.read(paths.fingerprint)
    new = make_plan(fingerprint, plan.dataset, channels, plan.labels, preset or plan.preset, settings.plan.memory)
    return new.model_copy(update={"channels": plan.channels, "stored_as": plan.stored_as})


def _starting_plan(
    paths: Paths, configuration: str, fold: str, settings: Settings, folder: Path, dataset: str, restart: bool
) -> Plan:
    """The plan for the settings, adapted to a model to start from; a resumed fold does not need that model."""
    plan, init = plan_for_settings(paths, settings), settings.training.init
    if init is None:
        return plan
    try:
        source = find_source(Path(init), dataset, fold)
    except UserError:
        if restart or not is_begun(folder / f"fold_{fold}"):
            raise
        return Plan.read(folder / "plans.json")
    return adopt_plan(plan, configuration, source, settings) if settings.plan.adopt else plan
