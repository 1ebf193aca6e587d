"""Figures that all cells give: 95 of 100 intervals hold what another draw of all cells gives.

Cells are drawn 500 times from one distribution, batches and labels with them; the truth is the mean
of 500 other draws as large. (Of few cells some measures lean: BRAS of 2,000 lies .7 of its standard
error below that of very many.) Clusters are those of fixed centres, as the errors know nothing of
another start.
"""

from __future__ import annotations

import numpy as np
import pytest

from atlas.evaluation.bras import bras
from atlas.evaluation.clustering import adjusted_rand, agreement, normalised_mutual_information
from atlas.evaluation.codes import Categories
from atlas.evaluation.estimates import Estimate, draw
from atlas.evaluation.regression import explained_variance, pcr_comparison

RNG = np.random.default_rng(5)
CENTRES, SHIFTS = 1.5 * RNG.standard_normal((4, 5)), 0.8 * RNG.standard_normal((3, 5))
N, RUNS = 2000, 500


def estimates(seed: int) -> dict[str, Estimate]:
    """Of 4 labels in 3 batches, before integration and after."""
    n, rng = N, np.random.default_rng(seed)
    label, batch = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1]), rng.choice(3, n, p=[0.5, 0.3, 0.2])
    noise = rng.standard_normal((n, 5))
    z = (CENTRES[label] + 0.5 * SHIFTS[batch] + noise).astype(np.float32)
    before = CENTRES[label] + SHIFTS[batch] + noise + 0.3 * rng.standard_normal((n, 5))
    before = before.astype(np.float32)
    labels, batches = Categories(label, "abcd"), Categories(batch, "xyz")
    clusters = ((z[:, None] - CENTRES) ** 2).sum(axis=2).argmin(axis=1)
    # Errors come from most of the cells, drawn by stratum, as of large stores.
    sample = draw(np.arange(n), batch * 4 + label, n * 4 // 5, seed)
    ours, theirs = bras(z, labels, batches, sample)[1], bras(before, labels, batches, sample)[1]
    after = explained_variance(z, batches, sample)
    first = explained_variance(before, batches, sample)
    return {
        "bras": ours.mean(),
        "bras of a label": ours.of(2),
        "bras, difference": ours.mean().minus(theirs.mean()),
        "pcr": after,
        "pcr, difference": after.minus(first),
        "pcr comparison": pcr_comparison(first, after),
        "ari": agreement(adjusted_rand, clusters, labels, sample),
        "nmi": agreement(normalised_mutual_information, clusters, labels, sample),
        "ari of batches": agreement(adjusted_rand, clusters, batches, sample).scaled(-1, 1),
    }


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Estimate]]:
    return [estimates(seed) for seed in range(RUNS)]


@pytest.fixture(scope="module")
def others() -> list[dict[str, Estimate]]:
    return [estimates(RUNS + seed) for seed in range(RUNS)]


NAMES = ["bras", "bras of a label", "bras, difference", "pcr", "pcr, difference", "pcr comparison"]
NAMES += ["ari", "nmi", "ari of batches"]


@pytest.mark.parametrize("name", NAMES)
def test_intervals_hold_what_another_draw_of_all_cells_gives(
    name: str, runs: list[dict[str, Estimate]], others: list[dict[str, Estimate]]
) -> None:
    truth = np.mean([run[name].value for run in others])
    intervals = [run[name].interval() for run in runs]
    held = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.93 <= held <= 0.97
    errors = np.array([run[name].standard_error for run in runs])
    values = np.array([run[name].value for run in runs])
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)
