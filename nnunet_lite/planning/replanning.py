"""Plan a dataset again: keep the options it was planned with, and the edits of plans.json.

Two files make this a plain comparison: `plans.json` is what later steps read and a user may edit, `planned.json` is the
same plan as nnlite wrote it. What differs between the two is an edit. An edit stays while the planner leaves the entry
as it was and no option of this call sets it. Otherwise the new plan replaces it, and a copy of plans.json keeps it.

Read `read_earlier_plan` and `replan` first; `write_plan` reports and writes the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset, dataset_to_json, stored_dataset
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic, read_json, write_json
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.nnunet import read_plan
from nnunet_lite.planning.planner import PRESETS, apply_options, make_plan
from nnunet_lite.planning.schema import Channel, Options, Plan, configuration_changes, configuration_content
from nnunet_lite.settings import changed_values
from nnunet_lite.workspace import Paths

Entry = tuple[str | int, ...]  # the place of a value in plans.json, such as ("channels", 0, "normalization")


@dataclass(frozen=True)
class EarlierPlan:
    """The plan that a dataset has before it is planned again.

    Parameters
    ----------
    file : Path
        Its plans.json, which may not exist.
    options : Options
        The options that it was made with.
    plan : Plan or None
        What the file says; None where it does not exist or cannot be read.
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


def read_earlier_plan(paths: Paths) -> EarlierPlan:
    """Read the plan that a dataset has, if it has one. A damaged file is reported and counts as none."""
    if not paths.plans.is_file():
        return EarlierPlan(paths.plans, Options())
    plan, planned = _read(paths.plans), _read(paths.planned)
    known = plan or planned
    if known is None:
        return EarlierPlan(paths.plans, Options())
    preset = known.preset if known.preset in PRESETS else None
    # an earlier nnlite did not record the options
    options = known.options or Options(preset=preset, memory_gb=known.memory_gb, stored_as=known.stored_as)
    return EarlierPlan(paths.plans, options, plan, planned)


def _read(file: Path) -> Plan | None:
    try:
        return Plan.read(file) if file.is_file() else None
    except UserError as error:
        log.warn(f"{error.file}: {error.what}")
        return None


def current_plan(paths: Paths) -> Plan:
    """Read the plan of a dataset, whose labels and channels must be those that the dataset has.

    Raises
    ------
    UserError
        The plan is damaged, or its labels or channels were edited: cases would be trained with some labels and scored
        with others, and a channel would be normalised as another one.
    """
    plan, dataset = Plan.read(paths.plans), stored_dataset(paths.dataset)
    channels = ", ".join(channel.name for channel in plan.channels)
    if plan.labels != dataset.labels:
        kind, what = "Labels", _describe_edit(plan.labels, dataset.labels)
    elif channels != ", ".join(dataset.channels):
        kind, what = "Channels", f"channels: they are {channels}, in the dataset {', '.join(dataset.channels)}"
    else:
        _warn_of_old_shapes(plan, _read(paths.planned) or plan, paths.plans)
        return plan
    fix = f"Undo this edit. {kind} are changed in the dataset.json of the raw data; then run `nnlite plan` again."
    raise UserError(what, paths.plans, fix)


def _warn_of_old_shapes(plan: Plan, planned: Plan, file: Path) -> None:
    """Warn of configurations whose spacing was edited, but not the shape of the images at it."""
    spacings = {c.median_shape: c.spacing for c in planned.configurations.values()}
    for name, c in plan.configurations.items():
        old = spacings.get(c.median_shape, c.spacing)
        expected = [n * a / b for n, a, b in zip(c.median_shape, old, c.spacing, strict=True)]
        if any(abs(n - m) > 1 for n, m in zip(expected, c.median_shape, strict=True)):
            shapes = c.spacing, [round(n) for n in expected], old
            new, shape, old_mm = (" x ".join(f"{n:.4g}" for n in each) for each in shapes)
            what = f"{name} has a spacing of {new} mm, at which the median image has about {shape} voxels, and still "
            what += f"the median_shape of {old_mm} mm; an edited spacing changes neither patch nor batch"
            log.warn_once(f"{file}: {what}: `nnlite plan DATA --spacing` plans all of them")


def _describe_edit(edited: Labels, own: Labels) -> str:
    """Say how labels were edited."""
    after, before = ({**one.to_json(), "regions_class_order": one.region_order} for one in (edited, own))
    differing = [key for key in {**before, **after} if after.get(key) != before.get(key)]
    what = "; ".join(f"labels: {key} is {after.get(key)}, in the dataset {before.get(key)}" for key in differing)
    names = (", ".join(one.region_names) for one in (edited, own))
    return what or "labels: the order of the regions is {}, in the dataset {}".format(*names)


