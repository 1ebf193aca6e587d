"""I/O errors of a run folder, told as such."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atlas.errors import CheckpointError


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
