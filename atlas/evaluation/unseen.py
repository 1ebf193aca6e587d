"""Groups of cells that were called Unknown: a type that a reference lacks lies together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

Indices = npt.NDArray[np.int64]


def connected_groups(rows: Indices, neighbours: Indices, least: int) -> Indices:
    """Connected groups of some cells on the graph of mutual nearest neighbours.

    Two of the cells are joined where each is among the other's neighbours, of all cells. A cell at
    the edge of a known type has neighbours of that type, which are not among the cells; those of a
    type of its own have each other.

    Parameters
    ----------
    rows
        Numbers of the cells, rising: int64 (n,).
    neighbours
        Of each, by number, of all cells: int64 (n, k).
    least
        Cells that a group has at least.

    Returns
    -------
    Group of each cell, 0 the largest, -1 for none: int64 (n,).
    """
    n = len(rows)
    place = np.minimum(np.searchsorted(rows, neighbours), max(n - 1, 0))
    inside = rows[place] == neighbours if n else np.zeros(neighbours.shape, bool)
    source = np.repeat(np.arange(n), inside.sum(axis=1))
    edges = sp.csr_matrix((np.ones(len(source), np.int8), (source, place[inside])), (n, n))
    _, part = connected_components(edges.multiply(edges.T), directed=False)
    sizes = np.bincount(part, minlength=1)
    order = np.argsort(-sizes, kind="stable")  # of equals the one of the first cell
    number = np.full(len(sizes), -1, np.int64)
    large = order[sizes[order] >= least]
    number[large] = np.arange(len(large))
    groups: Indices = number[part]
    return groups
