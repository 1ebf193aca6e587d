"""Rows cut into blocks: consecutive rows of one segment that are read in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from loaders.errors import LoaderError
from loaders.selection import Ints, Selection

MAX_BLOCK = 256
MIN_BLOCK = 32
BLOCKS_PER_LANE = 16


@dataclass(frozen=True, slots=True)
class Blocks:
    """Stretches of rows, in any order.

    Attributes
    ----------
    starts, stops
        Row ranges to read: int64, (n_blocks,) each.
    takes
        Rows that minibatches take from each: int64, (n_blocks,). The chosen rows of the range; or,
        where rows are drawn by weight, the number of draws.
    segment
        The segment of each: int64, (n_blocks,).
    """

    starts: Ints
    stops: Ints
    takes: Ints
    segment: Ints

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, order: Ints) -> Blocks:
        """Some of the blocks, in the order given."""
        return Blocks(self.starts[order], self.stops[order], self.takes[order], self.segment[order])


def default_block_size(n_rows: int, lanes: int) -> int:
    """Rows of a block where the user names none.

    256, and fewer for a small source, so that each lane has at least 16 blocks; never under 32,
    where the price of a read outweighs that of its rows. With the default buffer, blocks of 256
    rows keep at least 64 of them in the mix, which holds the composition of minibatches near that
    of the whole; blocks of 1,024 would leave 16.
    """
    return min(MAX_BLOCK, max(MIN_BLOCK, n_rows // (BLOCKS_PER_LANE * lanes)))


def tile(segments: Sequence[int], selection: Selection, block_size: int) -> Blocks:
    """Cut each segment into ranges of ``block_size`` rows, and keep those with a chosen row.

    The cuts do not depend on the selection; a range is trimmed to its first and last chosen row.

    Parameters
    ----------
    segments
        Row at which each segment starts, and the number of rows at the end.
    selection
        The chosen rows.
    block_size
        Rows of a range at most.

    Raises
    ------
    LoaderError
        The segments do not rise from 0.
    """
    bounds = [int(bound) for bound in segments]
    if not bounds or bounds[0] != 0 or any(b < a for a, b in pairwise(bounds)):
        raise LoaderError(
            "the segments of the source are out of order",
            found=bounds,
            expected="0, then rising row numbers up to the number of rows",
        )
    parts = [np.arange(start, stop, block_size) for start, stop in pairwise(bounds)]
    starts = np.concatenate(parts).astype(np.int64)
    segment = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    stops = np.minimum(starts + block_size, np.array(bounds[1:])[segment])
    takes = selection.before(stops) - selection.before(starts)
    kept = takes > 0
    starts, stops = selection.trimmed(starts[kept], stops[kept])
    return Blocks(starts, stops, takes[kept], segment[kept])
