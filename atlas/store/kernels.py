"""Compiled loops of the store; all release the GIL."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def select_columns(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[np.uint16],
    data: npt.NDArray[np.uint16],
    table: npt.NDArray[np.int32],
) -> npt.NDArray[np.int64]:
    """Rename the columns of narrow CSR rows by ``table``, in place; -1 drops a value.

    What stays moves to the front of ``indices`` and ``data``; returns the new row pointers.
    """
    new_indptr = indptr.copy()
    if not (table < 0).any():  # nothing is dropped
        for j in range(indptr[0], indptr[-1]):
            indices[j] = np.uint16(table[indices[j]])
        return new_indptr
    longest = 0
    for row in range(len(indptr) - 1):
        longest = max(longest, int(indptr[row + 1] - indptr[row]))
    places = np.empty(longest, np.uint32)
    at = np.int64(0)
    for row in range(len(indptr) - 1):
        columns = indices[indptr[row] : indptr[row + 1]]
        values = data[indptr[row] : indptr[row + 1]]
        # To look for what stays and copy it then is twice as fast as both at once (LOG.md).
        n = np.uint64(0)  # unsigned: nothing is asked for whether it counts from the end
        for j in range(len(columns)):
            # Written in any case, and overwritten where it is dropped: no branch to mispredict.
            places[n] = j
            n += np.uint64(table[columns[j]] >= 0)
        for i in range(np.int64(n)):
            j = places[i]
            indices[at + i] = np.uint16(table[columns[j]])
            data[at + i] = values[j]
        at += np.int64(n)
        new_indptr[row + 1] = at
    return new_indptr


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def map_columns(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[Any],
    data: npt.NDArray[Any],
    table: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Rename the columns of CSR rows by ``table`` and widen; a column that maps to -1 is dropped.

    Parameters
    ----------
    indptr
        int64, (n_rows + 1,), from 0.
    indices, data
        (nnz,), as stored.
    table
        int32, (n_columns,): the new column of each old one, or -1.

    Returns
    -------
    indptr int64, indices int32, data float32
    """
    n_rows = len(indptr) - 1
    new_indptr = np.empty(n_rows + 1, np.int64)
    kept = 0
    new_indptr[0] = 0
    for row in range(n_rows):
        for j in range(indptr[row], indptr[row + 1]):
            if table[indices[j]] >= 0:
                kept += 1
        new_indptr[row + 1] = kept
    new_indices = np.empty(kept, np.int32)
    new_data = np.empty(kept, np.float32)
    at = 0
    for j in range(indptr[0], indptr[n_rows]):
        column = table[indices[j]]
        if column >= 0:
            new_indices[at] = column
            new_data[at] = data[j]
            at += 1
    return new_indptr, new_indices, new_data


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def hash_rows(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[Any],
    data: npt.NDArray[Any],
    table: npt.NDArray[np.int32],
) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each row's counts by gene, whatever the order of its columns.

    The sum, modulo 2^64, of splitmix64 over (gene, count) pairs: equal for the same cell in two
    studies whose columns differ in order. A row without counts has hash 0.
    ``table`` gives the gene of each column, -1 for none.
    """
    n_rows = len(indptr) - 1
    out = np.zeros(n_rows, np.uint64)
    for row in range(n_rows):
        # Slices that start at 0, and no branch: 3.1 ns a value with one, 1.65 without (LOG.md).
        start, stop = indptr[row], indptr[row + 1]
        columns, values = indices[start:stop], data[start:stop]
        total = np.uint64(0)
        for k in range(len(columns)):
            gene = table[columns[k]]
            x = (np.uint64(gene) << np.uint64(32)) ^ np.uint64(values[k])
            x = x + _GOLDEN
            x = (x ^ (x >> np.uint64(30))) * _MIX1
            x = (x ^ (x >> np.uint64(27))) * _MIX2
            x = x ^ (x >> np.uint64(31))
            total += x if gene >= 0 else np.uint64(0)
        out[row] = total
    return out
