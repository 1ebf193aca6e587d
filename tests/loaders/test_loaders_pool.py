"""Memory that is used again: only when nobody can see it, and never more than was reserved."""

from __future__ import annotations

import gc
import os
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders import ArraySource, MinibatchLoader
from loaders.pool import POOL, ROUNDING, Pool

LARGE = 2**20


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_comes_again_once_the_last_view_is_gone():
    pool = Pool()
    pool.reserve(8 * LARGE)
    array = pool.empty(LARGE, np.uint16)
    view, where = array[10:20].reshape(2, 5).T, address(array)
    del array
    assert address(pool.empty(LARGE, np.uint16)) != where
    view[:] = 7
    del view
    again = pool.empty(LARGE // 2, np.float32)  # another type, the same bytes
    assert address(again) == where
    assert again.dtype == np.float32
    assert again.shape == (LARGE // 2,)
    assert again.flags.writeable


def test_a_tensor_keeps_the_memory_of_its_array():
    torch = pytest.importorskip("torch")
    pool = Pool()
    pool.reserve(4 * LARGE)
    tensor = torch.from_numpy(pool.empty(LARGE, np.float32))
    tensor.fill_(3)
    pool.empty(LARGE, np.float32).fill(4)
    assert (tensor == 3).all()


def test_nothing_is_kept_where_nothing_is_reserved():
    pool = Pool()
    array = pool.empty(LARGE, np.uint8)
    assert array.base is None
    pool.reserve(4 * LARGE)
    kept = pool.empty(LARGE, np.uint8)
    del kept
    assert pool.idle_bytes == LARGE
    pool.release(4 * LARGE)
    assert pool.idle_bytes == 0


def test_small_arrays_are_left_to_malloc():
    pool = Pool()
    pool.reserve(LARGE)
    assert pool.empty(100, np.int64).base is None
    assert pool.empty(0, np.int64).shape == (0,)


@pytest.mark.parametrize("nbytes", [2**21 - 1, 2**21, 2**21 + 1, 7 * 10**6])
def test_large_memory_begins_at_a_huge_page_and_can_be_written_to_its_end(nbytes):
    pool = Pool()
    pool.reserve(2**26)
    arrays = [pool.empty(nbytes, np.uint8) for _ in range(3)]
    for i, array in enumerate(arrays):
        array[:] = i
    assert [(array == i).all() for i, array in enumerate(arrays)] == [True] * 3
    if nbytes >= 2**21 and sys.platform == "linux":
        assert all(array.ctypes.data % 2**21 == 0 for array in arrays)


@given(st.lists(st.tuples(st.integers(2**16, 2**20), st.booleans()), max_size=60))
def test_idle_memory_and_arrays_stay_within_what_is_reserved(asked):
    reserved = 3 * LARGE
    pool = Pool()
    pool.reserve(reserved)
    held: list[np.ndarray] = []
    for size, drop in asked:
        if drop and held:
            held.pop(0)
        array = pool.empty(size, np.uint8)
        assert len(array) == size
        held.append(array)
        del array
        in_arrays = sum(len(a) for a in held)
        assert pool.idle_bytes <= max(0, reserved - in_arrays)
    before = sum(len(a) for a in held)
    held.clear()
    assert min(before, reserved) - 2 * LARGE < pool.idle_bytes <= reserved
    if 0 < before < reserved / (1 + ROUNDING):
        assert pool.idle_bytes >= before


def test_threads_never_share_memory():
    pool = Pool()
    pool.reserve(16 * LARGE)
    wrong = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        held: list[np.ndarray] = []
        for _ in range(300):
            array = pool.empty(int(rng.integers(2**14, 2**15)), np.int64)
            array[:] = number
            held.append(array)
            if len(held) > 4:
                wrong.extend((held.pop(int(rng.integers(5))) != number).nonzero()[0].tolist())

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_can_ask_for_memory_while_another_thread_held_the_lock():
    taken, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with POOL._lock:
            taken.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(30)
    child = os.fork()
    if child == 0:
        POOL.reserve(LARGE)
        POOL.empty(LARGE, np.uint8).fill(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    leave.set()
    thread.join()


def test_a_loader_keeps_memory_between_epochs_and_gives_it_back_at_its_end():
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (2_000, 300))
    gc.collect()
    before = POOL.idle_bytes
    loader = MinibatchLoader(ArraySource(counts), 500)
    for _ in range(2):
        for minibatch in loader:
            assert minibatch.n_rows
    del minibatch
    gc.collect()
    assert before < POOL.idle_bytes <= before + loader.budget.total
    del loader
    gc.collect()
    assert POOL.idle_bytes == before
