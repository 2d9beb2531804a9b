"""Find errors in the references of a dataset: where held-out predictions agree with each other and not with them.

`audit_labels` collects the evidence of each case (contradictions.py). `rank_cases` measures Dice in what is usual for a
label over all cases, so that a label that is hard in every case is no finding: the score of a finding is by how many
usual deviations its correction raises the Dice of a label. Nothing is changed in the references.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, read_annotation
from nnunet_lite.data.images import read_label
from nnunet_lite.data.problems import align, few, plural
from nnunet_lite.data.raw_files import read_stamps, scan_raw_cases
from nnunet_lite.errors import UserError, describe
from nnunet_lite.evaluation.contradictions import (
    Correction,
    Evidence,
    Kind,
    Place,
    collect_evidence,
    describe_region,
    dice_after,
    dice_of_counts,
)
from nnunet_lite.evaluation.members import Member, find_members
from nnunet_lite.files import hash_of, read_validated, to_csv, write_json, write_text
from nnunet_lite.inference.cases import output_file
from nnunet_lite.models.folder import VALIDATION, held_out_dice
from nnunet_lite.system import cases_in_flight
from nnunet_lite.training.splits import read_split
from nnunet_lite.workspace import Paths

STRONG = 3.0  # a score that is rare in correct data
_WEAK = 1.0  # a smaller one is usual
_OF_THE_MAP = ("left/right swap", "swapped labels", "flipped map", "shifted map", "map of another case")
_GAP = "slices without labels"
_SMALLEST_SPREAD = 0.02  # of the Dice of a label over cases
_EXPLAINING = 0.6  # share of what Dice lacks that a correction of the whole map must restore
_UNEXPLAINED = 0.5  # weight of what no correction restores: the image may be hard
_OF_A_REGION = 0.9  # weight of a correction of a region: one that has a reason, such as empty slices, comes first
_OF_TWINS = 3  # weight of what Dice lacks if another case has the same voxels
_UNLIKE = 0.25  # share of both foregrounds outside of the other, from which two maps may be of two cases
_DRIFT = 0.1  # share of its volume by which a label is larger or smaller
_RARELY = 0.05  # share of the other references that may lack a label if its absence counts as such
_FAINT = 0.25  # of the voxels that models usually see of a label: fewer are no sign that it is there
_MOST_FINDINGS = 3
_WEAK_MODEL = 0.9  # of the best model's Dice
_DOUBTFUL = 0.6  # Dice of the best model
_FEW_CASES = 10  # of fewer, what is usual is not known well
_BYTES_PER_VOXEL = 12  # in memory while a case is compared, without the predictions


class Finding(BaseModel, frozen=True):
    """A probable error of a reference.

    Parameters
    ----------
    kind : str
        Such as "missing structure".
    label : str
        The label that it is about; empty for the whole map.
    text : str
        What is wrong, in words.
    place : tuple of int
        A voxel (z, y, x) of the image as stored.
    score : float
        By how many usual deviations the reference disagrees more than it would after a correction.
    """

    kind: Kind
    label: str
    text: str
    place: Place
    score: float


class AuditedCase(BaseModel, frozen=True):
    """A case with what may be wrong with its reference.

    Parameters
    ----------
    case : str
        Its id.
    score : float
        The highest of its findings; 0 without any.
    findings : tuple of Finding
        The most likely first.
    files : str
        Hash of its files.
    """

    case: str
    score: float
    findings: tuple[Finding, ...]
    files: str = ""


class Audit(BaseModel, frozen=True):
    """All cases that a model held out, the most suspicious first: the content of audit.json.

    Parameters
    ----------
    format : str
        The format of the file.
    cases : tuple of AuditedCase
        The worst first.
    models : tuple of str
        The models whose predictions were compared with the references, the best first.
    notes : tuple of str
        What was left out, and why.
    made, version : str
        The date (ISO), and the version of nnunet_lite.
    top : int
        The most cases that are shown as text.
    """

    format: Literal["nnlite-audit-1"] = "nnlite-audit-1"
    cases: tuple[AuditedCase, ...]
    models: tuple[str, ...]
    notes: tuple[str, ...] = ()
    made: str
    version: str
    top: int = Field(20, exclude=True)

    @property
    def suspicious(self) -> list[AuditedCase]:
        """The cases with a finding."""
        return [case for case in self.cases if case.findings]

    def to_json(self) -> dict[str, Any]:
        """Return the content of audit.json."""
        return self.model_dump(mode="json")

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of audit.csv: the headings, then a row for each finding."""
        found = [(case, finding) for case in self.suspicious for finding in case.findings]
        cells = [(c.case, f"{f.score:.2f}", f.kind, f.label, " ".join(map(str, f.place)), f.text) for c, f in found]
        return [("case", "score", "found", "label", "z y x", "what"), *cells]

    def to_text(self) -> str:
        """Write the first finding of the first cases as plain text, the worst first; then the notes."""
        head, *rows = self.rows()
        first = list({row[0]: row for row in reversed(rows)}.values())[::-1]
        strong, more = sum(case.score >= STRONG for case in self.cases), len(first) - self.top
        counts = f"{plural(strong, 'case')} of {len(self.cases)} with a score of {STRONG:g} or more"
        counts += f"; {plural(more, 'more case')} in audit.csv" if more > 0 else ""
        table = [align([head, *first[: self.top]], left=len(head))] if first else []
        return "\n".join([*table, counts, *(f"note: {note}" for note in self.notes)])

    __repr__ = to_text


