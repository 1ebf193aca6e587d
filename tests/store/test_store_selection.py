from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.sparse as sp

from atlas.errors import ConfigError
from atlas.store.selection import select_from_statistics
from atlas.store.statistics import GeneStatistics, gene_statistics

REAL = Path(__file__).parents[3] / "shared/data/pbmc_4batch_3study.h5ad"


def statistics(matrix, codes) -> GeneStatistics:
    matrix = sp.csr_matrix(matrix)

    def read(start, stop):
        rows = matrix[start:stop]
        return rows.indptr, rows.indices, rows.data

    return gene_statistics(read, *matrix.shape, np.asarray(codes, np.int32))


def studies_of(matrix, study, batch, columns):
    """One (statistics, columns) per study, each in its own columns."""
    parts = []
    for s, own in enumerate(columns):
        rows = np.flatnonzero(study == s)
        codes = np.unique(batch[rows], return_inverse=True)[1]
        parts.append((statistics(matrix[rows][:, own], codes), own.astype(np.int32)))
    return parts


def scanpys_choice(matrix, batch, n):
    """scanpy's table, genes of the same variance in a batch ranked by position.

    It leaves their order to numpy's sort, which differs from processor to processor.
    """
    sc = pytest.importorskip("scanpy")
    ad = pytest.importorskip("anndata")
    adata = ad.AnnData(sp.csr_matrix(matrix, dtype=np.float32))
    adata.obs["batch"] = np.char.add("b", batch.astype(str))
    with mock.patch.object(np, "argsort", partial(np.argsort, kind="stable")):
        return sc.pp.highly_variable_genes(
            adata, flavor="seurat_v3", n_top_genes=n, batch_key="batch", inplace=False
        )


def assert_same_up_to_ties(chosen, peer, n):
    """The same genes, or others of the same rank and number of batches as the last one in."""
    keys = peer[["highly_variable_rank", "highly_variable_nbatches"]].fillna(np.inf).to_numpy()
    mine, theirs = keys[chosen], keys[peer["highly_variable"].to_numpy()]
    assert len(chosen) == n
    np.testing.assert_array_equal(
        mine[np.lexsort((-mine[:, 1], mine[:, 0]))],
        theirs[np.lexsort((-theirs[:, 1], theirs[:, 0]))],
    )


def simulated(seed, n_obs=900, n_genes=600):
    """Counts so high that hardly two genes have the same statistics: ties within a batch would move
    the ranks of all genes behind them."""
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(2.5, 1, n_genes)
    size = rng.lognormal(0.3, 0.6, n_genes)
    counts = rng.negative_binomial(size, size / (size + mean), (n_obs, n_genes))
    study = np.repeat([0, 1, 2], [n_obs // 2, n_obs // 3, n_obs - n_obs // 2 - n_obs // 3])
    return sp.csr_matrix(counts), study, 2 * study + rng.integers(0, 2, n_obs), rng


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 50, 200])
def test_seurat_v3_is_scanpys_where_all_genes_are_everywhere(seed, n):
    counts, study, batch, _ = simulated(seed)
    parts = studies_of(counts, study, batch, [np.arange(600)] * 3)
    chosen = select_from_statistics(parts, 600, n)
    assert_same_up_to_ties(chosen, scanpys_choice(counts, batch, n), n)


@pytest.mark.parametrize("n", [50, 200])
def test_seurat_v3_is_scanpys_on_the_concatenation_with_zeros(n):
    counts, study, batch, rng = simulated(7)
    columns = [np.sort(rng.choice(600, size, replace=False)) for size in (600, 400, 450)]
    parts = studies_of(counts, study, batch, columns)
    zeroed = counts.toarray()
    for s, own in enumerate(columns):
        zeroed[np.ix_(study == s, np.setdiff1d(np.arange(600), own))] = 0
    chosen = select_from_statistics(parts, 600, n)
    assert_same_up_to_ties(chosen, scanpys_choice(zeroed, batch, n), n)


def test_columns_of_a_study_in_another_order():
    counts, study, batch, rng = simulated(3)
    straight = studies_of(counts, study, batch, [np.arange(600)] * 3)
    mixed = studies_of(counts, study, batch, [np.arange(600), rng.permutation(600), np.arange(600)])
    np.testing.assert_array_equal(
        select_from_statistics(straight, 600, 100), select_from_statistics(mixed, 600, 100)
    )


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not beside the checkout")
def test_seurat_v3_is_scanpys_on_real_counts():
    ad = pytest.importorskip("anndata")
    adata = ad.read_h5ad(REAL)
    study, batch = (adata.obs[c].cat.codes.to_numpy() for c in ("study", "batch"))
    parts = studies_of(adata.X, study, batch, [np.arange(adata.n_vars)] * 3)
    peer = scanpys_choice(adata.X, batch, 2000)
    chosen = select_from_statistics(parts, adata.n_vars, 2000)
    assert_same_up_to_ties(chosen, peer, 2000)
    assert len(np.setdiff1d(chosen, np.flatnonzero(peer["highly_variable"]))) <= 2


def test_dispersion_is_the_union_of_each_batchs_first():
    counts, study, batch, _ = simulated(1)
    parts = studies_of(counts, study, batch, [np.arange(600)] * 3)
    expected = set()
    for b in np.unique(batch):
        rows = counts[batch == b].toarray().astype(float)
        ratio = rows.var(0, ddof=1) / np.maximum(rows.mean(0), 1e-300)
        expected |= set(np.argsort(-ratio)[:40].tolist())
    chosen = select_from_statistics(parts, 600, 40, "dispersion")
    assert set(chosen.tolist()) == expected
    assert len(chosen) > 40
    assert (np.diff(chosen) > 0).all()


@pytest.mark.parametrize("flavour", ["seurat_v3", "dispersion"])
def test_a_handful_of_cells_changes_nothing(flavour):
    counts, study, batch, rng = simulated(2)
    parts = studies_of(counts, study, batch, [np.arange(600)] * 3)
    few = statistics(rng.poisson(3, (6, 600)), [0, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(
        select_from_statistics([*parts, (few, np.arange(600, dtype=np.int32))], 600, 80, flavour),
        select_from_statistics(parts, 600, 80, flavour),
    )


def test_a_handful_of_cells_is_enough_where_there_is_no_more():
    few = statistics(np.random.default_rng(0).poisson(3, (6, 50)), [0, 1, 1, 2, 2, 2])
    assert len(select_from_statistics([(few, np.arange(50, dtype=np.int32))], 50, 20)) == 20


def test_more_genes_than_vary_are_taken_with_a_warning():
    counts, study, batch, _ = simulated(5)
    counts = counts.tolil()
    counts[:, 100:] = 0
    parts = studies_of(counts.tocsr(), study, batch, [np.arange(600)] * 3)
    with pytest.warns(UserWarning, match="only 100 genes vary"):
        chosen = select_from_statistics(parts, 600, 200)
    np.testing.assert_array_equal(chosen, np.arange(100))


def test_requests_that_make_no_sense_are_refused():
    counts, study, batch, _ = simulated(5)
    parts = studies_of(counts, study, batch, [np.arange(600)] * 3)
    with pytest.raises(ConfigError, match="at least 1"):
        select_from_statistics(parts, 600, 0)
    with pytest.raises(ConfigError, match="no such flavour"):
        select_from_statistics(parts, 600, 10, "cell_ranger")
    constant = statistics(np.ones((20, 600)), np.zeros(20))
    with pytest.raises(ConfigError, match="no gene can be chosen"):
        select_from_statistics([(constant, np.arange(600, dtype=np.int32))], 600, 10)
