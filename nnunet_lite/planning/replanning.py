"""Plan a dataset again: keep the options it was planned with, and the edits of plans.json.

Two files make this a plain comparison: `plans.json` is what later steps read and a user may edit, `planned.json` is the
same plan as nnlite wrote it. What differs between the two is an edit. An edit stays while the planner leaves the entry
as it was and no option decides about it. Otherwise the new plan replaces it, and a copy of plans.json keeps it.

Read `read_earlier_plan` and `replan` first; `write_plan` reports and writes the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset, stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic, read_json, write_json
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.nnunet import Description, description_to_nnunet, read_plan
from nnunet_lite.planning.planner import PRESETS, make_plan, memory_budget, override_sizes
from nnunet_lite.planning.schema import Options, Plan, configuration_changes, essence, first_problem
from nnunet_lite.workspace import Paths

Entry = tuple[str | int, ...]  # the place of a value in plans.json, such as ("channels", 0, "normalization")
SizeChange = tuple[str, Sequence[int] | None, int | None]  # configuration, patch size, batch size


@dataclass(frozen=True)
class EarlierPlan:
    """The plan that a dataset has before it is planned again.

    Parameters
    ----------
    file : Path
        Its plans.json.
    options : Options
        The options that it was made with.
    plan : Plan or None
        What the file says; None where it cannot be read.
    planned : Plan or None
        The plan as nnlite wrote it, without edits; None where that is unknown.
    """

    file: Path
    options: Options
    plan: Plan | None = None
    planned: Plan | None = None


@dataclass(frozen=True)
class NewPlan:
    """A new plan, and what became of the edits in the earlier one.

    Parameters
    ----------
    plan : Plan
        The plan with the edits that stay.
    planned : Plan
        The plan without edits.
    content : dict
        The content of plans.json, where configurations may inherit from others.
    kept, lost : tuple of str
        The edits that stay, and those that do not, in words.
    """

    plan: Plan
    planned: Plan
    content: dict[str, Any]
    kept: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def plan_options(
    preset: str | None = None,
    memory_gb: float | None = None,
    adopt: str | Path | None = None,
    change: SizeChange | None = None,
    clip_percentiles: tuple[float, float] | None = None,
    stored_as: Literal["float16", "float32"] | None = None,
) -> Options:
    """Check the options of `nnlite plan`.

    Parameters
    ----------
    preset : str, optional
        default, resenc_m, resenc_l or resenc_xl.
    memory_gb : float, optional
        GPU memory budget in GB.
    adopt : str or Path, optional
        A plans.json, ours or nnU-Net's, to use instead of planning.
    change : tuple, optional
        A configuration, and the patch and batch size to give it.
    clip_percentiles : tuple of float, optional
        Percentiles to clip each image to before it is normalised.
    stored_as : {"float16", "float32"}, optional
        Type of the preprocessed images on disk.

    Returns
    -------
    Options
        What is stored in plans.json.

    Raises
    ------
    UserError
        One of them is illegal.
    """
    memory_budget(preset or "default", memory_gb)
    if (clip := clip_percentiles) is not None and not 0 <= clip[0] < clip[1] <= 100:
        raise UserError("--clip-percentiles {:g} {:g} leaves nothing".format(*clip), fix="Give low, high, 0 to 100.")
    sizes: dict[str, Any] = {}
    if change is not None and change[1:] != (None, None):
        sizes = {change[0]: {"patch_size": None if change[1] is None else tuple(change[1]), "batch_size": change[2]}}
    adopted = None if adopt is None else str(Path(adopt).expanduser().absolute())
    values = {"preset": preset, "memory_gb": memory_gb, "adopted": adopted, "sizes": sizes}
    try:
        return Options.model_validate({**values, "clip_percentiles": clip, "stored_as": stored_as})
    except ValidationError as error:
        raise UserError(first_problem(error)) from None


def read_earlier_plan(paths: Paths) -> EarlierPlan | None:
    """Read the plan that a dataset has.

    Returns
    -------
    EarlierPlan or None
        None where there is no plan. A damaged plan is reported, and only its options are taken.
    """
    if not (file := paths.plans).is_file():
        return None
    try:
        plan = Plan.read(file)
    except UserError as error:
        log.warn(f"{error.file}: {error.what}")
        try:
            return EarlierPlan(file, Options.model_validate(read_json(file)["options"]))
        except (UserError, ValidationError, KeyError, TypeError):
            return EarlierPlan(file, Options())
    options = plan.options
    if options is None:  # an earlier nnlite did not record them
        known = plan.preset if plan.preset in PRESETS else None
        options = Options(preset=known, memory_gb=plan.memory_gb, stored_as=plan.stored_as)
    return EarlierPlan(file, options, plan, _planned_before(paths, plan, options))


def _planned_file(plans: Path) -> Path:
    return plans.with_name("planned.json")


def _planned_before(paths: Paths, plan: Plan, options: Options) -> Plan | None:
    """The plan as nnlite wrote it; a workspace of an earlier nnlite has no planned.json, so it is planned once more."""
    try:
        if (file := _planned_file(paths.plans)).is_file():
            return Plan.read(file)
        if options.adopted is not None:
            return plan
        return _plan_with_options(options, Fingerprint.read(paths.fingerprint), stored_dataset(paths.dataset))
    except UserError as error:
        log.warn(f"the edits of {paths.plans} are unknown: {error}")
        return None


def combine_options(given: Options, earlier: EarlierPlan | None) -> Options:
    """Return the options of this call, and those of the earlier plan where this call gives none."""
    if earlier is None:
        return given
    before = Options() if given.adopted else earlier.options
    sizes = dict(before.sizes)
    for name, new in given.sizes.items():
        old = sizes.get(name, new)
        sizes[name] = old.model_copy(update=new.model_dump(exclude_none=True))
    plans_itself = given.preset is not None or given.memory_gb is not None
    return Options(
        preset=given.preset or before.preset,
        memory_gb=given.memory_gb or before.memory_gb,
        adopted=given.adopted or (None if plans_itself else before.adopted),
        sizes=sizes,
        clip_percentiles=given.clip_percentiles or earlier.options.clip_percentiles,
        stored_as=given.stored_as or earlier.options.stored_as,
    )


def read_adopted_plan(given: Options, earlier: EarlierPlan | None, dataset: Dataset) -> Plan | None:
    """Read the plan that is used instead of the planner's.

    A dataset that is planned again takes the copy in its workspace: the file that was adopted may be gone.

    Returns
    -------
    Plan or None
        The plan with the labels of this dataset; None where none is adopted.

    Raises
    ------
    UserError
        The file is no plan, or the plan is for other channels or labels.
    """
    adopted = combine_options(given, earlier).adopted
    if adopted is None:
        return None
    file = Path(adopted)
    if given.adopted is None and earlier is not None and earlier.planned is not None:
        file, plan = earlier.file, earlier.planned
    else:
        about = Description(dataset.channels, dataset.labels, len(dataset.cases), dataset.file_ending)
        plan = read_plan(file, description_to_nnunet(about))
    if len(plan.channels) != len(dataset.channels) or plan.labels.n_channels != dataset.labels.n_channels:
        raise UserError(
            f"is for {len(plan.channels)} channels and {plan.labels.n_channels} outputs, {dataset.name} has "
            f"{len(dataset.channels)} and {dataset.labels.n_channels}",
            file,
        )
    return plan.model_copy(update={"dataset": dataset.name, "labels": dataset.labels, "n_cases": len(dataset.cases)})


def replan(
    given: Options,
    earlier: EarlierPlan | None,
    fingerprint: Fingerprint,
    dataset: Dataset,
    adopted: Plan | None = None,
    trained: bool = False,
) -> NewPlan:
    """Plan a dataset with the options of this call and of its earlier plan, and keep the edits of that plan.

    Parameters
    ----------
    given : Options
        The options of this call, which decide about an edit.
    earlier : EarlierPlan or None
        The plan that the dataset has.
    fingerprint : Fingerprint
        The dataset's fingerprint.
    dataset : Dataset
        The dataset.
    adopted : Plan, optional
        A plan to take instead of the planner's, see `read_adopted_plan`.
    trained : bool
        The dataset has trained models: images stay as they are stored if these were trained so.

    Returns
    -------
    NewPlan
        The plan, and which edits it kept and lost.

    Raises
    ------
    UserError
        An option does not fit the dataset.
    """
    options = combine_options(given, earlier)
    try:
        planned = _plan_with_options(options, fingerprint, dataset, adopted)
    except UserError as error:
        if options == given or earlier is None:
            raise
        fix = f"{error.fix} {earlier.file} records the options it was made with: give others, or move it away.".strip()
        raise UserError(error.what, error.file, fix) from None
    if earlier is None:
        return NewPlan(planned, planned, planned.as_dict())
    if trained and earlier.plan is not None and earlier.plan.orientation is None and planned.orientation is not None:
        log.info(
            "images are not turned to one orientation, because models of this dataset were trained without; plan it in "
            "another --workspace to turn them"
        )
        planned = planned.model_copy(update={"orientation": None})
    return _keep_edits(planned, earlier, given)


def _plan_with_options(
    options: Options, fingerprint: Fingerprint, dataset: Dataset, adopted: Plan | None = None
) -> Plan:
    plan = adopted or make_plan(
        fingerprint, dataset.name, dataset.channels, dataset.labels, options.preset or "default", options.memory_gb
    )
    for name, sizes in options.sizes.items():
        plan = override_sizes(plan, name, sizes.patch_size, sizes.batch_size)
    channels = plan.channels
    if (clip := options.clip_percentiles) is not None:
        clipped = {"clip_percentiles": clip}
        channels = tuple(c if c.normalization == "ct" else c.model_copy(update=clipped) for c in channels)
    return plan.model_copy(
        update={
            "channels": channels,
            "orientation": plan.orientation or fingerprint.orientation,
            "stored_as": options.stored_as or plan.stored_as,
            "options": options,
        }
    )


def _keep_edits(planned: Plan, earlier: EarlierPlan, given: Options) -> NewPlan:
    """Put the edits of the earlier plan into a new one, where the planner leaves the entry as it was."""
    if earlier.plan is None or earlier.planned is None:
        same = earlier.plan is not None and earlier.plan.trains_as(planned)
        return NewPlan(planned, planned, planned.as_dict(), (), () if same else ("all that differs from it",))
    before, edited, new = _entries(earlier.planned), _entries(earlier.plan), _entries(planned)
    kept: list[Entry] = []
    lost: list[Entry] = []
    for entry in dict.fromkeys((*before, *edited)):
        if edited.get(entry) in (before.get(entry), new.get(entry)):
            continue
        added_or_deleted = entry[0] == "configurations" and (entry not in before or entry not in edited)
        unchanged = entry in edited and entry in new and new[entry] == before.get(entry)
        keeps = added_or_deleted or (unchanged and not _is_decided(entry, given))
        (kept if keeps else lost).append(entry)
    dropped = [_edit_in_words(entry, earlier.planned, earlier.plan) for entry in lost]
    if earlier.options.adopted not in (None, planned.options and planned.options.adopted):
        dropped.append(f"the plan that was adopted from {earlier.options.adopted}")
    words = [_edit_in_words(entry, earlier.planned, earlier.plan) for entry in kept]
    # As the file has them, so that they inherit from the new plan; or else as they were.
    for source in (read_json(earlier.file), earlier.plan.as_dict()):
        content = planned.as_dict()
        for entry in kept:
            target: Any = content
            for key in entry[:-1]:
                target = target[key]
            if entry[0] != "configurations":
                target[entry[-1]] = edited[entry]
            elif entry in edited:
                target[entry[1]] = source["configurations"][entry[1]]
            else:
                del target[entry[1]]
        try:
            plan = Plan.model_validate(content)
        except ValidationError:
            continue
        return NewPlan(plan, planned, content, tuple(words), tuple(dropped))
    return NewPlan(planned, planned, planned.as_dict(), (), (*dropped, *words))


def _entries(plan: Plan) -> dict[Entry, Any]:
    """The values that may be edited, by their place in plans.json; a configuration counts as one value."""
    values = plan.model_dump(mode="json", exclude={"format", "dataset", "options", "n_cases", "configurations"})
    channels = values.pop("channels")
    entries: dict[Entry, Any] = {(field,): value for field, value in values.items()}
    for number, channel in enumerate(channels):
        statistics = channel.pop("statistics")
        entries |= {("channels", number, field): value for field, value in channel.items()}
        entries |= {("channels", number, "statistics", field): value for field, value in statistics.items()}
    return entries | {("configurations", name): essence(c) for name, c in plan.configurations.items()}


def _is_decided(entry: Entry, given: Options) -> bool:
    """Whether an option of this call decides about an entry."""
    if given.adopted is not None:
        return True
    if entry[0] == "configurations":
        return given.preset is not None or given.memory_gb is not None or entry[1] in given.sizes
    return getattr(given, str(entry[-1]), None) is not None  # preset, memory_gb, stored_as, clip_percentiles


def _edit_in_words(entry: Entry, planned: Plan, edited: Plan) -> str:
    if entry[0] == "configurations":
        return f"{entry[1]} ({_change_in_words(str(entry[1]), planned, edited)})"
    return f"{'.'.join(map(str, entry))} ({_entries(planned).get(entry)} -> {_entries(edited).get(entry)})"


def _change_in_words(name: str, before: Plan, after: Plan) -> str:
    """How a configuration changed; empty if it did not."""
    old, new = (plan.configurations.get(name) for plan in (before, after))
    if old is None or new is None:
        return "added" if old is None else "deleted"
    return ", ".join(configuration_changes(old, new))


# ---------------------------------------------------------------------------------------------------------- writing


def write_plan(paths: Paths, new: NewPlan, earlier: EarlierPlan | None) -> None:
    """Write plans.json and planned.json, and report what was kept, changed and lost.

    Parameters
    ----------
    paths : Paths
        The files of the dataset.
    new : NewPlan
        What `replan` returned.
    earlier : EarlierPlan or None
        The plan that the dataset had. Where edits are lost, plans_1.json, plans_2.json ... keeps the file.
    """
    if earlier is not None:
        _report(new, earlier)
    write_json(paths.plans, new.content)  # before planned.json: after a kill in between, no entry looks like an edit
    write_json(_planned_file(paths.plans), new.planned.as_dict())


def _report(new: NewPlan, earlier: EarlierPlan) -> None:
    now = _options_in_words(new.planned.options or Options())
    reused = [option for option in _options_in_words(earlier.options) if option in now]
    if reused:
        log.info(f"planned again with the options of {earlier.file.name}: {', '.join(reused)}")
    if new.kept:
        log.info(f"edits that are kept: {'; '.join(new.kept)}")
    if earlier.plan is not None:
        names = dict.fromkeys((*earlier.plan.configurations, *new.plan.configurations))
        changes = {name: _change_in_words(name, earlier.plan, new.plan) for name in names}
        if shown := [f"{name} ({change})" for name, change in changes.items() if change]:
            log.info(f"the plan differs from the one before: {'; '.join(shown)}")
    if new.lost:
        copy = _copy_aside(earlier.file)
        log.warn(f"{earlier.file} is replaced; {copy} is a copy of the old file. Lost: {'; '.join(new.lost)}")


def _options_in_words(options: Options) -> list[str]:
    return [f"{name} {value}" for name, value in options.model_dump(mode="json", exclude_defaults=True).items()]


def _copy_aside(file: Path) -> Path:
    """Copy a file to the first free name of the form plans_1.json in its folder."""
    number = 1
    while (target := file.with_name(f"{file.stem}_{number}{file.suffix}")).exists():
        number += 1
    with atomic(target) as temporary:
        shutil.copyfile(file, temporary)
    return target
