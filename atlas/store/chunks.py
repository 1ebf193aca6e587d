"""Reading the long arrays of a study: strict, thread-safe, straight from the shards.

zarr-python fills what is absent with zeros, so a lost file would read as empty cells. Here a chunk
or shard that is missing, short or flipped is an error. What is read is plain Zarr v3 (sharding,
Blosc or pcodec, crc32c), with ``numcodecs.delta`` in the profiles that say so.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import pcodec.standalone
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.codecs.numcodecs import Delta, PCodec

from atlas.errors import CorruptStoreError, FormatError
from atlas.store import kernels
from atlas.store.schema import RESTORE

# Atlas reads these codecs itself, and README.md names the profile for other readers.
warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")

CHUNK = 131_072
"""Elements of an inner chunk: what is decoded at once."""
SHARD = 64 * CHUNK
"""Elements of a shard: one file."""

_ABSENT = 2**64 - 1


def create(
    group: zarr.Group,
    name: str,
    n: int,
    dtype: npt.DTypeLike,
    profile: str,
    *,
    sorted_runs: bool = False,
) -> zarr.Array[Any]:
    """Create a one-dimensional array in shards of checksummed chunks.

    Parameters
    ----------
    group, name
        Where.
    n
        Elements.
    dtype
        Little-endian numpy type.
    profile
        ``"fast"``: Blosc lz4 with byte shuffle, and a delta filter where it pays. ``"portable"``:
        the same without the delta, so codecs of the Zarr v3 specification only. ``"small"``:
        pcodec level 8.
    sorted_runs
        Values rise within runs (column indices, row pointers), so that deltas are small.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    options: dict[str, Any] = {}
    if profile == "small":
        options["serializer"] = PCodec(level=8)
        options["compressors"] = [Crc32cCodec()]
        options["filters"] = None
    else:
        delta = profile == "fast" and sorted_runs
        options["filters"] = [Delta(dtype=kind.str)] if delta else None
        options["compressors"] = [
            BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
            Crc32cCodec(),
        ]
    return group.create_array(
        name,
        shape=(n,),
        dtype=kind,
        chunks=(CHUNK,),
        shards=(SHARD,),
        fill_value=0,
        config={"write_empty_chunks": True},
        **options,
    )


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How the chunks of one array are decoded, read off its zarr.json."""

    n: int
    dtype: np.dtype[Any]
    chunk: int
    per_shard: int
    decompress: Callable[[bytes, npt.NDArray[Any]], None]
    delta: bool


def _decompress_blosc(source: bytes, target: npt.NDArray[Any]) -> None:
    numcodecs.blosc.decompress(source, target)


def _decompress_pcodec(source: bytes, target: npt.NDArray[Any]) -> None:
    pcodec.standalone.simple_decompress_into(source, target)


def _recipe(path: Path) -> _Recipe:
    """Parse the metadata of an array that :func:`create` made."""
    try:
        meta = json.loads((path / "zarr.json").read_bytes())
        (sharding,) = meta["codecs"]
        if sharding["name"] != "sharding_indexed":
            raise KeyError(sharding["name"])
        inner = sharding["configuration"]
        codecs = [codec["name"] for codec in inner["codecs"]]
        chunk = int(inner["chunk_shape"][0])
        shard = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
        dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        n = int(meta["shape"][0])
    except FileNotFoundError:
        raise _missing(path / "zarr.json", "The metadata of an array is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            "An array has a layout that this version does not read",
            found=repr(error),
            expected="one dimension, codec sharding_indexed",
            path=path / "zarr.json",
        ) from None
    known: dict[tuple[str, ...], tuple[Callable[[bytes, npt.NDArray[Any]], None], bool]] = {
        ("numcodecs.delta", "bytes", "blosc", "crc32c"): (_decompress_blosc, True),
        ("bytes", "blosc", "crc32c"): (_decompress_blosc, False),
        ("numcodecs.pcodec", "crc32c"): (_decompress_pcodec, False),
    }
    if tuple(codecs) not in known:
        raise FormatError(
            "An array has codecs that this version does not read",
            found=" → ".join(codecs),
            expected=" or ".join(" → ".join(names) for names in known),
            path=path / "zarr.json",
        )
    decompress, delta = known[tuple(codecs)]
    return _Recipe(n, dtype, chunk, shard // chunk, decompress, delta)


def _missing(path: Path, what: str) -> CorruptStoreError:
    return CorruptStoreError(what, do=RESTORE, path=path)


_thread = threading.local()


def _scratch(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory that each thread keeps for what it is decoding: uint8, (at least nbytes,)."""
    kept: npt.NDArray[np.uint8] | None = getattr(_thread, "scratch", None)
    if kept is None or len(kept) < nbytes:
        kept = _thread.scratch = np.empty(nbytes, np.uint8)
    return kept


