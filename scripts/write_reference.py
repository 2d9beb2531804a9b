#!/usr/bin/env python3
"""Write the pages of docs/reference/ that the code describes: commands, settings, plans.json and its JSON Schema.

usage: python scripts/write_reference.py        (after a change of an option, a setting or the plan; a test compares)
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from typer import Context
from typer.main import get_command

from nnunet_lite.cli import COMMANDS, app, command_of
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, _to_minutes

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
HEAD = "<!-- scripts/write_reference.py writes this page. -->\n\n"
KINDS = {"str": "text", "int": "whole number", "float": "number", "path": "path", "float,float": "two numbers"}
TYPES = {
    "string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`", "null": "`none`",
    "object": "table",
}  # fmt: skip
LIMITS = {
    "minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
}  # fmt: skip


def make_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n\n"


# ------------------------------------------------------------------------------------------------------------ commands


def commands_page() -> str:
    """Return the page of all commands: usage, options by panel, examples."""
    general = get_command(app)
    page = (
        f"{HEAD}# Commands\n\n`--help` of a command prints the same. Every command has `-q`, `-v`, `-h` and `--json`, "
    )
    page += f"which prints its result for scripts. Without a command:\n\n{option_table(general, ())}"
    known = {names for rows in general.panels(context(general)).values() for names, _ in rows} | {"--json"}
    for name in COMMANDS:
        command = command_of(name)
        usage = " ".join(command.get_usage(context(command, f"nnlite {name}")).split()[1:])
        page += f"## nnlite {name}\n\n{command.help}\n\n```text\n{usage}\n```\n\n{option_table(command, known)}"
        page += f"```\n{command.epilog.strip()}\n```\n\n"
    return page.rstrip() + "\n"


def context(command: Any, name: str = "") -> Context:
    return Context(command, info_name=name, **app.info.context_settings)


def option_table(command: Any, left_out: Collection[str]) -> str:
    """Return the arguments and options of a command as a table; the first one of a panel names it."""
    rows = []
    for panel, options in command.panels(context(command)).items():
        for names, text in options:
            if names in left_out:
                continue
            words = names.split(" ")
            flags = [word for word in words if word[0] in "-/"] or [word for word in words if word[0] != "<"]
            value = " ".join(words[len(flags) :])
            meaning, _, notes = text.partition("  [")
            notes = notes.removesuffix("]").split("; ")
            default = next((note.removeprefix("default: ") for note in notes if note.startswith("default: ")), "")
            limits = [note for note in notes if note and not note.startswith("default: ")]
            rows.append([panel, f"`{' '.join(flags)}`", ", ".join([*value_words(value), *limits]), meaning, default])
    for row, above in reversed(list(zip(rows[1:], rows, strict=False))):
        row[0] = "" if row[0] == above[0] else row[0]
    return make_table(("panel", "option", "value", "meaning", "default"), rows)


def value_words(value: str) -> list[str]:
    """Return what an option takes in words: its type, its choices, or the name of its value."""
    kind = value.removesuffix("...").strip("<>")
    return [KINDS[kind]] if kind in KINDS else [f"`{choice}`" for choice in kind.split("|") if choice]


# ------------------------------------------------------------------------------------------- settings and plans.json


class Schema(GenerateJsonSchema):
    """JSON Schema with `legal`: what our own validators accept, in words."""

    def function_after_schema(self, schema: Any) -> dict[str, Any]:
        check = schema["function"]["function"]
        what = inspect.getclosurevars(check).nonlocals.get("what") if inspect.isfunction(check) else None  # of must_be
        return super().function_after_schema(schema) | ({} if what is None else {"legal": what})

    def function_before_schema(self, schema: Any) -> dict[str, Any]:
        words = {"legal": "minutes, or a text: 8h, 90m, 300s"} if schema["function"]["function"] is _to_minutes else {}
        return super().function_before_schema(schema) | words


def legal_values(schema: dict[str, Any]) -> str:
    """Return the values that a JSON Schema accepts, in words."""
    if "legal" in schema:
        return str(schema["legal"])
    if "anyOf" in schema:
        words = [legal_values(one) for one in schema["anyOf"]]
        return ", or ".join(word for i, word in enumerate(words) if not any(word in other for other in words[:i]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "array":
        pair = schema.get("prefixItems", ())
        return f"[{', '.join(map(legal_values, pair) if pair else (legal_values(schema['items']), '...'))}]"
    if kind == "object" and isinstance(schema["additionalProperties"], dict):
        return f"by name: {legal_values(schema['additionalProperties'])}"
    limits = [f"{word} {schema[key]:g}" for key, word in LIMITS.items() if key in schema]
    return " and ".join([" ".join([TYPES[kind], *limits[:1]]), *limits[1:]]).replace(
        "of at least 0 and at most", "from 0 to"
    )


def settings_page() -> str:
    """Return the page of all settings."""
    page = f"""{HEAD}# Settings

