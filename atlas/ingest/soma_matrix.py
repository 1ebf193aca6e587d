"""The counts of a TileDB-SOMA experiment: one sparse layer of a measurement, read by cells."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from atlas.errors import ConfigError, InputError
from atlas.ingest import kernels
from atlas.ingest.matrix import ENTRY_BYTES, Budget, Matrix, Place, Rows, split, stretches

_BUFFER = 8 * 2**20
"""Bytes that a query fills at a time, of each of its three columns."""
_CONFIG = {
    "soma.init_buffer_bytes": _BUFFER,
    "sm.mem.total_budget": 2**27,
    "sm.compute_concurrency_level": 1,  # a query runs in the thread that asks
    "sm.io_concurrency_level": 1,
    # merged as they are read: the merge before reading can outlive its query, and then the process
    # dies (seen with the TileDB 2.30 of tiledbsoma 2.3.0; github.com/TileDB-Inc/TileDB/pull/5723)
    "sm.query.sparse_global_order.preprocess_tile_merge": 0,
}
_COUNTED = 8192
_PROBED = 16


def tiledbsoma() -> Any:
    """The package, which is an extra.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    try:
        return import_module("tiledbsoma")
    except ImportError as error:
        raise ConfigError(
            "SOMA experiments need the package tiledbsoma",
            found=error,
            do="pip install 'atlas-trainer[soma]'",
        ) from None


class Opened:
    """An experiment at one time, open in this process; a fork opens it anew."""

    def __init__(self, path: Path, uri: str) -> None:
        self._soma = tiledbsoma()
        self.path, self.uri = path, uri
        self._time = int(time.time() * 1000)
        self._of: dict[int, Any] = {}  # those of a parent stay: their threads are not here
        self._arrays: dict[tuple[int, str, str], Any] = {}
        self._locks: dict[int, threading.Lock] = {}  # a fork could leave one taken for ever

    @property
    def experiment(self) -> Any:
        """The experiment.

        Raises
        ------
        InputError
            It cannot be opened.
        """
        process = os.getpid()
        with self._locks.setdefault(process, threading.Lock()):
            if process not in self._of:
                context = self._soma.SOMATileDBContext(tiledb_config=_CONFIG)
                try:
                    self._of[process] = self._soma.Experiment.open(
                        self.uri, context=context, tiledb_timestamp=self._time
                    )
                except Exception as error:  # tiledbsoma raises what TileDB raises
                    raise InputError(
                        f"{self.uri} cannot be opened as a SOMA experiment",
                        found=f"{type(error).__name__}: {error}".splitlines()[0],
                        expected="a folder or URI of a TileDB-SOMA experiment",
                        path=self.path,
                    ) from error
            return self._of[process]

    def array(self, measurement: str, layer: str) -> Any:
        """A layer of a measurement, opened once: collections open what is in them at first use."""
        key = (os.getpid(), measurement, layer)
        experiment = self.experiment
        with self._locks[key[0]]:
            if key not in self._arrays:
                self._arrays[key] = experiment.ms[measurement].X[layer]
            return self._arrays[key]

    def close(self) -> None:
        """Close what this process opened."""
        for key in [key for key in self._arrays if key[0] == os.getpid()]:
            del self._arrays[key]
        if (experiment := self._of.pop(os.getpid(), None)) is not None:
            experiment.close()


