"""The files of a case: its image, and the label map that belongs to it.

An image is one file per channel, numbered `_0000`, `_0001`, ..., one file with all channels, or a DICOM series. A label
map has the name of its image. A word such as `_mask` at its end is accepted and reported. Other names are not guessed:
messages show them and propose likely pairs.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from nnunet_lite import log
from nnunet_lite.data.dicom import ENDINGS, is_series, series_folders
from nnunet_lite.data.images import is_image, read_geometry
from nnunet_lite.data.names import PICTURES, SUPPORTED, ending_of, has_label_word, header_of, stem, suffix_of, visible
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError, no_such_file
from nnunet_lite.workspace import IMAGE_FOLDERS

LABEL_FOLDERS = ("labelstr", "labels", "label", "masks", "mask", "segmentations", "segmentation")
_LABEL_WORD = re.compile(r"(.+?)[ _.-](?:masks?|segs?|segmentations?|labels?|gt)", re.IGNORECASE)
_NEEDS = "It needs dataset.json, or the folders images/ and labels/ (or imagesTr/ and labelsTr/)."
_NAMING = (
    "An image is called CASE.nii.gz, or CASE_0000.nii.gz, CASE_0001.nii.gz, ... for its channels (an underscore, four "
    "digits), and its label map CASE.nii.gz: one for all structures, with a value for each. `nnlite init FOLDER` lists "
    "files of other names or folders in a dataset.json, see docs/reference/files.md."
)
_CHANNEL = re.compile(r"^(.+)_(\d{4})$")
_PART = re.compile(r"\d+|[^\W\d_]+")  # of a name: a number or a word
_PART_OF_CASE = re.compile("anat|func|dwi|fmap|perf|pet|ses-.+|dicom", re.IGNORECASE)  # folders in that of a patient
_DEPTH = 4  # levels of folders that are searched for images: patient, visit, modality, and one more
_MOST_CHANNELS = 8  # of one case in separate files; more files of one name are a series of cases
_ALSO_DICOM = f"{SUPPORTED} and DICOM series (localizers, masks and reports are none)."


@dataclass(frozen=True)
class Case:
    """The files of one image, such as one visit of a patient.

    Parameters
    ----------
    id : str
        Name of the case, and of its label map.
    images : tuple of Path
        One file per channel, or one file with all channels. A DICOM series is given by its folder, or by one of its
        files if the folder contains several series.
    label : Path or None
        The label map.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None = None

    def __post_init__(self) -> None:
        try:
            self.id.encode()
        except UnicodeEncodeError:  # no file of results could contain it
            raise UserError("has a name that is not UTF-8 text", self.images[0], "Rename it.") from None


def image_files(folder: Path, ending: str | None = None) -> list[Path]:
    """Return the images in a folder, without hidden files.

    Parameters
    ----------
    folder : Path
        An existing folder.
    ending : str or None
        Only files that end with it, in upper or lower case.

    Returns
    -------
    list of Path
        Sorted.
    """
    files = (path for path in visible(folder) if is_image(path) and not header_of(path))
    return [path for path in files if ending is None or path.name.lower().endswith(ending.lower())]


def folders_in(parent: Path) -> list[Path]:
    """Return the folders in a folder, without hidden ones.

    Parameters
    ----------
    parent : Path
        An existing folder.

    Returns
    -------
    list of Path
        Sorted.
    """
    return [path for path in visible(parent) if path.is_dir()]


def count_endings(files: Iterable[Path]) -> str:
    """Count files by their endings, for a message.

    Parameters
    ----------
    files : iterable of Path
        Any files.

    Returns
    -------
    str
        Such as "5 .gif files, 1 .txt file".
    """
    endings = Counter(suffix_of(path) or path.suffix.lower() or path.name for path in files)
    return few([plural(n, f"{ending} file") for ending, n in endings.most_common()])


def unsupported_files(folder: Path, name: str = "") -> str:
    """Describe the files of a folder that are not images.

    Parameters
    ----------
    folder : Path
        An existing folder.
    name : str
        Only files of this name, with any ending.

    Returns
    -------
    str
        Such as ", but 5 .gif files", for the end of a message; empty if there are none.
    """
    files = [path for path in visible(folder) if path.is_file() and not is_image(path)]
    files = [path for path in files if path.suffix.lower() not in ("", ".json")]
    files = [path for path in files if not name or path.name.startswith(f"{name}.")]
    return f", but {count_endings(files)}" if files else ""