def audit_labels(paths: Paths, dataset: Dataset, only: Sequence[str] | None, workers: int | None, top: int) -> Audit:
    """Compare the references of a dataset with the held-out predictions of its models; write audit.json and audit.csv.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.
    dataset : Dataset
        The planned dataset.
    only : sequence of str or None
        Configurations, or names of model folders; None for all.
    workers : int or None
        Threads; None for all CPUs.
    top : int
        The most cases that the audit shows as text.

    Raises
    ------
    UserError
        No model is trained, or none has predicted the cases that it holds out.
    """
    members, notes = find_members(paths, dataset, only)
    members = _leave_out_weak_models(members, notes)
    files = _held_out_files(members, paths, dataset, notes)
    if not files:
        fix = "Run `nnlite select`, which predicts the cases that each model holds out."
        raise UserError(f"no held-out case of {paths.name} is predicted", paths.models, fix)
    if len(files) < _FEW_CASES:
        notes.append(f"what is usual is not known well from {plural(len(files), 'case')}")
    cases = [case for case in dataset.cases if case.id in files]
    stamps, _ = scan_raw_cases(cases, read_stamps(paths.raw), workers)
    voxels = max((prod(stamp.shape) for stamp in stamps.values()), default=0)
    at_once = cases_in_flight(voxels * (_BYTES_PER_VOXEL + len(members)), workers)

    def compare(case: Case) -> Evidence | str:
        try:
            return _compare(case, files[case.id], dataset)
        except (UserError, OSError, MemoryError) as error:
            return f"{case.id} is left out: {describe(error)}"

    compared = log.map_in_threads(compare, cases, at_once, "audit")
    evidence = [one for one in compared if isinstance(one, Evidence)]
    if not evidence:
        raise UserError(f"no case of {paths.name} can be compared; {str(compared[0]).rstrip('.')}", paths.models)
    ranked = rank_cases(evidence, dataset.labels.class_names)
    digests = {case_id: hash_of(stamp.digests) for case_id, stamp in stamps.items()}
    audit = Audit(
        cases=tuple(one.model_copy(update={"files": digests.get(one.case, "")}) for one in ranked),
        models=tuple(member.name for member in members),
        notes=(*notes, *(one for one in compared if isinstance(one, str))),
        made=date.today().isoformat(),
        version=nnunet_lite.__version__,
        top=top,
    )
    write_json(paths.audit, audit.to_json())
    write_text(paths.audit.with_suffix(".csv"), to_csv(audit.rows()))
    return audit


