"""Docstrings, comments, messages, help and documentation are plain technical English: a list of words that are not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "nnunet_lite").rglob("*.py"), *(ROOT / "nnunet_lite").rglob("*.j2"), *(ROOT / "docs").rglob("*.md"),
    ROOT / "README.md", *(ROOT / "configs").rglob("*.toml"),
]  # fmt: skip
ODD = re.compile(
    r"\b(mend(ed|s)?|anew|lies?|tells?|told|alike|thereof|goes on|go on|so many|stands? for|the house|nobody|borne out"
    r"|bears out|for want of|beside it|rooms|is asked for|what is there|by now|as ever|data sets?)\b",
    re.IGNORECASE,
)


def odd_lines(file: Path) -> list[str]:
    lines = enumerate(file.read_text().splitlines(), 1)
    return [f"{file.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in lines if ODD.search(line)]


def test_the_list_finds_words_and_not_parts_of_words() -> None:
    assert ODD.search("Begin anew.") and ODD.search("It LIES there") and not ODD.search("families renewed; untold")


@pytest.mark.parametrize("page", sorted({str(file.relative_to(ROOT)) for file in PAGES}))
def test_a_page_has_no_odd_words(page: str) -> None:
    assert not odd_lines(ROOT / page), "say it in plain technical English"
