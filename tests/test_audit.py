"""`nnlite audit`: planted label errors of each kind are found and named, and correct label maps are left alone."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import first_cases
from scipy import ndimage

import nnunet_lite
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.audit import STRONG, Audit, rank_cases, read_audit
from nnunet_lite.evaluation.contradictions import (
    Correction,
    Evidence,
    collect_evidence,
    dice_of_counts,
    majority_vote,
)
from nnunet_lite.files import read_json
from nnunet_lite.models.folder import open_run
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import load_settings
from nnunet_lite.training.job import configure_plan
from nnunet_lite.training.splits import read_splits
from nnunet_lite.workspace import Paths

Command = Callable[..., tuple[int, str, str]]

PLANT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "plant_errors.py"))
FOUND = {
    "swapped labels": "swapped labels",
    "removed label": "missing structure",
    "flipped map": "flipped map",
    "shifted map": "shifted map",
    "map of another case": "map of another case",
    "emptied slices": "slices without labels",
}


def predict_from(reference: np.ndarray, seed: int, noise: float = 0.25) -> np.ndarray:
    """What a good model makes of an image: the right structures with smooth errors at their borders, Dice about 0.9."""
    rng = np.random.default_rng(seed)
    shares = []
    for value in range(int(reference.max()) + 1):
        field = ndimage.gaussian_filter(rng.normal(size=reference.shape), 2)
        shares.append(ndimage.gaussian_filter((reference == value).astype(float), 0.7) + noise * field / field.std())
    return np.argmax(shares, axis=0).astype(reference.dtype)


def make_workspace(raw: Path, truth: Path, workspace: Path) -> Paths:
    """Plan a dataset, and add two models whose held-out predictions come from the true label maps of another folder."""
    nnunet_lite.plan(raw, workspace=workspace, workers=0)
    paths = Paths(workspace / raw.name)
    dataset, settings = stored_dataset(paths.dataset), load_settings("cpu")
    for number, name in enumerate(("first", "second")):
        plan = configure_plan(Plan.read(paths.plans), "3d_fullres", settings)
        open_run(paths.models / name, plan, dataset, "3d_fullres", settings)
        for split in read_splits(paths.splits, dataset):
            fold = paths.models / name / f"fold_{split.name}"
            (fold / "validation").mkdir(parents=True)
            (fold / "model.safetensors").write_bytes(b"weights")  # the audit reads predictions only
            for case_id in split.validation:
                array, geometry, _ = read_label(truth / "labelsTr" / f"{case_id}.nii.gz")
                prediction = predict_from(array, 1000 * number + int(case_id[-3:]))
                write_label(fold / "validation" / f"{case_id}.nii.gz", prediction, geometry)
    return paths


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_cases(tmp_path_factory.mktemp("clean") / "Task04_Hippocampus", 24)


@pytest.fixture(scope="module")
def planted(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Paths, dict[str, str]]:
    """A workspace of 24 cases, six of which have one error each. Not to be written to."""
    folder = tmp_path_factory.mktemp("planted")
    kinds = PLANT["plant_errors"](clean, folder / "Task04_Hippocampus", share=0.25, seed=1)
    return make_workspace(folder / "Task04_Hippocampus", clean, folder / "workspace"), kinds


@pytest.fixture
def paths(planted: tuple[Paths, dict[str, str]], tmp_path: Path) -> Paths:
    """A copy of it that a test may change."""
    shutil.copytree(planted[0].root.parent, tmp_path / "workspace")
    copy = Paths(tmp_path / "workspace" / planted[0].name)
    copy.audit.unlink(missing_ok=True)
    return copy


def audit(paths: Paths, **options: Any) -> Audit:
    return nnunet_lite.audit(workspace=paths.root.parent, **options)


# ------------------------------------------------------------------------------------------------------- what is found


def test_each_planted_error_comes_first_and_is_named(planted: tuple[Paths, dict[str, str]]) -> None:
    paths, kinds = planted
    assert (
        set(kinds.values()) == set(PLANT["KINDS"])
        and read_json(Path(stored_dataset(paths.dataset).root) / "planted.json") == kinds
    )
    found = audit(paths)
    first = {case.case: case.findings[0] for case in found.cases[: len(kinds)]}
    assert {case: finding.kind for case, finding in first.items()} == {
        case: FOUND[kind] for case, kind in kinds.items()
    }
    assert all(case.score >= STRONG for case in found.cases[: len(kinds)])
    assert all(case.score < STRONG for case in found.cases[len(kinds) :])
    assert found.models == ("first", "second") and len(found.cases) == 24 and found == read_audit(paths)
    cases = {case.id: case for case in stored_dataset(paths.dataset).cases}
    for case_id, finding in first.items():  # the place is where the maps differ
        prediction = next(paths.models.glob(f"first/fold_*/validation/{case_id}.nii.gz"))
        assert read_label(cases[case_id].label)[0][finding.place] != read_label(prediction)[0][finding.place]
    with paths.audit.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["case"] == found.cases[0].case and len(rows) == sum(len(case.findings) for case in found.cases)


def test_correct_label_maps_have_no_strong_finding(clean: Path, tmp_path: Path) -> None:
    found = audit(make_workspace(clean, clean, tmp_path / "workspace"))
    assert len(found.cases) == 24 and max(case.score for case in found.cases) < STRONG
    assert found.to_text().splitlines()[-1].startswith("0 cases of 24 with a score of 3 or more")


def two_kidneys(seed: int, flat: bool = False) -> np.ndarray:
    """Two ellipsoids, of the classes 1 and 2, of which the sizes differ from case to case."""
    z, y, x = np.ogrid[: 1 if flat else 24, :40, :60]
    a, b = np.random.default_rng(seed).uniform(6, 9, 2)
    depth = 0 * z if flat else (z - 12) ** 2
    first = depth + (y - 20) ** 2 + (x - 15) ** 2 < a**2
    return np.where(first, 1, np.where(depth + (y - 18) ** 2 + (x - 44) ** 2 < b**2, 2, 0)).astype(np.uint8)


def judge(
    change: Callable[[np.ndarray], np.ndarray], names: tuple[str, ...], ignore: int | None = None,
    predicted: Callable[[np.ndarray], np.ndarray] = lambda label: label, **more: Any,
) -> Any:  # fmt: skip
    """Return the findings of a changed map among twelve correct ones; the models see `predicted` of it."""
    maps = [two_kidneys(seed, **more) for seed in range(13)]
    evidence: list[Evidence] = []
    for seed, label in enumerate(maps):
        seen, own = (predicted(label), change(label)) if seed == 0 else (label, label)
        predictions = [predict_from(seen, 50 * seed + k) for k in range(3)]
        evidence.append(collect_evidence(str(seed), own, predictions, names, ignore))
    first, second, *_ = rank_cases(evidence, names)
    assert first.case == "0" and second.score < STRONG
    return first.findings


@pytest.mark.parametrize("flat", [False, True], ids=["3d", "picture"])
def test_left_and_right_are_exchanged(flat: bool) -> None:
    swap = np.array([0, 2, 1], np.uint8)
    finding, *more = judge(lambda label: swap[label], ("background", "kidney_left", "kidney_right"), flat=flat)
    assert (
        finding.kind == "left/right swap" and finding.text == "kidney_left and kidney_right are exchanged" and not more
    )
    assert judge(lambda label: swap[label], ("background", "liver", "cat"), flat=flat)[0].kind == "swapped labels"


def test_regions_of_a_label_are_missing_or_surplus_or_have_another_label() -> None:
    names = ("background", "liver", "tumour")

    def with_box(value: int, box: tuple[slice, slice, slice]) -> Callable[[np.ndarray], np.ndarray]:
        def change(label: np.ndarray) -> np.ndarray:
            out = label.copy()
            out[box] = value
            return out

        return change

    inside, outside = np.s_[6:20, 13:28, 8:16], np.s_[5:18, 15:28, 24:34]
    for value, box, kind in (
        (0, inside, "missing structure"),
        (2, inside, "other label"),
        (1, outside, "surplus structure"),
    ):
        finding = judge(with_box(value, box), names)[0]
        assert finding.kind == kind and finding.score >= STRONG and finding.label in names[1:]
        assert all(side.start <= n < side.stop for n, side in zip(finding.place, box, strict=True))


def test_many_missing_objects_are_one_finding() -> None:
    """Each nucleus alone is a twelfth of the label; models of pictures agree more or less well with correct maps."""
    names, y, x = ("background", "nucleus"), np.arange(96)[:, None], np.arange(128)
    evidence = []
    for seed in range(13):
        radius = np.random.default_rng(seed).uniform(7, 9)
        label = ((y % 32 - 16) ** 2 + (x % 32 - 16) ** 2 < radius**2)[None].astype(np.uint8)
        prediction = predict_from(label, seed, noise=0.35 if seed % 2 else 0.1)
        if seed == 0:
            label[:, :, :64] = 0
        evidence.append(collect_evidence(str(seed), label, [prediction], names, None))
    first, second, *_ = rank_cases(evidence, names)
    assert first.case == "0" and first.score > 3 * second.score
    assert first.findings[0].kind == "missing structure"
    assert re.fullmatch(r"\d+ pixels of nucleus are missing, in 6 regions", first.findings[0].text)


def test_a_label_that_is_absent_is_one_finding() -> None:
    """In the reference, or, of two parts, in the predictions."""
    names = ("background", "liver", "tumour")

    def change(label: np.ndarray) -> np.ndarray:
        return np.where(label == 2, 0, label)

    def add(label: np.ndarray) -> np.ndarray:
        out = change(label)
        out[4:10, 12:24, 38:50] = out[14:22, 12:24, 38:50] = 2
        return out

    assert [one.kind for one in judge(change, names) if one.label == "tumour"] == ["missing structure"]
    found = judge(add, names, predicted=change)
    assert [(one.kind, one.text[-14:]) for one in found] == [("surplus structure", ", in 2 regions")]


def test_a_label_that_all_other_cases_have_is_missing_also_if_no_model_sees_it() -> None:
    names = ("background", "liver", "nodule")

    def texts(*without: int, blind: bool) -> list[str]:
        evidence = []
        for seed in range(24):
            label = two_kidneys(seed)
            own = np.where(label == 2, 0, label) if seed in without else label
            seen = np.where(label == 2, 0, label) if blind or seed in without else label
            evidence.append(collect_evidence(str(seed), own, [predict_from(seen, seed)], names, None))
        ranked = rank_cases(evidence, names)
        assert not blind or len(without) > 1 or ranked[0].case == "7"
        return [finding.text for case in ranked for finding in case.findings if finding.score > STRONG]

    assert texts(7, blind=True) == ["nodule is nowhere, and nearly all other cases have it"]
    assert not any("nodule" in text for text in texts(7, blind=False)), "models find it in the others: it is not there"
    assert not any("nodule" in text for text in texts(7, 8, 9, blind=True)), "some cases have none"


def test_a_correction_of_the_map_that_explains_little_is_not_the_first() -> None:
    """Weak models see a nodule in every case; the reference of one has none, and models see some of it in the liver."""
    evidence = []
    for number in range(24):
        n = (6, 10, 14)[number % 3]
        counts = np.array([[9000, 100 - n, 100 - n], [100 - n, n, 0], [100 - n, 0, n]])
        corrections: tuple[Correction, ...] = ()
        if number == 0:
            counts = np.array([[9000, 0, 93], [93, 0, 7], [0, 0, 0]])
            absent, exchanged = np.diag([0, 0, 100]), np.array([[9000, 0, 93], [0, 0, 0], [93, 0, 7]])
            corrections = (
                Correction("swapped labels", "", (0, 0, 0), dice_of_counts(exchanged)),
                Correction("missing structure", "", (0, 0, 0), dice_of_counts(counts + absent), 2),
            )
        evidence.append(Evidence(str(number), counts, corrections, (0, 0, 0), "", "voxel"))
    first, *_ = rank_cases(evidence, ("background", "liver", "nodule"))
    assert first.case == "0" and first.findings[0].kind == "missing structure"
    assert first.score == first.findings[0].score > 2 * first.findings[1].score > 0


def test_a_gap_is_measured_in_what_is_usual_for_its_label() -> None:
    """Weak models see long bridges between two parts in some cases: they are no evidence, in others they are."""
    counts = np.array([[9000, 20], [20, 200]])

    def rank(*lengths: int) -> list[float]:
        evidence = []
        for number in range(16):
            gap = Correction(
                "slices without labels", "", (0, 0, 0), dice_of_counts(counts), 1, (*lengths, *[0] * 16)[number]
            )
            evidence.append(Evidence(str(number), counts, (gap,) if gap.depth else (), (0, 0, 0), "", "voxel"))
        return [case.score for case in rank_cases(evidence, ("background", "kidneys"))]

    assert rank(6)[:2] == [6, 0]
    assert max(rank(20, 19)) < STRONG


@pytest.mark.parametrize("flat", [False, True], ids=["3d", "picture"])
def test_the_space_between_two_parts_is_no_gap(flat: bool) -> None:
    """The models see a speck between two kidneys; of a picture they see a whole one, but it has no slices."""
    label = np.minimum(two_kidneys(0, flat), 1)
    prediction = label.copy()
    prediction[:, 10:30, 25:34] = flat
    prediction[-14:, 19:21, 28:31] = 1
    evidence = collect_evidence("0", label, [prediction], ("background", "kidney"), None)
    assert not any(correction.kind == "slices without labels" for correction in evidence.corrections)


def test_what_is_not_annotated_is_no_evidence() -> None:
    names, changed = ("background", "liver", "tumour"), np.s_[:, 12:, :]

    def hide(label: np.ndarray) -> np.ndarray:
        out = label.copy()
        out[changed] = 3
        return out

    maps = [two_kidneys(seed) for seed in range(12)]
    evidence = [collect_evidence(str(i), hide(one), [predict_from(one, i)], names, 3) for i, one in enumerate(maps)]
    assert all(case.score < STRONG for case in rank_cases(evidence, names))


def test_models_that_disagree_are_no_evidence() -> None:
    label, empty = two_kidneys(0), np.zeros((24, 40, 60), np.uint8)
    voted, sure = majority_vote([label, label, label, empty])
    assert (voted == label).all() and sure.all()
    assert not majority_vote([label, empty])[1][label > 0].any()
    counts = collect_evidence("a", label, [empty, two_kidneys(0)], ("background", "a", "b"), None).counts
    assert counts.sum() == counts.trace()


# ------------------------------------------------------------------------------------------- the command and its pages


def test_the_table_leads_to_the_place(paths: Paths, command: Command, tmp_path: Path) -> None:
    code, out, err = command("audit", "--top", 2, "-w", paths.root.parent, cwd=tmp_path)
    worst = read_audit(paths).cases[0]  # type: ignore[union-attr]
    place = " ".join(map(str, worst.findings[0].place))
    lines = out.splitlines()
    assert (
        code == 0 and lines[0].split()[:2] == ["case", "score"] and lines[1].startswith(worst.case) and len(lines) == 4
    )
    assert f"next: nnlite view {worst.case} --at {place}" in err
    values = json.loads(command("audit", "--json", "-w", paths.root.parent, cwd=tmp_path)[1])
    assert values["cases"][0]["findings"][0]["place"] == list(worst.findings[0].place) and "top" not in values

    with nnunet_lite.view(worst.case, at=worst.findings[0].place, browser=False, workspace=paths.root.parent) as page:
        assert page.url.startswith("http://127.0.0.1")
    code, _, err = command("view", worst.case, "--at", 0, 999, 0, "-w", paths.root.parent, cwd=tmp_path)
    assert code == 2 and "has no voxel 0 999 0" in err and "y to" in err


def test_the_report_shows_the_first_findings_until_their_labels_change(paths: Paths) -> None:
    assert "Label audit" not in nnunet_lite.report(workspace=paths.root.parent).read_text()
    first, second, *_ = audit(paths).cases
    page = nnunet_lite.report(workspace=paths.root.parent).read_text()
    assert "Label audit" in page and "Outdated" not in page
    assert f"nnlite view {first.case} --at {' '.join(map(str, first.findings[0].place))} -m first" in page
    changed = read_json(paths.audit)
    changed["cases"][0]["files"] = "of before"
    paths.audit.write_text(json.dumps(changed))
    page = nnunet_lite.report(workspace=paths.root.parent).read_text()
    assert f"Outdated: {first.case} changed" in page and f"nnlite view {second.case} --at" in page
    assert f"nnlite view {first.case} --at" not in page


def test_weak_models_are_named(paths: Paths) -> None:
    for validation in paths.models.glob("*/fold_*/validation"):
        dice = 0.3 if validation.parents[1].name == "first" else 0.1
        scored = {"prediction_file": f"{validation}.nii.gz", "metrics": {"1": {"Dice": dice}}}
        (validation / "summary.json").write_text(json.dumps({"metric_per_case": [scored]}))
    assert audit(paths).notes == (
        "no model has a Dice above 0.30: below 0.6 they contradict correct labels too",
        "second left out: Dice below 90% of the best model's, 0.300",
    )


def test_what_cannot_be_compared_is_named(paths: Paths, tmp_path: Path) -> None:
    shutil.rmtree(paths.models / "second" / "fold_0" / "validation")
    shutil.rmtree(paths.models / "first" / "fold_4")
    broken = next(paths.models.glob("first/fold_1/validation/*.nii.gz"))
    broken.write_bytes(broken.read_bytes()[:50])
    notes = "\n".join(audit(paths, workers=0).notes)
    assert "second has not predicted 5 held-out cases; `nnlite select` predicts them" in notes
    assert (
        f"{broken.name.removesuffix('.nii.gz')} is left out: " in notes and len(read_json(paths.audit)["cases"]) == 23
    )
    for name in ("first", "second"):
        for folder in paths.models.glob(f"{name}/fold_*/validation"):
            shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"no held-out case of Task04_Hippocampus is predicted.*`nnlite select`"):
        audit(paths)
    with pytest.raises(UserError, match="no model of Task04_Hippocampus is third"):
        audit(paths, configuration="third")
    shutil.rmtree(paths.models)
    with pytest.raises(UserError, match="no fold of Task04_Hippocampus is trained"):
        audit(paths)
    paths.audit.write_text('{"format": "nnlite-audit-1", "cases": 5}')
    with pytest.raises(UserError, match=r"audit.json.*Run `nnlite audit` again"):
        read_audit(paths)


def test_errors_are_planted_in_a_copy(clean: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in clean.rglob("*.nii.gz")}
    kinds = PLANT["plant_errors"](clean, tmp_path / "copy", share=0.5, seed=4)
    assert PLANT["plant_errors"](clean, tmp_path / "again", share=0.5, seed=4) == kinds and len(kinds) == 12
    assert {file: file.read_bytes() for file in clean.rglob("*.nii.gz")} == before
    for file in (clean / "labelsTr").glob("*.nii.gz"):
        own, other = read_label(file)[0], read_label(tmp_path / "copy" / "labelsTr" / file.name)[0]
        assert np.array_equal(own, other) == (file.name.removesuffix(".nii.gz") not in kinds)
