"""Reading the long arrays of a study: strict, thread-safe, straight from the shards.

zarr-python fills what is absent with zeros, so a lost file would read as empty cells. Here a chunk
or shard that is missing, short or flipped is an error. What is read is plain Zarr v3 (sharding,
Blosc, pcodec or nothing, crc32c), with ``numcodecs.delta`` in the profiles that say so.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from atlas.codecs import fused
from atlas.codecs.deltas import sum_deltas
from atlas.codecs.recipe import RESTORE, end_bytes, missing, read_recipe
from atlas.errors import CorruptStoreError
from loaders.pool import POOL
from loaders.selection import Ints
from loaders.source import as_ranges

_STORED = "the crc32c stored"
_OPEN = 512
"""Shards of all arrays that stay open; a process may have about a thousand files open."""
_KEPT = 64 * 2**20
"""Bytes of scratch memory that a thread keeps; larger ones are made for the occasion."""

_thread = threading.local()


def _room(name: str, nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory that each thread keeps for what it is decoding: uint8, (nbytes,)."""
    kept: npt.NDArray[np.uint8] | None = getattr(_thread, name, None)
    if kept is None or len(kept) < nbytes:
        kept = np.empty(nbytes, np.uint8)
        if nbytes <= _KEPT:
            setattr(_thread, name, kept)
    return kept[:nbytes]


class _Shard:
    """An open shard; closed when nobody reads from it any more.

    Attributes
    ----------
    descriptor, size
        Of the file.
    tail
        Its end, see :func:`atlas.codecs.recipe.end_bytes`.
    index
        Offset and length of each chunk: uint64, (per_shard, 2).
    address
        Of the index in memory.
    """

    def __init__(self, descriptor: int, size: int, length: int) -> None:
        self.descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self.size = size
        self.tail = os.pread(self.descriptor, length, max(0, self.size - length))
        whole = len(self.tail) == length
        self.index = np.frombuffer(self.tail[4:-4] if whole else b"", "<u8").reshape(-1, 2)
        self.address = self.index.ctypes.data


class _Opened:
    """The shards of an array that are open, which does not change: who reads keeps it alive.

    Attributes
    ----------
    files
        By number.
    table
        As :func:`atlas.codecs.fused.read_ranges` takes it.
    """

    def __init__(self, files: dict[int, _Shard], table: Ints) -> None:
        self.files, self.table = files, table

    def changed(self, number: int, file: _Shard | None) -> _Opened:
        """The same with one shard open, or closed."""
        files, table = {**self.files}, self.table.copy()
        if file is None:
            files.pop(number, None)
            table[number, 0] = -1
        else:
            files[number] = file
            table[number] = file.descriptor, file.size, file.address
        return _Opened(files, table)


_recent: deque[tuple[weakref.ref[ChunkedArray], int]] = deque()
"""Which shards were opened, the last at the end."""


