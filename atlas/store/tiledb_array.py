"""The long arrays of a study in TileDB: dense, of one dimension, one fragment for each shard.

A store of the format ``tiledb`` holds ``X/indices.tiledb`` and ``X/data.tiledb`` in place of the
Zarr arrays ``X/indices`` and ``X/data``; row pointers and tables stay as they are. Of the layouts
that TileDB has this one is read several times as fast as a sparse array of two dimensions
(benchmarks/bench_tiledb.py).

TileDB reads what is absent as a fill value. So the names and sizes of all fragments are kept in
``array.json``, which the digests of the study cover, and compared when an array is opened; each
tile carries an MD5, which TileDB compares when it reads the tile.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from atlas import files
from atlas.codecs.chunks import ChunkedArray
from atlas.codecs.recipe import RESTORE
from atlas.codecs.remote import remote_of
from atlas.codecs.remote_array import RemoteArray
from atlas.errors import ConfigError, CorruptStoreError, FormatError
from loaders.selection import Ints
from loaders.source import as_ranges

SUFFIX: Final = ".tiledb"
RECORD: Final = "array.json"
FORMAT, VERSION = "atlas-tiledb-array", 1

_ATTRIBUTE: Final = ""
_DATA: Final = "a0.tdb"
"""The file of a fragment that holds the values of its only attribute."""


def tiledb() -> Any:
    """The package, which is an extra.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    try:
        return import_module("tiledb")
    except ImportError as error:
        raise ConfigError(
            "Stores of the format tiledb need the package tiledb",
            found=error,
            do="pip install 'atlas-trainer[tiledb]'",
        ) from None


_contexts: dict[int, Any] = {}
"""By process. Those of a parent stay referenced in a fork: its threads are not there to be joined
when they would be destroyed."""


def _context() -> Any:
    """TileDB's, of this process. Its queries run in the threads that call them."""
    process = os.getpid()
    if process not in _contexts:
        one = {"sm.compute_concurrency_level": "1", "sm.io_concurrency_level": "1"}
        _contexts[process] = tiledb().Ctx(one)
    return _contexts[process]


def array_folder(matrix: Path, name: str) -> Path:
    """Where ``indices`` or ``data`` of a matrix lies, in either format."""
    folder = matrix / f"{name}{SUFFIX}"
    return folder if folder.is_dir() else matrix / name


def open_array(matrix: Path, name: str) -> ChunkedArray | TileArray:
    """Open ``indices`` or ``data`` of a matrix, in either format, here or by URL."""
    path = array_folder(matrix, name)
    if path.suffix == SUFFIX:
        return TileArray(path)
    remote = remote_of(path)
    return ChunkedArray(path) if remote is None else RemoteArray(path, remote)


