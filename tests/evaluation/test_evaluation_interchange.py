"""Neighbours to and from scib-metrics and scanpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from anndata import AnnData

from atlas.errors import ConfigError
from atlas.evaluation.index import (
    Kind,
    NeighborIndex,
    NeighborsResults,
    from_neighbors_results,
    to_neighbors_results,
    to_scanpy_graph,
)
from atlas.evaluation.neighbours import Neighbours, nearest

Z = np.random.default_rng(0).standard_normal((500, 5)).astype(np.float32)


def test_to_scib_and_back() -> None:
    found = NeighborIndex.build(Z, kind="flat").neighbours(14)
    theirs = to_neighbors_results(found)
    assert theirs.indices.shape == (500, 15)
    np.testing.assert_array_equal(theirs.indices[:, 0], np.arange(500))
    assert not theirs.distances[:, 0].any()
    back = from_neighbors_results(theirs)
    np.testing.assert_array_equal(back.indices, found.indices)
    np.testing.assert_array_equal(back.distances, found.distances)
    assert back.recall is None
    assert from_neighbors_results(theirs, recall=found.recall).recall == found.recall


def test_self_is_left_out_by_id_wherever_it_is() -> None:
    indices = np.array([[0, 1, 2], [0, 1, 2], [1, 0, 3], [2, 1, 3]])
    distances = np.arange(12, dtype=np.float32).reshape(4, 3)
    ours = from_neighbors_results(NeighborsResults(indices, distances))
    assert ours.indices.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert ours.distances.tolist() == [[1, 2], [3, 5], [6, 7], [9, 10]]


def test_what_are_no_neighbours_is_refused() -> None:
    one = np.ones((4, 3), dtype=np.float32)
    with pytest.raises(ConfigError, match="are no cells"):
        from_neighbors_results(NeighborsResults(np.full((4, 3), 4), one))
    with pytest.raises(ConfigError, match="twice"):
        from_neighbors_results(NeighborsResults(np.zeros((4, 3), dtype=np.int64), one))
    with pytest.raises(ConfigError, match="are no neighbours"):
        from_neighbors_results(NeighborsResults(np.zeros((4, 3), dtype=np.int64), one[:, :2]))


@pytest.mark.parametrize("kind", ["exact", "flat", "ivf"])
@pytest.mark.parametrize("turned_into", [to_neighbors_results, to_scanpy_graph])
def test_neighbours_of_some_cells_are_not_given_as_those_of_all(
    kind: Kind, turned_into: Callable[[Neighbours], Any]
) -> None:
    index = NeighborIndex.build(Z, kind=kind)
    whole, rows = index.neighbours(5), np.arange(490, 500)
    wrong = {
        "of 10 queries among 500 cells": [index.neighbours(5, rows), whole.of(rows)],
        "among their own neighbours": [
            dataclasses.replace(whole, indices=np.arange(500)[:, None].repeat(5, axis=1))
        ],
        "another order": [
            index.neighbours(5, np.arange(500)[::-1]),
            index.search(Z, 5, np.full(500, -1)),
        ],
        "not known whose": [
            Neighbours(whole.indices, whole.distances, "by hand"),
            index.search(Z, 5),
        ],
    }
    for said, several in wrong.items():
        for found in several:
            with pytest.raises(ConfigError, match=rf"neighbours of all cells\n.*({said})"):
                turned_into(found)
    first = to_neighbors_results(whole.first(3))
    np.testing.assert_array_equal(first.indices[:, 1:], whole.indices[:, :3])
    flat = nearest(Z, Z, 5, np.arange(500))
    np.testing.assert_array_equal(to_neighbors_results(flat).indices[:, 1:], flat.indices)


@pytest.mark.long
def test_the_graph_is_the_one_that_scanpy_makes() -> None:
    sc = pytest.importorskip("scanpy")
    theirs = AnnData(Z, obsm={"X_z": Z})
    sc.pp.neighbors(theirs, n_neighbors=15, use_rep="X_z", transformer="sklearn")
    ours = AnnData(Z)
    to_scanpy_graph(NeighborIndex.build(Z).neighbours(14)).write(ours)
    for name in ("distances", "connectivities"):
        difference = abs(ours.obsp[name] - theirs.obsp[name])
        assert difference.max() < 1e-4
        assert ours.obsp[name].nnz == theirs.obsp[name].nnz
    sc.tl.umap(ours, maxiter=2)
    assert ours.obsm["X_umap"].shape == (500, 2)
