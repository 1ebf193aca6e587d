"""Writing the counts or a layer of a study: compressed rows in shards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zarr

from atlas.store import chunks


class CSRRows(Protocol):
    """A run of rows in CSR form, ``indptr`` from 0."""

    @property
    def indptr(self) -> npt.NDArray[np.int64]: ...
    @property
    def indices(self) -> npt.NDArray[Any]: ...
    @property
    def data(self) -> npt.NDArray[Any]: ...


def write_matrix(
    group: zarr.Group,
    name: str,
    blocks: Iterable[CSRRows],
    *,
    shape: tuple[int, int],
    nnz: int,
    dtype: npt.DTypeLike,
    profile: str,
) -> None:
    """Write CSR rows as ``name``, shard by shard, holding two shards in memory at the most.

    Column indices are uint16 where the columns allow, else uint32.
    """
    matrix = group.create_group(name)
    matrix.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(shape)}
    )
    index_type = np.uint16 if shape[1] <= 2**16 else np.uint32
    columns = _Appender(
        chunks.create(matrix, "indices", nnz, index_type, profile, sorted_runs=True)
    )
    values = _Appender(chunks.create(matrix, "data", nnz, dtype, profile))
    indptr = np.zeros(shape[0] + 1, np.int64)
    row = 0
    for block in blocks:
        n = len(block.indptr) - 1
        indptr[row + 1 : row + n + 1] = indptr[row] + block.indptr[1:]
        columns.append(block.indices)
        values.append(block.data)
        row += n
    columns.close()
    values.close()
    pointers = _Appender(
        chunks.create(matrix, "indptr", len(indptr), np.int64, profile, sorted_runs=True)
    )
    pointers.append(indptr)
    pointers.close()
    if row != shape[0] or indptr[-1] != nnz:
        raise RuntimeError(f"wrote {row} rows, {indptr[-1]} values; meant {shape[0]}, {nnz}")


class _Appender:
    """Collects values and writes whole shards."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self.array = array
        self.buffer = np.empty(min(chunks.SHARD, max(1, array.shape[0])), array.dtype)
        self.filled = 0
        self.written = 0

    def append(self, values: npt.NDArray[Any]) -> None:
        at = 0
        while at < len(values):
            n = min(len(values) - at, len(self.buffer) - self.filled)
            self.buffer[self.filled : self.filled + n] = values[at : at + n]
            self.filled += n
            at += n
            if self.filled == len(self.buffer):
                self._flush()

    def close(self) -> None:
        if self.filled:
            self._flush()

    def _flush(self) -> None:
        self.array[self.written : self.written + self.filled] = self.buffer[: self.filled]
        self.written += self.filled
        self.filled = 0
