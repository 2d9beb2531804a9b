"""Means over cases and labels, their confidence intervals, and paired comparisons.

Intervals are percentiles of 1000 resamples of the cases (bootstrap, Efron 1979) with a fixed seed. A label that no case
of a resample has keeps its mean: without it, the resample would have the mean of other labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_RESAMPLES = 1000
_FLIPS = 9999
_SEED = 12345
_INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Statistic:
    """One metric over cases.

    Parameters
    ----------
    n : int
        Number of cases to which the metric applies.
    mean, median : float or None
        None if there is no such case.
    low, high : float or None
        Ends of the 95 % interval of the mean; None below two cases.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    median: float | None


@dataclass(frozen=True)
class Margin:
    """The mean difference of two measurements of the same cases, with its 95 % interval.

    Parameters
    ----------
    mean : float or None
        None if a measurement has no value.
    low, high : float or None
        Ends of the 95 % interval; None below two cases.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None


def summarize(table: np.ndarray) -> Statistic:
    """Sum up a metric over cases and labels: the mean over labels of their means over cases.

    Parameters
    ----------
    table : ndarray, shape (cases, labels)
        NaN where the metric does not apply. The median is over cases, of their means over labels.
    """
    table = table[np.isfinite(table).any(axis=1)]
    n = len(table)
    if not n:
        return Statistic(0, None, None, None, None)
    low = high = None
    if n > 1:
        low, high = (float(v) for v in np.percentile(_weighted_means(table, _resamples(n)), _INTERVAL))
    return Statistic(n, mean_of_labels(table), low, high, float(np.median(np.nanmean(table, axis=1))))


def compare_paired(ours: np.ndarray, others: np.ndarray) -> Margin:
    """Compute by how much the mean of one table (cases, labels) is above the mean of another one of the same cases.

    Each resample draws the same cases of both, so that hard cases do not widen the interval.

    Parameters
    ----------
    ours, others : ndarray, shape (cases, labels)
        NaN where the metric does not apply.
    """
    rows = np.isfinite(ours).any(axis=1) | np.isfinite(others).any(axis=1)
    ours, others = ours[rows], others[rows]
    n = len(ours)
    if not np.isfinite(ours).any() or not np.isfinite(others).any():
        return Margin(None)
    mean = mean_of_labels(ours) - mean_of_labels(others)
    if n < 2:
        return Margin(mean)
    draws = _weighted_means(ours, _resamples(n)) - _weighted_means(others, _resamples(n))
    low, high = (float(v) for v in np.percentile(draws, _INTERVAL))
    return Margin(mean, low, high)


def p_of_gain(differences: np.ndarray) -> float:
    """Test whether the mean of paired differences is above zero, by a one-sided sign-flip test.

    Parameters
    ----------
    differences : ndarray, shape (cases,)

    Returns
    -------
    float
        The probability of a mean at least as high if gains and losses are equally likely: exact up to 13 cases that
        differ, above by 9999 flips with a fixed seed.
    """
    from scipy.stats import permutation_test  # slow to import, and needed by few commands

    changed = differences[differences != 0]
    if len(changed) < 2:
        return 0.5 if changed.sum() > 0 else 1.0
    test = permutation_test(
        (changed,), np.sum, permutation_type="samples", n_resamples=_FLIPS, alternative="greater", vectorized=True,
        random_state=_SEED,
    )  # fmt: skip
    return float(test.pvalue)


def p_of_difference(differences: np.ndarray) -> float:
    """Test whether paired differences are symmetric about zero, by Wilcoxon's two-sided signed-rank test.

    Parameters
    ----------
    differences : ndarray, shape (cases,)
        Those that are zero are left out (Wilcoxon 1945).
    """
    from scipy.stats import wilcoxon  # slow to import, and needed by one command

    changed = differences[differences != 0]
    return float(wilcoxon(changed).pvalue) if len(changed) else 1.0


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none.

    Parameters
    ----------
    values : iterable of float or None
    """
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_of_labels(table: np.ndarray) -> float:
    """Compute the mean over labels of their means over cases; NaN if there is no value.

    Parameters
    ----------
    table : ndarray, shape (cases, labels)
        NaN where the metric does not apply.
    """
    return float(_weighted_means(table, np.ones((1, len(table))))[0])


def _weighted_means(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the mean over labels of their means over cases, for each row of case weights (rows, cases)."""
    known = np.isfinite(table)
    values, counts = np.where(known, table, 0.0), weights @ known
    with np.errstate(invalid="ignore"):
        by_label = np.where(counts > 0, weights @ values / counts, values.sum(axis=0) / known.sum(axis=0))
        return np.nansum(by_label, axis=1) / known.any(axis=0).sum()


@lru_cache(maxsize=8)
def _resamples(n: int) -> np.ndarray:
    """Return how often each of n cases is drawn, in each resample (resamples, n)."""
    return np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(np.float64)
