"""The shuffle buffer: open windows in mixed order, and minibatches gathered from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.extending import intrinsic

from loaders.minibatch import Minibatch
from loaders.source import RowBlock
from loaders.windows import Ints, Window

# Columns of the table of an open window.
_ROW, _LENGTH, _INDICES, _DATA = range(4)


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """The rows of a window in mixed order, where they lie in memory.

    Rows are not copied when a window is opened, only when they go into a minibatch: with two
    thousand values a row, copying is most of the work.

    Attributes
    ----------
    table
        For each row its position in the source, its number of values, and the addresses of its
        columns and of its values: int64, (n_rows, 4).
    blocks
        What the addresses point into; kept alive here.
    """

    table: Ints
    blocks: Sequence[RowBlock]


def open_window(window: Window, blocks: Sequence[RowBlock], order: Ints) -> OpenWindow:
    """Lay out the rows of a window in the order in which they will be taken.

    Parameters
    ----------
    window
        The window.
    blocks
        Its blocks as read.
    order
        Its permutation, (n_rows,).
    """
    table = np.empty((len(order), 4), dtype=np.int64)
    table[:, _ROW] = window.rows()
    begin = 0
    for block in blocks:
        part = table[begin : begin + block.n_rows]
        begin += block.n_rows
        part[:, _LENGTH] = np.diff(block.indptr)
        offsets = 4 * block.indptr[:-1]  # Columns and values have four bytes each.
        part[:, _INDICES] = block.indices.ctypes.data + offsets
        part[:, _DATA] = block.data.ctypes.data + offsets
    return OpenWindow(table[order], blocks)


def gather(
    parts: Sequence[tuple[OpenWindow, slice | Ints]],
    obs_codes: Mapping[str, npt.NDArray[np.int32]],
    n_vars: int,
) -> Minibatch:
    """Copy rows of open windows into a minibatch of its own arrays."""
    table = np.concatenate([window.table[positions] for window, positions in parts])
    indptr = np.zeros(len(table) + 1, dtype=np.int64)
    np.cumsum(table[:, _LENGTH], out=indptr[1:])
    indices = np.empty(indptr[-1], dtype=np.int32)
    data = np.empty(indptr[-1], dtype=np.float32)
    _copy(table, indptr, indices, data.view(np.int32))
    rows = table[:, _ROW].copy()
    obs = {name: codes[rows] for name, codes in obs_codes.items()}
    return Minibatch(indptr, indices, data, rows, obs, n_vars)


@intrinsic  # type: ignore[untyped-decorator]
def _words_at(_: Any, address: Any) -> Any:
    """A pointer to 32-bit words from an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int32)(address), generate


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _copy(
    table: Ints, indptr: Ints, indices: npt.NDArray[np.int32], data: npt.NDArray[np.int32]
) -> None:
    """Copy each row of ``table`` to where ``indptr`` puts it; values as the words they are."""
    for row in range(len(table)):
        begin = indptr[row]
        columns, values = _words_at(table[row, _INDICES]), _words_at(table[row, _DATA])
        for k in range(table[row, _LENGTH]):
            indices[begin + k] = columns[k]
        for k in range(table[row, _LENGTH]):
            data[begin + k] = values[k]
