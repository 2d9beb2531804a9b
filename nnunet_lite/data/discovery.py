"""Find the cases in what people have: a folder for each patient, masks next to images, a table, DICOM with masks.

A label map is a file with a word such as "mask" in its name or folder, or one of the user's pattern. What remains of
its path without these words names the case: P001/seg.nii.gz is of P001, x_mask.tif of x. The images of a case have all
words of that name in their paths, in the same order; the words that remain name the channel: P001/P001_t1.nii.gz is t1.
What fits two cases, or differs between cases, is refused or left out, never guessed.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path, PurePath
from unicodedata import normalize

from nnunet_lite.data.cases import Case, count_endings
from nnunet_lite.data.dicom import dicom_class, is_scan
from nnunet_lite.data.images import is_image
from nnunet_lite.data.names import LABEL_WORD, companions, ending_of, has_label_word, header_of, stem, suffix_of
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_table
from nnunet_lite.workspace import IMAGE_FOLDERS

_NOT_SEARCHED = ("__MACOSX", "imagesTs", "labelsTs")  # of archives made on a Mac; test cases in nnU-Net's layout
_CHOOSE = (
    "A case has one label map, with a word such as mask, seg or label in its name. Say which files to take: --label "
    "'*_tumour.nii.gz' (what * replaces names the case), --image '*_t1.nii.gz' (once for each channel)."
)
_MERGE = (
    "A case has one label map. Merge masks of several structures into one file with a value for each, or take one of "
    "them: --label "
)
CONTOURS = "1.2.840.10008.5.1.4.1.1.481.3"  # RTSTRUCT
_MASKS = (CONTOURS, "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # and segmentations
_COLUMNS = "The first line names the columns: case, label, and image or a column for each channel."

NO_IMAGE, NO_MASK = "label maps of no image", "images without label map"  # reasons to leave files out

Words = tuple[str, ...]


@dataclass(frozen=True)
class Discovery:
    """The cases that were found.

    Parameters
    ----------
    cases : tuple of Case
        Label maps of DICOM masks are still to be written.
    channels : tuple of str
        Names of the images of a case, in their order.
    left_out : dict of str to list of str
        Reason -> files, or other names, that no case uses.
    """

    cases: tuple[Case, ...]
    channels: tuple[str, ...]
    left_out: dict[str, list[str]]


@dataclass(frozen=True)
class Files:
    """What is in a folder and below it.

    Parameters
    ----------
    root : Path
        The folder.
    images : list of Path
        Images and label maps; a DICOM series by its folder.
    dicom : dict of Path to str
        DICOM files with the UIDs of their classes.
    others : list of Path
        Files of no supported format.
    """

    root: Path
    images: list[Path]
    dicom: dict[Path, str]
    others: list[Path]

    @property
    def masks(self) -> list[Path]:
        """Segmentations and contours."""
        return [path for path, uid in self.dicom.items() if uid in _MASKS]


def files_below(root: Path, skip: Iterable[Path] = ()) -> Files:
    """Sort the files in a folder and below it, without hidden ones, by what they are.

    Parameters
    ----------
    root : Path
        The folder. Links are followed.
    skip : iterable of Path
        Folders that are not searched.

    Returns
    -------
    Files
        Each list is sorted.
    """
    images, rest = images_below(root, skip)
    used = {other for path in images for other in companions(path)}
    classes = {path: dicom_class(path) for path in rest if not is_image(path) and path not in used}
    dicom = {path: uid for path, uid in classes.items() if uid is not None}
    series = {path.parent for path, uid in dicom.items() if is_scan(uid)}
    others = [path for path, uid in classes.items() if uid is None]
    return Files(root, sorted({*images, *series}), dict(sorted(dicom.items())), sorted(others))


def images_below(root: Path, skip: Iterable[Path] = ()) -> tuple[list[Path], list[Path]]:
    """List the images in a folder and below it, and the other files, without hidden ones; no file is opened.

    Parameters
    ----------
    root : Path
        The folder. Links are followed.
    skip : iterable of Path
        Folders that are not searched.

    Returns
    -------
    tuple of list of Path
        The images, and the rest, with headers and DICOM files.
    """
    entered = {root.resolve(), *(folder.resolve() for folder in skip)}
    found: list[Path] = []
    for folder, inside, names in os.walk(root, followlinks=True):
        new = {name: (Path(folder) / name).resolve() for name in inside if name not in _NOT_SEARCHED and name[0] != "."}
        inside[:] = sorted(name for name, real in new.items() if real not in entered)
        entered.update(new.values())
        found += [Path(folder) / name for name in names if name[0] != "."]
    images = [path for path in found if is_image(path) and not header_of(path)]
    known = set(images)
    return images, [path for path in found if path not in known]


def cases_by_name(files: Files, images: Sequence[str] = (), labels: Sequence[str] = ()) -> Discovery:
    """Match label maps with images by their paths.

    Parameters
    ----------
    files : Files
        What the folder contains.
    images : sequence of str
        Patterns of images, one for each channel, such as "*_t1.nii.gz". Empty: all files that are no label maps.
    labels : sequence of str
        Patterns of label maps. Empty: files with a word such as "mask" in their names.

    Returns
    -------
    Discovery
        The cases.

    Raises
    ------
    UserError
        There are no label maps or no images, or it is not clear which belong together.
    """
    root, paths = files.root, {path: path.relative_to(files.root) for path in files.images}
    called = [path for path in paths if suffix_of(path) and has_label_word(paths[path])]
    maps = {path for path in paths if any(map(paths[path].match, labels))} if labels else {*called}
    scans = {path for path in paths if any(map(paths[path].match, images))} if images else paths.keys() - called
    scans = scans - maps
    parts = {label: _parts_of_case(paths[label], labels) for label in sorted(maps)}
    ids = _case_ids(root, parts)
    words = {path: (_words(*paths[path].parts[:-1]), _words(_name(path))) for path in sorted(scans)}
    groups, of_case = _group_images(parts, words, bool(images))
    for option, patterns, found in (("--label", labels, maps), ("--image", images, scans)):
        if patterns and not found:
            what = f"no file has a name like {option} {' '.join(map(repr, patterns))}"
            raise UserError(what + _unsupported(files, patterns), root, _CHOOSE)
    if not groups or (2 * len(groups) <= len(maps) and not labels):
        what = "no label map was found"
        if maps:
            n_maps = plural(len(maps), "label map")
            what = f"{len(groups)} of {n_maps} have the name of an image. Label maps: {_some(maps, root)}"
        what = f"{what}; images: {_some(scans, root) or 'none'}{_unsupported(files)}"
        inside = sorted({path.parent.as_posix() for path in paths.values()})
        a, b = inside if len(inside) == 2 else ("", "")
        fix = _CHOOSE + (f" If {a} holds the images: --image '{a}/*' --label '{b}/*'." if b else "")
        several = [name for name, n in Counter(path.name for path in sorted(maps)).items() if n > 1]
        raise UserError(what, root, f"{_MERGE}'{several[0]}'." if several[1:] else fix)
    chosen = {pattern: _channel_name(_words(_name(Path(pattern)))) for pattern in images}
    channels: dict[Path, dict[str, Path]] = {label: {} for label in groups}
    spelling = {name.lower(): name for name in chosen.values()}
    for label, image in ((label, image) for label, found in groups.items() for image in found):
        folders, own = (_without(some, of_case[label]) for some in words[image])
        matched = [name for pattern, name in chosen.items() if paths[image].match(pattern)]
        name = matched[0] if matched else _channel_name(own or folders)
        name = spelling.setdefault(name.lower(), name)  # T1 and t1 are one channel
        if (other := channels[label].setdefault(name, image)) != image:
            what = f"{ids[label]} has two images called {name!r}: {paths[other]}, {paths[image]}"
            raise UserError(what, root, _CHOOSE)
    names = [*chosen.values()] or _names_of_channels(root, channels.values())
    if not names:  # each case has one image, with a name of its own
        names, channels = ["image"], {label: {"image": found[0]} for label, found in groups.items()}
    whole = {label: found for label, found in channels.items() if found.keys() >= {*names}}
    if not whole:
        raise UserError(f"no case has all of {', '.join(names)}", root, _CHOOSE)
    cases = [Case(ids[label], tuple(found[name] for name in names), label) for label, found in whole.items()]
    grouped = {path for label, found in groups.items() for path in (label, *found)}
    unused = {
        NO_IMAGE: maps - grouped,
        NO_MASK: scans - grouped,
        f"of cases without all of {', '.join(names)}, or more than these": grouped.difference(
            whole, *(c.images for c in cases)
        ),
        "not chosen": paths.keys() - maps - scans,
    }
    left_out = {reason: sorted(str(paths[path]) for path in found) for reason, found in unused.items()}
    return Discovery(tuple(cases), tuple(names), left_out)


def cases_in_table(file: Path) -> Discovery:
    """Read the cases of a CSV file: columns case, label, and image or one for each channel.

    Parameters
    ----------
    file : Path
        The table, with commas, semicolons or tabs. Its paths are relative to its folder.

    Returns
    -------
    Discovery
        The cases. Columns without existing files are left out, and so are rows without all files.

    Raises
    ------
    UserError
        A column is missing, no row has all files, or a case has two rows.
    """
    head, *lines = [cells for cells in read_table(file) if cells] or [[]]
    rows = [dict(zip_longest(head, cells, fillvalue="")) for cells in lines]
    columns = {key.lower(): key for key in head}
    if lacking := [name for name in ("case", "label") if name not in columns and head]:
        raise UserError(f"has no column {few(lacking)}. Columns: {few(head, 9)}", file, _COLUMNS)
    case, label = columns.pop("case", ""), columns.pop("label", "")
    files = [
        {key: file.parent / cell for key, cell in row.items() if cell and (file.parent / cell).exists()} for row in rows
    ]
    channels = [key for key in columns.values() if any(key in found for found in files)]
    whole = {i: found for i, found in enumerate(files) if found.keys() >= {label, *channels} and rows[i].get(case)}
    if not channels or not whole:
        raise UserError(f"has no row with existing files. Columns: {few(head, 9)}", file, _COLUMNS)
    cases = [
        Case(rows[i][case].replace("/", "_"), tuple(found[c] for c in channels), found[label])
        for i, found in whole.items()
    ]
    if twice := [name for name, n in Counter(found.id for found in cases).items() if n > 1]:
        raise UserError(f"has several rows of {few(twice)}", file, "A case has one row.")
    left_out = {
        "rows without existing files": [str(rows[i].get(case)) for i in range(len(rows)) if i not in whole],
        "columns without files": [key for key in columns.values() if key not in channels],
    }
    return Discovery(tuple(cases), tuple(channels), left_out)


# ------------------------------------------------------------------------------------------- label maps and their cases


def _parts_of_case(path: Path, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return folders and name of a label map without the words that make it one: those of its pattern, and mask etc."""
    folders, name = path.parts[:-1], path.name
    for pattern in (PurePath(pattern) for pattern in patterns if path.match(pattern)):
        folders = tuple(part for part in folders if part not in pattern.parts)
        if found := re.fullmatch("(.*)".join(map(re.escape, pattern.name.split("*"))), name):
            name = "_".join(found.groups())  # what the stars match
    parts = (*folders, name.removesuffix(ending_of(path)))
    return tuple(LABEL_WORD.sub("", part).strip(" _.-") for part in parts)


