"""How a run folder is written to: files replaced whole, I/O errors told as such."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atlas import files
from atlas.errors import CheckpointError


def replace(path: Path, data: bytes) -> None:
    """Give a file new content, so that a crash leaves either the old or the new."""
    partial = path.with_name(f".{path.name}.partial")
    files.write_bytes(partial, data)
    partial.replace(path)
    files.sync_folder(path.parent)


@contextmanager
def io_errors(what: str, path: Path) -> Iterator[None]:
    """Turn an I/O error of the body into a :class:`CheckpointError` that says what was being done.

    Raises
    ------
    CheckpointError
        In place of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            what,
            found=error.strerror or str(error) or type(error).__name__,
            do="free space or repair the disk, then go on with --resume",
            path=path,
        ) from error
