"""Groups of Unknown cells on the graph of mutual neighbours."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from atlas.evaluation.neighbours import nearest
from atlas.evaluation.unseen import connected_groups


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_the_connected_parts_as_networkx_finds_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 4, (5, 3))
    z = (centres[rng.integers(0, 5, 300)] + rng.normal(size=(300, 3))).astype(np.float32)
    rows = np.flatnonzero(rng.random(300) < 0.5)
    k, least = 6, 4
    distance = np.linalg.norm(z.astype(np.float64)[:, None] - z, axis=-1)
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1)[:, :k]
    graph = nx.Graph()
    graph.add_nodes_from(rows)
    chosen = set(rows)
    graph.add_edges_from(
        (i, j) for i in rows for j in near[i] if j in chosen and i in near[j] and i != j
    )
    parts = [part for part in nx.connected_components(graph) if len(part) >= least]
    found = connected_groups(rows, nearest(z, z[rows], k, rows).indices, least)
    groups = {frozenset(rows[found == code]) for code in range(found.max() + 1)}
    assert groups == {frozenset(part) for part in parts}
    assert len(groups) > 1
    sizes = np.bincount(found[found >= 0])
    assert (np.diff(sizes) <= 0).all()
    assert (found < 0).sum() == len(rows) - sum(map(len, parts))


def test_no_cell_no_group() -> None:
    empty = connected_groups(np.empty(0, np.int64), np.empty((0, 5), np.int64), 3)
    assert empty.shape == (0,)
