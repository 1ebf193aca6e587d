"""How often each value occurs in each batch and gene: all statistics from one pass.

The statistics of genes take two passes (:mod:`atlas.store.statistics`), the second to find the
values above a bound that follows from the first. Counted by value, both come from the pass in which
the counts are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from atlas.store.statistics import Floats

_WIDTHS = (64, 32, 16)
_MOST = 1 << 18
"""Large values that may wait, and distinct ones that may be kept, before counting is given up."""
_LARGE_BYTES = 40 * _MOST


def affordable_width(n_batches: int, n_vars: int, memory: int) -> int | None:
    """The widest table of a :class:`Tally` that takes so many bytes at most; None if none does."""
    for width in _WIDTHS:
        if 4 * n_batches * n_vars * width + _LARGE_BYTES <= memory:
            return width
    return None


class Tally:
    """Counts how often each value occurs; for one thread at a time.

    Values below ``width`` are counted in a table, larger ones one by one. In the table the genes
    of a value lie side by side, and rows are counted batch after batch: what a row adds to is then
    a stretch for each of the small values, which stay in the cache, where else every count would be
    another line of memory.
    """

    def __init__(self, n_batches: int, n_vars: int, width: int) -> None:
        self.table = np.zeros((n_batches, width, n_vars), np.uint32)
        self._keys = np.empty(0, np.int64)
        self._times = np.empty(0, np.int64)
        self._waiting: list[npt.NDArray[np.int64]] = []
        self._n_waiting = 0
        self.given_up = False

    @property
    def nbytes(self) -> int:
        """Memory it takes at most."""
        return self.table.nbytes + _LARGE_BYTES

    def add(
        self,
        indptr: npt.NDArray[np.int64],
        indices: npt.NDArray[Any],
        data: npt.NDArray[Any],
        codes: npt.NDArray[np.int32],
    ) -> None:
        """Count the values of rows, each in the batch of its code."""
        if self.given_up:
            return
        order = np.argsort(codes, kind="stable")
        large = _tally(indptr, indices, data, codes, order, self.table)
        self._waiting.append(large)
        self._n_waiting += len(large)
        if self._n_waiting > _MOST:
            self._settle()

    def _settle(self) -> None:
        keys, times = np.unique(
            np.concatenate([*self._waiting, self._keys[:0]]), return_counts=True
        )
        both = np.concatenate([self._keys, keys])
        self._keys, place = np.unique(both, return_inverse=True)
        sums = np.zeros(len(self._keys), np.int64)
        np.add.at(sums, place, np.concatenate([self._times, times]))
        self._times, self._waiting, self._n_waiting = sums, [], 0
        if len(self._keys) > _MOST:  # values so diverse that a second pass is cheaper
            self.given_up = True
            self._keys, self._times = self._keys[:0], self._times[:0]

    def large(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Batch and gene (as one number), value, and how often, of the values not in the table."""
        self._settle()
        return self._keys >> 32, self._keys & 0xFFFFFFFF, self._times


def sums(tallies: Sequence[Tally], clip: Floats | None) -> list[Floats]:
    """What :func:`atlas.store.statistics.gene_statistics` sums, from values counted.

    Parameters
    ----------
    tallies
        Of the same batches and genes.
    clip
        float64, (n_batches, n_vars), or None.

    Returns
    -------
    list of float64, (n_batches, n_vars)
        Sums and sums of squares; or, with ``clip``, number, sums and sums of squares of the values
        above it. All are whole numbers, exact below 2^53.
    """
    n_batches, width, n_vars = tallies[0].table.shape
    powers = (1, 2) if clip is None else (0, 1, 2)
    values = np.arange(width, dtype=np.float64)
    out = [np.zeros((n_batches, n_vars)) for _ in powers]
    for batch in range(n_batches):
        times = np.zeros((width, n_vars))
        for tally in tallies:
            times += tally.table[batch]
        if clip is not None:
            times[values[:, None] <= clip[batch]] = 0
        for total, power in zip(out, powers, strict=True):
            total[batch] = values**power @ times
    for tally in tallies:
        places, large, often = tally.large()
        if clip is not None:
            above = large > clip.reshape(-1)[places]
            places, large, often = places[above], large[above], often[above]
        for total, power in zip(out, powers, strict=True):
            np.add.at(total.reshape(-1), places, often * large.astype(np.float64) ** power)
    return out


@numba.njit(nogil=True, cache=True)
def _tally(indptr, indices, data, codes, order, table):  # type: ignore[no-untyped-def]
    """Count values by batch, value and column in ``table`` (n_batches, width, n_columns).

    Rows are gone through in ``order``. Returns the values of ``width`` and more, one by one:
    ``(batch * n_columns + column) << 32 | value``.
    """
    width, n_columns = table.shape[1], table.shape[2]
    n_large = 0
    for j in range(indptr[0], indptr[len(indptr) - 1]):
        n_large += data[j] >= width
    large = np.empty(n_large, np.int64)
    at = 0
    for row in order:
        batch = codes[row]
        of_batch = table[batch]
        for j in range(indptr[row], indptr[row + 1]):
            value = np.int64(data[j])
            if value < width:
                of_batch[value, indices[j]] += np.uint32(1)
            else:
                large[at] = ((np.int64(batch) * n_columns + indices[j]) << 32) | value
                at += 1
    return large
