"""A matrix as a source."""

import numpy as np
import pytest
from loaders_helpers import counts, source
from scipy.sparse import csr_matrix

from loaders import ArraySource


@pytest.mark.parametrize(("start", "stop"), [(0, 500), (0, 37), (37, 38), (259, 260), (10, 10)])
def test_blocks_are_rows_of_the_matrix(start, stop):
    block = source().read_rows(start, stop)
    expected = counts(500)[start:stop]
    assert block.n_rows == stop - start
    found = csr_matrix((block.data, block.indices, block.indptr), shape=expected.shape)
    assert np.array_equal(found.toarray(), expected.toarray())
    assert (block.indptr.dtype, block.indices.dtype, block.data.dtype) == (
        np.int64,
        np.int32,
        np.float32,
    )


def test_duplicates_are_summed_and_the_input_left_alone():
    matrix = csr_matrix((np.ones(3), np.array([2, 2, 0]), np.array([0, 3])), shape=(1, 4))
    block = ArraySource(matrix).read_rows(0, 1)
    assert (block.indices.tolist(), block.data.tolist()) == ([0, 2], [1, 2])
    assert matrix.indices.tolist() == [2, 2, 0]


def test_fingerprint_follows_the_content():
    base = counts(20)
    changed = base.copy()
    changed.data[0] += 1
    codes = np.arange(20)
    sources = [
        ArraySource(base),
        ArraySource(changed),
        ArraySource(base[::-1]),
        ArraySource(base[:, ::-1]),
        ArraySource(csr_matrix(base, shape=(20, 41))),
        ArraySource(base, segments=(0, 10, 20)),
        ArraySource(base, {"batch": codes}),
        ArraySource(base, {"batch": codes[::-1]}),
        ArraySource(base, {"label": codes}),
    ]
    assert len({s.fingerprint for s in sources}) == len(sources)
    assert ArraySource(base.toarray()).fingerprint == sources[0].fingerprint
