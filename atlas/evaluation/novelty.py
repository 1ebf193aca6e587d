"""How far cells lie from a reference, in units of the reference's own distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from atlas.evaluation.codes import sample_rows
from atlas.evaluation.neighbours import Backend, Embedding, Search, nearest

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CELLS_PER_LABEL = 300
"""Cells of a label by which its distances are known; all where there are fewer."""

_LEAST_SPREAD = 1e-3
_FLOOR = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class DistanceScale:
    """Distances within a reference, by label, in logarithms.

    A cell's distance is d̄, the mean of the Euclidean distances to its k nearest reference cells.
    Its score is (log d̄ - m) / s: m is the mean of log d̄ of the reference's own cells of the label
    that the cell gets, each to its k nearest others, and s the standard deviation of log d̄ around
    the m of its label, one for all labels. So the score is 0 for a cell that lies in its label as
    the reference's cells do, positive for one that lies outside, and the unit of the embedding has
    no say. It is local: types of few or of diverse cells, which lie wide apart, have their own m.

    Attributes
    ----------
    location
        m of each node of the labels' tree, over the cells labelled with it or below it; of a node
        without such cells that of the node above, and of all cells at the root:
        float64 (n_nodes,).
    spread
        s.
    floor
        Least d̄ that is told from 0: a millionth of the median. Duplicates have none.
    """

    location: Floats
    spread: float
    floor: float

    @classmethod
    def of(
        cls,
        z: Embedding,
        nodes: Codes,
        parents: Codes,
        k: int,
        *,
        seed: int = 0,
        backend: Backend = "auto",
        search: Search | None = None,
    ) -> Self:
        """Measure a reference; a sample of each label's cells is searched among all cells.

        Parameters
        ----------
        z
            Embedding: float32 (n_cells, d), more than k cells.
        nodes
            Label of each cell: int64 (n_cells,).
        parents
            Parent of each node, which comes before it; -1 for a root: int64 (n_nodes,).
        k
            Neighbours over which distances are averaged.
        seed
            Of the sample.
        backend
            Of :func:`atlas.evaluation.neighbours.nearest`.
        search
            What searches the rows of ``z`` in its place.
        """
        drawn = [
            sample_rows(np.flatnonzero(nodes == node).astype(np.int64), CELLS_PER_LABEL, seed)
            for node in np.unique(nodes)
        ]
        cells = np.concatenate(drawn)
        if search is None:
            near = nearest(z, z[cells], k, cells, backend=backend)
        else:
            near = search(z[cells], k, cells)
        mean = near.distances.mean(axis=1, dtype=np.float64)
        positive = mean[mean > 0]
        floor = _FLOOR * float(np.median(positive)) if len(positive) else np.finfo(float).tiny
        logs = np.log(np.maximum(mean, floor))

        # a node's cells and those below it; each cell counts as many as its sample stands for
        count = np.bincount(nodes, minlength=len(parents)).astype(np.float64)
        sampled = np.bincount(nodes[cells], minlength=len(parents))
        weight = (count / np.maximum(sampled, 1))[nodes[cells]]
        total = np.bincount(nodes[cells], weights=weight * logs, minlength=len(parents))
        for node in range(len(parents) - 1, -1, -1):
            if parents[node] >= 0:
                total[parents[node]] += total[node]
                count[parents[node]] += count[node]
        location = np.empty(len(parents))
        everywhere = float(np.average(logs, weights=weight))
        for node, parent in enumerate(parents):
            above = location[parent] if parent >= 0 else everywhere
            location[node] = total[node] / count[node] if count[node] else above
        spread = np.sqrt(np.average((logs - location[nodes[cells]]) ** 2, weights=weight))
        return cls(location, max(float(spread), _LEAST_SPREAD), floor)

    def score(self, distances: npt.NDArray[np.float32], labels: Codes) -> Floats:
        """Scores of cells: float64 (n_cells,).

        Parameters
        ----------
        distances
            To the k nearest reference cells: float32 (n_cells, k).
        labels
            The node that each cell gets: int64 (n_cells,).
        """
        mean = distances.mean(axis=1, dtype=np.float64)
        beyond: Floats = np.log(np.maximum(mean, self.floor)) - self.location[labels]
        return beyond / self.spread
