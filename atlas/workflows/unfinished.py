"""What an update that is not at its end has done: to go on from, to be told of, to be rid of.

::

    STORE/.update-STUDY/request.json    what was asked, at which state of the store
    STORE/.update-STUDY/store/          a fork of the store, where each step commits a state
    STORE/.update-STUDY/run/            the run folder of the surgery

An update that fails or is killed leaves the folder for the same call to go on from. Until then it
takes room, so it is named by :func:`unfinished_updates`, and removed by :func:`discard_update`.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from stat import S_ISREG
from typing import Any

from anndata import AnnData

from atlas import files
from atlas.errors import ConfigError, InputError, ModelError, StoreError
from atlas.provenance import command
from atlas.store import CountStore, open_store
from atlas.store import manifest as manifests
from atlas.store.fork import UPDATE, fork

_REQUEST = "request.json"


@dataclass(frozen=True, slots=True)
class UnfinishedUpdate:
    """An update that was interrupted and not gone on with.

    Attributes
    ----------
    study, model
        What was to be added to which model; the model is None where the folder does not say.
    begun
        UTC, ISO 8601, to the second.
    n_bytes
        What its files take on disk, without those that it shares with the store.
    path
        Its folder.
    running
        It is at work, as far as can be told: the process that writes to the store is alive.
    goes_on
        The same call goes on from it.
    do
        What to do with it, a line for each possibility.
    """

    study: str
    model: str | None
    begun: str
    n_bytes: int
    path: Path
    running: bool
    goes_on: bool
    do: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "path": str(self.path), "do": list(self.do)}


def unfinished_updates(store: CountStore) -> tuple[UnfinishedUpdate, ...]:
    """The updates of a store that are not at their end: interrupted ones, and one at work now."""
    writing = manifests.who_writes(store.path)
    return tuple(
        _found(store, folder, writing)
        for folder in sorted(store.path.glob(f"{UPDATE}*"))
        if folder.is_dir() and not folder.is_symlink()
    )


def discard_update(path: str | PathLike[str], study: str) -> UnfinishedUpdate:
    """Remove what an interrupted update of a study has done; the store stays as it is.

    Parameters
    ----------
    path
        The store.
    study
        The study of the update. One of that name that is in the store is not touched.

    Returns
    -------
    What there was.

    Raises
    ------
    LockedError
        An update, or another writer, is at work.
    StoreError
        There is no unfinished update of this study.
    """
    store = open_store(path)
    with manifests.writer(store.path, f"discard the update {study}"):
        there = {one.study: one for one in unfinished_updates(store)}
        if study not in there:
            raise StoreError(
                "The store has no unfinished update of this study",
                found=study,
                expected="one of " + (", ".join(there) or "(there are none)"),
                path=store.path,
            )
        _remove(there[study].path)
    return there[study]


def work_folder(root: Path, study: str) -> Path:
    """Where an update works."""
    return root / f"{UPDATE}{study}"


def request_of(
    source: str | PathLike[str] | AnnData,
    model: str,
    appending: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What has to be the same for an update to go on, plain JSON."""
    found: list[Any]
    if isinstance(source, AnnData):
        found = ["memory", os.getpid(), id(source)]  # cannot go on in another process
    else:
        paths = [Path(source), *sorted(Path(source).rglob("*"))]
        stats = [(str(path.absolute()), path.stat()) for path in paths if path.is_file()]
        found = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    if (table := appending.get("orthologs")) and Path(table).is_file():
        found.append(files.digest_file(Path(table)))
    asked = {"source": found, "model": model, "append": appending, "options": options}
    return dict(json.loads(json.dumps(asked, default=str)))


