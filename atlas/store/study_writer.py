"""Writing one study: rows sorted by their hash, out of core, with statistics of its genes."""

from __future__ import annotations

import functools
import queue
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from atlas import files
from atlas.config import Profile
from atlas.errors import ConfigError
from atlas.ingest.matrix import Rows
from atlas.ingest.study import StudyCounts
from atlas.store import layout, tally
from atlas.store.journal import Journal
from atlas.store.matrix_writer import create_matrix, index_type, layouts
from atlas.store.row_order import hash_names, order_rows
from atlas.store.spill import RunResult, Runs
from atlas.store.statistics import GeneStatistics, gene_statistics, statistics_of_sums
from atlas.store.study_tasks import Block, Shard, close_kept, spill, spill_anywhere, write
from atlas.store.tiledb_array import SUFFIX, begin_copy, copy, finish_copy
from atlas.store.workers import Workers
from atlas.store.zarr_study import CSRMatrix, create_group, write_tables

_TALLY_SHARE = 4
"""Part of the memory that counting values may take: one in so many."""


class StudyWriter:
    """Writes one study: first in the journal's folder, in place at the end.

    Parameters
    ----------
    root, study, folder
        The store, the name of the study, and that of its folder.
    counts
        What to write.
    columns
        int32, (n_vars,): gene of the store for each column, -1 for none.
    batches
        int32, (n_obs,): code of the batch of each row, in input order.
    profile, memory
        Compression; bytes that rows may take at a time.
    workers, journal
        Who does it; what is done already.
    progress
        Show rows and cells/s on stderr.
    tiled
        Whether the columns and values of matrices go into TileDB in the end.
    """

    def __init__(
        self,
        root: Path,
        study: str,
        folder: str,
        counts: StudyCounts,
        columns: npt.NDArray[np.int32],
        batches: npt.NDArray[np.int32],
        profile: Profile,
        memory: int,
        workers: Workers,
        journal: Journal,
        progress: bool,
        tiled: bool = False,
    ) -> None:
        self.tiled = tiled
        self.root = root
        self.study = study
        self.counts = counts
        self.columns = columns
        self.profile = profile
        self.memory = memory
        self.workers = workers
        self.journal = journal
        self.progress = progress
        self.folder = root / "studies" / folder
        self.nnz = 0
        self._index_type = index_type(counts.n_vars)
        self.row_hash = hash_names(study, counts.obs.index)
        self.order = order_rows(self.row_hash, counts.obs.index)
        self._destination = np.empty(counts.n_obs, np.int64)
        self._destination[self.order] = np.arange(counts.n_obs)
        self._batches, codes = np.unique(batches, return_inverse=True)
        self._codes = codes.astype(np.int32)[self.order]
        self._statistics: GeneStatistics | None = None

    def write(self, keep_layers: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
        """Write everything; returns the arrays of the index part that follow from it."""
        counts, order = self.counts, self.order
        folder = self.journal.folder / "study"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        group = create_group(folder)
        write_tables(
            group,
            counts.obs.iloc[order],
            counts.var,
            {name: np.asarray(array)[order] for name, array in counts.obsm.items()},
            counts.uns,
            counts.path,
        )
        content = np.empty(counts.n_obs, np.uint64)
        for layer in (None, *keep_layers):
            name = "X" if layer is None else f"layers/{layer}"
            runs = self._read(name, layer, content if layer is None else None)
            self.nnz = runs.nnz if layer is None else self.nnz
            types = (self._index_type, _value_type(runs, layer))
            self._write(name, runs, types, counting=layer is None)
            create_matrix(
                group,
                folder,
                name,
                self.journal.shards_folder(name),
                runs.indptr,
                n_columns=counts.n_vars,
                types=types,
                profile=self.profile,
            )
            if self.tiled:
                self._tile(folder / name)
        files.sync_tree(folder)
        self.folder.parent.mkdir(exist_ok=True)
        folder.rename(self.folder)
        files.sync_folder(self.folder.parent)
        return {
            "row_hash": self.row_hash[order],
            "name_hash": hash_names("", counts.obs.index)[order],
            "content_hash": content,
            "input_position": order,
        }

    def _tile(self, matrix: Path) -> None:
        """Copy the arrays of a matrix into TileDB.

        They are written in Zarr first, which is what an interrupted ingest goes on with.
        """
        for name in ("indices", "data"):
            source, target = matrix / name, matrix / f"{name}{SUFFIX}"
            copies = begin_copy(source, target, layout.SHARD)
            for _ in self.workers.run(copy, copies):
                pass
            finish_copy(source, target)

    def _read(self, name: str, layer: str | None, content: npt.NDArray[np.uint64] | None) -> Runs:
        """Bring all rows of a matrix into runs; ``content`` is filled with their hashes."""
        runs = Runs(self.journal.runs_folder(name), self._destination)
        with self._bar("reading" if layer is None else f"layer {layer}") as bar:

            def take(result: RunResult) -> None:
                rows = runs.add(result)
                if content is not None:
                    content[rows] = result.hashes
                bar.update(len(rows))

            done = set()
            for result in self.journal.runs(name):
                done.add((result.run.first, result.run.n_rows))
                take(result)
            _leave_out(bar)
            blocks = self._blocks(layer, runs.folder, done)
            task = self._spill_here if self.workers.local else spill_anywhere
            try:
                for result in self.workers.run(task, blocks):
                    self.journal.add_run(name, result.run)
                    take(result)
            finally:
                self.workers.everywhere(close_kept)
        return runs

    def _spill_here(self, block: Block) -> RunResult:
        with self.counts.opened(block.piece) as source:
            return spill(source, block)

    def _blocks(
        self, layer: str | None, folder: Path, done: set[tuple[int, int]]
    ) -> Iterator[Block]:
        """Cut the inputs into blocks, and leave out those that are done."""
        genes = self.columns if layer is None else None
        for piece in self.counts.pieces:
            with self.counts.opened(piece) as source:
                ranges = source.ranges(layer)
                stored: Iterable[tuple[int, int, Rows | None]] = (
                    ((start, stop, None) for start, stop in ranges)
                    if ranges is not None
                    else (
                        (rows.first, rows.first + len(rows.indptr) - 1, rows)
                        for rows in source.stream(layer)
                    )
                )
                for start, stop, rows in stored:
                    first = piece.first + start
                    if (first, stop - start) not in done:
                        where = self._destination[first : piece.first + stop]
                        yield Block(
                            piece,
                            layer,
                            start,
                            stop,
                            where,
                            genes,
                            self._index_type,
                            folder,
                            rows,
                        )

    def _write(self, name: str, runs: Runs, types: tuple[str, str], counting: bool) -> None:
        """Write the shards of a matrix, and count the values on the way where that is cheap."""
        own = layouts(types, self.profile)
        folder = self.journal.shards_folder(name)
        done = self.journal.shards(name, types)
        tallies = self._tallies(types) if counting and not done else []
        free: queue.SimpleQueue[tally.Tally] = queue.SimpleQueue()
        for one in tallies:
            free.put(one)

        def count(
            first: int,
            indptr: npt.NDArray[np.int64],
            indices: npt.NDArray[Any],
            data: npt.NDArray[Any],
        ) -> None:
            one = free.get()
            try:
                one.add(indptr, indices, data, self._codes[first : first + len(indptr) - 1])
            finally:
                free.put(one)

        task = functools.partial(write, count=count) if tallies else write
        memory = self.memory - sum(one.nbytes for one in tallies)
        at_once = memory // shard_bytes(self.counts, types)
        with self._bar("writing") as bar:

            def shards() -> Iterator[Shard]:
                for stretch in runs.stretches(own[0].shard, types):
                    if stretch.number not in done:
                        yield Shard(stretch, folder, own)
                    else:
                        bar.update(stretch.n_rows)
                        _leave_out(bar)

            for indices, data, n_rows in self.workers.run(task, shards(), max(1, at_once)):
                self.journal.add_shards(name, indices, data)
                bar.update(min(n_rows, self.counts.n_obs - bar.n))
        if tallies and not any(one.given_up for one in tallies):
            cells = np.bincount(self._codes, minlength=len(self._batches)).astype(np.int64)
            self._statistics = statistics_of_sums(cells, functools.partial(tally.sums, tallies))

    def _tallies(self, types: tuple[str, str]) -> list[tally.Tally]:
        """One for each thread; none where the batches are many, or the workers elsewhere."""
        n_batches, n_vars = len(self._batches), self.counts.n_vars
        number = self.workers.number
        share = min(self.memory // _TALLY_SHARE, self.memory - shard_bytes(self.counts, types))
        width = tally.affordable_width(n_batches, n_vars, share // number)
        if width is None or not self.workers.local:
            return []
        return [tally.Tally(n_batches, n_vars, width) for _ in range(number)]

    def _bar(self, what: str) -> Any:
        """Rows, cells/s and the time left on stderr."""
        return tqdm(
            total=self.counts.n_obs,
            desc=f"{self.study}: {what}",
            unit=" cells",
            unit_scale=True,
            disable=not self.progress,
        )

    def statistics(self) -> dict[str, npt.NDArray[Any]]:
        """Means and variances per batch, with the codes of the batches, after :meth:`write`."""
        found = self._statistics or gene_statistics(
            CSRMatrix(self.folder / "X").read,
            self.counts.n_obs,
            self.counts.n_vars,
            self._codes,
            scheduler=self.workers.address,
        )
        return {**found.to_arrays(), "batches": self._batches.astype(np.int32)}


def _leave_out(bar: Any) -> None:
    """What was done before an interruption is no part of the speed."""
    if not bar.disable:
        bar.initial = bar.n


def _value_type(runs: Runs, layer: str | None) -> str:
    """Of the values on disk: the narrowest for counts, a layer's own."""
    if layer is None:
        return "<u2" if runs.largest < 2**16 else "<u4"
    kinds = runs.value_types
    return np.dtype(np.result_type(*kinds)).str if kinds else "<f4"


def shard_bytes(counts: StudyCounts, types: tuple[str, str]) -> int:
    """Memory for one shard: what is read, what is gathered from it, and what is compressed."""
    most = min(layout.SHARD, counts.n_obs * counts.n_vars)
    return max(1, most * sum(np.dtype(kind).itemsize for kind in types) * 5 // 2)


def check_memory(counts: StudyCounts, memory: int) -> None:
    """Refuse a budget in which not even one shard has room.

    Raises
    ------
    ConfigError
        Names the least that would do.
    """
    least = shard_bytes(counts, (index_type(counts.n_vars), "<u4"))
    if memory < least:
        raise ConfigError(
            "memory is too small to write a study",
            found=f"{memory:,} bytes",
            expected=f"at least {least:,} bytes for a study of {counts.n_vars:,} genes",
            do=f"give --memory {-(-least // 10**6)}MB or more",
        )
