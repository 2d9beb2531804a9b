"""Find the cases in what people have: a folder for each patient, masks next to images, a table, DICOM with masks.

A label map is a file with a word such as "mask" in its name or folder, or one of the user's pattern. What remains of
its path without these words names the case: P001/seg.nii.gz is of P001, x_mask.tif of x. The images of a case have all
words of that name in their paths, in the same order; the words that remain name the channel: P001/P001_t1.nii.gz is t1.
What fits two cases, or differs between cases, is refused or left out, never guessed.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePath
from unicodedata import normalize

from nnunet_lite.data.cases import LABEL_FOLDERS, Case, count_endings
from nnunet_lite.data.dicom import dicom_class, is_scan
from nnunet_lite.data.images import is_image
from nnunet_lite.data.names import SUPPORTED, companions, ending_of, header_of, stem, suffix_of
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_text
from nnunet_lite.workspace import IMAGE_FOLDERS

_WORDS = "masks?|msk|[dp]?segs?|segmentations?|labels?|lbl|gt|ground[ _-]?truth|truth|rois?|annotations?|contours?"
_LABEL_WORD = re.compile(rf"(?:^|[\W_]+)(?:{_WORDS})(?=[\W_]|$)", re.IGNORECASE)
_NOT_SEARCHED = ("__MACOSX", "imagesTs", "labelsTs")  # of archives made on a Mac; test cases in nnU-Net's layout
_CHOOSE = (
    "A case has one label map, with a word such as mask, seg or label in its name. Say which files to take: --label "
    "'*_tumour.nii.gz' (what * replaces names the case), --image '*_t1.nii.gz' (once for each channel)."
)
CONTOURS = "1.2.840.10008.5.1.4.1.1.481.3"  # RTSTRUCT
_MASKS = (CONTOURS, "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # and segmentations
_COLUMNS = "The first line names the columns: case, label, and image or a column for each channel."

Words = tuple[str, ...]


@dataclass(frozen=True)
class Discovery:
    """The cases that were found.

    Parameters
    ----------
    cases : tuple of Case
        Sorted by id. Label maps of DICOM masks are still to be written.
    channels : tuple of str
        Names of the images of a case, in their order.
    left_out : dict of str to list of str
        Reason -> files, or other names, that no case uses.
    """

    cases: tuple[Case, ...]
    channels: tuple[str, ...]
    left_out: dict[str, list[str]] = field(default_factory=dict)


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
    """List the files in a folder and below it, without hidden ones.

    Parameters
    ----------
    root : Path
        The folder. Links are followed.
    skip : iterable of Path
        Folders that are not searched.

    Returns
    -------
    Files
        Sorted.
    """
    entered = {root.resolve(), *(folder.resolve() for folder in skip)}
    found: list[Path] = []
    for folder, inside, names in os.walk(root, followlinks=True):
        new = {name: (Path(folder) / name).resolve() for name in inside if name not in _NOT_SEARCHED and name[0] != "."}
        inside[:] = sorted(name for name, real in new.items() if real not in entered)
        entered.update(new.values())
        found += [Path(folder) / name for name in names if name[0] != "."]
    images = [path for path in found if is_image(path) and not header_of(path)]
    used = {*images, *(other for path in images for other in companions(path))}
    classes = {path: dicom_class(path) for path in found if not is_image(path) and path not in used}
    dicom = {path: uid for path, uid in classes.items() if uid is not None}
    series = {path.parent for path, uid in dicom.items() if is_scan(uid)}
    others = [path for path, uid in classes.items() if uid is None]
    return Files(root, sorted({*images, *series}), dict(sorted(dicom.items())), sorted(others))


def cases_by_name(files: Files, images: Sequence[str] = (), labels: Sequence[str] = ()) -> Discovery:
    """Match label maps with images by their paths.

    Parameters
    ----------
    files : Files
        What the folder contains.
    images : sequence of str
        Patterns of images, in the order of the channels, such as "*_t1.nii.gz". Empty: all that are no label maps.
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
    maps, scans = _label_maps_and_images(files, paths, images, labels)
    parts = {label: _parts_of_case(paths[label], labels) for label in maps}
    ids = _case_ids(root, parts)
    words = {path: (_words(*paths[path].parts[:-1]), _words(_name(path))) for path in scans}
    groups, of_case = _group_images(parts, words, bool(images))
    if not groups:
        what = f"no image has the name of a label map. Label maps: {_some(maps, root)}; images: {_some(scans, root)}"
        raise UserError(what, root, _CHOOSE)
    channels = _name_channels(root, groups, of_case, words, ids)
    names, example = _channels_of_most(root, channels)
    order = {name: [paths[example[name]].match(pattern) for pattern in images] for name in names}
    ordered = tuple(sorted(names, key=lambda name: (order[name].index(True) if images else 0, name)))
    reasons = dict.fromkeys(scans, "belongs to no label map") | dict.fromkeys(maps, "is a label map of no image")
    cases: list[Case] = []
    for label, found in channels.items():
        missing = [name for name in ordered if name not in found]
        reason = f"its case has no {' and no '.join(missing)}" if missing else "is no channel of most cases"
        reasons |= dict.fromkeys([label, *found.values()], reason)
        if not missing:
            cases.append(Case(ids[label], tuple(found[name] for name in ordered), label))
    used = {path for case in cases for path in (*case.images, case.label)}
    left_out = defaultdict[str, list[str]](list)
    for path in paths:
        if path not in used:
            left_out[reasons.get(path, "is not chosen")].append(str(paths[path]))
    return Discovery(tuple(sorted(cases, key=lambda case: case.id)), ordered, dict(left_out))


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
        A column is missing, a file does not exist, or a case has two rows.
    """
    text = read_text(file)
    lines = csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=text.count), restkey="", restval="")
    rows = [{str(key).strip(): str(value).strip() for key, value in line.items()} for line in lines]
    columns = {key.lower(): key for key in (rows[0] if rows else ())}
    if not {"case", "label"} <= set(columns):
        raise UserError(f"has the columns {few(list(columns.values()), 9) or 'of no table'}", file, _COLUMNS)
    case, label = columns.pop("case"), columns.pop("label")
    channels = [key for key in columns.values() if any(row[key] and (file.parent / row[key]).exists() for row in rows)]
    if not channels:
        raise UserError(f"no column has existing files besides {label}: {few(list(columns.values()))}", file, _COLUMNS)
    lost = [row[key] for row in rows for key in (*channels, label) if not (file.parent / row[key]).exists()]
    if lost:
        raise UserError(f"names files that do not exist: {few(lost)}", file, "Give paths relative to the table.")
    if twice := [name for name, n in Counter(row[case] for row in rows).items() if n > 1]:
        raise UserError(f"has several rows of {few(twice)}", file, "A case has one row.")
    whole = [row for row in rows if all(row[key] for key in (case, label, *channels))]
    found = [
        Case(
            re.sub(r"[/\\]", "_", row[case]),
            tuple(file.parent / row[key] for key in channels),
            file.parent / row[label],
        )
        for row in whole
    ]
    left_out = {
        "has not all of its files": [row[case] for row in rows if row not in whole],
        "is a column without files": [key for key in columns.values() if key not in channels],
    }
    return Discovery(tuple(sorted(found, key=lambda case: case.id)), tuple(channels), left_out)


# ------------------------------------------------------------------------------------------- label maps and their cases


def _label_maps_and_images(
    files: Files, paths: Mapping[Path, Path], images: Sequence[str], labels: Sequence[str]
) -> tuple[list[Path], list[Path]]:
    """Return which files are label maps and which are images; refuse a folder without one of both."""

    def matching(patterns: Sequence[str]) -> set[Path]:
        return {path for path in paths if any(paths[path].match(pattern) for pattern in patterns)}

    called = {path for path in paths if suffix_of(path) and _has_label_word(paths[path])}
    maps = matching(labels) if labels else called
    scans = (matching(images) if images else paths.keys() - called) - maps
    if not paths:
        but = f", but {count_endings(files.others)}" if files.others else ""
        raise UserError(f"holds no image of a supported format{but}", files.root, f"{SUPPORTED} and DICOM.")
    for kind, found, patterns in (("label map", maps, labels), ("image", scans, images)):
        if not found:
            what = f"matches {' '.join(patterns)}" if patterns else f"has a name as {kind}s have"
            raise UserError(f"no {kind} {what}: it holds {_some(sorted(paths), files.root)}", files.root, _CHOOSE)
    return sorted(maps), sorted(scans)


def _has_label_word(path: Path) -> bool:
    return bool(_LABEL_WORD.search(stem(path))) or any(map(_is_label_folder, path.parts[:-1]))


def _is_label_folder(name: str) -> bool:
    return name.lower() in LABEL_FOLDERS or bool(_LABEL_WORD.fullmatch(name))


def _parts_of_case(path: Path, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return folders and name of a label map without what makes it one."""
    name, folders = path.name, path.parts[:-1]
    for pattern in map(PurePath, patterns):
        found = re.fullmatch("(.*)".join(map(re.escape, pattern.name.split("*"))), name)
        if found and path.match(str(pattern)):
            name = "_".join(found.groups())  # what the stars match
            folders = tuple(part for part in folders if part not in pattern.parts[:-1])
            break
    own = _LABEL_WORD.sub("", name.removesuffix(ending_of(path))).strip(" _.-")
    return (*(part for part in folders if not _is_label_folder(part)), own)


