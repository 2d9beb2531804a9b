"""Which label map belongs to which image: the folders of a dataset, and how the names of their files match.

A label map has the name of its image. A word such as `_mask` at its end is accepted and reported. Other names are not
guessed: the error shows names of both folders, and how to name files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from nnunet_lite.data.cases import Case, count_endings, folders_in, group_files, image_files, numbered_cases, split_name
from nnunet_lite.data.names import SUPPORTED, stem, suffix_of
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import IMAGE_FOLDERS

LABEL_FOLDERS = ("labelstr", "labels", "label", "masks", "mask", "segmentations", "segmentation")
_LABEL_WORD = re.compile(r"(.+?)[ _.-](?:masks?|segs?|segmentations?|labels?|gt)", re.IGNORECASE)
_NEEDS = "It needs dataset.json, or the folders images/ and labels/ (or imagesTr/ and labelsTr/)."
_NAMING = (
    "An image is called CASE.nii.gz, or CASE_0000.nii.gz, CASE_0001.nii.gz, ... for its channels, and its label map "
    "CASE.nii.gz: one for all structures, with a value for each. Or list the files in dataset.json, see docs/files.md."
)


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
        raise UserError(f"holds {names}, and each could hold the {what}", root, "Keep one of them.")
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
        raise no_files_error(folder, "label map")
    labels = label_maps(maps, _image_names(files))
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
        raise UserError(what, folder, _NAMING)
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


def _image_names(files: Iterable[Path]) -> set[str]:
    """Return the names that label maps of image files may have: with and without a channel number."""
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


# --------------------------------------------------------------------------------------------------------------- errors


def no_files_error(folder: Path, what: str, ending: str | None = None) -> UserError:
    """Return the error for a folder without a readable file, which says what the folder contains instead.

    Parameters
    ----------
    folder : Path
        The folder of images or label maps.
    what : str
        "image" or "label map".
    ending : str or None
        The only ending that counts, from dataset.json.

    Returns
    -------
    UserError
        To be raised.
    """
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    wrong = image_files(folder) or [path for path in files if path.suffix.lower() != ".json"]
    inside = [f"{path.name}/ ({few(names)})" for path in folders_in(folder) if (names := _names_in(path))]
    found = count_endings(wrong) if wrong else few(inside)
    ends = f" that ends with {ending}" if ending else ""
    instead = f", but {found}" if found else "" if files else ": it is empty"
    text = f"holds no {what} of a supported format{ends}{instead}"
    if inside:
        fix = f"Move the files to {folder.name}/, one for each case and channel. {_NAMING}"
    else:
        fix = f"Convert them, or correct file_ending in dataset.json. {SUPPORTED}."
    return UserError(text, folder, fix)


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def no_dataset_error(root: Path) -> UserError:
    """Return the error for a folder that is not a dataset, which says what the folder contains.

    Parameters
    ----------
    root : Path
        The folder.

    Returns
    -------
    UserError
        To be raised.
    """
    folders = [root.parent, *folders_in(root)]
    datasets = [str(folder) for folder in folders if (folder / "dataset.json").is_file() or _has_both(folder)]
    if datasets:
        return UserError("is no dataset", root, f"Give {few(datasets)}.")
    names = [f"{name}/" if (root / name).is_dir() else name for name in _names_in(root)]
    found = f": it holds {few(names)}" if names else ""
    return UserError(f"is no dataset{found}", root, f"{_NEEDS} {_NAMING}")
