"""Where the voxels of an image lie in space."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = IDENTITY
    dimensions: int = 3

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
