"""The order of the source as a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from loaders.blocks import Range, cut, row_pieces
from loaders.errors import at_least_one
from loaders.windows import Ints, Take, Window

_BLOCK: Final = 1024


class SequentialPlan:
    """Minibatches of rows in the order of the source.

    Parameters
    ----------
    segments
        Row at which each segment starts, and the number of rows at the end.
    minibatch_size
        Rows of a minibatch; it is shorter where a segment or a row range ends.
    rows
        Sorted, disjoint row ranges to go through; by default all rows.

    Attributes
    ----------
    n_rows, n_steps
        Number of rows and of minibatches.
    block_size
        Rows that are read in one go.
    """

    def __init__(
        self, segments: Sequence[int], minibatch_size: int, rows: Sequence[Range] | None = None
    ) -> None:
        self.minibatch_size = minibatch_size = at_least_one("minibatch_size", minibatch_size)
        pieces = row_pieces(segments, rows)
        self.n_rows = sum(stop - start for start, stop in pieces)
        # Whole minibatches, so that each lies in one block.
        self.block_size = minibatch_size * max(1, _BLOCK // minibatch_size)
        self._starts, self._stops = cut(pieces, self.block_size)
        steps = -(-(self._stops - self._starts) // minibatch_size)
        self._first_steps = np.concatenate([[0], np.cumsum(steps)])
        self.n_steps = int(self._first_steps[-1])

    def windows(self, step: int = 0) -> Iterator[Window]:
        """The blocks from the one that holds minibatch ``step`` on."""
        for index in range(self._block(step), len(self._starts)):
            yield Window(0, index, ((int(self._starts[index]), int(self._stops[index])),))

    def mix(self, window: Window) -> Ints:
        """Rows as they are."""
        return np.arange(window.n_rows)

    def takes(self, step: int) -> list[Take]:
        """The rows of minibatch ``step``."""
        block = self._block(step)
        size = int(self._stops[block] - self._starts[block])
        start = (step - int(self._first_steps[block])) * self.minibatch_size
        stop = min(start + self.minibatch_size, size)
        return [Take(0, block, slice(start, stop), stop == size)]

    def _block(self, step: int) -> int:
        return int(np.searchsorted(self._first_steps, step, side="right")) - 1
