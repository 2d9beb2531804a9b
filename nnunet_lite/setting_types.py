"""Kinds of values that settings have: each is checked where it is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator


def _range(legal: str, is_legal: Callable[[float, float], bool]) -> AfterValidator:
    """Refuse a pair of numbers that is not `legal`, which puts `is_legal` in words."""

    def check(limits: tuple[float, float]) -> tuple[float, float]:
        if not is_legal(*limits):
            raise ValueError(f"must be [low, high] with {legal}")
        return limits

    return AfterValidator(check)


def _axes(axes: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(axes)) != len(axes) or not set(axes) <= {0, 1, 2}:
        raise ValueError("must be different axes, each 0, 1 or 2")
    return axes


Factors = Annotated[tuple[float, float], _range("0 < low <= high", lambda low, high: 0 < low <= high)]
Deviations = Annotated[tuple[float, float], _range("0 <= low <= high", lambda low, high: 0 <= low <= high)]
Shares = Annotated[tuple[float, float], _range("0 < low <= high <= 1", lambda low, high: 0 < low <= high <= 1)]
Axes = Annotated[tuple[int, ...], AfterValidator(_axes)]


def _minutes(value: Any) -> Any:
    """ "8h", "90m" and "300s" in minutes; anything else as it is."""
    number, unit = (value[:-1], value[-1:]) if isinstance(value, str) else (value, "")
    try:
        return float(number) * {"h": 60.0, "m": 1.0, "s": 1 / 60}[unit]
    except (KeyError, TypeError, ValueError):
        return value


def _weights(weights: tuple[float, ...]) -> tuple[float, ...]:
    if min(weights, default=0) < 0 or sum(weights) == 0:
        raise ValueError("must be numbers of at least 0, not all of them 0")
    return weights


def _whole_path(factory: str) -> str:
    """A factory's file by its whole path, so that the model can be read from any folder."""
    where, _, name = factory.rpartition(":")
    return f"{Path(where).expanduser().absolute()}:{name}" if where.endswith(".py") else factory


Weights = Annotated[tuple[float, ...], AfterValidator(_weights)]
Minutes = Annotated[float, BeforeValidator(_minutes)]
Factory = Annotated[str, AfterValidator(_whole_path)]
