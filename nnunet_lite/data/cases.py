"""Which files make up a case: channels are numbered `_0000`, `_0001`, ..., or lie in one file; or a DICOM series."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_lite import log
from nnunet_lite.data.dicom import ENDINGS, is_series, series_folders
from nnunet_lite.data.images import SUFFIXES, ending_of, is_image, read_geometry, stem, suffix_of
from nnunet_lite.data.names import header_of
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError

_CHANNEL = re.compile(r"^(.+)_(\d{4})$")
SUPPORTED = f"Supported are {' '.join(SUFFIXES)} and DICOM series."
_MOST_CHANNELS = 8  # of one case, in separate files; more files of one name are a series


@dataclass(frozen=True)
class Case:
    """One patient's visit: one file per channel, or one file that holds all of them, and the label map.

    For an image that is a DICOM series stands its folder, or one file of several series in a folder.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None = None


def image_files(folder: Path, ending: str | None = None) -> list[Path]:
    """The readable, not hidden image files of a folder (with this ending), sorted."""
    files = (p for p in folder.iterdir() if is_image(p) and not header_of(p))
    return sorted(p for p in files if ending is None or p.name.lower().endswith(ending.lower()))


def unsupported(folder: Path, name: str = "") -> str:
    """What a folder holds instead of images, with this name or any, for the end of a message; empty if nothing."""
    files = [p for p in folder.iterdir() if p.is_file() and not is_image(p) and not p.name.startswith(".")]
    endings = Counter(p.suffix.lower() for p in files if p.suffix and (not name or p.name.startswith(f"{name}.")))
    endings.pop(".json", None)
    return "".join(f", but {plural(n, f'{ending} file')}" for ending, n in endings.most_common(1))


def find_cases(source: Path, channels: int) -> list[Case]:
    """The cases to predict: in a file, a folder of files or a folder of case folders; no labels.

    A file is an image, any of the channel files of one, or any file of a DICOM series. A folder holds any mix of
    supported files, or one DICOM series, else folders that hold one case each and name it.

    Raises
    ------
    UserError : nothing there to read, two files for one case and channel, or several cases in a case folder.
    """
    if source.is_file():
        return _of_file(source, channels)
    if not source.is_dir():
        raise UserError("there is no such file or folder", source)
    if cases := _inside(source, channels):
        others = [] if cases[0].images == (source,) else folders_in(source)
        if passed := [path.name for path in others if series_folders(path)]:
            log.warn(f"{source}: the DICOM series in {few(passed)} are not read, since the folder holds images too")
    else:
        cases = _case_folders(source, channels)
    if not cases:
        below = "; nor do the folders inside it" if any(path.is_dir() for path in source.iterdir()) else ""
        what = f"holds no image of a supported format{unsupported(source)}{below}"
        raise UserError(what, source, SUPPORTED)
    seen: dict[str, Case] = {}
    for case in cases:
        if case.id in seen:
            names = " and ".join(path.name for path in (seen[case.id].images[0], case.images[0]))
            raise UserError(f"{names} are the same case {case.id!r}", source, "Rename or remove one.")
        seen[case.id] = case
    if channels == 1 and (series := numbered_alone(cases)):
        names = " and ".join(case.images[0].name for case in series[0][:2])
        log.warn(
            f"{source}: {names} are predicted as two cases, because the model has one channel. If they are channels of "
            "one case, leave only the channel of the model in the folder"
        )
    return cases


def find_all_cases(sources: Sequence[Path], channels: int) -> list[Case]:
    """The cases to predict in several files and folders.

    Raises
    ------
    UserError : as `find_cases`, or two sources hold a case of the same name.
    """
    found: dict[str, tuple[Case, Path]] = {}
    for source in sources:
        for case in find_cases(source, channels):
            other = found.setdefault(case.id, (case, source))
            if set(other[0].images) != set(case.images):
                what = f"holds case {case.id!r}, and so does {other[1]}: their label maps would be one file"
                raise UserError(what, source, "Predict them into two folders.")
    return [case for case, _ in found.values()]


def _of_file(path: Path, channels: int) -> list[Case]:
    if not is_image(path):
        if is_series(path):
            return [Case(path.stem if path.suffix.lower() in ENDINGS else path.name, (path,))]
        raise UserError("is of no supported format", path, SUPPORTED)
    path = header_of(path) or path
    name, number = split_name(stem(path))
    alone = channels == 1 and number != 0  # then nothing beside it changes its name
    beside = [path] if alone else image_files(path.parent)
    files = [other for other in beside if split_name(stem(other))[0] == name]
    cases = [case for case in group_files(files, channels) if path in case.images]
    if not cases:
        what = f"would be channel {number} of {name}, and the model has {channels}, from 0 on"
        raise UserError(what, path, f"Give {name}_0000{suffix_of(path)}, or the folder.")
    return cases


