"""Minibatches have the rows of the plan, and positions are saved, restored or refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_helpers import counts, source

from loaders import ArraySource, EpochPlan, LoaderError, Minibatch, MinibatchLoader, RowSource

SMALL = {"block_size": 8, "buffer_size": 128, "lanes": 4}


def same(a: Minibatch, b: Minibatch) -> bool:
    return (
        all(
            np.array_equal(getattr(a, name), getattr(b, name))
            for name in ("indptr", "indices", "data", "rows")
        )
        and a.obs.keys() == b.obs.keys()
        and all(np.array_equal(a.obs[name], b.obs[name]) for name in a.obs)
        and a.n_vars == b.n_vars
    )


def check(minibatch: Minibatch, rows: np.ndarray) -> None:
    """Against scipy's own row indexing and the formulas of the helper's codes."""
    assert np.array_equal(minibatch.rows, rows)
    assert minibatch.n_rows == len(rows)
    found, expected = minibatch.to_scipy(), counts(500)[rows]
    assert found.shape == expected.shape
    assert np.array_equal(found.toarray(), expected.toarray())
    assert found.nnz == expected.nnz
    assert np.array_equal(minibatch.obs["batch"], rows * 7 % 11)
    assert np.array_equal(minibatch.obs["label"], rows % 5 - 1)


@settings(deadline=None, max_examples=50)
@given(
    m=st.integers(1, 200),
    block_size=st.integers(1, 100),
    windows=st.integers(1, 4),
    lanes=st.integers(1, 9),
    threads=st.integers(1, 4),
    drop_last=st.booleans(),
)
def test_minibatches_are_the_rows_of_the_plan(m, block_size, windows, lanes, threads, drop_last):
    options = {
        "rows": [(3, 100), (100, 101), (230, 480)],
        "block_size": block_size,
        "buffer_size": windows * block_size * lanes,
        "lanes": lanes,
        "drop_last": drop_last,
    }
    data = source()
    loader = MinibatchLoader(data, m, 11, **options, threads=threads)
    for epoch in range(2):
        plan = list(EpochPlan(data.segments, m, 11, epoch, **options).minibatches())
        assert loader.steps_per_epoch == len(loader) == len(plan)
        for minibatch, rows in zip(loader, plan, strict=True):
            check(minibatch, rows)
    assert (loader.epoch, loader.step) == (2, 0)
    assert loader.n_rows == 348


def test_types():
    minibatch = next(iter(MinibatchLoader(source(), 50)))
    assert isinstance(source(), RowSource)
    assert minibatch.indptr.dtype == np.int64
    assert minibatch.indices.dtype == np.int32
    assert minibatch.data.dtype == np.float32
    assert minibatch.rows.dtype == np.int64
    assert {codes.dtype for codes in minibatch.obs.values()} == {np.dtype(np.int32)}
    assert minibatch.to_scipy().dtype == np.float32
    assert minibatch.nbytes == 51 * 8 + minibatch.to_scipy().nnz * 8 + 50 * 8 + 2 * 50 * 4


def test_width_is_that_of_the_source():
    """No value lies in the last three columns."""
    for minibatch in MinibatchLoader(source(), 7):
        assert minibatch.n_vars == 40
        assert minibatch.to_scipy().shape[1] == 40


def test_a_source_of_empty_rows():
    loader = MinibatchLoader(ArraySource(np.zeros((9, 3), np.float32)), 4)
    minibatches = list(loader)
    assert [m.n_rows for m in minibatches] == [4, 3, 2]
    assert all(m.to_scipy().nnz == 0 and m.obs == {} for m in minibatches)


def test_segments_of_one_row():
    data = source(6, (0, 1, 2, 3, 4, 5, 6))
    rows = np.concatenate([m.rows for m in MinibatchLoader(data, 4)])
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4, 5]


def test_what_was_handed_out_never_changes():
    loader = MinibatchLoader(source(), 16, **SMALL)
    kept = [m for _ in range(3) for m in loader]
    copies = [
        [m.rows.copy(), m.to_scipy().toarray()] for m in MinibatchLoader(source(), 16, **SMALL)
    ]
    for minibatch, (rows, dense) in zip(kept, copies, strict=False):
        assert np.array_equal(minibatch.rows, rows)
        assert np.array_equal(minibatch.to_scipy().toarray(), dense)
    buffers = {a.ctypes.data for m in kept for a in (m.indptr, m.rows)}
    assert len(buffers) == 2 * len(kept)


def test_changing_a_minibatch_changes_nothing_else():
    data = source()
    for minibatch in MinibatchLoader(data, 16, **SMALL):
        check(minibatch, minibatch.rows.copy())
        minibatch.to_scipy().data[:] = 1e9
        check(minibatch, minibatch.rows.copy())
        minibatch.data[:] = -1
        minibatch.rows[:] = -1
        minibatch.obs["batch"][:] = -1
    assert np.array_equal(data.read_rows(0, 37).data, counts(500)[:37].data)


def test_number_of_threads_changes_nothing():
    one, four = (list(MinibatchLoader(source(), 16, **SMALL, threads=n)) for n in (1, 4))
    assert all(same(a, b) for a, b in zip(one, four, strict=True))


# --- positions -----------------------------------------------------------------------------------


def test_resuming_at_every_step_gives_the_same_minibatches():
    loader = MinibatchLoader(source(), 23, seed=4, **SMALL)
    states, minibatches = [loader.state_dict()], []
    for _ in range(2):
        for minibatch in loader:
            minibatches.append(minibatch)
            states.append(loader.state_dict())
    assert len(minibatches) == 2 * 22
    for step, state in enumerate(states):
        other = MinibatchLoader(source(), 23, seed=4, **SMALL, threads=1)
        other.load_state_dict(json.loads(json.dumps(state)))
        assert (other.epoch, other.step) == (state["epoch"], state["step"])
        following = list(other)
        if other.epoch < 2:
            following += list(other)
        assert all(map(same, following, minibatches[step:]))
        assert len(following) >= len(minibatches[step:])


def test_a_state_is_json_also_where_parameters_are_numpy_numbers():
    one = np.int64(1)
    loader = MinibatchLoader(
        source(), 8 * one, 3 * one, block_size=8 * one, buffer_size=64 * one, lanes=4 * one
    )
    state = json.loads(json.dumps(loader.state_dict()))
    MinibatchLoader(source(), 8, 3, block_size=8, buffer_size=64, lanes=4).load_state_dict(state)


def test_step_counts_what_was_handed_out_not_what_was_prepared():
    loader = MinibatchLoader(source(), 10, **SMALL)
    iterator = iter(loader)
    assert loader.step == 0
    for expected in (1, 2, 3):
        next(iterator)
        assert loader.step == loader.state_dict()["step"] == expected


def test_leaving_early_and_going_on_gives_the_rest_of_the_epoch():
    whole = [m.rows.tolist() for m in MinibatchLoader(source(), 30, **SMALL)]
    loader = MinibatchLoader(source(), 30, **SMALL)
    found = []
    for minibatch in loader:
        found.append(minibatch.rows.tolist())
        if len(found) == 5:
            break
    assert (loader.epoch, loader.step) == (0, 5)
    found += [m.rows.tolist() for m in loader]
    assert found == whole
    assert (loader.epoch, loader.step) == (1, 0)


def test_left_at_the_last_minibatch_the_rest_of_the_epoch_is_empty():
    loader = MinibatchLoader(source(), 30, **SMALL)
    for _ in loader:
        if loader.step == len(loader):
            break
    assert (loader.epoch, loader.step) == (0, len(loader))
    assert list(loader) == []
    assert (loader.epoch, loader.step) == (1, 0)


def test_a_state_is_restored_at_any_time():
    loader = MinibatchLoader(source(), 30, **SMALL)
    start = loader.state_dict()
    first = [m.rows.tolist() for m in loader]
    second = [m.rows.tolist() for m in loader]
    assert first != second
    loader.load_state_dict(start)
    assert [m.rows.tolist() for m in loader] == first


def test_a_newer_iteration_ends_an_older_one():
    loader = MinibatchLoader(source(), 30, **SMALL)
    older = iter(loader)
    next(older)
    newer = iter(loader)
    next(newer)
    with pytest.raises(LoaderError, match="ended by a newer one"):
        next(older)
    next(newer)
    assert loader.step == 3


def test_restoring_ends_the_iteration_under_way():
    loader = MinibatchLoader(source(), 30, **SMALL)
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(LoaderError, match="or by a restored state"):
        next(iterator)
    assert loader.step == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("minibatch_size", {"minibatch_size": 31}),
        ("seed", {"seed": 1}),
        ("rows", {"rows": [(0, 499)]}),
        ("rows", {"rows": [(0, 250), (300, 500)]}),
        ("block_size", {"block_size": 9}),
        ("buffer_size", {"buffer_size": 256}),
        ("lanes", {"lanes": 5}),
        ("drop_last", {"drop_last": True}),
    ],
)
def test_a_state_of_other_settings_is_refused_with_both_sides(name, options):
    base = {"minibatch_size": 30, **SMALL}
    state = MinibatchLoader(source(), **base).state_dict()
    loader = MinibatchLoader(source(), **{**base, **options})
    own = loader.state_dict()["fingerprint"]
    with pytest.raises(LoaderError, match="another source or other settings") as caught:
        loader.load_state_dict(state)
    assert f"{name}={state['fingerprint'][name]!r}" in str(caught.value.found)
    assert f"{name}={own[name]!r}" in str(caught.value.expected)


def test_a_state_of_another_source_is_refused():
    """Other counts, other codes, other segments: also where the number of rows is the same."""
    state = MinibatchLoader(source(), 30).state_dict()
    others = [
        source(seed=1),
        source(segments=(0, 37, 38, 261, 500)),
        ArraySource(counts(500), {"batch": np.zeros(500)}, source().segments),
    ]
    for other in others:
        with pytest.raises(LoaderError, match=r"found: source='.*\n  expected: source='"):
            MinibatchLoader(other, 30).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": 1},
            "another version of the loader\n  found: version 1\n  expected: version 3",
        ),
        ({"step": 18}, "found: step 18\n  expected: 0 to 17"),
        ({"step": -1}, "found: step -1"),
        ({"step": 1.5}, "no valid position"),
        ({"epoch": -1}, "no valid position"),
        ({"fingerprint": "x"}, "no state of a loader"),
        (
            {"more": 1},
            "no state of a loader\n  found: fields version, epoch, step, fingerprint, more",
        ),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    loader = MinibatchLoader(source(), 30)
    assert len(loader) == 17
    with pytest.raises(LoaderError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})
    assert (loader.epoch, loader.step) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is out of range"),
        ({"minibatch_size": 0}, "minibatch_size is out of range"),
        ({"rows": [(0, 501)]}, "within 0 and 500"),
        ({"rows": []}, "no rows to load"),
        ({"block_size": 100, "buffer_size": 100}, "too small for one block per lane"),
        ({"minibatch_size": 501, "drop_last": True}, "no minibatch in an epoch"),
    ],
)
def test_bad_parameters_are_refused_at_construction(options, message):
    with pytest.raises(LoaderError, match=message):
        MinibatchLoader(source(), **options)


def test_a_source_that_contradicts_itself_is_refused():
    with pytest.raises(LoaderError, match=r"do not end at its last row\n  found: \(0, 499\)"):
        MinibatchLoader(source(segments=(0, 499)))
    short = ArraySource(counts(500), {"batch": np.zeros(499)})
    with pytest.raises(LoaderError, match=r"codes 'batch'.*\n  found: int32 \(499,\)"):
        MinibatchLoader(short)
