"""What a zarr.json says about the chunks of an array, as far as this version reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import pcodec.standalone

from atlas.errors import CorruptStoreError, FormatError

RESTORE = "restore it from a copy, or ingest the study into a new store"
"""What to do where a store is damaged."""
SHARDS = "atlas_shards"
"""The attribute of an array that says which shards are its own: bytes of each, and crc32c of its
end. A chunk's own checksum says that it is whole, not where it belongs."""


def end_bytes(per_shard: int) -> int:
    """Bytes of the end of a shard: the checksum of its last chunk, its index, and that one's."""
    return 4 + 16 * per_shard + 4


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the chunks of one array are decoded, read off its zarr.json.

    Attributes
    ----------
    n, dtype
        Elements of the array, and their type.
    chunk, per_shard
        Elements of a chunk, and chunks of a shard.
    decompress
        Writes the elements of a stored chunk into an array.
    delta
        Whether these are differences.
    shards
        Bytes of each shard, and crc32c of its end; none where an earlier version wrote the array.
    """

    n: int
    dtype: np.dtype[Any]
    chunk: int
    per_shard: int
    decompress: Callable[[bytes, npt.NDArray[Any]], None]
    delta: bool
    shards: Sequence[tuple[int, int]]

    @property
    def blosc(self) -> bool:
        """Whether Blosc compressed the chunks."""
        return self.decompress is _decompress_blosc

    @property
    def fused(self) -> bool:
        """Whether :mod:`atlas.codecs.fused` reads them: Blosc's, and those that lie as they are."""
        return self.blosc or self.decompress is _copy


def _decompress_blosc(source: bytes, target: npt.NDArray[Any]) -> None:
    numcodecs.blosc.decompress(source, target)


def _copy(source: bytes, target: npt.NDArray[Any]) -> None:
    target[:] = np.frombuffer(source, target.dtype)


def _decompress_pcodec(source: bytes, target: npt.NDArray[Any]) -> None:
    pcodec.standalone.simple_decompress_into(source, target)


def read_recipe(path: Path) -> Recipe:
    """Parse the metadata of an array that :class:`atlas.store.layout.Layout` declared."""
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
        own = [(int(a), int(b)) for a, b in meta.get("attributes", {}).get(SHARDS, ())]
    except FileNotFoundError:
        raise missing(path / "zarr.json", "The metadata of an array is missing") from None
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
        ("bytes", "crc32c"): (_copy, False),
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
    return Recipe(n, dtype, chunk, shard // chunk, decompress, delta, own)


def missing(path: Path, what: str) -> CorruptStoreError:
    """The error for a file or chunk that is not there."""
    return CorruptStoreError(what, do=RESTORE, path=path)