def _case_ids(root: Path, parts: Mapping[Path, tuple[str, ...]]) -> dict[Path, str]:
    """Return a name for the case of each label map: the parts of its path that not all have."""
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    ids = {}
    for label, found in parts.items():
        *folders, name = [part for part in found if part and part not in shared] or [root.name]
        ids[label] = "_".join([*(part for part in folders if part not in name), name])
    if len(set(ids.values())) < len(ids):
        ids = {label: "_".join(filter(None, found)) for label, found in parts.items()}
    for case_id, n in Counter(ids.values()).items():
        if n > 1:
            maps = [str(label.relative_to(root)) for label in ids if ids[label] == case_id]
            what = f"{case_id or 'it'} has {n} label maps: {few(maps)}"
            fix = "A case has one, with a value for each structure. Choose with --label PATTERN, such as"
            raise UserError(what, root, f"{fix} --label '*{Path(maps[0]).name}'.")
    return ids


# -------------------------------------------------------------------------------------------------- images and channels


def _group_images(
    parts: Mapping[Path, tuple[str, ...]], images: Mapping[Path, tuple[Words, Words]], widest: bool
) -> tuple[dict[Path, list[Path]], dict[Path, set[str]]]:
    """Return the images of each label map, and the words that name its case.

    Words with which all label maps begin or end need not be in the paths of images: they are left out if that gives
    more cases or, if the images were chosen, more images.
    """
    names = {label: tuple(map(str.lower, _words(*found))) for label, found in parts.items()}
    begin = _number_shared(names.values())
    end = min(_number_shared(name[::-1] for name in names.values()), min(map(len, names.values())) - begin)
    best: dict[Path, list[Path]] = {}
    most = (0, 0)
    for first, last in ((0, 0), (begin, 0), (0, end), (begin, end)):
        own = {label: name[first : len(name) - last] for label, name in names.items()}
        groups = _images_of(own, images)
        size = (len(groups), sum(map(len, groups.values())) if widest else 0)
        if size > most:
            best, most = groups, size
    return best, {label: set(name[: len(name) - end]) for label, name in names.items()}


