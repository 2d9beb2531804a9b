"""Where the voxels of an image are in space, and whether two images share a grid."""

from __future__ import annotations

from dataclasses import dataclass, field

TOLERANCE = 0.005  # of a voxel: how far the origin may be off, and how far a direction may move the last voxel
SPACING_TOLERANCE = 0.001  # of the voxel size
_ROUNDING = 1e-6  # of a coordinate, as float32 rounds it
_COSINE_ROUNDING = 1e-4  # what the quaternion of a NIfTI header loses
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
PICTURE_SPACING = (999.0, 1.0, 1.0)  # (z, y, x) where the file does not state one, as in nnU-Net
ACCEPTABLE = ("origin", "direction")  # differences that a user may accept, where the voxels do match


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of an image are.

    Parameters
    ----------
    shape : tuple of int
        Voxels (z, y, x); a picture has z = 1.
    spacing : tuple of float
        mm (z, y, x). As in nnU-Net a 2D image's z spacing is 999 times its largest other, a picture's is 999.
    origin : tuple of float
        Place of the first voxel, LPS mm (x, y, z), as in ITK.
    direction : tuple of float
        Nine direction cosines, row by row, LPS, as in ITK.
    dimensions : int
        2 for a picture or a two-dimensional NIfTI, whose arrays carry a leading axis of length 1; else 3.
    calibrated : bool
        Whether the file states the spacing. If not, the spacing is one per pixel, and says nothing in a comparison.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = IDENTITY
    dimensions: int = 3
    calibrated: bool = field(default=True, compare=False)

    def differences(self, other: Geometry) -> list[tuple[str, str, str]]:
        """List what differs beyond tolerance, as (what, of self, of other).

        The spacing may differ by 0.1 % of the voxel size, the origin by 0.5 % of it, and the direction by what moves
        the last voxel by 0.5 % of it. Of a two-dimensional image only the plane counts, and only the plane of an image
        (1, y, x) that it is compared with. Of an image whose file does not state a spacing only the shape counts.
        """
        flat = 2 in (self.dimensions, other.dimensions) and self.shape[0] == other.shape[0] == 1
        mine, others = self._described(flat), other._described(flat)
        if self.shape != other.shape:
            return [("shape", mine["shape"], others["shape"])]
        if not (self.calibrated and other.calibrated):
            return []
        sizes = list(zip(self.spacing, other.spacing, strict=True))[1 if flat else 0 :]
        voxel = min(min(pair) for pair in sizes)
        origins = list(zip(self.origin, other.origin, strict=True))[: 2 if flat else 3]
        cosines = list(zip(self.direction, other.direction, strict=True))
        cosines = [cosines[i] for i in (0, 1, 3, 4)] if flat else cosines
        turn = max(_COSINE_ROUNDING, TOLERANCE / max(self.shape))
        differs = {
            "spacing": any(abs(a - b) > SPACING_TOLERANCE * min(a, b) for a, b in sizes),
            "origin": any(abs(a - b) > TOLERANCE * voxel + _ROUNDING * abs(a) for a, b in origins),
            "direction": any(abs(a - b) > turn for a, b in cosines),
        }
        return [(what, mine[what], others[what]) for what, found in differs.items() if found]

    def describe(self) -> str:
        """Shape, spacing, origin and direction in one line, (z, y, x) and (x, y, z); of a 2D image only its plane."""
        return ", ".join(f"{what} {values}" for what, values in self._described(self.dimensions == 2).items())

    def _described(self, flat: bool) -> dict[str, str]:
        """The numbers as text; of a flat image those of its plane, since its z spacing is invented."""
        d = self.direction
        return {
            "shape": _numbers(self.shape[1:] if flat else self.shape),
            "spacing": _numbers(self.spacing[1:] if flat else self.spacing),
            "origin": _numbers(self.origin[:2] if flat else self.origin),
            "direction": _numbers((d[0], d[1], d[3], d[4]) if flat else d),
        }


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v + 0.0:.6g}" for v in values) + ")"
