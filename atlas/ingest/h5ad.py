"""AnnData files (.h5ad), also those written before anndata 0.7."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import read_elem

from atlas.errors import InputError
from atlas.ingest.content import (
    Content,
    LazyArrays,
    OpenMatrix,
    elsewhere,
    missing_layer,
    missing_raw,
    obsm_array,
)
from atlas.ingest.matrix import CsrMatrix, DenseMatrix, Matrix, Place
from atlas.ingest.transpose import ChunkedMatrix, CscMatrix


def is_h5ad(file: h5py.File) -> bool:
    """Whether an HDF5 file has the tables of an AnnData."""
    return "obs" in file and "var" in file


def read_h5ad(file: h5py.File, path: Path, *, layer: str | None, use_raw: bool) -> Content:
    """Find counts and tables in an open file; counts are not read yet.

    Raises as :func:`read_elements`.
    """
    found = read_elements(file, path, stored_matrix, layer=layer, use_raw=use_raw)
    return replace(found, close=file.close)


def read_elements(
    file: Any,
    path: Path,
    matrix_of: Callable[[Any, Place], Matrix],
    *,
    layer: str | None,
    use_raw: bool,
) -> Content:
    """Find counts and tables in the group of an AnnData, in HDF5 or Zarr.

    Parameters
    ----------
    file
        The open group.
    path
        Of the file or folder.
    matrix_of
        Opens an element as a matrix.
    layer, use_raw
        Where the counts are.

    Raises
    ------
    InputError
        Where X or raw is missing, or a part is damaged.
    MissingColumnError
        Where there is no such layer.
    """
    raw_x, raw_var = ("raw/X", "raw/var") if "raw" in file else ("raw.X", "raw.var")
    names = list(file["layers"]) if "layers" in file else []
    if layer is not None and layer not in names:
        raise missing_layer(layer, dict.fromkeys(names), str(path), path)
    if use_raw and raw_x not in file:
        raise missing_raw(str(path), path)

    x, raw = (
        _matrix(file, key, what, path, matrix_of) for key, what in (("X", "X"), (raw_x, "raw.X"))
    )
    layers = {
        name: matrix
        for name in names
        if (matrix := _matrix(file, f"layers/{name}", f"layers[{name!r}]", path, matrix_of))
        is not None
    }
    chosen = raw if use_raw else x if layer is None else layers[layer]
    if chosen is None:
        raise InputError(
            f"{path} has no X",
            found="layers: " + (", ".join(map(repr, names)) or "none"),
            expected="raw counts in X",
            do="name the layer that holds the counts with --layer",
            path=path,
        )
    return Content(
        name=str(path),
        path=path,
        obs=_table(file, "obs", path),
        var=_table(file, raw_var if use_raw else "var", path),
        obsm=_obsm(file, path),
        uns={"spatial": _element(file, "uns/spatial", path)} if "uns/spatial" in file else {},
        counts=chosen(),
        layers={} if use_raw else layers,
        elsewhere=elsewhere(layers, x, raw, chosen),
    )


def stored_matrix(element: Any, place: Place) -> Matrix:
    """A matrix as anndata stores it: a dataset, or a group in CSR or CSC.

    Raises
    ------
    InputError
        Where it is stored in another way, or is damaged.
    """
    attributes = element.attrs
    encoding = str(attributes.get("encoding-type", attributes.get("h5sparse_format", "")))
    if isinstance(element, h5py.Dataset) and element.ndim == 2:
        return (DenseMatrix if element.chunks is None else ChunkedMatrix)(element, place)
    if isinstance(element, h5py.Group) and encoding[:3] in ("csr", "csc"):
        missing = [name for name in ("data", "indices", "indptr") if name not in element]
        shape = attributes.get("shape", attributes.get("h5sparse_shape"))
        if not missing and shape is not None:
            return (CsrMatrix if encoding[:3] == "csr" else CscMatrix)(
                element["data"],
                element["indices"],
                element["indptr"],
                (int(shape[0]), int(shape[1])),
                place,
            )
        found = f"a sparse matrix without {', '.join(missing) or 'a shape'}"
    else:
        found = encoding or type(element).__name__.lower()
    raise InputError(
        f"{place.what} is not stored as a matrix of counts",
        found=found,
        expected="a dense matrix, or a sparse one as CSR or CSC",
        do="write the file again with adata.write_h5ad()",
        path=place.path,
    )


def _matrix(
    file: Any, key: str, what: str, path: Path, matrix_of: Callable[[Any, Place], Matrix]
) -> OpenMatrix | None:
    if key not in file or file[key].attrs.get("encoding-type") == "null":
        return None
    return functools.partial(matrix_of, file[key], Place(what, path))


def _element(file: Any, key: str, path: Path) -> Any:
    try:
        return read_elem(file[key])
    except Exception as error:  # a damaged element can fail in any way
        raise InputError(
            f"{key} of {path} cannot be read",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            expected="an element that anndata can read",
            do="write the file again with adata.write_h5ad(), or copy it again",
            path=path,
        ) from error


def _table(file: Any, key: str, path: Path) -> pd.DataFrame:
    """``obs`` or ``var``; before anndata 0.7 a structured array with categories in ``uns``."""
    table = _element(file, key, path)
    if isinstance(table, pd.DataFrame):
        return table
    table = pd.DataFrame.from_records(table)
    table = table.set_index(table.columns[0])
    for column in table.columns:
        categories = f"uns/{column}_categories"
        if categories in file and table[column].dtype.kind in "iu":
            table[column] = pd.Categorical.from_codes(
                table[column].to_numpy(), pd.Index(np.atleast_1d(_element(file, categories, path)))
            )
    return table


def _obsm(file: Any, path: Path) -> LazyArrays:
    if "obsm" not in file:
        return LazyArrays({})
    if isinstance(file["obsm"], h5py.Dataset):  # before anndata 0.7
        fields = file["obsm"].dtype.names or ()
        return LazyArrays({name: functools.partial(_field, file, name) for name in fields})
    return LazyArrays(
        {name: functools.partial(_array, file, f"obsm/{name}", path) for name in file["obsm"]}
    )


def _array(file: Any, key: str, path: Path) -> npt.NDArray[Any]:
    return obsm_array(_element(file, key, path))


def _field(file: Any, name: str) -> npt.NDArray[Any]:
    return np.asarray(file["obsm"][name])
