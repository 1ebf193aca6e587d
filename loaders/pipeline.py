"""One background pipeline: windows are read, rows gathered, minibatches handed over.

A producer thread walks the plan. It never holds a reference to the :class:`Pipeline`, so that one
that is forgotten is collected, and stops its threads then; so does one that still exists when the
interpreter exits.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from loaders.errors import LoaderError
from loaders.minibatch import Minibatch
from loaders.reader import Stopped, WindowReader
from loaders.shuffle import gather, open_window
from loaders.source import RowSource
from loaders.windows import Plan, walk

# Minibatches that wait to be taken: at most so many, and (beyond one) at most so many bytes.
MAX_WAITING: Final = 16
MAX_WAITING_BYTES: Final = 64 * 2**20

_THREAD_NAME: Final = "loaders-produce"


class Handover:
    """A bounded queue from one producer to one consumer, which either side can end."""

    def __init__(self) -> None:
        # Reentrant, because a collection inside these methods may stop another pipeline, or this.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[Minibatch] = deque()
        self._bytes = 0
        self._finished = False
        self._error: BaseException | None = None
        self._stopped = False

    def put(self, minibatch: Minibatch) -> None:
        """Wait for room, then add; raises :class:`Stopped` once the consumer has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room(minibatch.nbytes))
            if self._stopped:
                raise Stopped
            self._waiting.append(minibatch)
            self._bytes += minibatch.nbytes
            self._changed.notify_all()

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing will follow, because all is done or because of an error."""
        with self._changed:
            self._finished = True
            self._error = error
            self._changed.notify_all()

    def get(self) -> Minibatch | None:
        """Wait for the next minibatch; ``None`` at the end. Raises the error of the producer."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting or self._finished)
            if self._stopped:
                return None
            if self._waiting:
                minibatch = self._waiting.popleft()
                self._bytes -= minibatch.nbytes
                self._changed.notify_all()
                return minibatch
            error, self._error = self._error, None
        if error is not None:
            raise error
        return None

    def stop(self) -> None:
        """Nothing more is wanted."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()

    def stopped(self) -> bool:
        """Whether nothing more is wanted."""
        return self._stopped

    def _has_room(self, nbytes: int) -> bool:
        if not self._waiting:
            return True
        return len(self._waiting) < MAX_WAITING and self._bytes + nbytes <= MAX_WAITING_BYTES


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
        Number of reading threads.
    ahead
        Rows that may be read before their window is needed.
    """

    source: RowSource
    obs_codes: Mapping[str, npt.NDArray[np.int32]]
    plan: Plan
    step: int
    threads: int
    ahead: int


class Pipeline:
    """An iterator over minibatches that are made in the background."""

    def __init__(self, work: Work) -> None:
        self._handover = Handover()
        self._process = os.getpid()
        producer = threading.Thread(
            target=_produce, args=(work, self._handover), name=_THREAD_NAME, daemon=True
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
        minibatch = self._handover.get()
        if minibatch is None:
            raise StopIteration
        return minibatch


def _produce(work: Work, handover: Handover) -> None:
    """Make minibatches until all are made, the consumer stops, or something fails."""
    try:
        windows = work.plan.windows(work.step)
        with WindowReader(
            work.source, windows, work.threads, work.ahead, handover.stopped
        ) as reader:
            opened = (
                (window, open_window(window, blocks, work.plan.mix(window)))
                for window, blocks in reader
            )
            n_vars = work.source.n_vars
            for parts in walk(work.plan, work.step, opened):
                minibatch = gather(parts, work.obs_codes, n_vars)
                parts.clear()  # Frees windows that have ended before the wait.
                handover.put(minibatch)
    except Stopped:
        handover.finish()
    except BaseException as error:
        handover.finish(error)
    else:
        handover.finish()


def _close(handover: Handover, producer: threading.Thread, process: int) -> None:
    """Stop, and wait for the threads to end."""
    if os.getpid() != process:
        return  # A fork has none of the threads, and perhaps a lock that nobody will release.
    handover.stop()
    # A collection can run in any thread; those of a pipeline must not wait for themselves.
    if not threading.current_thread().name.startswith("loaders-"):
        producer.join()
