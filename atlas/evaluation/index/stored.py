"""An index on disk: JSON that says what it is, its vectors, and FAISS's own file. No pickle."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atlas.errors import CorruptStoreError, FormatError, OutputError
from atlas.evaluation.exact import import_faiss
from atlas.evaluation.index.choice import KINDS, Kind
from atlas.evaluation.index.lists import LISTS_FILE
from atlas.evaluation.neighbours import Recall
from atlas.evaluation.vectors import Embedding, RowDigest, tiles
from atlas.files import digest_file, sync_folder, write_bytes

SCHEMA = "atlas.neighbor-index"
VERSION = 1
ABOUT_FILE = "index.json"
VECTORS_FILE = "vectors.npy"
FAISS_FILE = "index.faiss"


@dataclass(frozen=True, slots=True)
class Stored:
    """What ``index.json`` says.

    Attributes
    ----------
    n, n_dimensions, digest
        Shape and digest of the embedding it was built from.
    kind, why, seed, recall_target
        What was asked for, and why the kind was taken.
    centre, exponent
        Origin and unit of the float32 distances (:class:`atlas.evaluation.frame.Frame`).
    breadth
        Of an approximate search, else 0.
    recalls
        What was measured, by k.
    """

    n: int
    n_dimensions: int
    digest: str
    kind: Kind
    why: str
    seed: int
    recall_target: float
    centre: tuple[float, ...]
    exponent: int
    breadth: int
    recalls: Mapping[int, Recall]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with schema and version."""
        values = asdict(self)
        values["recalls"] = {str(k): asdict(recall) for k, recall in self.recalls.items()}
        return {"schema": SCHEMA, "version": VERSION, **values}

    @classmethod
    def from_json(cls, values: dict[str, Any], path: Path) -> Stored:
        """The inverse of :meth:`to_json`."""
        if (values.get("schema"), values.get("version")) != (SCHEMA, VERSION):
            raise FormatError(
                "this is no index that this version reads",
                found=f"schema {values.get('schema')!r}, version {values.get('version')!r}",
                expected=f"schema {SCHEMA!r}, version {VERSION}",
                path=path,
            )
        try:
            about = cls(
                n=int(values["n"]),
                n_dimensions=int(values["n_dimensions"]),
                digest=str(values["digest"]),
                kind=values["kind"],
                why=str(values["why"]),
                seed=int(values["seed"]),
                recall_target=float(values["recall_target"]),
                centre=tuple(map(float, values["centre"])),
                exponent=int(values.get("exponent", 0)),  # older ones do not tell of it
                breadth=int(values["breadth"]),
                recalls={int(k): Recall(**recall) for k, recall in values["recalls"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                "the description of the index lacks a field, or has a wrong one",
                found=repr(error),
                path=path,
            ) from error
        if about.kind not in KINDS or len(about.centre) != about.n_dimensions:
            raise FormatError("the description of the index contradicts itself", path=path)
        return about


def save(folder: Path, about: Stored, vectors: Embedding, structure: Any | None) -> Path:
    """Write all files beside ``folder`` and give them its name at the end."""
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(
            "the folder of the index is not empty",
            found=", ".join(sorted(path.name for path in folder.iterdir())[:5]),
            do="choose another folder",
            path=folder,
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        mapped = np.lib.format.open_memmap(
            partial / VECTORS_FILE, mode="w+", dtype=np.float32, shape=vectors.shape
        )
        for rows in tiles(len(vectors)):
            mapped[rows] = vectors[rows]
        mapped.flush()
        del mapped
        if structure is not None:
            _write_structure(structure, about.kind, partial)
        names = [VECTORS_FILE, *([] if structure is None else [FAISS_FILE])]
        names += [LISTS_FILE] if (partial / LISTS_FILE).exists() else []
        content = about.to_json() | {
            "files": {
                name: {
                    "bytes": (partial / name).stat().st_size,
                    "sha256": digest_file(partial / name),
                }
                for name in names
            }
        }
        write_bytes(partial / ABOUT_FILE, json.dumps(content, indent=1, allow_nan=False).encode())
        sync_folder(partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _write_structure(structure: Any, kind: Kind, folder: Path) -> None:
    faiss = import_faiss()
    assert faiss is not None
    if kind == "disk":
        lists = faiss.downcast_InvertedLists(structure.invlists)
        shutil.copyfile(lists.filename, folder / LISTS_FILE)
    faiss.write_index(structure, str(folder / FAISS_FILE))


def load(folder: Path, *, mapped: bool, check: bool) -> tuple[Stored, Embedding, Any | None]:
    """What an index is, its vectors, and FAISS's structure, if it has one."""
    path = folder / ABOUT_FILE
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FormatError(
            "there is no index here", expected=f"a folder with {ABOUT_FILE}", path=folder
        ) from error
    except ValueError as error:
        raise CorruptStoreError(
            "the description of the index is not JSON", found=str(error), path=path
        ) from error
    if not isinstance(values, dict):
        raise FormatError("this is no index", found=type(values).__name__, path=path)
    about = Stored.from_json(values, path)
    _check_files(folder, values.get("files", {}), check)
    vectors = np.load(folder / VECTORS_FILE, mmap_mode="r" if mapped else None, allow_pickle=False)
    if vectors.shape != (about.n, about.n_dimensions) or vectors.dtype != np.float32:
        raise CorruptStoreError(
            "the vectors of the index are not those it tells of",
            found=f"{vectors.dtype} {vectors.shape}",
            expected=f"float32 {(about.n, about.n_dimensions)}",
            path=folder / VECTORS_FILE,
        )
    if check:
        found = RowDigest(about.n_dimensions)
        for rows in tiles(about.n):
            found.update(vectors[rows])
        if found.hexdigest() != about.digest:
            raise CorruptStoreError(
                "the vectors of the index are not those it was built from",
                found=f"digest {found.hexdigest()[:12]}",
                expected=f"digest {about.digest[:12]}",
                do="build the index again",
                path=folder / VECTORS_FILE,
            )
    structure = None
    if about.kind in ("ivf", "hnsw", "disk"):
        faiss = import_faiss()
        if faiss is None:
            raise FormatError(
                f"an index of kind {about.kind!r} needs FAISS, which is not installed",
                do="install faiss-cpu or faiss-gpu (never both)",
                path=folder,
            )
        flags = faiss.IO_FLAG_MMAP if mapped and about.kind == "ivf" else 0
        flags |= faiss.IO_FLAG_ONDISK_SAME_DIR if about.kind == "disk" else 0
        structure = faiss.read_index(str(folder / FAISS_FILE), flags)
        if structure.ntotal != about.n:
            raise CorruptStoreError(
                "FAISS's file holds another number of rows than the index tells of",
                found=structure.ntotal,
                expected=about.n,
                path=folder / FAISS_FILE,
            )
    return about, vectors, structure


def _check_files(folder: Path, files: dict[str, Any], check: bool) -> None:
    for name, known in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != known["bytes"]:
            raise CorruptStoreError(
                "a file of the index is missing or has another length",
                found=f"{path.stat().st_size} bytes" if path.is_file() else "no file",
                expected=f"{known['bytes']} bytes",
                do="build the index again",
                path=path,
            )
        # The vectors are compared with the digest of the embedding.
        if check and name != VECTORS_FILE and digest_file(path) != known["sha256"]:
            raise CorruptStoreError(
                "a file of the index is not as it was written",
                do="build the index again",
                path=path,
            )
