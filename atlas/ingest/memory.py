"""AnnData objects in memory, views of them, and backed ones."""

from __future__ import annotations

import functools
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp
from anndata.abc import CSCDataset, CSRDataset

from atlas.errors import InputError
from atlas.ingest.content import (
    Content,
    LazyArrays,
    elsewhere,
    missing_layer,
    missing_raw,
    obsm_array,
)
from atlas.ingest.h5ad import stored_matrix
from atlas.ingest.matrix import CsrMatrix, DenseMatrix, Matrix, Place, SlicedMatrix
from atlas.ingest.transpose import CscMatrix

NAME = "AnnData in memory"


def read_anndata(adata: Any, *, layer: str | None, use_raw: bool) -> Content:
    """Take an AnnData as it is: nothing is copied whole and nothing of it is changed.

    A view is read slice by slice; a view of a backed AnnData, which cannot be sliced again, is
    the exception: anndata reads it into memory.

    Raises
    ------
    InputError
        Where X or raw is missing, or of a kind that is not read.
    MissingColumnError
        Where there is no such layer.
    """
    if layer is not None and layer not in adata.layers:
        raise missing_layer(layer, adata.layers, NAME, None)
    if use_raw and adata.raw is None:
        raise missing_raw(NAME, None)

    x = None if adata.X is None else functools.partial(_part, adata, "X")
    raw = None if adata.raw is None else lambda: _matrix(adata.raw.X, Place("raw.X", None))
    layers = {
        str(name): functools.partial(_part, adata, f"layers[{str(name)!r}]", name)
        for name in adata.layers
    }
    chosen = raw if use_raw else x if layer is None else layers[layer]
    if chosen is None:
        raise InputError(
            "the AnnData has no X",
            found="X is None; layers: " + (", ".join(map(repr, layers)) or "none"),
            expected="raw counts in X",
            do="name the layer that holds the counts with --layer",
        )
    return Content(
        name=NAME,
        path=None,
        obs=adata.obs,
        var=adata.raw.var if use_raw else adata.var,
        obsm=LazyArrays({str(key): _reader(adata, key) for key in adata.obsm}),
        uns={"spatial": adata.uns["spatial"]} if "spatial" in adata.uns else {},
        counts=chosen(),
        layers={} if use_raw else layers,
        elsewhere=elsewhere(layers, x, raw, chosen),
    )


def _part(adata: Any, what: str, layer: str | None = None) -> Matrix:
    """X or a layer; of a view, slices of it rather than a copy of the whole."""

    def take(start: int, stop: int) -> Any:
        rows = adata[start:stop]
        return rows.X if layer is None else rows.layers[layer]

    if adata.is_view and not adata.isbacked:
        return SlicedMatrix(take, adata.shape, take(0, 1).dtype, Place(what, None))
    return _matrix(adata.X if layer is None else adata.layers[layer], Place(what, None))


def _matrix(values: Any, place: Place) -> Matrix:
    if sp.issparse(values) and values.format in ("csr", "csc"):
        kind = CsrMatrix if values.format == "csr" else CscMatrix
        return kind(values.data, values.indices, values.indptr, values.shape, place)
    if isinstance(values, np.ndarray):
        return DenseMatrix(np.asarray(values), place)
    if isinstance(values, h5py.Dataset):
        return stored_matrix(values, place)
    if isinstance(values, CSRDataset | CSCDataset):
        return stored_matrix(values.group, place)
    raise InputError(
        f"{place.what} is of a kind that is not read",
        found=type(values).__name__,
        expected="a NumPy array or a CSR or CSC matrix",
        do="load it first, e.g. with adata = adata.to_memory()",
    )


def _reader(adata: Any, key: Any) -> Any:
    return lambda: obsm_array(adata.obsm[key])
