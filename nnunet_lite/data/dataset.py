"""Datasets in every layout: MSD, nnU-Net v1 and v2, and plain folders of images and labels, as one `Dataset`.

A case lists the files that it should have. check.py reports which are missing or wrong.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from nnunet_lite.data.cases import Case, common_ending, labelled_cases, split_name
from nnunet_lite.data.geometry import ACCEPTABLE, Geometry
from nnunet_lite.data.images import Image, read_geometry, read_images, read_label
from nnunet_lite.data.labels import BACKGROUND, Labels
from nnunet_lite.data.names import PICTURES, TIFF, ending_of, stem, suffix_of
from nnunet_lite.data.tiff import ome_channels
from nnunet_lite.errors import UserError
from nnunet_lite.files import first_problem, read_json, understood, validated

MASK_NOTE = "label maps hold 0 and 255: 255 is read as 1, and predictions hold 1"
_LABELS_FORM = (
    'Write {"background": 0, "organ": 1, "ignore": 255}; of regions, a list of values and regions_class_order.'
)


@dataclass(frozen=True)
class Dataset:
    """A dataset as its folder describes it.

    Parameters
    ----------
    name : str
        Name of its folder.
    root : Path
        The folder.
    layout : str
        "msd", "nnunet_v1", "nnunet_v2", "explicit" (nnU-Net v2 with a list of files) or "plain".
    channels : tuple of str
        Names of the channels.
    labels : Labels
        Names and values.
    cases : tuple of Case
        Sorted by id. Their files are those they should have.
    value_map : dict of int to int or None
        Value in the files -> value of the dataset, {255: 1} for masks of 0 and 255; "label_map" in JSON.
    file_ending : str
        Of the images; of most if there are several.
    notes : tuple of str
        How the folder was understood.
    orientation : str or None
        The orientation that dataset.json requires by naming a reader of nnU-Net. None: that of most cases.
    accept : tuple of str
        Kinds of problems that the user accepts, see problems.py.
    excluded : tuple of Case
        Cases that the user left out; `cases` lacks them.
    """

    name: str
    root: Path
    layout: str
    channels: tuple[str, ...]
    labels: Labels
    cases: Annotated[tuple[Case, ...], Field(alias="dataset")]
    value_map: Annotated[dict[int, int] | None, Field(alias="label_map")] = None
    file_ending: str = ".nii.gz"
    notes: tuple[str, ...] = ()
    orientation: str | None = None
    accept: tuple[str, ...] = ()
    excluded: tuple[Case, ...] = ()

    @property
    def accept_geometry(self) -> bool:
        """Whether the files of a case may differ in origin or direction; which of them, the check has seen."""
        return not set(ACCEPTABLE).isdisjoint(self.accept)

    @property
    def description(self) -> Path:
        """The file that describes the dataset: dataset.json, or the folder itself in the plain layout."""
        return self.root if self.layout == "plain" else self.root / "dataset.json"


_DATASET = TypeAdapter(Dataset)


def read_dataset(root: Path) -> Dataset:
    """Read the description of a dataset from its folder.

    Parameters
    ----------
    root : Path
        The folder.

    Returns
    -------
    Dataset
        Channels, labels and cases.

    Raises
    ------
    UserError
        The folder has no known layout, or dataset.json is damaged (line and column) or incomplete.
    """
    root = Path(root).absolute()
    if ".." in root.parts:
        root = root.resolve()  # the folder's name is that of the dataset
    if not root.is_dir():
        raise UserError("there is no such folder", root)
    if (root / "dataset.json").is_file():
        return _described(root, root / "dataset.json")
    return _plain(root)


def read_case(case: Case, dataset: Dataset) -> tuple[Image, np.ndarray]:
    """Read the image and the label map of a case.

    Parameters
    ----------
    case : Case
        A case with a reference, as every one of a planned dataset.
    dataset : Dataset
        Its dataset.

    Returns
    -------
    image : Image
        With all channels.
    label : ndarray of int, shape (z, y, x)
        Values of the dataset.

    Raises
    ------
    UserError
        A file cannot be read, channels are missing, or the shapes of image and label map differ.
    """
    image = read_images(case.images, len(dataset.channels), dataset.accept_geometry)
    if image.array.shape[0] != len(dataset.channels):
        raise UserError(f"has {image.array.shape[0]} channels, {len(dataset.channels)} are expected", case.images[0])
    label, geometry = read_annotation(case, dataset, image.geometry)
    if geometry.shape != image.geometry.shape:
        raise UserError(f"has shape {geometry.shape}, its image {image.geometry.shape}", case.label)
    return image, label


def read_annotation(case: Case, dataset: Dataset, grid: Geometry | None = None) -> tuple[np.ndarray, Geometry]:
    """Read the reference of a case, and its geometry.

    Parameters
    ----------
    case : Case
        A case with a reference, as every one of a planned dataset.
    dataset : Dataset
        Its dataset.
    grid : Geometry, optional
        The one of its image or prediction, to which the reference is aligned.

    Returns
    -------
    label : ndarray of int, shape (z, y, x)
        Values of the dataset.
    geometry : Geometry
        Of the file.

    Raises
    ------
    UserError
        The file cannot be read.
    """
    assert case.label is not None
    label, geometry, _ = read_label(case.label, grid)
    return map_labels(label, dataset.value_map), geometry


def map_labels(label: np.ndarray, value_map: Mapping[int, int] | None) -> np.ndarray:
    """Convert values of a file to values of the dataset.

    Parameters
    ----------
    label : ndarray of int
        A label map.
    value_map : dict of int to int or None
        Value in the file -> value of the dataset.

    Returns
    -------
    ndarray
        Of the same type.
    """
    for raw, value in (value_map or {}).items():
        label = np.where(label == raw, np.asarray(value, label.dtype), label)
    return label


# ------------------------------------------------------------------------------------------ dataset.json of a workspace


def dataset_to_json(dataset: Dataset) -> dict[str, Any]:
    """Return the content of a workspace's dataset.json, with absolute paths.

    Parameters
    ----------
    dataset : Dataset
        The dataset.

    Returns
    -------
    dict
        With the keys of nnU-Net's dataset.json, and others.
    """
    value: dict[str, Any] = _DATASET.dump_python(dataset, mode="json", by_alias=True)
    del value["channels"]
    for key in ("orientation", "accept", "excluded"):
        if not value[key]:
            del value[key]
    return value | summarize_dataset(dataset)


def summarize_dataset(dataset: Dataset) -> dict[str, Any]:
    """Return the part of dataset.json that may travel with a model: no paths, no case ids.

    Parameters
    ----------
    dataset : Dataset
        The dataset.

    Returns
    -------
    dict
        With keys of nnU-Net's dataset.json only.
    """
    order = dataset.labels.region_order
    return {
        "name": dataset.name,
        "channel_names": {str(i): name for i, name in enumerate(dataset.channels)},
        "labels": dataset.labels.to_json(),
        **({"regions_class_order": list(order)} if order else {}),
        "file_ending": dataset.file_ending,
        "numTraining": len(dataset.cases),
    }


def dataset_from_json(value: dict[str, Any]) -> Dataset:
    """Return the dataset in the content of a workspace's dataset.json.

    Parameters
    ----------
    value : dict
        As `dataset_to_json` returns it.

    Returns
    -------
    Dataset
        The dataset.
    """
    labels = Labels.from_json(value["labels"], value.get("regions_class_order"))
    channels = list(value["channel_names"].values())
    before = {"accept": ACCEPTABLE} if value.get("accept_geometry") else {}  # as files of version 0.1 say it
    return _DATASET.validate_python({**before, **value, "channels": channels, "labels": labels})


def stored_dataset(file: Path) -> Dataset:
    """Read the dataset.json of a workspace.

    Parameters
    ----------
    file : Path
        The file.

    Returns
    -------
    Dataset
        The dataset.

    Raises
    ------
    UserError
        The file is missing, or is not as `dataset_to_json` writes it.
    """
    with understood(file, "Run `nnlite plan` again."):
        return dataset_from_json(read_json(file))


# ----------------------------------------------------------------------------------------------- dataset.json of a user


def _described(root: Path, table: Path) -> Dataset:
    """Return a dataset with a dataset.json."""
    content = read_json(table)
    if not isinstance(content, dict):
        raise UserError("is not a JSON object", table, 'It is {"channel_names": {...}, "labels": {...}}, or more.')
    channels = channels_of(content, table)
    labels = labels_of(content, table)
    ending = content.get("file_ending") or None
    if ending is not None and not isinstance(ending, str):
        raise UserError(f"file_ending is {ending!r}", table, 'Give, for example, ".nii.gz".')
    ending = ending and f".{ending.removeprefix('.')}"
    pairing: tuple[str, ...] = ()
    training = content.get("training")
    if isinstance(content.get("dataset"), dict):
        layout, cases = "explicit", _explicit_cases(root, content["dataset"], len(channels), table)
    elif isinstance(training, list) and any(isinstance(entry, dict) for entry in training):
        layout, cases = _training_cases(root, training, len(channels), table)
    else:
        layout = "nnunet_v2"
        cases, pairing = labelled_cases(root, len(channels), ending)
    value_map = _mask_map(labels, cases)
    return Dataset(
        name=root.name,
        root=root,
        layout=layout,
        channels=channels,
        labels=labels,
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        value_map=value_map,
        orientation=orientation_of_reader(content.get("overwrite_image_reader_writer")),
        file_ending=ending or common_ending(cases),
        notes=(*pairing, *([MASK_NOTE] if value_map else [])),
    )


def orientation_of_reader(reader: Any) -> str | None:
    """Return the orientation to which a reader of nnU-Net turns images.

    Parameters
    ----------
    reader : object
        Its name in a dataset.json or plans.json.

    Returns
    -------
    str or None
        None for a reader that takes images as they are stored.
    """
    return "RAS" if reader in ("NibabelIOWithReorient", "SimpleITKIOWithReorient") else None


def channels_of(content: Mapping[str, Any], table: Path | None) -> tuple[str, ...]:
    """Return the names of the channels in a dataset.json, by number.

    Parameters
    ----------
    content : dict
        With `channel_names` (nnU-Net v2) or `modality` (MSD, nnU-Net v1).
    table : Path or None
        The file, for messages.

    Returns
    -------
    tuple of str
        The names.

    Raises
    ------
    UserError
        They are missing or malformed.
    """
    if not isinstance(content, Mapping):
        raise UserError("is not a JSON object", table)
    names = content.get("channel_names", content.get("modality"))
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise UserError("has no channel_names", table, 'Add, for example, "channel_names": {"0": "CT"}.')
    numbers = {str(key): str(name) for key, name in names.items()}
    if set(numbers) != {str(i) for i in range(len(numbers))}:
        raise UserError(f"channel_names has the keys {list(numbers)}", table, 'Number the channels "0", "1", ...')
    return tuple(numbers[str(i)] for i in range(len(numbers)))


def labels_of(content: Mapping[str, Any], table: Path | None) -> Labels:
    """Return the labels in a dataset.json.

    Parameters
    ----------
    content : dict
        With `labels`, and `regions_class_order` if there are regions.
    table : Path or None
        The file, for messages.

    Returns
    -------
    Labels
        The labels.

    Raises
    ------
    UserError
        They are missing or malformed.
    """
    if not isinstance(content.get("labels"), dict):
        raise UserError("has no labels", table, 'Add, for example, "labels": {"background": 0, "tumour": 1}.')
    try:
        return Labels.from_json(content["labels"], content.get("regions_class_order"))
    except (TypeError, ValueError) as error:  # pydantic's is a ValueError
        wrong = f" {content['labels']} are not names with integers"
        what = f": {first_problem(error)}" if isinstance(error, ValidationError) else wrong
        raise UserError(f"labels{what}", table, _LABELS_FORM) from None


def _explicit_cases(root: Path, entries: dict[str, Any], channels: int, table: Path) -> list[Case]:
    """Return the cases of nnU-Net v2's list: id -> {"images": [one per channel], "label": file}.

    Paths are relative to the dataset, and may begin with environment variables, as $DATA/a.nii.gz.
    """
    cases = []
    for name, entry in entries.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        files: list[Any] = [entry.get("label") or "", *images] if isinstance(images, list) and images else [None]
        if not all(isinstance(file, str) for file in files):
            raise UserError(f'dataset.{name} is not {{"images": [file, ...], "label": file}}, but {entry}', table)
        if "/" in name:
            raise UserError(f"the id {name!r} holds a /, and cases give files their names", table, "Write _ instead.")
        label, *images = [os.path.expandvars(file) for file in files]
        cases.append(Case(name, tuple(root / file for file in images), root / label if label else None))
    listed = {path for case in cases for path in case.images}
    for i, case in enumerate(cases):
        if len(case.images) == 1:  # x_0000 alone: its other channels are x_0001, ...
            cases[i] = replace(case, images=_channel_files(case.images[0], channels, listed)[1])
    return cases


def _training_cases(root: Path, entries: list[Any], channels: int, table: Path) -> tuple[str, list[Case]]:
    """Return the layout and the cases of MSD's list of image and label.

    nnU-Net v1 has the same list, but names its files image_0000, image_0001, ...
    """
    cases, layout = [], "msd"
    for number, entry in enumerate(entries):
        label = (entry.get("label") or "") if isinstance(entry, dict) else None
        if not isinstance(label, str) or not isinstance(entry.get("image"), str):
            raise UserError(f'training[{number}] is not {{"image": file, "label": file}}, but {entry}', table)
    listed = {root / entry["image"] for entry in entries}
    for entry in entries:
        image, label = root / entry["image"], entry.get("label")
        name, images = _channel_files(image, channels, listed)
        layout = layout if images == (image,) else "nnunet_v1"
        cases.append(Case(name, images, root / label if label else None))
    return layout, cases


def _channel_files(image: Path, channels: int, listed: Collection[Path]) -> tuple[str, tuple[Path, ...]]:
    """Return id and files of a listed image: x, or x_0000, may mean x_0000, x_0001, ... if those are not listed."""
    name, suffix = stem(image), ending_of(image)
    base, number = split_name(name)
    for case_id, possible in ((name, not image.is_file()), (base, number == 0 and channels > 1)):
        files = tuple(image.with_name(f"{case_id}_{i:04d}{suffix}") for i in range(channels))
        others = [path for path in files if path != image]
        if possible and any(path.is_file() for path in others) and not any(path in listed for path in others):
            return case_id, files
    return name, (image,)


def _mask_map(labels: Labels, cases: Sequence[Case]) -> dict[int, int] | None:
    """Return the `value_map` of a dataset with the values 0 and 1 if its files hold 0 and 255.

    This reads three files; if they contain only background, it reads others until one does not. The check reads all.
    """
    if labels.values != (0, 1) or labels.ignore is not None:
        return None
    paths = [case.label for case in cases if case.label and case.label.is_file()]
    found = set().union(*_values_in([paths[i] for i in sorted({0, len(paths) // 2, len(paths) - 1}) if paths]))
    if found == {0}:
        found = next((values for path in paths for values in _values_in([path]) if values - {0}), found)
    return {255: 1} if found - {0} == {255} else None


def _values_in(paths: Sequence[Path]) -> list[set[int]]:
    """Return the values in each label map. Files that cannot be read are left out: the check reports them."""

    def values(path: Path) -> set[int] | None:
        try:
            return {int(value) for value in np.unique(read_label(path)[0])}
        except UserError:
            return None

    with ThreadPoolExecutor(4) as pool:
        return [found for found in pool.map(values, paths) if found is not None]


# -------------------------------------------------------------------------------------------------------- plain folders


def _plain(root: Path) -> Dataset:
    """Return a dataset without dataset.json: channels follow from the files, labels from values in the label maps."""
    cases, pairing = labelled_cases(root)
    channels = max(len(case.images) for case in cases)
    names = name_channels(cases, [f"channel_{i}" for i in range(channels)])
    labels, value_map = labels_in([case.label for case in cases if case.label and case.label.is_file()])
    pairing += (MASK_NOTE,) if value_map else ()
    return Dataset(
        name=root.name,
        root=root,
        layout="plain",
        channels=names,
        labels=labels,
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        value_map=value_map,
        file_ending=common_ending(cases),
        notes=("no dataset.json: channels and labels were taken from the files", *pairing),
    )


def name_channels(cases: Iterable[Case], names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the channels of images whose files may have several.

    Parameters
    ----------
    cases : iterable of Case
        Cases of a dataset.
    names : sequence of str
        A name for each file of a case.

    Returns
    -------
    tuple of str
        These names, numbered if the files have several channels; those of an OME-TIFF; R, G, B for a colour picture.
    """
    readable, inside = _first_readable(cases)
    if inside == 1 or len(names) > 1:
        return tuple(names)
    if suffix_of(readable) in TIFF and len(own := ome_channels(readable)) == inside:
        return own
    if inside == 3 and suffix_of(readable) in PICTURES:
        return ("R", "G", "B")
    return tuple(f"{names[0].removesuffix('_0')}_{i}" for i in range(inside))


