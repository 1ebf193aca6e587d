"""Work on threads of our own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from atlas.models.threads import as_they_come, threads


@pytest.mark.timeout(60)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_each_item_is_done_once_with_one_thread_of_torch_in_each(n_threads: int) -> None:
    done, of_torch, names = [], [], set()

    def work(item: int) -> None:
        time.sleep(0.002)
        done.append(item)
        of_torch.append(torch.get_num_threads())
        names.add(threading.current_thread().name)

    with threads(n_threads, n_threads):
        as_they_come(iter(range(50)), work)
        assert torch.get_num_threads() == n_threads
    assert sorted(done) == list(range(50))
    assert set(of_torch) == {1}
    assert (threading.current_thread().name in names) == (n_threads == 1)


@pytest.mark.timeout(60)
def test_no_more_items_are_made_than_two_for_each_thread() -> None:
    lock, waiting, most = threading.Lock(), 0, 0

    def items() -> Iterator[int]:
        nonlocal waiting, most
        for i in range(40):
            with lock:
                waiting += 1
                most = max(most, waiting)
            yield i

    def work(item: int) -> None:
        nonlocal waiting
        time.sleep(0.002)
        with lock:
            waiting -= 1

    with threads(2, 2):
        as_they_come(items(), work)
    assert waiting == 0
    assert most <= 5  # two for each thread, and the next


@pytest.mark.timeout(60)
def test_the_first_error_is_raised_when_all_that_was_begun_has_ended() -> None:
    ended, begun = [], []

    def work(item: int) -> None:
        begun.append(item)
        if item == 4:
            raise ValueError("the fifth")
        time.sleep(0.02)
        ended.append(item)

    with threads(2, 2), pytest.raises(ValueError, match="the fifth"):
        as_they_come(iter(range(1000)), work)
    assert len(begun) < 10
    assert sorted([*ended, 4]) == sorted(begun)
