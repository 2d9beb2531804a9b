"""Predicting many images into a folder: the next is read, and the last one written, while the networks work."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.cases import Case, split_name
from nnunet_lite.data.dicom_seg import require_dicom, write_dicom_seg
from nnunet_lite.data.formats import require_picture_values
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import is_dicom, label_suffix, read_geometry, write_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import PICTURES, stem, suffix_of
from nnunet_lite.data.nifti import write_share
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError, describe
from nnunet_lite.files import atomic, lacks_space, no_space
from nnunet_lite.inference.maps import STEPS, Wanted
from nnunet_lite.inference.predictor import Model, segment
from nnunet_lite.inference.prepare import Ready, ready_case
from nnunet_lite.preprocessing.pipeline import output_values

Finish = Callable[[np.ndarray, Geometry], np.ndarray]  # what is done with a label map (z, y, x) before it is written

_UNFIT = str.maketrans(dict.fromkeys('/\\:*?"<>| ', "_"))  # for the name of a file


class _Predicted(NamedTuple):
    """What is to be written of a case: its label map, and its maps (name -> array)."""

    segmentation: np.ndarray
    maps: dict[str, np.ndarray]


def predict_cases(
    model: Model,
    cases: Sequence[Case],
    out: Path,
    *,
    wanted: Wanted | None = None,
    dicom_seg: bool = False,
    skip_existing: bool = False,
    show: Callable[[Iterable[Case], int, str], Iterable[Case]] = lambda cases, total, what: cases,
    previous: Callable[[str], np.ndarray] | None = None,
    finish: Finish | None = None,
    accept_geometry: bool = False,
) -> tuple[list[Path], dict[str, str]]:
    """Predict cases into a folder, one label map each, in the format of its image; a single case also into a file.

    A case that fails does not stop the others.

    Parameters
    ----------
    out : a folder, or of a single case the name of its label map, whose ending decides the format.
    wanted : maps to write beside the label maps, into folders there that are named probabilities and uncertainty.
    dicom_seg : write DICOM segmentations; the images must be DICOM series.
    previous : gives the classes that a case's previous stage predicts on the grid of its preprocessed array, for the
        second stage of a cascade that was loaded alone.
    finish : what is done with each label map before it is written, such as postprocessing.
    accept_geometry : whether the files of a case's channels may differ in origin and direction.

    Returns
    -------
    The label maps (those that were there before too), and case id -> what was wrong for the cases that failed.

    Raises
    ------
    UserError : a label map would overwrite an input, or a DICOM segmentation is wanted of what is no DICOM series.
    OSError : the disk is full.
    """
    targets = {case.id: output_file(case, out, dicom_seg) for case in cases}
    inputs = {_identity(path) for case in cases for path in case.images}
    if overwritten := next((path for path in targets.values() if _identity(path) in inputs), None):
        raise UserError("would be overwritten by its own label map", overwritten, "Choose another --output.")
    if dicom_seg:
        require_dicom()
        if strange := next((case.images[0] for case in cases if not is_dicom(case.images[0])), None):
            raise UserError("is no DICOM series, so it can have no DICOM segmentation", strange)
    out = out.parent if names_file(out) else out
    out.mkdir(parents=True, exist_ok=True)
    done = [path for path in targets.values() if skip_existing and path.is_file()]
    todo = [case for case in cases if targets[case.id] not in done]
    failed: dict[str, str] = {}
    turned: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead: list[Future[Ready]] = []
        written: list[tuple[Case, Future[None]]] = []
        for i, case in enumerate(show(todo, len(todo), "predict")):
            ahead += [reader.submit(ready_case, model, c, accept_geometry) for c in todo[i + len(ahead) : i + 2]]
            try:
                ready = ahead.pop(0).result()
                found = _predict(model, ready, None if previous is None else previous(case.id), wanted, out)
            except Exception as error:  # whatever is wrong with one case, the others are predicted
                _stop_if_full(error)
                failed[case.id] = describe(error)
                continue
            own = ready.prepared.placement.geometry.orientation
            if own != (ready.plan.orientation or own) and own is not None:
                turned[own].append(case.id)
            written.append((case, writer.submit(_write, model, case, targets[case.id], ready, found, finish)))
        for case, future in written:
            try:
                future.result()
                done.append(targets[case.id])
            except Exception as error:
                _stop_if_full(error)
                failed[case.id] = describe(error)
    if turned:
        stored = ", ".join(f"{plural(len(ids), 'image')} stored as {own} ({few(ids)})" for own, ids in turned.items())
        log.info(f"turned to {model.plan.orientation}, the orientation of the model: {stored}")
    return sorted(done), failed


def _stop_if_full(error: Exception) -> None:
    """A full disk is not the fault of one case, and no other would fare better."""
    if lacks_space(error):
        raise error


def names_file(out: Path) -> bool:
    """Whether an output is the name of a label map, and not a folder."""
    return (suffix_of(out) != "" or out.suffix.lower() == ".dcm") and not out.is_dir()


def output_file(case: Case, out: Path, dicom_seg: bool = False) -> Path:
    """Where the label map of a case goes: its id, in the format of its image; or `out`, if that names a file."""
    if names_file(out):
        return out
    return out / f"{case.id}{'.dcm' if dicom_seg else label_suffix(suffix_of(case.images[0]))}"


def check_output(sources: Sequence[Path], cases: Sequence[Case], out: Path, labels: Labels, dicom_seg: bool) -> None:
    """Refuse an output that the label maps cannot have, before anything is predicted.

    Parameters
    ----------
    sources : the files and folders in which the cases were found.

    Raises
    ------
    UserError : one file for several cases, or in a format that cannot hold the label map; or the label maps would be
        written where the same command takes them for images the next time.
    """
    if names_file(out):
        _must_fit_one_file(cases, out, labels, dicom_seg)
    folder = out.parent if names_file(out) else out
    given = {_identity(source) for source in sources if source.is_dir()}
    holders = {path if path.is_dir() else path.parent for case in cases for path in case.images}
    of_one_case = {holder for holder in holders if _identity(holder) not in given and _identity(holder.parent) in given}
    searched = given | {_identity(holder) for holder in of_one_case}
    would_be_searched = {_identity(holder.parent) for holder in of_one_case}
    beside_channels = any(
        len(case.images) > 1 and split_name(stem(case.images[0]))[0] == stem(output_file(case, out, dicom_seg))
        for case in cases
        if _identity(case.images[0].parent) == _identity(folder)
    )
    if _identity(folder) in searched or _identity(folder.parent) in would_be_searched or beside_channels:
        what = "would hold images and label maps, which the next prediction would take for images"
        raise UserError(what, out, "Choose another --output.")


def _must_fit_one_file(cases: Sequence[Case], out: Path, labels: Labels, dicom_seg: bool) -> None:
    """Refuse a name of a label map that is not for one image, or whose format cannot hold its label map."""
    if len(cases) > 1:
        raise UserError(f"names one label map, and there are {len(cases)} images", out, "Give a folder.")
    if dicom_seg != (out.suffix.lower() == ".dcm"):
        raise UserError("a DICOM segmentation ends in .dcm, and needs --dicom-seg", out)
    suffix = suffix_of(out)
    if not dicom_seg and label_suffix(suffix) != suffix:
        raise UserError(f"label maps cannot be written as {suffix}", out, f"Use {label_suffix(suffix)}.")
    if suffix in PICTURES:
        require_picture_values(out, output_values(labels), read_geometry(cases[0].images[0])[0])


def _identity(path: Path) -> tuple[object, ...]:
    """What two paths share exactly where they lead to the same file or folder, by links or in other letters' case."""
    try:
        stat = path.stat()
    except OSError:
        return (path.resolve(),)
    return (stat.st_dev, stat.st_ino)


