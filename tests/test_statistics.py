"""Means, intervals and paired differences of tables with gaps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from nnunet_lite.evaluation.statistics import Margin, compare_paired, mean_of_labels, summarize

N = np.nan


def test_means_are_over_cases_first() -> None:
    table = np.array([[1.0, 0.2], [0.5, N], [N, N]])
    assert mean_of_labels(table) == pytest.approx((0.75 + 0.2) / 2)
    assert summarize(table).n == 2 and summarize(table).mean == mean_of_labels(table)
    assert np.isnan(mean_of_labels(np.full((3, 2), N)))


def test_paired_interval_equals_scipys() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.9, 60)
    ours, others = hard + rng.normal(0.02, 0.02, 60), hard + rng.normal(0, 0.02, 60)
    found = compare_paired(ours[:, None], others[:, None])
    expected = bootstrap((ours - others,), np.mean, n_resamples=20000, method="percentile", rng=0).confidence_interval
    assert found.mean == pytest.approx((ours - others).mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-3)
    assert found.low is not None and found.low > 0  # although the cases differ far more than the two
    back = compare_paired(others[:, None], ours[:, None])
    assert (back.low, back.high) == (pytest.approx(-found.high), pytest.approx(-found.low))  # type: ignore[operator]


def test_gaps_on_one_side() -> None:
    """Where one predicts nothing of an absent label, and the other something (0)."""
    none, some = np.array([[0.8], [N], [0.7]]), np.array([[0.8], [0.0], [0.7]])
    margin = compare_paired(none, some)
    assert margin.mean == pytest.approx(0.25) and margin.low is not None and margin.low >= 0
    assert compare_paired(np.array([[N], [N]]), np.array([[0.0], [N]])) == Margin(None)
    assert compare_paired(np.array([[0.5]]), np.array([[0.25]])) == Margin(0.25)
    same = compare_paired(some, some)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