def _case_ids(root: Path, parts: Mapping[Path, tuple[str, ...]]) -> dict[Path, str]:
    """Name the case of each label map by the parts of its path that not all have."""
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    ids = {}
    for label, found in parts.items():
        *folders, name = [part for part in found if part and part not in shared] or [root.name]
        ids[label] = "_".join([*(part for part in folders if part not in name), name])
    if len(set(ids.values())) < len(ids):
        ids = {label: "_".join(filter(None, found)) or root.name for label, found in parts.items()}
    for case_id, n in Counter(ids.values()).items():
        if n > 1:
            maps = [label.relative_to(root) for label in ids if ids[label] == case_id]
            fix = f"{_MERGE}'{maps[0].name.replace(case_id, '*')}' (what * replaces names the case)."
            raise UserError(f"{case_id} has {n} label maps: {few(list(map(str, maps)))}", root, fix)
    return ids


# -------------------------------------------------------------------------------------------------- images and channels


def _group_images(
    parts: Mapping[Path, tuple[str, ...]], images: Mapping[Path, tuple[Words, Words]], are_chosen: bool
) -> tuple[dict[Path, list[Path]], dict[Path, list[Words]]]:
    """Return the images of each label map, and words that name its case.

    Words with which all label maps begin or end, such as the name of a folder, need not be in the paths of images if
    the user chose these, or if more cases are found without such words.
    """
    names = {label: tuple(map(str.lower, _words(*found))) for label, found in parts.items()}
    begin = _number_shared(names.values())
    end = min(_number_shared(name[::-1] for name in names.values()), min(map(len, names.values()), default=0) - begin)
    whole = _images_of(names, images)
    short = _images_of({label: name[begin : len(name) - end] for label, name in names.items()}, images)
    of_case = {label: [name[: len(name) - end], *map(_words, parts[label])] for label, name in names.items()}
    return (short if len(short) >= len(whole) + (not are_chosen) else whole), of_case