def _images_of(names: Mapping[Path, Words], images: Mapping[Path, tuple[Words, Words]]) -> dict[Path, list[Path]]:
    """Return the images whose paths contain all words of a name in its order; of several names the longest, nearest."""
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


def _name_channels(
    root: Path,
    groups: Mapping[Path, list[Path]],
    of_case: Mapping[Path, set[str]],
    words: Mapping[Path, tuple[Words, Words]],
    ids: Mapping[Path, str],
) -> dict[Path, dict[str, Path]]:
    """Name the images of each case by words that do not name the case: of the file, else of its folders, or of both."""
    for whole in (False, True):
        named = {label: defaultdict[str, list[Path]](list) for label in groups}
        for label, images in groups.items():
            for image in images:
                folders, own = ([w for w in some if w.lower() not in of_case[label]] for some in words[image])
                named[label][_channel_name([*folders, *own] if whole else own or folders)].append(image)
        twice = {label: images for label, found in named.items() for images in found.values() if len(images) > 1}
        if not twice:
            break
    else:
        label, images = next(iter(twice.items()))
        raise UserError(
            f"{ids[label]} has several images of one kind: {few([str(i.relative_to(root)) for i in images])}",
            root,
            _CHOOSE,
        )
    channels = {label: {name: images[0] for name, images in found.items()} for label, found in named.items()}
    if len({name for found in channels.values() for name in found}) == len(groups) == sum(map(len, channels.values())):
        return {label: {"image": image} for label, found in channels.items() for image in found.values()}
    return channels


def _channel_name(words: Sequence[str]) -> str:
    name = "_".join(words)
    if name.isdecimal():
        return f"channel_{int(name)}"
    return "image" if not name or name.lower() in IMAGE_FOLDERS else name


def _channels_of_most(root: Path, channels: Mapping[Path, dict[str, Path]]) -> tuple[frozenset[str], dict[str, Path]]:
    """Return the names of the images that more than half of the cases have, and a case with them."""
    (names, n), *others = Counter(frozenset(found) for found in channels.values()).most_common()
    if 2 * n <= len(channels):
        kinds = [f"{plural(k, 'case')} with {', '.join(sorted(kind))}" for kind, k in [(names, n), *others]]
        raise UserError(f"cases have different images: {few(kinds)}", root, _CHOOSE)
    return names, next(found for found in channels.values() if names == found.keys())


# ---------------------------------------------------------------------------------------------------------------- words


def _name(path: Path) -> str:
    return stem(path) if suffix_of(path) else path.name  # a DICOM series has no ending


def _words(*texts: str) -> Words:
    return tuple(word for text in texts for word in re.split(r"[\W_]+", normalize("NFC", text)) if word)


def _number_shared(names: Iterable[tuple[str, ...]]) -> int:
    """Return the number of words with which all names begin."""
    return len([*takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))])


def _some(paths: Sequence[Path], root: Path) -> str:
    """Return names of files for a message: one that is in several folders once, with their number."""
    names = Counter(path.name for path in paths)
    one = {path.name: str(path.relative_to(root)) for path in paths}
    return few([one[name] if n == 1 else f"{name} ({n} files)" for name, n in names.most_common()], 6)
