"""Codes of batches and labels: names that are only ever added to, and the code of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import InputError, MissingColumnError, listed

Codes: TypeAlias = npt.NDArray[np.int64]


def text_of(value: object) -> str:
    """A value of obs as text; 1.0 is 1, since a column of integers with a gap has become floats."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def obs_column(obs: pd.DataFrame, key: str, what: str, path: Path | None) -> pd.Series[Any]:
    """A column of obs that holds the ``batch`` or the ``label``.

    Raises
    ------
    MissingColumnError
        There is none.
    """
    if key not in obs:
        raise MissingColumnError(
            f"There is no obs column for the {what}",
            found=repr(key),
            expected="one of " + (listed(obs.columns, key) or "(there are none)"),
            do=f"name the column with --{what}-key ({what}_key= in Python), or leave it out",
            path=path,
        )
    return obs[key]


def batch_names(
    columns: Mapping[str, pd.Series[Any]], n_obs: int, study: str, path: Path | None
) -> tuple[list[str | None], Codes]:
    """Names of the batches of a study, and which of them each row is in.

    Parameters
    ----------
    columns
        Of obs by name; those of several are combined. The study is one batch without any.
    n_obs, study, path
        Its rows, its name, and its file for messages.

    Raises
    ------
    InputError
        A row has no batch.
    """
    codes = np.zeros(n_obs, np.int64)
    combined: list[str] = []
    for key, column in columns.items():
        own, values = pd.factorize(column)
        if missing := int((own < 0).sum()):
            raise InputError(
                "Some cells have no batch",
                found=f"{missing} missing values in obs column {key!r}",
                expected="a batch for every cell",
                do="fill the column in, or drop these cells",
                path=path,
            )
        texts = [text_of(value) for value in values]
        codes = codes * len(values) + own
        combined = [f"{a}|{b}" for a in combined for b in texts] or texts
        # only combinations that occur, so that many keys do not multiply
        occurring, codes = np.unique(codes, return_inverse=True)
        combined = [combined[i] for i in occurring]
    return [f"{study}/{name}" for name in combined] or [study], codes


def label_names(
    column: pd.Series[Any] | None, n_obs: int, unlabeled: str
) -> tuple[list[str | None], Codes]:
    """Names of the labels in a column, None for unlabeled ones, and that of each row."""
    if column is None:
        return [None], np.zeros(n_obs, np.int64)
    codes, values = pd.factorize(column)
    texts = [text_of(value) for value in values]
    names = [None if text.strip() in ("", unlabeled) else text for text in texts]
    return [*names, None], codes.astype(np.int64)  # -1, a missing value, is the last


def extend(
    names: tuple[str, ...], own: Sequence[str | None], codes: Codes
) -> tuple[tuple[str, ...], npt.NDArray[np.int32]]:
    """Codes by append-only names; new names come in alphabetical order, None is -1.

    Parameters
    ----------
    names
        Names so far.
    own, codes
        Names in this study, and which of them each row has.
    """
    new = {name for name in own if name is not None} - set(names)
    names = (*names, *sorted(new))
    code = {name: i for i, name in enumerate(names)}
    table = np.array([-1 if name is None else code[name] for name in own], np.int32)
    return names, table[codes]
