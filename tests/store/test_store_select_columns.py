"""Columns of narrow rows renamed and dropped, beside scipy's selection of columns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import sparse

from atlas.store.kernels import select_columns

GENES = 300


@pytest.mark.parametrize("kept", [0, 1, 30, 299, 300])
@pytest.mark.parametrize("rows", [0, 1, 60])
@pytest.mark.parametrize("in_order", [True, False])
def test_columns_are_those_that_scipy_selects(kept: int, rows: int, in_order: bool) -> None:
    rng = np.random.default_rng(kept + rows)
    dense = rng.poisson(0.2, (rows, GENES))
    dense[rows // 3 : rows // 2] = 0
    counts = sparse.csr_matrix(dense)
    chosen = rng.permutation(GENES)[:kept]
    table = np.full(GENES, -1, np.int32)
    table[chosen] = np.arange(kept)
    indptr = counts.indptr.astype(np.int64)
    places = np.arange(counts.nnz)
    if not in_order:
        parts = [rng.permutation(places[a:b]) for a, b in pairwise(indptr)]
        places = np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)
    indices = counts.indices[places].astype(np.uint16)
    data = counts.data[places].astype(np.uint16)
    before = indptr.copy()

    new = select_columns(indptr, indices, data, table)
    assert new.dtype == np.int64
    np.testing.assert_array_equal(indptr, before)
    n = int(new[-1])
    made = sparse.csr_matrix((data[:n], indices[:n], new), shape=(rows, max(kept, 1)))
    expected = dense[:, chosen]
    np.testing.assert_array_equal(made.toarray()[:, :kept], expected)
    if in_order:  # what stays keeps its order
        row_of = np.repeat(np.arange(rows), np.diff(before))
        stays = np.isin(counts.indices, chosen)
        np.testing.assert_array_equal(indices[:n], table[counts.indices[stays]])
        np.testing.assert_array_equal(np.repeat(np.arange(rows), np.diff(new)), row_of[stays])
