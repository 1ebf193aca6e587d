"""Joining the obs tables of several studies into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from atlas.errors import MissingColumnError, listed


def join_obs(
    frames: Sequence[pd.DataFrame],
    own: Mapping[str, pd.Categorical],
    columns: Sequence[str] | None,
    path: Path,
) -> pd.DataFrame:
    """Stack obs tables; a column that a table does not have is missing in its rows.

    Parameters
    ----------
    frames
        One table per study.
    own
        Columns of the store itself, over all rows; one that an input has already is left out.
    columns
        The columns wanted; all when None.
    path
        The store, for messages.
    """
    there = list(dict.fromkeys(column for frame in frames for column in frame.columns))
    own = {name: values for name, values in own.items() if name not in there}
    wanted = [*there, *own] if columns is None else list(columns)
    if unknown := [column for column in wanted if column not in there and column not in own]:
        raise MissingColumnError(
            "The store has no such obs column",
            found=", ".join(map(repr, unknown)),
            expected="one of " + listed([*there, *own], unknown[0]),
            path=path,
        )
    index = pd.Index([name for frame in frames for name in frame.index], dtype=object)
    values: dict[str, Any] = {}
    for column in wanted:
        if column in own:
            values[column] = own[column]
        else:
            values[column] = _stack([f.get(column) for f in frames], [len(f) for f in frames])
    return pd.DataFrame(values, index=index, columns=wanted)


def _stack(parts: Sequence[pd.Series[Any] | None], lengths: Sequence[int]) -> Any:
    """One column of several tables; where a table lacks it, its rows are missing values.

    Numbers and booleans stay what they are, in pandas' nullable types where rows are missing.
    Anything else, and columns whose kinds disagree, become categories of strings, united in the
    order they are met.
    """
    given = [part for part in parts if part is not None]
    if len(parts) == 1:
        return given[0].array
    kinds = {kind_of(part) for part in given}
    whole = len(given) == len(parts) and not any(part.isna().any() for part in given)
    if kinds == {"float"} or kinds == {"float", "integer"}:
        pieces = [
            np.full(n, np.nan) if part is None else part.to_numpy(float, na_value=np.nan)
            for part, n in zip(parts, lengths, strict=True)
        ]
        return np.concatenate(pieces)
    if kinds in ({"integer"}, {"boolean"}) and whole:
        return np.concatenate([part.to_numpy() for part in given])
    if kinds in ({"integer"}, {"boolean"}):
        dtype: Any = "Int64" if kinds == {"integer"} else "boolean"
        filled = [
            pd.Series(pd.NA, range(n), dtype=dtype) if part is None else part.astype(dtype)
            for part, n in zip(parts, lengths, strict=True)
        ]
        return pd.concat(filled, ignore_index=True).array
    names: dict[str, None] = {}
    values = []
    for part, n in zip(parts, lengths, strict=True):
        if part is None:
            values.append(np.full(n, None, object))
            continue
        text = part.astype(object).where(part.notna(), None).map(str, na_action="ignore")
        if isinstance(part.dtype, pd.CategoricalDtype):
            names.update(dict.fromkeys(map(str, part.cat.categories)))
        else:
            names.update(dict.fromkeys(text.dropna()))
        values.append(text.to_numpy(object))
    return pd.Categorical(np.concatenate(values), categories=list(names))


def kind_of(part: pd.Series[Any]) -> str:
    """``"boolean"``, ``"integer"``, ``"float"``, or ``"other"``."""
    if pd.api.types.is_bool_dtype(part.dtype):
        return "boolean"
    if pd.api.types.is_integer_dtype(part.dtype):
        return "integer"
    return "float" if pd.api.types.is_float_dtype(part.dtype) else "other"
