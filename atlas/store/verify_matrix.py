"""Checking the counts of one study: every chunk of every array, and what the rows must satisfy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from atlas.codecs.chunks import ChunkedArray
from atlas.errors import AtlasError, CorruptStoreError
from atlas.store.tiledb_array import TileArray, open_array

_FINE, _RANGE, _ORDER = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work for a thread.

    Attributes
    ----------
    run
        Does it; gives the faults it finds, and raises none.
    bytes
        Of what it reads, on disk.
    chunks
        Chunks it decodes.
    after
        Called when this task and all before it are done.
    """

    run: Callable[[], list[AtlasError]]
    bytes: int = 0
    chunks: int = 0
    after: Callable[[], list[AtlasError]] = list


def caught(run: Callable[[], object]) -> list[AtlasError]:
    """Run a check; the error that it raises is the fault."""
    try:
        run()
    except AtlasError as error:
        return [error]
    return []


def fault(what: str, path: Path, found: object = None, expected: object = None) -> AtlasError:
    """A fault that a check found; what to do about it follows from the study it is in."""
    return CorruptStoreError(what, found=found, expected=expected, path=path)


class MatrixCheck:
    """Checks of a CSR matrix, as tasks for threads.

    Parameters
    ----------
    folder
        Of the matrix, with ``indptr``, ``indices`` and ``data``.
    n_obs, n_vars
        Its shape.
    nnz
        Values it must have; None takes what ``indptr`` says.
    positive
        Whether a stored value of zero is a fault.
    """

    def __init__(
        self, folder: Path, n_obs: int, n_vars: int, nnz: int | None, *, positive: bool
    ) -> None:
        self._folder = folder
        self._n_obs, self._n_vars, self._nnz = n_obs, n_vars, nnz
        self._positive = positive
        self._starts: npt.NDArray[np.int64] | None = None
        self._edges = np.empty((0, 2), np.int64)

    def tasks(self) -> Iterator[Task]:
        """All checks; row pointers are read while drawing the first."""
        opening = self._open()
        yield Task(lambda: opening, *self._size("indptr"))
        for name in ("indices", "data"):
            try:
                array = open_array(self._folder, name)
            except AtlasError as error:
                found = [error]
                yield Task(lambda found=found: found)  # type: ignore[misc]
                continue
            if self._nnz is not None and len(array) != self._nnz:
                wrong = fault(
                    "An array has another length than the rows need",
                    array.path,
                    f"{len(array):,} values",
                    f"{self._nnz:,}",
                )
                yield Task(lambda wrong=wrong: [wrong])  # type: ignore[misc]
            size = array.chunk_bytes // array.dtype.itemsize
            n_chunks = -(-len(array) // size)
            if name == "indices":
                self._edges = np.full((n_chunks, 2), -1, np.int64)
            for number, n_bytes in enumerate(_bytes_by_chunk(array)):
                span = (number * size, min(len(array), (number + 1) * size))
                last = name == "indices" and number == n_chunks - 1
                yield Task(
                    lambda array=array, number=number, span=span: self._chunk(  # type: ignore[misc]
                        array, number, *span
                    ),
                    n_bytes,
                    1,
                    (lambda size=size: self._joins(size)) if last else list,  # type: ignore[misc]
                )

    def _size(self, name: str) -> tuple[int, int]:
        """Bytes and chunks of an array, as far as they can be told."""
        path = self._folder / name
        shards = [p for p in path.glob("c/*") if p.is_file()]
        try:
            n = -(-len(ChunkedArray(path)) // chunk_size(path))
        except AtlasError:
            n = 0
        return sum(p.stat().st_size for p in shards), n

    def _open(self) -> list[AtlasError]:
        """Read the row pointers; a fault in them leaves the columns checked by range only."""
        path = self._folder / "indptr"
        try:
            array = ChunkedArray(path)
            indptr = _read(array, 0, len(array)).astype(np.int64, copy=False)
        except AtlasError as error:
            return [error]
        out = []
        if len(indptr) != self._n_obs + 1:
            out.append(
                fault(
                    "The row pointers are not as many as the rows",
                    path,
                    f"{len(indptr):,}",
                    f"{self._n_obs + 1:,}",
                )
            )
        elif indptr[0] != 0 or (np.diff(indptr) < 0).any():
            out.append(fault("The row pointers do not rise from 0", path))
        elif self._nnz is not None and indptr[-1] != self._nnz:
            out.append(
                fault(
                    "The row pointers end elsewhere than the manifest says",
                    path,
                    f"{int(indptr[-1]):,} values",
                    f"{self._nnz:,}",
                )
            )
        else:
            self._starts = indptr
            self._nnz = int(indptr[-1])
        return out

    def _chunk(
        self, array: ChunkedArray | TileArray, number: int, start: int, stop: int
    ) -> list[AtlasError]:
        """Decode one chunk and check its values."""
        try:
            values = _read(array, start, stop)
        except AtlasError as error:
            return [error]
        where = f"chunk {number} (elements {start:,} to {stop:,})"
        if array.path.stem == "data":
            if self._positive and not values.all():
                zero = start + int(np.flatnonzero(values == 0)[0])
                return [
                    fault(
                        "A stored count is zero",
                        array.path,
                        f"element {zero:,} in {where}",
                        "counts above zero only",
                    )
                ]
            return []
        starts = self._starts
        kind, at = _check_columns(
            values,
            start,
            np.empty(0, np.int64) if starts is None else starts,
            0 if starts is None else int(np.searchsorted(starts, start, side="right")),
            self._n_vars,
        )
        self._edges[number] = values[0], values[-1]
        if kind == _RANGE:
            return [
                fault(
                    "A column index is out of range",
                    array.path,
                    f"{values[at]} at element {start + at:,} in {where}",
                    f"below {self._n_vars:,}",
                )
            ]
        return [self._falls(array.path, start + at, where)] if kind == _ORDER else []

    def _joins(self, size: int) -> list[AtlasError]:
        """Columns rise across the border of two chunks too, unless a row begins there."""
        if self._starts is None or len(self._edges) < 2:
            return []
        borders = np.arange(1, len(self._edges), dtype=np.int64) * size
        inside = self._starts[np.searchsorted(self._starts, borders)] != borders
        known = (self._edges[1:, 0] >= 0) & (self._edges[:-1, 1] >= 0)
        wrong = np.flatnonzero(inside & known & (self._edges[1:, 0] <= self._edges[:-1, 1]))
        path = self._folder / "indices"
        return [self._falls(path, int(borders[i]), f"chunk {i + 1}") for i in wrong]

    def _falls(self, path: Path, element: int, where: str) -> AtlasError:
        row = "" if self._starts is None else f", row {self._row_of(element):,}"
        return fault(
            "The columns of a row do not rise, or one comes twice",
            path,
            f"element {element:,}{row} in {where}",
            "rising column indices within each row",
        )

    def _row_of(self, element: int) -> int:
        assert self._starts is not None
        return int(np.searchsorted(self._starts, element, side="right")) - 1


def _read(array: ChunkedArray | TileArray, start: int, stop: int) -> npt.NDArray[Any]:
    """Read elements; whatever a decoder raises is a fault of the array."""
    try:
        return array.read(start, stop)
    except AtlasError:
        raise
    except Exception as error:  # decoders raise whatever they like on bytes that are no stream
        raise fault(
            "An array cannot be decoded", array.path, f"{type(error).__name__}: {error}"
        ) from error


def chunk_size(path: Path) -> int:
    """Elements of a chunk, of an array that :class:`ChunkedArray` reads."""
    meta = json.loads((path / "zarr.json").read_bytes())
    return int(meta["codecs"][0]["configuration"]["chunk_shape"][0])


def _bytes_by_chunk(array: ChunkedArray | TileArray) -> Iterator[int]:
    """About how many bytes each chunk has on disk: its share of its shard."""
    if isinstance(array, TileArray):
        yield from array.chunk_sizes()
        return
    path, n_chunks = array.path, -(-len(array) // chunk_size(array.path))
    meta = json.loads((path / "zarr.json").read_bytes())
    per_shard = meta["chunk_grid"]["configuration"]["chunk_shape"][0] // chunk_size(path)
    for first in range(0, n_chunks, per_shard):
        inside = min(per_shard, n_chunks - first)
        file = path / "c" / str(first // per_shard)
        size = file.stat().st_size if file.is_file() else 0
        yield from [size // inside] * (inside - 1)
        yield size - size // inside * (inside - 1)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _check_columns(
    columns: npt.NDArray[Any],
    start: int,
    starts: npt.NDArray[np.int64],
    next_row: int,
    n_vars: int,
) -> tuple[int, int]:
    """Whether columns are in range and rise within rows; what is wrong, and at which of them.

    ``start`` is the element that ``columns`` begins with; ``starts`` are the row pointers, none
    where they are not known, and ``next_row`` the first of them beyond ``start``.
    """
    for i in range(len(columns)):
        if columns[i] >= n_vars:
            return _RANGE, i
    if len(starts) == 0:
        return _FINE, 0
    begin, row = 0, next_row
    while begin < len(columns):
        end = len(columns) if row >= len(starts) else min(len(columns), starts[row] - start)
        for i in range(begin + 1, end):
            if columns[i] <= columns[i - 1]:
                return _ORDER, i
        begin = max(begin, end)
        row += 1
    return _FINE, 0
