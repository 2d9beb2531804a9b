"""One fold of a planned data set, from its plan to its scores: everything around training/loop.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset, stored_dataset
from nnunet_lite.errors import Busy, UserError
from nnunet_lite.inference.next_stage import FirstStage, find_first_stage, predict_for_next_stage
from nnunet_lite.inference.tiles import window_starts
from nnunet_lite.models.folder import (
    MODEL,
    SUMMARY,
    VALIDATION,
    accepted_changes,
    exclusive,
    fold_seed,
    is_begun,
    is_complete,
    is_finished,
    model_folder,
    open_run,
    other_folds,
    refuse_lost_extension,
    require_begun,
    set_aside,
)
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.planner import make_plan
from nnunet_lite.planning.schema import Plan
from nnunet_lite.planning.show import configuration_changes
from nnunet_lite.preprocessing.store import open_case, preprocess_dataset
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training.configured import configured
from nnunet_lite.training.limit import Validation, announce, step_sizes
from nnunet_lite.training.previous import with_previous
from nnunet_lite.training.splits import (
    ALL,
    DEFAULT_RULE,
    FoldRule,
    Split,
    load_splits,
    read_record,
    read_split,
    record_cases,
    refuse_other_cases,
    warn_of_unused_splits,
)
from nnunet_lite.workspace import Paths

if TYPE_CHECKING:
    import torch

    from nnunet_lite.evaluation.scores import Scores
    from nnunet_lite.training.distributed import Ranks
    from nnunet_lite.training.job import Job


@dataclass(frozen=True)
class Request:
    """What is asked of `nnlite train`; `api.train` says what each part means."""

    configuration: str
    fold: str
    settings: Settings
    rule: FoldRule = DEFAULT_RULE
    name: str | None = None
    device: str | None = None
    restart: bool | Literal["model"] = False
    resume: bool = False
    force: bool = False
    lengthen: frozenset[str] = frozenset()
    preview: bool = False


@dataclass(frozen=True)
class Run:
    """A request that was found to be possible: what it trains, on which cases, and where that goes."""

    request: Request
    paths: Paths
    dataset: Dataset
    plan: Plan
    split: Split
    folder: Path
    first: FirstStage | None

    @property
    def configuration(self) -> str:
        return self.request.configuration

    @property
    def settings(self) -> Settings:
        return self.request.settings

    @cached_property
    def fold_folder(self) -> Path:
        return self.folder / f"fold_{self.split.name}"

    def is_done(self) -> bool:
        """Whether the fold is trained for as long as the settings say, and its held-out cases are scored."""

        scored = self.split.name == ALL or (self.fold_folder / VALIDATION / SUMMARY).is_file()
        return scored and is_complete(self.fold_folder, self.settings)

    def refuse_changes(self) -> None:
        """Make sure that a model folder which is there goes on with this plan, these settings and these cases.

        Raises
        ------
        UserError : it does not.
        """
        refuse_other_cases(self.folder, self.split, self.paths.splits)
        if (self.folder / "run.json").is_file():
            _open(self)


def train_and_validate(request: Request, paths: Paths) -> Scores | None:
    """Train a fold, or go on with it, then predict and score its held-out cases.

    Raises
    ------
    UserError : see `api.train`. Stopped : a signal asked for it. Lost : another process of several is gone.
    """
    run = examined(request, paths)

    # torch takes seconds to import: mistakes are told before
    from nnunet_lite.evaluation.cross_validation import validate_fold
    from nnunet_lite.models.checkpoint import read_state
    from nnunet_lite.networks.precision import pick_device
    from nnunet_lite.training.distributed import current, device_of, join
    from nnunet_lite.training.nodes import keep_watch, naming_the_lost

    ranks = current()
    device = device_of(ranks, pick_device(request.device))
    join(ranks, device)
    keep_watch(ranks)
    if device.type == "cpu" and run.settings.recipe == "default" and request.device is None:
        log.warn("there is no GPU, for which the recipe `default` is made; `--recipe cpu` gives a model in minutes")
    with naming_the_lost():
        _must_be_trainable(run, ranks, device)
        seed, fresh = _begun(run, ranks)
        if is_complete(run.fold_folder, run.settings):
            log.info(f"{run.fold_folder}: training is finished" + "; no preview is drawn" * request.preview)
        else:
            _say_what_is_trained(run)
            with _unbound_if_untrained(run) if fresh else nullcontext():
                _train(run, seed, ranks, device)
    if run.split.name == ALL or ranks.rank:
        return None
    held_out = run.split.validation
    planned = read_state(run.fold_folder / MODEL).get("validation")  # what is imported has none
    step_size = None
    if planned is not None and not (run.fold_folder / VALIDATION).is_dir():
        announce(run.settings, Validation(**planned), len(held_out))
    if planned is not None and planned["step_size"] != run.settings.inference.step_size:
        step_size = planned["step_size"]
    before = _predicted(run, held_out, device)
    return validate_fold(
        run.folder, run.split.name, run.dataset, held_out, request.device, before, step_size,
        trust_code=True,  # `_open` made sure that the model names the code of this request and no other
    )  # fmt: skip


def _say_what_is_trained(run: Run) -> None:
    """How what is trained differs from the plan, and which folds are not used."""
    name = run.configuration
    if run.settings.plan.preset is not None or run.settings.plan.memory is not None:
        log.info(f"planned for the recipe: {run.plan.preset}, {run.plan.memory_gb:g} GB")
    planned = Plan.read(run.paths.plans).configurations.get(name)
    changes = [] if planned is None else configuration_changes(planned, run.plan.configuration(name))
    if run.settings.network.factory is not None:
        changes.append(f"network made by {run.settings.network.factory}")
    if changes:
        by = "the settings" if run.settings.training.init is None else "the settings and the model to start from"
        log.info(f"{name}, changed against the plan by {by}: {'; '.join(changes)}")
    if run.split.name != ALL and run.request.rule == DEFAULT_RULE:
        warn_of_unused_splits(run.paths.splits, run.dataset)


def _must_be_trainable(run: Run, ranks: Ranks, device: torch.device) -> None:
    """Refuse, before anything is written, what only the parts that need torch can tell.

    Raises
    ------
    UserError : class weights or swaps of other labels, no such transform, a network that cannot be made, or one that
        normalises each process's part of a batch by itself.
    """
    from nnunet_lite.networks.build import build_network
    from nnunet_lite.networks.norm import mixes_samples
    from nnunet_lite.training.batches import check_augmentation
    from nnunet_lite.training.job import Job
    from nnunet_lite.training.loss import check_weights

    check_weights(run.settings.loss, run.plan.labels)
    check_augmentation(Job(run.plan, run.configuration, run.settings, 0, run.fold_folder, device, [], [], ranks))
    apart = ranks.world > 1 and device.type != "cuda"
    if run.settings.network.factory is not None or apart:
        network = build_network(
            run.plan, run.configuration, run.settings.network.factory, run.settings.training.deep_supervision
        )
        if apart and mixes_samples(network):
            what = "batch normalisation over several processes needs GPUs"
            raise UserError(what, fix="Train in one process, or with --set network.norm=instance.")


def examined(request: Request, paths: Paths) -> Run:
    """The request with all that its mistakes can be told from, before anything is changed."""
    settings = request.settings
    dataset = stored_dataset(paths.dataset)
    folder = model_folder(paths, request.name or f"{request.configuration}-{settings.recipe}")
    made = configured(_planned(request, paths, folder, dataset.name), request.configuration, settings)
    split = read_split(paths.splits, dataset, request.fold, request.rule)
    first = find_first_stage(paths, made, request.configuration, split, folder, settings.recipe, request.name)
    return Run(request, paths, dataset, made, split, folder, first)


def _planned(request: Request, paths: Paths, folder: Path, dataset: str) -> Plan:
    """The plan of the data set, or what of it a model to start from leaves, if that is to be adopted.

    A fold that was begun goes on without that model.
    """
    planned, init = planned_for(paths, request.settings), request.settings.training.init
    if init is None:
        return planned
    from nnunet_lite.training.initial import adopted_plan, find_source

    try:
        source = find_source(Path(init), dataset, request.fold)
    except UserError:
        if request.restart or not is_begun(folder / f"fold_{request.fold}"):
            raise
        return Plan.read(folder / "plans.json")
    adopts = request.settings.plan.adopt
    return adopted_plan(planned, request.configuration, source, request.settings) if adopts else planned


def planned_for(paths: Paths, settings: Settings) -> Plan:
    """The plan of the data set, or the one that a recipe's preset makes from its fingerprint.

    What was changed by hand about the channels (normalisation, clipping) and the storage stays.
    """
    planned, wanted = Plan.read(paths.plans), settings.plan
    preset = wanted.preset or planned.preset
    if preset == planned.preset and wanted.memory in (None, planned.memory_gb):
        return planned
    names = tuple(channel.name for channel in planned.channels)
    taken = Fingerprint.read(paths.fingerprint)
    made = make_plan(taken, planned.dataset, names, planned.labels, preset, wanted.memory)
    return made.model_copy(update={"channels": planned.channels, "stored_as": planned.stored_as})


def _begun(run: Run, ranks: Ranks) -> tuple[int, bool]:
    """Open the model folder, after the first stage of a cascade is trained: the fold's seed, whether this made it."""
    from nnunet_lite.training.distributed import from_first

    request, folder = run.request, run.folder
    if request.resume:
        require_begun(run.fold_folder, request.restart)
    if not request.restart:
        refuse_lost_extension(run.fold_folder, run.settings)
    whole = request.restart == "model" or not other_folds(folder, run.split.name)
    if not (request.restart and whole):
        refuse_other_cases(folder, run.split, run.paths.splits, restart=bool(request.restart))
        if (folder / "run.json").is_file():  # what is wrong with it is told before anything is moved or trained
            anew = run.fold_folder.name if request.restart else None
            accepted_changes(folder, run.plan, run.configuration, run.settings, request.force, request.lengthen, anew)
    if request.restart and ranks.rank == 0:
        set_aside(folder if whole else run.fold_folder)
    fresh = not (folder / "run.json").is_file()
    from_first(None, ranks)  # the others wait for that
    if run.first is not None and not is_finished(run.fold_folder):
        _train_first_stage(run, run.first)
    seed = _open(run)
    run.fold_folder.mkdir(exist_ok=True)
    return fold_seed(seed, run.split.name), fresh and ranks.rank == 0


