"""Files of counts as they are, opened like a store without being ingested.

Rows come in the order of the files, each file a study. It is slower than a store, which is written
for random blocks, and nothing records what the counts were: see README.md, What opens.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import (
    CorruptStoreError,
    CountsError,
    InputError,
    StoreError,
)
from atlas.ingest import GeneTable, join
from atlas.ingest.base import CountsSource
from atlas.ingest.files import open_counts
from atlas.ingest.genes import align
from atlas.store.codes import batch_names, extend, label_names, obs_column
from atlas.store.row_order import hash_names
from atlas.store.split import Split, ranges_of
from atlas.store.statistics import GeneStatistics, gene_statistics
from atlas.store.tables import join_obs
from loaders import RowBlock
from loaders.selection import Ints
from loaders.source import NARROW_MAX, as_ranges, joined, segment_of

INGEST = "ingest it: atlas ingest STORE FILE --study NAME"

_CACHED = ("narrow", "fingerprint")
"""What of a source follows from its genes."""

Codes: TypeAlias = dict[str, npt.NDArray[np.int32]]
_Csr: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]

Paths: TypeAlias = str | PathLike[str] | Sequence[str | PathLike[str]]


def open_files(
    paths: Paths,
    *,
    batch_key: str | None = None,
    label_key: str | None = None,
    unlabeled: str = "Unknown",
    layer: str | None = None,
    measurement: str | None = None,
    obs_filter: str | None = None,
) -> FilesSource:
    """Open one file of counts, or several, without ingesting them.

    Parameters
    ----------
    paths
        ``.h5ad``, 10x ``.h5`` or ``.loom`` files, or folders of AnnData in Zarr, whose rows can be
        read in any order: CSR, or dense in chunks of few rows; or SOMA experiments, also by URI.
        Genes meet as in a store, by id or name.
    batch_key
        The obs column of the batch; each file is one batch without it.
    label_key, unlabeled
        The obs column of the label, and the value that stands for none.
    layer
        Where the counts are, if not in X.
    measurement, obs_filter
        Of SOMA experiments: which measurement, and which cells, e.g. ``"tissue == 'lung'"``.

    Returns
    -------
    FilesSource
        What :func:`atlas.train`, :func:`atlas.embed` (with ``name=None``) and the loader take.

    Raises
    ------
    InputError, MissingColumnError
        A file cannot be read as counts, or only in order; or has no such column.
    """
    listed = [paths] if isinstance(paths, str | PathLike) else list(paths)
    if not listed:
        raise InputError("No file was given", expected="at least one")
    asked = Asked(
        tuple(map(Path, listed)), batch_key, label_key, unlabeled, layer, measurement, obs_filter
    )
    source = FilesSource(asked)
    warnings.warn(
        f"{source.path.name}{' …' if len(listed) > 1 else ''} is read {source.reading}; "
        "for many epochs make a store of it: atlas ingest",
        stacklevel=2,
    )
    return source


@dataclass(frozen=True)
class Asked:
    """What is opened, and how; the fields are those of :func:`open_files`."""

    paths: tuple[Path, ...]
    batch_key: str | None = None
    label_key: str | None = None
    unlabeled: str = "Unknown"
    layer: str | None = None
    measurement: str | None = None
    obs_filter: str | None = None


class FilesSource:
    """Rows of files: a :class:`loaders.RowSource`, and what training asks of a store.

    Opened by :func:`open_files`.
    """

    genes: tuple[str, ...] | None = None
    """None are recorded; give ``genes=``."""
    number: int | None = None
    """Files have no states."""

    def __init__(self, asked: Asked, chosen: Sequence[str] | None = None) -> None:
        self._asked = asked
        self.path = asked.paths[0]
        self.studies = tuple(join.labels(asked.paths))
        self._files = [
            open_counts(
                path,
                layer=asked.layer,
                measurement=asked.measurement,
                obs_filter=asked.obs_filter,
            )
            for path in asked.paths
        ]
        self._stamps = [file.stamp() for file in self._files]
        table, columns = GeneTable.of_names(()), []
        for file, path in zip(self._files, asked.paths, strict=True):
            if not file.random:
                raise InputError(
                    f"The rows of {path} can only be read in order",
                    expected="counts by row (CSR), or dense in chunks of few rows",
                    do=INGEST,
                    path=path,
                )
            table, own, _ = align(table, file.var)
            columns.append(own)
        self.gene_table = table
        self._columns = columns
        self.segments = tuple(int(n) for n in np.cumsum([0, *(f.n_obs for f in self._files)]))
        self.batches, self.labels, codes = self._coded()
        self.obs_codes: Mapping[str, npt.NDArray[np.int32]] = codes
        self._choose(table.names if chosen is None else chosen)

    def _choose(self, chosen: Sequence[str]) -> None:
        """Have these genes as columns, in this order."""
        names = tuple(map(str, chosen))
        position = {name: i for i, name in enumerate(self.gene_table.names)}
        unknown = [name for name in names if name not in position]
        if unknown or len(set(names)) < len(names) or not names:
            raise StoreError(
                "These genes cannot be selected",
                found=f"{len(unknown)} of {len(names)} are not in the files, e.g. "
                + ", ".join(unknown[:5])
                if unknown
                else "a gene twice, or none at all",
                expected="names of the files' genes, each once",
                path=self.path,
            )
        self._names = names
        place = np.full(len(self.gene_table.names) + 1, -1, np.int32)
        place[[position[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        self._tables = [place[own] for own in self._columns]

    def __reduce__(self) -> tuple[type[FilesSource], tuple[Any, ...]]:
        return FilesSource, (self._asked, self._names)

    def __repr__(self) -> str:
        return (
            f"FilesSource({len(self._files)} files: {self.n_obs:,} cells × {self.n_vars:,} genes)"
        )

    def _coded(self) -> tuple[tuple[str, ...], tuple[str, ...], Codes]:
        batch_key, label_key = self._asked.batch_key, self._asked.label_key
        batches: tuple[str, ...] = ()
        labels: tuple[str, ...] = ()
        batch, label = [], []
        for name, file in zip(self.studies, self._files, strict=True):

            def column(key: str, what: str, file: CountsSource = file) -> pd.Series[Any]:
                return obs_column(file.obs, key, what, file.path)

            of_batch = {} if batch_key is None else {batch_key: column(batch_key, "batch")}
            own = batch_names(of_batch, file.n_obs, name, file.path)
            batches, found = extend(batches, *own)
            batch.append(found)
            of_label = None if label_key is None else column(label_key, "label")
            own = label_names(of_label, file.n_obs, self._asked.unlabeled)
            labels, found = extend(labels, *own)
            label.append(found)
        study = np.repeat(np.arange(len(self._files), dtype=np.int32), np.diff(self.segments))
        return (
            batches,
            labels,
            {"study": study, "batch": np.concatenate(batch), "label": np.concatenate(label)},
        )

    # what it holds

    @property
    def n_obs(self) -> int:
        """Cells of all files."""
        return self.segments[-1]

    @property
    def n_vars(self) -> int:
        """Genes: those chosen, or of all files."""
        return len(self._names)

    @property
    def var(self) -> pd.DataFrame:
        """All genes: index gene name, column ``gene_id``."""
        index = pd.Index(self.gene_table.names, name="gene", dtype=object)
        return pd.DataFrame({"gene_id": pd.array(self.gene_table.ids, dtype="string")}, index=index)

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Annotations of all cells, in the order of the files; see :meth:`CountStore.obs`."""
        names = {"study": self.studies, "batch": self.batches, "label": self.labels}
        own = {
            f"atlas_{what}": pd.Categorical.from_codes(codes, pd.Index(names[what], dtype=object))
            for what, codes in self.obs_codes.items()
        }
        return join_obs([file.obs for file in self._files], own, columns, self.path)

    def select(self, genes: Sequence[str]) -> FilesSource:
        """The same rows over chosen genes, in the order given; the files stay open for both."""
        other = object.__new__(FilesSource)
        other.__dict__ |= {name: one for name, one in vars(self).items() if name not in _CACHED}
        other._choose(genes)
        return other

    def statistics(self) -> list[tuple[GeneStatistics, npt.NDArray[np.int32]]]:
        """Of each file, in two passes over it, and where its genes are in the gene table."""
        out = []
        for i, (file, columns) in enumerate(zip(self._files, self._columns, strict=True)):
            own = self.obs_codes["batch"][self.segments[i] : self.segments[i + 1]]
            codes = np.unique(own, return_inverse=True)[1].astype(np.int32)

            def read(start: int, stop: int, file: CountsSource = file) -> _Csr:
                (rows,) = file.read_many(np.array([start]), np.array([stop]))
                return file.tidy(rows, types=(np.int32, np.uint32))

            out.append((gene_statistics(read, file.n_obs, file.n_vars, codes), columns))
        return out

    def split(self, validation: float = 0.1) -> Split:
        """Hold out cells by the hash of file and row name."""
        hashes = [
            hash_names(name, file.obs.index)
            for name, file in zip(self.studies, self._files, strict=True)
        ]
        held_out = np.concatenate(hashes) < np.uint64(int(validation * 2**64))
        return Split(ranges_of(~held_out), ranges_of(held_out), [])

    @property
    def presence(self) -> npt.NDArray[np.bool_]:
        """Which file has which gene: bool (n_files, n_vars)."""
        out = np.zeros((len(self._files), self.n_vars), bool)
        for row, table in zip(out, self._tables, strict=True):
            row[table[table >= 0]] = True
        return out

    # rows

    @functools.cached_property
    def narrow(self) -> bool:
        """Whether the files hold uint16 or less."""
        small = all(file.dtype in (np.uint8, np.uint16) for file in self._files)
        return small and self.n_vars <= NARROW_MAX + 1

    @property
    def reading(self) -> str:
        """How rows are read."""
        how = "; ".join(dict.fromkeys(file.reading for file in self._files))
        return f"from files as they are, {how}"

    @property
    def read_overhead(self) -> int:
        """Bytes that a read takes besides twice what it returns, about."""
        return max(file.read_overhead for file in self._files)

    def count_values(self, starts: Ints, stops: Ints) -> Ints:
        """Values in each range of rows at most: int64, (n_ranges,)."""
        out = np.empty(len(starts), np.int64)
        of = np.searchsorted(self.segments, starts, side="right") - 1
        for i in np.unique(of).tolist():
            mine, first = of == i, self.segments[i]
            out[mine] = self._files[i].count_values(starts[mine] - first, stops[mine] - first)
        return out

    def read_rows(self, starts: int | Ints, stops: int | Ints) -> RowBlock:
        """Rows of one file, one range or several; thread-safe.

        Raises
        ------
        CorruptStoreError
            The file was replaced or changed since it was opened.
        CountsError, InputError
            A value is no count, or a part cannot be read.
        """
        starts, stops = as_ranges(starts, stops)
        i = segment_of(self.segments, starts, stops)
        path, file, first = self._asked.paths[i], self._files[i], self.segments[i]
        if file.stamp() != self._stamps[i]:
            raise CorruptStoreError(
                "A file was replaced or changed since it was opened",
                do="open it again",
                path=path,
            )
        types = (np.uint16, np.uint16) if self.narrow else (np.int32, np.uint32)
        blocks = []
        for rows in file.read_many(starts - first, stops - first):
            block = RowBlock(*file.tidy(rows, columns=self._tables[i], types=types))
            if self.narrow and not block.narrow:  # duplicates that add up to more
                raise CountsError("A count is above 65,535 in a file of uint16", path=path)
            blocks.append(block if self.narrow else block.widened())
        return blocks[0] if len(blocks) == 1 else joined(blocks)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the files' sizes and times, names of rows and genes, and codes.

        Of an AnnData in Zarr, of the size and the ends of each file of the counts.
        """
        digests = [file.digest() for file in self._files]
        total = hashlib.sha256(repr((digests, self._names)).encode())
        for file, table in zip(self._files, self._tables, strict=True):
            total.update(table.tobytes())
            total.update("\0".join(file.obs.index).encode())
        for name, codes in sorted(self.obs_codes.items()):
            total.update(name.encode() + codes.tobytes())
        return total.hexdigest()
