"""Folders of 10x Genomics with a matrix in Matrix Market form, of Cell Ranger 2 and of 3 and later.

``matrix.mtx`` holds features × barcodes, one entry a line, ``features.tsv`` (``genes.tsv`` before
Cell Ranger 3) and ``barcodes.tsv`` their names; each may be gzipped. Text is parsed in blocks and
never held whole. Entries that come cell by cell, as Cell Ranger writes them, are passed on as they
come; others go through a temporary file (:mod:`atlas.ingest.transpose`).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import InputError
from atlas.ingest.content import Content
from atlas.ingest.matrix import ENTRY_BYTES, Budget, Place, Rows
from atlas.ingest.tenx import GENES, content_of_type
from atlas.ingest.transpose import ByColumns, Entries

_HEAD = 100_000
"""Entries by which it is seen whether they come cell by cell."""
_FIELDS = {"integer": np.int64, "real": np.float64}


def find(folder: Path, *names: str) -> Path | None:
    """The first file of these names in a folder, gzipped or not."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def is_mtx(folder: Path) -> bool:
    """Whether there is a matrix in Matrix Market form in a folder."""
    return find(folder, "matrix.mtx") is not None


def read_mtx(folder: Path, *, feature_type: str) -> Content:
    """Find matrix and tables of a folder; entries are not read yet.

    Raises
    ------
    InputError
        A file is missing, the header is none, or sizes disagree.
    """
    matrix_file = find(folder, "matrix.mtx")
    features_file = find(folder, "features.tsv", "genes.tsv")
    barcodes_file = find(folder, "barcodes.tsv")
    if matrix_file is None or features_file is None or barcodes_file is None:
        raise InputError(
            f"{folder} is not a complete 10x folder",
            found=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder",
            expected="matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv, gzipped or not",
            do="give the folder that Cell Ranger wrote, e.g. outs/filtered_feature_bc_matrix",
            path=folder,
        )
    matrix = MtxMatrix(matrix_file)
    var = _features(features_file)
    obs = pd.DataFrame(index=_table(barcodes_file)[0].to_numpy(object))
    for file, table, size in ((features_file, var, 1), (barcodes_file, obs, 0)):
        if len(table) != matrix.shape[size]:
            raise InputError(
                f"{file} and {matrix_file.name} disagree",
                found=f"{len(table):,} lines for {matrix.shape[size]:,} "
                + ("barcodes (columns)" if size == 0 else "features (rows)"),
                expected="one line for each",
                do="copy or download the folder again",
                path=file,
            )
    return content_of_type(folder, obs, var, matrix, feature_type)


def _table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(
            path, sep="\t", header=None, dtype=str, na_filter=False, quoting=3, encoding="utf-8"
        )
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, error) from error


def _features(path: Path) -> pd.DataFrame:
    """Ids, names and types of features, with the column names that scanpy gives them."""
    table = _table(path)
    if table.shape[1] < 2:
        raise InputError(
            f"{path} has too few columns",
            found=f"{table.shape[1]}",
            expected="id and name, separated by a tab, and perhaps a type",
            do="copy or download the folder again",
            path=path,
        )
    types = table[2] if table.shape[1] > 2 else pd.Series(GENES, table.index)
    columns = {"gene_ids": table[0].to_numpy(object), "feature_types": types.to_numpy(object)}
    return pd.DataFrame(columns, index=pd.Index(table[1].to_numpy(object), dtype=object))


def _unreadable(path: Path, error: BaseException) -> InputError:
    return InputError(
        f"{path} cannot be read",
        found=f"{type(error).__name__}: {error}".splitlines()[0][:200],
        expected="a whole text file, or a whole gzip file of one",
        do="copy or download it again",
        path=path,
    )


