"""What the loader needs of its source, and nothing more.

The loader owns this protocol: a store, a file or an array becomes loadable by having these members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Consecutive rows of one source in CSR form.

    Attributes
    ----------
    indptr
        int64, (n_rows + 1,), starting at 0.
    indices
        Column of each value: int32, (nnz,), unique within a row, in any order.
    data
        Counts: float32, (nnz,).
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    data: npt.NDArray[np.float32]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1


@runtime_checkable
class RowSource(Protocol):
    """Rows in a fixed order, readable by range from several threads at once."""

    @property
    def n_obs(self) -> int:
        """Number of rows."""
        ...

    @property
    def n_vars(self) -> int:
        """Number of columns: the width of every minibatch."""
        ...

    @property
    def segments(self) -> tuple[int, ...]:
        """Row at which each segment (study) starts, and ``n_obs`` at the end; blocks never cross."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest that changes whenever rows, columns or their order change."""
        ...

    @property
    def obs_codes(self) -> Mapping[str, npt.NDArray[np.int32]]:
        """Integer codes per row, each int32 (n_obs,); -1 stands for none."""
        ...

    def read_rows(self, start: int, stop: int) -> RowBlock:
        """Read rows ``start`` to ``stop`` (exclusive), which lie in one segment; thread-safe."""
        ...
