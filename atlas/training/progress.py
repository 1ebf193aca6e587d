"""What a user sees of a training while it runs: one line, and Ctrl-C that loses nothing."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from tqdm import tqdm


class ProgressLine:
    """Epoch, step, loss, cells/s and the time that remains, on one line of stderr.

    Parameters
    ----------
    max_epochs
        Epochs of the training.
    epoch_cells
        Training cells of one epoch.
    done_cells
        Training cells seen before a resume.
    show
        Whether to print anything.
    """

    def __init__(self, max_epochs: int, epoch_cells: int, done_cells: int, *, show: bool) -> None:
        self._max_epochs = max_epochs
        self._bar: tqdm[Any] = tqdm(
            total=max_epochs * epoch_cells,
            initial=done_cells,
            disable=not show,
            file=sys.stderr,
            unit=" cells",
            unit_scale=True,
            dynamic_ncols=True,
            bar_format="{desc} · {rate_fmt} · ETA {remaining} |{bar:20}| {percentage:.0f} %",
            # A log file gets a line now and then, a terminal a moving one.
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, cells: int) -> None:
        """Count the cells of one step."""
        self._bar.update(cells)

    def describe(self, epoch: int, step: int, loss: float) -> None:
        """Set what the line says from its next refresh on."""
        text = f"epoch {epoch}/{self._max_epochs} · step {step} · loss {loss:.2f}"
        self._bar.set_description_str(text, refresh=False)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C of the body into a request; a second one interrupts at once.

    Yields
    ------
    Callable
        Whether Ctrl-C was pressed. Always False outside the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    requested = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def request(_signal: int, _frame: FrameType | None) -> None:
        requested.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, request)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGINT, before)
