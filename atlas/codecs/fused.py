"""One compiled call from a file to decoded elements: read, check, decompress, sum deltas.

Every step of it releases the GIL when called from Python, but taking it back costs a thread more
than the step itself where blocks are short (two threads then read no faster than one). Here the GIL
is given up once. The functions called are libc's ``pread``, c-blosc's ``blosc_decompress_ctx`` as
numcodecs carries it, and the processor's CRC-32C instruction; where one of them is absent,
:data:`AVAILABLE` is False, :data:`WHY_NOT` says why, and :mod:`atlas.codecs.chunks` goes the longer
way.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any, Final

import llvmlite.binding
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from atlas.codecs.deltas import sum_deltas
from loaders.addresses import unsigned_at

FINE: Final = 0
UNREADABLE: Final = -1
SHORT: Final = -2
ABSENT: Final = -3
CLOSED: Final = -4
SMALL: Final = -5
OUTSIDE: Final = -6
FLIPPED: Final = 1
"""Statuses; from ``FLIPPED`` on, which of the chunks has a wrong checksum or content, from 0."""

_HEAD: Final = 16
_CHECKSUM: Final = 4
OVERHEAD: Final = _HEAD + _CHECKSUM
"""Bytes by which a stored chunk can be longer than its elements: Blosc's header, and a checksum."""

NO_CHUNK: Final = np.uint64(2**64 - 1)
"""In place of offset and length, in the index of a shard: the chunk is not there."""


