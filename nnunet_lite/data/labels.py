"""What the values of a label map mean, and how they become network channels and back.

Three kinds of numbers are kept apart here. *Values* are what the user's files hold, any integers (0, 1, 4). *Classes*
are dense indices 0..n-1 into the sorted values, background first: what is stored and trained on. *Channels* are what
the network puts out: one per class, or one per region where labels are overlapping sets of values.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from nnunet_lite.errors import UserError

BACKGROUND = "background"
IGNORE = "ignore"
_PIECE = 1 << 20
_WIDEST = 1 << 20  # encoding looks classes up in a table of all values from the lowest to the highest


def smallest_dtype(low: int, high: int) -> type[np.integer]:
    """The smallest integer type that holds low..high, unsigned where it can be."""
    kinds = (np.uint8, np.uint16, np.uint32) if low >= 0 else (np.int8, np.int16, np.int32)
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return kind
    return np.int64


class Labels(BaseModel):
    """The labels of a data set.

    Parameters
    ----------
    names : name -> value, or name -> values for a region. The background is the label called "background", else the
        value 0, which is added where it is missing.
    ignore : the value whose voxels are not annotated, never in the loss; None where there is none.
    region_order : for regions, the value written for each region, in the order of writing (later ones overwrite).

    Raises
    ------
    ValueError : there is no foreground, a value would mean two things, or the values are too far apart to look up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: dict[str, int | tuple[int, ...]]
    ignore: int | None = None
    region_order: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Labels:
        for name, value in self.names.items():
            self._refuse_overlap(name, _members(value))
        if self.ignore == self.background:
            raise ValueError(f"ignore and the background share the value {self.ignore}")
        if not self.region_names:
            raise ValueError("there is no foreground label")
        if self.has_regions and (self.region_order is None or len(self.region_order) != len(self.region_names)):
            raise ValueError(
                f"regions_class_order must give one value for each of the {len(self.region_names)} regions"
            )
        singles = [v for v in self.names.values() if isinstance(v, int)]
        if len(set(singles)) != len(singles):
            raise ValueError("two labels share one value")
        if max(self._known) - min(self._known) > _WIDEST:
            raise ValueError(
                f"label values {min(self._known)} and {max(self._known)} are more than {_WIDEST} apart; renumber them"
            )
        return self

    def _refuse_overlap(self, name: str, members: tuple[int, ...]) -> None:
        """Refuse a label with a value that belongs to the background or to ignore."""
        if name.lower() == IGNORE or (name.lower() == BACKGROUND and len(members) != 1):
            raise ValueError(f"{name} must be a single value, not {list(members)}")
        if not members:
            raise ValueError(f"region {name} has no value")
        if self.ignore in members:
            raise ValueError(f"ignore and {name} share the value {self.ignore}")
        if len(members) > 1 and self.background in members:
            raise ValueError(f"region {name} contains the background's value {self.background}")

    @cached_property
    def background(self) -> int:
        """The value of the background."""
        value = next((v for k, v in self.names.items() if k.lower() == BACKGROUND), 0)
        return _members(value)[0]

    @cached_property
    def values(self) -> tuple[int, ...]:
        """The value of each class: the background, then the others in ascending order, without the ignore value."""
        found = {member for value in self.names.values() for member in _members(value)}
        return (self.background, *sorted(found - {self.background}))

    @cached_property
    def _known(self) -> tuple[int, ...]:
        """The value of each class, then the ignore value if there is one."""
        return self.values if self.ignore is None else (*self.values, self.ignore)

    @property
    def has_regions(self) -> bool:
        return any(not isinstance(self.names[name], int) for name in self.region_names)

    @cached_property
    def region_names(self) -> tuple[str, ...]:
        """Names of everything that is scored: the foreground classes in the order of their values, or the regions."""
        foreground = {k: v for k, v in self.names.items() if _members(v) != (self.background,)}
        if any(not isinstance(v, int) for v in foreground.values()):
            return tuple(foreground)
        return tuple(sorted(foreground, key=lambda k: _members(foreground[k])))

    @cached_property
    def region_values(self) -> tuple[tuple[int, ...], ...]:
        """The values that make up each of `region_names`."""
        return tuple(_members(self.names[name]) for name in self.region_names)

    @property
    def n_classes(self) -> int:
        """Number of classes, background included, ignore not."""
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
        """The class indices that make up each of `region_names`."""
        index = {value: i for i, value in enumerate(self.values)}
        return tuple(tuple(index[v] for v in members) for members in self.region_values)

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Values -> classes (any shape; smallest unsigned type).

        Raises
        ------
        UserError : the array holds a value that is no label of this data set.
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
        """Classes -> values (any shape; the smallest integer type that holds every value of the data set)."""
        written = (*self._known, *(self.region_order or ()))
        return _look_up(np.asarray(self._known, smallest_dtype(min(written), max(written))), classes)

    @classmethod
    def from_json(cls, labels: dict[str, Any], region_order: list[int] | None = None) -> Labels:
        """From the `labels` of a dataset.json: name -> value (nnU-Net v2), or value -> name (MSD, nnU-Net v1)."""
        names: dict[str, int | tuple[int, ...]] = {}
        ignore = None
        if labels and all(k.lstrip("-").isdigit() for k in labels) and all(isinstance(v, str) for v in labels.values()):
            labels = {name: int(value) for value, name in labels.items()}
        for name, value in labels.items():
            if name.lower() == IGNORE and isinstance(value, int):
                ignore = value
            else:
                names[name] = tuple(map(_integer, value)) if isinstance(value, list | tuple) else _integer(value)
        if all(len(_members(value)) == 1 for value in names.values()):  # [1] for each label: no region, as in nnU-Net
            names = {name: _members(value)[0] for name, value in names.items()}
        return cls(names=names, ignore=ignore, region_order=None if region_order is None else tuple(region_order))

    def to_json(self) -> dict[str, Any]:
        """The `labels` of an nnU-Net v2 dataset.json."""
        out: dict[str, Any] = {k: v if isinstance(v, int) else list(v) for k, v in self.names.items()}
        return out if self.ignore is None else {**out, IGNORE: self.ignore}


def _integer(value: Any) -> int:
    """A value of a dataset.json, some of which are written as "1" or 1.0; ValueError for 1.5."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is no integer")
    return int(value)


def _members(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else value


def _look_up(table: np.ndarray, index: np.ndarray, first: int = 0) -> np.ndarray:
    """table[index - first] in pieces: numpy turns an index into eight bytes per voxel, too much for a large image."""
    out = np.empty(index.shape, table.dtype)
    flat, flat_out = index.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        piece = slice(start, start + _PIECE)
        flat_out[piece] = table[flat[piece].astype(np.intp) - first]
    return out
