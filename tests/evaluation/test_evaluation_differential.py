"""Bayes factors, log fold changes and expected FDR: against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from atlas.evaluation import differential as maths
from atlas.evaluation.differential import GroupCounts, Pairs

N_PAIRS, N_GENES = 137, 23


def _shares(seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=N_GENES) + rng.normal(size=(N_PAIRS, N_GENES))
    logits[:, 3] += shift
    shares = np.exp(logits - 4)
    return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)


def _pairs(one: np.ndarray, other: np.ndarray, size: int = 50) -> Pairs:
    return lambda: ((one[a : a + size], other[a : a + size]) for a in range(0, len(one), size))


def test_vanilla_is_a_count_of_pairs() -> None:
    one, other = _shares(0, 4.0), _shares(1)
    pairs, offset = _pairs(one, other), 1e-4
    table = maths.vanilla(pairs, maths.summarise(pairs), pseudocount=offset, fdr=0.1)
    sure = [max(p, 1 - p) for p in table["proba_m1"]]
    for gene in range(N_GENES):
        n = sum(a > b for a, b in zip(one[:, gene], other[:, gene], strict=True))
        p = n / N_PAIRS
        assert table["proba_m1"][gene] == pytest.approx(p, abs=1e-12)
        expected = math.log((p + 1e-8) / (1 - p + 1e-8))
        assert table["bayes_factor"][gene] == pytest.approx(expected, rel=1e-9)
        mean = math.fsum(map(float, one[:, gene])) / N_PAIRS
        assert table["scale1"][gene] == pytest.approx(mean, rel=1e-9)
        lfc = [
            math.log2(a + offset / 1000) - math.log2(b + offset / 1000)
            for a, b in zip(map(float, one[:, gene]), map(float, other[:, gene]), strict=True)
        ]
        assert table["lfc_median"][gene] == pytest.approx(np.median(lfc), rel=1e-4, abs=1e-6)
        assert table["lfc_std"][gene] == pytest.approx(np.std(lfc), rel=1e-4)
        wrong = [1 - q for q in sure if q >= sure[gene]]
        assert table["expected_fdr"][gene] == pytest.approx(sum(wrong) / len(wrong), abs=1e-12)
    assert table["is_de_fdr_0.1"].tolist() == (table["expected_fdr"] <= 0.1).tolist()
    assert 0 < table["is_de_fdr_0.1"].sum() < N_GENES
    assert table["bayes_factor"].idxmax() == 3
    assert np.isfinite(maths.bayes_factor(np.array([0.0, 1.0]))).all()


@pytest.mark.parametrize("sides", ["three", "two"])
def test_change_is_a_loop_over_pairs_and_genes(sides: str) -> None:
    one, other, offset, delta = _shares(0, 4.0), _shares(1), 1e-4, 0.3
    pairs = _pairs(one, other)
    scales = maths.summarise(pairs)
    options = {"pseudocount": offset, "delta": delta, "sides": sides}
    table = maths.change(pairs, scales, **options)
    for gene in range(N_GENES):
        lfc, size = [], []
        for a, b in zip(map(float, one[:, gene]), map(float, other[:, gene]), strict=True):
            lfc.append(math.log2(a + offset) - math.log2(b + offset))
            size.append(math.log2(a + offset / 1000) - math.log2(b + offset / 1000))
        up = sum(v >= delta for v in lfc) / N_PAIRS
        down = sum(v < -delta for v in lfc) / N_PAIRS
        expected = {
            "proba_de": max(up, down) if sides == "three" else up + down,
            "lfc_mean": np.mean(size),
            "lfc_median": np.median(size),
            "lfc_std": np.std(size),
            "lfc_min": min(size),
            "lfc_max": max(size),
        }
        for name, value in expected.items():
            assert table[name][gene] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    few = maths.change(pairs, scales, **options, memory=16 * N_PAIRS * 4)  # four genes at a time
    assert few.equals(table)


def test_expected_fdr_is_the_mean_over_the_genes_called() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(0.5, 0.5, 200).round(2)  # with ties
    found = maths.expected_fdr(p)
    for gene in range(200):
        called = [1 - q for q in p if q >= p[gene]]
        assert found[gene] == pytest.approx(sum(called) / len(called), abs=1e-12)
    # Drawn anew many times, the share of false ones among those called is what it says.
    called = found <= 0.1
    truth = rng.random((4000, 200)) < p
    assert (~truth[:, called]).mean() == pytest.approx((1 - p[called]).mean(), abs=0.005)
    assert (1 - p[called]).mean() <= 0.1
    assert called.any()
    assert not called.all()


def test_two_like_groups_differ_in_nothing() -> None:
    rng = np.random.default_rng(5)
    pool = np.concatenate([_shares(seed) for seed in range(20)])
    one, other = pool[rng.integers(len(pool), size=4000)], pool[rng.integers(len(pool), size=4000)]
    pairs = _pairs(one, other)
    scales = maths.summarise(pairs)
    table = maths.change(pairs, scales, pseudocount=1e-6)
    assert not table["is_de_fdr_0.05"].any()
    assert (table["proba_de"] < 0.55).all()
    which = maths.vanilla(pairs, scales, pseudocount=1e-6)
    assert which["bayes_factor"].abs().max() < 0.3
    assert not which["is_de_fdr_0.05"].any()
    # p(|LFC| >= delta) cannot tell unlike groups from groups of unlike cells
    two = maths.change(pairs, scales, pseudocount=1e-6, sides="two")
    assert (two["proba_de"] > 0.6).all()


def test_pseudocount_comes_from_genes_that_are_not_expressed() -> None:
    one, other = _shares(0), _shares(1)
    scales = maths.summarise(_pairs(one, other))
    loud, silent = np.ones(N_GENES), np.ones(N_GENES)
    silent[[2, 5, 7]] = [0.009, 0.0, np.nan]

    def of(raw: np.ndarray) -> GroupCounts:
        return GroupCounts(len(raw), raw, raw, raw)

    assert maths.pseudocount_of(scales, of(loud), of(loud)) == 1e-10
    highest = sorted([float(other[:, 2].max()), float(other[:, 5].max())])
    expected = (highest[0] + 0.9 * (highest[1] - highest[0])) / N_GENES
    assert maths.pseudocount_of(scales, of(loud), of(silent)) == pytest.approx(expected, rel=1e-6)
