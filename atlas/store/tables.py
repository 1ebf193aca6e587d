"""Joining the obs tables of several studies into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from atlas.errors import MissingColumnError


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
            expected="one of " + ", ".join([*there, *own]),
            path=path,
        )
    index = pd.Index([name for frame in frames for name in frame.index], dtype=object)
    values: dict[str, Any] = {}
    for column in wanted:
        if column in own:
            values[column] = own[column]
        else:
            parts = [f[column] if column in f else pd.Series(pd.NA, f.index) for f in frames]
            values[column] = _stack(parts)
    return pd.DataFrame(values, index=index, columns=wanted)


def _stack(parts: Sequence[pd.Series[Any]]) -> Any:
    """One column of several tables; categories are united in the order they are met."""
    given = [part for part in parts if not part.isna().all()]
    if given and all(isinstance(part.dtype, pd.CategoricalDtype) for part in given):
        names = dict.fromkeys(name for part in given for name in part.cat.categories)
        values = np.concatenate([part.astype(object).to_numpy(object) for part in parts])
        return pd.Categorical(values, categories=list(names))
    if len(parts) == 1:
        return parts[0].array
    if given and len({part.dtype for part in given}) == 1 and len(given) < len(parts):
        parts = [part if len(part.dropna()) else part.astype(object) for part in parts]
    return pd.concat(parts, ignore_index=True).infer_objects().array
