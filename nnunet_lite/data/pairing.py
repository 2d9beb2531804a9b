"""Which label map belongs to which image: the folders of a dataset, and how the names in them match.

A label map has the name of its image. A word such as `_mask` at its end is understood, and reported. Other names that
look like pairs are proposed to the user, never taken.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from pathlib import Path

from nnunet_lite.data.cases import Case, folders_in, group_files, image_files, numbered_alone, split_name
from nnunet_lite.data.dicom import is_series
from nnunet_lite.data.images import SUFFIXES, stem, suffix_of
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import IMAGE_FOLDERS

LABEL_FOLDERS = ("labelstr", "labels", "label", "masks", "mask", "segmentations", "segmentation")
_LABEL_WORD = re.compile(r"(.+?)[ _.-](?:masks?|segs?|segmentations?|labels?|gt)", re.IGNORECASE)
_TOKEN = re.compile(r"\d+|[^\W\d_]+")
_LIST = 'list the files in dataset.json ("dataset", see docs/files.md)'
_NEEDS = "It needs dataset.json, or the folders images/ and labels/ (or imagesTr/ and labelsTr/)."


# -------------------------------------------------------------------------------------------------------------- folders


def image_folder(root: Path) -> Path | None:
    """Where a dataset keeps its training images: imagesTr, or images, Images, image.

    Raises
    ------
    UserError : several folders could be meant.
    """
    return _the_folder(root, "imagesTr", IMAGE_FOLDERS, "images")


def label_folder(root: Path) -> Path | None:
    """Where a dataset keeps its training label maps: labelsTr, or labels, masks, segmentations, in any case.

    Raises
    ------
    UserError : several folders could be meant.
    """
    return _the_folder(root, "labelsTr", LABEL_FOLDERS, "label maps")


def _the_folder(root: Path, of_nnunet: str, usual: Sequence[str], what: str) -> Path | None:
    if (root / of_nnunet).is_dir():
        return root / of_nnunet
    named = [folder for folder in folders_in(root) if folder.name.lower() in usual]
    filled = [folder for folder in named if any(not path.name.startswith(".") for path in folder.iterdir())]
    if len(filled) > 1:
        names = " and ".join(f"{folder.name}/" for folder in filled)
        raise UserError(f"holds {names}, and each could hold the {what}", root, f"Keep one of them, or {_LIST}.")
    return next(iter(filled or named), None)


def _has_both(folder: Path) -> bool:
    names = {inside.name.lower() for inside in folders_in(folder)}
    return not names.isdisjoint(IMAGE_FOLDERS) and not names.isdisjoint(LABEL_FOLDERS)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


# ---------------------------------------------------------------------------------------------------------------- names


def labelled_cases(
    files: Sequence[Path], channels: int | None, folder: Path, ending: str | None
) -> tuple[list[Case], tuple[str, ...]]:
    """Group image files into cases, each with its label map, or the path of one that is missing; and notes.

    Parameters
    ----------
    channels : of the images; None for what the numbers in the names of labelled images show.
    folder : of the label maps.
    ending : of the files, where dataset.json has it.

    Raises
    ------
    UserError : the folder holds no label map, or none has the name of an image.
    """
    maps = image_files(folder)
    if not maps:
        raise no_files_in(folder, "label map", names=image_names(files))
    found = label_maps(maps, image_names(files))
    if channels != 1:
        _of_first_channels(found, files)
    alone = [Case(stem(path), (path,)) for path in files if stem(path) in found]  # also names that end in _0001
    others = [path for path in files if stem(path) not in found]
    if channels is None:
        numbers = [number for base, number in (split_name(stem(path)) for path in others) if number and base in found]
        channels = max(numbers, default=0) + 1
    cases = alone + group_files(others, channels, found)
    if not any(case.id in found for case in cases):
        raise _unmatched(folder, files, maps)
    missing = ending or common_ending(cases)
    out, by_word = [], []
    for case in cases:
        mine = sorted(found.get(case.id, ()), key=lambda path: not path.name.endswith(ending or ""))
        label = mine[0] if mine else folder / f"{case.id}{missing}"
        if mine and stem(label) != case.id:
            image = case.images[0].name
            by_word.append(f"{label.name} taken as the label map of {image if image != label.name else case.id}")
        out.append(Case(case.id, case.images, label))
    notes = [
        f"{where.name}/ taken as the folder of the {what}"
        for where, what in ((files[0].parent, "images"), (folder, "label maps"))
        if where.name.lower() not in ("imagestr", "images", "labelstr", "labels")
    ]
    if by_word:
        notes.append(by_word[0] + (f", and {len(by_word) - 1} more in the same way" if by_word[1:] else ""))
    if channels == 1 and (series := numbered_alone(alone)):
        names = " and ".join(case.images[0].name for case in series[0][:2])
        notes.append(f"{names} are two cases and not two channels, since each has a label map")
    return out, tuple(notes)


def _of_first_channels(found: dict[str, list[Path]], files: Iterable[Path]) -> None:
    """Give label maps called x_0000 to the case x where x_0001, ... are images without one."""
    later: dict[str, list[str]] = defaultdict(list)
    for path in files:
        base, number = split_name(stem(path))
        if number:
            later[base].append(stem(path))
    for base, names in later.items():
        if f"{base}_0000" in found and base not in found and not any(name in found for name in names):
            found[base] = found.pop(f"{base}_0000")


def image_names(files: Iterable[Path]) -> set[str]:
    """The names that label maps of these image files may have: with and without a channel number."""
    return {name for path in files for name in (stem(path), split_name(stem(path))[0])}


def label_maps(files: Iterable[Path], names: Collection[str]) -> dict[str, list[Path]]:
    """The label maps of each name that has any: those of that very name, else those with a word such as `_mask`."""
    exact: dict[str, list[Path]] = defaultdict(list)
    by_word: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        name = stem(path)
        if name in names:
            exact[name].append(path)
        elif label_base(name) in names:
            by_word[label_base(name)].append(path)
    return {**by_word, **exact}


def label_base(name: str) -> str:
    """The name without a word that label maps end in: cell0_mask -> cell0, case_0.seg -> case_0."""
    match = _LABEL_WORD.fullmatch(name)
    return match[1] if match else name


def common_ending(cases: Iterable[Case]) -> str:
    """The ending that most images have."""
    endings = [suffix_of(path) for case in cases for path in case.images]
    return max(set(endings), key=endings.count, default=".nii.gz")


def likely_pairs(images: Sequence[Path], maps: Sequence[Path]) -> dict[Path, list[Path]]:
    """Label maps whose names do not match, with the images that they may belong to: several are channels of a case.

    What varies among the names of images is compared with what varies among those of label maps (img_01 and mask_01;
    P01_T1 and P01_seg), then the numbers in them. An image that two label maps would have is left out.
    """
    ours = {path: _tokens(stem(path)) for path in images}
    theirs = {path: _tokens(label_base(stem(path))) for path in maps}
    numbers = {path: tuple(filter(str.isdecimal, tokens)) for path, tokens in (ours | theirs).items()}
    for keys in (_varying(ours) | _varying(theirs), numbers):
        exact, by_start = defaultdict(list), defaultdict(list)
        for image in images:
            exact[keys[image]].append(image)
            for length in range(1, len(keys[image])):
                by_start[keys[image][:length]].append(image)
        pairs = {label: exact.get(keys[label]) or by_start.get(keys[label], []) for label in maps if keys[label]}
        times = Counter(image for found in pairs.values() for image in found)
        sure = {label: found for label, found in pairs.items() if found and all(times[image] == 1 for image in found)}
        if sure:
            return sure
    return {}


def _tokens(name: str) -> tuple[str, ...]:
    """Runs of digits, without leading zeros, and of letters: P001_T1 -> p, 1, t, 1."""
    return tuple(str(int(token)) if token.isdecimal() else token.lower() for token in _TOKEN.findall(name))


def _varying(names: dict[Path, tuple[str, ...]]) -> dict[Path, tuple[str, ...]]:
    """Each name without the tokens that all of them begin and end with."""
    if len(set(names.values())) < 2:
        return names
    first = _common(names.values())
    last = _common([name[first:][::-1] for name in names.values()])
    return {path: name[first : len(name) - last] for path, name in names.items()}


def _common(names: Iterable[tuple[str, ...]]) -> int:
    """How many tokens all names begin with."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*names, strict=False)))


