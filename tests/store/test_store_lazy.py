"""A store as an AnnData that stays on disk, against the same in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import scanpy
import scipy.sparse as sp
from anndata import AnnData

import atlas
from atlas.store import export


@pytest.fixture
def store(tmp_path: Path, make_study: Callable[..., AnnData], monkeypatch) -> atlas.CountStore:
    """Two studies with a layer, genes of their own, and an embedding; blocks of 50 cells."""
    monkeypatch.setattr(export, "_ROWS_AT_ONCE", 50)
    store = atlas.create_store(tmp_path / "store")
    for i, (name, genes) in enumerate({"one": 30, "two": 40}.items()):
        adata = make_study(120, genes, seed=i, prefix=name)
        adata.layers["spliced"] = sp.csr_matrix(adata.X) * 0.5
        store.append(adata, study=name, batch_key="batch", keep_layers=("spliced",))
    z = np.random.default_rng(0).normal(size=(240, 3)).astype(np.float32)
    store.write_embedding("z", z, {})
    return store


@pytest.mark.parametrize("order", ["store", "input"])
@pytest.mark.parametrize("rows", [None, [3, 200, 7, 7, 119, 120], []])
def test_the_same_as_in_memory(store, order, rows):
    lazy, eager = (
        atlas.to_anndata(store, rows=rows, order=order, embedding="z", lazy=lazy)
        for lazy in (True, False)
    )
    assert isinstance(lazy.X, da.Array)
    assert isinstance(lazy.X._meta, sp.csr_matrix)
    assert max(lazy.X.chunks[0]) <= 50
    for found, expected in ((lazy.X, eager.X), (lazy.layers["spliced"], eager.layers["spliced"])):
        found = found.compute()
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert (found != expected).nnz == 0
    assert lazy.obs.equals(eager.obs)
    assert lazy.var.equals(eager.var)
    assert (lazy.obsm["X_z"] == eager.obsm["X_z"]).all()


def test_nothing_is_read_before_it_is_computed(store, monkeypatch):
    read = []
    real = type(store).read_rows
    monkeypatch.setattr(
        type(store), "read_rows", lambda self, a, b: (read.append((a, b)), real(self, a, b))[1]
    )
    lazy = atlas.to_anndata(store, lazy=True)
    assert read == []
    lazy.X[:60].compute()
    assert sorted(read) == [(0, 50), (50, 100)]


def test_scanpy_works_on_it(store):
    lazy, eager = atlas.to_anndata(store, lazy=True), atlas.to_anndata(store)
    for adata in (lazy, eager):
        scanpy.pp.normalize_total(adata, target_sum=1e3)
        scanpy.pp.log1p(adata)
        scanpy.pp.highly_variable_genes(adata, n_top_genes=10)
    assert isinstance(lazy.X, da.Array)
    np.testing.assert_allclose(lazy.X.compute().toarray(), eager.X.toarray(), rtol=1e-5)
    assert lazy.var["highly_variable"].tolist() == eager.var["highly_variable"].tolist()
    scanpy.pp.pca(lazy, n_comps=5, svd_solver="covariance_eigh")
    scanpy.pp.pca(eager, n_comps=5, svd_solver="covariance_eigh")
    assert lazy.obsm["X_pca"].shape == eager.obsm["X_pca"].shape


@pytest.mark.long
def test_other_processes_compute_it(store):
    lazy, eager = atlas.to_anndata(store, lazy=True), atlas.to_anndata(store)
    with dask.config.set(scheduler="processes", num_workers=2):
        assert (lazy.X.compute() != eager.X).nnz == 0
