"""The order of an epoch: properties, a slow reference, golden orders, mixture."""

import hashlib
import math
import weakref
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
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
    words = philox(len(items), (seed, purpose), (0, epoch, lane, window))
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        place = words[last] * (last + 1) // WORD
        items[last], items[place] = items[place], items[last]
    return items


def reference(
    segments, m, seed, epoch, *, rows, block_size, buffer_size, lanes, drop_last
) -> list[list[int]]:
    wanted = {row for start, stop in rows for row in range(start, stop)}
    blocks: list[list[int]] = []
    for begin, end in pairwise(segments):
        for start in range(begin, end, block_size):
            block = [r for r in range(start, min(start + block_size, end)) if r in wanted]
            blocks += [block] if block else []
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
    n_rows, spare = len(wanted), []
    for number, lane in enumerate(dealt):
        while (over := sum(map(len, lane)) - (n_rows + number) // lanes) > 0:
            block = lane.pop()
            if len(block) > over:
                lane.append(block[:-over])
            spare.append(block[-over:])
    for number, lane in enumerate(dealt):
        while (under := (n_rows + number) // lanes - sum(map(len, lane))) > 0:
            block = spare.pop()
            lane.append(block[:under])
            spare += [block[under:]] if block[under:] else []
    size = buffer_size // lanes
    mixed = []
    for number, lane in enumerate(dealt):
        sequence: list[int] = []
        limit, window = math.ceil(size * (number + 1) / lanes), 0
        while lane:
            inside = lane.pop(0)
            while lane and len(inside) + len(lane[0]) <= limit:
                inside = inside + lane.pop(0)
            sequence += permuted(inside, seed, 1, epoch, number, window)
            limit, window = size, window + 1
        mixed.append(sequence)
    bounds = [*range(0, n_rows, m), n_rows]
    if drop_last:
        bounds = [*range(0, n_rows - m + 1, m), n_rows - n_rows % m]
    elif len(bounds) > 2 and bounds[-1] - bounds[-2] < min(m, lanes):
        bounds[-2] = n_rows - (n_rows - bounds[-3]) // 2
    minibatches = [
        [
            row
            for number, sequence in enumerate(mixed)
            for row in sequence[(a + number) // lanes : (b + number) // lanes]
        ]
        for a, b in pairwise(bounds)
    ]
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
    assert sizes[:-2] == [m] * max(0, len(sizes) - 2)
    assert all(1 <= size <= m for size in sizes)
    # Only the last two may be short, and not by chance: less than a row for each lane was left.
    left = plan.n_rows % m
    if len(sizes) > 1 and 0 < left < args["lanes"]:
        assert abs(sizes[-1] - sizes[-2]) <= 1
    elif len(sizes) > 1:
        assert sizes[-2] == m


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


def first_needs(plan: EpochPlan, step: int) -> dict[tuple[int, int], int]:
    """The step at which each window is first needed from ``step`` on."""
    needs: dict[tuple[int, int], int] = {}
    for current in range(step, plan.n_steps):
        for take in plan.course(current, current + 1).takes:
            needs.setdefault((take.lane, take.index), current)
    return needs


@settings(deadline=None, max_examples=100)
@given(parameters(), st.data())
def test_a_step_needs_one_begun_window_of_each_lane(args, data):
    plan = EpochPlan(**args)
    step = data.draw(st.integers(0, plan.n_steps - 1))
    listed = {(window.lane, window.index) for window in plan.windows(step)}
    assert listed == set(first_needs(plan, step))
    begun = {
        (take.lane, take.index) for s in range(step) for take in plan.course(s, s + 1).takes
    } & listed
    assert len({lane for lane, _ in begun}) == len(begun)


@settings(deadline=None, max_examples=100)
@given(parameters())
def test_windows_come_in_the_order_of_need(args):
    plan = EpochPlan(**args)
    needs = first_needs(plan, 0)
    order = [needs[window.lane, window.index] for window in plan.windows()]
    assert order == sorted(order)


@settings(deadline=None, max_examples=100)
@given(parameters())
def test_blocks_lie_in_one_segment_and_windows_in_the_buffer(args):
    plan = EpochPlan(**args)
    bounds = np.asarray(args["segments"])
    for window in plan.windows():
        assert 1 <= window.n_rows <= max(args["buffer_size"] // args["lanes"], args["block_size"])
        for start, stop in window.blocks:
            assert 1 <= stop - start <= args["block_size"]
            assert not ((bounds > start) & (bounds < stop)).any()


@settings(deadline=None, max_examples=100)
@given(parameters())
def test_lanes_are_of_equal_length(args):
    plan = EpochPlan(**args)
    filled = [0] * args["lanes"]
    for window in plan.windows():
        filled[window.lane] += window.n_rows
    n, lanes = plan.n_rows, args["lanes"]
    assert filled == [(n + lane) // lanes for lane in range(lanes)]


@settings(deadline=None, max_examples=100)
@given(parameters(), st.data())
def test_minibatches_made_together_are_those_made_alone(args, data):
    plan = EpochPlan(**args)
    at_once = data.draw(st.integers(1, 7))
    opened = ((w, w.rows()[plan.mix(w)]) for w in plan.windows())
    found = []
    for parts, course in walk(plan, 0, at_once, opened, lambda _: None):
        rows = np.concatenate([content[stretch] for content, stretch in parts])
        order = course.order()
        rows = rows if order is None else rows[order]
        found += [part.tolist() for part in np.split(rows, np.cumsum(course.sizes)[:-1])]
    assert found == [rows.tolist() for rows in plan.minibatches()]


@settings(deadline=None, max_examples=150)
@given(parameters(), words, st.sampled_from([1, 2, 3, 4, 8]))
def test_ranks_share_the_rows_of_every_step(args, epoch, world_size):
    args = {**args, "lanes": 8, "buffer_size": 8 * args["buffer_size"]}
    whole = [rows.tolist() for rows in EpochPlan(**args, epoch=epoch).minibatches()]

    def plan_of(rank: int) -> EpochPlan:
        return EpochPlan(**args, epoch=epoch, rank=rank, world_size=world_size)

    if world_size == 3:
        with pytest.raises(LoaderError, match="lanes cannot be shared evenly"):
            plan_of(0)
        return
    if min(map(len, whole)) < world_size:
        with pytest.raises(LoaderError, match="fewer rows than there are ranks"):
            plan_of(0)
        return
    ranks = [[rows.tolist() for rows in plan_of(rank).minibatches()] for rank in range(world_size)]
    for step, together in enumerate(zip(*ranks, strict=True)):
        assert sorted(sum(together, [])) == sorted(whole[step])  # noqa: RUF017
        assert max(map(len, together)) - min(map(len, together)) <= 8 // world_size
        assert min(map(len, together)) >= 1
    blocks = [{b for w in plan_of(rank).windows() for b in w.blocks} for rank in range(world_size)]
    assert sum(map(len, blocks)) == len(set().union(*blocks)), "a block is read by two ranks"


@settings(deadline=None, max_examples=60)
@given(parameters(), words)
def test_ranks_share_the_rows_of_every_step_also_where_the_last_is_dropped(args, epoch):
    n_rows = len(chosen(args["rows"]))
    size = min(n_rows, max(8, args["minibatch_size"]))
    args |= {"minibatch_size": size, "lanes": 8, "buffer_size": 8 * args["buffer_size"]}

    def steps_of(world_size: int) -> list[list[int]]:
        ranks = [
            EpochPlan(**args, epoch=epoch, drop_last=True, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        together = zip(*(plan.minibatches() for plan in ranks), strict=True)
        return [sorted(np.concatenate(parts).tolist()) for parts in together]

    whole = steps_of(1)
    assert [len(rows) for rows in whole] == [size] * (n_rows // size)
    for world_size in (2, 4, 8):
        if size >= world_size:
            assert steps_of(world_size) == whole


class Content:
    """Something that a weak reference can watch."""


@settings(deadline=None, max_examples=100)
@given(parameters())
def test_windows_that_have_ended_are_let_go(args):
    plan = EpochPlan(**args)
    alive: weakref.WeakSet[Content] = weakref.WeakSet()
    closed = []

    def opened():
        for window in plan.windows():
            content = Content()
            alive.add(content)
            yield window, content
            del content

    for contents, course in walk(plan, 0, 1, opened(), closed.append):
        contents.clear()
        going_on = {take.lane for take in course.takes if not take.last}
        idle = args["lanes"] - len({take.lane for take in course.takes})
        # One is still held by the generator above.
        assert len(alive) <= len(going_on) + idle + 1
    assert len(alive) == 0
    assert len(closed) == len(list(plan.windows()))


# --- seeds, epochs, golden orders ----------------------------------------------------------------


def order(**options) -> tuple[int, ...]:
    plan = EpochPlan((0, 40, 41, 100), 8, block_size=5, buffer_size=80, **options)
    return tuple(np.concatenate(list(plan.minibatches())).tolist())


def test_seeds_and_epochs_never_share_an_order():
    """Small pairs collide where seed and epoch are added or xored."""
    orders = {order(seed=seed, epoch=epoch) for seed in range(12) for epoch in range(12)}
    assert len(orders) == 144
    assert order(seed=1) == order(seed=1)


@settings(deadline=None, max_examples=100)
@given(parameters().filter(lambda args: len(chosen(args["rows"])) > 30), words, words, words)
def test_two_epochs_never_share_an_order(args, seed, one, other):
    assume(one != other)
    first, second = (
        np.concatenate([*EpochPlan(**args, seed=seed, epoch=epoch).minibatches()])
        for epoch in (one, other)
    )
    assert not np.array_equal(first, second)


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

    assert golden(0) == [[13, 12, 2, 5], [16, 4, 3, 1], [8, 17, 19, 18], [7, 6, 15, 14]]
    assert golden(1) == [[8, 7, 3, 16], [6, 14, 2, 17], [15, 5, 4, 1], [19, 18, 12, 13]]


def test_golden_order_at_default_settings():
    plan = EpochPlan((0, 30_000, 100_000), seed=2**40 + 3, epoch=5)
    assert (plan.block_size, plan.buffer_size) == (256, 16_384)
    rows = np.concatenate(list(plan.minibatches())).astype("<i8")
    assert hashlib.sha256(rows.tobytes()).hexdigest() == (
        "dd34c24c538050c7b1d6b3f052b60b392bc1dfc4215ba2c7a365c0b154d3212a"
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
        ({"rows": [(5, 5)]}, "found: a selection without a row, of a source of 100 rows"),
        ({"segments": (0, 50, 40)}, "segments of the source are out of order"),
        ({"rows": np.zeros(100, bool)}, "a selection without a row"),
        ({"rows": np.ones(99, bool)}, "mask of rows does not fit"),
        ({"rows": np.array([3, 2])}, "rising whole numbers from 0 to 99"),
        ({"rows": np.array([3, 100])}, "rising whole numbers from 0 to 99"),
        ({"rows": np.array([3.0])}, "in a way that is not known"),
        ({"rank": 2, "world_size": 2}, "rank is out of range"),
        ({"world_size": 3}, "lanes cannot be shared evenly"),
        ({"world_size": 16}, "lanes cannot be shared evenly"),
        ({"minibatch_size": 2, "world_size": 4}, "fewer rows than there are ranks"),
        ({"segments": (1, 50)}, "segments of the source are out of order"),
        ({"segments": ()}, "no rows to load"),
        ({"segments": (0,)}, "no rows to load"),
    ],
)
def test_bad_parameters_are_refused(options, message):
    with pytest.raises(LoaderError, match=message):
        EpochPlan(**{"segments": (0, 100), **options})
