"""Minibatches in the order of the source: the plan, and the loader that follows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from loaders.blocks import tile
from loaders.errors import at_least_one
from loaders.minibatch import Minibatch
from loaders.pipeline import Pipeline, Work, default_threads
from loaders.reader import Ahead
from loaders.selection import Ints, RowsLike, Selection
from loaders.source import RowSource, checked_codes, checked_segments
from loaders.windows import Course, Take, Window

_BLOCK: Final = 1024


class SequentialPlan:
    """Minibatches of rows in the order of the source. Every block is a window.

    Parameters
    ----------
    segments
        Row at which each segment starts, and the number of rows at the end.
    minibatch_size
        Rows of a minibatch; the last one of a segment may be shorter.
    rows
        Rows to go through: sorted, disjoint ranges, a mask, or rising row numbers; by default all.

    Attributes
    ----------
    n_rows, n_steps
        Number of rows and of minibatches.
    block_size
        Rows that are read in one go, at most.
    partial
        Whether blocks hold rows that are not gone through.
    held
        None.
    """

    def __init__(self, segments: Sequence[int], minibatch_size: int, rows: RowsLike = None) -> None:
        minibatch_size = at_least_one("minibatch_size", minibatch_size)
        self._selection = Selection(rows, int(segments[-1]) if len(segments) else 0)
        self.n_rows = self._selection.n_rows
        self.partial = len(self._selection.starts) > 1
        self.held: Ints = np.empty(0, np.int64)
        # Whole minibatches, so that each lies in one block where all rows are taken.
        self.block_size = minibatch_size * max(1, _BLOCK // minibatch_size)
        self._blocks = tile(segments, self._selection, self.block_size)
        self._ends = np.cumsum(self._blocks.takes)
        in_segments = np.bincount(self._blocks.segment, self._blocks.takes).astype(np.int64)
        lasts = np.cumsum(in_segments)
        starts = [
            np.arange(last - size, last, minibatch_size)
            for last, size in zip(lasts.tolist(), in_segments.tolist(), strict=True)
        ]
        self._bounds: Ints = np.concatenate([*starts, [self.n_rows]])
        self.n_steps = len(self._bounds) - 1

    def windows(self, step: int = 0) -> Iterator[Window]:
        """The blocks from the one that minibatch ``step`` begins in on."""
        blocks = self._blocks
        for index in range(self._block(int(self._bounds[step])), len(blocks)):
            block = int(blocks.starts[index]), int(blocks.stops[index])
            yield Window(0, index, (block,), (int(blocks.takes[index]),))

    def mix(self, window: Window) -> Ints:
        """Rows as they come."""
        ((start, stop),) = window.blocks
        return self._selection.between(start, stop) - start

    def source_rows(self, window: Window) -> Ints:
        """:meth:`Window.rows`: none are held."""
        return window.rows()

    def course(self, step: int, stop: int) -> Course:
        """The rows of minibatches ``step`` to ``stop`` (exclusive)."""
        begin, end = int(self._bounds[step]), int(self._bounds[stop])
        takes = []
        for index in range(self._block(begin), self._block(end - 1) + 1):
            size = int(self._blocks.takes[index])
            first = int(self._ends[index]) - size
            upto = min(end - first, size)
            takes.append(Take(0, index, max(0, begin - first), upto, upto == size))
        return Course(takes, np.diff(self._bounds[step : stop + 1])[:, None])

    def _block(self, position: int) -> int:
        """The block that holds a position among the chosen rows."""
        return int(np.searchsorted(self._ends, position, side="right"))


class SequentialLoader:
    """Minibatches in the order of the source, for validation and embedding.

    A minibatch never crosses the end of a segment, so it may be shorter there. Each iteration
    begins anew. Reading and gathering run in background threads as in :class:`MinibatchLoader`.

    Parameters
    ----------
    source
        Where the rows are.
    minibatch_size
        Rows of a minibatch at most.
    rows
        Rows to go through: ranges ``(start, stop)``, a mask, or rising row numbers; by default all.
    narrow
        Hand out columns and counts as uint16; see :class:`MinibatchLoader`.

    Raises
    ------
    LoaderError
        A parameter out of range, or a source whose segments or codes do not fit its rows.
    """

    def __init__(
        self,
        source: RowSource,
        minibatch_size: int,
        rows: RowsLike = None,
        *,
        narrow: bool = False,
    ) -> None:
        self._plan = SequentialPlan(checked_segments(source), minibatch_size, rows)
        self._source = source
        self._narrow = narrow and source.narrow
        self._obs_codes = checked_codes(source)

    @property
    def n_rows(self) -> int:
        """Rows to go through."""
        return self._plan.n_rows

    def __len__(self) -> int:
        """Number of minibatches."""
        return self._plan.n_steps

    def __iter__(self) -> Iterator[Minibatch]:
        """All minibatches, from the first."""
        threads = default_threads(self._source)
        pipeline = Pipeline(
            Work(
                self._source,
                self._obs_codes,
                self._plan,
                step=0,
                threads=threads,
                ahead=Ahead(2 * threads * self._plan.block_size),
                narrow=self._narrow,
                waiting=4,
            )
        )
        try:
            yield from pipeline
        finally:
            pipeline.close()
