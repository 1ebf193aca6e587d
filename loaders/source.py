"""What the loader needs of its source, and nothing more.

The loader owns this protocol: a store, a file or an array becomes loadable by having these members.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix


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
        """Row at which each segment (study) starts, and ``n_obs`` at the end; no block crosses."""
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


class ArraySource:
    """A matrix in memory as a source of rows.

    Parameters
    ----------
    counts
        Sparse or dense matrix (n_obs, n_vars) of counts.
    obs_codes
        Integer codes per row by name, (n_obs,) each; by default none.
    segments
        Row at which each segment starts, and ``n_obs`` at the end; by default one segment.
    """

    def __init__(
        self,
        counts: csr_matrix | npt.NDArray[np.generic],
        obs_codes: Mapping[str, npt.ArrayLike] | None = None,
        segments: Sequence[int] | None = None,
    ) -> None:
        matrix = csr_matrix(counts, dtype=np.float32, copy=True)
        matrix.sum_duplicates()
        n_obs, n_vars = matrix.shape
        self._n_obs, self._n_vars = int(n_obs), int(n_vars)
        self._indptr = matrix.indptr.astype(np.int64)
        self._indices = matrix.indices.astype(np.int32)
        self._data: npt.NDArray[np.float32] = matrix.data
        self._segments = (0, self._n_obs) if segments is None else tuple(map(int, segments))
        self._obs_codes = {
            name: np.array(codes, dtype=np.int32) for name, codes in (obs_codes or {}).items()
        }
        digest = hashlib.sha256(repr((self._n_obs, self._n_vars, self._segments)).encode())
        for array in (self._indptr, self._indices, self._data):
            digest.update(array.tobytes())
        for name, codes in sorted(self._obs_codes.items()):
            digest.update(name.encode() + codes.tobytes())
        self._fingerprint = digest.hexdigest()

    @property
    def n_obs(self) -> int:
        """Number of rows."""
        return self._n_obs

    @property
    def n_vars(self) -> int:
        """Number of columns."""
        return self._n_vars

    @property
    def segments(self) -> tuple[int, ...]:
        """Row at which each segment starts, and ``n_obs`` at the end."""
        return self._segments

    @property
    def fingerprint(self) -> str:
        """A digest of all that the source holds."""
        return self._fingerprint

    @property
    def obs_codes(self) -> Mapping[str, npt.NDArray[np.int32]]:
        """Integer codes per row, each int32 (n_obs,)."""
        return self._obs_codes

    def read_rows(self, start: int, stop: int) -> RowBlock:
        """Rows ``start`` to ``stop`` (exclusive), not copied."""
        indptr = self._indptr[start : stop + 1]
        values = slice(indptr[0], indptr[-1])
        return RowBlock(indptr - indptr[0], self._indices[values], self._data[values])
