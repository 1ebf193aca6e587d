"""Writing the counts or a layer of a study: shards of compressed, checksummed chunks.

Shards are laid out here as zarr-python would (sharding codec of the Zarr v3 specification, index at
the end), because there they are made by one thread and through several copies. Tests compare both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs.pcodec import PCodec

from atlas import files
from atlas.store import chunks
from atlas.store.fused import NO_CHUNK


@dataclass(frozen=True, slots=True)
class Layout:
    """How the values of one array are cut and compressed; what :func:`chunks.create` declares.

    Attributes
    ----------
    dtype
        numpy type.
    profile
        ``"fast"``, ``"portable"`` or ``"small"``.
    sorted_runs
        Values rise within runs.
    chunk, shard
        Elements of each.
    """

    dtype: str
    profile: str
    sorted_runs: bool
    chunk: int
    shard: int

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

    def _compress(self, chunk: npt.NDArray[Any]) -> bytes:
        if self.profile == "small":
            return bytes(PCodec(level=8).encode(chunk))
        if self.profile == "fast" and self.sorted_runs:
            deltas = np.empty_like(chunk)
            deltas[0] = chunk[0]
            np.subtract(chunk[1:], chunk[:-1], out=deltas[1:])
            chunk = deltas
        packed: bytes = numcodecs.blosc.compress(
            np.ascontiguousarray(chunk), b"lz4", 5, numcodecs.blosc.SHUFFLE, 0, chunk.itemsize
        )
        return packed


class Written(NamedTuple):
    """A shard on disk: its number, the bytes of its file and their crc32c."""

    number: int
    size: int
    crc32c: int


def write_shard(folder: Path, number: int, values: npt.NDArray[Any], layout: Layout) -> Written:
    """Write one shard into ``folder``, synced."""
    data = layout.encode(values)
    files.write_bytes(folder / str(number), data)
    return Written(number, len(data), google_crc32c.value(data))


def index_type(n_columns: int) -> str:
    """Type of column indices: uint16 where the columns allow, else uint32."""
    return "<u2" if n_columns <= 2**16 else "<u4"


def layouts(types: tuple[str, str], profile: str) -> tuple[Layout, Layout]:
    """Of the indices and of the values of a matrix."""
    return (
        Layout(types[0], profile, True, chunks.CHUNK, chunks.SHARD),
        Layout(types[1], profile, False, chunks.CHUNK, chunks.SHARD),
    )


def create_matrix(
    group: zarr.Group,
    folder: Path,
    name: str,
    shards: Path,
    indptr: npt.NDArray[np.int64],
    *,
    n_columns: int,
    types: tuple[str, str],
    profile: str,
) -> None:
    """Make a matrix of shards that were written: they are moved, not copied.

    Parameters
    ----------
    group, folder
        Of the study, and the folder it is in.
    name
        ``"X"`` or ``"layers/NAME"``.
    shards
        Folder with the folders ``indices`` and ``data``, each with shards by number.
    indptr
        int64, (n_obs + 1,).
    n_columns, types, profile
        Genes; types of indices and values; compression.
    """
    matrix = group.create_group(name)
    matrix.attrs.update(
        {
            "encoding-type": "csr_matrix",
            "encoding-version": "0.1.0",
            "shape": [len(indptr) - 1, n_columns],
        }
    )
    nnz = int(indptr[-1])
    for array, kind, rises in (("indices", types[0], True), ("data", types[1], False)):
        chunks.create(matrix, array, nnz, kind, profile, sorted_runs=rises)
        if nnz:
            (shards / array).rename(folder / name / array / "c")
    chunks.create(matrix, "indptr", len(indptr), np.int64, profile, sorted_runs=True)
    target = folder / name / "indptr" / "c"
    target.mkdir()
    layout = Layout("<i8", profile, True, chunks.CHUNK, chunks.SHARD)
    for number, start in enumerate(range(0, len(indptr), chunks.SHARD)):
        write_shard(target, number, indptr[start : start + chunks.SHARD], layout)
