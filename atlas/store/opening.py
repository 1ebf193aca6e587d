"""Making a store, and opening one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import get_args, overload

from atlas.config import StoreFormat
from atlas.errors import ConfigError
from atlas.ingest.genes import GeneTable
from atlas.ingest.soma import is_soma
from atlas.store import manifest as manifests
from atlas.store.base import CountStore
from atlas.store.files_source import FilesSource, open_files
from atlas.store.mirror import is_url, open_mirror
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


@overload
def open_store(
    path: str | PathLike[str],
    *,
    number: int | None = None,
    cache: str | int = ...,
    cache_folder: str | PathLike[str] | None = ...,
    options: Mapping[str, str] | None = ...,
    timeout: float = ...,
    deadline: float = ...,
) -> CountStore: ...


@overload
def open_store(
    path: str | PathLike[str],
    *,
    measurement: str,
    obs_filter: str | None = None,
    layer: str | None = None,
    batch_key: str | None = None,
    label_key: str | None = None,
    unlabeled: str = "Unknown",
) -> FilesSource: ...


def open_store(
    path: str | PathLike[str],
    *,
    number: int | None = None,
    cache: str | int = "10GB",
    cache_folder: str | PathLike[str] | None = None,
    options: Mapping[str, str] | None = None,
    timeout: float = 30.0,
    deadline: float = 180.0,
    measurement: str | None = None,
    obs_filter: str | None = None,
    layer: str | None = None,
    batch_key: str | None = None,
    label_key: str | None = None,
    unlabeled: str = "Unknown",
) -> CountStore | FilesSource:
    """Open a store at its newest state, or at the one of a manifest ``number``.

    A store by URL (extra ``remote``) can be read only: ``open_store("s3://bucket/atlas")``. All but
    the counts is copied first; counts come as they are read, in joined ranges, and stay in a cache.

    A TileDB-SOMA experiment, as CELLxGENE Census publishes them, opens too (extra ``soma``), to be
    read as it is: ``open_store("experiment", measurement="RNA", obs_filter="tissue == 'lung'")``.

    Parameters
    ----------
    path
        The store, or its URL (``s3://``, ``gs://``, ``https://``; over https a store has a list of
        its files, see :func:`write_inventory`); or the folder or URI of an experiment.
    number
        Of the state of a store; the newest when None.
    cache, cache_folder
        Of a store by URL: how many bytes of counts stay on disk, and where:
        ``~/.cache/atlas/stores`` by default.
    options
        Of the connection, as obstore names them: ``{"endpoint": …, "region": …}``, or
        ``{"skip_signature": "true"}`` for a public bucket. Credentials are those of the
        environment (``AWS_ACCESS_KEY_ID`` …).
    timeout, deadline
        Seconds that a request may take before it is made again, and until that is given up.
    measurement
        Of an experiment.
    obs_filter, layer, batch_key, label_key, unlabeled
        Of an experiment; see :func:`open_files`. ``layer`` is ``raw`` or ``data`` by default.

    Raises
    ------
    NotAStoreError, FormatError, CorruptStoreError
        There is no store, it was written in a newer format, or its manifest is damaged.
    RemoteError
        The object store gives no answer, or no leave.
    InputError, MissingColumnError, ConfigError
        An experiment cannot be opened so.
    """
    if measurement is not None or (not is_url(path) and is_soma(Path(path))):
        if number is not None:
            raise ConfigError("A SOMA experiment has no states by number", found=f"number={number}")
        return open_files(
            path,
            batch_key=batch_key,
            label_key=label_key,
            unlabeled=unlabeled,
            layer=layer,
            measurement=measurement,
            obs_filter=obs_filter,
        )
    if any(one is not None for one in (obs_filter, layer, batch_key, label_key)):
        raise ConfigError(
            "A store has its layers, batches and labels already",
            found="obs_filter, layer, batch_key or label_key without a measurement",
            do="name the measurement of a SOMA experiment, or open files with atlas.open_files",
            path=path,
        )
    root = Path(path)
    if is_url(path):
        root = open_mirror(
            str(path),
            options=options,
            cache=cache,
            cache_folder=cache_folder,
            timeout=timeout,
            deadline=deadline,
        )
    return CountStore(root, manifests.read(root, number))
