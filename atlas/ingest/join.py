"""Joining the tables of several inputs into those of one study."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData

from atlas.errors import InputError
from atlas.ingest.base import CountsSource
from atlas.ingest.genes import GeneTable, align

_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Tables:
    """What of an input is kept in memory after it was closed."""

    name: str
    obs: pd.DataFrame
    var: pd.DataFrame
    obsm: Mapping[str, tuple[int, ...]]
    uns: Mapping[str, Any]
    layers: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, counts: CountsSource, name: str) -> Self:
        """Take them from an open input."""
        shapes = {key: array.shape[1:] for key, array in counts.obsm.items()}
        return cls(name, counts.obs, counts.var, shapes, counts.uns, counts.layers, counts.notes)


def labels(sources: Sequence[Path | AnnData]) -> list[str]:
    """A short name of each input: the file's without its ending, with folders where needed.

    Raises
    ------
    InputError
        A file is given twice.
    """
    parts = [
        (f"input{i}",) if isinstance(source, AnnData) else source.absolute().with_suffix("").parts
        for i, source in enumerate(sources)
    ]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    paths = [str(source) for source in sources]
    raise InputError(
        "Two inputs of the study cannot be told apart by name",
        found=_few([path for i, path in enumerate(paths) if names.count(names[i]) > 1]),
        expected="files whose names differ by more than their ending, each once",
        do="name each file once",
    )


def prefixed(label: str, names: pd.Index[Any]) -> pd.Index[Any]:
    """Row names with the name of their file before them."""
    return pd.Index([f"{label}:{name}" for name in names], dtype=object, name=names.name)


def join_genes(
    tables: Sequence[Tables], common: bool
) -> tuple[list[npt.NDArray[np.int32] | None], pd.DataFrame, list[str]]:
    """Where the genes of each input are in the study's table.

    Genes meet as those of two studies do, by Ensembl id where both have one, else by symbol; the
    first input gives the order.

    Returns
    -------
    columns
        For each input int32 (its genes,), -1 for a gene left out; None where nothing changes.
    var
        The table of the study: a column whose values differ between inputs is left out.
    notes
        What was left out.
    """
    first = tables[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the study meets the store
        table, own, _ = align(GeneTable(), first.var)
        met = [own] + [_align(table, first.name, other) for other in tables[1:]]
    n = len(first.var)
    in_all = np.ones(n, np.bool_)
    for columns in met:
        has = np.zeros(n, np.bool_)
        has[columns[(columns >= 0) & (columns < n)]] = True
        in_all &= has
    if not common:
        for other, columns in zip(tables[1:], met[1:], strict=True):
            _check_same(first, other, columns)
    if not in_all.any():
        raise InputError(
            "The inputs of the study have no gene in common",
            found=", ".join(t.name for t in tables),
            expected="at least one gene that all of them measured",
            do="ingest them as studies of their own",
        )
    keep = np.append(np.where(in_all, np.cumsum(in_all) - 1, -1), -1).astype(np.int32)
    out: list[npt.NDArray[np.int32] | None] = []
    for columns in met:
        inside = np.where((columns >= 0) & (columns < n), columns, n)
        mapped = keep[inside]
        out.append(None if np.array_equal(mapped, np.arange(len(mapped))) else mapped)
    notes = []
    if not in_all.all() or any((mapped == -1).any() for mapped in out if mapped is not None):
        notes.append(f"{int(in_all.sum()):,} genes that all {len(tables)} inputs have were kept")
    var, differing = _join_var(tables, met, in_all)
    if differing:
        notes.append(f"var columns that differ between inputs were left out: {_few(differing)}")
    return out, var, notes


def _align(table: GeneTable, name: str, other: Tables) -> npt.NDArray[np.int32]:
    try:
        return align(table, other.var)[1]
    except InputError as error:
        raise InputError(
            f"{other.name} has no gene in common with {name}",
            found=error.found,
            expected=error.expected,
            do=error.do,
        ) from None


def _check_same(first: Tables, other: Tables, columns: npt.NDArray[np.int32]) -> None:
    n = len(first.var)
    new = other.var.index[columns >= n].tolist()
    lost = first.var.index[np.setdiff1d(np.arange(n), columns)].tolist()
    if not new and not lost:
        return
    found = []
    if lost:
        found.append(f"{len(lost):,} genes only in {first.name}: {_few(lost)}")
    if new:
        found.append(f"{len(new):,} genes only in {other.name}: {_few(new)}")
    raise InputError(
        "The inputs of the study did not measure the same genes",
        found="; ".join(found),
        expected="the same genes in every file, in any order: a gene that one file did not "
        "measure would read as zero in its cells",
        do="ingest the files as studies of their own, where such genes are missing and not zero; "
        "or keep the genes they have in common with --genes-of-all (genes_of_all=True in Python)",
    )


def _join_var(
    tables: Sequence[Tables],
    met: Sequence[npt.NDArray[np.int32]],
    in_all: npt.NDArray[np.bool_],
) -> tuple[pd.DataFrame, list[str]]:
    """Columns of all inputs, and the names of those whose values differ."""
    var = tables[0].var[in_all].copy()
    differing: list[str] = []
    for table, columns in zip(tables[1:], met[1:], strict=True):
        place = np.full(int(columns.max(initial=0)) + 1 + len(in_all), -1)
        place[columns[columns >= 0]] = np.flatnonzero(columns >= 0)
        own = table.var.iloc[place[: len(in_all)][in_all]].set_axis(var.index)
        for column in own.columns:
            if column not in var:
                var[column] = own[column]
            elif column not in differing and not _same(var[column], own[column]):
                differing.append(column)
    return var.drop(columns=differing), differing


def _same(one: pd.Series[Any], other: pd.Series[Any]) -> bool:
    a, b = one.astype(object), other.astype(object)
    return bool(((a == b) | (a.isna() & b.isna())).all())


def join_obs(
    tables: Sequence[Tables], names: Sequence[str], prefix: bool, column: str
) -> tuple[pd.DataFrame, list[str]]:
    """One table of all rows; a column that an input lacks is missing in its rows.

    Parameters
    ----------
    tables, names
        The inputs and their short names.
    prefix
        Put the short name before each row name.
    column
        The column that is to hold the short name.

    Raises
    ------
    InputError
        A row name occurs in two inputs.
    """
    frames = [
        t.obs.set_axis(prefixed(name, t.obs.index)) if prefix else t.obs
        for t, name in zip(tables, names, strict=True)
    ]
    which = np.repeat(np.arange(len(frames)), [len(frame) for frame in frames])
    index = pd.Index([name for frame in frames for name in frame.index], dtype=object)
    if (again := index.duplicated(keep=False)).any():
        twice = index[again].unique()
        owners = np.unique(which[again])
        raise InputError(
            "Row names occur in more than one input of the study",
            found=f"{len(twice):,} names, e.g. {_few(twice.tolist())}, in "
            + _few([tables[i].name for i in owners]),
            expected="one name per row, over all inputs",
            do="put the name of its file before each name with --prefix-rows (prefix_rows=True in "
            "Python)",
        )
    there = list(dict.fromkeys(name for frame in frames for name in frame.columns))
    joined = {name: _stack([frame.get(name) for frame in frames], which) for name in there}
    notes = []
    if column in joined:
        notes.append(f"the inputs have an obs column {column!r} already; it was kept")
    else:
        joined[column] = pd.Categorical(np.array(names, object)[which], categories=list(names))
    index.name = frames[0].index.name
    return pd.DataFrame(joined, index=index), notes


def _stack(parts: Sequence[pd.Series[Any] | None], which: npt.NDArray[np.int64]) -> Any:
    """One column of several tables; categories are united in the order they are met."""
    given = [part for part in parts if part is not None]
    filled = [
        part if part is not None else pd.Series(np.nan, range(int((which == i).sum())), object)
        for i, part in enumerate(parts)
    ]
    if all(isinstance(part.dtype, pd.CategoricalDtype) for part in given):
        kinds = list(dict.fromkeys(value for part in given for value in part.cat.categories))
        values = np.concatenate([part.astype(object).to_numpy(object) for part in filled])
        return pd.Categorical(values, categories=kinds)
    numbers = all(pd.api.types.is_numeric_dtype(part.dtype) for part in given)
    if len(given) < len(parts) and numbers:
        if any(pd.api.types.is_bool_dtype(part.dtype) for part in given):
            filled = [part.astype("boolean") for part in filled]
        else:
            filled = [part.astype(float) for part in filled]
    return pd.concat(filled, ignore_index=True).array


def common_arrays(tables: Sequence[Tables]) -> tuple[list[str], list[str]]:
    """Names of the arrays that all inputs have in one shape, and a note on the others."""
    every = dict.fromkeys(name for table in tables for name in table.obsm)
    common = [
        name
        for name in every
        if all(name in t.obsm and t.obsm[name] == tables[0].obsm.get(name) for t in tables)
    ]
    left = [name for name in every if name not in common]
    return common, [
        f"obsm arrays that not all inputs have in one shape were left out: {_few(left)}"
    ] * bool(left)


def join_spatial(tables: Sequence[Tables]) -> tuple[dict[str, Any], list[str]]:
    """``uns['spatial']`` of all inputs by library; left out where a library occurs twice."""
    found = [table.uns["spatial"] for table in tables if "spatial" in table.uns]
    libraries = [name for spatial in found for name in spatial]
    if len(set(libraries)) < len(libraries):
        return {}, ["uns['spatial'] names a library in more than one input and was left out"]
    joined = {name: value for spatial in found for name, value in spatial.items()}
    return ({"spatial": joined} if joined else {}), []


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
