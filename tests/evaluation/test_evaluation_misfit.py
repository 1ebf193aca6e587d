"""The misfit of cells, beside a plain computation in float64."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from atlas.evaluation import misfit as module
from atlas.evaluation.misfit import levels, misfit, pooled, variance_within

RNG = np.random.default_rng(0)
QUERY = csr_matrix(RNG.poisson(0.8, (90, 12)).astype(np.float32))
REFERENCE = csr_matrix(RNG.poisson(1.1, (70, 12)).astype(np.float32))
BATCHES = np.arange(90) // 2 % 2
LABELS = np.where(np.arange(90) < 5, 2, np.arange(90) % 2)  # label 2 is too rare to have a say
NEAR = np.array([RNG.choice(90, 7, replace=False) for _ in range(90)])
AMONG = np.array([RNG.choice(70, 5, replace=False) for _ in range(90)])
VARIANCE = RNG.random(12)


def log_of(sums):
    return np.log(2 + 1e4 * sums / sums.sum())


def brute() -> np.ndarray:
    query, reference = (counts.toarray().astype(np.float64) for counts in (QUERY, REFERENCE))
    found = np.empty((90, 12))
    for i in range(90):
        mine, theirs = np.zeros(12), np.zeros(12)
        for j in NEAR[i]:
            mine += query[j]
            for r in AMONG[j]:
                theirs += reference[r]
        found[i] = log_of(mine) - log_of(theirs)
    out = np.empty(90)
    for batch in (0, 1):
        own = batch == BATCHES
        means = [
            found[own & (label == LABELS)].mean(axis=0)
            for label in range(3)
            if (own & (label == LABELS)).sum() >= 20
        ]
        assert len(means) == 2
        out[own] = [
            (VARIANCE**2 * (row - np.median(means, axis=0)) ** 2).sum() for row in found[own]
        ]
    return np.array([np.mean([out[j] ** 2 for j in NEAR[i]]) ** 0.5 for i in range(90)])


@pytest.mark.parametrize("values", [2**22, 100])
def test_it_is_what_its_formula_says(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    monkeypatch.setattr(module, "_BLOCK_VALUES", values)
    made = misfit(QUERY, REFERENCE, pooled(NEAR, 90), pooled(AMONG, 70), BATCHES, LABELS, VARIANCE)
    np.testing.assert_allclose(made, brute(), rtol=1e-10)


@pytest.mark.parametrize("values", [2**22, 100])
def test_variance_is_that_within_batches(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    monkeypatch.setattr(module, "_BLOCK_VALUES", values)
    near, batches = AMONG[:60], BATCHES[:60]
    made = variance_within(REFERENCE, pooled(near, 70), batches)
    rows = np.array(
        [log_of(REFERENCE.toarray().astype(np.float64)[own].sum(axis=0)) for own in near]
    )
    parts = [rows[batches == batch].var(axis=0) * (batches == batch).sum() for batch in (0, 1)]
    np.testing.assert_allclose(made, np.sum(parts, axis=0) / 60, rtol=1e-8, atol=1e-12)
    shifted = REFERENCE.copy()
    assert (variance_within(shifted, pooled(near, 70), np.zeros(60, np.int64)) > 0).all()


def test_what_the_batch_adds_to_all_labels_is_left_out() -> None:
    # a gene that only the query's batch 1 has, in all its cells alike
    batch = np.repeat([0, 1], 45)
    query = np.full((90, 3), 40, np.float32)
    query[45:, 2] = 900
    reference = csr_matrix(np.full((70, 3), 40.0, np.float32))
    near = np.array([RNG.choice(45, 7, replace=False) + 45 * b for b in batch])
    made = misfit(
        csr_matrix(query),
        reference,
        pooled(near, 90),
        pooled(AMONG, 70),
        batch,
        np.arange(90) % 2,
        np.ones(3),
    )
    np.testing.assert_allclose(made, 0, atol=1e-20)


def test_cells_without_counts_have_levels() -> None:
    np.testing.assert_allclose(levels(csr_matrix((2, 4), dtype=np.float32)), np.log(2))