def _images_of(names: Mapping[Path, Words], images: Mapping[Path, tuple[Words, Words]]) -> dict[Path, list[Path]]:
    """Return the images with all words of a name in their paths, in its order: of the longest name, and the nearest."""
    counts = Counter(word for name in names.values() for word in set(name))
    by_word = defaultdict[str, list[Path]](list)  # its rarest word, so that few names are compared with an image
    for label, name in names.items():
        if name or len(names) == 1:
            by_word[min(name, key=counts.__getitem__, default="")].append(label)
    groups = defaultdict[Path, list[Path]](list)
    for image, (folders, own) in images.items():
        words = [word.lower() for word in (*folders, *own)]
        fits = [label for word in {*words, ""} for label in by_word[word] if _contains(words, names[label])]
        rank = {label: (len(names[label]), _number_shared([label.parts, image.parts])) for label in fits}
        best = [label for label in fits if rank[label] == max(rank.values())]
        if len(best) == 1:
            groups[best[0]].append(image)
    return dict(groups)


def _contains(words: Iterable[str], name: Words) -> bool:
    rest = iter(words)
    return all(word in rest for word in name)


def _without(words: Words, names: Iterable[Words]) -> Words:
    """Remove names from words: ("T1",) of ("BraTS", "01", "T1") and ("brats", "01")."""
    text = f"_{'_'.join(words)}_"
    for name in sorted(filter(None, names), key=len, reverse=True):
        text = re.sub(re.escape(f"_{'_'.join(name)}_"), "_", text, flags=re.IGNORECASE)
    return _words(text)


