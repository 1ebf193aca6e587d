"""The simulated cells that all loaders are compared on, sorted by batch as a merged file would be.

Simulated counts come in random order and compressed; both would flatter or slow one side or the
other. So they are copied once into a file whose rows are sorted by batch (the hardest order for a
loader that shuffles by blocks) and whose arrays are not compressed (the fastest that h5py can read,
for the peer that reads the file itself).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import read_elem, write_elem

LIBRARIES = {1900: 5450.0, 1000: 2050.0}
"""Median total counts of a cell for which about so many of 20,000 genes are not zero."""

_ROWS = 8192  # copied at a time


def cells_file(folder: Path, cells: int, genes: int, nnz: int) -> Path:
    """The file of so many cells, made if it is not there.

    Parameters
    ----------
    folder
        Where it is kept; made if needed.
    cells, genes
        Its shape.
    nnz
        Non-zeros of a cell, about; one of :data:`LIBRARIES` at 20,000 genes.
    """
    from atlas.simulate import simulate

    file = folder / "cells.h5ad"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / "simulated"
    if not (raw / "truth.npz").exists():  # written last
        shutil.rmtree(raw, ignore_errors=True)
        simulate(raw, cells, 1, seed=0, genes=genes, library=LIBRARIES[nnz])
    partial = folder / "cells.partial"
    _sort_by_batch(raw / "study_1.h5ad", partial)
    partial.replace(file)
    shutil.rmtree(raw)
    return file


def _sort_by_batch(source: Path, target: Path) -> None:
    """Copy, rows in order of batch (stable), X as contiguous int32 and float32."""
    with h5py.File(source) as raw, h5py.File(target, "w") as out:
        out.attrs.update(dict(raw.attrs))
        obs: pd.DataFrame = read_elem(raw["obs"])
        batch = obs["batch"].cat.codes.to_numpy()
        order = np.argsort(batch, kind="stable")
        write_elem(out, "obs", obs.iloc[order])
        write_elem(out, "var", read_elem(raw["var"]))
        for empty in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            write_elem(out, empty, {})
        old = raw["X/indptr"][:]
        new = np.concatenate([[0], np.cumsum(np.diff(old)[order])])
        counts = out.create_group("X")
        counts.attrs.update(dict(raw["X"].attrs))
        counts.create_dataset("indptr", data=new)
        parts = [
            (raw["X"][name], counts.create_dataset(name, shape=(int(new[-1]),), dtype=dtype))
            for name, dtype in (("indices", np.int32), ("data", np.float32))
        ]
        # Rows of one batch follow each other in the target wherever they were in the source.
        first = np.concatenate([[0], np.cumsum(np.bincount(batch))])
        at = new[first[:-1]]
        for start in range(0, len(batch), _ROWS):
            _copy_rows(parts, old, batch, at, start)


def _copy_rows(
    parts: list[tuple[h5py.Dataset, h5py.Dataset]],
    indptr: npt.NDArray[np.int64],
    batch: npt.NDArray[np.integer],
    at: npt.NDArray[np.int64],
    start: int,
) -> None:
    """Copy the rows from ``start``, each batch to where it goes on (``at``, moved on)."""
    here = batch[start : start + _ROWS]
    bounds = indptr[start : start + len(here) + 1]
    element_batch = np.repeat(here, np.diff(bounds))
    sizes = np.bincount(element_batch, minlength=len(at))
    for source, target in parts:
        values = source[bounds[0] : bounds[-1]]
        for b in np.flatnonzero(sizes):
            target[at[b] : at[b] + sizes[b]] = values[element_batch == b]
    at += sizes
