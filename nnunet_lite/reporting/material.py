"""What the report is made from: the files of a dataset at any stage, and pictures of its cases.

`read_material` reads plans, models and scores. `draw_cases` chooses cases, reads each one once, in threads, and keeps
the pictures that fit the page.
"""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_lite import log, system
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, read_annotation, read_case, stored_dataset
from nnunet_lite.data.geometry import Geometry, turn_between
from nnunet_lite.data.images import read_geometry, read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import Problem, read_problems
from nnunet_lite.errors import UserError, describe
from nnunet_lite.evaluation.audit import Audit, Finding, read_audit
from nnunet_lite.evaluation.calibration_rows import Row, read_rows
from nnunet_lite.evaluation.metrics import METRICS
from nnunet_lite.evaluation.scores import CaseScore, Scores, read_fold_scores
from nnunet_lite.evaluation.selection import Selection, changed_models, read_selection
from nnunet_lite.evaluation.statistics import Statistic
from nnunet_lite.files import read_json, understood
from nnunet_lite.inference.quality import read_quality
from nnunet_lite.models.folder import MODEL, RECORD, VALIDATION, model_folders, read_weights_header
from nnunet_lite.models.lookup import read_model
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.schema import Plan
from nnunet_lite.reporting.pictures import MAX_CHANNELS, OrientedImage, Picture, box_around
from nnunet_lite.training.metrics import read_epochs
from nnunet_lite.training.splits import Split, load_splits
from nnunet_lite.workspace import Paths

TILES = 24  # cases in the montage
PAGE_BYTES = 9_000_000  # of all overlays in the page
_MAX_VOXELS = 2.5e9  # of all images that are read, a third of them for the montage: about 20 s on two cores
_MAX_LABEL_VOXELS = 4e9  # of all label maps that are read only for their volumes
_SIZES = (384, 320, 256, 192, 160, 128)  # pixels along the longer side of an overlay
_FINDING_SIZE = 256  # pixels along the longer side of a picture of a finding
_UNKNOWN_SHAPE = (64, 256, 256)  # of a case that is not in the fingerprint
_BYTES_PER_VOXEL = 16  # in memory while a case is drawn: image, label map and prediction
_CASE_SAMPLES = 4000  # voxels of each label and case for the histograms of intensities
_MICROSCOPY = 0.02  # mm of a pixel, below which lengths are in um
_IMAGE_SAMPLES = 1_000_000  # voxels for the mean and deviation of an image


@dataclass(frozen=True)
class FoldHistory:
    """The training of one fold.

    Parameters
    ----------
    name : str
        Of the fold, such as "0".
    rows : tuple of dict
        Its epochs, as in metrics.jsonl.
    state : dict
        The header of its finished model; empty while it trains.
    prediction_seconds : tuple of float
        How long the prediction of each held-out case took; empty if it is not known.
    """

    name: str
    rows: tuple[dict[str, Any], ...]
    state: dict[str, Any]
    prediction_seconds: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        return float(self.state.get("seconds") or sum(row["seconds"] for row in self.rows))


