"""Compiled loops over rows; each releases the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

FINE, NOT_FINITE, NEGATIVE, FRACTION, TOO_LARGE, WIDER = range(6)
_LARGEST = float(2**32 - 1)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the GIL, keeping the machine code beside the source file."""
    compiled: Callable[..., Any] = numba.njit(nogil=True, cache=True)(function)
    return compiled


@kernel
def _reason(value, rounded):  # type: ignore[no-untyped-def]
    """Why a value is not a count, or FINE."""
    if not np.isfinite(value):
        return NOT_FINITE
    if value < 0:
        return NEGATIVE
    if np.rint(value) > _LARGEST:
        return TOO_LARGE
    if value != np.rint(value) and not rounded:
        return FRACTION
    return FINE


@kernel
def clean_rows(  # type: ignore[no-untyped-def]
    indptr, indices, data, order, rounded, largest, out_indptr, out_indices, out_data
):
    """Copy CSR rows as counts, in a given order: sorted, duplicates summed, zeros dropped.

    ``largest`` is what the type of ``out_data`` holds; a larger count is ``WIDER``, unless it is
    none at all. Returns ``(status, entry)``: why it stopped and at which entry, or ``FINE`` and
    the number of counts.
    """
    filled = np.int64(0)
    out_indptr[0] = 0
    for place in range(len(order)):
        start, stop = indptr[order[place]], indptr[order[place] + 1]
        # Slices that start at 0, and loops without a way out, are what compiles to vectors.
        columns, values = indices[start:stop], data[start:stop]
        bad, wide, zero = False, False, False
        for k in range(len(values)):
            value = np.float64(values[k])
            whole = np.rint(value)
            bad |= not (0 <= value < np.inf) or (value != whole and not rounded)
            wide |= whole > largest
            zero |= whole == 0
        if bad or wide:
            for k in range(len(values)):
                reason = _reason(np.float64(values[k]), rounded)
                if reason != FINE:
                    return reason, start + k
            if largest < _LARGEST:
                return WIDER, start
        falls = False
        for k in range(1, len(columns)):
            falls |= columns[k] <= columns[k - 1]
        if not falls and not zero:
            indices_here = out_indices[filled : filled + len(columns)]
            data_here = out_data[filled : filled + len(columns)]
            for k in range(len(columns)):
                indices_here[k] = columns[k]
            for k in range(len(columns)):
                data_here[k] = np.uint32(np.rint(np.float64(values[k])))
            filled += len(columns)
        elif not falls:
            for k in range(len(values)):
                count = np.uint32(np.rint(np.float64(values[k])))
                out_indices[filled] = columns[k]
                out_data[filled] = count
                filled += count != 0  # a zero is overwritten by what follows
        else:
            ranks = np.argsort(columns)
            k = 0
            while k < len(columns):
                column, total = columns[ranks[k]], 0.0
                while k < len(columns) and columns[ranks[k]] == column:
                    total += np.float64(values[ranks[k]])
                    k += 1
                if np.rint(total) > _LARGEST:
                    return TOO_LARGE, start + ranks[k - 1]
                if np.rint(total) > largest:
                    return WIDER, start
                out_indices[filled] = column
                out_data[filled] = np.uint32(np.rint(total))
                filled += out_data[filled] != 0
        out_indptr[place + 1] = filled
    return FINE, filled


@kernel
def count_nonzeros(dense, out_indptr):  # type: ignore[no-untyped-def]
    """Row pointers of a dense block; NaN is not zero."""
    out_indptr[0] = 0
    for row in range(dense.shape[0]):
        n = 0
        for column in range(dense.shape[1]):
            if dense[row, column] != 0:
                n += 1
        out_indptr[row + 1] = out_indptr[row] + n


@kernel
def gather_nonzeros(dense, out_indices, out_data):  # type: ignore[no-untyped-def]
    """Columns and values of a dense block, row by row."""
    filled = 0
    for row in range(dense.shape[0]):
        for column in range(dense.shape[1]):
            value = dense[row, column]
            if value != 0:
                out_indices[filled] = column
                out_data[filled] = value
                filled += 1


@kernel
def select_columns(  # type: ignore[no-untyped-def]
    indptr, indices, data, columns, out_indptr, out_indices, out_data
):
    """Renumber columns through ``columns`` and drop those that map to -1."""
    filled = 0
    out_indptr[0] = 0
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            column = columns[indices[k]]
            if column >= 0:
                out_indices[filled] = column
                out_data[filled] = data[k]
                filled += 1
        out_indptr[row + 1] = filled
    return filled


@kernel
def tally(rows, counts):  # type: ignore[no-untyped-def]
    """Add the number of times each row occurs to ``counts``."""
    for row in rows:
        counts[row] += 1


@kernel
def partition(  # type: ignore[no-untyped-def]
    rows, columns, values, part_of_row, ends, out_rows, out_columns, out_values
):
    """Place entries part by part, in order within a part.

    ``ends`` starts as the first place of each part and is left as the end of each.
    """
    for k in range(len(rows)):
        part = part_of_row[rows[k]]
        place = ends[part]
        ends[part] = place + 1
        out_rows[place] = rows[k]
        out_columns[place] = columns[k]
        out_values[place] = values[k]


@kernel
def scatter(  # type: ignore[no-untyped-def]
    rows, columns, values, first_row, ends, out_indices, out_data
):
    """Put entries into CSR rows; ``ends`` holds the next free place of each row."""
    for k in range(len(rows)):
        row = rows[k] - first_row
        place = ends[row]
        ends[row] = place + 1
        out_indices[place] = columns[k]
        out_data[place] = values[k]


@kernel
def gather_rows(  # type: ignore[no-untyped-def]
    indptr, indices, data, order, out_indptr, out_indices, out_data
):
    """Copy the rows ``order`` of a CSR block one after another."""
    filled = 0
    out_indptr[0] = 0
    for row in range(len(order)):
        start, stop = indptr[order[row]], indptr[order[row] + 1]
        end = filled + stop - start
        out_indices[filled:end] = indices[start:stop]
        out_data[filled:end] = data[start:stop]
        filled = end
        out_indptr[row + 1] = filled


@kernel
def slots(ids, known):  # type: ignore[no-untyped-def]
    """Position of each id in ``known``, which rises and holds all of them; runs are quick."""
    out = np.empty(len(ids), np.int64)
    at = 0
    for k in range(len(ids)):
        if known[at] != ids[k]:
            at = np.searchsorted(known, ids[k])
        out[k] = at
    return out
