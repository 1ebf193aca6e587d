"""Memory of arrays that nobody holds any more, kept for those that come next.

Fresh memory is handed out by the kernel page by page, each filled with zeros first: with 15 kB a
row that was a quarter of all work. Memory goes back when the last view of an array is gone, never
before, so an array that was handed out is not changed afterwards.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_SMALL: Final = 2**16
"""Bytes below which ``malloc`` has no need of help."""
ROUNDING: Final = 1 / 16
"""Share of an array that its memory may be larger, so that another fits in it later."""


class Pool:
    """Keeps memory of arrays for others, while somebody has reserved bytes for arrays.

    What is kept and what is in arrays stays together within the bytes reserved; arrays that take
    more are made all the same, and nothing is kept then.
    """

    def __init__(self) -> None:
        self._limit = 0
        self._in_arrays = 0
        self._idle_bytes = 0
        # by size, the size asked for last at the end
        self._idle: OrderedDict[int, list[npt.NDArray[np.uint8]]] = OrderedDict()
        self.renew_lock()

    def renew_lock(self) -> None:
        """Forget who holds the lock: in a fork they are gone."""
        # Reentrant, because a collection inside these methods may give memory back.
        self._lock = threading.RLock()

    @property
    def idle_bytes(self) -> int:
        """Bytes that are kept and in no array."""
        return self._idle_bytes

    def empty(self, n: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """As ``np.empty(n, dtype)``."""
        kind = np.dtype(dtype)
        nbytes = n * kind.itemsize
        if not self._limit or nbytes < _SMALL:
            return np.empty(n, kind)
        return np.asarray(_Owner(self, self._take(_rounded(nbytes)), n, kind))

    def reserve(self, nbytes: int) -> None:
        """Allow so many bytes more."""
        with self._lock:
            self._limit += nbytes

    def release(self, nbytes: int) -> None:
        """Take back what :meth:`reserve` allowed."""
        with self._lock:
            self._limit -= nbytes
            self._trim()

    def _take(self, size: int) -> npt.NDArray[np.uint8]:
        with self._lock:
            self._in_arrays += size
            slabs = self._idle.get(size)
            if slabs:
                self._idle.move_to_end(size)
                self._idle_bytes -= size
                return slabs.pop()
            self._trim()
        return _fresh(size)

    def give(self, slab: npt.NDArray[np.uint8]) -> None:
        """Memory of an array that is gone."""
        with self._lock:
            self._in_arrays -= len(slab)
            self._idle.setdefault(len(slab), []).append(slab)
            self._idle_bytes += len(slab)
            self._trim()

    def _trim(self) -> None:
        while self._idle_bytes > max(0, self._limit - self._in_arrays):
            size = next(iter(self._idle))
            slabs = self._idle[size]
            if slabs:
                slabs.pop()
                self._idle_bytes -= size
            else:
                del self._idle[size]  # a size that is not asked for any more


_HUGE: Final = 2**21
"""Bytes of a huge page."""


def _fresh(size: int) -> npt.NDArray[np.uint8]:
    """New memory, in huge pages as far as it fills them, where the system has them.

    Rows are copied in no order, from much memory: with pages of 4 kB the processor looks for each.
    """
    if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    # Address space, not memory: what is never touched takes none.
    try:
        room = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory, and numpy says so as all others do
        return np.empty(size, np.uint8)
    whole = np.frombuffer(room, np.uint8)
    start = -whole.ctypes.data % _HUGE
    with suppress(OSError):  # a system may have none
        room.madvise(mmap.MADV_HUGEPAGE, start, size - size % _HUGE)
    return whole[start : start + size]


class _Owner:
    """Holds the memory of one array; numpy keeps it alive as the base of all views."""

    __slots__ = ("__array_interface__", "_pool", "_slab")

    def __init__(
        self, pool: Pool, slab: npt.NDArray[np.uint8], n: int, dtype: np.dtype[Any]
    ) -> None:
        self._pool, self._slab = pool, slab
        self.__array_interface__ = {
            "version": 3,
            "shape": (n,),
            "typestr": dtype.str,
            "data": (slab.ctypes.data, False),
        }

    def __del__(self) -> None:
        self._pool.give(self._slab)


def _rounded(nbytes: int) -> int:
    """Rounded up to five binary digits, so that arrays of about one size share memory."""
    step = max(0, nbytes.bit_length() - 5)
    return -(-nbytes >> step) << step


POOL: Final = Pool()
"""That of the process: what a store reads into, and minibatches."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=POOL.renew_lock)
