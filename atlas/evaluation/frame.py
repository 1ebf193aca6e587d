"""Where an embedding is laid to be searched in float32: the one place that knows of its scale."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from atlas.errors import ModelError
from atlas.evaluation.vectors import Embedding, column_means, tiles

Floats = npt.NDArray[np.float64]

_STEP = 64
_LEAST = -192  # for rows that are all at the centre; every other exponent is above
_FARTHEST = 48
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Origin and unit of the points that stand for rows in a float32 search.

    A search compares squares, which float32 holds from 1e-38 to 3e38 only, while rows may have any
    float32 values. So each is laid at ``(row - centre) / 2**exponent``, which is exact but for the
    rounding of the difference. The exponent is a multiple of 64 such that the farthest coordinate
    is within 2^-32 to 2^32, and so 0 for all but an embedding of an odd scale. Distances are
    computed from the rows themselves, in float64, whose squares hold any float32.

    Attributes
    ----------
    centre
        Origin: float64 (d,). Distances do not change when the origin does, but their rounding
        errors grow with the distance from it: 1,000 off the centre, float32 products lose nine
        neighbours in ten.
    exponent
        Of the unit, a power of two.
    """

    centre: Floats
    exponent: int = 0

    @classmethod
    def of(cls, rows: Embedding, centre: Floats | None = None) -> Self:
        """The frame of some rows, float32 (n, d), around their mean or another centre."""
        centre = column_means(rows) if centre is None else centre
        return cls(centre, _exponent(_reach(rows, centre)))

    @property
    def unit(self) -> float:
        """What is 1 in the frame."""
        return 2.0**self.exponent

    def with_rows(self, rows: Embedding) -> Self:
        """The frame of the rows that it is of and of others, around the same centre."""
        return replace(self, exponent=max(self.exponent, _exponent(_reach(rows, self.centre))))

    def reaching(self, queries: Embedding) -> Self:
        """A frame with a unit so large that squares of these do not overflow either."""
        _, highest = math.frexp(_reach(queries, self.centre))
        return replace(self, exponent=max(self.exponent, highest - _FARTHEST))

    def holds(self, queries: Embedding) -> npt.NDArray[np.bool_]:
        """Which of these are not so far that their squares might overflow: bool (n,)."""
        far = np.abs(self.offsets(queries)).max(axis=1, initial=0)
        return np.asarray(far < 2.0**_FARTHEST)

    def offsets(self, rows: Embedding) -> Floats:
        """Where rows are in the frame: float64 (n, d)."""
        out = rows - self.centre
        if self.exponent:
            out /= self.unit
        return out

    def points(self, rows: Embedding) -> Embedding:
        """The same, rounded once: float32 (n, d)."""
        out = np.empty(rows.shape, dtype=np.float32)
        for part in tiles(len(rows)):
            out[part] = self.offsets(rows[part])
        return out


def check_apart(rows: Embedding, what: str) -> None:
    """Refuse rows that are all at one place, or as far apart only as float32 has no digits for.

    Neighbours are then those of the numbers that are there, but these do not tell cells apart: rows
    that coincide come in the order of the file, and of a value below 1.2e-38 float32 keeps fewer
    digits the smaller it is.

    Parameters
    ----------
    rows
        float32, (n, d), finite.
    what
        Whose they are, as the error says it.

    Raises
    ------
    ModelError
        No value is 1.2e-38 off that of the first row.
    """
    apart = 0.0
    for part in tiles(len(rows)):
        found = float(np.abs(rows[part] - rows[0].astype(np.float64)).max(initial=0))
        if not found < SMALLEST_NORMAL:  # NaN too, of which the search tells more
            return
        apart = max(apart, found)
    if apart:
        raise ModelError(
            f"{what} has values so small that float32 has lost their digits",
            found=f"values at most {apart:.3g} apart",
            expected=f"cells that are {SMALLEST_NORMAL:.3g} apart at least",
            do="make it again in another unit: the unit has no say in labels, lost digits have",
        )
    raise ModelError(
        f"{what} has all cells at one place, so none is nearer than another",
        found=f"{len(rows):,} equal rows",
        expected="an embedding that tells cells apart",
        do="look at how it was made: a model whose latent space collapsed gives every cell the "
        "same place",
    )


def _reach(rows: Embedding, centre: Floats) -> float:
    """The largest distance of a coordinate from the centre's."""
    reach = 0.0
    for part in tiles(len(rows)):
        high, low = rows[part].max(axis=0), rows[part].min(axis=0)
        reach = max(reach, float(np.maximum(high - centre, centre - low).max(initial=0)))
    return reach


def _exponent(reach: float) -> int:
    """The multiple of 64 for which ``reach / 2**exponent`` is within 2^-32 to 2^32."""
    _, highest = math.frexp(reach)  # reach < 2**highest
    return (highest + _STEP // 2 - 1) // _STEP * _STEP if reach else _LEAST
