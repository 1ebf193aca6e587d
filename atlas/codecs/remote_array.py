"""Arrays of a mirror: what of them is not there yet is fetched before it is read."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atlas.codecs.chunks import ChunkedArray, _Opened, _Shard
from atlas.codecs.remote import Filled, Remote, remote_of
from atlas.errors import CorruptStoreError
from loaders.pool import POOL
from loaders.selection import Ints
from loaders.source import as_ranges


class _FilledShard(_Shard):
    """A shard of a mirror."""

    def __init__(self, filled: Filled, length: int) -> None:
        self.filled = filled
        super().__init__(filled.descriptor, filled.size, length)


class RemoteArray(ChunkedArray):
    """One array of a study in a mirror; as :class:`ChunkedArray`.

    Parameters
    ----------
    path
        Folder of the array, in the mirror.
    remote
        The mirror.
    """

    def __init__(self, path: Path, remote: Remote) -> None:
        super().__init__(path)
        self._known = remote

    @property
    def _remote(self) -> Remote:
        """The mirror, of this process: in a fork nothing is open yet."""
        if self._known.process != os.getpid():
            self._opened = self._none()
            self._known = remote_of(self.path) or self._known
        return self._known

    def _none(self) -> _Opened:
        return _Opened({}, np.full_like(self._opened.table, -1))

    def read(self, starts: int | Ints, stops: int | Ints) -> npt.NDArray[Any]:
        """See :meth:`ChunkedArray.read`.

        Raises
        ------
        CorruptStoreError
            A shard is missing or damaged, or was changed since it was opened.
        RemoteError
            The object store gives no answer, or no leave.
        """
        starts, stops = as_ranges(starts, stops)
        opened = self._fetched(starts, stops)
        out = POOL.empty(max(0, int((stops - starts).sum())), self.dtype)
        try:
            self._read_into(starts, stops, out, opened)
        except CorruptStoreError:  # perhaps only the copy is, after a crash of this machine
            for number in opened.files:
                self._close(number)
                self._remote.forget(self._shard_path(number))
            self._read_into(starts, stops, out, self._fetched(starts, stops))
        return out

    def _fetched(self, starts: Ints, stops: Ints) -> _Opened:
        """The shards that hold the ranges, with all chunks of them there."""
        r, remote, none = self._recipe, self._remote, self._none()
        if not ((starts >= 0) & (starts <= stops) & (stops <= r.n)).all():
            return none  # which reading says
        filled = stops > starts
        bounds = zip(starts[filled] // r.chunk, (stops[filled] - 1) // r.chunk, strict=True)
        chunks = np.unique(np.concatenate([[], *(np.arange(a, b + 1) for a, b in bounds)]))
        chunks = chunks.astype(np.int64)
        numbers = np.unique(chunks // r.per_shard).tolist()
        shards: dict[int, _Shard] = {}

        def open_one(number: int) -> None:
            shards[number] = self._open(number)

        closed = [n for n in numbers if n not in (files := self._opened.files)]
        shards |= {n: files[n] for n in numbers if n in files}
        remote.map(open_one, closed)
        pieces, taken = [], dict.fromkeys(numbers, 0)
        for number in numbers:
            own = chunks[chunks // r.per_shard == number] - number * r.per_shard
            shard = shards[number]
            assert isinstance(shard, _FilledShard)
            found = shard.filled.pieces(shard.filled.missing(own), shard.index)
            taken[number] = sum(piece.stop - piece.start for piece in found)
            pieces += found
        remote.map(lambda piece: piece.shard.fetch(piece), pieces)
        for number in numbers:
            remote.use(self._shard_path(number), taken[number], self._closer(number))
            none = none.changed(number, shards[number])
        return none

    def _open(self, shard: int) -> _Shard:
        try:
            return super()._open(shard)
        except CorruptStoreError:  # perhaps only the copy is
            self._remote.forget(self._shard_path(shard))
            return super()._open(shard)

    def _load(self, path: str, length: int) -> _Shard:
        last = 2
        for attempt in range(last + 1):
            try:
                filled = Filled(self._remote, path, length, self._recipe.per_shard)
                return _FilledShard(filled, length)
            except FileNotFoundError:  # removed by another process, to make room
                if attempt == last:
                    raise
        raise AssertionError

    def _close(self, number: int) -> None:
        self._opened = self._opened.changed(number, None)

    def _closer(self, number: int) -> Callable[[], None]:
        array = weakref.ref(self)

        def close() -> None:
            if (found := array()) is not None:
                found._close(number)

        return close
