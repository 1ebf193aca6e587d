"""Columns of a study's obs that were added or corrected since: the part ``obs`` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.store.arrays import read_array, read_details, write_part
from atlas.store.schema import Part


def write(root: Path, path: str, columns: Mapping[str, pd.Series[Any]]) -> Part:
    """Write columns as :func:`atlas.store.zarr_study.storable` leaves them, each of all rows."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    about: list[dict[str, Any]] = []
    for i, (name, column) in enumerate(columns.items()):
        known: dict[str, Any] = {"name": name}
        if isinstance(column.dtype, pd.CategoricalDtype):
            kinds = column.cat.categories
            known |= {"categories": kinds.tolist(), "ordered": bool(column.cat.ordered)}
            known["type"] = "str" if kinds.dtype.kind == "O" else str(kinds.dtype)
            arrays[f"column-{i}"] = column.cat.codes.to_numpy(np.int32)
        elif pd.api.types.is_extension_array_dtype(column.dtype):  # nullable
            kind = bool if pd.api.types.is_bool_dtype(column.dtype) else np.int64
            known["nullable"] = True
            arrays[f"column-{i}"] = column.to_numpy(kind, na_value=kind(0))
            arrays[f"missing-{i}"] = column.isna().to_numpy(bool)
        else:
            arrays[f"column-{i}"] = column.to_numpy()
        about.append(known)
    return write_part(root, path, arrays, {"columns": about})


def read(root: Path, part: Part) -> dict[str, Any]:
    """The columns by name, checked against their digests.

    Raises
    ------
    CorruptStoreError
        A file is missing or is not what was written.
    """
    return {
        known["name"]: _column(root, part, i, known)
        for i, known in enumerate(read_details(root, part)["columns"])
    }


def _column(root: Path, part: Part, i: int, known: Mapping[str, Any]) -> Any:
    values = read_array(root, part, f"column-{i}")
    if "categories" in known:
        kind = object if known["type"] == "str" else np.dtype(known["type"])
        categories = pd.Index(known["categories"], dtype=kind)
        return pd.Categorical.from_codes(values, categories=categories, ordered=known["ordered"])
    if "nullable" in known:
        missing = read_array(root, part, f"missing-{i}")
        if values.dtype == bool:
            return pd.arrays.BooleanArray(values, missing)
        return pd.arrays.IntegerArray(values, missing)
    return values
