"""Compiled loops over cells or genes, on as many threads as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

_pool: ThreadPoolExecutor | None = None


def in_parts(n: int, work: Callable[[int, int], None], step: int = 1) -> None:
    """Call ``work(begin, end)`` for parts that make up the range to ``n``, at the same time.

    ``work`` must release the GIL, and what it writes of an element may not depend on the part that
    the element is in: the number of threads then changes nothing.

    Parameters
    ----------
    n
        Elements.
    work
        Does those from ``begin`` to ``end``.
    step
        Parts begin at multiples of it.
    """
    steps = -(-n // step)
    threads = max(1, min(torch.get_num_threads(), steps))
    ends = [min(n, steps * (i + 1) // threads * step) for i in range(threads)]
    if threads == 1:
        work(0, n)
        return
    others = [_executor().submit(work, a, b) for a, b in pairwise(ends)]
    try:
        work(0, ends[0])
    finally:
        for other in others:
            other.result()


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="atlas-kernel")
    return _pool


def _forget() -> None:
    """A forked process has none of the threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
