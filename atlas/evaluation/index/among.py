"""Neighbours among some rows of an index, as if it had no others."""

from __future__ import annotations

import numpy as np

from atlas.evaluation.exact import Indices
from atlas.evaluation.index.neighbor_index import NeighborIndex
from atlas.evaluation.neighbours import Neighbours, nearest
from atlas.evaluation.vectors import Embedding

_MORE = (2, 16)
"""So many times k rows are asked of the index before a query is searched without it."""


class Among:
    """Some rows of an index, searched through it.

    An exact index is searched over these rows alone. Of an approximate one more neighbours than are
    wanted are asked, and those among the rows are taken; where they are too few, more still, and at
    last these rows are searched exactly. So each answer is at least as good as the index's.

    Parameters
    ----------
    index
        The index.
    rows
        Numbers of its rows, rising: int64 (n,).
    """

    def __init__(self, index: NeighborIndex, rows: Indices) -> None:
        self._index, self._rows = index, rows
        self._vectors = index.vectors[rows]
        self._place = np.full(len(index), -1, np.int64)
        self._place[rows] = np.arange(len(rows))

    def search(self, queries: Embedding, k: int, query_ids: Indices | None = None) -> Neighbours:
        """The k nearest of the rows for each query, nearest first, equal distances by row.

        Parameters
        ----------
        queries
            float32, (Q, d).
        k
            Neighbours of each.
        query_ids
            Which of these rows each query is, left out of its own neighbours: int64 (Q,), -1 for
            none.

        Returns
        -------
        Neighbours
            Their numbers are places among the rows.
        """
        index = self._index
        if index.choice.kind in ("exact", "flat"):
            return nearest(self._vectors, queries, k, query_ids)
        own = None
        if query_ids is not None:
            own = np.where(query_ids >= 0, self._rows[query_ids], -1)
        indices = np.empty((len(queries), k), np.int64)
        distances = np.empty((len(queries), k))
        left = np.arange(len(queries))
        recall = index.recall(k)
        for times in _MORE:
            wanted = min(times * k, len(index) - (own is not None))
            if not len(left) or wanted < k:
                break
            ids = None if own is None else own[left]
            found = index.search(np.ascontiguousarray(queries[left]), wanted, ids)
            place = self._place[found.indices]
            inside = place >= 0
            enough = inside.sum(axis=1) >= k
            # the first k that are inside keep their order
            first = np.argsort(~inside[enough], axis=1, kind="stable")[:, :k]
            done = left[enough]
            indices[done] = np.take_along_axis(place[enough], first, axis=1)
            distances[done] = np.take_along_axis(found.distances[enough], first, axis=1)
            left = left[~enough]
        if len(left):
            ids = None if query_ids is None else query_ids[left]
            exactly = nearest(self._vectors, np.ascontiguousarray(queries[left]), k, ids)
            indices[left], distances[left] = exactly.indices, exactly.distances
        return Neighbours(indices, distances, index.backend, recall)
