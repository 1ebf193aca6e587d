"""A training store of chosen genes: what a selection of a store reads, written out once.

Reading 2,000 of 20,000 genes from a store decodes all 20,000. A projection holds the chosen ones
alone, rows in the order of the store, columns in that of the genes, uncompressed: as records of
two bytes a value (:mod:`loaders.packed`), or as CSR where counts or columns need more than
uint16::

    PATH/begun.json         what is being written, before anything else is
    PATH/0000/ 0001/ …      one matrix per study, whole once it has its study.json
    PATH/projection.json    written last: with it the projection is whole

It stands for the selection that it was made of: :func:`open_projection` gives rows, columns, codes
and fingerprint of ``store.select(genes)``, so that a run may go on from either.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from atlas.errors import CorruptStoreError, StoreError
from atlas.store.packed_matrix import PackedMatrix
from atlas.store.projection_format import (
    BEGUN,
    REMAKE,
    WHOLE,
    StudyRecord,
    digest_small,
    read_record,
)
from atlas.store.projection_writer import ProjectionWriter
from atlas.store.zarr_study import CSRMatrix, how_read
from loaders import LoaderError, RowBlock
from loaders.packed import Block, PackedBlock
from loaders.selection import Ints
from loaders.source import as_ranges, segment_of

if TYPE_CHECKING:
    from atlas.store.base import CountStore
    from atlas.store.view import CountView


def write_projection(
    store: CountStore,
    genes: Sequence[str],
    path: str | PathLike[str],
    *,
    progress: bool = False,
    threads: int | None = None,
) -> Projection:
    """Write the chosen genes of a store into a folder of their own.

    After Ctrl-C or a kill the same call goes on with the studies that are missing; where the
    projection is whole it is opened.

    Parameters
    ----------
    store
        An open store.
    genes
        The genes, in the order that the columns are to have.
    path
        A folder that is free, or holds this same projection, whole or begun.
    progress
        Show cells/s and the time left on stderr.
    threads
        By default as many as cores.

    Raises
    ------
    StoreError
        A gene is not in the store, the folder holds something else, or writing failed.
    LockedError
        Another process is writing there.
    CorruptStoreError
        A chunk of the store is missing or damaged.
    """
    folder = Path(path)
    view = store.select(genes)
    ProjectionWriter(store, view, list(map(str, genes)), folder, threads).write(progress=progress)
    return open_projection(folder, store)


def open_projection(path: str | PathLike[str], store: CountStore) -> Projection:
    """Open a projection of this very state of a store.

    Raises
    ------
    StoreError
        There is none, it is not whole, or it is of another state of the store or of other genes.
    FormatError
        It was written in a newer format.
    CorruptStoreError
        A file of it is missing or is not what was written.
    """
    folder = Path(path)
    whole = folder / WHOLE
    if not whole.is_file():
        begun = (folder / BEGUN).is_file()
        raise StoreError(
            "The projection is not whole" if begun else "There is no projection here",
            found="one whose writing was interrupted" if begun else f"no {WHOLE}",
            do=f"write it with `atlas project {store.path} --genes … --out {folder}`"
            + (", which goes on where it was" if begun else ""),
            path=folder,
        )
    record = read_record(whole)
    unknown = sorted(set(record["genes"]) - set(store.gene_table.names))
    view = None if unknown else store.select(record["genes"])
    if view is None or view.fingerprint != record["fingerprint"]:
        raise StoreError(
            "The projection is of another state of the store, or of another store",
            found=_shown(record["studies"], record["segments"], record["fingerprint"])
            + (f"; {len(unknown):,} genes that are not here" if unknown else ""),
            expected=_shown(
                store.studies, store.segments, "unknown" if view is None else view.fingerprint
            ),
            do="open the store and the state that it was made of, or write another projection",
            path=folder,
        )
    studies = [StudyRecord(**values) for values in record["matrices"]]
    for i, study in enumerate(studies):
        _check(folder / f"{i:04d}", study)
    return Projection(folder, store, view, tuple(record["genes"]), studies)


def _shown(studies: Sequence[str], segments: Sequence[int], fingerprint: str) -> str:
    named = ", ".join(studies[:5]) + (", …" if len(studies) > 5 else "")
    return f"{segments[-1]:,} cells of {named or 'no study'}, fingerprint {fingerprint[:16]}"


def _check(folder: Path, study: StudyRecord) -> None:
    """Whether the files of one study are there, and the small ones what was written.

    The long ones are not read: their chunks are checked when they are.
    """
    for array, shards in study.shards.items():
        for number, (size, _) in enumerate(shards):
            file = folder / array / "c" / str(number)
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                raise CorruptStoreError(
                    "A file of the projection is missing or is not what was written",
                    found="no file" if found is None else f"{found:,} bytes",
                    expected=f"{size:,} bytes",
                    do=REMAKE,
                    path=file,
                )
    if digest_small(folder, study.shards) != study.digest:
        raise CorruptStoreError(
            "The metadata of the projection is not what was written",
            do=REMAKE,
            path=folder,
        )


class Projection:
    """A :class:`loaders.RowSource`: what ``store.select(genes)`` is, read from a projection.

    Opened by :func:`open_projection`.
    """

    def __init__(
        self,
        path: Path,
        store: CountStore,
        view: CountView,
        genes: tuple[str, ...],
        studies: Sequence[StudyRecord],
    ) -> None:
        self.path = path
        self.genes = genes
        self.segments = view.segments
        self.fingerprint = view.fingerprint
        self.presence = view.presence
        self._codes = store.obs_codes
        self._counts = tuple(
            (PackedMatrix if study.packed else CSRMatrix)(path / f"{i:04d}")
            for i, study in enumerate(studies)
        )
        self.nnz = sum(study.nnz for study in studies)

    def __repr__(self) -> str:
        return f"Projection({str(self.path)!r}: {self.n_obs:,} cells × {self.n_vars:,} genes)"

    @property
    def n_obs(self) -> int:
        """Rows of all studies."""
        return self.segments[-1]

    @property
    def n_vars(self) -> int:
        """The genes."""
        return len(self.genes)

    @property
    def obs_codes(self) -> Mapping[str, npt.NDArray[np.int32]]:
        """``study``, ``batch`` and ``label`` of every row."""
        return self._codes

    @functools.cached_property
    def narrow(self) -> bool:
        """Whether columns and counts of all studies are uint16."""
        return all(counts.narrow for counts in self._counts)

    @property
    def reading(self) -> str:
        """How rows are read."""
        how = how_read({str(counts.folder): counts.why_stepwise for counts in self._counts})
        return f"{how}, from a projection of {self.n_vars:,} genes"

    @functools.cached_property
    def read_overhead(self) -> int:
        """Bytes that a read takes besides twice what it returns (:meth:`read_packed`)."""
        return max((counts.read_overhead for counts in self._counts), default=0)

    @functools.cached_property
    def packed_bytes(self) -> int:
        """Bytes of all rows as :meth:`read_packed` gives them, where that is packed; 0 if not."""
        packed = [c.packed_bytes for c in self._counts if isinstance(c, PackedMatrix)]
        return sum(packed) if len(packed) == len(self._counts) else 0

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Values in each range of rows, each of one study: int64, (n_ranges,)."""
        out = np.empty(len(starts), np.int64)
        study_of = np.searchsorted(self.segments, starts, side="right") - 1
        for i in np.unique(study_of).tolist():
            mine, offset = study_of == i, self.segments[i]
            out[mine] = self._counts[i].count_values(starts[mine] - offset, stops[mine] - offset)
        return out

    def read_rows(self, starts: int | Ints, stops: int | Ints) -> RowBlock:
        """Rows ``starts`` to ``stops`` (exclusive) of one study, columns rising; thread-safe.

        One range, or several.

        Raises
        ------
        CorruptStoreError
            A chunk is missing or damaged, or records do not fit their row pointers.
        """
        block = self.read_packed(*as_ranges(starts, stops))
        if not isinstance(block, PackedBlock):
            return block
        try:
            return block.unpacked()
        except LoaderError as error:
            raise CorruptStoreError(
                "Rows of the projection are not what was written",
                found=error.found,
                do=REMAKE,
                path=self.path,
            ) from error

    def read_packed(self, starts: Ints, stops: Ints) -> Block:
        """As :meth:`read_rows`, but packed where the study is: for the loader, which checks it."""
        i = segment_of(self.segments, starts, stops)
        counts, offset = self._counts[i], self.segments[i]
        try:
            if isinstance(counts, PackedMatrix):
                return counts.read(starts - offset, stops - offset)
            block = RowBlock(*counts.read(starts - offset, stops - offset))
        except CorruptStoreError as error:
            raise CorruptStoreError(
                error.what.replace("the store", "the projection"),
                found=error.found,
                expected=error.expected,
                do=REMAKE,
                path=error.path,
            ) from error
        return block if counts.narrow else block.widened()
