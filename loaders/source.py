"""What the loader needs of its source, and nothing more.

The loader owns this protocol: a store, a file or an array becomes loadable by having these members.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from numba import njit
from scipy.sparse import csr_matrix

from loaders.errors import LoaderError
from loaders.selection import Ints, rows_of

NARROW_MAX = 2**16 - 1
"""Largest column and count of a narrow block."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows of one source in CSR form, wide or narrow.

    Attributes
    ----------
    indptr
        int64, (n_rows + 1,), starting at 0.
    indices
        Column of each value: int32, or uint16 where narrow, (nnz,), unique within a row, in any
        order.
    data
        Counts: float32, or uint16 where narrow, (nnz,).
    """

    indptr: Ints
    indices: npt.NDArray[Any]
    data: npt.NDArray[Any]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @property
    def narrow(self) -> bool:
        """Whether columns and counts are uint16."""
        return self.indices.dtype == np.uint16 and self.data.dtype == np.uint16

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.indptr.nbytes + self.indices.nbytes + self.data.nbytes

    def take(self, rows: Ints) -> RowBlock:
        """Some of the rows, as a block with arrays of its own."""
        lengths = np.diff(self.indptr)[rows]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        indices = np.empty(int(indptr[-1]), self.indices.dtype)
        data = np.empty(int(indptr[-1]), self.data.dtype)
        _take(self.indptr, self.indices, self.data, rows, indptr, indices, data)
        return RowBlock(indptr, indices, data)

    def widened(self) -> RowBlock:
        """The same with int32 columns and float32 counts."""
        return RowBlock(
            self.indptr,
            self.indices.astype(np.int32, copy=False),
            self.data.astype(np.float32, copy=False),
        )


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _take(
    indptr: Ints,
    indices: npt.NDArray[Any],
    data: npt.NDArray[Any],
    rows: Ints,
    new_indptr: Ints,
    new_indices: npt.NDArray[Any],
    new_data: npt.NDArray[Any],
) -> None:
    for i in range(len(rows)):
        begin, to = indptr[rows[i]], new_indptr[i]
        for k in range(new_indptr[i + 1] - to):
            new_indices[to + k] = indices[begin + k]
        for k in range(new_indptr[i + 1] - to):
            new_data[to + k] = data[begin + k]


def joined(blocks: Sequence[RowBlock]) -> RowBlock:
    """Blocks one behind the other, wide if any of them is."""
    if not all(block.narrow for block in blocks):
        blocks = [block.widened() for block in blocks]
    lengths = np.concatenate([np.diff(block.indptr) for block in blocks])
    return RowBlock(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([block.indices for block in blocks]),
        np.concatenate([block.data for block in blocks]),
    )


@runtime_checkable
class RowSource(Protocol):
    """Rows in a fixed order, readable by ranges from several threads at once.

    A source may also have ``read_packed(starts, stops)``, both arrays: the rows of
    :meth:`read_rows`, packed (:class:`loaders.packed.PackedBlock`) or not. The loader reads by it
    all rows but those that it holds for the whole time. If it says ``packed_bytes`` too
    (:class:`loaders.packed.Compact`), and its rows fit in the budget, one rank reads all once.
    """

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

    @property
    def narrow(self) -> bool:
        """Whether every block is narrow: columns and counts below 2^16, as uint16."""
        ...

    @property
    def reading(self) -> str:
        """How rows are read, and why so: a sentence for people."""
        ...

    @property
    def read_overhead(self) -> int:
        """Bytes that one :meth:`read_rows` takes besides twice what it returns."""
        ...

    def count_values(self, starts: Ints, stops: Ints) -> Ints:
        """Values in each range of rows at most, without reading them: int64, (n_ranges,).

        Each range lies in one segment.
        """
        ...

    def read_rows(self, starts: int | Ints, stops: int | Ints) -> RowBlock:
        """Read rows ``starts`` to ``stops`` (exclusive); thread-safe.

        One range, or several at once, which saves much of the price of each: int64, (n_ranges,).
        All lie in one segment. Their rows come one range behind the other.
        """
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
    narrow
        Hold columns and counts as uint16.

    Raises
    ------
    ValueError
        ``narrow``, but a column or count does not fit.
    """

    def __init__(
        self,
        counts: csr_matrix | npt.NDArray[np.generic],
        obs_codes: Mapping[str, npt.ArrayLike] | None = None,
        segments: Sequence[int] | None = None,
        *,
        narrow: bool = False,
    ) -> None:
        matrix = csr_matrix(counts, dtype=np.float32, copy=True)
        matrix.sum_duplicates()
        n_obs, n_vars = matrix.shape
        self._n_obs, self._n_vars = int(n_obs), int(n_vars)
        self._indptr = matrix.indptr.astype(np.int64)
        self._indices: npt.NDArray[Any] = matrix.indices.astype(np.int32)
        self._data: npt.NDArray[Any] = matrix.data
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
        self._narrow = narrow
        if narrow:
            self._indices = self._indices.astype(np.uint16)
            self._data = matrix.data.astype(np.uint16)
            if n_vars > NARROW_MAX + 1 or (self._data != matrix.data).any():
                raise ValueError("columns or counts do not fit in uint16")

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

    @property
    def narrow(self) -> bool:
        """Whether columns and counts are uint16."""
        return self._narrow

    @property
    def reading(self) -> str:
        """How rows are read."""
        return "fast: from memory"

    @property
    def read_overhead(self) -> int:
        """Nothing."""
        return 0

    def count_values(self, starts: Ints, stops: Ints) -> Ints:
        """Values in each range of rows: int64, (n_ranges,)."""
        values: Ints = self._indptr[stops] - self._indptr[starts]
        return values

    def read_rows(self, starts: int | Ints, stops: int | Ints) -> RowBlock:
        """Rows of one range, not copied, or of several, copied one behind the other."""
        starts, stops = as_ranges(starts, stops)
        if len(starts) > 1:
            whole = RowBlock(self._indptr, self._indices, self._data)
            return whole.take(rows_of(starts, stops))
        values = slice(int(self._indptr[starts[0]]), int(self._indptr[stops[0]]))
        indptr = row_pointers(self._indptr, starts, stops)
        return RowBlock(indptr, self._indices[values], self._data[values])


