"""The groups above labels, as a user gives them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np

from atlas.errors import ConfigError, InputError
from atlas.models import LabelTree

Hierarchy = str | PathLike[str] | Mapping[str, str]
"""The parent of each label, or a file that has it: JSON, or a CSV or TSV of child and parent."""

_WANTED: Final = (
    "a JSON object of child and parent, or a table in UTF-8 of two columns whose first line is "
    "child,parent"
)


def read_hierarchy(hierarchy: Hierarchy) -> dict[str, str]:
    """The parent of each label, from a mapping or a file.

    Columns of a table are parted by commas, tabs or semicolons; blanks around names do not count.

    Raises
    ------
    InputError, ConfigError
        The file is not there or no such table, a label has two parents, or there is a cycle.
    """
    if isinstance(hierarchy, Mapping):
        return {str(child): str(parent) for child, parent in hierarchy.items()}
    path = Path(hierarchy)
    if not path.is_file():
        raise InputError("There is no such file", expected="a hierarchy of labels", path=path)
    rows = _json_rows(path) if path.suffix == ".json" else _table_rows(path)
    out: dict[str, str] = {}
    for child, parent in rows:
        if not all(isinstance(name, str) and name.strip() for name in (child, parent)):
            raise InputError(
                "A line of the hierarchy lacks a name",
                found=f"child {child!r}, parent {parent!r}",
                expected="both; a label without a parent is no child",
                do="take the line out, or fill it in",
                path=path,
            )
        if out.setdefault(child, parent) != parent:
            raise ConfigError(
                "A label has two parents in the hierarchy",
                found=f"{child}: {out[child]} and {parent}",
                expected="one",
                do="take one of the two lines out",
                path=path,
            )
    if not out:
        raise _unreadable(path, "no lines of child and parent")
    _make([], out, 0, path)  # which refuses cycles
    return out


def label_tree(
    labels: Iterable[str], hierarchy: Hierarchy | None, unobserved: int = 0
) -> LabelTree:
    """The tree of some labels, with the groups above them; see :meth:`LabelTree.make`."""
    parent_of = None if hierarchy is None else read_hierarchy(hierarchy)
    path = None if hierarchy is None or isinstance(hierarchy, Mapping) else Path(hierarchy)
    return _make(labels, parent_of, unobserved, path)


def tree_above(labels: set[str], parent_of: Mapping[str, str]) -> LabelTree:
    """The tree of some labels and of the groups above them, without other branches."""
    whole = LabelTree.make(sorted(labels), parent_of)
    kept = np.zeros(len(whole.names), bool)
    kept[whole.codes(labels)] = True
    for node, parent in reversed([*enumerate(whole.parents)]):
        if kept[node] and parent >= 0:
            kept[parent] = True
    number = np.cumsum(kept) - 1
    return LabelTree(
        tuple(name for name, keep in zip(whole.names, kept, strict=True) if keep),
        tuple(
            -1 if parent < 0 else int(number[parent])
            for parent, keep in zip(whole.parents, kept, strict=True)
            if keep
        ),
    )


def _make(
    labels: Iterable[str], parent_of: Mapping[str, str] | None, unobserved: int, path: Path | None
) -> LabelTree:
    try:
        return LabelTree.make(labels, parent_of, unobserved)
    except ConfigError as error:
        raise ConfigError(
            error.what, found=error.found, expected=error.expected, do=error.do, path=path
        ) from error


def _json_rows(path: Path) -> list[tuple[Any, Any]]:
    try:
        pairs = json.loads(path.read_bytes(), object_pairs_hook=list)
        return [(child, parent) for child, parent in pairs]
    except (ValueError, TypeError) as error:
        raise _unreadable(path, str(error)) from error


def _table_rows(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"not text in UTF-8 ({error})") from error
    first = next((line for line in lines if line.strip()), "")
    separator = next((mark for mark in "\t;" if mark in first), ",")
    rows: list[list[str]] = []
    try:
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
        for row in reader:
            names = [name.strip() for name in row]
            if not any(names):
                continue
            if len(names) != 2:
                raise _unreadable(path, f"{len(names)} columns in line {reader.line_num}")
            rows.append(names)
    except csv.Error as error:
        raise _unreadable(path, f"line {reader.line_num}: {error}") from error
    header = [name.lower() for name in rows[0]] if rows else []
    if sorted(header) != ["child", "parent"]:
        # Any other first line may be a pair, which would be lost if it were taken for names.
        raise _unreadable(path, f"the first line {first!r}" if rows else "an empty file")
    child = header.index("child")
    return [(row[child], row[1 - child]) for row in rows[1:]]


def _unreadable(path: Path, found: str) -> InputError:
    return InputError(
        "The hierarchy cannot be read",
        found=found,
        expected=_WANTED,
        do='write it so, or give a .json file such as {"CD4 T": "T", "CD8 T": "T"}',
        path=path,
    )
