"""Small studies and how to compare what was read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from atlas.ingest import CountsSource

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def random_counts(seed: int, n_obs: int, n_vars: int, density: float = 0.3) -> sp.csr_matrix:
    generator = np.random.default_rng(seed)
    counts = generator.poisson(3, (n_obs, n_vars)) * (generator.random((n_obs, n_vars)) < density)
    return sp.csr_matrix(counts.astype(np.float32))


def small_study(seed: int = 0, n_obs: int = 40, n_vars: int = 12) -> anndata.AnnData:
    """Counts with every kind of annotation that is kept."""
    generator = np.random.default_rng(seed)
    counts = random_counts(seed, n_obs, n_vars)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(generator.choice(["a", "b"], n_obs)),
            "score": generator.normal(size=n_obs),
            "text": [f"t{i}" for i in range(n_obs)],
        },
        index=[f"cell{i}" for i in range(n_obs)],
    )
    var = pd.DataFrame(
        {
            "gene_ids": [f"ENSG{i:011d}" for i in range(n_vars)],
            "highly": np.arange(n_vars) % 2 == 0,
        },
        index=[f"G{i}" for i in range(n_vars)],
    )
    adata = anndata.AnnData(counts, obs=obs, var=var)
    adata.obsm["spatial"] = generator.normal(size=(n_obs, 2))
    adata.obsm["X_pca"] = generator.normal(size=(n_obs, 3)).astype(np.float32)
    adata.uns["spatial"] = {"library": {"scalefactors": {"spot": 2.5}}}
    adata.uns["other"] = 1
    return adata


def read_counts(source: CountsSource, rows_per_block: int | None = None) -> sp.csr_matrix:
    """All blocks as one matrix, with what every block promises checked."""
    parts = []
    for block in source.blocks(rows_per_block):
        assert block.indptr.dtype == np.int64
        assert block.indices.dtype == np.int32
        assert block.data.dtype == np.uint32
        assert block.indptr[0] == 0
        assert block.data.all()
        assert rows_per_block is None or block.n_rows <= rows_per_block
        part = sp.csr_matrix(
            (block.data, block.indices, block.indptr), shape=(block.n_rows, source.n_vars)
        )
        assert part.has_canonical_format
        parts.append(part)
    return sp.vstack(parts, format="csr")


def assert_same(found: sp.csr_matrix, expected: Any) -> None:
    expected = expected.toarray() if sp.issparse(expected) else np.asarray(expected)
    np.testing.assert_array_equal(found.toarray(), expected)


def write_tenx_v3(path: Path, counts: sp.csr_matrix, types: list[str]) -> None:
    """Cell Ranger 3 and later; counts are barcodes × features."""
    n_vars = counts.shape[1]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        _write_columns(group, counts)
        features = group.create_group("features")
        features["_all_tag_keys"] = np.array([b"genome"])
        features["feature_type"] = np.array(types, "S")
        features["genome"] = np.array(["GRCh38"] * n_vars, "S")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(n_vars)], "S")
        features["name"] = np.array([f"G{i}" for i in range(n_vars)], "S")


def write_tenx_v2(path: Path, counts: sp.csr_matrix, genomes: tuple[str, ...] = ("hg19",)) -> None:
    with h5py.File(path, "w") as file:
        for genome in genomes:
            group = file.create_group(genome)
            _write_columns(group, counts)
            n_vars = counts.shape[1]
            group["genes"] = np.array([f"ENSG{i:011d}" for i in range(n_vars)], "S")
            group["gene_names"] = np.array([f"G{i}" for i in range(n_vars)], "S")


def _write_columns(group: h5py.Group, counts: sp.csr_matrix) -> None:
    group["barcodes"] = np.array([f"AAAC{i}-1" for i in range(counts.shape[0])], "S")
    group["data"] = counts.data.astype(np.int32)
    group["indices"] = counts.indices.astype(np.int64)
    group["indptr"] = counts.indptr.astype(np.int64)
    group["shape"] = np.array(counts.shape[::-1], np.int32)
