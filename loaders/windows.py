"""The terms in which an order of minibatches is told, and the walk that follows it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import numpy as np

from loaders.selection import Ints, Range, rows_of

Content = TypeVar("Content")

_SOONER: Final = 8
"""By this the minibatches that are asked for first are fewer, so that they come sooner."""


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks that are read together and whose rows are mixed with each other.

    Attributes
    ----------
    lane, index
        The lane, and the position of the window in it.
    blocks
        Row ranges of the source, in the order in which their rows are concatenated. Ranges from
        ``n_obs`` on are those of :attr:`Plan.held`.
    takes
        How many rows minibatches take from each block.
    """

    lane: int
    index: int
    blocks: tuple[Range, ...]
    takes: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """Rows that minibatches take."""
        return sum(self.takes)

    def rows(self) -> Ints:
        """All rows of the blocks, block after block, taken or not: int64."""
        ranges = np.array(self.blocks)
        return rows_of(ranges[:, 0], ranges[:, 1])


@dataclass(frozen=True, slots=True)
class Take:
    """A stretch of a mixed window that goes into minibatches.

    Attributes
    ----------
    lane, index
        The window.
    start, stop
        Positions in its mixed rows.
    last
        Whether nothing is taken from the window later.
    """

    lane: int
    index: int
    start: int
    stop: int
    last: bool


@dataclass(frozen=True, slots=True)
class Course:
    """What some minibatches in a row take.

    Attributes
    ----------
    takes
        Stretches of windows; their rows follow each other in this order.
    counts
        How many rows each minibatch takes from each lane: int64, (n_minibatches, n_lanes). The
        takes are lane after lane.
    """

    takes: list[Take]
    counts: Ints

    @property
    def sizes(self) -> Ints:
        """Rows of each minibatch: int64, (n_minibatches,)."""
        sizes: Ints = self.counts.sum(axis=1)
        return sizes

    def order(self) -> Ints | None:
        """Positions in the rows of the takes, minibatch after minibatch; None if they come so."""
        if min(self.counts.shape) < 2:
            return None
        before = np.cumsum(self.counts, axis=0) - self.counts
        of_lanes = self.counts.sum(axis=0)
        begin = np.cumsum(of_lanes) - of_lanes + before
        flat = self.counts.ravel()
        shift = begin.ravel() - (np.cumsum(flat) - flat)
        order: Ints = np.arange(flat.sum()) + np.repeat(shift, flat)
        return order


class Plan(Protocol):
    """An order of minibatches over windows."""

    @property
    def n_steps(self) -> int:
        """Number of minibatches."""
        ...

    @property
    def partial(self) -> bool:
        """Whether minibatches may leave out rows of the blocks that are read for them."""
        ...

    @property
    def held(self) -> Ints:
        """Rows that are read once and held, numbered from ``n_obs`` on in blocks: int64."""
        ...

    def windows(self, step: int = 0) -> Iterator[Window]:
        """The windows that minibatches from ``step`` on take from, in the order of first need."""
        ...

    def mix(self, window: Window) -> Ints:
        """Positions in :meth:`Window.rows` in the order in which they are taken: int64."""
        ...

    def source_rows(self, window: Window) -> Ints:
        """:meth:`Window.rows`, with held rows by their number in the source."""
        ...

    def course(self, step: int, stop: int) -> Course:
        """What minibatches ``step`` to ``stop`` (exclusive) take."""
        ...


def walk(
    plan: Plan,
    step: int,
    at_once: int,
    opened: Iterator[tuple[Window, Content]],
    closed: Callable[[Window], None],
) -> Iterator[tuple[list[tuple[Content, slice]], Course]]:
    """Go through the minibatches from ``step`` on, holding the windows that they need.

    Parameters
    ----------
    plan
        The order.
    step
        First minibatch.
    at_once
        How many minibatches to yield at a time; fewer at first, and twice as many each time.
    opened
        The windows of ``plan.windows(step)``, in that order, each with its content; pulled only
        when a minibatch needs the window.
    closed
        Told of each window that no later minibatch takes from, once the caller has come back.

    Yields
    ------
    The contents that the next minibatches take from, with the stretch of each; and their course. No
    other reference is kept to a content that no later minibatch takes from: clear the list to free
    it.
    """
    live: dict[tuple[int, int], tuple[Window, Content]] = {}
    stop, few = step, max(1, at_once // _SOONER)
    while stop < plan.n_steps:
        first, stop, error = stop, min(stop + few, plan.n_steps), None
        few = min(2 * few, at_once)
        course = plan.course(first, stop)
        try:
            for take in course.takes:
                while (take.lane, take.index) not in live:
                    window, content = next(opened)
                    live[window.lane, window.index] = window, content
                    del content
        except Exception as caught:
            # Minibatches before the one that it concerns still come.
            error = caught
            course = _reachable(plan, first, stop, live)
            if not len(course.sizes):
                raise
        parts: list[tuple[Content, slice]] = []
        ended = []
        for take in course.takes:
            key = take.lane, take.index
            parts.append((live[key][1], slice(take.start, take.stop)))
            if take.last:
                ended.append(live.pop(key)[0])
        yield parts, course
        for window in ended:
            closed(window)
        if error is not None:
            raise error


def _reachable(plan: Plan, first: int, stop: int, live: Container[tuple[int, int]]) -> Course:
    """What minibatches from ``first`` on take, up to the first that needs another window."""
    for step in range(first, stop):
        if any((take.lane, take.index) not in live for take in plan.course(step, step + 1).takes):
            stop = step
            break
    return plan.course(first, stop)
