"""Blocks dealt to lanes of equal length, and the windows of a lane."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

from loaders.blocks import Blocks
from loaders.selection import Ints, Range

Piece: TypeAlias = tuple[int, int, int]
"""First row, row after the last, and rows to take: one block."""
Splitter: TypeAlias = Callable[[Piece, int], tuple[Piece, Piece]]
"""Cuts a piece in two, of which the first has a given number of rows to take."""


class Lane:
    """The blocks of one lane, grouped into windows of at most ``size`` rows.

    ``bounds`` are the positions, counted in rows of the lane, at which its windows begin, and its
    number of rows at the end.

    Parameters
    ----------
    pieces
        First row, row after the last, rows to take: int64, (n_blocks, 3).
    first, size
        Rows of the first window, and of the others. One block always fits.
    """

    def __init__(self, pieces: Ints, first: int, size: int) -> None:
        self._pieces = pieces
        ends = [0, *np.cumsum(pieces[:, 2]).tolist()]
        cuts, limit = [0], first
        while cuts[-1] < len(pieces):
            at = cuts[-1]
            cuts.append(max(at + 1, bisect_right(ends, ends[at] + limit) - 1))
            limit = size
        self._cuts = cuts
        self.bounds: list[int] = [ends[cut] for cut in cuts]

    @property
    def n_rows(self) -> int:
        """Rows of the lane."""
        return self.bounds[-1]

    def blocks(self, index: int) -> tuple[tuple[Range, ...], tuple[int, ...]]:
        """Row ranges of the blocks of a window, and the rows to take from each."""
        inside = self._pieces[self._cuts[index] : self._cuts[index + 1]].tolist()
        return tuple((a, b) for a, b, _ in inside), tuple(take for *_, take in inside)

    def window_at(self, position: int) -> int:
        """The window that holds a position of the lane."""
        return bisect_right(self.bounds, position) - 1

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Positions ``start`` to ``stop`` of the lane as (window, start, stop, size), in windows"""
        while start < stop:
            index = self.window_at(start)
            begin, end = self.bounds[index], self.bounds[index + 1]
            upto = min(stop, end)
            yield index, start - begin, upto - begin, end - begin
            start = upto


def deal(blocks: Blocks, lanes: int, split: Splitter) -> list[Ints]:
    """Deal blocks to lanes, so that lane ``l`` of ``L`` has ``(n_rows + l) // L`` rows.

    Each block goes to the lane that has the fewest rows so far; what a lane then has too many, less
    than one block, is cut off its end and given to those that have too few.

    Returns
    -------
    For each lane its pieces in order, int64 (n, 3).
    """
    table = np.stack([blocks.starts, blocks.stops, blocks.takes], axis=1)
    dealt = _deal(blocks.takes, lanes)
    total = int(blocks.takes.sum())
    surplus = [
        int(blocks.takes[dealt == lane].sum()) - (total + lane) // lanes for lane in range(lanes)
    ]
    parts = [table[dealt == lane] for lane in range(lanes)]
    spare: list[Piece] = []
    for lane, part in enumerate(parts):
        while surplus[lane] > 0:
            piece: Piece = tuple(part[-1].tolist())
            part = part[:-1]
            if piece[2] > surplus[lane]:
                kept, piece = split(piece, piece[2] - surplus[lane])
                part = np.concatenate([part, [kept]])
            spare.append(piece)
            surplus[lane] -= piece[2]
        parts[lane] = part
    for lane, part in enumerate(parts):
        while surplus[lane] < 0:
            piece = spare.pop()
            if piece[2] > -surplus[lane]:
                piece, rest = split(piece, -surplus[lane])
                spare.append(rest)
            part = np.concatenate([part, [piece]])
            surplus[lane] += piece[2]
        parts[lane] = part
    return parts


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _deal(sizes: Ints, lanes: int) -> npt.NDArray[np.int32]:
    """The lane of each block: the one with the fewest rows so far, and of those the lowest."""
    filled = np.zeros(lanes, dtype=np.int64)
    dealt = np.empty(len(sizes), dtype=np.int32)
    for block in range(len(sizes)):
        lane = np.argmin(filled)
        filled[lane] += sizes[block]
        dealt[block] = lane
    return dealt
