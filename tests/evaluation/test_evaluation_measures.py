"""All measures together: what they agree with, their JSON, and data that cannot give some."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import binomtest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from atlas.errors import ConfigError, FormatError
from atlas.evaluation import vectors
from atlas.evaluation.codes import Categories, sample_rows
from atlas.evaluation.labels import label_accuracy
from atlas.evaluation.measures import NO_BEFORE, NO_INDIVIDUAL, evaluate_embedding
from atlas.evaluation.metrics import Metrics

RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 3, size=400)
LABELS = Categories(np.where(RNG.random(400) < 0.3, -1, CODES), ["B", "T", "NK"])
BATCHES = Categories(RNG.integers(0, 2, size=400), ["one", "two"])
Z = (RNG.standard_normal((400, 4)) + 3 * np.eye(4)[CODES]).astype(np.float32)


def test_figures_are_those_of_the_parts() -> None:
    metrics = evaluate_embedding(Z, BATCHES, LABELS)
    assert {measure.skipped for measure in metrics.measures} == {None, NO_BEFORE, NO_INDIVIDUAL}
    transfer = label_accuracy(Z, LABELS, k=50)
    assert metrics["label_accuracy_k50"].value == pytest.approx(transfer.majority.accuracy)
    assert metrics["label_weighted_accuracy_kernel_k50"].value == pytest.approx(
        transfer.weighted.weighted_accuracy
    )
    entropy = metrics["mixing_entropy_k15"]
    assert entropy.unit == "nats"
    assert (entropy.n, entropy.k, entropy.backend) == (400, 15, "faiss flat, CPU")
    bits = metrics["mixing_entropy_bits_k15"]
    assert entropy.value is not None
    assert entropy.standard_error is not None
    assert bits.value == pytest.approx(entropy.value / math.log(2))
    assert bits.standard_error == pytest.approx(entropy.standard_error / math.log(2))
    ceiling = metrics["mixing_share_of_ceiling_k15"].value
    share = metrics["mixing_share_of_log_b_k15"].value
    assert ceiling is not None
    assert share is not None
    assert 0.9 < share < ceiling < 1.1
    assert metrics.label_protocol is not None
    assert f"Each of {transfer.n_cells} labeled cells" in metrics.label_protocol


def test_accuracy_where_the_weighted_vote_answers() -> None:
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 5, 400)
    z = (1.3 * np.eye(5)[codes] + rng.standard_normal((400, 5))).astype(np.float32)
    metrics = evaluate_embedding(z, BATCHES, Categories(codes, "abcde"))
    distance = cdist(z.astype(np.float64), z.astype(np.float64))
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1)[:, :50]
    d = np.take_along_axis(distance, near, axis=1)
    # scArches: a Gaussian of the distance over the spread of each cell's own distances
    weights = np.exp(-d / (2 / d.std(axis=1, keepdims=True)) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    votes = np.stack([(weights * (codes[near] == label)).sum(axis=1) for label in range(5)], axis=1)
    answered = votes.max(axis=1) >= 0.5
    right = votes.argmax(axis=1) == codes
    assert 40 < answered.sum() < 360
    found = metrics["label_accuracy_answered_k50"]
    assert found.value == pytest.approx(right[answered].mean(), abs=1e-9)
    assert found.n == answered.sum()
    assert metrics["label_unknown_share_k50"].value == pytest.approx((~answered).mean(), abs=1e-9)
    kernel = metrics["label_accuracy_kernel_k50"].value
    assert kernel == pytest.approx((right & answered).mean(), abs=1e-9)


def test_isolated_labels_and_batches_of_clusters() -> None:
    rng = np.random.default_rng(7)
    codes = rng.choice(4, 400, p=[0.4, 0.3, 0.2, 0.1])
    batch = np.where(codes >= 2, 0, rng.integers(0, 3, 400))  # c and d in one batch alone
    batch = np.where((codes == 0) & (rng.random(400) < 0.7), 1, batch)
    z = (9 * np.eye(4)[codes] + rng.standard_normal((400, 4))).astype(np.float32)
    metrics = evaluate_embedding(z, Categories(batch, "xyz"), Categories(codes, "abcd"))
    widths = (silhouette_samples(z.astype(np.float64), codes) + 1) / 2
    isolated = np.mean([widths[codes == code].mean() for code in (2, 3)])
    assert metrics["isolated_labels"].value == pytest.approx(isolated, abs=1e-9)
    assert metrics["isolated_labels"].n == (codes >= 2).sum()
    clusters = KMeans(4, n_init=10, random_state=5).fit_predict(z)
    expected = 1 - adjusted_rand_score(batch, clusters)
    assert 0.5 < expected < 0.95
    assert metrics["ari_batch"].value == pytest.approx(expected, abs=1e-12)


def test_backends_give_the_same_figures() -> None:
    faiss = evaluate_embedding(Z, BATCHES, LABELS, backend="faiss")
    torch = evaluate_embedding(Z, BATCHES, LABELS, backend="torch")
    for ours, theirs in zip(faiss.measures, torch.measures, strict=True):
        assert (ours.name, ours.value, ours.standard_error) == (
            theirs.name,
            theirs.value,
            theirs.standard_error,
        )


def test_rows_mapped_from_a_file_give_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of labeled cells, of a reference and of batches, where memory need not hold them."""
    individual = Z[:, :3].copy()
    held = evaluate_embedding(Z, BATCHES, LABELS, individual=individual)
    monkeypatch.setattr(vectors, "IN_MEMORY", 0)
    assert isinstance(vectors.rows_of(Z, np.arange(7)), np.memmap)
    mapped = evaluate_embedding(Z, BATCHES, LABELS, individual=individual)
    assert mapped.to_json() == held.to_json()


