"""Stamp the raw files of a dataset, so that an unchanged file is never read twice and a changed one is noticed.

A stamp is size, time of change and a hash of the content. raw.json holds the stamps of all cases: one in the dataset's
folder as the dataset was planned, one in preprocessed/ as it was preprocessed. `dataset_paths` and `reason_to_plan`
compare a raw dataset with what is planned under its name.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from stat import S_ISREG

from pydantic import TypeAdapter

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, dataset_from_json, dataset_to_json, stored_dataset
from nnunet_lite.data.dicom import series_folders
from nnunet_lite.data.discovery import images_below
from nnunet_lite.data.images import is_dicom, read_geometry
from nnunet_lite.data.names import companions, visible
from nnunet_lite.data.problems import name_cases, plural
from nnunet_lite.errors import UserError
from nnunet_lite.files import is_folder_name, read_json, understood, write_json, write_text
from nnunet_lite.system import cpus
from nnunet_lite.workspace import Paths

_COMPARED = 8  # cases whose contents are compared where two datasets have one name


@dataclass(frozen=True)
class RawFile:
    """The stamp of a raw file.

    Parameters
    ----------
    size : int
        Bytes.
    changed : int
        Time of change in ns.
    digest : str
        SHA-256 of the content.
    """

    size: int
    changed: int
    digest: str


@dataclass(frozen=True)
class RawCase:
    """The stamps of a case's files, and the grid of its image.

    Parameters
    ----------
    files : tuple of RawFile
        Images, label map, and what else an image is read from.
    shape : tuple of int
        Voxels (z, y, x) as in the file.
    spacing : tuple of float
        mm (z, y, x) as in the file.
    orientation : str or None
        As in `Geometry`.
    """

    files: tuple[RawFile, ...]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str | None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def digests(self) -> list[str]:
        return [file.digest for file in self.files]


_STAMPS = TypeAdapter(dict[str, RawCase])


def scan_raw_cases(
    cases: Sequence[Case], known: Mapping[str, RawCase], workers: int | None = None
) -> tuple[dict[str, RawCase], dict[str, Exception]]:
    """Stamp the files of some cases.

    Parameters
    ----------
    cases : sequence of Case
        The cases.
    known : mapping of str to RawCase
        Earlier stamps by case id; a file of equal size and time of change is not read.
    workers : int, optional
        Threads; None for one per CPU, 0 for none.

    Returns
    -------
    tuple of two dicts
        By case id the stamps, and why the other cases have none.
    """
    workers = cpus() if workers is None else workers

    def scan(case: Case) -> RawCase | Exception:
        try:
            return _scan(case, known.get(case.id))
        except (UserError, OSError) as error:
            return error

    with ThreadPoolExecutor(workers or 1) as pool:
        results: Iterable[RawCase | Exception] = pool.map(scan, cases) if workers else map(scan, cases)
        found = dict(zip((case.id for case in cases), log.progress(results, len(cases), "files"), strict=True))
    stamps = {case_id: raw for case_id, raw in found.items() if isinstance(raw, RawCase)}
    return stamps, {case_id: raw for case_id, raw in found.items() if isinstance(raw, Exception)}


def read_stamps(file: Path) -> dict[str, RawCase]:
    """Read a raw.json; nothing where it is missing or damaged, because the stamps can be taken again."""
    try:
        with understood(file):
            return _STAMPS.validate_python(read_json(file))
    except UserError:
        return {}


def known_stamps(paths: Paths) -> dict[str, RawCase]:
    """Return the latest stamps of a dataset: those of preprocessing, otherwise those of planning."""
    return read_stamps(paths.raw) | read_stamps(paths.preprocessed / "raw.json")


def write_stamps(file: Path, raw: Mapping[str, RawCase]) -> None:
    """Write a raw.json."""
    write_text(file, _STAMPS.dump_json(dict(raw), indent=1).decode() + "\n")


def unchanged_cases(cases: Iterable[Case], file: Path) -> dict[str, RawCase]:
    """Return the stamps in a raw.json of the cases whose files have the same size and time; no file is read."""
    known = read_stamps(file)
    return {
        case.id: known[case.id]
        for case in cases
        if case.id in known
        and [(stamp.size, stamp.changed) for stamp in known[case.id].files] == [_size_and_time(p) for p in _paths(case)]
    }


def first_change(cases: Sequence[Case], file: Path) -> Path | None:
    """Return the first raw file whose content differs from its stamp in a raw.json, None where all are equal.

    A file of another time of change and equal content gets a new stamp.
    """
    known = read_stamps(file)
    now, _ = scan_raw_cases(cases, known)
    for case in cases:
        if changed := changed_files(case, known.get(case.id), now.get(case.id)):
            return changed[0]
    if now != known:
        write_stamps(file, now)
    return None


def changed_files(case: Case, before: RawCase | None, after: RawCase | None) -> list[Path]:
    """Return the files of a case whose contents differ between two stamps; one that is missing, or its image, if some
    are missing or new."""
    if before is None or after is None or len(before.files) != len(after.files):
        return [next((path for path in _paths(case) if not path.is_file()), case.images[0])]
    stamps = zip(_paths(case), before.files, after.files, strict=True)
    return [path for path, old, new in stamps if old.digest != new.digest]


def warn_of_new_files(dataset: Dataset, workspace: Path) -> None:
    """Warn of files that were added to a folder since `nnlite init` listed its cases.

    Parameters
    ----------
    dataset : Dataset
        A raw dataset, which `init` may have written.
    workspace : Path
        The workspace, which is not searched.
    """
    table = dataset.root / "dataset.json"
    match read_json(table).get("source") if table.is_file() else None:  # other programs may write that key, too
        case {"folder": str(source), "files": int(listed)}:
            n = len(images_below(Path(source), (workspace, dataset.root))[0]) - listed
            if n > 0:
                what = f"{plural(n, 'file')} came after `nnlite init` listed the cases in {table}"
                again = f"run `nnlite init {shlex.quote(source)}` again, with the options of the first time"
                log.warn_once(f"{source}: {what}, and are not in the dataset; {again}")


def dataset_paths(workspace: Path, dataset: Dataset) -> Paths:
    """Return where a raw dataset has its files in a workspace; log if it was planned in another folder.

    Parameters
    ----------
    workspace : Path
        The workspace.
    dataset : Dataset
        The raw dataset.

    Raises
    ------
    UserError
        The dataset's name cannot be that of a folder, its raw data are in that place, or another dataset of that name
        is in the workspace.
    """
    paths, root = Paths(workspace / dataset.name), dataset.root
    planned = paths.dataset.is_file()  # maybe by a version that took other names, too
    if not (planned or is_folder_name(dataset.name)):
        what = f"{dataset.name!r:.90} is no name for a dataset, which takes it from its folder"
        raise UserError(what, root, "Rename the folder: at most 80 letters, without / \\ and :, not hidden.")
    if paths.root.resolve() == root.resolve():
        raise UserError(f"is itself in the workspace {workspace}", root, "Give another folder with --workspace.")
    if not planned:
        return paths
    with understood(paths.dataset, "Move it away."):
        stored = dataset_from_json(read_json(paths.dataset))
    if stored.root.resolve() == root.resolve():
        return paths
    moved = not stored.root.exists()
    if not _has_same_files(dataset, stored, paths, moved):
        what = f"the workspace {workspace} has another dataset called {dataset.name}, with other files, "
        where = f"from {stored.root}{', which is gone' if moved else ''}"
        raise UserError(what + where, root, "Give another folder with --workspace, or rename one of the two.")
    what = f"moved here from {stored.root}" if moved else f"has the same files as {stored.root}"
    log.info(f"{root}: {what}, and counts as the dataset {dataset.name} of the workspace {workspace}")
    return paths


def reason_to_plan(dataset: Dataset, paths: Paths) -> str | None:
    """Say why there is no plan of exactly these cases and files; None if there is one.

    A dataset that was moved is not planned again: the new places of its files are recorded.

    Parameters
    ----------
    dataset : Dataset
        The raw dataset.
    paths : Paths
        Its files in the workspace.
    """
    if not all(file.is_file() for file in (paths.plans, paths.dataset, paths.fingerprint)):
        return "is not planned yet"
    planned = stored_dataset(paths.dataset)
    now, before = ({case.id for case in each.cases} for each in (dataset, planned))
    changes = {"lacks": sorted(before - now), "also has": sorted(now - before)}
    if what := [f"{verb} {name_cases(names)}" for verb, names in changes.items() if names]:
        return f"has changed since it was planned: it {' and '.join(what)}"
    new, old = map(_with_relative_paths, (dataset, planned))
    if other := [field.name for field in fields(Dataset) if getattr(new, field.name) != getattr(old, field.name)]:
        names = {"cases": "files", "value_map": "label values", "accept": "kinds of --accept"}
        return f"was planned with other {' and '.join(names.get(name, name) for name in other)}"
    if not paths.raw.is_file():
        return f"was planned before {paths.raw.name} was kept, which shows whether a file has changed"
    if (changed := first_change(dataset.cases, paths.raw)) is not None:
        return f"has changed since it was planned ({changed}{'' if changed.is_file() else ' is gone'})"
    if dataset != planned:
        write_json(paths.dataset, dataset_to_json(dataset))
    return None


def _with_relative_paths(dataset: Dataset) -> Dataset:
    """Return the dataset with its files relative to its folder."""

    def relative(file: Path) -> Path:
        return file.relative_to(dataset.root) if file.is_relative_to(dataset.root) else file

    cases = (
        replace(case, images=tuple(map(relative, case.images)), label=case.label and relative(case.label))
        for case in dataset.cases
    )
    return replace(dataset, root=Path(), cases=tuple(cases), excluded=())


def _has_same_files(dataset: Dataset, stored: Dataset, paths: Paths, moved: bool) -> bool:
    """Compare the content of some cases with that of the dataset that is planned under the same name.

    Parameters
    ----------
    dataset : Dataset
        The dataset at hand.
    stored : Dataset
        The planned dataset, which is in another folder.
    paths : Paths
        The files of the planned dataset.
    moved : bool
        The folder of the planned dataset does not exist any more. It may have changed since, so half of the cases must
        agree, not all.

    Returns
    -------
    bool
        Whether they are the same dataset.
    """
    planned, left_out = ({case.id: case for case in cases} for cases in (stored.cases, stored.excluded))
    cases = [case for case in dataset.cases if case.id not in left_out]
    shared = [case for case in cases if case.id in planned]
    some = shared[:: max(1, len(shared) // _COMPARED)]
    known = read_stamps(paths.preprocessed / "raw.json") | read_stamps(paths.raw)
    before = scan_raw_cases([planned[case.id] for case in some if case.id not in known], {})[0] | known
    now, _ = scan_raw_cases(some, {})
    equal = sum(
        case.id in before and now[case.id].digests == before[case.id].digests for case in some if case.id in now
    )
    if moved:
        return 2 * equal >= max(1, len(some))
    return len(shared) == len(cases) == len(planned) and equal == len(some)


def _paths(case: Case) -> list[Path]:
    images = [file for path in case.images for file in _files_of(path)]
    others = [other for path in images for other in companions(path)]
    return [*images, *([case.label] if case.label else []), *dict.fromkeys(others)]


def _files_of(image: Path) -> list[Path]:
    """Return the file of an image; of a DICOM series all files in its folders."""
    if not image.is_dir() and not is_dicom(image):
        return [image]
    folders = series_folders(image if image.is_dir() else image.parent)
    return sorted(file for folder in folders for file in visible(folder) if file.is_file())


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _scan(case: Case, known: RawCase | None) -> RawCase:
    paths = _paths(case)
    before: Sequence[RawFile | None] = known.files if known and len(known.files) == len(paths) else [None] * len(paths)
    files = tuple(_stamp(path, old) for path, old in zip(paths, before, strict=True))
    if known and files == known.files:
        return known
    geometry = read_geometry(case.images[0])[0]
    return RawCase(files, geometry.shape, geometry.spacing, geometry.orientation)


def _stamp(path: Path, known: RawFile | None) -> RawFile:
    try:
        stat = path.stat()
    except FileNotFoundError:
        fix = "Restore it, or plan the dataset without this case."
        raise UserError("does not exist any more", path, fix) from None
    if not S_ISREG(stat.st_mode):  # reading a pipe or a device would not end
        raise UserError("is a pipe or a device, not a file", path)
    if known and (stat.st_size, stat.st_mtime_ns) == (known.size, known.changed):
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return RawFile(stat.st_size, stat.st_mtime_ns, digest)
