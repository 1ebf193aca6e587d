"""Requests to an object store, tried again with longer and longer waits, until a deadline."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

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
NO_ETAG: Final = "none"

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


class Item(NamedTuple):
    """An object: its key below the URL, bytes, and ETag where the server has them."""

    key: str
    size: int
    etag: str


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


def check_process(of: int | None, url: str) -> None:
    """Refuse a fork of the process whose threads make the requests, where it would wait for ever.

    Raises
    ------
    RemoteError
        This is one.
    """
    if of not in (None, os.getpid()):
        raise RemoteError(
            "A store by URL cannot be read in a forked process",
            found="a process forked after the first request",
            expected="a process started anew",
            do="take multiprocessing_context='spawn', or num_workers=0: the loader has threads",
            path=url,
        )


class Connection:
    """Requests to one URL; thread-safe."""

    def __init__(self, origin: Origin) -> None:
        global _used_by
        check_process(_used_by, origin.url)
        package = obstore()
        self.origin = origin
        try:
            self._store = import_module("obstore.store").from_url(
                origin.url,
                client_options={
                    "timeout": timedelta(seconds=origin.timeout),
                    "connect_timeout": timedelta(seconds=min(10.0, origin.timeout)),
                    "allow_http": True,
                },
                retry_config={"max_retries": 0},  # it is done here, with stalls counted too
                **origin.options,
            )
        except (package.exceptions.BaseError, TypeError, ValueError) as error:
            raise ConfigError(
                "The URL cannot be connected to",
                found=_first_line(error),
                expected="s3://bucket/path, gs://bucket/path or https://host/path",
                path=origin.url,
            ) from error
        _used_by = os.getpid()

    def list(self) -> list[Item]:
        """All objects below the URL."""

        def listed() -> list[Item]:
            found = []
            for page in obstore().list(self._store):
                found += [Item(o["path"], o["size"], o["e_tag"] or NO_ETAG) for o in page]
            return found

        return self._tried("the list of its files", listed)

    def head(self, key: str) -> Item:
        """Size and ETag of an object."""

        def asked() -> Item:
            found = obstore().head(self._store, key)
            return Item(key, found["size"], found["e_tag"] or NO_ETAG)

        return self._tried(key, asked)

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
        options: dict[str, Any] = {}
        if start is not None:
            options["range"] = (start, stop) if stop is not None else {"suffix": -start}
        if etag != NO_ETAG:
            options["if_match"] = etag

        def asked() -> tuple[memoryview, Item]:
            found = obstore().get(self._store, key, options=options)
            data = memoryview(found.bytes())
            first, last = found.range
            if len(data) != last - first:
                raise OSError(f"{len(data)} bytes of {last - first}")
            return data, Item(key, found.meta["size"], found.meta["e_tag"] or NO_ETAG)

        return self._tried(key, asked)

    def whole(self, item: Item) -> bytes:
        """All of an object, in pieces that a slow line brings before a request times out."""
        starts = range(0, item.size, PIECE)
        parts = [self.get(item.key, a, min(item.size, a + PIECE), item.etag)[0] for a in starts]
        return b"".join(parts)

    def _tried(self, what: str, request: Callable[[], _T]) -> _T:
        """Again after an error that may pass, until the deadline, with longer and longer waits."""
        errors, until = 0, time.monotonic() + self.origin.deadline
        where = f"{self.origin.url.rstrip('/')}/{what}"
        exceptions = obstore().exceptions
        while True:
            try:
                return request()
            except FileNotFoundError as error:
                raise CorruptStoreError(
                    "A file of the store is missing",
                    found=_first_line(error),
                    do="check the URL; copy the store there again if it is right",
                    path=where,
                ) from error
            except exceptions.PreconditionError as error:
                raise CorruptStoreError(
                    "A file of the store was changed while it was read",
                    found=_first_line(error),
                    do="open the store again",
                    path=where,
                ) from error
            except (exceptions.BaseError, OSError) as error:
                errors += 1
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (errors - 1))
                wait *= random.uniform(0.5, 1)
                if _denied(error):
                    raise RemoteError(
                        "The object store gives no leave to read",
                        found=_first_line(error),
                        do="set credentials in the environment (AWS_ACCESS_KEY_ID … or "
                        "GOOGLE_APPLICATION_CREDENTIALS), or for a public bucket "
                        "options={'skip_signature': 'true'}",
                        path=where,
                    ) from error
                if time.monotonic() + wait > until:
                    raise RemoteError(
                        "The object store does not answer",
                        found=f"{errors} errors in {self.origin.deadline:g} s, the last: "
                        + _first_line(error),
                        do="check the network and the URL, then run the command again: what has "
                        "come is kept",
                        path=where,
                    ) from error
                time.sleep(wait)


def _denied(error: Exception) -> bool:
    exceptions = obstore().exceptions
    kinds = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
    # without any credentials S3 is asked for them at the address of its machines
    return isinstance(error, kinds) or "169.254." in str(error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
