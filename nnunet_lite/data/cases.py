"""Which files make up a case: channels are numbered `_0000`, `_0001`, ..., or lie in one file."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from nnunet_lite.data.images import SUFFIXES, is_image, stem, suffix_of
from nnunet_lite.errors import UserError

_CHANNEL = re.compile(r"^(.+)_(\d{4})$")
_SUPPORTED = f"Supported are {' '.join(SUFFIXES)}."


@dataclass(frozen=True)
class Case:
    """One patient's visit: one file per channel, or one file that holds all of them, and the label map."""

    id: str
    images: tuple[Path, ...]
    label: Path | None = None


def image_files(folder: Path, ending: str | None = None) -> list[Path]:
    """The readable, not hidden image files of a folder (with this ending), sorted."""
    return sorted(p for p in folder.iterdir() if is_image(p) and (ending is None or p.name.endswith(ending)))


def find_cases(folder: Path, channels: int) -> list[Case]:
    """The cases to predict: an image (any of its channel files), or a folder of any mix of supported files; no labels.

    Raises
    ------
    UserError : nothing there to read, or two files for one case and channel.
    """
    if folder.is_file():
        if not is_image(folder):
            raise UserError("is of no supported format", folder, _SUPPORTED)
        name = split_name(stem(folder))[0]
        files = [path for path in image_files(folder.parent) if channels > 1 and split_name(stem(path))[0] == name]
        return [case for case in group_files(files or [folder], channels) if folder in case.images]
    if not folder.is_dir():
        raise UserError("there is no such file or folder", folder)
    cases = group_files(image_files(folder), channels)
    if not cases:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        below = f" Folders inside it are not searched: {', '.join(inside[:3])}." if inside else ""
        raise UserError("holds no image of a supported format", folder, _SUPPORTED + below)
    seen: dict[str, Case] = {}
    for case in cases:
        if case.id in seen:
            names = " and ".join(path.name for path in (seen[case.id].images[0], case.images[0]))
            raise UserError(f"{names} are the same case {case.id!r}", folder, "Rename or remove one.")
        seen[case.id] = case
    return cases


def split_name(name: str) -> tuple[str, int | None]:
    """liver_0001 -> (liver, 1); a name without a channel number -> (name, None)."""
    match = _CHANNEL.match(name)
    return (match[1], int(match[2])) if match else (name, None)


def group_files(files: list[Path], channels: int) -> list[Case]:
    """Group files by their channel numbers `_0000`, `_0001`, ...; these are optional for a single file per case.

    Where no case has a second file, one file holds all channels. For a single channel, a name with a number other than
    `_0000` is simply a name (scan_0017). Channels beyond `channels` are left out, missing ones are listed.
    """
    groups: dict[str, dict[int | None, Path]] = defaultdict(dict)
    twice = []
    for path in files:
        name, number = split_name(stem(path))
        if number is not None and channels == 1 and number > 0:
            name, number = stem(path), None
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
        elif separate:
            expected = (first.with_name(f"{name}_{i:04d}{suffix_of(first)}") for i in range(channels))
            cases.append(Case(name, tuple(numbers.get(i, path) for i, path in enumerate(expected))))
        else:
            cases.append(Case(name, (first,)))
    return sorted(cases + twice, key=lambda case: case.id)
