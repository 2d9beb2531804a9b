"""The labels of a dataset: values in files, classes of the training, channels of the network, and their conversion.

*Values* are the integers in the user's files, any integers (0, 1, 4). *Classes* are dense indices 0..n-1 into the
sorted values, background first: preprocessed cases store them, and networks are trained on them. *Channels* are the
outputs of the network: one per class, or one per region if labels are overlapping sets of values.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, model_validator

from nnunet_lite.errors import UserError

BACKGROUND = "background"
IGNORE = "ignore"
Colour = tuple[int, int, int]
# unlike those of labels
MISSED: Colour = (220, 0, 160)  # magenta, false negatives
ADDED: Colour = (0, 150, 40)  # green, false positives
CONFUSED: Colour = (255, 255, 0)  # yellow, foreground that was given another label
# those of the pictures in report.css: distinct from each other and from the greys of an image
_COLOURS: tuple[Colour, ...] = (
    (86, 180, 233), (255, 157, 77), (52, 211, 162), (255, 143, 207), (240, 228, 66),
    (143, 208, 255), (182, 155, 240), (214, 161, 150), (180, 224, 90), (229, 231, 235),
)  # fmt: skip
_PALETTE = "palette picture read as the numbers of its colours"
_SEGMENTS = "segments of 3D Slicer"
_PIECE = 1 << 20  # voxels
_WIDEST = 1 << 20  # encoding uses a table of all values from the lowest to the highest


def smallest_dtype(low: int, high: int) -> np.dtype[Any]:
    """Return the smallest integer type for a range of values, unsigned if possible.

    Parameters
    ----------
    low, high : int
        The lowest and the highest value.

    Returns
    -------
    dtype
        Such as that of numpy.uint8.
    """
    return np.min_scalar_type(min(low, -high - 1) if low < 0 else high)


def palette_note(colours: np.ndarray) -> str:
    """Describe a label map that is a palette picture: files whose palettes differ may mean other things by a number.

    Parameters
    ----------
    colours : ndarray of int, shape (numbers, 3)
        Red, green and blue of each number, 0 to 255.
    """
    first = ", ".join(f"{i} is #{red:02x}{green:02x}{blue:02x}" for i, (red, green, blue) in enumerate(colours[:3]))
    return f"{_PALETTE}: {first}"


def segments_note(names: Mapping[int, str]) -> str:
    """Describe the numbers of a segmentation of 3D Slicer, which numbers each file by itself.

    Parameters
    ----------
    names : dict of int to str
        The name of each number.
    """
    return f"{_SEGMENTS}: " + ", ".join(f"{number} is {name.replace(',', ' ')}" for number, name in names.items())


def number_meanings(note: str) -> list[tuple[int, str]]:
    """Return the numbers and colours of a `palette_note`, or numbers and names of a `segments_note`; else none."""
    found = re.findall(r"(\d+) is ([^,]+)", note) if note.startswith((_PALETTE, _SEGMENTS)) else []
    return [(int(number), meaning) for number, meaning in found]


def contradiction(note: str, labels: Labels) -> str | None:
    """Say which number of a `segments_note` has the name of a label with another number; None if there is none."""
    values = {name.lower(): of_label for name, of_label in labels.segments.items()}
    for number, name in number_meanings(note):
        if number not in values.get(name.lower(), (number,)):
            return f"the number {number} is {name}, which is {values[name.lower()][0]} in the labels"
    return None


def label_colours(n: int) -> list[Colour]:
    """Return the colours of labels; after the first ones, hues by the golden ratio.

    Parameters
    ----------
    n : int
        Number of labels.
    """
    more = (colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.55 + 0.15 * (i % 3), 0.95) for i in range(n))
    return [*_COLOURS, *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in more)][:n]


class Labels(BaseModel, frozen=True, extra="forbid"):
    """The labels of a dataset. The background is the label of that name, otherwise the value 0, which is added."""

    names: dict[str, int | tuple[int, ...]] = Field(description="value of each label, or values of each region")
    ignore: int | None = Field(None, description="value of voxels that are not annotated, which the loss ignores")
    region_order: tuple[int, ...] | None = Field(
        None, description="regions: the value that is written for each, in the order of writing (later ones overwrite)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Labels:
        for name, value in self.names.items():
            members = _members(value)
            if name.lower() == IGNORE or (name.lower() == BACKGROUND and len(members) != 1):
                raise ValueError(f"{name} must be a single value, not {list(members)}")
            if not members:
                raise ValueError(f"region {name} has no value")
            if self.ignore in members:
                raise ValueError(f"ignore and {name} share the value {self.ignore}")
            if len(members) > 1 and self.background in members:
                raise ValueError(f"region {name} contains the background's value {self.background}")
        if self.ignore == self.background:
            raise ValueError(f"ignore and the background share the value {self.ignore}")
        if not self.region_names:
            raise ValueError("there is no foreground label")
        if self.has_regions and (self.region_order is None or len(self.region_order) != len(self.region_names)):
            n = len(self.region_names)
            raise ValueError(f"regions_class_order must give one value for each of the {n} regions")
        singles = [v for v in self.names.values() if isinstance(v, int)]
        if len(set(singles)) != len(singles):
            raise ValueError("two labels share one value")
        low, high = min(self._known), max(self._known)
        if high - low > _WIDEST:
            raise ValueError(f"label values {low} and {high} are more than {_WIDEST} apart; renumber them")
        return self

    def __eq__(self, other: object) -> bool:
        """Whether names and meaning are equal: the order of regions counts, which that of a dict does not."""
        return super().__eq__(other) and isinstance(other, Labels) and self.meaning == other.meaning

    @cached_property
    def background(self) -> int:
        """The value of the background."""
        value = next((v for k, v in self.names.items() if k.lower() == BACKGROUND), 0)
        return _members(value)[0]

    @cached_property
    def values(self) -> tuple[int, ...]:
        """The value of each class: the background, then the others in ascending order; without the ignore value."""
        found = {member for value in self.names.values() for member in _members(value)}
        return (self.background, *sorted(found - {self.background}))

    @cached_property
    def _known(self) -> tuple[int, ...]:
        """The value of each class, then the ignore value if there is one."""
        return self.values if self.ignore is None else (*self.values, self.ignore)

    @property
    def has_regions(self) -> bool:
        """Whether a label is a set of values."""
        return any(not isinstance(self.names[name], int) for name in self.region_names)

    @cached_property
    def region_names(self) -> tuple[str, ...]:
        """Names of all labels that are scored: the foreground classes in the order of their values, or the regions."""
        foreground = {k: v for k, v in self.names.items() if _members(v) != (self.background,)}
        if any(not isinstance(v, int) for v in foreground.values()):
            return tuple(foreground)
        return tuple(sorted(foreground, key=lambda k: _members(foreground[k])))

    @cached_property
    def region_values(self) -> tuple[tuple[int, ...], ...]:
        """The values of each of `region_names`."""
        return tuple(_members(self.names[name]) for name in self.region_names)

    @property
    def regions(self) -> dict[str, tuple[int, ...]]:
        """Each of `region_names` with its values."""
        return dict(zip(self.region_names, self.region_values, strict=True))

    def count_voxels(self, label_map: np.ndarray) -> dict[str, int]:
        """Count the voxels of each of `region_names` in an array of values."""
        values, counts = np.unique(label_map, return_counts=True)
        return {name: int(counts[np.isin(values, of)].sum()) for name, of in self.regions.items()}

    @cached_property
    def segments(self) -> dict[str, tuple[int, ...]]:
        """For each of `region_names`, the values in a predicted label map that it covers; regions may overlap."""
        written = self.region_order if self.has_regions and self.region_order else [v[0] for v in self.region_values]
        each = zip(self.regions.items(), written, strict=True)
        return {name: values if value in values else (value,) for (name, values), value in each}

    @property
    def n_classes(self) -> int:
        """Number of classes, with the background and without the ignore value."""
        return len(self.values)

    @property
    def n_channels(self) -> int:
        """Number of network output channels: regions (sigmoid), or classes with the background (softmax)."""
        return len(self.region_names) if self.has_regions else self.n_classes

    @property
    def ignore_class(self) -> int | None:
        """The class index under which ignored voxels are stored: one past the last class."""
        return None if self.ignore is None else self.n_classes

    @property
    def outside_class(self) -> int:
        """The class index under which voxels outside the nonzero mask are stored: one past all others."""
        return self.n_classes + (self.ignore is not None)

    @cached_property
    def region_classes(self) -> tuple[tuple[int, ...], ...]:
        """The class indices of each of `region_names`."""
        index = {value: i for i, value in enumerate(self.values)}
        return tuple(tuple(index[v] for v in members) for members in self.region_values)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class: its label, or the regions that contain it; the background's comes first."""
        regions, values = self.regions.items(), self.values[1:]
        named = (" + ".join(name for name, members in regions if value in members) for value in values)
        return (BACKGROUND, *named)

    @property
    def meaning(self) -> dict[str, Any]:
        """All but the names, on which neither arrays nor networks depend: equal for labels that were only renamed."""
        members = {"values": self.values, "regions": self.region_values, "order": self.region_order}
        return {**members, "ignore": self.ignore, "has_regions": self.has_regions}

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Convert values to classes.

        Parameters
        ----------
        array : ndarray of int
            Values of the dataset, of any shape.

        Returns
        -------
        ndarray
            Class indices of the same shape, in the smallest unsigned type.

        Raises
        ------
        UserError
            A value is not a label of this dataset.
        """
        known = self._known
        first, last = min(known), max(known)
        low, high = (int(array.min()), int(array.max())) if array.size else (first, last)
        if low < first or high > last:
            raise UserError(f"label values {low}..{high} are not all among {sorted(known)}")
        none = len(known)
        table = np.full(last - first + 1, none, smallest_dtype(0, none))
        table[np.asarray(known) - first] = np.arange(len(known))
        classes = _look_up(table, array, first)
        if classes.max(initial=0) == none:
            unknown = sorted({int(v) for v in np.unique(array[classes == none])})
            raise UserError(f"label values {unknown} are not among {sorted(known)}")
        return classes

    def decode(self, classes: np.ndarray) -> np.ndarray:
        """Convert classes to values.

        Parameters
        ----------
        classes : ndarray of int
            Class indices, of any shape.

        Returns
        -------
        ndarray
            Values of the same shape, in the smallest integer type for all values of the dataset.
        """
        written = (*self._known, *(self.region_order or ()))
        return _look_up(np.asarray(self._known, smallest_dtype(min(written), max(written))), classes)

    @classmethod
    def from_json(cls, labels: dict[str, Any], region_order: list[int] | None = None) -> Labels:
        """Read the labels of a dataset.json.

        Parameters
        ----------
        labels : dict
            Name -> value (nnU-Net v2), or value -> name (MSD, nnU-Net v1).
        region_order : list of int or None
            Its `regions_class_order`.

        Returns
        -------
        Labels
            The labels.

        Raises
        ------
        ValueError
            They are not names with integers, or not consistent.
        """
        names: dict[str, int | tuple[int, ...]] = {}
        ignore = None
        if labels and all(k.lstrip("-").isdigit() for k in labels) and all(isinstance(v, str) for v in labels.values()):
            labels = {name: int(value) for value, name in labels.items()}
        for name, value in labels.items():
            names[name] = tuple(map(_integer, value)) if isinstance(value, list | tuple) else _integer(value)
            if name.lower() == IGNORE and len(_members(names[name])) == 1:
                (ignore,) = _members(names.pop(name))
        if all(len(_members(value)) == 1 for value in names.values()):  # [1] for each label: no region, as in nnU-Net
            names = {name: _members(value)[0] for name, value in names.items()}
        return cls(names=names, ignore=ignore, region_order=None if region_order is None else tuple(region_order))

    def to_json(self) -> dict[str, Any]:
        """Return the `labels` of an nnU-Net v2 dataset.json, name -> value or values."""
        out: dict[str, Any] = {k: v if isinstance(v, int) else list(v) for k, v in self.names.items()}
        return out if self.ignore is None else {**out, IGNORE: self.ignore}


def _integer(value: Any) -> int:
    """Return a value of a dataset.json, which may be written as "1" or 1.0; ValueError for 1.5."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is no integer")
    return int(value)


def _members(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else value


def _look_up(table: np.ndarray, index: np.ndarray, first: int = 0) -> np.ndarray:
    """Return table[index - first], piece by piece: numpy converts an index to eight bytes per voxel."""
    out = np.empty(index.shape, table.dtype)
    flat, flat_out = index.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        piece = slice(start, start + _PIECE)
        flat_out[piece] = table[flat[piece].astype(np.intp) - first]
    return out
