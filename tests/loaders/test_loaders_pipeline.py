"""Threads: errors reach the consumer, and however it leaves, the threads end."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_helpers import Recording, counts, loader_threads, source

from loaders import ArraySource, EpochPlan, LoaderError, MinibatchLoader, RowBlock, SequentialLoader
from loaders.minibatch import Minibatch
from loaders.pipeline import Handover
from loaders.reader import Ahead, Stopped, WindowReader
from loaders.shuffle import OpenWindow, empty_table, groups, lay_out
from loaders.stalls import Stalls
from loaders.windows import Course, walk
from loaders.workers import Workers

pytestmark = pytest.mark.timeout(60)

SMALL = {"block_size": 8, "buffer_size": 64, "lanes": 4}
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_threads_are_left():
    yield
    assert loader_threads() == []


def failing(n: int, error: Exception) -> Recording:
    def before(read: int, start: int) -> None:
        if read == n:
            raise error

    return Recording(counts(500), segments=(0, 200, 500), before=before)


def drain(loader: MinibatchLoader | SequentialLoader, into: list[list[int]]) -> None:
    for minibatch in loader:
        into.append(minibatch.rows.tolist())  # noqa: PERF401


@pytest.mark.parametrize("n", [1, 2, 9, 30, 60, 63])
def test_the_error_of_the_nth_read_is_raised_at_next(n):
    error = OSError(5, "disk on fire")
    data = failing(n, error)
    loader = MinibatchLoader(data, 20, **SMALL)
    plan = [rows.tolist() for rows in EpochPlan(data.segments, 20, **SMALL).minibatches()]
    found: list[list[int]] = []
    with pytest.raises(OSError, match="disk on fire") as caught:
        drain(loader, found)
    assert caught.value is error
    assert loader_threads() == []
    # What came before the error is right, is counted, and the rest comes once the fault is gone.
    assert found == plan[: len(found)]
    assert loader.step == len(found) < len(plan)
    assert [m.rows.tolist() for m in loader] == plan[len(found) :]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("n", [0, 17, 40, 62])
def test_the_error_comes_where_the_block_is_needed(n, threads):
    """Neither earlier, because it was read ahead, nor later."""
    plan = EpochPlan((0, 200, 500), 20, **SMALL)
    windows = list(plan.windows())
    broken, window = [(block[0], window) for window in windows for block in window.blocks][n]
    key = (window.lane, window.index)
    takes = [
        [(take.lane, take.index) for take in plan.course(s, s + 1).takes]
        for s in range(plan.n_steps)
    ]
    order = [(w.lane, w.index) for w in windows]
    expected = next(
        s for s, keys in enumerate(takes) if max(map(order.index, keys)) >= order.index(key)
    )

    def before(_: int, start: int) -> None:
        if start == broken:
            raise OSError("here")

    data = Recording(counts(500), segments=(0, 200, 500), before=before)
    loader = MinibatchLoader(data, 20, **SMALL, threads=threads)
    with pytest.raises(OSError, match="here"):
        drain(loader, [])
    assert loader.step == expected


def test_an_error_in_sequence():
    data = Recording(counts(5_000), before=lambda n, start: 1 / (2_000 - start))
    found: list[list[int]] = []
    with pytest.raises(ZeroDivisionError):
        drain(SequentialLoader(data, 100), found)
    assert sum(found, []) == list(range(2_000))  # noqa: RUF017


class Broken(ArraySource):
    def __init__(self, change) -> None:
        super().__init__(counts(50))
        self.change = change

    def read_rows(self, starts, stops) -> RowBlock:
        return self.change(super().read_rows(starts, stops))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: RowBlock(b.indptr, b.indices.astype(np.int64), b.data),
            "indices of another type",
        ),
        (
            lambda b: RowBlock(b.indptr, b.indices, b.data.astype(np.float64)),
            "data of another type",
        ),
        (
            lambda b: RowBlock(b.indptr.astype(np.int32), b.indices, b.data),
            "indptr of another type",
        ),
        (lambda b: RowBlock(b.indptr, np.repeat(b.indices, 2)[::2], b.data), "strides"),
        (lambda b: RowBlock(b.indptr[:-1], b.indices, b.data), "no CSR"),
        (lambda b: RowBlock(b.indptr + 1, b.indices, b.data), "no CSR"),
        (lambda b: RowBlock(b.indptr, b.indices[1:], b.data), "no CSR"),
        (lambda b: RowBlock(b.indptr, b.indices, b.data[1:]), "no CSR"),
        (
            lambda b: RowBlock(b.indptr[[0, -1, *range(2, len(b.indptr))]], b.indices, b.data),
            "no CSR",
        ),
        (lambda b: RowBlock(b.indptr, b.indices + 30, b.data), r"expected: 0 to 39"),
        (lambda b: RowBlock(b.indptr, b.indices - 1, b.data), r"found: column -1"),
    ],
)
def test_a_block_that_breaks_its_promise_is_refused(change, message):
    with pytest.raises(LoaderError, match=message):
        list(MinibatchLoader(Broken(change), 10))


# --- leaving -------------------------------------------------------------------------------------


def test_leaving_early_ends_the_threads():
    loader = MinibatchLoader(source(9_000, None), 5, **SMALL, memory=100_000)
    for _ in loader:
        assert loader_threads()
        break
    assert loader_threads() == []


def test_closing_and_forgetting_an_iterator_ends_the_threads():
    for end in ("close", "forget", "cycle"):
        # more rows than may wait, so that the threads cannot have ended by themselves
        iterator = iter(MinibatchLoader(source(9_000, None), 5, **SMALL, memory=100_000))
        next(iterator)
        assert loader_threads()
        if end == "close":
            iterator.close()
        if end == "cycle":
            cycle = [iterator]
            cycle.append(cycle)
            del cycle
        del iterator
        gc.collect()
        assert loader_threads() == [], end


def test_many_iterations_leave_nothing_behind():
    loader = MinibatchLoader(source(), 5, **SMALL)
    for _ in range(30):
        next(iter(loader))
    assert loader_threads() == []


def test_interrupt_in_the_body_of_the_loop():
    loader = MinibatchLoader(source(), 5, **SMALL)

    def train() -> None:
        for _ in loader:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert loader_threads() == []
    assert loader.step == 1


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_interrupt_while_waiting_for_a_minibatch():
    def before(n: int, _: int) -> None:
        if n == 20:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # So that the signal comes while the consumer waits.

    loader = MinibatchLoader(Recording(counts(500), before=before), 5, **SMALL, threads=1)
    with pytest.raises(KeyboardInterrupt):
        drain(loader, [])
    assert loader_threads() == []
    step = loader.step
    rest = list(loader)
    assert len(rest) == len(loader) - step


def test_nothing_is_taken_in_after_the_stop():
    made: Future[list[Minibatch]] = Future()
    handover = Handover(4)
    handover.wait_for_room()
    handover.put(made)
    handover.stop()
    with pytest.raises(Stopped):
        handover.wait_for_room()
    assert handover.get() == []


def test_a_group_that_is_given_up_while_it_is_waited_for_is_the_end():
    made: Future[list[Minibatch]] = Future()
    handover = Handover(4)
    handover.put(made)
    made.cancel()
    assert handover.get() == []


def run(script: str) -> subprocess.CompletedProcess[str]:
    prelude = (
        "import os, sys, threading\n"
        "sys.path.insert(0, 'tests/loaders')\n"
        "from loaders_helpers import *\n"
        "from loaders import *\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_the_interpreter_exits_with_an_iteration_under_way():
    done = run(
        "iterator = iter(MinibatchLoader(source(), 5, block_size=8, buffer_size=64))\n"
        "next(iterator)\n"
        "print('end')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_an_error_of_the_consumer_ends_the_interpreter():
    done = run(
        "for minibatch in MinibatchLoader(source(), 5, block_size=8, buffer_size=64):\n"
        "    raise SystemExit(3)\n"
    )
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_wait_for_threads_that_it_does_not_have():
    done = run(
        "loader = MinibatchLoader(source(), 5, block_size=8, buffer_size=64)\n"
        "iterator = iter(loader)\n"
        "next(iterator)\n"
        # At the moment of the fork another thread holds the lock, which the child never gets.
        "held, release = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with loader._pipeline._handover._changed:\n"
        "        held.set()\n"
        "        release.wait()\n"
        "threading.Thread(target=hold).start()\n"
        "held.wait()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        "        next(iterator)\n"
        "    except LoaderError as error:\n"
        "        print(error.what, flush=True)\n"
        "    print(len(list(loader)), flush=True)\n"
        "    os._exit(0)\n"
        "release.set()\n"
        "status = os.waitpid(pid, 0)[1]\n"
        "print(status, len(list(iterator)), flush=True)\n"
    )
    assert done.stdout.splitlines() == [
        "an iteration cannot go on in another process",
        "99",
        "0 99",
    ], done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_wait_for_a_thread_that_compiles():
    done = run(
        "import time\n"
        "from numba import njit\n"
        "from numba.core.compiler_lock import global_compiler_lock as lock\n"
        "held = threading.Event()\n"
        "def hold():\n"
        "    with lock:\n"
        "        held.set()\n"
        "        time.sleep(1)\n"
        "threading.Thread(target=hold).start()\n"
        "held.wait()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    print(njit(lambda x: x + 1)(1), flush=True)\n"
        "    print(len(list(MinibatchLoader(source(), 5))), flush=True)\n"
        "    os._exit(0)\n"
        "print(os.waitpid(pid, 0)[1], flush=True)\n"
    )
    assert done.stdout.splitlines() == ["2", "100", "0"], done.stderr


# --- bounds --------------------------------------------------------------------------------------


def test_a_slow_consumer_stops_the_reading():
    data = Recording(counts(5_000))
    loader = MinibatchLoader(data, 5, **SMALL, threads=1, memory=200_000)
    iterator = iter(loader)
    next(iterator)
    before = -1
    while before != data.rows_read:  # Until the producer waits for us.
        before = data.rows_read
        time.sleep(0.2)
    budget = loader.budget
    handed_or_waiting = (1 + budget.waiting + 1) * budget.at_once * 5
    assert data.rows_read <= handed_or_waiting + 2 * 64 + max(64 // 4, 2 * 8) + 16
    iterator.close()


def test_more_minibatches_of_small_rows_are_made_in_one_go():
    cells = counts(50_000), counts(5_000, 3_000)
    small, large = (MinibatchLoader(ArraySource(one), 128) for one in cells)
    assert large.budget.at_once == 2048 // 128
    assert 2 * large.budget.at_once < small.budget.at_once
    assert 128 * small.budget.at_once < small.plan.buffer_size
    one = MinibatchLoader(ArraySource(cells[0]), 128)
    one.budget = replace(one.budget, at_once=1)
    for minibatch, same in zip(small, one, strict=True):
        np.testing.assert_array_equal(minibatch.rows, same.rows)


def test_rows_are_read_ahead_within_the_budget():
    data = Recording(counts(500))
    plan = EpochPlan((0, 500), 10, **SMALL)
    windows = list(plan.windows())
    for opened in (1, 3, 6):
        data.reads.clear()
        workers = Workers(1, "test")
        with (
            closing(workers),
            WindowReader(
                data, plan, 0, None, workers, Ahead(40), lambda: False, Stalls()
            ) as reader,
        ):
            iterator = iter(reader)
            for _ in range(opened):
                window, content = next(iterator)
                assert sum(block.n_rows for block in content.blocks) == window.n_rows
        used = sum(window.n_rows for window in windows[:opened])
        assert used <= data.rows_read <= used + 40


def test_every_row_is_read_once():
    data = Recording(counts(500), segments=(0, 37, 38, 500))
    list(MinibatchLoader(data, 17, **SMALL))
    rows = [row for start, stop in data.reads for row in range(start, stop)]
    assert sorted(rows) == list(range(500))


def test_resuming_reads_the_windows_at_hand_only():
    data = Recording(counts(5_000))
    loader = MinibatchLoader(data, 20, **SMALL)
    loader.load_state_dict({**loader.state_dict(), "step": 200})
    data.reads.clear()
    rows = [m.rows for m in loader]
    assert sum(map(len, rows)) == 1_000
    assert data.rows_read <= 1_000 + 64


@settings(deadline=None)
@given(st.integers(0, 20_000), st.booleans(), st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_groups_of_minibatches_fit_in_bytes_and_make_the_same(most, narrow, sizes):
    n = sum(sizes)
    data = ArraySource(counts(n), narrow=narrow)
    order = np.random.default_rng(n).permutation(n)
    block, table = data.read_rows(0, n), empty_table(n)
    one = np.array([0])
    lay_out(table, one, one, np.array([n]), np.empty(0, np.int64), block)
    window = OpenWindow(table, order, [block])
    course = Course([], np.array(sizes)[:, None])
    parts = [(window, slice(0, n))]
    made = []
    for group in groups(parts, course, data.obs_codes, data.n_vars, narrow, most):
        minibatches = group.gather()
        assert len(minibatches) == 1 or sum(m.nbytes for m in minibatches) <= most
        made += minibatches
    assert [m.n_rows for m in made] == sizes
    assert np.concatenate([m.rows for m in made]).tolist() == order.tolist()
    for minibatch in made:
        assert (minibatch.to_scipy() != counts(n)[minibatch.rows]).nnz == 0


def test_a_loader_with_little_room_gives_the_same_minibatches():
    expected = [m.rows.tolist() for m in MinibatchLoader(source(), 5, **SMALL)]
    loader = MinibatchLoader(source(), 5, **SMALL)
    loader.budget = replace(loader.budget, group=1, waiting=1)
    assert [m.rows.tolist() for m in loader] == expected


def test_what_is_urgent_comes_between_two_pieces_of_longer_work():
    done, workers, over = [], Workers(1, "test"), threading.Event()

    def long():
        for piece in range(3):
            workers.hurry()
            done.append(piece)
            if piece == 1:
                urgent.append(workers.submit_urgent(lambda: done.append("urgent")))

    urgent = []
    workers.submit(long)
    workers.submit(lambda: done.append("later"))
    workers.submit(over.set)
    assert over.wait(10)
    workers.close()
    assert done == [0, 1, "urgent", 2, "later"]
    assert urgent[0].result(timeout=0) is None


def test_urgent_work_that_fails_says_so_and_what_is_left_is_cancelled():
    workers, go, begun = Workers(1, "test"), threading.Event(), threading.Event()

    def wait():
        begun.set()
        go.wait(10)

    def fail():
        raise LoaderError("it failed")

    failed = workers.submit_urgent(fail)
    with pytest.raises(LoaderError, match="it failed"):
        failed.result(timeout=10)
    workers.submit(wait)
    assert begun.wait(10)
    left = workers.submit_urgent(lambda: 0)
    closer = threading.Thread(target=workers.close, args=(True,))
    closer.start()
    with pytest.raises(CancelledError):
        left.result(timeout=10)
    go.set()
    closer.join()


def test_small_windows_are_read_together_and_minibatches_are_made_between_two():
    data = Recording(counts(500))
    plan = EpochPlan((0, 500), 10, **SMALL)
    made = []

    def before(read: int, start: int) -> None:
        made.append(read)
        if read == 1:
            workers.submit_urgent(lambda: made.append("urgent"))

    data.before, workers = before, Workers(1, "test")
    ahead = Ahead(80, task=2**20)
    with (
        closing(workers),
        WindowReader(data, plan, 0, None, workers, ahead, lambda: False, Stalls()) as reader,
    ):
        together, submit = [], workers.submit

        def note(work):
            if "_read_all" in repr(work):
                together.append(len(work.args[0]))
            submit(work)

        workers.submit = note
        windows = iter(reader)
        window, opened = next(windows)
        next(windows)
    assert together[0] > 2
    assert made.index("urgent") == len(window.blocks)
    np.testing.assert_array_equal(opened.table[:, 0], window.rows())


def test_reading_is_shared_by_the_threads_from_the_beginning():
    data = Recording(counts(500))
    plan = EpochPlan((0, 500), 10, **SMALL)
    workers, submitted = Workers(3, "test"), []
    submit = workers.submit
    workers.submit = lambda work: submitted.append(submit(work))
    ahead = Ahead(80, task=2**20)
    with (
        closing(workers),
        WindowReader(data, plan, 0, None, workers, ahead, lambda: False, Stalls()) as reader,
    ):
        next(iter(reader))
    assert len(submitted) >= 3


def test_the_first_minibatches_come_in_small_groups():
    data = ArraySource(counts(4_000))
    loader = MinibatchLoader(data, 10)
    assert loader.budget.at_once >= 100
    seen = []
    many = walk(loader.plan, 0, 100, ((w, w) for w in loader.plan.windows()), lambda _: None)
    for _, course in many:
        seen.append(len(course.sizes))
    assert seen[:5] == [12, 24, 48, 96, 100]
    assert sum(seen) == loader.steps_per_epoch
