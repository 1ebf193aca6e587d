from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from atlas.errors import ConfigError
from atlas.store.statistics import GeneStatistics, expected_variance, gene_statistics


class MatrixReader:
    """Rows of a CSR matrix in memory; remembers the largest request."""

    def __init__(self, matrix):
        self.matrix = sp.csr_matrix(matrix)
        self.largest = 0

    def __call__(self, start, stop):
        self.largest = max(self.largest, stop - start)
        rows = self.matrix[start:stop]
        return rows.indptr.astype(np.int64), rows.indices.astype(np.uint16), rows.data


def simulated(n_obs=300, n_vars=400, n_batches=3, seed=0, dtype=np.uint16):
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(-0.5, 1.5, n_vars)
    counts = rng.negative_binomial(1.5, 1.5 / (1.5 + mean), (n_obs, n_vars)).astype(dtype)
    return counts, rng.integers(0, n_batches, n_obs).astype(np.int32)


def statistics(counts, codes, **options) -> GeneStatistics:
    return gene_statistics(MatrixReader(counts), *counts.shape, codes, **options)


@pytest.mark.parametrize("block_rows", [1, 7, 300, 1000])
def test_mean_and_variance_are_numpys(block_rows):
    counts, codes = simulated()
    found = statistics(counts, codes, block_rows=block_rows)
    for b in range(3):
        rows = counts[codes == b].astype(float)
        assert found.n_cells[b] == len(rows)
        np.testing.assert_allclose(found.mean[b], rows.mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.variance[b], rows.var(0, ddof=1), rtol=1e-11)


def test_normalized_variance_is_scanpys():
    sc = pytest.importorskip("scanpy")
    ad = pytest.importorskip("anndata")
    counts, codes = simulated()
    found = statistics(counts, codes, block_rows=64)
    for b in range(3):
        adata = ad.AnnData(sp.csr_matrix(counts[codes == b].astype(np.float32)))
        peer = sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=50, inplace=False)
        np.testing.assert_allclose(
            found.normalized_variance[b], peer["variances_norm"], rtol=1e-7, atol=1e-12
        )


def test_some_values_are_clipped_as_defined():
    counts, codes = simulated(n_obs=200, n_batches=1)
    counts[3, 5] = 5000
    found = statistics(counts, codes)
    rows = counts.astype(float)
    mean, deviation = rows.mean(0), np.sqrt(expected_variance(found.mean[0], found.variance[0]))
    bound = mean + deviation * np.sqrt(200)
    assert (rows > bound).sum() > 0
    z = (np.minimum(rows, bound) - mean) / deviation
    np.testing.assert_allclose(
        found.normalized_variance[0], np.square(z).sum(0) / 199, rtol=1e-9, atol=1e-12
    )


def test_result_depends_on_neither_blocks_nor_workers():
    from dask.distributed import Client, LocalCluster

    counts, codes = simulated(n_obs=500)
    expected = statistics(counts, codes, block_rows=500).to_arrays()
    options = {"n_workers": 1, "threads_per_worker": 3, "processes": False}
    with LocalCluster(dashboard_address=None, **options) as cluster, Client(cluster):
        spread = statistics(counts, codes, block_rows=40, scheduler=cluster.scheduler_address)
    for found in (statistics(counts, codes, block_rows=33), spread):
        for name, array in found.to_arrays().items():
            np.testing.assert_array_equal(array, expected[name])


def test_reader_is_asked_for_blocks_only():
    counts, codes = simulated()
    reader = MatrixReader(counts)
    gene_statistics(reader, *counts.shape, codes, block_rows=32)
    assert reader.largest == 32


def test_batches_of_one_cell_or_none_and_empty_cells():
    counts, codes = simulated()
    codes[:] = 0
    codes[10] = 1
    counts[20] = 0
    found = statistics(counts, codes, n_batches=3)
    assert found.n_cells.tolist() == [299, 1, 0]
    for array in found.to_arrays().values():
        assert np.isfinite(array).all()
    np.testing.assert_array_equal(found.mean[1], counts[10])
    assert not found.variance[1:].any()
    assert not found.normalized_variance[1:].any()
    assert not found.mean[2].any()