Keys of recipes and of `--set`: `nnlite train 3d_fullres 0 --set optimizer.lr=0.001`, or in a recipe

```toml
base = "default"

[optimizer]
lr = 0.001
```

Defaults are those of the recipe `default`. `none` is typed as `--set training.gradient_clip=none`; a recipe leaves such
a key out. How to choose: [training](../howto/training.md#recipes).

"""
    for section, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            schema = kind.model_json_schema(schema_generator=Schema)
            page += f"## {section}\n\n{first_paragraph(schema['description'])}\n\n"
            rows = [
                (f"`{section}.{key}`", as_typed(one), legal_values(one), one["description"])
                for key, one in schema["properties"].items()
            ]
            page += make_table(("key", "default", "legal values", "meaning"), rows)
    return page.rstrip() + "\n"


def first_paragraph(text: str) -> str:
    return " ".join(text.partition("\n\nParameters")[0].split())


def as_typed(schema: dict[str, Any]) -> str:
    """Return the default of a key as a user types it; nothing where there is none."""
    if "default" not in schema:
        return ""
    default = schema["default"]
    if default is None and "none" in schema["anyOf"][0].get("enum", ()):
        return "not set"
    return f"`{default if isinstance(default, str) else json.dumps(default).replace('null', 'none')}`"


def plans_page() -> str:
    """Return the page of plans.json, object by object."""
    schema = Plan.model_json_schema(schema_generator=Schema)
    tables = describe_object(schema, schema["$defs"], "").rstrip()
    return f"""{HEAD}# plans.json

`nnlite plan` writes it, and every later step reads it. You may edit it; [files](files.md#plansjson) says which edits
stay. [plans.schema.json](plans.schema.json) is the same as a JSON Schema, for editors that check files. Sizes and
spacings are in the order (z, y, x) after `axis_order`, those of a 2d configuration (y, x). `none` is null in it.

{tables}
"""


def describe_object(schema: dict[str, Any], known: dict[str, Any], path: str) -> str:
    """Return a table of the keys of an object, then those of the objects in it."""
    rows, inside = [], ""
    for key, one in schema["properties"].items():
        place, kind, default = f"{path}.{key}".lstrip("."), "", as_typed(one)
        several = {"[]": one.get("items", {}), ".NAME": one.get("additionalProperties", {})}
        single = {"": next((part for part in one.get("anyOf", ()) if "$ref" in part), one)}
        for suffix, part in (several | single).items():
            if "$ref" in part:
                place, default = place + suffix, ""
                kind = f"[{place}](#{re.sub('[^a-z_]', '', place.lower())})"
                inside += describe_object(known[part["$ref"].rpartition("/")[2]], known, place)
        rows.append((f"`{key}`", kind or legal_values(one), default, one["description"]))
    title = f"## {path}\n\n{first_paragraph(schema['description'])}\n\n" if path else ""
    return title + make_table(("key", "value", "default", "meaning"), rows) + inside


PAGES = {
    "commands.md": commands_page,
    "settings.md": settings_page,
    "plans.md": plans_page,
    "plans.schema.json": lambda: json.dumps(Plan.model_json_schema(), indent=1) + "\n",
}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make())
