"""One table of genes for many studies, and where the genes of a study are in it."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.utils import make_index_unique

from atlas.errors import InputError

ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{6,})(\.\d+)?")
_ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl", "feature_id")
_SYMBOL_COLUMNS = (
    "gene_symbols",
    "gene_symbol",
    "gene_name",
    "gene_names",
    "feature_name",
    "symbol",
    "name",
)


@dataclass(frozen=True, slots=True)
class GeneIdentity:
    """What the genes of a study are called.

    Attributes
    ----------
    names
        Symbols, in the order of ``var``; the index where there is no symbol. Not always unique.
    ids
        Ensembl gene ids without version, or None.
    """

    names: tuple[str, ...]
    ids: tuple[str | None, ...]

    @classmethod
    def from_var(cls, var: pd.DataFrame) -> Self:
        """Find symbols and Ensembl ids in the index and the usual columns of ``var``."""
        index = [str(name) for name in var.index]
        ids: list[str | None] = [None] * len(index)
        for values in [*_columns(var, _ID_COLUMNS), index]:
            ids = [known or ensembl_id(value) for known, value in zip(ids, values, strict=True)]
        names = index
        for values in reversed(list(_columns(var, _SYMBOL_COLUMNS))):
            names = [
                symbol if _is_number(name) and _is_symbol(symbol) else name
                for name, symbol in zip(names, values, strict=True)
            ]
        return cls(tuple(names), tuple(ids))


@dataclass(frozen=True, slots=True)
class GeneTable:
    """The genes of a store; it only grows, and a gene keeps its position.

    Attributes
    ----------
    names
        Unique names, mostly symbols.
    ids
        Ensembl gene id of each without version, or None; no id occurs twice.
    """

    names: tuple[str, ...] = ()
    ids: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        known = [gene_id for gene_id in self.ids if gene_id is not None]
        if len(self.names) != len(self.ids):
            raise ValueError(f"{len(self.names)} names for {len(self.ids)} ids")
        if len(set(self.names)) != len(self.names) or len(set(known)) != len(known):
            raise ValueError("names or ids of genes are not unique")

    @classmethod
    def of_names(cls, names: Iterable[str]) -> Self:
        """A table of a given list of symbols or Ensembl ids.

        Raises
        ------
        InputError
            Where a name or id occurs twice.
        """
        listed = [str(name) for name in names]
        ids = [ensembl_id(name) for name in listed]
        keys = pd.Index([known or name for known, name in zip(ids, listed, strict=True)])
        again = keys[keys.duplicated()].unique()
        if len(again):
            raise InputError(
                "the list of genes names some more than once",
                found=", ".join(again[:5]),
                expected="each gene once",
                do="remove the repetitions",
            )
        return cls(tuple(listed), tuple(ids))

    def __len__(self) -> int:
        """Number of genes."""
        return len(self.names)

    @property
    def digest(self) -> str:
        """SHA-256 of names and ids in their order, in hexadecimal."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: two lists of equal length."""
        return {"names": list(self.names), "ids": list(self.ids)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls(tuple(values["names"]), tuple(values["ids"]))


@dataclass(frozen=True, slots=True)
class AlignmentReport:
    """How the genes of a study met the table.

    Attributes
    ----------
    n_by_id, n_by_symbol
        Genes found in the table by Ensembl id, and by symbol.
    n_new
        Genes appended to the table.
    n_dropped
        Genes that a fixed table does not have.
    renamed
        Symbol in the study and name in the table, where the symbol was taken by another gene.
    """

    n_by_id: int
    n_by_symbol: int
    n_new: int
    n_dropped: int
    renamed: tuple[tuple[str, str], ...]


def align(
    table: GeneTable, var: pd.DataFrame, mode: Literal["union", "fixed"] = "union"
) -> tuple[GeneTable, npt.NDArray[np.int32], AlignmentReport]:
    """Find the genes of a study in the table, and append those that are new.

    Genes meet by Ensembl id where both sides have one, else by symbol: never by symbol where both
    have ids that differ. A gene of the table takes at most one of the study. An entry that is
    met by symbol and has no id is given the study's.

    Parameters
    ----------
    table
        The genes so far; stays as it is.
    var
        The genes of the study.
    mode
        ``"union"`` appends unknown genes; ``"fixed"`` leaves them out.

    Returns
    -------
    table
        The new table; all of the old one, in place.
    columns
        int32, (n_vars of the study,): position of each gene in the new table, -1 for those left
        out.
    report
        How they met.

    Raises
    ------
    InputError
        Where no gene is in a table that has some.
    """
    found = GeneIdentity.from_var(var)
    names, ids = _without_duplicates(found)
    columns = np.full(len(names), -1, np.int32)
    table_names, table_ids = list(table.names), list(table.ids)
    by_id = {gene_id: i for i, gene_id in enumerate(table.ids) if gene_id is not None}
    by_name = {name: i for i, name in enumerate(table.names)}

    taken: set[int] = set()
    for gene, gene_id in enumerate(ids):
        if gene_id in by_id:
            columns[gene] = by_id[gene_id]
            taken.add(by_id[gene_id])
    n_by_id = len(taken)
    for gene, name in enumerate(names):
        position = by_name.get(name)
        if columns[gene] >= 0 or position is None or position in taken:
            continue
        if table_ids[position] is None or found.ids[gene] is None:
            columns[gene] = position
            taken.add(position)
            table_ids[position] = table_ids[position] or ids[gene]

    # What is left is new, or was given another name when it came with an earlier study.
    renamed = []
    reserved = {*table_names, *names}
    for gene in np.flatnonzero(columns < 0).tolist():
        name, number = names[gene], 0
        while name in by_name or (number and name in reserved):
            position = by_name.get(name, -1)
            anonymous = position >= 0 and ids[gene] is None and table_ids[position] is None
            if number and anonymous and position not in taken:
                columns[gene] = position
                taken.add(position)
                break
            number += 1
            name = f"{names[gene]}-{number}"
        if columns[gene] >= 0 or mode == "fixed":
            continue
        if number:
            renamed.append((names[gene], name))
        reserved.add(name)
        columns[gene] = len(table_names)
        table_names.append(name)
        table_ids.append(ids[gene])
    if (len(table) or mode == "fixed") and not taken:
        raise _nothing_in_common(table, names)
    if renamed:
        shown = ", ".join(f"{symbol} as {name}" for symbol, name in renamed[:5])
        warnings.warn(
            f"{len(renamed):,} genes share a symbol with another gene of the table and were "
            f"given a name of their own: {shown}{', …' if len(renamed) > 5 else ''}",
            UserWarning,
            stacklevel=2,
        )
    report = AlignmentReport(
        n_by_id,
        len(taken) - n_by_id,
        len(table_names) - len(table),
        int((columns < 0).sum()),
        tuple(renamed),
    )
    return GeneTable(tuple(table_names), tuple(table_ids)), columns, report


def ensembl_id(value: object) -> str | None:
    """The Ensembl gene id in ``value`` without its version, or None."""
    match = ENSEMBL.fullmatch(value) if isinstance(value, str) else None
    return match[1] if match else None


def _columns(var: pd.DataFrame, names: Iterable[str]) -> list[list[Any]]:
    return [var[name].astype(object).tolist() for name in names if name in var.columns]


def _is_number(name: str) -> bool:
    """Whether an index entry only numbers the gene, as Ensembl ids and row numbers do."""
    return ensembl_id(name) is not None or name.isdecimal()


def _is_symbol(value: object) -> bool:
    return isinstance(value, str) and value != "" and ensembl_id(value) is None


def _without_duplicates(found: GeneIdentity) -> tuple[list[str], list[str | None]]:
    """Unique names; of genes with one id, the first keeps it."""
    index = pd.Index(found.names, dtype=object)
    again = index.duplicated()
    seen: set[str] = set()
    ids: list[str | None] = []
    for gene_id in found.ids:
        ids.append(None if gene_id in seen else gene_id)
        if gene_id is not None:
            seen.add(gene_id)
    n_ids = sum(gene_id is not None for gene_id in found.ids) - len(seen)
    if again.any() or n_ids:
        shown = (
            index[again].unique()[:5].tolist()
            or sorted(
                {a for a, b in zip(found.ids, ids, strict=True) if a is not None and b is None}
            )[:5]
        )
        warnings.warn(
            f"{int(again.sum()):,} gene names and {n_ids:,} Ensembl ids repeat an earlier one "
            f"({', '.join(map(str, shown))}); each was kept as a gene of its own",
            UserWarning,
            stacklevel=3,
        )
    return make_index_unique(index).tolist(), ids


def _nothing_in_common(table: GeneTable, names: list[str]) -> InputError:
    shown = [gene_id or name for gene_id, name in zip(table.ids, table.names, strict=True)]
    coded = sum(ensembl_id(name) is not None for name in names) * 2 > len(names)
    if coded != (sum(ensembl_id(name) is not None for name in table.names) * 2 > len(table)):
        do = (
            "one side has Ensembl ids and the other symbols: give both, e.g. var['gene_ids'] "
            "beside symbols in the index"
        )
    else:
        do = (
            "check the species and the annotation; ids go into var['gene_ids']; a study of another "
            "species needs a table of orthologs: --orthologs TABLE"
        )
    return InputError(
        "the study has no gene in common with the store",
        found=", ".join(names[:5]),
        expected="some of " + ", ".join(map(str, shown[:5])) + " …" if len(table) else "genes",
        do=do,
    )
