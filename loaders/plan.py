"""Which rows make which minibatch: pure functions, no reading.

The order of an epoch, :class:`EpochPlan`, is built so that any step of it can be computed without
the steps before, and so that rows are read in blocks and mixed in a bounded buffer:

1. Rows are cut into blocks. Each segment's blocks are permuted and spread evenly over the epoch,
   one at a random place in each of as many equal stretches as there are blocks; all blocks are
   taken in the order of these places. So every segment (a study) has its share of every part of
   the epoch, which a plain permutation of the blocks leaves to chance.
2. The blocks are dealt one by one to ``lanes``, each to the lane that has the fewest rows so far.
   Lanes therefore differ by at most one block.
3. Blocks that follow each other in a lane make a window, whose rows are mixed by a permutation of
   its own. The first windows of the lanes differ in length, so that later on the lanes do not all
   need their next window at the same step.
4. Minibatch ``s`` of ``m`` rows takes from lane ``l`` of ``L`` the rows of its mixed sequence from
   position ``(s*m + l) // L`` to ``((s+1)*m + l) // L``. By Hermite's identity these are ``m`` rows
   in all.
5. When a lane would run dry, the rows left in all lanes form one pool, which is permuted and dealt
   out as the last minibatches.

Random numbers are the raw stream of Philox4x64-10 (Salmon et al. 2011), keyed by the seed and
counted by (epoch, lane, window). NumPy keeps that stream the same in all its versions, which it
does not promise for what is built upon it (``Generator.permutation``).
"""

from __future__ import annotations

import hashlib
import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
from numba import njit

from loaders.blocks import Range, cut, default_block_size, row_pieces
from loaders.errors import LoaderError, at_least_one
from loaders.windows import Ints, Take, Window, walk

DEFAULT_BUFFER: Final = 16 * 1024

# The second word of the key: what a permutation is for.
_BLOCKS, _WINDOW, _POOL, _PLACES = 0, 1, 2, 3


