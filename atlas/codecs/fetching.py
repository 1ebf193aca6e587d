"""Single requests to an object store: in this process, or in a fork of it by helpers started anew.

obstore's threads are not there in a fork, which would wait for them for ever. ``python -m
atlas.codecs.fetching`` is a helper: it is told where to connect on its first line of input, then
answers one request a line, each with a line of JSON and as many bytes as that says.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

NO_ETAG: Final = "none"


class Missing(Exception):
    """There is no such object."""


class Changed(Exception):
    """The object has another ETag."""


class Denied(Exception):
    """There is no leave to read it."""


class Refused(Exception):
    """The server takes the request for a wrong one, which it will do again."""


_KINDS: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind for kind in (Missing, Changed, Denied, Refused, OSError)
}
_STATUS: Final = re.compile(r"status code: (4\d\d)")
_PASSING: Final = ("408", "425", "429")


class Item(NamedTuple):
    """An object: its key below the URL, bytes, and ETag where the server has them."""

    key: str
    size: int
    etag: str


class Requests(Protocol):
    """Requests made once; what may pass is an OSError, else it is one of the others above."""

    def list(self) -> list[Item]:
        """All objects below the URL."""
        ...

    def head(self, key: str) -> Item:
        """Size and ETag of an object."""
        ...

    def get(
        self, key: str, start: int | None, stop: int | None, etag: str
    ) -> tuple[memoryview, Item]:
        """Bytes of an object; see :meth:`atlas.codecs.connection.Connection.get`."""
        ...


class Direct:
    """By obstore, in this process.

    Raises
    ------
    TypeError, ValueError, obstore.exceptions.BaseError
        The URL or an option cannot be used.
    """

    def __init__(self, url: str, options: Mapping[str, str], timeout: float) -> None:
        self._package = import_module("obstore")
        self._store = import_module("obstore.store").from_url(
            url,
            client_options={
                "timeout": timedelta(seconds=timeout),
                "connect_timeout": timedelta(seconds=min(10.0, timeout)),
                "allow_http": True,
            },
            retry_config={"max_retries": 0},  # the connection does it, with stalls counted too
            **options,
        )

    def list(self) -> list[Item]:
        """See :class:`Requests`."""
        with self._kinds():
            return [
                Item(found["path"], found["size"], found["e_tag"] or NO_ETAG)
                for page in self._package.list(self._store)
                for found in page
            ]

    def head(self, key: str) -> Item:
        """See :class:`Requests`."""
        with self._kinds():
            found = self._package.head(self._store, key)
            return Item(key, found["size"], found["e_tag"] or NO_ETAG)

    def get(
        self, key: str, start: int | None, stop: int | None, etag: str
    ) -> tuple[memoryview, Item]:
        """See :class:`Requests`."""
        options: dict[str, Any] = {}
        if start is not None:
            options["range"] = (start, stop) if stop is not None else {"suffix": -start}
        if etag != NO_ETAG:
            options["if_match"] = etag
        with self._kinds():
            found = self._package.get(self._store, key, options=options)
            data = memoryview(found.bytes())
            first, last = found.range
            if len(data) != last - first:
                raise OSError(f"{len(data)} bytes of {last - first}")
            return data, Item(key, found.meta["size"], found.meta["e_tag"] or NO_ETAG)

    @contextmanager
    def _kinds(self) -> Iterator[None]:
        exceptions = self._package.exceptions
        try:
            yield
        except FileNotFoundError as error:
            raise Missing(first_line(error)) from error
        except exceptions.PreconditionError as error:
            raise Changed(first_line(error)) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise Denied(first_line(error)) from error
        except exceptions.BaseError as error:
            raise _kind(str(error))(first_line(error)) from error


class Helpers:
    """By helper processes, each with one request at a time."""

    def __init__(self, url: str, options: Mapping[str, str], timeout: float) -> None:
        self._told = {"url": url, "options": dict(options), "timeout": timeout}
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def list(self) -> list[Item]:
        """See :class:`Requests`."""
        return [Item(*found) for found in self._ask({"do": "list"})[0]["items"]]

    def head(self, key: str) -> Item:
        """See :class:`Requests`."""
        return Item(*self._ask({"do": "head", "key": key})[0]["item"])

    def get(
        self, key: str, start: int | None, stop: int | None, etag: str
    ) -> tuple[memoryview, Item]:
        """See :class:`Requests`."""
        asked = {"do": "get", "key": key, "start": start, "stop": stop, "etag": etag}
        answer, data = self._ask(asked)
        return memoryview(data), Item(*answer["item"])

    def _ask(self, asked: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        try:
            helper = self._idle.get_nowait()
        except queue.Empty:
            helper = self._started()
        assert helper.stdin is not None
        assert helper.stdout is not None
        try:
            helper.stdin.write(json.dumps(asked).encode() + b"\n")
            helper.stdin.flush()
            answer = json.loads(helper.stdout.readline())
            data = helper.stdout.read(answer.get("bytes", 0))
            if len(data) < answer.get("bytes", 0):
                raise OSError("half an answer")
        except (OSError, ValueError) as error:
            helper.kill()
            helper.wait()
            raise OSError(f"a helper process ended: {error}") from error
        self._idle.put(helper)
        if "error" in answer:
            raise _KINDS[answer["error"]](answer["message"])
        return answer, data

    def _started(self) -> subprocess.Popen[bytes]:
        home = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        helper = subprocess.Popen(
            [sys.executable, "-m", "atlas.codecs.fetching"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for whoever asks; at the end of input it leaves
        )
        assert helper.stdin is not None
        helper.stdin.write(json.dumps(self._told).encode() + b"\n")
        return helper


def _kind(message: str) -> type[Exception]:
    """Of an error that obstore has no class for."""
    if "169.254." in message:  # without credentials S3 asks for them at the address of its machines
        return Denied
    status = _STATUS.search(message)
    return OSError if status is None or status[1] in _PASSING else Refused


def first_line(error: Exception) -> str:
    """Of a message, for one of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def _serve() -> None:
    """Be a helper."""
    requests = Direct(**json.loads(sys.stdin.buffer.readline()))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        data = memoryview(b"")
        answer: dict[str, Any]
        try:
            match asked.pop("do"):
                case "list":
                    answer = {"items": requests.list()}
                case "head":
                    answer = {"item": requests.head(**asked)}
                case _:
                    data, item = requests.get(**asked)
                    answer = {"item": item, "bytes": len(data)}
        except tuple(_KINDS.values()) as error:
            kind = next(name for name, kind in _KINDS.items() if isinstance(error, kind))
            answer = {"error": kind, "message": str(error)}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        _serve()
