"""Data sets as people have them: MSD, nnU-Net v1 and v2 layouts and plain images/ + labels/ folders, as one `Dataset`.

What the folders hold is not judged here, check.py does that: a case lists the files it should have.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from nnunet_lite.data.cases import SUPPORTED, Case, find_cases, group_files, image_files, split_name, unsupported
from nnunet_lite.data.images import PICTURES, Image, ending_of, read_geometry, read_images, read_label, stem, suffix_of
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import read_json, understood

__all__ = [
    "Case",
    "Dataset",
    "dataset_from_json",
    "dataset_to_json",
    "find_cases",
    "image_folder",
    "label_folder",
    "map_labels",
    "read_case",
    "read_dataset",
]


@dataclass(frozen=True)
class Dataset:
    """A data set as found.

    Parameters
    ----------
    layout : "msd", "nnunet_v1", "nnunet_v2", "explicit" (nnU-Net v2 with a list of files) or "plain".
    cases : sorted by id. Their files are those they should have; check.py tells which are missing.
    label_map : value in the files -> value of the data set, e.g. {255: 1} for masks of 0 and 255.
    file_ending : of the images, of most where there are several.
    notes : what had to be understood.
    accept_geometry : whether files of a case may differ in origin and direction.
    """

    name: str
    root: Path
    layout: str
    channels: tuple[str, ...]
    labels: Labels
    cases: tuple[Case, ...]
    label_map: dict[int, int] | None = None
    file_ending: str = ".nii.gz"
    notes: tuple[str, ...] = ()
    accept_geometry: bool = False


def read_dataset(root: Path) -> Dataset:
    """Find out what a folder holds.

    Raises
    ------
    UserError : no data set in one of the known layouts; dataset.json is broken (line and column) or lacks something.
    """
    root = Path(root).absolute()
    if ".." in root.parts:
        root = root.resolve()  # the folder's name is the data set's
    if not root.is_dir():
        raise UserError("there is no such folder", root)
    table = root / "dataset.json"
    if table.is_file():
        return _described(root, table)
    images, labels = image_folder(root), label_folder(root)
    if images is None or labels is None:
        raise UserError(
            "is no data set",
            root,
            "It needs dataset.json, or the folders images/ and labels/ (or imagesTr/ and labelsTr/).",
        )
    return _plain(root, images, labels)


def image_folder(root: Path) -> Path | None:
    """Where a data set keeps its training images."""
    return next((root / name for name in ("imagesTr", "images") if (root / name).is_dir()), None)


def label_folder(root: Path) -> Path | None:
    """Where a data set keeps its training labels."""
    return next((root / name for name in ("labelsTr", "labels") if (root / name).is_dir()), None)


def read_case(case: Case, dataset: Dataset) -> tuple[Image, np.ndarray | None]:
    """Image and label map (z, y, x) of a case, the latter with the data set's values.

    Raises
    ------
    UserError : a file cannot be read, channels are missing, or the shapes of image and label differ.
    """
    image = read_images(case.images, len(dataset.channels), dataset.accept_geometry)
    if image.array.shape[0] != len(dataset.channels):
        raise UserError(f"has {image.array.shape[0]} channels, {len(dataset.channels)} are expected", case.images[0])
    if case.label is None:
        return image, None
    label, geometry, _ = read_label(case.label)
    if geometry.shape != image.geometry.shape:
        raise UserError(f"has shape {geometry.shape}, its image {image.geometry.shape}", case.label)
    return image, map_labels(label, dataset.label_map)


def map_labels(label: np.ndarray, label_map: dict[int, int] | None) -> np.ndarray:
    """Translate values of a file into values of the data set; left alone where the file holds both."""
    for raw, value in (label_map or {}).items():
        if not (label == value).any():
            label = np.where(label == raw, np.asarray(value, label.dtype), label)
    return label


def dataset_to_json(dataset: Dataset) -> dict[str, Any]:
    """Everything of a data set, paths absolute, for the workspace's dataset.json."""
    return {
        "name": dataset.name,
        "root": str(dataset.root),
        "layout": dataset.layout,
        "channel_names": {str(i): name for i, name in enumerate(dataset.channels)},
        "labels": dataset.labels.to_json(),
        **({"regions_class_order": list(dataset.labels.region_order)} if dataset.labels.region_order else {}),
        "file_ending": dataset.file_ending,
        "numTraining": len(dataset.cases),
        "label_map": None if dataset.label_map is None else {str(k): v for k, v in dataset.label_map.items()},
        "notes": list(dataset.notes),
        "accept_geometry": dataset.accept_geometry,
        "dataset": [
            {"id": c.id, "images": [str(p) for p in c.images], "label": None if c.label is None else str(c.label)}
            for c in dataset.cases
        ],
    }


