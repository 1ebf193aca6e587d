"""Bytes that a loader may hold: what its settings need at the least, and how a budget is shared.

The needs are bounds that no order of rows can exceed, so that a budget that is accepted is never
too small later on.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from loaders.blocks import Blocks
from loaders.errors import LoaderError, whole_number
from loaders.packed import Compact
from loaders.pool import ROUNDING
from loaders.selection import Ints, Selection
from loaders.source import RowSource

_UNITS: Final = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for unit, base in (("B", 1000), ("iB", 1024))
}
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")

_TABLE_ROW: Final = 64
"""Bytes of an open row besides its values: where it lies, and its place in the order."""
_QUEUE: Final = 192 * 10**6
_GROUPS: Final = 8
"""That the queue is made of: threads must not wait for who takes them, nor it for them."""
_BUNDLE_ROWS: Final = 2048
_BUNDLE: Final = 2**23
"""Rows that minibatches are made of in one go, or these bytes of them where rows are small: what a
piece of work takes besides its values, much of it under Python's lock, is shared by more."""
_ROWS_AT_ONCE: Final = 2**20
_TASK: Final = 2**24


def parse_bytes(size: str | int) -> int:
    """A number of bytes from a number, or from a text such as ``"512MB"`` or ``"1.5 GiB"``.

    1 MB is 10^6 bytes, 1 MiB is 2^20.

    Raises
    ------
    LoaderError
        The text is no size, or the size is not above 0.
    """
    number = 0
    if isinstance(size, str):
        found = _SIZE.fullmatch(size)
        units = {name.upper(): factor for name, factor in _UNITS.items()}
        if found and found[2].upper() in units:
            number = int(float(found[1]) * units[found[2].upper()])
    else:
        with suppress(LoaderError):
            number = whole_number("memory", size)
    if number < 1:
        raise LoaderError(
            "this is no size of memory",
            found=repr(size),
            expected='a number of bytes, or a text such as "512MB" or "2GiB"',
        )
    return number


@dataclass(frozen=True, slots=True)
class Budget:
    """How the bytes are shared.

    Attributes
    ----------
    total
        All of them.
    minimum
        What the settings need at the least.
    held
        Rows that are held for the whole time, and tables of weights.
    windows
        Blocks that minibatches are taken from, and those read ahead of them; or all rows.
    tables
        Where all rows of a packed source fit in place of windows, what says where they lie; else 0.
    reading
        Scratch of the threads that read.
    task
        What a thread reads in one go, unless one block takes more: handing it over costs as much as
        100 kB.
    queue
        Minibatches made, waiting and handed out last.
    at_once
        Minibatches that are made in one go at the most.
    group
        Bytes that they are handed over in, at the most, unless one minibatch takes more.
    waiting
        How many such groups may wait to be taken.
    """

    total: int
    minimum: int
    held: int
    windows: int
    tables: int
    reading: int
    task: int
    queue: int
    at_once: int
    group: int
    waiting: int

    @property
    def resident(self) -> bool:
        """Whether all rows fit, so that they are read once."""
        return self.tables > 0

    @property
    def reusable(self) -> int:
        """Bytes of arrays whose memory others may have later."""
        return self.windows + self.queue - self.tables

    def __str__(self) -> str:
        parts = ("windows", "reading", "queue", "held")
        shown = ", ".join(f"{name} {getattr(self, name) / 1e6:,.1f} MB" for name in parts)
        return f"{self.total / 1e6:,.1f} MB ({shown}; at least {self.minimum / 1e6:,.1f} MB)"


@dataclass(frozen=True, slots=True)
class Needs:
    """What the budget depends on besides the source.

    Attributes
    ----------
    blocks, selection
        The blocks of the chosen rows, each with the rows that one visit takes from it.
    visits
        How often an epoch visits each block at most, int64 (n_blocks,); None where all are, once.
    n_rows, minibatch_size, buffer_size
        Rows of an epoch, of a minibatch and of the open windows, of one rank.
    ahead
        Rows to read ahead.
    threads
        Threads that read.
    value_bytes
        Bytes of a value in a minibatch.
    held
        Rows that are held, and bytes of tables.
    alone
        Whether no other rank takes rows, so that all that are read in an epoch are taken here.
    """

    blocks: Blocks
    selection: Selection
    visits: Ints | None
    n_rows: int
    minibatch_size: int
    buffer_size: int
    ahead: int
    threads: int
    value_bytes: int
    held: tuple[Ints, int]
    alone: bool


def block_bytes(source: RowSource, starts: Ints, stops: Ints) -> Ints:
    """Bytes of blocks as they are read, at most: int64, (n_blocks,)."""
    values = source.count_values(starts, stops)
    arrays: Ints = np.ceil(values * ((1 + ROUNDING) * (4 if source.narrow else 8))).astype(np.int64)
    return arrays + (stops - starts + 1) * 8


