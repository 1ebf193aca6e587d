"""Neighbours among some rows of an index: as exact search over these rows alone has them."""

from __future__ import annotations

import numpy as np
import pytest

from atlas.evaluation.exact import import_faiss
from atlas.evaluation.index import Kind, NeighborIndex
from atlas.evaluation.index.among import Among
from atlas.evaluation.neighbours import nearest

KINDS = ["exact", *(["flat", "ivf", "hnsw"] if import_faiss() else [])]
N, K = 1500, 20


def _exactly(z: np.ndarray, queries: np.ndarray, own: np.ndarray | None) -> np.ndarray:
    distance = np.linalg.norm(queries.astype(np.float64)[:, None] - z, axis=-1)
    if own is not None:
        distance[np.arange(len(own)), own] = np.where(own >= 0, np.inf, distance[:, 0])
    return np.argsort(distance, axis=1, kind="stable")[:, :K]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.9, 0.3, 0.02])
def test_it_is_as_if_the_index_had_no_other_rows(kind: Kind, share: float) -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(N, 4)).astype(np.float32)
    rows = np.sort(rng.choice(N, max(K + 1, int(share * N)), replace=False)).astype(np.int64)
    among = Among(NeighborIndex.build(z, kind=kind, device="cpu", seed=1), rows)
    queries = rng.normal(size=(100, 4)).astype(np.float32)
    found = among.search(queries, K)
    expected = _exactly(z[rows], queries, None)
    assert found.indices.shape == (100, K)
    shared = np.mean([len({*a} & {*b}) / K for a, b in zip(found.indices, expected, strict=True)])
    assert shared == 1 if kind in ("exact", "flat") else shared > 0.97
    distance = np.linalg.norm(queries[:, None].astype(np.float64) - z[rows][found.indices], axis=-1)
    np.testing.assert_allclose(found.distances, distance, rtol=1e-6)
    assert (np.diff(distance, axis=1) >= 0).all()
    # a row is left out of its own neighbours
    own = np.arange(0, len(rows), 2, dtype=np.int64)
    found = among.search(z[rows[own]], K, own)
    assert not (found.indices == own[:, None]).any()
    peer = nearest(z[rows], z[rows[own]], K, own)
    shared = (found.distances <= peer.distances[:, -1:]).mean()
    assert shared == 1 if kind in ("exact", "flat") else shared > 0.97


@pytest.mark.skipif(import_faiss() is None, reason="an approximate index needs FAISS")
def test_queries_among_rows_that_do_not_count_are_searched_exactly() -> None:
    """As a new study's own type: all that is near them is of the study itself."""
    rng = np.random.default_rng(1)
    away = rng.normal(9, 0.1, (800, 4))
    z = np.concatenate([rng.normal(size=(700, 4)), away]).astype(np.float32)
    rows = np.arange(700, dtype=np.int64)
    among = Among(NeighborIndex.build(z, kind="ivf", device="cpu"), rows)
    found = among.search(z[700:750], K)
    np.testing.assert_array_equal(found.indices, _exactly(z[:700], z[700:750], None))
