"""Cells chosen by an obs column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import ConfigError, MissingColumnError
from atlas.store import CountStore, FilesSource
from atlas.store.codes import text_of
from atlas.store.split import Split, ranges_of

Rows = str | Mapping[str, Sequence[str]]
"""Cells chosen by an obs column: ``"study=zheng,pbmc3k"`` or ``{"study": ["zheng", "pbmc3k"]}``."""


RowsOrMask = Rows | npt.NDArray[np.bool_] | None
"""Cells chosen so, or by a mask (n_obs,); all when None."""


def rows_where(store: CountStore | FilesSource, rows: Rows) -> npt.NDArray[np.bool_]:
    """Cells whose obs column has one of some values: bool (n_obs,).

    ``study``, ``batch`` and ``label`` fall back to the store's own where no input has such a
    column.

    Raises
    ------
    ConfigError, MissingColumnError
        The text is not ``column=value,value``; there is no such column; no cell has the value.
    """
    out = np.ones(store.n_obs, bool)
    for column, wanted in _chosen(rows).items():
        texts = texts_of(store, column)
        there = set(texts.dropna())
        values = _values(wanted, there)
        if absent := [value for value in values if value not in there]:
            raise ConfigError(
                f"No cell has this value in obs column {column!r}",
                found=", ".join(absent),
                expected="some of " + ", ".join(sorted(there)[:20]),
                path=store.path,
            )
        out &= texts.isin(values).to_numpy(bool)
    return out


def mask_of(store: CountStore | FilesSource, rows: RowsOrMask) -> npt.NDArray[np.bool_]:
    """Cells chosen by an obs column, or by a mask already, or all: bool (n_obs,).

    Raises
    ------
    ConfigError, MissingColumnError
        The mask is of another length, or as for :func:`rows_where`.
    """
    if rows is None:
        return np.ones(store.n_obs, bool)
    if not isinstance(rows, np.ndarray):
        return rows_where(store, rows)
    if rows.shape != (store.n_obs,) or rows.dtype != bool:
        raise ConfigError(
            "The mask does not fit the store",
            found=f"{rows.dtype} of shape {rows.shape}",
            expected=f"bool of shape ({store.n_obs},)",
            path=store.path,
        )
    return rows


def batches_within(
    store: CountStore | FilesSource, chosen: npt.NDArray[np.bool_]
) -> tuple[tuple[str, ...], npt.NDArray[np.int32]]:
    """Batches that chosen cells have, and the code of each cell's; 0 for cells not chosen."""
    met, own = np.unique(store.obs_codes["batch"][chosen], return_inverse=True)
    codes = np.zeros(store.n_obs, np.int32)
    codes[chosen] = own
    return tuple(store.batches[i] for i in met), codes


def split_within(split: Split, chosen: npt.NDArray[np.bool_]) -> Split:
    """The chosen cells on either side; where none is left to train on, none is held out."""
    held_out = np.zeros(len(chosen), bool)
    for start, stop in split.validation:
        held_out[start:stop] = True
    if not (chosen & ~held_out).any():
        held_out[:] = False
    return Split(ranges_of(chosen & ~held_out), ranges_of(chosen & held_out), [])


def column_of(store: CountStore | FilesSource, column: str) -> pd.Series[Any]:
    """An obs column as it is; columns as in :func:`rows_where`."""
    try:
        return store.obs([column])[column]
    except MissingColumnError:
        if column not in ("study", "batch", "label"):
            raise
        return store.obs([f"atlas_{column}"])[f"atlas_{column}"]


def refuse_measurements(store: CountStore | FilesSource, column: str, what: str) -> None:
    """Refuse a column of numbers with fractions: each cell would be a label, or a group, itself."""
    values = column_of(store, column).dropna()
    if pd.api.types.is_float_dtype(values.dtype) and len(fractions := values[values % 1 != 0]):
        raise ConfigError(
            f"Obs column {column!r} holds measurements, not {what}",
            found=f"{values.nunique():,} different numbers, such as {fractions.iloc[0]:g}",
            expected="a column of names or of whole numbers",
            do="name another column; or cut the numbers into ranges (pandas.cut), and add these "
            "with `atlas annotate`",
            path=store.path,
        )


def texts_of(store: CountStore | FilesSource, column: str) -> pd.Series[Any]:
    """An obs column as text, missing values left missing; columns as in :func:`rows_where`."""
    return column_of(store, column).map(text_of, na_action="ignore").astype(object)


def columns_of(rows: Rows) -> tuple[str, ...]:
    """The obs columns that cells are chosen by."""
    return tuple(_chosen(rows))


def _chosen(rows: Rows) -> dict[str, Any]:
    if isinstance(rows, Mapping):
        return dict(rows)
    column, equals, text = rows.partition("=") if isinstance(rows, str) else ("", "", "")
    if not equals or not text:
        raise ConfigError(
            "Cells are chosen by an obs column",
            found=repr(rows),
            expected="column=value or column=value,value",
        )
    return {column: text}


def _values(wanted: Any, there: set[str]) -> list[str]:
    """Values as text; a text is taken whole if it is a value, else split at its commas."""
    if isinstance(wanted, str):
        return [wanted] if wanted in there else wanted.split(",")
    return [text_of(value) for value in wanted]
