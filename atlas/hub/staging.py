"""A place beside the target where it is made, so that it appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atlas import files
from atlas.errors import OutputError


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """An empty folder on the disk of ``target``, gone at the end whatever happens.

    A process that is killed leaves it; the next one for the same target empties it. The lock goes
    with the process.

    Raises
    ------
    OutputError
        ``target`` is there already, its folder is not, or another process makes it; or writing
        failed (any ``OSError`` within).
    """
    check_free(target)
    folder = target.with_name(f".{target.name}.partial")
    descriptor = None
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            descriptor = None
            raise OutputError(
                "Another process is writing this",
                found=f"{folder.name} is locked",
                do="wait until it has ended",
                path=target,
            ) from None
        for left in folder.iterdir():
            _remove(left)
        yield folder
    except OSError as error:
        raise OutputError(
            "It could not be written, and nothing is left of it",
            found=str(error),
            expected="a folder that can be written to, and room in it",
            do="make room, or choose another place, and run it again",
            path=target,
        ) from error
    finally:
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def check_free(target: Path) -> None:
    """Refuse a target that is there: an empty folder may be.

    Raises
    ------
    OutputError
        It is there, has no name, or is to be in a folder that is not there.
    """
    if not target.name or target.name == "..":
        raise OutputError("This is no name of a new file or folder", found=str(target))
    empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if os.path.lexists(target) and not empty:
        raise OutputError(
            "There is something here already",
            expected="a name that is free, or an empty folder",
            do="choose another, or remove it",
            path=target,
        )
    if not target.parent.is_dir():
        raise OutputError(
            "The folder to write to is not there", do="make it first", path=target.parent
        )


def place(made: Path, target: Path) -> None:
    """Give what was made in the staging folder its name; it is synced first."""
    if made.is_dir():
        files.sync_tree(made)
    elif target.is_dir():  # an empty one
        target.rmdir()
    made.replace(target)
    try:
        files.sync_folder(target.parent)
    except BaseException:
        _remove(target)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