def _first_readable(cases: Iterable[Case]) -> tuple[Path, int]:
    """Return the first image that can be read and its channels; if none can, the first image."""
    paths = [path for case in cases for path in case.images]
    for path in paths:
        with suppress(UserError):
            return path, read_geometry(path)[1]
    return paths[0], 1


def labels_in(paths: Sequence[Path]) -> tuple[Labels, dict[int, int] | None]:
    """Return a label for each value in label maps, label_1 for 1.

    Parameters
    ----------
    paths : sequence of Path
        The label maps. Those that cannot be read are left out, since the check reports them.

    Returns
    -------
    labels : Labels
        The labels.
    value_map : dict of int to int or None
        As in `Dataset`.

    Raises
    ------
    UserError
        They hold nothing but zeros, or values that are no labels.
    """
    found = _values_in(paths)
    values = set().union(*found) - {0}
    fix = "Label maps hold 0 for the background and 1, 2, ... for the labels."
    if not values and len(found) == len(paths):  # otherwise the check reports those that cannot be read
        raise UserError("holds no label map with anything but zeros", paths[0].parent, fix)
    value_map = {255: 1} if values == {255} else None
    names = {f"label_{value}": value for value in (sorted(values) if values and not value_map else [1])}
    with validated(paths[0].parent, fix=fix):
        return Labels(names={BACKGROUND: 0, **names}), value_map
