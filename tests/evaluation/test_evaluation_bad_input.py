"""Bad input to the measures: a clear error or a stated rule, never a NaN in a table."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from atlas.errors import ConfigError, ModelError
from atlas.evaluation import measures, vectors
from atlas.evaluation.codes import Categories
from atlas.evaluation.index import NeighborIndex
from atlas.evaluation.measures import compare_embeddings, evaluate_embedding
from atlas.evaluation.metrics import Measure, Metrics
from atlas.evaluation.neighbours import nearest
from atlas.evaluation.scib_table import scib_table
from atlas.evaluation.vectors import tiles as vectors_tiles

N = 300
RNG = np.random.default_rng(41)
CODES, BATCH = RNG.choice(4, N), RNG.choice(3, N)
Z = (2 * RNG.standard_normal((4, 5))[CODES] + RNG.standard_normal((N, 5))).astype(np.float32)
LABELS, BATCHES = Categories(CODES, "abcd"), Categories(BATCH, "xyz")


def measure(
    z: np.ndarray = Z, batch: np.ndarray = BATCH, codes: np.ndarray = CODES
) -> tuple[Metrics, dict[str, str | None], dict[tuple[str, str], Measure]]:
    """All measures; each has a finite value or says why not, and none warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        metrics = evaluate_embedding(
            z,
            Categories(batch, "xyz"),
            Categories(codes, "abcd"),
            individual=z,
            before=(z + batch[:, None]).astype(np.float32),
            proteins=z,
        )
    json.dumps(metrics.to_json(), allow_nan=False)
    table = scib_table({"z": metrics})
    json.dumps(table.to_json(), allow_nan=False)
    for found in (*metrics.measures, *metrics.groups):
        assert (found.value is None) == (found.skipped is not None), found
    return (
        metrics,
        {m.name: m.skipped for m in metrics.measures},
        {(m.name, m.of or ""): m for m in metrics.groups},
    )


def test_k_larger_than_a_batch() -> None:
    """Purity leaves the batch out and says so; what is searched among all cells keeps it."""
    batch = np.where(np.arange(N) < 10, 1, 0)
    metrics, why, groups = measure(batch=batch)
    assert metrics["purity_k15"].value == 1
    assert groups["purity_k15", "batch y"].skipped == (
        "15 neighbours within it need at least 16 cells"
    )
    assert groups["purity_k15", "batch x"].value == 1
    assert why["mixing_entropy_k50"] is None
    assert groups["mixing_entropy_k50", "batch y"].value is not None
    _, why, _ = measure(z=Z[:14], batch=BATCH[:14], codes=CODES[:14])
    assert why["purity_k15"] == "no batch has more than 15 cells"
    assert why["mixing_entropy_k15"] == "15 neighbours need at least 16 cells, and there are 14"
    with pytest.raises(ConfigError, match=r"k is out of range\n.*k = 300\n.*1 to 299"):
        nearest(Z, Z, N, np.arange(N))


def test_a_batch_of_three_cells() -> None:
    batch = np.where(np.arange(N) < 3, 1, 0)
    metrics, why, groups = measure(batch=batch)
    assert why["kbet"] == "less than one cell of the smallest batch is expected among 50"
    assert why["kbet_by_label"] == "no label has enough cells in each of several batches"
    assert "too few for χ²" in " ".join(
        str(m.skipped) for (name, _), m in groups.items() if name == "kbet_by_label"
    )
    assert groups["purity_k15", "batch y"].skipped is not None
    assert groups["cluster_conservation", "batch y"].skipped == (
        "4 clusters need at least twice as many cells"
    )
    for name in ("mixing_entropy_k50", "ilisi", "bras", "silhouette_batch", "pcr_comparison"):
        assert metrics[name].value is not None


def test_one_batch() -> None:
    metrics, why, _ = measure(batch=np.zeros(N, dtype=np.int64))
    names = ["kbet", "kbet_by_label", "ilisi", "pcr_batch", "pcr_comparison", "ari_batch"]
    names += ["mixing_entropy_k50", "mixing_share_of_ceiling_k15", "ari_batch_leiden"]
    for name in names:
        if name != "ari_batch_leiden" or "igraph" not in str(why[name]):
            assert why[name] == "there is only one batch", name
    for name in ("bras", "silhouette_batch"):
        assert why[name] == "no label has several cells in two batches or more"
    assert metrics["label_accuracy_k50"].value is not None
    table = scib_table({"z": metrics})
    assert table["z", "Bio conservation"].value is not None
    assert metrics["graph_connectivity"].value is not None
    assert table["z", "Batch correction"].value is None
    assert table["z", "Batch correction"].skipped == (
        "only graph connectivity has a value, which knows no batches"
    )
    assert table["z", "Total"].value is None


