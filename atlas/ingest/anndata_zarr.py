"""AnnData in Zarr (v2 or v3), of any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr

from atlas.codecs.zarr_arrays import GenericArray
from atlas.codecs.zarr_rows import DenseRows, SparseRows
from atlas.errors import InputError
from atlas.ingest.content import Content, stamp
from atlas.ingest.h5ad import read_elements
from atlas.ingest.matrix import (
    Budget,
    Matrix,
    Place,
    Rows,
    check_range,
    dense_rows,
    native,
    split,
    stretches,
)
from atlas.ingest.transpose import CscMatrix

_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a Zarr group."""
    return (folder / "zarr.json").is_file() or (folder / ".zgroup").is_file()


def read_zarr(path: Path, *, layer: str | None, use_raw: bool) -> Content:
    """Find counts and tables in a folder; counts are not read yet.

    Raises
    ------
    InputError
        There is no AnnData, X or raw is missing, or a part is damaged.
    MissingColumnError
        There is no such layer.
    CorruptStoreError
        A chunk of the row pointers is absent.
    """
    try:
        group = zarr.open_group(path, mode="r")
        found = str(group.attrs.asdict().get("encoding-type", "a Zarr group of another kind"))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        found = str(error)
    if found != "anndata":
        raise InputError(
            f"{path} is no AnnData in Zarr",
            found=found,
            expected="a folder that AnnData.write_zarr made",
            do="give the folder of the AnnData itself, e.g. a study of a store",
            path=path,
        )
    content = read_elements(group, path, zarr_matrix, layer=layer, use_raw=use_raw)
    where = Path(str(content.counts.place.path))
    # a file put in place of another is seen by its folder's time
    folders = [where, *(p for p in where.rglob("*") if p.is_dir())]
    watched = sorted([*folders, *(p for name in _METADATA for p in where.rglob(name))])
    return replace(
        content,
        stamp=lambda: " ".join(map(stamp, watched)),
        digest=lambda: _digest(where),
    )


def zarr_matrix(element: Any, place: Place) -> Matrix:
    """A matrix as anndata stores it.

    Raises
    ------
    InputError
        It is stored in another way.
    """
    folder = Path(str(place.path)) / element.path
    place = Place(place.what, folder)
    encoding = str(element.attrs.get("encoding-type", ""))
    found = encoding or type(element).__name__
    if isinstance(element, zarr.Array) and len(element.shape) == 2:
        return ZarrMatrix(DenseRows(element, folder, place.what), place)
    if isinstance(element, zarr.Group) and encoding in ("csr_matrix", "csc_matrix"):
        missing = [name for name in ("data", "indices", "indptr") if name not in element]
        if not missing and encoding == "csr_matrix":
            return ZarrMatrix(SparseRows(element, folder, place.what), place)
        if not missing:
            data, indices, indptr = (
                GenericArray(cast("zarr.Array[Any]", element[name]), folder / name)
                for name in ("data", "indices", "indptr")
            )
            n_obs, n_vars = cast("list[int]", element.attrs.asdict()["shape"])
            return CscMatrix(data, indices, indptr, (n_obs, n_vars), place)
        found = f"a sparse matrix without {', '.join(missing)}"
    raise InputError(
        f"{place.what} is not stored as a matrix of counts",
        found=found,
        expected="a dense matrix, or a sparse one as CSR or CSC",
        do="write the folder again with adata.write_zarr()",
        path=place.path,
    )


class ZarrMatrix(Matrix):
    """Rows of a Zarr group or array, any of which can be read."""

    def __init__(self, rows: SparseRows | DenseRows, place: Place) -> None:
        super().__init__(rows.shape, rows.dtype, place)
        self._rows = rows
        slow = "" if rows.reading.startswith("fast") else "; 8 times as long as from a store"
        self.reading = rows.reading + slow
        self.read_overhead = rows.overhead

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Values in each range of rows at most: int64, (n_ranges,)."""
        return self._rows.count(starts, stops)

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield rows as they are stored."""
        for start, stop in self.ranges(budget):
            yield from split(self.rows(start, stop), budget)

    def ranges(self, budget: Budget) -> list[tuple[int, int]]:
        """Any rows can be read; of a dense array in whole chunks."""
        if isinstance(self._rows, SparseRows):
            return list(budget.boundaries(self._rows.indptr))
        step = dense_rows(self.shape[1], self.dtype, budget)
        if self._rows.rows_at_once < step:
            step -= step % self._rows.rows_at_once
        return stretches(self.shape[0], step)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows as they are stored, a dense one's without its zeros."""
        indptr, indices, data = self._rows.read(start, stop)
        check_range(indices, self.shape[1], self.place)
        return Rows(start, indptr, indices, native(data))

    def sample(self) -> npt.NDArray[Any]:
        """Values of some rows."""
        some = np.unique(np.linspace(0, self.shape[0] - 1, 8).astype(int)).tolist()
        return np.concatenate([self.rows(row, row + 1).data for row in some])


def _digest(folder: Path) -> str:
    """Of each file its name, size, and first and last 256 bytes."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            head = file.read(256)
            size = file.seek(0, 2)
            file.seek(max(0, size - 256))
            total.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
            total.update(head + file.read())
    return total.hexdigest()
