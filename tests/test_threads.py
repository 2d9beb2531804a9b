"""Shares cover every sample once, in order, and are not shared out again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nnunet_lite.networks.threads import in_shares


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(
    ("n", "expected"), [(1, [[0]]), (2, [[0], [1]]), (3, [[0], [1], [2]]), (8, [[0, 1], [2, 3], [4, 5], [6, 7]])]
)
def test_shares_are_equal_and_the_rest_comes_last(n: int, expected: list[list[int]]) -> None:
    assert in_shares(n, list) == expected


@pytest.mark.usefixtures("three_threads")
def test_threads_of_a_share_are_its_own() -> None:
    assert in_shares(3, lambda samples: torch.get_num_threads()) == [1, 1, 1]
    assert in_shares(3, lambda samples: in_shares(3, list)) == [[[0, 1, 2]]] * 3
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_no_share_records_gradients_and_all_are_in_the_callers_mode() -> None:
    assert in_shares(3, lambda samples: torch.is_grad_enabled()) == [False] * 3
    with torch.inference_mode():
        assert in_shares(4, lambda samples: torch.is_inference_mode_enabled()) == [True] * 4


@pytest.mark.usefixtures("three_threads")
def test_an_error_of_a_share_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_shares(6, lambda samples: 1 // (samples.start - 2))
