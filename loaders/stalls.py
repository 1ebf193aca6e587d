"""Where a pipeline spends its time, and what it held at the most."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("reading", "wait_for_blocks", "gathering", "wait_for_room", "wait_for_minibatch")


class Stalls:
    """Seconds by stage, counted from several threads.

    ``reading`` and ``gathering`` are sums over the threads that do it; ``wait_for_blocks`` and
    ``wait_for_room`` are what the thread between them waits, ``wait_for_minibatch`` what the
    consumer waits: a high one means that the loader is the bottleneck, a high ``wait_for_room``
    that the consumer is.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.window_bytes = 0
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds of a stage."""
        with self._lock:
            self.seconds[stage] += seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count what the body takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def hold(self, nbytes: int) -> None:
        """Bytes of windows that are held now."""
        self.window_bytes = max(self.window_bytes, nbytes)
