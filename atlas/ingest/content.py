"""What the readers of formats give: the parts of a file, and blocks of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from atlas.errors import InputError, MissingColumnError
from atlas.ingest.matrix import Matrix

OpenMatrix = Callable[[], Matrix]


@dataclass(frozen=True, slots=True)
class CountsBlock:
    """Consecutive rows of raw counts in input order, as CSR without zeros.

    Attributes
    ----------
    indptr
        int64, (n_rows + 1,), starting at 0.
    indices
        Column of each count: int32, (nnz,), strictly rising within a row.
    data
        Counts: uint32, (nnz,), none of them zero.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    data: npt.NDArray[np.uint32]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1


@dataclass(frozen=True, slots=True)
class LayerBlock:
    """Consecutive rows of a layer in input order, as CSR without zeros.

    Attributes
    ----------
    indptr
        int64, (n_rows + 1,), starting at 0.
    indices
        Column of each value: int32, (nnz,), strictly rising within a row.
    data
        (nnz,), float32, or the integer type of the layer.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    data: npt.NDArray[Any]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1


class LazyArrays(Mapping[str, npt.NDArray[Any]]):
    """Arrays by name, each read when it is asked for and not kept."""

    def __init__(self, readers: Mapping[str, Callable[[], npt.NDArray[Any]]]) -> None:
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Read one array."""
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._readers)

    def __len__(self) -> int:
        """Count the names."""
        return len(self._readers)


@dataclass(frozen=True)
class Content:
    """What a reader of one format finds in a file.

    Attributes
    ----------
    name
        What messages call the input: its path or ``AnnData in memory``.
    path
        The file, if it is one.
    obs, var
        Tables of rows and genes.
    obsm, uns
        Arrays per row, and ``spatial`` where there is such a key.
    counts
        The matrix that is to hold raw counts.
    layers
        All layers that have the genes of ``var``, each opened when it is needed.
    elsewhere
        Other matrices of the input that may hold the counts, by the advice that selects them.
    notes
        What the user should know about the choice.
    close
        Gives the file back.
    stamp
        A text that changes when the counts do; by default of the file's size and time.
    digest
        A digest of the counts, as far as it is cheap; by default the stamp.
    """

    name: str
    path: Path | None
    obs: pd.DataFrame
    var: pd.DataFrame
    obsm: Mapping[str, npt.NDArray[Any]]
    uns: Mapping[str, Any]
    counts: Matrix
    layers: Mapping[str, OpenMatrix]
    elsewhere: Mapping[str, OpenMatrix]
    notes: tuple[str, ...] = ()
    close: Callable[[], None] = lambda: None
    stamp: Callable[[], str] | None = None
    digest: Callable[[], str] | None = None


def stamp(path: Path) -> str:
    """Size and time of a file."""
    try:
        stat = path.stat()
    except OSError:
        return "none"
    return f"{stat.st_size} {stat.st_mtime_ns}"


def obsm_array(value: Any) -> npt.NDArray[Any]:
    """An entry of obsm as a plain array, whatever it is kept as."""
    if isinstance(value, pd.DataFrame):
        return value.to_numpy()
    if sp.issparse(value):
        dense: npt.NDArray[Any] = value.toarray()
        return dense
    return np.asarray(value)


def missing_layer(
    layer: str, layers: Mapping[str, Any], name: str, path: Path | None
) -> MissingColumnError:
    """The error for a layer that is not there."""
    return MissingColumnError(
        f"{name} has no layer {layer!r}",
        found=", ".join(map(repr, layers)) or "no layers",
        expected=f"a layer named {layer!r}",
        do="name one of those found, or leave the layer out to read X",
        path=path,
    )


def missing_raw(name: str, path: Path | None) -> InputError:
    """The error for an AnnData without ``raw``."""
    return InputError(
        f"{name} has no raw",
        found="no raw.X",
        expected="counts in raw.X",
        do="leave out --use-raw to read X, or name a layer with --layer",
        path=path,
    )


def elsewhere(
    layers: Mapping[str, OpenMatrix],
    x: OpenMatrix | None,
    raw: OpenMatrix | None,
    chosen: OpenMatrix,
) -> dict[str, OpenMatrix]:
    """Matrices beside the chosen one, by the advice that selects them."""
    advice: dict[str, OpenMatrix] = {}
    if raw is not None:
        advice["raw.X holds counts: add --use-raw (use_raw=True in Python)"] = raw
    for name, layer in layers.items():
        selects = f"add --layer {name} (layer={name!r} in Python)"
        advice[f"layers[{name!r}] holds counts: {selects}"] = layer
    if x is not None:
        advice["X holds counts: leave out --layer and --use-raw"] = x
    return {text: matrix for text, matrix in advice.items() if matrix is not chosen}