def test_labels_missing_for_some_are_as_if_these_cells_were_not_there() -> None:
    """For what is of labels; what is of batches counts all cells."""
    known = RNG.random(N) < 0.7
    metrics, _, _ = measure(codes=np.where(known, CODES, -1))
    rows = np.flatnonzero(known)
    alone, _, _ = measure(z=Z[rows], batch=BATCH[rows], codes=CODES[rows])
    of_labels = ["silhouette_label", "clisi", "nmi_kmeans", "ari_kmeans", "isolated_labels", "bras"]
    of_labels += ["silhouette_batch", "label_accuracy_k50", "ari_batch", "kbet_by_label"]
    for name in of_labels:
        assert metrics[name].value == pytest.approx(alone[name].value, abs=2e-6), name
    if metrics["nmi_leiden"].value is not None:
        assert metrics["nmi_leiden"].value == pytest.approx(alone["nmi_leiden"].value, abs=1e-9)
    whole, _, _ = measure()
    for name in ("mixing_entropy_k50", "ilisi", "kbet", "pcr_batch"):
        assert metrics[name].value == whole[name].value
        assert metrics[name].n == N


@pytest.mark.parametrize("place", [0.0, 0.1, -7.3, 1e6])
def test_an_embedding_of_one_place(place: float) -> None:
    """Nothing lies apart: batches are mixed, labels are not told apart, and it is said."""
    metrics, why, groups = measure(z=np.tile(np.float32([place, 2 * place, place / 3]), (N, 1)))
    assert metrics["bras"].value == metrics["silhouette_batch"].value == 1
    assert metrics["silhouette_label"].value == metrics["isolated_labels"].value == 0.5
    assert groups["bras", "label a"].value == 1
    assert why["pcr_batch"] == "all cells lie at one place"
    for found in metrics.measures:
        if found.value is not None:
            assert found.note == "all cells lie at one place", found.name


def test_more_cells_at_one_place_than_neighbours_are_told() -> None:
    z = Z.copy()
    z[:40] = z[0]
    metrics, _, _ = measure(z=z)
    said = (
        "40 of 300 cells asked lie at one place with 15 others or more, and the first of these by "
        "row count as their neighbours"
    )
    assert metrics["mixing_entropy_k15"].note == metrics["purity_k15"].note == said
    assert metrics["mixing_entropy_k50"].note is metrics["bras"].note is None


@pytest.mark.parametrize("places", [1, 4])
def test_duplicate_rows(places: int) -> None:
    """Twins are each other's neighbours, nearest by row; many at one place are one part."""
    at = np.arange(N) % places
    metrics, why, _ = measure(z=Z[:places][at], codes=at)
    assert metrics["graph_connectivity"].value == 1
    assert metrics["purity_k15"].value == 1
    if places == 1:
        assert why["pcr_batch"] == "all cells lie at one place"
        assert why["clisi"] == "there is only one label"
    else:
        for name in ("label_accuracy_k50", "nmi_kmeans", "silhouette_label", "clisi"):
            assert metrics[name].value == pytest.approx(1, abs=1e-6), name


@pytest.mark.parametrize("where", ["embedding", "individual", "before", "proteins"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(where: str, value: float) -> None:
    broken = Z.copy()
    broken[7, 1] = value
    arrays = dict.fromkeys(("embedding", "individual", "before", "proteins"), Z) | {where: broken}
    z = arrays.pop("embedding")
    kind = ConfigError if where == "proteins" and np.isnan(value) else ModelError
    said = "cells have some of the proteins" if kind is ConfigError else "not finite.*\n.*1 of"
    with pytest.raises(kind, match=said):
        evaluate_embedding(z, BATCHES, LABELS, **arrays)
    if where == "embedding":
        with pytest.raises(ModelError, match=r"the embedding 'b' has .*not finite.*\n.*in row 7\n"):
            compare_embeddings({"a": Z, "b": broken}, BATCHES, LABELS)


@pytest.mark.parametrize("where", ["embedding", "individual", "before", "proteins"])
def test_all_values_are_checked_before_anything_is_measured(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row is that of the whole array, also past the first tile of rows."""
    monkeypatch.setattr(measures, "_measure", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(vectors, "tiles", lambda n: vectors_tiles(n, 64))
    broken = Z.copy()
    broken[200, 2] = np.inf
    broken[201] = -np.inf
    arrays = {"individual": Z, "before": Z, "proteins": Z}
    embeddings = {"a": Z, "b": broken if where == "embedding" else Z}
    if where != "embedding":
        arrays[where] = broken
    with pytest.raises(ModelError, match=r"found: 6 of 1,500 values, the first in row 200\n"):
        compare_embeddings(embeddings, BATCHES, LABELS, **arrays)


@pytest.mark.parametrize("change", ["values", "order", "cells", "dimensions"])
def test_an_index_of_another_embedding(change: str) -> None:
    others = {"values": Z + 1, "order": Z[::-1], "cells": Z[:-1], "dimensions": Z[:, :-1]}
    index = NeighborIndex.build(np.ascontiguousarray(others[change]))
    with pytest.raises(ConfigError, match=r"the index is of another embedding\n.*digest"):
        evaluate_embedding(Z, BATCHES, LABELS, index=index)
    evaluate_embedding(Z, BATCHES, LABELS, index=NeighborIndex.build(Z))