def _inside(folder: Path, channels: int) -> list[Case]:
    """The cases in the files of a folder; all its DICOM files are one case, which is called as the folder."""
    files = image_files(folder)
    if not files and series_folders(folder) == [folder]:
        return [Case(folder.resolve().name, (folder,))]
    return group_files(files, channels)


def folders_in(parent: Path) -> list[Path]:
    """The folders of a folder that are not hidden, sorted."""
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _case_folders(parent: Path, channels: int) -> list[Case]:
    """One case per folder. Folders of DICOM series may be numbered `_0000`, `_0001`, ... as files are.

    A series may be in folders below (patient/study/series). The case has the first folder's name; if that holds
    several series, each is a case, which is called by the whole path.
    """
    folders = folders_in(parent)
    series, cases, empty = [], [], []
    for folder in folders:
        found = _inside(folder, channels)
        if len(found) > 1:
            names = ", ".join(case.images[0].name for case in found[:3]) + (" ..." if len(found) > 3 else "")
            fix = "Give the folder of the images itself, or one folder per case."
            raise UserError(f"holds {len(found)} images ({names}) where it should hold one case", folder, fix)
        below = [] if found else series_folders(folder)
        if len(below) == 1:
            series.append(folder)
        elif below:
            cases += [Case("_".join(path.relative_to(parent).parts), (path,)) for path in below]
        elif not found:
            empty.append(folder.name)
        elif found[0].images == (folder,):
            series.append(folder)
        else:
            cases.append(Case(folder.name, found[0].images))
    if empty and (series or cases):
        log.warn(f"{parent}: folders without an image are passed over: {', '.join(empty)}")
    return sorted(cases + group_files(series, channels), key=lambda case: case.id)


def _holds(path: Path, channels: int) -> bool:
    """Whether a file can be read and holds so many channels."""
    try:
        return path.is_file() and read_geometry(path, channels)[1] == channels
    except UserError:  # whoever reads the case will say why
        return False


def split_name(name: str) -> tuple[str, int | None]:
    """liver_0001 -> (liver, 1); a name without a channel number -> (name, None)."""
    match = _CHANNEL.match(name)
    return (match[1], int(match[2])) if match else (name, None)


def numbered_alone(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases called x_0000, x_0001, ... that could be the channels of a case x; a longer series could not."""
    series: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        name, number = split_name(case.id)
        if number is not None:
            series[name].append(case)
    return [
        found
        for name, found in series.items()
        if 1 < len(found) <= _MOST_CHANNELS and any(case.id == f"{name}_0000" for case in found)
    ]


def group_files(files: list[Path], channels: int, ids: Collection[str] = ()) -> list[Case]:
    """Group files, or folders of DICOM series, by their channel numbers `_0000`, `_0001`, ...

    Numbers are optional for a single file per case. Where no case has a second file, one file holds all channels. Where
    each file holds all of them, or there is only one, numbers other than `_0000` are part of a name (scan_0017), and so
    is the `_0000` beside them. Channels beyond `channels` are left out, missing ones are listed.

    Parameters
    ----------
    ids : names of which it is known that they are cases: a number after one is that of a channel.
    """
    groups: dict[str, dict[int | None, Path]] = defaultdict(dict)
    twice = []
    wholes = {path: stem(path) if suffix_of(path) else path.name for path in files}  # a DICOM series has no ending
    parts = {path: split_name(whole) for path, whole in wholes.items()}
    later = [path for path, (_, number) in parts.items() if number]
    each_is_whole = bool(later) and (channels == 1 or _holds(later[0], channels))
    numbered = {parts[path][0] for path in later}.difference(ids) if each_is_whole else set()
    for path, (name, number) in parts.items():
        if name in numbered:
            name, number = wholes[path], None
        if number in groups[name]:
            twice.append(Case(name, (path,)))
        groups[name].setdefault(number, path)
    separate = channels > 1 and any(number for numbers in groups.values() for number in numbers)
    cases = []
    for name, numbers in groups.items():
        first = next(iter(numbers.values()))
        if None in numbers:
            cases.append(Case(name, (numbers[None],)))
            twice += [Case(name, (path,)) for number, path in numbers.items() if number is not None]
        elif separate or (channels == 1 and name in ids):
            expected = (first.with_name(f"{name}_{i:04d}{ending_of(first)}") for i in range(channels))
            cases.append(Case(name, tuple(numbers.get(i, path) for i, path in enumerate(expected))))
        else:
            cases.append(Case(name, (first,)))
    return sorted(cases + twice, key=lambda case: case.id)
