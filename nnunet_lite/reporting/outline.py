"""The outline of a mask as an SVG path: along the edges of voxels, so that it shows exactly what is labelled."""

from __future__ import annotations

from collections import defaultdict

import numpy as np


def outline(mask: np.ndarray, step: tuple[int, int] = (1, 1)) -> str:
    """The closed outlines of a mask (y, x), in voxels; holes go the other way round (fill-rule evenodd).

    Parameters
    ----------
    step : size (y, x) of a pixel of the mask, where it is coarser than the picture it is drawn on.
    """
    padded = np.pad(mask.astype(np.int8), 1)
    across = _runs(np.diff(padded, axis=0)[:, 1:-1])  # (y, from x, to x) where the mask begins or ends going down
    along = _runs(np.diff(padded, axis=1)[1:-1].T)  # (x, from y, to y)
    # the mask lies to the right of where we go: top edges run right, left edges run up
    horizontal = [((y, a), (y, b)) if sign > 0 else ((y, b), (y, a)) for y, a, b, sign in across]
    vertical = defaultdict(list)
    for x, a, b, sign in along:
        start, end = ((b, x), (a, x)) if sign > 0 else ((a, x), (b, x))
        vertical[start].append(end)
    onwards = defaultdict(list)
    for start, end in horizontal:
        onwards[start].append(end)
    paths = []
    for first, _ in horizontal:
        if onwards[first]:
            paths.append(_walk(first, onwards, vertical, step))
    return "".join(paths)


def _walk(
    first: tuple[int, int],
    horizontal: dict[tuple[int, int], list[tuple[int, int]]],
    vertical: dict[tuple[int, int], list[tuple[int, int]]],
    step: tuple[int, int],
) -> str:
    """One closed outline, in turns to the side and up or down; its runs are taken out of the two tables."""
    parts, at = [f"M{first[1] * step[1]} {first[0] * step[0]}"], first
    while True:
        after = horizontal[at].pop()
        parts.append(f"h{(after[1] - at[1]) * step[1]}")
        at = vertical[after].pop()
        if at == first:  # z draws the last run
            return "".join([*parts, "z"])
        parts.append(f"v{(at[0] - after[0]) * step[0]}")


def _runs(edges: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Runs of equal nonzero numbers along the rows: (row, from, to, number)."""
    padded = np.pad(edges, ((0, 0), (1, 1)))
    changes = np.diff(padded, axis=1) != 0
    rows, starts = np.nonzero(changes)
    # changes of a row bound the runs in it, those of zeros included
    follow = rows[1:] == rows[:-1]
    rows, begins, ends = rows[:-1][follow], starts[:-1][follow], starts[1:][follow]
    signs = padded[rows, begins + 1]
    kept = signs != 0
    return list(zip(*(a[kept].tolist() for a in (rows, begins, ends, signs)), strict=True))