def read_audit(paths: Paths) -> Audit | None:
    """Read the audit.json of a dataset; None if there is none.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.

    Raises
    ------
    UserError
        The file cannot be read.
    """
    return read_validated(paths.audit, Audit, "is no audit of the form nnlite-audit-1", "Run `nnlite audit` again.")


def changed_since(audit: Audit, paths: Paths, cases: Sequence[Case]) -> list[str]:
    """Return the cases whose files changed after an audit.

    Parameters
    ----------
    audit : Audit
        The audit of the dataset.
    paths : Paths
        The workspace of the dataset.
    cases : sequence of Case
        Those to look at.
    """
    stamps, _ = scan_raw_cases(cases, read_stamps(paths.raw))
    audited = {case.case: case.files for case in audit.cases}
    return [case.id for case in cases if case.id not in stamps or hash_of(stamps[case.id].digests) != audited[case.id]]


# --------------------------------------------------------------------------------------------------------- predictions


def _leave_out_weak_models(members: Sequence[Member], notes: list[str]) -> list[Member]:
    """Return the models whose held-out Dice is near that of the best one, the best first."""
    means = {one: held_out_dice(one.folder, one.folds) for one in members}
    dice = {one: mean or 0.0 for one, mean in means.items()}
    best = max(dice.values())
    if best < _DOUBTFUL and any(mean is not None for mean in means.values()):
        notes.append(f"no model has a Dice above {best:.2f}: below {_DOUBTFUL:g} they contradict correct labels too")
    weak = [one for one in members if 0 < dice[one] < _WEAK_MODEL * best]  # 0: not scored yet
    if weak:
        names = few([one.name for one in weak])
        notes.append(f"{names} left out: Dice below {_WEAK_MODEL:.0%} of the best model's, {best:.3f}")
    return sorted(set(members) - set(weak), key=lambda one: (-dice[one], one.name))


def _held_out_files(
    members: Sequence[Member], paths: Paths, dataset: Dataset, notes: list[str]
) -> dict[str, list[Path]]:
    """Return for each case the label maps of the models that hold it out; a note names the models that lack some."""
    files, cases = defaultdict[str, list[Path]](list), {case.id: case for case in dataset.cases}
    for member in members:
        expected = [
            (case_id, output_file(cases[case_id], member.folder / f"fold_{fold}" / VALIDATION))
            for fold in member.folds for case_id in read_split(paths.splits, dataset, fold).validation
        ]  # fmt: skip
        known = [(case_id, file) for case_id, file in expected if file.is_file()]
        for case_id, file in known:
            files[case_id].append(file)
        if len(known) < len(expected):
            lacking = plural(len(expected) - len(known), "held-out case")
            notes.append(f"{member.name} has not predicted {lacking}; `nnlite select` predicts them")
    if left := len(cases) - len(files):
        notes.append(f"{plural(left, 'case')} without a held-out prediction")
    return dict(files)


def _compare(case: Case, files: Sequence[Path], dataset: Dataset) -> Evidence:
    """Read the maps of a case as classes, and compare them."""
    labels, (first, grid, _) = dataset.labels, read_label(files[0])
    reference, geometry = read_annotation(case, dataset, grid)
    maps = [reference, first, *(read_label(file, grid)[0] for file in files[1:])]
    if any(one.shape != first.shape for one in maps):
        raise UserError(f"has shape {geometry.shape}, its predictions {grid.shape}", case.label)
    own, *others = map(labels.encode, maps)
    return collect_evidence(case.id, own, others, labels.class_names, labels.ignore_class)


# ------------------------------------------------------------------------------------------------------------- ranking


