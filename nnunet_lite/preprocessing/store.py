"""Preprocessed cases of a data set, addressed by what they were made of.

preprocessed/
  raw.json                   hashes of the raw files, with size and time of change: an unchanged file is not read again
  3d_fullres-1c9a4e0b.json   for a configuration and what of it matters for the arrays: case id -> folder in cases/
  cases/case_001-5f.../      see stored.py

A folder's name holds a hash of the raw files and of the recipe, hence a changed label redoes one case, a changed patch
size none, and configurations whose arrays are equal share one copy. A killed run goes on with the next case.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from nnunet_lite import log
from nnunet_lite.data.dataset import Case, Dataset
from nnunet_lite.errors import UserError, describe
from nnunet_lite.files import lacks_space, locked, read_json, sweep, write_json
from nnunet_lite.planning.schema import Plan, Precision
from nnunet_lite.preprocessing.make import Make, Part, Progress, folder_name, recipe_of, short_hash
from nnunet_lite.preprocessing.raw_files import RawCase, memorize, recall, remembered
from nnunet_lite.preprocessing.stored_case import StoredCase, is_whole, read_stored
from nnunet_lite.system import in_units

# (function, items, what for) -> (item, result or why there is none), as they end
Spread = Callable[[Callable[[Any], Any], Sequence[Any], str], Iterable[tuple[Any, Any]]]

_SHOWN = 5  # failures that an error names


@dataclass(frozen=True)
class Summary:
    """What a preprocessing run did. Sizes in bytes; `cases` by configuration; `estimate` is the one given before."""

    cases: dict[str, int]
    made: int
    kept: int
    raw_bytes: int
    stored_bytes: int
    estimate: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        counts = ", ".join(f"{name} {n}" for name, n in self.cases.items())
        ratio = self.stored_bytes / max(1, self.raw_bytes)
        size = f"{in_units(self.stored_bytes)} on disk, {ratio:.2f} x the raw files"
        estimate = f" ({in_units(self.estimate)} were estimated)" if self.made else ""
        return f"cases: {counts}; {self.made} arrays made, {self.kept} kept\n{size}{estimate}"


def preprocess_dataset(
    dataset: Dataset,
    plan: Plan,
    configurations: Sequence[str],
    folder: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    precision: Precision | None = None,
    spread: Spread | None = None,
) -> Summary:
    """Preprocess every case for some configurations; what is there already is kept.

    Parameters
    ----------
    folder : the data set's `preprocessed` folder in the workspace.
    workers : the most cases at once; None follows from memory and CPUs, 0 works in this thread.
    progress : wraps the loop over the cases, such as `nnunet_lite.log.progress`.
    precision : of the stored images; None for the plan's.
    spread : does the work on other machines, see cluster.py, as many cases at once as they have CPUs.

    Raises
    ------
    UserError : no such configuration, too little free disk, or cases that failed, named with their files; the other
        cases are done nevertheless.
    """
    names = tuple(dict.fromkeys(configurations))
    for name in names:
        plan.configuration(name)
    make = Make(replace(dataset, cases=()), plan, names, folder, precision or plan.stored_as)
    with _one_at_a_time(folder):
        _sweep(folder)
        memory = folder / "raw.json"
        known = recall(folder.parent / "raw.json") | recall(memory)  # planning has read the files too
        if spread is None:
            part = make(dataset.cases, known, workers, progress)
        else:
            part = _merged(
                names, spread(make.alone, [(case, known.get(case.id)) for case in dataset.cases], "preprocess")
            )
            _sweep(folder)  # what workers that died left
        if full := next((error for error in part.failed.values() if lacks_space(error)), None):
            raise full
        if part.raw != recall(memory):
            memorize(memory, part.raw)
        for name, entries in part.index.items():
            there = {case: key for case, key in entries.items() if (folder / "cases" / key).is_dir()}
            _write_if_new(_index_path(folder, plan, name), there)
    if part.failed:
        raise _failure(part.failed, dataset)
    folders = {folder / "cases" / key for entries in part.index.values() for key in entries.values()}
    sizes = sum(_size(path) for path in folders)
    counts = {name: len(entries) for name, entries in part.index.items()}
    raw_size = sum(found.size for found in part.raw.values())
    return Summary(counts, part.made, len(folders) - part.made, raw_size, sizes, part.estimate)


def _merged(names: Sequence[str], results: Iterable[tuple[tuple[Case, RawCase | None], Part | Exception]]) -> Part:
    """What became of all cases, from what became of each, in the order of their ids."""
    parts = {case.id: result for (case, _), result in results}
    whole = Part({}, {name: {} for name in names}, {})
    for case_id in sorted(parts):
        part = parts[case_id]
        if isinstance(part, Exception):
            whole.failed[case_id] = part
            continue
        whole.raw |= part.raw
        whole.failed |= part.failed
        whole.made, whole.estimate = whole.made + part.made, whole.estimate + part.estimate
        for name, entries in part.index.items():
            whole.index[name] |= entries
    return whole


def is_preprocessed(dataset: Dataset, plan: Plan, configurations: Sequence[str], folder: Path) -> bool:
    """Whether every case is there for some configurations, made of the raw files as they are; reads none of them."""
    raw = remembered(dataset.cases, folder / "raw.json")
    indices = [_index_path(folder, plan, name) for name in configurations]
    if len(raw) < len(dataset.cases) or not all(path.is_file() for path in indices):
        return False
    return all(
        is_whole(folder / "cases" / folder_name(plan, plan.configuration(name), case, found, dataset, plan.stored_as))
        for name in configurations
        for case, found in raw.items()
    )


def open_case(folder: Path, plan: Plan, configuration: str, case_id: str) -> StoredCase:
    """A preprocessed case, from the data set's `preprocessed` folder.

    Raises
    ------
    UserError : it is not preprocessed for that configuration of that plan.
    """
    path = _index_path(folder, plan, configuration)
    key = _index(path, path.stat().st_mtime_ns).get(case_id) if path.is_file() else None
    if key is None or not is_whole(folder / "cases" / key):
        raise UserError(f"case {case_id} is not preprocessed for {configuration}", folder, "Run `nnlite preprocess`.")
    return read_stored(folder / "cases" / key, case_id)


def prune(folder: Path, plan: Plan) -> tuple[int, int]:
    """Delete the arrays that no configuration of this plan uses: how many, and their bytes."""
    with _one_at_a_time(folder):
        _sweep(folder)
        indices = {_index_path(folder, plan, name) for name in plan.configurations}
        for path in folder.glob("*-*.json"):
            if path not in indices:
                path.unlink()
        used = {key for path in indices if path.is_file() for key in read_json(path).values()}
        orphans = [path for path in folder.glob("cases/*") if path.name not in used]
        freed = sum(_size(path) for path in orphans)
        for path in orphans:
            shutil.rmtree(path)
    return len(orphans), freed


def _index_path(folder: Path, plan: Plan, name: str) -> Path:
    configuration = plan.configuration(name)
    return folder / f"{name}-{short_hash(recipe_of(plan, configuration, configuration.spacing))}.json"


def _failure(failed: dict[str, Exception], dataset: Dataset) -> UserError:
    files = {case.id: case.images[0] for case in dataset.cases}
    shown = []
    for case_id in sorted(failed)[:_SHOWN]:
        what, file = describe(failed[case_id]), str(files[case_id])
        shown.append(f"{case_id}: {what}" if file in what else f"{case_id} ({file}): {what}")
    more = f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    return UserError(
        f"{len(failed)} of {len(dataset.cases)} cases could not be preprocessed: {'; '.join(shown)}{more}".rstrip("."),
        fix="The others are done. `nnlite check` lists what is wrong with a data set.",
    )


# ------------------------------------------------------------------------------------------------------ the folder


def _one_at_a_time(folder: Path) -> AbstractContextManager[None]:
    """One process at a time works on the folder; a second waits, and finds the work done."""
    return locked(folder, lambda: log.info(f"{folder}: another process is preprocessing, waiting for it"))


def _sweep(folder: Path) -> None:
    """Delete what a killed run left half done."""
    sweep(folder, alone=True)
    sweep(folder / "cases", alone=True)


@lru_cache(maxsize=8)
def _index(path: Path, changed: int) -> dict[str, str]:
    """Case id -> folder; `changed` (ns) makes a rewritten file another one."""
    return read_json(path)


def _write_if_new(path: Path, value: dict[str, str]) -> None:
    with suppress(UserError):  # a damaged one
        if path.is_file() and read_json(path) == value:
            return
    write_json(path, value)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