class ChunkedArray:
    """One array of a study, read by element range from any number of threads.

    Parameters
    ----------
    path
        Folder of the array, with its zarr.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._recipe = _recipe(path)
        self._indices: dict[int, tuple[tuple[int, int, int], npt.NDArray[np.uint64]]] = {}

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

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements ``start`` to ``stop`` (exclusive), checked and decoded.

        Raises
        ------
        CorruptStoreError
            A shard or chunk is missing, short, unreadable, or fails its checksum.
        """
        r = self._recipe
        if not 0 <= start <= stop <= r.n:
            raise IndexError(f"elements {start}:{stop} of {r.n} in {self.path}")
        out = np.empty(stop - start, r.dtype)
        if start == stop:
            return out
        first, last = start // r.chunk, (stop - 1) // r.chunk
        for shard in range(first // r.per_shard, last // r.per_shard + 1):
            low = max(first, shard * r.per_shard)
            high = min(last, (shard + 1) * r.per_shard - 1)
            path = self.path / "c" / str(shard)
            for number, data in enumerate(self._stored(shard, low, high, path), start=low):
                begin = number * r.chunk
                a, b = max(start, begin), min(stop, begin + r.chunk)
                self._decode(data, path, number, a - begin, out[a - start : b - start])
        return out

    def _stored(self, shard: int, low: int, high: int, path: Path) -> list[memoryview]:
        """Bytes of chunks ``low`` to ``high`` (inclusive, numbered over the array) of one shard."""
        r = self._recipe
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise _missing(path, "A shard of the store is missing") from None
        except OSError as error:
            raise self._unreadable(path, error) from error
        try:
            index = self._index(shard, descriptor, path)
            local = index[low - shard * r.per_shard : high + 1 - shard * r.per_shard]
            if (local == _ABSENT).any():
                raise _missing(path, "A chunk is missing from a shard of the store")
            # neighbouring chunks lie one behind the other: one read for all
            begin = int(local[:, 0].min())
            end = int((local[:, 0] + local[:, 1]).max())
            data = memoryview(os.pread(descriptor, end - begin, begin))
        except OSError as error:
            raise self._unreadable(path, error) from error
        finally:
            os.close(descriptor)
        if len(data) != end - begin:
            raise self._flipped(path, f"{begin + len(data)} bytes", f"at least {end} bytes")
        return [data[at - begin : at - begin + n] for at, n in local.tolist()]

    def _decode(
        self, data: memoryview, path: Path, number: int, skip: int, out: npt.NDArray[Any]
    ) -> None:
        """Decode the elements of a chunk from ``skip`` on into ``out``."""
        r = self._recipe
        body = bytes(data[:-4])
        if google_crc32c.value(body) != int.from_bytes(data[-4:], "little"):
            raise self._flipped(path, f"another checksum in chunk {number}", "the crc32c stored")
        if len(out) == r.chunk:
            r.decompress(body, out)
            if r.delta:
                kernels.sum_deltas(out, 0, out)
            return
        # A part of a chunk goes through scratch memory that the thread keeps.
        scratch = _scratch(r.chunk * r.dtype.itemsize)[: r.chunk * r.dtype.itemsize].view(r.dtype)
        r.decompress(body, scratch)
        if r.delta:
            kernels.sum_deltas(scratch, skip, out)
        else:
            out[:] = scratch[skip : skip + len(out)]

    def _index(self, shard: int, descriptor: int, path: Path) -> npt.NDArray[np.uint64]:
        """Offset and length of each chunk in a shard, (per_shard, 2), from the shard's end.

        Read once; afterwards the file must be the one it was read from.
        """
        status = os.fstat(descriptor)
        identity = status.st_ino, status.st_size, status.st_mtime_ns
        # No lock: a fork could leave it taken for ever. At worst an index is read twice.
        known = self._indices.get(shard)
        if known is not None:
            if known[0] != identity:
                raise CorruptStoreError(
                    "A shard of the store was replaced or changed while the store was open",
                    found=f"{status.st_size} bytes, changed {status.st_mtime_ns} ns",
                    expected=f"{known[0][1]} bytes, changed {known[0][2]} ns",
                    do="open the store again, and check it with `atlas verify`",
                    path=path,
                )
            return known[1]
        length = self._recipe.per_shard * 16 + 4
        data = os.pread(descriptor, length, max(0, status.st_size - length))
        if len(data) < length:
            raise self._flipped(path, f"{status.st_size} bytes", f"at least {length} bytes")
        if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise self._flipped(path, "another checksum in its index", "the crc32c stored")
        index = np.frombuffer(data[:-4], "<u8").reshape(-1, 2)
        self._indices[shard] = identity, index
        return index

    def _unreadable(self, path: Path, error: OSError) -> CorruptStoreError:
        return CorruptStoreError(
            "A shard of the store cannot be read",
            found=str(error),
            do="check the disk, then " + RESTORE,
            path=path,
        )

    def _flipped(self, path: Path, found: str, expected: str) -> CorruptStoreError:
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
