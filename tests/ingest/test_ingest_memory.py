"""AnnData objects: in memory, views, backed; read by blocks and left as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_helpers import assert_same, random_counts, read_counts, small_study

from atlas.errors import InputError
from atlas.ingest import open_counts

FORMATS = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csc_array": sp.csc_array,
    "dense": lambda x: x.toarray(),
    "fortran": lambda x: np.asfortranarray(x.toarray()),
}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 60), st.integers(1, 30)),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    memory=st.sampled_from([1, 1_000, 10_000, 1 << 20]),
    rows_per_block=st.sampled_from([None, 1, 7]),
)
def test_all_forms_give_the_same_counts(
    seed: int, shape: tuple[int, int], density: float, memory: int, rows_per_block: int | None
) -> None:
    counts = random_counts(seed, *shape, density)
    for form in FORMATS.values():
        adata = anndata.AnnData(
            form(counts),
            obs=pd.DataFrame(index=[f"c{i}" for i in range(shape[0])]),
            var=pd.DataFrame(index=[f"g{i}" for i in range(shape[1])]),
        )
        with open_counts(adata, memory=memory) as source:
            assert_same(read_counts(source, rows_per_block), counts)


@pytest.mark.parametrize("form", FORMATS)
def test_the_object_is_not_changed(form: str) -> None:
    adata = small_study()
    unsorted = adata.X.copy()
    unsorted.indices = unsorted.indices[::-1].copy()  # in no order
    unsorted.has_sorted_indices = False
    adata.X = FORMATS[form](unsorted)
    adata.var_names = ["same"] * 2 + [f"G{i}" for i in range(2, adata.n_vars)]
    before = adata.copy()
    stored = adata.X.indices.copy() if sp.issparse(adata.X) else None
    with pytest.warns(UserWarning, match="1 gene names of AnnData in memory"):
        source = open_counts(adata)
    with source:
        read_counts(source)
        source.obs["new"] = 1
        assert list(source.var.index[:2]) == ["same", "same-1"]
    assert list(adata.obs.columns) == list(before.obs.columns)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert_same(sp.csr_matrix(adata.X), before.X)
    if stored is not None:
        np.testing.assert_array_equal(adata.X.indices, stored)


@pytest.mark.parametrize("form", FORMATS)
def test_views_layers_and_raw(form: str) -> None:
    adata = small_study()
    adata.X = FORMATS[form](adata.X)
    adata.raw = adata.copy()
    adata.layers["counts"] = FORMATS[form](random_counts(4, *adata.shape))
    rows = np.array([5, 3, 20, 21, 0])
    view = adata[rows, [4, 1]]
    expected = view.copy()
    with open_counts(view, memory=1_000) as source:
        assert_same(read_counts(source), expected.X)
        assert_same(read_counts(source, 2), expected.X)
        pd.testing.assert_frame_equal(source.obs, expected.obs)
        np.testing.assert_array_equal(source.obsm["spatial"], expected.obsm["spatial"])
    with open_counts(view, layer="counts") as source:
        assert_same(read_counts(source), expected.layers["counts"])
    with open_counts(view, use_raw=True) as source:
        assert_same(read_counts(source), expected.raw.X)
        assert source.n_vars == adata.n_vars
    assert view.is_view


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_backed_objects(tmp_path: Path, form: str) -> None:
    adata = small_study()
    adata.X = FORMATS[form](adata.X)
    adata.raw = adata.copy()
    adata.layers["counts"] = FORMATS[form](random_counts(4, *adata.shape))
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    backed.obs["added"] = 1
    with open_counts(backed, memory=2_000, folder=tmp_path) as source:
        assert_same(read_counts(source), adata.X)
        assert "added" in source.obs
    with open_counts(backed, use_raw=True) as source:
        assert_same(read_counts(source), adata.raw.X)
    with open_counts(backed, layer="counts") as source:
        assert_same(read_counts(source), adata.layers["counts"])
    with open_counts(backed[3:9]) as source:
        assert_same(read_counts(source), adata[3:9].X)
    assert backed.file.is_open
    backed.file.close()


def test_obsm_of_other_kinds_becomes_arrays() -> None:
    adata = small_study()
    adata.obsm["table"] = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names)
    adata.obsm["sparse"] = sp.csr_matrix(adata.obsm["X_pca"])
    with open_counts(adata) as source:
        np.testing.assert_array_equal(source.obsm["table"], adata.obsm["spatial"])
        np.testing.assert_array_equal(source.obsm["sparse"], adata.obsm["X_pca"])


def test_other_kinds_of_x_are_refused() -> None:
    dask_array: Any = pytest.importorskip("dask.array")
    adata = small_study()
    adata.X = dask_array.from_array(adata.X.toarray())
    with pytest.raises(InputError, match="kind that is not read\n  found: Array"):
        open_counts(adata)


def test_without_x_a_layer_is_needed() -> None:
    adata = small_study()
    adata.layers["counts"] = adata.X
    adata.X = None
    with pytest.raises(InputError, match="no X\n  found: X is None; layers: 'counts'"):
        open_counts(adata)
    with open_counts(adata, layer="counts") as source:
        assert_same(read_counts(source), adata.layers["counts"])
