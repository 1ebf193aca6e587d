"""Entropy of batch mixing, against scipy's entropy cell by cell and drawn permutations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.measures import evaluate_embedding
from atlas.evaluation.mixing import batch_entropies, permutation_ceiling
from atlas.evaluation.neighbours import nearest


def test_entropies_equal_scipys_cell_by_cell() -> None:
    rng = np.random.default_rng(0)
    batches = rng.integers(0, 5, size=300)
    indices = rng.integers(0, 300, size=(40, 15))
    expected = [
        scipy.stats.entropy(np.unique(batches[row], return_counts=True)[1]) for row in indices
    ]
    np.testing.assert_allclose(batch_entropies(indices, batches, 5), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("k", "sizes", "share"),
    [(15, [50_000] * 2, 0.95), (50, [1_000] * 100, 0.78), (50, [90_000, 10_000], 0.47)],
)
def test_ceiling_has_the_known_share_of_log_b(k: int, sizes: list[int], share: float) -> None:
    # 90/10 batches reach .469 of ln 2 with ever more neighbours, and less with few.
    ceiling = permutation_ceiling(np.array(sizes), k) / math.log(len(sizes))
    assert ceiling == pytest.approx(share, abs=0.02)


def test_ceiling_equals_the_mean_over_drawn_permutations() -> None:
    rng = np.random.default_rng(1)
    batches = np.repeat([0, 1, 2], [20, 30, 5])
    z = rng.standard_normal((55, 2)).astype(np.float32)
    found = nearest(z, z, 10, np.arange(55))
    drawn = [
        batch_entropies(found.indices, rng.permutation(batches), 3).mean() for _ in range(2000)
    ]
    ceiling = permutation_ceiling(np.array([20, 30, 5]), 10)
    assert ceiling == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / math.sqrt(2000))


def test_separated_and_mixed_batches() -> None:
    rng = np.random.default_rng(2)
    codes = np.repeat([0, 1], 400)
    batches = Categories(codes, ["a", "b"])
    z = rng.standard_normal((800, 3)).astype(np.float32)
    mixed = evaluate_embedding(z, batches)
    assert mixed["mixing_share_of_ceiling_k50"].value == pytest.approx(1, abs=0.015)
    z[400:] += 100
    apart = evaluate_embedding(z, batches)
    assert apart["mixing_entropy_k50"].value == 0
    assert apart["mixing_entropy_k50"].standard_error == 0


def test_a_name_without_a_cell_is_no_batch() -> None:
    z = np.random.default_rng(3).standard_normal((120, 2)).astype(np.float32)
    codes = np.tile([0, 2], 60)
    two = evaluate_embedding(z, Categories(codes, ["a", "empty", "b"]))
    assert two == evaluate_embedding(z, Categories(codes // 2, ["a", "b"]))
    assert two["mixing_share_of_log_b_k50"].value is not None


def test_one_cell_of_a_batch_has_no_error() -> None:
    z = np.random.default_rng(3).standard_normal((60, 2)).astype(np.float32)
    metrics = evaluate_embedding(z, Categories(np.arange(60) == 7, ["many", "single"]))
    groups = {(g.name, g.of): g for g in metrics.groups}
    found = groups["mixing_entropy_k50", "batch single"]
    assert found.n == 1
    assert found.value is not None
    assert found.standard_error is found.low is found.high is None


def test_codes_without_a_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"0 to 2\n.*-1 to 1"):
        Categories([0, 1, 2], ["a", "b"])
