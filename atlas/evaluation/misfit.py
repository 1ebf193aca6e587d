"""How unlike the reference cells that they lie among cells are in what they express.

A model lays cells of a type that its reference lacks among cells that it knows, where in the
embedding they may lie as close as others. Their counts tell: what a cell's neighbours express is
compared with what the reference cells express among which these lie.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_TOTAL = 1e4
_PSEUDO = 2.0
_LEAST_CELLS = 20
"""Cells of a label in a batch from which its mean has a say in what the batch's labels share."""
_BLOCK_VALUES = 2**22


def pooled(near: Codes, n: int) -> csr_matrix:
    """The matrix that sums the rows of some neighbours: float32 (len(near), n), 1 for each.

    Parameters
    ----------
    near
        Neighbours of each cell: int64 (n_cells, k).
    n
        Rows there are.
    """
    k = near.shape[1]
    ones = np.ones(near.size, np.float32)
    return csr_matrix((ones, near.ravel(), np.arange(0, near.size + 1, k)), shape=(len(near), n))


def levels(sums: csr_matrix) -> Floats:
    """log(2 + counts per ten thousand) of summed counts: float64 (n, n_genes)."""
    dense = sums.toarray().astype(np.float64)
    total = np.maximum(dense.sum(axis=1, keepdims=True), 1)
    found: Floats = np.log(_PSEUDO + _TOTAL * dense / total)
    return found


def variance_within(counts: csr_matrix, sums: csr_matrix, batches: Codes) -> Floats:
    """How much each gene varies over a reference, within its batches: float64 (n_genes,).

    The variance of :func:`levels` of summed counts of each batch, their mean by number of cells.

    Parameters
    ----------
    counts
        Of cells of the reference: (n_cells, n_genes).
    sums
        What sums the counts of neighbours of one batch, for some cells: (n, n_cells).
    batches
        Batch of each of these: int64 (n,).
    """
    n = np.bincount(batches).astype(np.float64)
    mean, square = (np.zeros((len(n), counts.shape[1])) for _ in range(2))
    for rows in _blocks(sums.shape[0], counts.shape[1]):
        found = levels(sums[rows] @ counts)
        np.add.at(mean, batches[rows], found / n[batches[rows], None])
        np.add.at(square, batches[rows], found**2 / n[batches[rows], None])
    out: Floats = n @ np.maximum(square - mean**2, 0) / n.sum()
    return out


def misfit(
    counts: csr_matrix,
    reference: csr_matrix,
    near: csr_matrix,
    among: csr_matrix,
    batches: Codes,
    labels: Codes,
    variance: Floats,
) -> Floats:
    """The misfit of each query cell: float64 (n_query,), at least 0, higher for what fits less.

    The counts of a cell's neighbours in its batch are summed, and so are those of the reference
    cells that are nearest to each of these. R is the difference of their :func:`levels`, less what
    the batch adds to every gene: the median over the labels given of the mean over their cells (of
    labels with 20 cells there, if any has). Summed over genes is V² R²: a gene counts by how well
    it tells the reference's own cells apart. The misfit is the root mean square of that over the
    cell's neighbours, itself among them: cells of a type lie together, and at its edge those that
    do not fit count for more than those that do.

    In a batch with no more cells than are summed all cells have one sum, which the batch's own
    share takes away whatever it is: their misfit is not known, NaN.

    Parameters
    ----------
    counts, reference
        Counts of the query, and of cells of the reference: (n_query, n_genes) and (n_reference,
        n_genes).
    near
        What sums a query cell's neighbours (:func:`pooled`): (n_query, n_query).
    among
        What sums the reference cells nearest to a query cell: (n_query, n_reference).
    batches, labels
        Of each query cell, the label being the one that it gets: int64 (n_query,).
    variance
        V, as :func:`variance_within` gives it: float64 (n_genes,).
    """
    n_labels = int(labels.max(initial=0)) + 1
    group = batches * n_labels + labels
    n = np.bincount(group, minlength=(int(batches.max(initial=0)) + 1) * n_labels)
    mean = np.zeros((len(n), counts.shape[1]))
    # twice, as all differences at once may not fit in memory
    for rows, found in _differences(counts, reference, near, among):
        np.add.at(mean, group[rows], found / n[group[rows], None])
    own = np.empty(near.shape[0])
    shared = _shared(mean, n, n_labels)
    for rows, found in _differences(counts, reference, near, among):
        own[rows] = (found - shared[batches[rows]]) ** 2 @ variance**2
    summed = np.diff(near.indptr)
    out: Floats = np.sqrt(near @ own**2 / summed)
    out[summed >= np.bincount(batches)[batches]] = np.nan
    return out


def _shared(mean: Floats, n: Codes, n_labels: int) -> Floats:
    """What the labels of each batch have in common: float64 (n_batches, n_genes)."""
    out = np.zeros((len(n) // n_labels, mean.shape[1]))
    for batch in range(len(out)):
        own = np.arange(n_labels) + batch * n_labels
        least = _LEAST_CELLS if n[own].max() >= _LEAST_CELLS else 1
        enough = own[n[own] >= least]
        if len(enough):
            out[batch] = np.median(mean[enough], axis=0)
    return out


def _differences(
    counts: csr_matrix, reference: csr_matrix, near: csr_matrix, among: csr_matrix
) -> Iterator[tuple[slice, Floats]]:
    for rows in _blocks(near.shape[0], counts.shape[1]):
        mine = near[rows]
        yield rows, levels(mine @ counts) - levels((mine @ among) @ reference)


def _blocks(n: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_VALUES // max(1, width))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
