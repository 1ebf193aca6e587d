"""The two tasks of writing a study: a block of rows into a run, a stretch of runs into shards.

They run in threads, or in other processes that share nothing but the files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from atlas.ingest.base import CountsSource
from atlas.ingest.matrix import Rows
from atlas.ingest.study import Piece, Reading
from atlas.store.layout import Layout
from atlas.store.matrix_writer import Written, write_shard
from atlas.store.spill import RunResult, Stretch, write_run


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one piece that become one run; ``rows`` where they had to be read in order."""

    piece: Piece
    layer: str | None
    start: int
    stop: int
    destinations: npt.NDArray[np.int64]
    genes: npt.NDArray[np.int32] | None
    index_type: str
    folder: Path
    rows: Rows | None = None


def spill(source: CountsSource, block: Block) -> RunResult:
    """Read, check, sort and write a block."""
    rows = block.rows or source.read(block.start, block.stop, block.layer)
    value_type = None if block.layer is not None else np.uint16
    tidy = functools.partial(
        source.tidy,
        rows,
        block.layer,
        columns=block.piece.columns,
        types=(block.index_type, value_type),
    )
    return write_run(
        block.folder,
        block.piece.first + block.start,
        block.destinations,
        lambda order: tidy(order=order),
        block.genes,
    )


def spill_anywhere(block: Block) -> RunResult:
    """The same in a process that shares nothing but the files."""
    path = Path(str(block.piece.source))
    return spill(_kept_open(path, path.stat().st_mtime_ns, block.piece.reading), block)


@functools.lru_cache(maxsize=2)
def _kept_open(path: Path, changed: int, reading: Reading) -> CountsSource:
    return reading.open(path)


def close_kept() -> None:
    """Close what a worker kept open."""
    _kept_open.cache_clear()


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard of both arrays, to be written into ``folder``."""

    stretch: Stretch
    folder: Path
    layouts: tuple[Layout, Layout]


def write(shard: Shard, count: Callable[..., None] | None = None) -> tuple[Written, Written, int]:
    """Gather a shard and write it; returns what was written, and how many rows end in it."""
    indptr, indices, data = shard.stretch.gather()
    if count is not None:
        count(shard.stretch.first_row, indptr, indices, data)
    number = shard.stretch.number
    written = (
        write_shard(shard.folder / "indices", number, indices, shard.layouts[0]),
        write_shard(shard.folder / "data", number, data, shard.layouts[1]),
    )
    return *written, shard.stretch.n_rows
