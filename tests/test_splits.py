"""Folds are nnU-Net's or those of the options; an edited splits.json is used, or refused with the reason."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TINIEST, Command, Copy, as_options
from sklearn.model_selection import KFold

import nnunet_lite
from nnunet_lite.commands.train import fold_names
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, read_dataset
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.planning import fingerprint
from nnunet_lite.training.splits import (
    FoldRule,
    Split,
    check_folds,
    divide,
    find_patients,
    load_splits,
    make_splits,
    make_strata,
    read_column,
    read_groups,
    read_split,
    read_splits,
    stratify_by_labels,
)
from nnunet_lite.workspace import planned_paths

IDS = [f"case_{i:03d}" for i in (7, 3, 11, 1, 2, 9, 30, 4, 5, 6, 8, 10)]
PAIRS = ["pat01_a", "pat01_b", "pat02_a", "pat02_b", "pat03_a"]


def dataset_of(ids: Sequence[str], root: Path = Path()) -> Dataset:
    """A dataset whose cases have names only."""
    return Dataset(
        "x", root, "plain", ("MR",), Labels(names={"background": 0, "a": 1}), tuple(Case(i, ()) for i in ids)
    )


def patients(sizes: Sequence[int]) -> dict[str, str]:
    """Case id -> patient, of patients with these numbers of scans."""
    return {f"pat{p:02}_{scan}": f"pat{p:02}" for p, n in enumerate(sizes) for scan in range(n)}


@pytest.fixture(scope="module")
def dataset(hippocampus: Path) -> Dataset:
    return read_dataset(hippocampus)


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    return tmp_path / "splits.json"


# ------------------------------------------------------------------------------------------------ division into folds


@pytest.mark.parametrize(("n_cases", "n_folds"), [(2, 2), (7, 5), (40, 5), (101, 10)])
def test_folds_are_those_of_scikit_learn(n_cases: int, n_folds: int) -> None:
    ids = [f"case_{i:03d}" for i in range(n_cases)]
    expected = KFold(n_folds, shuffle=True, random_state=12345).split(ids)
    made = [split.validation for split in divide(ids[::-1], n_folds)]
    assert made == [tuple(ids[i] for i in held_out) for _, held_out in expected]


def test_folds_are_those_of_nnunet(splits: Path) -> None:
    ids = np.array(sorted(IDS))
    expected = [
        {"train": ids[train].tolist(), "val": ids[val].tolist()}
        for train, val in KFold(n_splits=5, shuffle=True, random_state=12345).split(ids)
    ]
    fold = read_split(splits, dataset_of(IDS), "3")
    assert read_json(splits) == expected
    assert fold == Split("3", tuple(expected[3]["train"]), tuple(expected[3]["val"]))


@pytest.mark.parametrize("sizes", [[2] * 10, [1, 2, 3, 1, 1, 7, 2, 2, 1, 1, 4, 3, 2, 1], [9, 1, 1, 1, 1], [1] * 30])
def test_a_group_is_never_on_both_sides(sizes: list[int]) -> None:
    groups = patients(sizes)
    folds = divide(list(groups), 5, groups)
    assert sorted(case for fold in folds for case in fold.validation) == sorted(groups)
    for fold in folds:
        assert not {groups[case] for case in fold.training} & {groups[case] for case in fold.validation}
        assert sorted(fold.training + fold.validation) == sorted(groups)
    held_out = [len(fold.validation) for fold in folds]
    if max(sizes) <= 7:
        assert max(held_out) - min(held_out) <= 1, "about equal numbers of cases"
    assert folds == divide(list(reversed(groups)), 5, groups), "the same each time"
    if len(sizes) > 5:
        assert list(folds[0].validation) != sorted(groups)[: held_out[0]], "at random"


def test_each_fold_has_its_share_of_every_stratum() -> None:
    groups = patients([2] * 20 + [1] * 20)
    strata = {case: f"s{int(case[3:5]) % 4}" for case in groups}
    for by in (None, groups):
        for fold in divide(list(groups), 5, by, strata):
            counts = Counter(strata[case] for case in fold.validation)
            assert set(counts) == {"s0", "s1", "s2", "s3"} and set(counts.values()) <= {2, 3, 4}
            assert 11 <= len(fold.validation) <= 13
    rare = strata | {"pat00_0": "alone"}
    assert sum("pat00_0" in fold.validation for fold in divide(list(groups), 5, None, rare)) == 1
    with pytest.raises(UserError, match=r"no stratum has 16 cases, one for each fold\. Use fewer strata"):
        divide(list(groups), 16, None, strata)


# ------------------------------------------------------------------------------------------------ splits.json


def test_an_edited_file_is_used(splits: Path) -> None:
    write_json(splits, [{"train": ["case_001"], "val": ["case_002", "case_003"]}])
    assert read_split(splits, dataset_of(IDS), "0") == Split("0", ("case_001",), ("case_002", "case_003"))
    with pytest.raises(UserError, match=r"no fold '1'.*Folds are 0 to 0"):
        read_split(splits, dataset_of(IDS), "1")
    write_json(splits, [{"train": IDS, "val": []}])
    assert read_split(splits, dataset_of(IDS), "0").validation == (), "no validation is allowed"


def test_all_trains_on_every_case_without_a_file(splits: Path) -> None:
    fold = read_split(splits, dataset_of(IDS[:3]), "all")
    assert fold.training == tuple(sorted(IDS[:3]))
    with pytest.raises(UserError, match=r"fold `all` trains on every case.*or train `all-folds`"):
        read_split(splits, dataset_of(IDS), "all", FoldRule(3))
    assert not splits.exists()


@pytest.mark.parametrize("name", ["5", "-1", "a", "", "1.0", "01", "²"])
def test_an_unknown_fold_is_named_and_no_file_is_written(splits: Path, name: str) -> None:
    """A user who asks for fold 7 may need the option for eight folds."""
    with pytest.raises(UserError, match=f"no fold '{name}'.*Folds are 0 to 4"):
        read_split(splits, dataset_of(IDS), name)
    assert not list(splits.parent.iterdir())
    assert len(read_split(splits, dataset_of(IDS), "7", FoldRule(8)).validation) == 1


def test_cases_without_a_fold_are_named(splits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [f"case_{i}" for i in range(6)]
    read_split(splits, dataset_of(ids[:5]), "0")
    for fold in "01":
        read_split(splits, dataset_of(ids), fold)
    err = capsys.readouterr().err
    assert err.count(f"{splits} leaves out case case_5; edit or delete the file to use all cases") == 1, (
        "not once a fold"
    )


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            FoldRule(1),
            r"32 cases cannot be split into 1 fold\. Train on every case: `.* all`, or take --folds 2 to 32\.",
        ),
        (FoldRule(11, r"\d$"), r"9 groups cannot be split into 11 folds\. .* or take --folds 2 to 9\."),
        (FoldRule(group_by="hippo"), r"1 group cannot be split into 5 folds\. Train on every case: `nnlite .* all`\.$"),
        (FoldRule(3, splits="x.json"), "--splits names the folds: --folds, --group-by and --stratify"),
        (FoldRule(splits="x.json"), r"x\.json: no such file"),
        (FoldRule(splits="x.csv"), r"x\.csv: no such file"),
        (FoldRule(stratify="x.csv"), r"x\.csv: no such file"),
    ],
)
def test_mistakes_are_reported_before_label_maps_are_read(
    dataset: Dataset, splits: Path, rule: FoldRule, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_folds(splits, dataset, rule)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ("123", r"folds are 1, 2, 3\. Number them 0, 1, 2"),
        ("ab", r"folds are a, b\."),
        ("0", r"fold 0 has no training case"),
        ("012", None),
    ],
)
def test_a_table_of_folds_holds_each_case_out_once(tmp_path: Path, numbers: str, message: str | None) -> None:
    table, ids = tmp_path / "folds.csv", sorted(IDS)
    rows = "".join(f"{case_id},{numbers[i % len(numbers)]}\n" for i, case_id in enumerate(ids))
    table.write_text("case,fold\n" + rows)
    if message is not None:
        with pytest.raises(UserError, match=rf"folds\.csv: {message}"):
            load_splits(table, dataset_of(ids))
        return
    folds = load_splits(table, dataset_of(ids))
    assert [list(fold.validation) for fold in folds] == [ids[i::3] for i in range(3)]
    assert all(sorted(fold.training + fold.validation) == ids for fold in folds)


def test_real_volumes_are_spread_evenly(dataset: Dataset, splits: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each of four folds holds out eight cases, two from each quarter by volume; an edit makes the record invalid."""
    rule = FoldRule(4, stratify=True)
    folds = read_splits(splits, dataset, rule)
    assert "splits.json: 4 folds of 32 cases, stratified by labels; held out: 8, 8, 8, 8" in capfd.readouterr().err
    volumes = {}
    for case in dataset.cases:
        assert case.label is not None
        label, geometry, _ = read_label(case.label)
        volumes[case.id] = (label > 0).sum() * np.prod(geometry.spacing)
    quarter = {case_id: rank // 8 for rank, case_id in enumerate(sorted(volumes, key=lambda c: volumes[c]))}
    for fold in folds:
        assert Counter(quarter[case_id] for case_id in fold.validation) == dict.fromkeys(range(4), 2)
    write_json(splits, read_json(splits)[::-1])
    with pytest.raises(UserError, match=r"holds 4 folds of 32 cases \(given or edited\), not those that the options"):
        read_splits(splits, dataset, rule)
    splits.with_name("splits_made.json").write_text("[]")
    with pytest.raises(UserError, match=r"splits_made\.json: is not as nnlite writes it .* Delete it"):
        read_splits(splits, dataset, rule)


def test_existing_folds_agree_with_the_options_or_are_refused(
    dataset: Dataset, splits: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`plan` checks them with `check_folds`, `train` with `read_splits`."""
    table = splits.with_name("sites.csv")
    table.write_text("".join(f"{case.id},{i % 3}\n" for i, case in enumerate(dataset.cases)))
    assert check_folds(splits, dataset, FoldRule(3)) and not check_folds(splits, dataset, FoldRule())
    folds = read_splits(splits, dataset, FoldRule(3, r"_\d\d", table))
    record = read_json(splits.with_name("splits_made.json"))
    assert (record["folds"], record["group_by"], record["stratify"], record["seed"]) == (3, r"_\d\d", str(table), 12345)
    assert record["groups"]["hippocampus_001"] == "_00"
    n_groups = len(set(record["groups"].values()))
    assert f"3 folds of 32 cases in {n_groups} groups by " in capfd.readouterr().err
    both = FoldRule(3, r"_\d+(?=\d)", str(table))
    for rule in (FoldRule(), both, FoldRule(splits=splits)):
        assert read_splits(splits, dataset, rule) == folds and not check_folds(splits, dataset, rule)
    message = (
        r"splits\.json: holds 3 folds of 32 cases in \d+ groups by _\\d\\d, stratified by .*sites\.csv, "
        r"not those that the options make of 32 cases\. Omit the options for folds to continue with these, or delete"
    )
    table.write_text("".join(f"{case.id},{i % 2}\n" for i, case in enumerate(dataset.cases)))
    for rule in (FoldRule(3), FoldRule(group_by=r"\d$"), FoldRule(3, stratify=True), both, FoldRule(splits=table)):
        for check in (check_folds, read_splits):
            with pytest.raises(UserError, match=message):
                check(splits, dataset, rule)
    fewer = replace(dataset, cases=dataset.cases[:31])
    unknown = r"names unknown cases: \S+\. Correct or remove it: without it folds are made again"
    with pytest.raises(UserError, match=unknown):
        read_splits(splits, fewer, FoldRule(3))
    assert len(read_splits(splits.with_name("removed.json"), fewer, FoldRule(3))) == 3
    assert not check_folds(splits, fewer, FoldRule())  # not an error before there is a training
    gone = f"names case {dataset.cases[31].id}, which the dataset does not have"
    assert gone in capfd.readouterr().err
    splits.unlink()
    read_splits(splits, fewer)
    assert len(read_splits(splits, dataset)) == 5, "without an option, new cases are no mistake"
    with pytest.raises(UserError, match="holds 5 folds of 31 cases, not those that the options make of 32 cases"):
        read_splits(splits, dataset, FoldRule(5))


def test_folds_stay_when_cases_are_excluded(dataset: Dataset, splits: Path) -> None:
    """splits.json stays whole, and agrees with its options, whichever cases are left out later."""
    table = splits.with_name("folds.csv")
    table.write_text("".join(f"{case.id},{i % 3}\n" for i, case in enumerate(dataset.cases)))

    def without(*left_out: int) -> Dataset:
        kept = tuple(case for i, case in enumerate(dataset.cases) if i not in left_out)
        return replace(dataset, cases=kept, excluded=tuple(dataset.cases[i] for i in left_out))

    for rule in (FoldRule(3), FoldRule(3, stratify=True), FoldRule(splits=table)):
        first = read_splits(splits, without(0), rule)
        before = splits.read_text()
        for left_out in ((0,), (0, 1), (0, 5, 6)):
            fewer = without(*left_out)
            assert not check_folds(splits, fewer, rule)
            excluded = {case.id for case in fewer.excluded}
            assert [set(fold.training) for fold in read_splits(splits, fewer, rule)] == [
                set(fold.training) - excluded for fold in first
            ]
        assert splits.read_text() == before
        splits.unlink()


# ------------------------------------------------------------------------------------------------ groups, strata


LONG = "|".join([r"pat\d+", *(rf"site{i}_\d+" for i in range(60))])  # longer than a file name may be


@pytest.mark.parametrize(
    ("expression", "groups"),
    [
        (r"pat\d+", ["pat01", "pat01", "pat02", "pat02", "pat03", None]),  # the whole match
        (r"t(\d+)_", ["01", "01", "02", "02", "03", None]),  # the first group
        (r"^(pat\d+)|.+", ["pat01", "pat01", "pat02", "pat02", "pat03", "anna"]),  # the match, without the group
        (LONG, ["pat01", "pat01", "pat02", "pat02", "pat03", None]),
    ],
)
def test_groups_by_expression(expression: str, groups: list[str | None]) -> None:
    expected = {case: group for case, group in zip([*PAIRS, "anna"], groups, strict=True) if group}
    assert read_groups(list(expected), expression) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (r"pat\d+_b", r"matches nothing in cases pat01_a, pat02_a, pat03_a"),
        (r"^(x*)", r"matches nothing in cases pat01_a, pat01_b, pat02_a and 2 more"),
        (r"0[12]", r"matches nothing in case pat03_a\. "),
        ("nowhere.csv", r"nowhere\.csv: no such file"),
    ],
)
def test_an_expression_that_leaves_a_case_without_group(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_groups(PAIRS, expression)


@pytest.mark.parametrize(
    "text",
    [
        "case,group\npat01_a,x\npat01_b,x\npat02_a,y\npat02_b,y\npat03_a,z\n",
        "pat01_a;x\npat01_b;x\n\npat02_a ; y\npat02_b;y\npat03_a;z\nelsewhere;w\n",
        "\ufeffpat01_a\tx\r\npat01_b\tx\r\npat02_a\ty\r\npat02_b\ty\r\npat03_a\tz\r\npat03_a\tz",
        '"pat01_a","x"\npat01_b,x\npat02_a,y\npat02_b,y\npat03_a,z',
    ],
)
def test_groups_by_table(tmp_path: Path, text: str) -> None:
    """With a header or none, as Excel writes it or by hand; rows of other cases do no harm."""
    (tmp_path / "groups.csv").write_text(text)
    assert list(read_groups(PAIRS, str(tmp_path / "groups.csv")).values()) == ["x", "x", "y", "y", "z"]
    (tmp_path / "groups.csv").rename(tmp_path / "groups")
    assert read_groups(PAIRS, str(tmp_path / "groups"))["pat03_a"] == "z", "any file that is there is a table"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,group\npat01_a,x\n", r"has no group for cases pat01_b, pat02_a, pat02_b and 1 more\. It needs two col"),
        ("pat01_a,x\npat01_b,\npat02_a,x\npat02_b,x\npat03_a,x", r"has no group for case pat01_b"),
        ("", r"has no group for cases pat01_a"),
        ("pat01_a,Müller", r"is not UTF-8 text \(byte 9\)"),
    ],
)
def test_a_table_that_lacks_something(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "groups.csv").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=rf"groups\.csv: {message}"):
        read_column(tmp_path / "groups.csv", PAIRS, "group")


@pytest.mark.parametrize(
    "ids",
    [
        [f"hippocampus_{i:03}" for i in range(1, 394, 3)],
        [str(i) for i in range(40)],
        [f"{organ}_{i:03}" for organ in ("lung", "prostate", "la") for i in range(20)],
        [f"BraTS20_Training_{i:03}" for i in range(369)],
        [f"BraTS-GLI-{i:05}-000" for i in range(300)],
        [f"site{site}_{i:03}" for site in range(5) for i in range(30)],
        [f"FLARE{year}_Tr_{i:04}" for year in (22, 23) for i in range(50)],
        [f"1.3.6.1.4.1.14519.5.2.1.6001.{i * 7919**3}" for i in range(1, 60)],
    ],
    ids=lambda ids: ids[0],
)
def test_names_that_do_not_look_grouped(ids: list[str]) -> None:
    assert find_patients(ids) is None


@pytest.mark.parametrize(
    ("ids", "n_groups"),
    [
        (PAIRS, 3),
        ([f"{i}{side}" for i in range(12) for side in "LR"], 12),
        ([f"patient{i:03}_frame{t:02}" for i in range(50) for t in (1, 7 + i % 9)], 50),
        ([f"sub-{i:02}_{20200000 + 37 * i + s}" for i in range(10) for s in (1, 2)], 10),
        ([f"BraTS-GLI-{i:05}-{t:03}" for i in range(30) for t in range(1 + i % 2)], 30),
        ([f"site{s}_pat{i:02}_{x}" for s in range(3) for i in range(12) for x in "ab"], 36),
        ([*(f"pat{i:02}" for i in range(8)), "pat03_again"], 8),
        (["anna", *PAIRS], 4),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_names_that_look_grouped(ids: list[str], n_groups: int) -> None:
    pattern = find_patients(ids)
    assert pattern is not None and len(set(read_groups(ids, pattern).values())) == n_groups


def test_images_of_one_patient_are_pointed_out(splits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the folds are made, and only where no option says which cases belong together."""
    dataset = dataset_of(list(patients([2, 1, 3, 1, 2, 1])))
    check_folds(splits, dataset, FoldRule())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: names look as if the 10 cases were of 6 patients; if so, scores are too good unless"
    )
    expression = line.split("--group-by ")[1].strip("'")
    assert check_folds(splits, dataset, FoldRule(group_by=expression))
    assert capsys.readouterr().err == ""


def test_strata_are_label_sets_and_volumes() -> None:
    contents = {f"c{i:02}": ((1, 2), float(i)) for i in range(12)}
    contents |= {f"d{i}": ((1,), 5.0) for i in range(4)} | {"e0": ((), 0.0), "e1": ((2,), 1.0)}
    strata = make_strata(contents, 4)
    volumes = [strata[f"c{i:02}"] for i in range(12)]
    assert volumes == [f"1+2, volume {part} of 3" for part in (1, 2, 3) for _ in range(4)]
    assert strata["d0"] == "1, volume 1 of 1"
    assert strata["e0"] == strata["e1"] == "rare, volume 1 of 1", "sets that not every fold could have go together"
    assert min(Counter(make_strata(contents, 2).values()).values()) >= 2


def test_rare_labels_make_strata_of_their_own_and_are_reported(
    copy_dataset: Copy, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = read_dataset(copy_dataset(8))
    without = {case.id: case.label for case in dataset.cases[:4:3]}
    for path in without.values():
        assert path is not None
        label, geometry, _ = read_label(path)
        path.unlink()
        write_label(path, np.where(label == 2, 0, label), geometry)
    strata = stratify_by_labels(dataset, 2)
    assert {case_id for case_id, name in strata.items() if name == "1, volume 1 of 1"} == set(without)
    assert "warning" not in capfd.readouterr().err
    assert set(stratify_by_labels(dataset, 8).values()) == {"rare, volume 1 of 1"}
    assert "label 2 occurs in 6 of 8 cases: not every fold can hold it out" in capfd.readouterr().err
    shutil.rmtree(dataset.root / "labelsTr")
    with pytest.raises(UserError, match=r"hippocampus_\d+\.nii\.gz"):
        stratify_by_labels(dataset, 2)


# ------------------------------------------------------------------------------------------------ commands


def test_plan_writes_the_folds_of_the_options(copy_dataset: Copy, command: Command, tmp_path: Path) -> None:
    root = copy_dataset(6)
    stored = tmp_path / "nnlite_workspace" / "broken"

    def plan(*options: object) -> tuple[int, str]:
        code, _, err = command("plan", root, *options, cwd=tmp_path)
        return code, err

    code, err = plan("--folds", 7)
    assert code == 2 and "6 cases cannot be split into 7 folds" in err and not stored.exists()
    assert plan()[0] == 0 and not (stored / "splits.json").exists(), "train makes nnU-Net's"
    code, err = plan("--folds", 3, "--stratify")
    assert code == 0 and "splits.json: 3 folds of 6 cases, stratified by labels; held out: 2, 2, 2" in err
    first = read_json(stored / "splits.json")
    assert "splits.json" not in plan("--folds", 3, "--stratify")[1], "they agree"
    assert plan()[0] == 0 and read_json(stored / "splits.json") == first
    code, err = plan("--folds", 2, "--group-by", "_0[0-9]")
    assert code == 2 and "splits.json: holds 3 folds of 6 cases, stratified by labels, not those" in err
    assert read_json(stored / "splits.json") == first
    (stored / "splits.json").unlink()
    assert plan("--folds", 2, "--group-by", "_0[0-9]")[0] == 0 and len(read_json(stored / "splits.json")) == 2
    assert "--splits names the folds" in plan("--splits", tmp_path / "folds.csv", "--folds", 3)[1]


def test_a_model_does_not_mix_folds(tiny_workspace: Path, tiny_model: Path, tiny_settings: Any, tmp_path: Path) -> None:
    """The tiny model has fold 0 of five; its dataset then gets three folds, in every possible way."""
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace)
    paths = planned_paths(workspace)
    model, before = paths.models / "tiny", paths.splits.read_text()
    raw = read_json(paths.dataset)["root"]

    def train(fold: str, **options: Any) -> Any:
        return nnunet_lite.train(
            "3d_fullres", fold, settings=tiny_settings, workspace=workspace, name="tiny", device="cpu", **options
        )

    for change in (lambda: nnunet_lite.plan(raw, workspace=workspace, folds=3), lambda: train("0", folds=3)):
        with pytest.raises(UserError, match=r"splits\.json: holds 5 folds of 10 cases, not those .* Omit the options"):
            change()
    assert paths.splits.read_text() == before
    paths.splits.unlink()
    for fold in ("0", "1"):
        with pytest.raises(UserError, match=r"tiny: fold 0 was trained on other cases than splits\.json has now"):
            train(fold, folds=3)
    assert [path.name for path in model.glob("fold_*")] == ["fold_0"]
    paths.splits.write_text(before)
    assert train("0", folds=5).scores, "resumes, and has nothing to do"
    folds = read_json(paths.splits)
    write_json(paths.splits, [folds[0], *reversed(folds[1:])])
    assert train("0").scores, "the cases of untrained folds do not matter"


def test_a_case_is_excluded_after_training(
    tiny_workspace: Path, tiny_model: Path, tiny_settings: Any, tmp_path: Path
) -> None:
    """A finished fold is selected with the cases that are left; to train it further is refused until the undo."""
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace)
    paths = planned_paths(workspace)
    raw, held_out = read_json(paths.dataset)["root"], read_json(paths.splits)[0]["val"]
    train = partial(nnunet_lite.train, "3d_fullres", "0", workspace=workspace, name="tiny", device="cpu")
    longer = {**tiny_settings, "training.epochs": tiny_settings["training.epochs"] + 1}
    planned = paths.plans.read_text()
    nnunet_lite.plan(raw, workspace=workspace, exclude=held_out[0])
    assert nnunet_lite.select(workspace=workspace, device="cpu").candidates[0].n_cases == len(held_out) - 1
    with pytest.raises(UserError, match=r"other settings: .*the plan \(10 cases -> 9; see --exclude\)"):
        train(settings=longer)
    paths.plans.write_text(planned)  # as if the case had not changed the plan
    assert len(train(settings=tiny_settings).scores["0"].rows) == len(held_out) - 1
    with pytest.raises(UserError, match=r"fold_0: began with other cases than --exclude leaves now"):
        train(settings=longer)
    nnunet_lite.plan(raw, workspace=workspace, exclude="")
    assert nnunet_lite.select(workspace=workspace, device="cpu").candidates[0].n_cases == len(held_out)
    assert len(train(settings=longer).scores["0"].rows) == len(held_out)


