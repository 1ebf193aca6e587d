"""Rows drawn with replacement, in proportion to weights, at the speed of reading blocks.

A block is visited in proportion to the summed weight of its rows, and a visit draws a fixed number
of its rows in proportion to theirs: the share of each row is exact, and reading stays in blocks.
Both draws are systematic (equal steps from a random start), so the number of visits and of draws
lies within one of what is expected. A row that a visit would draw over and over is *heavy*: heavy
rows are taken out of their blocks, read once and held, and drawn as a block of their own, so that
one cell of a rare label does not come many times in a row.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from loaders.blocks import Blocks
from loaders.errors import LoaderError
from loaders.selection import Ints, Selection

HEAVY_DRAWS = 4
"""Draws of one row that a visit of its block may make, before it counts as heavy."""


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
        Heavy rows at most.

    Attributes
    ----------
    heavy
        Rows that are read once and held: int64, rising.

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
        self.digest = hashlib.sha256(self._light.tobytes()).hexdigest()[:16]
        self.n_draws, self._per_visit, self._n_obs = n_draws, block_size, n_obs
        totals = self._totals(blocks)
        self.heavy = self._heavy(blocks, totals, held)
        self._heavy_ends = np.cumsum(self._light[self.heavy])
        self._light[self.heavy] = 0
        totals = self._totals(blocks)
        if len(self.heavy):
            totals = np.append(totals, self._heavy_ends[-1])
            blocks = Blocks(
                np.append(blocks.starts, n_obs),
                np.append(blocks.stops, n_obs + len(self.heavy)),
                np.append(blocks.takes, 0),
                np.append(blocks.segment, blocks.segment.max() + 1),
            )
        self._blocks, self._ends = blocks, np.cumsum(totals)

    @property
    def nbytes(self) -> int:
        """Memory that is held besides the heavy rows themselves."""
        return self._light.nbytes + self._ends.nbytes + self._heavy_ends.nbytes

    def visits(self, u: float) -> Blocks:
        """The blocks to visit in an epoch, some of them several times, some never.

        ``u`` is a random number in [0, 1).
        """
        n_visits = -(-self.n_draws // self._per_visit)
        chosen = self._blocks[_systematic(self._ends, n_visits, u)]
        takes = np.full(n_visits, self._per_visit, np.int64)
        return Blocks(chosen.starts, chosen.stops, takes, chosen.segment)

    def draw(self, start: int, stop: int, n: int, u: float) -> Ints:
        """Positions in the block ``start`` to ``stop`` that one visit draws: int64, (n,), rising.

        A block that begins at the number of rows is the one of heavy rows.
        """
        if start >= self._n_obs:
            return _systematic(self._heavy_ends, n, u)
        return _systematic(np.cumsum(self._light[start:stop]), n, u)

    def _totals(self, blocks: Blocks) -> npt.NDArray[np.float64]:
        """Summed weight of each block; exactly 0 where all its weights are."""
        ranges = np.stack([blocks.starts, blocks.stops], axis=1).ravel()
        padded = np.append(self._light, 0.0)
        totals: npt.NDArray[np.float64] = np.add.reduceat(padded, ranges)[::2]
        return totals

    def _heavy(
        self, blocks: Blocks, totals: npt.NDArray[np.float64], held: int
    ) -> npt.NDArray[np.int64]:
        """The heavy rows, of which the heaviest (among equals the first) where they are too many"""
        limit = HEAVY_DRAWS * totals / self._per_visit
        sizes = blocks.stops - blocks.starts
        offsets = np.cumsum(sizes) - sizes
        every = np.repeat(blocks.starts - offsets, sizes) + np.arange(int(sizes.sum()))
        rows = every[self._light[every] > np.repeat(limit, sizes)]
        heaviest = np.argsort(-self._light[rows], kind="stable")[:held]
        heavy: Ints = np.sort(rows[heaviest])
        return heavy


def _systematic(ends: npt.NDArray[np.float64], n: int, u: float) -> Ints:
    """``n`` draws in proportion to the steps of ``ends``, which rise: int64 positions, rising."""
    points = (np.arange(n) + u) * (ends[-1] / n)
    # rounding may carry the last point to the end; the last step that is not 0 holds it
    last = np.searchsorted(ends, ends[-1], side="left")
    drawn: Ints = np.minimum(np.searchsorted(ends, points, side="right"), last).astype(np.int64)
    return drawn