class EpochPlan:
    """The order of one epoch: every row exactly once, a pure function of its parameters.

    Parameters
    ----------
    segments
        Row at which each segment starts, and the number of rows at the end.
    minibatch_size
        Rows of a minibatch; the last one may be shorter.
    seed
        In [0, 2^64).
    epoch
        In [0, 2^64). Every pair of seed and epoch has an order of its own.
    rows
        Sorted, disjoint row ranges to go through; by default all rows.
    block_size
        Rows that are read in one go. By default 256, and fewer for a small source
        (:func:`loaders.blocks.default_block_size`).
    buffer_size
        Rows in the windows that are open at a time, which minibatches are drawn from. By default
        16,384, or one block per lane where that is more.
    lanes
        Number of lanes. It fixes the order, and has nothing to do with threads or ranks.
    drop_last
        Leave out the last minibatch if it would be short. Which rows are left out changes with the
        epoch.

    Attributes
    ----------
    n_rows, n_steps
        Number of rows and of minibatches.

    Raises
    ------
    LoaderError
        A parameter out of range.
    """

    def __init__(
        self,
        segments: Sequence[int],
        minibatch_size: int = 128,
        seed: int = 0,
        epoch: int = 0,
        *,
        rows: Sequence[Range] | None = None,
        block_size: int | None = None,
        buffer_size: int | None = None,
        lanes: int = 8,
        drop_last: bool = False,
    ) -> None:
        self.minibatch_size = minibatch_size = at_least_one("minibatch_size", minibatch_size)
        self.lanes = lanes = at_least_one("lanes", lanes)
        self.seed = seed = _word("seed", seed)
        self.epoch = epoch = _word("epoch", epoch)
        self.drop_last = bool(drop_last)
        pieces = row_pieces(segments, rows)
        self.n_rows = sum(stop - start for start, stop in pieces)
        self.block_size, self.buffer_size = _sizes(self.n_rows, lanes, block_size, buffer_size)
        self.n_steps = self.n_rows // minibatch_size
        if not drop_last:
            self.n_steps = -(-self.n_rows // minibatch_size)
        if self.n_steps == 0:
            raise LoaderError(
                "there is no minibatch in an epoch",
                found=f"{self.n_rows} rows with drop_last",
                expected=f"at least minibatch_size={minibatch_size} rows",
                do="take smaller minibatches, or keep the last one",
            )
        starts, stops = cut(pieces, self.block_size)
        self._blocks_digest = hashlib.sha256(starts.tobytes() + stops.tobytes()).hexdigest()[:16]
        order = _spread(np.searchsorted(segments, starts, side="right"), seed, epoch)
        starts, stops = starts[order], stops[order]
        dealt = _deal(stops - starts, lanes)
        blocks = self.buffer_size // (lanes * self.block_size)
        self._lanes = [
            _Lane(
                starts[dealt == lane],
                stops[dealt == lane],
                first=-(-blocks * (lane + 1) // lanes),
                later=blocks,
            )
            for lane in range(lanes)
        ]
        # The first step whose share some lane cannot give: here the pool begins.
        self._pool_step = min(
            ((lane.n_rows + 1) * lanes - number - 1) // minibatch_size
            for number, lane in enumerate(self._lanes)
        )

    @property
    def settings(self) -> dict[str, str | int]:
        """What fixes the order besides the epoch, as JSON values."""
        return {
            "rows": f"{self.n_rows} rows, blocks {self._blocks_digest}",
            "minibatch_size": self.minibatch_size,
            "seed": self.seed,
            "block_size": self.block_size,
            "buffer_size": self.buffer_size,
            "lanes": self.lanes,
            "drop_last": self.drop_last,
        }

    def windows(self, step: int = 0) -> Iterator[Window]:
        """The windows that minibatches from ``step`` on take from, in the order of first need."""
        step = min(step, self._pool_step)
        found = [
            (self._first_step(number, lane.bounds[index]), number, index)
            for number, lane in enumerate(self._lanes)
            for index in range(
                bisect_right(lane.bounds, self._position(number, step)) - 1, lane.n_windows
            )
        ]
        for _, number, index in sorted(found):
            yield Window(number, index, self._lanes[number].blocks(index))

    def mix(self, window: Window) -> Ints:
        """The order in which the rows of a window are taken: int64 permutation, (n_rows,)."""
        return _permutation(
            window.n_rows, self.seed, _WINDOW, self.epoch, window.lane, window.index
        )

    def takes(self, step: int) -> list[Take]:
        """What minibatch ``step`` takes, lane after lane."""
        if step >= self._pool_step:
            return self._pool_takes(step)
        return [
            Take(number, index, slice(start, stop), stop == size)
            for number, lane in enumerate(self._lanes)
            for index, start, stop, size in lane.spans(
                self._position(number, step), self._position(number, step + 1)
            )
        ]

    def minibatches(self, step: int = 0) -> Iterator[Ints]:
        """Rows of the source in each minibatch from ``step`` on: int64, (rows of minibatch,)."""
        opened = ((window, window.rows()[self.mix(window)]) for window in self.windows(step))
        for parts in walk(self, step, opened):
            yield np.concatenate([rows[positions] for rows, positions in parts])

    def _position(self, lane: int, step: int) -> int:
        """Rows that minibatches before ``step`` have taken from a lane."""
        return (step * self.minibatch_size + lane) // self.lanes

    def _first_step(self, lane: int, position: int) -> int:
        """The step that takes the row at a position of a lane, or the one where the pool begins."""
        step = ((position + 1) * self.lanes - lane - 1) // self.minibatch_size
        return min(step, self._pool_step)

    @cached_property
    def _pool(self) -> tuple[list[tuple[int, int, int, int]], Ints]:
        """Parts of the pool as (lane, window, first and last position), and its permutation."""
        parts = [
            (number, index, start, stop)
            for number, lane in enumerate(self._lanes)
            for index, start, stop, _ in lane.spans(
                self._position(number, self._pool_step), lane.n_rows
            )
        ]
        n_rows = sum(stop - start for *_, start, stop in parts)
        return parts, _permutation(n_rows, self.seed, _POOL, self.epoch)

    def _pool_takes(self, step: int) -> list[Take]:
        parts, order = self._pool
        first = (step - self._pool_step) * self.minibatch_size
        # In the order of the lanes, so that each window is taken from once.
        chosen = np.sort(order[first : first + self.minibatch_size])
        takes = []
        offset = 0
        for lane, index, start, stop in parts:
            low, high = np.searchsorted(chosen, (offset, offset + stop - start))
            if low < high:
                positions = chosen[low:high] - offset + start
                takes.append(Take(lane, index, positions, last=step == self.n_steps - 1))
            offset += stop - start
        return takes


class _Lane:
    """The blocks of one lane, grouped into windows.

    ``bounds`` are the positions, counted in rows of the lane, at which its windows begin, and its
    number of rows at the end.
    """

    def __init__(self, starts: Ints, stops: Ints, first: int, later: int) -> None:
        self._starts, self._stops = starts, stops
        n_blocks = len(starts)
        self._cuts = [0, *range(first, n_blocks, later), n_blocks] if n_blocks else [0]
        ends = np.concatenate([[0], np.cumsum(stops - starts)])
        self.bounds: list[int] = ends[self._cuts].tolist()

    @property
    def n_rows(self) -> int:
        return self.bounds[-1]

    @property
    def n_windows(self) -> int:
        return len(self.bounds) - 1

    def blocks(self, index: int) -> tuple[Range, ...]:
        """Row ranges of the blocks of a window."""
        inside = slice(self._cuts[index], self._cuts[index + 1])
        starts, stops = self._starts[inside].tolist(), self._stops[inside].tolist()
        return tuple(zip(starts, stops, strict=True))

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Positions ``start`` to ``stop`` of the lane as (window, start, stop, size), in windows"""
        while start < stop:
            index = bisect_right(self.bounds, start) - 1
            begin, end = self.bounds[index], self.bounds[index + 1]
            upto = min(stop, end)
            yield index, start - begin, upto - begin, end - begin
            start = upto


def _permutation(
    n: int, seed: int, purpose: int, epoch: int, lane: int = 0, window: int = 0
) -> Ints:
    """A permutation of ``range(n)``: int64, (n,). Equal keys, if ever, stay in order."""
    return np.argsort(_words(n, seed, purpose, epoch, lane, window), kind="stable")


def _words(
    n: int, seed: int, purpose: int, epoch: int, lane: int = 0, window: int = 0
) -> npt.NDArray[np.uint64]:
    """Random words, (n,). Philox counts up in the first word of its counter: no streams overlap."""
    bits = np.random.Philox(
        key=np.array([seed, purpose], dtype=np.uint64),
        counter=np.array([0, epoch, lane, window], dtype=np.uint64),
    )
    return bits.random_raw(n)


def _spread(segment: Ints, seed: int, epoch: int) -> Ints:
    """The order of blocks, given the segment of each: int64 permutation, (n_blocks,).

    The j-th of a segment's n permuted blocks is placed at random between j/n and (j+1)/n of the
    epoch.
    """
    n_blocks = len(segment)
    order = _permutation(n_blocks, seed, _BLOCKS, epoch)
    # by segment, and within one in the permuted order
    order = order[np.argsort(segment[order], kind="stable")]
    _, first, size = np.unique(segment[order], return_index=True, return_counts=True)
    rank = np.arange(n_blocks) - np.repeat(first, size)
    within = _words(n_blocks, seed, _PLACES, epoch) / 2.0**64
    places = (rank + within) / np.repeat(size, size)
    return order[np.argsort(places, kind="stable")]


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


def _sizes(
    n_rows: int, lanes: int, block_size: int | None, buffer_size: int | None
) -> tuple[int, int]:
    """Block and buffer size, where one is not given chosen so that it fits the other."""
    if buffer_size is not None and buffer_size < lanes:
        raise LoaderError(
            "buffer_size is too small",
            found=buffer_size,
            expected=f"at least one row for each of {lanes} lanes",
            do="raise buffer_size or take fewer lanes",
        )
    if block_size is None:
        block_size = default_block_size(n_rows, lanes)
        if buffer_size is not None:
            block_size = min(block_size, buffer_size // lanes)
    block_size = at_least_one("block_size", block_size)
    if buffer_size is None:
        buffer_size = max(DEFAULT_BUFFER, lanes * block_size)
    if buffer_size < lanes * block_size:
        raise LoaderError(
            "buffer_size is too small for one block per lane",
            found=f"buffer_size={buffer_size}, block_size={block_size}, lanes={lanes}",
            expected=f"buffer_size of at least {lanes * block_size}",
            do="raise buffer_size, or take smaller blocks or fewer lanes",
        )
    return block_size, operator.index(buffer_size)


def _word(name: str, value: int) -> int:
    """A word of Philox's key or counter."""
    word = operator.index(value)
    if not 0 <= word < 2**64:
        raise LoaderError(f"{name} is out of range", found=word, expected="in [0, 2^64)")
    return word
