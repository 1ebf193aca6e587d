"""Tables of counts in text: CSV or TSV, cells × genes, or genes × cells with ``transpose``.

Every zero is written out in such a file, so it is large and slow to read; it is read in blocks all
the same, twice: for the names of the rows, and for the counts.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import InputError
from atlas.ingest.content import Content, LazyArrays
from atlas.ingest.matrix import Budget, Matrix, Place, Rows, dense_rows, rows_of_dense, split
from atlas.ingest.transpose import ByColumns, Entries

SUFFIXES = (".csv", ".tsv", ".tab", ".txt")


def is_text(path: Path) -> bool:
    """Whether a file is named as a table in text."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    return plain.suffix.lower() in SUFFIXES


def read_text(path: Path, *, transpose: bool) -> Content:
    """Read the names of a table; counts are not read yet.

    Raises
    ------
    InputError
        The header is none, a name is missing, or a line has another number of fields.
    """
    table = _Table(path)
    lines = table.names()
    columns = pd.Index(table.columns, dtype=object)
    rows = pd.Index(lines, dtype=object)
    cells, genes = (columns, rows) if transpose else (rows, columns)
    place = Place(f"the table {path}", path)
    matrix = (_GenesByLine if transpose else _CellsByLine)(table, len(lines), place)
    n = len(lines) * len(columns)
    note = (
        f"{path}: {len(cells):,} cells × {len(genes):,} genes as text, {n:,} numbers with all "
        f"zeros; keep the store, not this file, and ask for .h5ad or .mtx next time"
    )
    return Content(
        name=str(path),
        path=path,
        obs=pd.DataFrame(index=cells),
        var=pd.DataFrame(index=genes),
        obsm=LazyArrays({}),
        uns={},
        counts=matrix,
        layers={},
        elsewhere={},
        notes=(note,),
    )


_FIELDS = 2**21
"""Of a block of lines whose names are read: about 40 MB."""


class _Table:
    """A table in text, with names in its first line and its first column."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
                lines = [file.readline(), file.readline()]
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error
        self.separator = max("\t,; ", key=lines[0].count)
        header, first = (next(csv.reader([ll], delimiter=self.separator), []) for ll in lines)
        # R's write.table leaves out the name of the column of names
        self.columns = header if len(header) + 1 == len(first) else header[1:]
        if not self.columns or len(first) != len(self.columns) + 1:
            raise InputError(
                f"{path} is not a table of counts",
                found=f"{len(header):,} fields in the first line, {len(first):,} in the second",
                expected="a line of names, then a name and as many counts on each line, separated "
                "by commas or tabs",
                do="write the table with a header and row names",
                path=path,
            )
        numbers = [name for name in self.columns[:50] if _is_number(name)]
        if len(numbers) == len(self.columns[:50]) and len(set(numbers)) < len(numbers):
            raise InputError(
                f"{path} has no line of names",
                found=f"numbers in its first line: {', '.join(numbers[:5])}",
                expected="names of genes (or of cells, with --transpose)",
                do="add a header",
                path=path,
            )

    def names(self) -> list[str]:
        """The first column."""
        out: list[str] = []
        # pandas splits all fields of a block, whatever it then takes of them
        at_a_time = max(1, _FIELDS // (len(self.columns) + 1))
        for block in self._blocks(at_a_time, usecols=[0], dtype=str):
            out += block.iloc[:, 0].tolist()
        return out

    def blocks(self, n_rows: int) -> Iterator[npt.NDArray[Any]]:
        """The numbers, some lines at a time: float64 or int64, (n_lines, n_columns)."""
        for block in self._blocks(n_rows, index_col=0):
            values = block.to_numpy()
            if values.dtype.kind not in "iufb":
                line, column = self._first_text(block)
                raise InputError(
                    f"{self.path} holds a field that is no number",
                    found=f"{block.iloc[line, column]!r} in line "
                    f"{int(block.attrs['first']) + line + 2:,}, column {self.columns[column]!r}",
                    expected="counts",
                    do="remove columns that are no genes, e.g. annotations (atlas annotate)",
                    path=self.path,
                )
            if values.shape[1] != len(self.columns):
                raise self._ragged(values.shape[1])
            yield values

    def _first_text(self, block: pd.DataFrame) -> tuple[int, int]:
        for column in range(block.shape[1]):
            numbers = pd.to_numeric(block.iloc[:, column], errors="coerce")
            if numbers.isna().any():
                return int(np.flatnonzero(numbers.isna())[0]), column
        return 0, 0

    def _blocks(self, n_rows: int, **options: Any) -> Iterator[pd.DataFrame]:
        done = 0
        try:
            with pd.read_csv(
                self.path,
                sep=self.separator,
                header=None,
                skiprows=1,
                chunksize=max(1, n_rows),
                na_filter=False,
                low_memory=False,
                encoding="utf-8-sig",
                **options,
            ) as tables:
                for table in tables:
                    table.attrs["first"] = done
                    done += len(table)
                    yield table
        except (ValueError, OSError, EOFError) as error:
            raise self._unreadable(error) from error

    def _ragged(self, n: int) -> InputError:
        return InputError(
            f"{self.path} has lines of different lengths",
            found=f"{n:,} counts",
            expected=f"{len(self.columns):,}, as names in the first line",
            do="write the table again",
            path=self.path,
        )

    def _unreadable(self, error: BaseException) -> InputError:
        return InputError(
            f"{self.path} cannot be read as a table",
            found=f"{type(error).__name__}: {error}".strip().splitlines()[0][:200],
            expected="lines of equal numbers of fields, or a whole gzip file of them",
            do="write, copy or download it again",
            path=self.path,
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _CellsByLine(Matrix):
    """A cell on each line."""

    def __init__(self, table: _Table, n_lines: int, place: Place) -> None:
        super().__init__((n_lines, len(table.columns)), np.float64, place)
        self._table = table

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield lines without their zeros."""
        step = dense_rows(self.shape[1], np.dtype(np.float64), budget)
        first = 0
        for values in self._table.blocks(step):
            yield from split(rows_of_dense(first, values), budget)
            first += len(values)

    def sample(self) -> npt.NDArray[Any]:
        """The first lines."""
        return next(self._table.blocks(16), np.empty((0, 0))).ravel()


class _GenesByLine(ByColumns):
    """A gene on each line."""

    def __init__(self, table: _Table, n_lines: int, place: Place) -> None:
        super().__init__((len(table.columns), n_lines), np.float64, place)
        self._table = table

    def sample(self) -> npt.NDArray[Any]:
        """The first lines."""
        return next(self._table.blocks(16), np.empty((0, 0))).ravel()

    def entry_rows(self, size: int) -> Iterator[npt.NDArray[Any]]:
        """Yield the cells of the non-zeros."""
        for entries in self.entries(size):
            yield entries.rows

    def entries(self, size: int) -> Iterator[Entries]:
        """Yield the non-zeros, some lines at a time."""
        first = 0
        for values in self._table.blocks(max(1, size // self.shape[0])):
            genes, cells = np.nonzero(values)
            yield Entries(
                cells, (genes + first).astype(np.int32), values[genes, cells].astype(np.float64)
            )
            first += len(values)
