"""Where the voxels of an image are in space, and how its axes are turned without loss.

An orientation is three letters, as in nibabel: "LAS" says that the axes x, y, z of an array (z, y, x) point to the
patient's left, anterior and superior side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

SPACING_TOLERANCE = ORIGIN_TOLERANCE = 1e-3  # mm
DIRECTION_TOLERANCE = 1e-4
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of an image lie.

    Parameters
    ----------
    shape : voxels (z, y, x); a picture has z = 1.
    spacing : mm (z, y, x). As in nnU-Net a 2D image's z spacing is 999 times its largest other, a picture's is 999.
    origin : of the first voxel, LPS mm (x, y, z), as in ITK.
    direction : nine direction cosines, row by row, LPS, as in ITK.
    dimensions : 2 for a picture or a two-dimensional NIfTI, whose arrays carry a leading axis of length 1; else 3.
    oriented : whether the direction is known. It is not for arrays from Python, nor for stacks of pictures.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = IDENTITY
    dimensions: int = 3
    oriented: bool = True

    @property
    def orientation(self) -> str | None:
        """Where the axes x, y, z point, such as "LAS"; of oblique axes the nearest; None where that is not known."""
        return _orientation(self.direction) if self.oriented and self.dimensions == 3 else None

    def turned(self, turn: Turn) -> Geometry:
        """The geometry of the same voxels after a turn of their array."""
        cosines = np.reshape(self.direction, (3, 3))[:, ::-1]  # columns z, y, x
        origin = np.array(self.origin, np.float64)
        columns = []
        for axis, is_reversed in zip(turn.order, turn.reversed, strict=True):
            column = cosines[:, axis]
            if is_reversed:
                origin += column * self.spacing[axis] * (self.shape[axis] - 1)
                column = -column
            columns.append(column)
        direction = tuple(np.stack(columns[::-1], axis=1).ravel().tolist())
        z, y, x = (self.shape[axis] for axis in turn.order)
        sz, sy, sx = (self.spacing[axis] for axis in turn.order)
        return replace(self, shape=(z, y, x), spacing=(sz, sy, sx), origin=tuple(origin.tolist()), direction=direction)

    def differences(self, other: Geometry) -> list[tuple[str, str, str]]:
        """What differs beyond tolerance (1e-3 mm, 1e-4 in direction), as (what, of self, of other)."""
        if self.shape != other.shape:
            return [("shape", str(self.shape), str(other.shape))]
        out = []
        for what, tolerance in (
            ("spacing", SPACING_TOLERANCE),
            ("origin", ORIGIN_TOLERANCE),
            ("direction", DIRECTION_TOLERANCE),
        ):
            mine, others = getattr(self, what), getattr(other, what)
            if max(abs(a - b) for a, b in zip(mine, others, strict=True)) > tolerance:
                out.append((what, _numbers(mine), _numbers(others)))
        return out


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"


@dataclass(frozen=True)
class Turn:
    """A change of the axes of an array that moves voxels and computes none: a transposition, then reversals.

    Parameters
    ----------
    order : the transposition applied to (z, y, x).
    reversed : which of the new axes run backwards.
    """

    order: tuple[int, int, int] = (0, 1, 2)
    reversed: tuple[bool, bool, bool] = (False, False, False)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """The view of an array (..., z, y, x) with its last three axes turned."""
        before = array.ndim - 3
        moved = array.transpose(*range(before), *(before + axis for axis in self.order))
        steps = (slice(None, None, -1 if is_reversed else None) for is_reversed in self.reversed)
        return moved[..., *steps]

    def then(self, order: Sequence[int]) -> Turn:
        """This turn followed by a transposition."""
        a, b, c = (self.order[axis] for axis in order)
        u, v, w = (self.reversed[axis] for axis in order)
        return Turn((a, b, c), (u, v, w))


def turn_between(source: str | None, target: str | None) -> Turn:
    """The turn of an array (z, y, x) from one orientation to another; none where one of the two is not known."""
    if source is None or target is None:
        return Turn()
    own, wanted = source[::-1], target[::-1]  # from (x, y, z) to (z, y, x)
    sides = [_SIDES[letter] for letter in own]
    order = [sides.index(_SIDES[letter]) for letter in wanted]
    a, b, c = order
    u, v, w = (own[axis] != letter for axis, letter in zip(order, wanted, strict=True))
    return Turn((a, b, c), (u, v, w))


def common_orientation(orientations: Iterable[str | None]) -> str | None:
    """The orientation that most cases have, the first of equally frequent ones; None where none is known."""
    known = Counter(orientation for orientation in orientations if orientation is not None)
    return known.most_common(1)[0][0] if known else None


_SIDES = {"L": "LR", "R": "LR", "A": "AP", "P": "AP", "S": "SI", "I": "SI"}


@lru_cache(maxsize=1024)
def _orientation(direction: tuple[float, ...]) -> str:
    from nibabel.orientations import aff2axcodes  # a tenth of a second

    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ np.reshape(direction, (3, 3))  # nibabel counts in RAS, ITK in LPS
    return "".join(aff2axcodes(affine))