def combine_options(given: Options, earlier: Options) -> Options:
    """Return the options of this call, and those of the earlier plan where this call gives none."""
    options = earlier.model_dump() | given.model_dump(exclude_none=True, exclude={"sizes"})
    if given.adopted is not None:  # it has its own network and sizes
        options |= {"preset": given.preset, "memory_gb": given.memory_gb, "spacing": None, "sizes": {}}
    elif given.changes_rules:
        options["adopted"] = None
    for name, sizes in given.sizes.items():
        options["sizes"][name] = options["sizes"].get(name, {}) | sizes.model_dump(exclude_none=True)
    return Options.model_validate(options)


def read_adopted_plan(given: Options, earlier: EarlierPlan, dataset: Dataset) -> Plan | None:
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
    adopted = combine_options(given, earlier.options).adopted
    if adopted is None:
        return None
    plan = earlier.planned if given.adopted is None else None
    plan = plan or read_plan(Path(adopted), dataset_to_json(dataset))
    if len(plan.channels) != len(dataset.channels) or plan.labels.n_channels != dataset.labels.n_channels:
        what = f"is for {len(plan.channels)} channels and {plan.labels.n_channels} outputs"
        raise UserError(f"{what}, {dataset.name} has {len(dataset.channels)} and {dataset.labels.n_channels}", adopted)
    own = {"dataset": dataset.name, "labels": dataset.labels, "n_cases": len(dataset.cases)}
    return plan.model_copy(update={**own, "channels": _match_channels(plan.channels, dataset.channels)})


def _match_channels(channels: Sequence[Channel], names: Sequence[str]) -> tuple[Channel, ...]:
    """Return the channels of a plan for those of a dataset: by name if they have the same names, else in order."""
    by_name = {channel.name.casefold(): channel for channel in channels}
    if by_name.keys() == {name.casefold() for name in names} and len(by_name) == len(names):
        channels = [by_name[name.casefold()] for name in names]
    return tuple(channel.model_copy(update={"name": name}) for channel, name in zip(channels, names, strict=True))


