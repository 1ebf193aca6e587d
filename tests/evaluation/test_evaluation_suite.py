"""Each measure of single cells against its definition, written out in float64."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import scipy.stats
from graph_helpers import in_largest_part
from scipy.optimize import brentq
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from atlas.errors import ConfigError
from atlas.evaluation import kbet
from atlas.evaluation.clustering import (
    adjusted_rand,
    agreement,
    contingency,
    kmeans,
    normalised_mutual_information,
)
from atlas.evaluation.codes import Categories
from atlas.evaluation.estimates import draw, mean, mean_of
from atlas.evaluation.lisi import lisi
from atlas.evaluation.measures import evaluate_embedding
from atlas.evaluation.mixing import reweighted_entropies
from atlas.evaluation.neighbours import Neighbours, Recall, nearest
from atlas.evaluation.purity import cluster_conservation, overlap, purity
from atlas.evaluation.regression import explained_variance, pcr_comparison

RNG = np.random.default_rng(5)
N = 600
LABELS = RNG.choice(4, N, p=[0.5, 0.3, 0.15, 0.05])
BATCHES = RNG.choice(3, N, p=[0.6, 0.3, 0.1])
Z = (RNG.standard_normal((N, 5)) + 2 * LABELS[:, None] + 0.4 * BATCHES[:, None]).astype(np.float32)
ALL = draw(np.arange(N), BATCHES, N, 0)


def test_reweighted_entropy() -> None:
    indices = RNG.integers(0, N, (50, 15))
    sizes = np.bincount(BATCHES)
    for row, ours in zip(indices, reweighted_entropies(indices, BATCHES, sizes), strict=True):
        p = np.bincount(BATCHES[row], minlength=3) / sizes
        assert ours == pytest.approx(scipy.stats.entropy(p), abs=1e-12)


def test_reweighted_entropy_of_even_mixing_is_ln_b() -> None:
    batches = np.repeat([0, 1], [9000, 1000])
    indices = np.random.default_rng(0).integers(0, 10_000, (200, 500))
    ours = reweighted_entropies(indices, batches, np.array([9000, 1000])).mean()
    assert ours == pytest.approx(math.log(2), abs=0.02)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_lisi_against_a_root_found_in_another_way(scale: float) -> None:
    found = nearest(Z, Z[:40], 45, np.arange(40))
    distances = found.distances * np.float32(scale)
    ours = lisi(distances, BATCHES[found.indices], 3)
    for d, codes, value in zip(distances.astype(float), BATCHES[found.indices], ours, strict=True):

        def excess(log_beta: float, d: np.ndarray = d) -> float:
            p = np.exp(-(d - d.min()) * math.exp(log_beta))
            return float(scipy.stats.entropy(p)) - math.log(15)  # 46 // 3

        p = np.exp(-(d - d.min()) * math.exp(brentq(excess, -20, 20)))
        shares = np.bincount(codes, p / p.sum(), minlength=3)
        assert value == pytest.approx(1 / (shares**2).sum(), abs=1e-4)


def test_lisi_of_twins_counts_all_neighbours_alike() -> None:
    codes = np.array([[0, 0, 1, 1, 2, 2]])
    assert lisi(np.zeros((1, 6), dtype=np.float32), codes, 3) == pytest.approx(3)


def test_kbet_p_is_scipys() -> None:
    rows = np.arange(30)
    found = nearest(Z, Z[rows], 49, rows)
    sizes = np.bincount(BATCHES)
    p = kbet.p_values(found.indices, rows, BATCHES, sizes)
    for row, near, ours in zip(rows, found.indices, p, strict=True):
        observed = np.bincount(BATCHES[[row, *near]], minlength=3)
        expected = 50 * sizes / N
        assert ours == pytest.approx(scipy.stats.chisquare(observed, expected).pvalue, abs=1e-12)


def test_kbet_refuses_expected_counts_under_one() -> None:
    with pytest.raises(ConfigError, match=r"0\.5 cells of the smallest batch expected among 50"):
        kbet.p_values(np.zeros((1, 49), int), np.zeros(1, int), BATCHES, np.array([990, 10]))


def test_kbet_within_labels() -> None:
    labels = Categories(LABELS, "abcd")
    batches = Categories(BATCHES, "xyz")
    tested = kbet.acceptance_by_label(Z, labels, batches, sizes=(0.1, 0.25))
    for label in tested:
        rows = np.flatnonzero(label.label == LABELS)
        counts = np.bincount(BATCHES[rows], minlength=3)
        able = [s for s in (0.1, 0.25) if counts.min() * (int(s * len(rows)) + 1) >= len(rows)]
        if not able or counts.min() == 0:
            assert label.acceptance is None
            assert label.skipped is not None
            continue
        assert label.sizes == tuple(able)
        z = Z[rows].astype(float)
        accepted = []
        for s in able:
            k = int(s * len(rows))
            for i in range(len(rows)):
                d = ((z - z[i]) ** 2).sum(1)
                d[i] = -1
                near = np.argsort(d, kind="stable")[: k + 1]
                observed = np.bincount(BATCHES[rows][near], minlength=3)
                chi = scipy.stats.chisquare(observed, counts / len(rows) * (k + 1))
                accepted.append(chi.pvalue >= 0.05)
        assert label.acceptance is not None
        assert label.acceptance.value == pytest.approx(np.mean(accepted), abs=1e-9)
    assert any(label.acceptance is not None for label in tested)


def test_a_mean_of_labels_has_the_error_of_independent_samples() -> None:
    parts = []
    for size, most, seed in ((300, 40, 0), (50, 50, 1), (1000, 90, 2)):
        strata = np.arange(size) % 3
        sample = draw(np.arange(size), strata, most, seed)
        parts.append(mean(np.random.default_rng(seed).random(len(sample)), sample))
    joint = mean_of(parts)
    assert joint.value == pytest.approx(np.mean([part.value for part in parts]))
    errors = [part.standard_error for part in parts]
    assert joint.standard_error == pytest.approx(np.sqrt(np.square(errors).sum()) / 3)


def test_graph_connectivity_is_networkxs() -> None:
    found = nearest(Z, Z, 4, np.arange(N))
    hidden = np.where(np.arange(N) < 60, -1, LABELS)
    inside = in_largest_part(found, Categories(hidden, "abcd"))
    assert not inside[:60].any()
    for label in range(4):
        rows = np.flatnonzero(hidden == label)
        graph = nx.DiGraph()
        graph.add_nodes_from(rows)
        graph.add_edges_from((i, j) for i in rows for j in found.indices[i] if hidden[j] == label)
        largest = max(len(part) for part in nx.strongly_connected_components(graph))
        assert inside[rows].sum() == largest
    with pytest.raises(ConfigError, match="neighbours of all cells"):
        in_largest_part(found.of(np.arange(5)), Categories(hidden, "abcd"))


def test_explained_variance_is_that_of_regressed_components() -> None:
    exact = Z.astype(float) + 1000
    axes = PCA().fit(exact)
    scores, onehot = axes.transform(exact), np.eye(3)[BATCHES]
    r2 = [LinearRegression().fit(onehot, s).score(onehot, s) for s in scores.T]
    expected = np.average(r2, weights=axes.explained_variance_)
    ours = explained_variance((Z + 1000).astype(np.float32), Categories(BATCHES, "xyz"), ALL)
    assert ours.value == pytest.approx(expected, rel=1e-4)
    rng = np.random.default_rng(0)
    again = []
    for _ in range(300):
        rows = rng.integers(0, N, N)
        sample = draw(np.arange(N), BATCHES[rows], N, 0)
        again.append(explained_variance(Z[rows], Categories(BATCHES[rows], "xyz"), sample).value)
    # Batches are drawn along with the cells, so that the sample's strata are they does not matter.
    error = explained_variance(Z, Categories(BATCHES, "xyz"), ALL).standard_error
    assert error == pytest.approx(np.std(again), rel=0.2)


def test_pcr_comparison() -> None:
    batches = Categories(BATCHES, "xyz")
    before = explained_variance((Z + 2 * BATCHES[:, None]).astype(np.float32), batches, ALL)
    after = explained_variance(Z, batches, ALL)
    assert pcr_comparison(before, after).value == pytest.approx(1 - after.value / before.value)
    more = explained_variance((Z + 6 * BATCHES[:, None]).astype(np.float32), batches, ALL)
    worse = pcr_comparison(before, more)
    assert worse.unclipped is not None
    assert worse.unclipped.value == pytest.approx(1 - more.value / before.value)
    assert worse.unclipped.interval().high < 0
    assert (worse.value, worse.standard_error, worse.interval()) == (0, 0, (0, 0))
    assert worse.minus(worse).interval() == (0, 0)
    assert worse.scaled(-1.0, 1.0).interval() == (1, 1)
    with pytest.raises(ConfigError, match="at one place"):
        explained_variance(Z * 0, batches, ALL)


def test_a_cut_value_keeps_what_its_interval_says_above() -> None:
    sample = draw(np.arange(40), np.zeros(40, dtype=np.int64), 40, 0)
    below = mean(np.random.default_rng(0).standard_normal(40) - 0.1, sample)
    assert below.value < 0 < below.interval().high
    cut = below.at_least(0.0)
    assert cut.value == 0
    assert cut.interval() == (0, below.interval().high)
    assert cut.at_least(-1.0) is cut
    assert below.minus(cut).standard_error == below.standard_error


def test_agreement_is_scikit_learns_and_its_error_that_of_resampled_cells() -> None:
    rng = np.random.default_rng(1)
    clusters = np.where(rng.random(N) < 0.8, LABELS, rng.integers(0, 4, N))
    labels = Categories(np.where(np.arange(N) < 40, -1, LABELS), "abcd")
    rows = np.arange(40, N)
    sample = draw(rows, LABELS[rows], len(rows), 0)
    for measure, peer in (
        (adjusted_rand, adjusted_rand_score),
        (normalised_mutual_information, normalized_mutual_info_score),
    ):
        ours = agreement(measure, clusters, labels, sample)
        assert ours.value == pytest.approx(peer(LABELS[40:], clusters[40:]), abs=1e-12)
        again = []
        for _ in range(300):
            drawn = rng.choice(rows, len(rows))
            again.append(peer(LABELS[drawn], clusters[drawn]))
        assert ours.standard_error == pytest.approx(np.std(again), rel=0.15)


def test_tables_of_one_cluster_and_one_label() -> None:
    one = np.array([[5.0]])
    assert adjusted_rand(one) == normalised_mutual_information(one) == 1
    assert adjusted_rand(np.array([[3.0, 2.0]])) == 0


def test_kmeans_finds_far_groups_and_goes_to_the_nearest_centre() -> None:
    z = (Z[:, :2] * 0.1 + 50 * np.eye(4)[LABELS][:, :2] + 20 * LABELS[:, None]).astype(np.float32)
    found = kmeans(z, 4, seed=1, fit_cells=200)
    table = contingency(found.codes, Categories(LABELS, "abcd"))
    assert adjusted_rand(table.astype(float)) == 1
    np.testing.assert_array_equal(found.codes, kmeans(z, 4, seed=1, fit_cells=200).codes)
    with pytest.raises(ConfigError, match="601 clusters of 600 cells"):
        kmeans(z, 601)


def test_purity_is_the_jaccard_index_within_the_batch() -> None:
    own = Z[:, [0, 2, 4]]
    batches = BATCHES.copy()
    batches[:8] = 3  # too small for 10 neighbours
    sample = draw(np.arange(N), batches, 100, 2)
    ours = purity(Z, own, Categories(batches, ["x", "y", "z", "tiny"]), sample, 10)
    assert ours.too_small == ("tiny",)
    for row, value in zip(sample.rows, ours.values, strict=True):
        if batches[row] == 3:
            assert np.isnan(value)
            continue
        rows = np.flatnonzero((batches == batches[row]) & (np.arange(N) != row))
        sets = []
        for z in (Z.astype(float), own.astype(float)):
            d = ((z[rows] - z[row]) ** 2).sum(1)
            sets.append(set(rows[np.argsort(d, kind="stable")[:10]]))
        assert value == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))


def test_purity_refuses_neighbours_that_may_be_wrong() -> None:
    near = nearest(Z, Z[:5], 10, np.arange(5))
    for recall in (Recall(0.994, 0.001, 1000), None):
        poor = Neighbours(near.indices, near.distances, "faiss IVF", recall)
        with pytest.raises(ConfigError, match=r"(.|\n)*at least 0\.995"):
            overlap(near, poor)
    assert overlap(near, near).tolist() == [1.0] * 5


def test_clusters_are_conserved_where_nothing_moves() -> None:
    batches = Categories(BATCHES, "xyz")
    same = cluster_conservation(Z, Z + 5, batches, 4)
    assert list(same) == ["x", "y", "z"]
    assert min(found.value for found in same.values()) > 0.9
    noise = RNG.standard_normal((N, 5)).astype(np.float32)
    apart = cluster_conservation(Z, noise, batches, 4)
    assert max(found.value for found in apart.values()) < 0.2


def test_conservation_is_scikit_learns_kmeans_and_ari() -> None:
    """On clusters that lie apart enough for every start to find them."""
    rng = np.random.default_rng(8)
    groups, others = rng.integers(0, 4, N), rng.integers(0, 4, N)
    others = np.where(rng.random(N) < 0.6, groups, others)
    places = 20 * np.eye(4, 5) + rng.standard_normal((4, 5))
    joint, own = (
        (places[codes] + rng.standard_normal((N, 5))).astype(np.float32)
        for codes in (groups, others)
    )
    metrics = evaluate_embedding(
        joint, Categories(BATCHES, "xyz"), Categories(groups, "abcd"), individual=own
    )
    of = {g.of: g for g in metrics.groups if g.name == "cluster_conservation"}
    expected = []
    for code, name in enumerate("xyz"):
        rows = code == BATCHES
        theirs = [KMeans(4, n_init=10, random_state=3).fit_predict(z[rows]) for z in (joint, own)]
        expected.append(adjusted_rand_score(*theirs))
        batch = of[f"batch {name}"]
        assert batch.value == pytest.approx(expected[-1], abs=1e-12)
        assert batch.n == rows.sum()
        assert batch.low is not None
        assert batch.high is not None
        assert batch.low < expected[-1] < batch.high
    whole = metrics["cluster_conservation"]
    assert 0.1 < np.mean(expected) < 0.6
    assert whole.value == pytest.approx(np.mean(expected), abs=1e-12)
    assert whole.n == N
    errors = [float(batch.standard_error or 0) for batch in of.values()]
    assert whole.standard_error == pytest.approx(np.sqrt(np.square(errors).sum()) / 3, rel=0.01)
