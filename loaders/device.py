"""Minibatches on a device: the sparse parts travel, dense rows are made where they are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from loaders.errors import LoaderError
from loaders.minibatch import Minibatch


@dataclass
class _Slot:
    """A pinned buffer, and when the last copy from it will have ended."""

    buffer: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    copied: torch.cuda.Event | None = None


class DeviceFeed:
    """Takes minibatches to a device, one after the other.

    To a GPU the arrays of a minibatch travel in one copy from a ring of pinned buffers, so that the
    copy of one overlaps with the making of the next; a buffer is written again only when its copy
    has ended. On the CPU dense rows are made directly.

    Parameters
    ----------
    device
        Where to.
    slots
        Buffers of the ring.
    columns
        Select genes on the device: for each column of the minibatches its new one, or -1 to leave
        it out; int32, (n_vars,). By default all stay.

    Raises
    ------
    LoaderError
        ``columns`` maps two columns to one.
    """

    def __init__(
        self,
        device: torch.device | str,
        slots: int = 3,
        columns: npt.NDArray[np.int32] | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._slots = [_Slot() for _ in range(slots)]
        self._next = 0
        self._columns, self._table, self._width = columns, None, None
        if columns is not None:
            kept = columns[columns >= 0]
            if len(np.unique(kept)) != len(kept):
                raise LoaderError(
                    "columns are mapped to the same column",
                    found=f"{len(kept)} columns to {len(np.unique(kept))}",
                    expected="a column for each",
                )
            self._width = int(kept.max(initial=-1)) + 1
            self._table = torch.from_numpy(columns.astype(np.int64)).to(self._device)

    def __call__(self, minibatch: Minibatch, dense: bool = True) -> Tensor:
        """The counts of a minibatch on the device: float32, (n_rows, n_vars).

        Dense, or in ``torch.sparse_csr`` layout.
        """
        n_vars = minibatch.n_vars if self._width is None else self._width
        shape = (minibatch.n_rows, n_vars)
        if self._device.type == "cpu" and dense:
            out = np.zeros(shape, np.float32)
            table = np.empty(0, np.int32) if self._columns is None else self._columns
            _densify(minibatch.indptr, minibatch.indices, minibatch.data, table, out)
            return torch.from_numpy(out)
        indptr, indices, data = self._move([minibatch.indptr, minibatch.indices, minibatch.data])
        return assemble(indptr, indices, data, shape, self._table, dense)

    def _move(self, arrays: list[npt.NDArray[Any]]) -> list[Tensor]:
        """Arrays on the device, in one copy."""
        if self._device.type != "cuda":
            return [_tensor(array).to(self._device) for array in arrays]
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        # each array begins at a multiple of 16 bytes, which every type may be read at
        offsets = np.cumsum([0, *(-(-array.nbytes // 16) * 16 for array in arrays)]).tolist()
        if slot.copied is not None:
            slot.copied.synchronize()
        if len(slot.buffer) < offsets[-1]:
            slot.buffer = torch.empty(offsets[-1] * 5 // 4, dtype=torch.uint8, pin_memory=True)
        host = slot.buffer.numpy()
        for array, offset in zip(arrays, offsets[:-1], strict=True):
            host[offset : offset + array.nbytes] = array.view(np.uint8)
        sent = slot.buffer[: offsets[-1]].to(self._device, non_blocking=True)
        slot.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        slot.copied.record(torch.cuda.current_stream(self._device))
        return [
            sent[offset : offset + array.nbytes].view(_tensor(array[:0]).dtype)
            for array, offset in zip(arrays, offsets[:-1], strict=True)
        ]


def assemble(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    shape: tuple[int, int],
    table: Tensor | None,
    dense: bool,
) -> Tensor:
    """Widen, select and densify on the device where the parts lie, without waiting for it.

    Narrow parts come as int16, which torch knows how to compute with; their bits are those of
    uint16.
    """
    n_rows, width = shape
    indices, data = _widened(indices).to(torch.int64), _widened(data).to(torch.float32)
    # The length is given, because to learn it from the device would wait for all work queued there.
    rows = torch.arange(n_rows, device=data.device).repeat_interleave(
        indptr.diff(), output_size=len(data)
    )
    if table is not None:
        indices = table[indices]
    if dense:
        # a column more than asked for takes the values that are left out
        spare = 0 if table is None else 1
        if table is not None:
            indices = torch.where(indices < 0, width, indices)
        counts = torch.zeros(n_rows * (width + spare), dtype=torch.float32, device=data.device)
        counts = counts.scatter_(0, rows * (width + spare) + indices, data)
        counts = counts.view(n_rows, width + spare)
        return counts[:, :width].contiguous() if spare else counts
    if table is not None:
        kept = indices >= 0
        rows, indices, data = rows[kept], indices[kept], data[kept]
        ends = torch.bincount(rows, minlength=n_rows).cumsum(0)
        indptr = torch.cat([ends.new_zeros(1), ends])
    # Sparse kernels expect the columns of a row to rise.
    order = (rows * width + indices).argsort()
    return torch.sparse_csr_tensor(
        indptr, indices[order], data[order], size=shape, check_invariants=False
    )


def _widened(part: Tensor) -> Tensor:
    return part.to(torch.int32) & 0xFFFF if part.dtype == torch.int16 else part


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _densify(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[Any],
    data: npt.NDArray[Any],
    table: npt.NDArray[np.int32],
    out: npt.NDArray[np.float32],
) -> None:
    """Write values into rows of zeros; ``table`` renames columns, unless it is empty."""
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            column = np.int64(indices[k])
            if len(table):
                column = np.int64(table[column])
            if column >= 0:
                out[row, column] = data[k]
