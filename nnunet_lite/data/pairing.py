"""Which label map belongs to which image: the folders of a dataset, how their names match, and advice if they do not.

A label map has the name of its image. A word such as `_mask` at its end is accepted and reported. Other names that look
like pairs are proposed to the user, but never used.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from pathlib import Path

from nnunet_lite.data.cases import Case, count_endings, folders_in, group_files, image_files, numbered_cases, split_name
from nnunet_lite.data.dicom import is_series
from nnunet_lite.data.names import SUPPORTED, stem, suffix_of
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
    """Return the folder of the training images: imagesTr, or images, Images, image.

    Parameters
    ----------
    root : Path
        The folder of a dataset.

    Returns
    -------
    Path or None
        None if there is none.

    Raises
    ------
    UserError
        There are several such folders.
    """
    return _usual_folder(root, "imagesTr", IMAGE_FOLDERS, "images")


def label_folder(root: Path) -> Path | None:
    """Return the folder of the training label maps: labelsTr, or labels, masks, segmentations, in any case.

    Parameters
    ----------
    root : Path
        The folder of a dataset.

    Returns
    -------
    Path or None
        None if there is none.

    Raises
    ------
    UserError
        There are several such folders.
    """
    return _usual_folder(root, "labelsTr", LABEL_FOLDERS, "label maps")


def _usual_folder(root: Path, of_nnunet: str, usual: Sequence[str], what: str) -> Path | None:
    if (root / of_nnunet).is_dir():
        return root / of_nnunet
    candidates = [folder for folder in folders_in(root) if folder.name.lower() in usual]
    filled = [folder for folder in candidates if any(not path.name.startswith(".") for path in folder.iterdir())]
    if len(filled) > 1:
        names = " and ".join(f"{folder.name}/" for folder in filled)
        raise UserError(f"holds {names}, and each could hold the {what}", root, f"Keep one of them, or {_LIST}.")
    return next(iter(filled or candidates), None)


def _has_both(folder: Path) -> bool:
    names = {inside.name.lower() for inside in folders_in(folder)}
    return not names.isdisjoint(IMAGE_FOLDERS) and not names.isdisjoint(LABEL_FOLDERS)


# ---------------------------------------------------------------------------------------------------------------- names


def labelled_cases(
    files: Sequence[Path], channels: int | None, folder: Path, ending: str | None
) -> tuple[list[Case], tuple[str, ...]]:
    """Group image files into cases with their label maps.

    Parameters
    ----------
    files : sequence of Path
        All images of a dataset.
    channels : int or None
        Their number of channels. None: what the numbers in the names of labelled images show.
    folder : Path
        The folder of the label maps.
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
        The folder contains no label map, or none with the name of an image.
    """
    maps = image_files(folder)
    if not maps:
        raise no_files_error(folder, "label map", names=image_names(files))
    labels = label_maps(maps, image_names(files))
    if channels != 1:
        _rename_first_channels(labels, files)
    single = [Case(stem(path), (path,)) for path in files if stem(path) in labels]  # also names that end in _0001
    others = [path for path in files if stem(path) not in labels]
    if channels is None:
        numbers = [number for base, number in (split_name(stem(path)) for path in others) if number and base in labels]
        channels = max(numbers, default=0) + 1
    cases = single + group_files(others, channels, labels)
    if not any(case.id in labels for case in cases):
        raise _no_match_error(folder, files, maps)
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
        for used, what in ((files[0].parent, "images"), (folder, "label maps"))
        if used.name.lower() not in ("imagestr", "images", "labelstr", "labels")
    ]
    if by_word:
        notes.append(by_word[0] + (f", and {len(by_word) - 1} more in the same way" if by_word[1:] else ""))
    if channels == 1 and (numbered := numbered_cases(single)):
        names = " and ".join(case.images[0].name for case in numbered[0][:2])
        notes.append(f"{names} are two cases and not two channels, since each has a label map")
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


def image_names(files: Iterable[Path]) -> set[str]:
    """Return the names that label maps of image files may have: with and without a channel number.

    Parameters
    ----------
    files : iterable of Path
        Images.

    Returns
    -------
    set of str
        Names without endings.
    """
    return {name for path in files for name in (stem(path), split_name(stem(path))[0])}


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
    for path in files:
        name = stem(path)
        if name in names:
            exact[name].append(path)
        elif label_base(name) in names:
            by_word[label_base(name)].append(path)
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


def common_ending(cases: Iterable[Case]) -> str:
    """Return the ending of most images.

    Parameters
    ----------
    cases : iterable of Case
        Cases of a dataset.

    Returns
    -------
    str
        Such as ".nii.gz".
    """
    endings = [suffix_of(path) for case in cases for path in case.images]
    return max(set(endings), key=endings.count, default=".nii.gz")


# --------------------------------------------------------------------------------------------------------- likely pairs


def likely_pairs(images: Sequence[Path], maps: Sequence[Path]) -> dict[Path, list[Path]]:
    """Propose images for label maps whose names do not match.

    The varying parts of the names of images are compared with those of label maps (img_01 and mask_01; P01_T1 and
    P01_seg), then the numbers in them. An image that two label maps match is left out.

    Parameters
    ----------
    images, maps : sequence of Path
        Images and label maps without a partner.

    Returns
    -------
    dict of Path to list of Path
        Label map -> images; several images may be channels of a case.
    """
    of_images = {path: _tokens(stem(path)) for path in images}
    of_maps = {path: _tokens(label_base(stem(path))) for path in maps}
    numbers = {path: tuple(filter(str.isdecimal, tokens)) for path, tokens in (of_images | of_maps).items()}
    for keys in (_varying(of_images) | _varying(of_maps), numbers):
        exact, by_start = defaultdict(list), defaultdict(list)
        for image in images:
            exact[keys[image]].append(image)
            for length in range(1, len(keys[image])):
                by_start[keys[image][:length]].append(image)
        pairs = {label: exact.get(keys[label]) or by_start.get(keys[label], []) for label in maps if keys[label]}
        uses = Counter(image for found in pairs.values() for image in found)
        sure = {label: found for label, found in pairs.items() if found and all(uses[image] == 1 for image in found)}
        if sure:
            return sure
    return {}


def _tokens(name: str) -> tuple[str, ...]:
    """Split a name into letters and numbers without leading zeros: P001_T1 -> p, 1, t, 1."""
    return tuple(str(int(token)) if token.isdecimal() else token.lower() for token in _TOKEN.findall(name))


def _varying(names: dict[Path, tuple[str, ...]]) -> dict[Path, tuple[str, ...]]:
    """Remove the tokens with which all names begin and end."""
    if len(set(names.values())) < 2:
        return names

    def common(tokens: list[tuple[str, ...]]) -> int:
        return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*tokens, strict=False)))

    first = common(list(names.values()))
    last = common([name[first:][::-1] for name in names.values()])
    return {path: name[first : len(name) - last] for path, name in names.items()}


def pair_advice(label: Path, images: Sequence[Path]) -> str:
    """Say how to rename the files of a likely pair.

    Parameters
    ----------
    label : Path
        The label map.
    images : sequence of Path
        The images that it may belong to.

    Returns
    -------
    str
        A sentence.
    """
    rename = f"rename it to {stem(images[0])}{suffix_of(label)}"
    return _channel_advice(label, images) or f"If it is the label map of {images[0].name}, {rename}."


def _channel_advice(label: Path, images: Sequence[Path]) -> str:
    """Say how to rename images that look like channels of one case; empty if they do not."""
    name, ending = label_base(stem(label)), suffix_of(images[0])
    if re.fullmatch(re.escape(name) + r"[^A-Za-z0-9]?\d{1,6}", stem(images[0])):
        right = f"{name}_0000{ending}"
        return f"The number of a channel has four digits after an underscore: rename {images[0].name} to {right}."
    if len(images) > 1:
        files = " and ".join(path.name for path in images[:2])
        return f"If {files} are channels of one case, rename them to {name}_0000{ending} and {name}_0001{ending}."
    return ""


# --------------------------------------------------------------------------------------------------------------- errors


def _no_match_error(folder: Path, files: Sequence[Path], maps: Sequence[Path]) -> UserError:
    """No label map has the name of an image: list both, and likely pairs or masks of one case."""
    n_maps, n_images = plural(len(maps), "label map"), plural(len(files), "image")
    pairs, masks = likely_pairs(files, maps), likely_pairs(maps, files)
    several = next((image for image, found in masks.items() if len(found) > 1), None)
    if several and not pairs:
        names = [path.name for path in masks[several]]
        what = f"holds several masks for an image ({few(names)} for {several.name})"
        return UserError(what, folder, _merge_advice(folder, f"{stem(several)}{suffix_of(several)}", names))
    if not pairs:
        of_maps, of_images = (few([path.name for path in paths]) for paths in (maps, files))
        what = f"none of its {n_maps} ({of_maps}) has the name of one of the {n_images} ({of_images})"
        return UserError(what, folder, f"Name each label map as its image, or {_LIST}.")
    listed = [f"{' and '.join(path.name for path in found)} with {label.name}" for label, found in pairs.items()]
    what = f"none of its {n_maps} has the name of one of the {n_images}; likely pairs are {few(listed)}"
    label, found = next(iter(pairs.items()))
    rename = f"rename {label.name} to {stem(found[0])}{suffix_of(label)}"
    fix = _channel_advice(label, found) or f"If these are pairs, {rename}, and so on, or {_LIST}."
    return UserError(what, folder, fix)


def no_files_error(folder: Path, what: str, ending: str | None = None, names: Collection[str] = ()) -> UserError:
    """Return the error for a folder without a readable file, which says what the folder contains instead.

    Parameters
    ----------
    folder : Path
        The folder of images or label maps.
    what : str
        "image" or "label map".
    ending : str or None
        The only ending that counts, from dataset.json.
    names : collection of str
        Names of the images that need label maps.

    Returns
    -------
    UserError
        To be raised.
    """
    if readable := image_files(folder):
        fix = 'Correct "file_ending" in dataset.json, or convert the files.'
        return UserError(f"holds no {what} that ends with {ending}, but {count_endings(readable)}", folder, fix)
    inside = {path: image_files(path) for path in folders_in(folder)}
    if filled := {path: files for path, files in inside.items() if files}:
        return _nested_error(folder, filled, what, names)
    if series := next((path for path in inside if is_series(path)), None):
        fix = f"Convert them to NIfTI, or {_LIST}: the image of a case is then the folder of its series."
        return UserError(f"holds no {what} but folders of DICOM files, such as {series.name}", folder, fix)
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if others := [path for path in files if path.suffix.lower() != ".json"]:
        text = f"holds no {what} of a supported format, but {count_endings(others)}"
        return UserError(text, folder, f"Convert them. {SUPPORTED}.")
    empty = "" if files or inside else ": it is empty"
    return UserError(f"holds no {what} of a supported format{empty}", folder, f"{SUPPORTED}.")


def _nested_error(folder: Path, inside: dict[Path, list[Path]], what: str, names: Collection[str]) -> UserError:
    """The images or label maps are in folders inside: one per case, one per structure, or one for all."""
    case, paths = next(iter(inside.items()))
    files = [path.name for path in paths]
    if not {label_base(stem(path)) for path in paths}.isdisjoint(names) and len(inside) > 1:
        folders = [path.name for path in inside]
        text = f"holds a folder for each structure ({few(folders)}), each with a mask per case"
        return UserError(text, folder, _merge_advice(folder, paths[0].name, folders))
    if len(inside) == 1 and len(files) > 1 and case.name not in names:
        fix = f"Move its files to {folder.name}/, or {_LIST}."
        return UserError(f"holds no {what}, but {case.name}/ inside it does ({few(files)})", folder, fix)
    if what == "label map" and len(files) > 1:
        text = f"holds a folder for each case with one mask per structure (in {case.name}/ {few(files)})"
        return UserError(text, folder, _merge_advice(folder, f"{case.name}{suffix_of(paths[0])}", files))
    number = "_0000" if what == "image" and len(files) > 1 else ""
    target = f"{folder.name}/{case.name}{number}{suffix_of(paths[0])}"
    fix = f"Move {case.name}/{files[0]} to {target}, and so on, or {_LIST}."
    return UserError(f"holds no {what} but a folder for each case (in {case.name}/ {few(files)})", folder, fix)


def _merge_advice(folder: Path, case: str, masks: Sequence[str]) -> str:
    values = ", ".join(f"{i} for {stem(Path(name))}" for i, name in enumerate(masks[:3], 1))
    values = f"0 for the background, {values}" + (", and so on" if masks[3:] else "")
    return f"Merge the masks of each case into one label map, {folder.name}/{case}: {values}."


def no_dataset_error(root: Path) -> UserError:
    """Return the error for a folder that is no dataset, which says what it is instead if that can be seen.

    Parameters
    ----------
    root : Path
        The folder.

    Returns
    -------
    UserError
        To be raised.
    """
    inside = [folder for folder in folders_in(root) if (folder / "dataset.json").is_file() or _has_both(folder)]
    if inside:
        return UserError("is no dataset", root, f"Give a folder inside it: {few([str(path) for path in inside])}.")
    if root.name.lower() in (*IMAGE_FOLDERS, *LABEL_FOLDERS) and _has_both(root.parent):
        return UserError("is no dataset but a part of one", root, f"Give {root.parent}.")
    images, labels = image_folder(root), label_folder(root)
    by_name = {stem(path): path for path in image_files(images or root)}
    mixed = [(by_name[base], path) for name, path in by_name.items() if (base := label_base(name)) in by_name]
    mixed = [(image, label) for image, label in mixed if image != label]
    if mixed and labels is None:
        place = f"{images.name}/ holds" if images else "it holds"
        names = ", ".join(path.name for path in mixed[0])
        fix = f"Move the images to images/ and the label maps to labels/, or {_LIST}."
        return UserError(f"is no dataset: {place} images and label maps in one folder ({names})", root, fix)
    if images:
        what = f"is no dataset: it holds {images.name}/ and no folder of label maps, such as labels/"
        return UserError(what, root, _NEEDS)
    if labels:
        what = f"is no dataset: it holds {labels.name}/ and no folder of images, such as images/"
        return UserError(what, root, _NEEDS)
    errors = (_case_folder_error(root, folder) for folder in folders_in(root))
    return next(filter(None, errors), UserError("is no dataset", root, _NEEDS))


def _case_folder_error(root: Path, case: Path) -> UserError | None:
    """A folder contains the image and the label map of one case, or its masks in a folder of their own."""
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
