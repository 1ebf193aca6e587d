"""Files of AnnData, against anndata's own reader."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from ingest_helpers import REAL, assert_same, random_counts, read_counts, small_study

from atlas.ingest import open_counts

FORMATS = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "dense": lambda x: x.toarray(),
}
REAL_FILES = [
    "cbmc_top2000",
    "mouse_bladder_2100",
    "paul15_hspc",
    "pbmc3k",
    "pbmc_4batch_3study",
    "splatter_simul1",
    "tenx_mouse_10k_1000g",
    "zeisel_cortex_subset",
    "zheng_pbmc_facs",
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("memory", [3_000, 1 << 20])
def test_every_form_of_x_is_read(tmp_path: Path, form: str, dtype: Any, memory: int) -> None:
    adata = small_study()
    adata.X = FORMATS[form](adata.X.astype(dtype))
    adata.write_h5ad(tmp_path / "x.h5ad")
    expected = anndata.read_h5ad(tmp_path / "x.h5ad")
    with open_counts(tmp_path / "x.h5ad", memory=memory, folder=tmp_path) as source:
        assert_same(read_counts(source), expected.X)
        assert_same(read_counts(source, 7), expected.X)
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5ad"]


def test_tables_and_arrays_are_those_that_anndata_reads(tmp_path: Path) -> None:
    small_study().write_h5ad(tmp_path / "x.h5ad")
    expected = anndata.read_h5ad(tmp_path / "x.h5ad")
    with open_counts(str(tmp_path / "x.h5ad")) as source:
        pd.testing.assert_frame_equal(source.obs, expected.obs)
        pd.testing.assert_frame_equal(source.var, expected.var)
        assert (source.n_obs, source.n_vars) == expected.shape
        assert set(source.obsm) == set(expected.obsm)
        for name, values in source.obsm.items():
            np.testing.assert_array_equal(values, expected.obsm[name])
            assert values.dtype == expected.obsm[name].dtype
        assert source.uns == {"spatial": expected.uns["spatial"]}
        assert source.name == str(tmp_path / "x.h5ad")


@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_or_raw_takes_the_place_of_x(tmp_path: Path, form: str) -> None:
    adata = small_study()
    counts = random_counts(5, *adata.shape)
    adata.raw = anndata.AnnData(FORMATS[form](adata.X), obs=adata.obs, var=adata.var)
    adata = adata[:, ::2].copy()
    adata.layers["counts"] = FORMATS[form](counts[:, ::2])
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "x.h5ad")
    expected = anndata.read_h5ad(tmp_path / "x.h5ad")
    with open_counts(tmp_path / "x.h5ad", layer="counts") as source:
        assert_same(read_counts(source), expected.layers["counts"])
        assert list(source.var.index) == list(expected.var_names)
    with open_counts(tmp_path / "x.h5ad", use_raw=True) as source:
        assert_same(read_counts(source), expected.raw.X)
        pd.testing.assert_frame_equal(source.var, expected.raw.var)
        assert source.layers == ()


@pytest.mark.parametrize("form", FORMATS)
def test_layers_can_be_kept(tmp_path: Path, form: str) -> None:
    adata = small_study()
    adata.layers["log"] = FORMATS[form](adata.X.log1p().astype(np.float64))
    adata.layers["spliced"] = FORMATS[form](random_counts(3, *adata.shape).astype(np.int32))
    adata.write_h5ad(tmp_path / "x.h5ad")
    with open_counts(tmp_path / "x.h5ad", memory=3_000) as source:
        assert set(source.layers) == {"log", "spliced"}
        for name, dtype in (("log", np.float32), ("spliced", np.int32)):
            blocks = list(source.layer_blocks(name, 9))
            assert {block.data.dtype for block in blocks} == {np.dtype(dtype)}
            parts = [
                sp.csr_matrix((b.data, b.indices, b.indptr), shape=(b.n_rows, source.n_vars))
                for b in blocks
            ]
            expected = adata.layers[name]
            expected = expected.toarray() if sp.issparse(expected) else expected
            assert_same(sp.vstack(parts), expected.astype(dtype))


@pytest.mark.parametrize("chunks", [(40, 1), (40, 12), (7, 5), (1, 12), (13, 12)])
@pytest.mark.parametrize("memory", [600, 8_000, 1 << 20])
def test_dense_chunks_of_any_shape(tmp_path: Path, chunks: tuple[int, int], memory: int) -> None:
    adata = small_study()
    dense = adata.X.toarray()
    adata.X = dense
    adata.write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        attributes = dict(file["X"].attrs)
        del file["X"]
        file.create_dataset("X", data=dense, chunks=chunks, compression="gzip")
        file["X"].attrs.update(attributes)
    with open_counts(tmp_path / "x.h5ad", memory=memory, folder=tmp_path) as source:
        assert_same(read_counts(source), dense)
        assert_same(read_counts(source, 4), dense)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_unsorted_rows_duplicates_and_zeros_are_put_right(tmp_path: Path, form: str) -> None:
    generator = np.random.default_rng(0)
    major, minor = (40, 12) if form == "csr" else (12, 40)
    indptr = np.arange(0, 20 * major + 1, 20)
    indices = generator.integers(0, minor, 20 * major).astype(np.int32)
    values = generator.integers(0, 4, 20 * major).astype(np.float32)
    matrix = FORMATS[form]((40, 12), dtype=np.float32)
    matrix.indptr, matrix.indices, matrix.data = indptr, indices, values
    adata = small_study()
    adata.X = matrix
    adata.write_h5ad(tmp_path / "x.h5ad")
    with open_counts(tmp_path / "x.h5ad", memory=3_000) as source:
        assert_same(read_counts(source), matrix.toarray())


def test_a_file_from_before_anndata_0_7(tmp_path: Path) -> None:
    path = tmp_path / "old.h5ad"
    counts = random_counts(0, 6, 4)
    with h5py.File(path, "w") as file:
        x = file.create_group("X")
        x.attrs["h5sparse_format"] = "csr"
        x.attrs["h5sparse_shape"] = np.array(counts.shape)
        for name in ("data", "indices", "indptr"):
            x[name] = getattr(counts, name)
        rows = [(f"c{i}".encode(), i % 2, 0.5 * i) for i in range(6)]
        file["obs"] = np.array(rows, [("index", "S4"), ("type", "i1"), ("score", "f8")])
        file["var"] = np.array(
            [(f"G{i}".encode(), i) for i in range(4)], [("index", "S4"), ("n", "i8")]
        )
        file["obsm"] = np.array([((i, 2.0 * i),) for i in range(6)], [("X_pca", "f8", (2,))])
        file["uns/type_categories"] = np.array([b"B", b"T"])
        file["raw.X"] = counts.toarray() * 2
        file["raw.var"] = file["var"][()]
    with pytest.warns(anndata.OldFormatWarning, match="very old version"):
        expected = anndata.read_h5ad(path)
    with open_counts(path) as source:
        assert_same(read_counts(source), counts)
        assert list(source.obs.index) == list(expected.obs_names)
        assert list(source.var.index) == list(expected.var_names)
        assert source.obs["type"].tolist() == expected.obs["type"].tolist()
        assert source.obs["score"].tolist() == expected.obs["score"].tolist()
        np.testing.assert_array_equal(source.obsm["X_pca"], expected.obsm["X_pca"])
    with open_counts(path, use_raw=True) as source:
        assert_same(read_counts(source), counts * 2)


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, form: str) -> None:
    """A file of many times the budget is read within it, also against its grain."""
    n_obs, n_vars, budget = 20_000, 200, 1 << 20
    counts = random_counts(0, n_obs, n_vars, 0.2).astype(np.float64)
    adata = anndata.AnnData(FORMATS[form](counts), obs=pd.DataFrame(index=map(str, range(n_obs))))
    adata.write_h5ad(tmp_path / "x.h5ad")
    del adata
    assert (tmp_path / "x.h5ad").stat().st_size > 8 * budget
    with open_counts(tmp_path / "x.h5ad", memory=budget, folder=tmp_path) as source:
        read_counts(source)  # compiles
        tracemalloc.start()
        try:
            total = sum(int(block.data.sum()) for block in source.blocks())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert total == counts.sum()
    assert peak < budget + 40 * n_obs


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files_are_read_as_anndata_reads_them(name: str) -> None:
    path = REAL / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    expected = anndata.read_h5ad(path)
    with open_counts(path, memory=4 << 20) as source:
        counts = read_counts(source)
        pd.testing.assert_frame_equal(source.obs, expected.obs)
        pd.testing.assert_frame_equal(source.var, expected.var)
    assert counts.shape == expected.shape
    assert (counts != expected.X).nnz == 0
