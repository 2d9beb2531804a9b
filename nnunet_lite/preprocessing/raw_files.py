"""What is known of the raw files of a data set, so that an unchanged file is not read again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.dataset import Case, Dataset
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_geometry
from nnunet_lite.data.names import companions
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, understood, write_json
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.system import cpus
from nnunet_lite.workspace import Paths

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

_COMPARED = 8  # cases, of which the contents are compared to tell datasets of one name apart


@dataclass(frozen=True)
class RawFile:
    """A raw file: its stamp (size in bytes, time of change in ns), and a hash of its contents."""

    size: int
    changed: int
    digest: str


@dataclass(frozen=True)
class RawCase:
    """The raw files of a case: images, label map, and what else an image is read from; shape and spacing of the image.

    Shape and spacing (mm) are (z, y, x) as in the file; the orientation is as in `Geometry`.
    """

    files: tuple[RawFile, ...]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str | None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def survey(
    cases: Sequence[Case], known: Mapping[str, RawCase], workers: int, progress: Progress | None = None
) -> dict[str, RawCase | Exception]:
    """Hashes and headers of cases by id, or why they cannot be had; read only where `known` is out of date."""

    def look(case: Case) -> RawCase | Exception:
        return _look(case, known.get(case.id))

    with ThreadPoolExecutor(workers or 1) as pool:
        results: Iterable[Any] = pool.map(look, cases) if workers else map(look, cases)
        found = list(progress(results, len(cases), "files") if progress else results)
    return {case.id: raw for case, raw in zip(cases, found, strict=True)}


def look_at(cases: Sequence[Case], memory: Path, workers: int | None, progress: Progress | None) -> dict[str, RawCase]:
    """Hashes and headers of the cases whose files can be read; `memory` (JSON) spares those that have not changed."""
    found = survey(cases, recall(memory), cpus() if workers is None else workers, progress)
    return {name: raw for name, raw in found.items() if isinstance(raw, RawCase)}


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


def first_change(cases: Iterable[Case], memory: Path) -> Path | None:
    """The first raw file that is not as `memory` (JSON) has it, if there is one.

    A file of another time of change is read; where its content is as before, its new time is recorded.
    """
    known, changed = recall(memory), None
    now = dict(known)
    for case in cases:
        before, found = known.get(case.id), _look(case, known.get(case.id))
        if before is None or isinstance(found, Exception) or len(before.files) != len(found.files):
            changed = next((path for path in _paths(case) if not path.is_file()), case.images[0])
            break
        pairs = zip(_paths(case), before.files, found.files, strict=True)
        changed = next((path for path, old, new in pairs if old.digest != new.digest), None)
        if changed is not None:
            break
        now[case.id] = found
    if now != known:
        memorize(memory, now)
    return changed


def same_files(dataset: Dataset, stored: Dataset, paths: Paths, moved: bool) -> bool:
    """Whether a dataset has the files of the one that is planned under its name, as far as some of its cases show.

    Parameters
    ----------
    stored : the one that is planned; its folder is another.
    moved : that folder is gone: the dataset may have been changed since, and half of the cases must agree, not all.
    """
    theirs = {case.id: case for case in stored.cases}
    shared = [case for case in dataset.cases if case.id in theirs]
    some = shared[:: max(1, len(shared) // _COMPARED)]
    known = recall(paths.preprocessed / "raw.json") | recall(paths.raw)
    equal = [_is_same(case, theirs[case.id], known.get(case.id), paths) for case in some]
    if not moved:
        return len(shared) == len(dataset.cases) == len(stored.cases) and all(equal)
    return 2 * sum(equal) >= max(1, len(some))


def _is_same(case: Case, stored: Case, known: RawCase | None, paths: Paths) -> bool:
    """Whether a case has the files of another one: by their contents, else by what the fingerprint has of the grid."""
    now = _look(case, None)
    before = known or _look(stored, None)
    if isinstance(now, Exception):
        return False
    if not isinstance(before, Exception):
        return [file.digest for file in now.files] == [file.digest for file in before.files]
    taken = Fingerprint.read(paths.fingerprint)
    cases = dict(zip(taken.case_ids, zip(taken.spacings, taken.shapes_after_crop, strict=True), strict=True))
    if case.id not in cases:
        return False
    spacing, shape = cases[case.id]
    pairs = zip(sorted(shape), sorted(now.shape), strict=True)  # the fingerprint's may be turned
    return bool(np.allclose(sorted(spacing), sorted(now.spacing))) and all(n <= m for n, m in pairs)


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
        return RawCase(files, geometry.shape, geometry.spacing, geometry.orientation)
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
    files = tuple(RawFile(**file) for file in value["files"])
    return RawCase(files, tuple(value["shape"]), tuple(value["spacing"]), value["orientation"])
