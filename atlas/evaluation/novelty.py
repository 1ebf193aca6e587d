"""How far cells lie from a reference, in units of the reference's own distances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from atlas.evaluation.codes import Categories, sample_rows
from atlas.evaluation.neighbours import Backend, Embedding, Search, nearest
from atlas.evaluation.vectors import Distances, rows_of

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CELLS_PER_LABEL = 300
"""Cells of a label by which its distances are known; all where there are fewer."""

_AS_FAR = 4
"""Neighbours looked for among all cells, in k: mostly enough that k are of other studies."""

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
        own = nodes[cells]
        stands_for = np.bincount(nodes) / np.maximum(np.bincount(own, minlength=nodes.max() + 1), 1)
        return cls.from_sample(near.distances, own, stands_for[own], parents)

    @classmethod
    def from_sample(
        cls,
        distances: Distances,
        nodes: Codes,
        weight: Floats,
        parents: Codes,
    ) -> Self:
        """The scale of a reference, from some of its cells.

        Parameters
        ----------
        distances
            Of each cell to the k nearest others of the reference: (n, k).
        nodes
            Its label: int64 (n,).
        weight
            How many cells it stands for: float64 (n,).
        parents
            As for :meth:`of`.
        """
        mean = distances.mean(axis=1, dtype=np.float64)
        positive = mean[mean > 0]
        floor = _FLOOR * float(np.median(positive)) if len(positive) else np.finfo(float).tiny
        logs = np.log(np.maximum(mean, floor))

        # a node's cells and those below it; each cell counts as many as its sample stands for
        count = np.bincount(nodes, weights=weight, minlength=len(parents))
        total = np.bincount(nodes, weights=weight * logs, minlength=len(parents))
        for node in range(len(parents) - 1, -1, -1):
            if parents[node] >= 0:
                total[parents[node]] += total[node]
                count[parents[node]] += count[node]
        location = np.empty(len(parents))
        everywhere = float(np.average(logs, weights=weight))
        for node, parent in enumerate(parents):
            above = location[parent] if parent >= 0 else everywhere
            location[node] = total[node] / count[node] if count[node] else above
        spread = np.sqrt(np.average((logs - location[nodes]) ** 2, weights=weight))
        return cls(location, max(float(spread), _LEAST_SPREAD), floor)

    def score(self, distances: Distances, labels: Codes) -> Floats:
        """Scores of cells: float64 (n_cells,).

        Parameters
        ----------
        distances
            To the k nearest reference cells: (n_cells, k).
        labels
            The node that each cell gets: int64 (n_cells,).
        """
        mean = distances.mean(axis=1, dtype=np.float64)
        beyond: Floats = np.log(np.maximum(mean, self.floor)) - self.location[labels]
        return beyond / self.spread


class OwnDistances:
    """Distances of a reference's cells to its other cells, whichever study is left out.

    A sample of cells is searched among all cells once. Of the neighbours found those of the study
    that is left out are passed over, and only cells for which too few remain are searched again: to
    search for each study anew would take as many times as long as there are studies.

    Parameters
    ----------
    z, nodes, groups, k, seed, backend
        As for :func:`atlas.evaluation.calibration.leave_out`.
    """

    def __init__(
        self,
        z: Embedding,
        nodes: Codes,
        groups: Categories,
        k: int,
        seed: int,
        backend: Backend,
    ) -> None:
        self._z, self._nodes, self._groups = z, nodes, groups.codes
        self._k, self._backend = k, backend
        # the cells of each label in each study, in one sort
        width = len(groups.names) + 1
        pairs, stratum, sizes = np.unique(
            nodes * width + groups.codes + 1, return_inverse=True, return_counts=True
        )
        strata = np.split(np.argsort(stratum, kind="stable"), np.cumsum(sizes)[:-1])
        n_studies = np.bincount(pairs // width)
        cells, weight = [], []
        for own, node in zip(strata, (pairs // width).tolist(), strict=True):
            # so many that enough remain whichever study is left out
            most = math.ceil(CELLS_PER_LABEL / max(1, n_studies[node] - 1))
            drawn = sample_rows(own, most, seed)
            cells.append(drawn)
            weight.append(np.full(len(drawn), len(own) / len(drawn)))
        self._cells, self._weight = np.concatenate(cells), np.concatenate(weight)
        far = min(_AS_FAR * k, len(z) - 1)
        self._near = nearest(z, z[self._cells], far, self._cells, backend=backend)

    def without(self, left_out: int, parents: Codes) -> DistanceScale:
        """The scale of the other studies."""
        asked = self._groups[self._cells] != left_out
        cells = self._cells[asked]
        near, distances = self._near.indices[asked], self._near.distances[asked]
        others = self._groups[near] != left_out
        first = np.argsort(~others, axis=1, kind="stable")[:, : self._k]
        found = np.take_along_axis(distances, first, axis=1)
        short = np.flatnonzero(others.sum(axis=1) < self._k)
        if len(short):
            rest = self._groups != left_out
            place = np.cumsum(rest) - 1
            among = rows_of(self._z, rest)
            again = cells[short]
            found[short] = nearest(
                among, self._z[again], self._k, place[again], backend=self._backend
            ).distances
        return DistanceScale.from_sample(found, self._nodes[cells], self._weight[asked], parents)
