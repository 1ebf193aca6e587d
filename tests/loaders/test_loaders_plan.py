"""The order of an epoch: properties, a slow reference, golden orders, mixture."""

import hashlib
import math
import weakref
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import EpochPlan, LoaderError
from loaders.blocks import default_block_size
from loaders.windows import walk

# --- a slow reference, written from the description of the order -------------------------------

WORD = 2**64


def philox(n: int, key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x64-10 as in Salmon et al. 2011, figure 2; counts up before each four words."""
    words: list[int] = []
    first, *others = counter
    while len(words) < n:
        first += 1
        c, k = [first, *others], list(key)
        for _ in range(10):
            a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [b // WORD ^ c[1] ^ k[0], b % WORD, a // WORD ^ c[3] ^ k[1], a % WORD]
            k = [(k[0] + 0x9E3779B97F4A7C15) % WORD, (k[1] + 0xBB67AE8584CAA73B) % WORD]
        words += c
    return words[:n]


def permuted(items: list, seed: int, purpose: int, epoch: int, lane: int, window: int) -> list:
    keys = philox(len(items), (seed, purpose), (0, epoch, lane, window))
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def reference(
    segments, m, seed, epoch, *, rows, block_size, buffer_size, lanes, drop_last
) -> list[list[int]]:
    blocks: list[list[int]] = []
    for start, stop in rows:
        for row in range(start, stop):
            if row == start or row in segments or len(blocks[-1]) == block_size:
                blocks.append([])
            blocks[-1].append(row)
    segment_of = [sum(block[0] >= start for start in segments) for block in blocks]
    spread = []
    for segment in sorted(set(segment_of)):
        shuffled = permuted(list(range(len(blocks))), seed, 0, epoch, 0, 0)
        own = [i for i in shuffled if segment_of[i] == segment]
        spread += [(j, len(own), i) for j, i in enumerate(own)]
    words = philox(len(blocks), (seed, 3), (0, epoch, 0, 0))
    places = [(j + word / 2**64) / n for (j, n, _), word in zip(spread, words, strict=True)]
    dealt: list[list[list[int]]] = [[] for _ in range(lanes)]
    for k in sorted(range(len(blocks)), key=places.__getitem__):
        block = blocks[spread[k][2]]
        min(dealt, key=lambda lane: sum(map(len, lane))).append(block)
    k = buffer_size // (lanes * block_size)
    mixed = []
    for number, lane in enumerate(dealt):
        sequence: list[int] = []
        size, window = math.ceil(k * (number + 1) / lanes), 0
        while lane:
            inside, lane = list(chain.from_iterable(lane[:size])), lane[size:]
            sequence += permuted(inside, seed, 1, epoch, number, window)
            size, window = k, window + 1
        mixed.append(sequence)
    minibatches: list[list[int]] = []
    taken = [0] * lanes
    while True:
        step = len(minibatches)
        upto = [((step + 1) * m + number) // lanes for number in range(lanes)]
        if any(end > len(sequence) for end, sequence in zip(upto, mixed, strict=True)):
            break
        minibatches.append(
            [r for a, b, rows_ in zip(taken, upto, mixed, strict=True) for r in rows_[a:b]]
        )
        taken = upto
    pool = [row for start, sequence in zip(taken, mixed, strict=True) for row in sequence[start:]]
    order = permuted(list(range(len(pool))), seed, 2, epoch, 0, 0)
    dealt_out = [sorted(order[first : first + m]) for first in range(0, len(pool), m)]
    minibatches += [[pool[i] for i in positions] for positions in dealt_out]
    if drop_last and minibatches and len(minibatches[-1]) < m:
        minibatches.pop()
    return minibatches


# --- arbitrary parameters ------------------------------------------------------------------------


@st.composite
def parameters(draw) -> dict:
    sizes = draw(st.lists(st.integers(0, 70), min_size=3, max_size=6).filter(any))
    segments = tuple(np.cumsum([0, *sizes]).tolist())
    n_obs = segments[-1]
    edges = draw(st.lists(st.integers(0, n_obs), max_size=8))
    edges = sorted(edges[: len(edges) // 2 * 2])
    rows = list(zip(edges[::2], edges[1::2], strict=True))
    if sum(b - a for a, b in rows) == 0:
        rows = [(0, n_obs)]
    lanes, block_size = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    buffer_size = lanes * block_size * draw(st.integers(1, 5)) + draw(st.integers(0, 20))
    return {
        "segments": segments,
        "minibatch_size": draw(st.integers(1, 60)),
        "rows": rows,
        "block_size": block_size,
        "buffer_size": buffer_size,
        "lanes": lanes,
    }


def chosen(rows: list[tuple[int, int]]) -> list[int]:
    return [row for start, stop in rows for row in range(start, stop)]


words = st.integers(0, WORD - 1)


@settings(deadline=None, max_examples=300)
@given(parameters(), words, words)
def test_every_row_comes_exactly_once(args, seed, epoch):
    plan = EpochPlan(**args, seed=seed, epoch=epoch)
    minibatches = list(plan.minibatches())
    assert sorted(np.concatenate(minibatches).tolist()) == chosen(args["rows"])
    sizes = [len(rows) for rows in minibatches]
    m = args["minibatch_size"]
    assert len(sizes) == plan.n_steps == math.ceil(plan.n_rows / m)
    assert sizes[:-1] == [m] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= m


@settings(deadline=None, max_examples=200)
@given(parameters(), words, words)
def test_drop_last_leaves_out_only_the_short_minibatch(args, seed, epoch):
    m, n_rows = args["minibatch_size"], len(chosen(args["rows"]))
    if n_rows < m:
        with pytest.raises(LoaderError, match="no minibatch in an epoch"):
            EpochPlan(**args, seed=seed, epoch=epoch, drop_last=True)
        return
    plan = EpochPlan(**args, seed=seed, epoch=epoch, drop_last=True)
    minibatches = list(plan.minibatches())
    assert [len(rows) for rows in minibatches] == [m] * (n_rows // m)
    rows = np.concatenate(minibatches)
    assert len(set(rows.tolist())) == len(rows)
    assert set(rows.tolist()) <= set(chosen(args["rows"]))


@settings(deadline=None, max_examples=200)
@given(parameters(), words, words, st.booleans())
def test_order_is_that_of_the_slow_reference(args, seed, epoch, drop_last):
    if drop_last and len(chosen(args["rows"])) < args["minibatch_size"]:
        drop_last = False
    plan = EpochPlan(**args, seed=seed, epoch=epoch, drop_last=drop_last)
    options = {**args, "drop_last": drop_last}
    expected = reference(
        options.pop("segments"), options.pop("minibatch_size"), seed, epoch, **options
    )
    assert [rows.tolist() for rows in plan.minibatches()] == expected


@settings(deadline=None, max_examples=100)
@given(parameters(), st.data())
def test_any_step_can_be_computed_without_those_before(args, data):
    plan = EpochPlan(**args, seed=5, epoch=2)
    step = data.draw(st.integers(0, plan.n_steps))
    whole = [rows.tolist() for rows in plan.minibatches()]
    assert [rows.tolist() for rows in plan.minibatches(step)] == whole[step:]


def first_needs(plan: EpochPlan, step: int) -> tuple[dict[tuple[int, int], int], int]:
    """The step at which each window is first needed from ``step`` on; where the pool begins."""
    needs: dict[tuple[int, int], int] = {}
    takes = {current: plan.takes(current) for current in range(step, plan.n_steps)}
    pooled = [s for s in takes if isinstance(takes[s][0].positions, np.ndarray)]
    for current, parts in takes.items():
        for take in parts:
            needs.setdefault((take.lane, take.index), current)
    return needs, min(pooled, default=plan.n_steps)


@settings(deadline=None, max_examples=100)
@given(parameters(), st.data())
def test_a_step_needs_one_begun_window_of_each_lane(args, data):
    plan = EpochPlan(**args)
    step = data.draw(st.integers(0, plan.n_steps - 1))
    needs, _ = first_needs(plan, step)
    _, pool = first_needs(plan, 0)
    listed = {(window.lane, window.index) for window in plan.windows(step)}
    if step > pool:  # The pool is dealt out from all its windows.
        assert listed >= set(needs)
        return
    assert listed == set(needs)
    begun = {(take.lane, take.index) for s in range(step) for take in plan.takes(s)} & listed
    assert len({lane for lane, _ in begun}) == len(begun)


@settings(deadline=None, max_examples=100)
@given(parameters())
def test_windows_come_in_the_order_of_need(args):
    plan = EpochPlan(**args)
    needs, pool = first_needs(plan, 0)
    order = [min(needs[window.lane, window.index], pool) for window in plan.windows()]
    assert order == sorted(order)


@settings(deadline=None, max_examples=100)
@given(parameters())
def test_blocks_lie_in_one_segment_and_windows_in_the_buffer(args):
    plan = EpochPlan(**args)
    bounds = np.asarray(args["segments"])
    per_window = args["buffer_size"] // (args["lanes"] * args["block_size"])
    for window in plan.windows():
        assert 1 <= len(window.blocks) <= per_window
        for start, stop in window.blocks:
            assert 1 <= stop - start <= args["block_size"]
            assert not ((bounds > start) & (bounds < stop)).any()


@settings(deadline=None, max_examples=100)
@given(parameters())
def test_lanes_differ_by_one_block_at_most(args):
    plan = EpochPlan(**args)
    filled = [0] * args["lanes"]
    for window in plan.windows():
        filled[window.lane] += window.n_rows
    assert max(filled) - min(filled) <= args["block_size"]


class Content:
    """Something that a weak reference can watch."""


@settings(deadline=None, max_examples=100)
@given(parameters())
def test_windows_that_have_ended_are_let_go(args):
    plan = EpochPlan(**args)
    _, pool = first_needs(plan, 0)
    alive: weakref.WeakSet[Content] = weakref.WeakSet()

    def opened():
        for window in plan.windows():
            content = Content()
            alive.add(content)
            yield window, content
            del content

    parts = walk(plan, 0, opened())
    for step, contents in enumerate(parts):
        contents.clear()
        if step < pool:  # One is still held by the generator above.
            assert len(alive) <= args["lanes"] + 1
    assert len(alive) == 0


# --- seeds, epochs, golden orders ----------------------------------------------------------------


def order(**options) -> tuple[int, ...]:
    plan = EpochPlan((0, 40, 41, 100), 8, block_size=5, buffer_size=80, **options)
    return tuple(np.concatenate(list(plan.minibatches())).tolist())


def test_seeds_and_epochs_never_share_an_order():
    """Small pairs collide where seed and epoch are added or xored."""
    orders = {order(seed=seed, epoch=epoch) for seed in range(12) for epoch in range(12)}
    assert len(orders) == 144
    assert order(seed=1) == order(seed=1)


def test_dropped_rows_change_with_the_epoch():
    kept = {frozenset(order(epoch=epoch, drop_last=True)) for epoch in range(10)}
    assert len(kept) > 5


def test_golden_orders():
    """Frozen: a change here breaks resuming from states that users have saved."""

    def golden(epoch: int) -> list[list[int]]:
        rows = [(1, 9), (12, 20)]
        plan = EpochPlan(
            (0, 5, 6, 20), 4, 7, epoch, rows=rows, block_size=2, buffer_size=8, lanes=2
        )
        return [minibatch.tolist() for minibatch in plan.minibatches()]

    assert golden(0) == [[5, 14, 8, 19], [3, 4, 18, 1], [15, 17, 2, 6], [13, 12, 16, 7]]
    assert golden(1) == [[16, 17, 4, 5], [15, 13, 3, 6], [14, 12, 8, 7], [1, 2, 19, 18]]


def test_golden_order_at_default_settings():
    plan = EpochPlan((0, 30_000, 100_000), seed=2**40 + 3, epoch=5)
    assert (plan.block_size, plan.buffer_size) == (256, 16_384)
    rows = np.concatenate(list(plan.minibatches())).astype("<i8")
    assert hashlib.sha256(rows.tobytes()).hexdigest() == (
        "8846128558087e9dc3a0ef85d2cbae7654bedd1c4450d4f72c87e3800f5f6314"
    )


# --- mixture -------------------------------------------------------------------------------------


def entropy(codes: np.ndarray) -> float:
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(
    ("n_obs", "studies"), [(3_000, 4), (20_000, 4), (20_000, 20), (200_000, 4), (200_000, 20)]
)
def test_minibatches_of_sorted_batches_are_mixed_at_default_settings(n_obs, studies):
    """Rows sorted by batch, so that each block is of one: 98 % of the entropy of a full shuffle."""
    segments = np.linspace(0, n_obs, studies + 1).astype(int)
    batch = np.searchsorted(segments, np.arange(n_obs), side="right") - 1
    rng = np.random.default_rng(0)
    shuffled = batch[rng.permutation(n_obs)]
    ideal = np.mean([entropy(shuffled[i : i + 128]) for i in range(0, n_obs - 127, 128)])
    found = [
        entropy(batch[rows])
        for epoch in range(max(1, 100_000 // n_obs))
        for rows in EpochPlan(segments.tolist(), epoch=epoch).minibatches()
        if len(rows) == 128
    ]
    assert np.mean(found) >= 0.98 * ideal


def test_rows_land_anywhere_in_an_epoch():
    """The mean position of each row over epochs is that of a uniform permutation, within 5 sd."""
    n, epochs = 300, 400
    position = np.zeros(n)
    for epoch in range(epochs):
        plan = EpochPlan((0, 100, 130, n), 10, epoch=epoch, block_size=8, buffer_size=64, lanes=4)
        position[np.concatenate(list(plan.minibatches()))] += np.arange(n)
    sd = n / math.sqrt(12 * epochs)
    assert np.abs(position / epochs - (n - 1) / 2).max() < 5 * sd


# --- parameters ----------------------------------------------------------------------------------


def test_default_block_size():
    assert [default_block_size(n, 8) for n in (1, 4_096, 10_000, 32_768, 10**9)] == [
        32,
        32,
        78,
        256,
        256,
    ]


def test_sizes_that_are_not_given_fit_those_that_are():
    def sizes(**options) -> tuple[int, int]:
        plan = EpochPlan((0, 10**6), **options)
        return plan.block_size, plan.buffer_size

    assert sizes() == (256, 16_384)
    assert sizes(buffer_size=800) == (100, 800)
    assert sizes(block_size=4_096) == (4_096, 32_768)
    assert sizes(lanes=128) == (256, 32_768)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"minibatch_size": 0},
            "minibatch_size is out of range\n  found: 0\n  expected: at least 1",
        ),
        ({"lanes": 0}, "lanes is out of range"),
        ({"block_size": 0}, "block_size is out of range"),
        (
            {"buffer_size": 7},
            "buffer_size is too small\n  found: 7\n  expected: at least one row for",
        ),
        ({"block_size": 10, "buffer_size": 79}, "expected: buffer_size of at least 80"),
        ({"seed": -1}, "seed is out of range"),
        ({"seed": 2**64}, "seed is out of range"),
        ({"epoch": -1}, "epoch is out of range"),
        ({"rows": [(10, 20), (5, 8)]}, r"found: \(5, 8\) after row 20"),
        ({"rows": [(0, 10), (9, 20)]}, "sort the ranges and join those that overlap"),
        ({"rows": [(0, 101)]}, r"found: \(0, 101\).*\n  expected: .* within 0 and 100"),
        ({"rows": [(-1, 5)]}, "a row range is out of order or out of range"),
        ({"rows": [(8, 5)]}, "a row range is out of order or out of range"),
        ({"rows": []}, "no rows to load"),
        ({"rows": [(5, 5)]}, "found: 1 row ranges without a row, of a source of 100 rows"),
        ({"segments": (0, 50, 40)}, "segments of the source are out of order"),
        ({"segments": (1, 50)}, "segments of the source are out of order"),
        ({"segments": ()}, "segments of the source are out of order"),
        ({"segments": (0,)}, "no rows to load"),
    ],
)
def test_bad_parameters_are_refused(options, message):
    with pytest.raises(LoaderError, match=message):
        EpochPlan(**{"segments": (0, 100), **options})
