"""Rows into another order, out of core and in bounded memory: an external merge sort.

Rows are gathered until the budget is spent, sorted by destination and written as one run. When all
have come, the length of every row is known, so blocks of the result are cut exactly to the
budget; each takes a contiguous stretch from every run. Rows that fit in the budget never touch
the disk.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedRandom
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from atlas.ingest import kernels


class SortedRows(NamedTuple):
    """Consecutive rows of the new order in CSR form.

    Attributes
    ----------
    indptr
        int64, (n_rows + 1,), starting at 0.
    indices, data
        (nnz,), of the types that were appended.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[Any]
    data: npt.NDArray[Any]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1


@dataclass
class _Run:
    """Rows on disk by rising destination, and how far they have been read."""

    destinations: npt.NDArray[np.int64]
    next_row: int
    next_entry: int


class RowSorter:
    """Takes sparse rows in one order and gives them in another.

    A context manager: leaving it removes its files, also after an error. Beside ``memory`` it
    keeps about 20 bytes per row.

    Parameters
    ----------
    destination
        int64, (n_obs,): row ``i`` as appended becomes row ``destination[i]``; a permutation.
    folder
        An existing folder for the temporary files, which take as much as the rows themselves.
    memory
        Bytes of rows to hold at a time, including one block that the consumer still holds.

    Raises
    ------
    ValueError
        Where ``destination`` is not a permutation.
    """

    def __init__(
        self,
        destination: npt.NDArray[np.int64],
        folder: str | PathLike[str],
        memory: int = 256 << 20,
    ) -> None:
        self._destination = np.asarray(destination, np.int64)
        n_rows = len(self._destination)
        seen = np.zeros(n_rows, np.bool_)
        if n_rows and self._destination.min() >= 0 and self._destination.max() < n_rows:
            seen[self._destination] = True
        if not seen.all():
            raise ValueError("destination is not a permutation of 0 … n_obs - 1")
        self._folder = Path(folder)
        self._memory = memory
        self._lengths = np.zeros(n_rows, np.int64)  # by destination
        self._types: tuple[np.dtype[Any], np.dtype[Any]] | None = None
        # Rows _first … _next of the input wait in the first _used places of the buffer.
        self._buffer: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
        self._first = self._next = self._used = 0
        self._runs: list[_Run] = []
        self._written = 0
        self._files: tuple[BufferedRandom, BufferedRandom] | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        """Use the sorter in a ``with`` statement."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the files."""
        self.close()

    def close(self) -> None:
        """Remove the files and free the memory."""
        self._buffer = self._files = None
        self._cleanup.close()

    def append(
        self,
        indptr: npt.NDArray[np.int64],
        indices: npt.NDArray[Any],
        data: npt.NDArray[Any],
    ) -> None:
        """Take the next rows in input order; the arrays are copied.

        Parameters
        ----------
        indptr
            (n_rows + 1,), starting at 0.
        indices, data
            (nnz,), of the same types in every call.

        Raises
        ------
        ValueError
            Where there are more rows than destinations, or types change.
        OSError
            Where a file cannot be written.
        """
        n_rows = len(indptr) - 1
        if self._next + n_rows > len(self._destination):
            raise ValueError(f"more than the {len(self._destination)} rows expected")
        types = (indices.dtype, data.dtype)
        self._types = self._types or types
        if types != self._types:
            raise ValueError(f"rows of types {types} after rows of types {self._types}")
        rows = self._destination[self._next : self._next + n_rows]
        self._lengths[rows] = indptr[1:] - indptr[:-1]
        start = 0
        while start < n_rows:
            # What waits takes five eighths of the budget; see _cut for the rest.
            capacity = self._entries(5 / 8) if self._buffer is None else len(self._buffer[0])
            limit = int(indptr[start]) + capacity - self._used
            stop = int(np.searchsorted(indptr, limit, side="right")) - 1
            if stop == start and self._used:
                self._spill()
                continue
            if stop == start:  # one row exceeds the budget
                stop, self._buffer = start + 1, None
                capacity = int(indptr[stop] - indptr[start])
            if self._buffer is None:
                self._buffer = (np.empty(capacity, types[0]), np.empty(capacity, types[1]))
            size = int(indptr[stop] - indptr[start])
            for waiting, new in zip(self._buffer, (indices, data), strict=True):
                waiting[self._used : self._used + size] = new[indptr[start] : indptr[stop]]
            self._used += size
            self._next += stop - start
            start = stop

    def sorted_blocks(self) -> Iterator[SortedRows]:
        """Yield all rows in the new order; to be called once, after the last :meth:`append`.

        Raises
        ------
        ValueError
            Where rows are still to come.
        OSError
            Where a file cannot be written or read.
        """
        if self._next != len(self._destination):
            raise ValueError(f"{self._next} rows of the {len(self._destination)} expected")
        if not self._runs:
            yield from self._sorted_buffer()
            return
        self._spill()
        self._buffer = None
        for start, stop in self._cut(self._lengths):
            yield self._merge(start, stop)

    def _entries(self, share: float) -> int:
        assert self._types is not None  # set with the first rows
        return max(1, int(self._memory * share) // sum(dtype.itemsize for dtype in self._types))

    def _cut(self, lengths: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Cut rows into stretches of a sixth of the budget.

        There are up to three at a time: read, put in order, and with the consumer; or the last
        two beside the rows that wait.
        """
        if not len(lengths):
            return
        ends = np.concatenate([[0], np.cumsum(lengths)])
        fit, start = self._entries(1 / 6), 0
        while start < len(lengths):
            stop = int(np.searchsorted(ends, ends[start] + fit, side="right")) - 1
            stop = max(start + 1, stop)
            yield start, stop
            start = stop

    def _sorted_buffer(self) -> Iterator[SortedRows]:
        """The rows that wait, by rising destination."""
        waiting = self._destination[self._first : self._next]
        indptr = np.concatenate([[0], np.cumsum(self._lengths[waiting])])
        order = np.argsort(waiting)
        for start, stop in self._cut(self._lengths[waiting[order]]):
            assert self._buffer is not None  # there are rows
            yield _gather(indptr, *self._buffer, order[start:stop])

    def _spill(self) -> None:
        """Write the rows that wait as one run."""
        if self._files is None:
            self._files = (self._create("indices"), self._create("data"))
        for rows in self._sorted_buffer():
            self._files[0].write(rows.indices.data)
            self._files[1].write(rows.data.data)
        run = np.sort(self._destination[self._first : self._next])
        self._runs.append(_Run(run, 0, self._written))
        self._written += self._used
        self._first, self._used = self._next, 0

    def _create(self, kind: str) -> BufferedRandom:
        path = self._folder / f"sort-{secrets.token_hex(8)}.{kind}"
        self._cleanup.callback(path.unlink, missing_ok=True)
        return self._cleanup.enter_context(open(path, "x+b"))  # noqa: PTH123 (one call to fail)

    def _merge(self, start: int, stop: int) -> SortedRows:
        """Read rows ``start`` to ``stop`` of the new order from all runs."""
        assert self._files is not None
        assert self._types is not None
        size = int(self._lengths[start:stop].sum())
        indices, data = (np.empty(size, dtype) for dtype in self._types)
        rows, filled = [], 0
        for run in self._runs:
            last = int(np.searchsorted(run.destinations, stop))
            part = run.destinations[run.next_row : last]
            end = filled + int(self._lengths[part].sum())
            for file, array in zip(self._files, (indices, data), strict=True):
                file.seek(run.next_entry * array.itemsize)
                if file.readinto(array[filled:end].data) != (end - filled) * array.itemsize:
                    raise OSError(f"{file.name} was cut short")
            run.next_row, run.next_entry = last, run.next_entry + end - filled
            rows.append(part)
            filled = end
        destinations = np.concatenate(rows)
        indptr = np.concatenate([[0], np.cumsum(self._lengths[destinations])])
        return _gather(indptr, indices, data, np.argsort(destinations))


def _gather(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[Any],
    data: npt.NDArray[Any],
    order: npt.NDArray[np.int64],
) -> SortedRows:
    size = int((indptr[order + 1] - indptr[order]).sum())
    block = SortedRows(
        np.empty(len(order) + 1, np.int64),
        np.empty(size, indices.dtype),
        np.empty(size, data.dtype),
    )
    kernels.gather_rows(indptr, indices, data, order, *block)
    return block
