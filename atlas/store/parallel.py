"""Work on many small items with threads, in order and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from atlas.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")


def resolve_threads(threads: int | None) -> int:
    """As many as the process may use cores, where no number is given."""
    if threads is None:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    if threads < 1:
        raise ConfigError("threads is out of range", found=threads, expected="at least 1")
    return threads


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[tuple[Item, Result]]:
    """Apply a function to items in threads; yields each item with its result, in order.

    No more than two items a thread are taken before their results are. Items are drawn by the
    calling thread. An error, an interrupt, or leaving the loop early drops what has not begun.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="atlas")
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) >= 2 * threads:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