@pytest.mark.parametrize("n_cells", [2, 3, 5, 12])
@pytest.mark.parametrize("n_vars", [1, 2, 5, 400])
def test_degenerate_batches_have_finite_statistics(n_cells, n_vars):
    rng = np.random.default_rng(n_cells)
    counts = rng.poisson(0.3, (n_cells, n_vars)).astype(np.uint16)
    counts[0, 0] += 1
    found = statistics(counts, np.zeros(n_cells, np.int32))
    assert np.isfinite(found.normalized_variance).all()
    np.testing.assert_array_equal(found.normalized_variance > 0, found.variance > 0)


def test_constant_genes_do_not_vary():
    counts = np.full((7, 30), 3, dtype=np.uint16)
    found = statistics(counts, np.zeros(7, np.int32))
    assert (found.mean == 3).all()
    assert not found.variance.any()
    assert not found.normalized_variance.any()


def test_fallback_is_the_parabola_through_the_genes():
    # Two cells: the means are multiples of a half, too few for loess.
    mean = np.array([0.5, 1.0, 2.0, 4.0, 0.0])
    variance = np.array([0.5, 2.0, 8.0, 32.0, 0.0])  # 2 mean²: a line in the logarithms
    expected = expected_variance(mean, variance)
    np.testing.assert_allclose(expected[:4], variance[:4], rtol=1e-9)
    assert expected[4] == 1


def test_span_widens_where_loess_is_singular():
    from skmisc.loess import loess

    # 150 cells, and most genes seen in one, two or three of them: few distinct means.
    rate = np.concatenate([np.full(1000, 5e-3), np.geomspace(1e-3, 3, 2000)])
    counts = np.random.default_rng(0).poisson(rate, (150, 3000))
    mean, variance = counts.mean(0), counts.var(0, ddof=1)
    varies = variance > 0
    x, y = np.log10(mean[varies]), np.log10(variance[varies])
    with pytest.raises(ValueError, match="singularities"):
        loess(x, y, span=0.3, degree=2).fit()
    expected = expected_variance(mean, variance)[varies]
    np.testing.assert_allclose(expected, mean[varies], rtol=0.02)  # Poisson
    parabola = np.polynomial.Polynomial.fit(x, y, 2)(x)
    assert np.abs(np.log10(expected) - parabola).max() > 1e-3


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.float32])
def test_any_width_of_counts(dtype):
    counts, codes = simulated()
    expected = statistics(counts, codes).to_arrays()
    for name, array in statistics(counts.astype(dtype), codes).to_arrays().items():
        np.testing.assert_array_equal(array, expected[name])


def test_arrays_go_out_and_come_back():
    found = statistics(*simulated())
    back = GeneStatistics.from_arrays(found.to_arrays())
    assert (back.n_batches, back.n_vars) == (3, 400)
    for name, array in found.to_arrays().items():
        np.testing.assert_array_equal(getattr(back, name), array)
    with pytest.raises(ValueError, match="do not match"):
        GeneStatistics.from_arrays({**found.to_arrays(), "mean": found.mean[:2]})
    with pytest.raises(KeyError):
        GeneStatistics.from_arrays({"mean": found.mean})


def test_a_study_without_cells_or_genes():
    none = statistics(np.zeros((0, 5)), np.zeros(0, np.int32), n_batches=1)
    assert none.n_cells.tolist() == [0]
    assert none.mean.shape == (1, 5)
    assert statistics(np.zeros((4, 0)), np.zeros(4, np.int32)).n_cells.tolist() == [4]


def test_codes_that_do_not_fit_are_refused():
    counts, codes = simulated()
    with pytest.raises(ConfigError, match="batch codes do not fit"):
        statistics(counts, codes[:-1])
    with pytest.raises(ConfigError, match="codes 0 to 1"):
        statistics(counts, codes, n_batches=2)
    with pytest.raises(ConfigError, match="block_rows"):
        statistics(counts, codes, block_rows=0)
