"""Archives by URL, streamed to a file without a name: no kill leaves any of it."""

from __future__ import annotations

import hashlib
import http.client
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from atlas import files
from atlas.codecs.connection import PIECE, Connection, Origin
from atlas.errors import ConfigError, CorruptStoreError, PackageError, RemoteError

_WEB: Final = ("http", "https")
_BUCKETS: Final = ("s3", "gs")


def is_url(source: str) -> bool:
    """Whether this is a URL and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def path_of_url(url: str) -> Path | None:
    """The path of a ``file://`` URL; None for a URL of another kind.

    Raises
    ------
    ConfigError
        The file is on another machine.
    """
    parts = urlsplit(url)
    if parts.scheme.lower() != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(
            "A file:// URL is of this machine", found=url, expected="file:///path/of/package.tar.gz"
        )
    return Path(unquote(parts.path))


@contextmanager
def downloaded(
    url: str,
    folder: Path,
    *,
    limit: int,
    timeout: float,
    options: Mapping[str, str] | None,
    progress: bool,
) -> Iterator[IO[bytes]]:
    """What a URL gives, in a file of the disk of ``folder``, at its start.

    Raises
    ------
    ConfigError
        The URL is of a kind that is not fetched from.
    RemoteError
        There is no answer, no leave, or the answer ends before its end.
    PackageError
        It is longer than ``limit`` bytes.
    """
    scheme = urlsplit(url).scheme.lower()
    if scheme in _WEB:
        pieces = _from_web(url, limit, timeout)
    elif scheme in _BUCKETS:
        pieces = _from_bucket(url, limit, timeout, options or {})
    else:
        raise ConfigError(
            "A package is not fetched from a URL of this kind",
            found=url,
            expected=", ".join(f"{one}://" for one in (*_WEB, *_BUCKETS, "file")),
        )
    with (
        tempfile.TemporaryFile(dir=folder) as file,
        tqdm(unit="B", unit_scale=True, desc="fetching", disable=not progress) as bar,
    ):
        files.write_pieces(file.fileno(), _counted(pieces, limit, url, bar))
        file.seek(0)
        yield file


def check_digest(file: IO[bytes], sha256: str, where: str) -> None:
    """Compare all of a file with its SHA-256, and go back to its start.

    Raises
    ------
    PackageError
        It has another.
    """
    found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    compare_digests(found, sha256, where)


def compare_digests(found: str, sha256: str, where: str) -> None:
    """Refuse what has another digest than was asked for.

    Raises
    ------
    PackageError
        They differ.
    """
    if found != sha256.lower():
        raise PackageError(
            "The package is not the one asked for: it has another digest",
            found=f"SHA-256 {found}",
            expected=f"SHA-256 {sha256}",
            do="compare the digest with the one where the package is announced, and fetch it again",
            path=where,
        )


def _counted(pieces: Iterator[bytes], limit: int, url: str, bar: Any) -> Iterator[bytes]:
    n = 0
    for piece in pieces:
        n += len(piece)
        if n > limit:
            raise too_long(f"more than {limit:,} bytes", limit, url)
        yield piece
        bar.update(len(piece))


def too_long(found: str, limit: int, where: str) -> PackageError:
    """The error of a package that is longer than is taken."""
    return PackageError(
        "The package is longer than is taken",
        found=found,
        expected=f"at most {limit:,} bytes",
        do="if it may be that long, raise the limit with --max-bytes",
        path=where,
    )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Goes where it is sent on the web, but not from an encrypted connection to one that is not."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
    ) -> Any:
        allowed = ("https",) if urlsplit(req.full_url).scheme == "https" else _WEB
        if urlsplit(newurl).scheme not in allowed:
            raise RemoteError(
                "The server sends elsewhere, to where there is less to rely on",
                found=newurl,
                do="take that URL yourself, with the digest that was announced",
                path=req.full_url,
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _from_web(url: str, limit: int, timeout: float) -> Iterator[bytes]:
    opener = urllib.request.build_opener(_Redirects)
    request = urllib.request.Request(url, headers={"User-Agent": "atlas"})
    try:
        with opener.open(request, timeout=timeout) as answer:
            length = answer.headers.get("Content-Length")
            left = int(length) if length and length.isdecimal() else None
            if left is not None and left > limit:
                raise too_long(f"{left:,} bytes", limit, url)
            while piece := answer.read(PIECE):
                if left is not None:
                    left -= len(piece)
                yield piece
            if left:
                raise _no_answer(f"an answer that ends {left:,} bytes early", url)
    except urllib.error.HTTPError as error:
        raise _no_answer(f"{error.code} {error.reason}", url) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _no_answer(f"{type(error).__name__}: {error}", url) from error


def _no_answer(found: str, url: str) -> RemoteError:
    return RemoteError(
        "The package could not be fetched, and nothing is left of it",
        found=found,
        do="check the network and the URL, then run it again",
        path=url,
    )


def _from_bucket(
    url: str, limit: int, timeout: float, options: Mapping[str, str]
) -> Iterator[bytes]:
    above, _, name = url.rstrip("/").rpartition("/")
    connection = Connection(Origin(above, options, timeout=timeout))
    try:
        about = connection.head(name)
        if about.size > limit:
            raise too_long(f"{about.size:,} bytes", limit, url)
        for start in range(0, about.size, PIECE):
            stop = min(about.size, start + PIECE)
            yield bytes(connection.get(name, start, stop, about.etag)[0])
    except CorruptStoreError as error:  # in words of a store
        raise _no_answer(str(error.found), url) from error