def dataset_from_json(value: dict[str, Any]) -> Dataset:
    """The inverse of `dataset_to_json`."""
    label_map = value["label_map"]
    return Dataset(
        name=value["name"],
        root=Path(value["root"]),
        layout=value["layout"],
        channels=tuple(value["channel_names"].values()),
        labels=Labels.from_json(value["labels"], value.get("regions_class_order")),
        cases=tuple(
            Case(c["id"], tuple(Path(p) for p in c["images"]), None if c["label"] is None else Path(c["label"]))
            for c in value["dataset"]
        ),
        label_map=None if label_map is None else {int(k): v for k, v in label_map.items()},
        file_ending=value["file_ending"],
        notes=tuple(value["notes"]),
        accept_geometry=value.get("accept_geometry", False),
    )


def stored_dataset(file: Path) -> Dataset:
    """The data set that a workspace's dataset.json tells of.

    Raises
    ------
    UserError : no such file, no JSON, or not as `dataset_to_json` makes it.
    """
    with understood(file, "Run `nnlite plan` again."):
        return dataset_from_json(read_json(file))


# ------------------------------------------------------------------------------------------------- with dataset.json


def _described(root: Path, table: Path) -> Dataset:
    """A data set with a dataset.json."""
    told = read_json(table)
    if not isinstance(told, dict):
        raise UserError("is not a JSON object", table)
    channels = channels_of(told, table)
    labels = labels_of(told, table)
    if not isinstance(told.get("file_ending") or "", str):
        raise UserError(f"file_ending is {told['file_ending']!r}", table, 'Give, for example, ".nii.gz".')
    if isinstance(told.get("dataset"), dict):
        layout, cases = "explicit", _listed_v2(root, told["dataset"], table)
    elif isinstance(told.get("training"), list) and any(isinstance(entry, dict) for entry in told["training"]):
        layout, cases = _listed(root, told["training"], len(channels), table)
    else:
        layout, cases = "nnunet_v2", _scanned(root, len(channels), told.get("file_ending"), table)
    label_map, notes = _mask_map(labels, cases)
    return Dataset(
        name=root.name,
        root=root,
        layout=layout,
        channels=channels,
        labels=labels,
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        label_map=label_map,
        file_ending=_common_ending(cases, told.get("file_ending")),
        notes=notes,
    )


def channels_of(told: Mapping[str, Any], table: Path | None) -> tuple[str, ...]:
    """Channel names of a dataset.json: `channel_names` (nnU-Net v2) or `modality` (MSD, nnU-Net v1), by number.

    Raises
    ------
    UserError : missing or malformed; `table` is the file that the message names.
    """
    if not isinstance(told, Mapping):
        raise UserError("is not a JSON object", table)
    names = told.get("channel_names", told.get("modality"))
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise UserError("has no channel_names", table, 'Add, for example, "channel_names": {"0": "CT"}.')
    numbers = {str(key): str(name) for key, name in names.items()}
    if set(numbers) != {str(i) for i in range(len(numbers))}:
        raise UserError(f"channel_names has the keys {list(numbers)}", table, 'Number the channels "0", "1", ...')
    return tuple(numbers[str(i)] for i in range(len(numbers)))


def labels_of(told: Mapping[str, Any], table: Path | None) -> Labels:
    """Labels of a dataset.json.

    Raises
    ------
    UserError : missing or malformed; `table` is the file that the message names.
    """
    if not isinstance(told.get("labels"), dict):
        raise UserError("has no labels", table, 'Add, for example, "labels": {"background": 0, "tumour": 1}.')
    try:
        return Labels.from_json(told["labels"], told.get("regions_class_order"))
    except ValidationError as error:
        message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise UserError(f"labels: {message}", table) from None
    except (TypeError, ValueError):
        raise UserError(f"labels {told['labels']} are not names with integers", table) from None


def _listed_v2(root: Path, entries: dict[str, Any], table: Path) -> list[Case]:
    """nnU-Net v2's explicit list: id -> {"images": [one per channel], "label": file}, relative to the data set.

    Files may begin with environment variables, as $DATA/a.nii.gz.
    """
    cases = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or not entry["images"]:
            raise UserError(f'dataset.{name} is not {{"images": [...], "label": ...}}', table)
        if "/" in name:
            raise UserError(f"the id {name!r} holds a /, and cases give files their names", table, "Write _ instead.")
        files = [entry.get("label") or "", *entry["images"]]
        if not all(isinstance(file, str) for file in files):
            raise UserError(f"dataset.{name} has something else than file names: {files}", table)
        label, *images = [os.path.expandvars(file) for file in files]
        cases.append(Case(name, tuple(root / file for file in images), root / label if label else None))
    return cases


def _listed(root: Path, entries: list[Any], channels: int, table: Path) -> tuple[str, list[Case]]:
    """MSD's list of image and label. nnU-Net v1 has the same list but names its files image_0000, image_0001, ..."""
    cases, layout = [], "msd"
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise UserError(f'training[{number}] is not {{"image": ..., "label": ...}}', table)
        if not isinstance(entry.get("label") or "", str):
            raise UserError(f"training[{number}] has the label {entry['label']!r}, which is no file name", table)
        image = root / entry["image"]
        name, suffix = stem(image), ending_of(image)
        images: tuple[Path, ...] = (image,)
        numbered = tuple(image.with_name(f"{name}_{i:04d}{suffix}") for i in range(channels))
        if not image.is_file() and any(path.is_file() for path in numbered):
            images, layout = numbered, "nnunet_v1"
        cases.append(Case(name, images, root / entry["label"] if entry.get("label") else None))
    return layout, cases