def advice(label: Path, images: Sequence[Path]) -> str:
    """How to rename the files of a likely pair."""
    rename = f"rename it to {stem(images[0])}{suffix_of(label)}"
    return _channel_advice(label, images) or f"If it is the label map of {images[0].name}, {rename}."


def _channel_advice(label: Path, images: Sequence[Path]) -> str:
    """How to rename images that look like channels of one case; empty where they do not."""
    name, ending = label_base(stem(label)), suffix_of(images[0])
    if re.fullmatch(re.escape(name) + r"[^A-Za-z0-9]?\d{1,6}", stem(images[0])):
        right = f"{name}_0000{ending}"
        return f"The number of a channel has four digits after an underscore: rename {images[0].name} to {right}."
    if len(images) > 1:
        files = " and ".join(path.name for path in images[:2])
        return f"If {files} are channels of one case, rename them to {name}_0000{ending} and {name}_0001{ending}."
    return ""


# ------------------------------------------------------------------------------------------ what is there, for messages


def _unmatched(folder: Path, files: Sequence[Path], maps: Sequence[Path]) -> UserError:
    """No label map has the name of an image: both, and what look like pairs, or like masks of one case."""
    n_maps, n_images = plural(len(maps), "label map"), plural(len(files), "image")
    pairs, masks = likely_pairs(files, maps), likely_pairs(maps, files)
    several = next((image for image, found in masks.items() if len(found) > 1), None)
    if several and not pairs:
        names = [path.name for path in masks[several]]
        what = f"holds several masks for an image ({few(names)} for {several.name})"
        return UserError(what, folder, _merge(folder, f"{stem(several)}{suffix_of(several)}", names))
    if not pairs:
        have, wanted = (few([path.name for path in paths]) for paths in (maps, files))
        what = f"none of its {n_maps} ({have}) has the name of one of the {n_images} ({wanted})"
        return UserError(what, folder, f"Name each label map as its image, or {_LIST}.")
    listed = [f"{' and '.join(path.name for path in found)} with {label.name}" for label, found in pairs.items()]
    what = f"none of its {n_maps} has the name of one of the {n_images}; likely pairs are {few(listed)}"
    label, found = next(iter(pairs.items()))
    rename = f"rename {label.name} to {stem(found[0])}{suffix_of(label)}"
    return UserError(
        what, folder, _channel_advice(label, found) or f"If these are pairs, {rename}, and so on, or {_LIST}."
    )


