"""Stretches of HDF5 vectors, read past the HDF5 library: its one lock would stop all threads.

What lies in a file in one piece is read straight into memory; what lies in chunks is read chunk by
chunk and inflated here, so that several threads read and inflate at once. Whatever is stored in a
way not known here, or does not come out as it should, is left to the library, which has the
messages for it.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

_KNOWN_FILTERS = (
    (),
    (h5py.h5z.FILTER_DEFLATE,),
    (h5py.h5z.FILTER_SHUFFLE,),
    (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE),
)


def read_vector(dataset: h5py.Dataset, start: int, stop: int) -> npt.NDArray[Any] | None:
    """Elements ``start`` to ``stop`` (exclusive), or None where the library has to read them.

    Parameters
    ----------
    dataset
        One dimension of plain numbers.
    """
    if dataset.ndim != 1 or not 0 <= start < stop <= dataset.shape[0] or not _is_plain(dataset):
        return None
    handle = dataset.file.id.get_vfd_handle()
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        return None if offset is None else _contiguous(handle, offset, dataset.dtype, start, stop)
    filters = dataset.id.get_create_plist()
    codes = tuple(filters.get_filter(i)[0] for i in range(filters.get_nfilters()))
    return _chunked(handle, dataset, codes, start, stop) if codes in _KNOWN_FILTERS else None


def _is_plain(dataset: h5py.Dataset) -> bool:
    """Numbers of the machine's own kind in an ordinary file of its own."""
    dtype = dataset.dtype
    if dtype.kind not in "iuf" or not dtype.isnative or dataset.is_virtual or dataset.external:
        return False
    if dataset.file.driver != "sec2" or dataset.file.userblock_size:
        return False
    return bool(dataset.id.get_type().equal(h5py.h5t.py_create(dtype)))


def _contiguous(
    handle: int, offset: int, dtype: np.dtype[Any], start: int, stop: int
) -> npt.NDArray[Any] | None:
    out = np.empty(stop - start, dtype)
    view, at = out.view(np.uint8).data, offset + start * dtype.itemsize
    while len(view):
        n = os.preadv(handle, [view], at)  # at most 2 GiB at once
        if n == 0:
            return None
        view, at = view[n:], at + n
    return out


def _chunked(
    handle: int, dataset: h5py.Dataset, filters: tuple[int, ...], start: int, stop: int
) -> npt.NDArray[Any] | None:
    dtype, size = dataset.dtype, dataset.chunks[0]
    out = np.empty(stop - start, dtype)
    for begin in range(start - start % size, stop, size):
        info = dataset.id.get_chunk_info_by_coord((begin,))
        if info.byte_offset is None or info.filter_mask:
            return None
        stored = os.pread(handle, info.size, info.byte_offset)
        if len(stored) != info.size:
            return None
        chunk = _decoded(stored, filters, dtype, size)
        if chunk is None:
            return None
        a, b = max(start, begin), min(stop, begin + size)
        out[a - start : b - start] = chunk[a - begin : b - begin]
    return out


def _decoded(
    stored: bytes, filters: tuple[int, ...], dtype: np.dtype[Any], size: int
) -> npt.NDArray[Any] | None:
    if h5py.h5z.FILTER_DEFLATE in filters:
        try:
            stored = zlib.decompress(stored, bufsize=size * dtype.itemsize)
        except zlib.error:
            return None
    if len(stored) != size * dtype.itemsize:
        return None
    raw = np.frombuffer(stored, np.uint8)
    if h5py.h5z.FILTER_SHUFFLE in filters:
        raw = np.ascontiguousarray(raw.reshape(dtype.itemsize, size).T)
    return raw.reshape(-1).view(dtype)
