"""One study on disk: a complete AnnData in Zarr v3 that ``anndata.read_zarr`` opens.

In a store of the format ``tiledb`` the columns and values of its matrices lie in TileDB instead.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import anndata
import anndata.io
import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

from atlas.codecs import chunks
from atlas.codecs.recipe import RESTORE
from atlas.errors import CorruptStoreError, InputError
from atlas.files import digest_tree
from atlas.store import obs_part
from atlas.store.arrays import DurableStore
from atlas.store.schema import StudyEntry
from atlas.store.tiledb_array import RECORD, SUFFIX, TileArray, array_folder, open_array
from loaders.selection import Ints
from loaders.source import as_ranges, row_pointers

Rows: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]
"""indptr from 0, indices in the study's own columns, values; as stored."""


def create_group(folder: Path) -> zarr.Group:
    """The group of a new study, with all elements an AnnData has."""
    group = zarr.open_group(DurableStore(folder), mode="w", zarr_format=3)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
        anndata.io.write_elem(group, name, {})
    return group


def write_tables(
    group: zarr.Group,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    obsm: Mapping[str, npt.NDArray[Any]],
    uns: Mapping[str, Any],
    path: Path | None,
) -> None:
    """Write everything but the counts; rows are in stored order already.

    ``path`` is the input's, for messages.

    Raises
    ------
    InputError
        A column or array cannot be written as AnnData does.
    """
    with anndata.settings.override(auto_shard_zarr_v3=False):
        for name, frame in {"obs": obs, "var": var}.items():
            _write(group, name, storable(frame, name, path), path)
        for name, array in obsm.items():
            _write(group, f"obsm/{name}", array, path)
        for name, item in uns.items():
            _write(group, f"uns/{name}", item, path)


def _write(group: zarr.Group, name: str, value: Any, path: Path | None) -> None:
    try:
        anndata.io.write_elem(group, name, value)
    except OSError:
        raise
    except Exception as error:  # anndata raises whatever its writers raise
        raise InputError(
            f"{name} cannot be stored",
            found=f"{type(error).__name__}: {error}",
            do=f"change {name} to plain arrays, numbers and strings, or remove it",
            path=path,
        ) from error


def storable(frame: pd.DataFrame, name: str, path: Path | None) -> pd.DataFrame:
    """A table in types that AnnData writes to Zarr.

    Numbers and booleans stay; strings, dates and other values with a text become categories of
    strings.

    Raises
    ------
    InputError
        A column mixes types, or has a name that cannot be stored.
    """
    out = frame.copy(deep=False)
    bad = [c for c in frame.columns if not isinstance(c, str) or "/" in c or c == "_index"]
    if bad or not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()].tolist()
        raise InputError(
            f"{name} has columns that cannot be stored",
            found=", ".join(map(repr, bad or twice)),
            expected="names that are text without '/', each once",
            do=f"rename them, e.g. adata.{name}.rename(columns=…)",
            path=path,
        )
    if out.index.name in out.columns:
        out.index.name = None
    for column in out.columns:
        series, dtype = out[column], out[column].dtype
        if isinstance(dtype, pd.CategoricalDtype):
            if dtype.categories.dtype.kind not in "Obiuf":
                out[column] = series.cat.rename_categories([str(c) for c in dtype.categories])
        elif pd.api.types.is_object_dtype(dtype):
            out[column] = _object_column(series, name, path)
        elif not pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype):
            out[column] = series.astype(object).map(str, na_action="ignore").astype("category")
        elif pd.api.types.is_float_dtype(dtype):
            out[column] = series.to_numpy(float, na_value=np.nan)
    return out


def _object_column(series: pd.Series[Any], name: str, path: Path | None) -> pd.Series[Any]:
    kinds = {type(value) for value in series.dropna()}
    if kinds and kinds <= {bool, np.bool_}:
        return series.astype("boolean")
    if not kinds <= {str, np.str_}:
        raise InputError(
            f"The {name} column {series.name!r} mixes types and cannot be stored",
            found=", ".join(sorted(kind.__name__ for kind in kinds)),
            expected="strings, numbers, booleans or categories",
            do=f"convert it, e.g. adata.{name}[{series.name!r}].astype(str)",
            path=path,
        )
    return series.astype("category")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a study's metadata (all but the counts and obs), obs, and indptr."""
    return {what: _digest(folder, what) for what in ("metadata", "obs", "indptr")}


def _digest(folder: Path, what: str) -> str:
    if what == "obs":
        return digest_tree([folder / "obs"], folder)
    layers = folder / "layers"
    matrices = [folder / "X", *sorted(p for p in layers.glob("*") if p.is_dir())]
    if what == "indptr":
        return digest_tree([matrix / "indptr" for matrix in matrices], folder)
    small = [p for p in folder.glob("*") if p.name not in ("X", "obs", "layers")]
    small += [m / "indptr" / "zarr.json" for m in matrices]
    for array in (array_folder(m, name) for m in matrices for name in ("indices", "data")):
        tiled = array.suffix == SUFFIX
        small += [array / RECORD, array / "__schema"] if tiled else [array / "zarr.json"]
    small += [p / "zarr.json" for p in [*matrices, layers]]
    return digest_tree(small, folder)


