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
from nnunet_lite.data.images import read_images, read_label, write_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import Format, case_of, format_of
from nnunet_lite.data.nifti import write_nifti
from nnunet_lite.data.problems import few, plural
from nnunet_lite.data.slicer import needs_layers
from nnunet_lite.errors import UserError, describe
from nnunet_lite.files import allocate, atomic, lacks_space, must_be_writable, no_space, sweep
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


@dataclass(frozen=True)
class _Call:
    """What all cases of a call of `predict_cases` share, by the names of its parameters; `files` are by case id."""

    predictor: Predictor
    out: Path
    outputs: Outputs
    files: dict[str, _CaseFiles]
    report: Callable[[CaseResult], None]
    stage_classes: Callable[[str], np.ndarray] | None
    accept_geometry: bool

    @property
    def plan(self) -> Plan:
        return self.predictor.plan

    def find_existing(self) -> tuple[set[str], set[str]]:
        """Return the ids of cases that have all files, and of those that can be completed from their label map."""
        complete, incomplete = set[str](), set[str]()
        if not self.outputs.skip_existing:
            return complete, incomplete
        measured = read_statistics(self.out) if self.outputs.statistics else {}
        # as values of the dataset
        readable = (None, "nifti") if needs_layers(self.plan.labels) else (None, "nifti", "seg.nrrd")
        for name, of in self.files.items():
            if not all(path.is_file() for path in (of.label_map, *of.maps.values())):
                continue
            is_measured = not self.outputs.statistics or case_of(of.label_map) in measured
            if is_measured and all(path.is_file() for path in of.masks.values()):
                complete.add(name)
            elif format_of(of.label_map) in readable:
                incomplete.add(name)
        return complete, incomplete

    def complete(self, case: Case) -> None:
        """Make statistics and files of labels from a label map that exists."""
        image, file = read_case_image(self.plan, case, self.accept_geometry), self.files[case.id].label_map
        label_map = read_label(file, image.geometry)[0]
        if label_map.shape != image.geometry.shape:
            raise UserError("is the label map of another image", file, "Choose another --output.")
        self._write_masks(case, label_map, image.geometry)
        if self.outputs.statistics:
            self.report(CaseResult(file, case, KEPT, None, self._measure(label_map, image.array, image.geometry)))

    def prepare(self, case: Case) -> PreparedImage:
        """Read and preprocess an image."""
        return prepare_image(self.predictor, read_case_image(self.plan, case, self.accept_geometry))

    def predict(self, case: Case, source: Future[PreparedImage]) -> _Prediction:
        """Predict an image, and judge the prediction."""
        prepared = source.result()
        began = time.monotonic()
        calibrated, maps = self.predictor.quality if self.outputs.quality else None, self.outputs.maps
        if calibrated is not None:
            maps = self.predictor.add_quality_maps(maps)
        classes = None if self.stage_classes is None else self.stage_classes(case.id)
        label_map, arrays = segment(self.predictor, prepared, classes, maps, partial(array_on_disk, self.out))
        judged = None
        if calibrated is not None:
            features = describe_prediction(prepared.arrays[0], label_map, arrays, self.plan.labels)
            judged = judge(calibrated, features)
        geometry = prepared.arrays[0].placement.geometry
        return _Prediction(geometry, label_map, arrays, judged, time.monotonic() - began)

    def write(self, case: Case, prediction: _Prediction) -> None:
        """Write all files of a case; the label map is the last one: if it exists, the case is complete."""
        of, label_map, geometry = self.files[case.id], prediction.label_map, prediction.geometry
        of.label_map.unlink(missing_ok=True)  # an older one beside new files would be taken for theirs
        for name, file in of.maps.items():
            with atomic(file) as temporary:
                write_nifti(temporary, prediction.maps[name], geometry, 1 / STEPS, case.images[0])
        if self.outputs.postprocess is not None:
            label_map = self.outputs.postprocess(label_map, geometry.spacing)
        self._write_masks(case, label_map, geometry)
        sizes = None
        if self.outputs.statistics:  # what there is to say about the image was said when it was read first
            image = read_images(case.images, len(self.plan.channels), self.accept_geometry)
            sizes = self._measure(label_map, image.array, geometry)
        seconds = round(prediction.seconds, 2)
        self.report(CaseResult(of.label_map, case, "written", seconds, sizes, prediction.quality))
        write_segmentation(of.label_map, label_map, geometry, self.plan.labels, case.images[0])

    def _write_masks(self, case: Case, label_map: np.ndarray, geometry: Geometry) -> None:
        for label, file in self.files[case.id].masks.items():
            mask = np.isin(label_map, self.plan.labels.segments[label])
            write_label(file, mask, geometry, like=case.images[0])

    def _measure(self, label_map: np.ndarray, array: np.ndarray, geometry: Geometry) -> dict[str, dict[str, Any]]:
        channels = [channel.name for channel in self.plan.channels]
        return measure_labels(label_map, array, geometry, self.plan.labels, channels)


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
    must_be_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    for folder in (out / "probabilities", out / "uncertainty", *out.glob(f"{SEGMENTATIONS}/*")):
        sweep(folder)  # of a killed run; this one may write nothing there
    call = _Call(predictor, out, outputs, files, report, stage_classes, accept_geometry)
    complete, incomplete = call.find_existing()
    existing = complete | incomplete
    todo = [case for case in cases if case.id not in existing]
    if existing:
        log.info(f"{out}: {plural(len(existing), 'label map')} kept, {len(todo)} to predict")
    if n_replaced := sum(files[case.id].label_map.is_file() for case in todo):
        why = "files that are made with them are missing" if outputs.skip_existing else "--continue keeps them"
        log.info(f"{out}: {plural(n_replaced, 'label map')} will be replaced; {why}")
    failed: dict[str, str] = {}
    partial_cases = [case for case in cases if case.id in incomplete]
    for case in log.progress(partial_cases, len(partial_cases), "complete") if partial_cases else ():
        with _recorded(failed, case):
            call.complete(case)
    n_readers = 1 if predictor.device.type == "cpu" else min(cpus(), _MOST_READERS)  # a CPU computes at the same time
    size = _READING + _MEASURING * outputs.statistics
    with ThreadPoolExecutor(n_readers) as reader:
        images = _read_ahead(reader, call.prepare, todo, n_readers, size)
        oriented = _predict_and_write(call, images, len(todo), failed)
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
    call: _Call, images: Iterator[tuple[Case, Future[PreparedImage]]], total: int, failed: dict[str, str]
) -> dict[str, list[str]]:
    """Predict images in turn while a thread writes those before; return the ids of each orientation."""
    oriented = defaultdict[str, list[str]](list)
    queue = deque[tuple[Case, Future[None]]]()
    with ThreadPoolExecutor(1) as writer, log.working("predict", total) as advance:
        for case, source in images:
            with _recorded(failed, case):
                prediction = call.predict(case, source)
                if own := prediction.geometry.orientation:
                    oriented[own].append(case.id)
                queue.append((case, writer.submit(call.write, case, prediction)))
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
