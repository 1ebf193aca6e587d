"""Integer codes with their names: how batches, studies and labels reach the measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError

UNLABELED = -1


@dataclass(frozen=True, slots=True)
class Categories:
    """One category per cell.

    Attributes
    ----------
    codes
        Position in ``names``, or -1 for none (an unlabeled cell): int64, (n_cells,).
    names
        Names of the categories; some may have no cell.

    Raises
    ------
    ConfigError
        A code without a name.
    """

    codes: npt.NDArray[np.int64]
    names: tuple[str, ...]

    def __init__(self, codes: npt.ArrayLike, names: Sequence[str]) -> None:
        object.__setattr__(self, "codes", np.asarray(codes, dtype=np.int64))
        object.__setattr__(self, "names", tuple(map(str, names)))
        if self.codes.ndim != 1 or np.any((self.codes < -1) | (self.codes >= len(self.names))):
            raise ConfigError(
                "category codes do not fit their names",
                found=f"shape {self.codes.shape}"
                + (f", {self.codes.min()} to {self.codes.max()}" if self.codes.size else ""),
                expected=f"one code per cell, -1 to {len(self.names) - 1}",
            )

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Categories:
        """The same categories for some of the cells."""
        return Categories(self.codes[rows], self.names)

    def counts(self) -> npt.NDArray[np.int64]:
        """Cells of each category, those without one left out: int64, (n_names,)."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.names)).astype(np.int64)

    def present(self) -> npt.NDArray[np.int64]:
        """Codes that at least one cell has, rising."""
        return np.flatnonzero(self.counts()).astype(np.int64)


def sample_rows(rows: npt.NDArray[np.int64], most: int, seed: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of ``rows``, drawn without replacement by ``seed``, in rising order."""
    if len(rows) <= most:
        return rows
    drawn = np.random.default_rng(seed).choice(len(rows), size=most, replace=False, shuffle=False)
    return np.sort(rows[drawn])
