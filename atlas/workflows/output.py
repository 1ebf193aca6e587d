"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from atlas import files
from atlas.errors import ConfigError, OutputError


def write_json(path: str | PathLike[str], values: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(Path(path)) as partial:
        files.write_bytes(partial, json.dumps(values, indent=1, allow_nan=False).encode())


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all."""
    write_bytes(path, text.encode())


def check_suffix(path: str | PathLike[str], known: Sequence[str], what: str) -> None:
    """Refuse a file whose name ends in none of the known suffixes.

    Raises
    ------
    ConfigError
        Says what would be written, and which suffixes are known.
    """
    suffix = Path(path).suffix.removeprefix(".")
    if suffix not in known:
        raise ConfigError(
            f"{what} cannot be written in this format",
            found=suffix or "no suffix",
            expected="one of " + ", ".join(known),
            path=Path(path),
        )


def check_file(path: str | PathLike[str]) -> None:
    """Refuse a file that cannot be written, before the work whose result it would hold.

    Raises
    ------
    OutputError
        Its folder is not there or takes no files, or it is a folder itself.
    """
    target = Path(path)
    found = None
    if target.is_dir():
        found = "a folder of this name"
    elif not target.parent.is_dir():
        found = f"no folder {target.parent}"
    elif not os.access(target.parent, os.W_OK):
        found = f"no leave to write in {target.parent}"
    if found is not None:
        raise OutputError(
            "The file cannot be written",
            found=found,
            expected="a file in a folder that is there",
            do="make the folder, or name another file",
            path=target,
        )


def write_bytes(path: str | PathLike[str], content: bytes) -> None:
    """Write a file, whole or not at all."""
    with replacing(Path(path)) as partial:
        files.write_bytes(partial, content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write to, and move it there when all went well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            "The file could not be written",
            found=str(error),
            expected="a folder that is there, and room in it",
            path=path,
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_table(table: pd.DataFrame, out: str | PathLike[str], index: str) -> None:
    """Write a table as CSV, or TSV by the ending .tsv or .txt, whole or not at all.

    Raises
    ------
    ConfigError, OutputError
        The name has another ending, or the file could not be written.
    """
    path = check_table_name(out)
    separator = "," if path.suffix == ".csv" else "\t"
    with replacing(path) as partial:
        table.to_csv(partial, sep=separator, index_label=index)


def check_table_name(out: str | PathLike[str]) -> Path:
    """The path of a table to write; refused where the ending says another format, or cannot be."""
    path = Path(out)
    if path.suffix not in (".csv", ".tsv", ".txt"):
        raise ConfigError(
            "A table is written as CSV or TSV",
            found=path.name,
            expected="a name that ends with .csv, .tsv or .txt",
            path=path,
        )
    check_file(path)
    return path
