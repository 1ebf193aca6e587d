"""Loops over cells or genes, on threads of our own."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")

_pool: ThreadPoolExecutor | None = None
_heavy: int | None = None


@contextmanager
def threads(torch_threads: int, heavy: int) -> Iterator[None]:
    """Give torch its number of threads, and the heavy parts of a step theirs, for a while.

    Threads that share small operations mostly wait for each other. A heavy part of a step is one
    piece of work for each thread, and may be worth another where torch's operations are not.
    """
    global _heavy
    before, heavy_before = torch.get_num_threads(), _heavy
    torch.set_num_threads(torch_threads)
    _heavy = heavy
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _heavy = heavy_before


def heavy_threads() -> int:
    """Threads of the heavy parts of a step: as many as torch has, unless said otherwise."""
    return torch.get_num_threads() if _heavy is None else _heavy


def in_parts(n: int, work: Callable[[int, int], None], step: int = 1) -> None:
    """Call ``work(begin, end)`` for parts that make up the range to ``n``, at the same time.

    On as many threads as torch has. ``work`` must release the GIL, and what it writes of an element
    may not depend on the part that the element is in: the number of threads then changes nothing.

    Parameters
    ----------
    n
        Elements.
    work
        Does those from ``begin`` to ``end``.
    step
        Parts begin at multiples of it.
    """
    at_once([partial(work, *part) for part in cut(n, torch.get_num_threads(), step)])


def cut(n: int, n_parts: int, step: int = 1) -> list[tuple[int, int]]:
    """Begin and end of parts of a range of equal size, at multiples of ``step``; one at least."""
    steps = -(-n // step)
    n_parts = max(1, min(n_parts, steps))
    return list(pairwise(min(n, steps * i // n_parts * step) for i in range(n_parts + 1)))


def at_once(tasks: Sequence[Callable[[], None]]) -> None:
    """Do tasks on a thread each, the first on this one; torch has a single thread in each."""
    first, *others = tasks
    if not others:
        first()
        return
    pool = _executor()
    futures = [pool.submit(task) for task in others]
    n_threads = torch.get_num_threads()
    if n_threads > 1:
        torch.set_num_threads(1)
    try:
        first()
    finally:
        if n_threads > 1:
            torch.set_num_threads(n_threads)
        for future in futures:
            future.result()


def as_they_come(items: Iterable[T], work: Callable[[T], None]) -> None:
    """Do work for each item, on as many threads as torch has, with one of torch's in each.

    So small operations of torch, which threads of its own mostly wait for each other in, run side
    by side. Items are taken on this thread, two for each thread ahead at the most.

    Parameters
    ----------
    items
        In any number.
    work
        May be called from any thread, in any order. The first error that it raises is raised here,
        when all that was begun has ended.
    """
    n_threads = torch.get_num_threads()
    if n_threads == 1:
        for item in items:
            work(item)
        return
    pool, begun, room = _executor(), deque[Future[None]](), threading.Semaphore(n_threads)

    def work_in_turn(item: T) -> None:
        with room:  # the pool may have more threads
            work(item)

    try:
        for item in items:
            while len(begun) >= 2 * n_threads:
                begun.popleft().result()
            begun.append(pool.submit(work_in_turn, item))
        while begun:
            begun.popleft().result()
    finally:
        wait(begun)


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        size = os.cpu_count() or 1
        begun = threading.Barrier(size + 1)

        def begin() -> None:
            torch.get_num_threads()  # A thread's first question sets its number to the default.
            torch.set_num_threads(1)
            begun.wait()

        # All at once, because what one of them asks of torch becomes the default of later threads.
        pool = ThreadPoolExecutor(size, thread_name_prefix="atlas-kernel")
        before = torch.get_num_threads()
        for _ in range(size):
            pool.submit(begin)
        begun.wait()
        torch.set_num_threads(before)
        _pool = pool
    return _pool


def _forget() -> None:
    """A forked process has none of the threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
