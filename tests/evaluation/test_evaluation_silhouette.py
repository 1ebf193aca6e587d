"""Silhouettes and BRAS, against scikit-learn and the definitions written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import pairwise_distances, silhouette_samples

from atlas.errors import ConfigError
from atlas.evaluation import distances
from atlas.evaluation.bras import bras
from atlas.evaluation.codes import Categories
from atlas.evaluation.estimates import Sample, draw
from atlas.evaluation.silhouette import (
    batch_silhouettes,
    isolated_labels,
    label_silhouettes,
)


def cells(n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels, batches = rng.integers(0, 3, size=n), rng.integers(0, 3, size=n)
    z = rng.standard_normal((n, 4)) + 2 * labels[:, None] + 0.5 * batches[:, None]
    return z.astype(np.float32), labels, batches


def whole(rows: np.ndarray) -> Sample:
    return draw(np.asarray(rows), np.zeros(len(rows), dtype=np.int64), len(rows), 0)


@pytest.mark.parametrize("double", [True, False])
def test_label_silhouettes_are_scikit_learns(double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not double:
        monkeypatch.setattr(distances, "_DOUBLE_PAIRS", 0)
        monkeypatch.setattr(distances, "_ROW_TILE", 70)
    z, labels, _ = cells()
    labels[7] = 3  # alone: 0, as scikit-learn has it
    hidden = np.where(np.arange(300) >= 250, -1, labels)
    ours = label_silhouettes(z, Categories(hidden, "abcd"), whole(np.arange(250)))
    peer = silhouette_samples(z[:250].astype(np.float64), labels[:250])
    np.testing.assert_allclose(ours, peer, atol=1e-9 if double else 1e-3)
    some = draw(np.arange(250), hidden[:250], 40, 1)
    part = label_silhouettes(z, Categories(hidden, "abcd"), some)
    np.testing.assert_allclose(part, peer[some.rows], atol=1e-9 if double else 1e-3)


def test_batch_silhouettes_are_scikit_learns_within_labels() -> None:
    z, labels, batches = cells()
    batches[labels == 2] = 0  # one label in one batch: left out
    ours = batch_silhouettes(
        z, Categories(labels, "abc"), Categories(batches, "xyz"), whole(np.arange(300))
    )
    for label in (0, 1):
        rows = labels == label
        s = silhouette_samples(z[rows].astype(np.float64), batches[rows])
        np.testing.assert_allclose(ours[rows], 1 - np.abs(s), atol=1e-9)
    assert np.isnan(ours[labels == 2]).all()


def test_bras_is_its_definition() -> None:
    z, labels, batches = cells()
    batches[labels == 2] = 0
    hidden = np.where(np.arange(300) >= 270, -1, labels)
    cells_ = (z, Categories(hidden, "abc"), Categories(batches, "xyz"), whole(np.arange(270)))
    codes, means = bras(*cells_)
    assert codes.tolist() == [0, 1]  # label 2 lies in one batch
    scores: dict[int, list[float]] = {0: [], 1: []}
    for cell in np.flatnonzero((hidden == 0) | (hidden == 1)):
        group = np.flatnonzero(hidden == hidden[cell])
        d = pairwise_distances(z[[cell]].astype(float), z[group].astype(float), metric="cosine")[0]
        own = (batches[group] == batches[cell]) & (group != cell)
        a, b = d[own].mean(), d[batches[group] != batches[cell]].mean()
        scores[hidden[cell]].append(1 - abs((b - a) / max(a, b)))
    for code, own_scores in scores.items():
        assert means.of(code).value == pytest.approx(np.mean(own_scores), abs=1e-9)
        assert means.of(code).n == len(own_scores)
    expected = np.mean([np.mean(own_scores) for own_scores in scores.values()])
    assert means.mean().value == pytest.approx(expected, abs=1e-9)


def test_an_offset_changes_nothing() -> None:
    z, labels, _ = cells()
    codes = Categories(labels, "abc")
    near = label_silhouettes(z.round(2), codes, whole(np.arange(300)))
    far = label_silhouettes(z.round(2) + np.float32(4096), codes, whole(np.arange(300)))
    np.testing.assert_allclose(far, near, atol=2e-3)


def test_twins_have_no_silhouette_but_0() -> None:
    z = np.ones((20, 3), dtype=np.float32)
    labels, batches = np.arange(20) % 2, np.arange(20) // 2 % 2
    ours = label_silhouettes(z, Categories(labels, "ab"), whole(np.arange(20)))
    np.testing.assert_array_equal(ours, 0)
    _, means = bras(
        z * 0, Categories(labels, "ab"), Categories(batches, "xy"), whole(np.arange(20))
    )
    np.testing.assert_array_equal(means.means, 1)


def test_isolated_labels_are_those_in_the_fewest_batches() -> None:
    labels = Categories([0, 0, 1, 1, 2, 2, -1], "abc")
    batches = Categories([0, 1, 0, 0, 1, 1, 0], "xy")
    assert isolated_labels(labels, batches).tolist() == [1, 2]


def test_one_label_has_none() -> None:
    z, _, _ = cells()
    with pytest.raises(ConfigError, match="1 labels on 300 cells"):
        label_silhouettes(z, Categories(np.zeros(300), "a"), whole(np.arange(300)))
