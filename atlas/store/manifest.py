"""Numbered manifests: read, commit exclusively, one writer at a time, clean up after a crash.

::

    STORE/manifests/000001.json …   every state the store has had
    STORE/genes/000001.json …       gene tables, each as of the manifest of that number
    STORE/studies/NAME/             one AnnData group per study (NAME@000007 where NAME was dropped)
    STORE/parts/NAME/…              what lies beside a study: index, statistics, embeddings
    STORE/models/NAME/VERSION/      trained models, with a record of where each came from
    STORE/writer.lock, writer.json  who is writing

A writer puts everything in place first, synced; then the next manifest appears in one step. What no
manifest names was left by a crash, and the next writer removes it.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock

from atlas import files
from atlas.codecs.connection import MARK, Origin
from atlas.errors import CorruptStoreError, LockedError, NotAStoreError, StoreError
from atlas.ingest.genes import GeneTable
from atlas.provenance import command
from atlas.store.projection_format import BEGUN, WHOLE
from atlas.store.schema import GenesFile, Manifest

SCRATCH = "scratch"
"""Folder in the store for what a writer needs for a while."""
INGEST, JOURNAL = "ingest", "journal.json"
"""Folder in it for an ingest, and the file there that says how far it is."""

_NUMBERED = re.compile(r"^(\d{6,})\.json$")


def now() -> str:
    """This moment in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def manifest_path(root: Path, number: int) -> Path:
    """File of manifest ``number``."""
    return root / "manifests" / f"{number:06d}.json"


def numbers(root: Path) -> list[int]:
    """Numbers of all manifests, rising."""
    folder = root / "manifests"
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := _NUMBERED.match(p.name)))


def read(root: Path, number: int | None = None) -> Manifest:
    """Read a manifest: the newest, or the one of a number.

    Raises
    ------
    NotAStoreError
        ``root`` is no folder, or has no manifest.
    """
    if not root.exists():
        raise NotAStoreError(
            "There is no store here",
            found="no such folder",
            expected="a folder that `atlas ingest` made",
            path=root,
        )
    there = numbers(root)
    if not there and any((root / name).is_file() for name in (WHOLE, BEGUN)):
        raise NotAStoreError(
            "This is a projection of a store, not a store",
            found=f"{WHOLE} or {BEGUN} in place of manifests",
            expected="a folder that `atlas ingest` made",
            do="open the store; atlas.project(store, genes, path) opens a projection of it",
            path=root,
        )
    if not there:
        raise NotAStoreError(
            "This is no store",
            found="a file" if root.is_file() else "a folder without manifests",
            expected="a folder that `atlas ingest` made",
            do="check the path, or make a store with `atlas ingest`",
            path=root,
        )
    if number is not None and number not in there:
        raise StoreError(
            "The store has no manifest of this number", found=number, expected=there, path=root
        )
    path = manifest_path(root, there[-1] if number is None else number)
    manifest = _parsed(path.read_bytes(), path)
    if f"{manifest.number:06d}.json" != path.name:
        raise CorruptStoreError(
            "The manifest has another number than its file",
            found=manifest.number,
            expected=path.stem,
            path=path,
        )
    return manifest


@lru_cache(maxsize=512)
def _parsed(data: bytes, path: Path) -> Manifest:
    """A manifest, checked once however often its file is read: a writer looks at all of them."""
    return Manifest.from_bytes(data, path)


def commit(root: Path, newest: Manifest, action: str, **changes: Any) -> Manifest:
    """Make the state that follows ``newest`` the newest, and return it.

    Raises
    ------
    StoreError
        A manifest of this number is there already: the lock was not respected.
    """
    state = replace(
        newest,
        number=newest.number + 1,
        created=now(),
        written_by=version("atlas-trainer"),
        action=action,
        command=command(),
        **changes,
    )
    path = manifest_path(root, state.number)
    try:
        files.create_exclusively(path, state.to_bytes())
    except FileExistsError:
        raise StoreError(
            "Another writer has committed meanwhile",
            found=f"manifest {state.number}",
            do="run the command again; on network file systems without locks, one at a time",
            path=path,
        ) from None
    return state


def study_folder(root: Path, newest: Manifest, study: str) -> str:
    """Name of the folder for a new study below ``studies/`` and ``parts/``.

    It is the study's own, unless an older state still holds a study of that name, which was dropped
    since: then it is ``NAME@000007``, by the number of the manifest to come.
    """
    taken = {entry.path for state in history(root) for entry in state.studies}
    free = f"studies/{study}" not in taken
    return study if free else f"{study}@{newest.number + 1:06d}"


def is_free(root: Path) -> bool:
    """Nothing is there, an empty folder, or what a crash left before a store's first state."""
    if not root.exists():
        return True
    if not root.is_dir() or numbers(root):
        return False
    files_there = (p.relative_to(root) for p in root.rglob("*") if not p.is_dir())
    return all(
        p.as_posix() == "genes/000001.json"
        or (p.parent.name == "manifests" and p.name.endswith(".partial"))
        for p in files_there
    )