def no_files_in(folder: Path, what: str, ending: str | None = None, names: Collection[str] = ()) -> UserError:
    """A folder holds no image, or no label map, to read; the error says what it holds instead.

    Parameters
    ----------
    what : "image" or "label map".
    ending : the only one that counts, from dataset.json.
    names : of the images that label maps are wanted for.
    """
    if readable := image_files(folder):
        there = _by_ending(suffix_of(path) for path in readable)
        fix = 'Correct "file_ending" in dataset.json, or convert the files.'
        return UserError(f"holds no {what} that ends with {ending}, but {there}", folder, fix)
    inside = {path: image_files(path) for path in folders_in(folder)}
    filled = {path: files for path, files in inside.items() if files}
    if filled:
        return _in_folders(folder, filled, what, names)
    if series := next((path for path in inside if is_series(path)), None):
        fix = f"Convert them to NIfTI, or {_LIST}: the image of a case is then the folder of its series."
        return UserError(f"holds no {what} but folders of DICOM files, such as {series.name}", folder, fix)
    if others := [path for path in _files(folder) if path.suffix.lower() != ".json"]:
        there = _by_ending(path.suffix.lower() or path.name for path in others)
        fix = f"Convert them. Supported are {' '.join(SUFFIXES)}."
        return UserError(f"holds no {what} of a supported format, but {there}", folder, fix)
    empty = "" if _files(folder) or inside else ": it is empty"
    return UserError(f"holds no {what} of a supported format{empty}", folder, f"Supported are {' '.join(SUFFIXES)}.")


def _by_ending(endings: Iterable[str]) -> str:
    """How many files there are of each ending: 5 .gif files, 1 .txt file."""
    return few([plural(n, f"{ending} file") for ending, n in Counter(endings).most_common()])