def _channel_name(words: Words) -> str:
    name = "_".join(words)
    if name.isdecimal():
        return f"channel_{int(name)}"
    return "image" if name.lower() in ("", *IMAGE_FOLDERS) else name


def _names_of_channels(root: Path, channels: Collection[dict[str, Path]]) -> list[str]:
    """Return the names that more than half of the cases have; none if each case has one image, of another name."""
    (names, most), *others = Counter(map(frozenset, channels)).most_common()
    if most == 1 < len(channels) and all(len(found) == 1 for found in channels):
        return []
    if 2 * most <= len(channels):
        found = [f"{plural(n, 'case')} with {', '.join(sorted(kind))}" for kind, n in [(names, most), *others]]
        raise UserError(f"cases have different images: {few(found)}", root, _CHOOSE)
    return sorted(names)


# ---------------------------------------------------------------------------------------------------------------- words


def _name(path: Path) -> str:
    return stem(path) if suffix_of(path) else path.name  # a DICOM series has no ending


def _words(*texts: str) -> Words:
    return tuple(word for text in texts for word in re.split(r"[\W_]+", normalize("NFC", text)) if word)


def _number_shared(names: Iterable[Words]) -> int:
    """Return the number of words with which all names begin."""
    return len([*takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))])


def _unsupported(files: Files, patterns: Sequence[str] = ("*",)) -> str:
    """Describe the files of no supported format, for the end of a message."""
    found = [path for path in files.others if any(map(path.relative_to(files.root).match, patterns))]
    return f"; of no supported format: {count_endings(found)}" if found else ""


def _some(paths: Iterable[Path], root: Path) -> str:
    """Return names of files for a message: one that is in several folders once, with their number."""
    found = {path.name: str(path.relative_to(root)) for path in sorted(paths)}
    counts = Counter(path.name for path in sorted(paths))
    return few([found[name] if n == 1 else f"{name} ({n} files)" for name, n in counts.most_common()], 6)
