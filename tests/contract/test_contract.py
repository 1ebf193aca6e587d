"""What every source of counts keeps, whatever it reads (loaders.RowSource), against scipy."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
from contract_openers import OPENERS, Opened, by_url

from loaders import MinibatchLoader, RowBlock, RowSource


@pytest.fixture(scope="module", params=OPENERS, ids=lambda opener: opener.__name__)
def opened(request, tmp_path_factory) -> Opened:
    if request.param is by_url:
        request.getfixturevalue("object_store")
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


def matrix(block: RowBlock, n_vars: int) -> sp.csr_matrix:
    out = sp.csr_matrix(
        (block.data.astype(np.float64), block.indices.astype(np.int64), block.indptr),
        shape=(block.n_rows, n_vars),
    )
    out.sort_indices()
    return out


def same(found: sp.csr_matrix, expected: sp.csr_matrix) -> bool:
    return found.shape == expected.shape and (found != expected).nnz == 0


def ranges(source: RowSource, n: int, seed: int) -> list[tuple[int, int]]:
    """Random ranges, each in one segment; some are empty."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        k = rng.integers(len(source.segments) - 1)
        start, stop = sorted(rng.integers(source.segments[k], source.segments[k + 1] + 1, 2))
        out.append((int(start), int(stop)))
    return out


def test_is_a_source_and_says_what_it_is(opened):
    source, counts = opened.source, opened.counts
    assert isinstance(source, RowSource)
    assert (source.n_obs, source.n_vars) == counts.shape
    assert source.segments[0] == 0
    assert source.segments[-1] == source.n_obs
    assert all(a < b for a, b in pairwise(source.segments))
    assert source.reading
    assert source.read_overhead >= 0
    assert {"study", "batch", "label"} <= set(source.obs_codes)
    for codes in source.obs_codes.values():
        assert codes.dtype == np.int32
        assert codes.shape == (source.n_obs,)
        assert codes.min() >= -1


def test_rows_are_those_of_the_file(opened):
    source, counts = opened.source, opened.counts
    for start, stop in [*pairwise(source.segments), *ranges(source, 40, 0)]:
        block = source.read_rows(start, stop)
        assert block.narrow == source.narrow
        assert same(matrix(block, source.n_vars), counts[start:stop])


def test_several_ranges_come_one_behind_the_other(opened):
    source, counts = opened.source, opened.counts
    for k, (low, high) in enumerate(pairwise(source.segments)):
        rng = np.random.default_rng(k)
        starts = rng.integers(low, high, 12)
        stops = np.minimum(starts + rng.integers(0, 30, 12), high)
        block = source.read_rows(starts, stops)
        rows = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        assert same(matrix(block, source.n_vars), counts[rows])


def test_values_are_counted_without_reading(opened):
    source, counts = opened.source, opened.counts
    starts, stops = np.array(ranges(source, 50, 1)).T
    found = source.count_values(starts, stops)
    lengths = np.diff(counts.indptr)
    exact = [lengths[a:b].sum() for a, b in zip(starts, stops, strict=True)]
    assert found.dtype == np.int64
    assert (found >= exact).all()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 10**6), (5, 4)])
def test_ranges_that_are_none_are_refused(opened, start, stop):
    with pytest.raises(IndexError, match="do not lie in one study"):
        opened.source.read_rows(start, stop)


def test_a_range_over_two_segments_is_refused(opened):
    if len(opened.source.segments) == 2:
        pytest.skip("one segment")
    border = opened.source.segments[1]
    with pytest.raises(IndexError, match="do not lie in one study"):
        opened.source.read_rows(border - 1, border + 1)


def test_fingerprint_is_of_the_rows(opened):
    again = opened.reopen()
    assert again.fingerprint == opened.source.fingerprint
    assert len(again.fingerprint) >= 32


def test_threads_read_at_once(opened):
    wanted = ranges(opened.source, 200, 2)
    with ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(lambda r: opened.source.read_rows(*r), wanted))
    for (start, stop), block in zip(wanted, blocks, strict=True):
        assert same(matrix(block, opened.source.n_vars), opened.counts[start:stop])


def _sums(source: RowSource, out) -> None:
    sums = [float(source.read_rows(a, b).data.sum()) for a, b in pairwise(source.segments)]
    out.put((sums, source.fingerprint))


def test_a_fork_reads_the_same(opened):
    """After its parent has read: what the parent holds open must not be shared unawares."""
    opened.source.read_rows(0, 5)
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    child = context.Process(target=_sums, args=(opened.source, out))
    child.start()
    sums, fingerprint = out.get(timeout=60)
    child.join(60)
    assert sums == [float(opened.counts[a:b].sum()) for a, b in pairwise(opened.source.segments)]
    assert fingerprint == opened.source.fingerprint


def test_a_pickled_copy_reads_the_same(opened):
    copy = pickle.loads(pickle.dumps(opened.source))
    for start, stop in pairwise(copy.segments):
        assert same(matrix(copy.read_rows(start, stop), copy.n_vars), opened.counts[start:stop])
    assert copy.fingerprint == opened.source.fingerprint


def test_an_epoch_has_each_row_once_and_its_counts(opened):
    loader = MinibatchLoader(opened.source, 32, seed=5, block_size=8, buffer_size=64)
    orders = []
    for _ in range(2):
        rows = []
        for minibatch in loader:
            found = minibatch.to_scipy().astype(np.float64)
            assert same(sp.csr_matrix(found), opened.counts[minibatch.rows])
            for name, codes in opened.source.obs_codes.items():
                assert (minibatch.obs[name] == codes[minibatch.rows]).all()
            rows.append(minibatch.rows)
        orders.append(np.concatenate(rows))
        assert sorted(orders[-1].tolist()) == list(range(opened.source.n_obs))
    assert (orders[0] != orders[1]).any()


def test_an_epoch_goes_on_where_it_was(opened):
    def loader(source: RowSource) -> MinibatchLoader:
        return MinibatchLoader(source, 32, seed=5, block_size=8, buffer_size=64)

    whole = [minibatch.rows.tolist() for minibatch in loader(opened.source)]
    first = loader(opened.source)
    iteration = iter(first)
    begun = [next(iteration).rows.tolist() for _ in range(4)]
    state = first.state_dict()
    second = loader(opened.reopen())
    second.load_state_dict(state)
    assert begun + [minibatch.rows.tolist() for minibatch in second] == whole
