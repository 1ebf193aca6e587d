"""Silhouettes, against scikit-learn and the definition of scib-metrics written out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import silhouette_samples, silhouette_score

from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.silhouette import batch_silhouette, label_silhouette


def cells(n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels, batches = rng.integers(0, 3, size=n), rng.integers(0, 2, size=n)
    z = rng.standard_normal((n, 4)) + 2 * labels[:, None] + 0.5 * batches[:, None]
    return z.astype(np.float32), labels, batches


def test_label_silhouette_is_scikit_learns_rescaled() -> None:
    z, labels, _ = cells()
    hidden = np.where(np.arange(300) < 50, -1, labels)
    ours = label_silhouette(z, Categories(hidden, "abc"))
    peer = silhouette_score(z[50:].astype(np.float64), labels[50:])
    assert ours.value == pytest.approx((peer + 1) / 2)
    samples = silhouette_samples(z[50:].astype(np.float64), labels[50:])
    assert ours.standard_error == pytest.approx(samples.std(ddof=1) / 2 / np.sqrt(250))
    assert ours.n_cells == 250


def test_batch_silhouette_is_a_mean_over_labels_of_one_minus_its_size() -> None:
    z, labels, batches = cells()
    batches[labels == 2] = 0  # one label in one batch: left out
    ours = batch_silhouette(z, Categories(labels, "abc"), Categories(batches, "xy"))
    means = []
    for label in (0, 1):
        rows = labels == label
        s = silhouette_samples(z[rows].astype(np.float64), batches[rows])
        means.append((1 - np.abs(s)).mean())
    assert ours.value == pytest.approx(np.mean(means))
    assert ours.n_cells == (labels < 2).sum()


def test_an_offset_changes_nothing() -> None:
    z, labels, _ = cells()
    near = label_silhouette(z, Categories(labels, "abc"))
    far = label_silhouette(z.round(2) + np.float32(4096), Categories(labels, "abc"))
    assert far.value == pytest.approx(near.value, abs=1e-3)


def test_cells_are_sampled_by_seed() -> None:
    z, labels, batches = cells()
    one = label_silhouette(z, Categories(labels, "abc"), max_cells=100, seed=1)
    assert one.n_cells == 100
    assert one == label_silhouette(z, Categories(labels, "abc"), max_cells=100, seed=1)
    assert one != label_silhouette(z, Categories(labels, "abc"), max_cells=100, seed=2)
    few = batch_silhouette(z, Categories(labels, "abc"), Categories(batches, "xy"), max_cells=90)
    assert few.n_cells == 90


def test_one_label_or_one_batch_has_none() -> None:
    z, labels, _ = cells()
    one = np.zeros(300, dtype=np.int64)
    with pytest.raises(ConfigError, match="1 labels on 300 cells"):
        label_silhouette(z, Categories(one, "a"))
    with pytest.raises(ConfigError, match="a label in at least two batches"):
        batch_silhouette(z, Categories(labels, "abc"), Categories(one, "x"))