def rank_cases(evidence: Sequence[Evidence], names: Sequence[str]) -> list[AuditedCase]:
    """Score the corrections of all cases by what is usual for their labels.

    Parameters
    ----------
    evidence : sequence of Evidence
        Of the held-out cases.
    names : sequence of str
        The name of each class, with the background.

    Returns
    -------
    list of AuditedCase
        The worst first.
    """
    dice = np.array([dice_of_counts(one.counts) for one in evidence])
    depths, twins = np.zeros((len(evidence), 2, len(names))), defaultdict[str, list[str]](list)
    for row, one in zip(depths, evidence, strict=True):
        twins[one.digest].append(one.case_id)
        for correction in one.corrections:
            place = int(correction.kind == _GAP), correction.label
            row[place] = max(row[place], correction.depth)
    usual = _Usual.of(evidence, dice, depths)
    cases = []
    for one, own_dice in zip(evidence, dice, strict=True):
        others = [name for name in twins[one.digest] if one.digest and name != one.case_id]
        findings = _judge_case(one, own_dice, usual, names, others)
        score = max((finding.score for finding in findings), default=0.0)
        most = 1 if findings and findings[0].kind in _OF_THE_MAP else _MOST_FINDINGS
        shown = tuple(finding for finding in findings[:most] if finding.score >= _WEAK)
        cases.append(AuditedCase(case=one.case_id, score=score, findings=shown))
    return sorted(cases, key=lambda case: (-case.score, case.case))


class _Usual(NamedTuple):
    """What is usual for each foreground class (dice, spread), and for each class.

    Median and spread of Dice, depth of regions, length of gaps, number of voxels that models see where a reference has
    the class, and how surprising a reference without it is, in bits: 0 if more than a few have none.
    """

    dice: np.ndarray
    spread: np.ndarray
    depth: np.ndarray
    gap: np.ndarray
    seen: np.ndarray
    surprise: np.ndarray

    @classmethod
    def of(cls, evidence: Sequence[Evidence], dice: np.ndarray, depths: np.ndarray) -> _Usual:
        """Estimate the spread from the deviations and from the lower quartile, which counts where many are hard."""
        known = np.where(np.isnan(dice).all(0), 0, dice)
        low, middle = np.nanquantile(known, (0.25, 0.5), axis=0)
        spread = np.maximum(1.4826 * np.nanmedian(np.abs(known - middle), axis=0), (middle - low) / 0.6745)
        smallest = _SMALLEST_SPREAD * max(1, _FEW_CASES / len(dice))
        depth, gap = np.median(depths[:, 0], axis=0), np.quantile(depths[:, 1], 0.9, axis=0)
        has = np.array([one.counts.sum(1) > 0 for one in evidence])
        seen = np.array([one.counts.sum(0) for one in evidence])
        usual_seen = np.nanmedian(np.where(has | ~has.any(0), seen, np.nan), axis=0)
        n, absent = len(evidence), np.maximum(np.count_nonzero(~has, axis=0), 1)
        surprise = np.where(absent - 1 <= _RARELY * (n - 1), np.log2((n + 1) / absent), 0)
        surprise[0] = 0  # a picture may have no background
        return cls(middle, np.maximum(spread, smallest), depth, gap, usual_seen, surprise)

    def lack(self, dice: np.ndarray) -> np.ndarray:
        """Return by how many spreads Dice is below the usual one; 0 for classes that are nowhere."""
        return np.nan_to_num(np.maximum((self.dice - dice) / self.spread, 0))

    def absences(self, own: np.ndarray, seen: np.ndarray) -> dict[int, float]:
        """Return each class that a reference lacks and nearly all others have, and how surprising that is.

        If the models usually see the class, and see none here, they agree with the reference: it is left out.
        """
        is_absent = (own == 0) & (seen >= _FAINT * self.seen) & (self.surprise > 0)
        return {k: float(self.surprise[k]) for k in np.flatnonzero(is_absent).tolist()}


