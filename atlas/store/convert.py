"""A store in another format or compression: the same studies, rows, codes and embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import filelock
import zarr
from tqdm import tqdm

from atlas import files
from atlas.config import Profile, StoreFormat
from atlas.errors import ConfigError, LockedError, StoreError
from atlas.store import layout
from atlas.store import manifest as manifests
from atlas.store.arrays import DurableStore
from atlas.store.base import CountStore
from atlas.store.matrix_writer import create_matrix, layouts, write_shard
from atlas.store.parallel import ordered_map, resolve_threads
from atlas.store.schema import Manifest, StudyEntry
from atlas.store.tiledb_array import SUFFIX, begin_copy, copy, finish_copy, open_array, tiledb
from atlas.store.zarr_study import CSRMatrix, digests

_ASKED = "converting.json"
_LOCK = "converting.lock"


def convert_store(
    store: CountStore,
    out: str | PathLike[str],
    *,
    profile: Profile = "fast",
    format: StoreFormat = "zarr",
    progress: bool = False,
    threads: int | None = None,
) -> CountStore:
    """Write the state of a store that is open into a new one.

    Rows, obs, codes, embeddings and the genes chosen stay as they are; older states do not come
    along. It is written beside ``out`` and takes its name at the end; after Ctrl-C or a kill the
    same call goes on with the studies that are missing.

    Parameters
    ----------
    store
        An open store.
    out
        Where; must be free.
    profile
        Compression of a Zarr store; see :meth:`atlas.store.CountStore.append`.
    format
        ``"zarr"`` or ``"tiledb"``.
    progress
        Show counts/s and the time left on stderr.
    threads
        By default as many as cores.

    Raises
    ------
    ConfigError
        There is no such profile or format, or a profile was given for TileDB.
    StoreError, LockedError
        ``out`` is not free, another process writes there, or writing failed.
    CorruptStoreError
        A chunk of the store is missing or damaged.
    """
    root, target = Path(out), Path(out).with_name(f".{Path(out).name}.converting")
    _check(root, profile, format)
    asked = {"fingerprint": store.fingerprint, "manifest": store.manifest.number}
    asked |= {"profile": profile, "format": format}
    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(target.with_name(f"{target.name}.{_LOCK}"), thread_local=False)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise LockedError(
                "Another process is converting to this place", do="wait until it ends", path=root
            ) from None
        try:
            if _recorded(target) != asked:
                shutil.rmtree(target)
                target.mkdir()
                files.write_bytes(target / _ASKED, json.dumps(asked).encode())
            _write(store, target, profile, format, progress, resolve_threads(threads))
            (target / _ASKED).unlink()
            if root.exists():
                root.rmdir()  # an empty folder
            target.rename(root)
            files.sync_folder(root.absolute().parent)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            "The store could not be converted",
            found=str(error),
            do="make room or mend the disk, then run the command again: it goes on where it was",
            path=root,
        ) from error
    return CountStore(root, manifests.read(root))


def _check(root: Path, profile: str, format: str) -> None:
    for what, value, offered in (
        ("profile", profile, get_args(Profile)),
        ("format", format, get_args(StoreFormat)),
    ):
        if value not in offered:
            raise ConfigError(
                f"There is no such {what}",
                found=repr(value),
                expected=" or ".join(map(repr, offered)),
            )
    if format == "tiledb":
        tiledb()
        if profile != "fast":
            raise ConfigError(
                "A store of the format tiledb has no compression profiles",
                found=f"profile={profile!r}",
                do="leave the profile out",
            )
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise StoreError(
            "A store cannot be written here",
            found="a file or a folder that is not empty",
            expected="a path that is free",
            do="choose another path",
            path=root,
        )


def _recorded(target: Path) -> Any:
    try:
        return json.loads((target / _ASKED).read_bytes())
    except (OSError, ValueError):
        return None


def _write(
    store: CountStore, target: Path, profile: str, format: str, progress: bool, threads: int
) -> None:
    """Write what is missing, the manifest last."""
    source = store.manifest
    for folder in ("manifests", "studies"):
        (target / folder).mkdir(exist_ok=True)
    for path in sorted(source.paths - {study.path for study in source.studies}):
        _copied(store.path / path, target / path)
    studies = []
    nnz = sum(study.nnz for study in source.studies)
    with tqdm(
        total=nnz, desc="convert", unit=" counts", unit_scale=True, disable=not progress
    ) as bar:
        for entry in source.studies:
            final = target / entry.path
            if not final.exists():
                partial = final.with_name(f"{final.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                _study(store.path / entry.path, partial, profile, format, bar, threads)
                files.sync_tree(partial)
                partial.rename(final)
            else:
                bar.update(entry.nnz)
                bar.initial = bar.n
            studies.append(_entry(entry, final, profile if format == "zarr" else format))
    files.sync_tree(target)
    for old in (target / "manifests").iterdir():
        old.unlink()  # of a run that was interrupted at the very end
    void: Manifest = replace(source, number=0, backend=format, studies=tuple(studies))
    manifests.commit(target, void, f"convert {store.path.name}")


def _entry(entry: StudyEntry, folder: Path, profile: str) -> StudyEntry:
    return replace(entry, profile=profile, digests=digests(folder))


def _copied(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _study(source: Path, target: Path, profile: str, format: str, bar: Any, threads: int) -> None:
    """Copy the tables of a study, and write its matrices anew."""
    names = [
        "X",
        *(f"layers/{p.name}" for p in sorted((source / "layers").glob("*")) if p.is_dir()),
    ]
    left_out = {source / name for name in names}

    def ignored(folder: str, inside: list[str]) -> list[str]:
        return [name for name in inside if Path(folder) / name in left_out]

    shutil.copytree(source, target, ignore=ignored)
    group = zarr.open_group(DurableStore(target), mode="a", zarr_format=3)
    for name in names:
        _matrix(source / name, target, group, name, profile, bar, threads)
        if format == "tiledb":
            for array in ("indices", "data"):
                zarr_array = target / name / array
                tiled = zarr_array.with_name(f"{array}{SUFFIX}")
                copies = begin_copy(zarr_array, tiled, layout.SHARD)
                for _ in ordered_map(copy, copies, threads):
                    pass
                finish_copy(zarr_array, tiled)


def _matrix(
    source: Path,
    target: Path,
    group: zarr.Group,
    name: str,
    profile: str,
    bar: Any,
    threads: int,
) -> None:
    arrays = {array: open_array(source, array) for array in ("indices", "data")}
    types = (arrays["indices"].dtype.str, arrays["data"].dtype.str)
    shards = target / "shards"
    for (array, opened), how in zip(arrays.items(), layouts(types, profile), strict=True):
        folder = shards / array
        folder.mkdir(parents=True)

        def write(number: int, opened: Any = opened, folder: Path = folder, how: Any = how) -> int:
            start, stop = number * how.shard, min(len(opened), (number + 1) * how.shard)
            write_shard(folder, number, opened.read(start, stop), how)
            return int(stop - start)

        for _, n in ordered_map(write, _numbers(len(opened), how.shard), threads):
            if name == "X" and array == "data":
                bar.update(n)
    matrix = CSRMatrix(source)
    create_matrix(
        group,
        target,
        name,
        shards,
        matrix.indptr,
        n_columns=int(json.loads((source / "zarr.json").read_bytes())["attributes"]["shape"][1]),
        types=types,
        profile=profile,
    )
    shutil.rmtree(shards)


def _numbers(n: int, shard: int) -> Iterator[int]:
    yield from range(-(-n // shard))
