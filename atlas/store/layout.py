"""How a long array of a study lies on disk: shards of compressed, checksummed chunks.

Shards are laid out here as zarr-python would (sharding codec of the Zarr v3 specification, index at
the end), because there they are made by one thread and through several copies. Tests compare both.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numcodecs.blosc
import numcodecs.pcodec
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.codecs.numcodecs import Delta, PCodec

from atlas.codecs.fused import NO_CHUNK
from atlas.codecs.recipe import SHARDS, end_bytes

# Atlas reads these codecs itself, and README.md names the profile for other readers.
warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")

CHUNK = 32_768
"""Elements of an inner chunk: what is decoded at once."""
SHARD = 256 * CHUNK
"""Elements of a shard: one file."""

_LEVEL: Final = 8
"""Of pcodec."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the values of one array are cut and compressed.

    Attributes
    ----------
    dtype
        Little-endian numpy type.
    profile
        ``"fast"``: Blosc LZ4 with byte shuffle, and a delta filter where it pays. ``"portable"``:
        the same without the delta, so codecs of the Zarr v3 specification only. ``"small"``:
        pcodec.
    sorted_runs
        Values rise within runs (column indices, row pointers), so that deltas are small.
    chunk, shard
        Elements of each.
    compressed
        Whether chunks are, as the profile says, and may be differences; ``"small"`` always is.
    """

    dtype: str
    profile: str
    sorted_runs: bool
    chunk: int
    shard: int
    compressed: bool = True

    def create(
        self, group: zarr.Group, name: str, n: int, shards: Path | None = None
    ) -> zarr.Array[Any]:
        """Declare an array of ``n`` elements in Zarr.

        With the folder that its shards lie in their ends are noted, so that another's are told.
        """
        options: dict[str, Any] = {"filters": None, "compressors": [Crc32cCodec()]}
        if shards is not None:
            options["attributes"] = {SHARDS: self._ends(shards, -(-n // self.shard))}
        if self.profile == "small":
            options["serializer"] = PCodec(level=_LEVEL)
        elif self.compressed:
            name_of_codec, level = self._blosc
            blosc = BloscCodec(cname=name_of_codec, clevel=level, shuffle="shuffle")  # type: ignore[arg-type]
            options["compressors"] = [blosc, Crc32cCodec()]
            options["filters"] = [Delta(dtype=self.dtype)] if self._delta else None
        return group.create_array(
            name,
            shape=(n,),
            dtype=np.dtype(self.dtype),
            chunks=(self.chunk,),
            shards=(self.shard,),
            fill_value=0,
            config={"write_empty_chunks": True},
            **options,
        )

    def encode(self, values: npt.NDArray[Any]) -> bytes:
        """The file of one shard."""
        kind = np.dtype(self.dtype)
        values = values.astype(kind, copy=False)
        index = np.full((self.shard // self.chunk, 2), NO_CHUNK, "<u8")
        parts, at = [], 0
        for number, start in enumerate(range(0, len(values), self.chunk)):
            chunk = values[start : start + self.chunk]
            if len(chunk) < self.chunk:
                chunk = np.concatenate([chunk, np.zeros(self.chunk - len(chunk), kind)])
            body = self._compress(chunk)
            parts += [body, google_crc32c.value(body).to_bytes(4, "little")]
            index[number] = at, len(body) + 4
            at += len(body) + 4
        tail = index.tobytes()
        return b"".join([*parts, tail, google_crc32c.value(tail).to_bytes(4, "little")])

    def _ends(self, folder: Path, n_shards: int) -> list[tuple[int, int]]:
        """Bytes of each shard, and crc32c of its end."""
        length = end_bytes(self.shard // self.chunk)
        out = []
        for number in range(n_shards):
            with (folder / str(number)).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(size - length)
                out.append((size, google_crc32c.value(file.read())))
        return out

    @property
    def _delta(self) -> bool:
        return self.profile == "fast" and self.sorted_runs and self.compressed

    @property
    def _blosc(self) -> tuple[str, int]:
        """Compressor and level.

        lz4hc finds longer matches in counts: a quarter less to read and to decode for 4 µs a cell
        more when it is written; higher levels take ten times as long and gain little. In
        differences there is nothing to find but zero bytes (benchmarks/LOG.md).
        """
        return ("lz4", 5) if self.sorted_runs else ("lz4hc", 2)

    def _compress(self, chunk: npt.NDArray[Any]) -> bytes:
        if self.profile == "small":
            return bytes(numcodecs.pcodec.PCodec(level=_LEVEL).encode(chunk))
        if not self.compressed:
            return chunk.tobytes()
        if self._delta:
            deltas = np.empty_like(chunk)
            deltas[0] = chunk[0]
            np.subtract(chunk[1:], chunk[:-1], out=deltas[1:])
            chunk = deltas
        name, level = self._blosc
        shuffle, size = numcodecs.blosc.SHUFFLE, chunk.itemsize
        chunk = np.ascontiguousarray(chunk)
        packed: bytes = numcodecs.blosc.compress(chunk, name.encode(), level, shuffle, 0, size)
        return packed