# ----------------------------------------------------------------------------------------------------- cases to predict


def find_cases(sources: Sequence[Path], channels: int, names: Sequence[str] = ()) -> list[Case]:
    """Find the cases to predict in files, folders of files, and folders of case folders.

    A file is an image, one of several channel files, or a file of a DICOM series. A folder contains any mix of
    supported files, or one DICOM series, or folders that contain one case each and give it their name. It names the
    case itself if its folders are those of one patient, such as anat or ses-01.

    Parameters
    ----------
    sources : sequence of Path
        The files and folders.
    channels : int
        Number of channels of the model.
    names : sequence of str
        Their names. Of a case folder with several files, those that end in these names are taken.

    Returns
    -------
    list of Case
        Without label maps, in the order of the sources.

    Raises
    ------
    UserError
        There is nothing to read, two cases have one name, or a case folder contains several cases.
    """
    cases: dict[str, Case] = {}
    for source in sources:
        for case in _cases_of(source, channels, names):
            other = cases.setdefault(case.id, case)
            if set(other.images) != set(case.images):
                files = f"{other.images[0]} and {case.images[0]}"
                what = f"{files} are the same case {case.id!r}: their label maps would be one file"
                raise UserError(what, source, "Rename or remove one, or predict them into two folders.")
    return list(cases.values())


def _cases_of(source: Path, channels: int, names: Sequence[str]) -> list[Case]:
    if source.is_file():
        return _cases_of_file(source, channels)
    if not source.is_dir():
        raise no_such_file(source)
    if cases := _cases_of_folder(source, channels):
        others = [] if cases[0].images == (source,) else folders_in(source)
        if series := [path.name for path in others if series_folders(path)]:
            log.warn(f"{source}: the DICOM series in {few(series)} are not read, since the folder holds images too")
    else:
        skipped: list[Path] = []
        is_case = all(_PART_OF_CASE.fullmatch(folder.name) for folder in folders_in(source))
        find = _nested_cases if is_case else _case_folders
        cases = find(source, channels, names, skipped, _DEPTH + is_case)
        if skipped:
            files = few([str(path.relative_to(source)) for path in skipped])
            log.warn(f"{source}: {files} are not predicted: by their names they are label maps")
    if not cases:
        inside = "; nor do the folders inside it" if any(path.is_dir() for path in source.iterdir()) else ""
        what = f"holds no image of a supported format{unsupported_files(source)}{inside}"
        raise UserError(what, source, _ALSO_DICOM)
    ids = {case.id for case in cases}
    if maps := [case for case in cases if label_base(case.id) != case.id and label_base(case.id) in ids]:
        files = few([case.images[0].name for case in maps])
        log.warn(f"{source}: {files} are not predicted: by their names they are label maps of other files there")
        cases = [case for case in cases if case not in maps]
    if channels == 1 and (files := numbered_files(cases)):
        what = "are predicted as two cases, because the model has one channel"
        log.warn(f"{source}: {files} {what}. If they are channels of one case, keep only that of the model there")
    return cases


def _cases_of_file(path: Path, channels: int) -> list[Case]:
    if not is_image(path):
        if is_series(path):
            return [Case(path.stem if path.suffix.lower() in ENDINGS else path.name, (path,))]
        raise UserError("is of no supported format", path, _ALSO_DICOM)
    path = header_of(path) or path
    name, number = split_name(stem(path))
    alone = channels == 1 and number != 0  # then no other file changes its name
    files = [other for other in ([path] if alone else image_files(path.parent)) if split_name(stem(other))[0] == name]
    cases = [case for case in group_files(files, channels) if path in case.images]
    if not cases:
        what = f"would be channel {number} of {name}, and the model has {channels}, from 0 on"
        raise UserError(what, path, f"Give {name}_0000{suffix_of(path)}, or the folder.")
    return cases


def _cases_of_folder(folder: Path, channels: int) -> list[Case]:
    """Return the cases in the files of a folder; all its DICOM files are one case, with the name of the folder.

    Pictures beside DICOM files are previews and screenshots of the scan.
    """
    files = image_files(folder)
    holds_series = any(path.is_file() and not is_image(path) and is_series(path) for path in folder.iterdir())
    are_pictures = all(suffix_of(path) in PICTURES for path in files)
    if holds_series and files:
        left_out = few([path.name for path in files]) if are_pictures else "the DICOM files"
        log.warn(f"{folder}: holds DICOM files and other images; left out: {left_out}")
    if holds_series and are_pictures:
        return [Case(folder.resolve().name, (folder,))]
    return group_files(files, channels)


