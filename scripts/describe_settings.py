#!/usr/bin/env python3
"""Print every setting with its default and meaning, as Markdown: docs/reference/settings.md."""

from __future__ import annotations

import json

from pydantic import BaseModel

from nnunet_lite.settings import Settings


def describe_settings() -> str:
    """Return the text of docs/reference/settings.md."""
    lines = ["# Settings", "", "Keys of recipes and of `--set`; defaults are those of the recipe `default`."]
    for section, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            about = " ".join((kind.__doc__ or "").split())
            lines += ["", f"## {section}", "", *([about, ""] if about else [])]
            lines += ["| key | default | meaning |", "|---|---|---|"]
            for name, entry in kind.model_fields.items():
                lines.append(f"| `{section}.{name}` | `{json.dumps(entry.default)}` | {entry.description or ''} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(describe_settings(), end="")
