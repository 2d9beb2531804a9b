"""Groups and strata: from the names of cases, from tables, and from what the label maps hold."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.errors import UserError
from nnunet_lite.training.grouping import make_strata, read_column, read_groups, stratify_by_labels

PAIRS = ["pat01_a", "pat01_b", "pat02_a", "pat02_b", "pat03_a"]


def test_groups_by_expression() -> None:
    assert read_groups(PAIRS, r"pat\d+") == {c: c[:5] for c in PAIRS}, "the whole match"
    assert read_groups(PAIRS, r"t(\d+)_") == {c: c[3:5] for c in PAIRS}, "the first group"
    assert read_groups([*PAIRS, "anna"], r"^(pat\d+)|.+")["anna"] == "anna", "the match where its group took no part"


def test_an_expression_may_be_longer_than_a_file_name() -> None:
    expression = "|".join([r"pat\d+", *(rf"site{i}_\d+" for i in range(60))])
    assert len(expression) > 255
    assert set(read_groups(PAIRS, expression).values()) == {"pat01", "pat02", "pat03"}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (r"pat\d+_b", r"matches nothing in cases pat01_a, pat02_a, pat03_a"),
        (r"^(x*)", r"matches nothing in cases pat01_a, pat01_b, pat02_a and 2 more"),
        (r"0[12]", r"matches nothing in case pat03_a\. "),
        (r"pat(\d+", r"is no regular expression: missing \)"),
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
        ("pat01_a,x\npat01_b,x,3\n", r"line 2 has 3 columns, not two: case, group"),
        ("\n".join(f"{c},{g}" for g in "xy" for c in PAIRS), r"has more than one group for cases pat01_a, pat01_b"),
        ("", r"has no group for cases pat01_a"),
    ],
)
def test_a_table_that_lacks_something(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(UserError, match=rf"groups\.csv: {message}"):
        read_column(tmp_path / "groups.csv", PAIRS, "group")


def test_a_table_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "groups.csv").write_bytes("pat01_a,Müller".encode("latin-1"))
    with pytest.raises(UserError, match=r"groups\.csv: is not UTF-8 text \(byte 9\)"):
        read_column(tmp_path / "groups.csv", PAIRS, "group")


def test_strata_are_label_sets_and_volumes() -> None:
    contents = {f"c{i:02}": ((1, 2), float(i)) for i in range(12)}
    contents |= {f"d{i}": ((1,), 5.0) for i in range(4)} | {"e0": ((), 0.0), "e1": ((2,), 1.0)}
    strata = make_strata(contents, 4)
    volumes = [strata[f"c{i:02}"] for i in range(12)]
    assert volumes == [f"1+2, volume {part} of 3" for part in (1, 2, 3) for _ in range(4)]
    assert strata["d0"] == "1, volume 1 of 1"
    assert strata["e0"] == strata["e1"] == "rare, volume 1 of 1", "sets that not every fold could have go together"
    assert min(Counter(make_strata(contents, 2).values()).values()) >= 2


def test_strata_of_real_labels(
    copy_dataset: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Volumes are those of the files, and a label that hardly occurs is pointed out."""
    dataset = read_dataset(copy_dataset(8))
    for number in (0, 3):
        path = dataset.cases[number].label
        assert path is not None
        label, geometry, _ = read_label(path)
        path.unlink()
        write_label(path, np.where(label == 2, 0, label), geometry)
    strata = stratify_by_labels(dataset, 2)
    alone = {case.id for i, case in enumerate(dataset.cases) if i in (0, 3)}
    assert {case_id for case_id, name in strata.items() if name == "1, volume 1 of 1"} == alone
    assert "warning" not in capfd.readouterr().err
    volumes = {}
    for case in dataset.cases:
        assert case.label is not None
        label, geometry, _ = read_label(case.label)
        volumes[case.id] = (label > 0).sum() * np.prod(geometry.spacing)
    small = [case_id for case_id, name in strata.items() if name == "1+2, volume 1 of 3"]
    assert len(small) == 2 and max(volumes[c] for c in small) <= min(
        volumes[c] for c in set(volumes) - alone - {*small}
    )
    assert set(stratify_by_labels(dataset, 8).values()) == {"rare, volume 1 of 1"}
    assert "label 2 occurs in 6 of 8 cases: not every fold can hold it out" in capfd.readouterr().err


def test_a_label_map_that_is_gone_is_named(copy_dataset: Callable[..., Path]) -> None:
    dataset = read_dataset(copy_dataset(5))
    shutil.rmtree(dataset.root / "labelsTr")
    with pytest.raises(UserError, match=r"hippocampus_\d+\.nii\.gz"):
        stratify_by_labels(dataset, 2)
