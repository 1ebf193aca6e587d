"""Rows cut into blocks: consecutive rows of one segment that are read in one go."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from loaders.errors import LoaderError

Range = tuple[int, int]

MAX_BLOCK = 256
MIN_BLOCK = 32
BLOCKS_PER_LANE = 16


def default_block_size(n_rows: int, lanes: int) -> int:
    """Rows of a block where the user names none.

    256, and fewer for a small source, so that each lane has at least 16 blocks; never under 32,
    where the price of a read outweighs that of its rows. With the default buffer, blocks of 256
    rows keep at least 64 of them in the mix, which holds the composition of minibatches near that
    of the whole; blocks of 1,024 would leave 16.
    """
    return min(MAX_BLOCK, max(MIN_BLOCK, n_rows // (BLOCKS_PER_LANE * lanes)))


def row_pieces(segments: Sequence[int], rows: Sequence[Range] | None) -> list[Range]:
    """The chosen row ranges, split where a segment ends, without the empty ones.

    Parameters
    ----------
    segments
        Row at which each segment starts, and the number of rows at the end.
    rows
        Sorted, disjoint ranges ``(start, stop)``; ``None`` takes all rows.

    Raises
    ------
    LoaderError
        Segments or ranges out of order or range, or nothing chosen.
    """
    bounds = [int(bound) for bound in segments]
    if not bounds or bounds[0] != 0 or any(b < a for a, b in pairwise(bounds)):
        raise LoaderError(
            "the segments of the source are out of order",
            found=bounds,
            expected="0, then rising row numbers up to the number of rows",
        )
    n_obs = bounds[-1]
    ranges = [(0, n_obs)] if rows is None else [(int(start), int(stop)) for start, stop in rows]
    _check_ranges(ranges, n_obs)
    pieces: list[Range] = []
    segment = 0
    for start, stop in ranges:
        while start < stop:
            while bounds[segment + 1] <= start:
                segment += 1
            end = min(stop, bounds[segment + 1])
            pieces.append((start, end))
            start = end
    if not pieces:
        raise LoaderError(
            "no rows to load",
            found=f"{len(ranges)} row ranges without a row, of a source of {n_obs} rows",
            expected="at least one row",
        )
    return pieces


def _check_ranges(ranges: Sequence[Range], n_obs: int) -> None:
    previous = 0
    for start, stop in ranges:
        if not previous <= start <= stop <= n_obs:
            raise LoaderError(
                "a row range is out of order or out of range",
                found=f"({start}, {stop}) after row {previous}",
                expected=f"sorted, disjoint (start, stop) within 0 and {n_obs}",
                do="sort the ranges and join those that overlap",
            )
        previous = stop


def cut(
    pieces: Sequence[Range], block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut pieces into blocks of ``block_size`` rows; the last block of a piece may be shorter.

    Returns
    -------
    starts, stops
        int64, (n_blocks,) each, in row order.
    """
    starts = np.concatenate([np.arange(start, stop, block_size) for start, stop in pieces])
    ends = np.concatenate(
        [np.full(-(-(stop - start) // block_size), stop) for start, stop in pieces]
    )
    return starts.astype(np.int64), np.minimum(starts + block_size, ends).astype(np.int64)
