"""Blocks of coming windows are read ahead by a few threads, under a budget of rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from loaders.errors import LoaderError
from loaders.source import RowBlock, RowSource
from loaders.windows import Window


class Stopped(Exception):
    """Nobody wants the minibatches any more."""


class WindowReader:
    """The windows with their blocks, in order, read ahead in the background.

    Parameters
    ----------
    source
        Where the rows are.
    windows
        What to read.
    threads
        Number of reading threads.
    ahead
        Rows that may be read before their window is asked for; one window always may.
    stopped
        Asked before each read; once it says yes, reads that have not begun raise :class:`Stopped`.
    """

    def __init__(
        self,
        source: RowSource,
        windows: Iterator[Window],
        threads: int,
        ahead: int,
        stopped: Callable[[], bool],
    ) -> None:
        self._source = source
        self._windows = windows
        self._ahead = ahead
        self._stopped = stopped
        self._pending: deque[tuple[Window, list[Future[RowBlock]]]] = deque()
        self._pending_rows = 0
        self._next = next(windows, None)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="loaders-read")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._executor.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Window, list[RowBlock]]]:
        while True:
            self._read_ahead()
            if not self._pending:
                return
            window, futures = self._pending.popleft()
            self._pending_rows -= window.n_rows
            # Before waiting, so that the threads have work meanwhile.
            self._read_ahead()
            yield window, [future.result() for future in futures]
            del futures  # The blocks belong to the window now.

    def _read_ahead(self) -> None:
        while self._next is not None and (
            not self._pending or self._pending_rows + self._next.n_rows <= self._ahead
        ):
            futures = [
                self._executor.submit(self._read, start, stop) for start, stop in self._next.blocks
            ]
            self._pending.append((self._next, futures))
            self._pending_rows += self._next.n_rows
            self._next = next(self._windows, None)

    def _read(self, start: int, stop: int) -> RowBlock:
        if self._stopped():
            raise Stopped
        block = self._source.read_rows(start, stop)
        check_block(block, stop - start, self._source.n_vars, f"rows {start} to {stop}")
        return block


def check_block(block: RowBlock, n_rows: int, n_vars: int, where: str) -> None:
    """Refuse a block that is not what :class:`RowBlock` says: its arrays are read by address.

    Raises
    ------
    LoaderError
        Wrong types, lengths or columns.
    """
    indptr, indices, data = block.indptr, block.indices, block.data
    arrays: list[tuple[str, npt.NDArray[Any], type]] = [
        ("indptr", indptr, np.int64),
        ("indices", indices, np.int32),
        ("data", data, np.float32),
    ]
    for name, array, dtype in arrays:
        if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            raise LoaderError(
                f"the source gave {name} of another type for {where}",
                found=f"{array.dtype}, {array.ndim} dimensions, strides {array.strides}",
                expected=f"{np.dtype(dtype)}, 1 dimension, contiguous",
            )
    if (
        len(indptr) != n_rows + 1
        or indptr[0] != 0
        or not indptr[-1] == len(indices) == len(data)
        or (np.diff(indptr) < 0).any()
    ):
        raise LoaderError(
            f"the source gave a block that is no CSR for {where}",
            found=f"{block.n_rows} rows, {len(indices)} columns, {len(data)} values, "
            f"indptr from {indptr[:1]} to {indptr[-1:]}",
            expected=f"{n_rows} rows, and an indptr that rises from 0 to the number of values",
        )
    # As unsigned numbers negative columns are out of range as well.
    if len(indices) and indices.view(np.uint32).max() >= n_vars:
        raise LoaderError(
            f"the source gave columns out of range for {where}",
            found=f"{indices.min()} to {indices.max()}",
            expected=f"0 to {n_vars - 1}",
        )
