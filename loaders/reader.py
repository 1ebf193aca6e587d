"""Blocks of coming windows are read ahead by a few threads, under a budget of rows and bytes."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import islice, pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np

from loaders.checks import check_block
from loaders.memory import block_bytes
from loaders.packed import Block
from loaders.selection import Ints
from loaders.shuffle import ALL_ROWS, OpenWindow, empty_table, lay_out
from loaders.source import RowBlock, RowSource
from loaders.stalls import Stalls
from loaders.windows import Plan, Window
from loaders.workers import Workers

_LOOKED_AT = 16
"""Windows whose bytes are asked for in one go."""


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
    task
        Bytes that a thread reads in one go, about; a block at least.
    """

    rows: int
    nbytes: int | None = None
    task: int = 2**20


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks to be read together.

    Attributes
    ----------
    starts, stops
        Their rows in the source: int64, (n_blocks,).
    offsets
        First row of each in the window: int64, (n_blocks,).
    kept
        Of each, which of its rows to keep, counted in it: int64, rising; None to keep all rows.
    """

    starts: Ints
    stops: Ints
    offsets: Ints
    kept: list[Ints] | None

    def __getitem__(self, which: Ints | slice) -> _Blocks:
        kept = self.kept
        if kept is not None:
            kept = [kept[i] for i in np.arange(len(kept))[which].tolist()]
        return _Blocks(self.starts[which], self.stops[which], self.offsets[which], kept)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Blocks of one window that are read in one go.

    Attributes
    ----------
    blocks
        In the order of the source.
    table
        Of the window, for where their rows lie.
    nbytes
        What they will take.
    read
        What was read.
    """

    blocks: _Blocks
    table: Ints
    nbytes: int
    read: Future[list[Block]] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Coming:
    """A window to come.

    Attributes
    ----------
    ranges, sizes
        Its blocks, and their bytes as they are read: int64, (n_blocks, 2) and (n_blocks,).
    nbytes
        What it will hold.
    """

    window: Window
    ranges: Ints
    sizes: Ints
    nbytes: int


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
    workers
        Who reads, and who does what is urgent between two reads.
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
        workers: Workers,
        ahead: Ahead,
        stopped: Callable[[], bool],
        stalls: Stalls,
    ) -> None:
        self._source, self._plan, self._held_rows = source, plan, held
        self._held_table = empty_table(len(plan.held))
        if held is not None:
            each = np.arange(held.n_rows), plan.held, np.ones(held.n_rows, np.int64)
            lay_out(self._held_table, *each, ALL_ROWS, held)
        self._windows = plan.windows(step)
        self._segments = [*source.segments]
        self._read_rows: Callable[[Ints, Ints], Block] = getattr(
            source, "read_packed", source.read_rows
        )
        self._ahead, self._stopped, self._stalls = ahead, stopped, stalls
        self._pending: deque[tuple[Window, Ints, Ints, list[Future[list[Block]]]]] = deque()
        self._pending_rows = 0
        self._bytes: dict[tuple[int, int], int] = {}
        self._leaving: deque[Window | Future[Any]] = deque()
        self._coming: deque[_Coming] = deque()
        self._workers = workers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for *_, futures in self._pending:
            for future in futures:
                future.cancel()

    def __iter__(self) -> Iterator[tuple[Window, OpenWindow]]:
        """The windows, each opened once its blocks are there."""
        while True:
            self._read_ahead()
            if not self._pending:
                return
            window, table, order, futures = self._pending.popleft()
            self._pending_rows -= window.n_rows
            # Before waiting, so that the threads have work meanwhile.
            self._read_ahead()
            with self._stalls.timed("wait_for_blocks"):
                blocks = [block for future in futures for block in future.result()]
            del futures  # The blocks belong to the window now.
            opened = OpenWindow(table, order, blocks)
            del table, order, blocks
            yield window, opened
            del opened

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
        """Have windows read as far as may be: small ones together, for a task has its price."""
        self._let_go(at_the_latest=False)
        pieces: list[_Piece] = []
        while self._coming or self._look_ahead():
            if not self._fits(self._coming[0]):
                if self._pending:
                    break
                self._let_go(at_the_latest=True)
            pieces += self._begin(self._coming.popleft())
        most = min(self._ahead.task, sum(piece.nbytes for piece in pieces) // self._workers.threads)
        task: deque[_Piece] = deque()
        for piece in pieces:
            task.append(piece)
            if sum(piece.nbytes for piece in task) >= most or piece is pieces[-1]:
                self._workers.submit(functools.partial(self._read_all, task))
                task = deque()

    def _begin(self, coming: _Coming) -> list[_Piece]:
        """Begin a window: what is to be read of it, in pieces of one task at the most."""
        window = coming.window
        self._bytes[window.lane, window.index] = coming.nbytes
        self._stalls.hold(sum(self._bytes.values()))
        order = self._plan.mix(window)
        starts, stops = coming.ranges.T
        ends = np.cumsum(stops - starts)
        offsets = ends - (stops - starts)
        kept = None
        if self._plan.partial:
            chosen = np.unique(order)
            within = pairwise(np.searchsorted(chosen, [*offsets, ends[-1]]))
            kept = [chosen[a:b] - o for (a, b), o in zip(within, offsets, strict=True)]
        # In the order of the source, so that blocks of one segment are read in one go.
        by_start = np.argsort(starts, kind="stable")
        blocks = _Blocks(starts, stops, offsets, kept)[by_start]
        table = empty_table(int(ends[-1]))
        sizes = coming.sizes[by_start]
        bounds = cuts(np.cumsum(sizes) // max(1, self._ahead.task))
        pieces = [
            _Piece(blocks[first:last], table, int(sizes[first:last].sum()))
            for first, last in pairwise(bounds)
        ]
        self._pending.append((window, table, order, [piece.read for piece in pieces]))
        self._pending_rows += window.n_rows
        return pieces

    def _fits(self, coming: _Coming) -> bool:
        if self._pending_rows + coming.window.n_rows > self._ahead.rows:
            return False
        if self._ahead.nbytes is None:
            return True
        return sum(self._bytes.values()) + coming.nbytes <= self._ahead.nbytes

    def _look_ahead(self) -> bool:
        """Look at some coming windows, and how many bytes their blocks will take."""
        windows = list(islice(self._windows, _LOOKED_AT))
        if not windows:
            return False
        ranges = np.array([block for window in windows for block in window.blocks])
        takes = np.concatenate([window.takes for window in windows])
        sizes = np.zeros(len(ranges), np.int64)
        own = ranges[:, 0] < self._source.n_obs
        if own.any():
            sizes[own] = block_bytes(self._source, ranges[own, 0], ranges[own, 1])
        share = takes / (ranges[:, 1] - ranges[:, 0])
        kept = sizes * np.where(2 * share < 1, share, 1.0)
        ends = np.cumsum([len(window.blocks) for window in windows]).tolist()
        for window, start, stop in zip(windows, [0, *ends], ends, strict=False):
            nbytes = int(kept[start:stop].sum())
            part = slice(start, stop)
            self._coming.append(_Coming(window, ranges[part], sizes[part], nbytes))
        return True

    def _read_all(self, pieces: deque[_Piece]) -> None:
        """Read pieces; one that cannot be read does not concern the others."""
        while pieces:
            self._workers.hurry()
            piece = pieces.popleft()
            if piece.read.set_running_or_notify_cancel():
                try:
                    piece.read.set_result(self._read(piece.blocks, piece.table))
                except BaseException as error:
                    piece.read.set_exception(error)
            del piece  # The blocks belong to whoever asked for them.

    def _read(self, blocks: _Blocks, table: Ints) -> list[Block]:
        """Read blocks, in the order of the source, and say in the table where their rows lie."""
        began = time.perf_counter()
        segment = np.searchsorted(self._segments, blocks.starts, side="right")
        read = [self._read_together(blocks[a:b], table) for a, b in pairwise(cuts(segment))]
        self._stalls.add("reading", time.perf_counter() - began)
        return read

    def _read_together(self, blocks: _Blocks, table: Ints) -> Block:
        """Read blocks of one segment, or lay out the rows that are held."""
        if self._stopped():
            raise Stopped
        starts, stops, offsets = blocks.starts, blocks.stops, blocks.offsets
        if starts[0] >= self._source.n_obs:
            held = self._held_rows
            assert held is not None  # the plan draws them only where it names them
            for offset in offsets.tolist():  # each time all of them
                table[offset : offset + held.n_rows] = self._held_table
            return held
        read = self._read_rows(starts, stops)
        check_block(read, starts, stops, self._source.narrow)
        counts, within = stops - starts, ALL_ROWS
        if blocks.kept is not None:
            read, counts, within = _without(read, counts, blocks.kept)
        lay_out(table, offsets, starts, counts, within, read)
        return read


def cuts(numbers: Ints) -> list[int]:
    """Where numbers that rise begin to differ from those before, 0 and the end included."""
    if numbers[0] == numbers[-1]:
        return [0, len(numbers)]
    return [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]


def _without(read: Block, counts: Ints, kept: list[Ints]) -> tuple[Block, Ints, Ints]:
    """Leave out the rows that are not kept, of blocks of which so few are kept that it pays.

    Returns what is left, how many rows of each block, and which of their block they are (none
    where they are all).
    """
    few = [2 * len(rows) < count for rows, count in zip(kept, counts.tolist(), strict=True)]
    if not any(few):
        return read, counts, ALL_ROWS
    left = [
        rows if copied else np.arange(count)
        for rows, count, copied in zip(kept, counts.tolist(), few, strict=True)
    ]
    first = (np.cumsum(counts) - counts).tolist()
    rows = [part + at for part, at in zip(left, first, strict=True)]
    taken = read.take(np.concatenate(rows))
    return taken, np.array([len(part) for part in left]), np.concatenate(left)
