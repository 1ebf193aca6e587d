"""Arrays of any Zarr layout through zarr-python, with what is absent made an error.

zarr-python gives fill values where a chunk is absent. Writers leave chunks out that hold nothing
but fill values, and a lost file looks the same; so an absent chunk is an error here, in ``data``
and ``indices`` of a sparse matrix as in a dense one. The first two have no such chunks in practice:
no explicit zeros are stored, and a run of column 0 alone as long as a chunk does not occur.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr

from atlas.codecs.fused import NO_CHUNK
from atlas.errors import CorruptStoreError, FormatError

RESTORE = "restore it from a copy, or write the file again with write_empty_chunks=True"

_INDEX_CODECS = (["bytes"], ["bytes", "crc32c"])


class GenericArray:
    """An array read by ranges along its first axis, from any number of threads.

    Parameters
    ----------
    array
        Opened for reading.
    folder
        Where it lies.

    Raises
    ------
    FormatError
        Its layout does not let absent chunks be told.
    """

    def __init__(self, array: zarr.Array[Any], folder: Path) -> None:
        self.path = folder
        self.array = array
        self.shape = array.shape
        self.dtype = np.dtype(array.dtype)
        self.rows_at_once = (array.shards or array.chunks)[0]
        self._grid = array.shards or array.chunks
        self._shard_index = _shard_index(array, folder) if array.shards else None

    def __len__(self) -> int:
        return int(self.shape[0])

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Entries ``start`` to ``stop`` (exclusive) of the first axis.

        Raises
        ------
        CorruptStoreError
            A chunk is absent or cannot be decoded.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"elements {start}:{stop} of {len(self)} in {self.path}")
        if start == stop:
            return np.empty((0, *self.shape[1:]), self.dtype)
        try:
            values = np.asarray(self.array[start:stop])
        except Exception as error:  # zarr and its codecs raise what they like
            raise CorruptStoreError(
                "An array cannot be decoded",
                found=f"{type(error).__name__}: {error}",
                do=RESTORE,
                path=self.path,
            ) from error
        self._check_present(start, stop)  # afterwards, so that what vanished before is seen
        return values

    def __getitem__(self, index: slice) -> npt.NDArray[Any]:
        """Entries of the first axis that follow one another."""
        start, stop, _ = index.indices(len(self))
        return self.read(start, max(start, stop))

    def _check_present(self, start: int, stop: int) -> None:
        size = self._grid[0]
        first = range(start // size, (stop - 1) // size + 1)
        others = [range(-(-n // c)) for n, c in zip(self.shape[1:], self._grid[1:], strict=True)]
        for place in itertools.product(first, *others):
            key = self.array.metadata.encode_chunk_key(place)
            path = self.path / key
            if self._shard_index is None:
                if not path.is_file():
                    raise _absent(path)
                continue
            here = self._shard_index.present(path)
            inner = self.array.chunks
            low = max(0, start - place[0] * size) // inner[0]
            high = (min(stop, (place[0] + 1) * size) - place[0] * size - 1) // inner[0]
            inside = [slice(low, high + 1)]
            for axis in range(1, len(inner)):
                end = min(self.shape[axis] - place[axis] * self._grid[axis], self._grid[axis])
                inside.append(slice(0, -(-end // inner[axis])))
            if not here[tuple(inside)].all():
                raise _absent(path)


class _ShardIndex:
    """Which chunks a shard has, from its index at the end or the start of its file."""

    def __init__(self, counts: tuple[int, ...], at_end: bool, checksum: bool) -> None:
        self.counts, self.at_end, self.checksum = counts, at_end, checksum

    def present(self, path: Path) -> npt.NDArray[np.bool_]:
        n = int(np.prod(self.counts)) * 16
        length = n + 4 * self.checksum
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - length) if self.at_end else 0)
                data = file.read(length)
        except FileNotFoundError:
            raise _absent(path) from None
        broken = len(data) < length
        if not broken and self.checksum:
            broken = google_crc32c.value(data[:n]) != int.from_bytes(data[n:], "little")
        if broken:
            raise CorruptStoreError("The index of a shard is damaged", do=RESTORE, path=path)
        offsets = np.frombuffer(data[:n], "<u8").reshape(*self.counts, 2)[..., 0]
        return cast("npt.NDArray[np.bool_]", offsets != NO_CHUNK)


def _shard_index(array: zarr.Array[Any], folder: Path) -> _ShardIndex:
    meta = json.loads((folder / "zarr.json").read_bytes())
    sharding = meta["codecs"][0] if len(meta["codecs"]) == 1 else {}
    settings = sharding.get("configuration", {})
    codecs = [codec["name"] for codec in settings.get("index_codecs", [])]
    if sharding.get("name") != "sharding_indexed" or codecs not in _INDEX_CODECS:
        raise FormatError(
            "An array has shards whose index this version does not read",
            found=" → ".join([sharding.get("name", "several codecs"), *codecs]),
            expected="sharding_indexed with an index of bytes → crc32c",
            do="write the file again with anndata.write_zarr",
            path=folder / "zarr.json",
        )
    shards = cast("tuple[int, ...]", array.shards)
    counts = tuple(shard // chunk for shard, chunk in zip(shards, array.chunks, strict=True))
    at_end = settings.get("index_location", "end") == "end"
    return _ShardIndex(counts, at_end, "crc32c" in codecs)


def _absent(path: Path) -> CorruptStoreError:
    return CorruptStoreError(
        "A chunk of the array is absent, and zarr would read it as zeros",
        found="no chunk",
        expected="every chunk: one of nothing but zeros cannot be told from one that was lost",
        do=RESTORE,
        path=path,
    )


def why_not_fast(folder: Path) -> str | None:
    """Why :class:`atlas.codecs.chunks.ChunkedArray` would not read an array right; None if it does.

    It is written for the arrays that Atlas writes and takes for granted what they have in common.
    """
    try:
        meta = json.loads((folder / "zarr.json").read_bytes())
    except FileNotFoundError:
        return "is Zarr v2"
    try:
        codecs = meta["codecs"]
        if [codec["name"] for codec in codecs] != ["sharding_indexed"]:
            return f"has codecs {_names(codecs)} and no shards"
        settings = codecs[0]["configuration"]
        if (
            settings.get("index_location", "end") != "end"
            or [c["name"] for c in settings["index_codecs"]] != ["bytes", "crc32c"]
            or meta["chunk_key_encoding"]["name"] != "default"
            or meta["chunk_key_encoding"].get("configuration", {}).get("separator", "/") != "/"
            or meta.get("storage_transformers")
            or len(meta["shape"]) != 1
        ):
            return "has shards of another layout"
        little = np.dtype(meta["data_type"]).newbyteorder("<").str
        for codec in [*settings["codecs"], *settings["index_codecs"]]:
            options = codec.get("configuration") or {}
            if options.get("endian", "little") != "little":
                return "has big-endian values"
            if codec["name"] == "numcodecs.delta" and {
                np.dtype(options.get("dtype", little)).str,
                np.dtype(options.get("astype") or options.get("dtype", little)).str,
            } != {little}:
                return "has deltas of another type"
    except (KeyError, TypeError, ValueError):
        return "has metadata of another form"
    return None


def codec_names(folder: Path) -> str:
    """The codecs of a sharded array's chunks, for messages."""
    meta = json.loads((folder / "zarr.json").read_bytes())
    return _names(meta["codecs"][0]["configuration"]["codecs"])


def _names(codecs: Sequence[Any]) -> str:
    return ", ".join(str(codec["name"]) for codec in codecs)
