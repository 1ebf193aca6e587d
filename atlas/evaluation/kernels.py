"""How much each neighbour's label counts, by its distance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atlas.config import VoteKernel
from atlas.evaluation.vectors import Distances


def kernel_weights(
    distances: Distances, kernel: VoteKernel = "gaussian"
) -> npt.NDArray[np.float64]:
    """Weights of each query's neighbours by their distances; those of a query sum to 1.

    ``"gaussian"``
        exp(-d² / 2σ²), σ² the mean of the query's own k squared distances. Only ratios of distances
        enter, so the unit of the embedding has no say, and a query in a sparse region is treated
        like one in a dense region. The nearest of k neighbours weighs at most exp(k / 2) times as
        much as the farthest, and with most embeddings less than twice as much.
    ``"scarches"``
        exp(-d / (2/σ)²), σ the standard deviation of the query's own k distances: the kernel of
        scArches (Lotfollahi et al. 2022, Methods, "Cell type annotation") as its authors' code has
        it, so that figures can be laid beside theirs. It depends on the unit of the embedding
        (wider embeddings lean more on the very nearest).
    ``"uniform"``
        1 / k.

    Exponentials are normalised as logarithms, so none underflows. Where all distances are 0, all
    neighbours weigh the same.

    Parameters
    ----------
    distances
        Of each query to its neighbours: (n_queries, k).
    kernel
        Which.

    Returns
    -------
    float64, (n_queries, k).
    """
    exact = distances.astype(np.float64)
    if kernel == "uniform":
        return np.full(exact.shape, 1 / exact.shape[1])
    if kernel == "scarches":
        logs = -exact * (exact.std(axis=1, keepdims=True) / 2) ** 2
    else:
        # as shares of the farthest, whose square neither underflows nor overflows
        farthest = exact.max(axis=1, keepdims=True)
        share = np.divide(exact, farthest, out=np.zeros_like(exact), where=farthest > 0)
        square = share**2
        spread = 2 * square.mean(axis=1, keepdims=True)
        logs = -np.divide(square, spread, out=square, where=spread > 0)
    logs -= logs.max(axis=1, keepdims=True)
    weights: npt.NDArray[np.float64] = np.exp(logs)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights
