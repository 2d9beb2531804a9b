"""Problems of a dataset, the kinds that a user may accept, the report as text and JSON, and words for messages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

from nnunet_lite.data.geometry import ACCEPTABLE
from nnunet_lite.errors import UserError, suggest
from nnunet_lite.files import read_json, understood

Severity = Literal["error", "warning", "notice"]

_ERRORS = (
    *("invalid_json", "invalid_dataset", "missing_image", "extra_channel", "missing_label", "ambiguous_label"),
    *("duplicate_id", "unreadable", "dimensions", "channels", "grid", "shape", "spacing", "nan"),
    *("label_fraction", "label_channels", "label_value", "label_void", "label_levels", "instances", "label_lossy"),
    *("no_foreground", "no_spacing", "segments"),
)
_WARNINGS = (
    *("extra_image", "extra_label", "n_cases", "origin", "direction", "forms", "instances_likely"),
    *("label_absent", "label_outside", "constant", "two_values", "looks_like_ct", "not_ct", "duplicate_case"),
    *("few_cases", "orientation_tag", "region_order", "not_annotated", "sheared", "palettes", "inverted"),
    "segment_names",
)
_NOTICES = ("orientation", "understood")
KINDS: dict[str, Severity] = {
    **dict.fromkeys(_ERRORS, "error"),
    **dict.fromkeys(_WARNINGS, "warning"),
    **dict.fromkeys(_NOTICES, "notice"),
}
# errors about files that can be trained on
_GUESSES = ("extra_channel", "label_void", "label_levels", "instances", "no_spacing", "segments")
ACCEPTED_KINDS = (*_WARNINGS, *_GUESSES)
_MOST_ROWS = 50  # of a table in a notebook
_REPR = 5  # problems that a Report shows in Python
_LINES_SHOWN: dict[Severity, int] = {"error": 3, "warning": 3, "notice": 10}  # of each kind, the most severe first


@dataclass(frozen=True)
class Problem:
    """One problem of a dataset.

    Parameters
    ----------
    kind : str
        A stable name, see `KINDS`.
    file : str
        The file or folder.
    found : str
        What is wrong.
    expected : str
        What it should be.
    fix : str
        What to do.
    accepted : bool
        Whether the user accepts its kind: it counts as a notice.
    """

    kind: str
    file: str
    found: str
    expected: str = ""
    fix: str = ""
    accepted: bool = False

    @property
    def severity(self) -> Severity:
        """Of its kind, unless it is accepted."""
        return "notice" if self.accepted else KINDS[self.kind]

    @property
    def text(self) -> str:
        """What is wrong, and what it should be."""
        return self.found + (f", expected {self.expected}" if self.expected else "")

    @property
    def stops(self) -> bool:
        """Whether it prevents planning: an error, or a different geometry, that is not accepted."""
        return not self.accepted and (self.severity == "error" or self.kind in ACCEPTABLE)


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Parameters
    ----------
    dataset : str
        Name of the dataset.
    cases : int
        Number of cases that are not left out.
    channels : tuple of str
        Names of the channels.
    problems : tuple of Problem
        All problems.
    excluded : tuple of str
        Ids of the cases that are left out.
    """

    dataset: str
    cases: int
    channels: tuple[str, ...]
    problems: tuple[Problem, ...] = ()
    excluded: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.count("error")

    @property
    def can_be_planned(self) -> bool:
        """Whether there is no error, and no geometry to accept."""
        return not any(problem.stops for problem in self.problems)

    def count(self, severity: Severity) -> int:
        """Count the problems of a severity.

        Parameters
        ----------
        severity : str
            "error", "warning" or "notice".

        Returns
        -------
        int
            How many there are.
        """
        return sum(problem.severity == severity for problem in self.problems)

    @property
    def exit_code(self) -> int:
        """Of `nnlite check`: 2 if the dataset has errors."""
        return 0 if self.ok else 2

    def to_json(self) -> dict[str, Any]:
        """Return the content of check.json, with an entry for each problem."""
        return {
            "dataset": self.dataset,
            "ok": self.ok,
            "cases": self.cases,
            "channels": list(self.channels),
            "excluded": list(self.excluded),
            "problems": [{"severity": p.severity, **asdict(p)} for p in self.problems],
        }

    def to_text(self) -> str:
        """Return a headline and a line per problem; equal problems of several files share a line."""
        lines = [self._headline()]
        shown: Counter[str] = Counter()
        hidden: Counter[str] = Counter()
        for problem, names in by_severity(self.problems):
            kind = problem.kind
            shown[kind] += 1
            if shown[kind] > _LINES_SHOWN[problem.severity]:
                hidden[kind] += len(names)
                continue
            lines.append(f"{problem.severity}: {few(names)}: {problem.text}. {problem.fix}".rstrip() + f" [{kind}]")
        for kind, n in hidden.items():
            lines.append(f"... and {plural(n, 'more problem')} of the kind {kind}; --json shows all")
        left = {problem.kind for problem in self.problems if problem.severity != "notice"}
        if self.cases and left:
            kinds = ", ".join(sorted(left.intersection(ACCEPTED_KINDS)))
            accept = f"; --accept KIND accepts {kinds}" if kinds else ""
            lines.append(f"hint: --exclude CASE leaves out a case{accept}")
        return "\n".join(lines)

    def _headline(self) -> str:
        counts = [plural(self.count("error"), "error"), plural(self.count("warning"), "warning")]
        left_out = f" ({len(self.excluded)} left out)" if self.excluded else ""
        return f"{self.dataset}: {plural(self.cases, 'case')}{left_out}, {', '.join(counts)}"

    def __repr__(self) -> str:
        found = [f"{p.severity}: {few(names)}: {p.text}" for p, names in by_severity(self.problems)]
        rest = [f"... and {len(found) - _REPR} more; `to_text()` shows them"] if len(found) > _REPR else []
        return "\n".join([self._headline(), *found[:_REPR], *rest])

    def _repr_html_(self) -> str:
        rows = [(p.severity, few(names), p.text, p.fix) for p, names in by_severity(self.problems)]
        return html_table([("severity", "files", "problem", "fix"), *rows], [self._headline()])