def _addresses() -> tuple[int, int, str]:
    """Addresses of pread and of blosc_decompress_ctx, or why there is none."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return 0, 0, f"it is made for Linux on x86-64, not {sys.platform} on {platform.machine()}"
    if not llvmlite.binding.get_host_cpu_features().get("sse4.2", False):
        return 0, 0, "the processor has no CRC-32C instruction"
    try:
        pread = ctypes.CDLL(None).pread
        decompress = ctypes.CDLL(numcodecs.blosc.__file__).blosc_decompress_ctx
    except (OSError, AttributeError) as error:
        return 0, 0, f"numcodecs does not show its c-blosc ({error})"
    cast = ctypes.cast
    return cast(pread, ctypes.c_void_p).value or 0, cast(decompress, ctypes.c_void_p).value or 0, ""


_PREAD, _DECOMPRESS, WHY_NOT = _addresses()
AVAILABLE: Final = bool(_PREAD and _DECOMPRESS)


def read_ranges(
    shards: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    n: int,
    per_shard: int,
    raw: npt.NDArray[np.uint8],
    scratch: npt.NDArray[Any],
    blosc: bool,
    delta: bool,
    out: npt.NDArray[Any],
    where: npt.NDArray[np.int64],
) -> int:
    """Read ranges of elements: neighbouring chunks of a shard in one go, the wanted part of each.

    Parameters
    ----------
    shards
        The shards of the array: int64, (n_shards, 3), each its file descriptor, or -1 where it is
        not open, its size in bytes, and the address of its index. That is the offset and length of
        each chunk in the file, uint64 (per_shard, 2); 2^64 - 1 for none.
    starts, stops
        Of the ranges: int64, (n_ranges,).
    n
        Elements of the array.
    per_shard
        Chunks of a shard.
    raw
        Room for the bytes of all chunks of a range in one shard, and what may lie between.
    scratch
        Room for one decoded chunk, of the elements' type.
    blosc
        Whether chunks are compressed, or lie as they are.
    delta
        Whether the elements are stored as differences.
    out
        Where the elements go, one range behind the other.
    where
        Gets the number of the shard, and of the first and last chunk (inclusive) of what is wrong:
        int64, (3,). Chunks are numbered over the array.

    Returns
    -------
    ``FINE``, or what is wrong. ``CLOSED``: the shard in ``where`` has to be opened; ``SMALL``:
    ``raw`` has to be as large as ``where`` says; ``OUTSIDE``: a range is not one of the array. In
    these cases nothing was read.
    """
    # Sums wrap around, so that a signed type is as well summed as an unsigned one; and floats,
    # which are not stored as differences, need no code of their own.
    kind = np.dtype(f"u{out.itemsize}")
    status: int = _read_ranges(
        _PREAD,
        _DECOMPRESS if blosc else 0,
        shards,
        starts,
        stops,
        n,
        per_shard,
        raw,
        scratch.view(kind),
        delta,
        out.view(kind),
        where,
    )
    return status


def _call(result: Any, *arguments: Any) -> Any:
    """A call of a C function at an address, for compiled code."""

    @intrinsic  # type: ignore[untyped-decorator]
    def call(_: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        signature = result(types.int64, *arguments)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = [context.get_value_type(kind) for kind in signature.args[1:]]
            function = ir.FunctionType(context.get_value_type(signature.return_type), kinds)
            return builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])

        return signature, generate

    return call


# ssize_t pread(int, void *, size_t, off_t); int blosc_decompress_ctx(src, dest, destsize, threads)
_pread = _call(types.int64, types.int32, types.int64, types.uint64, types.int64)
_decompress = _call(types.int32, types.int64, types.int64, types.uint64, types.int32)


@intrinsic  # type: ignore[untyped-decorator]
def _crc_word(_: Any, crc: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64), ir.IntType(64)])
        name = "llvm.x86.sse42.crc32.64.64"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _crc_byte(_: Any, crc: Any, byte: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), ir.IntType(8)])
        name = "llvm.x86.sse42.crc32.32.8"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return types.uint32(types.uint32, types.uint8), generate


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _crc_on(crc: np.uint64, data: npt.NDArray[np.uint8]) -> np.uint32:
    """CRC-32C (Castagnoli) as Zarr v3 defines it, gone on with."""
    words = unsigned_at(np.int64(data.ctypes.data))
    n_words = len(data) // 8
    for k in range(n_words):
        crc = _crc_word(crc, words[k])
    tail = np.uint32(crc)
    for k in range(8 * n_words, len(data)):
        tail = _crc_byte(tail, data[k])
    return np.uint32(tail ^ np.uint32(0xFFFFFFFF))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _first_flipped(raw: npt.NDArray[np.uint8], index: npt.NDArray[np.uint64], begin: int) -> int:
    """The first of some chunks that has not the checksum behind it; as many as there are if none.

    Three at a time: the instruction takes three cycles, and one can begin in each.
    """
    start = np.uint64(0xFFFFFFFF)
    for first in range(0, len(index), 3):
        three = index[first : first + 3]
        x, y, z, n_words = start, start, start, np.int64(0)
        if len(three) == 3:
            n_words = (np.int64(three[:, 1].min()) - _CHECKSUM) // 8
            at = np.int64(raw.ctypes.data) - begin
            a = unsigned_at(at + np.int64(three[0, 0]))
            b = unsigned_at(at + np.int64(three[1, 0]))
            c = unsigned_at(at + np.int64(three[2, 0]))
            for k in range(n_words):
                x = _crc_word(x, a[k])
                y = _crc_word(y, b[k])
                z = _crc_word(z, c[k])
        for k in range(len(three)):
            low = np.int64(three[k, 0]) - begin
            high = low + np.int64(three[k, 1]) - _CHECKSUM
            stored = np.uint32(0)
            for byte in range(_CHECKSUM):
                stored |= np.uint32(raw[high + byte]) << np.uint32(8 * byte)
            crc = x if k == 0 else y if k == 1 else z
            if _crc_on(crc, raw[low + 8 * n_words : high]) != stored:
                return first + k
    return len(index)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _read_chunks(
    pread: int,
    decompress: int,
    descriptor: int,
    size: int,
    index: npt.NDArray[np.uint64],
    raw: npt.NDArray[np.uint8],
    scratch: npt.NDArray[Any],
    skip: int,
    delta: bool,
    out: npt.NDArray[Any],
) -> int:
    begin, end = np.int64(size), np.int64(0)
    for k in range(len(index)):
        if index[k, 0] == NO_CHUNK:
            return ABSENT
        if index[k, 0] > np.uint64(size) or index[k, 1] > np.uint64(size) - index[k, 0]:
            return SHORT
        begin = min(begin, np.int64(index[k, 0]))
        end = max(end, np.int64(index[k, 0] + index[k, 1]))
    if end - begin > len(raw):  # chunks that do not follow each other: one by one
        for k in range(len(index)):
            n = min(len(scratch) - skip, len(out))
            part, one = out[:n], index[k : k + 1]
            if one[0, 1] > len(raw):
                return FLIPPED + k
            status: int = _read_chunks(
                pread, decompress, descriptor, size, one, raw, scratch, skip, delta, part
            )
            if status != FINE:
                return status + k if status == FLIPPED else status
            out, skip = out[n:], 0
        return FINE
    got = np.int64(0)
    while got < end - begin:  # a signal or a network may give less than was asked for
        n = _pread(
            pread,
            np.int32(descriptor),
            np.int64(raw.ctypes.data) + got,
            np.uint64(end - begin - got),
            begin + got,
        )
        if n < 0:
            return UNREADABLE
        if n == 0:
            return SHORT
        got += n
    chunk_bytes = len(scratch) * scratch.itemsize
    at = 0
    for k in range(len(index)):
        length = np.int64(index[k, 1]) - _CHECKSUM
        if length < _HEAD if decompress else length != chunk_bytes:
            return FLIPPED + k
    flipped = _first_flipped(raw, index, begin)
    for k in range(len(index)):
        if k == flipped:
            return FLIPPED + k
        first = np.int64(index[k, 0]) - begin
        body = raw[first : first + np.int64(index[k, 1]) - _CHECKSUM]
        n = min(len(scratch) - skip, len(out) - at)
        to = out[at : at + n]
        if not decompress:  # it lies as it is
            part = body[skip * scratch.itemsize :].view(out.dtype)
            for j in range(n):
                to[j] = part[j]
            at += n
            skip = 0
            continue
        whole = n == len(scratch)
        target = to if whole else scratch
        done = _decompress(
            decompress,
            np.int64(body.ctypes.data),
            np.int64(target.ctypes.data),
            np.uint64(chunk_bytes),
            np.int32(1),
        )
        if done != chunk_bytes:
            return FLIPPED + k
        if delta:
            sum_deltas(target, skip, to)
        elif not whole:
            for j in range(n):
                to[j] = target[skip + j]
        at += n
        skip = 0
    return FINE


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _read_ranges(
    pread: int,
    decompress: int,
    shards: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    n: int,
    per_shard: int,
    raw: npt.NDArray[np.uint8],
    scratch: npt.NDArray[Any],
    delta: bool,
    out: npt.NDArray[Any],
    where: npt.NDArray[np.int64],
) -> int:
    chunk = len(scratch)
    most = 0
    for i in range(len(starts)):
        if not 0 <= starts[i] <= stops[i] <= n:
            return OUTSIDE
        begin = starts[i]
        while begin < stops[i]:
            number = begin // (chunk * per_shard)
            if shards[number, 0] < 0:
                where[0] = number
                return CLOSED
            end = min(stops[i], (number + 1) * chunk * per_shard)
            most = max(most, (end - 1) // chunk - begin // chunk + 1)
            begin = end
    if most * (chunk * scratch.itemsize + OVERHEAD) > len(raw):
        where[0] = most * (chunk * scratch.itemsize + OVERHEAD)
        return SMALL
    at = 0
    for i in range(len(starts)):
        begin = starts[i]
        while begin < stops[i]:
            first = begin // chunk
            number = first // per_shard
            before = number * per_shard
            last = min((stops[i] - 1) // chunk, before + per_shard - 1)
            end = min(stops[i], (last + 1) * chunk)
            entries = unsigned_at(shards[number, 2])
            index = np.empty((last - first + 1, 2), np.uint64)
            for k in range(len(index)):
                index[k, 0] = entries[2 * (first - before + k)]
                index[k, 1] = entries[2 * (first - before + k) + 1]
            status: int = _read_chunks(
                pread,
                decompress,
                shards[number, 0],
                shards[number, 1],
                index,
                raw,
                scratch,
                begin - first * chunk,
                delta,
                out[at : at + end - begin],
            )
            if status != FINE:
                where[0], where[1], where[2] = number, first, last
                return status
            at += end - begin
            begin = end
    return FINE
