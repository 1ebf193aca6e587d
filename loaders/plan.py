"""Which rows make which minibatch: pure functions, no reading.

The order of an epoch, :class:`EpochPlan`, is built so that any step of it can be computed without
the steps before, and so that rows are read in blocks and mixed in a bounded buffer:

1. Rows are cut into blocks. Each segment's blocks are permuted and spread evenly over the epoch,
   one at a random place in each of as many equal stretches as there are blocks; all blocks are
   taken in the order of these places. So every segment (a study) has its share of every part of
   the epoch, which a plain permutation of the blocks leaves to chance.
2. The blocks are dealt one by one to ``lanes``, each to the lane that has the fewest rows so far.
   What one lane then has more than another is cut off at its end and dealt again: lane ``l`` of
   ``L`` has ``(n + l) // L`` of the ``n`` rows.
3. Blocks that follow each other in a lane make a window, whose rows are mixed by a permutation of
   its own. The first windows of the lanes differ in length, so that later on the lanes do not all
   need their next window at the same step.
4. Let ``b(s)`` be the rows of all minibatches before ``s``. Minibatch ``s`` takes from lane ``l``
   the rows of its mixed sequence from position ``(b(s) + l) // L`` to ``(b(s+1) + l) // L``. By
   Hermite's identity these are ``b(s+1) - b(s)`` rows in all, and the lanes end together.
5. The last minibatch holds what is left. If that is less than a row for each lane, the last two
   minibatches share their rows evenly.

Rank ``r`` of ``W`` serves the lanes ``l`` with ``l % W == r``: whatever the number of ranks, a step
is the same rows, and every rank has a part of every step.

Where weights are given, the blocks of an epoch are visits, and a visit takes rows that are drawn:
see :mod:`loaders.weights`. All else is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from loaders import philox
from loaders.blocks import Blocks, default_block_size, tile
from loaders.errors import LoaderError, at_least_one, whole_number
from loaders.lanes import Lane, Piece, deal
from loaders.selection import Ints, RowsLike, Selection, rows_of
from loaders.weights import Draws
from loaders.windows import Course, Take, Window, walk

DEFAULT_BUFFER: Final = 16 * 1024


class EpochPlan:
    """The order of one epoch: every row exactly once, a pure function of its parameters.

    Parameters
    ----------
    segments
        Row at which each segment starts, and the number of rows at the end.
    minibatch_size
        Rows of a minibatch over all ranks; the last ones may be shorter.
    seed
        In [0, 2^64).
    epoch
        In [0, 2^64). Every pair of seed and epoch has an order of its own.
    rows
        Rows to go through: sorted, disjoint ranges, a mask, or rising row numbers; by default all.
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
    draws
        Draw rows by weight (made for the same segments, rows and sizes) in place of taking each
        once.
    rank, world_size
        Which part of every minibatch this plan is about.

    Attributes
    ----------
    n_rows, n_steps
        Number of rows and of minibatches of an epoch, over all ranks.

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
        rows: RowsLike = None,
        block_size: int | None = None,
        buffer_size: int | None = None,
        lanes: int = 8,
        drop_last: bool = False,
        draws: Draws | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.minibatch_size = minibatch_size = at_least_one("minibatch_size", minibatch_size)
        self.lanes = lanes = at_least_one("lanes", lanes)
        self.seed = seed = _word("seed", seed)
        self.epoch = epoch = _word("epoch", epoch)
        self.drop_last = bool(drop_last)
        self._n_obs = int(segments[-1]) if len(segments) else 0
        self._selection = Selection(rows, self._n_obs)
        self._draws = draws
        self.n_rows = self._selection.n_rows if draws is None else draws.n_draws
        self.block_size, self.buffer_size = sizes(
            self._selection.n_rows, lanes, block_size, buffer_size
        )
        self.n_steps, self._bound_before_last = _steps(
            self.n_rows, minibatch_size, lanes, self.drop_last
        )
        self.rank, self.world_size = _checked_rank(rank, world_size, lanes, self._smallest())
        pieces = deal(self._blocks(segments), lanes, self._split)
        size = self.buffer_size // lanes
        self._lanes = [
            Lane(piece, first=-(-size * (number + 1) // lanes), size=size)
            for number, piece in enumerate(pieces)
        ]
        self._own = np.arange(self.rank, lanes, self.world_size)

    @property
    def settings(self) -> dict[str, str | int]:
        """What fixes the order besides the epoch, as JSON values."""
        return {
            "rows": f"{self._selection.n_rows} rows, ranges {self._selection.digest}",
            "weights": "none" if self._draws is None else self._draws.digest,
            "rows_per_epoch": self.n_rows,
            "minibatch_size": self.minibatch_size,
            "seed": self.seed,
            "block_size": self.block_size,
            "buffer_size": self.buffer_size,
            "lanes": self.lanes,
            "drop_last": self.drop_last,
        }

    @property
    def partial(self) -> bool:
        """Whether minibatches may leave out rows of the blocks that are read for them."""
        return self._draws is not None or len(self._selection.starts) > 1

    @property
    def held(self) -> Ints:
        """Rows that are read once and held: the heavy ones where rows are drawn by weight."""
        return np.empty(0, np.int64) if self._draws is None else self._draws.heavy

    def windows(self, step: int = 0) -> Iterator[Window]:
        """The windows that minibatches from ``step`` on take from, in the order of first need."""
        found = []
        for number in self._own.tolist():
            lane = self._lanes[number]
            begin, end = (int(p) for p in self._positions(number, [step, self.n_steps]))
            if begin < end:
                found += [
                    (self._first_step(number, lane.bounds[index]), number, index)
                    for index in range(lane.window_at(begin), lane.window_at(end - 1) + 1)
                ]
        for _, number, index in sorted(found):
            yield Window(number, index, *self._lanes[number].blocks(index))

    def mix(self, window: Window) -> Ints:
        """Positions in :meth:`Window.rows` in the order in which they are taken: int64."""
        key = self.epoch, window.lane, window.index
        order = philox.permutation(window.n_rows, self.seed, philox.WINDOW, *key)
        if not self.partial:
            return order
        spans = [stop - start for start, stop in window.blocks]
        offsets = np.concatenate([[0], np.cumsum(spans)[:-1]])
        if self._draws is None:
            chosen = [self._selection.between(*block) - block[0] for block in window.blocks]
        else:
            u = philox.uniform(len(spans), self.seed, philox.DRAWS, *key)
            chosen = [
                self._draws.draw(*block, take, float(u[i]))
                for i, (block, take) in enumerate(zip(window.blocks, window.takes, strict=True))
            ]
        positions = [part + offset for part, offset in zip(chosen, offsets.tolist(), strict=True)]
        return np.concatenate(positions)[order]

    def course(self, step: int, stop: int) -> Course:
        """What minibatches ``step`` to ``stop`` (exclusive) take."""
        bounds = np.array([self._bound(s) for s in range(step, stop + 1)])
        ends = (bounds[:, None] + self._own) // self.lanes
        takes = [
            Take(number, index, start, upto, upto == size)
            for number, begin, end in zip(
                self._own.tolist(), ends[0].tolist(), ends[-1].tolist(), strict=True
            )
            for index, start, upto, size in self._lanes[number].spans(begin, end)
        ]
        return Course(takes, np.diff(ends, axis=0))

    def minibatches(self, step: int = 0) -> Iterator[Ints]:
        """Rows of the source in each minibatch from ``step`` on: int64, (rows of minibatch,)."""
        opened = (
            (window, self.source_rows(window)[self.mix(window)]) for window in self.windows(step)
        )
        for parts, _ in walk(self, step, 1, opened, lambda _: None):
            yield np.concatenate([rows[stretch] for rows, stretch in parts])

    def source_rows(self, window: Window) -> Ints:
        """:meth:`Window.rows`, with held rows by their number in the source."""
        rows = window.rows()
        if len(self.held):
            held = rows >= self._n_obs
            rows[held] = self.held[rows[held] - self._n_obs]
        return rows

    def _blocks(self, segments: Sequence[int]) -> Blocks:
        """The blocks of the epoch, in the order in which they are dealt."""
        if self._draws is None:
            blocks = tile(segments, self._selection, self.block_size)
            return blocks[self._spread(blocks.segment)]
        blocks = self._draws.visits(self.seed, self.epoch)
        return blocks[self._spread(blocks.segment)]

    def _spread(self, segment: Ints) -> Ints:
        """The order of blocks, given the segment of each: int64 permutation, (n_blocks,).

        The j-th of a segment's n permuted blocks is placed at random between j/n and (j+1)/n of the
        epoch.
        """
        n_blocks = len(segment)
        order = philox.permutation(n_blocks, self.seed, philox.BLOCKS, self.epoch)
        # by segment, and within one in the permuted order
        order = order[np.argsort(segment[order], kind="stable")]
        _, first, size = np.unique(segment[order], return_index=True, return_counts=True)
        rank = np.arange(n_blocks) - np.repeat(first, size)
        within = philox.words(n_blocks, self.seed, philox.PLACES, self.epoch) / 2.0**64
        places = (rank + within) / np.repeat(size, size)
        return order[np.argsort(places, kind="stable")]

    def _split(self, piece: Piece, n: int) -> tuple[Piece, Piece]:
        """A block in two, of which the first gives ``n`` rows."""
        start, stop, take = piece
        if self._draws is not None:
            return (start, stop, n), (start, stop, take - n)
        rows = self._selection.between(start, stop)
        return (start, int(rows[n - 1]) + 1, n), (int(rows[n]), stop, take - n)

    def _bound(self, step: int) -> int:
        """Rows of all minibatches before ``step``, over all ranks."""
        if step == self.n_steps - 1:
            return self._bound_before_last
        return min(step * self.minibatch_size, self.n_rows)

    def _positions(self, lane: int, steps: Sequence[int]) -> list[int]:
        """Rows that minibatches before each step take from a lane."""
        return [(self._bound(step) + lane) // self.lanes for step in steps]

    def places(self, step: int) -> Ints:
        """Where this rank's rows are in the minibatch over all ranks: int64, (n_rows,), rising."""
        bounds = np.array([self._bound(step), self._bound(step + 1)])
        counts = np.diff((bounds[:, None] + np.arange(self.lanes)) // self.lanes, axis=0)[0]
        stops = np.cumsum(counts)
        return rows_of((stops - counts)[self._own], stops[self._own])

    def rows_of_step(self, step: int) -> int:
        """Rows of a minibatch over all ranks."""
        return self._bound(step + 1) - self._bound(step)

    def _first_step(self, lane: int, position: int) -> int:
        """The step that takes the row at a position of a lane."""
        rows = (position + 1) * self.lanes - lane
        if rows > self._bound_before_last:
            return self.n_steps - 1
        return min((rows - 1) // self.minibatch_size, self.n_steps - 2)

    def _smallest(self) -> int:
        """Rows of the smallest minibatch."""
        steps = {0, 1, self.n_steps - 1, self.n_steps}
        bounds = [self._bound(s) for s in sorted(steps) if s <= self.n_steps]
        return min(int(d) for d in np.diff(bounds))


def _steps(n_rows: int, minibatch_size: int, lanes: int, drop_last: bool) -> tuple[int, int]:
    """Number of minibatches, and of rows before the last of them."""
    n_steps, rest = divmod(n_rows, minibatch_size)
    if rest and not drop_last:
        n_steps += 1
    if n_steps == 0:
        raise LoaderError(
            "there is no minibatch in an epoch",
            found=f"{n_rows} rows with drop_last",
            expected=f"at least minibatch_size={minibatch_size} rows",
            do="take smaller minibatches, or keep the last one",
        )
    before_last = (n_steps - 1) * minibatch_size
    if rest and not drop_last and rest < lanes and n_steps > 1:
        before_last = n_rows - (minibatch_size + rest) // 2
    return n_steps, before_last


def sizes(
    n_rows: int, lanes: int, block_size: int | None, buffer_size: int | None
) -> tuple[int, int]:
    """Block and buffer size, where one is not given chosen so that it fits the other."""
    if buffer_size is not None:
        buffer_size = whole_number("buffer_size", buffer_size)
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
    return block_size, buffer_size


def _word(name: str, value: int) -> int:
    """A word of Philox's key or counter."""
    word = whole_number(name, value)
    if not 0 <= word < 2**64:
        raise LoaderError(f"{name} is out of range", found=word, expected="in [0, 2^64)")
    return word


def _checked_rank(rank: int, world_size: int, lanes: int, smallest: int) -> tuple[int, int]:
    rank, world_size = whole_number("rank", rank), at_least_one("world_size", world_size)
    if not 0 <= rank < world_size:
        raise LoaderError(
            "rank is out of range", found=rank, expected=f"0 to world_size - 1 = {world_size - 1}"
        )
    if lanes % world_size:
        raise LoaderError(
            "lanes cannot be shared evenly by the ranks",
            found=f"world_size={world_size}, lanes={lanes}",
            expected="a number of ranks that divides lanes",
            do="give lanes as a multiple of world_size; the order of rows changes with lanes",
        )
    if smallest < world_size:
        raise LoaderError(
            "a minibatch has fewer rows than there are ranks",
            found=f"{smallest} rows in the smallest minibatch, world_size={world_size}",
            expected="at least one row for each rank",
            do="take larger minibatches, or drop_last=True",
        )
    return rank, world_size
