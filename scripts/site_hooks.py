"""A hook of mkdocs.yml: griffe reads the package without preprocess/, the import path of older scripts.

Its name is also that of the function `nnunet_lite.preprocess`, and griffe takes one name for one thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from griffe import Module, ModuleFinder

_submodules = ModuleFinder.submodules


def _documented(finder: ModuleFinder, module: Module) -> Iterator[tuple[tuple[str, ...], Path]]:
    return (found for found in _submodules(finder, module) if found[0][0] != "preprocess")


ModuleFinder.submodules = _documented  # type: ignore[method-assign,assignment]