def _join_regions(one: Evidence, usual: _Usual, names: Sequence[str]) -> list[Correction]:
    """Correct regions that are thicker than usual together: of many small objects, each one alone changes little."""
    groups = defaultdict[tuple[int, int], list[Correction]](list)
    for correction in one.corrections:
        if correction.moved and correction.depth > usual.depth[correction.label]:
            groups[correction.moved[:2]].append(correction)
    joined = []
    for (own, seen), parts in groups.items():
        if len(parts) > 1:
            moved = np.zeros_like(one.counts)
            moved[own, seen] = sum(part.moved[2] for part in parts if part.moved)
            _, text = describe_region(own, seen, int(moved.sum()), one.unit, names)
            after = dice_after(one.counts, moved)
            joined.append(parts[0]._replace(text=f"{text}, in {len(parts)} regions", dice=after, moved=None))
    return joined


def _judge_case(
    one: Evidence, dice: np.ndarray, usual: _Usual, names: Sequence[str], twins: Sequence[str]
) -> list[Finding]:
    """Return the findings of a case, the most likely first; one of a kind and label, but each gap."""
    lack = usual.lack(dice)
    total, worst = float(lack.max()), int(lack.argmax())
    findings = []
    own, seen = one.counts.sum(1), one.counts.sum(0)
    absent = usual.absences(own, seen)

    def add(kind: Kind, label: int, text: str, place: Place, score: float) -> None:
        name = names[label] if label else ""
        findings.append(Finding(kind=kind, label=name, text=text, place=place, score=round(score, 2)))

    for kind, text, place, after, label, depth, _ in (*one.corrections, *_join_regions(one, usual, names)):
        left = usual.lack(after)
        score = float((lack - left).max())
        if kind in _OF_THE_MAP:
            restored, gain = total - float(left.max()), float(np.nan_to_num(after - dice).mean())
            fits = gain > 0 and restored >= _EXPLAINING * total
            score = max(restored, gain / _SMALLEST_SPREAD) if fits else 0.0
        elif kind == _GAP:
            score = max(score, float((depth - usual.gap[label]) / max(1, usual.gap[label])))
        elif kind == "missing structure" and label in absent:
            score = max(score, absent.pop(label))
        elif depth:  # a region as thin as most is usual
            score *= _OF_A_REGION * (depth > usual.depth[label])
        if score > 0:
            add(kind, label, text, place, score)
    for label, score in absent.items():  # the models do not see it, and usually do not either
        text = f"{names[label]} is nowhere, and nearly all other cases have it"
        add("missing structure", label, text, one.place, score)
    if twins and not any(finding.kind in _OF_THE_MAP for finding in findings):
        text = f"it has the same {one.unit}s as that of {' and '.join(twins)}"
        add("map of another case", 0, text, one.place, _OF_TWINS * total)
    if max((finding.score for finding in findings), default=0.0) < _EXPLAINING * total:
        size, name, both = own[worst + 1], names[worst + 1], one.counts[1:, 1:].sum()
        if both < (1 - _UNLIKE) * min(own[1:].sum(), seen[1:].sum()):
            add("map of another case", 0, "no correction makes it fit: it may be of another case", one.place, total)
        elif abs(size / max(seen[worst + 1], 1) - 1) > _DRIFT:
            text = f"{name} has {size} {one.unit}s, and the models see {seen[worst + 1]}"
            add("boundary drift", worst + 1, text, one.place, _UNEXPLAINED * total)
        else:
            text = f"Dice of {name} with the models is {dice[worst]:.2f}, usual is {usual.dice[worst]:.2f}"
            add("low agreement", worst + 1, text, one.place, _UNEXPLAINED * total)
    first = dict[tuple[Any, ...], Finding]()  # a region is a part of what all regions of its label say
    enough = _EXPLAINING * max((finding.score for finding in findings), default=0.0)  # for a reason of all others
    for found in sorted(findings, key=lambda one: (not (one.kind in _OF_THE_MAP and one.score >= enough), -one.score)):
        first.setdefault((found.kind, found.label, found.kind == _GAP and found.place), found)
    return list(first.values())
