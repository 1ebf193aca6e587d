"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from atlas import files
from atlas.errors import OutputError


def write_json(path: str | PathLike[str], values: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(Path(path)) as partial:
        files.write_bytes(partial, json.dumps(values, indent=1, allow_nan=False).encode())


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
