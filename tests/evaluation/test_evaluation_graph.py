"""Measures of the graph of neighbours: Leiden clusters, and what hangs together, of many cells."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from graph_helpers import in_largest_part
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from atlas.errors import ConfigError
from atlas.evaluation import cells, connectivity, leiden
from atlas.evaluation.codes import Categories
from atlas.evaluation.connectivity import LabelGraphs
from atlas.evaluation.index import choice, to_scanpy_graph
from atlas.evaluation.leiden import RESOLUTIONS, best_leiden
from atlas.evaluation.measures import evaluate_embedding
from atlas.evaluation.neighbours import nearest

N = 900
RNG = np.random.default_rng(29)
CODES = RNG.choice(4, N, p=[0.5, 0.3, 0.15, 0.05])
BATCH = RNG.choice(3, N)
Z = (1.6 * RNG.standard_normal((4, 6))[CODES] + RNG.standard_normal((N, 6))).astype(np.float32)
LABELS, BATCHES = Categories(CODES, "abcd"), Categories(BATCH, "xyz")
NAMES = ("nmi_leiden", "ari_leiden", "ari_batch_leiden")


def test_leiden_is_igraphs_called_directly() -> None:
    igraph = pytest.importorskip("igraph", reason="the extra leiden is not installed")
    found = nearest(Z, Z, 14, np.arange(N))
    weights = to_scanpy_graph(found).connectivities.tocoo()
    graph = igraph.Graph(
        n=N, edges=list(zip(weights.row.tolist(), weights.col.tolist(), strict=True))
    )
    scores = {}
    for resolution in RESOLUTIONS:
        igraph.set_random_number_generator(random.Random(42))
        clusters = graph.community_leiden(
            "modularity", weights=weights.data.tolist(), resolution=resolution
        ).membership
        scores[resolution] = (
            normalized_mutual_info_score(CODES, clusters),
            adjusted_rand_score(CODES, clusters),
            1 - adjusted_rand_score(BATCH, clusters),
        )
    igraph.set_random_number_generator(random)
    best = max(RESOLUTIONS, key=lambda r: scores[r][0])
    metrics = evaluate_embedding(Z, BATCHES, LABELS)
    for name, expected in zip(NAMES, scores[best], strict=True):
        assert metrics[name].value == pytest.approx(expected, abs=1e-9)
        assert metrics[name].backend == f"igraph, resolution {best:g}"
        assert metrics[name].n == N
    assert len({np.unique(c).size for c in leiden.leiden(weights.tocsr()).values()}) > 1


def test_leiden_leaves_the_random_numbers_of_others_alone() -> None:
    pytest.importorskip("igraph", reason="the extra leiden is not installed")
    random.seed(3)
    expected = random.random()
    found = nearest(Z, Z, 14, np.arange(N))
    random.seed(3)
    first = best_leiden(found, LABELS)
    assert random.random() == expected
    np.testing.assert_array_equal(first.codes, best_leiden(found, LABELS).codes)


def test_leiden_of_many_cells_is_of_a_sample_and_says_so() -> None:
    pytest.importorskip("igraph", reason="the extra leiden is not installed")
    hidden = Categories(np.where(np.arange(N) % 9 == 0, -1, CODES), "abcd")
    metrics = evaluate_embedding(Z, BATCHES, hidden, leiden_cells=300)
    n_labeled = int((hidden.codes >= 0).sum())
    for name in NAMES:
        assert metrics[name].n == 300
        told = f"a sample of 300 of {n_labeled} labeled cells"
        assert told in str(metrics[name].backend)
        assert metrics[name].standard_error is not None
    whole = evaluate_embedding(Z, BATCHES, hidden)
    assert whole["nmi_leiden"].n == n_labeled
    assert "sample" not in str(whole["nmi_leiden"].backend)
    value, error = metrics["nmi_leiden"].value, metrics["nmi_leiden"].standard_error
    assert value == pytest.approx(whole["nmi_leiden"].value, abs=6 * error + 0.05)


def test_without_igraph_leiden_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "igraph", None)
    metrics = evaluate_embedding(Z, BATCHES, LABELS)
    assert "pip install 'atlas-trainer[leiden]'" in str(metrics["nmi_leiden"].skipped)
    with pytest.raises(ConfigError, match=r"pip install 'atlas-trainer\[leiden\]'"):
        leiden.leiden(to_scanpy_graph(nearest(Z, Z, 14, np.arange(N))).connectivities)


def connected_share(indices: np.ndarray, codes: np.ndarray) -> float:
    """scib-metrics' graph connectivity, with networkx."""
    shares = []
    for label in np.unique(codes[codes >= 0]):
        rows = np.flatnonzero(codes == label)
        graph = nx.DiGraph()
        graph.add_nodes_from(rows)
        graph.add_edges_from((i, j) for i in rows for j in indices[i] if codes[j] == label)
        largest = max(len(part) for part in nx.strongly_connected_components(graph))
        shares.append(largest / len(rows))
    return float(np.mean(shares))


def test_graph_connectivity_of_blocks_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(connectivity, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(connectivity.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cells, "_BLOCK", 128)
    hidden = np.where(RNG.random(N) < 0.2, -1, CODES)
    exact = nearest(Z, Z, 14, np.arange(N))
    metrics = evaluate_embedding(Z, BATCHES, Categories(hidden, "abcd"), max_queries=200)
    found = metrics["graph_connectivity"]
    assert found.value == pytest.approx(connected_share(exact.indices, hidden), abs=1e-12)
    assert found.n == (hidden >= 0).sum()
    assert found.recall == 1
    assert not list(tmp_path.iterdir())


def test_graph_connectivity_by_an_index_tells_its_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    monkeypatch.setattr(choice, "_PATIENCE_SECONDS", 0.0)
    rng = np.random.default_rng(7)
    z = np.tile(Z, (6, 1)) + 0.5 * rng.standard_normal((6 * N, 6), dtype=np.float32)
    codes = np.tile(CODES, 6)
    metrics = evaluate_embedding(
        z, Categories(np.tile(BATCH, 6), "xyz"), Categories(codes, "abcd"), max_queries=300
    )
    found = metrics["graph_connectivity"]
    assert found.backend is not None
    assert "ivf" in found.backend.lower()
    assert found.recall is not None
    assert 0.95 < found.recall <= 1
    exact = connected_share(nearest(z, z, 14, np.arange(len(z))).indices, codes)
    assert found.value == pytest.approx(exact, abs=0.01)


def test_cells_at_one_place_hang_together_whatever_their_order() -> None:
    """40 twins find the same 5; those of one label are one part all the same."""
    far = np.array([[1.0, 1.0], [1.1, 1.0], [1.0, 1.1]])
    z = np.concatenate([np.zeros((40, 2)), far]).astype(np.float32)
    labels = Categories(np.zeros(43), "a")
    assert in_largest_part(nearest(z, z, 5, np.arange(43)), labels).sum() == 40
    two = Categories([0, 1] * 20 + [1] * 3, "ab")
    inside = in_largest_part(nearest(z, z, 5, np.arange(43)), two)
    np.testing.assert_array_equal(inside, np.arange(43) < 40)


def test_a_cell_whose_neighbours_are_not_there_is_an_error() -> None:
    graphs = LabelGraphs(LABELS, 3)
    graphs.add(np.arange(10), nearest(Z, Z[:10], 3, np.arange(10)))
    with pytest.raises(ConfigError, match=r"neighbours of all cells\n.*neighbours of 10 cells"):
        graphs.in_largest_part()
    found = nearest(Z, Z, 3, np.arange(N))
    assert in_largest_part(found, LABELS).sum() > 0
