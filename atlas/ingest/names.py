"""Names of rows and genes in the tables of an input: text, each row its own, genes made unique."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
from anndata.utils import make_index_unique

from atlas.errors import InputError


def named(table: pd.DataFrame) -> pd.DataFrame:
    """A copy with names of rows and columns as str; the caller's table stays as it is."""
    table = table.copy()
    table.columns = pd.Index(table.columns.astype(str), dtype=object)
    table.index = pd.Index(table.index.astype(str), dtype=object, name=table.index.name)
    return table


def check_row_names(obs: pd.DataFrame, name: str, path: Path | None) -> None:
    """Refuse an input, called ``name``, in which a row name occurs twice.

    Raises
    ------
    InputError
        It does.
    """
    again = obs.index.duplicated()
    if again.any():
        names = obs.index[again].unique()
        raise InputError(
            f"row names of {name} are not unique",
            found=f"{len(names):,} names that occur more than once: {_few(names)}",
            expected="one name per row",
            do="add the sample to each name, or call adata.obs_names_make_unique() and save",
            path=path,
        )


def make_genes_unique(var: pd.DataFrame, name: str) -> None:
    """Add numbers to gene names of an input that occur twice, in place, with a warning."""
    again = var.index.duplicated()
    if again.any():
        names = var.index[again].unique()
        warnings.warn(
            f"{len(names):,} gene names of {name} occur more than once "
            f"({_few(names)}); numbers were added to make them unique",
            UserWarning,
            stacklevel=4,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ours says it, for the file at hand
            var.index = make_index_unique(var.index)


def _few(names: pd.Index[Any]) -> str:
    return ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "")