def is_of(work: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the folder is of an update that was asked for in these words."""
    return not _differing(_recorded(work), asked)


def begin(root: Path, work: Path, asked: Mapping[str, Any], *, fresh: bool) -> list[str]:
    """Make the folder to work in, or take the one to go on with; returns what to say."""
    notes = []
    if work.exists():
        recorded = _recorded(work)
        differing = _differing(recorded, asked)
        if not differing and not fresh:
            return ["going on with the update that was interrupted"]
        if recorded is not None:  # else it had not begun
            why = "--fresh was given" if fresh else f"it was of another {', '.join(differing)}"
            notes.append(f"an interrupted update was not gone on with: {why}")
        _remove(work)
    work.mkdir()
    fork(root, work / "store", manifests.read(root))
    about = {**asked, "begun": manifests.now(), "command": command()}
    files.replace_bytes(work / _REQUEST, json.dumps(about, indent=1).encode())
    return notes


@contextmanager
def kept_to_go_on(work: Path) -> Iterator[None]:
    """After what no repetition mends, such as bad input, nothing stays; else it can go on."""
    try:
        yield
    except (InputError, ModelError, ConfigError):
        shutil.rmtree(work, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "(what was done is kept: the same command goes on, --fresh starts anew)"
        ) from None


def _recorded(work: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((work / _REQUEST).read_bytes()))
    except (OSError, ValueError):
        return None


def _differing(recorded: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> list[str]:
    """What was asked for in other words."""
    return [name for name in asked if (recorded or {}).get(name) != asked[name]]


def _remove(work: Path) -> None:
    """Remove the folder; what a kill leaves of it is not gone on with."""
    (work / _REQUEST).unlink(missing_ok=True)
    shutil.rmtree(work)


def _found(store: CountStore, folder: Path, writing: Mapping[str, Any] | None) -> UnfinishedUpdate:
    study = folder.name.removeprefix(UPDATE)
    recorded = _recorded(folder)
    about = recorded or {}
    why_not = _why_not(store, study, recorded)
    do: tuple[str, ...]
    if running := writing is not None and writing.get("action") == f"update {study}":
        do = (f"it is at work now: process {writing['pid']} on {writing['host']}",)
    else:
        rid = shlex.join(["atlas", "drop", str(store.path), study, "--unfinished"])
        again = _again(about.get("command", ""))
        do = (why_not or f"go on: {again}", f"or be rid of it: {rid}")
    return UnfinishedUpdate(
        study=study,
        model=about.get("model"),
        begun=about.get("begun") or _time_of(folder),
        n_bytes=_own_bytes(folder),
        path=folder,
        running=running,
        goes_on=not running and why_not is None,
        do=do,
    )


def _why_not(store: CountStore, study: str, recorded: Mapping[str, Any] | None) -> str | None:
    """Why the same call would not go on; None where it would."""
    if recorded is None:
        return "nothing had been done yet: the same command starts anew"
    newest = manifests.numbers(store.path)[-1]
    if study in (entry.name for entry in manifests.read(store.path).studies):
        return "a study of this name is in the store, so nothing comes of it"
    if recorded.get("manifest") != newest:
        return "the store has changed since: the same command starts anew"
    source = recorded.get("source") or [None]
    if source[0] == "memory":
        return "its study was an AnnData in memory: only the same process goes on"
    if not all(_as_it_was(*one) for one in source if isinstance(one, list)):
        return "its input has changed since: the same command starts anew"
    return None


def _as_it_was(name: str, size: int, time: int) -> bool:
    try:
        stat = Path(name).stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (size, time)


def _again(recorded: str) -> str:
    """The command that goes on, as it was typed; without the option by which it would not."""
    words = shlex.split(recorded)
    if words[:2] != ["atlas", "update"]:
        return "the same call of atlas.update" if recorded else "the same `atlas update` command"
    return shlex.join(word for word in words if word != "--fresh")


def _time_of(folder: Path) -> str:
    try:
        time = folder.stat().st_mtime
    except FileNotFoundError:  # the update came to its end meanwhile
        return ""
    changed = datetime.datetime.fromtimestamp(time, datetime.UTC)
    return changed.isoformat(timespec="seconds")


def _own_bytes(folder: Path) -> int:
    """Bytes that are free once the folder is gone: links to the store's files take none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                stat = Path(place, name).lstat()
            except FileNotFoundError:  # an update is at work
                continue
            total += stat.st_size if S_ISREG(stat.st_mode) and stat.st_nlink == 1 else 0
    return total
