"""Cells chosen by an obs column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError, MissingColumnError
from atlas.store import (
    CountStore,
)

Rows = str | Mapping[str, Sequence[str]]
"""Cells chosen by an obs column: ``"study=zheng,pbmc3k"`` or ``{"study": ["zheng", "pbmc3k"]}``."""


def rows_where(store: CountStore, rows: Rows) -> npt.NDArray[np.bool_]:
    """Cells whose obs column has one of some values: bool (n_obs,).

    ``study``, ``batch`` and ``label`` fall back to the store's own where no input has such a
    column.

    Raises
    ------
    ConfigError, MissingColumnError
        The text is not ``column=value,value``; there is no such column; no cell has the value.
    """
    if isinstance(rows, str):
        column, equals, text = rows.partition("=")
        if not equals or not text:
            raise ConfigError(
                "Cells are chosen by an obs column",
                found=repr(rows),
                expected="column=value or column=value,value",
            )
        chosen: dict[str, Sequence[str]] = {column: text.split(",")}
    else:
        chosen = dict(rows)
    out = np.ones(store.n_obs, bool)
    for column, values in chosen.items():
        try:
            found = store.obs([column])[column]
        except MissingColumnError:
            if column not in ("study", "batch", "label"):
                raise
            found = store.obs([f"atlas_{column}"])[f"atlas_{column}"]
        text_values = found.astype(str)
        there = set(text_values)
        if absent := [value for value in values if value not in there]:
            raise ConfigError(
                f"No cell has this value in obs column {column!r}",
                found=", ".join(absent),
                expected="some of " + ", ".join(sorted(there)[:20]),
                path=store.path,
            )
        out &= text_values.isin(list(values)).to_numpy()
    return out