def create(root: Path, backend: str, gene_mode: str, table: GeneTable) -> Manifest:
    """Make the folder of a new store, with manifest 1.

    Raises
    ------
    StoreError
        There is something at ``root`` already.
    """
    if not is_free(root):
        raise StoreError(
            "A store cannot be made here",
            found="a store" if numbers(root) else "a file or a folder that is not empty",
            expected="a path that is free",
            do="open the store that is there, or choose another path",
            path=root,
        )
    for folder in ("manifests", "genes", "studies", "parts"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    void = Manifest(0, now(), "", "", "", backend, gene_mode, GenesFile("", "", 0))
    state = commit(root, void, "create", genes=write_gene_table(root, 1, table))
    files.sync_tree(root)
    files.sync_folder(root.absolute().parent)
    return state


def write_gene_table(root: Path, number: int, table: GeneTable) -> GenesFile:
    """Write the gene table as of manifest ``number``."""
    path = root / "genes" / f"{number:06d}.json"
    files.write_bytes(path, json.dumps(table.to_json()).encode())
    files.sync_folder(path.parent)
    return GenesFile(path.relative_to(root).as_posix(), files.digest_file(path), len(table.names))


def history(root: Path) -> list[Manifest]:
    """All states the store has had, the oldest first."""
    return [read(root, number) for number in numbers(root)]


def read_gene_table(root: Path, manifest: Manifest) -> GeneTable:
    """Read the gene table of a state, checked against its digest."""
    path = root / manifest.genes.path
    if not path.is_file() or files.digest_file(path) != manifest.genes.sha256:
        raise CorruptStoreError(
            "The gene table is missing or is not what was written",
            do="restore it from a copy; older manifests of the store are still whole",
            path=path,
        )
    return GeneTable.from_json(json.loads(path.read_bytes()))


@contextmanager
def writer(root: Path, action: str) -> Iterator[Manifest]:
    """Be the only writer of a store; gives its newest state.

    What a crash left behind is removed first, and what the body wrote without committing it last.

    Raises
    ------
    LockedError
        Another process writes; the message names it.
    StoreError
        Writing failed (a full disk, an I/O error); the store is as it was.
    """
    if (root / MARK).is_file():
        raise StoreError(
            "A store by URL can only be read",
            found=f"a copy, in the cache, of what {Origin.read(root).url} holds",
            do="work on the store where it is, or copy it whole: atlas convert URL STORE; keep an "
            "embedding with atlas.embed(name=None), genes with record=False",
            path=root,
        )
    owner = root / "writer.json"
    try:
        lock = _lock(root)
    except filelock.Timeout:
        try:
            who = json.loads(owner.read_text())
            found = "process {pid} on {host}, since {since}: {action}".format(**who)
        except (OSError, ValueError, KeyError):
            found = "another process"
        raise LockedError(
            "Another writer is at work on the store",
            found=found,
            do="wait until it has ended; readers are not affected",
            path=root,
        ) from None
    except OSError as error:
        raise StoreError(
            "The store cannot be written to",
            found=str(error),
            do="check the permissions of its folder",
            path=root,
        ) from error
    try:
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": now(), "action": action}
        owner.write_text(json.dumps({**who, "command": command()}))
        remove_leftovers(root)
        (root / SCRATCH).mkdir(exist_ok=True)
        yield read(root)
    except OSError as error:
        raise StoreError(
            f"Writing failed ({action}); the store is as it was",
            found=str(error),
            do="make room or mend the disk, then run the command again",
            path=root,
        ) from error
    finally:
        try:
            remove_leftovers(root)
        finally:
            owner.unlink(missing_ok=True)
            lock.release()


def who_writes(root: Path) -> dict[str, Any] | None:
    """Who writes to a store now (``pid``, ``host``, ``since``, ``action``), None for nobody.

    As far as can be told without the lock, which a reader does not take: what a writer on this
    machine left whose process is gone is nobody's.
    """
    try:
        who: dict[str, Any] = json.loads((root / "writer.json").read_text())
        pid, here = int(who["pid"]), who["host"] == socket.gethostname()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        if here:
            os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's
    return who


def _lock(root: Path) -> filelock.BaseFileLock:
    """Take the lock of writers, or raise filelock.Timeout at once."""
    lock = filelock.FileLock(root / "writer.lock", thread_local=False)
    lock.acquire(timeout=0)
    return lock


def remove_leftovers(root: Path) -> list[Path]:
    """Remove what no manifest names: the remains of an interrupted writer; returns what it was.

    An ingest that can go on stays, until a commit changes the store.
    """
    named = {path for manifest in history(root) for path in manifest.paths}
    held = (
        path
        for pattern in ("studies/*", "parts/*/*", "models/*/*", "genes/*")
        for path in root.glob(pattern)
    )
    candidates = [
        *(path for path in held if path.relative_to(root).as_posix() not in named),
        *root.glob("manifests/.*.partial"),
        *(
            (p for p in root.glob(f"{SCRATCH}/*") if p.name != INGEST)
            if can_go_on(root)
            else root.glob(SCRATCH)
        ),
    ]
    for path in candidates:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for folder in (*root.glob("parts/*"), *root.glob("models/*")):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return candidates


def can_go_on(root: Path) -> bool:
    """Whether an ingest was interrupted since the newest state, and has a journal."""
    try:
        journal = json.loads((root / SCRATCH / INGEST / JOURNAL).read_bytes())
        return bool(journal["manifest"] == numbers(root)[-1])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def remove_unused(root: Path) -> None:
    """Remove a store that holds nothing but its first state, unless somebody writes to it.

    It stays where an ingest into it can go on.
    """
    try:
        lock = _lock(root)
    except OSError:  # held by another writer, or the folder cannot be written to
        return
    try:
        if numbers(root) == [1] and not can_go_on(root):
            shutil.rmtree(root, ignore_errors=True)
    finally:
        lock.release()
