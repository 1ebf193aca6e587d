"""From a store to AnnData: float32 counts and int32 indices, as everyone else expects them.

In memory, or with counts and layers as dask arrays of CSR blocks that are read when they are
computed.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from atlas.errors import ConfigError
from atlas.store.base import CountStore
from atlas.store.files_source import FilesSource

_ROWS_AT_ONCE = 8192


def to_anndata(
    store: CountStore,
    *,
    embedding: str | None = None,
    rows: npt.ArrayLike | None = None,
    order: Literal["store", "input"] = "store",
    lazy: bool = False,
) -> AnnData:
    """Read cells of a store, over its whole gene table.

    Parameters
    ----------
    store
        An open store.
    embedding
        Name of an embedding to add as ``obsm['X_NAME']``.
    rows
        Positions in the store (int), or a mask (bool); all cells when None.
    order
        ``"store"``: rising positions, or as ``rows`` gives them. ``"input"``: study by study as
        appended, each study's cells as they came.
    lazy
        Leave X and layers on disk: dask arrays in blocks of 8,192 cells, which scanpy's
        dask-aware functions and ``dask.distributed`` take. obs and obsm are read.

    Returns
    -------
    AnnData
        X: float32 CSR with int32 indices (int64 above 2^31 values); ``var['gene_id']``; obs with
        all columns of the inputs and the training codes as ``atlas_study``, ``atlas_batch`` and
        ``atlas_label``; obsm that all studies have; layers kept with all studies.
    """
    if order not in ("store", "input"):
        raise ConfigError("order is not offered", found=repr(order), expected="store or input")
    positions = _positions(store, rows)
    if order == "input":
        came = store.index_array("input_position")[positions]
        positions = positions[np.lexsort((came, store.obs_codes["study"][positions]))]
    obs = obs_of(store, positions)
    matrix = _lazily if lazy else _matrix
    adata = AnnData(X=matrix(store, None, positions), obs=obs, var=var_of(store))
    for name, array in _obsm(store).items():
        adata.obsm[name] = array[positions]
    for name in _common_layers(store):
        adata.layers[name] = matrix(store, name, positions)
    if embedding is not None:
        adata.obsm[f"X_{embedding}"] = store.embedding(embedding)[positions]
    return adata


def obs_of(store: CountStore | FilesSource, positions: npt.NDArray[np.int64]) -> pd.DataFrame:
    """Annotations of cells under row names that are unique, as AnnData wants them."""
    obs = store.obs().iloc[positions]
    if not obs.index.is_unique:
        warnings.warn(
            "cells of different studies have the same row name; '-STUDY' is added to theirs",
            UserWarning,
            stacklevel=3,
        )
        twice = obs.index.duplicated(keep=False)
        study = np.asarray(store.studies, object)[store.obs_codes["study"][positions]]
        names = obs.index.to_numpy(object).copy()
        names[twice] = [f"{n}-{s}" for n, s in zip(names[twice], study[twice], strict=True)]
        obs.index = pd.Index(names, dtype=object)
    return obs


def var_of(store: CountStore | FilesSource) -> pd.DataFrame:
    """The gene table as AnnData keeps it: no value is missing."""
    var = store.var
    var["gene_id"] = var["gene_id"].astype(object).where(var["gene_id"].notna(), "")
    return var


def _positions(store: CountStore, rows: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
    if rows is None:
        return np.arange(store.n_obs)
    given = np.asarray(rows)
    if given.dtype == bool:
        fits = given.shape == (store.n_obs,)
        positions = np.flatnonzero(given)
    else:
        fits = given.ndim == 1 and (not given.size or np.issubdtype(given.dtype, np.integer))
        positions = given.astype(np.int64) if fits else np.empty(0, np.int64)
        fits = fits and bool(((positions >= 0) & (positions < store.n_obs)).all())
    if not fits:
        raise ConfigError(
            "These rows cannot be taken from the store",
            found=f"{given.dtype} of shape {given.shape}",
            expected=f"positions from 0 to {store.n_obs - 1}, or a mask of {store.n_obs} booleans",
            path=store.path,
        )
    return positions


def _lazily(store: CountStore, layer: str | None, positions: npt.NDArray[np.int64]) -> Any:
    """The same as :func:`_matrix`, as a dask array."""
    read = dask.delayed(_matrix)
    opened = dask.delayed(store, traverse=False)  # pickled once for all blocks, and opened there
    void = sp.csr_matrix((0, store.n_vars), dtype=np.float32)
    blocks = [
        da.from_delayed(
            read(opened, layer, part),
            shape=(len(part), store.n_vars),
            dtype=np.float32,
            meta=void,
        )
        for part in np.split(positions, range(_ROWS_AT_ONCE, len(positions), _ROWS_AT_ONCE))
    ]
    return da.concatenate(blocks, axis=0)


def _matrix(
    store: CountStore, layer: str | None, positions: npt.NDArray[np.int64]
) -> sp.csr_matrix:
    """Counts or a layer of the rows at ``positions``, over the whole gene table: float32.

    They are read in rising order in blocks that keep within a study.
    """
    pieces = []
    rising = np.sort(positions)
    for start, stop in zip(store.segments[:-1], store.segments[1:], strict=True):
        for a in range(start, stop, _ROWS_AT_ONCE):
            b = min(stop, a + _ROWS_AT_ONCE)
            inside = rising[np.searchsorted(rising, a) : np.searchsorted(rising, b)]
            if not len(inside):
                continue
            piece = _counts(store, a, b) if layer is None else _layer(store, layer, a, b)
            whole = np.array_equal(inside, np.arange(a, b))
            pieces.append(piece if whole else piece[inside - a])
    if not pieces:
        return sp.csr_matrix((0, store.n_vars), dtype=np.float32)
    out = sp.vstack(pieces, format="csr", dtype=np.float32)
    if not np.array_equal(rising, positions):
        back = np.empty(len(positions), np.int64)
        back[np.argsort(positions, kind="stable")] = np.arange(len(positions))
        out = out[back]
    out.sort_indices()
    return out


def _obsm(store: CountStore) -> dict[str, npt.NDArray[Any]]:
    """The obsm entries that all studies have with the same width."""
    tables = [store.study(name).table("obsm") for name in store.studies]
    out = {}
    for name in tables[0] if tables else ():
        arrays = [np.asarray(table[name]) for table in tables if name in table]
        if len(arrays) == len(tables) and len({a.shape[1:] for a in arrays}) == 1:
            out[name] = np.concatenate(arrays)
    return out


def _common_layers(store: CountStore) -> list[str]:
    kept = [set(store.study(name).layers) for name in store.studies]
    return sorted(set.intersection(*kept)) if kept else []


def _counts(store: CountStore, start: int, stop: int) -> sp.csr_matrix:
    """Counts of rows of one study."""
    block = store.read_rows(start, stop).widened()
    shape = (stop - start, store.n_vars)
    return sp.csr_matrix((block.data, block.indices, block.indptr), shape=shape)


def _layer(store: CountStore, name: str, start: int, stop: int) -> sp.csr_matrix:
    """A layer of rows of one study, as float32."""
    i = int(np.searchsorted(store.segments, start, side="right")) - 1
    entry, first = store.manifest.studies[i], store.segments[i]
    columns = store.part_array(entry, "index", "genes")
    indptr, indices, data = store.study(entry.name).layer(name).read(start - first, stop - first)
    column = columns[indices]
    measured = column >= 0
    ends = np.concatenate([[0], np.cumsum(measured)])[indptr]
    shape = (stop - start, store.n_vars)
    return sp.csr_matrix((data[measured].astype(np.float32), column[measured], ends), shape=shape)
