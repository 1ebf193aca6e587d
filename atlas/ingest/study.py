"""The counts of one study: of one input, or of several whose rows follow one another.

Tables are joined in memory; counts stay where they are. Each input is opened when its rows are
read and closed after the last of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData

from atlas.errors import ConfigError
from atlas.ingest import join
from atlas.ingest.base import DEFAULT_MEMORY, CountsSource
from atlas.ingest.content import LazyArrays
from atlas.ingest.files import open_counts
from atlas.ingest.soma import is_uri
from atlas.ingest.tenx import GENES

FILE_COLUMN = "file"
"""The obs column that says which of several inputs a row came from."""


@dataclass(frozen=True)
class Reading:
    """How inputs are read; the fields are those of :func:`atlas.ingest.open_counts`."""

    layer: str | None = None
    use_raw: bool = False
    round_counts: bool = False
    feature_type: str = GENES
    memory: int = DEFAULT_MEMORY
    folder: Path | None = None
    transpose: bool = False
    gene_lengths: Path | None = None
    measurement: str | None = None
    obs_filter: str | None = None

    def open(self, source: str | PathLike[str] | AnnData) -> CountsSource:
        """Open one input."""
        return open_counts(
            source,
            layer=self.layer,
            use_raw=self.use_raw,
            round_counts=self.round_counts,
            feature_type=self.feature_type,
            memory=self.memory,
            folder=self.folder,
            transpose=self.transpose,
            gene_lengths=self.gene_lengths,
            measurement=self.measurement,
            obs_filter=self.obs_filter,
        )


@dataclass(frozen=True, eq=False)
class Piece:
    """One input of a study, and where its rows and genes go; picklable where it is a file.

    Attributes
    ----------
    source, reading
        What to open, and how.
    first, n_obs
        Its rows: first of them in the study, and how many.
    columns
        int32, (genes of the input,): number of each gene in the study, -1 for those left out; None
        where they are the study's.
    """

    source: str | Path | AnnData
    reading: Reading
    first: int
    n_obs: int
    columns: npt.NDArray[np.int32] | None = None

    def open(self) -> CountsSource:
        """Open it."""
        return self.reading.open(self.source)


@dataclass(frozen=True, eq=False)
class StudyCounts:
    """Tables of a study, and the pieces its counts are in.

    Attributes
    ----------
    name
        What messages call it.
    path
        The file, where it is one.
    obs, var
        Tables of rows and genes.
    obsm, uns
        Arrays (n_obs, …) read when asked for, and ``spatial``.
    layers
        Names of the layers that could be kept.
    notes
        What the user should know.
    pieces
        The inputs, in the order of their rows.
    """

    name: str
    path: Path | None
    obs: pd.DataFrame
    var: pd.DataFrame
    obsm: Mapping[str, npt.NDArray[Any]]
    uns: Mapping[str, Any]
    layers: tuple[str, ...]
    notes: tuple[str, ...]
    pieces: tuple[Piece, ...]
    _open: OpenPieces = field(default_factory=lambda: OpenPieces())

    @property
    def n_obs(self) -> int:
        """Number of rows."""
        return len(self.obs)

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return len(self.var)

    @property
    def files(self) -> tuple[Path, ...] | None:
        """The inputs, where all are files here; of a folder the files in it."""
        out: list[Path] = []
        for piece in self.pieces:
            if isinstance(piece.source, AnnData):
                return None
            path = Path(piece.source)
            if is_uri(path):
                return None
            inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            out += inside
            if piece.reading.gene_lengths is not None:
                out.append(piece.reading.gene_lengths)
        return tuple(out)

    def opened(self, piece: Piece) -> Any:
        """Use a piece in a ``with`` statement, from several threads if need be."""
        return self._open.using(piece)

    def close(self) -> None:
        """Close what is open."""
        self._open.close()

    def __enter__(self) -> Self:
        """Use the counts in a ``with`` statement."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close what is open."""
        self.close()


