"""Writing a projection: blocks of rows read and selected in parallel, shards written in order."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numba
import numpy as np
import numpy.typing as npt
import zarr
from tqdm import tqdm

from atlas import files
from atlas.errors import LockedError, StoreError
from atlas.store.arrays import DurableStore
from atlas.store.layout import Layout
from atlas.store.matrix_writer import Written, index_type, write_pointers, write_shard
from atlas.store.parallel import ordered_map, resolve_threads
from atlas.store.projection_format import (
    BEGUN,
    FORMAT,
    STUDY,
    VERSION,
    WHOLE,
    StudyRecord,
    check_version,
    digest_small,
)
from atlas.store.zarr_study import CSRMatrix
from loaders import RowBlock
from loaders.packed import Block, packed

if TYPE_CHECKING:
    from atlas.store.base import CountStore
    from atlas.store.view import CountView

CHUNK = 8_192
"""Elements of a chunk. Rows are several times shorter than in the store, so chunks are: a block of
256 rows ends in fewer values that are decoded for nothing (benchmarks/LOG.md)."""
SHARD = 256 * CHUNK
_RECORD_SHARD = 4
"""How many times :data:`SHARD` elements a shard of records has: they are bytes."""

_BLOCK = 2**19
"""Values of the store that are read at once, about."""
_LOCK = "writer.lock"


class ProjectionWriter:
    """Writes a projection into a folder, and goes on with one that was interrupted."""

    def __init__(
        self,
        store: CountStore,
        view: CountView,
        genes: list[str],
        folder: Path,
        threads: int | None,
    ) -> None:
        self._store, self._view, self._genes = store, view, genes
        self._folder = folder
        self._threads = resolve_threads(threads)
        position = {name: i for i, name in enumerate(store.gene_table.names)}
        # one more than genes, so that -1 (no gene of the store) finds -1 at the end
        self._chosen = np.full(store.n_vars + 1, -1, np.int32)
        self._chosen[[position[gene] for gene in genes]] = np.arange(len(genes), dtype=np.int32)

    def write(self, *, progress: bool) -> None:
        """Write what is missing.

        Raises
        ------
        StoreError
            The folder holds something else, or writing failed.
        LockedError
            Another process is writing there.
        """
        folder = self._folder
        try:
            self._check_folder()
            folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(folder / _LOCK, thread_local=False)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise LockedError(
                    "Another process is writing this projection",
                    do="wait until it has ended, or choose another folder",
                    path=folder,
                ) from None
            try:
                self._write(progress)
            finally:
                lock.release()
        except OSError as error:
            raise StoreError(
                "The projection could not be written",
                found=str(error),
                do="make room or mend the disk, then run the command again: it goes on where it "
                "was",
                path=folder,
            ) from error

    def _check_folder(self) -> None:
        """Refuse a folder that holds another projection, or anything else."""
        folder = self._folder
        if not folder.exists():
            return
        there = {p.name for p in folder.iterdir()} - {_LOCK} if folder.is_dir() else {"a file"}
        for name in (WHOLE, BEGUN):
            if name not in there:
                continue
            try:
                found = json.loads((folder / name).read_bytes())
                recorded, genes = str(found["fingerprint"]), list(found["genes"])
            except (ValueError, KeyError, TypeError):
                break
            check_version(found, folder / name)
            if recorded == self._view.fingerprint and genes == self._genes:
                return
            raise StoreError(
                "There is another projection here",
                found=f"{len(genes):,} genes, e.g. {', '.join(map(str, genes[:3]))}; of a "
                f"selection with fingerprint {recorded[:16]}…",
                expected=f"{len(self._genes):,} genes, e.g. {', '.join(self._genes[:3])}; of a "
                f"selection with fingerprint {self._view.fingerprint[:16]}…",
                do="remove it, or choose another folder",
                path=folder,
            )
        if there - {f".{BEGUN}.partial"}:
            raise StoreError(
                "A projection cannot be written here",
                found=", ".join(sorted(there)[:5]),
                expected="a folder that is free",
                do="choose another folder",
                path=folder,
            )

    def _write(self, progress: bool) -> None:
        folder = self._folder
        if (folder / WHOLE).is_file():
            return
        record = {
            "format": FORMAT,
            "version": VERSION,
            "written_by": version("atlas-trainer"),
            "fingerprint": self._view.fingerprint,
            "genes": self._genes,
        }
        if not (folder / BEGUN).is_file():
            files.replace_bytes(folder / BEGUN, json.dumps(record).encode())
        studies = []
        with tqdm(
            total=self._store.n_obs,
            desc="project",
            unit=" cells",
            unit_scale=True,
            disable=not progress,
        ) as bar:
            for i, name in enumerate(self._store.studies):
                target = folder / f"{i:04d}"
                known = _known(target)
                if known is None:
                    shutil.rmtree(target, ignore_errors=True)
                    known = self._study(name, target, bar)
                else:
                    bar.update(known.n_obs)
                studies.append(dataclasses.asdict(known))
        record |= {
            "segments": list(self._store.segments),
            "studies": list(self._store.studies),
            "matrices": studies,
        }
        files.replace_bytes(folder / WHOLE, json.dumps(record).encode())
        (folder / BEGUN).unlink()

    def _study(self, name: str, target: Path, bar: Any) -> StudyRecord:
        """Write one study, its record last."""
        entry = next(s for s in self._store.manifest.studies if s.name == name)
        table = self._chosen[self._store.part_array(entry, "index", "genes")]
        counts = self._store.study(name).counts
        kind = counts.read(0, 0)[2].dtype.str  # as in the store, so that the same is narrow
        matrix = _MatrixWriter(target, entry.n_obs, len(self._genes), kind)

        def read(rows: tuple[int, int]) -> Block:
            selected = _select(*counts.read(*rows), table)
            return packed(*selected) if matrix.packed else RowBlock(*selected)

        blocks = _row_blocks(counts, entry.n_obs)
        for (start, stop), part in ordered_map(read, blocks, self._threads):
            matrix.append(start, part)
            bar.update(stop - start)
        record = matrix.close()
        files.sync_tree(target)
        files.sync_folder(target.parent)
        files.replace_bytes(target / STUDY, json.dumps(dataclasses.asdict(record)).encode())
        return record


def _known(folder: Path) -> StudyRecord | None:
    """The record of a study that is whole, from an earlier run."""
    try:
        return StudyRecord(**json.loads((folder / STUDY).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _row_blocks(counts: CSRMatrix, n_obs: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows with about as many values each."""
    rows = np.arange(n_obs, dtype=np.int64)
    ends = np.cumsum(counts.count_values(rows, rows + 1))
    start = done = 0
    while start < n_obs:
        stop = max(start + 1, int(np.searchsorted(ends, done + _BLOCK, side="right")))
        yield start, stop
        start, done = stop, int(ends[stop - 1])


