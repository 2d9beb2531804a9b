"""Planning a dataset again: with the options of the plan that is there, and with what was changed in it by hand.

What was changed by hand is what differs from the plan that the recorded fingerprint and options give. It stays while
the planner gives the same for it as before. Else the planner's replaces it, and plans_1.json keeps the file as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset, stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic, read_json
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.override import override
from nnunet_lite.planning.planner import PRESETS, make_plan
from nnunet_lite.planning.schema import Options, Plan, essence
from nnunet_lite.planning.show import configuration_changes
from nnunet_lite.workspace import Paths

_CHANNEL_FIELDS = ("normalization", "use_mask", "clip_percentiles", "statistics")
_PLAN_FIELDS = ("orientation", "axis_order", "stored_as")
Units = dict[str, Any]


@dataclass(frozen=True)
class Earlier:
    """The plan that is there.

    Parameters
    ----------
    written : the content of the file, in which configurations may still inherit from others.
    plan : what it says; None where it cannot be read.
    options : those that it was made with.
    made : what they give with the fingerprint that they were used with; None where that is not known.
    """

    file: Path
    written: dict[str, Any]
    plan: Plan | None
    options: Options
    made: Plan | None


@dataclass(frozen=True)
class Again:
    """A new plan, and what became of the changes by hand in the one that is there."""

    plan: Plan
    content: dict[str, Any]  # of plans.json, where configurations may inherit from others
    kept: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def asked(**given: Any) -> Options:
    """Options of `nnlite plan`.

    Raises
    ------
    UserError : one of them is of the wrong kind.
    """
    try:
        return Options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where} = {first['input']!r:.80}: {first['msg']}") from None


def earlier_plan(paths: Paths) -> Earlier | None:
    """The plan that is there, if there is one; a damaged one is reported, and only its options are taken."""
    if not paths.plans.is_file():
        return None
    try:
        written = read_json(paths.plans)
        plan = Plan.read(paths.plans)
    except UserError as error:
        log.warn(f"{error.file}: {error.what}")
        return Earlier(paths.plans, {}, None, _readable_options(paths.plans), None)
    options = plan.options or _guessed(plan)
    return Earlier(paths.plans, written, plan, options, _made_before(paths, plan, options))


def combined(given: Options, earlier: Earlier | None) -> Options:
    """The options that were given, and for the others those of the plan that is there."""
    if earlier is None:
        return given
    before = earlier.options
    fresh = given.preset is not None or given.memory_gb is not None or given.adopted is not None
    sizes = {**({} if given.adopted else before.sizes)}
    for name, new in given.sizes.items():
        old = sizes.get(name, new)
        sizes[name] = new.model_copy(
            update={
                "patch_size": new.patch_size or old.patch_size,
                "batch_size": old.batch_size if new.batch_size is None else new.batch_size,
            }
        )
    return Options(
        preset=given.preset or (None if given.adopted else before.preset),
        memory_gb=given.memory_gb or (None if given.adopted else before.memory_gb),
        adopted=given.adopted if fresh else before.adopted,
        sizes=sizes,
        clip_percentiles=given.clip_percentiles or before.clip_percentiles,
        stored_as=given.stored_as or before.stored_as,
    )


def made_with(options: Options, fingerprint: Fingerprint, dataset: Dataset, adopted: Plan | None = None) -> Plan:
    """The plan that options give, or what they change about an adopted one.

    Raises
    ------
    UserError : an option does not fit the dataset.
    """
    made = adopted or make_plan(
        fingerprint, dataset.name, dataset.channels, dataset.labels, options.preset or "default", options.memory_gb
    )
    for name, sizes in options.sizes.items():
        made = override(made, name, sizes.patch_size, sizes.batch_size)
    if (clip := options.clip_percentiles) is not None:
        clipped = [
            c if c.normalization == "ct" else c.model_copy(update={"clip_percentiles": clip}) for c in made.channels
        ]
        made = made.model_copy(update={"channels": tuple(clipped)})
    return made.model_copy(
        update={
            "orientation": made.orientation or fingerprint.orientation,
            "stored_as": options.stored_as or made.stored_as,
            "options": options,
        }
    )


def plan_with(
    given: Options,
    options: Options,
    fingerprint: Fingerprint,
    dataset: Dataset,
    earlier: Earlier | None = None,
    adopted: Plan | None = None,
) -> Again:
    """The new plan, with what was changed by hand in the earlier one where that is still about the same.

    Parameters
    ----------
    given : the options of this call, which overrule what was changed by hand.
    options : these and those of the earlier plan, see `combined`.
    adopted : a plan to take instead of the planner's.

    Raises
    ------
    UserError : an option does not fit the dataset.
    """
    if adopted is not None and given.adopted is None:  # it has the earlier options, and what was changed by hand since
        made = made_with(given, fingerprint, dataset, adopted).model_copy(update={"options": options})
        return Again(made, made.as_dict())
    try:
        made = made_with(options, fingerprint, dataset, adopted)
    except UserError as error:
        if options == given or earlier is None:
            raise
        fix = f"{error.fix} {earlier.file} records the options it was made with: give others, or move it away.".strip()
        raise UserError(error.what, error.file, fix) from None
    return Again(made, made.as_dict()) if earlier is None else _with_changes(made, earlier, given)


def for_trained_models(found: Again, earlier: Earlier) -> Again:
    """A new plan for a dataset with models: images stay as they are stored if they were so when these were trained."""
    if earlier.plan is None or earlier.plan.orientation is not None or found.plan.orientation is None:
        return found
    log.info(
        "images are not turned to one orientation, because models of this dataset were trained without; plan it in "
        "another --workspace to turn them"
    )
    plan = found.plan.model_copy(update={"orientation": None})
    return replace(found, plan=plan, content={**found.content, "orientation": None})


def _with_changes(made: Plan, earlier: Earlier, given: Options) -> Again:
    """What the planner gives now, with what was changed by hand."""
    if earlier.plan is None or earlier.made is None:
        same = earlier.plan is not None and earlier.plan.trains_as(made)
        return Again(made, made.as_dict(), (), () if same else ("all that the plan does not share with this one",))
    before, old, new = _units(earlier.made), _units(earlier.plan), _units(made)
    kept, lost = [], []
    for unit in dict.fromkeys((*before, *old)):
        if unit in before and unit in old and before[unit] == old[unit]:
            continue
        if old.get(unit) == new.get(unit):
            continue
        by_hand = unit.startswith("configurations.") and (unit not in before or unit not in old)  # added or deleted
        if by_hand or (new.get(unit) == before.get(unit) and not _overruled(unit, given)):
            kept.append(unit)
        else:
            lost.append(_described(unit, earlier))
    lost += [
        field
        for field in ("labels", "preset", "memory_gb", "median_spacing", "median_shape")
        if getattr(earlier.plan, field) not in (getattr(earlier.made, field), getattr(made, field))
    ]
    return _with_units(made, earlier, kept, tuple(lost))


def put_aside(file: Path) -> Path:
    """Copy a file to the first free name of the form plans_1.json in its folder."""
    number = 1
    while (target := file.with_name(f"{file.stem}_{number}{file.suffix}")).exists():
        number += 1
    with atomic(target) as temporary:
        shutil.copyfile(file, temporary)
    return target


def report(found: Again, earlier: Earlier | None, given: Options) -> None:
    """Say which options are used again, what stays, what changed, and where that is kept which does not stay."""
    if earlier is None:
        return
    reused = [
        words
        for words in _in_words(combined(Options(), earlier))
        if words in _in_words(found.plan.options or given) and words not in _in_words(given)
    ]
    if reused:
        log.info(f"planned again with the options of {earlier.file.name}: {', '.join(reused)}")
    if found.kept:
        log.info(f"changed by hand and kept: {'; '.join(found.kept)}")
    if earlier.made is not None and (changes := _differences(earlier.made, found.plan, found.kept)):
        log.info(f"the plan differs from the one before: {'; '.join(changes)}")
    if found.lost:
        copy = put_aside(earlier.file)
        log.warn(f"{earlier.file} is replaced; the file as it was is kept in {copy}. Lost: {'; '.join(found.lost)}")


def _with_units(made: Plan, earlier: Earlier, kept: Sequence[str], lost: tuple[str, ...]) -> Again:
    """Put units of the earlier plan into a new one: as they are written, else without inheritance, else not at all."""
    assert earlier.plan is not None
    words = [_described(unit, earlier) for unit in kept]
    for source in (earlier.written, earlier.plan.as_dict()):
        content = made.as_dict()
        for unit in kept:
            _put(content, source, unit.split("."))
        try:
            plan = Plan.model_validate(content)
        except ValidationError:
            continue
        return Again(plan, content, tuple(words), (*lost, *_inherited_changes(earlier.plan, plan, kept)))
    return Again(made, made.as_dict(), (), (*lost, *words))


def _inherited_changes(before: Plan, now: Plan, kept: Sequence[str]) -> list[str]:
    """How configurations that were kept as they are written changed with what they inherit."""
    out = []
    for name in (unit.partition(".")[2] for unit in kept if unit.startswith("configurations.")):
        old, new = before.configurations.get(name), now.configurations.get(name)
        if old is not None and new is not None and (changes := configuration_changes(old, new)):
            out.append(f"{name}, with what it inherits ({', '.join(changes)})")
    return out


def _put(content: dict[str, Any], source: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Copy one entry, or delete it where the source has none."""
    target: Any = content
    given: Any = source
    for key in keys[:-1]:
        target, given = ((c[int(key)] if isinstance(c, list) else c[key]) for c in (target, given))
    if keys[-1] in given:
        target[keys[-1]] = given[keys[-1]]
    elif keys[0] == "configurations":
        del target[keys[-1]]


