"""Predicting many images into a folder: the next is read, and the last one written, while the networks work."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from nnunet_lite.data.dataset import Case
from nnunet_lite.data.dicom_seg import require_dicom, write_dicom_seg
from nnunet_lite.data.formats import write_share
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import is_dicom, label_suffix, suffix_of, write_label
from nnunet_lite.errors import UserError, describe
from nnunet_lite.inference.maps import STEPS, Wanted
from nnunet_lite.inference.predictor import Model, segment
from nnunet_lite.inference.prepare import Ready, ready_case
from nnunet_lite.workspace import atomic

Finish = Callable[[np.ndarray, Geometry], np.ndarray]  # what is done with a label map (z, y, x) before it is written

_UNFIT = str.maketrans(dict.fromkeys('/\\:*?"<>| ', "_"))  # for the name of a file


class _Predicted(NamedTuple):
    """What is to be written of a case, and the folder that holds its maps (name -> array) until then."""

    segmentation: np.ndarray
    maps: dict[str, np.ndarray]
    scratch: ExitStack


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
    """Predict cases into a folder, one label map each, in the format of its image.

    A case that fails does not stop the others.

    Parameters
    ----------
    wanted : maps to write beside the label maps, into folders of `out` named probabilities and uncertainty.
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
    """
    targets = {case.id: output_file(case, out, dicom_seg) for case in cases}
    inputs = {path.resolve() for case in cases for path in case.images}
    if overwritten := next((path for path in targets.values() if path.resolve() in inputs), None):
        raise UserError("would be overwritten by its own label map", overwritten, "Choose another --output.")
    if dicom_seg:
        require_dicom()
        if strange := next((case.images[0] for case in cases if not is_dicom(case.images[0])), None):
            raise UserError("is no DICOM series, so it can have no DICOM segmentation", strange)
    out.mkdir(parents=True, exist_ok=True)
    done = [path for path in targets.values() if skip_existing and path.is_file()]
    todo = [case for case in cases if targets[case.id] not in done]
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead: list[Future[Ready]] = []
        written: list[tuple[Case, Future[None]]] = []
        for i, case in enumerate(show(todo, len(todo), "predict")):
            ahead += [reader.submit(ready_case, model, c, accept_geometry) for c in todo[i + len(ahead) : i + 2]]
            try:
                ready = ahead.pop(0).result()
                found = _predict(model, ready, None if previous is None else previous(case.id), wanted, out)
            except Exception as error:  # whatever is wrong with one case, the others are predicted
                _stop_if_full(error, out)
                failed[case.id] = describe(error)
                continue
            written.append((case, writer.submit(_write, model, case, targets[case.id], ready, found, finish)))
        for case, future in written:
            try:
                future.result()
                done.append(targets[case.id])
            except Exception as error:
                _stop_if_full(error, out)
                failed[case.id] = describe(error)
    return sorted(done), failed


def _stop_if_full(error: Exception, out: Path) -> None:
    """A full disk is not the fault of one case, and no other would fare better."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(error.errno, error.strerror, str(out)) from None


def output_file(case: Case, out: Path, dicom_seg: bool = False) -> Path:
    """Where the label map of a case goes: its id, in the format of its image."""
    return out / f"{case.id}{'.dcm' if dicom_seg else label_suffix(suffix_of(case.images[0]))}"


def _predict(model: Model, ready: Ready, previous: np.ndarray | None, wanted: Wanted | None, out: Path) -> _Predicted:
    """Predict a case; its maps, which may be larger than the memory, lie in files until they are written."""
    maps: dict[str, np.ndarray] = {}
    with ExitStack() as scratch:
        folder = Path(scratch.enter_context(TemporaryDirectory(prefix=".tmp-", dir=out))) if wanted else out

        def new_map(name: str) -> np.ndarray:
            shape = ready.prepared.placement.geometry.shape
            maps[name] = np.memmap(folder / f"{len(maps)}.raw", np.uint8, "w+", shape=shape)
            return maps[name]

        return _Predicted(segment(model, ready, previous, wanted, new_map), maps, scratch.pop_all())


def _write(model: Model, case: Case, target: Path, ready: Ready, found: _Predicted, finish: Finish | None) -> None:
    """Write the maps of a case, and its label map last: where that is, all is."""
    geometry = ready.prepared.placement.geometry
    with found.scratch:
        for name, array in found.maps.items():
            folder, _, of = name.partition("/")
            with atomic(target.parent / folder / f"{case.id}_{of.translate(_UNFIT)}.nii.gz") as temporary:
                write_share(temporary, array, geometry, STEPS)
        labels = found.segmentation if finish is None else finish(found.segmentation, geometry)
        if target.suffix == ".dcm":
            write_dicom_seg(target, labels, case.images[0], model.plan.labels)
        else:
            write_label(target, labels, geometry, like=case.images[0])
