"""Genes of one species under the names of another, by a table of orthologs.

The table has two columns, query gene and reference gene, by name or Ensembl id. One-to-one pairs
are used alone: a gene with several partners, on either side, is left out and counted. To split its
counts among partners, or to add those of several genes, would be a guess of what was measured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import InputError
from atlas.ingest.genes import AlignmentReport, GeneIdentity, GeneTable, align, ensembl_id

_SPECIES = re.compile(r"ENS([A-Z]*)G\d{6,}(\.\d+)?")
_EXPECTED = "two columns, query gene and reference gene, separated by a comma or a tab"


@dataclass(frozen=True, slots=True)
class Orthologs:
    """Pairs of a query gene and a reference gene.

    Attributes
    ----------
    pairs
        Reference gene of each query gene that has one partner, and is its only one. Ensembl ids are
        without their version.
    one_to_many, many_to_one
        Query genes with several partners, and query genes that share their only partner: left out.
    path
        The table.
    """

    pairs: Mapping[str, str]
    one_to_many: frozenset[str]
    many_to_one: frozenset[str]
    path: Path

    def partner(self, name: str, gene_id: str | None) -> str | None:
        """The reference gene of a query gene, found by its id, else by its name."""
        return self._of(name, gene_id, self.pairs, None)

    def renamed(
        self, names: Sequence[str], ids: Sequence[str | None]
    ) -> tuple[list[str | None], str]:
        """The reference's name of each gene, None for none, and what to say of them.

        Raises
        ------
        InputError
            No gene has a partner.
        """
        genes = list(zip(names, ids, strict=True))
        found = [self.partner(*gene) for gene in genes]
        twice = {partner for partner, n in Counter(found).items() if n > 1}  # by name and by id
        found = [None if partner in twice else partner for partner in found]
        n_found = sum(partner is not None for partner in found)
        if not n_found:
            raise self._none_found(names, ids)
        several = [
            sum(bool(self._of(*gene, dict.fromkeys(kind, "x"), None)) for gene in genes)
            for kind in (self.one_to_many, self.many_to_one)
        ]
        rest = len(genes) - n_found - sum(several)
        return found, (
            f"orthologs: {n_found:,} of {len(genes):,} genes have a partner of their own; left "
            f"out: {several[0]:,} one-to-many, {several[1]:,} many-to-one, {rest:,} without"
        )

    @staticmethod
    def _of(
        name: str, gene_id: str | None, pairs: Mapping[str, str], default: str | None
    ) -> str | None:
        if gene_id is not None and gene_id in pairs:
            return pairs[gene_id]
        return pairs.get(ensembl_id(name) or name, default)

    def _none_found(self, names: Sequence[str], ids: Sequence[str | None]) -> InputError:
        own = {*names, *ids}
        swapped = any(gene in own for gene in self.pairs.values())
        return InputError(
            "No gene of the query has a partner in the table of orthologs",
            found=f"genes such as {', '.join(names[:3])}; in the table "
            + ", ".join(list(self.pairs)[:3]),
            expected="the query's genes, by name or Ensembl id, in the first column",
            do="exchange the columns of the table" if swapped else "check species and kind of name",
            path=self.path,
        )


def read_orthologs(path: str | PathLike[str]) -> Orthologs:
    """Read a CSV or TSV of query gene and reference gene.

    A header does no harm, as it names no gene. Lines that repeat another, or lack a partner (as
    BioMart writes them), are passed over.

    Raises
    ------
    InputError
        It is no such table, or has no one-to-one pair.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            separator = "\t" if "\t" in file.readline() else ","
        table = pd.read_csv(
            path,
            sep=separator,
            header=None,
            dtype=str,
            comment="#",
            keep_default_na=False,
            skipinitialspace=True,
        )
        if table.shape[1] != 2:
            raise ValueError(f"{table.shape[1]} columns in the first line")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a table of orthologs",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            expected=_EXPECTED,
            path=path,
        ) from error
    lines = [
        tuple(ensembl_id(gene.strip()) or gene.strip() for gene in line)
        for line in table.itertuples(index=False)
    ]
    pairs = [pair for pair in dict.fromkeys(lines) if all(pair)]
    of_query = Counter(query for query, _ in pairs)
    of_reference = Counter(reference for _, reference in pairs)
    single = [(q, r) for q, r in pairs if of_query[q] == 1]
    one_to_one = {q: r for q, r in single if of_reference[r] == 1}
    if not one_to_one:
        raise InputError(
            "The table of orthologs has no one-to-one pair",
            found=f"{len(pairs):,} pairs" + (", all with several partners" if pairs else ""),
            expected=_EXPECTED,
            path=path,
        )
    return Orthologs(
        one_to_one,
        frozenset(q for q, n in of_query.items() if n > 1),
        frozenset(q for q, r in single if of_reference[r] > 1),
        path,
    )


def align_orthologs(
    table: GeneTable, var: pd.DataFrame, orthologs: Orthologs, *, fixed: bool
) -> tuple[GeneTable, npt.NDArray[np.int32], AlignmentReport, str]:
    """:func:`atlas.ingest.genes.align` of genes under their partners' names; and what to say.

    Genes without a partner of their own are left out (-1), even where the table has a gene of their
    name: it is another species' gene.
    """
    own = GeneIdentity.from_var(var)
    partners, said = orthologs.renamed(own.names, own.ids)
    there = np.flatnonzero([partner is not None for partner in partners])
    renamed = pd.DataFrame(index=pd.Index([partners[i] for i in there], dtype=object))
    grown, found, report = align(table, renamed, mode="fixed" if fixed else "union")
    columns = np.full(len(partners), -1, np.int32)
    columns[there] = found
    return grown, columns, report, said


def another_species(
    own: tuple[Sequence[str], Sequence[Any]], reference: tuple[Sequence[str], Sequence[Any]]
) -> str | None:
    """In what genes look like those of another species than the reference's; None if they do not.

    By what most Ensembl ids begin with, where both have some; or else by names: more of them are a
    gene of the reference but for their case, as those of mouse and human are, than are one as they
    stand. Of 3,451 genes of mice and 2,000 of human blood 435 are alike but for their case, and 2
    the same; of two human studies hardly one.

    Parameters
    ----------
    own, reference
        Names and Ensembl ids (or None) of the genes.
    """
    mine, theirs = (_prefix([*names, *ids]) for names, ids in (own, reference))
    if mine is not None and theirs is not None:
        if mine == theirs:  # whatever the names are
            return None
        return f"Ensembl ids ENS{mine}G…, where the reference has ENS{theirs}G…"
    known = set(reference[0])
    folded = {name.casefold(): name for name in known}
    alike = [name for name in own[0] if name not in known and name.casefold() in folded]
    same = sum(name in known for name in own[0])
    if len(alike) > same:
        return f"names such as {alike[0]}, where the reference has {folded[alike[0].casefold()]}"
    return None


def _prefix(genes: Sequence[Any]) -> str | None:
    """The letters of the species in most of the Ensembl ids, None without such ids."""
    found = Counter(
        match[1] for gene in genes if isinstance(gene, str) and (match := _SPECIES.fullmatch(gene))
    )
    return found.most_common(1)[0][0] if found else None
