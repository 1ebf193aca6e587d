"""Blocks of coming windows are read ahead by a few threads, under a budget of rows and bytes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numba import njit

from loaders.errors import LoaderError
from loaders.memory import block_bytes
from loaders.selection import Ints
from loaders.shuffle import ReadBlock
from loaders.source import RowBlock, RowSource, joined
from loaders.stalls import Stalls
from loaders.windows import Plan, Window

_TASK_BYTES = 2**21
"""What a thread reads before it hands it over, about: handing over costs as much as 100 kB."""
_NEAR = 64
"""Held rows that lie within so many of each other are read together."""


class Stopped(Exception):
    """Nobody wants the minibatches any more."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """How far reading may run ahead of what is needed.

    Attributes
    ----------
    rows
        Rows that may be read before their window is asked for; one window always may.
    nbytes
        Bytes of windows, open and read ahead, that may be held; None for no limit. The window that
        is needed next is always read.
    """

    rows: int
    nbytes: int | None = None


class WindowReader:
    """The windows with their blocks, in order, read ahead in the background.

    Parameters
    ----------
    source
        Where the rows are.
    plan
        What to read.
    step
        The first minibatch to read for.
    held
        The rows of :attr:`Plan.held`, where there are any.
    threads
        Number of reading threads.
    ahead
        How far ahead.
    stopped
        Asked before each read; once it says yes, reads that have not begun raise :class:`Stopped`.
    stalls
        Where waiting and reading are counted.
    """

    def __init__(
        self,
        source: RowSource,
        plan: Plan,
        step: int,
        held: RowBlock | None,
        threads: int,
        ahead: Ahead,
        stopped: Callable[[], bool],
        stalls: Stalls,
    ) -> None:
        self._source, self._plan, self._held_rows = source, plan, held
        self._windows = plan.windows(step)
        self._ahead, self._stopped, self._stalls = ahead, stopped, stalls
        self._pending: deque[tuple[Window, Ints, list[Future[list[ReadBlock]]]]] = deque()
        self._pending_rows = 0
        self._bytes: dict[tuple[int, int], int] = {}
        self._leaving: deque[Window | Future[Any]] = deque()
        self._next: Window | None = None
        self._next_bytes = 0
        self._advance()
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

    def __iter__(self) -> Iterator[tuple[Window, Ints, list[ReadBlock]]]:
        """Each window with its mixed order and its blocks."""
        while True:
            self._read_ahead()
            if not self._pending:
                return
            window, order, futures = self._pending.popleft()
            self._pending_rows -= window.n_rows
            # Before waiting, so that the threads have work meanwhile.
            self._read_ahead()
            with self._stalls.timed("wait_for_blocks"):
                blocks = [block for future in futures for block in future.result()]
            del futures  # The blocks belong to the window now.
            yield window, order, blocks
            del blocks

    def used_by(self, task: Future[Any]) -> None:
        """A task takes from windows that were handed out: they are held until it is done."""
        self._leaving.append(task)

    def close(self, window: Window) -> None:
        """Nothing more is taken from a window, once the tasks told of so far are done."""
        self._leaving.append(window)

    def _let_go(self, at_the_latest: bool) -> None:
        """Count windows no longer that are held no longer, or wait until they are not."""
        while self._leaving:
            first = self._leaving[0]
            if isinstance(first, Window):
                del self._bytes[first.lane, first.index]
            elif at_the_latest:
                wait([first])
            elif not first.done():
                return
            self._leaving.popleft()

    def _read_ahead(self) -> None:
        self._let_go(at_the_latest=False)
        while self._next is not None:
            if not self._fits(self._next):
                if self._pending:
                    return
                self._let_go(at_the_latest=True)
            window = self._next
            order = self._plan.mix(window)
            nbytes = self._next_bytes
            self._bytes[window.lane, window.index] = nbytes
            self._stalls.hold(sum(self._bytes.values()))
            chosen = np.unique(order) if self._plan.partial else None
            asked: list[tuple[int, int, Ints | None]] = []
            begin = 0
            for start, stop in window.blocks:
                kept = None
                if chosen is not None:
                    low, high = np.searchsorted(chosen, (begin, begin + stop - start))
                    kept = chosen[low:high] - begin
                begin += stop - start
                asked.append((start, stop, kept))
            per_task = max(1, _TASK_BYTES * len(asked) // max(1, nbytes))
            futures = [
                self._executor.submit(self._read, asked[first : first + per_task])
                for first in range(0, len(asked), per_task)
            ]
            self._pending.append((window, order, futures))
            self._pending_rows += window.n_rows
            self._advance()

    def _fits(self, window: Window) -> bool:
        if self._pending_rows + window.n_rows > self._ahead.rows:
            return False
        if self._ahead.nbytes is None:
            return True
        return sum(self._bytes.values()) + self._next_bytes <= self._ahead.nbytes

    def _advance(self) -> None:
        self._next = next(self._windows, None)
        self._next_bytes = 0 if self._next is None else self._window_bytes(self._next)

    def _window_bytes(self, window: Window) -> int:
        """Bytes that the blocks of a window will take, by the share of their rows that is kept."""
        ranges = np.array(window.blocks)
        takes = np.array(window.takes)
        own = ranges[:, 0] < self._source.n_obs
        ranges, takes = ranges[own], takes[own]
        if not len(ranges):
            return 0
        sizes = block_bytes(self._source, ranges[:, 0], ranges[:, 1])
        share = takes / (ranges[:, 1] - ranges[:, 0])
        return int((sizes * np.where(2 * share < 1, share, 1.0)).sum())

    def _read(self, asked: Sequence[tuple[int, int, Ints | None]]) -> list[ReadBlock]:
        began = time.perf_counter()
        blocks = [self._read_block(*block) for block in asked]
        self._stalls.add("reading", time.perf_counter() - began)
        return blocks

    def _read_block(self, start: int, stop: int, kept: Ints | None) -> ReadBlock:
        if self._stopped():
            raise Stopped
        if start >= self._source.n_obs:
            assert self._held_rows is not None  # the plan draws them only where it names them
            return ReadBlock(self._held_rows, None)
        block = self._source.read_rows(start, stop)
        check_block(block, stop - start, self._source.n_vars, start)
        if kept is not None and 2 * len(kept) < stop - start:
            return ReadBlock(block.take(kept), kept)
        return ReadBlock(block, None)


def read_held(source: RowSource, rows: Ints, threads: int) -> RowBlock:
    """Rows that are held for the whole time, in the order given, which rises."""
    segment = np.searchsorted(source.segments, rows, side="right")
    groups = np.split(rows, np.flatnonzero(np.diff(rows // _NEAR) | np.diff(segment)) + 1)

    def read(group: Ints) -> RowBlock:
        start, stop = int(group[0]), int(group[-1]) + 1
        block = source.read_rows(start, stop)
        check_block(block, stop - start, source.n_vars, start)
        return block.take(group - start)

    with ThreadPoolExecutor(threads, thread_name_prefix="loaders-read") as executor:
        return joined(list(executor.map(read, groups)))


def check_block(block: RowBlock, n_rows: int, n_vars: int, start: int) -> None:
    """Refuse a block that is not what :class:`RowBlock` says: its arrays are read by address.

    Raises
    ------
    LoaderError
        Wrong types, lengths or columns.
    """
    indptr, indices, data = block.indptr, block.indices, block.data
    where = f"rows {start} to {start + n_rows}"
    narrow = indices.dtype == np.uint16
    arrays: list[tuple[str, npt.NDArray[Any], type]] = [
        ("indptr", indptr, np.int64),
        ("indices", indices, np.uint16 if narrow else np.int32),
        ("data", data, np.uint16 if narrow else np.float32),
    ]
    for name, array, dtype in arrays:
        if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            raise LoaderError(
                f"the source gave {name} of another type for {where}",
                found=f"{array.dtype}, {array.ndim} dimensions, strides {array.strides}",
                expected=f"{np.dtype(dtype)}, 1 dimension, contiguous",
            )
    if len(indptr) != n_rows + 1 or not _is_csr(indptr, len(indices), len(data)):
        raise LoaderError(
            f"the source gave a block that is no CSR for {where}",
            found=f"{block.n_rows} rows, {len(indices)} columns, {len(data)} values, "
            f"indptr from {indptr[:1]} to {indptr[-1:]}",
            expected=f"{n_rows} rows, and an indptr that rises from 0 to the number of values",
        )
    # As unsigned numbers negative columns are out of range as well.
    unsigned = indices if narrow else indices.view(np.uint32)
    if len(indices) and unsigned.max() >= n_vars:
        raise LoaderError(
            f"the source gave columns out of range for {where}",
            found=f"{indices.min()} to {indices.max()}",
            expected=f"0 to {n_vars - 1}",
        )


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _is_csr(indptr: Ints, n_indices: int, n_data: int) -> bool:
    if indptr[0] != 0 or indptr[-1] != n_indices or n_indices != n_data:
        return False
    falls = False
    for row in range(len(indptr) - 1):
        falls |= indptr[row + 1] < indptr[row]
    return not falls
