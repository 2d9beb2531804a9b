"""Tables of a notebook: small, escaped HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, lines: Sequence[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """A table, its head first, whose first column holds names and the others numbers; everything is escaped."""

    def row(tag: str, cells: Sequence[str]) -> str:
        sides = ["left", *["right"] * (len(cells) - 1)]
        inside = "".join(
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{inside}</tr>"

    head, *rows = lines
    body = "".join(row("td", cells) for cells in rows)
    below = "".join(f"<div><small>{escape(note)}</small></div>" for note in notes)
    return (
        f"<div><table><caption>{escape(title)}</caption><thead>{row('th', head)}</thead><tbody>{body}</tbody></table>"
        f"{below}</div>"
    )
