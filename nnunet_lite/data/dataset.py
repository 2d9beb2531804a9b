"""Data sets as people have them: MSD, nnU-Net v1 and v2 layouts and plain images/ + labels/ folders, as one `Dataset`.

What the folders hold is not judged here, check.py does that: a case lists the files it should have.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from nnunet_lite.data.cases import Case, find_cases, image_files, split_name
from nnunet_lite.data.images import PICTURES, Image, ending_of, read_geometry, read_images, read_label, stem, suffix_of
from nnunet_lite.data.label_values import labels_of_files, mask_map
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.pairing import (
    common_ending,
    image_folder,
    label_folder,
    labelled_cases,
    no_dataset,
    no_files_in,
)
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, understood

__all__ = [
    "Case",
    "Dataset",
    "dataset_from_json",
    "dataset_to_json",
    "find_cases",
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
    orientation : that dataset.json asks for, by the reader of nnU-Net that it names; None: the one of most cases.
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
    orientation: str | None = None
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
        raise no_dataset(root)
    return _plain(root, images, labels)


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
    label, geometry, _ = read_label(case.label, image.geometry)
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
        **({} if dataset.orientation is None else {"orientation": dataset.orientation}),
        **({"accept_geometry": True} if dataset.accept_geometry else {}),
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
        orientation=value.get("orientation"),
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
        raise UserError("is not a JSON object", table, 'It is {"channel_names": {...}, "labels": {...}}, or more.')
    channels = channels_of(told, table)
    labels = labels_of(told, table)
    ending = told.get("file_ending") or None
    if ending is not None and not isinstance(ending, str):
        raise UserError(f"file_ending is {ending!r}", table, 'Give, for example, ".nii.gz".')
    ending = ending and f".{ending.removeprefix('.')}"
    pairing: tuple[str, ...] = ()
    if isinstance(told.get("dataset"), dict):
        layout, cases = "explicit", _listed_v2(root, told["dataset"], table)
    elif isinstance(told.get("training"), list) and any(isinstance(entry, dict) for entry in told["training"]):
        layout, cases = _listed(root, told["training"], len(channels), table)
    else:
        layout = "nnunet_v2"
        cases, pairing = _scanned(root, len(channels), ending, table)
    label_map, remarks = mask_map(labels, cases)
    return Dataset(
        name=root.name,
        root=root,
        layout=layout,
        channels=channels,
        labels=labels,
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        label_map=label_map,
        orientation=orientation_of_reader(told.get("overwrite_image_reader_writer")),
        file_ending=ending or common_ending(cases),
        notes=(*pairing, *remarks),
    )


def orientation_of_reader(reader: Any) -> str | None:
    """The orientation that a reader of nnU-Net turns images to, by its name; None: it takes them as they are stored."""
    return "RAS" if reader in ("NibabelIOWithReorient", "SimpleITKIOWithReorient") else None


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


_LABELS_FORM = (
    'Labels are written as {"background": 0, "organ": 1, "tumour": 2, "ignore": 255}; a region is a list of values, '
    "and regions_class_order then has a value for each region."
)


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
        raise UserError(f"labels: {message}", table, _LABELS_FORM) from None
    except (TypeError, ValueError):
        raise UserError(f"labels {told['labels']} are not names with integers", table, _LABELS_FORM) from None


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
    listed = {root / str(entry.get("image")) for entry in entries if isinstance(entry, dict)}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise UserError(f'training[{number}] is not {{"image": ..., "label": ...}}', table)
        if not isinstance(entry.get("label") or "", str):
            raise UserError(f"training[{number}] has the label {entry['label']!r}, which is no file name", table)
        image = root / entry["image"]
        label = root / entry["label"] if entry.get("label") else None
        name, images = _channel_files(image, channels, listed)
        if images != (image,):
            layout = "nnunet_v1"
        cases.append(Case(name, images, label))
    return layout, cases


def _channel_files(image: Path, channels: int, listed: Collection[Path]) -> tuple[str, tuple[Path, ...]]:
    """The id and the files of a listed image: x, or x_0000, may mean x_0000, x_0001, ... that are not listed."""
    name, suffix = stem(image), ending_of(image)
    base, number = split_name(name)
    for case_id, possible in ((name, not image.is_file()), (base, number == 0 and channels > 1)):
        files = tuple(image.with_name(f"{case_id}_{i:04d}{suffix}") for i in range(channels))
        others = [path for path in files if path != image]
        if possible and any(path.is_file() for path in others) and not any(path in listed for path in others):
            return case_id, files
    return name, (image,)


def _scanned(root: Path, channels: int, ending: str | None, table: Path) -> tuple[list[Case], tuple[str, ...]]:
    """All images of imagesTr (or images), with the label map of the same name in labelsTr (or labels)."""
    images, labels = image_folder(root), label_folder(root)
    if images is None or labels is None:
        lacks = " and no ".join(
            name for name, folder in (("imagesTr/", images), ("labelsTr/", labels)) if folder is None
        )
        raise UserError(
            f"lists no files, and it has no {lacks} in its folder", table, "Add the folder, or list the files."
        )
    files = image_files(images, ending)
    if not files:
        raise no_files_in(images, "image", ending)
    return labelled_cases(files, channels, labels, ending)


# -------------------------------------------------------------------------------------------------------- plain folders


def _plain(root: Path, images: Path, labels: Path) -> Dataset:
    """No dataset.json: channels follow from the files, labels from the values in the label maps."""
    files = image_files(images)
    if not files:
        raise no_files_in(images, "image")
    cases, pairing = labelled_cases(files, None, labels, None)
    channels = max(len(case.images) for case in cases)
    readable, inside = _first_readable(cases)
    if channels > 1 or inside == 1:
        channel_names = tuple(f"channel_{i}" for i in range(channels))
    else:
        picture = inside == 3 and suffix_of(readable) in PICTURES
        channel_names = ("R", "G", "B") if picture else tuple(f"channel_{i}" for i in range(inside))
    paths = [case.label for case in cases if case.label and case.label.is_file()]
    found, label_map, remarks = labels_of_files(paths, labels)
    return Dataset(
        name=root.name,
        root=root,
        layout="plain",
        channels=channel_names,
        labels=found,
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        label_map=label_map,
        file_ending=common_ending(cases),
        notes=("no dataset.json: channels and labels were taken from the files", *pairing, *remarks),
    )


def _first_readable(cases: Iterable[Case]) -> tuple[Path, int]:
    """The first image that can be read, and its channels; check.py reports the others. The first of all, if none."""
    for path in (paths := [path for case in cases for path in case.images]):
        with suppress(UserError):
            return path, read_geometry(path)[1]
    return paths[0], 1
