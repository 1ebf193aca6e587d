"""Counts of whole transcripts, such as Smart-seq2's, by the relative length of their genes.

scANVI (Xu et al. 2021), Online Methods, "Normalization of SmartSeq2 data": counts are divided by
the length of the gene over the mean length of all genes, and the integer part is kept. Cells are
not normalised.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import InputError
from atlas.ingest.matrix import Budget, Matrix, Rows


def read_lengths(path: Path) -> pd.Series[float]:
    """Read a table of genes and lengths: the first two columns of a CSV or TSV, with or without a
    header.

    Raises
    ------
    InputError
        It is no such table, a gene comes twice, or a length is not above 0.
    """
    try:
        with path.open(encoding="utf-8") as file:
            separator = "\t" if "\t" in file.readline() else ","
        table = pd.read_csv(
            path, sep=separator, header=None, dtype=str, usecols=[0, 1], comment="#"
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a table of gene lengths",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            expected="two columns, gene and length, separated by a comma or a tab",
            path=path,
        ) from error
    lengths = pd.to_numeric(table[1], errors="coerce")
    if len(table) > 1 and np.isnan(lengths.iloc[0]):
        table, lengths = table[1:], lengths[1:]  # a header
    bad = table[0][~(lengths > 0)]
    twice = table[0][table[0].duplicated()]
    if len(bad) or len(twice):
        what, names = ("no length above 0", bad) if len(bad) else ("more than one length", twice)
        raise InputError(
            f"{path} has genes with {what}",
            found=f"{len(names):,}, e.g. {', '.join(map(str, names[:5]))}",
            expected="one number above 0 for each gene",
            path=path,
        )
    return pd.Series(lengths.to_numpy(np.float64), index=table[0].to_numpy(object))


def relative_lengths(
    lengths: pd.Series[float], var: pd.DataFrame, table: Path, path: Path | None
) -> npt.NDArray[np.float64]:
    """The length of each gene over their mean, found by name or else by ``gene_ids``.

    Raises
    ------
    InputError
        A gene has no length in the table.
    """
    found = lengths.reindex(var.index.astype(str)).to_numpy(np.float64, copy=True)
    for column in ("gene_ids", "gene_id"):
        if column in var:
            by_id = lengths.reindex(var[column].astype(str)).to_numpy(np.float64)
            found = np.where(np.isnan(found), by_id, found)
    missing = var.index[np.isnan(found)]
    if len(missing):
        raise InputError(
            f"Some genes have no length in {table}",
            found=f"{len(missing):,} of {len(var):,}, e.g. {', '.join(map(str, missing[:5]))}",
            expected="a length for every gene, by its name or id",
            do="add them to the table, or leave these genes out of the input",
            path=path,
        )
    relative: npt.NDArray[np.float64] = found / found.mean()
    return relative


class ByLength(Matrix):
    """A matrix whose values are divided by the relative length of their column, rounded down."""

    def __init__(self, matrix: Matrix, relative: npt.NDArray[np.float64]) -> None:
        super().__init__(matrix.shape, np.float64, matrix.place)
        self._matrix, self._relative = matrix, relative

    def _divided(self, rows: Rows) -> Rows:
        values: npt.NDArray[Any] = np.floor(rows.data / self._relative[rows.indices])
        return rows._replace(data=values)

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        """Yield rows of divided values."""
        for rows in self._matrix.row_blocks(budget):
            yield self._divided(rows)

    def ranges(self, budget: Budget) -> list[tuple[int, int]] | None:
        """Those of the matrix."""
        return self._matrix.ranges(budget)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows of divided values."""
        return self._divided(self._matrix.rows(start, stop))

    def sample(self) -> npt.NDArray[Any]:
        """Values as they are stored."""
        return self._matrix.sample()
