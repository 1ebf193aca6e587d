"""Rows into another order, out of core: runs on disk, each sorted, and stretches gathered from all.

A block of input rows is checked, sorted by where its rows go, and written as one *run*. When all
runs are there, the length of every row is known, and any stretch of the sorted rows can be gathered
by itself: it is a contiguous stretch of every run. So both steps are tasks that need nothing of
each other, for any number of workers; and a run that was written outlives an interruption.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import google_crc32c
import numpy as np
import numpy.typing as npt

from atlas import files
from atlas.ingest import kernels
from atlas.store.kernels import hash_rows

_CHECKED_AT_ONCE = 1 << 20
_PLANNED_AT_ONCE = 64
"""Stretches: of each run one search for all of them."""


class Rows(Protocol):
    """Gives rows sorted, checked and renumbered: :meth:`atlas.ingest.CountsSource.tidy`."""

    def __call__(
        self, order: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]: ...


@dataclass(frozen=True, slots=True)
class Run:
    """One run: a file of row lengths (uint32), row hashes (uint64), column indices and values.

    Attributes
    ----------
    first, n_rows
        The rows of the input that are in it.
    nnz
        Values.
    index_type, value_type
        numpy types of indices and values.
    largest
        The largest value; 0 where there is none.
    size, crc32c
        Bytes of the file, and their checksum.
    """

    first: int
    n_rows: int
    nnz: int
    index_type: str
    value_type: str
    largest: float
    size: int
    crc32c: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.first:012d}.run"

    @property
    def indices_at(self) -> int:
        """Byte at which the indices start."""
        return 12 * self.n_rows

    @property
    def values_at(self) -> int:
        """Byte at which the values start."""
        return self.indices_at + self.nnz * np.dtype(self.index_type).itemsize


class RunResult(NamedTuple):
    """A run, and what the ones who plan have to know of its rows, in their sorted order."""

    run: Run
    lengths: npt.NDArray[np.uint32]
    hashes: npt.NDArray[np.uint64]


def checksum(data: Any, start: int = 0) -> int:
    """crc32c of a contiguous array or buffer."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    crc = start
    for at in range(0, len(view), _CHECKED_AT_ONCE):
        crc = google_crc32c.extend(crc, bytes(view[at : at + _CHECKED_AT_ONCE]))
    return crc


def write_run(
    folder: Path,
    first: int,
    destinations: npt.NDArray[np.int64],
    rows: Rows,
    genes: npt.NDArray[np.int32] | None,
) -> RunResult:
    """Sort rows by destination and write them as one run.

    Parameters
    ----------
    folder
        Where.
    first
        Number of the first row, in the order of the input.
    destinations
        int64, (n_rows,): where each row goes.
    rows
        Gives them.
    genes
        Gene of each column, for the hash of each row's counts; hashes are 0 without.
    """
    indptr, indices, data = rows(np.argsort(destinations))
    lengths = np.diff(indptr).astype(np.uint32)
    hashes = (
        np.zeros(len(lengths), np.uint64)
        if genes is None
        else hash_rows(indptr, indices, data, genes)
    )
    parts = [np.ascontiguousarray(part) for part in (lengths, hashes, indices, data)]
    crc = 0
    for part in parts:
        crc = checksum(part, crc)
    largest = data.max(initial=0) if len(data) else 0
    run = Run(
        first,
        len(lengths),
        len(data),
        indices.dtype.str,
        data.dtype.str,
        float(largest),
        sum(part.nbytes for part in parts),
        crc,
    )
    files.write_scratch(folder / run.name, [part.view(np.uint8).data for part in parts])
    return RunResult(run, lengths, hashes)


def read_run(folder: Path, run: Run) -> RunResult | None:
    """A run that was written earlier; None where it is not what was written."""
    crc, size, head = 0, 0, b""
    try:
        with (folder / run.name).open("rb") as file:
            head = file.read(12 * run.n_rows)
            crc, size = checksum(head), len(head)
            while part := file.read(_CHECKED_AT_ONCE):
                crc, size = google_crc32c.extend(crc, part), size + len(part)
    except FileNotFoundError:
        return None
    if (size, crc) != (run.size, run.crc32c):
        return None
    lengths = np.frombuffer(head, np.uint32, run.n_rows)
    hashes = np.frombuffer(head[4 * run.n_rows :], np.uint64, run.n_rows)
    return RunResult(run, lengths, hashes)


class Piece(NamedTuple):
    """A stretch of one run: its file, the bytes at which it starts, its types and its length."""

    path: str
    indices_at: int
    values_at: int
    index_type: str
    value_type: str
    size: int


@dataclass(frozen=True, eq=False)
class Stretch:
    """Elements of the sorted matrix that are gathered together; picklable.

    Attributes
    ----------
    number
        Position among the stretches.
    first_row
        The sorted row that the first element is in.
    pieces
        Stretches of runs, whole rows of them.
    destinations, lengths
        (n_rows,): sorted row and length of each row of the pieces.
    skip, size
        Elements to leave out before the first, and how many to take.
    types
        Of indices and values, as they are wanted.
    """

    number: int
    first_row: int
    pieces: tuple[Piece, ...]
    destinations: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.uint32]
    skip: int
    size: int
    types: tuple[str, str]

    @property
    def n_rows(self) -> int:
        """Rows that it has elements of."""
        return len(self.destinations)

    def gather(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]:
        """Read it: indptr of its rows (cut where it is), indices and values.

        Raises
        ------
        OSError
            A run was cut short.
        """
        indptr = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        indices, values = (np.empty(int(indptr[-1]), kind) for kind in self.types)
        filled = 0
        for piece in self.pieces:
            end = filled + piece.size
            descriptor = os.open(piece.path, os.O_RDONLY)
            try:
                _read(
                    descriptor, piece.path, piece.indices_at, piece.index_type, indices[filled:end]
                )
                _read(descriptor, piece.path, piece.values_at, piece.value_type, values[filled:end])
            finally:
                os.close(descriptor)
            filled = end
        order = np.argsort(self.destinations)
        sorted_indptr = np.empty_like(indptr)
        sorted_indices, sorted_values = np.empty_like(indices), np.empty_like(values)
        kernels.gather_rows(
            indptr, indices, values, order, sorted_indptr, sorted_indices, sorted_values
        )
        inside = slice(self.skip, self.skip + self.size)
        cut = np.clip(sorted_indptr - self.skip, 0, self.size)
        return cut, sorted_indices[inside], sorted_values[inside]


