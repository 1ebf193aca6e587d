"""Packages as folders and archives: written in one form, and read with suspicion.

An archive is a row of plain files, ``package.json`` first; it declares the others with their sizes,
and nothing else is taken. Python's ``tarfile`` and ``shutil.unpack_archive`` follow what an archive
says: links, devices, names that lead elsewhere, headers of any length. So entries are read one
after another here, to no further than what is declared of each, and only by name into the folder
where the package is made.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from atlas.errors import PackageError
from atlas.hub.manifest import FETCH_AGAIN, PACKAGE

PIECE: Final = 2**20
_BLOCK: Final = 512
_PADDING: Final = 2**16
"""Bytes of zeros at the end of a tar archive at most; tar pads to 10,240."""
_MODE: Final = 0o644
_DOS_TIME: Final = (1980, 1, 1, 0, 0, 0)
_DAMAGE: Final = (
    *(zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, tarfile.HeaderError, EOFError),
    *(ValueError, NotImplementedError, RuntimeError, IndexError),
)
"""What the readers of Python raise where an archive is damaged."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a package: its name, the bytes that it says it has, and its content.

    ``pieces`` must be used up before the next entry is asked for, and may hold more or less than
    ``size``.
    """

    name: str
    size: int
    pieces: Iterator[bytes]


# writing


def write_tar(folder: Path, names: list[str], out: IO[bytes]) -> None:
    """Write files of a folder as ``.tar.gz``; the same files make the same bytes."""
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=out, compresslevel=6, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for name in names:
            about = tarfile.TarInfo(name)
            about.size, about.mode = (folder / name).stat().st_size, _MODE
            with (folder / name).open("rb") as file:
                archive.addfile(about, file)


def write_zip(folder: Path, names: list[str], out: IO[bytes]) -> None:
    """Write files of a folder as ``.zip``; the same files make the same bytes."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            about = zipfile.ZipInfo(name, _DOS_TIME)
            about.compress_type, about.external_attr = zipfile.ZIP_DEFLATED, _MODE << 16
            about.external_attr |= stat.S_IFREG << 16
            with (
                (folder / name).open("rb") as file,
                archive.open(about, "w", force_zip64=True) as entry,
            ):
                while piece := file.read(PIECE):
                    entry.write(piece)


# reading


@contextmanager
def archive_entries(file: IO[bytes], where: str) -> Iterator[Iterator[Entry]]:
    """The entries of an archive, told by its first bytes to be ``.tar.gz`` or ``.zip``.

    Raises
    ------
    PackageError
        It is neither, is damaged, or has an entry that no package has.
    """
    start = file.read(4)
    file.seek(0)
    try:
        if start[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file, mode="rb") as packed:
                yield _tar_entries(packed, where)
        elif start == b"PK\x03\x04":
            with zipfile.ZipFile(_Guarded(file)) as archive:
                yield _zip_entries(archive, where)
        else:
            raise _refused("no .tar.gz and no .zip", where)
    except _DAMAGE as error:
        # gzip.BadGzipFile is an OSError, which else is the disk's
        raise PackageError(
            "The archive is damaged",
            found=f"{type(error).__name__}: {error}",
            do=FETCH_AGAIN,
            path=where,
        ) from error


@contextmanager
def folder_entries(folder: Path, where: str) -> Iterator[Iterator[Entry]]:
    """The files of a folder, as of an archive."""
    yield _folder_entries(folder, where)


def _folder_entries(folder: Path, where: str) -> Iterator[Entry]:
    if not (folder / PACKAGE).is_file():
        raise _refused(f"no {PACKAGE}", where)
    names = [PACKAGE]
    for above, folders, found in os.walk(folder, followlinks=False):
        inside = Path(above).relative_to(folder)
        links = [name for name in folders if (Path(above) / name).is_symlink()]
        names += [(inside / name).as_posix() for name in sorted([*found, *links])]
    for name in dict.fromkeys(names):
        _check_name(name, where)
        about = (folder / name).lstat()
        if not stat.S_ISREG(about.st_mode):
            raise _refused(f"{name!r:.120}: {_kind(about.st_mode)}", where)
        try:
            file = (folder / name).open("rb")
        except OSError as error:
            raise _refused(f"{name} cannot be read: {error}", where) from error
        with file:
            yield Entry(name, about.st_size, _read(file, about.st_size))


