"""The loaders: a source, a plan and a pipeline wired together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.blocks import Range
from loaders.errors import LoaderError
from loaders.minibatch import Minibatch
from loaders.pipeline import Pipeline, Work
from loaders.plan import EpochPlan
from loaders.sequential import SequentialPlan
from loaders.source import RowSource
from loaders.state import Fingerprint, Position, restore, save

# Share of the buffer that is read before it is needed, on top of the buffer itself.
_AHEAD_SHARE = 4


class MinibatchLoader:
    """Shuffled minibatches, epoch after epoch.

    Iterating yields the rest of the current epoch, after which the next one begins. Every row comes
    exactly once in an epoch, in an order that depends on nothing but the source, the parameters
    below (except ``threads``) and the number of the epoch: see :mod:`loaders.plan`. Reading and
    gathering run in background threads. An error there is raised when the minibatch that it
    concerns would have come; leaving the loop early stops the threads.

    Memory holds the rows of ``buffer_size``, about a quarter of that read ahead, and at most 64 MiB
    of minibatches (or one, if larger) that wait to be taken.

    Parameters
    ----------
    source
        Where the rows are.
    minibatch_size, seed, rows, block_size, buffer_size, lanes, drop_last
        See :class:`EpochPlan`.
    threads
        Number of reading threads; by default 2, or 1 on a machine of one core.

    Raises
    ------
    LoaderError
        A parameter out of range, or a source whose segments or codes do not fit its rows.
    """

    def __init__(
        self,
        source: RowSource,
        minibatch_size: int = 128,
        seed: int = 0,
        *,
        rows: Sequence[Range] | None = None,
        block_size: int | None = None,
        buffer_size: int | None = None,
        lanes: int = 8,
        drop_last: bool = False,
        threads: int | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise LoaderError("threads is out of range", found=threads, expected="at least 1")
        self._source = source
        self._threads = _default_threads() if threads is None else threads
        self._plan_of = partial(
            EpochPlan,
            _segments(source),
            minibatch_size,
            seed,
            rows=rows,
            block_size=block_size,
            buffer_size=buffer_size,
            lanes=lanes,
            drop_last=drop_last,
        )
        self._obs_codes = _obs_codes(source)
        self._position = Position()
        self._plan = self._plan_of(epoch=0)
        self._pipeline: Pipeline | None = None

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
        """Rows in an epoch, those left out by ``drop_last`` included."""
        return self._plan.n_rows

    def __len__(self) -> int:
        """Minibatches in every epoch, as :attr:`steps_per_epoch`."""
        return self._plan.n_steps

    def __iter__(self) -> Iterator[Minibatch]:
        """The rest of the current epoch. A new iteration ends one that is still under way."""
        self._end_iteration()
        position, plan = self._position, self._plan
        pipeline = self._pipeline = Pipeline(
            Work(
                self._source,
                self._obs_codes,
                plan,
                position.step,
                self._threads,
                ahead=max(plan.buffer_size // _AHEAD_SHARE, 2 * self._threads * plan.block_size),
            )
        )
        try:
            for minibatch in pipeline:
                position = self._position = Position(position.epoch, position.step + 1)
                yield minibatch
                if self._pipeline is not pipeline:
                    raise LoaderError(
                        "this iteration was ended by a newer one, or by a restored state",
                        do="iterate over a loader once at a time",
                    )
            self._go_to(Position(position.epoch + 1))
        finally:
            pipeline.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as a small dict of JSON values.

        It counts minibatches handed out, not those prepared: inside the loop, the state is that
        after the minibatch at hand.
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


class SequentialLoader:
    """Minibatches in the order of the source, for validation and embedding.

    A minibatch never crosses the end of a segment or of a row range, so it may be shorter there.
    Each iteration begins anew. Reading and gathering run in background threads as in
    :class:`MinibatchLoader`.

    Parameters
    ----------
    source
        Where the rows are.
    minibatch_size
        Rows of a minibatch at most.
    rows
        Sorted, disjoint row ranges ``(start, stop)`` to go through; by default all rows.

    Raises
    ------
    LoaderError
        A parameter out of range, or a source whose segments or codes do not fit its rows.
    """

    def __init__(
        self, source: RowSource, minibatch_size: int, rows: Sequence[Range] | None = None
    ) -> None:
        self._source = source
        self._plan = SequentialPlan(_segments(source), minibatch_size, rows)
        self._obs_codes = _obs_codes(source)

    @property
    def n_rows(self) -> int:
        """Rows to go through."""
        return self._plan.n_rows

    def __len__(self) -> int:
        """Number of minibatches."""
        return self._plan.n_steps

    def __iter__(self) -> Iterator[Minibatch]:
        """All minibatches, from the first."""
        threads = _default_threads()
        pipeline = Pipeline(
            Work(
                self._source,
                self._obs_codes,
                self._plan,
                step=0,
                threads=threads,
                ahead=2 * threads * self._plan.block_size,
            )
        )
        try:
            yield from pipeline
        finally:
            pipeline.close()


def _default_threads() -> int:
    return min(2, os.cpu_count() or 1)


def _segments(source: RowSource) -> tuple[int, ...]:
    segments = tuple(int(bound) for bound in source.segments)
    if not segments or segments[-1] != source.n_obs:
        raise LoaderError(
            "the segments of the source do not end at its last row",
            found=segments,
            expected=f"n_obs={source.n_obs} at the end",
        )
    return segments


def _obs_codes(source: RowSource) -> dict[str, npt.NDArray[np.int32]]:
    obs_codes = dict(source.obs_codes)
    for name, codes in obs_codes.items():
        if codes.shape != (source.n_obs,) or codes.dtype != np.int32:
            raise LoaderError(
                f"the codes {name!r} of the source do not fit its rows",
                found=f"{codes.dtype} {codes.shape}",
                expected=f"int32 ({source.n_obs},)",
            )
    return obs_codes