def _case_folders(parent: Path, channels: int, names: Sequence[str], skipped: list[Path], depth: int) -> list[Case]:
    """Return one case per folder: its only image, or the file of each channel's name.

    Folders of DICOM series may be numbered `_0000`, `_0001`, ... as files are.

    A series or an image may be at a deeper level (patient/study/series, sub-01/anat/T1w.nii.gz). The case has the name
    of the first folder; if that folder contains several, each is a case with its path as its name. `skipped` gets the
    files that are left out because they are label maps by their names.
    """
    series, cases, empty = [], [], []
    for folder in folders_in(parent):
        found = _cases_of_folder(folder, channels)
        if len(found) > 1:
            files = image_files(folder)
            masks = [file for file in files if has_label_word(Path(file.name))]
            others = [file for file in files if file not in masks]
            numbered = group_files(others, channels)
            of = {name: [file for file in others if _channel_of(_parts(stem(file)), names) == name] for name in names}
            odd = [f"{plural(len(some), 'file')} of channel {name}" for name, some in of.items() if len(some) != 1]
            if len(numbered) == 1:
                images = numbered[0].images
            elif names and not odd:
                images = tuple(file for (file,) in of.values())
            else:
                shown = few([f"{file.name}{', which looks like a mask' * (file in masks)}" for file in files])
                each = few([f"*{name}.*" for name in names])
                fix = f"A folder per case holds one image, or one for each channel of the model: {each}."
                what = f"holds {len(files)} images ({shown}) where it should hold one case"
                raise UserError(f"{what}: {few(odd)}" if odd else what, folder, fix)
            skipped += masks
            found = [Case(folder.name, images)]
        inside = [] if found else series_folders(folder)
        if len(inside) == 1 or (found and found[0].images == (folder,)):
            series.append(folder)
        elif inside:
            cases += [Case("_".join(path.relative_to(parent).parts), (path,)) for path in inside]
        elif found:
            cases.append(Case(folder.name, found[0].images))
        elif deeper := _nested_cases(folder, channels, names, skipped, depth):
            cases += deeper
        else:
            empty.append(folder.name)
    if empty and (series or cases):
        log.warn(f"{parent}: folders without an image are ignored: {', '.join(empty)}")
    return sorted(cases + group_files(series, channels), key=lambda case: case.id)


def _nested_cases(folder: Path, channels: int, names: Sequence[str], skipped: list[Path], depth: int) -> list[Case]:
    """Return the cases in the folders inside a case folder."""
    found = _case_folders(folder, channels, names, skipped, depth - 1) if depth else []
    maps = [case for case in found if has_label_word(case.images[0].relative_to(folder))]
    skipped += [path for case in maps for path in case.images]
    found = [case for case in found if case not in maps]
    name = folder.resolve().name if folder.name in ("", "..") else folder.name
    return [Case(name if len(found) == 1 else f"{name}_{case.id}", case.images) for case in found]


def _channel_of(parts: list[str], names: Sequence[str]) -> str | None:
    """Return the longest name that the parts of a file's name end in: ce_t1 is of ce_t1, and t1_to_flair of t1."""
    name = max((name for name in names if parts[-len(_parts(name)) :] == _parts(name)), key=len, default=None)
    before = parts if name is None else parts[: -len(_parts(name))]
    return _channel_of(before[:-1], names) if before[-1:] in (["to"], ["space"]) else name


# ------------------------------------------------------------------------------------------------------------- channels


def split_name(name: str) -> tuple[str, int | None]:
    """Split a channel number from a name.

    Parameters
    ----------
    name : str
        Of a file, without its ending.

    Returns
    -------
    tuple
        ("liver", 1) for liver_0001; (name, None) for a name without a number.
    """
    match = _CHANNEL.match(name)
    return (match[1], int(match[2])) if match else (name, None)


def numbered_files(cases: Iterable[Case]) -> str:
    """Name the first two images x_0000, x_0001 that could be channels of one case x, for a message.

    Parameters
    ----------
    cases : iterable of Case
        Cases of one channel.

    Returns
    -------
    str
        Such as "x_0000.png and x_0001.png"; empty if there are none. A series of more than eight is no case's channels.
    """
    series: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        name, number = split_name(case.id)
        if number is not None:
            series[name].append(case)
    groups = (found for found in series.values() if 1 < len(found) <= _MOST_CHANNELS)
    first = next((found for found in groups if any(split_name(case.id)[1] == 0 for case in found)), [])
    return " and ".join(case.images[0].name for case in first[:2])


