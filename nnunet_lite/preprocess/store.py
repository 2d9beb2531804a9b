"""Preprocessed cases of a data set, addressed by what they were made of.

preprocessed/
  raw.json                   hashes of the raw files, with size and time of change: an unchanged file is not read again
  3d_fullres-1c9a4e0b.json   for a configuration and what of it matters for the arrays: case id -> folder in cases/
  cases/case_001-5f.../      see stored.py

A folder's name holds a hash of the raw files and of the recipe, hence a changed label redoes one case, a changed patch
size none, and configurations whose arrays are equal share one copy. A killed run goes on with the next case.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

from nnunet_lite import budget, log
from nnunet_lite.data.dataset import Case, Dataset, read_case
from nnunet_lite.errors import UserError, describe
from nnunet_lite.plan.schema import Configuration, Plan
from nnunet_lite.preprocess.pipeline import Prepared, prepare, resample, resampled_shape, target_spacing, transposed
from nnunet_lite.preprocess.raw_files import RawCase, remembered, survey
from nnunet_lite.preprocess.stored import LEFTOVER, Precision, StoredCase, read_stored, write_stored
from nnunet_lite.workspace import locked, read_json, write_json

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

_VERSION = 1  # of how the arrays are made: raising it redoes every case
_COMPRESSED = 0.5  # of the size in memory, for the estimate; 0.2 was measured for skull-stripped MR, 0.6 for CT
_SMALL = 1 << 18  # values of a case below which threads are in each other's way more than they help
_SHOWN = 5  # failures that an error names


@dataclass(frozen=True)
class Summary:
    """What a preprocessing run did. Sizes in bytes; `cases` by configuration; `estimate` is the one given before."""

    cases: dict[str, int]
    made: int
    kept: int
    raw_bytes: int
    stored_bytes: int
    estimate: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        counts = ", ".join(f"{name} {n}" for name, n in self.cases.items())
        ratio = self.stored_bytes / max(1, self.raw_bytes)
        size = f"{self.stored_bytes / 1e6:.1f} MB on disk, {ratio:.2f} x the raw files"
        estimate = f" ({self.estimate / 1e6:.1f} MB were estimated)" if self.made else ""
        return f"cases: {counts}; {self.made} arrays made, {self.kept} kept\n{size}{estimate}"


@dataclass
class Job:
    """A case and the folders it lacks, each with the configuration it is made for and the resampled shape."""

    case: Case
    raw: RawCase
    missing: dict[Path, tuple[Configuration, tuple[int, int, int]]] = field(default_factory=dict)

    def memory(self, channels: int) -> int:
        """About the bytes that making it takes: as read and as normalised, then normalised and resampled."""
        before = prod(self.raw.shape)
        after = max(prod(shape) for _, shape in self.missing.values())
        return max((8 * channels + 6) * before, (4 * channels + 2) * before + (6 * channels + 3) * after)

    def disk(self, channels: int, precision: Precision) -> int:
        """About the bytes that its folders take."""
        voxels = sum(prod(shape) for _, shape in self.missing.values())
        return int(_COMPRESSED * voxels * (channels * (2 if precision == "float16" else 4) + 1))


def preprocess_dataset(
    dataset: Dataset,
    plan: Plan,
    configurations: Sequence[str],
    folder: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    precision: Precision | None = None,
) -> Summary:
    """Preprocess every case for some configurations; what is there already is kept.

    Parameters
    ----------
    folder : the data set's `preprocessed` folder in the workspace.
    workers : the most cases at once; None follows from memory and CPUs, 0 works in this thread.
    progress : wraps the loop over the cases, such as `nnunet_lite.log.progress`.
    precision : of the stored images; None for the plan's.

    Raises
    ------
    UserError : no such configuration, too little free disk, or cases that failed, named with their files; the other
        cases are done nevertheless.
    """
    precision = precision or plan.stored_as
    wanted = {name: plan.configuration(name) for name in dict.fromkeys(configurations)}
    with _one_at_a_time(folder):
        _sweep(folder)
        raw = survey(dataset.cases, folder / "raw.json", budget.cpus() if workers is None else workers)
        failed = {name: found for name, found in raw.items() if isinstance(found, Exception)}
        sound = {name: found for name, found in raw.items() if isinstance(found, RawCase)}
        index = {
            name: {case: _key(plan, configuration, case, found, dataset, precision) for case, found in sound.items()}
            for name, configuration in wanted.items()
        }
        jobs = _jobs(dataset, plan, index, sound, folder)
        estimate = sum(job.disk(len(plan.channels), precision) for job in jobs)
        budget.require_space(folder, estimate)
        if jobs:
            log.info(f"{sum(len(job.missing) for job in jobs)} arrays to make, about {estimate / 1e6:.1f} MB of disk")
        failed |= _run(jobs, dataset, plan, workers, progress, precision)
        for name, entries in index.items():
            there = {case: key for case, key in entries.items() if (folder / "cases" / key).is_dir()}
            _write_if_new(_index_path(folder, plan, name), there)
    if failed:
        raise _failure(failed, dataset)
    folders = {folder / "cases" / key for entries in index.values() for key in entries.values()}
    made = sum(len(job.missing) for job in jobs)
    sizes = sum(_size(path) for path in folders)
    counts = {name: len(entries) for name, entries in index.items()}
    return Summary(counts, made, len(folders) - made, sum(f.size for f in sound.values()), sizes, estimate)


def is_preprocessed(dataset: Dataset, plan: Plan, configurations: Sequence[str], folder: Path) -> bool:
    """Whether every case is there for some configurations, made of the raw files as they are; reads none of them."""
    raw = remembered(dataset.cases, folder / "raw.json")
    indices = [_index_path(folder, plan, name) for name in configurations]
    if len(raw) < len(dataset.cases) or not all(path.is_file() for path in indices):
        return False
    return all(
        (folder / "cases" / _key(plan, plan.configuration(name), case, found, dataset, plan.stored_as)).is_dir()
        for name in configurations
        for case, found in raw.items()
    )


def open_case(folder: Path, plan: Plan, configuration: str, case_id: str) -> StoredCase:
    """A preprocessed case, from the data set's `preprocessed` folder.

    Raises
    ------
    UserError : it is not preprocessed for that configuration of that plan.
    """
    path = _index_path(folder, plan, configuration)
    key = _index(path, path.stat().st_mtime_ns).get(case_id) if path.is_file() else None
    if key is None or not (folder / "cases" / key).is_dir():
        raise UserError(f"case {case_id} is not preprocessed for {configuration}", folder, "Run `nnlite preprocess`.")
    return read_stored(folder / "cases" / key, case_id)


def prune(folder: Path, plan: Plan) -> tuple[int, int]:
    """Delete the arrays that no configuration of this plan uses: how many, and their bytes."""
    with _one_at_a_time(folder):
        _sweep(folder)
        indices = {_index_path(folder, plan, name) for name in plan.configurations}
        for path in folder.glob("*-*.json"):
            if path not in indices:
                path.unlink()
        used = {key for path in indices if path.is_file() for key in read_json(path).values()}
        orphans = [path for path in folder.glob("cases/*") if path.name not in used]
        freed = sum(_size(path) for path in orphans)
        for path in orphans:
            shutil.rmtree(path)
    return len(orphans), freed


# ------------------------------------------------------------------------------------------------------ what to make


def _recipe(plan: Plan, configuration: Configuration, spacing: Sequence[float]) -> dict[str, Any]:
    """What of a plan decides the arrays that a case is made into."""
    labels, how = plan.labels, configuration.resampling
    return {
        "version": _VERSION,
        "axis_order": plan.axis_order,
        "channels": [
            (
                c.normalization,
                c.use_mask,
                c.clip_percentiles,
                c.statistics.model_dump() if c.normalization == "ct" else None,
            )
            for c in plan.channels
        ],
        "labels": (labels.values, labels.ignore, labels.region_classes if labels.has_regions else None),
        "spacing": tuple(spacing),
        "resampling": (how.image_order, how.image_order_z, how.label_order, how.label_order_z, how.separate_z),
    }


def _key(
    plan: Plan, configuration: Configuration, case_id: str, raw: RawCase, dataset: Dataset, precision: Precision
) -> str:
    """Name of the folder of a case: its id, and a hash of its files and the recipe at its own spacing."""
    spacing = target_spacing(configuration, transposed(raw.spacing, plan.axis_order))
    files = [file.digest for file in raw.files]
    recipe = _recipe(plan, configuration, spacing)
    return f"{case_id}-{_hash([recipe, files, sorted((dataset.label_map or {}).items()), precision])}"


def _index_path(folder: Path, plan: Plan, name: str) -> Path:
    configuration = plan.configuration(name)
    return folder / f"{name}-{_hash(_recipe(plan, configuration, configuration.spacing))}.json"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _jobs(
    dataset: Dataset, plan: Plan, index: dict[str, dict[str, str]], raw: dict[str, RawCase], folder: Path
) -> list[Job]:
    """The cases that lack a folder; a three-dimensional configuration comes first where several share one."""
    order = sorted(index, key=lambda name: -plan.configurations[name].dimensions)
    jobs = []
    for case in dataset.cases:
        if case.id not in raw:
            continue
        job = Job(case, raw[case.id])
        spacing = transposed(job.raw.spacing, plan.axis_order)
        old = [job.raw.shape[axis] for axis in plan.axis_order]
        for name in order:
            path = folder / "cases" / index[name][case.id]
            configuration = plan.configurations[name]
            if path not in job.missing and not path.is_dir():
                job.missing[path] = configuration, resampled_shape(old, spacing, target_spacing(configuration, spacing))
        if job.missing:
            jobs.append(job)
    return jobs


# ------------------------------------------------------------------------------------------------------ making it


def _run(
    jobs: list[Job],
    dataset: Dataset,
    plan: Plan,
    workers: int | None,
    progress: Progress | None,
    precision: Precision,
) -> dict[str, Exception]:
    """Make what is missing; the failures by case id."""
    if not jobs:
        return {}
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    needed = max(job.memory(len(plan.channels)) for job in jobs)
    if workers is None and max(prod(job.raw.shape) for job in jobs) * len(plan.channels) < _SMALL:
        workers = 0
    in_flight = budget.cases_in_flight(needed, workers)
    free = budget.free_memory()
    if needed > free:
        log.warn(f"the largest case needs about {needed / budget.GB:.1f} GB, {free / budget.GB:.1f} GB are free")
    threads = 1 if workers == 0 else max(1, budget.cpus() // in_flight)  # of ours, for each case
    work = partial(_make, dataset=dataset, plan=plan, precision=precision, threads=threads)
    failed = {}
    with threadpool_limits(1, "blas"):  # none of BLAS's own
        results = _each(work, jobs, 0 if workers == 0 else in_flight)
        for job, error in progress(results, len(jobs), "preprocess") if progress else results:
            if error is not None:
                failed[job.case.id] = error
    return failed


def _each(
    work: Callable[[Job], Exception | None], jobs: list[Job], workers: int
) -> Iterator[tuple[Job, Exception | None]]:
    """Work on all jobs, the largest first, in threads (none: in this one), and give each as it ends."""
    jobs = sorted(jobs, key=lambda job: -prod(job.raw.shape))
    if not workers:
        yield from ((job, work(job)) for job in jobs)
        return
    pool = ThreadPoolExecutor(workers, "preprocess")
    try:
        futures = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _make(job: Job, dataset: Dataset, plan: Plan, precision: Precision, threads: int) -> Exception | None:
    """Read a case once and make all its folders; what went wrong is returned, for the other cases go on."""
    try:
        case = _prepared(job.case, dataset, plan)
        for path, (configuration, _) in job.missing.items():
            patch = (1,) * (3 - configuration.dimensions) + configuration.patch_size
            write_stored(path, resample(case, configuration, threads), plan.labels, patch, precision)
    except MemoryError as error:
        need, free = job.memory(len(plan.channels)) / budget.GB, budget.free_memory() / budget.GB
        fix = f"It needs about {need:.1f} GB, {free:.1f} GB are free: use --workers 1, or more memory."
        return UserError(f"no memory left ({error})", fix=fix)
    except Exception as error:  # any: it is reported with the name of the case
        return error
    return None


def _prepared(case: Case, dataset: Dataset, plan: Plan) -> Prepared:
    """Read and prepare a case; the image as read is gone when this returns."""
    image, values = read_case(case, dataset)
    return prepare(image, None if values is None else plan.labels.encode(values), plan)


def _failure(failed: dict[str, Exception], dataset: Dataset) -> UserError:
    files = {case.id: case.images[0] for case in dataset.cases}
    shown = []
    for case_id in sorted(failed)[:_SHOWN]:
        what, file = describe(failed[case_id]), str(files[case_id])
        shown.append(f"{case_id}: {what}" if file in what else f"{case_id} ({file}): {what}")
    more = f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    return UserError(
        f"{len(failed)} of {len(dataset.cases)} cases could not be preprocessed: {'; '.join(shown)}{more}".rstrip("."),
        fix="The others are done. `nnlite check` lists what is wrong with a data set.",
    )


# ------------------------------------------------------------------------------------------------------ the folder


def _one_at_a_time(folder: Path) -> AbstractContextManager[None]:
    """One process at a time works on the folder; a second waits, and finds the work done."""
    return locked(folder, lambda: log.info(f"{folder}: another process is preprocessing, waiting for it"))


def _sweep(folder: Path) -> None:
    """Delete what a killed run left half done."""
    for leftover in (*folder.glob(f"{LEFTOVER}*"), *folder.glob(f"cases/{LEFTOVER}*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@lru_cache(maxsize=8)
def _index(path: Path, changed: int) -> dict[str, str]:
    """Case id -> folder; `changed` (ns) makes a rewritten file another one."""
    return read_json(path)


def _write_if_new(path: Path, value: dict[str, str]) -> None:
    if not path.is_file() or read_json(path) != value:
        write_json(path, value)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
