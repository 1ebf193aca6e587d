"""Trained models kept with the store, under names and versions: their files, digests and records.

What a model is, the store does not know: it keeps the files that it is given. The record says where
a version came from, in plain JSON: the version before it, its studies, its settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas import files
from atlas.errors import StoreError
from atlas.store import manifest as manifests
from atlas.store.arrays import checked_folder, read_details, write_part
from atlas.store.options import check_name
from atlas.store.schema import Manifest, ModelEntry, Part

FILES = ("model.json", "weights.safetensors")
"""Of a trained model."""


def versions(root: Path, state: Manifest, name: str) -> dict[int, ModelEntry]:
    """All versions of a model up to a state, by number, rising.

    Raises
    ------
    StoreError
        There is no such model.
    """
    if name not in state.models:
        raise StoreError(
            "The store has no such model",
            found=name,
            expected=f"one of {', '.join(state.models) or '(there are none)'}",
            do=f"keep one with `atlas keep STORE RUN --name {name}`",
            path=root,
        )
    out: dict[int, ModelEntry] = {}
    for number in manifests.numbers(root):
        if number < state.number and (entry := manifests.read(root, number).models.get(name)):
            out[entry.version] = entry
    return out | {state.models[name].version: state.models[name]}


def entry_of(root: Path, state: Manifest, name: str, version: int | None) -> ModelEntry:
    """One version of a model; the newest when None.

    Raises
    ------
    StoreError
        There is no such model or version.
    """
    if version is None and name in state.models:
        return state.models[name]
    there = versions(root, state, name)
    if version not in there:
        raise StoreError(
            f"The model {name!r} has no such version",
            found=version,
            expected="one of " + ", ".join(map(str, there)),
            path=root,
        )
    return there[version]


def folder_of(root: Path, name: str, entry: ModelEntry) -> Path:
    """The folder of a version, its files compared with their digests.

    Raises
    ------
    CorruptStoreError
        A file is missing or is not what was written.
    """
    return checked_folder(root, entry.part, f"the model {name!r}")


def record(root: Path, entry: ModelEntry) -> dict[str, Any]:
    """Where a version came from, as given to :func:`write`."""
    return read_details(root, entry.part)


def write(
    root: Path, newest: Manifest, name: str, given: Mapping[str, Path], about: Mapping[str, Any]
) -> ModelEntry:
    """Write the next version of a model; the caller, who holds the lock, commits it.

    Parameters
    ----------
    root, newest
        The store and its newest state.
    name
        Letters, digits, ``._-``.
    given
        The model's files by the names that they are to have.
    about
        The record, plain JSON.
    """
    check_name(name, "model")
    version = newest.models[name].version + 1 if name in newest.models else 1
    path = f"models/{name}/{version}"
    part = write_part(root, path, {}, about)
    digests = dict(part.files)
    for file, source in given.items():
        files.write_bytes(root / path / file, source.read_bytes())
        digests[file] = files.digest_file(root / path / file)
    files.sync_folder(root / path)
    return ModelEntry(version, Part(path, digests))
