"""Which genes of a store are meant: names as they are, Ensembl ids, other cases, aliases."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Self

from atlas.errors import InputError
from atlas.ingest.genes import GeneTable, ensembl_id

_SHIPPED = "aliases.tsv"


@dataclass(frozen=True, slots=True)
class Aliases:
    """Other names of genes.

    Attributes
    ----------
    groups
        For each name in capitals, all names, itself too, of the gene or the genes that it may be.
    """

    groups: Mapping[str, frozenset[str]]

    @classmethod
    def shipped(cls) -> Self:
        """Common immunology markers (``aliases.tsv`` in this folder)."""
        text = resources.files(__package__).joinpath(_SHIPPED).read_text(encoding="utf-8")
        return cls._parse(text, None)

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Self:
        """A table of one's own: names of one gene on each line, between blanks, tabs or commas.

        Raises
        ------
        InputError
            It cannot be read, or a line has one name only.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError) as error:
            raise InputError(
                "The table of aliases cannot be read",
                found=f"{type(error).__name__}: {error}",
                expected="a text file",
                path=path,
            ) from error
        return cls._parse(text, Path(path))

    @classmethod
    def _parse(cls, text: str, path: Path | None) -> Self:
        groups: dict[str, set[str]] = defaultdict(set)
        for number, line in enumerate(text.splitlines(), start=1):
            names = re.split(r"[\s,]+", line.partition("#")[0].strip(" \t,"))
            if names == [""]:
                continue
            if len(names) < 2:
                raise InputError(
                    "A line of the table of aliases has one name only",
                    found=f"line {number}: {names[0]}",
                    expected="all names of one gene, such as TNFRSF18 GITR AITR",
                    path=path,
                )
            for name in names:
                groups[name.upper()].update(names)
        return cls({name: frozenset(group) for name, group in groups.items()})

    def over(self, other: Aliases) -> Aliases:
        """Both tables; where both know a name, what this one says of it."""
        return Aliases({**other.groups, **self.groups})

    def of(self, name: str) -> frozenset[str]:
        """All names, in any case, of what ``name`` may be."""
        return self.groups.get(name.upper(), frozenset())


@dataclass(frozen=True, slots=True)
class Resolved:
    """A gene of a signature and the gene of the store that it is.

    Attributes
    ----------
    asked
        As in the signature.
    name, position
        Of the gene of the store; None and -1 where there is none.
    """

    asked: str
    name: str | None
    position: int


def resolve(
    asked: Iterable[str], table: GeneTable, aliases: Aliases, path: Path | None = None
) -> dict[str, Resolved]:
    """The gene of a store that each name stands for.

    A name is looked for as it is, then as an Ensembl id, then in another case, then under its
    aliases in any case; the first of these that finds something decides.

    Parameters
    ----------
    asked
        Names as in signatures.
    table
        The genes of the store.
    aliases
        Other names.
    path
        Of the store, for messages.

    Raises
    ------
    InputError
        A name is that of several genes of the store.
    """
    exact = {name: i for i, name in enumerate(table.names)}
    by_id = {gene_id: i for i, gene_id in enumerate(table.ids) if gene_id is not None}
    folded: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(table.names):
        folded[name.upper()].append(i)
    out = {}
    for name in dict.fromkeys(asked):
        if name in exact:
            found = [exact[name]]
        elif (gene_id := ensembl_id(name)) is not None and gene_id in by_id:
            found = [by_id[gene_id]]
        elif name.upper() in folded:
            found = folded[name.upper()]
        else:
            also = {other.upper() for other in aliases.of(name)}
            found = sorted(i for other in also for i in folded.get(other, []))
        if len(found) > 1:
            raise InputError(
                f"The gene {name!r} may be several genes of the store",
                found=", ".join(table.names[i] for i in found),
                expected="one",
                do="write the one that is meant, or say so in a table of aliases (--aliases)",
                path=path,
            )
        position = found[0] if found else -1
        out[name] = Resolved(name, table.names[position] if found else None, position)
    return out


def unknown_genes(
    names: Iterable[str], table: GeneTable, aliases: Aliases, path: Path | None = None
) -> InputError:
    """The error for genes that are nowhere, with aliases that were tried and the closest names."""
    folded = {name.upper(): name for name in table.names}
    told = []
    for name in names:
        close = difflib.get_close_matches(name.upper(), folded, n=3, cutoff=0.6)
        like = ", ".join(folded[c] for c in close)
        also = sorted(other for other in aliases.of(name) if other.upper() != name.upper())
        tried = f"nor as {', '.join(also)}; " if also else ""
        told.append(f"{name} ({tried}closest: {like or 'none'})")
    return InputError(
        "The store does not have these genes of the signatures",
        found="; ".join(told),
        expected="names of its genes, Ensembl ids, or aliases of them",
        do="mend the names, give a table of other names (--aliases), or leave these genes out "
        "(--ignore-missing)",
        path=path,
    )
