"""One background pipeline: windows are read, rows gathered, minibatches handed over.

A producer thread walks the plan; others read and gather for it. None of them holds a
reference to the :class:`Pipeline`, so that one that is forgotten is collected, and stops its
threads then; so does one that still exists when the interpreter exits.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from loaders.errors import LoaderError
from loaders.minibatch import Minibatch
from loaders.reader import Ahead, Stopped, WindowReader
from loaders.resident import Resident, ResidentWindows
from loaders.shuffle import Group, groups
from loaders.source import RowBlock, RowSource
from loaders.stalls import Stalls
from loaders.windows import Plan, walk
from loaders.workers import Workers

_THREAD_NAME: Final = "loaders-produce"


class Handover:
    """A bounded queue from one producer to one consumer, which either side can end.

    Parameters
    ----------
    waiting
        Groups of minibatches, made or being made, that may wait to be taken.
    """

    def __init__(self, waiting: int) -> None:
        self._most = waiting
        # Reentrant, because a collection inside these methods may stop another pipeline, or this.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[Future[list[Minibatch | LoaderError]]] = deque()
        self._finished = False
        self._error: BaseException | None = None
        self._stopped = False

    def wait_for_room(self) -> None:
        """Wait until another group may be added; :class:`Stopped` once the consumer has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self._most)
            if self._stopped:
                raise Stopped

    def put(self, minibatches: Future[list[Minibatch | LoaderError]]) -> None:
        """Add a group that is being made."""
        with self._changed:
            self._waiting.append(minibatches)
            self._changed.notify_all()

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing will follow, because all is done or because of an error."""
        with self._changed:
            self._finished = True
            self._error = error
            self._changed.notify_all()

    def get(self) -> list[Minibatch | LoaderError]:
        """Wait for the next minibatches; none at the end. Raises the error of the producer."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting or self._finished)
            if self._stopped:
                return []
            if not self._waiting:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return []
            minibatches = self._waiting.popleft()
            self._changed.notify_all()
        try:
            return minibatches.result()
        except CancelledError:  # stopped while it waited
            return []

    def stop(self) -> None:
        """Nothing more is wanted."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()

    def stopped(self) -> bool:
        """Whether nothing more is wanted."""
        return self._stopped


@dataclass(frozen=True, slots=True)
class Work:
    """What a pipeline does.

    Attributes
    ----------
    source
        Where the rows are.
    obs_codes
        Codes to hand out with them.
    plan
        Which rows, in which order.
    step
        First minibatch.
    threads
        Number of threads that read and gather.
    ahead
        How far reading may run ahead.
    held
        The rows of :attr:`Plan.held`.
    resident
        All rows that the plan takes, where they are in memory.
    narrow
        Whether minibatches are narrow.
    at_once
        Minibatches that are made in one go.
    group
        Bytes that they are handed over in.
    waiting
        Such groups that may wait to be taken.
    """

    source: RowSource
    obs_codes: Mapping[str, npt.NDArray[np.int32]]
    plan: Plan
    step: int
    threads: int
    ahead: Ahead
    held: RowBlock | None = None
    resident: Resident | None = None
    narrow: bool = False
    at_once: int = 1
    group: int = 2**62
    waiting: int = 16


class Pipeline:
    """An iterator over minibatches that are made in the background."""

    def __init__(self, work: Work) -> None:
        self.stalls = Stalls()
        self._handover = Handover(work.waiting)
        self._ready: deque[Minibatch | LoaderError] = deque()
        self._process = os.getpid()
        producer = threading.Thread(
            target=_produce,
            args=(work, self._handover, self.stalls),
            name=_THREAD_NAME,
            daemon=True,
        )
        # Also called on collection and, before daemon threads are cut off, at exit.
        self.close = weakref.finalize(self, _close, self._handover, producer, self._process)
        producer.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Minibatch:
        if os.getpid() != self._process:
            raise LoaderError(
                "an iteration cannot go on in another process",
                found=f"process {os.getpid()}, forked from {self._process}",
                expected="the process in which the iteration began",
                do="begin a new iteration in this process",
            )
        if not self.close.alive:
            self._ready.clear()
        if not self._ready:
            with self.stalls.timed("wait_for_minibatch"):
                self._ready.extend(self._handover.get())
            if not self._ready:
                raise StopIteration
        minibatch = self._ready.popleft()
        if isinstance(minibatch, LoaderError):
            raise minibatch
        return minibatch


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(source: RowSource) -> int:
    """As many as cores, or as the source's ``reading_threads`` where it waits for a network."""
    wanted: int | None = getattr(source, "reading_threads", None)
    return max(cores(), wanted or 1)


def _produce(work: Work, handover: Handover, stalls: Stalls) -> None:
    """Make minibatches until all are made, the consumer stops, or something fails."""
    workers = Workers(work.threads, "loaders-work")
    try:
        _walk(work, handover, stalls, workers)
    except Stopped:
        handover.finish()
    except BaseException as error:
        handover.finish(error)
    else:
        handover.finish()
    finally:
        # What was made before an error still comes.
        workers.close(leave=handover.stopped())


def _walk(work: Work, handover: Handover, stalls: Stalls, workers: Workers) -> None:
    plan, n_vars = work.plan, work.source.n_vars
    with _reader(work, handover, stalls, workers) as reader:
        for parts, course in walk(plan, work.step, work.at_once, iter(reader), reader.close):
            for group in groups(parts, course, work.obs_codes, n_vars, work.narrow, work.group):
                with stalls.timed("wait_for_room"):
                    handover.wait_for_room()
                task = workers.submit_urgent(functools.partial(_gather, group, stalls))
                reader.used_by(task)
                handover.put(task)
                del group, task
            parts.clear()  # Frees windows that have ended before the wait.


def _reader(
    work: Work, handover: Handover, stalls: Stalls, workers: Workers
) -> AbstractContextManager[WindowReader | ResidentWindows]:
    if work.resident is not None:
        return nullcontext(ResidentWindows(work.plan, work.step, work.resident))
    return WindowReader(
        work.source,
        work.plan,
        work.step,
        work.held,
        workers,
        work.ahead,
        handover.stopped,
        stalls,
    )


def _gather(group: Group, stalls: Stalls) -> list[Minibatch | LoaderError]:
    with stalls.timed("gathering"):
        return group.gather()


def _close(handover: Handover, producer: threading.Thread, process: int) -> None:
    """Stop, and wait for the threads to end."""
    if os.getpid() != process:
        return  # A fork has none of the threads, and perhaps a lock that nobody will release.
    handover.stop()
    # A collection can run in any thread; those of a pipeline must not wait for themselves.
    if not threading.current_thread().name.startswith("loaders-"):
        producer.join()
