"""Any AnnData in Zarr as a source of rows, without ingesting it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, cast

import anndata.io
import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import zarr

from atlas.codecs.zarr_rows import DenseRows, SparseRows
from atlas.errors import (
    AtlasError,
    CorruptStoreError,
    CountsError,
    FormatError,
    InputError,
    MissingColumnError,
    NotAStoreError,
)
from atlas.store.append import text_of
from loaders import RowBlock
from loaders.selection import Ints
from loaders.source import as_ranges, joined, segment_of

INGEST = "ingest it: store.append(anndata.read_zarr(path), study=…)"

_Codes: TypeAlias = npt.NDArray[np.int32]


def open_zarr(
    path: str | PathLike[str],
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    label_key: str | None = None,
    unlabeled: str = "Unknown",
    genes: Sequence[str] | None = None,
) -> ZarrSource:
    """Open the counts of an AnnData in Zarr, of any layout, as they lie.

    The rows come in the order of the file, which is not shuffled as a store's is, and nothing
    records what they were: :func:`open_store` has checksums, several studies, and speed.

    Parameters
    ----------
    path
        Folder of the AnnData (Zarr v2 or v3).
    layer
        The layer that holds the counts; X when None.
    batch_key, label_key
        obs columns of the batch and the label; one batch, and no labels, when None.
    unlabeled
        The value that stands for no label, besides missing and empty ones.
    genes
        The columns wanted, in this order; all when None.

    Raises
    ------
    NotAStoreError, FormatError
        There is no AnnData in Zarr at ``path``, or its counts lie by column.
    MissingColumnError, InputError
        No such layer, obs column or gene; or cells without a batch.
    CorruptStoreError
        Row pointers that are damaged, or chunks that are absent.
    """
    root = Path(path)
    group = _open_group(root)
    name = "X" if layer is None else f"layers/{layer}"
    if name not in group:
        there = sorted(cast("zarr.Group", group["layers"]).keys()) if "layers" in group else []
        raise MissingColumnError(
            "There is no such layer" if layer else "The AnnData has no X",
            found=layer,
            expected="one of " + (", ".join(there) or "(there are none)"),
            path=root,
        )
    matrix = group[name]
    kind = str(matrix.attrs.asdict().get("encoding-type", "unknown"))
    rows: SparseRows | DenseRows
    if kind == "csr_matrix" and isinstance(matrix, zarr.Group):
        rows = SparseRows(matrix, root / name, name)
    elif kind == "array" and isinstance(matrix, zarr.Array):
        rows = DenseRows(matrix, root / name, name)
    else:
        raise FormatError(
            f"{name} does not lie by row",
            found=kind,
            expected="csr_matrix, or a dense array",
            do=INGEST,
            path=root / name,
        )
    n_obs = rows.shape[0]
    batches: tuple[str, ...] = ("all",)
    batch = np.zeros(n_obs, np.int32)
    if batch_key is not None:
        batches, batch = _codes(group, batch_key, "batch", None, root)
        if missing := int((batch < 0).sum()):
            raise InputError(
                "Some cells have no batch",
                found=f"{missing} missing values in obs column {batch_key!r}",
                expected="a batch for every cell",
                path=root,
            )
    labels: tuple[str, ...] = ()
    label = np.full(n_obs, -1, np.int32)
    if label_key is not None:
        labels, label = _codes(group, label_key, "label", unlabeled, root)
    codes = {"study": np.zeros(n_obs, np.int32), "batch": batch, "label": label}
    if any(len(column) != n_obs for column in codes.values()):
        raise CorruptStoreError(f"obs and {name} differ in their rows", path=root)
    names = _index(group, "var")
    if len(names) != rows.shape[1]:
        raise CorruptStoreError(f"var and {name} differ in their genes", path=root)
    return ZarrSource(root, rows, names, genes, codes, batches, labels)


class ZarrSource:
    """The rows of an AnnData in Zarr: a :class:`loaders.RowSource`; opened by :func:`open_zarr`."""

    def __init__(
        self,
        path: Path,
        rows: SparseRows | DenseRows,
        names: Sequence[str],
        genes: Sequence[str] | None,
        codes: Mapping[str, _Codes],
        batches: tuple[str, ...],
        labels: tuple[str, ...],
    ) -> None:
        self.path = path
        self.genes = tuple(names if genes is None else map(str, genes))
        self.batches, self.labels = batches, labels
        self._rows = rows
        self._codes = dict(codes)
        self._all = genes is None
        # the chosen position of each column, -1 for one that is left out
        self._table = (
            np.arange(len(names), dtype=np.int32)
            if genes is None
            else _table(names, self.genes, path)
        )

    def __repr__(self) -> str:
        return f"ZarrSource({str(self.path)!r}: {self.n_obs:,} cells × {self.n_vars:,} genes)"

    @property
    def n_obs(self) -> int:
        """Rows."""
        return int(self._rows.shape[0])

    @property
    def n_vars(self) -> int:
        """Columns: the genes chosen."""
        return len(self.genes)

    @property
    def segments(self) -> tuple[int, ...]:
        """One segment."""
        return 0, self.n_obs

    @property
    def obs_codes(self) -> Mapping[str, _Codes]:
        """``study`` (0), ``batch`` and ``label`` of every row."""
        return self._codes

    @property
    def reading(self) -> str:
        """Which path reads the rows, and why."""
        return self._rows.reading

    @property
    def narrow(self) -> bool:
        """Whether blocks come as uint16, as they lie on disk."""
        return self.n_vars <= 2**16 and self._rows.dtype in (np.uint8, np.uint16)

    @property
    def read_overhead(self) -> int:
        """Bytes of the chunks that one read decodes beyond its rows."""
        return self._rows.overhead

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Values in each range of rows at most: int64, (n_ranges,)."""
        return self._rows.count(starts, stops)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of metadata, row pointers, row and gene names, codes, and genes chosen.

        The counts are not read for it: of each of their files it takes name, size, and the first
        and last 256 bytes.
        """
        total = hashlib.sha256()
        for name in self.genes:
            total.update(name.encode() + b"\0")
        total.update(self._table.tobytes())
        for name, codes in sorted(self._codes.items()):
            total.update(name.encode() + codes.astype("<i4").tobytes())
        for name in _index(_open_group(self.path), "obs"):
            total.update(name.encode() + b"\0")
        self._rows.digest(total)
        return total.hexdigest()

    def read_rows(self, starts: int | Ints, stops: int | Ints) -> RowBlock:
        """Rows ``starts`` to ``stops`` (exclusive), one range or several; thread-safe.

        Raises
        ------
        CorruptStoreError
            A chunk is absent or damaged, or a column index is out of range.
        CountsError
            A value is no count: negative, not whole, or not finite.
        """
        starts, stops = as_ranges(starts, stops)
        segment_of(self.segments, starts, stops)
        if len(starts) == 1:
            return self._read_range(int(starts[0]), int(stops[0]))
        return joined(list(map(self._read_range, starts.tolist(), stops.tolist())))

    def _read_range(self, start: int, stop: int) -> RowBlock:
        indptr, indices, data = self._rows.read(start, stop)
        state, at = _check(indptr, indices, data, self._rows.shape[1])
        if state in (_NOT_A_COUNT, _RANGE):
            raise self._fault(state, at, start, indptr, indices, data)
        if state == _ORDER:
            shape = (stop - start, self._rows.shape[1])
            tidy = sp.csr_matrix((data.astype(np.float64), indices, indptr), shape)
            tidy.sum_duplicates()
            indptr, indices, data = tidy.indptr, tidy.indices, tidy.data
            if self.narrow and data.max() > 2**16 - 1:
                raise self._fault(_NOT_A_COUNT, int(data.argmax()), start, indptr, indices, data)
        types = (np.uint16, np.uint16) if self.narrow else (np.int32, np.float32)
        if self._all:
            return RowBlock(
                indptr.astype(np.int64, copy=False),
                indices.astype(types[0], copy=False),
                data.astype(types[1], copy=False),
            )
        columns = self._table[indices]
        keep = columns >= 0
        kept = np.concatenate([[0], np.cumsum(keep)])[indptr]
        return RowBlock(kept, columns[keep].astype(types[0]), data[keep].astype(types[1]))

    def _fault(
        self,
        state: int,
        at: int,
        start: int,
        indptr: npt.NDArray[Any],
        indices: npt.NDArray[Any],
        data: npt.NDArray[Any],
    ) -> AtlasError:
        row = start + int(np.searchsorted(indptr, at, side="right")) - 1
        if state == _RANGE:
            return CorruptStoreError(
                "A column index is out of range",
                found=f"{indices[at]} in row {row}",
                expected=f"0 to {self._rows.shape[1] - 1}",
                path=self._rows.path,
            )
        return CountsError(
            "The values are no counts",
            found=f"{data[at]} in row {row}",
            expected="whole numbers from 0 on",
            do="name the layer of the raw counts: layer=…",
            path=self._rows.path,
        )


def _open_group(root: Path) -> zarr.Group:
    try:
        group = zarr.open_group(root, mode="r")
        if group.attrs.asdict().get("encoding-type") == "anndata":
            return group
        found: object = "a Zarr group of another kind"
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        found = "no such folder" if not root.exists() else error
    raise NotAStoreError(
        "There is no AnnData in Zarr here",
        found=found,
        expected="a folder that AnnData.write_zarr made",
        path=root,
    )


def _index(group: zarr.Group, name: str) -> list[str]:
    frame = cast("zarr.Group", group[name])
    values = anndata.io.read_elem(frame[str(frame.attrs.asdict()["_index"])])
    return [str(value) for value in values]


def _codes(
    group: zarr.Group, key: str, what: str, unlabeled: str | None, root: Path
) -> tuple[tuple[str, ...], _Codes]:
    """Names of the values of an obs column in alphabetical order, and the code of each row."""
    obs = cast("zarr.Group", group["obs"])
    there = [str(name) for name in obs.attrs.asdict()["column-order"]]  # type: ignore[union-attr]
    if key not in there:
        raise MissingColumnError(
            f"There is no obs column for the {what}",
            found=repr(key),
            expected="one of " + (", ".join(there) or "(there are none)"),
            path=root,
        )
    own, values = pd.factorize(pd.Series(anndata.io.read_elem(obs[key])))
    texts = [text_of(value) for value in values]
    none = () if unlabeled is None else ("", unlabeled)
    names = sorted({text for text in texts if text.strip() not in none})
    code = {name: i for i, name in enumerate(names)}
    table = np.array([*(code.get(text, -1) for text in texts), -1], np.int32)
    return tuple(names), table[own]


def _table(names: Sequence[str], genes: Sequence[str], path: Path) -> npt.NDArray[np.int32]:
    """The chosen position of each column, -1 for those left out."""
    position = {name: i for i, name in enumerate(names)}
    unknown = [gene for gene in genes if gene not in position]
    if unknown or not genes or len(set(genes)) < len(genes):
        raise InputError(
            "These genes cannot be selected",
            found=f"{len(unknown)} of {len(genes)} are not there, e.g. {', '.join(unknown[:5])}"
            if unknown
            else "a gene twice, or none at all",
            expected="names of var, each once",
            path=path,
        )
    table = np.full(len(names), -1, np.int32)
    table[[position[gene] for gene in genes]] = np.arange(len(genes), dtype=np.int32)
    return table


_FINE, _NOT_A_COUNT, _RANGE, _ORDER = 0, 1, 2, 3


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _check(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[Any],
    data: npt.NDArray[Any],
    n_vars: int,
) -> tuple[int, int]:
    """Whether rows are counts in range whose columns rise; what is wrong, and at which value."""
    for i in range(len(data)):
        value = np.float64(data[i])
        if not (value >= 0 and value == np.rint(value) and value < 2**32):
            return _NOT_A_COUNT, i
    for i in range(len(indices)):
        if indices[i] < 0 or indices[i] >= n_vars:
            return _RANGE, i
    for row in range(len(indptr) - 1):
        for i in range(indptr[row] + 1, indptr[row + 1]):
            if indices[i] <= indices[i - 1]:
                return _ORDER, i
    return _FINE, 0
