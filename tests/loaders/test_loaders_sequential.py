"""The order of the source."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_helpers import counts, source

from loaders import LoaderError, SequentialLoader


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 2_000),
    edges=st.lists(st.integers(0, 500), min_size=2, max_size=8),
)
def test_rows_come_in_order_and_never_cross_a_segment(m, edges):
    edges = sorted(edges[: len(edges) // 2 * 2])
    rows = list(zip(edges[::2], edges[1::2], strict=True))
    expected = [row for start, stop in rows for row in range(start, stop)]
    data = source()
    if not expected:
        with pytest.raises(LoaderError, match="no rows to load"):
            SequentialLoader(data, m, rows)
        return
    loader = SequentialLoader(data, m, rows)
    minibatches = list(loader)
    assert len(minibatches) == len(loader)
    assert loader.n_rows == len(expected)
    assert np.concatenate([b.rows for b in minibatches]).tolist() == expected
    bounds = np.asarray(data.segments)
    for minibatch in minibatches:
        assert 1 <= minibatch.n_rows <= m
        assert len(set(np.searchsorted(bounds, minibatch.rows, side="right"))) == 1
        assert np.array_equal(minibatch.to_scipy().toarray(), counts(500)[minibatch.rows].toarray())
        assert np.array_equal(minibatch.obs["batch"], minibatch.rows * 7 % 11)


def test_minibatches_are_full_except_where_a_segment_ends():
    sizes = [m.n_rows for m in SequentialLoader(source(), 100)]
    assert sizes == [37, 1, 100, 100, 22, 100, 100, 40]


def test_iterations_are_independent():
    loader = SequentialLoader(source(), 64)
    whole = [m.rows.tolist() for m in loader]
    assert [(a.rows.tolist(), b.rows.tolist()) for a, b in zip(loader, loader, strict=True)] == [
        (rows, rows) for rows in whole
    ]


def test_bad_parameters_are_refused():
    with pytest.raises(LoaderError, match="minibatch_size is out of range"):
        SequentialLoader(source(), 0)
    with pytest.raises(LoaderError, match="out of order or out of range"):
        SequentialLoader(source(), 10, [(5, 10), (0, 5)])