def _tar_entries(packed: gzip.GzipFile, where: str) -> Iterator[Entry]:
    while True:
        block = packed.read(_BLOCK)
        if len(block) < _BLOCK:
            raise EOFError("it ends in mid-entry")
        if not block.strip(b"\0"):
            break
        about = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        if about.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            # long names too, which no package has
            kind = _TYPES.get(about.type, "an entry of another kind")
            raise _refused(f"{about.name!r:.120}: {kind}", where)
        _check_name(about.name, where)
        if about.size < 0:
            raise _refused(f"{about.name}: {about.size} bytes", where)
        left = _Left(about.size)
        yield Entry(about.name, about.size, left.read(packed))
        if left.bytes:
            raise RuntimeError("an entry was not read")
        packed.read(-about.size % _BLOCK)
    rest = packed.read(_PADDING)
    if rest.strip(b"\0") or packed.read(1):
        raise _refused("something after the end of the archive", where)


_TYPES: Final = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder of its own",
    tarfile.GNUTYPE_LONGNAME: "a long name",
    tarfile.XHDTYPE: "a header of pax",
}


class _Left:
    """How much of an entry is to be read."""

    def __init__(self, size: int) -> None:
        self.bytes = size

    def read(self, file: gzip.GzipFile) -> Iterator[bytes]:
        while self.bytes:
            piece = file.read(min(PIECE, self.bytes))
            if not piece:
                raise EOFError("it ends in mid-entry")
            self.bytes -= len(piece)
            yield piece


def _zip_entries(archive: zipfile.ZipFile, where: str) -> Iterator[Entry]:
    entries = archive.infolist()
    first = [about for about in entries if about.orig_filename == PACKAGE]
    for about in first + [about for about in entries if about.orig_filename != PACKAGE]:
        name, mode = about.orig_filename, about.external_attr >> 16
        # archives made on other systems have no mode
        if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise _refused(f"{name!r:.120}: {_kind(mode)}", where)
        _check_name(name, where)
        if about.flag_bits & 0x1:
            raise _refused(f"{name}: encrypted", where)
        if about.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused(f"{name}: compressed by method {about.compress_type}", where)
        with archive.open(about) as file:
            yield Entry(name, about.file_size, _read(file, about.file_size))


def _read(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Pieces of a file, and one byte more than ``size`` where there is more."""
    left = size + 1
    while left and (piece := file.read(min(PIECE, left))):
        left -= len(piece)
        yield piece


class _Guarded(io.BufferedIOBase):
    """A file of which little is read at once: ``zipfile`` holds a list of any length."""

    _MOST: Final = 2**22

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """As of any file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of any file."""
        return self._file.tell()

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file, up to a limit."""
        if size is None or size < 0:
            size = self._MOST
        if size > self._MOST:
            raise ValueError(f"a list of entries of {size:,} bytes")
        return self._file.read(size)


_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


def _check_name(name: str, where: str) -> None:
    """Refuse a name that leads out of a folder, or that no package has.

    All that are taken are declared, of one of a few forms; this says why others are not.
    """
    if _PLAIN.fullmatch(name):
        return
    parts = name.replace("\\", "/").split("/")
    reason = "a name of another form"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        reason = "an absolute path"
    elif ".." in parts:
        reason = "a path that leads out of the package"
    elif name.endswith("/"):
        reason = "a folder of its own"
    raise _refused(f"{name!r:.120}: {reason}", where)


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return name
    return "a device"


def _refused(found: str, where: str) -> PackageError:
    return PackageError(
        "This is no package that can be taken, and nothing of it was kept",
        found=found,
        expected=f"a folder, .tar.gz or .zip that `atlas share` wrote: {PACKAGE} and the plain "
        "files that it declares",
        do="do not unpack it by other means; ask whoever shares it for another",
        path=where,
    )
