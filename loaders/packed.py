"""Rows in two bytes a value, as a source may give them to the loader.

Reading rows from disk waits for memory: what takes half the bytes takes little more than half the
time. The record of a row of n values is::

    n bytes     how far each column lies behind the one before (the first: behind 0), its low byte
    n bytes     each count, its low byte
    4 bytes     for each of these 2 n numbers with a high byte, in their order, uint32: 256 * its
                place + that byte

or, where that would take 4 n bytes or more, or columns do not rise, n columns and n counts as
uint16. All numbers are little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from numba import njit

from loaders.addresses import bytes_at, halves_at
from loaders.errors import LoaderError
from loaders.selection import Ints
from loaders.source import RowBlock

_PATCH = 4
"""Bytes for one high byte."""


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """Rows of one source as records; columns and counts are below 2^16.

    Attributes
    ----------
    indptr
        Values before each row: int64, (n_rows + 1,), from 0.
    offsets
        Bytes before each record: int64, (n_rows + 1,), from 0.
    records
        uint8, one record behind the other.
    """

    indptr: Ints
    offsets: Ints
    records: npt.NDArray[np.uint8]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.indptr.nbytes + self.offsets.nbytes + self.records.nbytes

    def take(self, rows: Ints) -> PackedBlock:
        """Some of the rows, as a block with arrays of its own."""
        indptr = np.concatenate([[0], np.cumsum(np.diff(self.indptr)[rows])])
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[rows])])
        records = np.empty(int(offsets[-1]), np.uint8)
        _take(self.offsets, self.records, rows, offsets, records)
        return PackedBlock(indptr, offsets, records)

    def unpacked(self) -> RowBlock:
        """The same with columns and counts as uint16.

        Raises
        ------
        LoaderError
            These are no records.
        """
        if not is_packed(self):
            raise _no_records("arrays or patches that do not fit each other")
        n = int(self.indptr[-1])
        indices, data = np.empty(n, np.uint16), np.empty(n, np.uint16)
        address = self.records.ctypes.data
        top = int(_unpack(self.indptr, self.offsets, address, indices, data))
        if top >= 2**16:
            raise _no_records(f"column {top}")
        return RowBlock(self.indptr, indices, data)


Block: TypeAlias = RowBlock | PackedBlock


@runtime_checkable
class Compact(Protocol):
    """What a source has besides :class:`loaders.RowSource` whose rows may stay in memory."""

    @property
    def packed_bytes(self) -> int:
        """Bytes of all its rows as :meth:`read_packed` gives them; 0 where they are not packed."""
        ...

    def read_packed(self, starts: Ints, stops: Ints) -> Block:
        """See :class:`loaders.RowSource`."""
        ...


def packed(indptr: Ints, indices: npt.NDArray[Any], data: npt.NDArray[np.uint16]) -> PackedBlock:
    """Pack rows in CSR form, whose columns are below 2^16."""
    offsets = np.zeros(len(indptr), np.int64)
    _sizes(indptr, indices, data, offsets)
    records = np.empty(int(offsets[-1]), np.uint8)
    _pack(indptr, indices, data, offsets, records)
    return PackedBlock(indptr, offsets, records)


def _no_records(found: str) -> LoaderError:
    return LoaderError(
        "these are no records of packed rows",
        found=found,
        expected="records as loaders.packed says",
    )


def is_packed(block: PackedBlock) -> bool:
    """Whether the arrays fit each other, and patches their rows: then it can be unpacked.

    Whether columns are in range says :func:`unpack_row`, which reads them anyway.
    """
    records = block.records
    fit: bool = _fit(block.indptr, block.offsets, records.ctypes.data, len(records))
    return fit


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _sizes(
    indptr: Ints, indices: npt.NDArray[Any], data: npt.NDArray[np.uint16], offsets: Ints
) -> None:
    for row in range(len(indptr) - 1):
        last, size, falls = np.int64(0), np.int64(0), 0
        for k in range(indptr[row], indptr[row + 1]):
            column = np.int64(indices[k])
            falls += int(column < last)
            size += 2 + _PATCH * (np.int64(column - last > 255) + np.int64(data[k] > 255))
            last = column
        plain = 4 * (indptr[row + 1] - indptr[row])
        offsets[row + 1] = offsets[row] + (plain if falls or size > plain else size)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _pack(
    indptr: Ints,
    indices: npt.NDArray[Any],
    data: npt.NDArray[np.uint16],
    offsets: Ints,
    records: npt.NDArray[np.uint8],
) -> None:
    for row in range(len(indptr) - 1):
        begin, n = indptr[row], indptr[row + 1] - indptr[row]
        record = records[offsets[row] : offsets[row + 1]]
        if len(record) == 4 * n:
            for k in range(n):
                column, count = np.int64(indices[begin + k]), np.int64(data[begin + k])
                record[2 * k], record[2 * k + 1] = column & 255, column >> 8
                record[2 * (n + k)], record[2 * (n + k) + 1] = count & 255, count >> 8
            continue
        last, at = np.int64(0), 2 * n
        for place in range(2 * n):
            if place < n:
                column = np.int64(indices[begin + place])
                number, last = column - last, column
            else:
                number = np.int64(data[begin + place - n])
            record[place] = number & 255
            if number > 255:
                patch = place << 8 | number >> 8
                for byte in range(_PATCH):
                    record[at + byte] = (patch >> (8 * byte)) & 255
                at += _PATCH


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _patch(record: int, at: int) -> int:
    patch = 0
    for byte in range(_PATCH):
        patch |= int(bytes_at(record)[at + byte]) << (8 * byte)
    return patch


@njit(cache=True)  # type: ignore[untyped-decorator]
def _fit(indptr: Ints, offsets: Ints, address: int, n_bytes: int) -> bool:
    if indptr[0] != 0 or offsets[0] != 0 or offsets[-1] != n_bytes:
        return False
    for row in range(len(indptr) - 1):
        n, size = indptr[row + 1] - indptr[row], offsets[row + 1] - offsets[row]
        # the second, since 4 n may not fit in 64 bits
        if n < 0 or n > n_bytes or size > n_bytes - offsets[row] or size > 4 * n:
            return False
        if size == 4 * n:
            continue
        if size < 2 * n or (size - 2 * n) % _PATCH:
            return False
        last = np.int64(-1)
        for at in range(2 * n, size, _PATCH):
            place = _patch(address + offsets[row], at) >> 8
            if place <= last or place >= 2 * n:
                return False
            last = place
    return True


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def unpack_row(
    record: int, nbytes: int, columns: npt.NDArray[Any], counts: npt.NDArray[Any]
) -> np.int64:
    """Write the columns and counts of a record, given its address; (n,) each, of any type.

    Returns the highest column, also where it does not fit in the type of ``columns``.
    """
    n = len(columns)
    if nbytes == 4 * n:
        halves, above = halves_at(record), halves_at(record + 2 * n)
        top = np.uint16(0)
        for k in range(n):
            columns[k] = halves[k]
            top = max(top, halves[k])
        for k in range(n):
            counts[k] = above[k]
        return np.int64(top)
    steps, low = bytes_at(record), bytes_at(record + n)
    column = np.int64(0)
    for k in range(n):
        column += np.int64(steps[k])
        columns[k] = column
    for k in range(n):
        counts[k] = low[k]
    for at in range(2 * n, nbytes, _PATCH):
        patch = _patch(record, at)
        place, high = patch >> 8, (patch & 255) << 8
        if place >= n:
            counts[place - n] += high
        else:
            column += high
            for k in range(place, n):
                columns[k] += high
    return column


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _unpack(
    indptr: Ints,
    offsets: Ints,
    records: int,
    indices: npt.NDArray[np.uint16],
    data: npt.NDArray[np.uint16],
) -> np.int64:
    top = np.int64(0)
    for row in range(len(indptr) - 1):
        here = slice(indptr[row], indptr[row + 1])
        size = offsets[row + 1] - offsets[row]
        top = max(top, unpack_row(records + offsets[row], size, indices[here], data[here]))
    return top


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _take(
    offsets: Ints,
    records: npt.NDArray[np.uint8],
    rows: Ints,
    new_offsets: Ints,
    new_records: npt.NDArray[np.uint8],
) -> None:
    for i in range(len(rows)):
        begin, to = offsets[rows[i]], new_offsets[i]
        for k in range(new_offsets[i + 1] - to):
            new_records[to + k] = records[begin + k]
