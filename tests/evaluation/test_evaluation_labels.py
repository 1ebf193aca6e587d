"""Label transfer, against scikit-learn and the published kernel written out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.neighbors import KNeighborsClassifier

from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.labels import label_accuracy, majority_vote, score, weighted_vote

NAMES = ("B", "T", "NK", "Mono")


def blobs(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.choice(4, size=n, p=[0.5, 0.3, 0.15, 0.05])
    centres = rng.standard_normal((4, 5)) * 1.2
    return (centres[codes] + rng.standard_normal((n, 5))).astype(np.float32), codes


def test_reference_to_query_equals_scikit_learn() -> None:
    z, codes = blobs()
    reference = np.arange(600) < 400
    k = 1  # one neighbour leaves no ties for scikit-learn to break its own way
    ours = label_accuracy(z, Categories(codes, NAMES), reference, ~reference, k=k)
    peer = KNeighborsClassifier(k, algorithm="brute").fit(z[:400], codes[:400]).predict(z[400:])
    assert ours.majority.accuracy == pytest.approx(accuracy_score(codes[400:], peer))
    assert ours.majority.weighted_accuracy == pytest.approx(
        balanced_accuracy_score(codes[400:], peer)
    )
    np.testing.assert_array_equal(ours.confusion.counts, sklearn_confusion(codes[400:], peer))
    assert (ours.n_cells, ours.n_reference, ours.leave_one_out) == (200, 400, False)
    assert ours.query_only_share == 0


def test_many_neighbours_equal_scikit_learn_where_it_has_no_tie() -> None:
    z, codes = blobs(seed=1)
    peer = KNeighborsClassifier(15, algorithm="brute").fit(z[:400], codes[:400])
    shares = np.sort(peer.predict_proba(z[400:]), axis=1)
    clear = np.concatenate([np.zeros(400, bool), shares[:, -1] > shares[:, -2]])
    reference = np.arange(600) < 400
    ours = label_accuracy(z, Categories(codes, NAMES), reference, clear, k=15)
    predicted = peer.predict(z[clear])
    assert ours.majority.accuracy == pytest.approx(accuracy_score(codes[clear], predicted))
    assert ours.majority.weighted_accuracy == pytest.approx(
        balanced_accuracy_score(codes[clear], predicted)
    )


def test_leave_one_out_keeps_a_cells_label_from_it() -> None:
    z = np.array([[0.0], [0.1], [10.0], [10.1]], dtype=np.float32)
    swapped = Categories([0, 1, 0, 1], NAMES)
    assert label_accuracy(z, swapped, k=1).majority.accuracy == 0
    assert label_accuracy(z, Categories([0, 0, 1, 1], NAMES), k=1).majority.accuracy == 1


def test_unlabeled_cells_neither_vote_nor_are_scored() -> None:
    z, codes = blobs(seed=2)
    hidden = codes.copy()
    hidden[::3] = -1
    keep = hidden >= 0
    ours = label_accuracy(z, Categories(hidden, NAMES), k=9)
    without = label_accuracy(z[keep], Categories(codes[keep], NAMES), k=9)
    assert ours.majority == without.majority
    assert ours.weighted == without.weighted


def test_ties_go_to_the_nearest() -> None:
    votes = np.array([[2, 1, 1, 2], [1, 2, 2, 1], [3, 0, 0, 0]])
    assert majority_vote(votes, 4).codes.tolist() == [2, 1, 0]
    assert majority_vote(votes, 4).uncertainty == pytest.approx([0.5, 0.5, 0.25])


def published(labels: np.ndarray, distances: np.ndarray) -> tuple[list[int], list[float]]:
    """The formula of scArches, Methods, cell by cell."""
    codes, uncertainty = [], []
    for row, d in zip(labels, distances.astype(np.float64), strict=True):
        kernel = np.exp(-d / (2 / d.std()) ** 2)
        p = {label: kernel[row == label].sum() / kernel.sum() for label in np.unique(row)}
        best = max(p, key=lambda label: p[label])
        uncertainty.append(1 - p[best])
        codes.append(-1 if uncertainty[-1] > 0.5 else int(best))
    return codes, uncertainty


def test_weighted_vote_is_the_published_kernel() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, size=(200, 15))
    distances = np.sort(rng.gamma(3.0, 1.0, size=(200, 15)), axis=1).astype(np.float32)
    ours = weighted_vote(labels, distances, 4)
    codes, uncertainty = published(labels, distances)
    assert ours.codes.tolist() == codes
    np.testing.assert_allclose(ours.uncertainty, uncertainty, atol=1e-9)
    assert -1 in codes
    assert len(set(codes)) == 5


def test_weighted_vote_survives_distances_at_which_the_kernel_underflows() -> None:
    distances = np.array([[100.0, 101.0, 140.0]], dtype=np.float32)
    assert np.exp(-distances / (2 / distances.std()) ** 2).sum() == 0
    ours = weighted_vote(np.array([[1, 1, 0]]), distances, 2)
    assert ours.codes.tolist() == [1]
    assert ours.uncertainty == pytest.approx([0.0])


def test_weighted_vote_of_equal_distances_is_the_plain_one() -> None:
    votes = np.array([[0, 1, 1, 2], [0, 1, 2, 3]])
    ours = weighted_vote(votes, np.ones((2, 4), dtype=np.float32), 4)
    assert ours.uncertainty == pytest.approx([0.5, 0.75])
    assert ours.codes.tolist() == [1, -1]


def test_unknown_is_never_right() -> None:
    scored = score(np.array([0, 0, 1, 1]), np.array([0, -1, -1, 1]))
    assert scored.accuracy == 0.5
    assert scored.unknown_share == 0.5
    assert scored.weighted_accuracy == 0.5


def test_standard_errors_are_binomial() -> None:
    rng = np.random.default_rng(4)
    truth = np.repeat([0, 1], [900, 100])
    scored = [
        score(truth, np.where(rng.random(1000) < np.where(truth == 0, 0.9, 0.6), truth, 2))
        for _ in range(400)
    ]
    assert np.mean([s.accuracy_error for s in scored]) == pytest.approx(
        np.std([s.accuracy for s in scored]), rel=0.15
    )
    assert np.mean([s.weighted_accuracy_error for s in scored]) == pytest.approx(
        np.std([s.weighted_accuracy for s in scored]), rel=0.15
    )


def test_labels_that_only_the_query_has_are_errors_and_stated() -> None:
    z, codes = blobs(seed=5)
    codes[:400] = np.where(codes[:400] == 3, 0, codes[:400])
    reference = np.arange(600) < 400
    ours = label_accuracy(z, Categories(codes, NAMES), reference, k=5)
    assert ours.query_only_labels == ("Mono",)
    assert ours.query_only_share == pytest.approx((codes[400:] == 3).mean())
    assert "Mono" in ours.confusion.truth
    assert "Mono" not in ours.confusion.predicted
    assert ours.majority.accuracy <= 1 - ours.query_only_share
    assert ours.majority.weighted_accuracy <= 0.75


def test_queries_are_sampled_by_seed_and_the_reference_is_not() -> None:
    z, codes = blobs(seed=6)
    labels = Categories(codes, NAMES)
    one = label_accuracy(z, labels, k=5, max_queries=50, seed=1)
    assert (one.n_cells, one.n_reference) == (50, 600)
    assert one.majority == label_accuracy(z, labels, k=5, max_queries=50, seed=1).majority
    other = label_accuracy(z, labels, k=5, max_queries=50, seed=2)
    assert one.confusion.counts.tolist() != other.confusion.counts.tolist()


def test_masks_that_cannot_be_used_are_refused() -> None:
    z, codes = blobs(seed=7)
    labels = Categories(np.where(np.arange(600) < 400, codes, -1), NAMES)
    first = np.arange(600) < 400
    with pytest.raises(ConfigError, match=r"share cells\n.*400 cells in both"):
        label_accuracy(z, labels, first, first)
    with pytest.raises(ConfigError, match=r"the query has no labeled cell\n.*200 cells"):
        label_accuracy(z, labels, first)
    with pytest.raises(ConfigError, match="the reference has no labeled cell"):
        label_accuracy(z, labels, query=first)