def group_files(files: list[Path], channels: int, ids: Collection[str] = ()) -> list[Case]:
    """Group files, or folders of DICOM series, into cases by their channel numbers `_0000`, `_0001`, ...

    The number is optional for a single file per case. If no case has a second file, one file contains all channels. If
    each file contains all channels, numbers other than `_0000` are part of a name (scan_0017), and then so is a
    `_0000`.

    Parameters
    ----------
    files : list of Path
        Images of any number of cases.
    channels : int
        Number of channels. Files of further channels are ignored, files of missing ones are listed.
    ids : collection of str
        Known names of cases: a number after one of them is that of a channel.

    Returns
    -------
    list of Case
        Sorted by id; a second file of a case and channel is a case with the same id.
    """
    groups: dict[str, dict[int | None, Path]] = defaultdict(dict)
    duplicates = []
    names = {path: stem(path) if suffix_of(path) else path.name for path in files}  # a DICOM series has no ending
    parts = {path: split_name(name) for path, name in names.items()}
    later = [path for path, (_, number) in parts.items() if number]
    each_is_whole = bool(later) and (channels == 1 or _has_channels(later[0], channels))
    numbered = {parts[path][0] for path in later}.difference(ids) if each_is_whole else set()
    for path, (name, number) in parts.items():
        if name in numbered:
            name, number = names[path], None
        if number in groups[name]:
            duplicates.append(Case(name, (path,)))
        groups[name].setdefault(number, path)
    separate = channels > 1 and any(number for numbers in groups.values() for number in numbers)
    cases = []
    for name, numbers in groups.items():
        first = next(iter(numbers.values()))
        if None in numbers:
            cases.append(Case(name, (numbers[None],)))
            duplicates += [Case(name, (path,)) for number, path in numbers.items() if number is not None]
        elif separate or (channels == 1 and name in ids):
            expected = (first.with_name(f"{name}_{i:04d}{ending_of(first)}") for i in range(channels))
            cases.append(Case(name, tuple(numbers.get(i, path) for i, path in enumerate(expected))))
        else:
            cases.append(Case(name, (first,)))
    return sorted(cases + duplicates, key=lambda case: case.id)


def _has_channels(path: Path, channels: int) -> bool:
    """Return whether a file can be read and contains this number of channels."""
    try:
        return path.is_file() and read_geometry(path, channels)[1] == channels
    except UserError:  # reported when the case is read
        return False


# -------------------------------------------------------------------------------------------------------------- folders


def _data_folders(root: Path) -> tuple[Path, Path]:
    """Return the folders of images and label maps: imagesTr and labelsTr, or such as images and masks, in any case."""
    images = _usual_folder(root, "imagesTr", IMAGE_FOLDERS, "images")
    labels = _usual_folder(root, "labelsTr", LABEL_FOLDERS, "label maps")
    if images and labels:
        return images, labels
    if not (table := root / "dataset.json").is_file():
        raise _no_dataset_error(root)
    missing = [name for name, folder in (("imagesTr/", images), ("labelsTr/", labels)) if folder is None]
    what = f"lists no files, and it has no {' and no '.join(missing)} in its folder"
    raise UserError(what, table, "Add the folder, or list the files.")


def _usual_folder(root: Path, of_nnunet: str, usual: Sequence[str], what: str) -> Path | None:
    if (root / of_nnunet).is_dir():
        return root / of_nnunet
    candidates = [folder for folder in folders_in(root) if folder.name.lower() in usual]
    filled = [folder for folder in candidates if visible(folder)]
    if len(filled) > 1:
        names = " and ".join(f"{folder.name}/" for folder in filled)
        raise UserError(f"holds {names}, and each could hold the {what}", root, "Keep one of them.")
    return next(iter(filled or candidates), None)


def _has_both(folder: Path) -> bool:
    names = {inside.name.lower() for inside in folders_in(folder)}
    return not names.isdisjoint(IMAGE_FOLDERS) and not names.isdisjoint(LABEL_FOLDERS)


# ----------------------------------------------------------------------------------------------------------- label maps