def test_sampling_queries_keeps_the_database_and_the_seed() -> None:
    whole = evaluate_embedding(Z, BATCHES, LABELS)["mixing_entropy_k50"]
    part = evaluate_embedding(Z, BATCHES, LABELS, max_queries=100)["mixing_entropy_k50"]
    again = evaluate_embedding(Z, BATCHES, LABELS, max_queries=100)["mixing_entropy_k50"]
    other = evaluate_embedding(Z, BATCHES, LABELS, max_queries=100, seed=1)["mixing_entropy_k50"]
    assert part == again
    assert part.value != other.value
    assert (whole.n, part.n) == (400, 100)
    assert part.value == pytest.approx(whole.value, abs=0.02)


def test_json_and_back() -> None:
    for labels in (LABELS, None):
        metrics = evaluate_embedding(Z, BATCHES, labels)
        text = json.dumps(metrics.to_json(), allow_nan=False)
        read = Metrics.from_json(json.loads(text))
        assert read.measures == metrics.measures
        assert read.to_json() == metrics.to_json()
    assert json.loads(text)["schema"] == "atlas.metrics"
    with pytest.raises(FormatError, match="version 4"):
        Metrics.from_json({**json.loads(text), "version": 4})


def reasons(metrics: Metrics) -> dict[str, str | None]:
    assert all((m.value is None) == (m.skipped is not None) for m in metrics.measures)
    json.dumps(metrics.to_json(), allow_nan=False)
    return {measure.name: measure.skipped for measure in metrics.measures}


@pytest.mark.parametrize("labels", [None, Categories(np.full(400, -1), ["B"])])
def test_without_labels(labels: Categories | None) -> None:
    metrics = evaluate_embedding(Z, BATCHES, labels)
    why = reasons(metrics)
    assert why["mixing_entropy_k50"] is None
    assert why["label_accuracy_k50"] == why["silhouette_label"] == "no cell has a label"
    assert metrics.confusion is None


