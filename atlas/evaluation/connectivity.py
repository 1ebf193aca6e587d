"""Graph connectivity (Luecken et al. 2022, Methods), as scib-metrics 0.6 has it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from atlas.errors import ConfigError
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.neighbours import Neighbours


def in_largest_part(neighbours: Neighbours, labels: Categories) -> npt.NDArray[np.bool_]:
    """Whether each cell lies in the largest strongly connected part of its label's graph.

    The mean over labels of the share that does is the graph connectivity.

    Parameters
    ----------
    neighbours
        Of all cells, in order.
    labels
        Label of every cell, -1 for none.

    Returns
    -------
    bool, (n_cells,), False for cells without a label.
    """
    n = len(neighbours.indices)
    if n != len(labels):
        raise ConfigError(
            "graph connectivity needs the neighbours of all cells",
            found=f"neighbours of {n} cells",
            expected=f"of {len(labels)}",
        )
    label = labels.codes
    same = (label[:, None] == label[neighbours.indices]) & (label[:, None] != UNLABELED)
    rows = np.repeat(np.arange(n), same.sum(axis=1))
    columns = neighbours.indices[same]
    # Edges between labels are gone, so the parts of all labels are found at once.
    graph = sp.csr_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(n, n))
    n_parts, part = connected_components(graph, directed=True, connection="strong")
    sizes = np.bincount(part, minlength=n_parts)
    largest = np.zeros(len(labels.names), dtype=np.int64)
    by_size = np.argsort(sizes[part], kind="stable")
    labeled = by_size[label[by_size] != UNLABELED]
    largest[label[labeled]] = part[labeled]  # of those written to one place, the last stays
    return np.asarray((label != UNLABELED) & (part == largest[label]))
