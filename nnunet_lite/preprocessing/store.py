"""The store of a dataset's preprocessed cases: make what is missing, open a case, delete what no plan needs.

preprocessed/
  raw.json                   stamps of the raw files, see raw_files.py
  3d_fullres-1c9a4e0b.json   for a configuration and its recipe: case id -> folder in cases/
  cases/case_001-5f.../      see stored_case.py
  teachers/                  what models predict of the cases, see inference/teachers.py

The name of a case's folder contains a hash of the raw files and of the recipe. So a changed label map makes one case
again, a changed patch size none, and configurations whose arrays are equal share one copy. A run after a killed one
continues with the next case.

Read `preprocess_dataset` first, then `recipe_of` and `make_case`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

from nnunet_lite import log, system
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, read_case
from nnunet_lite.data.geometry import Turn
from nnunet_lite.data.problems import name_cases, plural
from nnunet_lite.data.raw_files import RawCase, read_stamps, scan_raw_cases, unchanged_cases, write_stamps
from nnunet_lite.errors import UserError, describe
from nnunet_lite.files import SPARE, hash_of, lacks_space, locked, no_space, read_json, size_of, sweep, write_json
from nnunet_lite.planning.schema import Configuration, Plan, exact_storage
from nnunet_lite.preprocessing import pipeline
from nnunet_lite.preprocessing.resampling import one_blas_thread
from nnunet_lite.preprocessing.stored_case import StoredCase, is_whole, read_stored_case, write_stored_case
from nnunet_lite.workspace import RAW_IS_GONE

# (function, items, what for) -> (item, result or exception), as they end
Spread = Callable[[Callable[[Any], Any], Sequence[Any], str], Iterable[tuple[Any, Any]]]

_VERSION = 1  # of how the arrays are made: raising it makes every case again
_COMPRESSED = 0.5  # of the size in memory, for the estimate; 0.2 was measured for skull-stripped MR, 0.6 for CT
_ID_BYTES = 200  # of a case id in the name of its folder: file systems allow 255 for all of it
_SMALL = 1 << 18  # values of a case below which more than two threads only wait for Python's lock
_SHOWN = 5  # failures that an error names


@dataclass(frozen=True)
class PreprocessingSummary:
    """What a preprocessing run did.

    Parameters
    ----------
    cases : dict of str to int
        Cases by configuration.
    made, kept : int
        Arrays that were made, and that existed before.
    raw_bytes, stored_bytes : int
        Size of the raw files and of the store.
    estimate : int
        Estimated bytes of the arrays that were made.
    """

    cases: dict[str, int]
    made: int
    kept: int
    raw_bytes: int
    stored_bytes: int
    estimate: int

    def to_text(self) -> str:
        counts = ", ".join(f"{name} {n}" for name, n in self.cases.items())
        ratio = self.stored_bytes / max(1, self.raw_bytes)
        size = f"{system.in_units(self.stored_bytes)} on disk, {ratio:.2f} x the raw files"
        estimate = f" ({system.in_units(self.estimate)} were estimated)" if self.made else ""
        return f"cases: {counts}; {self.made} arrays made, {self.kept} kept\n{size}{estimate}"

    __repr__ = to_text


@dataclass(frozen=True)
class MissingCase:
    """A case, and the folders that it lacks.

    Parameters
    ----------
    case : Case
        The case.
    raw : RawCase
        Its stamps.
    folders : dict of Path to tuple
        For each folder the configuration that it is made for, and the resampled shape.
    """

    case: Case
    raw: RawCase
    folders: dict[Path, tuple[Configuration, pipeline.Shape]]

    def memory(self, channels: int) -> int:
        """About the bytes that making it takes: as read and normalised, then normalised, resampled, packed."""
        before = prod(self.raw.shape)
        after = max(prod(shape) for _, shape in self.folders.values())
        return max((8 * channels + 6) * before, (4 * channels + 2) * before + (8 * channels + 3) * after)

    def disk(self, plan: Plan) -> int:
        """About the bytes that its folders take."""
        voxels = sum(prod(shape) for _, shape in self.folders.values())
        return int(_COMPRESSED * voxels * (len(plan.channels) * (2 if plan.stored_as == "float16" else 4) + 1))


def preprocess_dataset(
    dataset: Dataset,
    plan: Plan,
    configurations: Sequence[str],
    folder: Path,
    workers: int | None = None,
    spread: Spread | None = None,
) -> PreprocessingSummary:
    """Preprocess every case for some configurations; arrays that exist are kept.

    Parameters
    ----------
    dataset : Dataset
        The raw cases.
    plan : Plan
        How they are preprocessed.
    configurations : sequence of str
        Names of configurations.
    folder : Path
        The dataset's `preprocessed` folder in the workspace.
    workers : int, optional
        The most cases at once; None follows from memory and CPUs, 0 works in this thread.
    spread : callable, optional
        Does the work on other machines, see cluster.py.

    Returns
    -------
    PreprocessingSummary
        Counts and sizes.

    Raises
    ------
    UserError
        A configuration is unknown, the disk has too little space, or cases failed. The message names them with their
        files; the other cases are done nevertheless.
    """
    names = tuple(dict.fromkeys(configurations))
    for name in names:
        plan.configuration(name)
    with locked(folder, "preprocessing"):
        _sweep(folder)
        stamps = folder / "raw.json"
        known = read_stamps(folder.parent / stamps.name) | read_stamps(stamps)  # planning has read the files too
        raw, failed = scan_raw_cases(dataset.cases, known, workers)
        if not raw and not dataset.root.is_dir():
            raise UserError("the raw data are not there any more", dataset.root, RAW_IS_GONE)
        index = {name: _case_folders(dataset, plan, name, raw) for name in names}
        missing = _missing_cases(dataset, plan, index, raw, folder)
        estimate = sum(case.disk(plan) for case in missing)
        system.require_space(folder, estimate)
        made = sum(len(case.folders) for case in missing)
        other = [one.case.id for one in missing if known.get(one.case.id, one.raw).digests != one.raw.digests]
        if other:
            log.info(f"the raw files of {name_cases(other)} have changed, and are preprocessed again")
        if missing:
            log.info(f"{made} arrays to make, about {system.in_units(estimate)} of disk")
            if plan.stored_as == "float16" and exact_storage(plan.channels) == "float32":
                log.warn("the plan stores images as float16, which rounds 16-bit values that are not standardised by "
                         "up to 16; `nnlite plan DATA --store float32` keeps all digits")  # fmt: skip
        failed |= _make_cases(missing, dataset, plan, workers, spread)
        _sweep(folder)
        if full := next((error for error in failed.values() if lacks_space(error)), None):
            left = [case for case in missing if not all(is_whole(path) for path in case.folders)]
            needed = sum(case.disk(plan) for case in left) + SPARE
            what = f"the {plural(len(left), 'case')} left need{'s' * (len(left) == 1)} about"
            raise no_space(folder, what, needed, full.errno)
        write_stamps(stamps, raw)
        for name, folders in index.items():
            done = {case_id: key for case_id, key in folders.items() if (folder / "cases" / key).is_dir()}
            write_json(_index_file(folder, plan, name), done)
    if failed:
        raise _failure(failed, dataset)
    paths = {folder / "cases" / key for folders in index.values() for key in folders.values()}
    counts = {name: len(folders) for name, folders in index.items()}
    raw_bytes, stored_bytes = sum(stamp.size for stamp in raw.values()), sum(size_of(path) for path in paths)
    return PreprocessingSummary(counts, made, len(paths) - made, raw_bytes, stored_bytes, estimate)


def is_preprocessed(dataset: Dataset, plan: Plan, configurations: Sequence[str], folder: Path) -> bool:
    """Check that every case is stored for some configurations, made of the raw files as they are; reads none of them.

    Parameters are those of `preprocess_dataset`.
    """
    raw = unchanged_cases(dataset.cases, folder / "raw.json")
    return len(raw) == len(dataset.cases) and all(
        _index_file(folder, plan, name).is_file()
        and all(is_whole(folder / "cases" / key) for key in _case_folders(dataset, plan, name, raw).values())
        for name in configurations
    )


def open_case(folder: Path, plan: Plan, configuration: str, case_id: str) -> StoredCase:
    """Open a preprocessed case from the dataset's `preprocessed` folder.

    Raises
    ------
    UserError
        It is not preprocessed for that configuration of that plan.
    """
    index = _index_file(folder, plan, configuration)
    key = _read_index(index, index.stat().st_mtime_ns).get(case_id) if index.is_file() else None
    if key is None or not is_whole(folder / "cases" / key):
        raise UserError(f"case {case_id} is not preprocessed for {configuration}", folder, "Run `nnlite preprocess`.")
    return read_stored_case(folder / "cases" / key, case_id)


# --------------------------------------------------------------------------------------------- what a case is made of


def recipe_of(plan: Plan, configuration: Configuration, spacing: Sequence[float]) -> dict[str, Any]:
    """Return what of a plan decides the arrays that a case is made into, at a target spacing (mm)."""
    labels, resampling = plan.labels, configuration.resampling.model_dump()
    outside = {"outside": labels.outside_class} if any(c.use_mask for c in plan.channels) else {}
    # version 1 clipped outside of the mask too
    is_clipped_inside = any(c.use_mask and c.clip_percentiles for c in plan.channels)
    return {
        **outside,
        "version": _VERSION + is_clipped_inside,
        "axis_order": plan.axis_order,
        "channels": [(c.normalization, c.use_mask, c.clip_percentiles, c.statistics_used) for c in plan.channels],
        "labels": (labels.values, labels.ignore, labels.region_classes if labels.has_regions else None),
        "spacing": tuple(spacing),
        "resampling": [value for key, value in resampling.items() if not key.startswith("logits")],
    }


def _case_folders(dataset: Dataset, plan: Plan, name: str, raw: Mapping[str, RawCase]) -> dict[str, str]:
    """The name of each case's folder: its id, cut to what a name may hold, and a hash of its files and the recipe."""
    configuration, value_map = plan.configuration(name), sorted((dataset.value_map or {}).items())
    folders = {}
    for case_id, stamps in raw.items():
        recipe = recipe_of(plan, configuration, _resampled_grid(stamps, plan, configuration)[0])
        if pipeline.turn_for(plan, stamps.orientation) != Turn(plan.axis_order):
            recipe["orientation"] = plan.orientation
        short = case_id.encode()[:_ID_BYTES].decode(errors="ignore")
        folders[case_id] = f"{short}-{hash_of([recipe, stamps.digests, value_map, plan.stored_as])}"
    return folders


