"""Folds are nnU-Net's or those that were asked for, and an edited splits.json is obeyed or refused with the reason."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import KFold

import nnunet_lite
from nnunet_lite.commands.train import fold_names
from nnunet_lite.data.dataset import Dataset, read_dataset
from nnunet_lite.data.images import read_label
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.planning import fingerprint
from nnunet_lite.training.folds import Wanted, make_folds, must_be_made, read_fold, read_splits, wanted_folds
from nnunet_lite.training.splits import Splits
from nnunet_lite.workspace import planned_paths

Copy = Callable[..., Path]
IDS = [f"case_{i:03d}" for i in (7, 3, 11, 1, 2, 9, 30, 4, 5, 6, 8, 10)]


def test_folds_are_those_of_nnunet() -> None:
    ids = np.array(sorted(IDS))
    expected = KFold(n_splits=5, shuffle=True, random_state=12345).split(ids)
    for fold, (train, val) in zip(make_folds(IDS), expected, strict=True):
        assert fold == {"train": ids[train].tolist(), "val": ids[val].tolist()}
    assert sorted(case for fold in make_folds(IDS) for case in fold["val"]) == sorted(IDS)


def test_splits_are_written_once_and_obeyed(tmp_path: Path) -> None:
    splits = tmp_path / "splits.json"
    fold = read_fold(splits, IDS, "3")
    assert read_json(splits) == make_folds(IDS)
    assert (fold.name, list(fold.training), list(fold.validation)) == ("3", *make_folds(IDS)[3].values())
    write_json(splits, [{"train": ["case_001"], "val": ["case_002", "case_003"]}])
    edited = read_fold(splits, IDS, "0")
    assert (edited.training, edited.validation) == (("case_001",), ("case_002", "case_003"))
    with pytest.raises(UserError, match=r"no fold '1'.*Folds are 0 to 0"):
        read_fold(splits, IDS, "1")


def test_all_trains_on_every_case_and_needs_no_splits(tmp_path: Path) -> None:
    fold = read_fold(tmp_path / "splits.json", IDS[:3], "all")
    assert fold.training == tuple(sorted(IDS[:3]))
    assert not list(tmp_path.iterdir())


def test_an_empty_validation_is_allowed(tmp_path: Path) -> None:
    write_json(tmp_path / "splits.json", [{"train": IDS, "val": []}])
    assert read_fold(tmp_path / "splits.json", IDS, "0").validation == ()


@pytest.mark.parametrize("name", ["5", "-1", "a", "", "1.0", "01", "²"])
def test_an_unknown_fold_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"no fold '{name}'.*Folds are 0 to 4"):
        read_fold(tmp_path / "splits.json", IDS, name)


def test_too_few_cases_for_five_folds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 cases cannot be split into 5 folds"):
        read_fold(tmp_path / "splits.json", IDS[:4], "0")


def test_cases_in_no_fold_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [f"case_{i}" for i in range(6)]
    read_fold(tmp_path / "splits.json", ids[:5], "0")
    read_fold(tmp_path / "splits.json", ids, "0")
    assert "leaves out 1 cases (case_5)" in capsys.readouterr().err


def test_a_fold_that_is_not_there_leaves_no_file(tmp_path: Path) -> None:
    """Who asks for fold 7 may mean to ask for eight folds."""
    with pytest.raises(UserError, match=r"no fold '7'.*Folds are 0 to 4"):
        read_fold(tmp_path / "splits.json", IDS, "7")
    assert not list(tmp_path.iterdir())
    assert len(read_fold(tmp_path / "splits.json", IDS, "7", Wanted(n_folds=8)).validation) == 1


def patients(sizes: Sequence[int]) -> dict[str, str]:
    """Case id -> patient, of patients with so many scans."""
    return {f"pat{p:02}_{scan}": f"pat{p:02}" for p, n in enumerate(sizes) for scan in range(n)}


def held_out(folds: Splits) -> list[int]:
    return [len(fold["val"]) for fold in folds]


@pytest.mark.parametrize("sizes", [[2] * 10, [1, 2, 3, 1, 1, 7, 2, 2, 1, 1, 4, 3, 2, 1], [9, 1, 1, 1, 1], [1] * 30])
def test_a_group_is_never_on_both_sides(sizes: list[int]) -> None:
    groups = patients(sizes)
    folds = make_folds(list(groups), 5, groups)
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(groups)
    for fold in folds:
        assert not {groups[case] for case in fold["train"]} & {groups[case] for case in fold["val"]}
        assert sorted(fold["train"] + fold["val"]) == sorted(groups)
    if max(sizes) <= 7:
        assert max(held_out(folds)) - min(held_out(folds)) <= 1, "about equal numbers of cases"
    assert folds == make_folds(list(reversed(groups)), 5, groups), "the same each time"
    if len(sizes) > 5:
        assert folds[0]["val"] != sorted(groups)[: len(folds[0]["val"])], "at random"


def test_each_fold_has_its_share_of_every_stratum() -> None:
    groups = patients([2] * 20 + [1] * 20)
    strata = {case: f"s{int(case[3:5]) % 4}" for case in groups}
    for by in (None, groups):
        for fold in make_folds(list(groups), 5, by, strata):
            counts = Counter(strata[case] for case in fold["val"])
            assert set(counts) == {"s0", "s1", "s2", "s3"} and set(counts.values()) <= {2, 3, 4}
            assert 11 <= len(fold["val"]) <= 13
    rare = strata | {"pat00_0": "alone"}
    assert sum("pat00_0" in fold["val"] for fold in make_folds(list(groups), 5, None, rare)) == 1


@pytest.mark.parametrize(
    ("sizes", "n_folds", "message"),
    [
        ([3, 3, 3], 5, r"3 groups cannot be split into 5 folds\. Train on .* all`, or take --folds 3\."),
        ([30], 5, r"1 group cannot be split into 5 folds\. Train on every case: `nnlite train CONFIGURATION all`\.$"),
        ([1] * 12, 13, r"12 groups cannot be split into 13 folds"),
    ],
)
def test_fewer_groups_than_folds(sizes: list[int], n_folds: int, message: str) -> None:
    groups = patients(sizes)
    with pytest.raises(UserError, match=message):
        make_folds(list(groups), n_folds, groups)


def test_groups_and_strata_together_are_as_even_as_can_be() -> None:
    """Of 6 patients with two scans each, one small and one large: two patients to each of three folds."""
    groups = patients([2] * 6)
    strata = {case: f"volume {1 + int(case[3:5]) // 3 + 2 * int(case[-1])}" for case in groups}
    folds = make_folds(list(groups), 3, groups, strata)
    assert held_out(folds) == [4, 4, 4]
    assert [len({strata[case] for case in fold["val"]}) for fold in folds] == [4, 4, 4]


def test_strata_smaller_than_the_number_of_folds() -> None:
    with pytest.raises(UserError, match=r"no stratum has 5 cases, one for each fold\. Use fewer strata"):
        make_folds(IDS, 5, None, {case: str(i // 4) for i, case in enumerate(IDS)})


# ------------------------------------------------------------------------------------------------ what is asked for


@pytest.fixture(scope="module")
def dataset(hippocampus: Path) -> Dataset:
    return read_dataset(hippocampus)


def ids_of(dataset: Dataset) -> list[str]:
    return [case.id for case in dataset.cases]


def test_real_volumes_are_spread_evenly(dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each of four folds holds out eight cases, two from each quarter by volume."""
    folds = read_splits(tmp_path / "splits.json", ids_of(dataset), wanted_folds(dataset, 4, stratify=True))
    assert "splits.json: 4 folds of 32 cases, stratified by labels; held out: 8, 8, 8, 8" in capfd.readouterr().err
    volumes = {}
    for case in dataset.cases:
        assert case.label is not None
        label, geometry, _ = read_label(case.label)
        volumes[case.id] = (label > 0).sum() * np.prod(geometry.spacing)
    quarter = {case_id: rank // 8 for rank, case_id in enumerate(sorted(volumes, key=lambda c: volumes[c]))}
    for fold in folds:
        assert Counter(quarter[case_id] for case_id in fold["val"]) == dict.fromkeys(range(4), 2)


def test_how_folds_were_made_is_recorded(dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    splits = tmp_path / "splits.json"
    read_splits(splits, ids_of(dataset), wanted_folds(dataset, 3, r"_\d\d"))
    made = read_json(tmp_path / "splits_made.json")
    assert (made["folds"], made["group_by"], made["stratify"], made["seed"]) == (3, r"_\d\d", None, 12345)
    assert made["groups"]["hippocampus_001"] == "_00"
    assert f"3 folds of 32 cases in {len(set(made['groups'].values()))} groups by " in capfd.readouterr().err


def test_folds_that_are_there_are_those_asked_for_or_refused(dataset: Dataset, tmp_path: Path) -> None:
    splits, ids = tmp_path / "splits.json", ids_of(dataset)
    table = tmp_path / "sites.csv"
    table.write_text("".join(f"{case_id},{i % 3}\n" for i, case_id in enumerate(ids)))

    def ask(**options: Any) -> Splits:
        return read_splits(splits, ids, wanted_folds(dataset, **options))

    folds = ask(n_folds=3, group_by=r"_\d\d", stratify=table)
    same = [{}, {"n_folds": 3}, {"group_by": r"(\d\d)\d"}, {"stratify": str(table)}, {"splits": splits}]
    assert all(ask(**options) == folds for options in same), "what was not asked is as it is there"
    held = r"splits\.json: holds 3 folds of 32 cases in \d+ groups by _\\d\\d, stratified by .*sites\.csv, "
    fix = r"\. Leave the options for folds out to continue with these, or delete the file to make them again\.$"
    for options, what in (
        ({"n_folds": 5}, "not 5"),
        ({"group_by": r"\d$"}, "with the group 0 on both sides of fold 0"),
        ({"stratify": True}, "not stratified by labels"),
    ):
        with pytest.raises(UserError, match=held + what + fix):
            ask(**options)
    table.write_text("".join(f"{case_id},{i % 2}\n" for i, case_id in enumerate(ids)))
    with pytest.raises(UserError, match=r"not stratified by .*sites\.csv"):
        ask(stratify=table)


def test_an_edit_voids_the_record(dataset: Dataset, tmp_path: Path) -> None:
    splits, ids = tmp_path / "splits.json", ids_of(dataset)
    stratified = wanted_folds(dataset, 3, stratify=True)
    folds = read_splits(splits, ids, stratified)
    first, second = folds[0]["val"][0], folds[1]["val"][0]
    for fold in folds:
        for side in fold.values():
            side[:] = [{first: second, second: first}.get(case_id, case_id) for case_id in side]
    write_json(splits, folds)
    assert read_splits(splits, ids, wanted_folds(dataset, 3)) == folds
    with pytest.raises(UserError, match=r"holds 3 folds of 32 cases \(given or edited\), not stratified by labels"):
        read_splits(splits, ids, stratified)


def test_a_data_set_that_has_grown_is_told(dataset: Dataset, tmp_path: Path) -> None:
    splits, ids = tmp_path / "splits.json", ids_of(dataset)
    read_splits(splits, ids[:30])
    assert len(read_splits(splits, ids)) == 5
    with pytest.raises(UserError, match="holds 5 folds of 30 cases, not of the 32 that the data set has"):
        read_splits(splits, ids, wanted_folds(dataset, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_folds": 1}, r"1 is no number of folds\. Take 2 or more, or train on every case: fold `all`"),
        ({"n_folds": 3, "splits": "x.json"}, "--splits says what the folds are: --folds, --group-by and --stratify"),
        ({"splits": "x.json"}, r"x\.json: no such file"),
        ({"splits": "x.csv"}, r"x\.csv: no such file"),
        ({"stratify": "x.csv"}, r"x\.csv: no such file"),
        ({"group_by": r"pat\d+"}, r"matches nothing in cases hippocampus_\d+, "),
    ],
)
def test_mistakes_are_told_before_anything_is_read(dataset: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wanted_folds(dataset, **options)


def test_the_fold_of_all_cases_takes_no_options(dataset: Dataset, tmp_path: Path) -> None:
    """It may be mistaken for all folds."""
    with pytest.raises(UserError, match=r"fold `all` trains on every case.*train each of them: `all-folds`"):
        read_fold(tmp_path / "splits.json", ids_of(dataset), "all", wanted_folds(dataset, 3))


def test_names_that_look_grouped_are_pointed_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ids = list(patients([2] * 8))
    read_splits(tmp_path / "splits.json", ids)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert lines == [
        "warning: pat00_0 and pat00_1 look like images of one patient, whom folds may have on both sides; "
        r"--group-by '^\D*\d+' makes 8 groups of the 16 cases"
    ]
    read_splits(tmp_path / "splits.json", ids)
    read_splits(tmp_path / "grouped.json", ids, Wanted(group_by="x", groups=patients([2] * 8)))
    read_splits(tmp_path / "real.json", [f"hippocampus_{i:03}" for i in range(30)])
    assert "warning" not in capfd.readouterr().err


def test_plan_keeps_folds_that_models_are_trained_on(dataset: Dataset, tmp_path: Path) -> None:
    splits, ids, wanted = tmp_path / "splits.json", ids_of(dataset), wanted_folds(dataset, 3)
    assert not must_be_made(splits, ids, Wanted(), ["a"]), "not asked for"
    assert must_be_made(splits, ids, wanted, ["a"]), "not there"
    read_splits(splits, ids)
    assert must_be_made(splits, ids, wanted, [])
    with pytest.raises(UserError, match=r"holds 5 folds of 32 cases, not 3, and a, b are trained on them\. Scores on"):
        must_be_made(splits, ids, wanted, ["a", "b"])
    assert not must_be_made(splits, ids, wanted_folds(dataset, 5), ["a"]), "these are there"
    with pytest.raises(UserError, match="9 groups cannot be split into 11 folds"):
        must_be_made(splits, ids, wanted_folds(dataset, 11, r"\d$"), [])


# ------------------------------------------------------------------------------------------------ commands and steps


def test_plan_writes_the_folds_that_are_asked_for(
    copy_dataset: Copy, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
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
    assert "splits.json" not in plan("--folds", 3, "--stratify")[1], "they are there"
    assert plan()[0] == 0 and read_json(stored / "splits.json") == first
    code, err = plan("--folds", 2, "--group-by", "_0[0-9]")
    assert code == 0 and "the folds that were there are kept in" in err
    assert read_json(stored / "old_splits.json_1") == first and len(read_json(stored / "splits.json")) == 2
    ids = sorted(case_id for side in first[0].values() for case_id in side)
    (tmp_path / "folds.csv").write_text("".join(f"{case_id},{i % 2}\n" for i, case_id in enumerate(ids)))
    assert plan("--splits", tmp_path / "folds.csv")[0] == 0
    assert [fold["val"] for fold in read_json(stored / "splits.json")] == [ids[::2], ids[1::2]]
    assert "--splits says what the folds are" in plan("--splits", tmp_path / "folds.csv", "--folds", 3)[1]


def test_a_model_does_not_mix_folds(tiny_workspace: Path, tiny_model: Path, tiny_settings: Any, tmp_path: Path) -> None:
    """The tiny model has fold 0 of five; its data set is then given three folds, in every way there is."""
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace)
    paths = planned_paths(workspace)
    model, before = paths.models / "tiny", paths.splits.read_text()
    raw = read_json(paths.dataset)["root"]

    def train(fold: str, **options: Any) -> Any:
        return nnunet_lite.train(
            "3d_fullres", fold, settings=tiny_settings, workspace=workspace, name="tiny", device="cpu", **options
        )

    with pytest.raises(UserError, match=r"splits\.json: holds 5 folds of 10 cases, not 3, and tiny is trained on them"):
        nnunet_lite.plan(raw, workspace=workspace, folds=3)
    with pytest.raises(UserError, match=r"holds 5 folds of 10 cases, not 3\. Leave the options"):
        train("0", folds=3)
    assert paths.splits.read_text() == before
    paths.splits.unlink()
    for fold in ("0", "1"):
        with pytest.raises(
            UserError, match=r"tiny: fold 0 was begun with other cases than splits\.json has for it now"
        ):
            train(fold, folds=3)
    assert [path.name for path in model.glob("fold_*")] == ["fold_0"]
    paths.splits.write_text(before)
    assert train("0", folds=5).scores, "goes on, and has nothing to do"
    folds = read_json(paths.splits)
    write_json(paths.splits, [folds[0], *reversed(folds[1:])])
    assert train("0").scores, "what other folds hold matters where they are trained"


def test_every_fold_is_trained(
    tiny_workspace: Path, tiny_settings: Any, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace)
    paths = planned_paths(workspace)
    shutil.rmtree(paths.models, ignore_errors=True)
    paths.splits.unlink(missing_ok=True)
    quick = {**tiny_settings, "training.epochs": 1, "inference.mirroring": False, "inference.step_size": 1.0}
    settings = [part for key, value in quick.items() for part in ("--set", f"{key}={value}")]
    asked = ["--folds", 3, "--group-by", r"\d\d$", "-w", workspace, "--device", "cpu", *settings]
    code, out, err = command("train", "3d_fullres", "all-folds", *asked, cwd=tmp_path)
    assert code == 0, err
    assert [line for line in out.splitlines() if line.startswith("fold ")] == [
        f"fold {fold}, whole images:" for fold in range(3)
    ]
    trained = sorted((paths.models / "3d_fullres-default").glob("fold_*/cases.json"))
    assert [read_json(file)["validation"] for file in trained] == held_out(read_json(paths.splits))
    shutil.rmtree(trained[2].parent)  # as if it had been stopped before
    code, _, err = command("train", "3d_fullres", "all-folds", "--resume", *asked, cwd=tmp_path)
    assert (code, err.count("training is finished")) == (0, 2) and trained[2].is_file()
    assert command("train", "3d_fullres", 3, *asked, cwd=tmp_path)[2].endswith(
        'error: there is no fold \'3\'. Folds are 0 to 2, "all-folds" and "all".\n'
    )


# ------------------------------------------------------------------------------ splits_final.json of the dataset itself


@pytest.fixture
def with_splits(copy_dataset: Copy, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Splits]:
    """A dataset of six cases with a splits_final.json of two folds."""
    monkeypatch.setattr(fingerprint, "SAMPLES", 100_000)  # to draw 1e8 takes longer than all the rest
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    raw = copy_dataset(6, "data")
    ids = [case.id for case in read_dataset(raw).cases]
    folds = [{"train": ids[:3], "val": ids[3:]}, {"train": ids[3:], "val": ids[:3]}]
    write_json(raw / "splits_final.json", folds)
    return raw, folds


def test_splits_final_is_taken_and_reported(
    with_splits: tuple[Path, Splits], tiny_settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, folds = with_splits
    nnunet_lite.plan(raw, workspace=tmp_path / "ws", workers=0)
    file = raw / "splits_final.json"
    paths = planned_paths(tmp_path / "ws")
    assert read_json(paths.splits) == folds
    assert f"splits.json: 2 folds of 6 cases (from {file}); held out: 3, 3\n" in capsys.readouterr().err
    nnunet_lite.plan(raw, workspace=tmp_path / "ws", workers=0)
    assert fold_names(planned_paths(tmp_path / "ws")) == ["0", "1"]
    assert "splits" not in capsys.readouterr().err, "it is as it was"
    changes = {**tiny_settings, "training.epochs": 1, "training.iterations": 1, "training.patch_size": [16, 16, 16]}
    nnunet_lite.train("3d_fullres", 1, settings=changes, workspace=tmp_path / "ws", device="cpu")
    assert f"training 3d_fullres fold 1 of {file} on 3 cases" in capsys.readouterr().err
    assert read_json(paths.models / "3d_fullres-default" / "fold_1" / "cases.json")["training"] == 3
    dataset = read_dataset(raw)
    everything = read_fold(paths.splits, ids_of(dataset), "all", wanted_folds(dataset))
    assert len(everything.training) == 6, "no option asks for folds"


def test_splits_final_is_looked_for_where_nnunet_keeps_it(
    with_splits: tuple[Path, Splits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, folds = with_splits
    kept = tmp_path / "preprocessed" / raw.name
    kept.mkdir(parents=True)
    write_json(kept / "splits_final.json", folds[::-1])
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    assert wanted_folds(read_dataset(raw)).given == folds, "the dataset's own comes first"
    (raw / "splits_final.json").unlink()
    wanted = wanted_folds(read_dataset(raw))
    assert (wanted.given, wanted.file, wanted.found) == (folds[::-1], str(kept / "splits_final.json"), True)
    monkeypatch.delenv("nnUNet_preprocessed")
    assert wanted_folds(read_dataset(raw)) == Wanted()


@pytest.mark.parametrize("how", [{"n_folds": 3}, {"group_by": r"\d+"}, {"stratify": True}, {"splits": "mine.csv"}])
def test_what_is_asked_for_beats_splits_final(
    with_splits: tuple[Path, Splits], how: dict[str, Any], tmp_path: Path
) -> None:
    raw, folds = with_splits
    ids = sorted(case.id for case in read_dataset(raw).cases)
    (tmp_path / "mine.csv").write_text("".join(f"{case_id},{i % 3}\n" for i, case_id in enumerate(ids)))
    if "splits" in how:
        how = {"splits": tmp_path / "mine.csv"}
    wanted = wanted_folds(read_dataset(raw), **how)
    assert wanted.asked and wanted.given != folds
    (raw / "splits_final.json").write_text("[")  # it is not read
    assert wanted_folds(read_dataset(raw), **how).given == wanted.given


def test_folds_that_are_there_stay_and_splits_final_is_pointed_out(
    with_splits: tuple[Path, Splits], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, folds = with_splits
    (raw / "splits_final.json").rename(tmp_path / "later.json")
    nnunet_lite.plan(raw, workspace=tmp_path / "ws", folds=3, workers=0)
    before = read_json(planned_paths(tmp_path / "ws").splits)
    (tmp_path / "later.json").rename(raw / "splits_final.json")
    capsys.readouterr()
    nnunet_lite.plan(raw, workspace=tmp_path / "ws", workers=0)
    said = capsys.readouterr().err
    assert f"warning: {raw / 'splits_final.json'} is not used: " in said and "holds other folds, which stay" in said
    assert read_json(planned_paths(tmp_path / "ws").splits) == before and len(before) == 3
    nnunet_lite.plan(raw, workspace=tmp_path / "ws", splits=raw / "splits_final.json", workers=0)
    assert read_json(planned_paths(tmp_path / "ws").splits) == folds


def test_cases_that_no_fold_has_are_named(
    with_splits: tuple[Path, Splits], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, folds = with_splits
    gone = folds[0]["val"][-1]
    write_json(raw / "splits_final.json", [{side: [i for i in f[side] if i != gone] for side in f} for f in folds])
    nnunet_lite.plan(raw, workspace=tmp_path / "ws", workers=0)
    assert f"splits_final.json: no fold has case {gone}; only the fold `all` trains on them" in capsys.readouterr().err
