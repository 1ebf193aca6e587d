"""Training, validation and test cells as ranges of the row hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Split:
    """Rows for training, validation and test, each as (start, stop) ranges of the store."""

    train: list[tuple[int, int]]
    validation: list[tuple[int, int]]
    test: list[tuple[int, int]]


def split_rows(
    segments: Sequence[int],
    hashes: Sequence[npt.NDArray[np.uint64]],
    validation: float,
    test: float,
) -> Split:
    """Hold out the lowest hashes for validation and the highest for test.

    Parameters
    ----------
    segments
        Row at which each study starts, and the number of rows at the end.
    hashes
        Row hashes of each study, rising: uint64, (n_obs of the study,).
    validation, test
        Shares of the cells to hold out.

    Raises
    ------
    ConfigError
        The shares are negative, or leave nothing to train on.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise ConfigError(
            "The shares held out are out of range",
            found=f"validation {validation}, test {test}",
            expected="each at least 0, together below 1",
        )
    low, high = int(validation * 2**64), min(int((1 - test) * 2**64), 2**64 - 1)
    out = Split([], [], [])
    for (start, stop), own in zip(pairwise(segments), hashes, strict=True):
        cut = start + int(np.searchsorted(own, np.uint64(low)))
        end = start + int(np.searchsorted(own, np.uint64(high))) if test else stop
        for ranges, a, b in (
            (out.validation, start, cut),
            (out.train, cut, end),
            (out.test, end, stop),
        ):
            if a < b:
                ranges.append((a, b))
    return out


def ranges_of(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The rows of a mask, bool (n_obs,), as ranges (start, stop)."""
    edges = np.flatnonzero(np.diff(mask.view(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
