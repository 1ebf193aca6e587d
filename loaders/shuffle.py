"""The shuffle buffer: open windows in mixed order, and minibatches gathered from them.

Kernels that take milliseconds give Python's lock up; those of microseconds keep it, here and in the
rooms beside, since waiting for it to come back takes longer than they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from loaders.addresses import floats_at, halves_at, longs_at, words_at
from loaders.errors import LoaderError
from loaders.minibatch import Minibatch
from loaders.packed import Block, PackedBlock, unpack_row
from loaders.pool import POOL, ROUNDING
from loaders.selection import Ints
from loaders.windows import Course

ALL_ROWS: Final = np.empty(0, np.int64)
"""In place of which rows of their block are there: they all are."""

# Columns of the table of an open window.
_ROW, _LENGTH, _INDICES, _DATA, _KIND = range(5)
_WIDE, _NARROW, _PACKED = range(3)
_COLUMNS: Final = 5
_TABLE_ROW: Final = 8 * _COLUMNS
"""Bytes of a row of it."""

_AHEAD: Final = 4
"""Rows between the one that is copied and the one that the processor is told of."""
_TOLD: Final = 256
"""Bytes of it, of columns and of values; what follows the processor guesses itself."""
_LINE: Final = 64
"""Bytes that come from memory at once."""


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """The rows of a window where they lie in memory, and the order in which they are taken.

    Rows are not copied when a window is opened, only when they go into a minibatch: with two
    thousand values a row, copying is most of the work.

    Attributes
    ----------
    table
        For each row that is taken its position in the source, its number of values, the addresses
        of its columns and of its values (of a packed one, where its record begins and ends), and
        whether it is wide, narrow or packed: int64, (n_rows, 5).
    order
        Positions in the table, as they are taken: int64.
    blocks
        What the addresses point into; kept alive here.
    """

    table: Ints
    order: Ints
    blocks: Sequence[Block]

    def places(self, stretch: slice) -> Ints:
        """Addresses of the rows of the table that a stretch of the order takes: int64."""
        places: Ints = self.order[stretch] * _TABLE_ROW
        places += self.table.ctypes.data
        return places


def empty_table(n_rows: int) -> Ints:
    """Room for the table of an open window: int64, (n_rows, 5)."""
    return np.empty((n_rows, _COLUMNS), np.int64)


def lay_out(
    table: Ints, offsets: Ints, starts: Ints, counts: Ints, within: Ints, block: Block
) -> None:
    """Write into a table where the rows of some blocks lie that were read together.

    Parameters
    ----------
    table
        Of the window; ``block`` is to be kept alive beside it.
    offsets, starts
        Of each block, its first row in the table and in the source: int64, (n_blocks,).
    counts
        Rows that are there of each: int64, (n_blocks,).
    within
        Which rows of their block they are: int64, (n_rows,); or :data:`ALL_ROWS`.
    block
        The rows, one block behind the other.
    """
    if isinstance(block, PackedBlock):
        kind, records = _PACKED, block.records.ctypes.data
        first = records, 1, block.offsets[:-1]
        second = records, 1, block.offsets[1:]
    else:
        kind = _NARROW if block.narrow else _WIDE
        indices, data, begin = block.indices, block.data, block.indptr[:-1]
        first = indices.ctypes.data, indices.itemsize, begin
        second = data.ctypes.data, data.itemsize, begin
    _lay_out(table, offsets, starts, counts, within, block.indptr, first, second, kind)


def groups(
    parts: Sequence[tuple[OpenWindow, slice]],
    course: Course,
    obs_codes: Mapping[str, npt.NDArray[np.int32]],
    n_vars: int,
    narrow: bool,
    most: int,
) -> Iterator[Group]:
    """Some minibatches in groups, each of as many as fit in some bytes, or of one.

    Parameters
    ----------
    parts
        Windows, and the stretch of each.
    course
        What the minibatches take from these stretches.
    obs_codes
        Codes of all rows of the source.
    n_vars
        Columns of the source.
    narrow
        Whether the minibatches are narrow.
    most
        Bytes of a group.
    """
    places = np.concatenate([window.places(stretch) for window, stretch in parts])
    order = course.order()
    if order is not None:
        places = places[order]
    bounds = np.concatenate([[0], np.cumsum(course.sizes)])
    ends = np.zeros(len(places) + 1, np.int64)
    _sum_lengths(places, ends)
    # Each row takes a place in indptr and in rows besides its values and codes.
    a_value, a_row = (4 if narrow else 8) * (1 + ROUNDING), 16 + 4 * len(obs_codes)
    upto = ends[bounds] * a_value + bounds * a_row + 8 * np.arange(len(bounds))
    windows = [window for window, _ in parts]
    first = 0
    while first < len(bounds) - 1:
        stop = int(np.searchsorted(upto, upto[first] + most, side="right")) - 1
        stop = max(first + 1, stop)
        part = bounds[first : stop + 1]
        begin, end = int(part[0]), int(part[-1])
        indptr = ends[begin : end + 1] - ends[begin]
        yield Group(windows, places[begin:end], indptr, part - begin, obs_codes, n_vars, narrow)
        first = stop


@dataclass(frozen=True, slots=True)
class Group:
    """Minibatches that are made together; their arrays are stretches of arrays of the group.

    Attributes
    ----------
    windows
        Kept alive here, since ``places`` are in them.
    places
        See :meth:`OpenWindow.places`; the rows of one minibatch behind those of the other.
    indptr
        Of all rows, from 0: int64, (n_rows + 1,).
    bounds
        Where each begins, and the number of rows at the end: int64, (n_minibatches + 1,).
    obs_codes, n_vars, narrow
        See :func:`groups`.
    """

    windows: Sequence[OpenWindow]
    places: Ints
    indptr: Ints
    bounds: Ints
    obs_codes: Mapping[str, npt.NDArray[np.int32]]
    n_vars: int
    narrow: bool

    def gather(self) -> list[Minibatch | LoaderError]:
        """Copy the rows. At the end an error may stand in place of the minibatch it concerns."""
        places, indptr, n = self.places, self.indptr, int(self.indptr[-1])
        rows = np.empty(len(places), np.int64)
        indices: npt.NDArray[Any]
        data: npt.NDArray[Any]
        if self.narrow:
            indices, data = POOL.empty(n, np.uint16), POOL.empty(n, np.uint16)
        else:
            indices, data = POOL.empty(n, np.int32), POOL.empty(n, np.float32)
        wrong = _copy(places, indptr, self.n_vars, rows, indices, data)
        obs = {name: codes.take(rows) for name, codes in self.obs_codes.items()}
        pointers = np.empty(len(indptr) + len(self.bounds) - 2, np.int64)
        _own_pointers(indptr, self.bounds, pointers)
        out: list[Minibatch | LoaderError] = []
        bounds = zip(self.bounds.tolist(), indptr[self.bounds].tolist(), strict=True)
        for i, ((begin, low), (stop, high)) in enumerate(pairwise(bounds)):
            if begin <= wrong < stop:
                columns = indices[indptr[wrong] : indptr[wrong + 1]]
                return [*out, self._refused(rows[wrong], columns)]
            out.append(
                Minibatch(
                    pointers[begin + i : stop + i + 1],
                    indices[low:high],
                    data[low:high],
                    rows[begin:stop],
                    {name: codes[begin:stop] for name, codes in obs.items()},
                    self.n_vars,
                )
            )
        return out

    def _refused(self, row: int, columns: npt.NDArray[Any]) -> LoaderError:
        """What is wrong with a row of which a column is out of range."""
        unsigned = columns if self.narrow else columns.view(np.uint32)
        found = columns[unsigned >= self.n_vars][:1]
        return LoaderError(
            f"the source gave a column out of range for row {row}",
            found=f"column {found[0]}" if len(found) else f"a column above {2**16 - 1}",
            expected=f"0 to {self.n_vars - 1}",
        )


@njit(cache=True)  # type: ignore[untyped-decorator]
def _lay_out(
    table: Ints,
    offsets: Ints,
    starts: Ints,
    counts: Ints,
    within: Ints,
    indptr: Ints,
    first: tuple[int, int, Ints],
    second: tuple[int, int, Ints],
    kind: int,
) -> None:
    """The same, given address, bytes of an element and first element of the two parts of rows."""
    k = 0
    for i in range(len(counts)):
        for j in range(counts[i]):
            row = within[k] if len(within) else j
            at = offsets[i] + row
            table[at, _ROW] = starts[i] + row
            table[at, _LENGTH] = indptr[k + 1] - indptr[k]
            table[at, _INDICES] = first[0] + first[1] * first[2][k]
            table[at, _DATA] = second[0] + second[1] * second[2][k]
            table[at, _KIND] = kind
            k += 1


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(_: Any, address: Any) -> Any:
    """Tell the processor that what is at an address will be read."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        reading, keep, data = (ir.Constant(flag, number) for number in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], pointer), reading, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(cache=True)  # type: ignore[untyped-decorator]
