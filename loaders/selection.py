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
RowsLike: TypeAlias = "Sequence[Range] | Sequence[int] | npt.ArrayLike | Selection | None"
"""All rows (None), sorted disjoint ranges ``(start, stop)``, a mask bool (n_obs,), or rising row
numbers, int (n,); lists, arrays and pandas Series alike."""


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
        else:
            starts, stops = _read(rows, n_obs)
        kept = starts < stops
        starts, stops = starts[kept].astype(np.int64), stops[kept].astype(np.int64)
        if not len(starts):
            raise LoaderError(
                "no rows to load",
                found=f"a selection without a row, of a source of {n_obs} rows",
                expected="at least one row",
                do="look at the mask, or leave rows out to take all",
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
        starts, stops = self.starts[first:last], self.stops[first:last]
        return rows_of(np.maximum(starts, start), np.minimum(stops, stop))

    def trimmed(self, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
        """Ranges that hold a chosen row each, without what lies outside their chosen rows."""
        first = np.searchsorted(self.stops, starts, side="right")
        last = np.searchsorted(self.starts, stops, side="left") - 1
        return np.maximum(starts, self.starts[first]), np.minimum(stops, self.stops[last])


def rows_of(starts: Ints, stops: Ints) -> Ints:
    """The rows of ranges, one range behind the other: int64."""
    sizes = stops - starts
    ends = np.cumsum(sizes)
    rows: Ints = np.arange(ends[-1] if len(ends) else 0)
    rows += np.repeat(starts - ends + sizes, sizes)
    return rows


def _read(rows: Any, n_obs: int) -> tuple[Ints, Ints]:
    """Starts and stops of what was given as a mask, as row numbers or as ranges."""
    try:
        array = np.asarray(rows)
    except ValueError:  # tuples of different lengths
        array = np.empty(0, object)
    if array.ndim == 1 and array.dtype == bool:
        return _of_mask(array, n_obs)
    if array.size == 0 and array.dtype != object:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if array.ndim == 1 and array.dtype.kind in "iu":
        return _of_positions(array, n_obs)
    if array.ndim == 2 and array.shape[1] == 2 and array.dtype.kind in "iu":
        starts, stops = array.astype(np.int64).T
        _check(starts, stops, n_obs)
        return starts, stops
    raise LoaderError(
        "rows are chosen in a way that is not known",
        found=f"{type(rows).__name__}, as an array {array.dtype} {array.shape}",
        expected=f"a mask bool ({n_obs},), rising row numbers int (n,), or ranges (start, stop)",
        do="give a mask, such as (store.obs()['donor'] == 'D3').to_numpy()",
    )


def _of_mask(mask: npt.NDArray[Any], n_obs: int) -> tuple[Ints, Ints]:
    if mask.shape != (n_obs,):
        raise LoaderError(
            "the mask of rows does not fit the source",
            found=f"shape {mask.shape}",
            expected=f"({n_obs},)",
            do="give one bool for each row of the source, in its order",
        )
    edges = np.flatnonzero(np.diff(mask.view(np.int8), prepend=0, append=0))
    return edges[::2], edges[1::2]


def _of_positions(rows: npt.NDArray[Any], n_obs: int) -> tuple[Ints, Ints]:
    if (np.diff(rows.astype(np.int64)) <= 0).any() or rows[0] < 0 or rows[-1] >= n_obs:
        if len(rows) == n_obs and rows.min() >= 0 and rows.max() <= 1:
            raise LoaderError(
                "the mask of rows is not one of bool",
                found=f"{rows.dtype} ({n_obs},) of zeros and ones",
                expected=f"a mask bool ({n_obs},), or rising row numbers",
                do="give mask.astype(bool)",
            )
        raise LoaderError(
            "row numbers are out of order or out of range",
            found=", ".join(map(str, rows[:5].tolist())) + (", …" if len(rows) > 5 else ""),
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
