"""Counts as a sparse TileDB array of two dimensions: the layout that the store does not have.

It stands beside the one it has, dense arrays of one dimension, in ``bench_loader.py``; rows come
through the same loader.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import tiledb

from loaders import RowBlock
from loaders.source import as_ranges

_ROWS = 8192
"""Written at a time, into one fragment."""
_TILE = 256
"""Rows of a space tile; the cells of one block of the loader."""


def write(h5ad: Path, target: Path) -> None:
    """Copy X of an h5ad file, CSR, row by row."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with h5py.File(h5ad) as file:
        group = file["X"]
        n_obs, n_vars = map(int, group.attrs["shape"])
        indptr = group["indptr"][:].astype(np.int64)
        narrow = [tiledb.ByteShuffleFilter(), tiledb.ZstdFilter(1)]
        dims = [
            tiledb.Dim("row", domain=(0, n_obs - 1), tile=_TILE, dtype=np.uint32, filters=narrow),
            tiledb.Dim(
                "gene", domain=(0, n_vars - 1), tile=n_vars, dtype=np.uint32, filters=narrow
            ),
        ]
        schema = tiledb.ArraySchema(
            tiledb.Domain(*dims),
            [tiledb.Attr("count", np.uint16, filters=narrow)],
            sparse=True,
            cell_order="row-major",
            tile_order="row-major",
            capacity=2**17,
        )
        tiledb.Array.create(str(target / "counts"), schema)
        for start in range(0, n_obs, _ROWS):
            stop = min(n_obs, start + _ROWS)
            a, b = indptr[start], indptr[stop]
            row = np.repeat(np.arange(start, stop), np.diff(indptr[start : stop + 1]))
            with tiledb.open(str(target / "counts"), "w") as array:
                array[row, group["indices"][a:b]] = group["data"][a:b].astype(np.uint16)
    np.save(target / "indptr.npy", indptr)
    (target / "shape.json").write_text(json.dumps([n_obs, n_vars]))


class SparseSource:
    """The rows of :func:`write` as a :class:`loaders.RowSource`."""

    narrow = True
    reading = "a sparse TileDB array of two dimensions"
    read_overhead = 2**24

    def __init__(self, path: Path) -> None:
        self._path = path
        self.n_obs, self.n_vars = json.loads((path / "shape.json").read_text())
        self.segments = (0, self.n_obs)
        self._indptr = np.load(path / "indptr.npy")
        self.fingerprint = hashlib.sha256(self._indptr.tobytes()).hexdigest()
        self.obs_codes: Mapping[str, npt.NDArray[np.int32]] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def _array(self) -> Any:
        one = {"sm.compute_concurrency_level": "1", "sm.io_concurrency_level": "1"}
        return tiledb.open(str(self._path / "counts"), ctx=tiledb.Ctx(one))

    def count_values(self, starts: Any, stops: Any) -> npt.NDArray[np.int64]:
        """Values in each range."""
        counts: npt.NDArray[np.int64] = self._indptr[stops] - self._indptr[starts]
        return counts

    def read_rows(self, starts: Any, stops: Any) -> RowBlock:
        """Rows of some ranges."""
        starts, stops = as_ranges(starts, stops)
        with self._lock:
            array = self._array
        ranges = [slice(int(a), int(b) - 1) for a, b in zip(starts, stops, strict=True) if a < b]
        found = array.query(attrs=["count"], coords=True, order="U").multi_index[ranges, :]
        rows = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        # the order of the answer is that of tiles; ranges came in rising order
        order = np.lexsort((found["gene"], found["row"]))
        lengths = self._indptr[rows + 1] - self._indptr[rows]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        return RowBlock(indptr, found["gene"][order].astype(np.uint16), found["count"][order])
