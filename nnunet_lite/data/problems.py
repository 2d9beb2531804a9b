"""What is wrong with a data set, and how a person is told."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "notice"]

KINDS: dict[str, Severity] = {
    "invalid_json": "error",
    "invalid_dataset": "error",
    "missing_image": "error",
    "extra_channel": "error",
    "extra_image": "warning",
    "missing_label": "error",
    "extra_label": "warning",
    "ambiguous_label": "error",
    "n_cases": "warning",
    "duplicate_id": "error",
    "unreadable": "error",
    "dimensions": "error",
    "channels": "error",
    "grid": "error",
    "shape": "error",
    "spacing": "error",
    "origin": "warning",
    "direction": "warning",
    "forms": "warning",
    "no_spacing": "warning",
    "nan": "error",
    "label_fraction": "error",
    "label_channels": "error",
    "label_value": "error",
    "label_void": "error",
    "label_levels": "error",
    "instances": "error",
    "instances_likely": "warning",
    "label_lossy": "error",
    "no_foreground": "error",
    "label_absent": "warning",
    "constant": "warning",
    "duplicate_case": "warning",
    "few_cases": "warning",
    "looks_like_ct": "warning",
    "not_ct": "warning",
    "orientation_tag": "warning",
    "orientation": "notice",
    "understood": "notice",
}
_LINES_SHOWN: dict[Severity, int] = {"error": 3, "warning": 3, "notice": 10}
TO_ACCEPT = ("origin", "direction")  # warnings without whose acceptance nothing is planned


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a stable kind (see `KINDS`), the file, what was found, what was expected, what to do."""

    kind: str
    file: str
    found: str
    expected: str = ""
    fix: str = ""

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind]

    def stops(self, accept_geometry: bool) -> bool:
        """Whether nothing can be planned with it: errors, and a geometry that differs until that is accepted."""
        return self.severity == "error" or (self.kind in TO_ACCEPT and not accept_geometry)


@dataclass(frozen=True)
class Report:
    """Everything that a check found."""

    dataset: str
    cases: int
    channels: tuple[str, ...]
    problems: tuple[Problem, ...] = ()
    accept_geometry: bool = False

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not any(problem.severity == "error" for problem in self.problems)

    @property
    def can_be_planned(self) -> bool:
        """Whether there is no error, and no geometry that has to be accepted."""
        return not any(problem.stops(self.accept_geometry) for problem in self.problems)

    def count(self, severity: Severity) -> int:
        return sum(problem.severity == severity for problem in self.problems)

    @property
    def exit_code(self) -> int:
        """Of `nnlite check`: 2 if the dataset has errors."""
        return 0 if self.ok else 2

    def to_json(self) -> dict[str, Any]:
        """Everything, one entry per problem."""
        return {
            "dataset": self.dataset,
            "ok": self.ok,
            "cases": self.cases,
            "channels": list(self.channels),
            "problems": [{"severity": p.severity, **asdict(p)} for p in self.problems],
        }

    def to_text(self) -> str:
        """For a person: a headline, then a line per problem; equal problems of many files share one line."""
        counts = [plural(self.count("error"), "error"), plural(self.count("warning"), "warning")]
        lines = [f"{self.dataset}: {plural(self.cases, 'case')}, {', '.join(counts)}"]
        same: dict[tuple[Severity, str, str, str, str], list[str]] = defaultdict(list)
        for p in self.problems:
            same[p.severity, p.kind, p.found, p.expected, p.fix].append(p.file)
        shown: Counter[str] = Counter()
        hidden: Counter[str] = Counter()
        order = {"error": 0, "warning": 1, "notice": 2}
        for (severity, kind, found, expected, fix), files in sorted(same.items(), key=lambda e: order[e[0][0]]):
            shown[kind] += 1
            if shown[kind] > _LINES_SHOWN[severity]:
                hidden[kind] += len(files)
                continue
            wanted = f", expected {expected}" if expected else ""
            lines.append(f"{severity}: {few(files)}: {found}{wanted}. {fix}".rstrip() + f" [{kind}]")
        lines += [
            f"... and {plural(n, 'more problem')} of the kind {kind}; --json shows all" for kind, n in hidden.items()
        ]
        return "\n".join(lines)


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def plural(n: int, what: str) -> str:
    """1 case, 2 cases."""
    return f"{n} {what}{'' if n == 1 else 's'}"
