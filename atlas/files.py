"""The one door through which Atlas writes: every file and folder synced, nothing half there.

Stores, models and checkpoints all pass :func:`write_bytes`, those that zarr-python writes included,
so that a test can make the n-th write fail.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def write_bytes(path: Path, data: bytes | memoryview, *, exclusive: bool = False) -> None:
    """Write a file whole and sync it; with ``exclusive`` the file must not be there."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if exclusive else os.O_TRUNC)
    descriptor = os.open(path, flags, 0o666)
    try:
        view = memoryview(data)
        while len(view):
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_pieces(descriptor: int, pieces: Iterable[bytes | memoryview]) -> None:
    """Write to an open file what is too long to be held at once, and sync it."""
    for piece in pieces:
        view = memoryview(piece)
        while len(view):
            view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def write_scratch(path: Path, parts: Sequence[memoryview]) -> None:
    """Write a file that need not outlive a crash of the machine, so it is not synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for part in parts:
            view = part
            while len(view):
                view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Sync one folder, so that the names in it outlive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Sync every folder below ``path`` and itself, the deepest first."""
    for folder, _, _ in os.walk(path, topdown=False):
        sync_folder(Path(folder))


def create_exclusively(path: Path, data: bytes) -> None:
    """Make ``path`` appear with all of ``data`` at once, or raise FileExistsError.

    The data is written to a file beside it and linked: a reader never sees half of it, and of two
    writers one loses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_bytes(partial, data)
        os.link(partial, path)
        try:
            sync_folder(path.parent)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    finally:
        partial.unlink(missing_ok=True)


def replace_bytes(path: Path, data: bytes) -> None:
    """Give a file new content, so that a crash leaves either all of the old or all of the new."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_bytes(partial, data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def digest_file(path: Path) -> str:
    """SHA-256 of one file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tree(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 over names (relative to ``root``) and contents of the files at and below ``paths``.

    A file that is missing changes it, which zarr-python alone would read as fill values.
    """
    files: set[Path] = set()
    for path in paths:
        files.update((p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])
    total = hashlib.sha256()
    for file in sorted(files):
        name = file.relative_to(root).as_posix().encode()
        content = digest_file(file) if file.is_file() else "missing"
        total.update(len(name).to_bytes(4, "little") + name + content.encode())
    return total.hexdigest()