def _scanned(root: Path, channels: int, ending: str | None, table: Path) -> list[Case]:
    """All images of imagesTr (or images), with the label of the same name in labelsTr (or labels)."""
    images, labels = image_folder(root), label_folder(root)
    if images is None or labels is None:
        raise UserError("there is no folder imagesTr or no folder labelsTr beside it", table)
    files = image_files(images, ending)
    if not files:
        raise UserError(f"holds no image{f' that ends with {ending}' if ending else ''}{unsupported(images)}", images)
    return _with_labels(files, channels, labels, ending)


# -------------------------------------------------------------------------------------------------------- plain folders


def _plain(root: Path, images: Path, labels: Path) -> Dataset:
    """No dataset.json: channels follow from the files, labels from the values in the label maps."""
    files = image_files(images)
    if not files:
        raise UserError(f"holds no image of a supported format{unsupported(images)}", images, SUPPORTED)
    if not image_files(labels):
        raise UserError(f"holds no label map of a supported format{unsupported(labels)}", labels, SUPPORTED)
    names = {stem(path) for path in image_files(labels)}
    numbers = [split_name(stem(path))[1] for path in files if stem(path) not in names]
    channels = max((n for n in numbers if n is not None), default=0) + 1
    cases = _with_labels(files, channels, labels, None)
    readable, inside = _first_readable(cases)
    if channels > 1 or inside == 1:
        channel_names = tuple(f"channel_{i}" for i in range(channels))
    else:
        picture = inside == 3 and suffix_of(readable) in PICTURES
        channel_names = ("R", "G", "B") if picture else tuple(f"channel_{i}" for i in range(inside))
    values = _values([case.label for case in cases if case.label and case.label.is_file()])
    is_mask = values == {0, 255}
    found = [1] if is_mask else sorted(values - {0})
    if not found and any(_unreadable(case.label) for case in cases if case.label and case.label.is_file()):
        found = [1]  # check.py reports each file
    if not found:
        raise UserError("holds no label map with anything but zeros", labels)
    notes = ["no dataset.json: channels and labels were taken from the files"]
    return Dataset(
        name=root.name,
        root=root,
        layout="plain",
        channels=channel_names,
        labels=Labels(names={"background": 0, **{f"label_{value}": value for value in found}}),
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        label_map={255: 1} if is_mask else None,
        file_ending=_common_ending(cases, None),
        notes=(*notes, _MASK_NOTE) if is_mask else tuple(notes),
    )


def _first_readable(cases: Iterable[Case]) -> tuple[Path, int]:
    """The first image that can be read, and its channels; check.py reports the others. The first of all, if none."""
    for path in (paths := [path for case in cases for path in case.images]):
        with suppress(UserError):
            return path, read_geometry(path)[1]
    return paths[0], 1


def _unreadable(path: Path) -> bool:
    try:
        read_label(path)
    except UserError:
        return True
    return False


_MASK_NOTE = "label maps hold 0 and 255: 255 is read as 1"


def _values(paths: list[Path]) -> set[int]:
    """All values in some label maps. Files that cannot be read are passed over here: check.py reports each of them."""

    def values(path: Path) -> set[int]:
        try:
            label = read_label(path)[0]
        except UserError:
            return set()
        return {int(v) for v in np.unique(label)}

    with ThreadPoolExecutor(4) as pool:
        return set().union(*pool.map(values, paths))


def _with_labels(files: list[Path], channels: int, labels: Path, ending: str | None) -> list[Case]:
    """Group image files into cases; each gets the label of its name, or the path where one is missing."""
    found = {stem(path): path for path in image_files(labels)}
    whole = [path for path in files if stem(path) in found]  # names that end in _0001 by themselves
    others = [path for path in files if stem(path) not in found]
    cases = [Case(stem(path), (path,)) for path in whole] + group_files(others, channels)
    missing = ending or _common_ending(cases, None)
    return [Case(case.id, case.images, found.get(case.id, labels / f"{case.id}{missing}")) for case in cases]


def _mask_map(labels: Labels, cases: Iterable[Case]) -> tuple[dict[int, int] | None, tuple[str, ...]]:
    """Whether the masks of a data set with the values 0 and 1 hold 0 and 255.

    Looks at three files, and if they hold nothing but background at others until one does.
    """
    if labels.values != (0, 1) or labels.ignore is not None:
        return None, ()
    paths = [case.label for case in cases if case.label and case.label.is_file()]
    found = _values([paths[i] for i in sorted({0, len(paths) // 2, len(paths) - 1}) if paths])
    if found == {0}:
        found = next((values for values in (_values([path]) for path in paths) if values - {0}), found)
    if 255 in found:
        return {255: 1}, (_MASK_NOTE,)
    return None, ()


def _common_ending(cases: Iterable[Case], told: str | None) -> str:
    if told:
        return told
    endings = [suffix_of(path) for case in cases for path in case.images]
    return max(set(endings), key=endings.count, default=".nii.gz")
