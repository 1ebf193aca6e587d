"""The shuffle buffer: open windows in mixed order, and minibatches gathered from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.extending import intrinsic

from loaders.minibatch import Minibatch
from loaders.pool import POOL, ROUNDING
from loaders.selection import Ints
from loaders.source import RowBlock
from loaders.windows import Course

# Columns of the table of an open window.
_ROW, _LENGTH, _INDICES, _DATA, _NARROW = range(5)
_ALL: Final = np.empty(0, np.int64)
"""In place of the rows that were kept of a block, where these are all."""


@dataclass(frozen=True, slots=True)
class ReadBlock:
    """A block as it was read.

    Attributes
    ----------
    block
        Its rows, or some of them.
    kept
        Which of its rows these are: int64, rising; None for all.
    """

    block: RowBlock
    kept: Ints | None


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """The rows of a window in mixed order, where they lie in memory.

    Rows are not copied when a window is opened, only when they go into a minibatch: with two
    thousand values a row, copying is most of the work.

    Attributes
    ----------
    table
        For each row its position in the source, its number of values, the addresses of its columns
        and of its values, and whether they are narrow: int64, (n_rows, 5).
    blocks
        What the addresses point into; kept alive here.
    """

    table: Ints
    blocks: Sequence[ReadBlock]


def open_window(
    rows: Ints, blocks: Sequence[ReadBlock], spans: Sequence[int], order: Ints
) -> OpenWindow:
    """Lay out the rows of a window in the order in which they will be taken.

    Parameters
    ----------
    rows
        Source rows of all its blocks, one behind the other.
    blocks
        Its blocks as read.
    spans
        Rows of each block, kept or not.
    order
        Positions in ``rows``, as they are taken.
    """
    table = np.empty((len(rows), 5), dtype=np.int64)
    table[:, _ROW] = rows
    begin = 0
    for read, span in zip(blocks, spans, strict=True):
        block, part = read.block, table[begin : begin + span]
        indices, data = block.indices, block.data
        _lay_out(
            part,
            block.indptr,
            _ALL if read.kept is None else read.kept,
            (indices.ctypes.data, indices.itemsize),
            (data.ctypes.data, data.itemsize),
            block.narrow,
        )
        begin += span
    return OpenWindow(table[order], blocks)


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
    table = np.concatenate([window.table[stretch] for window, stretch in parts])
    order = course.order()
    table = table if order is None else table[order]
    # Each row takes a place in indptr and in rows besides its values and codes.
    beside = 16 + 4 * len(obs_codes)
    a_value = (4 if narrow else 8) * (1 + ROUNDING)
    ends = np.cumsum(table[:, _LENGTH] * a_value + beside)
    bounds = np.concatenate([[0], np.cumsum(course.sizes)])
    upto = np.concatenate([[0.0], ends])[bounds] + 8 * np.arange(len(bounds))
    windows = [window for window, _ in parts]
    first = 0
    while first < len(bounds) - 1:
        stop = int(np.searchsorted(upto, upto[first] + most, side="right")) - 1
        stop = max(first + 1, stop)
        part = bounds[first : stop + 1]
        rows = table[part[0] : part[-1]]
        yield Group(windows, rows, part - part[0], obs_codes, n_vars, narrow)
        first = stop


@dataclass(frozen=True, slots=True)
class Group:
    """Minibatches that are made together; their arrays are stretches of arrays of the group.

    Attributes
    ----------
    windows
        Kept alive here, since ``table`` has addresses in them.
    table
        As :attr:`OpenWindow.table`, the rows of one minibatch behind those of the other.
    bounds
        Where each begins, and the number of rows at the end: int64, (n_minibatches + 1,).
    obs_codes, n_vars, narrow
        See :func:`groups`.
    """

    windows: Sequence[OpenWindow]
    table: Ints
    bounds: Ints
    obs_codes: Mapping[str, npt.NDArray[np.int32]]
    n_vars: int
    narrow: bool

    def gather(self) -> list[Minibatch]:
        """Copy the rows."""
        table, bounds = self.table, self.bounds
        indptr = np.zeros(len(table) + 1, dtype=np.int64)
        np.cumsum(table[:, _LENGTH], out=indptr[1:])
        n = int(indptr[-1])
        indices: npt.NDArray[Any]
        data: npt.NDArray[Any]
        if self.narrow:
            indices, data = POOL.empty(n, np.uint16), POOL.empty(n, np.uint16)
            _copy_narrow(table, indptr, indices, data)
        else:
            indices, data = POOL.empty(n, np.int32), POOL.empty(n, np.float32)
            _copy_wide(table, indptr, indices, data)
        rows = table[:, _ROW].copy()
        obs = {name: codes[rows] for name, codes in self.obs_codes.items()}
        out = []
        for begin, stop in pairwise(bounds.tolist()):
            pointers = indptr[begin : stop + 1]
            low, high = int(pointers[0]), int(pointers[-1])
            out.append(
                Minibatch(
                    pointers - low,
                    indices[low:high],
                    data[low:high],
                    rows[begin:stop],
                    {name: codes[begin:stop] for name, codes in obs.items()},
                    self.n_vars,
                )
            )
        return out


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _lay_out(
    table: Ints,
    indptr: Ints,
    kept: Ints,
    indices: tuple[int, int],
    data: tuple[int, int],
    narrow: bool,
) -> None:
    """Say where the rows of a block lie, given the address and item size of its arrays."""
    for i in range(len(indptr) - 1):
        row = kept[i] if len(kept) else i
        table[row, _LENGTH] = indptr[i + 1] - indptr[i]
        table[row, _INDICES] = indices[0] + indices[1] * indptr[i]
        table[row, _DATA] = data[0] + data[1] * indptr[i]
        table[row, _NARROW] = narrow


def _pointer(kind: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def at(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), generate

    return at


_halves_at = _pointer(types.uint16)
_words_at = _pointer(types.int32)
_floats_at = _pointer(types.float32)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _copy_narrow(
    table: Ints, indptr: Ints, indices: npt.NDArray[np.uint16], data: npt.NDArray[np.uint16]
) -> None:
    """Copy each row of ``table`` to where ``indptr`` puts it."""
    for row in range(len(table)):
        begin, length = indptr[row], table[row, _LENGTH]
        columns, values = _halves_at(table[row, _INDICES]), _halves_at(table[row, _DATA])
        to_indices, to_data = indices[begin : begin + length], data[begin : begin + length]
        for k in range(length):
            to_indices[k] = columns[k]
        for k in range(length):
            to_data[k] = values[k]


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _copy_wide(
    table: Ints, indptr: Ints, indices: npt.NDArray[np.int32], data: npt.NDArray[np.float32]
) -> None:
    """Copy each row of ``table`` to where ``indptr`` puts it, and widen it where it is narrow."""
    for row in range(len(table)):
        begin, length = indptr[row], table[row, _LENGTH]
        to_indices, to_data = indices[begin : begin + length], data[begin : begin + length]
        if table[row, _NARROW]:
            columns, values = _halves_at(table[row, _INDICES]), _halves_at(table[row, _DATA])
            for k in range(length):
                to_indices[k] = columns[k]
            for k in range(length):
                to_data[k] = values[k]
        else:
            words, floats = _words_at(table[row, _INDICES]), _floats_at(table[row, _DATA])
            for k in range(length):
                to_indices[k] = words[k]
            for k in range(length):
                to_data[k] = floats[k]
