"""Estimates from strata: unbiased, and intervals that hold the truth as often as they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from atlas.errors import ConfigError
from atlas.evaluation.estimates import (
    Estimate,
    Sample,
    draw,
    mean,
    mean_of_groups,
    median,
    ratio,
)

RNG = np.random.default_rng(0)
N = 60_000
STRATA = RNG.choice(5, N, p=[0.5, 0.3, 0.15, 0.04, 0.01])
GROUPS = np.where(RNG.random(N) < 0.1, -1, RNG.choice(4, N, p=[0.6, 0.25, 0.1, 0.05]))
SMOOTH = RNG.gamma(2.0, 1.0 + 0.4 * STRATA)
OTHER = SMOOTH + 0.3 * RNG.standard_normal(N) + 0.1
BINARY = (RNG.random(N) < 0.85 - 0.1 * STRATA).astype(float)
RARE = (RNG.random(N) < 0.985).astype(float)
ROWS = np.arange(N)


def group_means(values: np.ndarray) -> float:
    return float(np.mean([values[g == GROUPS].mean() for g in range(4)]))


CASES: dict[str, tuple[Callable[[Sample], Estimate], float]] = {
    "mean": (lambda s: mean(SMOOTH[s.rows], s), SMOOTH.mean()),
    "share": (lambda s: mean(BINARY[s.rows], s, share=True), BINARY.mean()),
    "share near 1": (lambda s: mean(RARE[s.rows], s, share=True), RARE.mean()),
    "mean of a label": (
        lambda s: mean(SMOOTH[s.rows], s, GROUPS[s.rows] == 1),
        SMOOTH[GROUPS == 1].mean(),
    ),
    "mean of group means": (
        lambda s: mean_of_groups(BINARY[s.rows], GROUPS[s.rows], s),
        group_means(BINARY),
    ),
    "ratio": (lambda s: ratio(SMOOTH[s.rows], OTHER[s.rows], s), SMOOTH.sum() / OTHER.sum()),
    "median": (lambda s: median(SMOOTH[s.rows], s), float(np.median(SMOOTH))),
    "paired difference": (
        lambda s: mean(OTHER[s.rows], s).minus(mean(SMOOTH[s.rows], s)),
        (OTHER - SMOOTH).mean(),
    ),
    "paired difference of medians": (
        lambda s: median(OTHER[s.rows], s).minus(median(SMOOTH[s.rows], s)),
        float(np.median(OTHER) - np.median(SMOOTH)),
    ),
}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [draw(ROWS, STRATA, 1000, seed) for seed in range(500)]


@pytest.mark.parametrize("name", CASES)
def test_intervals_hold_the_truth_in_95_of_100_runs(name: str, samples: list[Sample]) -> None:
    estimate, truth = CASES[name]
    found = [estimate(sample) for sample in samples]
    intervals = [e.interval() for e in found]
    held = np.mean([low <= truth <= high for low, high in intervals])
    # 93 to 97 of 100 is what 500 runs of a true 95 give, two standard errors on either side.
    assert 0.93 <= held <= 0.97
    values = np.array([e.value for e in found])
    assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(500) + 1e-3 * abs(truth)
    errors = np.array([e.standard_error for e in found])
    assert errors.mean() == pytest.approx(values.std(), rel=0.12)


def test_pairing_is_sharper_than_two_samples() -> None:
    sample = draw(ROWS, STRATA, 1000, 0)
    ours, theirs = mean(SMOOTH[sample.rows], sample), mean(OTHER[sample.rows], sample)
    apart = np.hypot(ours.standard_error, theirs.standard_error)
    assert ours.minus(theirs).standard_error < apart / 4
    with pytest.raises(ConfigError, match="different cells"):
        ours.minus(mean(OTHER[:1000], draw(ROWS, STRATA, 1000, 1)))


def test_all_cells_give_the_plain_figures() -> None:
    sample = draw(ROWS, STRATA, N, 0)
    np.testing.assert_array_equal(sample.rows, ROWS)
    assert mean(SMOOTH, sample).value == pytest.approx(SMOOTH.mean(), rel=1e-12)
    assert median(SMOOTH, sample).value == np.median(SMOOTH)
    assert mean_of_groups(BINARY, GROUPS, sample).value == pytest.approx(group_means(BINARY))
    plain = Sample(ROWS, np.zeros(N, dtype=np.int64), np.array([N]))
    error = SMOOTH.std(ddof=1) / np.sqrt(N)
    assert mean(SMOOTH, plain).standard_error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("most", [10, 11, 100, 999])
def test_a_draw_is_as_large_as_asked_with_two_of_each_stratum(most: int) -> None:
    sample = draw(ROWS, STRATA, most, 4)
    assert len(sample) == most
    assert np.all(sample.drawn >= 2)
    assert np.all(np.diff(sample.rows) > 0)
    np.testing.assert_array_equal(sample.sizes, np.bincount(STRATA))
    np.testing.assert_array_equal(STRATA[sample.rows], sample.strata)
    assert sample.weights.sum() == pytest.approx(1)
    np.testing.assert_array_equal(sample.rows, draw(ROWS, STRATA, most, 4).rows)
    assert not np.array_equal(sample.rows, draw(ROWS, STRATA, most, 5).rows)


def test_strata_of_one_cell() -> None:
    strata = np.zeros(50, dtype=np.int64)
    strata[7] = 1
    sample = draw(np.arange(50), strata, 20, 0)
    assert 7 in sample.rows
    assert np.isfinite(mean(np.arange(20.0), sample).standard_error)


def test_all_right_is_not_certain() -> None:
    sample = draw(np.arange(30), np.zeros(30, dtype=np.int64), 30, 0)
    found = mean(np.ones(30), sample, share=True)
    assert found.standard_error == 0
    low, high = found.interval()
    assert high == pytest.approx(1)
    assert 0.85 < low < 0.95  # Wilson: 1 / (1 + z² / 30)
