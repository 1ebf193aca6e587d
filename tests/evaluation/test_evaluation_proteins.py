"""Common neighbours by proteins and in an embedding, against the scVI authors' way of counting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.stats

from atlas.errors import ConfigError, ModelError
from atlas.evaluation.codes import Categories
from atlas.evaluation.measures import compare_embeddings, evaluate_embedding
from atlas.evaluation.proteins import are_counts, centred_log_ratio, protein_overlap

N, K = 260, 20
RNG = np.random.default_rng(31)
STATE = RNG.standard_normal((N, 4))
Z = (STATE + 0.5 * RNG.standard_normal((N, 4))).astype(np.float32)
COUNTS = RNG.poisson(np.exp(STATE @ RNG.standard_normal((4, 9)) + 1))
PROTEINS = centred_log_ratio(COUNTS)
BATCHES = Categories(RNG.choice(2, N), "xy")


def adjacency(values: np.ndarray, k: int) -> np.ndarray:
    """0/1 matrix of the k nearest, in float64."""
    exact = values.astype(np.float64)
    distance = ((exact[:, None] - exact[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    out = np.zeros(distance.shape)
    near = np.argsort(distance, axis=1, kind="stable")[:, :k]
    np.put_along_axis(out, near, 1, axis=1)
    return out


def test_figures_are_those_of_the_two_matrices() -> None:
    metrics = evaluate_embedding(Z, BATCHES, proteins=PROTEINS, protein_k=K)
    a, b = adjacency(PROTEINS, K), adjacency(Z, K)
    common = (a * b).sum()
    shares = (a * b).sum(axis=1) / K
    overlap = metrics[f"protein_overlap_k{K}"]
    assert overlap.value == pytest.approx(common / (N * K), abs=1e-12)
    assert overlap.standard_error == pytest.approx(shares.std(ddof=1) / np.sqrt(N), rel=0.02)
    fold = metrics[f"protein_fold_enrichment_k{K}"].value
    assert fold == pytest.approx(common * a.size / (a.sum() * b.sum()), abs=1e-9)
    spearman = scipy.stats.spearmanr(a.ravel(), b.ravel()).statistic
    assert metrics[f"protein_spearman_k{K}"].value == pytest.approx(spearman, abs=1e-9)
    assert 0.1 < overlap.value < 0.9


def test_an_embedding_that_is_the_proteins_has_all_in_common_and_noise_none() -> None:
    noise = np.random.default_rng(0).standard_normal((N, 4)).astype(np.float32)
    compared = compare_embeddings(
        {"proteins": PROTEINS, "noise": noise}, BATCHES, proteins=PROTEINS
    )
    same, other = compared.metrics["proteins"], compared.metrics["noise"]
    assert same["protein_overlap_k100"].value == 1
    assert same["protein_spearman_k100"].value == pytest.approx(1)
    fold = other["protein_fold_enrichment_k100"]
    assert fold.value == pytest.approx(1, abs=0.1)
    assert fold.unit == "fold"
    difference = {d.name: d for d in compared.differences}["protein_overlap_k100"]
    assert difference.favours == "proteins"


def test_cells_without_proteins_are_left_out_of_both_searches() -> None:
    some = RNG.random(N) < 0.6
    partly = np.where(some[:, None], PROTEINS, np.nan).astype(np.float32)
    metrics = evaluate_embedding(Z, BATCHES, proteins=partly, protein_k=K)
    a, b = adjacency(PROTEINS[some], K), adjacency(Z[some], K)
    overlap = metrics[f"protein_overlap_k{K}"]
    assert overlap.value == pytest.approx((a * b).sum() / a.sum(), abs=1e-12)
    assert overlap.n == some.sum()


def test_a_sample_is_asked_among_all() -> None:
    metrics = evaluate_embedding(Z, BATCHES, proteins=PROTEINS, protein_k=K, max_queries=80)
    overlap = metrics[f"protein_overlap_k{K}"]
    assert overlap.n == 80
    whole = evaluate_embedding(Z, BATCHES, proteins=PROTEINS, protein_k=K)
    expected = whole[f"protein_overlap_k{K}"].value
    assert overlap.low is not None
    assert overlap.high is not None
    assert overlap.value == pytest.approx(expected, abs=4 * (overlap.standard_error or 0))


def test_what_cannot_be_compared_is_refused_or_told() -> None:
    metrics = evaluate_embedding(Z[:60], BATCHES[np.arange(60)], proteins=PROTEINS[:60])
    assert metrics["protein_overlap_k100"].skipped == (
        "100 neighbours need at least 101 cells with proteins, and there are 60"
    )
    holes = PROTEINS.copy()
    holes[3, 2] = np.nan
    with pytest.raises(ConfigError, match=r"some of the proteins and not others\n.*1 such cells"):
        evaluate_embedding(Z, BATCHES, proteins=holes)
    holes[3, 2] = np.inf
    with pytest.raises(ModelError, match="proteins"):
        evaluate_embedding(Z, BATCHES, proteins=holes)
    with pytest.raises(ConfigError, match="proteins and embedding have different numbers"):
        evaluate_embedding(Z, BATCHES, proteins=PROTEINS[1:])
    with pytest.raises(ConfigError, match="proteins and embedding have different numbers"):
        protein_overlap(Z, PROTEINS[1:], np.arange(5), K)


def test_centred_log_ratio() -> None:
    for counts, ours in zip(COUNTS[:20], PROTEINS[:20], strict=True):
        mean = scipy.stats.gmean(counts + 1)
        np.testing.assert_allclose(ours, np.log((counts + 1) / mean), atol=1e-6)
    assert are_counts(COUNTS)
    assert not are_counts(PROTEINS)
    assert not are_counts(COUNTS + 0.5)


def test_on_real_proteins(real_data: Callable[[str], Path]) -> None:
    adata = anndata.read_h5ad(real_data("cbmc_top2000.h5ad"))
    names = [name for name in adata.obsm if "protein" in name or "adt" in name.lower()]
    if not names:
        pytest.skip("cbmc_top2000.h5ad has no proteins in obsm")
    proteins = centred_log_ratio(np.asarray(adata.obsm[names[0]]))
    z = np.log1p(np.asarray(adata.X[:, :50].todense())).astype(np.float32)
    batches = Categories(np.zeros(len(z)), ["all"])
    metrics = evaluate_embedding(z, batches, proteins=proteins, max_queries=500)
    assert metrics["protein_fold_enrichment_k100"].value > 1