def _read(descriptor: int, path: str, at: int, kind: str, out: npt.NDArray[Any]) -> None:
    stored = out if out.dtype.str == kind else np.empty(len(out), kind)
    view = stored.view(np.uint8).data
    while len(view):
        n = os.preadv(descriptor, [view], at)
        if n == 0:
            raise OSError(f"{path} was cut short")
        view, at = view[n:], at + n
    if stored is not out:
        out[:] = stored


class Runs:
    """All runs of one matrix, and where each sorted row lies.

    It keeps about 28 bytes per row.

    Parameters
    ----------
    folder
        Where the runs are.
    destination
        int64, (n_obs,): row ``i`` of the input becomes row ``destination[i]``; a permutation.

    Raises
    ------
    ValueError
        Where ``destination`` is not a permutation.
    """

    def __init__(self, folder: Path, destination: npt.NDArray[np.int64]) -> None:
        n_rows = len(destination)
        seen = np.zeros(n_rows, np.bool_)
        if n_rows and destination.min() >= 0 and destination.max() < n_rows:
            seen[destination] = True
        if not seen.all():
            raise ValueError("destination is not a permutation of 0 … n_obs - 1")
        self.folder = folder
        self.destination = destination
        self.lengths = np.zeros(n_rows, np.uint32)
        self._runs: dict[int, Run] = {}

    def add(self, result: RunResult) -> npt.NDArray[np.int64]:
        """Take a run; returns the sorted rows it holds, rising."""
        run = result.run
        rows = np.sort(self.destination[run.first : run.first + run.n_rows])
        self.lengths[rows] = result.lengths
        self._runs[run.first] = run
        return rows

    @property
    def nnz(self) -> int:
        """Values of all runs."""
        return sum(run.nnz for run in self._runs.values())

    @property
    def largest(self) -> float:
        """Largest value of all."""
        return max((run.largest for run in self._runs.values()), default=0.0)

    @property
    def value_types(self) -> list[np.dtype[Any]]:
        """Types in which the values of runs are kept."""
        return [np.dtype(run.value_type) for run in self._runs.values()]

    @cached_property
    def indptr(self) -> npt.NDArray[np.int64]:
        """int64, (n_obs + 1,): where each sorted row starts; to be asked for when all are there.

        Raises
        ------
        ValueError
            Where rows are still to come.
        """
        found = sum(run.n_rows for run in self._runs.values())
        if found != len(self.destination):
            raise ValueError(f"{found} rows of the {len(self.destination)} expected")
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def stretches(self, size: int, types: tuple[str, str]) -> Iterator[Stretch]:
        """Cut the sorted values into stretches of ``size``, the last of them shorter."""
        runs = [self._runs[first] for first in sorted(self._runs)]
        rows = [np.sort(self.destination[r.first : r.first + r.n_rows]) for r in runs]
        at_row, at_entry = np.zeros(len(runs), np.int64), np.zeros(len(runs), np.int64)
        total = int(self.indptr[-1])
        all_starts = np.arange(0, total, size)
        for begin in range(0, len(all_starts), _PLANNED_AT_ONCE):
            starts = all_starts[begin : begin + _PLANNED_AT_ONCE]
            stops = np.minimum(starts + size, total)
            first = np.searchsorted(self.indptr, starts, side="right") - 1
            last = np.searchsorted(self.indptr, stops, side="left")
            # Of each run: its rows in each of these stretches, the entry of the first, how many.
            inside, entry, n_entries = [], [], []
            for i, own in enumerate(rows):
                low, high = np.searchsorted(own, first), np.searchsorted(own, last)
                at_entry[i] += int(self.lengths[own[at_row[i] : low[0]]].sum(dtype=np.int64))
                at_row[i] = low[0]
                lengths = self.lengths[own[low[0] : high[-1]]]
                ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
                before, upto = ends[low - low[0]], ends[high - low[0]]
                inside.append([own[a:b] for a, b in zip(low.tolist(), high.tolist(), strict=True)])
                entry.append((at_entry[i] + before).tolist())
                n_entries.append((upto - before).tolist())
            for k, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
                pieces = [
                    self._piece(run, entry[i][k], n_entries[i][k])
                    for i, run in enumerate(runs)
                    if n_entries[i][k]
                ]
                where = np.concatenate([of_run[k] for of_run in inside])
                yield Stretch(
                    begin + k,
                    int(first[k]),
                    tuple(pieces),
                    where,
                    self.lengths[where],
                    start - int(self.indptr[first[k]]),
                    stop - start,
                    types,
                )

    def _piece(self, run: Run, entry: int, size: int) -> Piece:
        """``size`` entries of a run from one on."""
        indices, values = np.dtype(run.index_type), np.dtype(run.value_type)
        return Piece(
            f"{self.folder}/{run.name}",
            run.indices_at + entry * indices.itemsize,
            run.values_at + entry * values.itemsize,
            run.index_type,
            run.value_type,
            size,
        )
