"""Predict many images into a folder: the next one is read, and the last one written, while the networks compute."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from traceback import format_exception
from typing import Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import Image, read_images, read_label, write_label
from nnunet_lite.data.labels import Labels
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
from nnunet_lite.inference.segmentation import SEGMENTATIONS, label_file, measure_labels, write_segmentation
from nnunet_lite.planning.schema import Plan
from nnunet_lite.system import cases_in_flight, cpus

# changes a label map (z, y, x) of some spacing before it is written
Postprocess = Callable[[np.ndarray, tuple[float, float, float]], np.ndarray]

_MOST_READERS = 4  # images that are read, cropped, normalised and resampled at once while a GPU computes
_READING = 4  # times the size of a preprocessed image: what reading and preprocessing one takes
_MEASURING = 1  # the same for the image that is read again for its statistics
_MOST_WRITING = 2  # label maps that wait to be written
_NAME_BYTES = 255


@dataclass(frozen=True)
class Outputs:
    """What is written of each case.

    Parameters
    ----------
    maps : ExtraMaps
        Maps to write too, into the folders probabilities and uncertainty.
    format : str, optional
        Of the label maps; default: that of their images.
    per_label : bool
        Write a file for each label too, into the folder segmentations.
    statistics : bool
        Measure the labels, for the report.
    quality : bool
        Judge the predictions, for the report, if that was calibrated for the model.
    skip_existing : bool
        Keep label maps that exist already, unless `maps` of the case are missing. Statistics and files of labels that
        are missing are made from them.
    postprocess : callable, optional
        Changes each label map before it is written.
    """

    maps: ExtraMaps = field(default_factory=ExtraMaps)
    format: Format | None = None
    per_label: bool = False
    statistics: bool = False
    quality: bool = False
    skip_existing: bool = False
    postprocess: Postprocess | None = None


@dataclass(frozen=True)
class _CaseFiles:
    """The files of a case: its label map, its maps by their names, and those of single labels."""

    label_map: Path
    maps: dict[str, Path]
    masks: dict[str, Path]


@dataclass(frozen=True)
class _Prediction:
    """What is predicted of a case; `seconds` is the time from the preprocessed image to the label map."""

    geometry: Geometry
    label_map: np.ndarray
    maps: dict[str, np.ndarray]
    quality: CaseQuality | None
    seconds: float


def predict_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    out: Path,
    outputs: Outputs = Outputs(),
    *,
    report: Callable[[CaseResult], None] = lambda result: None,
    stage_classes: Callable[[str], np.ndarray] | None = None,
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
    outputs : Outputs
        What to write.
    report : callable
        Takes each case before its label map is written; in the end those that failed.
    stage_classes : callable, optional
        Returns the classes that the first stage predicts of a case, by its id, on the grid of its preprocessed array;
        for the second stage of a cascade that was loaded without the first.
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
    plan = predictor.plan
    files = {case.id: _name_files(case, out, outputs, plan.labels) for case in cases}
    _check_files(cases, files)
    out = out.parent if names_file(out) else out
    out.mkdir(parents=True, exist_ok=True)
    for folder in (out / "probabilities", out / "uncertainty", *out.glob(f"{SEGMENTATIONS}/*")):
        sweep(folder)  # of a killed run; this one may write nothing there
    complete, incomplete = _find_existing(files, out, outputs, plan.labels) if outputs.skip_existing else (set(), set())
    existing = complete | incomplete
    todo = [case for case in cases if case.id not in existing]
    if n_replaced := sum(files[case.id].label_map.is_file() for case in todo):
        why = "files that are made with them are missing" if outputs.skip_existing else "--continue keeps them"
        log.info(f"{out}: {plural(n_replaced, 'label map')} will be replaced; {why}")
    failed: dict[str, str] = {}
    read = partial(read_case_image, plan, accept_geometry=accept_geometry)

    def read_again(case: Case) -> np.ndarray:
        """What there is to say about the image was said the first time."""
        return read_images(case.images, len(plan.channels), accept_geometry).array

    partial_cases = [case for case in cases if case.id in incomplete]
    for case in log.progress(partial_cases, len(partial_cases), "complete") if partial_cases else ():
        with _recorded(failed, case):
            _complete_case(case, files[case.id], plan, outputs, read, report)
    n_readers = 1 if predictor.device.type == "cpu" else min(cpus(), _MOST_READERS)  # a CPU computes at the same time
    size = _READING + _MEASURING * outputs.statistics
    with ThreadPoolExecutor(n_readers) as reader:
        images = _read_ahead(reader, lambda case: prepare_image(predictor, read(case)), todo, n_readers, size)
        predict = partial(_predict_case, predictor, stage_classes=stage_classes, outputs=outputs, out=out)
        write = partial(_write_case, files=files, plan=plan, outputs=outputs, read=read_again, report=report)
        oriented = _predict_and_write(images, len(todo), predict, write, failed)
    for case in todo:
        if case.id in failed:
            report(CaseResult(files[case.id].label_map, case, f"failed: {failed[case.id]}"))
    turned = {own: ids for own, ids in oriented.items() if own != (plan.orientation or own)}
    if turned:
        stored = ", ".join(f"{plural(len(ids), 'image')} stored as {own} ({few(ids)})" for own, ids in turned.items())
        log.info(f"turned to {plan.orientation}, the orientation of the model: {stored}")
    return sorted(files[case.id].label_map for case in cases if case.id not in failed), failed


@contextmanager
def _recorded(failed: dict[str, str], case: Case) -> Iterator[None]:
    """Note what is wrong with a case, so that the others are predicted; without disk space none can be written."""
    try:
        yield
    except Exception as error:
        if lacks_space(error):
            raise
        log.detail("".join(format_exception(error)).rstrip())
        failed[case.id] = describe(error)


def _predict_and_write(
    images: Iterator[tuple[Case, Future[PreparedImage]]],
    total: int,
    predict: Callable[[Case, Future[PreparedImage]], _Prediction],
    write: Callable[[Case, _Prediction], None],
    failed: dict[str, str],
) -> dict[str, list[str]]:
    """Predict images in turn while a thread writes those before; return the ids of each orientation."""
    oriented = defaultdict[str, list[str]](list)
    queue = deque[tuple[Case, Future[None]]]()
    with ThreadPoolExecutor(1) as writer, log.working("predict", total) as advance:
        for case, source in images:
            with _recorded(failed, case):
                prediction = predict(case, source)
                if own := prediction.geometry.orientation:
                    oriented[own].append(case.id)
                queue.append((case, writer.submit(write, case, prediction)))
                del prediction
            del source  # or image and maps would be in memory until the next image is predicted
            if len(queue) > _MOST_WRITING:
                _finish_writing(queue, failed)
            advance(1)
        while queue:
            _finish_writing(queue, failed)
    return oriented


def _finish_writing(queue: deque[tuple[Case, Future[None]]], failed: dict[str, str]) -> None:
    case, writing = queue.popleft()
    with _recorded(failed, case):
        writing.result()


def _name_files(case: Case, out: Path, outputs: Outputs, labels: Labels) -> _CaseFiles:
    target, maps = output_file(case, out, outputs.format), {}
    for name in outputs.maps.names:  # such as probabilities/liver
        folder, _, of = name.partition("/")
        maps[name] = target.parent / folder / f"{case_of(target)}_{file_name(of)}.nii.gz"
    masks = {label: label_file(target, label, case.images[0]) for label in labels.segments if outputs.per_label}
    return _CaseFiles(target, maps, masks)


def _check_files(cases: Sequence[Case], files: Mapping[str, _CaseFiles]) -> None:
    """Refuse files, by case id, that could not be written, before anything is predicted."""
    images = {identify(path) for case in cases for path in case.images}
    targets = [of.label_map for of in files.values()]
    if overwritten := next((path for path in targets if identify(path) in images), None):
        raise UserError("would be overwritten by its own label map", overwritten, "Choose another --output.")
    further = [path for of in files.values() for path in (*of.maps.values(), *of.masks.values())]
    written = [*targets, *further]
    if too_long := next((path for path in written if len(path.name.encode()) > _NAME_BYTES), None):
        what = f"has a longer name than file systems allow ({_NAME_BYTES} bytes)"
        raise UserError(what, too_long, f"Rename the image{', or leave out its maps' if further else ''}.")
    times = Counter(str(path).lower() for path in written)  # some systems take both letter cases for the same
    if twice := next((path for path in written if times[str(path).lower()] > 1), None):
        raise UserError("would be written twice, for two cases or labels", twice, "Rename one.")


def _find_existing(
    files: Mapping[str, _CaseFiles], out: Path, outputs: Outputs, labels: Labels
) -> tuple[set[str], set[str]]:
    """Return the ids of cases that have all files, and of those whose missing ones can be made from the label map."""
    measured = read_statistics(out) if outputs.statistics else {}
    readable = (None, "nifti") if needs_layers(labels) else (None, "nifti", "seg.nrrd")  # as values of the dataset
    complete, incomplete = set[str](), set[str]()
    for name, of in files.items():
        if not all(path.is_file() for path in (of.label_map, *of.maps.values())):
            continue
        is_measured = not outputs.statistics or case_of(of.label_map) in measured
        if is_measured and all(path.is_file() for path in of.masks.values()):
            complete.add(name)
        elif format_of(of.label_map) in readable:
            incomplete.add(name)
    return complete, incomplete


def _complete_case(
    case: Case,
    files: _CaseFiles,
    plan: Plan,
    outputs: Outputs,
    read: Callable[[Case], Image],
    report: Callable[[CaseResult], None],
) -> None:
    """Make statistics and files of labels from a label map that exists."""
    image = read(case)
    label_map = read_label(files.label_map, image.geometry)[0]
    if label_map.shape != image.geometry.shape:
        raise UserError("is the label map of another image", files.label_map, "Choose another --output.")
    _write_masks(case, files, label_map, image.geometry, plan.labels)
    if outputs.statistics:
        report(CaseResult(files.label_map, case, KEPT, None, _measure(label_map, image.array, image.geometry, plan)))


def _predict_case(
    predictor: Predictor,
    case: Case,
    source: Future[PreparedImage],
    stage_classes: Callable[[str], np.ndarray] | None,
    outputs: Outputs,
    out: Path,
) -> _Prediction:
    """Predict an image, and judge the prediction."""
    prepared = source.result()
    began = time.monotonic()
    calibrated, maps = predictor.quality if outputs.quality else None, outputs.maps
    if calibrated is not None:
        maps = predictor.add_quality_maps(maps)
    classes = None if stage_classes is None else stage_classes(case.id)
    label_map, arrays = segment(predictor, prepared, classes, maps, partial(array_on_disk, out))
    judged = None
    if calibrated is not None:
        features = describe_prediction(prepared.arrays[0], label_map, arrays, predictor.plan.labels)
        judged = judge(calibrated, features)
    geometry = prepared.arrays[0].placement.geometry
    return _Prediction(geometry, label_map, arrays, judged, time.monotonic() - began)


def _write_case(
    case: Case,
    prediction: _Prediction,
    files: Mapping[str, _CaseFiles],
    plan: Plan,
    outputs: Outputs,
    read: Callable[[Case], np.ndarray],
    report: Callable[[CaseResult], None],
) -> None:
    """Write all files of a case; the label map is the last one: if it exists, the case is complete."""
    of, label_map, geometry = files[case.id], prediction.label_map, prediction.geometry
    of.label_map.unlink(missing_ok=True)  # an older one beside new files would be taken for theirs
    for name, file in of.maps.items():
        with atomic(file) as temporary:
            write_nifti(temporary, prediction.maps[name], geometry, 1 / STEPS, case.images[0])
    if outputs.postprocess is not None:
        label_map = outputs.postprocess(label_map, geometry.spacing)
    _write_masks(case, of, label_map, geometry, plan.labels)
    sizes = _measure(label_map, read(case), geometry, plan) if outputs.statistics else None
    report(CaseResult(of.label_map, case, "written", round(prediction.seconds, 2), sizes, prediction.quality))
    write_segmentation(of.label_map, label_map, geometry, plan.labels, case.images[0])


def _write_masks(case: Case, files: _CaseFiles, label_map: np.ndarray, geometry: Geometry, labels: Labels) -> None:
    for label, file in files.masks.items():
        write_label(file, np.isin(label_map, labels.segments[label]), geometry, like=case.images[0])


def _measure(label_map: np.ndarray, array: np.ndarray, geometry: Geometry, plan: Plan) -> dict[str, dict[str, Any]]:
    channels = [channel.name for channel in plan.channels]
    return measure_labels(label_map, array, geometry, plan.labels, channels)


def _read_ahead(
    reader: ThreadPoolExecutor,
    read: Callable[[Case], PreparedImage],
    cases: Iterable[Case],
    most: int,
    size: int = _READING,
) -> Iterator[tuple[Case, Future[PreparedImage]]]:
    """Yield cases with their images, in order, while the next ones are read: one, or as many as fit into memory.

    `size` is what one takes, in sizes of a preprocessed image. Nothing here holds an image that was yielded.
    """
    waiting = deque[tuple[Case, Future[PreparedImage]]]()
    n_ahead = 1
    for case in cases:
        waiting.append((case, reader.submit(read, case)))
        if len(waiting) <= n_ahead:
            continue
        if waiting[0][1].exception() is None:
            n_ahead = cases_in_flight(size * waiting[0][1].result().nbytes, most)
        yield waiting.popleft()
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
