"""Every way in which counts are opened: a source of the same cells, and what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import atlas
from loaders import RowSource

GENES = 80
NAMES = [f"gene{i}" for i in range(GENES)]


@dataclass(frozen=True)
class Opened:
    """A source, and the counts that it is to give, in its own order of rows: CSR of float64."""

    source: RowSource
    counts: sp.csr_matrix
    reopen: Callable[[], RowSource]


def studies() -> dict[str, AnnData]:
    """Two studies over the same genes; one cell is empty, and one count is large."""
    out = {}
    for seed, (name, n) in enumerate({"one": 333, "two": 190}.items()):
        rng = np.random.default_rng(seed)
        counts = rng.poisson(rng.gamma(0.3, 2, GENES), (n, GENES))
        counts[n // 2] = 0
        counts[3, 5] = 40_000
        obs = pd.DataFrame(
            {
                "batch": rng.choice(["a", "b"], n),
                "cell_type": rng.choice(["T", "B", "Unknown"], n),
            },
            index=[f"{name}-{i}" for i in range(n)],
        )
        out[name] = AnnData(sp.csr_matrix(counts.astype(np.float32)), obs)
        out[name].var_names = NAMES
    return out


def _opened(source: RowSource, names: list[str], reopen: Callable[[], RowSource]) -> Opened:
    """``names`` are the row names of the source, in its order."""
    whole = ad.concat(studies().values())
    counts = sp.csr_matrix(whole[names].X, dtype=np.float64)
    return Opened(source, counts, reopen)


def _filled(folder: Path, format: str = "zarr", **options: str) -> Path:
    store = atlas.create_store(folder / "store", format=format)
    for name, study in studies().items():
        store.append(study, study=name, batch_key="batch", label_key="cell_type", **options)
    return folder / "store"


def _store(path: Path) -> Opened:
    store = atlas.open_store(path)
    return _opened(store, list(store.obs().index), lambda: atlas.open_store(path))


def zarr_fast(folder: Path) -> Opened:
    return _store(_filled(folder, profile="fast"))


def zarr_portable(folder: Path) -> Opened:
    return _store(_filled(folder, profile="portable"))


def zarr_small(folder: Path) -> Opened:
    return _store(_filled(folder, profile="small"))


def tiledb(folder: Path) -> Opened:
    pytest.importorskip("tiledb", reason="the extra tiledb is not installed")
    return _store(_filled(folder, format="tiledb"))


def by_url(folder: Path) -> Opened:
    pytest.importorskip("obstore", reason="the extra remote is not installed")
    pytest.importorskip("moto", reason="moto is not installed")
    import object_store

    server = object_store.shared()  # the fixture of this name sets its credentials
    url = server.upload(_filled(folder), folder.name)

    def reopen() -> RowSource:
        return atlas.open_store(url, options=server.options, cache_folder=folder / "cache")

    store = atlas.open_store(url, options=server.options, cache_folder=folder / "cache")
    return _opened(store, list(store.obs().index), reopen)


def projection(folder: Path) -> Opened:
    store = atlas.open_store(_filled(folder))
    path = folder / "projected"
    source = atlas.project(store, NAMES, path)
    return _opened(source, list(store.obs().index), lambda: atlas.project(store, NAMES, path))


def anndata_zarr(folder: Path) -> Opened:
    paths = [folder / f"{name}.zarr" for name in studies()]
    for path, study in zip(paths, studies().values(), strict=True):
        study.write_zarr(path)
    return _files(paths)


def soma(folder: Path) -> Opened:
    pytest.importorskip("tiledbsoma", reason="the extra soma is not installed")
    import tiledbsoma.io

    paths = [folder / name for name in studies()]
    for path, study in zip(paths, studies().values(), strict=True):
        tiledbsoma.io.from_anndata(str(path), study, measurement_name="RNA")
    return _files(paths)


def h5ad_files(folder: Path) -> Opened:
    paths = [folder / f"{name}.h5ad" for name in studies()]
    for path, study in zip(paths, studies().values(), strict=True):
        study.write_h5ad(path)
    return _files(paths)


def _files(paths: list[Path]) -> Opened:
    def reopen() -> RowSource:
        return atlas.open_files(paths, batch_key="batch", label_key="cell_type")

    names = [cell for study in studies().values() for cell in study.obs_names]
    return _opened(reopen(), names, reopen)


OPENERS = [
    zarr_fast,
    zarr_portable,
    zarr_small,
    tiledb,
    by_url,
    projection,
    anndata_zarr,
    h5ad_files,
    soma,
]
