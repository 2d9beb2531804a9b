"""A plan as a person wants to read it: the table, then why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from textwrap import wrap

from nnunet_lite.plan.schema import Configuration, Plan

WIDTH = 120
_HEADER = ("configuration", "spacing (mm)", "median shape", "patch", "batch", "stages", "GB", "patch sees")
_SCHEMES = {"ct": "CT", "zscore": "z-score", "none": "as it is", "rescale_0_1": "to 0..1", "rgb_0_1": "RGB to 0..1"}


def plan_table(plan: Plan) -> str:
    """The plan as plain text, at most 120 columns: one line per configuration, then the reasons for each.

    Lengths are in mm, GB are 1e9 bytes of a training step; "patch sees" is the share of the median image in one patch.
    """
    axes = " ".join("zyx"[axis] for axis in plan.axis_order)
    title = (
        f"{plan.dataset}: {_count(plan.n_cases, 'case')}, preset {plan.preset}, budget {plan.memory_gb:g} GB, "
        f"axes {axes}, {_count(plan.labels.n_channels, 'output channel')}"
    )
    rows = [_HEADER, *(_row(name, c) for name, c in plan.configurations.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [*wrap(title, WIDTH), *wrap("channels: " + ", ".join(_channels(plan)), WIDTH, subsequent_indent="  "), ""]
    lines += [_align(row, widths) for row in rows]
    for name, configuration in plan.configurations.items():
        lines += ["", name]
        for reason in (*configuration.reasons, *_over_budget(plan, configuration)):
            lines += wrap(reason, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def patch_share(configuration: Configuration) -> float:
    """The share of the median image that one patch sees, 0 to 1."""
    axes = zip(configuration.patch_size, configuration.median_shape, strict=True)
    return prod(min(1.0, size / whole) for size, whole in axes)


def _row(name: str, c: Configuration) -> tuple[str, ...]:
    return (
        name,
        _by(f"{length:.3g}" for length in c.spacing),
        _by(f"{voxels:g}" for voxels in c.median_shape),
        _by(str(voxels) for voxels in c.patch_size),
        str(c.batch_size),
        str(len(c.network.features)),
        "?" if c.memory_gb is None else f"{c.memory_gb:.1f}",
        f"{100 * patch_share(c):.3g} %",
    )


def _align(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells)


def _channels(plan: Plan) -> list[str]:
    """Each channel with its normalisation."""
    return [
        f"{channel.name} ({_SCHEMES[channel.normalization]}{' inside the nonzero mask' if channel.use_mask else ''})"
        for channel in plan.channels
    ]


def _over_budget(plan: Plan, c: Configuration) -> list[str]:
    if c.memory_gb is None or c.memory_gb <= plan.memory_gb:
        return []
    return [
        f"predicted {c.memory_gb:.1f} GB are more than {plan.memory_gb:g} GB: the rule for the patch counts feature "
        f"maps, not parameters, nor the loss over {_count(plan.labels.n_channels, 'output channel')}; "
        "a smaller batch or patch, or a smaller budget, fits"
    ]


def _by(parts: Iterable[str]) -> str:
    return " x ".join(parts)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
