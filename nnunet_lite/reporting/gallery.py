"""Which cases are shown and how finely, so that the page stays small and is made in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from nnunet_lite import system
from nnunet_lite.data.dataset import Case
from nnunet_lite.reporting.collect import Material
from nnunet_lite.reporting.pictures import MOST_CHANNELS, Detail, Seen, Wanted, is_colour, look

TILES = 24  # cases in the montage
PICTURE_BYTES = 9_000_000  # of all overlays, in the page
MOST_VOXELS = 2.5e9  # of all images that are read, the montage's share of which is a third; some 20 s on two cores
LABEL_VOXELS = 4e9  # of all label maps that are read only to measure volumes
TILE = Detail(224, 70)
_FALLBACK = (64, 256, 256)  # voxels of a case of which the fingerprint does not tell
_LADDER = ((384, 80, 0.30), (320, 78, 0.28), (256, 75, 0.25), (192, 72, 0.24), (160, 68, 0.22), (128, 62, 0.20))
_BASE64 = 4 / 3
_OUTLINE_BYTES = 700  # of one plane, roughly
_BYTES_PER_VOXEL = 16  # while a case is worked on: its image, and label maps with what is compared

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True)
class Gallery:
    """All that was seen of the cases.

    Parameters
    ----------
    seen : by case.
    shown : model -> its cases with overlays, worst first.
    notes : what was left out, and why.
    """

    seen: dict[str, Seen]
    shown: dict[str, list[str]]
    notes: tuple[str, ...]


def make_gallery(material: Material, progress: Progress | None = None) -> Gallery:
    """Read the cases in threads, and make what is to be shown of each."""
    shapes = _shapes(material)
    tiles = _tiles(material, shapes)
    pairs, detail = _overlays(material, shapes, tiles)
    measured = _measured(material, shapes)
    by_case: dict[str, list[str]] = {}
    for case, model in pairs:
        by_case.setdefault(case, []).append(model)
    files = {
        model.name: {row.case: Path(row.prediction_file) for row in model.scores.rows if row.prediction_file}
        for model in material.scored
    }

    def wanted(case: Case) -> Wanted:
        predictions = {m: files[m][case.id] for m in by_case.get(case.id, ()) if case.id in files[m]}
        return Wanted(case, case.id in tiles, case.id in measured, predictions)

    work = partial(look, dataset=material.dataset, plan=material.plan, detail=detail, tile_detail=TILE)
    jobs = [wanted(case) for case in material.dataset.cases]
    largest = max((prod(shapes[job.case.id]) for job in jobs), default=0) * len(material.plan.channels)
    seen = {}
    with ThreadPoolExecutor(system.cases_in_flight(largest * _BYTES_PER_VOXEL, None), "report") as pool:
        results: Iterable[Seen] = pool.map(work, jobs)
        for result in progress(results, len(jobs), "report") if progress else results:
            seen[result.case] = result
    return _within_budget(material, seen, pairs, _notes(material, tiles, measured, seen))


def _shapes(material: Material) -> dict[str, tuple[int, int, int]]:
    """Voxels of each case, as far as the fingerprint knows."""
    found = material.fingerprint
    known = dict(zip(found.case_ids, found.shapes_after_crop, strict=False)) if found else {}
    return {case.id: known.get(case.id, _FALLBACK) for case in material.dataset.cases}


def _tiles(material: Material, shapes: dict[str, tuple[int, int, int]]) -> set[str]:
    """Cases for the montage, evenly spaced."""
    channels = len(material.plan.channels)
    mean = sum(prod(shape) for shape in shapes.values()) * channels / max(1, len(shapes))
    n = min(TILES, len(shapes), max(4, int(MOST_VOXELS / 3 / max(mean, 1))))
    return {case.id for case in _spread(material.dataset.cases, n)}


def _measured(material: Material, shapes: dict[str, tuple[int, int, int]]) -> set[str]:
    """Cases whose label map is read for its volumes: those that no summary.json tells of."""
    told = {row.case for model in material.scored for row in model.scores.rows}
    rest = [case for case in material.dataset.cases if case.id not in told and case.label is not None]
    voxels = sum(prod(shapes[case.id]) for case in rest)
    n = len(rest) if voxels <= LABEL_VOXELS else max(8, int(len(rest) * LABEL_VOXELS / voxels))
    return {case.id for case in _spread(rest, n)}


def _spread(cases: Iterable[Case], n: int) -> list[Case]:
    every = list(cases)
    if n >= len(every):
        return every
    return [every[round(i * (len(every) - 1) / max(1, n - 1))] for i in range(n)]


def _overlays(
    material: Material, shapes: dict[str, tuple[int, int, int]], tiles: set[str]
) -> tuple[list[tuple[str, str]], Detail]:
    """(case, model) to show, the worst of every model first, and how finely."""
    channels = len(material.plan.channels)
    read, voxels = set(tiles), float(sum(prod(shapes[case]) * channels for case in tiles))
    ranked = _ranked(material, set(shapes))
    pairs = []
    for case, model in ranked:
        if case not in read:
            voxels += prod(shapes[case]) * channels
            if voxels > MOST_VOXELS:
                break
            read.add(case)
        pairs.append((case, model))
    pictures = 1 if is_colour(material.dataset, material.plan) else min(channels, MOST_CHANNELS)
    for longest, quality, per_pixel in _LADDER:
        sizes = [_estimate(shapes[case], longest, per_pixel, pictures) for case, _ in pairs]
        if sum(sizes) <= PICTURE_BYTES:
            return pairs, Detail(longest, quality)
    kept, total = 0, 0.0
    while total + sizes[kept] <= PICTURE_BYTES:
        total += sizes[kept]
        kept += 1
    return pairs[:kept], Detail(longest, quality)


def _ranked(material: Material, there: set[str]) -> list[tuple[str, str]]:
    """(case, model): the worst case of each model, then the second worst of each, and so on."""
    models = [(model.name, [row.case for row in model.worst_first if row.case in there]) for model in material.scored]
    most = max((len(cases) for _, cases in models), default=0)
    return [(cases[i], name) for i in range(most) for name, cases in models if i < len(cases)]


def _estimate(shape: tuple[int, int, int], longest: int, per_pixel: float, pictures: int) -> float:
    """Bytes of the overlays of one case and model."""
    z, y, x = (min(n, longest) for n in shape)
    planes = [y * x] if z == 1 else [y * x, z * x, z * y]
    return sum(_OUTLINE_BYTES + pictures * _BASE64 * (200 + area * per_pixel) for area in planes)


def _within_budget(
    material: Material, seen: dict[str, Seen], pairs: list[tuple[str, str]], notes: list[str]
) -> Gallery:
    """Leave out the best cases where the overlays came out larger than planned."""
    shown: dict[str, list[str]] = {model.name: [] for model in material.scored}
    total, kept = 0, set()
    for case, name in pairs:
        planes = seen[case].overlays.get(name)
        if not planes:
            continue
        total += sum(len(text) for plane in planes for text in _texts(plane))
        if total > PICTURE_BYTES * 1.1:
            break
        shown[name].append(case)
        kept.add((case, name))
    for model in material.scored:
        cases = len(model.worst_first)
        if len(shown[model.name]) < cases:
            notes.append(f"{model.label}: pictures of the {len(shown[model.name])} worst of {cases} cases")
    lean = {
        case: replace(found, overlays={m: p for m, p in found.overlays.items() if (case, m) in kept})
        for case, found in seen.items()
    }
    return Gallery(lean, shown, tuple(notes))


def _texts(plane: dict[str, Any]) -> list[str]:
    return [*plane["images"], *(path for side in ("reference", "prediction") for _, path in plane[side] or ())]


def _notes(material: Material, tiles: set[str], measured: set[str], seen: dict[str, Seen]) -> list[str]:
    cases = len(material.dataset.cases)
    told = {row.case for model in material.scored for row in model.scores.rows}
    notes = []
    if len(tiles) < cases:
        notes.append(f"the montage and the intensities are those of {len(tiles)} of {cases} cases, evenly spaced")
    if len(told | measured) < cases:
        notes.append(f"volumes are those of {len(told | measured)} of {cases} cases, evenly spaced")
    problems = [problem for found in seen.values() for problem in found.problems]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        notes.append(f"{len(problems)} of {cases} cases could not be shown: {'; '.join(problems[:3])}{more}")
    return notes