def _sum_lengths(places: Ints, ends: Ints) -> None:
    """Running sums of the lengths of rows, from 0."""
    for i in range(len(places)):
        ends[i + 1] = ends[i] + longs_at(places[i])[_LENGTH]


@njit(cache=True)  # type: ignore[untyped-decorator]
def _own_pointers(indptr: Ints, bounds: Ints, out: Ints) -> None:
    """Row pointers of each minibatch, from 0, one behind the other."""
    at = 0
    for i in range(len(bounds) - 1):
        for row in range(bounds[i], bounds[i + 1] + 1):
            out[at] = indptr[row] - indptr[bounds[i]]
            at += 1


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _tell(places: Ints, i: int) -> None:
    """Have the beginning of a row brought from memory: rows are copied in no order."""
    if i + _AHEAD < len(places):
        _prefetch(places[i + _AHEAD])  # where it lies has to be there by then
    if i < len(places):
        row = longs_at(places[i])
        if row[_KIND] == _PACKED:
            for line in range(row[_INDICES], min(row[_DATA], row[_INDICES] + 2 * _TOLD), _LINE):
                _prefetch(line)
            return
        nbytes = row[_LENGTH] * (2 if row[_KIND] == _NARROW else 4)
        for line in range(0, min(nbytes, _TOLD), _LINE):
            _prefetch(row[_INDICES] + line)
            _prefetch(row[_DATA] + line)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _copy(
    places: Ints,
    indptr: Ints,
    n_vars: int,
    rows: Ints,
    indices: npt.NDArray[Any],
    data: npt.NDArray[Any],
) -> int:
    """Copy rows of any kind, given where their table is, to arrays that are wide or narrow.

    Returns the first row with a column that is not one of ``n_vars``; -1 if there is none.
    """
    wrong = -1
    for i in range(len(places)):
        _tell(places, i + _AHEAD)
        row = longs_at(places[i])
        rows[i] = row[_ROW]
        begin, length = indptr[i], row[_LENGTH]
        to_indices, to_data = indices[begin : begin + length], data[begin : begin + length]
        if row[_KIND] == _PACKED:
            nbytes = row[_DATA] - row[_INDICES]
            top = unpack_row(row[_INDICES], nbytes, to_indices, to_data)
            if top >= 2**16:  # it wraps around in a narrow minibatch
                top = np.int64(n_vars)
        else:
            if row[_KIND] == _NARROW:
                columns, values = halves_at(row[_INDICES]), halves_at(row[_DATA])
                for k in range(length):
                    to_indices[k] = columns[k]
                for k in range(length):
                    to_data[k] = values[k]
            else:
                words, floats = words_at(row[_INDICES]), floats_at(row[_DATA])
                for k in range(length):
                    to_indices[k] = words[k]
                for k in range(length):
                    to_data[k] = floats[k]
            highest = np.uint32(0)  # negative ones count as higher than all others
            for k in range(length):
                highest = max(highest, np.uint32(to_indices[k]))
            top = np.int64(highest)
        if length and top >= n_vars and wrong < 0:
            wrong = i
    return wrong
