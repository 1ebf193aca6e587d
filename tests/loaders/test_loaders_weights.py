"""Rows drawn by weight: as often as it says, not in lumps, behind any mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_helpers import Recording, counts, source
from scipy import stats
from scipy.sparse import csr_matrix

from loaders import ArraySource, MinibatchLoader, audit

pytestmark = pytest.mark.timeout(120)
SMALL = {"block_size": 8, "buffer_size": 64, "lanes": 4}


def rows_of(loader: MinibatchLoader) -> list[list[int]]:
    return [minibatch.rows.tolist() for minibatch in loader]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 30, 100]), st.floats(0.02, 0.5))
def test_rows_come_as_often_as_their_weight_says(seed, factor, share):
    rng = np.random.default_rng(seed)
    n, epochs = 600, 60
    weights = np.where(rng.random(n) < share, float(factor), 1.0)
    weights[rng.integers(0, n, 30)] = 0
    data = ArraySource(counts(n), segments=(0, 150, 151, 400, n))
    loader = MinibatchLoader(data, 50, seed, weights=weights, **SMALL)
    seen = np.zeros(n)
    for _ in range(epochs):
        rows = np.concatenate([b.rows for b in loader])
        assert len(rows) == n
        seen += np.bincount(rows, minlength=n)
    assert (seen[weights == 0] == 0).all()
    expected = epochs * n * weights / weights.sum()
    # Draws are systematic, so counts scatter less than independent ones: a z of 6 is far out.
    drawn = weights > 0
    z = (seen - expected)[drawn] / np.sqrt(expected[drawn] * 8)
    assert np.abs(z).max() < 6
    heavy = weights == factor
    off = seen[heavy].sum() - expected[heavy].sum()
    assert abs(off) < 6 * np.sqrt(expected[heavy].sum())  # few rows may be heavy


def test_counts_of_weighted_rows_follow_the_weights_on_the_whole():
    n, epochs = 400, 400
    weights = np.random.default_rng(0).gamma(0.7, size=n) + 0.01
    loader = MinibatchLoader(ArraySource(counts(n)), 40, weights=weights, **SMALL)
    seen = sum(
        np.bincount(np.concatenate([b.rows for b in loader]), minlength=n) for _ in range(epochs)
    )
    expected = epochs * n * weights / weights.sum()
    assert stats.pearsonr(seen, expected)[0] > 0.995
    assert stats.chisquare(seen, expected).statistic < 3 * n


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.01, 0.05, 0.3, 0.6, 1]),
    st.sampled_from([1, 3, 40]),
)
def test_any_chosen_rows_come_by_weight_and_not_in_lumps(seed, share, factor):
    """Scatter of counts about what is expected, where independent draws have one of 1 a row."""
    rng = np.random.default_rng(seed)
    n, epochs = 4_000, 20
    mask = rng.random(n) < share
    mask[rng.integers(0, n)] = True
    weights = np.where(rng.random(n) < 0.03, float(factor), 1.0)
    sizes = {"block_size": 16, "buffer_size": 1024, "lanes": 4}
    data = ArraySource(counts(n), segments=(0, 150, 151, 1_900, n))
    loader = MinibatchLoader(
        data, 64, seed, rows=mask, weights=weights, rows_per_epoch=3_000, **sizes
    )
    assert rows_of(loader) == [rows.tolist() for rows in loader._plan_of(epoch=0).minibatches()]
    expected = 3_000 * (weights * mask) / (weights * mask).sum()
    seen = np.zeros((epochs, n))
    for epoch in range(epochs):
        loader.skip_to_epoch(epoch)
        seen[epoch] = np.bincount(np.concatenate([*loader.plan.minibatches()]), minlength=n)
    assert (seen.sum(axis=1) == 3_000).all()
    assert not seen[:, ~mask].any()
    seen, expected = seen[:, mask], expected[mask]
    scatter = ((seen - expected) ** 2).mean(axis=0) / expected
    assert scatter.mean() < 1.2
    assert scatter.max() < 6
    z = (seen.sum(axis=0) - epochs * expected) / np.sqrt(epochs * expected)
    assert np.abs(z).max() < 8


def test_a_light_row_beside_a_heavy_one_does_not_come_in_lumps():
    """Two rows of each block are chosen: without the heavy one, the other would fill a visit."""
    n = 32 * 200
    weights = np.zeros(n)
    weights[::32], weights[1::32] = 100, 10
    loader = MinibatchLoader(
        ArraySource(counts(n)),
        rows=weights > 0,
        weights=weights,
        block_size=32,
        rows_per_epoch=4000,
    )
    seen = np.bincount(np.concatenate([m.rows for m in loader]), minlength=n)[1::32]
    assert seen.sum() == pytest.approx(4000 / 11, rel=0.1)
    assert seen.max() < 10
    assert (seen > 0).mean() > 0.7


def test_equal_weights_behind_a_thin_mask_reach_nearly_every_row():
    """There are far more chosen rows than may be held."""
    mask = np.random.default_rng(0).random(400_000) < 0.05
    data = ArraySource(csr_matrix((400_000, 3), dtype=np.float32))
    loader = MinibatchLoader(data, rows=mask, weights=np.ones(400_000))
    assert len(np.unique(np.concatenate([*loader.plan.minibatches()]))) > 0.95 * mask.sum()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.4, 1]))
def test_an_epoch_keeps_within_the_least_memory(seed, share):
    """Blocks at the ends of segments, of which less is taken, are in few windows."""
    rng = np.random.default_rng(seed)
    n = 3_000
    mask = rng.random(n) < share
    options = {"rows": mask, "weights": rng.gamma(0.5, size=n) + 1e-3, "rows_per_epoch": 2_000}
    options |= {"block_size": 16, "buffer_size": 256, "lanes": 4, "threads": 2}
    data = ArraySource(rng.poisson(rng.gamma(0.3, 2, (n, 1)), (n, 40)), segments=(0, 9, 1_213, n))
    least = MinibatchLoader(data, 50, seed, **options).budget.minimum
    loader = MinibatchLoader(data, 50, seed, memory=least, **options)
    found = audit(loader)
    assert found.rows == 2_000
    assert 0 < found.window_bytes <= loader.budget.windows


def test_a_single_heavy_row_comes_all_over_an_epoch():
    weights = np.ones(4_000)
    weights[1_234] = 16
    loader = MinibatchLoader(ArraySource(counts(4_000)), 40, weights=weights)
    assert loader.plan.held.tolist() == [1_234]
    for _ in range(5):
        found = np.flatnonzero(np.concatenate([m.rows for m in loader]) == 1_234)
        assert len(found) in (15, 16)
        assert np.ptp(found) > 2_000


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 7, 1e308, np.finfo(np.float64).max])
def test_only_the_ratios_of_weights_count(scale):
    ones = rows_of(MinibatchLoader(source(), 20, weights=np.ones(500), **SMALL))
    assert rows_of(MinibatchLoader(source(), 20, weights=np.full(500, scale), **SMALL)) == ones


def test_labels_are_balanced_down_to_a_single_cell():
    labels = np.array([0] * 2_900 + [1] * 80 + [2] * 19 + [3])
    labels = np.random.default_rng(1).permutation(labels)
    data = ArraySource(counts(3_000), {"label": labels})
    loader = MinibatchLoader(data, 128, balance="label", rows_per_epoch=4_000)
    assert loader.n_rows == 4_000
    for _ in range(3):
        minibatches = list(loader)
        rows = np.concatenate([b.rows for b in minibatches])
        assert np.bincount(labels[rows]) == pytest.approx([1_000] * 4, rel=0.12)
        # the one cell of its label comes in nearly every minibatch, not in a lump
        assert np.mean([(b.obs["label"] == 3).any() for b in minibatches]) > 0.95
        for b in minibatches[:3]:
            assert (b.to_scipy() != counts(3_000)[b.rows]).nnz == 0


def test_any_column_can_be_balanced_by():
    codes = np.random.default_rng(2).choice(3, 3_000, p=[0.9, 0.07, 0.03])
    donors = np.array(["D1", "D2", None], object)[codes]
    data = ArraySource(counts(3_000), {"donor": codes})
    ours, by_code = (
        MinibatchLoader(data, 128, balance=balance, rows_per_epoch=4_000)
        for balance in (donors, "donor")
    )
    by_number = MinibatchLoader(data, 128, balance=codes, rows_per_epoch=4_000)
    for a, b, c in zip(ours, by_code, by_number, strict=True):
        assert (a.rows == b.rows).all()
        assert (c.rows == b.rows).all()
    rows = np.concatenate([m.rows for m in by_number])
    assert np.bincount(codes[rows]) == pytest.approx([4_000 / 3] * 3, rel=0.12)


def test_rare_rows_are_read_once_and_held():
    weights = np.ones(4_000)
    weights[[17, 2_000]] = 1_000
    data = Recording(counts(4_000))
    loader = MinibatchLoader(data, 50, weights=weights)
    first, second = (list(loader) for _ in range(2))
    assert np.concatenate([b.rows for b in first]).tolist().count(17) > 600
    assert sum(start <= 17 < stop and stop - start < 4 for start, stop in data.reads) == 1
    assert loader.budget.held > 0
    assert len(first) == len(second)
