"""Every error that Atlas raises on purpose.

::

    AtlasError                     what, found, expected, what to do, path
    ├── InputError                 a file or AnnData that cannot be ingested
    │   ├── CountsError            values that are not raw counts
    │   └── MissingColumnError     an obs column, layer or key that is not there
    ├── StoreError                 a store that cannot be used as asked
    │   ├── NotAStoreError         a folder without a manifest
    │   ├── FormatError            a format or schema this version does not read
    │   ├── CorruptStoreError      a missing, truncated or flipped file or chunk
    │   ├── StudyExistsError       a study name that is taken
    │   ├── LockedError            another writer is at work
    │   └── RemoteError            an object store that gives no answer or no leave
    ├── ModelError                 a model that does not fit the store or the request
    ├── CheckpointError            a run folder that cannot be resumed or loaded
    ├── PackageError               a shared reference that is refused
    ├── TrainingError              a training that cannot go on
    ├── OutputError                a file asked for that cannot be written
    └── ConfigError                an option out of range, or options that contradict

The command line prints the message and leaves with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os import PathLike

_MOST_LISTED = 12


class AtlasError(Exception):
    """What was wrong, what was found, what was expected, what to do, and where.

    Parameters
    ----------
    what
        What is wrong, in one sentence without a full stop.
    found
        What was found.
    expected
        What was expected in its place.
    do
        What the user can do about it.
    path
        File or folder that it concerns.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        do: str | None = None,
        path: str | PathLike[str] | None = None,
    ) -> None:
        self.what = what
        self.found = found
        self.expected = expected
        self.do = do
        self.path = path
        parts = [what]
        if found is not None:
            parts.append(f"found: {found}")
        if expected is not None:
            parts.append(f"expected: {expected}")
        if do is not None:
            parts.append(f"what to do: {do}")
        if path is not None:
            parts.append(f"path: {path}")
        super().__init__("\n  ".join(parts))


class InputError(AtlasError):
    """A file or AnnData that cannot be ingested."""


class CountsError(InputError):
    """Values that are not raw counts."""


class MissingColumnError(InputError):
    """An obs column, layer or key that is not there."""


class StoreError(AtlasError):
    """A store that cannot be used as asked."""


class NotAStoreError(StoreError):
    """A folder without a manifest."""


class FormatError(StoreError):
    """A format or schema that this version does not read."""


class CorruptStoreError(StoreError):
    """A missing, truncated or flipped file or chunk."""


class StudyExistsError(StoreError):
    """A study name that is taken."""


class LockedError(StoreError):
    """Another writer is at work on the store."""


class RemoteError(StoreError):
    """An object store that gives no answer, or no leave."""


class ModelError(AtlasError):
    """A model that does not fit the store or the request."""


class CheckpointError(AtlasError):
    """A run folder that cannot be resumed or loaded."""


class PackageError(AtlasError):
    """A shared reference that is damaged, of a newer version, or not what it declares."""


class TrainingError(AtlasError):
    """A training that cannot go on, for instance because the loss is not finite."""


class OutputError(AtlasError):
    """A file asked for that cannot be written."""


class ConfigError(AtlasError):
    """An option out of range, or options that contradict each other."""


def listed(names: Iterable[object], like: str = "") -> str:
    """Names for a message; of many a dozen, those like what was asked for first."""
    every = [str(name) for name in names]
    if len(every) <= _MOST_LISTED:
        return ", ".join(every)
    close = difflib.get_close_matches(like, every, n=3, cutoff=0.5)
    first = [*close, *(name for name in every if name not in close)][:_MOST_LISTED]
    return ", ".join(first) + f", … ({len(every):,} in all)"
