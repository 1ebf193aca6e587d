"""A derived training store of the chosen genes: when it pays, and while a run needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from atlas.errors import ConfigError, StoreError
from atlas.store import CountStore, CountView, FilesSource
from atlas.store.parallel import resolve_threads
from atlas.store.projection import Projection, write_projection
from atlas.training.checkpoint import FOLDER as CHECKPOINTS

_BLOCKS = 32
_BLOCK_ROWS = 256

_WRITING = 2.0
"""Seconds that writing a projection takes, in epochs of reading the store: it reads all once."""
_OVERHEAD = 0.02
"""Share of the reading that stays even if hardly a value is kept."""
_LEAST_SECONDS = 60.0
_LEAST_SHARE = 0.1


def project(
    store: CountStore,
    genes: Sequence[str] | None,
    path: str | PathLike[str],
    *,
    progress: bool = False,
    threads: int | None = None,
) -> Projection:
    """Write a training store of chosen genes; see :func:`atlas.store.projection.write_projection`.

    Parameters
    ----------
    store
        An open store.
    genes
        The genes, in order; those recorded by :func:`select_genes` when None.
    path
        A folder that is free, or holds this same projection, whole or begun.
    progress
        Show cells/s and the time left on stderr.
    threads
        By default as many as cores.

    Returns
    -------
    Projection
        Its rows, columns, codes and fingerprint are those of ``store.select(genes)``.
    """
    if genes is None and store.genes is None:
        raise ConfigError(
            "No genes are chosen",
            do="choose them with `atlas genes` (atlas.select_genes), or give genes=",
            path=store.path,
        )
    chosen = store.genes if genes is None else genes
    return write_projection(store, chosen or (), path, progress=progress, threads=threads)


@dataclass(frozen=True, slots=True)
class Saving:
    """What a projection would save a run: seconds of reading, all cores together.

    Attributes
    ----------
    epoch, projected
        Reading all cells once, from the store and from the projection.
    writing
        Making the projection.
    epochs
        How often the cells are read.
    """

    epoch: float
    projected: float
    writing: float
    epochs: int

    @property
    def total(self) -> float:
        """What is saved over all epochs; negative where it costs more."""
        return self.epochs * (self.epoch - self.projected) - self.writing

    @property
    def pays(self) -> bool:
        """Whether it saves more than a minute, and more than a tenth of the reading."""
        return self.total > max(_LEAST_SECONDS, _LEAST_SHARE * self.epochs * self.epoch)

    def __str__(self) -> str:
        return (
            f"reading takes about {_seconds(self.epoch)} an epoch; --project would make it "
            f"{_seconds(self.projected)} after {_seconds(self.writing)} of writing, and save up to "
            f"{_seconds(self.total)} over {self.epochs:,} epochs"
        )


def estimate(seconds_per_row: float, n_obs: int, kept: float, epochs: int) -> Saving:
    """What a projection would save.

    Parameters
    ----------
    seconds_per_row
        Of reading the store, all cores together.
    n_obs, epochs
        Cells, and how often they are read.
    kept
        Share of the stored values that are of the chosen genes.
    """
    epoch = seconds_per_row * n_obs
    return Saving(epoch, epoch * min(1.0, kept + _OVERHEAD), epoch * _WRITING, epochs)


def measure(
    view: CountView, *, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Read a few dozen blocks: seconds a row, shared by the cores, and share of values kept."""
    size = min(_BLOCK_ROWS, view.n_obs)
    starts = np.linspace(0, view.n_obs - size, _BLOCKS).astype(np.int64)
    bounds = np.array(view.segments)
    ends = bounds[np.searchsorted(bounds, starts, side="right")]  # a block lies in one study
    blocks = [(int(a), int(min(a + size, b))) for a, b in zip(starts, ends, strict=True)]
    view.read_rows(*blocks[0])  # compiles, and opens the first files
    began, values = clock(), 0
    for start, stop in blocks:
        values += len(view.read_rows(start, stop).data)
    seconds = clock() - began
    stored = int(view.count_values(*np.array(blocks, np.int64).T).sum())
    rows = sum(stop - start for start, stop in blocks)
    return seconds / rows / resolve_threads(None), values / max(stored, 1)


def advice(view: CountView | FilesSource, epochs: int, run: Path) -> str | None:
    """One line that offers ``--project`` to a new run, where that saves something."""
    if not isinstance(view, CountView) or not view.n_obs or (run / CHECKPOINTS).exists():
        return None
    try:
        seconds_per_row, kept = measure(view)
    except StoreError:  # the training itself will say it, when it comes to these rows
        return None
    saving = estimate(seconds_per_row, view.n_obs, kept, epochs)
    return str(saving) if saving.pays else None


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