class CSRMatrix:
    """The counts or a layer of one study, read by row range from any number of threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[type[CSRMatrix], tuple[Path]]:
        return CSRMatrix, (self.folder,)  # a worker elsewhere opens it anew

    @functools.cached_property
    def indptr(self) -> npt.NDArray[np.int64]:
        """Row pointers: int64, (n_obs + 1,)."""
        return cast("npt.NDArray[np.int64]", chunks.read_all(self.folder / "indptr"))

    @functools.cached_property
    def _indices(self) -> chunks.ChunkedArray | TileArray:
        return open_array(self.folder, "indices")

    @functools.cached_property
    def _data(self) -> chunks.ChunkedArray | TileArray:
        return open_array(self.folder, "data")

    @property
    def narrow(self) -> bool:
        """Whether columns and values are uint16."""
        return self._indices.dtype == np.uint16 and self._data.dtype == np.uint16

    @property
    def why_stepwise(self) -> str:
        """Why it is not read in one compiled call; nothing where it is."""
        return self._indices.why_stepwise or self._data.why_stepwise

    @property
    def read_overhead(self) -> int:
        """Bytes that a read takes besides twice what it returns: chunks at both ends, scratch."""
        return 4 * max(self._indices.chunk_bytes, self._data.chunk_bytes)

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Values in each range of rows: int64, (n_ranges,)."""
        return self.indptr[stops] - self.indptr[starts]

    def read(self, starts: int | Ints, stops: int | Ints) -> Rows:
        """Rows ``starts`` to ``stops`` (exclusive) of one range or several, checked and decoded."""
        starts, stops = as_ranges(starts, stops)
        low, high = self.indptr[starts], self.indptr[stops]
        return (
            row_pointers(self.indptr, starts, stops),
            self._indices.read(low, high),
            self._data.read(low, high),
        )


def how_read(reasons: Mapping[str, str]) -> str:
    """How rows are read, in words, from ``why_stepwise`` of each study."""
    slow = {name: why for name, why in reasons.items() if why}
    fast = "fast: chunks are read, checked and decoded in one compiled call"
    if not slow:
        return fast
    why = "; ".join(sorted(set(slow.values())))
    if len(slow) == len(reasons):
        return f"step by step: chunks are decoded one after the other, because {why}"
    return f"{fast}; of {', '.join(slow)} step by step, because {why}"


class ZarrStudy:
    """Reads one study; safe to use from several threads.

    Parameters
    ----------
    root
        The store.
    entry
        The study, as the manifest has it.
    """

    def __init__(self, root: Path, entry: StudyEntry) -> None:
        self._root = root
        self.folder = root / entry.path
        self.entry = entry
        self.counts = CSRMatrix(self.folder / "X")

    def __reduce__(self) -> tuple[type[ZarrStudy], tuple[Path, StudyEntry]]:
        return ZarrStudy, (self._root, self.entry)  # a worker process opens it anew

    def check(self, what: str) -> None:
        """Compare the digest of ``"metadata"``, ``"obs"`` or ``"indptr"`` with the manifest's.

        Raises
        ------
        CorruptStoreError
            A file is missing or is not what was written.
        """
        found = _digest(self.folder, what)
        if found != self.entry.digests[what]:
            raise CorruptStoreError(
                f"The {what} of study {self.entry.name!r} is not what was written",
                found=f"SHA-256 {found[:16]}…",
                expected=f"SHA-256 {self.entry.digests[what][:16]}…",
                do=RESTORE,
                path=self.folder,
            )

    @functools.cached_property
    def _group(self) -> zarr.Group:
        try:
            return zarr.open_group(self.folder, mode="r")
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise CorruptStoreError(
                f"The metadata of study {self.entry.name!r} is missing or damaged",
                found=str(error),
                do=RESTORE,
                path=self.folder,
            ) from error

    def obs(self) -> pd.DataFrame:
        """The study's obs, in stored order, indexed by row name; as annotated since."""
        self.check("obs")
        frame: pd.DataFrame = anndata.io.read_elem(self._group["obs"])
        if "obs" in self.entry.parts:
            for name, values in obs_part.read(self._root, self.entry.parts["obs"]).items():
                frame[name] = values
        return frame

    def table(self, name: str) -> Any:
        """Another small element of the AnnData: ``"var"``, ``"obsm"``, ``"uns"``."""
        self.check("metadata")
        return anndata.io.read_elem(self._group[name])

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers kept with the study."""
        return tuple(sorted(p.name for p in (self.folder / "layers").glob("*") if p.is_dir()))

    def layer(self, name: str) -> CSRMatrix:
        """A layer kept with the study."""
        return CSRMatrix(self.folder / "layers" / name)