@contextmanager
def _unbound_if_untrained(run: Run) -> Iterator[None]:
    """Let a run that ends before there is anything to go on from not bind the next one to its settings."""
    try:
        yield
    except BaseException:
        with suppress(Busy), exclusive(run.fold_folder):  # nobody else trains there by now
            if not is_begun(run.fold_folder) and not other_folds(run.folder, run.split.name):
                (run.folder / "run.json").unlink(missing_ok=True)
        raise


def _open(run: Run) -> int:
    previous = None if run.first is None else run.first.folder.name
    force, lengthen = run.request.force, run.request.lengthen
    return open_run(run.folder, run.plan, run.dataset, run.configuration, run.settings, force, lengthen, previous)


def _train_first_stage(run: Run, first: FirstStage) -> None:
    """Train the folds of the first stage that are missing, with the same recipe and settings."""
    refuse_other_cases(first.folder, run.split, run.paths.splits)
    log.info(first.needs())
    # a model to start from is one network's
    settings = with_changes(run.settings, {"training.init": None, "training.freeze": None})
    for fold in first.missing:
        request = replace(run.request, configuration=first.configuration, fold=fold, name=first.folder.name,
                          settings=settings, restart=False, resume=False, preview=False)  # fmt: skip
        train_and_validate(request, run.paths)


