"""What share of the true neighbours an approximate search finds, on samples of its own rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from atlas.evaluation.exact import SPARE_CANDIDATES, Indices
from atlas.evaluation.frame import Frame
from atlas.evaluation.index.lists import Approximate
from atlas.evaluation.index.searching import search_all
from atlas.evaluation.neighbours import Neighbours, Recall, distances_of, recall_of
from atlas.evaluation.vectors import Embedding

_RECALL_QUERIES = 1000
_TUNING_QUERIES = 300
_TUNING_K = 100

Found = Callable[[Indices, int], Neighbours]
"""The k neighbours of some rows, by the search that is measured."""


def measured_recall(vectors: Embedding, frame: Frame, k: int, seed: int, find: Found) -> Recall:
    """The share of the k true neighbours that is found, for 1,000 of the rows.

    Parameters
    ----------
    vectors, frame
        The rows, float32 (N, d), and their frame.
    k
        Neighbours of each, fewer than there are rows.
    seed
        Of the sample.
    find
        The search.
    """
    rows = _sample(len(vectors), _RECALL_QUERIES, seed, salt=1)
    return recall_of(find(rows, k), _exactly(vectors, frame, rows, k))


def tune(lists: Approximate, vectors: Embedding, seed: int, target: float, find: Found) -> None:
    """Have lists searched broadly enough for a sample of rows to find its neighbours.

    Parameters
    ----------
    lists, vectors
        The lists of some rows: float32 (N, d).
    seed
        Of the sample.
    target
        Share of the neighbours to be found.
    find
        The search of these lists.
    """
    rows = _sample(len(vectors), _TUNING_QUERIES, seed, salt=2)
    k = min(_TUNING_K, len(vectors) - 1)
    if k < 1:
        return
    exact = _exactly(vectors, lists.frame, rows, k)

    def enough() -> bool:
        return recall_of(find(rows, k), exact).value >= target

    lists.tune(vectors[rows], min(k + 1 + SPARE_CANDIDATES, len(vectors)), enough)


def _exactly(vectors: Embedding, frame: Frame, rows: Indices, k: int) -> Neighbours:
    indices, squared = search_all(vectors, vectors[rows], k, rows, frame)
    return Neighbours(indices, distances_of(squared), "exact")


def _sample(n: int, most: int, seed: int, salt: int) -> Indices:
    rng = np.random.default_rng([seed, salt])
    return np.sort(rng.choice(n, min(most, n), replace=False, shuffle=False)).astype(np.int64)
