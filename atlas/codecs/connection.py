"""Requests to an object store, tried again with longer and longer waits, until a deadline."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar

from atlas.codecs.fetching import (
    NO_ETAG,
    Changed,
    Denied,
    Direct,
    Helpers,
    Item,
    Missing,
    Refused,
    Requests,
    first_line,
)
from atlas.errors import ConfigError, CorruptStoreError, FormatError, RemoteError

MARK: Final = ".remote.json"
"""The file that makes a folder a mirror."""
THREADS: Final = 16
"""Requests that are under way at a time."""
PIECE: Final = 2**21
"""Bytes of one request at most: sixteen of them come in time at 10 Mbit/s."""
_FORMAT, _VERSION = "atlas-remote", 1
_TIMEOUT, _DEADLINE = 30.0, 180.0
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0

_T = TypeVar("_T")
_used_by: int | None = None
"""The process whose requests started threads that a fork of it does not have."""


@dataclass(frozen=True)
class Origin:
    """What a mirror is of; holds no secret, those are in the environment.

    Attributes
    ----------
    url
        ``s3://bucket/path``, ``gs://…``, ``https://…``.
    options
        Of the connection, as obstore names them: ``endpoint``, ``region``, ``skip_signature`` …
    cache
        Bytes that chunks may take on disk.
    timeout, deadline
        Seconds for one request, and for all its repetitions.
    """

    url: str
    options: Mapping[str, str] = field(default_factory=dict)
    cache: int = 10**10
    timeout: float = _TIMEOUT
    deadline: float = _DEADLINE

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}).encode()

    @classmethod
    def read(cls, root: Path) -> Origin:
        """Of a mirror."""
        try:
            found = json.loads((root / MARK).read_bytes())
            if (found.pop("format"), found.pop("version")) != (_FORMAT, _VERSION):
                raise ValueError("another format or version")
            return cls(**found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                "A mirror of a store by URL is damaged",
                found=str(error),
                do="remove the folder, and open the URL again",
                path=root / MARK,
            ) from None


def obstore() -> Any:
    """The package, which is an extra.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    try:
        return import_module("obstore")
    except ImportError as error:
        raise ConfigError(
            "Stores by URL need the package obstore",
            found=error,
            do="pip install 'atlas-trainer[remote]'",
        ) from None


class Connection:
    """Requests to one URL; thread-safe, and made by helper processes in a fork.

    Raises
    ------
    ConfigError
        The URL or an option cannot be used, or obstore is not installed.
    """

    def __init__(self, origin: Origin) -> None:
        global _used_by
        package = obstore()
        self.origin = origin
        told = origin.url, origin.options, origin.timeout
        self._requests: Requests
        if _used_by not in (None, os.getpid()):
            self._requests = Helpers(*told)
            return
        try:
            self._requests = Direct(*told)
        except (package.exceptions.BaseError, TypeError, ValueError) as error:
            raise ConfigError(
                "The URL cannot be connected to",
                found=first_line(error),
                expected="s3://bucket/path, gs://bucket/path or https://host/path",
                path=origin.url,
            ) from error
        _used_by = os.getpid()

    def list(self) -> list[Item]:
        """All objects below the URL."""
        return self._tried("the list of its files", self._requests.list)

    def head(self, key: str) -> Item:
        """Size and ETag of an object."""
        return self._tried(key, partial(self._requests.head, key))

    def get(
        self, key: str, start: int | None = None, stop: int | None = None, etag: str = NO_ETAG
    ) -> tuple[memoryview, Item]:
        """Bytes ``start`` to ``stop`` of an object; the last ``-start`` where it is negative.

        Raises
        ------
        RemoteError
            There was no answer, or no leave.
        CorruptStoreError
            The object is not there, or is no more the one of this ETag.
        """
        return self._tried(key, partial(self._requests.get, key, start, stop, etag))

    def whole(self, item: Item) -> bytes:
        """All of an object, in pieces that a slow line brings before a request times out."""
        starts = range(0, item.size, PIECE)
        parts = [self.get(item.key, a, min(item.size, a + PIECE), item.etag)[0] for a in starts]
        return b"".join(parts)

    def _tried(self, what: str, request: Callable[[], _T]) -> _T:
        """Again after an error that may pass, until the deadline, with longer and longer waits."""
        errors, until = 0, time.monotonic() + self.origin.deadline
        where = f"{self.origin.url.rstrip('/')}/{what}"
        while True:
            try:
                return request()
            except Missing as error:
                raise CorruptStoreError(
                    "A file of the store is missing",
                    found=error,
                    do="check the URL; copy the store there again if it is right",
                    path=where,
                ) from error
            except Changed as error:
                raise CorruptStoreError(
                    "A file of the store was changed while it was read",
                    found=error,
                    do="open the store again",
                    path=where,
                ) from error
            except Denied as error:
                raise RemoteError(
                    "The object store gives no leave to read",
                    found=error,
                    do="set credentials in the environment (AWS_ACCESS_KEY_ID … or "
                    "GOOGLE_APPLICATION_CREDENTIALS), or for a public bucket "
                    "options={'skip_signature': 'true'}",
                    path=where,
                ) from error
            except Refused as error:
                raise RemoteError(
                    "The object store refuses a request",
                    found=error,
                    do="check the URL, its bucket, and the region and endpoint in options",
                    path=where,
                ) from error
            except OSError as error:
                errors += 1
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (errors - 1))
                wait *= random.uniform(0.5, 1)
                if time.monotonic() + wait > until:
                    raise RemoteError(
                        "The object store does not answer",
                        found=f"{errors} errors in {self.origin.deadline:g} s, the last: {error}",
                        do="check the network and the URL, then run the command again: what has "
                        "come is kept",
                        path=where,
                    ) from error
                time.sleep(wait)
