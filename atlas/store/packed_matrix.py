"""The rows of one study of a projection, as records: see :mod:`loaders.packed`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

from atlas.codecs.chunks import ChunkedArray, read_all
from loaders.packed import PackedBlock
from loaders.selection import Ints
from loaders.source import row_pointers


class PackedMatrix:
    """Records on disk, read by row range from any number of threads."""

    narrow: Final = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[type[PackedMatrix], tuple[Path]]:
        return PackedMatrix, (self.folder,)  # a worker elsewhere opens it anew

    @functools.cached_property
    def indptr(self) -> Ints:
        """Values before each row: int64, (n_obs + 1,)."""
        return read_all(self.folder / "indptr")

    @functools.cached_property
    def _offsets(self) -> Ints:
        """Bytes before each record: int64, (n_obs + 1,)."""
        return read_all(self.folder / "offsets")

    @functools.cached_property
    def _records(self) -> ChunkedArray:
        return ChunkedArray(self.folder / "records")

    @property
    def why_stepwise(self) -> str:
        """Why it is not read in one compiled call; nothing where it is."""
        return self._records.why_stepwise

    @property
    def read_overhead(self) -> int:
        """Bytes that a read takes besides twice what it returns: chunks at both ends, scratch."""
        return 4 * self._records.chunk_bytes

    @property
    def packed_bytes(self) -> int:
        """Bytes of all rows as :meth:`read` gives them."""
        return len(self._records) + self.indptr.nbytes + self._offsets.nbytes

    def count_values(self, starts: Ints, stops: Ints) -> Ints:
        """Values in each range of rows: int64, (n_ranges,)."""
        values: Ints = self.indptr[stops] - self.indptr[starts]
        return values

    def read(self, starts: Ints, stops: Ints) -> PackedBlock:
        """Rows ``starts`` to ``stops`` (exclusive) of some ranges, as they are on disk.

        Whether they can be unpacked says :func:`loaders.packed.is_packed`.
        """
        return PackedBlock(
            row_pointers(self.indptr, starts, stops),
            row_pointers(self._offsets, starts, stops),
            self._records.read(self._offsets[starts], self._offsets[stops]),
        )
