"""Rows of an embedding, in memory or mapped from a file: their mean, digest and checks by tiles."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError, ModelError

Embedding = npt.NDArray[np.float32]
"""float32 (N, d); a memory-mapped array will do, as it is read by tiles."""

Distances = npt.NDArray[np.float32] | npt.NDArray[np.float64]
"""Of neighbours, (n, k): float64 as they are found here, float32 as others may have them."""

LARGEST_VALUE = 1e18  # its square still fits float32
LARGEST_FLOAT = float(np.finfo(np.float32).max)
IN_MEMORY = 256 * 2**20
_TILE_ROWS = 65536


def tiles(n: int, size: int = _TILE_ROWS) -> Iterator[slice]:
    """Slices of ``size`` rows that cover ``n``."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def rows_of(values: Embedding, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Embedding:
    """Some rows: float32 (n, d); above 256 MiB mapped from a temporary file without a name."""
    if rows.dtype == bool:
        rows = np.flatnonzero(rows)
    if 4 * len(rows) * values.shape[1] <= IN_MEMORY:
        return values[rows]
    with tempfile.TemporaryFile() as file:
        out = np.memmap(file, np.float32, "w+", shape=(len(rows), values.shape[1]))
    for part in tiles(len(rows)):
        out[part] = values[rows[part]]
    return out


def check_values(values: Embedding, what: str, largest: float = LARGEST_VALUE) -> None:
    """Refuse values that are not finite, or too large: whose squares overflow float32.

    Parameters
    ----------
    values
        float32, (N, d).
    what
        Whose they are, as the error says it: ``"the embedding 'scvi'"``.
    largest
        From which on they are too large; :data:`LARGEST_FLOAT` where no float32 is.

    Raises
    ------
    ModelError
        With the number of such values and the first row that has one.
    """
    bad, first = 0, -1
    for rows in tiles(len(values)):
        # "not <=" is true for NaN too
        wrong = ~(np.abs(values[rows]) <= largest)
        if wrong.any():
            bad += int(np.count_nonzero(wrong))
            first = first if first >= 0 else rows.start + int(wrong.any(axis=1).argmax())
    if bad:
        raise ModelError(
            f"{what} has values that are not finite, or are too large",
            found=f"{bad:,} of {values.size:,} values, the first in row {first:,}",
            expected=f"finite values up to {largest:g}",
            do="make it again; of a model whose loss diverged, look at the training log first",
        )


def column_means(values: Embedding) -> npt.NDArray[np.float64]:
    """Mean of each column, summed in float64 by tiles of fixed size: float64 (d,)."""
    total = np.zeros(values.shape[1])
    for rows in tiles(len(values)):
        total += values[rows].sum(axis=0, dtype=np.float64)
    return total / max(len(values), 1)


def centred(values: Embedding, centre: npt.NDArray[np.float64]) -> Embedding:
    """``values - centre``, subtracted in float64 and rounded once: float32."""
    out = np.empty(values.shape, dtype=np.float32)
    for rows in tiles(len(values)):
        out[rows] = values[rows] - centre
    return out


class RowDigest:
    """SHA-256 of the shape and bytes of rows that come one part after another.

    How the rows were cut into parts does not matter.
    """

    def __init__(self, n_dimensions: int) -> None:
        self._hash = hashlib.sha256(f"float32 rows of {n_dimensions}\n".encode())
        self._n = 0

    def update(self, rows: Embedding) -> None:
        """Take in more rows: float32 (n, d)."""
        self._hash.update(np.ascontiguousarray(rows, dtype="<f4").data)
        self._n += len(rows)

    def hexdigest(self) -> str:
        """Digest of all rows so far."""
        final = self._hash.copy()
        final.update(f"{self._n} rows".encode())
        return final.hexdigest()


def digest(values: Embedding) -> str:
    """Digest of an embedding, as :class:`RowDigest` gives it."""
    if values.ndim != 2:
        raise ConfigError("this is no embedding", found=f"shape {values.shape}", expected="(N, d)")
    found = RowDigest(values.shape[1])
    for rows in tiles(len(values)):
        found.update(values[rows])
    return found.hexdigest()
