"""Matrices of foreign files as a stream of CSR row blocks, read within a budget.

Arrays may be NumPy's or HDF5 datasets: both are sliced alike, and nothing is read whole but the
row pointers.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from atlas.errors import InputError
from atlas.ingest import kernels
from atlas.ingest.direct import read_vector

# Per stored entry: 16 bytes read, 8 cleaned, 8 in the hands of the consumer.
ENTRY_BYTES = 32
_SAMPLES, _SAMPLE_LENGTH = 16, 1024


class Rows(NamedTuple):
    """Consecutive rows as they are stored: unchecked, perhaps unsorted, duplicates and all."""

    first: int
    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[Any]
    data: npt.NDArray[Any]


class Place(NamedTuple):
    """Where a matrix is, for messages: ``layers['counts']`` of a file, or of an AnnData."""

    what: str
    path: str | PathLike[str] | None


class Budget(NamedTuple):
    """What reading may take: bytes of memory, rows per block, and a folder for temporary files."""

    memory: int
    rows: int | None = None
    folder: Path | None = None

    def boundaries(self, indptr: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Cut rows into blocks that fit; a row that does not fit makes a block of its own."""
        entries, n_rows, start = max(1, self.memory // ENTRY_BYTES), len(indptr) - 1, 0
        while start < n_rows:
            stop = int(np.searchsorted(indptr, indptr[start] + entries, side="right")) - 1
            stop = max(start + 1, min(stop, n_rows, start + (self.rows or n_rows)))
            yield start, stop
            start = stop


class Matrix(ABC):
    """A matrix of ``shape`` (rows, columns) that yields its rows in blocks."""

    reading = "through h5py: 3 times as long as from a store, longer where dense or compressed"
    """What reads the rows, and why."""
    read_overhead = 2**24
    """Bytes that a read takes besides twice what it returns, about."""

    def __init__(self, shape: tuple[int, int], dtype: npt.DTypeLike, place: Place) -> None:
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.place = place
        if self.dtype.kind not in "biuf":
            raise InputError(
                f"{place.what} does not hold numbers",
                found=str(self.dtype),
                expected="integers or floating-point numbers",
                path=place.path,
            )

    @abstractmethod
    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield all rows in order."""

    def ranges(self, budget: Budget) -> list[tuple[int, int]] | None:
        """Stretches of rows that fit and can be read in any order; None where rows come in one."""
        return None

    def rows(self, start: int, stop: int) -> Rows:
        """Rows of one of the :meth:`ranges`; safe to call from several threads."""
        raise NotImplementedError(f"{type(self).__name__} yields its rows in order only")

    def rows_of_ranges(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> Sequence[Rows]:
        """Several of the :meth:`ranges`, or parts of them; safe to call from several threads."""
        return list(map(self.rows, starts.tolist(), stops.tolist()))

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Values in each range of rows at most: int64, (n_ranges,)."""
        return (stops - starts) * self.shape[1]

    @abstractmethod
    def sample(self) -> npt.NDArray[Any]:
        """Some stored values from all over the matrix, read cheaply."""


class CsrMatrix(Matrix):
    """Compressed rows: ``indptr``, ``indices`` and ``data`` in memory or in HDF5."""

    def __init__(
        self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int], place: Place
    ) -> None:
        super().__init__(shape, data.dtype, place)
        self.data, self.indices = data, indices
        self.indptr = checked_indptr(indptr, data, indices, shape[0], place)

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Values in each range of rows: int64, (n_ranges,)."""
        return self.indptr[stops] - self.indptr[starts]

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield rows as they are stored."""
        for start, stop in self.ranges(budget):
            yield self.rows(start, stop)

    def ranges(self, budget: Budget) -> list[tuple[int, int]]:
        """Any rows can be read."""
        return list(budget.boundaries(self.indptr))

    def rows(self, start: int, stop: int) -> Rows:
        """Rows as they are stored."""
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        indices = read(self.indices, slice(first, last))
        check_range(indices, self.shape[1], self.place)
        data = read(self.data, slice(first, last))
        return Rows(start, self.indptr[start : stop + 1] - first, indices, data)

    def sample(self) -> npt.NDArray[Any]:
        """Some stored values."""
        return sample_vector(self.data)


