"""Entropy of batch mixing.

scVI (Lopez et al. 2018) and scANVI (Xu et al. 2021), Methods: the entropy of the batch frequencies
among a cell's 50 nearest neighbours, averaged over cells; scArches (Lotfollahi et al. 2022),
Methods: among 15.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import xlogy
from scipy.stats import hypergeom

from atlas.evaluation.neighbours import Indices


def batch_entropies(
    indices: Indices, batches: npt.NDArray[np.int64], n_batches: int
) -> npt.NDArray[np.float64]:
    """Entropy of the batch frequencies among each query's neighbours.

    Parameters
    ----------
    indices
        Neighbours of each query, as rows of ``batches``: int64, (n_queries, k).
    batches
        Batch of every cell: int64, (n_cells,).
    n_batches
        Number of batches.

    Returns
    -------
    Nats: float64, (n_queries,).
    """
    n_queries, k = indices.shape
    entropies = np.empty(n_queries)
    tile = max(1, 2**22 // n_batches)
    for start in range(0, n_queries, tile):
        codes = batches[indices[start : start + tile]]
        codes += np.arange(len(codes))[:, None] * n_batches
        counts = np.bincount(codes.ravel(), minlength=(len(codes)) * n_batches)
        shares = counts.reshape(len(codes), n_batches) / k
        entropies[start : start + tile] = -xlogy(shares, shares).sum(axis=1)
    return entropies


def reweighted_entropies(
    indices: Indices, batches: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Entropy among each query's neighbours as if all batches were equally large.

    The neighbours of each batch are counted relative to its cells, so that even mixing gives ln B
    whatever the sizes.

    Parameters
    ----------
    indices
        Neighbours of each query: int64, (n_queries, k).
    batches
        Batch of every cell: int64, (n_cells,).
    sizes
        Cells of each batch: int64, (B,).

    Returns
    -------
    Nats: float64, (n_queries,).
    """
    n_queries, n_batches = len(indices), len(sizes)
    entropies = np.empty(n_queries)
    tile = max(1, 2**22 // n_batches)
    for start in range(0, n_queries, tile):
        codes = batches[indices[start : start + tile]]
        codes += np.arange(len(codes))[:, None] * n_batches
        counts = np.bincount(codes.ravel(), minlength=len(codes) * n_batches)
        weights = counts.reshape(len(codes), n_batches) / np.maximum(sizes, 1)
        shares = weights / weights.sum(axis=1, keepdims=True)
        entropies[start : start + tile] = -xlogy(shares, shares).sum(axis=1)
    return entropies


def permutation_ceiling(batch_sizes: npt.NDArray[np.int64], k: int) -> float:
    """Expected entropy among k neighbours after a random permutation of the batches, nats.

    Exact, with no permutation drawn: whatever the neighbour lists, the batches of k different cells
    after a permutation are k draws without replacement, so the count of each batch is
    hypergeometric; and the entropy is a sum over batches of a function of that count. It is what
    perfect mixing reaches: below ln B, because k neighbours cannot show B equal shares, and because
    batches differ in size.

    Parameters
    ----------
    batch_sizes
        Cells of each batch: int64, (B,).
    k
        Neighbours per cell.
    """
    shares = np.arange(k + 1) / k
    terms = -xlogy(shares, shares)
    total = int(batch_sizes.sum())
    return float(
        sum(terms @ hypergeom.pmf(np.arange(k + 1), total, int(size), k) for size in batch_sizes)
    )
