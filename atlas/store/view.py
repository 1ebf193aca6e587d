"""The rows of a store over chosen genes: what the loader reads."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from atlas.codecs.remote import READING_THREADS, Remote, remote_of
from atlas.store.kernels import map_columns, select_columns
from atlas.store.zarr_study import ZarrStudy, how_read
from loaders import RowBlock
from loaders.selection import Ints
from loaders.source import NARROW_MAX, as_ranges, segment_of


class CountView:
    """A :class:`loaders.RowSource`: all rows of a store, its columns the chosen genes.

    Parameters
    ----------
    studies
        Readers of the studies, in order.
    columns
        For each study, the store's gene for each of its own columns: int32, -1 for none.
    positions
        The chosen genes: int64 positions in the gene table, -1 for a gene that it does not have.
    n_store_vars
        Genes of the gene table.
    codes
        Gives the integer codes of all rows.
    """

    def __init__(
        self,
        studies: Sequence[ZarrStudy],
        columns: Sequence[npt.NDArray[np.int32]],
        positions: npt.NDArray[np.int64],
        n_store_vars: int,
        codes: Callable[[], Mapping[str, npt.NDArray[np.int32]]],
    ) -> None:
        self._studies = tuple(studies)
        self._positions = positions
        self._codes = codes
        # one column more than genes, so that -1 (no gene) finds -1 at the end
        chosen = np.full(n_store_vars + 1, -1, np.int32)
        there = np.flatnonzero(positions >= 0)
        chosen[positions[there]] = there.astype(np.int32)
        self._tables = tuple(chosen[column] for column in columns)
        self.segments = tuple(
            int(n) for n in np.cumsum([0, *(study.entry.n_obs for study in studies)])
        )

    @property
    def n_obs(self) -> int:
        """Rows of all studies."""
        return self.segments[-1]

    @property
    def n_vars(self) -> int:
        """Chosen genes."""
        return len(self._positions)

    @functools.cached_property
    def _identity(self) -> tuple[bool, ...]:
        """Whether the columns of each study are the chosen genes, in this order."""
        every = np.arange(self.n_vars)
        return tuple(np.array_equal(table, every) for table in self._tables)

    @functools.cached_property
    def narrow(self) -> bool:
        """Whether columns and counts of all studies are uint16."""
        return self.n_vars <= NARROW_MAX + 1 and all(s.counts.narrow for s in self._studies)

    @functools.cached_property
    def _remote(self) -> Remote | None:
        return remote_of(self._studies[0].folder) if self._studies else None

    @property
    def reading_threads(self) -> int | None:
        """How many should read: more than cores where a network is waited for."""
        return None if self._remote is None else READING_THREADS

    @property
    def reading(self) -> str:
        """How rows are read."""
        if (remote := self._remote) is not None:
            size = f"{remote.origin.cache / 1e9:g} GB"
            return f"from {remote.origin.url}, in joined ranges, through a cache of {size} on disk"
        return how_read({s.entry.name: s.counts.why_stepwise for s in self._studies})

    @functools.cached_property
    def read_overhead(self) -> int:
        """Bytes that a read takes besides twice what it returns."""
        return max((study.counts.read_overhead for study in self._studies), default=0)

    @property
    def obs_codes(self) -> Mapping[str, npt.NDArray[np.int32]]:
        """``study``, ``batch`` and ``label`` of every row."""
        return self._codes()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the studies, their rows and order, and the columns."""
        total = hashlib.sha256()
        for study, table in zip(self._studies, self._tables, strict=True):
            entry = study.entry
            digests = [entry.digests[key] for key in sorted(entry.digests)]
            index = [entry.parts["index"].files[key] for key in sorted(entry.parts["index"].files)]
            total.update("\n".join([entry.name, str(entry.n_obs), *digests, *index]).encode())
            total.update(table.astype("<i4").tobytes())
        return total.hexdigest()

    @functools.cached_property
    def presence(self) -> npt.NDArray[np.bool_]:
        """Which study measured which of the genes: bool (n_studies, n_vars)."""
        out = np.zeros((len(self._studies), self.n_vars), bool)
        for row, table in zip(out, self._tables, strict=True):
            row[table[table >= 0]] = True
        return out

    def read_rows(self, starts: int | Ints, stops: int | Ints) -> RowBlock:
        """Rows ``starts`` to ``stops`` (exclusive) of one study, one range or several; thread-safe.

        Raises
        ------
        CorruptStoreError
            A chunk is missing or damaged.
        """
        starts, stops = as_ranges(starts, stops)
        i = segment_of(self.segments, starts, stops)
        offset = self.segments[i]
        counts, table = self._studies[i].counts, self._tables[i]
        indptr, indices, data = counts.read(starts - offset, stops - offset)
        if not counts.narrow or self.n_vars > NARROW_MAX + 1:
            return RowBlock(*map_columns(indptr, indices, data, table))
        if not self._identity[i]:
            indptr = select_columns(indptr, indices, data, table)
            n_values = int(indptr[-1])
            if 4 * n_values < 3 * len(indices):  # else the room is not worth a copy
                indices, data = indices[:n_values].copy(), data[:n_values].copy()
            indices, data = indices[:n_values], data[:n_values]
        return RowBlock(indptr, indices, data)

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Stored values in each range of rows, each of one study: int64, (n_ranges,)."""
        out = np.empty(len(starts), np.int64)
        study_of = np.searchsorted(self.segments, starts, side="right") - 1
        for i in np.unique(study_of).tolist():
            mine, offset = study_of == i, self.segments[i]
            out[mine] = self._studies[i].counts.count_values(
                starts[mine] - offset, stops[mine] - offset
            )
        return out