def _predicted(run: Run, case_ids: Sequence[str], device: torch.device) -> dict[str, Path] | None:
    """What the first stage of a cascade predicts of cases."""
    if run.first is None:
        return None
    return predict_for_next_stage(
        run.first.only(case_ids), run.dataset, run.plan, run.configuration, run.paths.preprocessed,
        run.settings.training.workers, str(device),
    )  # fmt: skip


def _train(run: Run, seed: int, ranks: Ranks, device: torch.device) -> None:
    """Load the cases and train on them."""
    from nnunet_lite.training.cache import load_cases
    from nnunet_lite.training.job import Job
    from nnunet_lite.training.loop import train_fold
    from nnunet_lite.training.preview import draw_preview

    split, training = run.split, run.settings.training
    preprocess_dataset(
        run.dataset, run.plan, [run.configuration], run.paths.preprocessed, training.workers, log.progress
    )
    before = _predicted(run, sorted({*split.training, *split.validation}), device)

    def open_one(case_id: str) -> Any:
        case = open_case(run.paths.preprocessed, run.plan, run.configuration, case_id)
        return case if before is None else with_previous(case, before[case_id])

    def cases(ids: Sequence[str]) -> list[Any]:
        reserve = run.plan.configuration(run.configuration).memory_gb or 0.0
        return load_cases(ids, open_one, training.cache, device, reserve, ranks.world)

    chosen = cases(split.training)
    held_out = chosen if split.name == ALL else cases(split.validation)
    source = None if split.name == ALL else read_record(run.paths.splits, load_splits(run.paths.splits)).get("splits")
    of = f" of {source}" if source else ""
    log.info(f"training {run.configuration} fold {split.name}{of} on {len(chosen)} cases in {run.fold_folder}")
    record_cases(run.fold_folder, split)
    job = Job(run.plan, run.configuration, run.settings, seed, run.fold_folder, device, chosen, held_out, ranks)
    if split.name != ALL:
        job = replace(job, passes=_passes_of_validation(job))
    if run.request.preview and ranks.rank == 0:
        draw_preview(job, job.folder / "preview.png")
    train_fold(job)


def _passes_of_validation(job: Job) -> dict[float, int]:
    """How many windows and mirrored copies the validation in whole images takes, by the distance of two windows."""
    augmentation, inference = job.settings.augmentation, job.settings.inference
    mirrored = inference.mirroring and augmentation.enabled and augmentation.p_mirror > 0
    copies = 2 ** len(job.mirror_axes) if mirrored else 1

    def windows(step: float) -> int:
        axes = (zip(case.label.shape, job.patch, strict=True) for case in job.validation)
        return sum(prod(len(window_starts(size, patch, step)) for size, patch in case) for case in axes)

    return {step: copies * windows(step) for step in step_sizes(job.settings)}
