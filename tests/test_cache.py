"""Cases are the same wherever they lie, and what `auto` chooses follows from what is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_lite.training.cache import load_case, load_cases, move_case

CPU = torch.device("cpu")


@pytest.mark.parametrize(("cache", "kind"), [("ram", np.ndarray), ("auto", np.ndarray), ("device", torch.Tensor)])
def test_loaded_cases_hold_what_is_on_disk(
    tiny_cases: list[Any], cache: Any, kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    by_id = {case.case_id: case for case in tiny_cases[:3]}
    found = load_cases(list(by_id), by_id.__getitem__, cache, CPU)
    for case, stored in zip(found, tiny_cases, strict=False):
        assert case.case_id == stored.case_id
        assert isinstance(case.image, kind) and isinstance(case.label, kind)
        np.testing.assert_array_equal(np.asarray(case.image), stored.image[:])
        np.testing.assert_array_equal(np.asarray(case.label), stored.label[:])
        assert case.foreground.keys() == stored.foreground.keys()
        assert case.previous is None
    assert capsys.readouterr().err.count("\n") == 1


def test_cases_too_large_for_the_memory_stay_on_disk(tiny_cases: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    by_id = {case.case_id: case for case in tiny_cases[:2]}
    found = load_cases(list(by_id), by_id.__getitem__, "auto", CPU, processes=10**9)
    assert found == tiny_cases[:2]
    assert "read from disk: only" in capsys.readouterr().err
    assert load_cases(list(by_id), by_id.__getitem__, "disk", CPU) == tiny_cases[:2]


def test_a_loaded_case_keeps_no_file_open(tiny_cases: list[Any]) -> None:
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir()))
    loaded = [load_case(tiny_cases[0]) for _ in range(5)]
    assert len(loaded) == 5 and len(list(files.iterdir())) == before


def test_many_classes_and_previous_stages_go_to_the_device(tiny_cases: list[Any]) -> None:
    from dataclasses import replace

    case = load_case(tiny_cases[0])
    wide = replace(case, label=case.label.astype(np.uint16) + 1000, previous=case.label)
    found = move_case(wide, CPU)
    assert isinstance(found.label, torch.Tensor) and isinstance(found.previous, torch.Tensor)
    assert (found.image.dtype, found.label.dtype, found.previous.dtype) == (torch.float16, torch.int32, torch.uint8)
    np.testing.assert_array_equal(found.label.numpy(), wide.label)
