"""Local inverse Simpson's index (Korsunsky et al. 2019, Methods), as scib-metrics 0.5.10 has it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from atlas.evaluation.vectors import Distances, tiles

Floats = npt.NDArray[np.float64]

_TOLERANCE = 1e-5
_STEPS = 50
_TILE = 8192


def lisi(
    distances: Distances,
    codes: npt.NDArray[np.int64],
    n_codes: int,
    perplexity: float | None = None,
) -> Floats:
    """How many categories are found near each cell, as if they came equally often.

    Neighbours weigh exp(-β d), with β of each cell such that the weights have the perplexity.
    The index is 1 over the sum of the squared shares of the categories.

    Parameters
    ----------
    distances
        Euclidean distances to the neighbours, the cell itself left out: (n, k).
    codes
        Category of each neighbour: int64, (n, k).
    n_codes
        Number of categories.
    perplexity
        Effective number of neighbours; a third of k + 1, rounded down, if not given, which is
        scib-metrics' rule as it counts the cell itself.

    Returns
    -------
    1 to n_codes: float64, (n,).
    """
    n, k = distances.shape
    perplexity = max(1, (k + 1) // 3) if perplexity is None else perplexity
    out = np.empty(n)
    for rows in tiles(n, _TILE):
        weights = _weights(distances[rows].astype(np.float64), math.log(perplexity))
        cell = np.arange(len(weights))[:, None] * n_codes
        shares = np.bincount(
            (codes[rows] + cell).ravel(), weights.ravel(), minlength=len(weights) * n_codes
        ).reshape(-1, n_codes)
        out[rows] = 1 / np.einsum("nc,nc->n", shares, shares)
    return out


def _weights(distances: Floats, target: float) -> Floats:
    """Weights of the neighbours of each cell whose entropy is ``target``, by bisection of β."""
    # Weights do not change when all distances of a cell do by as much, and cannot underflow so.
    distances = distances - distances.min(axis=1, keepdims=True)
    beta = np.ones(len(distances))
    low, high = np.full(len(distances), -np.inf), np.full(len(distances), np.inf)
    weights, entropy = _at(distances, beta)
    for _ in range(_STEPS):
        excess = entropy - target
        open_ = np.flatnonzero(np.abs(excess) >= _TOLERANCE)
        if not len(open_):
            break
        b, above = beta[open_], excess[open_] > 0
        low[open_] = np.where(above, b, low[open_])
        high[open_] = np.where(above, high[open_], b)
        lo, hi = low[open_], high[open_]
        with np.errstate(invalid="ignore"):
            beta[open_] = np.where(
                above,
                np.where(np.isinf(hi), b * 2, (b + hi) / 2),
                np.where(np.isinf(lo), b / 2, (b + lo) / 2),
            )
        weights[open_], entropy[open_] = _at(distances[open_], beta[open_])
    return weights


def _at(distances: Floats, beta: Floats) -> tuple[Floats, Floats]:
    weights = np.exp(-distances * beta[:, None])
    total = weights.sum(axis=1)
    entropy = np.log(total) + beta * (distances * weights).sum(axis=1) / total
    return weights / total[:, None], entropy