def _resampled_grid(raw: RawCase, plan: Plan, configuration: Configuration) -> tuple[pipeline.Spacing, pipeline.Shape]:
    """Spacing (mm) and shape of a case in a configuration, transposed axes."""
    order = pipeline.turn_for(plan, raw.orientation).order
    spacing = pipeline.transposed(raw.spacing, order)
    target = pipeline.resampled_spacing(configuration, spacing)
    return target, pipeline.resampled_shape([raw.shape[axis] for axis in order], spacing, target)


# -------------------------------------------------------------------------------------------------- making the cases


def _missing_cases(
    dataset: Dataset, plan: Plan, index: Mapping[str, dict[str, str]], raw: Mapping[str, RawCase], folder: Path
) -> list[MissingCase]:
    """The cases that lack a folder, the largest first; a 3D configuration comes first where several share one."""
    order = sorted(index, key=lambda name: -plan.configurations[name].dimensions)
    missing = []
    for case in (case for case in dataset.cases if case.id in raw):
        folders: dict[Path, tuple[Configuration, pipeline.Shape]] = {}
        for name in order:
            path, configuration = folder / "cases" / index[name][case.id], plan.configurations[name]
            if path not in folders and not is_whole(path):
                folders[path] = configuration, _resampled_grid(raw[case.id], plan, configuration)[1]
        if folders:
            missing.append(MissingCase(case, raw[case.id], folders))
    return sorted(missing, key=lambda case: -prod(case.raw.shape))


def _make_cases(
    missing: Sequence[MissingCase], dataset: Dataset, plan: Plan, workers: int | None, spread: Spread | None
) -> dict[str, Exception]:
    """Make all missing cases, here or on other machines; return the failures by case id."""
    if not missing:
        return {}
    work = partial(make_case, dataset=replace(dataset, cases=()), plan=plan)
    failed = {}
    for item, result in (spread or partial(_make_here, workers, len(plan.channels)))(work, missing, "preprocess"):
        if isinstance(result, Exception):
            failed[item.case.id] = result
        if lacks_space(result):
            break  # every other case would fail too
    return failed


def _make_here(
    workers: int | None, channels: int, work: Callable[..., None], missing: Sequence[MissingCase], what: str
) -> Iterator[tuple[MissingCase, Exception | None]]:
    """Make cases on this machine, as many at once as memory and CPUs allow; give each with its failure as it ends."""
    needed, free = max(case.memory(channels) for case in missing), system.free_memory()
    if needed > free:
        log.warn(f"the largest case needs about {system.in_units(needed)}, {system.in_units(free)} are free")
    if workers is None and prod(missing[0].raw.shape) * channels < _SMALL:
        workers = 2
    at_once = 0 if workers == 0 else system.cases_in_flight(needed, workers)
    threads = max(1, system.cpus() // at_once) if at_once else 1  # of ours, for each case

    def attempt(case: MissingCase) -> tuple[MissingCase, Exception | None]:
        try:
            work(case, threads=threads)
        except Exception as error:  # any: it is reported with the name of the case, and the other cases are made
            return case, error
        return case, None

    with one_blas_thread():  # once for all cases: setting the limit takes threads of its own
        if not at_once:
            yield from log.progress(map(attempt, missing), len(missing), what)
            return
        pool = ThreadPoolExecutor(at_once, what)
        try:
            futures = as_completed([pool.submit(attempt, case) for case in missing])
            yield from log.progress((future.result() for future in futures), len(missing), what)
        finally:
            pool.shutdown(cancel_futures=True)


def make_case(missing: MissingCase, dataset: Dataset, plan: Plan, threads: int = 1) -> None:
    """Read a case once and make all folders that it lacks.

    Parameters
    ----------
    missing : MissingCase
        The case and its folders.
    dataset : Dataset
        Where it is from; its cases are not needed.
    plan : Plan
        How it is preprocessed.
    threads : int
        Threads for the resampling.

    Raises
    ------
    UserError
        A file of the case cannot be used, or the memory does not suffice.
    OSError
        A file cannot be read or written at the moment; it may be tried again.
    """
    try:
        case = _read_and_prepare(missing.case, dataset, plan)
        for path, (configuration, _) in missing.folders.items():
            if is_whole(path):
                continue  # a worker that was taken for dead has made it meanwhile
            patch = (1,) * (3 - configuration.dimensions) + configuration.patch_size
            write_stored_case(path, pipeline.resample(case, configuration, threads), plan.labels, patch, plan.stored_as)
    except MemoryError as error:
        need, free = (system.in_units(n) for n in (missing.memory(len(plan.channels)), system.free_memory()))
        fix = f"It needs about {need}, {free} are free: use --workers 1, or more memory."
        raise UserError(f"no memory left ({error})", fix=fix) from None


def _read_and_prepare(case: Case, dataset: Dataset, plan: Plan) -> pipeline.Preprocessed:
    """A function of its own, so that the image as read is freed when it returns."""
    image, values = read_case(case, dataset)
    return pipeline.prepare(image, plan.labels.encode(values), plan)


def _failure(failed: Mapping[str, Exception], dataset: Dataset) -> UserError:
    files = {case.id: case.images[0] for case in dataset.cases}
    shown = []
    for case_id in sorted(failed)[:_SHOWN]:
        what, file = describe(failed[case_id]), str(files[case_id])
        shown.append(f"{case_id}: {what}" if file in what else f"{case_id} ({file}): {what}")
    more = f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    what = f"{len(failed)} of {len(dataset.cases)} cases could not be preprocessed: {'; '.join(shown)}{more}"
    return UserError(what.rstrip("."), fix="The others are done. `nnlite check` lists what is wrong with a dataset.")


# ------------------------------------------------------------------------------------------------- files of the store


def _sweep(folder: Path) -> None:
    """Delete what a killed run left incomplete."""
    sweep(folder, alone=True)
    sweep(folder / "cases", alone=True)


def _index_file(folder: Path, plan: Plan, name: str) -> Path:
    configuration = plan.configuration(name)
    return folder / f"{name}-{hash_of(recipe_of(plan, configuration, configuration.spacing))}.json"


@lru_cache(maxsize=8)
def _read_index(path: Path, changed: int) -> dict[str, str]:
    """Case id -> folder; `changed` (ns) makes sure that a rewritten file is read again."""
    return read_json(path)
