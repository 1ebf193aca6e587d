"""Rows drawn with replacement, in proportion to weights, at the speed of reading blocks.

Blocks make *units*: one block where all its rows can be drawn, neighbours together where few can,
as behind a mask. A unit is visited in proportion to the summed weight of its rows, and a visit
draws a block's worth of its rows in proportion to theirs: the share of each row is exact, and
reading stays in blocks. All draws are systematic (equal steps from a random start), so the number
of visits and of draws lies within one of what is expected. A row that a visit would draw over and
over is *heavy*: heavy rows are taken out of their blocks, read once and held, and drawn as a block
of their own, so that one cell of a rare label does not come many times in a row.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loaders import philox
from loaders.blocks import Blocks
from loaders.errors import LoaderError
from loaders.selection import Ints, Selection, rows_of

HEAVY_DRAWS: Final = 4
"""Draws of one row that a visit of its unit may make, before it counts as heavy."""
_VERSION: Final = b"2"
"""Changes with the way rows are drawn, so that a state of another way is refused."""


def codes_of(values: npt.ArrayLike, n_obs: int) -> npt.NDArray[np.int32]:
    """Number the different values of rows from 0: int32, (n_obs,).

    Raises
    ------
    LoaderError
        There is not one value for each row.
    """
    column = np.asarray(values)
    if column.shape != (n_obs,):
        raise LoaderError(
            "balance has another shape than the rows",
            found=column.shape,
            expected=(n_obs,),
            do="give one value for each row of the source, also for those that rows leaves out",
        )
    if column.dtype == object:  # texts, perhaps with None or NaN among them
        column = column.astype(str)
    return np.unique(column, return_inverse=True)[1].astype(np.int32)


def balanced(codes: npt.NDArray[np.int32], selection: Selection) -> npt.NDArray[np.float64]:
    """Weights by which each code is drawn equally often among the chosen rows: float64, (n_obs,).

    Rows with code -1 (none) count as a code of their own; leave them out with ``rows`` where they
    are not wanted.
    """
    chosen = np.zeros(len(codes), bool)
    for start, stop in zip(selection.starts.tolist(), selection.stops.tolist(), strict=True):
        chosen[start:stop] = True
    counts = np.bincount(codes[chosen].astype(np.int64) + 1)
    share = np.zeros(max(len(counts), int(codes.max(initial=-1)) + 2))
    share[: len(counts)] = 1 / np.maximum(counts, 1)
    return np.where(chosen, share[codes.astype(np.int64) + 1], 0.0)


class Draws:
    """What weights make of the blocks; one for all epochs.

    Parameters
    ----------
    weights
        At least 0 for each row, (n_obs,); only their ratios count.
    selection
        Rows that can be drawn.
    blocks
        The blocks of these rows.
    n_draws
        Rows of an epoch.
    block_size
        Draws of a visit.
    held
        Heavy rows at most: where there are more, the heaviest, and among equals the first.

    Attributes
    ----------
    heavy
        Rows that are read once and held: int64, rising.
    takes
        Rows by which to count the bytes of each block: those of a visit, at least half of the
        block (of one of which less is taken, only that is held): int64, (n_blocks,).
    visits_at_most
        Of each block in an epoch: int64, (n_blocks,).

    Raises
    ------
    LoaderError
        Weights that are negative, not finite, all zero, or not one for each row.
    """

    def __init__(
        self,
        weights: npt.ArrayLike,
        selection: Selection,
        blocks: Blocks,
        n_draws: int,
        block_size: int,
        held: int,
    ) -> None:
        n_obs = selection.n_obs
        given = np.asarray(weights)
        if given.shape != (n_obs,) or given.dtype.kind not in "biuf":
            raise LoaderError(
                "the weights do not fit the rows of the source",
                found=f"{given.dtype} {given.shape}",
                expected=f"one number for each row, ({n_obs},)",
                do="give weights for all rows of the source, those that rows leaves out too",
            )
        wrong = np.flatnonzero(~(np.isfinite(given) & (given >= 0)))
        if len(wrong):
            raise LoaderError(
                "a weight is negative or not finite",
                found=f"{given[wrong[0]]} at row {wrong[0]}, {len(wrong)} such rows",
                expected="finite numbers of at least 0",
                do="set weights of rows that are not wanted to 0",
            )
        self._light = np.zeros(n_obs)
        for start, stop in zip(selection.starts.tolist(), selection.stops.tolist(), strict=True):
            self._light[start:stop] = given[start:stop]
        if not self._light.any():
            raise LoaderError(
                "no row can be drawn",
                found="weights that are all zero among the chosen rows",
                expected="at least one weight above 0",
                do="choose other rows, or give one of these a weight",
            )
        self._light /= self._light.max()  # sums neither overflow nor vanish
        self.digest = hashlib.sha256(_VERSION + self._light.tobytes()).hexdigest()[:16]
        self.n_draws, self._per_visit, self._n_obs = n_draws, block_size, n_obs
        self.heavy = self._heavy(blocks, held)
        self._heavy_ends = np.cumsum(self._light[self.heavy])
        self._light[self.heavy] = 0
        unit = self._units(blocks)
        totals = _sums(blocks, self._light)
        of_units = np.bincount(unit, totals)[unit]
        share = np.divide(totals, of_units, out=np.zeros(len(blocks)), where=of_units > 0)
        half = (blocks.stops - blocks.starts + 1) // 2
        self.takes: Ints = np.maximum((share * block_size).astype(np.int64), half)
        n_visits = 1 + -(-n_draws // block_size)
        portion = of_units / totals.sum() if totals.any() else of_units
        self.visits_at_most: Ints = 1 + np.ceil(n_visits * portion).astype(np.int64)
        # blocks, the first of each unit, and the weight up to each; all with the end
        self._blocks, self._ends = blocks, np.append(0, np.cumsum(totals))
        self._firsts = np.append(np.flatnonzero(np.diff(unit, prepend=-1)), len(blocks))

    @property
    def nbytes(self) -> int:
        """Memory that is held besides the heavy rows themselves."""
        return self._light.nbytes + self._ends.nbytes + self._heavy_ends.nbytes

    def visits(self, seed: int, epoch: int) -> Blocks:
        """The blocks to visit in an epoch, some of them several times, some never.

        Each with its rows to draw: all together the rows of an epoch.
        """
        most = -(-self.n_draws // self._per_visit)
        u = philox.uniform(3 + most, seed, philox.VISITS, epoch)
        n_heavy = 0
        if len(self.heavy):
            share = self._heavy_ends[-1] / (self._heavy_ends[-1] + self._ends[-1])
            n_heavy = min(int(share * self.n_draws + u[0]), self.n_draws)
        draws = _dealt(self.n_draws - n_heavy, self._per_visit, u[1])
        unit = _systematic(self._ends[self._firsts[1:]], len(draws), u[2])
        first, last = self._firsts[unit], self._firsts[unit + 1]
        visit = np.repeat(np.arange(len(draws)), last - first)
        block = rows_of(first, last)
        low, high = self._ends[first][visit], self._ends[last][visit]

        def before(ends: npt.NDArray[np.float64]) -> Ints:
            """Draws of the visit up to here, in equal steps: all of them at its end."""
            points = (ends - low) / (high - low) * draws[visit] + u[3:][visit]
            upto: Ints = np.minimum(points.astype(np.int64), draws[visit])
            return upto

        takes = before(self._ends[block + 1]) - before(self._ends[block])
        light = self._blocks[block[takes > 0]]
        # held rows are at hand, so that small visits cost nothing, and spread them
        heavy = _dealt(n_heavy, min(self._per_visit, HEAVY_DRAWS * len(self.heavy)), u[1])
        start, segment = self._n_obs, self._blocks.segment.max() + 1
        return Blocks(
            np.append(light.starts, np.full(len(heavy), start)),
            np.append(light.stops, np.full(len(heavy), start + len(self.heavy))),
            np.append(takes[takes > 0], heavy),
            np.append(light.segment, np.full(len(heavy), segment)),
        )

    def draw(self, start: int, stop: int, n: int, u: float) -> Ints:
        """Positions in the block ``start`` to ``stop`` that one visit draws: int64, (n,), rising.

        A block that begins at the number of rows is the one of heavy rows.
        """
        if start >= self._n_obs:
            return _systematic(self._heavy_ends, n, u)
        return _systematic(np.cumsum(self._light[start:stop]), n, u)

    def _units(self, blocks: Blocks) -> Ints:
        """The unit of each block: int64, (n_blocks,), rising by 0 or 1.

        Each has about a block's worth of rows with a weight, and half of that at the least.
        """
        counts = _sums(blocks, self._light > 0)
        # a block that lacks a few is one by itself
        about = np.where(4 * counts >= 3 * self._per_visit, self._per_visit, counts)
        unit = (np.cumsum(about) - about) // self._per_visit
        enough = 2 * np.bincount(unit, counts) >= self._per_visit
        rising: Ints = np.cumsum(enough)[unit]  # too few rows go with those before
        rising -= rising[0]
        return rising

    def _heavy(self, blocks: Blocks, held: int) -> Ints:
        """The heavy rows, rising. Without some of them others may be: searched until none is."""
        every, sizes = rows_of(blocks.starts, blocks.stops), blocks.stops - blocks.starts
        weights, found = self._light.copy(), np.empty(0, np.int64)
        while len(found) <= held:
            unit = self._units(blocks)
            limit = np.bincount(unit, _sums(blocks, self._light)) * (HEAVY_DRAWS / self._per_visit)
            more = every[self._light[every] > np.repeat(limit[unit], sizes)]
            if not len(more):
                break
            found = np.union1d(found, more)
            self._light[more] = 0
        self._light = weights
        heavy: Ints = np.sort(found[np.argsort(-weights[found], kind="stable")[:held]])
        return heavy


def _sums(blocks: Blocks, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The sum of each block's values: exactly 0 where all of them are."""
    ranges = np.stack([blocks.starts, blocks.stops], axis=1).ravel()
    sums: npt.NDArray[Any] = np.add.reduceat(np.append(values, 0), ranges)[::2]
    return sums


def _dealt(n: int, most: int, u: float) -> Ints:
    """``n`` draws as visits of ``most``, of which one takes what is left: int64."""
    visits = np.full(-(-n // max(most, 1)), most, np.int64)
    visits[int(u * len(visits)) :][:1] -= len(visits) * most - n
    return visits


def _systematic(ends: npt.NDArray[np.float64], n: int, u: float) -> Ints:
    """``n`` draws in proportion to the steps of ``ends``, which rise: int64 positions, rising."""
    points = (np.arange(n) + u) * (ends[-1] / max(n, 1))
    # rounding may carry the last point to the end; the last step that is not 0 holds it
    last = np.searchsorted(ends, ends[-1], side="left")
    drawn: Ints = np.minimum(np.searchsorted(ends, points, side="right"), last).astype(np.int64)
    return drawn