def replan(
    given: Options,
    earlier: EarlierPlan,
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
    earlier : EarlierPlan
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
    options = combine_options(given, earlier.options)
    try:
        plan = adopted or make_plan(
            fingerprint, dataset.name, dataset.channels, dataset.labels, options.preset or "default", options.memory_gb,
            spacing=options.spacing,
        )  # fmt: skip
        plan = apply_options(plan, options)
    except UserError as error:
        if options == given:
            raise
        fix = f"{error.fix} `nnlite plan` keeps its options here: give it others, or move the file away.".strip()
        raise UserError(error.what, error.file, fix) from None
    orientation = plan.orientation or fingerprint.orientation
    if trained and earlier.plan is not None and earlier.plan.orientation is None and orientation is not None:
        why = "models of this dataset were trained without; plan it in another --workspace to turn them"
        log.info(f"images are not turned to one orientation, because {why}")
        orientation = None
    return _keep_edits(plan.model_copy(update={"orientation": orientation, "options": options}), earlier, given)


def _keep_edits(new: Plan, earlier: EarlierPlan, given: Options) -> NewPlan:
    """Put the edits of the earlier plan into a new one, where the planner leaves the entry as it was."""
    planned, edited = earlier.planned, earlier.plan
    if planned is None or edited is None:  # without both there is nothing to compare
        same = edited.trains_as(new) if edited is not None else not earlier.file.exists()
        return NewPlan(new, new, new.as_dict(), lost=() if same else ("all that differs from it",))
    before, after, now = _entries(planned), _entries(edited), _entries(new)

    def stays(entry: Entry) -> bool:
        name = (*entry[:2], "name")
        if entry[0] == "labels" or (entry[0] == "channels" and after.get(name) != now.get(name)):
            return False  # labels and channels are those of the dataset, as `current_plan` requires
        if entry[0] == "configurations" and not (entry in before and entry in after):
            return True  # the user added or deleted it
        return now.get(entry, ...) == before.get(entry) and not _is_set(entry, given)

    # what differs from the plan that was edited; where the new plan has the same value, there is nothing to keep
    edits = [entry for entry in before | after if after.get(entry) not in (before.get(entry), now.get(entry))]
    words = {entry: _edit_in_words(entry, planned, edited) for entry in edits}
    kept = {entry: edit for entry, edit in words.items() if stays(entry)}
    lost = [edit for entry, edit in words.items() if entry not in kept]
    if earlier.options.adopted not in (None, new.options and new.options.adopted):
        lost.append(f"the plan that was adopted from {earlier.options.adopted}")
    # The file says which configurations inherit from others. One that no longer fits what it inherits stays as it was.
    for source in (read_json(earlier.file), edited.as_dict()):
        content = new.as_dict()
        try:
            _copy_entries(kept, source, content)
            return NewPlan(Plan.model_validate(content), new, content, tuple(kept.values()), tuple(lost))
        except (ValidationError, LookupError):
            continue
    return NewPlan(new, new, new.as_dict(), (), (*lost, *kept.values()))


def _copy_entries(entries: Iterable[Entry], source: Any, target: Any) -> None:
    """Copy entries from one content of plans.json to another; what the source lacks is deleted."""
    for *parents, key in entries:
        origin, destination = source, target
        for parent in parents:
            origin, destination = origin[parent], destination[parent]
        if key in origin:
            destination[key] = origin[key]
        else:
            del destination[key]


def _entries(plan: Plan) -> dict[Entry, Any]:
    """The values that may be edited, by their place in plans.json; a configuration counts as one value."""
    values = plan.model_dump(mode="json", exclude={"format", "dataset", "options", "n_cases", "configurations"})
    channels = values.pop("channels")
    entries: dict[Entry, Any] = {(field,): value for field, value in values.items()}
    for number, channel in enumerate(channels):
        statistics = channel.pop("statistics")
        entries |= {("channels", number, field): value for field, value in channel.items()}
        entries |= {("channels", number, "statistics", field): value for field, value in statistics.items()}
    return entries | {("configurations", name): configuration_content(c) for name, c in plan.configurations.items()}


def _is_set(entry: Entry, given: Options) -> bool:
    """Whether an option of this call sets an entry."""
    if given.adopted is not None:
        return True
    if entry[0] == "configurations":
        return given.changes_rules or entry[1] in given.sizes
    return getattr(given, str(entry[-1]), None) is not None  # preset, memory_gb, stored_as, clip_percentiles


def _edit_in_words(entry: Entry, planned: Plan, edited: Plan) -> str:
    if entry[0] == "configurations":
        return f"{entry[1]} ({_change_in_words(str(entry[1]), planned, edited)})"
    of_dataset = entry[0] == "labels" or entry[-1] == "name"
    where = "; change it in the dataset.json of the raw data" * of_dataset
    before, after = changed_values(_entries(planned), _entries(edited))[entry]
    return f"{'.'.join(map(str, entry))} ({before} -> {after}{where})"


def _change_in_words(name: str, before: Plan, after: Plan) -> str:
    """How a configuration changed; empty if it did not."""
    old, new = (plan.configurations.get(name) for plan in (before, after))
    if old is None or new is None:
        return "added" if old is None else "deleted"
    return ", ".join(f"{key} {one} -> {other}" for key, (one, other) in configuration_changes(old, new).items())


# ---------------------------------------------------------------------------------------------------------- writing


def write_plan(paths: Paths, new: NewPlan, earlier: EarlierPlan) -> None:
    """Write plans.json and planned.json, and report what was kept, changed and lost.

    Parameters
    ----------
    paths : Paths
        The files of the dataset.
    new : NewPlan
        What `replan` returned.
    earlier : EarlierPlan
        The plan that the dataset had. Where edits are lost, plans_1.json, plans_2.json ... keeps the file.
    """
    now = _options_in_words(new.planned.options or Options())
    if reused := [option for option in _options_in_words(earlier.options) if option in now]:
        log.info(f"planned again with the options of {earlier.file.name}: {', '.join(reused)}")
    if new.kept:
        log.info(f"edits that are kept: {'; '.join(new.kept)}")
    if earlier.plan is not None:
        names = dict.fromkeys((*earlier.plan.configurations, *new.plan.configurations))
        changes = {name: _change_in_words(name, earlier.plan, new.plan) for name in names}
        if shown := [f"{name} ({change})" for name, change in changes.items() if change]:
            log.info(f"the plan differs from the one before: {'; '.join(shown)}")
    _warn_of_old_shapes(new.plan, new.planned, paths.plans)
    if new.lost:
        copy = _copy_aside(earlier.file)
        log.warn(f"{earlier.file} is replaced; {copy} is a copy of the old file. Lost: {'; '.join(new.lost)}")
    write_json(paths.plans, new.content)  # before planned.json: after a kill in between, no entry looks like an edit
    write_json(paths.planned, new.planned.as_dict())


def _options_in_words(options: Options) -> list[str]:
    return [f"{name} {value}" for name, value in options.model_dump(mode="json", exclude_defaults=True).items()]


def _copy_aside(file: Path) -> Path:
    """Copy a file to the first free name of the form plans_1.json in its folder."""
    names = (f"{file.stem}_{number}{file.suffix}" for number in count(1))
    target = next(path for path in map(file.with_name, names) if not path.exists())
    with atomic(target) as temporary:
        shutil.copyfile(file, temporary)
    return target
