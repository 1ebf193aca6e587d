"""Transferred labels: probabilities and distances by brute force, lines and sets by simulation."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from atlas.errors import ConfigError
from atlas.evaluation import calibration
from atlas.evaluation.calibration import (
    LeftOut,
    UnknownRule,
    conformal_quantile,
    is_or_lies_below,
    leave_out,
)
from atlas.evaluation.codes import Categories
from atlas.evaluation.kernels import kernel_weights
from atlas.evaluation.knn_labels import (
    Answer,
    KnnLabels,
    most_probable_path,
    node_probabilities,
)
from atlas.evaluation.novelty import DistanceScale, OwnDistances
from atlas.evaluation.transfer_score import Transferred, score_query
from atlas.models import LabelTree

FLAT = LabelTree.make(["B", "Mono", "NK", "T"])
PARENTS = {"B": "lymphoid", "NK": "lymphoid", "T": "lymphoid", "Mono": "myeloid", "CD4": "T"}
DEEP = LabelTree.make(["B", "CD4", "CD8", "NK", "Mono"], {**PARENTS, "CD8": "T"})


def cells(n: int, seed: int, apart: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Cells of four types in five dimensions, of unequal spread."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])
    centres = np.random.default_rng(99).standard_normal((4, 5)) * apart
    noise = rng.standard_normal((n, 5)) * np.array([0.5, 1.0, 1.0, 2.0])[codes, None]
    return (centres[codes] + noise).astype(np.float32), codes.astype(np.int64)


def ancestors(node: int, tree: LabelTree) -> list[int]:
    out = [node]
    while tree.parents[out[-1]] >= 0:
        out.append(tree.parents[out[-1]])
    return out


def test_labels_and_probabilities_are_those_of_brute_force() -> None:
    z, codes = cells(400, seed=0)
    queries, _ = cells(80, seed=1)
    found = KnnLabels(z, codes, FLAT, k=12).ask(queries)
    for i, query in enumerate(queries.astype(np.float64)):
        squared = ((z.astype(np.float64) - query) ** 2).sum(axis=1)
        near = np.argsort(squared, kind="stable")[:12]
        weights = np.exp(-squared[near] / (2 * squared[near].mean()))
        p = np.array([weights[codes[near] == c].sum() for c in range(4)]) / weights.sum()
        assert found.label[i] == p.argmax()
        np.testing.assert_allclose(found.leaves[i], p, atol=1e-6)
        assert found.uncertainty[i] == pytest.approx(1 - p.max(), abs=1e-6)


def test_distances_are_those_of_brute_force() -> None:
    z, codes = cells(150, seed=2)  # fewer than the sample of a label, so all are searched
    queries, _ = cells(40, seed=3)
    k = 7
    found = KnnLabels(z, codes, FLAT, k=k).ask(queries)

    def mean_log(point: np.ndarray, others: np.ndarray) -> float:
        distance = np.sqrt(((others.astype(np.float64) - point) ** 2).sum(axis=1))
        return math.log(np.sort(distance)[:k].mean())

    own = np.array([mean_log(z[i], np.delete(z, i, axis=0)) for i in range(len(z))])
    location = np.array([own[codes == c].mean() for c in range(4)])
    spread = np.sqrt(((own - location[codes]) ** 2).mean())
    expected = [
        (mean_log(query, z) - location[label]) / spread
        for query, label in zip(queries, found.label, strict=True)
    ]
    np.testing.assert_allclose(found.distance, expected, rtol=1e-4, atol=1e-4)


def test_a_sample_gives_the_distances_of_all() -> None:
    z, codes = cells(6000, seed=4)
    queries, _ = cells(200, seed=5)
    found = KnnLabels(z, codes, FLAT, k=30).ask(queries)
    one = KnnLabels(z, codes, FLAT, k=30, seed=1).ask(queries)
    assert not np.array_equal(found.distance, one.distance)
    np.testing.assert_allclose(found.distance, one.distance, atol=0.35)


@pytest.mark.parametrize("factor", [10.0, 1e-3, 1e12, 1e-12])
def test_the_unit_of_the_embedding_has_no_say(factor: float) -> None:
    z, codes = cells(500, seed=6, apart=1.0)
    queries, _ = cells(200, seed=7, apart=1.0)
    groups = Categories(np.arange(500) % 2, ("a", "b"))
    scale = np.float32(factor)
    found, scaled = (
        KnnLabels(values, codes, FLAT, k=20).ask(asked)
        for values, asked in ((z, queries), (z * scale, queries * scale))
    )
    assert (found.uncertainty > 0.3).any()
    np.testing.assert_array_equal(scaled.path, found.path)
    np.testing.assert_allclose(scaled.leaves, found.leaves, atol=1e-5)
    np.testing.assert_allclose(scaled.distance, found.distance, atol=1e-4)
    rules = [
        leave_out(values, codes, groups, FLAT, k=20).unknown_rule(0.1) for values in (z, z * scale)
    ]
    assert rules[1].uncertainty_above == pytest.approx(rules[0].uncertainty_above, abs=1e-5)
    assert rules[1].distance_above == pytest.approx(rules[0].distance_above, abs=1e-4)


def test_uniform_weights_are_the_vote_of_scikit_learn() -> None:
    z, codes = cells(500, seed=8, apart=0.7)
    queries, _ = cells(200, seed=9, apart=0.7)
    found = KnnLabels(z, codes, FLAT, k=15, kernel="uniform").ask(queries)
    peer = KNeighborsClassifier(15, algorithm="brute").fit(z, codes)
    np.testing.assert_allclose(found.leaves, peer.predict_proba(queries), atol=1e-12)
    shares = np.sort(found.leaves, axis=1)
    clear = shares[:, -1] - shares[:, -2] > 1e-9  # scikit-learn breaks ties its own way
    assert 0 < clear.sum() < len(clear)
    np.testing.assert_array_equal(found.label[clear], peer.predict(queries[clear]))


def test_the_published_kernel_by_name() -> None:
    rng = np.random.default_rng(10)
    distances = np.sort(rng.gamma(3.0, 1.0, (50, 9)), axis=1).astype(np.float32)
    exact = distances.astype(np.float64)
    kernel = np.exp(-exact / (2 / exact.std(axis=1, keepdims=True)) ** 2)
    np.testing.assert_allclose(
        kernel_weights(distances, "scarches"), kernel / kernel.sum(axis=1, keepdims=True)
    )


@pytest.mark.parametrize("kernel", ["gaussian", "scarches", "uniform"])
def test_equal_distances_weigh_the_same(kernel: Any) -> None:
    for value in (0.0, 1.0, 1e-30, 1e30):
        weights = kernel_weights(np.full((2, 4), value, np.float32), kernel)
        np.testing.assert_allclose(weights, 0.25)


def test_no_distance_weighs_nothing_or_everything() -> None:
    weights = kernel_weights(np.array([[0, 0, 0, 1e15]], np.float32))
    np.testing.assert_allclose(weights[0], np.array([1, 1, 1, math.exp(-2)]) / (3 + math.exp(-2)))
    near = kernel_weights(np.linspace(1000, 1001, 9, dtype=np.float32)[None])
    np.testing.assert_allclose(near, 1 / 9, rtol=1e-3)


def test_ties_go_to_the_nearest() -> None:
    votes = np.array([[2, 1, 1, 2], [1, 2, 2, 1], [3, 0, 0, 0]])
    p = node_probabilities(votes, np.full(votes.shape, 0.25), FLAT)
    assert most_probable_path(p, votes, FLAT)[:, 0].tolist() == [2, 1, 0]
    z = np.array([[1], [-1], [2], [-2], [3]], np.float32)  # B and Mono as near on either side
    found = KnnLabels(z, np.array([1, 0, 1, 0, 2]), FLAT, k=4).ask(np.zeros((1, 1), np.float32))
    np.testing.assert_allclose(found.leaves, [[0.5, 0.5, 0, 0]])
    assert found.label.tolist() == [1]  # that of the first row
    # at an inner node the nearest with one of its children decides
    at = {name: i for i, name in enumerate(DEEP.names)}
    votes = np.array([[at["B"], at["CD8"], at["CD4"], at["CD4"], at["CD8"], at["NK"]]])
    p = node_probabilities(votes, np.full(votes.shape, 1 / 6), DEEP)
    way = most_probable_path(p, votes, DEEP)[0]
    assert [DEEP.names[node] for node in way] == ["lymphoid", "T", "CD8"]


def test_duplicates_of_the_reference_are_no_trouble() -> None:
    z = np.repeat(np.array([[0, 0, 0], [9, 9, 9]], np.float32), [20, 20], axis=0)
    codes = np.tile(np.repeat(np.array([0, 1]), [12, 8]), 2)
    knn = KnnLabels(z, codes, FLAT, k=20 - 1)
    said = "1 of 2 cells lie at one place with 19 cells of the reference or more, of which the fir"
    with pytest.warns(UserWarning, match=said):
        found = knn.ask(np.array([[0, 0, 0], [1, 1, 1]], np.float32))
    same, far = found.distance
    assert same == pytest.approx(0, abs=1e-6)
    assert np.isfinite(far)
    assert far > 100
    np.testing.assert_allclose(found.leaves, np.array([[12 / 19, 7 / 19, 0, 0]] * 2))


def test_probabilities_of_a_tree_are_those_of_its_leaves_added_up() -> None:
    z, codes = cells(400, seed=11, apart=0.8)
    leaves = np.array(DEEP.leaves)[codes]  # B, CD4, CD8, Mono, NK less one
    queries, _ = cells(100, seed=12, apart=0.8)
    found = KnnLabels(z, leaves, DEEP, k=15).ask(queries)
    np.testing.assert_allclose(found.leaves.sum(axis=1), 1)
    for path, probability, p in zip(found.path, found.probability, found.leaves, strict=True):
        assert all(DEEP.parents[b] == a or a == b for a, b in pairwise(path))
        np.testing.assert_allclose(probability, DEEP.below[path] @ p)
        walked, at = [], -1
        while (below := [n for n, parent in enumerate(DEEP.parents) if parent == at]) != []:
            at = max(below, key=lambda node, p=p: DEEP.below[node] @ p)
            walked.append(at)
        assert path.tolist() == walked + [at] * (DEEP.n_levels - len(walked))
    assert (np.diff(found.probability, axis=1) <= 1e-12).all()


def test_a_group_votes_for_itself_and_not_below() -> None:
    at = {name: i for i, name in enumerate(DEEP.names)}
    votes = np.array([[at["T"], at["T"], at["CD4"], at["B"]], [at["T"], at["T"], at["T"], at["B"]]])
    p = node_probabilities(votes, np.full(votes.shape, 0.25), DEEP)
    assert p[:, at["lymphoid"]].tolist() == [1, 1]
    assert p[:, at["T"]].tolist() == [0.75, 0.75]
    assert p[:, at["CD4"]].tolist() == [0.75, 0]  # the one that says which speaks for the group
    assert p[:, at["CD8"]].tolist() == [0, 0]
    assert is_or_lies_below(
        np.array([at["CD4"], at["CD4"], at["CD4"], at["T"]]),
        np.array([at["lymphoid"], at["CD4"], at["B"], at["CD4"]]),
        DEEP,
    ).tolist() == [True, True, False, False]


def test_the_quantile_is_that_of_split_conformal_prediction() -> None:
    scores = np.random.default_rng(13).permutation(19) / 1.0
    assert conformal_quantile(scores, 0.9) == 17  # the 18th smallest of 19
    assert conformal_quantile(scores, 0.95) == 18
    assert conformal_quantile(scores, 0.951) == math.inf
    assert conformal_quantile(scores, 0.001) == 0
    assert conformal_quantile(scores[:0], 0.5) == math.inf


def _left_out(rng: np.random.Generator, n: int) -> tuple[LeftOut, np.ndarray]:
    """Cells whose leaf probabilities say little of the label of three of four types."""
    truth = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])
    logits = rng.normal(0, np.array([2, 1, 1, 0.3])[truth][:, None], (n, 4))
    logits[np.arange(n), truth] += 1.0
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    best = p.argmax(axis=1)[:, None]
    answer = Answer(best, np.take_along_axis(p, best, 1), p, rng.normal(size=n))
    groups = Categories(rng.integers(0, 3, n), ("a", "b", "c"))
    return LeftOut(groups, truth, np.ones(n, bool), answer, FLAT), truth


@pytest.mark.parametrize("per_label", [False, True])
def test_sets_hold_the_label_as_often_as_asked(per_label: bool) -> None:
    """Over many draws of both: in all, and with a line for each label in each label too."""
    rng = np.random.default_rng(14)
    covered: list[list[float]] = []
    for _ in range(300):
        calibration, _ = _left_out(rng, 199)
        new, truth = _left_out(rng, 200)
        inside = calibration.set_rule(0.8, per_label).sets(new.answer, FLAT)
        assert inside.any(axis=1).all()
        held = inside[np.arange(200), truth]
        covered.append([held.mean(), *(held[truth == label].mean() for label in range(4))])
    mean = np.nanmean(covered, axis=0)
    assert mean[0] == pytest.approx(0.8, abs=0.03)
    assert mean[0] > 0.79
    if per_label:
        assert (mean > 0.79).all()
    else:
        assert mean[1:].min() < 0.7


def test_so_many_cells_are_unknown_as_were_allowed() -> None:
    rng = np.random.default_rng(15)
    shares = []
    for _ in range(300):
        calibration, _ = _left_out(rng, 199)
        new, _ = _left_out(rng, 200)
        rule = calibration.unknown_rule(0.1)
        unknown = rule.applies(new.answer.uncertainty, new.answer.distance)
        shares.append(unknown.mean())
        both = [
            (values > line).any()
            for values, line in (
                (new.answer.uncertainty, rule.uncertainty_above),
                (new.answer.distance, rule.distance_above),
            )
        ]
        assert all(both)
    assert np.mean(shares) == pytest.approx(0.1, abs=0.01)
    few, _ = _left_out(rng, 8)
    assert few.unknown_rule(0.1) == UnknownRule(math.inf)


def test_left_out_studies_are_labelled_by_the_others() -> None:
    z, codes = cells(600, seed=16)
    group = np.arange(600) % 3
    codes[(codes == 3) & (group != 2)] = 0  # one study alone has the last type
    left = leave_out(z, codes, Categories(group, ("a", "b", "c")), FLAT, k=10)
    assert sorted(left.groups.counts().tolist()) == [200, 200, 200]
    for code in range(3):
        rest, own = group != code, left.groups.codes == code
        expected = KnnLabels(z[rest], codes[rest], FLAT, k=10).ask(z[group == code])
        np.testing.assert_array_equal(left.answer.leaves[own], expected.leaves)
        np.testing.assert_allclose(left.answer.distance[own], expected.distance, atol=1e-5)
        np.testing.assert_array_equal(left.truth[own], codes[group == code])
    np.testing.assert_array_equal(left.known, left.truth != 3)

    folds = left.folds(0.05, 0.9, per_label=False)
    assert [fold.name for fold in folds] == ["a", "b", "c"]
    assert [fold.n_unseen > 0 for fold in folds] == [False, False, True]
    assert folds[2].n_known + folds[2].n_unseen == 200
    known = left.known & (left.groups.codes == 0)
    rule = left.unknown_rule(0.05, left.groups.codes != 0)
    unknown = rule.applies(left.answer.uncertainty, left.answer.distance)
    right = left.answer.label == left.truth
    assert folds[0].answered == pytest.approx((~unknown[known]).mean())
    assert folds[0].answered_accuracy == pytest.approx(right[known & ~unknown].mean())
    assert folds[0].accuracy == pytest.approx(right[known].mean())
    sets = left.set_rule(0.9, False, left.groups.codes != 0).sets(left.answer, FLAT)
    assert folds[0].covered == pytest.approx(sets[known, left.truth[known]].mean())
    assert folds[0].mean_set_size == pytest.approx(sets[known].sum(axis=1).mean())
    assert left.folds(None, None, per_label=False)[0].covered is None


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_distances_of_the_other_studies_are_those_of_a_reference_without_one(shift: float) -> None:
    z, codes = cells(600, seed=18)
    group = np.arange(600) % 3
    z[:, 0] += np.float32(shift) * group.astype(np.float32)  # each study among itself
    parents = np.full(len(FLAT.parents), -1)
    within = OwnDistances(z, codes, Categories(group, ("a", "b", "c")), 10, 0, "torch")
    for code in range(3):
        rest = group != code
        expected = DistanceScale.of(z[rest], codes[rest], parents, 10, backend="torch")
        found = within.without(code, parents)
        np.testing.assert_allclose(found.location, expected.location, atol=1e-5)
        assert found.spread == pytest.approx(expected.spread, abs=1e-5)
        assert found.floor == pytest.approx(expected.floor, rel=1e-4)


def test_cells_of_a_type_that_the_reference_lacks_are_far() -> None:
    z, codes = cells(1200, seed=17, apart=6.0)
    reference = (np.arange(1200) < 800) & (codes != 1)
    found = KnnLabels(z[reference], codes[reference], FLAT, k=20).ask(z[800:])
    truth = codes[800:]
    given = Transferred(
        truth=np.where(truth == 1, 4, truth),
        known=truth != 1,
        path=found.path,
        unknown=UnknownRule(0.5, 3.0).applies(found.uncertainty, found.distance)[:, None],
        uncertainty=found.uncertainty,
        distance=found.distance,
        sets=None,
    )
    scored = score_query(given, FLAT, (*FLAT.names, "lost"))
    assert scored.unseen_labels == ("lost",)
    assert scored.n_unseen == (truth == 1).sum()
    assert scored.distance_auroc > 0.95
    assert scored.unseen_unknown > 0.8 > 0.2 > scored.false_unknown
    assert scored.confusion.truth == ("B", "NK", "T", "lost")
    assert scored.confusion.predicted[-1] == "Unknown"
    lost = scored.confusion.counts[-1]
    assert lost[-1] / lost.sum() == pytest.approx(scored.unseen_unknown)
    assert scored.accuracy.unknown_share == pytest.approx(scored.false_unknown)


def test_levels_are_scored_where_cells_have_a_label() -> None:
    at = {name: i for i, name in enumerate(DEEP.names)}
    way = {name: ancestors(i, DEEP)[::-1] for name, i in at.items()}
    pad = {name: (path + [path[-1]] * 3)[:3] for name, path in way.items()}
    truth = ["CD4", "CD4", "T", "Mono", "B"]
    label = ["CD4", "CD8", "CD8", "Mono", "NK"]
    given = Transferred(
        truth=np.array([at[name] for name in truth]),
        known=np.ones(5, bool),
        path=np.array([pad[name] for name in label]),
        unknown=np.array([[False] * 3, [False] * 3, [False] * 3, [False, True, True], [False] * 3]),
        uncertainty=np.zeros(5),
        distance=np.zeros(5),
        sets=None,
    )
    scored = score_query(given, DEEP, DEEP.names)
    assert [level.accuracy for level in scored.levels] == [1.0, 0.6, pytest.approx(1 / 4)]
    assert scored.accuracy.accuracy == pytest.approx(2 / 5)  # CD8 is right for T
    assert scored.answered_accuracy == pytest.approx(2 / 4)


def test_what_cannot_be_calibrated_is_refused() -> None:
    z, codes = cells(60, seed=18)
    one = Categories(np.zeros(60), ("a",))
    with pytest.raises(ConfigError, match=r"one study only.*\n  found: a\n.*\n.*-by batch"):
        leave_out(z, codes, one, FLAT, k=5)
    unequal = Categories(np.repeat([0, 1], [50, 10]), ("a", "b"))
    with pytest.raises(ConfigError, match=r"without 'a' is too small.*\n  found: 10 .* k = 10"):
        leave_out(z, codes, unequal, FLAT, k=10)
    apart = Categories(codes % 4, ("a", "b", "c", "d"))
    with pytest.raises(ConfigError, match="No label of the reference is in two of its studies"):
        leave_out(z, codes, apart, FLAT, k=5)
    with pytest.raises(ConfigError, match=r"k does not fit the reference\n  found: k = 60, and 60"):
        KnnLabels(z, codes, FLAT, k=60)


@pytest.mark.parametrize(("pairs", "asked"), [(10**6, 300), (60_000, 100), (9_000, 30), (1, 30)])
def test_of_a_large_reference_fewer_cells_are_left_out(pairs, asked, monkeypatch) -> None:
    """So that the time does not grow with the reference; never fewer than the least."""
    monkeypatch.setattr(calibration, "MOST_CELLS", 300)
    monkeypatch.setattr(calibration, "LEAST_CELLS", 30)
    monkeypatch.setattr(calibration, "_MOST_PAIRS", pairs)
    z, codes = cells(600, 0)
    groups = Categories(np.arange(600) % 3, ("a", "b", "c"))
    assert len(leave_out(z, codes, groups, FLAT, k=10).truth) == asked
