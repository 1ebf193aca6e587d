"""Writing the counts or a layer of a study, shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr

from atlas import files
from atlas.store import layout
from atlas.store.layout import Layout


class Written(NamedTuple):
    """A shard on disk: its number, the bytes of its file and their crc32c."""

    number: int
    size: int
    crc32c: int


def write_shard(folder: Path, number: int, values: npt.NDArray[Any], how: Layout) -> Written:
    """Write one shard into ``folder``, synced."""
    data = how.encode(values)
    files.write_bytes(folder / str(number), data)
    return Written(number, len(data), google_crc32c.value(data))


def index_type(n_columns: int) -> str:
    """Type of column indices: uint16 where the columns allow, else uint32."""
    return "<u2" if n_columns <= 2**16 else "<u4"


def layouts(types: tuple[str, str], profile: str) -> tuple[Layout, Layout]:
    """Of the indices and of the values of a matrix."""
    return (
        Layout(types[0], profile, True, layout.CHUNK, layout.SHARD),
        Layout(types[1], profile, False, layout.CHUNK, layout.SHARD),
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
    for array, how in zip(("indices", "data"), layouts(types, profile), strict=True):
        how.create(matrix, array, nnz, shards / array)
        if nnz:
            (shards / array).rename(folder / name / array / "c")
    write_pointers(matrix, folder / name, indptr, pointers(profile))


def pointers(profile: str) -> Layout:
    """Of the row pointers of a matrix."""
    return Layout("<i8", profile, True, layout.CHUNK, layout.SHARD)


def write_pointers(
    matrix: zarr.Group,
    folder: Path,
    indptr: npt.NDArray[np.int64],
    how: Layout,
    name: str = "indptr",
) -> None:
    """Declare and write the row pointers of a matrix that lies in ``folder``."""
    how.create(matrix, name, len(indptr))
    target = folder / name / "c"
    target.mkdir()
    for number, start in enumerate(range(0, len(indptr), how.shard)):
        write_shard(target, number, indptr[start : start + how.shard], how)