def _in_folders(folder: Path, inside: dict[Path, list[Path]], what: str, names: Collection[str]) -> UserError:
    """The images or label maps are in folders below: one per case, one per structure, or one for all."""
    (case, paths), files = next(iter(inside.items())), [path.name for path in next(iter(inside.values()))]
    if not {label_base(stem(path)) for path in paths}.isdisjoint(names) and len(inside) > 1:
        folders = [path.name for path in inside]
        text = f"holds a folder for each structure ({few(folders)}), each with a mask per case"
        return UserError(text, folder, _merge(folder, paths[0].name, folders))
    if len(inside) == 1 and len(files) > 1 and case.name not in names:
        fix = f"Move its files to {folder.name}/, or {_LIST}."
        return UserError(f"holds no {what}, but {case.name}/ inside it does ({few(files)})", folder, fix)
    if what == "label map" and len(files) > 1:
        text = f"holds a folder for each case with one mask per structure (in {case.name}/ {few(files)})"
        return UserError(text, folder, _merge(folder, f"{case.name}{suffix_of(paths[0])}", files))
    number = "_0000" if what == "image" and len(files) > 1 else ""
    target = f"{folder.name}/{case.name}{number}{suffix_of(paths[0])}"
    fix = f"Move {case.name}/{files[0]} to {target}, and so on, or {_LIST}."
    return UserError(f"holds no {what} but a folder for each case (in {case.name}/ {few(files)})", folder, fix)


def _merge(folder: Path, case: str, masks: Sequence[str]) -> str:
    """How to make a label map of masks of single structures."""
    values = ", ".join(f"{i} for {stem(Path(name))}" for i, name in enumerate(masks[:3], 1))
    rest = ", and so on" if masks[3:] else ""
    return (
        f"Merge the masks of each case into one label map, {folder.name}/{case}: 0 for the background, {values}{rest}."
    )


def no_dataset(root: Path) -> UserError:
    """A folder is no dataset; the error says what it is instead, where that can be seen."""
    inside = [folder for folder in folders_in(root) if (folder / "dataset.json").is_file() or _has_both(folder)]
    if inside:
        return UserError("is no dataset", root, f"Give a folder inside it: {few([str(path) for path in inside])}.")
    if root.name.lower() in (*IMAGE_FOLDERS, *LABEL_FOLDERS) and _has_both(root.parent):
        return UserError("is no dataset but a part of one", root, f"Give {root.parent}.")
    images, labels = image_folder(root), label_folder(root)
    files = image_files(images or root)
    mixed = _side_by_side(files)
    if mixed and labels is None:
        where = f"{images.name}/ holds" if images else "it holds"
        fix = f"Move the images to images/ and the label maps to labels/, or {_LIST}."
        return UserError(f"is no dataset: {where} images and label maps in one folder ({mixed})", root, fix)
    if images or labels:
        have, lack = (images, "label maps, such as labels/") if images else (labels, "images, such as images/")
        assert have is not None
        return UserError(f"is no dataset: it holds {have.name}/ and no folder of {lack}", root, _NEEDS)
    for folder in folders_in(root):
        if error := _case_of_files(root, folder):
            return error
    return UserError("is no dataset", root, _NEEDS)


def _case_of_files(root: Path, case: Path) -> UserError | None:
    """Whether a folder holds the image and the label map of one case, or its masks in a folder of their own."""
    masks = [folder for folder in folders_in(case) if image_files(folder)]
    files = image_files(case)
    if not files or len(files) + len(masks) < 2:
        return None
    ending = suffix_of(files[0])
    names = [*(path.name for path in files), *(f"{folder.name}/" for folder in masks)]
    merged = f"the masks of {masks[0].name}/ as one label map" if masks else "its label map"
    fix = (
        f"Move the image to images/{case.name}{ending} (channels: {case.name}_0000{ending} and so on) and {merged} to "
        f"labels/{case.name}{ending}, or {_LIST}."
    )
    return UserError(f"is no dataset: it holds a folder for each case (in {case.name}/ {few(names)})", root, fix)


def _side_by_side(files: list[Path]) -> str:
    """An image and a label map in one folder, such as "c0.png, c0_mask.png"; empty where there are none."""
    by_name = {stem(path): path for path in files}
    pairs = ((by_name.get(label_base(name)), path) for name, path in by_name.items() if label_base(name) != name)
    return next((f"{image.name}, {label.name}" for image, label in pairs if image), "")
