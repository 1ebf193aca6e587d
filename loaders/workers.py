"""Threads that read ahead, and stop between two reads for what is wanted at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from numba.core.compiler_lock import global_compiler_lock

Result = TypeVar("Result")

if hasattr(os, "register_at_fork"):
    # A thread may be compiling, or loading what was compiled: in a fork nobody would release it.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


class Workers:
    """A few threads; what is urgent does not wait until all is read that was begun before it.

    Parameters
    ----------
    threads
        How many.
    name
        Of the threads, before their number.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._urgent: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, work: Callable[[], object]) -> None:
        """Have work done, after all that was submitted before."""
        self._pool.submit(work)

    def submit_urgent(self, work: Callable[[], Result]) -> Future[Result]:
        """Have work done by the thread that is free first, or that says :meth:`hurry` first."""
        future: Future[Result] = Future()
        self._urgent.append((future, work))
        self._pool.submit(self.hurry)
        return future

    def hurry(self) -> None:
        """Do what is urgent, if anything is: called between two pieces of longer work."""
        while self._urgent:
            try:
                future, work = self._urgent.popleft()
            except IndexError:  # another thread took it
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del future, work

    def close(self, leave: bool = False) -> None:
        """Wait until all is done; ``leave`` what has not begun."""
        if leave:
            while self._urgent:
                with suppress(IndexError):  # a thread took it
                    self._urgent.popleft()[0].cancel()
        self._pool.shutdown(cancel_futures=leave)
