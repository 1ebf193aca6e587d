"""Making a store, and opening one."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import get_args

from atlas.config import StoreFormat
from atlas.errors import ConfigError
from atlas.ingest.genes import GeneTable
from atlas.store import manifest as manifests
from atlas.store.base import CountStore
from atlas.store.tiledb_array import tiledb


def create_store(
    path: str | PathLike[str],
    *,
    genes: Sequence[str] | None = None,
    first: bool = False,
    format: StoreFormat = "zarr",
) -> CountStore:
    """Make an empty store.

    Parameters
    ----------
    path
        Where; must be free.
    genes
        The genes to hold, for ever; by default the table grows by the genes of each study.
    first
        Hold the genes of the first study only.
    format
        ``"zarr"``, or ``"tiledb"``: the columns and values of counts in TileDB arrays, all else as
        in Zarr. Needs the extra ``tiledb``; reads slower (README.md, What opens).
    """
    if format not in get_args(StoreFormat):
        raise ConfigError(
            "There is no such format of a store",
            found=repr(format),
            expected=" or ".join(map(repr, get_args(StoreFormat))),
        )
    if format == "tiledb":
        tiledb()
    if genes is not None and first:
        raise ConfigError("The genes are given twice", found="a list, and those of the first study")
    mode = "first" if first else "union" if genes is None else "given"
    table = GeneTable.of_names(genes or ())
    root = Path(path)
    return CountStore(root, manifests.create(root, format, mode, table))


def open_store(path: str | PathLike[str], *, number: int | None = None) -> CountStore:
    """Open a store at its newest state, or at the one of a manifest ``number``.

    Raises
    ------
    NotAStoreError, FormatError, CorruptStoreError
        There is no store, it was written in a newer format, or its manifest is damaged.
    """
    root = Path(path)
    return CountStore(root, manifests.read(root, number))