def as_ranges(starts: int | Ints, stops: int | Ints) -> tuple[Ints, Ints]:
    """One range, or several, as arrays: int64, (n_ranges,) each."""
    if isinstance(starts, np.ndarray) and isinstance(stops, np.ndarray):
        return starts, stops
    return np.array([starts], np.int64), np.array([stops], np.int64)


def row_pointers(indptr: Ints, starts: Ints, stops: Ints) -> Ints:
    """The row pointers of ranges of rows that are put one behind the other: int64, from 0."""
    out = np.zeros(int((stops - starts).sum()) + 1, np.int64)
    _row_pointers(indptr, starts, stops, out)
    return out


@njit(cache=True)  # type: ignore[untyped-decorator]
def _row_pointers(indptr: Ints, starts: Ints, stops: Ints, out: Ints) -> None:
    at = 0
    for i in range(len(starts)):
        for row in range(starts[i], stops[i]):
            out[at + 1] = out[at] + indptr[row + 1] - indptr[row]
            at += 1


def segment_of(segments: Sequence[int], starts: Ints, stops: Ints) -> int:
    """The segment in which all of some ranges lie.

    Raises
    ------
    IndexError
        There is none.
    """
    first, last = int(starts.min()), int(stops.max())
    i = bisect.bisect_right(segments, first, hi=len(segments) - 1) - 1
    if i < 0 or last > segments[min(i + 1, len(segments) - 1)] or (starts > stops).any():
        shown = ", ".join(f"{a}:{b}" for a, b in zip(starts[:5], stops[:5], strict=True))
        raise IndexError(f"rows {shown} do not lie in one study of {segments}")
    return i


def checked_segments(source: RowSource) -> tuple[int, ...]:
    """The segments of a source, which must end at its last row."""
    # not isinstance, which would compute every property of the protocol
    if not hasattr(source, "read_rows") or not hasattr(source, "segments"):
        raise LoaderError(
            "this is no source of rows",
            found=type(source).__name__,
            expected="a store, store.select(genes), a projection, or ArraySource(counts)",
            do="open a path with atlas.open_store, wrap a matrix in loaders.ArraySource",
        )
    segments = tuple(int(bound) for bound in source.segments)
    if not segments or segments[-1] != source.n_obs:
        raise LoaderError(
            "the segments of the source do not end at its last row",
            found=segments,
            expected=f"n_obs={source.n_obs} at the end",
        )
    return segments


def checked_codes(source: RowSource) -> dict[str, npt.NDArray[np.int32]]:
    """The codes of a source, which must be one for each row."""
    obs_codes = dict(source.obs_codes)
    for name, codes in obs_codes.items():
        if codes.shape != (source.n_obs,) or codes.dtype != np.int32:
            raise LoaderError(
                f"the codes {name!r} of the source do not fit its rows",
                found=f"{codes.dtype} {codes.shape}",
                expected=f"int32 ({source.n_obs},)",
            )
    return obs_codes