def _packs(columns: str, counts: str) -> bool:
    """Whether columns and counts of these types are written as records."""
    return columns == counts == "<u2"


class _ArrayWriter:
    """Collects the elements of a long array and writes whole shards; holds one at the most."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self.layout = folder / "c", layout
        self._waiting = np.empty(layout.shard, layout.dtype)
        self._filled = 0
        self.shards: list[Written] = []
        self._folder.mkdir(parents=True)

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add elements."""
        at = 0
        while at < len(values):
            n = min(len(values) - at, len(self._waiting) - self._filled)
            self._waiting[self._filled : self._filled + n] = values[at : at + n]
            self._filled += n
            at += n
            if self._filled == len(self._waiting):
                self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._filled:
            values = self._waiting[: self._filled]
            self.shards.append(write_shard(self._folder, len(self.shards), values, self.layout))
            self._filled = 0


class _MatrixWriter:
    """Collects rows: as records where columns and counts are below 2^16, as CSR otherwise.

    Nothing is compressed: what is read for many epochs may take more room.
    """

    def __init__(self, folder: Path, n_obs: int, n_vars: int, count_type: str) -> None:
        self._folder, self._shape = folder, (n_obs, n_vars)
        columns = index_type(n_vars)
        self.packed = _packs(columns, count_type)
        types = {"records": "|u1"} if self.packed else {"indices": columns, "data": count_type}
        shard = SHARD * (_RECORD_SHARD if self.packed else 1)
        self._arrays = {
            name: _ArrayWriter(
                folder / name, Layout(kind, "fast", False, CHUNK, shard, compressed=False)
            )
            for name, kind in types.items()
        }
        names = ("indptr", "offsets") if self.packed else ("indptr",)
        self._pointers = {name: np.zeros(n_obs + 1, np.int64) for name in names}

    def append(self, row: int, block: Block) -> None:
        """Add the rows from ``row`` on."""
        for name, pointers in self._pointers.items():
            own = getattr(block, name)
            pointers[row + 1 : row + len(own)] = pointers[row] + own[1:]
        for name, array in self._arrays.items():
            array.append(getattr(block, name))

    def close(self) -> StudyRecord:
        """Write what waits, the row pointers, and the metadata."""
        group = zarr.open_group(DurableStore(self._folder), mode="a", zarr_format=3)
        kind = "atlas_packed_rows" if self.packed else "csr_matrix"
        group.attrs.update(
            {"encoding-type": kind, "encoding-version": "0.1.0", "shape": list(self._shape)}
        )
        indptr = self._pointers["indptr"]
        n_elements = int(self._pointers["offsets" if self.packed else "indptr"][-1])
        for name, array in self._arrays.items():
            array.flush()
            array.layout.create(group, name, n_elements, self._folder / name / "c")
        layout = Layout("<i8", "fast", True, CHUNK, SHARD)
        for name, pointers in self._pointers.items():
            write_pointers(group, self._folder, pointers, layout, name)
        return StudyRecord(
            n_obs=self._shape[0],
            nnz=int(indptr[-1]),
            digest=digest_small(self._folder, self._arrays),
            shards={
                name: [[shard.size, shard.crc32c] for shard in array.shards]
                for name, array in self._arrays.items()
            },
        )


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _select(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[Any],
    data: npt.NDArray[Any],
    table: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Columns renamed by ``table``, -1 dropped, and each row in rising order of the new columns."""
    new_indptr = np.zeros(len(indptr), np.int64)
    new_indices = np.empty(len(indices), np.int32)
    new_data = np.empty_like(data)
    at = 0
    for row in range(len(indptr) - 1):
        begin, falls, last = at, False, np.int32(-1)
        for j in range(indptr[row], indptr[row + 1]):
            column = table[indices[j]]
            if column >= 0:
                falls |= column < last
                last = column
                new_indices[at] = column
                new_data[at] = data[j]
                at += 1
        if falls:
            order = np.argsort(new_indices[begin:at])
            new_indices[begin:at] = new_indices[begin:at][order]
            new_data[begin:at] = new_data[begin:at][order]
        new_indptr[row + 1] = at
    return new_indptr, new_indices[:at].copy(), new_data[:at].copy()
