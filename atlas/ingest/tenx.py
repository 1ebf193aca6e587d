"""Feature-barcode matrices of 10x Genomics (.h5), of Cell Ranger 2 and of 3 and later.

Layout: 10x Genomics, "Feature-barcode matrices HDF5 format"; genes × barcodes by columns, which is
barcodes × genes by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import InputError
from atlas.ingest.content import Content, LazyArrays
from atlas.ingest.matrix import Budget, CsrMatrix, Matrix, Place, Rows, select_columns

_MATRIX = {"barcodes", "data", "indices", "indptr", "shape"}
_LEGACY = _MATRIX | {"genes", "gene_names"}
GENES = "Gene Expression"


def is_tenx(file: h5py.File) -> bool:
    """Whether an HDF5 file has the groups of a 10x matrix."""
    return "matrix" in file or bool(_genomes(file))


def read_tenx(file: h5py.File, path: Path, *, feature_type: str) -> Content:
    """Find counts and tables in an open file; counts are not read yet.

    Raises
    ------
    InputError
        Where a part is missing or damaged, there is no feature of the type, or an old file
        holds several genomes.
    """
    if "matrix" in file:
        group, var = file["matrix"], _features(file["matrix"], path)
    else:
        group, var = _legacy(file, path)
    missing = sorted(_MATRIX - set(group))
    if missing:
        raise _damaged(path, f"{group.name} without {', '.join(missing)}")

    n_features, n_barcodes = (int(size) for size in group["shape"][:2])
    place = Place(f"the matrix {group.name}", path)
    matrix: Matrix = CsrMatrix(
        group["data"], group["indices"], group["indptr"], (n_barcodes, n_features), place
    )
    if len(var) != n_features:
        raise _damaged(path, f"{len(var):,} features for {n_features:,} columns")
    return content_of_type(
        path, pd.DataFrame(index=_strings(group["barcodes"])), var, matrix, feature_type, file.close
    )


def content_of_type(
    path: Path,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    matrix: Matrix,
    feature_type: str,
    close: Callable[[], None] = lambda: None,
) -> Content:
    """The features of one type; a note names the others.

    Raises
    ------
    InputError
        There are none of this type.
    """
    types = var["feature_types"].astype(str)
    keep = (types == feature_type).to_numpy()
    numbers = types.value_counts(sort=False)
    if not keep.any():
        raise InputError(
            f"{path} has no features of type {feature_type!r}",
            found=", ".join(f"{n:,} {kind!r}" for kind, n in numbers.items()) or "no features",
            expected=f"features of type {feature_type!r}",
            do="name one of the types found as the feature type",
            path=path,
        )
    notes = []
    if not keep.all():
        matrix = _SelectedColumns(matrix, keep)
        left = ", ".join(f"{n:,} {kind}" for kind, n in numbers.items() if kind != feature_type)
        notes.append(f"{path}: features of other types were left out: {left}")
    return Content(
        name=str(path),
        path=path,
        obs=obs,
        var=var[keep],
        obsm=LazyArrays({}),
        uns={},
        counts=matrix,
        layers={},
        elsewhere={},
        notes=tuple(notes),
        close=close,
    )


class _SelectedColumns(Matrix):
    """Some columns of a matrix, in their order."""

    def __init__(self, matrix: Matrix, keep: npt.NDArray[np.bool_]) -> None:
        super().__init__((matrix.shape[0], int(keep.sum())), matrix.dtype, matrix.place)
        self._matrix = matrix
        self._columns = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)

    def row_blocks(self, budget: Budget) -> Iterator[Rows]:
        for rows in self._matrix.row_blocks(budget):
            yield select_columns(rows, self._columns)

    def ranges(self, budget: Budget) -> list[tuple[int, int]] | None:
        return self._matrix.ranges(budget)

    def rows(self, start: int, stop: int) -> Rows:
        return select_columns(self._matrix.rows(start, stop), self._columns)

    def sample(self) -> npt.NDArray[Any]:
        return self._matrix.sample()


def _features(group: h5py.Group, path: Path) -> pd.DataFrame:
    """Features of Cell Ranger 3 and later, with the column names that scanpy gives them."""
    names = set(group["features"]) if "features" in group else set()
    missing = sorted({"id", "name", "feature_type"} - names)
    if missing:
        raise _damaged(path, f"/matrix/features without {', '.join(missing)}")
    features = group["features"]
    probes = "gene_id" in names
    columns = {"gene_ids": _strings(features["gene_id" if probes else "id"])}
    if probes:
        columns["probe_ids"] = _strings(features["id"])
    columns["feature_types"] = _strings(features["feature_type"])
    known = {"id", "name", "gene_id", "feature_type", "_all_tag_keys"}
    for name in sorted(names - known):
        if isinstance(features[name], h5py.Dataset):
            columns[name] = _strings(features[name])
    return _frame(columns, _strings(features["name"]), path)


def _legacy(file: h5py.File, path: Path) -> tuple[h5py.Group, pd.DataFrame]:
    genomes = _genomes(file)
    if len(genomes) > 1:
        raise InputError(
            f"{path} holds more than one genome",
            found=", ".join(genomes),
            expected="one genome",
            do="write each to a file of its own: scanpy.read_10x_h5(path, genome=…).write_h5ad(…)",
            path=path,
        )
    group = file[genomes[0]]
    ids, names = _strings(group["genes"]), _strings(group["gene_names"])
    columns = {
        "gene_ids": ids,
        "feature_types": np.full(len(ids), GENES, object),
        "genome": np.full(len(ids), genomes[0], object),
    }
    return group, _frame(columns, names, path)


def _genomes(file: h5py.File) -> list[str]:
    """Groups that look like a matrix of Cell Ranger 2."""
    return [
        name
        for name, group in file.items()
        if isinstance(group, h5py.Group) and set(group) >= _LEGACY
    ]


def _frame(columns: dict[str, npt.NDArray[Any]], names: Any, path: Path) -> pd.DataFrame:
    wrong = [name for name, values in columns.items() if len(values) != len(names)]
    if wrong:
        raise _damaged(path, f"{wrong[0]} of another length than the gene names")
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


def _strings(dataset: h5py.Dataset) -> npt.NDArray[Any]:
    """Text as str, of fixed or variable length; anything else as it is."""
    values = dataset[()]
    if values.dtype.kind not in "SO":
        return np.asarray(values)
    return np.array(
        [value.decode() if isinstance(value, bytes) else value for value in values], object
    )


def _damaged(path: Path, found: str) -> InputError:
    return InputError(
        f"{path} is not a complete 10x matrix",
        found=found,
        expected="the groups that Cell Ranger writes",
        do="copy or download the file again",
        path=path,
    )