class DenseMatrix(Matrix):
    """A dense array (rows, columns) whose rows can be read a few at a time."""

    def __init__(self, values: Any, place: Place) -> None:
        super().__init__(values.shape, values.dtype, place)
        self.values = values

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield rows without their zeros, reading whole HDF5 chunks."""
        for start, stop in self.ranges(budget._replace(rows=None)):
            yield from split(self.rows(start, stop), budget)

    def ranges(self, budget: Budget) -> list[tuple[int, int]]:
        """As many rows as fit when dense, in whole HDF5 chunks."""
        step = dense_rows(self.shape[1], self.dtype, budget)
        chunks = getattr(self.values, "chunks", None)
        if chunks is not None and chunks[0] < step:
            step -= step % chunks[0]
        return stretches(self.shape[0], step)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows without their zeros."""
        return rows_of_dense(start, read(self.values, slice(start, stop)))

    def sample(self) -> npt.NDArray[Any]:
        """Some rows."""
        return sample_rows(lambda start, stop: read(self.values, slice(start, stop)), self.shape)


class SlicedMatrix(Matrix):
    """Rows that have to be asked for, a slice at a time, as a view of an AnnData."""

    def __init__(
        self,
        take: Callable[[int, int], Any],
        shape: tuple[int, int],
        dtype: npt.DTypeLike,
        place: Place,
    ) -> None:
        super().__init__(shape, dtype, place)
        self._take = take
        self._lock = threading.Lock()  # nobody promises that an AnnData can be sliced by two

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield rows as if each were dense, which no row exceeds."""
        for start, stop in self.ranges(budget._replace(rows=None)):
            yield from split(self.rows(start, stop), budget)

    def ranges(self, budget: Budget) -> list[tuple[int, int]]:
        """As many rows as fit when dense."""
        step = dense_rows(self.shape[1], np.dtype(np.float64), budget)
        return stretches(self.shape[0], step)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows of a slice, without the zeros of a dense one."""
        with self._lock:
            block = self._take(start, stop)
        if not sp.issparse(block):
            return rows_of_dense(start, native(np.asarray(block)))
        block = block.tocsr()
        return Rows(start, block.indptr.astype(np.int64), block.indices, native(block.data))

    def sample(self) -> npt.NDArray[Any]:
        """Some rows."""

        def take(start: int, stop: int) -> npt.NDArray[Any]:
            block = self._take(start, stop)
            return native(np.asarray(block.tocsr().data if sp.issparse(block) else block))

        return sample_rows(take, self.shape)


