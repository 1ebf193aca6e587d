"""The rows of an index: given whole, or part after part; in memory, or in a file that is mapped."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Self

import numpy as np

from atlas.errors import ConfigError
from atlas.evaluation.vectors import LARGEST_FLOAT, Embedding, RowDigest, check_values, tiles
from atlas.evaluation.vectors import digest as digest_of


class Spool:
    """Rows in the order they came, checked, with their digest.

    Parameters
    ----------
    n_dimensions
        Columns of the rows.
    folder
        Keep them in a file there, which has no name and is gone with the spool; None for memory.
    """

    def __init__(self, n_dimensions: int, folder: Path | None = None) -> None:
        self.n_dimensions = n_dimensions
        # open as long as the spool, or an array of its rows, is there
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._parts: list[Embedding] = []
        self._n = 0
        self._digest = RowDigest(n_dimensions)
        self._given: Embedding | None = None
        self._given_digest = ""

    @classmethod
    def of(cls, rows: Embedding, digest: str | None = None) -> Self:
        """Rows that are there, kept by reference until others come after them.

        Parameters
        ----------
        rows
            float32 (n, d), which may be a mapped file.
        digest
            Theirs, where it is known.
        """
        spool = cls(rows.shape[1])
        spool._given, spool._n = rows, len(rows)
        spool._given_digest = digest_of(rows) if digest is None else digest
        return spool

    def append(self, rows: Embedding) -> None:
        """Take in rows: float32 (n, d)."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.n_dimensions:
            raise ConfigError(
                "these rows do not fit the index",
                found=f"shape {rows.shape}",
                expected=f"(n, {self.n_dimensions})",
            )
        check_values(rows, "the array of rows to index", LARGEST_FLOAT)
        if self._given is not None:
            given, self._given, self._n = self._given, None, 0
            for part in tiles(len(given)):
                self.append(given[part])
        self._digest.update(rows)
        self._n += len(rows)
        if self._file is None:
            self._parts.append(rows)
        else:
            self._file.seek(0, os.SEEK_END)  # an array that was mapped has moved the position
            self._file.write(rows.data)
            self._file.flush()

    def __len__(self) -> int:
        return self._n

    @property
    def digest(self) -> str:
        """Digest of all rows, as :func:`atlas.evaluation.vectors.digest` gives it."""
        return self._digest.hexdigest() if self._given is None else self._given_digest

    def array(self) -> Embedding:
        """All rows: float32 (N, d); mapped from the file where there is one."""
        if self._given is not None:
            return self._given
        shape = (self._n, self.n_dimensions)
        if self._file is not None and self._n:
            return np.memmap(self._file, dtype=np.float32, mode="r", shape=shape)
        if len(self._parts) != 1:
            parts = [np.empty((0, self.n_dimensions), dtype=np.float32), *self._parts]
            self._parts = [np.concatenate(parts)]
        return self._parts[0]