class SomaMatrix(Matrix):
    """One sparse layer of a measurement; of the cells with the given join ids, in their order."""

    reading = "through tiledbsoma: 40 times as long as from a store, 15 times with block_size=2048"
    read_overhead = 4 * _BUFFER

    def __init__(
        self,
        opened: Opened,
        measurement: str,
        layer: str,
        ids: npt.NDArray[np.int64],
        genes: npt.NDArray[np.int64],
        said: npt.NDArray[Any] | None,
    ) -> None:
        self._opened, self._measurement, self._layer = opened, measurement, layer
        path = opened.path
        what = f"X[{layer!r}] of measurement {measurement!r}"
        if not self._array.is_sparse:
            raise InputError(
                f"{what} is dense",
                expected="a sparse array",
                do="write it as an h5ad with tiledbsoma.io.to_h5ad, and open that",
                path=path,
            )
        dtype = self._array.schema.field("soma_data").type.to_pandas_dtype()
        super().__init__((len(ids), len(genes)), dtype, Place(what, path))
        self._ids = ids
        self._column = np.full(int(genes.max(initial=-1)) + 2, -1, np.int32)
        self._column[genes] = np.arange(len(genes), dtype=np.int32)
        self._said = said

    @property
    def _array(self) -> Any:
        return self._opened.array(self._measurement, self._layer)

    @functools.cached_property
    def indptr(self) -> npt.NDArray[np.int64]:
        """Where the values of each row would start: int64, (n_obs + 1,).

        A pass over all values, as SOMA does not keep it; but where obs has a column ``nnz`` that
        is right for some rows, it is believed, and checked as rows are read.
        """
        n_obs = self.shape[0]
        if self._said is not None and self._said.dtype.kind in "iu":
            probed = [len(values) for values in self._probes]
            if np.array_equal(probed, self._said[self._probed_rows]):
                return np.concatenate([[0], np.cumsum(self._said, dtype=np.int64)])
        lengths = np.zeros(n_obs, np.int64)
        with tqdm(
            total=n_obs, unit=" cells", unit_scale=True, desc="counting values", delay=5
        ) as shown:
            for start in range(0, n_obs, _COUNTED):
                ids = self._ids[start : start + _COUNTED]
                for table in self._tables(ids):
                    kernels.tally(kernels.slots(table[0], ids), lengths[start : start + len(ids)])
                shown.update(len(ids))
        return np.concatenate([[0], np.cumsum(lengths)])

    @property
    def _probed_rows(self) -> npt.NDArray[np.int64]:
        return np.unique(np.linspace(0, self.shape[0] - 1, _PROBED).astype(np.int64))

    @functools.cached_property
    def _probes(self) -> list[npt.NDArray[Any]]:
        """The values of some rows from all over."""
        return [rows.data for rows in self._query(self._probed_rows, self._probed_rows + 1)]

    def _tables(self, ids: npt.NDArray[np.int64]) -> Iterator[list[npt.NDArray[Any]]]:
        """Cell, gene and value of each entry of the cells, in any order."""
        try:
            for table in self._array.read((ids, slice(None)), result_order="auto").tables():
                names = ("soma_dim_0", "soma_dim_1", "soma_data")
                yield [table[name].to_numpy() for name in names]
        except Exception as error:  # tiledbsoma raises what TileDB raises
            raise InputError(
                f"A part of {self.place.what} cannot be read",
                found=f"{type(error).__name__}: {error}".splitlines()[0],
                expected="an intact experiment",
                do="copy or download it again; open it again if it was consolidated or vacuumed",
                path=self.place.path,
            ) from error

    def _query(self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> Sequence[Rows]:
        """Ranges of rows, in one query."""
        wanted = [np.arange(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
        rows = np.unique(np.concatenate(wanted)) if wanted else np.empty(0, np.int64)
        ids = self._ids[rows]
        parts = list(self._tables(ids)) if len(ids) else []
        slots = [kernels.slots(cells, ids) for cells, _, _ in parts]
        indptr = np.zeros(len(ids) + 1, np.int64)
        for slot in slots:
            kernels.tally(slot, indptr[1:])
        np.cumsum(indptr, out=indptr)
        indices = np.empty(int(indptr[-1]), np.int32)
        data = np.empty(int(indptr[-1]), self.dtype)
        ends = indptr[:-1].copy()
        for slot, (_, genes, values) in zip(slots, parts, strict=True):
            kernels.scatter(slot, self._columns_of(genes), values, 0, ends, indices, data)
        out = []
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            first = int(np.searchsorted(rows, start))
            own = indptr[first : first + stop - start + 1]
            inside = slice(int(own[0]), int(own[-1]))
            out.append(Rows(start, own - own[0], indices[inside], data[inside]))
        return out

    def _columns_of(self, genes: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        columns = self._column[np.minimum(genes, len(self._column) - 1)]
        if len(columns) and int(columns.min()) < 0:
            raise InputError(
                f"{self.place.what} has genes that var does not have",
                found=f"soma_joinid {int(genes[columns.argmin()])}",
                expected="the join ids of var",
                path=self.place.path,
            )
        return columns

    def rows_of_ranges(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> Sequence[Rows]:
        """Rows in one query, each with as many values as :meth:`count_values` says, or fewer."""
        found = self._query(starts, stops)
        for rows in found:
            expected = np.diff(self.indptr[rows.first : rows.first + len(rows.indptr)])
            over = np.flatnonzero(np.diff(rows.indptr) > expected)
            if len(over):
                raise InputError(
                    "A cell has more values than obs['nnz'] says",
                    found=f"{int(np.diff(rows.indptr)[over[0]])} in row {rows.first + over[0]}",
                    expected=f"{int(expected[over[0]])}",
                    do="correct the column, or ingest the experiment",
                    path=self.place.path,
                )
        return found

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Values in each range of rows at most: int64, (n_ranges,)."""
        return self.indptr[stops] - self.indptr[starts]

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield rows as they are stored."""
        for start, stop in self.ranges(budget):
            yield from split(self.rows(start, stop), budget)

    def ranges(self, budget: Budget) -> list[tuple[int, int]]:
        """Any rows can be read; as many as fit if they have three times the mean of some.

        Not that of all: an array's ``nnz`` reads the whole of it where fragments overlap in time.
        """
        mean = max(1, int(np.mean([len(values) for values in self._probes])))
        step = max(1, budget.memory // (3 * mean * ENTRY_BYTES))
        return stretches(self.shape[0], min(step, budget.rows or step))

    def rows(self, start: int, stop: int) -> Rows:
        """Rows as they are stored."""
        return self._query(np.array([start]), np.array([stop]))[0]

    def sample(self) -> npt.NDArray[Any]:
        """Values of some rows."""
        return np.concatenate(self._probes)

    def digest(self) -> str:
        """Of the cells, how many values each has, and the names of fragments that are here."""
        total = hashlib.sha256(self._ids.tobytes() + self.indptr.tobytes())
        folder = Path(self._array.uri.removeprefix("file://")) / "__fragments"
        for fragment in sorted(p.name for p in folder.glob("*")):
            total.update(fragment.encode())
        return total.hexdigest()
