"""Signatures as text and JSON, in the notation of the scANVI paper: ``CCR7+ CD4+ S100A4-``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from atlas.errors import InputError

_PLUS, _MINUS = "+", "-−–"  # typeset papers have other dashes
_EXAMPLE = "CD4 Naive: CCR7+ CD4+ S100A4- CD69-"


@dataclass(frozen=True, slots=True)
class Signature:
    """Genes whose expression speaks for a type of cell, and genes whose expression speaks against.

    Attributes
    ----------
    name
        Of the type.
    positive, negative
        Genes as the user calls them.
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


Given: TypeAlias = str | PathLike[str] | Mapping[str, Any] | Sequence[Signature]
"""A file, a mapping with the values that a JSON file may have, or signatures."""


def read_signatures(given: Given) -> tuple[Signature, ...]:
    """Signatures from a file or from Python.

    A text file has a signature on each line, ``NAME: GENE+ GENE-`` or with a tab in place of the
    colon; genes are separated by blanks, tabs or commas, and ``#`` starts a comment. A ``.json``
    file has an object: for each name such a text, a list of such genes, or
    ``{"positive": [...], "negative": [...]}`` with names of genes without signs.

    Raises
    ------
    InputError
        The file cannot be read; a gene has no sign; a signature has no name, no positive gene, a
        gene twice, or the name of another one.
    """
    if isinstance(given, str | PathLike):
        path = Path(given)
        found = _from_json(path) if path.suffix.lower() == ".json" else _from_text(path)
    else:
        path = None
        found = _from_mapping(given, None) if isinstance(given, Mapping) else list(given)
        if not all(isinstance(signature, Signature) for signature in found):
            raise InputError(
                "These are no signatures",
                found=repr(given)[:80],
                expected="a file, a mapping of names to genes, or a list of Signature",
            )
    _check(found, path)
    return tuple(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise InputError(
            "The signatures cannot be read",
            found=f"{type(error).__name__}: {error}",
            expected=f"a text file with lines such as {_EXAMPLE}, or a .json file",
            path=path,
        ) from error


def _from_text(path: Path) -> list[Signature]:
    out = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        if "\t" in line:
            name, _, genes = line.partition("\t")
            name = name.rstrip().removesuffix(":")
        else:
            name, colon, genes = line.rpartition(":")
            if not colon:
                raise InputError(
                    "A line is no signature",
                    found=f"line {number}: {line[:60]}",
                    expected=_EXAMPLE,
                    path=path,
                )
        out.append(_signed(name.strip(), genes, path))
    return out


def _from_json(path: Path) -> list[Signature]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]:
            raise InputError(
                "Names are given twice", found=", ".join(twice), expected="each once", path=path
            )
        return dict(pairs)

    try:
        values = json.loads(_read(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError("The signatures are no JSON", found=error, path=path) from error
    if not isinstance(values, dict):
        raise InputError(
            "The signatures are no JSON object",
            found=type(values).__name__,
            expected='{"CD4 Naive": "CCR7+ CD4+ S100A4-", …}',
            path=path,
        )
    return _from_mapping(values, path)


def _from_mapping(values: Mapping[str, Any], path: Path | None) -> list[Signature]:
    out = []
    for name, value in values.items():
        if isinstance(value, Mapping) and set(value) <= {"positive", "negative"}:
            lists = [value.get(key, []) for key in ("positive", "negative")]
            if all(_are_texts(genes) for genes in lists):
                positive, negative = (tuple(gene.strip() for gene in genes) for genes in lists)
                out.append(Signature(str(name), positive, negative))
                continue
        elif isinstance(value, str) or _are_texts(value):
            text = value if isinstance(value, str) else " ".join(value)
            out.append(_signed(str(name), text, path))
            continue
        raise InputError(
            f"The signature {name!r} cannot be understood",
            found=repr(value)[:80],
            expected='"CCR7+ CD4-", ["CCR7+", "CD4-"] or {"positive": ["CCR7"], "negative": […]}',
            path=path,
        )
    return out


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def _signed(name: str, text: str, path: Path | None) -> Signature:
    genes = text.replace(",", " ").split()
    if bad := [gene for gene in genes if gene[-1] not in _PLUS + _MINUS or len(gene) == 1]:
        raise InputError(
            f"Genes of the signature {name!r} have no sign",
            found=", ".join(bad),
            expected="GENE+ for a gene that speaks for the type, GENE- for one against it",
            path=path,
        )
    positive = tuple(gene[:-1] for gene in genes if gene[-1] in _PLUS)
    negative = tuple(gene[:-1] for gene in genes if gene[-1] in _MINUS)
    return Signature(name, positive, negative)


def _check(signatures: list[Signature], path: Path | None) -> None:
    if not signatures:
        raise InputError("There are no signatures", expected=_EXAMPLE, path=path)
    names = Counter(signature.name for signature in signatures)
    if bad := [name for name, n in names.items() if n > 1 or not name.strip() or "/" in name]:
        raise InputError(
            "Signatures cannot be told apart by name",
            found=", ".join(map(repr, bad)),
            expected="a name for each, without '/' (obs columns are so named), given once",
            path=path,
        )
    for signature in signatures:
        if not signature.positive:
            raise InputError(
                f"The signature {signature.name!r} has no positive gene",
                found=" ".join(f"{gene}-" for gene in signature.negative) or "no gene at all",
                expected="at least one that speaks for the type: what a cell lacks may be what was "
                "not detected",
                path=path,
            )
        times = Counter((*signature.positive, *signature.negative))
        if twice := [gene for gene, n in times.items() if n > 1]:
            raise InputError(
                f"The signature {signature.name!r} has a gene twice",
                found=", ".join(twice),
                expected="each once, with one sign",
                path=path,
            )
