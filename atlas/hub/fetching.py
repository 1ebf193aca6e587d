"""A shared reference from a folder, an archive or a URL, checked in full before it has its name."""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import IO

from atlas import files
from atlas.errors import ConfigError, PackageError
from atlas.hub.archive import Entry, archive_entries, folder_entries
from atlas.hub.download import (
    check_digest,
    compare_digests,
    downloaded,
    is_url,
    path_of_url,
    too_long,
)
from atlas.hub.manifest import FETCH_AGAIN, MAX_JSON, PACKAGE, PackageManifest, Part
from atlas.hub.package import Package, load_package, wrong_digest
from atlas.hub.staging import place, staging
from atlas.store.options import bytes_of


def fetch(
    source: str | PathLike[str],
    to: str | PathLike[str],
    *,
    sha256: str | None = None,
    max_bytes: str | int = "16GB",
    timeout: float = 30.0,
    options: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Package:
    """Take in a shared reference.

    Nothing of it is run or unpickled, and only files that it declares are taken. It is there whole
    afterwards and its digests are those that it declares, or nothing is there.

    Parameters
    ----------
    source
        A folder or an archive that :func:`atlas.share` wrote; or the URL of such an archive:
        ``https://``, ``http://``, ``file://``, or with the extra ``remote`` ``s3://`` and ``gs://``.
    to
        The new folder.
    sha256
        The digest that was announced: of the archive, or of the ``package.json`` of a folder. An
        archive with another is not opened.
    max_bytes
        What the archive, and what is in it, may have.
    timeout
        Seconds to wait for a server.
    options
        Of the connection to an object store; see :func:`atlas.open_store`.
    progress
        Show bytes on stderr.

    Raises
    ------
    PackageError
        It is damaged, of a newer version, longer than ``max_bytes``, has another digest, or is not
        what ``atlas share`` writes.
    RemoteError
        A server gives no answer or no leave, or stops in mid-answer.
    OutputError
        ``to`` is there already, or cannot be written.
    """
    limit, target, where = bytes_of("max_bytes", max_bytes), Path(to).absolute(), str(source)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ConfigError("This is no SHA-256", found=repr(sha256), expected="64 hex digits")
    path = path_of_url(where) if is_url(where) else Path(source)
    if path is not None and not path.exists():
        raise PackageError("There is no such file or folder", expected="a package", path=path)
    with staging(target) as folder, ExitStack() as stack:
        if path is not None and path.is_dir():
            entries = stack.enter_context(folder_entries(path, where))
            _unpack(entries, folder / "package", limit, where, sha256)
        else:
            file = stack.enter_context(
                downloaded(
                    where, folder, limit=limit, timeout=timeout, options=options, progress=progress
                )
                if path is None
                else _opened(path)
            )
            if sha256 is not None:
                check_digest(file, sha256, where)
            entries = stack.enter_context(archive_entries(file, where))
            _unpack(entries, folder / "package", limit, where, None)
        package = _loaded(folder / "package", where)
        place(folder / "package", target)
    return replace(package, folder=target)


def _opened(path: Path) -> IO[bytes]:
    if not stat.S_ISREG(path.stat().st_mode):
        raise PackageError("This is no file", expected="a folder, .tar.gz or .zip", path=path)
    try:
        return path.open("rb")
    except OSError as error:
        raise PackageError("The package cannot be read", found=str(error), path=path) from error


def _unpack(
    entries: Iterator[Entry], folder: Path, limit: int, where: str, sha256: str | None
) -> None:
    """Write the files of a package to a new folder.

    Raises
    ------
    PackageError
        It declares more than ``limit`` bytes, an entry is not as declared or not declared, or one
        that is declared is not there.
    """
    document = _first(entries, where)
    if sha256 is not None:
        compare_digests(hashlib.sha256(document).hexdigest(), sha256, where)
    manifest = PackageManifest.from_bytes(document, where)
    if manifest.n_bytes + len(document) > limit:
        raise too_long(f"{manifest.n_bytes + len(document):,} bytes unpacked", limit, where)
    folder.mkdir()
    missing = dict(manifest.parts)
    for entry in entries:
        part = missing.pop(entry.name, None)
        if part is None:
            again = entry.name in manifest.parts or entry.name == PACKAGE
            raise _undeclared(
                f"{entry.name} a second time" if again else f"{entry.name}, undeclared", where
            )
        if entry.size != part.bytes:
            raise _undeclared(
                f"{entry.name} of {entry.size:,} bytes where {part.bytes:,} are declared", where
            )
        path = folder / entry.name
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as file:
            files.write_pieces(file.fileno(), _checked(entry, part, where))
    if missing:
        raise _undeclared(f"no {', '.join(sorted(missing)[:5])}", where)
    files.write_bytes(folder / PACKAGE, document)


def _first(entries: Iterator[Entry], where: str) -> bytes:
    first = next(entries, None)
    if first is None or first.name != PACKAGE:
        found = "nothing" if first is None else first.name
        raise _undeclared(f"{found} in the first place", where)
    if first.size > MAX_JSON:
        raise too_long(f"{PACKAGE} of {first.size:,} bytes", MAX_JSON, where)
    document = b"".join(first.pieces)
    if len(document) != first.size:
        raise _undeclared(f"{PACKAGE} of {len(document):,} bytes in place of {first.size:,}", where)
    return document


def _checked(entry: Entry, part: Part, where: str) -> Iterator[bytes]:
    """The pieces of an entry, up to its length, and an error in place of the end if it is wrong."""
    digest, n = hashlib.sha256(), 0
    for piece in entry.pieces:
        n += len(piece)
        if n > part.bytes:
            break
        digest.update(piece)
        yield piece
    if n != part.bytes:
        more = "more" if n > part.bytes else f"{n:,}"
        raise _undeclared(f"{entry.name} of {more} bytes where {part.bytes:,} are declared", where)
    if digest.hexdigest() != part.sha256:
        raise wrong_digest(entry.name, digest.hexdigest(), part, where)


def _loaded(folder: Path, where: str) -> Package:
    try:
        return load_package(folder)
    except PackageError as error:  # the folder will be gone
        raise PackageError(
            error.what, found=error.found, expected=error.expected, do=error.do, path=where
        ) from error


def _undeclared(found: str, where: str) -> PackageError:
    return PackageError(
        "The package does not hold what it declares",
        found=found,
        expected=f"{PACKAGE} first, then each file that it declares, once",
        do=FETCH_AGAIN,
        path=where,
    )