def by_severity(problems: Sequence[Problem]) -> list[tuple[Problem, list[str]]]:
    """Return equal problems once, with their files; errors first.

    Parameters
    ----------
    problems : sequence of Problem
        Of one dataset.
    """
    files: dict[Problem, list[str]] = defaultdict(list)
    for problem in problems:
        files[replace(problem, file="")].append(problem.file)
    order = list(_LINES_SHOWN)
    return sorted(files.items(), key=lambda entry: order.index(entry[0].severity))


def read_problems(file: Path) -> tuple[Problem, ...]:
    """Return the problems in a check.json.

    Parameters
    ----------
    file : Path
        What `Report.to_json` returned.

    Raises
    ------
    UserError
        The file is not as nnlite writes it.
    """
    with understood(file, "Run `nnlite check` again."):
        return tuple(
            Problem(**{key: value for key, value in entry.items() if key != "severity"})
            for entry in read_json(file)["problems"]
        )


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return kinds of problems that a user accepts.

    Raises
    ------
    UserError
        There is no such kind, or it cannot be accepted.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--accept {kind!r} is no kind of problem", fix=suggest(kind, (*ACCEPTED_KINDS, *_NOTICES)))
        if kind not in (*ACCEPTED_KINDS, *_NOTICES):
            what = f"--accept {kind}: such cases cannot be trained on, or the network would learn what is wrong"
            raise UserError(what, fix="Correct the files, or leave out their cases with --exclude CASE.")
    return tuple(kinds)


def few(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of a list, and how many more there are.

    Parameters
    ----------
    names : sequence of str
        Any names.
    most : int
        How many to show.

    Returns
    -------
    str
        "a, b, c and 2 more".
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def align(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table as plain text: the first columns are aligned to the left, the others to the right.

    Parameters
    ----------
    lines : sequence of sequence of str
        The cells of each line.
    left : int
        How many columns are aligned to the left.

    Returns
    -------
    str
        A line of text for each.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * len(widths)
    rows = ([side(cell, n) for side, cell, n in zip(sides, line, widths, strict=False)] for line in lines)
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


def plural(n: int, what: str) -> str:
    """Return a number with a noun.

    Parameters
    ----------
    n : int
        How many.
    what : str
        The noun, with a regular plural.

    Returns
    -------
    str
        "1 case" or "2 cases".
    """
    return f"{n} {what}{'' if n == 1 else 's'}"


def name_cases(case_ids: Sequence[str]) -> str:
    """Return "case a" or "cases a, b, c, and 4 more"."""
    return f"{'case' if len(case_ids) == 1 else 'cases'} {few(case_ids)}"