def test_every_fold_is_trained(tiny_workspace: Path, command: Command, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace)
    paths = planned_paths(workspace)
    shutil.rmtree(paths.models, ignore_errors=True)
    paths.splits.unlink(missing_ok=True)
    settings = as_options({**TINIEST, "training.epochs": 1, "training.patch_size": [16, 16, 16]})
    options = ["--folds", 3, "--group-by", r"\d\d$", "-w", workspace, "--device", "cpu", *settings]
    code, out, err = command("train", "3d_fullres", "all-folds", *options, cwd=tmp_path)
    assert code == 0, err
    assert [line for line in out.splitlines() if line.startswith("fold ")] == [
        f"fold {fold}, whole images:" for fold in range(3)
    ]
    assert "whole images:\n" not in err and "fold 1: Scores of " in err, "each table once"
    trained = sorted((paths.models / "3d_fullres-default").glob("fold_*/cases.json"))
    assert [read_json(file)["validation"] for file in trained] == [len(f["val"]) for f in read_json(paths.splits)]
    shutil.rmtree(trained[2].parent)  # as if it had been stopped before
    code, _, err = command("train", "3d_fullres", "all-folds", "--resume", *options, cwd=tmp_path)
    assert (code, err.count("training is finished")) == (0, 2) and trained[2].is_file()
    assert command("train", "3d_fullres", 3, *options, cwd=tmp_path)[2].endswith(
        'error: there is no fold \'3\'. Folds are 0 to 2, "all-folds" and "all".\n'
    )