def _predict(model: Model, ready: Ready, previous: np.ndarray | None, wanted: Wanted | None, out: Path) -> _Predicted:
    """Predict a case; its maps, which may be larger than the memory, lie in files until they are written."""
    maps: dict[str, np.ndarray] = {}

    def new_map(name: str) -> np.ndarray:
        maps[name] = _nameless(out, ready.prepared.placement.geometry.shape)
        return maps[name]

    return _Predicted(segment(model, ready, previous, wanted, new_map), maps)


def _nameless(folder: Path, shape: Sequence[int]) -> np.ndarray:
    """Zeros (z, y, x), uint8, in a file without a name: it is gone with the array, however this process ends."""
    with TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, prod(shape))  # else a full disk would end the process by SIGBUS
        except OSError as error:
            if lacks_space(error):
                raise no_space(folder, "each map needs", prod(shape), error.errno) from None
            raise
        return np.memmap(file, np.uint8, "r+", shape=tuple(shape))


def _write(model: Model, case: Case, target: Path, ready: Ready, found: _Predicted, finish: Finish | None) -> None:
    """Write the maps of a case, and its label map last: where that is, all is."""
    geometry = ready.prepared.placement.geometry
    for name, array in found.maps.items():
        folder, _, of = name.partition("/")
        with atomic(target.parent / folder / f"{stem(target)}_{of.translate(_UNFIT)}.nii.gz") as temporary:
            write_share(temporary, array, geometry, STEPS, like=case.images[0])
    labels = found.segmentation if finish is None else finish(found.segmentation, geometry)
    if target.suffix == ".dcm":
        write_dicom_seg(target, labels, case.images[0], model.plan.labels)
    else:
        write_label(target, labels, geometry, like=case.images[0])
