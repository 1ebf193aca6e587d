"""What the loader promises besides the order: masks, weights, ranks, resume, memory, narrow."""

import hashlib
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_helpers import Recording, counts, loader_threads, source
from scipy import stats

from loaders import (
    ArraySource,
    DeviceFeed,
    LoaderError,
    MinibatchLoader,
    SequentialLoader,
    TorchDataset,
    audit,
)
from loaders.audit import diversity
from loaders.memory import parse_bytes

pytestmark = pytest.mark.timeout(120)
SMALL = {"block_size": 8, "buffer_size": 64, "lanes": 4}


def rows_of(loader: MinibatchLoader) -> list[list[int]]:
    return [minibatch.rows.tolist() for minibatch in loader]


# --- masks ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.003, 1), st.booleans(), st.integers(1, 90))
def test_a_mask_is_gone_through_once_with_the_right_counts(seed, share, narrow, m):
    mask = np.random.default_rng(seed).random(500) < share
    mask[seed % 500] = True
    data = ArraySource(counts(500), segments=(0, 37, 38, 260, 500), narrow=narrow)
    loader = MinibatchLoader(data, m, seed, rows=mask, **SMALL)
    minibatches = list(loader)
    rows = np.concatenate([b.rows for b in minibatches])
    assert np.array_equal(np.sort(rows), np.flatnonzero(mask))
    for minibatch in minibatches:
        assert (minibatch.to_scipy() != counts(500)[minibatch.rows]).nnz == 0
    sequential = [b.rows for b in SequentialLoader(data, m, mask)]
    assert np.array_equal(np.concatenate(sequential), np.flatnonzero(mask))
    as_numbers = MinibatchLoader(data, m, seed, rows=np.flatnonzero(mask), **SMALL)
    assert rows_of(as_numbers) == [b.rows.tolist() for b in minibatches]


def test_rows_that_are_left_out_are_not_held():
    """A block of which less than half is wanted is cut down to that."""
    mask = np.zeros(5_000, bool)
    mask[::50] = True
    loader = MinibatchLoader(Recording(counts(5_000)), 10, rows=mask)
    assert audit(loader).each_once
    everything = MinibatchLoader(Recording(counts(5_000)), 10)
    assert loader.budget.minimum < everything.budget.minimum / 4


# --- weights -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": np.full(500, -1.0)}, "a weight is negative or not finite"),
        ({"weights": np.full(500, np.nan)}, "a weight is negative or not finite"),
        ({"weights": np.zeros(500)}, "no row can be drawn"),
        ({"weights": np.ones(499)}, r"expected: one number for each row, \(500,\)"),
        ({"weights": np.array(["a"] * 500)}, "one number for each row"),
        ({"balance": "donor"}, "expected: one of batch, label"),
        ({"balance": "label", "weights": np.ones(500)}, "weights and balance are both given"),
        ({"balance": ["a", "b"]}, r"found: \(2,\)\n +expected: \(500,\)"),
        ({"rows_per_epoch": 10}, "rows_per_epoch is given, but rows are not drawn"),
        ({"rows": np.zeros(500, bool)}, "no rows to load"),
        ({"narrow": True}, "narrow minibatches cannot be made"),
        ({"memory": "a lot"}, "this is no size of memory"),
        ({"world_size": 16}, "lanes cannot be shared evenly"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_to_do(options, message):
    with pytest.raises(LoaderError, match=message):
        MinibatchLoader(source(), 20, **options)


# --- ranks, threads, resume ----------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.data(), st.sampled_from(["all", "mask", "weights"]))
def test_any_step_resumes_with_other_ranks_threads_and_memory(data, kind):
    options = {
        "all": {},
        "mask": {"rows": np.arange(500) % 3 == 0},
        "weights": {"weights": 1.0 + np.arange(500) % 50},
    }[kind]
    whole = MinibatchLoader(source(), 24, 5, **options, **SMALL)
    list(whole)
    expected = rows_of(whole)  # of epoch 1
    step = data.draw(st.integers(0, len(expected)))
    first = MinibatchLoader(source(), 24, 5, world_size=2, rank=1, **options, **SMALL)
    first.skip_to_epoch(1)
    for _, _ in zip(range(step), first, strict=False):
        pass
    state = first.state_dict()
    world_size = data.draw(st.sampled_from([1, 2, 4]))
    parts = []
    for rank in range(world_size):
        again = MinibatchLoader(
            source(), 24, 5, world_size=world_size, rank=rank, threads=1 + rank, **options, **SMALL
        )
        again.load_state_dict(state)
        parts.append(rows_of(again))
    together = [sorted(sum(rows, [])) for rows in zip(*parts, strict=True)]  # noqa: RUF017
    if state["step"] < len(expected):
        assert together == [sorted(rows) for rows in expected[step:]]


def test_a_state_of_other_settings_is_refused_showing_both():
    state = MinibatchLoader(source(), 24, **SMALL).state_dict()
    for options, message in (
        ({"weights": np.ones(500)}, "found: weights='none'.*\n.*expected: weights='"),
        ({"rows": [(0, 10)]}, "rows='500 rows.*\n.*rows='10 rows"),
        ({"seed": 3}, "seed=0\n.*seed=3"),
    ):
        with pytest.raises(LoaderError, match=message):
            MinibatchLoader(source(), 24, **options, **SMALL).load_state_dict(state)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("512MB", 512 * 10**6), ("2 GiB", 2**31), ("1.5kb", 1500), (7, 7), ("100", 100)],
)
def test_sizes_are_parsed(size, nbytes):
    assert parse_bytes(size) == nbytes