class TileArray:
    """One array of a study in TileDB; as :class:`atlas.codecs.chunks.ChunkedArray`.

    Parameters
    ----------
    path
        Folder of the array.

    Raises
    ------
    CorruptStoreError
        A fragment or another file is missing, or is not as long as it was written.
    FormatError
        An array of another schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        record = _read_record(path)
        self._n = int(record["n"])
        self.chunk = int(record["tile"])
        self._check_fragments(record["fragments"])
        self._arrays: dict[int, Any] = {}  # by process, see _contexts
        schema = self._array().schema
        found = (
            schema.sparse,
            [(str(d.dtype), int(d.tile), tuple(map(int, d.domain))) for d in _dims(schema)],
            [(schema.attr(i).name, str(schema.attr(i).dtype)) for i in range(schema.nattr)],
        )
        kind = np.dtype(record["dtype"])
        expected = (
            False,
            [("uint64", self.chunk, (0, max(0, self._n - 1)))],
            [(_ATTRIBUTE, str(kind))],
        )
        if found != expected:
            raise FormatError(
                "A TileDB array has another schema", found=found, expected=expected, path=path
            )
        self.dtype = kind

    def __len__(self) -> int:
        return self._n

    @property
    def why_stepwise(self) -> str:
        """Why it is not read in one compiled call."""
        return "TileDB reads it"

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded tile."""
        return self.chunk * int(self.dtype.itemsize)

    def chunk_sizes(self) -> Iterator[int]:
        """About how many bytes each tile has on disk."""
        n = -(-self._n // self.chunk)
        total = sum(f.stat().st_size for f in self.path.glob(f"__fragments/*/{_DATA}"))
        for k in range(n):
            yield total * (k + 1) // n - total * k // n

    def read(self, starts: int | Ints, stops: int | Ints) -> npt.NDArray[Any]:
        """Elements ``starts`` to ``stops`` (exclusive) of one range or several, checked.

        Raises
        ------
        CorruptStoreError
            A tile is missing, unreadable, or fails its checksum.
        """
        starts, stops = as_ranges(starts, stops)
        if not ((starts >= 0) & (starts <= stops) & (stops <= self._n)).all():
            raise IndexError(f"elements {starts[:5]} to {stops[:5]} of {self._n} in {self.path}")
        some = starts < stops
        starts, stops = starts[some], stops[some]
        if not len(starts):
            return np.empty(0, self.dtype)
        try:
            # TileDB gives ranges in the order of the array, and what lies in two of them once
            if (starts[1:] >= stops[:-1]).all():
                return self._read(starts, stops)
            pairs = zip(starts, stops, strict=True)
            return np.concatenate([self._read(a[None], b[None]) for a, b in pairs])
        except tiledb().TileDBError as error:
            raise CorruptStoreError(
                "A TileDB array of the store cannot be read",
                found=str(error)[:300],
                do=RESTORE,
                path=self.path,
            ) from error

    def _read(self, starts: Ints, stops: Ints) -> npt.NDArray[Any]:
        array = self._array()
        if len(starts) == 1:
            values = array[int(starts[0]) : int(stops[0])]
        else:
            part = tiledb().Subarray(array, ctx=_context())
            part.add_ranges([list(zip(starts.tolist(), (stops - 1).tolist(), strict=True))])
            values = array.read_subarray(part)
        out: npt.NDArray[Any] = values[_ATTRIBUTE] if isinstance(values, dict) else values
        return out

    def _array(self) -> Any:
        process = os.getpid()
        if process not in self._arrays:
            try:
                self._arrays[process] = tiledb().open(str(self.path), "r", ctx=_context())
            except tiledb().TileDBError as error:
                raise CorruptStoreError(
                    "A TileDB array of the store cannot be opened",
                    found=str(error)[:300],
                    do=RESTORE,
                    path=self.path,
                ) from error
        return self._arrays[process]

    def _check_fragments(self, written: dict[str, dict[str, int]]) -> None:
        found = _fragments(self.path)
        for name in sorted(set(written) | set(found)):
            if found.get(name) != written.get(name):
                raise CorruptStoreError(
                    "A fragment of a TileDB array is missing or is not what was written",
                    found=found.get(name, "no such fragment"),
                    expected=written.get(name, "none of this name"),
                    do=RESTORE,
                    path=self.path / "__fragments" / name,
                )


def _dims(schema: Any) -> list[Any]:
    return [schema.domain.dim(i) for i in range(schema.domain.ndim)]


def _fragments(path: Path) -> dict[str, dict[str, int]]:
    """Sizes of the files of each fragment by their names, that of its commit included."""
    out: dict[str, dict[str, int]] = {}
    for folder in (path / "__fragments").glob("*"):
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        commit = path / "__commits" / f"{folder.name}.wrt"
        out[folder.name] = {**sizes, **({"commit": 0} if commit.is_file() else {})}
    return out


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((path / RECORD).read_bytes())
        if record["format"] != FORMAT or record["version"] > VERSION:
            raise FormatError(
                "A TileDB array was written in another format",
                found=f"{record['format']} version {record['version']}",
                expected=f"{FORMAT} version {VERSION}",
                path=path / RECORD,
            )
        record["n"], record["tile"], record["dtype"], record["fragments"]
    except FileNotFoundError:
        raise CorruptStoreError(
            "The record of a TileDB array is missing", do=RESTORE, path=path / RECORD
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(
            "The record of a TileDB array is damaged",
            found=repr(error),
            do=RESTORE,
            path=path / RECORD,
        ) from None
    return record


@dataclass(frozen=True, slots=True)
class Copy:
    """A stretch of a Zarr array to be written into a TileDB array; picklable.

    Attributes
    ----------
    source, target
        Folders of both.
    number, start, stop
        Number of the fragment, and its elements.
    """

    source: Path
    target: Path
    number: int
    start: int
    stop: int


def begin_copy(source: Path, target: Path, shard: int) -> list[Copy]:
    """Make an empty TileDB array for the elements of a Zarr array; what is left to be copied.

    ``shard`` is the number of elements of a fragment.
    """
    db, array = tiledb(), ChunkedArray(source)
    tile = array.chunk_bytes // array.dtype.itemsize
    if target.exists():
        shutil.rmtree(target)
    n = len(array)
    # Zstandard takes a fifth less room here than LZ4 and is read as fast; TileDB's own delta
    # filter takes three times as long to read.
    filters = [db.ByteShuffleFilter(), db.ZstdFilter(1), db.ChecksumMD5Filter()]
    dim = db.Dim("element", domain=(0, max(0, n - 1)), tile=min(tile, max(1, n)), dtype=np.uint64)
    attribute = db.Attr(_ATTRIBUTE, array.dtype, filters=db.FilterList(filters))
    schema = db.ArraySchema(db.Domain(dim), [attribute], sparse=False)
    db.Array.create(str(target), schema, ctx=_context())
    starts = range(0, n, shard)
    return [Copy(source, target, k, a, min(n, a + shard)) for k, a in enumerate(starts)]


def copy(task: Copy) -> int:
    """Copy a stretch; returns its number of elements."""
    values = ChunkedArray(task.source).read(task.start, task.stop)
    # the timestamp only tells fragments apart: none overlaps another
    with tiledb().open(str(task.target), "w", timestamp=task.number + 1, ctx=_context()) as array:
        array[task.start : task.stop] = values
    return len(values)


def finish_copy(source: Path, target: Path) -> None:
    """Record what was written, and take its source away."""
    array = ChunkedArray(source)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "n": len(array),
        "tile": min(array.chunk_bytes // array.dtype.itemsize, max(1, len(array))),
        "dtype": array.dtype.str,
        "fragments": _fragments(target),
    }
    files.sync_tree(target)
    files.write_bytes(target / RECORD, json.dumps(record).encode())
    files.sync_folder(target)
    shutil.rmtree(source)
