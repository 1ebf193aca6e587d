"""What the loader promises besides the order: masks, ranks, resume, memory, narrow, audits."""

import hashlib
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_helpers import Recording, counts, loader_threads, source

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
from loaders.pool import _SMALL
from loaders.stalls import STAGES

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


# --- what is refused -----------------------------------------------------------------------------


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
    [
        ("512MB", 512 * 10**6),
        ("2 GiB", 2**31),
        ("1.5kb", 1500),
        (7, 7),
        ("100", 100),
        (np.int64(10**9), 10**9),
        (np.uint8(7), 7),
    ],
)
def test_sizes_are_parsed(size, nbytes):
    assert parse_bytes(size) == nbytes


@pytest.mark.parametrize("size", ["", "MB", "-3MB", 0, -1, True, np.True_, "3 potatoes", 2.5, None])
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


def test_what_is_kept_never_changes_while_memory_of_the_rest_is_used_again():
    """Arrays large enough to come from the pool, and what is kept are views of them."""
    data = ArraySource(np.random.default_rng(0).poisson(1.0, (3_000, 200)))
    sizes = {"block_size": 16, "buffer_size": 256}
    least = MinibatchLoader(data, 250, **sizes).budget.minimum
    loader = MinibatchLoader(data, 250, memory=least, **sizes)  # minibatches are made singly
    digests, kept, places = [], [], []
    for _ in range(4):
        for number, minibatch in enumerate(loader):
            assert min(minibatch.indices.nbytes, minibatch.data.nbytes) > _SMALL
            places.append(minibatch.data.ctypes.data)
            if number % 3 == 0:
                arrays = (minibatch.indptr, minibatch.indices[9:], minibatch.data[:-9:2])
                digests.append([hashlib.sha256(a.tobytes()).hexdigest() for a in arrays])
                kept.append(arrays)
    assert len(set(places)) < len(places)
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
    assert "500 rows, 500 different, 0 missing, 0 dropped: each once" in str(found)
    weighted = audit(MinibatchLoader(source(), 20, weights=np.arange(500), **SMALL))
    assert weighted.each_once is None
    assert weighted.distinct_rows == 500 - weighted.missing_rows < 500


@pytest.mark.parametrize("threads", [1, 3])
def test_figures_of_an_audit_fit_each_other(threads):
    data = ArraySource(np.random.default_rng(0).poisson(1.0, (3_000, 200)))
    loader = MinibatchLoader(data, 100, threads=threads)
    found = audit(loader)
    assert found.cells_per_second * found.seconds == pytest.approx(3_000)
    assert found.seconds > 0
    assert found.peak_bytes >= 0
    assert 0 < found.window_bytes <= loader.budget.windows
    assert set(found.stalls) == set(STAGES)
    assert all(seconds >= 0 for seconds in found.stalls.values())
    assert found.stalls["wait_for_minibatch"] <= found.seconds
    assert found.stalls["wait_for_blocks"] + found.stalls["wait_for_room"] <= found.seconds
    assert 0 < found.stalls["reading"] + found.stalls["gathering"] <= threads * found.seconds


def test_an_audit_after_the_last_minibatch_is_one_of_the_next_epoch():
    loader = MinibatchLoader(source(), 20, **SMALL)
    for _ in loader:
        if loader.step == len(loader):
            break
    found = audit(loader)
    assert (found.epoch, found.rows, found.each_once) == (1, 500, True)
    assert (loader.epoch, loader.step) == (2, 0)


@settings(deadline=None, max_examples=25)
@given(st.data(), st.booleans(), st.sampled_from([1, 2, 4]))
def test_an_audit_judges_the_share_of_a_rank_from_any_step_on(data, drop_last, world_size):
    mask = np.random.default_rng(3).random(500) < 0.6
    loader = MinibatchLoader(
        *(source(), 24, 7),
        rows=mask,
        drop_last=drop_last,
        world_size=world_size,
        rank=world_size - 1,
        **SMALL,
    )
    dropped = mask.sum() % 24 if drop_last else 0
    steps = data.draw(st.integers(0, len(loader) - 1))
    before = sum(m.n_rows for m, _ in zip(loader, range(steps), strict=False))
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "step": steps})
    found = audit(loader)
    assert found.rows == sum(len(rows) for rows in loader._plan_of(epoch=0).minibatches()) - before
    assert (found.missing_rows, found.dropped_rows, found.each_once) == (0, dropped, True)


def test_an_audit_sees_rows_that_the_order_lacks():
    """What was to come is told by the rows that were chosen, not by the order."""
    loader = MinibatchLoader(source(), 20, **SMALL)
    loader._plan = MinibatchLoader(source(), 20, rows=[(0, 480)], **SMALL).plan
    found = audit(loader)
    assert (found.rows, found.distinct_rows, found.missing_rows) == (480, 480, 20)
    assert not found.each_once


def test_an_audit_sees_a_row_that_comes_twice_in_place_of_another():
    loader = MinibatchLoader(source(), 20, **SMALL)
    good = loader.plan.mix
    loader.plan.mix = lambda w: np.where(np.arange(w.n_rows) == 1, good(w)[0], good(w))
    found = audit(loader)
    assert found.distinct_rows < found.rows
    assert found.missing_rows == 500 - found.distinct_rows
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
