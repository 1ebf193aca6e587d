"""A store by URL: chunks that are fetched when they are read, and kept in a local cache.

What is small is copied into a folder of the same form, the mirror (:mod:`atlas.store.mirror`). The
long arrays come in pieces: a shard is a sparse file of the mirror, as long as the object, in which
those chunks are filled that were asked for; so all that reads shards reads them as it always does.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from atlas.codecs.connection import MARK, PIECE, THREADS, Connection, Origin
from atlas.codecs.fetching import Item
from atlas.errors import FormatError, StoreError
from atlas.files import replace_bytes

READING_THREADS: Final = 8
"""That a loader reads with: they wait more than they work."""
_GAP: Final = 2**17
"""Bytes between two chunks that are read with them rather than asked for apart."""
_ETAG: Final = 256

_T = TypeVar("_T")


class Remote:
    """A mirror and where it comes from; one of each in a process, see :func:`remote_of`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.origin = Origin.read(root)
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._workers: ThreadPoolExecutor | None = None
        # bytes of each shard and how it is closed, the one used last at the end; those that earlier
        # processes left come first
        self._shards: OrderedDict[str, tuple[int, Callable[[], None]]] = OrderedDict(
            (str(path), (path.stat().st_blocks * 512, lambda: None)) for path in self._there()
        )
        self._bytes = sum(size for size, _ in self._shards.values())
        self.requests = self.received = 0
        """Of chunks, by this process."""

    def _there(self) -> list[Path]:
        found = [*self.root.glob("studies/*/X/*/c/*"), *self.root.glob("studies/*/layers/*/*/c/*")]
        found = [path for path in found if path.parent.parent.name in ("indices", "data")]
        return sorted(found, key=lambda path: path.stat().st_mtime)

    @property
    def connection(self) -> Connection:
        """Made at the first request."""
        with self._lock:
            if self._connection is None:
                self._connection = Connection(self.origin)
            return self._connection

    def key(self, path: str | Path) -> str:
        """Of an object, from its place in the mirror."""
        return Path(path).relative_to(self.root).as_posix()

    def map(self, work: Callable[[_T], object], items: Iterable[_T]) -> None:
        """Do it for all, several at a time; the first error is raised."""
        with self._lock:
            if self._workers is None:
                self._workers = ThreadPoolExecutor(THREADS, thread_name_prefix="atlas-remote")
            workers = self._workers
        futures = [workers.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()

    def use(self, path: str, taken: int, close: Callable[[], None]) -> None:
        """Say that a shard is used, and how many bytes came for it; others make room for it."""
        dropped: list[tuple[str, Callable[[], None]]] = []
        with self._lock:
            before, _ = self._shards.pop(path, (0, close))
            self._shards[path] = (before + taken, close)
            self._bytes += taken
            self.received += taken
            while self._bytes > self.origin.cache and len(self._shards) > 1:
                oldest, (size, close_it) = self._shards.popitem(last=False)
                self._bytes -= size
                dropped.append((oldest, close_it))
        for name, close_it in dropped:
            close_it()
            with suppress(FileNotFoundError):
                os.unlink(name)  # noqa: PTH108 - who reads it goes on reading it

    def forget(self, path: str) -> None:
        """Remove what is there of a shard."""
        with self._lock:
            size, _ = self._shards.pop(path, (0, None))
            self._bytes -= size
        with suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108


class Filled:
    """Which chunks of a shard of the mirror are there, kept behind its last byte.

    ``descriptor`` is of the open file, and for whoever takes it to close; ``size`` the object's.

    Parameters
    ----------
    remote
        Of the mirror.
    path
        Of the shard.
    tail
        Bytes of its end, which holds the index.
    chunks
        How many chunks it has.
    """

    def __init__(self, remote: Remote, path: str, tail: int, chunks: int) -> None:
        self._remote, self.path = remote, path
        self._key = remote.key(path)
        item = self._known(chunks)
        if item is not None and item != remote.connection.head(self._key):
            remote.forget(path)
            item = None
        if item is None:
            item = self._begin(tail, chunks)
        self.size, self._etag = item.size, item.etag
        self.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with os.fdopen(os.dup(self.descriptor), "r+b") as file:
                self._flags = np.memmap(file, np.uint8, "r+", item.size + _ETAG, (chunks,))
        except BaseException:
            os.close(self.descriptor)
            raise

    def _known(self, chunks: int) -> Item | None:
        """What an earlier process left."""
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123 - Path costs as much as the file
                size = file.seek(0, 2) - _ETAG - chunks
                file.seek(max(0, size))
                etag = file.read(_ETAG).rstrip(b"\0").decode()
        except (OSError, UnicodeDecodeError):
            return None
        return Item(self._key, size, etag) if size > 0 and etag else None

    def _begin(self, tail: int, chunks: int) -> Item:
        data, item = self._remote.connection.get(self._key, -tail)
        self._remote.requests += 1
        partial = f"{self._remote.root}/.partial-{os.getpid()}-{threading.get_ident()}"
        with open(partial, "wb") as file:  # noqa: PTH123
            file.truncate(item.size + _ETAG + chunks)
            file.seek(max(0, item.size - len(data)))
            file.write(data)
            file.write(item.etag.encode()[:_ETAG].ljust(_ETAG, b"\0"))
        os.makedirs(os.path.dirname(self.path), exist_ok=True)  # noqa: PTH103, PTH120
        os.replace(partial, self.path)  # noqa: PTH105
        return item

    def missing(self, chunks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Those of the chunks that are not there."""
        lacking: npt.NDArray[np.int64] = chunks[self._flags[chunks] == 0]
        return lacking

    def pieces(self, chunks: npt.NDArray[np.int64], index: npt.NDArray[np.uint64]) -> list[Piece]:
        """Requests for chunks, neighbours in one; those outside the object are left out."""
        found = index[chunks].astype(np.int64)
        inside = (found[:, 0] >= 0) & (found[:, 1] > 0) & (found.sum(1) <= self.size)
        chunks, found = chunks[inside], found[inside]
        order = np.argsort(found[:, 0], kind="stable")
        out: list[Piece] = []
        for chunk, (offset, length) in zip(
            chunks[order].tolist(), found[order].tolist(), strict=True
        ):
            stop = offset + length
            last = out[-1] if out else None
            if last is not None and offset - last.stop <= _GAP and stop - last.start <= PIECE:
                out[-1] = Piece(self, last.start, max(last.stop, stop), (*last.chunks, chunk))
            else:
                out.append(Piece(self, offset, stop, (chunk,)))
        return out

    def fetch(self, piece: Piece) -> None:
        """Fill a piece in."""
        data, _ = self._remote.connection.get(self._key, piece.start, piece.stop, self._etag)
        at = piece.start
        try:
            while len(data):
                written = os.pwrite(self.descriptor, data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise StoreError(
                "The cache of a store by URL cannot be written",
                found=str(error),
                do="make room, or open the store with a smaller cache or another cache_folder",
                path=self.path,
            ) from error
        self._flags[list(piece.chunks)] = 1
        self._remote.requests += 1


class Piece(NamedTuple):
    """Bytes of a shard, and the chunks in them."""

    shard: Filled
    start: int
    stop: int
    chunks: Sequence[int]


_remotes: dict[tuple[int, Path], Remote] = {}
"""By process too: what a parent has, has locks that may be taken and threads that are not here."""
_locks: dict[int, threading.Lock] = {}


def adopt(root: Path, origin: Origin) -> Remote:
    """Make a folder the mirror of an origin, or go on with the one that it is."""
    with suppress(FormatError):
        if (known := remote_of(root / MARK)) is not None and known.origin == origin:
            return known
    replace_bytes(root / MARK, origin.to_bytes())
    process = os.getpid()
    with _locks.setdefault(process, threading.Lock()):
        _remotes[process, root] = Remote(root)
        return _remotes[process, root]


def remote_of(path: Path) -> Remote | None:
    """The mirror that a path lies in, if it does; opened anew in a process that does not know it.

    Raises
    ------
    FormatError
        It is damaged.
    """
    process = os.getpid()
    for folder in path.parents:
        if (process, folder) in _remotes:
            return _remotes[process, folder]
        if (folder / MARK).is_file():
            with _locks.setdefault(process, threading.Lock()):
                if (process, folder) not in _remotes:
                    _remotes[process, folder] = Remote(folder)
                return _remotes[process, folder]
    return None
