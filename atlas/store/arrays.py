"""Small arrays of a store as ``.npy`` with a digest, and zarr-python's writes made durable."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from atlas import files
from atlas.codecs.recipe import RESTORE
from atlas.errors import CorruptStoreError
from atlas.store.schema import Part

DETAILS = "details.json"


def save_array(path: Path, array: npt.NDArray[Any]) -> str:
    """Write one array as ``.npy``; returns its SHA-256."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    data = buffer.getbuffer()
    files.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def load_array(path: Path, digest: str) -> npt.NDArray[Any]:
    """Read one array written by :func:`save_array`, checked against its digest.

    Raises
    ------
    CorruptStoreError
        The file is missing, or is not what was written.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CorruptStoreError(
            "A file of the store is missing",
            do=RESTORE,
            path=path,
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise CorruptStoreError(
            "A file of the store is not what was written",
            found=f"SHA-256 {found[:16]}… ({len(data)} bytes)",
            expected=f"SHA-256 {digest[:16]}…",
            do=RESTORE,
            path=path,
        )
    return cast("npt.NDArray[Any]", np.load(io.BytesIO(data), allow_pickle=False))


def write_part(
    root: Path,
    path: str,
    arrays: Mapping[str, npt.NDArray[Any]],
    details: Mapping[str, Any] | None = None,
) -> Part:
    """Write a part: a new folder with an ``.npy`` per array, and ``details.json`` where given.

    Parameters
    ----------
    root, path
        The store, and the folder relative to it.
    """
    folder = root / path
    folder.mkdir(parents=True)
    digests = {f"{name}.npy": save_array(folder / f"{name}.npy", a) for name, a in arrays.items()}
    if details is not None:
        files.write_bytes(folder / DETAILS, json.dumps(details, indent=1).encode())
        digests[DETAILS] = files.digest_file(folder / DETAILS)
    files.sync_folder(folder)
    files.sync_folder(folder.parent)
    files.sync_folder(folder.parent.parent)
    return Part(path, digests)


def copy_part(root: Path, path: str, source: Path) -> Part:
    """Write a part of the files of a folder, whatever they hold.

    Parameters
    ----------
    root, path
        The store, and the new folder relative to it.
    source
        The folder, without further ones in it.
    """
    folder = root / path
    folder.mkdir(parents=True)
    digests = {}
    for file in sorted(source.iterdir()):
        files.write_bytes(folder / file.name, file.read_bytes())
        digests[file.name] = files.digest_file(folder / file.name)
    for changed in (folder, folder.parent, folder.parent.parent):
        files.sync_folder(changed)
    return Part(path, digests)


def checked_folder(root: Path, part: Part, what: str) -> Path:
    """The folder of a part, all its files compared with their digests.

    Raises
    ------
    CorruptStoreError
        A file is missing or is not what was written.
    """
    folder = root / part.path
    for file, digest in part.files.items():
        there = (folder / file).is_file()
        if not there or files.digest_file(folder / file) != digest:
            raise CorruptStoreError(
                f"A file of {what} is " + ("not what was written" if there else "missing"),
                do=RESTORE,
                path=folder / file,
            )
    return folder


def read_array(root: Path, part: Part, name: str) -> npt.NDArray[Any]:
    """One array of a part, checked against its digest."""
    file = f"{name}.npy"
    return load_array(root / part.path / file, part.files[file])


def read_details(root: Path, part: Part) -> dict[str, Any]:
    """The ``details.json`` of a part, checked against its digest."""
    path = root / part.path / DETAILS
    if not path.is_file() or files.digest_file(path) != part.files[DETAILS]:
        raise CorruptStoreError(
            "A file of the store is missing or is not what was written",
            do="restore it from a copy, or make what it belongs to again",
            path=path,
        )
    return cast("dict[str, Any]", json.loads(path.read_bytes()))


class DurableStore(LocalStore):
    """zarr-python's local store, with its writes sent through :func:`atlas.files.write_bytes`."""

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write one key, synced."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, value.as_numpy_array().tobytes())

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, value.as_numpy_array().tobytes(), exclusive=exclusive)
