"""A store by URL: a folder of the same form here, with all of it but the long arrays copied.

Those come as they are read (:mod:`atlas.codecs.remote`). A web server cannot list its files, so for
``https://`` they are listed in a file that :func:`write_inventory` makes beside the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from filelock import FileLock
from tqdm import tqdm

from atlas import files
from atlas.codecs.connection import Connection, Origin
from atlas.codecs.fetching import NO_ETAG, Item
from atlas.codecs.remote import Remote, adopt
from atlas.errors import ConfigError, CorruptStoreError, FormatError, NotAStoreError
from atlas.store import manifest as manifests
from atlas.store.options import bytes_of

INVENTORY = "files.json"
_FORMAT, _VERSION = "atlas-files", 1
_LONG = re.compile(r"studies/[^/]+/(X|layers/[^/]+)/(indices|data)/c/\d+")
_SKIPPED = re.compile(r"(writer\.|\.|.*\.partial$)")
_SECRET = re.compile(r"secret|token|password|key_id|access_key|credential", re.IGNORECASE)
_COPIED = ".copied.json"


def is_url(path: object) -> bool:
    """Whether a store is named by URL."""
    return isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def open_mirror(
    url: str,
    *,
    options: Mapping[str, str] | None = None,
    cache: str | int = "10GB",
    cache_folder: str | os.PathLike[str] | None = None,
    timeout: float = 30.0,
    deadline: float = 180.0,
) -> Path:
    """Copy what is small of a store, where it is not here yet; returns the mirror's folder.

    Raises
    ------
    ConfigError
        Options of no kind, or secrets among them; the package obstore is not installed.
    RemoteError, NotAStoreError, FormatError, CorruptStoreError
        There is no answer or no leave; no store; one of another format; or it is damaged.
    """
    if "?" in url or "@" in url.partition("://")[2].partition("/")[0]:
        raise ConfigError(
            "A URL with a query or a password is not taken, since the cache keeps it on disk",
            found=url.partition("?")[0].rpartition("@")[2],
            expected="s3://bucket/path, gs://bucket/path or https://host/path",
            do="set credentials in the environment",
        )
    origin = Origin(
        url.rstrip("/"), _checked(options or {}), bytes_of("cache", cache), timeout, deadline
    )
    above = Path(cache_folder) if cache_folder is not None else _home()
    name = hashlib.sha256(json.dumps([origin.url, dict(origin.options)]).encode()).hexdigest()[:20]
    root = (above / name).absolute()
    there = _listed(Connection(origin), url)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f"{name}.lock")):
        _copy(adopt(root, origin), there)
    return root


class _There(NamedTuple):
    """An object, and what changes when it does: its ETag, or its time in an inventory."""

    item: Item
    version: str


def _copy(remote: Remote, there: Mapping[str, _There]) -> None:
    """Make the small files those of the store."""
    root = remote.root
    try:
        copied = json.loads((root / _COPIED).read_bytes())
    except (OSError, ValueError):
        copied = {}
    for folder in ("manifests", "genes", "studies", "parts", "models"):
        (root / folder).mkdir(exist_ok=True)
        for path in [p for p in (root / folder).rglob("*") if p.is_file()]:
            if path.relative_to(root).as_posix() not in there:
                path.unlink(missing_ok=True)
    small = {key: one for key, one in there.items() if not _LONG.fullmatch(key)}
    wanted = [
        one
        for key, one in small.items()
        if copied.get(key) != [one.item.size, one.version] or not (root / key).is_file()
    ]
    with tqdm(
        total=sum(one.item.size for one in wanted),
        unit="B",
        unit_scale=True,
        desc="copying what is small of the store",
        delay=2,
    ) as shown:

        def fetch(one: _There) -> None:
            item = one.item
            data = remote.connection.whole(item)
            path = root / item.key
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = root / f".partial-{os.getpid()}-{hashlib.sha1(item.key.encode()).hexdigest()}"
            partial.write_bytes(data)
            partial.replace(path)
            copied[item.key] = [item.size, one.version]
            shown.update(len(data))

        try:
            remote.map(fetch, wanted)
        finally:  # what has come need not come again
            kept = {key: copied[key] for key in small if key in copied}
            files.replace_bytes(root / _COPIED, json.dumps(kept).encode())
    for study in {key.split("/")[1] for key in there if key.startswith("studies/")}:
        (root / "studies" / study / "layers").mkdir(exist_ok=True)


def _listed(connection: Connection, url: str) -> dict[str, _There]:
    """Files of the store by key."""
    if url.startswith(("http://", "https://")):
        listed = _inventory(connection, url)
    else:
        listed = [_There(item, item.etag) for item in connection.list()]
    # consoles make an object in place of each folder
    folders = {str(above) for one in listed for above in PurePosixPath(one.item.key).parents} | {""}
    items = {
        one.item.key: one
        for one in listed
        if not _SKIPPED.match(one.item.key) and one.item.key not in folders
    }
    if not any(key.startswith("manifests/") for key in items):
        raise NotAStoreError(
            "There is no store at this URL",
            found=f"{len(listed):,} files, none of them manifests/…"
            + (f", e.g. {listed[0].item.key}" if listed else ""),
            expected="the files of a folder that `atlas ingest` made",
            do="check the URL: the bucket, and the path in it",
            path=url,
        )
    for key in items:
        parts = PurePosixPath(key).parts
        if ".." in parts or PurePosixPath(key).is_absolute() or "\\" in key:
            raise CorruptStoreError(
                "A file of the store has a name outside it", found=key, path=url
            )
        if key.endswith("array.json") and ".tiledb/" in key:
            raise FormatError(
                "Only stores of the format zarr are read by URL",
                found="a store of the format tiledb",
                do="convert it first: atlas convert STORE OTHER --format zarr",
                path=url,
            )
    return items


def _inventory(connection: Connection, url: str) -> list[_There]:
    try:
        data, _ = connection.get(INVENTORY)
    except CorruptStoreError:
        raise NotAStoreError(
            "A web server cannot list the files of a store, and there is no list of them here",
            found=f"no file {INVENTORY}",
            expected=f"{INVENTORY} beside manifests/",
            do="write it where the store is, and copy it too: atlas inventory STORE",
            path=url,
        ) from None
    try:
        found = json.loads(bytes(data))
        if (found["format"], found["version"]) != (_FORMAT, _VERSION):
            raise ValueError("another format or version")
        return [
            _There(Item(str(key), int(size), NO_ETAG), str(time))
            for key, (size, time) in found["files"].items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            "The list of files cannot be read", found=str(error), path=f"{url}/{INVENTORY}"
        ) from None


def write_inventory(path: str | os.PathLike[str]) -> Path:
    """List the files of a store, for reading it from a web server.

    States written later are not seen from there until it is written again.

    Parameters
    ----------
    path
        The store.

    Returns
    -------
    Path
        Of the list, ``files.json`` in the store.

    Raises
    ------
    NotAStoreError
        There is no store.
    """
    root = Path(path)
    manifests.read(root)
    with manifests.writer(root, "inventory"):
        found = {
            key: [(stat := file.stat()).st_size, stat.st_mtime_ns]
            for file in sorted(p for p in root.rglob("*") if p.is_file())
            if not _SKIPPED.match(key := file.relative_to(root).as_posix()) and key != INVENTORY
        }
        listed: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "files": found}
        files.replace_bytes(root / INVENTORY, json.dumps(listed, indent=0).encode())
    return root / INVENTORY


def _home() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "atlas" / "stores"


def _checked(options: Mapping[str, str]) -> dict[str, str]:
    secrets = [name for name in options if _SECRET.search(name)]
    if secrets:
        raise ConfigError(
            "Secrets are not taken as options, since the cache keeps them on disk",
            found=", ".join(secrets),
            expected="endpoint, region, skip_signature …",
            do="set them in the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY …",
        )
    return {str(name): str(value) for name, value in options.items()}