# ------------------------------------------------------------------------------ splits_final.json of the dataset itself

Files = tuple[Path, list[dict[str, list[str]]]]


@pytest.fixture
def with_final(copy_dataset: Copy, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A dataset of six cases with a splits_final.json of two folds."""
    monkeypatch.setattr(fingerprint, "SAMPLES", 100_000)  # to draw 1e8 takes longer than all the rest
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    raw = copy_dataset(6, "data")
    ids = [case.id for case in read_dataset(raw).cases]
    folds = [{"train": ids[:3], "val": ids[3:]}, {"train": ids[3:], "val": ids[:3]}]
    write_json(raw / "splits_final.json", folds)
    return raw, folds


def test_splits_final_is_used_and_reported(
    with_final: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, folds = with_final
    file, workspace = raw / "splits_final.json", tmp_path / "ws"
    nnunet_lite.plan(raw, workspace=workspace, workers=0)
    paths = planned_paths(workspace)
    assert read_json(paths.splits) == folds
    assert f"splits.json: 2 folds of 6 cases (from {file}); held out: 3, 3\n" in capsys.readouterr().err
    nnunet_lite.plan(raw, workspace=workspace, workers=0)
    assert fold_names(planned_paths(workspace)) == ["0", "1"]
    assert "splits" not in capsys.readouterr().err, "nothing changed"
    file.write_text("[")  # it is not needed any more
    changes = {**TINIEST, "training.epochs": 1, "training.iterations": 1, "training.patch_size": [16, 16, 16]}
    nnunet_lite.train("3d_fullres", 1, settings=changes, workspace=workspace, device="cpu")
    err = capsys.readouterr().err
    assert f"training 3d_fullres fold 1 of {file} on 3 cases" in err and f"warning: {file} is not used: " in err
    assert read_json(paths.models / "3d_fullres-default" / "fold_1" / "cases.json")["training"] == 3
    assert len(read_split(paths.splits, read_dataset(raw), "all").training) == 6


def test_splits_final_is_found_where_nnunet_keeps_it(
    with_final: Files, splits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, folds = with_final
    read_splits(splits, read_dataset(raw), FoldRule(3))
    for _ in range(2):
        assert not check_folds(splits, read_dataset(raw), FoldRule()), "existing folds stay"
    warning = f"{raw / 'splits_final.json'} is not used: {splits} exists."
    assert capsys.readouterr().err.count(warning) == 1, "`run` checks them for each fold"
    record = splits.with_name("splits_made.json")
    content = record.read_text()
    record.write_text(content[:9])
    with pytest.raises(UserError, match=r"splits_made\.json: invalid JSON"):
        check_folds(splits, read_dataset(raw), FoldRule())
    record.write_text(content)
    other = tmp_path / "preprocessed" / raw.name / "splits_final.json"
    write_json(other, folds[::-1])
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    for file in (raw / "splits_final.json", other):  # the dataset's own comes first
        found, record = make_splits(read_dataset(raw))
        assert record.splits == str(file) and list(found[0].training) == read_json(file)[0]["train"]
        file.unlink()
    assert len(make_splits(read_dataset(raw))[0]) == 5


@pytest.mark.parametrize("rule", [FoldRule(3), FoldRule(group_by=r"\d+"), FoldRule(splits="mine.csv")])
def test_an_option_overrules_splits_final(
    with_final: Files, rule: FoldRule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, _ = with_final
    monkeypatch.chdir(tmp_path)
    (raw / "splits_final.json").write_text("[")  # it is not read
    dataset = read_dataset(raw)
    Path("mine.csv").write_text("".join(f"{case.id},{i % 3}\n" for i, case in enumerate(dataset.cases)))
    assert len(make_splits(dataset, rule)[0]) == (rule.folds or (3 if rule.splits else 5))
