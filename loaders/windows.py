"""The terms in which an order of minibatches is told, and the walk that follows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from loaders.blocks import Range

Ints = npt.NDArray[np.int64]
Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks that are read together and whose rows are mixed with each other.

    Attributes
    ----------
    lane, index
        The lane, and the position of the window in it.
    blocks
        Row ranges of the source, in the order in which their rows are concatenated.
    """

    lane: int
    index: int
    blocks: tuple[Range, ...]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.blocks)

    def rows(self) -> Ints:
        """Rows of the source, block after block: int64, (n_rows,)."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.blocks])


@dataclass(frozen=True, slots=True)
class Take:
    """What one minibatch takes from one window.

    Attributes
    ----------
    lane, index
        The window.
    positions
        Positions in the mixed rows of the window.
    last
        Whether no later minibatch takes from the window.
    """

    lane: int
    index: int
    positions: slice | Ints
    last: bool


class Plan(Protocol):
    """An order of minibatches over windows."""

    @property
    def n_steps(self) -> int:
        """Number of minibatches."""
        ...

    def windows(self, step: int = 0) -> Iterator[Window]:
        """The windows that minibatches from ``step`` on take from, in the order of first need."""
        ...

    def mix(self, window: Window) -> Ints:
        """The order in which the rows of a window are taken: a permutation, (n_rows,)."""
        ...

    def takes(self, step: int) -> list[Take]:
        """What minibatch ``step`` takes, in the order in which its rows come."""
        ...


def walk(
    plan: Plan, step: int, opened: Iterator[tuple[Window, Content]]
) -> Iterator[list[tuple[Content, slice | Ints]]]:
    """Go through the minibatches from ``step`` on, holding the windows that they need.

    Parameters
    ----------
    plan
        The order.
    step
        First minibatch.
    opened
        The windows of ``plan.windows(step)``, in that order, each with its content; pulled only
        when a minibatch needs the window.

    Yields
    ------
    For each minibatch the contents that it takes from, with the positions in each. No other
    reference is kept to a content that no later minibatch takes from: clear the list to free it.
    """
    live: dict[tuple[int, int], Content] = {}
    for current in range(step, plan.n_steps):
        takes = plan.takes(current)
        for take in takes:
            while (take.lane, take.index) not in live:
                window, content = next(opened)
                live[window.lane, window.index] = content
                del content
        parts = [(live[take.lane, take.index], take.positions) for take in takes]
        for take in takes:
            if take.last:
                del live[take.lane, take.index]
        yield parts
