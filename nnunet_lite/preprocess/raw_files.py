"""What is known of the raw files of a data set, so that an unchanged file is not read again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_lite.data.dataset import Case
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_geometry
from nnunet_lite.data.names import companions
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import read_json, understood, write_json


@dataclass(frozen=True)
class RawFile:
    """A raw file: its stamp (size in bytes, time of change in ns), and a hash of its contents."""

    size: int
    changed: int
    digest: str


@dataclass(frozen=True)
class RawCase:
    """The raw files of a case: images, label map, and what else an image is read from; shape and spacing of the image.

    Shape and spacing (mm) are (z, y, x).
    """

    files: tuple[RawFile, ...]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def survey(cases: Sequence[Case], known: Mapping[str, RawCase], workers: int) -> dict[str, RawCase | Exception]:
    """Hashes and headers of cases by id, or why they cannot be had; read only where `known` is out of date."""
    if workers:
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda case: _look(case, known.get(case.id)), cases))
    else:
        found = [_look(case, known.get(case.id)) for case in cases]
    return {case.id: raw for case, raw in zip(cases, found, strict=True)}


def recall(memory: Path) -> dict[str, RawCase]:
    """What was known when `memory` (JSON) was written; nothing where it is gone or damaged: it can be had again."""
    try:
        with understood(memory):
            return {name: _from_json(value) for name, value in read_json(memory).items()}
    except UserError:
        return {}


def memorize(memory: Path, raw: Mapping[str, RawCase]) -> None:
    write_json(memory, {name: asdict(found) for name, found in raw.items()})


def remembered(cases: Iterable[Case], memory: Path) -> dict[str, RawCase]:
    """What `memory` (JSON) knows of the cases whose files have not changed since; no file is read."""
    known = recall(memory)
    return {
        case.id: known[case.id]
        for case in cases
        if case.id in known
        and [(file.size, file.changed) for file in known[case.id].files] == [_stamp(path) for path in _paths(case)]
    }


def _paths(case: Case) -> list[Path]:
    others = [other for path in case.images for other in companions(path)]
    return [*case.images, *([case.label] if case.label else []), *dict.fromkeys(others)]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change in ns; None for a file that is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _look(case: Case, known: RawCase | None) -> RawCase | Exception:
    paths = _paths(case)
    before: tuple[RawFile | None, ...] = (
        known.files if known and len(known.files) == len(paths) else (None,) * len(paths)
    )
    try:
        files = tuple(_file(path, old) for path, old in zip(paths, before, strict=True))
        if known and files == known.files:
            return known
        geometry: Geometry = read_geometry(case.images[0])[0]
        return RawCase(files, geometry.shape, geometry.spacing)
    except (UserError, OSError) as error:
        return error


def _file(path: Path, known: RawFile | None) -> RawFile:
    stat = path.stat()
    if known and (stat.st_size, stat.st_mtime_ns) == (known.size, known.changed):
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return RawFile(stat.st_size, stat.st_mtime_ns, digest)


def _from_json(value: dict[str, Any]) -> RawCase:
    return RawCase(tuple(RawFile(**file) for file in value["files"]), tuple(value["shape"]), tuple(value["spacing"]))
