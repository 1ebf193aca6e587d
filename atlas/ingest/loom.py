"""Loom files: genes × cells in HDF5, read with h5py.

Form: loompy.org, "Loom file format specs": ``/matrix``, ``/layers/NAME``, ``/row_attrs/NAME``,
``/col_attrs/NAME``; names as scanpy takes them, ``CellID`` and ``Gene``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import InputError
from atlas.ingest.content import Content, LazyArrays, OpenMatrix, elsewhere, missing_layer
from atlas.ingest.matrix import (
    Budget,
    Place,
    Rows,
    dense_rows,
    read,
    rows_of_dense,
    split,
    stretches,
)
from atlas.ingest.transpose import ByColumns, Entries

_CELLS = ("CellID", "obs_names", "cell_id", "Barcode")
_GENES = ("Gene", "var_names", "gene_name", "Accession")
_IDS = ("Accession", "gene_ids", "EnsemblID")


def is_loom(file: h5py.File) -> bool:
    """Whether an HDF5 file is laid out as loom."""
    return isinstance(file.get("matrix"), h5py.Dataset) and {"row_attrs", "col_attrs"} <= set(file)


def read_loom(file: h5py.File, path: Path, *, layer: str | None) -> Content:
    """Find counts and tables in an open file; counts are not read yet.

    Raises
    ------
    InputError
        There are no names of cells or genes, or an attribute has another length.
    MissingColumnError
        There is no such layer.
    """
    n_genes, n_cells = file["matrix"].shape
    obs = _attributes(file["col_attrs"], n_cells, _CELLS, "cells", path)
    var = _attributes(file["row_attrs"], n_genes, _GENES, "genes", path)
    if ids := next((name for name in _IDS if name in var and name != var.index.name), None):
        var = var.rename(columns={ids: "gene_ids"})
    var.index.name = obs.index.name = None
    names = sorted(file["layers"]) if "layers" in file else []
    layers: dict[str, OpenMatrix] = {
        name: functools.partial(
            LoomMatrix, file[f"layers/{name}"], Place(f"layers[{name!r}] of {path}", path)
        )
        for name in names
    }
    x = functools.partial(LoomMatrix, file["matrix"], Place(f"the matrix of {path}", path))
    if layer is not None and layer not in layers:
        raise missing_layer(layer, layers, str(path), path)
    chosen: OpenMatrix = x if layer is None else layers[layer]
    return Content(
        name=str(path),
        path=path,
        obs=obs,
        var=var,
        obsm=LazyArrays({}),
        uns={},
        counts=chosen(),
        layers=layers,
        elsewhere=elsewhere(layers, x, None, chosen),
        close=file.close,
    )


def _attributes(
    group: h5py.Group, n: int, keys: tuple[str, ...], what: str, path: Path
) -> pd.DataFrame:
    columns = {}
    for name in sorted(group):
        values = group[name][()]
        if values.ndim != 1:
            continue  # embeddings and the like
        if len(values) != n:
            raise InputError(
                f"{path} has an attribute of another length",
                found=f"{len(values):,} values of {group.name}/{name}",
                expected=f"{n:,} {what}",
                do="write the file again from its source",
                path=path,
            )
        if values.dtype.kind in "SO":
            values = np.array([v.decode() if isinstance(v, bytes) else v for v in values], object)
        columns[name] = values
    key = next((key for key in keys if key in columns), None)
    if key is None:
        raise InputError(
            f"{path} does not name its {what}",
            found=f"{group.name} with " + (", ".join(columns) or "nothing in it"),
            expected="one of " + ", ".join(keys),
            do=f"add the names of the {what} to the file",
            path=path,
        )
    names = pd.Index([str(name) for name in columns.pop(key)], dtype=object, name=key)
    return pd.DataFrame(columns, index=names)


class LoomMatrix(ByColumns):
    """A dense array of genes × cells in HDF5, as cells × genes."""

    def __init__(self, values: h5py.Dataset, place: Place) -> None:
        super().__init__((values.shape[1], values.shape[0]), values.dtype, place)
        self.values = values

    def ranges(self, budget: Budget) -> list[tuple[int, int]] | None:
        """Any cells can be read where the cells of a chunk fit with all their genes."""
        step = dense_rows(self.shape[1], self.dtype, budget)
        width = self.values.chunks[1] if self.values.chunks else 1
        if width > step:
            return None
        return stretches(self.shape[0], step - step % width)

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield cells without their zeros; through a temporary file where chunks do not fit."""
        found = self.ranges(budget._replace(rows=None))
        if found is None:
            yield from super().row_blocks(budget)
            return
        for start, stop in found:
            yield from split(self.rows(start, stop), budget)

    def rows(self, start: int, stop: int) -> Rows:
        """Cells without their zeros."""
        strip = read(self.values, (slice(None), slice(start, stop)))
        return rows_of_dense(start, np.ascontiguousarray(strip.T))

    def sample(self) -> npt.NDArray[Any]:
        """Some genes of the first cells."""
        genes = np.unique(np.linspace(0, self.shape[1] - 1, 16).astype(int)).tolist()
        return np.concatenate([read(self.values, (g, slice(0, 4096))) for g in genes])

    def entry_rows(self, size: int) -> Iterator[npt.NDArray[Any]]:
        """Yield the cells of the non-zeros, tile by tile."""
        for entries in self.entries(size):
            yield entries.rows

    def entries(self, size: int) -> Iterator[Entries]:
        """Yield the non-zeros of tiles made of whole chunks."""
        n_cells, n_genes = self.shape
        height, width = self.values.chunks
        width *= max(1, size // (height * width))
        for top, bottom in pairwise([*range(0, n_genes, height), n_genes]):
            for left in range(0, n_cells, width):
                tile = read(self.values, (slice(top, bottom), slice(left, left + width)))
                genes, cells = np.nonzero(tile)
                yield Entries(cells + left, (genes + top).astype(np.int32), tile[genes, cells])
