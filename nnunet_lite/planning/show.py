"""Show a plan to a person: `plan_table` is all of it, a table and then the reasons; the others are its parts."""

from __future__ import annotations

from math import prod
from textwrap import wrap
from typing import TYPE_CHECKING

from nnunet_lite.data.problems import align, plural

if TYPE_CHECKING:  # schema.py imports this file, so that a plan can show itself
    from nnunet_lite.planning.schema import Configuration, Plan

WIDTH = 120
_PICTURES = [1, 1, 999]  # the spacing, sorted, that pictures are read with: they have none


def plan_table(plan: Plan) -> str:
    """Return the plan as plain text, at most 120 columns: one line per configuration, then the reasons for each.

    Lengths are in mm, of pictures in pixels; GB are 1e9 bytes of a training step; "patch sees" is the share of the
    median image in one patch.
    """
    channels = ", ".join(f"{channel.name} ({channel.to_text()})" for channel in plan.channels)
    lines = [*wrap(plan_title(plan), WIDTH), *wrap(f"channels: {channels}", WIDTH, subsequent_indent="  "), ""]
    lines.append(align([plan_head(plan), *plan_rows(plan)]))
    for name, reasons in plan_reasons(plan).items():
        lines += ["", name]
        for reason in reasons:
            lines += wrap(reason, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def plan_title(plan: Plan) -> str:
    """Return what all configurations share, in a line."""
    axes = " ".join("zyx"[axis] for axis in plan.axis_order)
    orientation = "" if plan.orientation is None else f" of {plan.orientation}"
    outputs = plural(len(plan.labels.region_names), "region" if plan.labels.has_regions else "label")
    return (
        f"{plan.dataset}: {plural(plan.n_cases, 'case')}, {outputs}, preset {plan.preset}, "
        f"GPU memory budget {plan.memory_gb:g} GB, axes {axes}{orientation}"
    )


def length_unit(plan: Plan) -> str:
    """Return the unit of the plan's spacings: "mm", or "px" for pictures."""
    return "px" if sorted(plan.median_spacing) == _PICTURES else "mm"


def plan_head(plan: Plan) -> tuple[str, ...]:
    """Return the names of the columns of `plan_rows`."""
    spacing = f"spacing ({length_unit(plan)})"
    return "configuration", spacing, "median shape", "patch", "batch", "stages", "GB", "patch sees"


def plan_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return the cells of `plan_head`'s columns for each configuration."""
    return [
        (
            name,
            " x ".join(f"{length:.3g}" for length in c.spacing),
            " x ".join(f"{voxels:g}" for voxels in c.median_shape),
            " x ".join(map(str, c.patch_size)),
            str(c.batch_size),
            str(len(c.network.features)),
            "?" if c.memory_gb is None else f"{c.memory_gb:.1f}",
            f"{100 * patch_share(c):.3g} %",
        )
        for name, c in plan.configurations.items()
    ]


def plan_reasons(plan: Plan) -> dict[str, list[str]]:
    """Return why each configuration is as it is."""
    return {name: [*c.reasons, *_over_budget(plan, c)] for name, c in plan.configurations.items()}


def patch_share(configuration: Configuration) -> float:
    """Return the share of the median image that one patch sees, 0 to 1."""
    axes = zip(configuration.patch_size, configuration.median_shape, strict=True)
    return prod(min(1.0, size / whole) for size, whole in axes)


def _over_budget(plan: Plan, c: Configuration) -> list[str]:
    if c.memory_gb is None or c.memory_gb <= plan.memory_gb:
        return []
    return [
        f"predicted {c.memory_gb:.1f} GB are more than {plan.memory_gb:g} GB: the rule for the patch counts feature "
        f"maps, not parameters, nor the loss over {plural(plan.labels.n_channels, 'output channel')}; "
        "a smaller batch or patch, or a smaller budget, fits"
    ]
