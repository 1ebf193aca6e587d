"""Rows that are read once and held: heavy ones, or all of a source that fit in memory.

The order stays as it is; of a source that fits there is nothing to read, to wait for or to lay out
any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders.blocks import Blocks
from loaders.checks import check_block
from loaders.packed import Block, Compact
from loaders.reader import cuts
from loaders.selection import Ints
from loaders.shuffle import ALL_ROWS, OpenWindow, empty_table, lay_out
from loaders.source import RowBlock, RowSource, joined
from loaders.windows import Plan, Window

_NEAR = 64
"""Held rows that lie within so many of each other are read together."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Rows in memory.

    Attributes
    ----------
    table
        Where each row of the source lies, see :class:`OpenWindow`: int64, (n_obs, 5). Only those
        that were read are filled in.
    blocks
        What it points into.
    """

    table: Ints
    blocks: list[Block]


def read_resident(source: RowSource, blocks: Blocks, threads: int, task: int) -> Resident:
    """Read the rows of all blocks, which rise, by some threads, about ``task`` bytes in one go.

    The source is a :class:`loaders.packed.Compact`.
    """
    assert isinstance(source, Compact)  # the budget has asked
    starts, stops = blocks.starts, blocks.stops
    upto = 2 * np.cumsum(source.count_values(starts, stops)) // max(1, task)
    table = empty_table(source.n_obs)

    def read(first: int, last: int) -> Block:
        begin, end = starts[first:last], stops[first:last]
        block = source.read_packed(begin, end)
        check_block(block, begin, end, source.narrow)
        lay_out(table, begin, begin, end - begin, ALL_ROWS, block)
        return block

    with ThreadPoolExecutor(threads, thread_name_prefix="loaders-read") as executor:
        pieces = cuts(blocks.segment + upto)  # both rise: none is of two segments
        return Resident(table, list(executor.map(read, pieces[:-1], pieces[1:])))


def read_held(source: RowSource, rows: Ints, threads: int) -> RowBlock:
    """Rows that are held for the whole time, in the order given, which rises."""
    segment = np.searchsorted(source.segments, rows, side="right")
    groups = np.split(rows, np.flatnonzero(np.diff(rows // _NEAR) | np.diff(segment)) + 1)

    def read(group: Ints) -> RowBlock:
        start, stop = group[:1], group[-1:] + 1
        block = source.read_rows(start, stop)
        check_block(block, start, stop, source.narrow)
        return block.take(group - start)

    with ThreadPoolExecutor(threads, thread_name_prefix="loaders-read") as executor:
        return joined(list(executor.map(read, groups)))


class ResidentWindows:
    """In place of a :class:`loaders.reader.WindowReader`: the windows, open at once."""

    def __init__(self, plan: Plan, step: int, resident: Resident) -> None:
        self._plan, self._step, self._resident = plan, step, resident

    def __iter__(self) -> Iterator[tuple[Window, OpenWindow]]:
        """The windows, in the order of first need."""
        table, blocks = self._resident.table, self._resident.blocks
        for window in self._plan.windows(self._step):
            rows = self._plan.source_rows(window)[self._plan.mix(window)]
            yield window, OpenWindow(table, rows, blocks)

    def used_by(self, task: Future[Any]) -> None:
        """Nothing is counted, since all is held."""

    def close(self, window: Window) -> None:
        """Nothing is freed."""