def labelled_cases(
    root: Path, channels: int | None = None, ending: str | None = None
) -> tuple[list[Case], tuple[str, ...]]:
    """Find the training cases in the folders of a dataset, such as imagesTr and labelsTr or images and masks.

    Parameters
    ----------
    root : Path
        The folder of the dataset.
    channels : int or None
        Their number of channels. None: what the numbers in the names of labelled images show.
    ending : str or None
        The ending of the files in dataset.json.

    Returns
    -------
    cases : list of Case
        A missing label map is given by its expected path.
    notes : tuple of str
        How names and folders were understood.

    Raises
    ------
    UserError
        A folder is missing, or there are several for one purpose; or it contains no image, no label map, or no label
        map with the name of an image.
    """
    images, folder = _data_folders(root)
    files, maps = image_files(images, ending), image_files(folder)
    if not files:
        raise _no_files_error(images, "image", ending)
    if not maps:
        raise _no_files_error(folder, "label map")
    labels = label_maps(maps, {name for path in files for name in names_of_image(path)})
    if channels != 1:
        _rename_first_channels(labels, files)
    single = [Case(stem(path), (path,)) for path in files if stem(path) in labels]  # also names that end in _0001
    others = [path for path in files if stem(path) not in labels]
    if channels is None:
        numbers = [number for base, number in (split_name(stem(path)) for path in others) if number and base in labels]
        channels = max(numbers, default=0) + 1
    cases = single + group_files(others, channels, labels)
    if not any(case.id in labels for case in cases):
        of_maps, of_images = (few([path.name for path in paths]) for paths in (maps, files))
        n_maps, n_images = plural(len(maps), "label map"), plural(len(files), "image")
        what = f"none of its {n_maps} ({of_maps}) has the name of one of the {n_images} ({of_images})"
        pairs = likely_pairs(files, maps).items()
        listed = few([f"{' and '.join(image.name for image in images)} with {label.name}" for label, images in pairs])
        raise UserError(what, folder, f"Likely pairs are {listed}. {_NAMING}" if listed else _NAMING)
    expected = ending or common_ending(cases)
    labelled, by_word = [], []
    for case in cases:
        own = sorted(labels.get(case.id, ()), key=lambda path: not path.name.endswith(ending or ""))
        label = own[0] if own else folder / f"{case.id}{expected}"
        if own and stem(label) != case.id:
            image = case.images[0].name
            by_word.append(f"{label.name} taken as the label map of {image if image != label.name else case.id}")
        labelled.append(Case(case.id, case.images, label))
    notes = [
        f"{used.name}/ taken as the folder of the {what}"
        for used, what in ((images, "images"), (folder, "label maps"))
        if used.name.lower() not in ("imagestr", "images", "labelstr", "labels")
    ]
    if by_word:
        notes.append(by_word[0] + (f", and {len(by_word) - 1} more in the same way" if by_word[1:] else ""))
    if channels == 1 and (numbered := numbered_files(single)):
        notes.append(f"{numbered} are two cases and not two channels, since each has a label map")
    return labelled, tuple(notes)


def _rename_first_channels(labels: dict[str, list[Path]], files: Iterable[Path]) -> None:
    """Give a label map called x_0000 to the case x if images x_0001, ... have no label map of their own."""
    later: dict[str, list[str]] = defaultdict(list)
    for path in files:
        base, number = split_name(stem(path))
        if number:
            later[base].append(stem(path))
    for base, names in later.items():
        if f"{base}_0000" in labels and base not in labels and not any(name in labels for name in names):
            labels[base] = labels.pop(f"{base}_0000")


def names_of_image(path: Path) -> tuple[str, str]:
    """Return the names that the label map of an image may have: with and without a channel number."""
    return stem(path), split_name(stem(path))[0]


def label_maps(files: Iterable[Path], names: Collection[str]) -> dict[str, list[Path]]:
    """Match label maps with names: by the exact name, otherwise by the name with a word such as `_mask`.

    Parameters
    ----------
    files : iterable of Path
        Label maps.
    names : collection of str
        Names of images.

    Returns
    -------
    dict of str to list of Path
        The label maps of each name that has any.
    """
    exact: dict[str, list[Path]] = defaultdict(list)
    by_word: dict[str, list[Path]] = defaultdict(list)
    known = {normalize("NFC", name): name for name in names}  # macOS writes ü as two characters
    for path in files:
        name = normalize("NFC", stem(path))
        if name in known:
            exact[known[name]].append(path)
        elif label_base(name) in known:
            by_word[known[label_base(name)]].append(path)
    return {**by_word, **exact}


