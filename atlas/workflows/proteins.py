"""Proteins kept with a store, as an embedding of the cells that have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError
from atlas.evaluation.proteins import are_counts, centred_log_ratio
from atlas.store import CountStore


def proteins_of(store: CountStore, name: str) -> npt.NDArray[np.float32]:
    """An obsm array of proteins in store order, rows of NaN for studies without it.

    Whole numbers from 0 are counts, and become centred log ratios, as in the scVI paper; other
    values are taken as they are.

    Returns
    -------
    float32, (n_obs, n_proteins).

    Raises
    ------
    ConfigError
        No study has it, or studies have different proteins.
    """
    tables = [store.study(study).table("obsm") for study in store.studies]
    found: dict[str, npt.NDArray[Any]] = {
        study: np.asarray(table[name], dtype=np.float64).reshape(len(table[name]), -1)
        for study, table in zip(store.studies, tables, strict=True)
        if name in table
    }
    if not found:
        there = sorted({key for table in tables for key in table})
        raise ConfigError(
            "no study has proteins of this name in obsm",
            found=name,
            expected="one of " + ", ".join(there) if there else "a study ingested with obsm",
            path=store.path,
        )
    widths = {study: values.shape[1] for study, values in found.items()}
    if len(set(widths.values())) > 1:
        raise ConfigError(
            "studies have different proteins",
            found=", ".join(f"{study}: {width}" for study, width in widths.items()),
            expected="as many in each, in the same order",
            path=store.path,
        )
    # NaN is a cell without proteins, not a value that makes the others no counts.
    counts = all(are_counts(values[~np.isnan(values).any(axis=1)]) for values in found.values())
    out = np.full((store.n_obs, next(iter(widths.values()))), np.nan, np.float32)
    for study, values in found.items():
        rows = store.obs_codes["study"] == store.studies.index(study)
        out[rows] = centred_log_ratio(values) if counts else values
    return out
