"""Rows of a packed source that fit in the budget are read once; nothing else changes."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_helpers import Recording, counts, loader_threads

from loaders import ArraySource, EpochPlan, LoaderError, MinibatchLoader
from loaders.blocks import tile
from loaders.packed import Compact, packed
from loaders.resident import ResidentWindows, read_resident
from loaders.selection import Selection
from loaders.source import as_ranges

pytestmark = pytest.mark.timeout(60)

N = 500
SEGMENTS = (0, 37, 38, 260, 260, N)
SMALL = {"block_size": 8, "buffer_size": 64, "lanes": 4}
CODES = {"batch": np.arange(N) * 7 % 11}


class Small(Recording):
    """A source that says how many bytes its records are."""

    def __init__(self, n: int = N, segments=SEGMENTS, **kwargs) -> None:
        codes = {"batch": np.arange(n) * 7 % 11}
        super().__init__(counts(n), codes, segments, narrow=True, **kwargs)
        self.packed_bytes = len(self.packed_of(0, n).records) + 16 * n

    def packed_of(self, start: int, stop: int):
        block = ArraySource.read_rows(self, start, stop)
        return packed(block.indptr, block.indices, block.data)

    def read_packed(self, starts, stops):
        block = self.read_rows(*as_ranges(starts, stops))
        return packed(block.indptr, block.indices, block.data)


def loaders_with_and_without_room(**settings) -> tuple[MinibatchLoader, MinibatchLoader]:
    room, without = Small(), ArraySource(counts(N), CODES, SEGMENTS, narrow=True)
    held = MinibatchLoader(room, **settings, memory="100MB")
    assert isinstance(room, Compact)
    # in the next epoch the rows of a rank are others: none reads for another
    assert held.budget.resident == (settings.get("world_size", 1) == 1)
    other = MinibatchLoader(without, **settings, memory="100MB")
    assert not other.budget.resident
    return held, other


def same_minibatches(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
        for name in ("indptr", "indices", "data"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            assert getattr(a, name).dtype == getattr(b, name).dtype
        assert a.obs.keys() == b.obs.keys()
        np.testing.assert_array_equal(a.obs["batch"], b.obs["batch"])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90),
    st.sampled_from(["all", "mask", "weights"]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_same_minibatches_come_whether_rows_are_held_or_not(size, which, ranks, narrow, seed):
    rng = np.random.default_rng(seed)
    chosen = {
        "all": {},
        "mask": {"rows": rng.random(N) < 0.3},
        # some rows are heavy, and held for that
        "weights": {"weights": np.where(rng.random(N) < 0.02, 50.0, 1.0)},
    }[which]
    size = max(size, ranks)
    if which == "mask" and chosen["rows"].sum() % size < ranks:
        chosen["drop_last"] = True
    for rank in range(ranks):
        settings = {**SMALL, "minibatch_size": size, "seed": seed, "narrow": narrow, **chosen}
        settings |= {"rank": rank, "world_size": ranks}
        held, other = loaders_with_and_without_room(**settings)
        for _ in range(2):
            same_minibatches(held, other)
        step = held.steps_per_epoch // 2
        for loader in (held, other):
            loader.load_state_dict({**loader.state_dict(), "step": step})
        same_minibatches(held, other)


def test_every_row_is_read_once_for_all_epochs():
    data = Small()
    loader = MinibatchLoader(data, 17, memory="100MB", **SMALL)
    for _ in range(3):
        assert sum(minibatch.n_rows for minibatch in loader) == N
    rows = [row for start, stop in data.reads for row in range(start, stop)]
    assert sorted(rows) == list(range(N))
    assert "held from then on" in loader.describe()


def test_rows_that_were_not_chosen_are_not_read():
    data = Small()
    loader = MinibatchLoader(data, 17, rows=[(40, 60)], memory="100MB", **SMALL)
    assert sorted(row for m in loader for row in m.rows) == list(range(40, 60))
    assert all(40 <= start < stop <= 60 for start, stop in data.reads)


def test_rows_are_held_only_where_the_budget_has_room_for_all():
    data = Small(4_000, (0, 4_000))
    least = MinibatchLoader(data, 16, **SMALL).budget.minimum
    tight = MinibatchLoader(data, 16, memory=least, **SMALL)
    assert not tight.budget.resident
    assert "held" not in tight.describe().split("\n")[0]
    full = MinibatchLoader(data, 16, memory="100MB", **SMALL).budget
    for memory in range(least, least + 9 * data.packed_bytes, data.packed_bytes // 2):
        budget = MinibatchLoader(data, 16, memory=memory, **SMALL).budget
        assert budget.held + budget.windows + budget.reading + budget.queue == memory
        assert budget.windows >= 0
        assert budget.resident == (budget.windows >= full.tables + 1.0625 * data.packed_bytes)
    assert budget.resident
    assert full.tables >= (40 + 8) * 4_000  # where each row lies, and its place in an order
    assert full.reusable == full.windows + full.queue - full.tables


def test_an_error_comes_with_the_minibatch_that_it_concerns_and_it_can_be_tried_again():
    def before(read: int, start: int) -> None:
        if start <= 317 < start + 8 and failing:
            raise LoaderError("the disk is gone")

    data = Small(before=before)
    loader = MinibatchLoader(data, 17, memory="100MB", **SMALL)
    failing = [True]
    with pytest.raises(LoaderError, match="the disk is gone"):
        list(loader)
    assert loader_threads() == []
    assert loader.step > 0
    failing.clear()
    rest = sum(minibatch.n_rows for minibatch in loader)
    assert 0 < rest < N
    data.reads.clear()  # all are held by now
    assert sum(minibatch.n_rows for minibatch in loader) == N
    assert data.reads == []


def test_a_worker_that_is_made_for_an_epoch_does_not_read_all_first():
    data = Small()
    loader = MinibatchLoader(data, 17, memory="100MB", **SMALL)
    loader._process += 1  # as a fork has it
    loader.load_state_dict({**loader.state_dict(), "step": loader.steps_per_epoch - 1})
    list(loader)
    assert 0 < data.rows_read < N


def test_what_a_source_gives_is_checked_before_it_is_held():
    class Wrong(Small):
        def read_packed(self, starts, stops):
            block = super().read_packed(starts, stops)
            return type(block)(block.indptr, block.offsets, block.records[:-1])

    with pytest.raises(LoaderError, match="do not fit"):
        next(iter(MinibatchLoader(Wrong(), 17, memory="100MB", **SMALL)))


def test_a_copy_in_another_process_reads_for_itself():
    loader = MinibatchLoader(Plain(), 17, memory="100MB", **SMALL)
    first = [minibatch.rows for minibatch in loader]
    loader.skip_to_epoch(0)
    small = len(pickle.dumps(MinibatchLoader(Plain(), 17, memory="100MB", **SMALL)))
    assert len(pickle.dumps(loader)) < small + 200
    for rows, minibatch in zip(first, pickle.loads(pickle.dumps(loader)), strict=True):
        np.testing.assert_array_equal(rows, minibatch.rows)


class Plain(ArraySource):
    """Without the lock of a recording."""

    def __init__(self) -> None:
        super().__init__(counts(N), CODES, SEGMENTS, narrow=True)
        self.packed_bytes = 10**5

    def read_packed(self, starts, stops):
        block = self.read_rows(starts, stops)
        return packed(block.indptr, block.indices, block.data)


def test_windows_say_the_rows_of_the_plan():
    data = Small()
    plan = EpochPlan(SEGMENTS, 20, **SMALL)
    blocks = tile(SEGMENTS, Selection(None, N), 8)
    resident = read_resident(data, blocks, threads=2, task=100)
    assert len(resident.blocks) > 4  # one at least for each segment with rows, and by bytes
    for step in (0, 11):
        for window, opened in ResidentWindows(plan, step, resident):
            taken = opened.table[opened.order]
            np.testing.assert_array_equal(taken[:, 0], window.rows()[plan.mix(window)])
            lengths = np.diff(counts(N).indptr)[taken[:, 0]]
            np.testing.assert_array_equal(taken[:, 1], lengths)
