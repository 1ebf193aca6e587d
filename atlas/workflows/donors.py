"""Where the cells of a store have names of donors, and what of it the names of batches tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.config import BatchNames
from atlas.errors import ConfigError
from atlas.hub.donors import (
    Donors,
    is_donor_column,
    neutral_batches,
    told_batches,
    with_batches,
    without_covariates_of_donors,
)
from atlas.models import TrainedModel
from atlas.store import CountStore
from atlas.store.codes import text_of
from atlas.workflows.rows import texts_of

_TRIED = 1000
"""Cells of a study by which the column of its batches is found."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Disguised:
    """A model as it may leave.

    Attributes
    ----------
    model
        Its batches and covariates, by names that do not tell of donors who were not named.
    batches
        New names of batches, by their names.
    said
        What is to be said of it, by the line of the listing that it belongs to.
    """

    model: TrainedModel
    batches: dict[str, str]
    said: dict[str, str]


def disguise(
    store: CountStore,
    model: TrainedModel,
    rows: Mask,
    *,
    named: Sequence[str],
    batch_names: BatchNames,
) -> Disguised:
    """Take names of donors from a model's batches and covariates, but for those that were named.

    Parameters
    ----------
    store, model, rows
        What is shared: bool (n_obs,).
    named
        Obs columns that were named for sharing.
    batch_names
        Which names of batches leave.

    Raises
    ------
    ConfigError
        There is no such choice of names.
    """
    if batch_names not in get_args(BatchNames):
        raise ConfigError(
            "There is no such choice of names of batches",
            found=repr(batch_names),
            expected=" or ".join(map(repr, get_args(BatchNames))),
        )
    sources = _sources(store, rows)
    donors = _donors(store, rows, [c for c in named if c in sources or is_donor_column(c)])
    told = told_batches(model, donors)
    chosen = {"no-donors": told, "all": [], "none": list(model.batches)}[batch_names]
    new = neutral_batches(model.batches, set(chosen), model.studies)
    said: dict[str, str] = {}
    notes = _notes(batch_names, told, new, sources or list(donors.columns))
    if not new and not told and (pairs := _one_to_one(store, rows, donors.columns)):
        notes.append(
            f"{pairs}; if their names tell whose they are, replace them: --batch-names none"
        )
    gone = [name for name in model.studies if name not in store.studies]
    known = [name.partition("/")[0] for name in model.batches if name not in new]
    if left := [name for name in gone if name in known]:
        notes.append(
            f"of studies that are not in the store ({', '.join(left[:5])}) nothing is known of "
            "donors here"
        )
    if notes:
        said["batches"] = "; ".join(notes)
    if alike := [name for name in model.studies if donors.told([name], name)[0]]:
        said["studies"] = f"named as donors are, and leave: {', '.join(alike[:5])}"
    disguised, lost = without_covariates_of_donors(model, donors, named)
    for column, n in lost.items():
        said[f"covariate {column}"] = (
            f"{n:,} values look like donors and are replaced; --obs-columns {column} gives them "
            "away"
        )
    return Disguised(with_batches(disguised, new), new, said)


def _notes(
    batch_names: BatchNames, told: Sequence[str], new: Mapping[str, str], columns: Sequence[str]
) -> list[str]:
    """What is said of names of batches: of donors they are, of which obs columns, and leave or not.

    ``told`` are those that look like donors, ``new`` has those that are replaced.
    """
    if not told:
        return [f"{len(new):,} names are replaced"] if new else []
    source = f", from obs column {', '.join(columns)}," if columns else ""
    look = f"{len(told):,} of the names{source} look like donors"
    if batch_names == "all":
        return [f"{look}, and leave by --batch-names all"]
    look += ": these are replaced, so none leaves"
    if batch_names == "no-donors":
        column = f"--obs-columns {columns[0]}, or " if columns else ""
        look += f" (to give them away: {column}--batch-names all)"
    return [look]


def _donors(store: CountStore, rows: Mask, named: Sequence[str]) -> Donors:
    """Names of donors by study, in columns that were named, and in others but not in these."""
    of_donors = [str(column) for column in store.obs().columns if is_donor_column(str(column))]
    others = tuple(column for column in of_donors if column not in named)
    given = _by_study(store, rows, named)
    hidden = {
        study: names - given.get(study, frozenset())
        for study, names in _by_study(store, rows, others).items()
    }
    return Donors(hidden, given, others)


def _by_study(store: CountStore, rows: Mask, columns: Sequence[str]) -> dict[str, frozenset[str]]:
    """The values that cells of each study have in some columns."""
    study = store.obs_codes["study"][rows]
    found: dict[str, set[str]] = {}
    for column in columns:
        pairs = pd.DataFrame({"study": study, "name": texts_of(store, column)[rows].to_numpy()})
        for code, name in pairs.dropna().drop_duplicates().itertuples(index=False):
            if name:
                found.setdefault(store.studies[code], set()).add(name)
    return {study: frozenset(names) for study, names in found.items()}


def _sources(store: CountStore, rows: Mask) -> list[str]:
    """The obs columns whose values names of batches are, those of donors first."""
    obs, codes = store.obs(), store.obs_codes
    found: dict[str, None] = {}
    for study in np.unique(codes["study"][rows]):
        own = np.flatnonzero(rows & (codes["study"] == study))
        own = own[np.linspace(0, len(own) - 1, min(_TRIED, len(own))).astype(np.int64)]
        parts = [store.batches[code].partition("/")[2] for code in codes["batch"][own]]
        wholes = [[part] for part in parts]
        pieces = [part.split("|") for part in parts]
        for column in obs.columns:
            if str(column).startswith("atlas_"):
                continue
            texts = obs[column].iloc[own].map(text_of, na_action="ignore")
            if any(_has(texts, names) for names in (wholes, pieces)):
                found[str(column)] = None
    return sorted(found, key=lambda column: not is_donor_column(column))


def _has(texts: pd.Series[Any], names: list[list[str]]) -> bool:
    """Whether the values are the n-th name of each cell, for some n."""
    n = min(map(len, names))
    return any(all(t == own[i] for t, own in zip(texts, names, strict=True)) for i in range(n))


def _one_to_one(store: CountStore, rows: Mask, columns: Sequence[str]) -> str:
    """In words, the first study whose batches are one donor each; "" where there is none."""
    codes = store.obs_codes
    for column in columns:
        pairs = pd.DataFrame(
            {
                "study": codes["study"][rows],
                "batch": codes["batch"][rows],
                "donor": texts_of(store, column)[rows].to_numpy(),
            }
        )
        for study, own in pairs.dropna().drop_duplicates().groupby("study"):
            if len(own) > 1 and own["batch"].is_unique and own["donor"].is_unique:
                return (
                    f"each batch of {store.studies[int(str(study))]} is one donor of obs column "
                    f"{column}"
                )
    return ""