@pytest.mark.parametrize("size", ["", "MB", "-3MB", 0, -1, True, "3 potatoes", 2.5, None])
def test_no_sizes_are_refused(size):
    with pytest.raises(LoaderError, match="no size of memory"):
        parse_bytes(size)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.sampled_from(["all", "mask", "weights"]), st.integers(1, 300))
def test_the_least_memory_gives_the_same_order_and_is_kept_to(seed, kind, m):
    rng = np.random.default_rng(seed)
    options = {
        "all": {},
        "mask": {"rows": rng.random(3_000) < 0.2},
        "weights": {"weights": rng.gamma(0.3, size=3_000)},
    }[kind]
    dense = rng.poisson(0.3, (3_000, 60)) * (rng.random((3_000, 1)) < 0.3)  # uneven rows
    data = ArraySource(dense, segments=(0, 1_000, 3_000))
    sizes = {"block_size": 16, "buffer_size": 512}
    free = MinibatchLoader(data, m, seed, **options, **sizes)
    least = MinibatchLoader(data, m, seed, memory=free.budget.minimum, **options, **sizes)
    assert least.budget.total == free.budget.minimum
    for _ in range(2):
        assert rows_of(least) == rows_of(free)
        assert least.stalls.window_bytes <= least.budget.windows
    with pytest.raises(LoaderError, match=f"expected: at least {free.budget.minimum:,} bytes"):
        MinibatchLoader(data, m, seed, memory=free.budget.minimum - 1, **options, **sizes)


def test_minibatches_never_change_after_they_were_handed_out():
    loader = MinibatchLoader(source(), 20, **SMALL, memory="1MB")
    digests, kept = [], []
    for minibatch in loader:
        arrays = (minibatch.indptr, minibatch.indices, minibatch.data, minibatch.rows)
        digests.append([hashlib.sha256(a.tobytes()).hexdigest() for a in arrays])
        kept.append(arrays)
    list(loader)
    assert digests == [[hashlib.sha256(a.tobytes()).hexdigest() for a in arrays] for arrays in kept]


# --- narrow, and the device ----------------------------------------------------------------------


def test_narrow_minibatches_hold_the_same():
    wide = MinibatchLoader(ArraySource(counts(500)), 20, 3, **SMALL)
    data = ArraySource(counts(500), narrow=True)
    for narrow_output in (True, False):
        for a, b in zip(
            wide, MinibatchLoader(data, 20, 3, narrow=narrow_output, **SMALL), strict=True
        ):
            assert b.data.dtype == (np.uint16 if narrow_output else np.float32)
            assert np.array_equal(a.rows, b.rows)
            assert (a.to_scipy() != b.to_scipy()).nnz == 0
            assert torch.equal(a.to_torch(), b.to_torch())
            assert torch.equal(a.to_torch(), b.to_torch(dense=False).to_dense())
        wide.skip_to_epoch(0)


