"""Rows out of matrices stored by columns, in two passes and bounded memory.

The first pass counts the entries of each row, so that rows can be cut into blocks that fit. The
second deals the entries out to one stretch of a temporary file per block; a block then is read
back and its entries are put in place. Where the whole fits, no file is written.
"""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from atlas.ingest import kernels
from atlas.ingest.matrix import (
    ENTRY_BYTES,
    Budget,
    DenseMatrix,
    Matrix,
    Place,
    Rows,
    check_range,
    checked_indptr,
    dense_rows,
    read,
    rows_of_dense,
    sample_vector,
    split,
)


class Entries(NamedTuple):
    """Values of a matrix with their rows and columns, in any order."""

    rows: npt.NDArray[Any]
    columns: npt.NDArray[Any]
    values: npt.NDArray[Any]


class ByColumns(Matrix):
    """A matrix whose entries come by columns; entries of a row come in order of their column."""

    @abstractmethod
    def entry_rows(self, size: int) -> Iterator[npt.NDArray[Any]]:
        """Yield the rows of all entries, about ``size`` at a time, in any order."""

    @abstractmethod
    def entries(self, size: int) -> Iterator[Entries]:
        """Yield all entries, about ``size`` at a time."""

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield rows, through a temporary file in the budget's folder where they do not fit."""
        n_rows = self.shape[0]
        piece = max(1, budget.memory // (4 * ENTRY_BYTES))
        indptr = np.zeros(n_rows + 1, np.int64)
        for rows in self.entry_rows(piece):
            kernels.tally(rows, indptr[1:])
        np.cumsum(indptr, out=indptr)
        if int(indptr[-1]) <= budget.memory // ENTRY_BYTES:
            yield from self._in_memory(indptr, budget, piece)
        else:
            yield from self._through_file(indptr, budget, piece)

    def _in_memory(
        self, indptr: npt.NDArray[np.int64], budget: Budget, piece: int
    ) -> Iterator[Rows]:
        indices = np.empty(int(indptr[-1]), np.int32)
        data: npt.NDArray[Any] | None = None
        ends = indptr[:-1].copy()
        for entries in self.entries(piece):
            if data is None:
                data = np.empty(len(indices), entries.values.dtype)
            kernels.scatter(*entries, 0, ends, indices, data)
        if data is None:
            data = np.empty(0, np.uint32)
        for start, stop in budget.boundaries(indptr):
            first, last = int(indptr[start]), int(indptr[stop])
            yield Rows(
                start, indptr[start : stop + 1] - first, indices[first:last], data[first:last]
            )

    def _through_file(
        self, indptr: npt.NDArray[np.int64], budget: Budget, piece: int
    ) -> Iterator[Rows]:
        cuts = list(budget._replace(memory=budget.memory // 2, rows=None).boundaries(indptr))
        part_of_row = np.repeat(
            np.arange(len(cuts), dtype=np.int32), [stop - start for start, stop in cuts]
        )
        # A nameless file, which vanishes with the process whatever happens to it.
        with tempfile.TemporaryFile(dir=budget.folder) as file:
            record: np.dtype[Any] | None = None
            places = np.array([indptr[start] for start, _ in cuts])
            for entries in self.entries(piece):
                record = np.dtype(
                    [("row", np.uint32), ("column", np.int32), ("value", entries.values.dtype)]
                )
                dealt = np.empty(len(entries.rows), record)
                sizes = np.bincount(part_of_row[entries.rows], minlength=len(cuts))
                bounds = np.concatenate([[0], np.cumsum(sizes)])
                kernels.partition(
                    *entries,
                    part_of_row,
                    bounds[:-1].copy(),
                    dealt["row"],
                    dealt["column"],
                    dealt["value"],
                )
                for part in np.flatnonzero(sizes):
                    file.seek(int(places[part]) * record.itemsize)
                    file.write(dealt[bounds[part] : bounds[part + 1]].view(np.uint8).data)
                places += sizes
            assert record is not None  # more entries than fit, so at least one piece
            for start, stop in cuts:
                yield from self._read_back(file, record, indptr, start, stop, budget, piece)

    def _read_back(
        self,
        file: Any,
        record: np.dtype[Any],
        indptr: npt.NDArray[np.int64],
        start: int,
        stop: int,
        budget: Budget,
        piece: int,
    ) -> Iterator[Rows]:
        pointers = indptr[start : stop + 1] - indptr[start]
        indices = np.empty(int(pointers[-1]), np.int32)
        data = np.empty(len(indices), record["value"])
        ends = pointers[:-1].copy()
        file.seek(int(indptr[start]) * record.itemsize)
        for done in range(0, len(indices), piece):
            dealt = np.empty(min(piece, len(indices) - done), record)
            if file.readinto(dealt.view(np.uint8)) != dealt.nbytes:
                raise OSError("a temporary file was cut short")
            kernels.scatter(
                dealt["row"], dealt["column"], dealt["value"], start, ends, indices, data
            )
        yield from split(Rows(start, pointers, indices, data), budget)


class CscMatrix(ByColumns):
    """Compressed columns: ``indptr``, ``indices`` and ``data`` in memory or in HDF5."""

    def __init__(
        self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int], place: Place
    ) -> None:
        super().__init__(shape, data.dtype, place)
        self.data, self.indices = data, indices
        self.indptr = checked_indptr(indptr, data, indices, shape[1], place)

    def entry_rows(self, size: int) -> Iterator[npt.NDArray[Any]]:
        """Yield the row indices as stored, once they are known to be in range."""
        for start in range(0, int(self.indptr[-1]), size):
            rows = read(self.indices, slice(start, min(start + size, int(self.indptr[-1]))))
            check_range(rows, self.shape[0], self.place)
            yield rows

    def entries(self, size: int) -> Iterator[Entries]:
        """Yield entries as stored."""
        for start, rows in zip(
            range(0, int(self.indptr[-1]), size), self.entry_rows(size), strict=True
        ):
            stop = start + len(rows)
            first = int(np.searchsorted(self.indptr, start, side="right")) - 1
            last = int(np.searchsorted(self.indptr, stop, side="left"))
            edges = np.clip(self.indptr[first : last + 1], start, stop)
            columns = np.repeat(np.arange(first, last, dtype=np.int32), edges[1:] - edges[:-1])
            yield Entries(rows, columns, read(self.data, slice(start, stop)))

    def sample(self) -> npt.NDArray[Any]:
        """Some stored values."""
        return sample_vector(self.data)


class ChunkedMatrix(ByColumns):
    """A dense HDF5 array in chunks.

    It is read by rows where the rows of a chunk fit, else by tiles: a block of fewer rows than a
    chunk has would decompress the rest in vain, once per block.
    """

    def __init__(self, values: Any, place: Place) -> None:
        super().__init__(values.shape, values.dtype, place)
        self.values = values

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield rows without their zeros; every chunk is read once, or twice by tiles."""
        if self.ranges(budget) is not None:
            return DenseMatrix(self.values, self.place).row_blocks(budget)
        return super().row_blocks(budget)

    def ranges(self, budget: Budget) -> list[tuple[int, int]] | None:
        """Any rows can be read where the rows of a chunk fit."""
        if self.values.chunks[0] > dense_rows(self.shape[1], self.dtype, budget):
            return None
        return DenseMatrix(self.values, self.place).ranges(budget)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows without their zeros."""
        return DenseMatrix(self.values, self.place).rows(start, stop)

    def entry_rows(self, size: int) -> Iterator[npt.NDArray[Any]]:
        """Yield the rows of the non-zeros, tile by tile."""
        for entries in self.entries(size):
            yield entries.rows

    def entries(self, size: int) -> Iterator[Entries]:
        """Yield the non-zeros of tiles made of whole chunks, strip of columns by strip."""
        n_rows, n_columns = self.shape
        height, width = self.values.chunks
        height *= max(1, size // (height * width))
        for left, right in pairwise([*range(0, n_columns, width), n_columns]):
            for first in range(0, n_rows, height):
                tile = read(self.values, (slice(first, first + height), slice(left, right)))
                part = rows_of_dense(first, tile)
                rows = np.repeat(
                    np.arange(first, first + len(tile), dtype=np.int64), np.diff(part.indptr)
                )
                yield Entries(rows, part.indices + np.int32(left), part.data)

    def sample(self) -> npt.NDArray[Any]:
        """The first rows of some strips of columns."""
        width = self.values.chunks[1]
        lefts = np.unique(np.linspace(0, (self.shape[1] - 1) // width, 4).astype(int)) * width
        tiles = [
            read(self.values, (slice(0, 4096), slice(left, left + width)))
            for left in lefts.tolist()
        ]
        return np.concatenate([tile.ravel() for tile in tiles])