def native(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Numbers in a type that compiled loops take: native byte order, no half or long floats."""
    if values.dtype == np.float16:
        return values.astype(np.float32)
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        return values.astype(np.float64)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def read(values: Any, index: Any) -> npt.NDArray[Any]:
    """Read a part of an array in memory or in HDF5."""
    try:
        if isinstance(values, h5py.Dataset) and isinstance(index, slice):
            found = read_vector(values, *index.indices(len(values))[:2])
            if found is not None:
                return native(found)
        return native(np.asarray(values[index]))
    except OSError as error:
        if not isinstance(values, h5py.Dataset):
            raise
        raise InputError(
            f"a part of {values.name} cannot be read",
            found=str(error),
            expected="an intact HDF5 file",
            do="copy or download the file again",
            path=values.file.filename,
        ) from error


def checked_indptr(
    indptr: Any, data: Any, indices: Any, n_rows: int, place: Place
) -> npt.NDArray[np.int64]:
    """Pointers as int64, once they are known to cut ``data`` and ``indices`` into rows."""
    pointers = read(indptr, slice(None)).astype(np.int64)
    found = None
    if len(pointers) != n_rows + 1:
        found = f"{len(pointers):,} pointers for {n_rows:,} rows or columns"
    elif pointers[0] != 0 or np.any(pointers[1:] < pointers[:-1]):
        found = "an indptr that does not rise from 0"
    elif not pointers[-1] == data.shape[0] == indices.shape[0]:
        found = (
            f"an indptr that ends at {pointers[-1]:,} with {indices.shape[0]:,} indices "
            f"and {data.shape[0]:,} values"
        )
    if found is not None:
        raise InputError(
            f"{place.what} is not a valid sparse matrix",
            found=found,
            expected="an indptr that rises from 0 to the number of values",
            do="write the file again from its source",
            path=place.path,
        )
    return pointers


def check_range(indices: npt.NDArray[Any], size: int, place: Place) -> None:
    """Raise where an index of a sparse matrix lies outside it."""
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= size):
        wrong = int(indices.min()) if int(indices.min()) < 0 else int(indices.max())
        raise InputError(
            f"{place.what} is not a valid sparse matrix",
            found=f"index {wrong}",
            expected=f"indices from 0 to {size - 1}",
            do="write the file again from its source",
            path=place.path,
        )


def dense_rows(n_columns: int, dtype: np.dtype[Any], budget: Budget) -> int:
    """How many dense rows fit: themselves, and every value of them as an entry."""
    return max(1, budget.memory // (max(1, n_columns) * (dtype.itemsize + ENTRY_BYTES)))


def stretches(n_rows: int, step: int) -> list[tuple[int, int]]:
    """Cut rows into stretches of ``step``, the last of them shorter."""
    return [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def split(rows: Rows, budget: Budget) -> Iterator[Rows]:
    """Cut rows that were read together into blocks of the budget's number of rows."""
    n_rows = len(rows.indptr) - 1
    step = budget.rows or max(1, n_rows)
    for start in range(0, n_rows, step):
        indptr = rows.indptr[start : start + step + 1]
        inside = slice(int(indptr[0]), int(indptr[-1]))
        yield Rows(rows.first + start, indptr - indptr[0], rows.indices[inside], rows.data[inside])


def select_columns(rows: Rows, columns: npt.NDArray[np.int32]) -> Rows:
    """Renumber the columns of rows, and leave out those that become -1."""
    indptr = np.empty_like(rows.indptr)
    indices = np.empty(len(rows.indices), np.int32)
    data = np.empty_like(rows.data)
    filled = kernels.select_columns(*rows[1:], columns, indptr, indices, data)
    return Rows(rows.first, indptr, indices[:filled], data[:filled])


def rows_of_dense(first: int, dense: npt.NDArray[Any]) -> Rows:
    """The non-zeros of dense rows."""
    indptr = np.empty(len(dense) + 1, np.int64)
    kernels.count_nonzeros(dense, indptr)
    indices = np.empty(int(indptr[-1]), np.int32)
    data = np.empty(int(indptr[-1]), dense.dtype)
    kernels.gather_nonzeros(dense, indices, data)
    return Rows(first, indptr, indices, data)


def sample_vector(data: Any) -> npt.NDArray[Any]:
    """Stretches of a long vector, evenly spread."""
    size = int(data.shape[0])
    if size <= _SAMPLES * _SAMPLE_LENGTH:
        return read(data, slice(None))
    starts = np.linspace(0, size - _SAMPLE_LENGTH, _SAMPLES).astype(int).tolist()
    return np.concatenate([read(data, slice(s, s + _SAMPLE_LENGTH)) for s in starts])


def sample_rows(
    take: Callable[[int, int], npt.NDArray[Any]], shape: tuple[int, int]
) -> npt.NDArray[Any]:
    """A few rows, evenly spread, as one vector."""
    starts = np.unique(np.linspace(0, shape[0] - 1, _SAMPLES // 2).astype(int)).tolist()
    return np.concatenate([take(s, s + 1).ravel() for s in starts])