def test_one_batch_only() -> None:
    why = reasons(evaluate_embedding(Z, Categories(np.zeros(400), ["one"]), LABELS))
    assert why["mixing_entropy_k50"] == "there is only one batch"
    assert why["silhouette_batch"] == "no label has several cells in two batches or more"
    assert why["label_accuracy_k50"] is None
    assert why["silhouette_label"] is None


def test_a_batch_of_one_cell() -> None:
    batches = Categories(np.where(np.arange(400) == 7, 1, 0), ["many", "single"])
    metrics = evaluate_embedding(Z, batches, LABELS)
    assert metrics["mixing_entropy_k50"].skipped is None
    reasons(metrics)


def test_fewer_cells_than_neighbours() -> None:
    few = np.arange(30)
    why = reasons(evaluate_embedding(Z[few], BATCHES[few], LABELS[few]))
    assert why["mixing_entropy_k50"] == "50 neighbours need at least 51 cells, and there are 30"
    assert why["mixing_entropy_k15"] is None
    assert "labeled cells, and there are" in str(why["label_accuracy_k50"])
    one = np.arange(1)
    assert None not in reasons(evaluate_embedding(Z[one], BATCHES[one], LABELS[one])).values()


def test_a_query_without_labels() -> None:
    query = np.arange(400) < 100
    hidden = Categories(np.where(query, -1, LABELS.codes), LABELS.names)
    why = reasons(evaluate_embedding(Z, BATCHES, hidden, query=query))
    assert why["label_accuracy_k50"] == "no query cell has a label to compare with"
    why = reasons(evaluate_embedding(Z, BATCHES, LABELS, reference=np.arange(400) < 20))
    assert "labeled reference cells, and there are" in str(why["label_accuracy_k50"])


def test_labels_that_only_the_query_has_are_told() -> None:
    query = (np.arange(400) < 100) | (CODES == 2)
    metrics = evaluate_embedding(Z, BATCHES, LABELS, query=query)
    told = metrics["label_query_only_share"]
    alone = LABELS.codes[query & (LABELS.codes >= 0)] == 2
    assert told.value == pytest.approx(alone.mean())
    assert told.n == len(alone)
    # Batches and labels are strata, and yet other cells would have other shares: a binomial error.
    error = alone.std(ddof=1) / math.sqrt(len(alone))
    assert told.standard_error == pytest.approx(error, rel=1e-9)
    low, high = binomtest(int(alone.sum()), len(alone)).proportion_ci(method="wilson")
    assert (told.low, told.high) == pytest.approx((low, high), abs=1e-3)
    part = evaluate_embedding(Z, BATCHES, LABELS, query=query, max_queries=60)
    sampled = part["label_query_only_share"]
    assert (sampled.value, sampled.n) == (told.value, told.n)
    assert sampled.standard_error == pytest.approx(error, rel=0.1)
    with pytest.raises(KeyError):
        evaluate_embedding(Z, BATCHES, LABELS)["label_query_only_share"]
    assert metrics.label_protocol is not None
    assert "only the query has count as wrong too: NK" in metrics.label_protocol


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"labels and embedding have different.*\n.*399 and 400"):
        evaluate_embedding(Z, BATCHES, LABELS[np.arange(399)])
    with pytest.raises(ConfigError, match=r"some cells have no batch\n.*120 cells"):
        evaluate_embedding(Z, Categories(np.where(np.arange(400) < 120, -1, 0), ["x"]))
    with pytest.raises(ConfigError, match="the embedding is none that can be evaluated"):
        evaluate_embedding(Z[:0], BATCHES[np.arange(0)])


def test_a_sample_is_drawn_without_replacement_in_rising_order() -> None:
    rows = np.arange(100, 200)
    drawn = sample_rows(rows, 30, seed=3)
    assert len(np.unique(drawn)) == 30
    assert np.all(np.diff(drawn) > 0)
    assert np.isin(drawn, rows).all()
    assert sample_rows(rows, 100, seed=3) is rows