class ChunkedArray:
    """One array of a study, read by ranges of elements from any number of threads.

    Parameters
    ----------
    path
        Folder of the array, with its zarr.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = f"{path}/c/"  # Path costs as much as opening the file
        self._recipe = r = read_recipe(path)
        n_shards = -(-r.n // (r.chunk * r.per_shard))
        self._opened = _Opened({}, np.full((n_shards, 3), -1, np.int64))

    def __len__(self) -> int:
        return self._recipe.n

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements, as stored."""
        return self._recipe.dtype

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return self._recipe.chunk * self._recipe.dtype.itemsize

    @property
    def why_stepwise(self) -> str:
        """Why it is not read in one compiled call; nothing where it is."""
        if not fused.AVAILABLE:
            return fused.WHY_NOT
        return "" if self._recipe.fused else "its profile is 'small'"

    def read(self, starts: int | Ints, stops: int | Ints) -> npt.NDArray[Any]:
        """Elements ``starts`` to ``stops`` (exclusive), checked and decoded.

        One range, or several, int64 (n_ranges,): their elements come one range behind the other.

        Raises
        ------
        CorruptStoreError
            A shard or chunk is missing, short, unreadable, or fails its checksum.
        """
        r = self._recipe
        starts, stops = as_ranges(starts, stops)
        out = POOL.empty(max(0, int((stops - starts).sum())), r.dtype)
        self._read_into(starts, stops, out, self._opened)
        return out

    def _read_into(self, starts: Ints, stops: Ints, out: npt.NDArray[Any], opened: _Opened) -> None:
        if not self.why_stepwise:
            self._read_fused(starts, stops, out, opened)
        else:
            self._read_stepwise(starts, stops, out, opened)

    def _read_fused(
        self, starts: Ints, stops: Ints, out: npt.NDArray[Any], opened: _Opened
    ) -> None:
        r = self._recipe
        raw = _room("raw", 2 * (self.chunk_bytes + fused.OVERHEAD))
        chunk = _room("chunk", self.chunk_bytes).view(r.dtype)
        where = np.zeros(3, np.int64)
        while True:
            status = fused.read_ranges(
                opened.table,
                starts,
                stops,
                r.n,
                r.per_shard,
                raw,
                chunk,
                r.blosc,
                r.delta,
                out,
                where,
            )
            number, first, last = where.tolist()
            if status == fused.FINE:
                return
            if status == fused.CLOSED:
                opened = opened.changed(number, self._open(number))
            elif status == fused.SMALL:
                raw = _room("raw", number)
            elif status == fused.OUTSIDE:
                raise self._outside(starts, stops)
            else:
                file, before = opened.files[number], number * r.per_shard
                index = file.index[first - before : last + 1 - before]
                raise self._fault(status, self._shard_path(number), file, first, index)

    def _outside(self, starts: Ints, stops: Ints) -> IndexError:
        return IndexError(f"elements {starts[:5]} to {stops[:5]} of {len(self)} in {self.path}")

    def _read_stepwise(
        self, starts: Ints, stops: Ints, out: npt.NDArray[Any], opened: _Opened
    ) -> None:
        r = self._recipe
        at = 0
        if not ((starts >= 0) & (starts <= stops) & (stops <= r.n)).all():
            raise self._outside(starts, stops)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            if start == stop:
                continue
            first, last = start // r.chunk, (stop - 1) // r.chunk
            for shard in range(first // r.per_shard, last // r.per_shard + 1):
                low = max(first, shard * r.per_shard)
                high = min(last, (shard + 1) * r.per_shard - 1)
                begin = max(start, low * r.chunk)
                n = min(stop, (high + 1) * r.chunk) - begin
                file = opened.files.get(shard) or self._open(shard)
                skip = begin - low * r.chunk
                self._read_shard(file, shard, low, high, skip, out[at : at + n])
                at += n

    def _read_shard(
        self, file: _Shard, shard: int, low: int, high: int, skip: int, out: npt.NDArray[Any]
    ) -> None:
        """Decode chunks ``low`` to ``high`` (inclusive, numbered over the array) of one shard.

        All elements of them but the first ``skip``, and as many as ``out`` holds.
        """
        r = self._recipe
        path = self._shard_path(shard)
        index = file.index[low - shard * r.per_shard : high + 1 - shard * r.per_shard]
        if (index == fused.NO_CHUNK).any():
            raise self._fault(fused.ABSENT, path, file, low, index)
        begin = int(index[:, 0].min())
        end = int((index[:, 0] + index[:, 1]).max())
        if end > file.size:
            raise self._fault(fused.SHORT, path, file, low, index)
        try:
            data = memoryview(os.pread(file.descriptor, end - begin, begin))
        except OSError as error:
            raise self._unreadable(path, error) from error
        if len(data) != end - begin:
            raise self._fault(fused.SHORT, path, file, low, index)
        at = 0
        for number, (offset, length) in enumerate(index.tolist(), start=low):
            n = min(r.chunk - skip, len(out) - at)
            stored = data[offset - begin : offset - begin + length]
            self._decode(stored, path, number, skip, out[at : at + n])
            at, skip = at + n, 0

    def _shard_path(self, shard: int) -> str:
        return f"{self._folder}{shard}"

    def _fault(
        self, status: int, path: str, file: _Shard, low: int, index: npt.NDArray[np.uint64]
    ) -> CorruptStoreError:
        """The error that a status of :mod:`atlas.codecs.fused` stands for."""
        if status == fused.ABSENT:
            return missing(Path(path), "A chunk is missing from a shard of the store")
        if status == fused.UNREADABLE:
            try:  # the compiled call does not say why
                os.pread(file.descriptor, int(index[:, 1].max()), int(index[:, 0].min()))
            except OSError as error:
                return self._unreadable(path, error)
            return self._unreadable(path, OSError(errno.EIO, os.strerror(errno.EIO)))
        if status == fused.SHORT:
            size = min(file.size, os.fstat(file.descriptor).st_size)  # which may have changed
            end = int((index[:, 0] + index[:, 1]).max())
            return self._flipped(path, f"{size} bytes", f"at least {end} bytes")
        number = low + status - fused.FLIPPED
        return self._flipped(path, f"another checksum in chunk {number}", _STORED)

    def _decode(
        self, data: memoryview, path: str, number: int, skip: int, out: npt.NDArray[Any]
    ) -> None:
        """Decode the elements of a chunk from ``skip`` on into ``out``."""
        r = self._recipe
        body = bytes(data[:-4])
        if google_crc32c.value(body) != int.from_bytes(data[-4:], "little"):
            raise self._flipped(path, f"another checksum in chunk {number}", _STORED)
        whole = len(out) == r.chunk
        # A part of a chunk goes through scratch memory that the thread keeps.
        chunk = out if whole else _room("chunk", r.chunk * r.dtype.itemsize).view(r.dtype)
        try:
            r.decompress(body, chunk)
        except (ValueError, RuntimeError) as error:
            found = f"chunk {number}, which cannot be decoded: {error}"
            raise self._flipped(path, found, f"{r.chunk} elements") from error
        if r.delta:
            sum_deltas(chunk, skip, out)
        elif not whole:
            out[:] = chunk[skip : skip + len(out)]

    def _open(self, shard: int) -> _Shard:
        """A shard that is open, or is opened now; the last :data:`_OPEN` stay so.

        What is open goes on being read if another file takes its place.
        """
        # No lock: a fork could leave it taken for ever. At worst a file is opened twice.
        known = self._opened.files.get(shard)
        if known is not None:
            return known
        path, length = self._shard_path(shard), end_bytes(self._recipe.per_shard)
        try:
            opened = self._load(path, length)
        except FileNotFoundError:
            raise missing(Path(path), "A shard of the store is missing") from None
        except OSError as error:
            raise self._unreadable(path, error) from error
        if len(opened.tail) < length:
            raise self._flipped(path, f"{opened.size} bytes", f"at least {length} bytes")
        if google_crc32c.value(opened.tail[4:-4]) != int.from_bytes(opened.tail[-4:], "little"):
            raise self._flipped(path, "another checksum in its index", _STORED)
        if own := self._recipe.shards:
            found = opened.size, google_crc32c.value(opened.tail)
            if shard >= len(own) or found != own[shard]:
                raise self._flipped(path, "a file that was not written here", "the one that was")
        self._opened = self._opened.changed(shard, opened)
        _recent.append((weakref.ref(self), shard))
        while len(_recent) > _OPEN:
            with suppress(IndexError):  # other threads may be faster
                of, oldest = _recent.popleft()
                array = of()
                if array is not None:
                    array._opened = array._opened.changed(oldest, None)
        return opened

    def _load(self, path: str, length: int) -> _Shard:
        """Open a shard whose end has ``length`` bytes."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return _Shard(descriptor, os.fstat(descriptor).st_size, length)

    def _unreadable(self, path: str, error: OSError) -> CorruptStoreError:
        return CorruptStoreError(
            "A shard of the store cannot be read",
            found=str(error),
            do="check the disk, then " + RESTORE,
            path=path,
        )

    def _flipped(self, path: str, found: str, expected: str) -> CorruptStoreError:
        return CorruptStoreError(
            "A shard of the store is damaged",
            found=found,
            expected=expected,
            do=RESTORE,
            path=path,
        )


def read_all(path: Path) -> npt.NDArray[Any]:
    """A whole array."""
    array = ChunkedArray(path)
    return array.read(0, len(array))