def share_out(source: RowSource, needs: Needs, total: int | None) -> Budget:
    """Share a budget out; None takes what the settings need, with some room.

    Raises
    ------
    LoaderError
        The budget is too small; the message names the minimum.
    """
    blocks = needs.blocks
    whole = block_bytes(source, blocks.starts, blocks.stops)
    kept = whole + blocks.takes * _TABLE_ROW
    if needs.visits is None:
        kept = _kept_bytes(source, needs, whole) + blocks.takes * _TABLE_ROW
    # Of each lane two windows can be open in a step, and what the step takes between them.
    open_rows = min(needs.n_rows, 2 * needs.buffer_size + needs.minibatch_size)
    rates = kept / blocks.takes
    of_epoch = blocks.takes if needs.visits is None else blocks.takes * needs.visits
    open_bytes = _heaviest(rates, of_epoch, open_rows)
    ahead_bytes = _heaviest(rates, of_epoch, needs.ahead)
    reading = needs.threads * (int(whole.max()) + source.read_overhead)
    rows, tables = needs.held
    held = tables + (int(block_bytes(source, rows, rows + 1).sum()) if len(rows) else 0)
    minibatch = _minibatch_bytes(source, needs)
    minimum = open_bytes + reading + held + 3 * minibatch
    if total is None:
        room = ahead_bytes + max(0, _QUEUE - 3 * minibatch)
        total = minimum + room + needs.threads * min(_TASK, int(whole.sum()))
    if total < minimum:
        raise LoaderError(
            "the memory given is too small for these settings",
            found=f"memory={total:,} bytes",
            expected=f"at least {minimum:,} bytes ({open_bytes:,} for open windows, {reading:,} "
            f"to read, {3 * minibatch:,} for minibatches, {held:,} for rows that are held)",
            do="raise memory, or take a smaller buffer_size or block_size or fewer threads",
        )
    task = min(_TASK, int(whole.sum()), (total - minimum) // (8 * needs.threads))
    reading += needs.threads * task
    left = total - minimum - needs.threads * task
    queue = 3 * minibatch + min(left // 2, max(0, _QUEUE - 3 * minibatch))
    windows = total - reading - held - queue
    # one is made, the last one taken is still in use, and the others wait
    group = max(minibatch, queue // _GROUPS)
    # what is made in one go needs its windows open at once, and others are read meanwhile
    spare = int((windows - open_bytes) / rates.max())
    small = min(int(_BUNDLE * blocks.takes.sum() / kept.sum()), needs.ahead // 2)
    rows_at_once = min(max(_BUNDLE_ROWS, small), needs.minibatch_size + spare)
    tables = source.n_obs * _TABLE_ROW
    everything = _packed_bytes(source) + tables
    resident = needs.alone and tables < everything <= windows
    return Budget(
        total=total,
        minimum=minimum,
        held=held,
        windows=windows,
        tables=tables if resident else 0,
        reading=reading,
        task=task,
        queue=queue,
        at_once=max(1, rows_at_once // needs.minibatch_size),
        group=group,
        waiting=max(1, queue // group - 2),
    )


def _packed_bytes(source: RowSource) -> int:
    """Bytes of all rows of a source as they can stay in memory; 0 where they cannot."""
    return math.ceil(source.packed_bytes * (1 + ROUNDING)) if isinstance(source, Compact) else 0


def _kept_bytes(source: RowSource, needs: Needs, whole: Ints) -> Ints:
    """Bytes that stay of each block: all, or its chosen rows where they are less than half."""
    blocks, selection = needs.blocks, needs.selection
    starts = np.union1d(selection.starts, blocks.starts)
    stops = np.union1d(selection.stops, blocks.stops)
    if len(starts) == len(blocks):
        return whole
    order = np.argsort(blocks.starts)
    block = order[np.searchsorted(blocks.starts[order], starts, side="right") - 1]
    chosen = np.bincount(block, block_bytes(source, starts, stops), len(blocks)).astype(np.int64)
    few = 2 * blocks.takes < blocks.stops - blocks.starts
    return np.where(few, chosen, whole)


def _heaviest(rates: npt.NDArray[np.float64], takes: Ints, n_rows: int) -> int:
    """Bytes of the ``n_rows`` rows that take most, by blocks of rows."""
    order = np.argsort(-rates)
    upto = np.minimum(np.cumsum(takes[order]), n_rows)
    return int((rates[order] * np.diff(upto, prepend=0)).sum()) + 1


def _minibatch_bytes(source: RowSource, needs: Needs) -> int:
    """Bytes of the largest minibatch that rows can make."""
    size = needs.minibatch_size
    largest = np.empty(0, np.int64)
    if needs.visits is not None:
        starts, stops = needs.blocks.starts, needs.blocks.stops
    else:
        starts, stops = needs.selection.starts, needs.selection.stops
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        for first in range(start, stop, _ROWS_AT_ONCE):
            rows = np.arange(first, min(stop, first + _ROWS_AT_ONCE))
            largest = np.concatenate([largest, source.count_values(rows, rows + 1)])
            if len(largest) > size + _ROWS_AT_ONCE:
                largest = np.partition(largest, len(largest) - size)[-size:]
    if needs.visits is not None:  # one row can come again and again
        values = size * int(largest.max(initial=0))
    else:
        values = int(np.sort(largest)[-size:].sum())
    arrays = math.ceil(values * needs.value_bytes * (1 + ROUNDING))
    return arrays + size * (24 + 4 * len(source.obs_codes)) + 64
