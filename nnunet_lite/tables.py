"""Tables of results: `align` writes one as plain text, `html_table` for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_MOST_ROWS = 50  # of a table in a notebook


def align(lines: Sequence[Sequence[str]]) -> str:
    """Write a table as plain text: the first column is aligned to the left, the others to the right.

    Parameters
    ----------
    lines : sequence of sequence of str
        The cells of each line.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = (
        [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        for first, *rest in lines
    )
    return "\n".join("  ".join(row).rstrip() for row in rows)


def html_table(lines: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Write a table as HTML, of which a notebook shows the first rows.

    Parameters
    ----------
    lines : sequence of sequence of str
        The cells of each line; those of the first are headings.
    notes : sequence of str
        A paragraph for each, below the table.
    """
    rows = [
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line)
        for tag, line in zip(("th", *("td" for _ in lines[1:])), lines, strict=True)
    ]
    left_out = len(rows[1 + _MOST_ROWS :])
    below = [f"... and {left_out} more rows"] * bool(left_out) + [*notes]
    shown = "</tr><tr>".join(rows[: 1 + _MOST_ROWS])
    return f"<table><tr>{shown}</tr></table>" + "".join(f"<p>{escape(note)}</p>" for note in below)