def _units(plan: Plan) -> Units:
    """What can be changed by hand, each by its place in plans.json."""
    values = plan.model_dump(mode="json", include={"channels", *_PLAN_FIELDS})
    units: Units = {field: values[field] for field in _PLAN_FIELDS}
    for number, channel in enumerate(values["channels"]):
        units |= {f"channels.{number}.{field}": channel[field] for field in _CHANNEL_FIELDS}
    return units | {f"configurations.{name}": essence(c) for name, c in plan.configurations.items()}


def _overruled(unit: str, given: Options) -> bool:
    """Whether an option of this call decides about a unit."""
    kind, _, name = unit.partition(".")
    if given.adopted is not None:
        return True
    if kind == "configurations":
        return given.preset is not None or given.memory_gb is not None or name in given.sizes
    if kind == "stored_as":
        return given.stored_as is not None
    return unit.endswith("clip_percentiles") and given.clip_percentiles is not None


def _described(unit: str, earlier: Earlier) -> str:
    """A unit that was changed by hand, in words."""
    assert earlier.plan is not None and earlier.made is not None
    kind, _, name = unit.partition(".")
    if kind == "configurations":
        before, after = (plan.configurations.get(name) for plan in (earlier.made, earlier.plan))
        if before is None or after is None:
            return f"{name} ({'added' if before is None else 'deleted'})"
        return f"{name} ({', '.join(configuration_changes(before, after))})"
    old, new = _units(earlier.made)[unit], _units(earlier.plan)[unit]
    if isinstance(old, dict):
        return f"{unit} ({', '.join(f'{key} {old[key]:g} -> {new[key]:g}' for key in old if old[key] != new[key])})"
    return f"{unit} ({old} -> {new})"


