"""Which rows of a source are gone through, given as ranges, as a mask or as positions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from loaders.errors import LoaderError

Ints: TypeAlias = npt.NDArray[np.int64]
Range: TypeAlias = tuple[int, int]
RowsLike: TypeAlias = "Sequence[Range] | npt.NDArray[Any] | Selection | None"
"""All rows (None), sorted disjoint ranges ``(start, stop)``, a mask bool (n_obs,), or rising row
numbers, int (n,)."""


class Selection:
    """Rows in rising order, kept as disjoint ranges.

    Parameters
    ----------
    rows
        See :data:`RowsLike`.
    n_obs
        Rows of the source.

    Attributes
    ----------
    starts, stops
        int64, (n_ranges,) each: ranges that neither touch nor are empty.

    Raises
    ------
    LoaderError
        The rows do not fit the source, or there are none.
    """

    def __init__(self, rows: RowsLike, n_obs: int) -> None:
        self.n_obs = n_obs
        if isinstance(rows, Selection):
            starts, stops = rows.starts, rows.stops
            _check(starts, stops, n_obs)
        elif rows is None:
            starts, stops = np.array([0]), np.array([n_obs])
        elif isinstance(rows, np.ndarray) and rows.dtype == bool:
            starts, stops = _of_mask(rows, n_obs)
        elif isinstance(rows, np.ndarray) and rows.ndim == 1:
            starts, stops = _of_positions(rows, n_obs)
        else:
            pairs = np.asarray(rows, dtype=np.int64).reshape(-1, 2)
            starts, stops = pairs[:, 0], pairs[:, 1]
            _check(starts, stops, n_obs)
        kept = starts < stops
        starts, stops = starts[kept].astype(np.int64), stops[kept].astype(np.int64)
        if not len(starts):
            raise LoaderError(
                "no rows to load",
                found=f"a selection without a row, of a source of {n_obs} rows",
                expected="at least one row",
            )
        apart = np.flatnonzero(starts[1:] > stops[:-1])
        self.starts: Ints = starts[np.concatenate([[0], apart + 1])]
        self.stops: Ints = stops[np.concatenate([apart, [len(stops) - 1]])]
        self._ends: Ints = np.cumsum(self.stops - self.starts)
        self.n_rows = int(self._ends[-1])

    @property
    def digest(self) -> str:
        """A digest of the rows."""
        return hashlib.sha256(self.starts.tobytes() + self.stops.tobytes()).hexdigest()[:16]

    def before(self, rows: Ints) -> Ints:
        """For each of ``rows``, how many chosen rows lie below it: int64."""
        nearest = np.searchsorted(self.starts, rows, side="left") - 1
        inside = np.minimum(rows, self.stops[nearest]) - self.stops[nearest] + self._ends[nearest]
        return np.where(nearest < 0, 0, inside)

    def between(self, start: int, stop: int) -> Ints:
        """The chosen rows from ``start`` to ``stop`` (exclusive): int64."""
        first = int(np.searchsorted(self.stops, start, side="right"))
        last = int(np.searchsorted(self.starts, stop, side="left"))
        if last - first == 1:  # by far the most common
            return np.arange(max(start, int(self.starts[first])), min(stop, int(self.stops[first])))
        starts = np.maximum(self.starts[first:last], start)
        sizes = np.minimum(self.stops[first:last], stop) - starts
        offsets = np.cumsum(sizes) - sizes
        return np.repeat(starts - offsets, sizes) + np.arange(int(sizes.sum()))

    def trimmed(self, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
        """Ranges that hold a chosen row each, without what lies outside their chosen rows."""
        first = np.searchsorted(self.stops, starts, side="right")
        last = np.searchsorted(self.starts, stops, side="left") - 1
        return np.maximum(starts, self.starts[first]), np.minimum(stops, self.stops[last])


def _of_mask(mask: npt.NDArray[Any], n_obs: int) -> tuple[Ints, Ints]:
    if mask.shape != (n_obs,):
        raise LoaderError(
            "the mask of rows does not fit the source",
            found=f"shape {mask.shape}",
            expected=f"({n_obs},)",
        )
    edges = np.flatnonzero(np.diff(mask.view(np.int8), prepend=0, append=0))
    return edges[::2], edges[1::2]


def _of_positions(rows: npt.NDArray[Any], n_obs: int) -> tuple[Ints, Ints]:
    wrong = rows.dtype.kind not in "iu" or (np.diff(rows.astype(np.int64)) <= 0).any()
    if wrong or (len(rows) and (rows[0] < 0 or rows[-1] >= n_obs)):
        raise LoaderError(
            "row numbers are out of order or out of range",
            found=f"{rows.dtype}, {rows[:5].tolist()} …",
            expected=f"rising whole numbers from 0 to {n_obs - 1}, each once",
            do="sort them, take each once, or give a mask",
        )
    starts = rows.astype(np.int64)
    return starts, starts + 1


def _check(starts: Ints, stops: Ints, n_obs: int) -> None:
    previous = np.concatenate([[0], stops[:-1]])
    wrong = np.flatnonzero((starts < previous) | (stops < starts) | (stops > n_obs))
    if len(wrong):
        at = int(wrong[0])
        raise LoaderError(
            "a row range is out of order or out of range",
            found=f"({starts[at]}, {stops[at]}) after row {previous[at]}",
            expected=f"sorted, disjoint (start, stop) within 0 and {n_obs}",
            do="sort the ranges and join those that overlap",
        )
