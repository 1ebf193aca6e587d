"""Sums of distances from some cells to all cells of each group, without the matrix of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from atlas.evaluation.exact import full_precision
from atlas.evaluation.vectors import Embedding, centred, column_means, tiles

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_DOUBLE_PAIRS = 5e7
_ROW_TILE = 16384


def summed_distances(
    embedding: Embedding, rows: Indices, groups: Indices, n_groups: int, queries: Indices
) -> Floats:
    """Sum of the Euclidean distances from each query to the rows of each group.

    Up to 50 M pairs in float64. Above, distances are float32 after centring in float64, and their
    sums float64: a pair that coincides, as a cell with itself, is then some 3e-4 of its distance
    from the centre apart, others are right to 1e-6.

    Parameters
    ----------
    embedding
        float32, (N, d).
    rows, groups
        The rows, and the group of each, 0 to n_groups - 1: int64 (n,).
    n_groups
        Number of groups.
    queries
        Rows of the embedding to measure from: int64 (Q,).

    Returns
    -------
    float64, (Q, n_groups).
    """
    order = np.argsort(groups, kind="stable")
    rows, groups = rows[order], groups[order]
    double = float(len(rows)) * len(queries) <= _DOUBLE_PAIRS
    device = "cuda" if torch.cuda.is_available() and not double else "cpu"
    centre = column_means(embedding)

    def placed(where: Indices) -> torch.Tensor:
        if double:
            return torch.from_numpy(embedding[where] - centre)
        return torch.from_numpy(centred(embedding[where], centre)).to(device)

    points = placed(queries)
    squares = points.square().sum(dim=1, keepdim=True)
    sums = torch.zeros((len(queries), n_groups), dtype=torch.float64, device=device)
    query_tile = 8192 if device == "cuda" else 256
    with full_precision():
        for part in tiles(len(rows), _ROW_TILE):
            tile = placed(rows[part])
            ends = np.flatnonzero(np.diff(groups[part])) + 1
            bounds = [0, *ends.tolist(), part.stop - part.start]
            tile_squares = tile.square().sum(dim=1)
            for block in tiles(len(queries), query_tile):
                squared = torch.addmm(tile_squares, points[block], tile.T, alpha=-2)
                distance = squared.add_(squares[block]).clamp_(min=0).sqrt_()
                for start, stop in pairwise(bounds):
                    group = int(groups[part.start + start])
                    sums[block, group] += distance[:, start:stop].sum(dim=1).to(sums.dtype)
    return sums.cpu().numpy()