def _differences(before: Plan, now: Plan, kept: Sequence[str]) -> list[str]:
    """How the planner's configurations changed, apart from those that were changed by hand."""
    by_hand = {words.partition(" ")[0] for words in kept}
    out = []
    for name in dict.fromkeys((*before.configurations, *now.configurations)):
        old, new = before.configurations.get(name), now.configurations.get(name)
        if name in by_hand:
            continue
        if old is None or new is None:
            out.append(f"{name} is {'new' if old is None else 'left out'}")
        elif changes := configuration_changes(old, new):
            out.append(f"{name}: {', '.join(changes)}")
    return out


def _in_words(options: Options) -> list[str]:
    """Options as they are typed."""
    words = [f"--preset {options.preset}"] if options.preset else []
    words += [f"--memory {options.memory_gb:g}"] if options.memory_gb is not None else []
    words += [f"--plans {options.adopted}"] if options.adopted else []
    for name, sizes in options.sizes.items():
        words += [f"--patch-size {'x'.join(map(str, sizes.patch_size))} -c {name}"] if sizes.patch_size else []
        words += [f"--batch-size {sizes.batch_size} -c {name}"] if sizes.batch_size is not None else []
    clip = options.clip_percentiles
    words += ["--clip-percentiles {:g} {:g}".format(*clip)] if clip else []
    return words + ([f"--store {options.stored_as}"] if options.stored_as else [])


def _made_before(paths: Paths, plan: Plan, options: Options) -> Plan | None:
    """What the planner gives for the fingerprint and the dataset that were recorded.

    None where these are damaged, and for a plan that was adopted: all of it may be by hand.
    """
    if options.adopted is not None:
        return None
    try:
        made = made_with(options, Fingerprint.read(paths.fingerprint), stored_dataset(paths.dataset))
    except UserError as error:
        log.warn(f"what of {plan.dataset}'s plan was changed by hand is unknown: {error}")
        return None
    if plan.options is None:  # an earlier nnlite stored every plan's images as float16
        made = made.model_copy(update={"stored_as": plan.stored_as})
    return made


def _guessed(plan: Plan) -> Options:
    """The options of a plan that does not record them, such as one of an earlier nnlite."""
    clips = {channel.clip_percentiles for channel in plan.channels if channel.normalization != "ct"}
    usual = PRESETS[plan.preset].memory_gb if plan.preset in PRESETS else None
    return Options(
        preset=plan.preset if plan.preset in PRESETS and plan.preset != "default" else None,
        memory_gb=None if plan.memory_gb == usual else plan.memory_gb,
        clip_percentiles=clips.pop() if len(clips) == 1 else None,
        stored_as=None if plan.stored_as == "float16" else plan.stored_as,
    )


def _readable_options(file: Path) -> Options:
    """The options in a plans.json that is no plan any more."""
    try:
        return Options.model_validate(read_json(file)["options"])
    except (UserError, ValidationError, KeyError, TypeError):
        return Options()