class OpenPieces:
    """Inputs in use: each is opened once, and closed when a later one is used and it no more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: dict[int, CountsSource] = {}
        self._users: dict[int, int] = {}

    def hold(self, piece: Piece, source: CountsSource) -> None:
        """Take an input that is open already."""
        self._sources[piece.first] = source

    @contextmanager
    def using(self, piece: Piece) -> Iterator[CountsSource]:
        """Give the open input."""
        with self._lock:
            source = self._sources.get(piece.first)
            if source is None:
                self._drop()
                source = self._sources[piece.first] = piece.open()
            self._users[piece.first] = self._users.get(piece.first, 0) + 1
        try:
            yield source
        finally:
            with self._lock:
                self._users[piece.first] -= 1

    def _drop(self) -> None:
        for first in [first for first in self._sources if not self._users.get(first)]:
            self._sources.pop(first).close()

    def close(self) -> None:
        """Close all that nobody uses."""
        with self._lock:
            self._drop()


def open_study(
    sources: str | PathLike[str] | AnnData | Sequence[str | PathLike[str] | AnnData],
    reading: Reading,
    *,
    prefix_rows: bool = False,
    genes_of_all: bool = False,
) -> StudyCounts:
    """Open one input, or join several.

    Parameters
    ----------
    sources
        As :func:`atlas.ingest.open_counts` takes them; rows come in the order given.
    reading
        How to read them.
    prefix_rows
        Put the name of the file and a colon before each row name.
    genes_of_all
        Keep the genes that all inputs have, in place of refusing inputs whose genes differ.

    Raises
    ------
    InputError
        An input cannot be read; genes differ, or a row name occurs in two inputs.
    ConfigError
        There is no input, or one is given twice.
    """
    listed = [sources] if isinstance(sources, str | PathLike | AnnData) else list(sources)
    if not listed:
        raise ConfigError(
            "No input was given", found="an empty list", expected="at least one file or AnnData"
        )
    inputs = [source if isinstance(source, AnnData) else Path(source) for source in listed]
    if len(inputs) == 1:
        return _single(inputs[0], reading, prefix_rows)
    labels = join.labels(inputs)
    tables = []
    for source, label in zip(inputs, labels, strict=True):
        with reading.open(source) as counts:
            counts.check_rounding()
            name = f"{label} ({counts.name})" if isinstance(source, AnnData) else counts.name
            tables.append(join.Tables.of(counts, name))
    columns, var, notes = join.join_genes(tables, genes_of_all)
    obs, more = join.join_obs(tables, labels, prefix_rows, FILE_COLUMN)
    first, pieces = 0, []
    for source, table, own in zip(inputs, tables, columns, strict=True):
        pieces.append(Piece(source, reading, first, len(table.obs), own))
        first += len(table.obs)
    obsm, left = join.common_arrays(tables)
    uns, parted = join.join_spatial(tables)
    study = StudyCounts(
        name=", ".join(table.name for table in tables),
        path=None,
        obs=obs,
        var=var,
        obsm={},
        uns=uns,
        layers=tuple(n for n in tables[0].layers if all(n in t.layers for t in tables)),
        notes=(*(note for t in tables for note in t.notes), *notes, *more, *left, *parted),
        pieces=tuple(pieces),
    )

    def array(name: str) -> npt.NDArray[Any]:
        parts = []
        for piece in study.pieces:
            with study.opened(piece) as counts:
                parts.append(counts.obsm[name])
        return np.concatenate(parts)

    readers = {name: (lambda name=name: array(name)) for name in obsm}
    return replace(study, obsm=LazyArrays(readers))


def _single(source: Path | AnnData, reading: Reading, prefix_rows: bool) -> StudyCounts:
    counts = reading.open(source)
    counts.check_rounding()
    obs = counts.obs
    if prefix_rows:
        (label,) = join.labels([source])
        obs = obs.set_axis(join.prefixed(label, obs.index))
    study = StudyCounts(
        name=counts.name,
        path=counts.path,
        obs=obs,
        var=counts.var,
        obsm=counts.obsm,
        uns=counts.uns,
        layers=counts.layers,
        notes=counts.notes,
        pieces=(Piece(source, reading, 0, counts.n_obs),),
    )
    study._open.hold(study.pieces[0], counts)
    return study