def label_base(name: str) -> str:
    """Remove the word at the end of the name of a label map.

    Parameters
    ----------
    name : str
        Without ending.

    Returns
    -------
    str
        cell0 for cell0_mask, case_0 for case_0.seg.
    """
    match = _LABEL_WORD.fullmatch(name)
    return match[1] if match else name


def likely_pairs(images: Sequence[Path], maps: Sequence[Path]) -> dict[Path, list[Path]]:
    """Propose images for label maps whose names do not match.

    Words and numbers of names are compared: P001_T1 and P001_seg have the same beginning, img_01 and mask_1 a number.

    Parameters
    ----------
    images, maps : sequence of Path
        Images and label maps without a partner.

    Returns
    -------
    dict of Path to list of Path
        Label map -> images, several if they may be channels of a case. An image that fits two label maps is left out.
    """
    parts = {path: _parts(split_name(stem(path))[0]) for path in (*images, *maps)}
    beginnings: dict[tuple[str, ...], list[Path]] = {(): list(images)}
    containing: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        for end in range(1, len(parts[image]) + 1):
            beginnings.setdefault(tuple(parts[image][:end]), []).append(image)
        for part in set(parts[image]):
            containing[part].append(image)
    order = {image: number for number, image in enumerate(images)}
    pairs: dict[Path, list[Path]] = {}
    for label in maps:
        own, start = set(parts[label]), tuple(parts[label])
        while start not in beginnings:
            start = start[:-1]
        near = beginnings[start] if start else {image for part in own for image in containing.get(part, ())}
        shared = {image: len(own.intersection(parts[image])) for image in near}
        most = max(shared.values(), default=0)
        found = sorted((image for image, number in shared.items() if number == most), key=order.__getitem__)
        if most and (len(found) < len(images) or len(images) == len(maps) == 1):
            pairs[label] = found
    uses = Counter(image for found in pairs.values() for image in found)
    return {label: found for label, found in pairs.items() if all(uses[image] == 1 for image in found)}


def _parts(name: str) -> list[str]:
    """Split a name into words and numbers: "P001_T1" -> p, 1, t, 1."""
    return [str(int(part)) if part.isdecimal() else part.lower() for part in _PART.findall(name)]


def common_ending(cases: Iterable[Case]) -> str:
    """Return the ending of most images; that of label maps for DICOM series, which have none.

    Parameters
    ----------
    cases : iterable of Case
        Cases of a dataset.

    Returns
    -------
    str
        Such as ".nii.gz".
    """
    endings = [suffix_of(path) or ".nii.gz" for case in cases for path in case.images]
    return max(set(endings), key=endings.count, default=".nii.gz")


# --------------------------------------------------------------------------------------------------------------- errors


def _no_files_error(folder: Path, what: str, ending: str | None = None) -> UserError:
    """Return the error for a folder without a readable file, which says what the folder contains instead."""
    files = [path for path in visible(folder) if path.is_file()]
    wrong = image_files(folder) or [path for path in files if path.suffix.lower() != ".json"]
    names = {path.name: [inside.name for inside in visible(path)] for path in folders_in(folder)}
    inside = [f"{name}/ ({few(within)})" for name, within in names.items() if within]
    found = count_endings(wrong) if wrong else few(inside)
    ends = f" that ends with {ending}" if ending else ""
    instead = f", but {found}" if found else "" if files else ": it is empty"
    text = f"holds no {what} of a supported format{ends}{instead}"
    if inside:
        fix = f"Move the files to {folder.name}/. {_NAMING}"
    else:
        fix = f"Convert them, or correct file_ending in dataset.json. {SUPPORTED}."
    return UserError(text, folder, fix)


def _no_dataset_error(root: Path) -> UserError:
    """Return the error for a folder that is not a dataset, which says what the folder contains."""
    folders = [root.parent, *folders_in(root)]
    datasets = [str(folder) for folder in folders if (folder / "dataset.json").is_file() or _has_both(folder)]
    if datasets:
        return UserError("is no dataset", root, f"Give {few(datasets)}.")
    names = [f"{path.name}/" if path.is_dir() else path.name for path in visible(root)]
    found = f": it holds {few(names)}" if names else ""
    naming = _NAMING.replace("FOLDER", shlex.quote(str(root)))
    return UserError(f"is no dataset{found}", root, f"{_NEEDS} {naming}")