def test_counts_above_what_int16_holds_survive():
    matrix = np.array([[0, 65_535, 40_000], [1, 0, 32_768]])
    (minibatch,) = MinibatchLoader(ArraySource(matrix, narrow=True), 2, narrow=True)
    for dense in (True, False):
        tensor = minibatch.to_torch(dense=dense)
        found = tensor if dense else tensor.to_dense()
        assert np.array_equal(found.numpy(), matrix[minibatch.rows])
    with pytest.raises(ValueError, match="do not fit in uint16"):
        ArraySource(matrix * 2, narrow=True)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_genes_are_selected_on_the_device(device, dense):
    columns = np.full(40, -1, np.int32)
    columns[[3, 30, 7]] = [0, 1, 2]
    feed = DeviceFeed(device, slots=2, columns=columns)
    matrix = counts(500).toarray()
    for minibatch in MinibatchLoader(ArraySource(counts(500), narrow=True), 33, narrow=True):
        tensor = feed(minibatch, dense=dense)
        found = (tensor if dense else tensor.to_dense()).cpu().numpy()
        assert np.array_equal(found, matrix[minibatch.rows][:, [3, 30, 7]])
    columns[5] = 0
    with pytest.raises(LoaderError, match="mapped to the same column"):
        DeviceFeed(device, columns=columns)


# --- torch and processes -------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_torch_dataset_has_every_row_once_and_a_new_order_each_epoch(num_workers):
    expected = MinibatchLoader(source(), 32, 4)
    dataset = TorchDataset(MinibatchLoader(source(), 32, 4))
    data_loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers)
    assert len(data_loader) == len(expected)
    for _ in range(3):
        for found, minibatch in zip(data_loader, expected, strict=True):
            assert found["rows"].tolist() == minibatch.rows.tolist()
            assert torch.equal(found["X"], minibatch.to_torch())
            assert found["label"].tolist() == minibatch.obs["label"].tolist()
    assert loader_threads() == []


def test_a_torch_dataset_goes_on_from_a_state():
    dataset = TorchDataset(MinibatchLoader(source(), 32, 4))
    list(dataset)
    found = [item["rows"].tolist() for _, item in zip(range(4), dataset, strict=False)]
    again = TorchDataset(MinibatchLoader(source(), 32, 4))
    again.load_state_dict(dataset.state_dict())
    rest = [item["rows"].tolist() for item in again]
    whole = MinibatchLoader(source(), 32, 4)
    whole.skip_to_epoch(1)
    assert found + rest == rows_of(whole)


def test_several_workers_are_refused():
    dataset = TorchDataset(MinibatchLoader(source(), 32))
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    with pytest.raises(LoaderError, match="num_workers=2"):
        next(iter(loader))


def _rows_in_child(loader, queue):
    queue.put([minibatch.rows.tolist() for minibatch in loader])


def test_a_fork_in_mid_epoch_goes_on_from_where_it_was():
    loader = MinibatchLoader(source(), 20, **SMALL)
    iterator = iter(loader)
    next(iterator)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_rows_in_child, args=(loader, queue))
    child.start()
    found = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert found == [minibatch.rows.tolist() for minibatch in iterator]


# --- audit and description -----------------------------------------------------------------------


def test_an_audit_tells_what_came():
    found = audit(MinibatchLoader(source(), 20, **SMALL))
    assert (found.rows, found.distinct_rows, found.missing_rows) == (500, 500, 0)
    assert found.each_once
    assert set(found.diversity) == {"batch", "label"}
    assert all(0.9 < share < 1.1 for share in found.diversity.values())
    assert "500 rows, 500 different, 0 missing: each once" in str(found)
    weighted = audit(MinibatchLoader(source(), 20, weights=np.arange(500), **SMALL))
    assert weighted.each_once is None
    assert weighted.distinct_rows < 500


def test_an_audit_sees_a_row_that_comes_twice_in_place_of_another():
    loader = MinibatchLoader(source(), 20, **SMALL)
    good = loader.plan.mix
    loader.plan.mix = lambda w: np.where(np.arange(w.n_rows) == 1, good(w)[0], good(w))
    found = audit(loader)
    # The audit compares with the same plan: it is distinct rows that give it away.
    assert found.distinct_rows < found.rows
    assert not found.each_once


def test_diversity_is_low_where_nothing_was_mixed():
    codes = np.repeat(np.arange(4), 250).astype(np.int32)
    assert diversity(codes, [100] * 10) < 0.3
    assert diversity(np.tile(np.arange(4), 250).astype(np.int32), [100] * 10) > 0.98
    assert diversity(np.zeros(1000, np.int32), [100] * 10) == 1


def test_a_loader_describes_itself():
    text = MinibatchLoader(source(), 20, memory="10MB", world_size=2, **SMALL).describe()
    for part in ("fast: from memory", "rank 0 of 2", "10.0 MB", "float32 counts", "each once"):
        assert part in text
