"""Tables of the page: what each cell shows, and the exact value that it is sorted by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A cell.

    Parameters
    ----------
    value : the number with all its digits; None for a text, or where it does not apply.
    share : 0 to 1, drawn as a bar behind the text.
    """

    text: str
    value: float | None = None
    share: float | None = None


Line = list[Cell | str]


@dataclass(frozen=True)
class Row:
    """A row; one of a case opens its pictures."""

    cells: tuple[Cell, ...]
    case: str = ""
    model: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by each column. The first column holds names; `sorted_by` counts from 0."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    sorted_by: int | None = None
    texts: tuple[int, ...] = (0,)  # columns that hold no numbers

    @classmethod
    def plain(cls, caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell | str]], **more: object) -> Table:
        made = tuple(Row(tuple(c if isinstance(c, Cell) else Cell(c) for c in row)) for row in rows)
        return cls(caption, tuple(head), made, **more)  # type: ignore[arg-type]


def number(value: float | None, form: str = ".3f", unit: str = "") -> Cell:
    """A number, "n/a" where there is none."""
    if value is None:
        return Cell("n/a")
    return Cell(f"{value:{form}}{unit}", float(value))


def score(value: float | None) -> Cell:
    """A Dice or another share of one."""
    return Cell("n/a") if value is None else Cell(f"{value:.3f}", float(value), min(max(float(value), 0.0), 1.0))


def interval(low: float | None, high: float | None, form: str = ".3f") -> str:
    return "n/a" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def by(values: Sequence[float], form: str = "g") -> str:
    """40 × 56 × 40"""
    return " × ".join(f"{value:{form}}" for value in values)
