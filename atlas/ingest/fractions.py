"""Values with fractions: whether rounding makes counts of them."""

from __future__ import annotations

import warnings
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from atlas.errors import InputError
from atlas.ingest.content import OpenMatrix

_LOG_RANGE: Final = 25.0
"""Above every logarithm, natural or binary, of a count or of a count per million."""

_NEAR: Final = 0.05
"""How near to a whole number an estimated count is that only arithmetic has moved from it."""

_MOVED: Final = 0.05
"""Share of the counts from which on rounding is warned of."""


def sample_of(matrix: OpenMatrix) -> npt.NDArray[np.float64] | None:
    """Values from all over a matrix; None where it is damaged or holds no numbers."""
    try:
        values: npt.NDArray[np.float64] = matrix().sample().astype(np.float64)
    except InputError:
        return None
    return values


def are_estimates(values: npt.NDArray[np.float64] | None) -> bool:
    """Whether values could be estimated counts: mostly near whole numbers, or too large for logs.

    Estimates of transcripts or of ambient RNA have fractions, and rounding is what is done with
    them; logarithms and shares have fractions too, and are no counts when rounded.
    """
    if values is None or not (np.isfinite(values).all() and (values >= 0).all()):
        return False
    values = values[values > 0]
    if not len(values):
        return False
    near = np.abs(values - np.rint(values)) < _NEAR
    return bool(near.mean() >= 0.5 or values.max() > _LOG_RANGE)


def warn_of_rounding(values: npt.NDArray[np.float64] | None, name: str) -> None:
    """Warn where rounding moves a sample by more than a twentieth of its sum."""
    if values is None or not (np.isfinite(values).all() and values.sum() > 0):
        return  # reading says what is wrong with them
    moved = float(np.abs(values - np.rint(values)).sum() / values.sum())
    if moved > _MOVED:
        warnings.warn(
            f"Rounding moves the counts of {name} by {moved:.0%} of their sum, in a sample; if "
            "they are normalised, or logarithms, rounding makes no counts of them, and a model of "
            "counts does not fit",
            UserWarning,
            stacklevel=2,
        )


def looks_like_counts(matrix: OpenMatrix) -> bool:
    """Whether a sample of the values could be raw counts."""
    values: npt.NDArray[Any] | None = sample_of(matrix)
    return bool(
        values is not None
        and values.any()
        and np.isfinite(values).all()
        and (values >= 0).all()
        and (values < 2**32).all()
        and (values == np.rint(values)).all()
    )
