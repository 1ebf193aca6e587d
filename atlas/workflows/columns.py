"""Columns of obs as a model takes them: covariates, size factors, labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import ConfigError, ModelError
from atlas.models import LabelTree
from atlas.models.columns import UNLABELED, ObsColumns
from atlas.store import CountStore, FilesSource
from atlas.training.inputs import CellColumns
from atlas.workflows.rows import refuse_measurements, texts_of


def describe_columns(
    store: CountStore | FilesSource,
    *,
    categorical: Sequence[str] = (),
    continuous: Sequence[str] = (),
    size_factor: str | None = None,
    label: str | None = None,
    unlabeled: str = UNLABELED,
    chosen: npt.NDArray[np.bool_] | None = None,
) -> ObsColumns:
    """Names of columns with the categories that their cells have, or those chosen, sorted."""
    found = []
    for name in categorical:
        texts = texts_of(store, name)
        texts = texts if chosen is None else texts[chosen]
        if texts.isna().any():
            raise _missing(store, name, texts)
        found.append((name, tuple(sorted(set(texts)))))
    return ObsColumns(tuple(found), tuple(continuous), size_factor, label, unlabeled)


def cell_columns(
    store: CountStore | FilesSource,
    columns: ObsColumns,
    labels: LabelTree | None,
    chosen: npt.NDArray[np.bool_] | None = None,
) -> CellColumns:
    """The values of columns for each cell of a store.

    With ``chosen``, bool (n_obs,), the values of other cells may be anything, or missing.

    Raises
    ------
    ConfigError, MissingColumnError, ModelError
        There is no such column, a value is missing or no number, or a category is unknown to the
        model.
    """
    n_obs = store.n_obs
    chosen = np.ones(n_obs, bool) if chosen is None else chosen
    categories = None
    if columns.categorical:
        categories = np.empty((n_obs, len(columns.categorical)), np.int32)
        for i, (name, known) in enumerate(columns.categorical):
            categories[:, i] = _codes(store, name, known, chosen)
    continuous = None
    if columns.continuous:
        found = [_numbers(store, name, chosen) for name in columns.continuous]
        continuous = np.stack(found, axis=1).astype(np.float32)
    size_factor = None
    if columns.size_factor is not None:
        size_factor = _numbers(store, columns.size_factor, chosen).astype(np.float32)
        if not (size_factor[chosen] > 0).all():
            raise ConfigError(
                "A size factor is not above 0",
                found=f"{size_factor[chosen].min()} in obs column {columns.size_factor!r}",
                path=store.path,
            )
    label = None if labels is None else label_codes(store, columns.label, labels)
    return CellColumns(None, label, categories, continuous, size_factor)


def label_codes(
    store: CountStore | FilesSource, column: str | None, labels: LabelTree
) -> npt.NDArray[np.int32]:
    """Node of each cell's label, -1 for none and for labels that the tree does not have."""
    if column is None:
        own = np.append(labels.codes(store.labels), np.int32(-1))
        return own[store.obs_codes["label"]]
    texts = texts_of(store, column).astype("category")
    own = np.append(labels.codes(map(str, texts.cat.categories)), np.int32(-1))
    return own[texts.cat.codes.to_numpy()]


def label_names(
    store: CountStore | FilesSource, column: str | None, unlabeled: str = UNLABELED
) -> list[str]:
    """Labels that cells of a store have, sorted.

    Raises
    ------
    ConfigError, MissingColumnError
        There is no such column, or it has measurements: numbers with fractions.
    """
    if column is None:
        codes = store.obs_codes["label"]
        return sorted(store.labels[i] for i in np.unique(codes[codes >= 0]))
    refuse_measurements(store, column, "labels")
    return sorted(set(texts_of(store, column).dropna()) - {"", unlabeled})


def warn_of_unseen(
    labels: LabelTree | None,
    code: npt.NDArray[np.int32] | None,
    train_rows: Sequence[tuple[int, int]],
    new: int = 0,
) -> None:
    """Warn of labels none of whose cells are trained on, so that none teaches the classifier them.

    Parameters
    ----------
    labels, code
        The tree, and each cell's node of it, -1 for none: int32, (n_obs,).
    train_rows
        Ranges (start, stop) of the rows that are trained on.
    new
        Of nodes from this number on, those that surgery adds.
    """
    if labels is None or code is None:
        return
    trained = np.zeros(len(labels.names), bool)
    for start, stop in train_rows:
        own = code[start:stop]
        trained[own[own >= 0]] = True
    cells = np.bincount(code[code >= 0], minlength=len(labels.names))
    unseen = [i for i in np.flatnonzero(cells) if i >= new and not trained[i]]
    if unseen:
        named = [f"{labels.names[i]} (of {cells[i]:,})" for i in unseen[:5]]
        warnings.warn(
            f"No cell of these labels is trained on: {', '.join(named)}"
            + (", …" if len(unseen) > 5 else "")
            + ". They stay classes, of which the classifier learns nothing. Hold out other cells "
            "(--hold-out), or none (--validation-share 0)",
            UserWarning,
            stacklevel=3,
        )


def _codes(
    store: CountStore | FilesSource,
    name: str,
    known: tuple[str, ...],
    chosen: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int32]:
    """Code of each cell's category; 0 for cells that are not chosen and have none of them."""
    texts = texts_of(store, name)
    codes = pd.Categorical(texts, categories=list(known)).codes.astype(np.int32)
    codes[~chosen & (codes < 0)] = 0
    texts = texts[chosen]
    if (codes < 0).any():
        if texts.isna().any():
            raise _missing(store, name, texts)
        unknown = sorted(set(texts[codes[chosen] < 0]))
        raise ModelError(
            f"Obs column {name!r} has values that the model was not trained on",
            found=", ".join(unknown[:5]),
            expected="some of " + ", ".join(known[:10]),
            path=store.path,
        )
    return codes


def _numbers(
    store: CountStore | FilesSource, name: str, chosen: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Number of each cell; 1 for cells that are not chosen and have none."""
    values = pd.to_numeric(store.obs([name])[name], errors="coerce").to_numpy(np.float64).copy()
    values[~chosen & ~np.isfinite(values)] = 1.0
    if not np.isfinite(values).all():
        raise ConfigError(
            f"Obs column {name!r} is not a number for each cell",
            found=f"{int((~np.isfinite(values)).sum())} cells without one",
            expected="finite numbers",
            path=store.path,
        )
    return values


def _missing(store: CountStore | FilesSource, name: str, texts: pd.Series[str]) -> ConfigError:
    return ConfigError(
        f"Obs column {name!r} has no value for some cells",
        found=f"{int(texts.isna().sum())} cells without one",
        do="fill them in with `atlas annotate`, or leave the covariate out",
        path=store.path,
    )


def check_unlabeled(store: CountStore | FilesSource, columns: ObsColumns) -> None:
    """Refuse a value for no label that nothing would come of."""
    if columns.label is None:
        raise ConfigError(
            "unlabeled is of a column of labels, and none is named",
            found=f"unlabeled={columns.unlabeled!r} with the store's own labels",
            do="name the column with label_key (--label-key); of the store's own labels it is "
            "said when they are ingested or annotated",
        )
    texts = texts_of(store, columns.label)
    if columns.unlabeled not in set(texts):
        met = sorted(set(texts.dropna()))
        raise ConfigError(
            f"No cell has the value that stands for no label in obs column {columns.label!r}",
            found=f"unlabeled={columns.unlabeled!r}",
            expected="one of " + ", ".join(met[:10]) + (", …" if len(met) > 10 else ""),
            path=store.path,
        )
