"""The loaders: a source, a plan and a pipeline wired together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import finalize

import numpy.typing as npt

from loaders.blocks import tile
from loaders.errors import LoaderError, at_least_one, whole_number
from loaders.memory import Budget, Needs, parse_bytes, share_out
from loaders.minibatch import Minibatch
from loaders.pipeline import Pipeline, Work, default_threads
from loaders.plan import EpochPlan, sizes
from loaders.pool import POOL
from loaders.reader import Ahead
from loaders.resident import Resident, read_held, read_resident
from loaders.selection import Ints, RowsLike, Selection
from loaders.source import RowBlock, RowSource, checked_codes, checked_segments
from loaders.stalls import Stalls
from loaders.state import Fingerprint, Position, restore, save
from loaders.weights import Draws, balanced, codes_of

# Share of the buffer that heavy rows may fill.
_HEAVY_SHARE = 4


class MinibatchLoader:
    """Shuffled minibatches, epoch after epoch.

    Iterating yields the rest of the current epoch, after which the next one begins. Every row comes
    exactly once in an epoch, unless rows are drawn by weight, in an order that depends on nothing
    but the source, the parameters in the first group below and the number of the epoch: see
    :mod:`loaders.plan`. Reading and gathering run in background threads. An error there is raised
    when the minibatch that it concerns would have come; leaving the loop early stops the threads.

    Parameters
    ----------
    source
        Where the rows are.
    minibatch_size, seed, block_size, buffer_size, lanes, drop_last
        See :class:`EpochPlan`. ``minibatch_size`` is that over all ranks.
    rows
        Rows to go through: ranges ``(start, stop)``, a mask, or rising row numbers; by default all.
    weights
        Draw rows with replacement in proportion to these, (n_obs,), in place of taking each once.
    balance
        Name of an obs code, or a value for each row, (n_obs,), such as a column of obs: draw each
        of its values equally often. Rows with code -1, or without a value, count as one value more.
    rows_per_epoch
        How many rows to draw in an epoch; by default as many as there are to go through. Only with
        ``weights`` or ``balance``.

    rank, world_size
        Hand out only the part of every minibatch that belongs to one of several processes. All
        ranks together hand out the same minibatches, whatever their number, and as many each.
    threads
        Number of threads that read and gather; by default as many as the process may use cores, or
        as the source's ``reading_threads``, if it has them.
    memory
        Bytes that may be held, as a number or as ``"512MB"``: windows, those read ahead, scratch,
        minibatches that wait, and rows that are held. By default what the settings need, with some
        room. It never changes the order. Where all rows of a projection fit, and this is the only
        rank, they are read once, before the first minibatch, and held; not so in a worker process.
    narrow
        Hand out columns and counts as uint16, as they are stored: half the bytes, to be widened on
        the device (:meth:`Minibatch.to_torch` does).

    Raises
    ------
    LoaderError
        A parameter out of range, a source whose segments or codes do not fit its rows, too little
        memory, or ``narrow`` from a source that is not.
    """

    def __init__(
        self,
        source: RowSource,
        minibatch_size: int = 128,
        seed: int = 0,
        *,
        rows: RowsLike = None,
        weights: npt.ArrayLike | None = None,
        balance: str | npt.ArrayLike | None = None,
        rows_per_epoch: int | None = None,
        block_size: int | None = None,
        buffer_size: int | None = None,
        lanes: int = 8,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        threads: int | None = None,
        memory: int | str | None = None,
        narrow: bool = False,
    ) -> None:
        segments = checked_segments(source)
        if narrow and not source.narrow:
            raise LoaderError(
                "narrow minibatches cannot be made from this source",
                found="columns or counts of 2^16 or more",
                expected="a source whose columns and counts all fit in uint16",
                do="leave out narrow=True",
            )
        self._source = source
        self._narrow = narrow
        self._threads = (
            default_threads(source) if threads is None else at_least_one("threads", threads)
        )
        self._obs_codes = checked_codes(source)
        self._selection = selection = Selection(rows, source.n_obs)
        lanes = at_least_one("lanes", lanes)
        block_size, buffer_size = sizes(selection.n_rows, lanes, block_size, buffer_size)
        blocks = tile(segments, selection, block_size)
        draws = None
        if weights is not None or balance is not None:
            draws = Draws(
                self._weights(weights, balance, selection),
                selection,
                blocks,
                at_least_one(
                    "rows_per_epoch",
                    selection.n_rows if rows_per_epoch is None else rows_per_epoch,
                ),
                block_size,
                held=buffer_size // _HEAVY_SHARE,
            )
            blocks.takes[:] = draws.takes
        elif rows_per_epoch is not None:
            raise LoaderError(
                "rows_per_epoch is given, but rows are not drawn",
                found=rows_per_epoch,
                expected="weights or balance beside it",
                do="leave it out: an epoch is each row once",
            )
        self._plan_of = partial(
            EpochPlan,
            segments,
            minibatch_size,
            seed,
            rows=selection,
            block_size=block_size,
            buffer_size=buffer_size,
            lanes=lanes,
            drop_last=drop_last,
            draws=draws,
            rank=rank,
            world_size=world_size,
        )
        self._position = Position()
        self._plan = self._plan_of(epoch=0)
        self._blocks = blocks
        # A worker of torch's DataLoader is made anew for each epoch, and would read all each time.
        self._process = os.getpid()
        self._held: RowBlock | None = None
        self._resident: Resident | None = None
        self._pipeline: Pipeline | None = None
        # As much as the buffer: with less, reading stops now and then for want of a window to read.
        ahead = max(buffer_size, 2 * self._threads * block_size)
        self._ahead_rows = -(-ahead // world_size)
        self.budget: Budget = share_out(
            source,
            Needs(
                blocks=blocks,
                selection=selection,
                visits=None if draws is None else draws.visits_at_most,
                n_rows=self._plan.n_rows,
                minibatch_size=-(-self._plan.minibatch_size // world_size),
                buffer_size=buffer_size // world_size,
                ahead=self._ahead_rows,
                threads=self._threads,
                value_bytes=4 if narrow else 8,
                held=(self._plan.held, 0 if draws is None else draws.nbytes),
                alone=world_size == 1,
            ),
            None if memory is None else parse_bytes(memory),
        )
        self._reserve()

    def __getstate__(self) -> dict[str, Any]:
        # for a worker process that is not a fork; an iteration under way stays here
        return {**self.__dict__, "_pipeline": None, "_resident": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reserve()

    @property
    def source(self) -> RowSource:
        """Where the rows are."""
        return self._source

    @property
    def selection(self) -> Selection:
        """The rows to go through."""
        return self._selection

    @property
    def plan(self) -> EpochPlan:
        """The order of the current epoch."""
        return self._plan

    def plan_of(self, rank: int) -> EpochPlan:
        """The order of the current epoch as another rank goes through it."""
        return self._plan_of(epoch=self.epoch, rank=rank)

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self._position.epoch

    @property
    def step(self) -> int:
        """Minibatches of the current epoch that were handed out."""
        return self._position.step

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches in every epoch."""
        return self._plan.n_steps

    @property
    def n_rows(self) -> int:
        """Rows in an epoch over all ranks, those left out by ``drop_last`` included."""
        return self._plan.n_rows

    @property
    def stalls(self) -> Stalls:
        """Where the iteration under way, or the last one, spent its time."""
        return Stalls() if self._pipeline is None else self._pipeline.stalls

    def __len__(self) -> int:
        """Minibatches in every epoch, as :attr:`steps_per_epoch`."""
        return self._plan.n_steps

    def __iter__(self) -> Iterator[Minibatch]:
        """The rest of the current epoch. A new iteration ends one that is still under way."""
        self._end_iteration()
        position, plan = self._position, self._plan
        if self._resident is None and self.budget.resident and os.getpid() == self._process:
            # An error comes again with the minibatch that it concerns.
            with suppress(Exception):
                self._resident = read_resident(
                    self._source, self._blocks, self._threads, self.budget.task
                )
        if self._resident is None and len(plan.held) and self._held is None:
            self._held = read_held(self._source, plan.held, self._threads)
        pipeline = self._pipeline = Pipeline(
            Work(
                self._source,
                self._obs_codes,
                plan,
                position.step,
                self._threads,
                Ahead(self._ahead_rows, self.budget.windows, self.budget.task),
                held=self._held,
                resident=self._resident,
                narrow=self._narrow,
                at_once=self.budget.at_once,
                group=self.budget.group,
                waiting=self.budget.waiting,
            )
        )
        try:
            for minibatch in pipeline:
                position = self._position = Position(position.epoch, position.step + 1)
                yield minibatch
                if self._pipeline is not pipeline:
                    raise LoaderError(
                        "this iteration was ended by a newer one, or by a restored state",
                        found=f"an iteration that goes on after it, at step {position.step}",
                        expected="one iteration of a loader at a time",
                        do="make a second loader to go through the same rows beside it",
                    )
            self._go_to(Position(position.epoch + 1))
        finally:
            pipeline.close()

    def describe(self) -> str:
        """What runs and why, for people: how rows are read, in what order, with what memory."""
        plan = self._plan
        part = f", rank {plan.rank} of {plan.world_size}" if plan.world_size > 1 else ""
        kind = "uint16 columns and counts" if self._narrow else "int32 columns, float32 counts"
        then = "; once, and held from then on" if self.budget.resident else ""
        drawn = "each once" if plan.settings["weights"] == "none" else "drawn by weight"
        return "\n".join(
            [
                f"reading   {self._source.reading}{then}",
                f"rows      {plan.n_rows:,} of {self._source.n_obs:,}, {drawn}; "
                f"{self._source.n_vars:,} columns",
                f"steps     {plan.n_steps:,} minibatches of {plan.minibatch_size:,}{part}",
                f"order     blocks of {plan.block_size:,} rows, {plan.buffer_size:,} rows mixed, "
                f"{plan.lanes} lanes, seed {plan.seed}",
                f"output    CSR, {kind}",
                f"threads   {self._threads} that read and gather",
                f"memory    {self.budget}",
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as a small dict of JSON values.

        It counts minibatches handed out, not those prepared: inside the loop, the state is that
        after the minibatch at hand. It is the same for every rank and any number of threads.
        """
        return save(self._position, self._fingerprint())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; the minibatches that follow are those that followed there.

        Raises
        ------
        LoaderError
            The state is of another source or other settings, or no state at all.
        """
        position = restore(state, self._fingerprint(), self.steps_per_epoch)
        self._end_iteration()
        self._go_to(position)

    def rows_of(self, epoch: int, step: int) -> Ints:
        """Rows of the source in a minibatch of any epoch, this rank's: int64, (n_rows,)."""
        return next(self._plan_of(epoch=epoch).minibatches(step))

    def skip_to_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless the loader is in it already."""
        epoch = whole_number("epoch", epoch)
        if epoch != self.epoch:
            self._end_iteration()
            self._go_to(Position(epoch))

    def _weights(
        self,
        weights: npt.ArrayLike | None,
        balance: str | npt.ArrayLike | None,
        selection: Selection,
    ) -> npt.ArrayLike:
        if balance is None:
            assert weights is not None  # one of the two was given
            return weights
        if weights is not None:
            raise LoaderError(
                "weights and balance are both given",
                expected="one of them",
                do="multiply the weights yourself, or leave one out",
            )
        if not isinstance(balance, str):
            return balanced(codes_of(balance, self._source.n_obs), selection)
        if balance not in self._obs_codes:
            raise LoaderError(
                "there are no such codes to balance by",
                found=repr(balance),
                expected="one of " + (", ".join(self._obs_codes) or "(there are none)"),
                do="for another column give its values, one for each row",
            )
        return balanced(self._obs_codes[balance], selection)

    def _reserve(self) -> None:
        POOL.reserve(self.budget.reusable)
        finalize(self, POOL.release, self.budget.reusable)

    def _go_to(self, position: Position) -> None:
        if position.epoch != self._plan.epoch:
            self._plan = self._plan_of(epoch=position.epoch)
        self._position = position

    def _end_iteration(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def _fingerprint(self) -> Fingerprint:
        return {"source": self._source.fingerprint, **self._plan.settings}
