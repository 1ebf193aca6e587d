"""A study's raw counts and tables, whatever file they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from atlas.errors import CountsError, InputError
from atlas.ingest import kernels
from atlas.ingest.content import (
    Content,
    CountsBlock,
    LayerBlock,
    missing_layer,
    stamp,
)
from atlas.ingest.fractions import are_estimates, looks_like_counts, sample_of, warn_of_rounding
from atlas.ingest.matrix import Budget, Matrix, Rows, select_columns
from atlas.ingest.names import check_row_names, make_genes_unique, named

DEFAULT_MEMORY = 256 << 20

_REASONS = {
    kernels.NOT_FINITE: "holds values that are not finite",
    kernels.NEGATIVE: "holds negative values",
    kernels.FRACTION: "holds fractions",
    kernels.TOO_LARGE: "holds values of 2^32 or more",
}


class CountsSource:
    """Raw counts of one study with its tables, read in blocks.

    Blocks are checked as they are read, so a source can turn out bad half way. A context manager:
    leaving it closes the file.

    Parameters
    ----------
    content
        What was found in the file or AnnData.
    round_counts
        Round fractions, half to even, in place of refusing them.
    memory
        Bytes that reading may take at a time.
    folder
        Where temporary files go if the matrix is stored by columns and does not fit in
        ``memory``; the system's folder by default.

    Raises
    ------
    InputError
        Where there are no rows or no genes, tables and counts disagree in shape, or row names
        are not unique.
    """

    def __init__(
        self,
        content: Content,
        *,
        round_counts: bool = False,
        memory: int = DEFAULT_MEMORY,
        folder: Path | None = None,
    ) -> None:
        self._content = content
        self._round_counts = round_counts
        self._budget = Budget(memory, folder=folder)
        self._opened: dict[str, Matrix] = {}
        self._check_shape(content.counts)
        self._check_size()
        self.obs: pd.DataFrame = named(content.obs)
        self.var: pd.DataFrame = named(content.var)
        check_row_names(self.obs, self.name, self.path)
        make_genes_unique(self.var, self.name)

    @property
    def name(self) -> str:
        """What messages call the input: its path, or ``AnnData in memory``."""
        return self._content.name

    @property
    def path(self) -> Path | None:
        """The file, if it is one."""
        return self._content.path

    @property
    def obsm(self) -> Mapping[str, npt.NDArray[Any]]:
        """Arrays (n_obs, …) by name, read when asked for."""
        return self._content.obsm

    @property
    def uns(self) -> Mapping[str, Any]:
        """``spatial``, where the input has it."""
        return self._content.uns

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, e.g. which feature types were left out."""
        return self._content.notes

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that could be kept."""
        return tuple(self._content.layers)

    @property
    def n_obs(self) -> int:
        """Number of rows."""
        return len(self.obs)

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return len(self.var)

    def blocks(self, rows_per_block: int | None = None) -> Iterator[CountsBlock]:
        """Yield all rows in input order, as many at a time as memory and the argument allow.

        Raises
        ------
        CountsError
            At the first value that is not a count.
        InputError
            Where the matrix is damaged.
        """
        for rows in self.stream(rows_per_block=rows_per_block):
            yield CountsBlock(*self.tidy(rows, types=(np.int32, np.uint32)))

    def layer_blocks(self, name: str, rows_per_block: int | None = None) -> Iterator[LayerBlock]:
        """Yield the rows of a layer in input order, unchecked: float32, or integers as they are.

        Raises
        ------
        MissingColumnError
            Where there is no such layer.
        InputError
            Where the layer is damaged.
        """
        for rows in self.stream(name, rows_per_block):
            yield LayerBlock(*self.tidy(rows, name, types=(np.int32, None)))

    def ranges(self, layer: str | None = None) -> list[tuple[int, int]] | None:
        """Stretches of rows for :meth:`read`, in any order; None where only :meth:`stream` reads.

        Parameters
        ----------
        layer
            Of this layer, rather than of the counts.
        """
        return self._matrix(layer).ranges(self._budget)

    def read(self, start: int, stop: int, layer: str | None = None) -> Rows:
        """One of the :meth:`ranges` as it is stored; from several threads if need be."""
        return self._matrix(layer).rows(start, stop)

    @property
    def random(self) -> bool:
        """Whether rows of the counts can be read in any order."""
        return self._matrix(None).ranges(self._budget) is not None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the counts as stored."""
        return self._content.counts.dtype

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Values in each range of rows at most: int64, (n_ranges,)."""
        return self._content.counts.count_values(starts, stops)

    def read_many(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> Sequence[Rows]:
        """Several ranges of rows that may be read in any order, as they are stored."""
        return self._content.counts.rows_of_ranges(starts, stops)

    @property
    def reading(self) -> str:
        """What reads the rows, and why."""
        return self._content.counts.reading

    @property
    def read_overhead(self) -> int:
        """Bytes that a read takes besides twice what it returns, about."""
        return self._content.counts.read_overhead

    def stamp(self) -> str:
        """A text that changes when the counts do."""
        if self._content.stamp is not None:
            return self._content.stamp()
        return "" if self.path is None else stamp(self.path)

    def digest(self) -> str:
        """A digest of the counts, as far as it is cheap."""
        return self._content.digest() if self._content.digest is not None else self.stamp()

    def stream(self, layer: str | None = None, rows_per_block: int | None = None) -> Iterator[Rows]:
        """Yield all rows in input order, as they are stored."""
        yield from self._matrix(layer).row_blocks(self._budget._replace(rows=rows_per_block))

    def tidy(
        self,
        rows: Rows,
        layer: str | None = None,
        *,
        order: npt.NDArray[np.int64] | None = None,
        columns: npt.NDArray[np.int32] | None = None,
        types: tuple[npt.DTypeLike, npt.DTypeLike | None],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]:
        """Rows as they were read, checked, without zeros and with columns that rise.

        Parameters
        ----------
        rows
            Of :meth:`read` or :meth:`stream`.
        layer
            The layer they are of; values of layers are not checked.
        order
            Positions of the rows in the order wanted; as they are when None.
        columns
            Number that each column is given, -1 for those left out.
        types
            Of indices and values. Counts that do not fit come as uint32 all the same; None keeps
            the integers of a layer, and makes float32 of its other numbers.

        Raises
        ------
        CountsError
            At the first value that is not a count.
        """
        order = np.arange(len(rows.indptr) - 1) if order is None else order
        chosen = rows if columns is None else select_columns(rows, columns)
        if layer is not None:
            return _tidy_layer(chosen, order, self.n_vars, *types)
        indptr = np.empty(len(order) + 1, np.int64)
        indices = np.empty(len(chosen.indices), types[0])
        for value_type in (np.dtype(types[1] or np.uint32), np.dtype(np.uint32)):
            data = np.empty(len(chosen.data), value_type)
            largest = float(np.iinfo(value_type).max)
            status, entry = kernels.clean_rows(
                *chosen[1:], order, self._round_counts, largest, indptr, indices, data
            )
            if status != kernels.WIDER:
                break
        if status != kernels.FINE:
            raise self._not_counts(rows)
        return indptr, indices[:entry], data[:entry]

    def check_rounding(self) -> None:
        """Warn where fractions are rounded that are much of the counts."""
        if self._round_counts and self.dtype.kind == "f":
            warn_of_rounding(self._sample(), self.name)

    def _sample(self) -> npt.NDArray[np.float64] | None:
        return sample_of(lambda: self._content.counts)

    def _matrix(self, layer: str | None) -> Matrix:
        if layer is None:
            return self._content.counts
        if layer not in self._opened:
            if layer not in self._content.layers:
                raise missing_layer(layer, self._content.layers, self.name, self.path)
            matrix = self._content.layers[layer]()
            self._check_shape(matrix)
            self._opened[layer] = matrix
        return self._opened[layer]

    def close(self) -> None:
        """Give the file back; nothing can be read afterwards."""
        self._content.close()

    def __enter__(self) -> Self:
        """Use the source in a ``with`` statement."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def _not_counts(self, rows: Rows) -> CountsError:
        """The error for the first value, in input order, that is not a count."""
        order = np.arange(len(rows.indptr) - 1)
        indptr, indices, data = np.empty_like(rows.indptr), np.empty_like(rows.indices), rows.data
        status, entry = kernels.clean_rows(
            *rows[1:],
            order,
            self._round_counts,
            float(2**32 - 1),
            indptr,
            indices,
            np.empty(len(data), np.uint32),
        )
        row = rows.first + int(np.searchsorted(rows.indptr, entry, side="right")) - 1
        gene = self.var.index[int(rows.indices[entry])]
        elsewhere = self._content.elsewhere
        others = [advice for advice, matrix in elsewhere.items() if looks_like_counts(matrix)]
        if others:
            do = "; ".join(others)
        elif status == kernels.FRACTION and are_estimates(self._sample()):
            do = (
                "give the file that holds the raw counts; or, if these are estimated counts, round "
                "them with --round of `atlas ingest` (round_counts=True in Python)"
            )
        elif status == kernels.FRACTION:
            do = (
                "give the file that holds the raw counts; these look normalised, or like "
                "logarithms, which rounding does not undo"
            )
        else:
            do = "give the file that holds the raw counts"
        return CountsError(
            f"{self._content.counts.place.what} {_REASONS[status]}",
            found=f"value {rows.data[entry]} at row {self.obs.index[row]}, gene {gene}",
            expected="raw counts: whole numbers from 0 to 2^32 - 1",
            do=do,
            path=self.path,
        )

    def _check_shape(self, matrix: Matrix) -> None:
        n_obs, n_vars = len(self._content.obs), len(self._content.var)
        if matrix.shape != (n_obs, n_vars):
            raise InputError(
                f"{matrix.place.what} and the tables of {self.name} disagree in shape",
                found=f"{matrix.shape[0]:,} × {matrix.shape[1]:,} values",
                expected=f"{n_obs:,} rows (obs) × {n_vars:,} genes (var)",
                do="write the file again from its source",
                path=self.path,
            )

    def _check_size(self) -> None:
        n_obs, n_vars = len(self._content.obs), len(self._content.var)
        if n_obs == 0 or n_vars == 0:
            raise InputError(
                f"{self.name} is empty",
                found=f"{n_obs:,} rows × {n_vars:,} genes",
                expected="at least one row and one gene",
                do="look at the step that wrote it; a filter may have kept nothing",
                path=self.path,
            )


def _tidy_layer(
    rows: Rows,
    order: npt.NDArray[np.int64],
    n_vars: int,
    index_type: npt.DTypeLike,
    value_type: npt.DTypeLike | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]:
    dtype: np.dtype[Any] = np.dtype(value_type or rows.data.dtype)
    if value_type is None and dtype.kind in "fb":
        dtype = np.dtype(np.float32 if dtype.kind == "f" else np.uint8)
    block = sp.csr_matrix(
        (rows.data.astype(dtype), rows.indices.astype(np.int32), rows.indptr),
        shape=(len(rows.indptr) - 1, n_vars),
    )
    block.sum_duplicates()
    block.eliminate_zeros()
    block = block[order]
    return block.indptr.astype(np.int64), block.indices.astype(index_type), block.data
