"""One search of an index: candidates of lists, or all rows, put in order in float64."""

from __future__ import annotations

import numpy as np

from atlas.evaluation.exact import (
    SPARE_CANDIDATES,
    Device,
    Floats,
    Indices,
    Kernel,
    import_faiss,
    refine,
    search_exactly,
)
from atlas.evaluation.frame import Frame
from atlas.evaluation.index.lists import Approximate
from atlas.evaluation.vectors import Embedding, tiles

_BLOCK = 65536


def search_lists(
    lists: Approximate, vectors: Embedding, queries: Embedding, k: int, ids: Indices | None
) -> tuple[Indices, Floats]:
    """The k rows nearest to each query among those that the lists propose.

    Parameters
    ----------
    lists
        The structure of FAISS.
    vectors, queries
        float32, (N, d) and (Q, d).
    k
        Neighbours of each.
    ids
        Row that each query is, int64 (Q,), -1 for none.

    Returns
    -------
    Rows, int64 (Q, k), and squared distances, float64 (Q, k).
    """
    indices = np.empty((len(queries), k), dtype=np.int64)
    squared = np.empty((len(queries), k))
    wanted = min(k + int(ids is not None) + SPARE_CANDIDATES, len(vectors))
    for block in tiles(len(queries), _BLOCK):
        candidates = lists.propose(queries[block], wanted)
        # Lists may hold fewer rows than are wanted: those queries are searched exactly.
        full = (candidates >= 0).all(axis=1)
        rows = block.start + np.flatnonzero(full)
        own = None if ids is None else ids[rows]
        if len(rows):
            indices[rows], squared[rows], _ = refine(
                vectors, queries[rows], candidates[full], k, own, lists.frame
            )
        rows = block.start + np.flatnonzero(~full)
        own = None if ids is None else ids[rows]
        if len(rows):
            indices[rows], squared[rows] = search_all(vectors, queries[rows], k, own, lists.frame)
    return indices, squared


def search_all(
    vectors: Embedding,
    queries: Embedding,
    k: int,
    ids: Indices | None,
    frame: Frame,
    kernel: Kernel | None = None,
    device: Device = "cpu",
) -> tuple[Indices, Floats]:
    """The k nearest of all rows, with FAISS where it is installed if no kernel is named."""
    if kernel is None:
        kernel = "torch" if import_faiss() is None else "faiss"
    return search_exactly(vectors, queries, k, ids, frame=frame, kernel=kernel, device=device)
