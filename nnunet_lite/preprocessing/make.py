"""Making preprocessed cases: which folders cases lack, and their arrays. store.py knows where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from nnunet_lite import log, system
from nnunet_lite.data.dataset import Case, Dataset, read_case
from nnunet_lite.data.geometry import Turn
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.files import SPARE, lacks_space, no_space
from nnunet_lite.planning.schema import Configuration, Plan, Precision, exact_storage
from nnunet_lite.preprocessing.pipeline import (
    Prepared,
    prepare,
    resample,
    resampled_shape,
    resampled_spacing,
    transposed,
    turn_for,
)
from nnunet_lite.preprocessing.raw_files import RawCase, survey
from nnunet_lite.preprocessing.resampling import one_blas_thread
from nnunet_lite.preprocessing.stored_case import is_whole, write_stored

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

_VERSION = 1  # of how the arrays are made: raising it redoes every case
_COMPRESSED = 0.5  # of the size in memory, for the estimate; 0.2 was measured for skull-stripped MR, 0.6 for CT
_ID_BYTES = 200  # of a case in the name of its folder: file systems allow 255 for all of it
_SMALL = 1 << 18  # values of a case below which threads are in each other's way more than they help


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


@dataclass
class Part:
    """What became of some cases: their raw files, folder of each by configuration and case, failures by case."""

    raw: dict[str, RawCase]
    index: dict[str, dict[str, str]]
    failed: dict[str, Exception]
    made: int = 0
    estimate: int = 0


@dataclass(frozen=True)
class Make:
    """Makes cases of a data set, which travels without them, for some configurations of a plan, into a folder."""

    dataset: Dataset
    plan: Plan
    configurations: tuple[str, ...]
    folder: Path
    precision: Precision

    def __call__(
        self, cases: Sequence[Case], known: Mapping[str, RawCase], workers: int | None, progress: Progress | None = None
    ) -> Part:
        """Make what these cases lack; `known` is what was known of their raw files before."""
        found = survey(cases, known, system.cpus() if workers is None else workers)
        failed = {name: raw for name, raw in found.items() if isinstance(raw, Exception)}
        sound = {name: raw for name, raw in found.items() if isinstance(raw, RawCase)}
        index = {
            name: {
                case: folder_name(self.plan, self.plan.configuration(name), case, raw, self.dataset, self.precision)
                for case, raw in sound.items()
            }
            for name in self.configurations
        }
        jobs = _jobs(cases, self.plan, index, sound, self.folder)
        estimate = sum(job.disk(len(self.plan.channels), self.precision) for job in jobs)
        system.require_space(self.folder, estimate)
        if progress and jobs:
            arrays = sum(len(job.missing) for job in jobs)
            log.info(f"{arrays} arrays to make, about {system.in_units(estimate)} of disk")
            if self.precision == "float16" and exact_storage(self.plan.channels) == "float32":
                log.warn("the plan stores images as float16, which rounds 16-bit values that are not standardised by "
                         "up to 16; `nnlite plan DATA --store float32` keeps all digits")  # fmt: skip
        failed |= _run(jobs, self.dataset, self.plan, workers, progress, self.precision)
        if full := next((error for error in failed.values() if lacks_space(error)), None):
            left = [job for job in jobs if not all(is_whole(path) for path in job.missing)]
            needed = sum(job.disk(len(self.plan.channels), self.precision) for job in left) + SPARE
            what = f"the {plural(len(left), 'case')} left need{'s' * (len(left) == 1)} about"
            raise no_space(self.folder, what, needed, full.errno)
        return Part(sound, index, failed, sum(len(job.missing) for job in jobs), estimate)

    def alone(self, item: tuple[Case, RawCase | None]) -> Part:
        """Make one case in this thread.

        Raises
        ------
        OSError : its files cannot be read or written at the moment; it may be tried again.
        """
        case, known = item
        part = self([case], {} if known is None else {case.id: known}, 0)
        for error in part.failed.values():
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError):
                raise error
        return part


def recipe_of(plan: Plan, configuration: Configuration, spacing: Sequence[float]) -> dict[str, Any]:
    """What of a plan decides the arrays that a case is made into."""
    labels, how = plan.labels, configuration.resampling
    marked = {"outside": labels.outside_class} if any(c.use_mask for c in plan.channels) else {}
    return {
        **marked,
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


def folder_name(
    plan: Plan, configuration: Configuration, case_id: str, raw: RawCase, dataset: Dataset, precision: Precision
) -> str:
    """Name of the folder of a case: its id, cut to what a name may hold, and a hash of its files and the recipe."""
    turn = turn_for(plan, raw.orientation)
    spacing = resampled_spacing(configuration, transposed(raw.spacing, turn.order))
    files = [file.digest for file in raw.files]
    recipe = recipe_of(plan, configuration, spacing)
    if turn != Turn(plan.axis_order):
        recipe["orientation"] = plan.orientation
    short = case_id.encode()[:_ID_BYTES].decode(errors="ignore")
    return f"{short}-{short_hash([recipe, files, sorted((dataset.label_map or {}).items()), precision])}"


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _jobs(
    cases: Iterable[Case], plan: Plan, index: dict[str, dict[str, str]], raw: dict[str, RawCase], folder: Path
) -> list[Job]:
    """The cases that lack a folder; a three-dimensional configuration comes first where several share one."""
    order = sorted(index, key=lambda name: -plan.configurations[name].dimensions)
    jobs = []
    for case in cases:
        if case.id not in raw:
            continue
        job = Job(case, raw[case.id])
        turn = turn_for(plan, job.raw.orientation)
        spacing = transposed(job.raw.spacing, turn.order)
        old = [job.raw.shape[axis] for axis in turn.order]
        for name in order:
            path = folder / "cases" / index[name][case.id]
            configuration = plan.configurations[name]
            if path not in job.missing and not is_whole(path):
                job.missing[path] = (
                    configuration,
                    resampled_shape(old, spacing, resampled_spacing(configuration, spacing)),
                )
        if job.missing:
            jobs.append(job)
    return jobs


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
    needed = max(job.memory(len(plan.channels)) for job in jobs)
    if workers is None and max(prod(job.raw.shape) for job in jobs) * len(plan.channels) < _SMALL:
        workers = 0
    in_flight = 0 if workers == 0 else system.cases_in_flight(needed, workers)
    free = system.free_memory()
    if needed > free:
        log.warn(f"the largest case needs about {system.in_units(needed)}, {system.in_units(free)} are free")
    threads = max(1, system.cpus() // in_flight) if in_flight else 1  # of ours, for each case
    work = partial(_make, dataset=dataset, plan=plan, precision=precision, threads=threads)
    failed = {}
    with one_blas_thread():
        results = _each(work, jobs, in_flight)
        for job, error in progress(results, len(jobs), "preprocess") if progress else results:
            if error is not None:
                failed[job.case.id] = error
            if lacks_space(error):
                break  # no other case would fare better
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
            if is_whole(path):
                continue  # a worker that was taken for dead has made it meanwhile
            patch = (1,) * (3 - configuration.dimensions) + configuration.patch_size
            write_stored(path, resample(case, configuration, threads), plan.labels, patch, precision)
    except MemoryError as error:
        need, free = (system.in_units(n) for n in (job.memory(len(plan.channels)), system.free_memory()))
        fix = f"It needs about {need}, {free} are free: use --workers 1, or more memory."
        return UserError(f"no memory left ({error})", fix=fix)
    except Exception as error:  # any: it is reported with the name of the case
        return error
    return None


def _prepared(case: Case, dataset: Dataset, plan: Plan) -> Prepared:
    """Read and prepare a case; the image as read is gone when this returns."""
    image, values = read_case(case, dataset)
    return prepare(image, None if values is None else plan.labels.encode(values), plan)