class MtxMatrix(ByColumns):
    """A coordinate matrix in Matrix Market form (features × barcodes), as barcodes × features.

    Form: Boisvert, Pozo and Remington 1996, "The Matrix Market exchange formats", coordinate form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with _opened(path) as file:
                banner = file.readline().decode("utf-8", "replace").lower().split()
                line, self._skip = file.readline(), 2
                while line.startswith(b"%") or line == b"\n":
                    line, self._skip = file.readline(), self._skip + 1
        except (OSError, EOFError) as error:
            raise _unreadable(path, error) from error
        sizes = line.split()
        if (
            len(banner) < 5
            or banner[:3] != ["%%matrixmarket", "matrix", "coordinate"]
            or banner[3] not in _FIELDS
            or banner[4] != "general"
            or len(sizes) != 3
            or not all(size.isdigit() for size in sizes)
        ):
            raise InputError(
                f"{path} is not a matrix that can be read",
                found=f"{' '.join(banner)[:80] or 'an empty file'}; sizes {line[:80]!r}",
                expected="%%MatrixMarket matrix coordinate integer (or real) general, and a line "
                "with the numbers of rows, columns and entries",
                do="give the matrix.mtx of Cell Ranger",
                path=path,
            )
        n_features, n_barcodes, self._n_entries = map(int, sizes)
        kind = _FIELDS[banner[3]]
        super().__init__((n_barcodes, n_features), kind, Place(f"the matrix of {path}", path))
        first = next(self.entries(_HEAD), None)
        self._by_cell = first is None or bool((np.diff(first.rows) >= 0).all())

    def sample(self) -> npt.NDArray[Any]:
        """The first entries."""
        first = next(self.entries(_HEAD), None)
        return np.empty(0, self.dtype) if first is None else first.values

    def entry_rows(self, size: int) -> Iterator[npt.NDArray[Any]]:
        """Yield the cells of all entries."""
        for entries in self.entries(size):
            yield entries.rows

    def entries(self, size: int) -> Iterator[Entries]:
        """Yield all entries in the order of the file.

        Raises
        ------
        InputError
            A line is no entry, an index is out of range, or entries are missing or too many.
        """
        done = 0
        for table in self._blocks(size):
            line = self._skip + done + 1
            done += len(table)
            features, cells = (table[k].to_numpy() - 1 for k in (0, 1))
            for indices, n, what in (
                (features, self.shape[1], "feature"),
                (cells, self.shape[0], "barcode"),
            ):
                if len(indices) and (indices.min() < 0 or indices.max() >= n):
                    at = int(np.flatnonzero((indices < 0) | (indices >= n))[0])
                    raise InputError(
                        f"{self.path} has an entry out of range",
                        found=f"{what} {indices[at] + 1} in line {line + at:,}",
                        expected=f"1 to {n:,}",
                        do="copy or download the folder again",
                        path=self.path,
                    )
            yield Entries(cells, features.astype(np.int32), table[2].to_numpy())
        if done != self._n_entries:
            raise InputError(
                f"{self.path} does not hold the entries that its header says",
                found=f"{done:,} entries",
                expected=f"{self._n_entries:,}",
                do="copy or download it again",
                path=self.path,
            )

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield rows as they come, where they come in order."""
        if not self._by_cell:
            yield from super().row_blocks(budget)
            return
        # the last cell of a block may go on in the next
        first, left = 0, Entries(*(np.empty(0, kind) for kind in (np.int64, np.int32, self.dtype)))
        size = max(1, min(budget.memory // (4 * ENTRY_BYTES), 2**22))
        read = 0
        for block in self.entries(size):
            cells = np.concatenate([left.rows, block.rows])
            falls = np.flatnonzero(np.diff(cells) < 0)
            if len(falls):
                line = self._skip + read + int(falls[0]) - len(left.rows) + 2
                raise InputError(
                    f"{self.path} is sorted by barcode at first, but not further on",
                    found=f"an earlier barcode in line {line:,}",
                    expected="entries sorted by barcode, or from the beginning otherwise",
                    do="write it again, e.g. by scanpy.read_10x_mtx(folder).write_h5ad(…)",
                    path=self.path,
                )
            read += len(block.rows)
            whole = Entries(
                cells,
                np.concatenate([left.columns, block.columns]),
                np.concatenate([left.values, block.values]),
            )
            stop = int(cells[-1]) if read < self._n_entries else self.shape[0]
            if budget.rows is not None:
                while first + budget.rows < stop:
                    whole, part = _cut(whole, first + budget.rows)
                    yield _rows(part, first, first + budget.rows)
                    first += budget.rows
            if first < stop:
                whole, part = _cut(whole, stop)
                yield _rows(part, first, stop)
                first = stop
            left = whole
        if first < self.shape[0]:  # cells without any entry
            yield _rows(left, first, self.shape[0])

    def _blocks(self, size: int) -> Iterator[pd.DataFrame]:
        try:
            with _opened(self.path) as file:
                for _ in range(self._skip):
                    file.readline()
                tables = pd.read_csv(
                    cast("IO[bytes]", file),
                    sep=" ",
                    header=None,
                    names=[0, 1, 2],
                    dtype={0: "int64", 1: "int64", 2: str(self.dtype)},
                    chunksize=size,
                    na_filter=False,
                    engine="c",
                    index_col=False,
                )
                yield from tables
        except pd.errors.EmptyDataError:
            return
        except (ValueError, OSError, EOFError) as error:
            raise _unreadable(self.path, error) from error


def _cut(entries: Entries, cell: int) -> tuple[Entries, Entries]:
    """Entries from a cell on, and those before it; they are sorted by cell."""
    at = int(np.searchsorted(entries.rows, cell))
    return Entries(*(a[at:] for a in entries)), Entries(*(a[:at] for a in entries))


def _rows(entries: Entries, first: int, stop: int) -> Rows:
    lengths = np.bincount(entries.rows - first, minlength=stop - first)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Rows(first, indptr, entries.columns, entries.values)


def _opened(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
