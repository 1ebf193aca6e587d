"""Looking after a store: check all of it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from atlas.store.findings import VerifyReport
from atlas.store.verify import verify_store


def verify(
    path: str | PathLike[str], *, progress: bool = False, threads: int | None = None
) -> VerifyReport:
    """Check everything that a store holds, in every state that it keeps.

    Manifests, gene tables, digests, every chunk of every array, row counts and column indices. A
    fault does not end it; the report has them all, with what to do about each.

    Parameters
    ----------
    path
        The store; a path and not an open store, since its newest manifest may be what is broken.
    progress
        Show chunks, bytes a second and the time left on stderr.
    threads
        By default as many as cores.

    Raises
    ------
    NotAStoreError
        There is no store at ``path``.
    """
    return verify_store(Path(path), progress=progress, threads=threads)
