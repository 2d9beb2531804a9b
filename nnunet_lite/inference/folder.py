"""Predict many images into a folder: the next one is read, and the last one written, while the networks compute."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from traceback import format_exception

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_images, read_label, write_label
from nnunet_lite.data.names import Format, case_of, format_of
from nnunet_lite.data.nifti import write_nifti
from nnunet_lite.data.problems import few, plural
from nnunet_lite.data.slicer import needs_layers
from nnunet_lite.errors import UserError, describe
from nnunet_lite.files import allocate, atomic, lacks_space, no_space, sweep
from nnunet_lite.inference.cases import file_name, identify, names_file, output_file, read_case_image
from nnunet_lite.inference.features import describe_prediction
from nnunet_lite.inference.outputs import STEPS, ExtraMaps
from nnunet_lite.inference.predictor import Predictor, PreparedImage, prepare_image, segment
from nnunet_lite.inference.quality import CaseQuality, judge
from nnunet_lite.inference.record import KEPT, CaseResult, read_statistics
from nnunet_lite.inference.results import SEGMENTATIONS, label_file, measure_labels, write_segmentation
from nnunet_lite.system import cases_in_flight, cpus

# changes a label map (z, y, x) of some spacing before it is written
Postprocess = Callable[[np.ndarray, tuple[float, float, float]], np.ndarray]

_MOST_READERS = 4  # images that are read, cropped, normalised and resampled at once while a GPU computes
_READING = 4  # times the size of a preprocessed image: what reading and preprocessing one takes
_MEASURING = 1  # the same for the image that is read again for its statistics
_MOST_WRITING = 2  # label maps that wait to be written
_NAME_BYTES = 255


def predict_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    out: Path,
    *,
    maps: ExtraMaps = ExtraMaps(),
    format: Format | None = None,
    per_label: bool = False,
    statistics: bool = False,
    quality: bool = False,
    report: Callable[[CaseResult], None] = lambda result: None,
    skip_existing: bool = False,
    stage_classes: Callable[[str], np.ndarray] | None = None,
    postprocess: Postprocess | None = None,
    accept_geometry: bool = False,
) -> tuple[list[Path], dict[str, str]]:
    """Predict cases into a folder: a label map for each, in the format of its image. One that fails stops no other.

    Parameters
    ----------
    predictor : Predictor
        The model.
    cases : sequence of Case
        Their images.
    out : Path
        A folder; of a single case also the name of its label map, whose ending decides the format.
    maps : ExtraMaps
        Maps to write too, into the folders probabilities and uncertainty in `out`.
    format : str, optional
        Of the label maps; default: that of their images.
    per_label : bool
        Write a file for each label too, into the folder segmentations in `out`.
    statistics : bool
        Measure the labels, for `report`.
    quality : bool
        Judge the predictions, for `report`, if that was calibrated for the model.
    report : callable
        Takes each case before its label map is written; in the end those that failed.
    skip_existing : bool
        Keep label maps that exist already, unless `maps` of the case are missing. Statistics and files of labels that
        are missing are made from them.
    stage_classes : callable, optional
        Returns the classes that the first stage predicts of a case, by its id, on the grid of its preprocessed array;
        for the second stage of a cascade that was loaded without the first.
    postprocess : callable, optional
        Changes each label map before it is written.
    accept_geometry : bool
        Whether the files of a case's channels may differ in origin and direction.

    Returns
    -------
    files : list of Path
        The label maps, also those that existed already.
    failed : dict of str to str
        The id of each case that failed, and the reason.

    Raises
    ------
    UserError
        A label map would overwrite an image, or a name would be too long or that of two files.
    OSError
        The disk is full.
    """
    labels, channels = predictor.plan.labels, [channel.name for channel in predictor.plan.channels]
    targets = {case.id: output_file(case, out, format) for case in cases}
    maps_of = {case.id: [_map_file(targets[case.id], name) for name in maps.names] for case in cases}
    masks_of = {
        case.id: {label: label_file(targets[case.id], label, case.images[0]) for label in labels.segments if per_label}
        for case in cases
    }
    _check_targets(cases, targets, {name: [*files, *masks_of[name].values()] for name, files in maps_of.items()})
    out = out.parent if names_file(out) else out
    out.mkdir(parents=True, exist_ok=True)
    for folder in (out / "probabilities", out / "uncertainty", *out.glob(f"{SEGMENTATIONS}/*")):
        sweep(folder)  # of a killed run; this one may write nothing there
    measured = read_statistics(out) if statistics and skip_existing else {}

    readable = (None, "nifti") if needs_layers(labels) else (None, "nifti", "seg.nrrd")  # as values of the dataset

    def is_complete(case: Case) -> bool:
        has_masks = all(path.is_file() for path in masks_of[case.id].values())
        return has_masks and (not statistics or case_of(targets[case.id]) in measured)

    def is_kept(case: Case) -> bool:
        has_files = all(path.is_file() for path in (targets[case.id], *maps_of[case.id]))
        return has_files and (is_complete(case) or format_of(targets[case.id]) in readable)

    kept = [case for case in cases if skip_existing and is_kept(case)]
    files = [targets[case.id] for case in kept]
    kept_ids = {case.id for case in kept}
    todo = [case for case in cases if case.id not in kept_ids]
    if old := [case for case in todo if targets[case.id].is_file()]:
        why = "files that are made with them are missing" if skip_existing else "--continue keeps them"
        log.info(f"{out}: {plural(len(old), 'label map')} will be replaced; {why}")
    failed: dict[str, str] = {}
    computed = maps
    calibrated = predictor.quality if quality else None
    if calibrated is not None and not maps.uncertainty:
        computed = replace(predictor.quality_maps, probabilities=maps.probabilities)
    turned: dict[str, list[str]] = defaultdict(list)

    def read(case: Case) -> PreparedImage:
        return prepare_image(predictor, read_case_image(predictor.plan, case, accept_geometry))

    def write(
        case: Case,
        geometry: Geometry,
        label_map: np.ndarray,
        arrays: dict[str, np.ndarray],
        judged: CaseQuality | None,
        seconds: float,
    ) -> None:
        target = targets[case.id]
        target.unlink(missing_ok=True)  # an older one beside new files would be taken for theirs
        for name in maps.names:
            with atomic(_map_file(target, name)) as temporary:
                write_nifti(temporary, arrays[name], geometry, 1 / STEPS, case.images[0])
        if postprocess is not None:
            label_map = postprocess(label_map, geometry.spacing)
        for label, file in masks_of[case.id].items():
            write_label(file, np.isin(label_map, labels.segments[label]), geometry, like=case.images[0])
        sizes = None
        if statistics:
            image = read_images(case.images, len(channels), accept_geometry).array
            sizes = measure_labels(label_map, image, geometry, labels, channels)
        report(CaseResult(target, case, "written", round(seconds, 2), sizes, judged))
        # the label map is the last file: if it exists, the case is complete
        write_segmentation(target, label_map, geometry, labels, case.images[0])

    def complete(case: Case) -> None:
        image = read_case_image(predictor.plan, case, accept_geometry)
        label_map = read_label(targets[case.id], image.geometry)[0]
        if label_map.shape != image.geometry.shape:
            raise UserError("is the label map of another image", targets[case.id], "Choose another --output.")
        for label, file in masks_of[case.id].items():
            write_label(file, np.isin(label_map, labels.segments[label]), image.geometry, like=case.images[0])
        if statistics:
            sizes = measure_labels(label_map, image.array, image.geometry, labels, channels)
            report(CaseResult(targets[case.id], case, KEPT, None, sizes))

    def fail(case: Case, error: Exception) -> None:
        if lacks_space(error):  # then no other case can be written either
            raise error
        log.detail("".join(format_exception(error)).rstrip())
        failed[case.id] = describe(error)

    def finish(case: Case, writing: Future[None]) -> None:
        try:
            writing.result()
            files.append(targets[case.id])
        except Exception as error:  # whatever is wrong with one case, the others are predicted
            fail(case, error)

    incomplete = [case for case in kept if not is_complete(case)]
    for case in log.progress(incomplete, len(incomplete), "complete") if incomplete else ():
        try:
            complete(case)
        except Exception as error:  # as above
            fail(case, error)
    n_readers = 1 if predictor.device.type == "cpu" else min(cpus(), _MOST_READERS)  # a CPU computes at the same time
    with ThreadPoolExecutor(n_readers) as reader, ThreadPoolExecutor(1) as writer:
        size = _READING + _MEASURING * statistics
        sources, queue = _read_ahead(reader, read, todo, n_readers, size), deque[tuple[Case, Future[None]]]()
        for case, source in zip(log.progress(todo, len(todo), "predict"), sources, strict=True):
            try:
                prepared = source.result()
                began = time.monotonic()
                classes = None if stage_classes is None else stage_classes(case.id)
                label_map, arrays = segment(predictor, prepared, classes, computed, partial(array_on_disk, out))
                judged = None
                if calibrated is not None:
                    judged = judge(calibrated, describe_prediction(prepared.arrays[0], label_map, arrays, labels))
            except Exception as error:  # as above
                fail(case, error)
                continue
            geometry = prepared.arrays[0].placement.geometry
            own = geometry.orientation
            if own is not None and own != (predictor.plan.orientation or own):
                turned[own].append(case.id)
            del prepared  # or it would be in memory until the next image is read
            seconds = time.monotonic() - began
            queue.append((case, writer.submit(write, case, geometry, label_map, arrays, judged, seconds)))
            if len(queue) > _MOST_WRITING:
                finish(*queue.popleft())
        for case, writing in queue:
            finish(case, writing)
    for case in todo:
        if case.id in failed:
            report(CaseResult(targets[case.id], case, f"failed: {failed[case.id]}"))
    if turned:
        stored = ", ".join(f"{plural(len(ids), 'image')} stored as {own} ({few(ids)})" for own, ids in turned.items())
        log.info(f"turned to {predictor.plan.orientation}, the orientation of the model: {stored}")
    return sorted(files), failed


def _check_targets(cases: Sequence[Case], targets: Mapping[str, Path], extra: Mapping[str, Sequence[Path]]) -> None:
    """Refuse label maps and further files, by case id, that could not be written, before anything is predicted."""
    images = {identify(path) for case in cases for path in case.images}
    if overwritten := next((path for path in targets.values() if identify(path) in images), None):
        raise UserError("would be overwritten by its own label map", overwritten, "Choose another --output.")
    further = [path for paths in extra.values() for path in paths]
    written = [*targets.values(), *further]
    if too_long := next((path for path in written if len(path.name.encode()) > _NAME_BYTES), None):
        what = f"has a longer name than file systems allow ({_NAME_BYTES} bytes)"
        raise UserError(what, too_long, f"Rename the image{', or leave out its maps' if further else ''}.")
    times = Counter(str(path).lower() for path in written)  # some systems take both letter cases for the same
    if twice := next((path for path in written if times[str(path).lower()] > 1), None):
        raise UserError("would be written twice, for two cases or labels", twice, "Rename one.")


def _map_file(target: Path, name: str) -> Path:
    """Return the file of a map, by its name in `ExtraMaps`, of the image with a label map."""
    folder, _, of = name.partition("/")
    return target.parent / folder / f"{case_of(target)}_{file_name(of)}.nii.gz"


def _read_ahead(
    reader: ThreadPoolExecutor,
    read: Callable[[Case], PreparedImage],
    cases: Iterable[Case],
    most: int,
    size: int = _READING,
) -> Iterator[Future[PreparedImage]]:
    """Yield the image of each case, in order, while the next ones are read: one, or as many as fit into memory.

    `size` is what one takes, in sizes of a preprocessed image.
    """
    waiting: deque[Future[PreparedImage]] = deque()
    n_ahead = 1
    for case in cases:
        waiting.append(reader.submit(read, case))
        if len(waiting) <= n_ahead:
            continue
        source = waiting.popleft()
        yield source
        if source.exception() is None:
            n_ahead = cases_in_flight(size * source.result().nbytes, most)
        del source
    while waiting:
        yield waiting.popleft()


def array_on_disk(folder: Path, shape: Sequence[int]) -> np.ndarray:
    """Return zeros (z, y, x), uint8, in a file without a name, which disappears with the array or the process.

    Maps may be larger than the memory.
    """
    with TemporaryFile(dir=folder) as file:
        try:
            allocate(file, prod(shape), folder)  # otherwise a full disk ends the process by SIGBUS
        except OSError as error:
            if lacks_space(error):
                raise no_space(folder, "each map needs", prod(shape), error.errno) from None
            raise
        return np.memmap(file, np.uint8, "r+", shape=tuple(shape))