@dataclass(frozen=True)
class ModelResults:
    """A model or an ensemble with the scores of its held-out cases.

    Parameters
    ----------
    folder : Path
        The model folder.
    name : str
        Its name, "a+b" for an ensemble.
    run : dict
        run.json; empty for an ensemble, which has no folds either.
    plan : Plan or None
        What was trained; None for an ensemble.
    folds : tuple of FoldHistory
        Its trained folds.
    scores : Scores
        Of all validated folds; without rows if there is none.
    fold_of : dict
        Case -> the fold that held it out.
    """

    folder: Path
    name: str
    run: dict[str, Any]
    plan: Plan | None
    folds: tuple[FoldHistory, ...]
    scores: Scores
    fold_of: dict[str, str]

    @property
    def begun(self) -> list[FoldHistory]:
        """The folds with at least one epoch."""
        return [fold for fold in self.folds if fold.rows]

    @property
    def label(self) -> str:
        return " + ".join(self.name.split("+"))

    @property
    def n_finished(self) -> int:
        """The number of folds whose training is finished."""
        return sum(bool(fold.state) for fold in self.folds)

    @cached_property
    def where(self) -> str:
        """The options that select its dataset on a command line."""
        return Paths(self.folder.parents[1]).where

    def view_command(self, case: str) -> str:
        """Return the command that shows a case with its prediction."""
        return shlex.join(["nnlite", "view", case, "-m", self.folder.name]) + self.where

    @cached_property
    def dice(self) -> Statistic:
        """Dice over all held-out cases and labels."""
        return self.scores.foreground()

    @cached_property
    def examples(self) -> dict[str, str]:
        """Case -> what it is an example of: the worst, the median and the best by their mean Dice."""
        known = [row.case for row in self.worst_first if row.mean_dice is not None]
        if not known:
            return {}
        examples = {known[len(known) // 2]: "median", known[-1]: "best"} | {known[0]: "worst"}  # of few cases, the last
        return {case: examples[case] for case in known if case in examples}

    @cached_property
    def worst_first(self) -> tuple[CaseScore, ...]:
        """The cases by their mean Dice; those without any label come last."""
        return tuple(sorted(self.scores.rows, key=lambda row: (row.mean_dice is None, row.mean_dice or 0.0, row.case)))


@dataclass(frozen=True)
class Units:
    """The units of lengths and volumes on the page: mm and ml; for microscopy um; for pictures areas.

    Parameters
    ----------
    length, volume : str
        Their names.
    per_mm, per_voxel : float
        How many units of length a mm has, and of volume a voxel of 1 mm; without a spacing, both count voxels.
    dimensions : int
        2 if all images are pictures.
    """

    length: str
    volume: str
    per_mm: float
    per_voxel: float
    dimensions: int

    @classmethod
    def of(cls, geometries: Sequence[Geometry]) -> Units:
        """Choose the units that fit the images.

        Parameters
        ----------
        geometries : sequence of Geometry
            Of the images.
        """
        dimensions = 2 if geometries and all(geometry.dimensions == 2 for geometry in geometries) else 3
        pixels = [geometry.spacing[2] for geometry in geometries if geometry.calibrated]
        if not pixels:
            return cls("pixels", "pixels" if dimensions == 2 else "voxels", 1.0, 1.0, dimensions)
        if np.median(pixels) < _MICROSCOPY:
            return cls("µm", "µm²" if dimensions == 2 else "µm³", 1e3, 1e3**dimensions, dimensions)
        return cls("mm", "mm²", 1.0, 1.0, 2) if dimensions == 2 else cls("mm", "ml", 1.0, 1e-3, 3)

    @property
    def size(self) -> str:
        """What a label has: an area or a volume."""
        return "Area" if self.dimensions == 2 else "Volume"

    def scale_of(self, metric: str) -> float:
        """Return by what a metric is multiplied: lengths are measured in mm.

        Parameters
        ----------
        metric : str
            A name of `METRICS`.
        """
        return self.per_mm if METRICS[metric].unit == "length" else 1.0

    def volume_of(self, voxels: float, geometry: Geometry) -> float:
        """Return the volume of some voxels, or the area of some pixels.

        Parameters
        ----------
        voxels : float
            Their number.
        geometry : Geometry
            Of their image.
        """
        known = self.volume not in ("pixels", "voxels")
        return voxels * self.per_voxel * (prod(geometry.spacing[-self.dimensions :]) if known else 1)


@dataclass
class CasePictures:
    """What the page shows of one case.

    Parameters
    ----------
    case_id : str
        Case id.
    geometry : Geometry or None
        Of its image, turned to the axes of the plan; None if it could not be read.
    voxels : dict
        Region -> its voxels in the reference.
    tile : dict or None
        The picture for the montage.
    intensities : dict
        "image" or region -> ndarray, shape (channels, samples).
    overlays : dict
        Model -> its planes.
    problem : str
        Why the case could not be read.
    """

    case_id: str
    geometry: Geometry | None = None
    voxels: dict[str, int] = field(default_factory=dict)
    tile: Picture | None = None
    intensities: dict[str, np.ndarray] = field(default_factory=dict)
    overlays: dict[str, list[Picture]] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Material:
    """All that the report is made from.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.
    dataset : Dataset
        The planned dataset.
    plan : Plan
        Its plan.
    fingerprint : Fingerprint or None
        None if its file is gone.
    problems : tuple of Problem
        From check.json.
    models : tuple of ModelResults
        The selected one first, then by Dice, those without scores last.
    selection : Selection or None
        None before `nnlite select`.
    audit : Audit or None
        None before `nnlite audit`.
    notes : tuple of str
        What is left out, and why.
    calibration : tuple of Row
        What is expected of held-out cases, and of degraded copies of them.
    pictures : dict
        Case -> its pictures.
    overlays : dict
        Model -> case -> its planes; the worst, best and median cases come first.
    """

    paths: Paths
    dataset: Dataset
    plan: Plan
    fingerprint: Fingerprint | None
    problems: tuple[Problem, ...]
    models: tuple[ModelResults, ...]
    selection: Selection | None
    audit: Audit | None
    notes: tuple[str, ...]
    calibration: tuple[Row, ...] = ()
    pictures: dict[str, CasePictures] = field(default_factory=dict)
    overlays: dict[str, dict[str, list[Picture]]] = field(default_factory=dict)

    @cached_property
    def units(self) -> Units:
        return Units.of([one.geometry for one in self.pictures.values() if one.geometry])

    @cached_property
    def splits(self) -> list[Split]:
        """The folds of the dataset; none before they are made."""
        return load_splits(self.paths.splits) if self.paths.splits.is_file() else []

    @property
    def scored(self) -> list[ModelResults]:
        """The models with at least one validated fold."""
        return [model for model in self.models if model.scores.rows]

    @property
    def trained(self) -> list[ModelResults]:
        """The models without the ensembles."""
        return [model for model in self.models if model.run]


def read_material(paths: Paths) -> Material:
    """Read everything about a dataset but its images.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.

    Raises
    ------
    UserError
        The dataset is not planned, or one of its files is broken.
    """
    plan, dataset, selection = Plan.read(paths.plans), stored_dataset(paths.dataset), read_selection(paths)
    chosen = selection.models if selection else ()
    selected = "+".join(chosen)
    qualities = [read_quality(paths.models / name) for name in chosen]
    calibrated = any(one is not None and selection and one.weights == selection.weights for one in qualities)
    changed = changed_models(paths, selection) if selection else []
    notes = [f"{' and '.join(changed)} changed since the comparison; `nnlite select` compares again"] if changed else []
    models = []
    for folder in model_folders(paths):
        try:
            models.append(read_results(folder, notes, dataset.labels))
        except UserError as error:
            notes.append(f"model {folder.name} is left out: {error}")
    ensemble = paths.folder_of(selected)
    if "+" in selected and ensemble.is_dir():
        scores = read_fold_scores(ensemble, dataset.labels, notes)
        models.append(ModelResults(ensemble, selected, {}, None, (), *scores))
    models.sort(key=lambda m: (m.name != selected, m.dice.mean is None, -(m.dice.mean or 0.0), m.name))
    return Material(
        paths,
        dataset,
        plan,
        Fingerprint.read(paths.fingerprint) if paths.fingerprint.is_file() else None,
        read_problems(paths.check) if paths.check.is_file() else (),
        tuple(models),
        selection,
        read_audit(paths),
        tuple(notes),
        tuple(read_rows(paths.calibration_of(selected))) if calibrated else (),
    )


def read_results(folder: Path, notes: list[str], labels: Labels | None = None) -> ModelResults:
    """Read the trainings of a model and its scores.

    Parameters
    ----------
    folder : Path
        The model folder.
    notes : list of str
        Gets what is left out, and why.
    labels : Labels or None
        Scores of other labels are left out; None for those of its plan.

    Raises
    ------
    UserError
        The folder is no model, or a file of it is broken.
    """
    plan, run = read_model(folder)
    plan.configuration(run["configuration"])
    folds = tuple(_read_fold(path, notes) for path in sorted(folder.glob("fold_*")) if path.is_dir())
    return ModelResults(folder, folder.name, run, plan, folds, *read_fold_scores(folder, labels or plan.labels, notes))


def _read_fold(folder: Path, notes: list[str]) -> FoldHistory:
    state = read_weights_header(folder / MODEL) if (folder / MODEL).is_file() else {}
    record = folder / VALIDATION / RECORD
    seconds: tuple[float, ...] = ()
    try:
        with understood(record):
            predictions = read_json(record)["predictions"].values() if record.is_file() else ()
            seconds = tuple(float(one["seconds"]) for one in predictions if one["seconds"] is not None)
    except UserError as error:
        notes.append(f"the times of predictions are left out: {error}")
    return FoldHistory(folder.name.removeprefix("fold_"), tuple(read_epochs(folder)), state, seconds)


# ----------------------------------------------------------------------------------------------- pictures of the cases


def draw_cases(material: Material) -> Material:
    """Read the cases in threads and draw them.

    Parameters
    ----------
    material : Material
        From `read_material`.

    Returns
    -------
    Material
        The same with pictures, and notes on what has none.
    """
    cases, channels, fingerprint = material.dataset.cases, len(material.plan.channels), material.fingerprint
    known_shapes = dict(zip(fingerprint.case_ids, fingerprint.shapes_after_crop, strict=False)) if fingerprint else {}
    voxels = {case.id: prod(known_shapes.get(case.id, _UNKNOWN_SHAPE)) * channels for case in cases}
    n_tiles = int(_MAX_VOXELS / 3 * len(cases) / max(1, sum(voxels.values())))
    tiles = _evenly(cases, min(TILES, max(4, n_tiles)))
    scored = {row.case for model in material.scored for row in model.scores.rows}
    unscored = [case for case in cases if case.id not in scored and case.label is not None]
    share = _MAX_LABEL_VOXELS * channels / max(1, sum(voxels[case.id] for case in unscored))
    volume_cases = _evenly(unscored, max(8, int(len(unscored) * min(1, share))))
    overlays = _choose_overlays(material, voxels, tiles)
    shapes = [known_shapes.get(overlay.case_id, _UNKNOWN_SHAPE) for overlay in overlays]
    size, n_overlays = _size_of_overlays(shapes, min(channels, MAX_CHANNELS))
    predictions: dict[str, dict[str, Path]] = defaultdict(dict)
    for overlay in overlays[:n_overlays]:
        predictions[overlay.case_id][overlay.model] = overlay.file
    draw = partial(draw_case, material.dataset, material.plan, size)
    contents = [(case, case.id in tiles, case.id in volume_cases, predictions[case.id]) for case in cases]
    at_once = system.cases_in_flight(max(voxels.values(), default=0) * _BYTES_PER_VOXEL, None)
    pictures = log.map_in_threads(lambda content: draw(*content), contents, at_once, "report")
    by_case = {one.case_id: one for one in pictures}
    overlaid = _fit_page(material, by_case, overlays[:n_overlays])
    counts = (("the montage and the intensities are", len(tiles)), ("volumes are", len(scored | volume_cases)))
    notes = [f"{what} those of {n} of {len(cases)} cases, evenly spaced" for what, n in counts if n < len(cases)]
    if problems := [one.problem for one in pictures if one.problem]:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        notes.append(f"{len(problems)} of {len(cases)} cases could not be shown: {'; '.join(problems[:3])}{more}")
    for model in material.scored:
        if (n := len(overlaid[model.name])) < (of := len(model.worst_first)):
            notes.append(f"{model.label}: pictures of {n} of {of} cases, first the worst, the best and the median")
        surfaces = [model.scores.values(metric) for metric in ("NSD", "HD95")]
        if model.run and not np.isfinite(surfaces).any():
            again = "delete summary.json in its folders `validation` and train again, which scores the same predictions"
            notes.append(f"{model.label}: NSD and HD95 were not measured; to measure them, {again}")
    return replace(material, pictures=by_case, overlays=overlaid, notes=(*material.notes, *notes))


def _evenly(cases: Sequence[Case], n: int) -> set[str]:
    """Return the names of n evenly spaced cases."""
    n = min(n, len(cases))
    return {cases[round(i * (len(cases) - 1) / max(1, n - 1))].id for i in range(n)}


class Overlay(NamedTuple):
    """A prediction that is drawn over its case.

    Parameters
    ----------
    rank : int
        0 for the worst case of the model, then its best, its median, and the others, the worst first.
    case_id, model : str
        The case, and the model folder.
    file : Path
        The label map.
    """

    rank: int
    case_id: str
    model: str
    file: Path


def _choose_overlays(material: Material, voxels: Mapping[str, int], tiles: set[str]) -> list[Overlay]:
    """Choose examples of each model, then its worst cases, as far as the time to read them allows."""
    overlays = []
    for model in material.scored:
        ranks = {case_id: ("worst", "best", "median").index(what) for case_id, what in model.examples.items()}
        rows = sorted((row for row in model.worst_first if row.case in voxels), key=lambda row: ranks.get(row.case, 3))
        files = [(row.case, Path(row.prediction_file)) for row in rows if row.prediction_file]
        overlays += [Overlay(rank, case_id, model.name, file) for rank, (case_id, file) in enumerate(files)]
    read, total, chosen = set(tiles), sum(voxels[case_id] for case_id in tiles), []
    for overlay in sorted(overlays, key=lambda overlay: overlay.rank):
        total += 0 if overlay.case_id in read else voxels[overlay.case_id]
        read.add(overlay.case_id)
        if total <= _MAX_VOXELS:
            chosen.append(overlay)
    return chosen


def _size_of_overlays(shapes: Sequence[tuple[int, int, int]], pictures: int) -> tuple[int, int]:
    """Return the side (pixels) with which all overlays fit the page, or the smallest one, and how many fit."""
    size, total = _SIZES[0], np.zeros(0)
    for size in _SIZES:
        total = np.cumsum([_estimate_bytes(shape, size, pictures) for shape in shapes])
        if not shapes or total[-1] <= PAGE_BYTES:
            break
    return size, int(np.searchsorted(total, PAGE_BYTES, side="right"))


def _fit_page(
    material: Material, pictures: Mapping[str, CasePictures], overlays: Sequence[Overlay]
) -> dict[str, dict[str, list[Picture]]]:
    """Return the planes of each model and case, without the best cases if the pictures are larger than estimated."""
    overlaid: dict[str, dict[str, list[Picture]]] = {model.name: {} for model in material.scored}
    total = 0
    for overlay in overlays:
        planes = pictures[overlay.case_id].overlays.get(overlay.model, [])
        total += sum(len(json.dumps(plane)) for plane in planes)
        if planes and total <= PAGE_BYTES * 1.1:
            overlaid[overlay.model][overlay.case_id] = planes
    return overlaid


def _estimate_bytes(shape: tuple[int, int, int], size: int, pictures: int) -> float:
    """Estimate the bytes of the overlays of one case and model: a WebP in base64 and some outlines for each plane."""
    z, y, x = (min(n, size) for n in shape)
    areas = [y * x] if z == 1 else [y * x, z * x, z * y]
    return sum(700 + pictures * 4 / 3 * (200 + 0.2 * area) for area in areas)


def draw_case(
    dataset: Dataset, plan: Plan, size: int, case: Case, tile: bool, volumes: bool, predictions: Mapping[str, Path]
) -> CasePictures:
    """Read the files of a case and draw its pictures; a case that cannot be read has a `problem`.

    Parameters
    ----------
    dataset : Dataset
        The planned dataset.
    plan : Plan
        Its plan.
    size : int
        Pixels along the longer side of an overlay.
    case : Case
        The case.
    tile, volumes : bool
        Whether to draw it for the montage, and to count the voxels of its regions.
    predictions : mapping
        Model -> label map to draw over the image.
    """
    out = CasePictures(case.id)
    try:
        if tile or predictions:
            image, label = read_case(case, dataset)
            out.geometry = _as_planned(image.geometry, plan)
            oriented = OrientedImage(image, plan)
            reference = oriented.turn.apply(label)
            if tile:
                out.tile = oriented.tile(reference)
                out.intensities = _sample_intensities(image.array, label, plan)
            out.overlays = oriented.overlays(reference, predictions, size)
        else:
            out.geometry, label = _as_planned(read_geometry(case.images[0])[0], plan), None
            if volumes and case.label is not None:
                label, _ = read_annotation(case, dataset)
        if volumes and label is not None:
            out.voxels = plan.labels.count_voxels(label)
    except (UserError, OSError, MemoryError) as error:
        out.problem = f"{case.id}: {describe(error)}"
    return out


def _as_planned(geometry: Geometry, plan: Plan) -> Geometry:
    """Turn a geometry to the axes of the plan, so that those of all cases can be compared."""
    return geometry.turned(turn_between(geometry.orientation, plan.orientation))


def draw_finding(material: Material, case: Case, file: Path, finding: Finding) -> list[Picture]:
    """Draw the place of an audit's finding, with the outlines of the reference and of a prediction.

    Parameters
    ----------
    material : Material
        From `read_material`.
    case : Case
        The case.
    file : Path
        The predicted label map.
    finding : Finding
        What was found.

    Returns
    -------
    list of Picture
        One for each plane.

    Raises
    ------
    UserError
        A file cannot be read.
    """
    image, reference = read_case(case, material.dataset)
    prediction, _, _ = read_label(file, image.geometry)
    oriented = OrientedImage(image, material.plan)
    own, other = oriented.turn.apply(reference), oriented.turn.apply(prediction)
    at = oriented.turn.apply_to_voxel(finding.place, image.geometry.shape)
    box = box_around(oriented.foreground_of(own) | oriented.foreground_of(other))
    return [oriented.draw(plane, at, box, _FINDING_SIZE, own, other) for plane in oriented.planes]


def _sample_intensities(image: np.ndarray, label: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """Take evenly spaced voxels of each region and of the nonzero image; z-scores where the plan normalizes so."""
    flat = image.reshape(len(image), -1)
    nonzero = (flat != 0).any(axis=0)
    masks = {name: np.isin(label.reshape(-1), members) for name, members in plan.labels.regions.items()}
    masks = {"image": nonzero, **masks}
    samples = {}
    for name, mask in masks.items():
        inside = np.flatnonzero(mask)
        samples[name] = flat[:, inside[:: max(1, inside.size // _CASE_SAMPLES)]].astype(np.float32)
    step = max(1, flat.shape[1] // _IMAGE_SAMPLES)
    for i, channel in enumerate(plan.channels):
        if channel.normalization == "zscore":
            values = flat[i, ::step].astype(np.float64)
            values = values[nonzero[::step]] if channel.use_mask else values
            for sample in samples.values():
                sample[i] = (sample[i] - values.mean()) / max(float(values.std()), 1e-8)
    return samples
