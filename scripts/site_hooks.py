"""Hooks of mkdocs.yml: notebooks become pages, and griffe reads the package without preprocess/.

That is the import path of older scripts. Its name is also that of the function `nnunet_lite.preprocess`, and griffe
takes one name for one thing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Module, ModuleFinder
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_submodules = ModuleFinder.submodules


def _documented(finder: ModuleFinder, module: Module) -> Iterator[tuple[tuple[str, ...], Path]]:
    return (found for found in _submodules(finder, module) if found[0][0] != "preprocess")


ModuleFinder.submodules = _documented  # type: ignore[method-assign,assignment]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page NAME.md for each notebook NAME.ipynb."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = file.src_uri.removesuffix("ipynb") + "md"
        files.append(File.generated(config, page, content=notebook_page(json.loads(file.content_string), file.name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to notebooks lead to their pages."""
    return markdown.replace(".ipynb)", ".md)")


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """Return a notebook as Markdown, with the outputs that are stored in it."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        parts += map(output_text, cell.get("outputs", ()))
    head, _, rest = "\n\n".join(filter(None, parts)).partition("\n")
    return f'{head}\n\n<a href="{name}.ipynb" download>Download the notebook</a>\n{rest}\n'


def output_text(output: dict[str, Any]) -> str:
    """Return an output of a cell as Markdown: the richest of a table, a picture and text."""
    data = {kind: "".join(lines) for kind, lines in output.get("data", {}).items()}
    if "text/html" in data:
        return "\n".join(line for line in data["text/html"].splitlines() if line.strip())
    if "image/png" in data:
        return f'<img alt="output" src="data:image/png;base64,{data["image/png"].strip()}">'
    text = data.get("text/plain", "".join(output.get("text", ())))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
