"""The stores that the sides of ``bench_loader.py`` read: made, timed and kept beside the cells."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from common import Json, run_worker, say
from contract import drop_page_cache

HERE = Path(__file__).resolve().parent
_MANY_CELLS = 200_000
"""From so many cells on, stores are made once: it takes minutes, and varies little."""
_SOMA_MOST_CELLS = 100_000


@dataclass
class Stores:
    """What there is to stream from.

    Attributes
    ----------
    folder
        Of the cells.
    paths
        Where the workers find everything.
    made
        By store: seconds of each making, bytes, peak memory; or why it is not there (``failed``).
    reference
        What the file holds; see ``with_atlas.reference``.
    """

    folder: Path
    paths: dict[str, str]
    made: Json = field(default_factory=dict)
    reference: Json = field(default_factory=dict)

    @property
    def failed(self) -> dict[str, str]:
        """Why a store is not there, by name."""
        return {name: one["failed"] for name, one in self.made.items() if "failed" in one}


def make_stores(folder: Path, shape: Json, args: argparse.Namespace) -> Stores:
    """Make the file and all stores, the makers in turn, and read what the file holds."""
    paths = {
        "file": str(folder / "cells.h5ad"),
        "store": str(folder / "store.atlas"),
        "annbatch": str(folder / "annbatch.zarr"),
        "tiledbsoma": str(folder / "soma"),
        "projected": str(folder / "projected"),
        "tiledb": str(folder / "store.tiledb"),
        "sparse": str(folder / "sparse.tiledb"),
        "zarr": str(folder / "cells.zarr"),
        "genes": str(folder / "genes.txt"),
        "all": str(folder / "all.npz"),
        "chosen": str(folder / "chosen.npz"),
    }
    stores = Stores(folder, paths)
    run_worker(str(HERE / "with_atlas.py"), "make_cells", shape | {"folder": str(folder)}, folder)
    _warm(folder / "cells.h5ad")
    repeats = 1 if shape["cells"] >= _MANY_CELLS else args.repeats
    for repeat in range(repeats):
        _make(stores, args, "ours", "with_atlas.py", "ingest", None, paths["store"])
        _make(
            stores, args, "annbatch", "with_annbatch.py", "convert", "annbatch", paths["annbatch"]
        )
        if repeat == 0 and (args.soma or shape["cells"] <= _SOMA_MOST_CELLS):
            soma = paths["tiledbsoma"]
            _make(stores, args, "tiledbsoma", "with_tiledbsoma.py", "convert", "tiledbsoma", soma)
    known = folder / "reference.json"
    if not known.exists() or not Path(paths["all"]).exists():
        asked = paths | {"n_genes": shape["n_genes"]}
        found = run_worker(str(HERE / "with_atlas.py"), "reference", asked, folder).result
        known.write_text(json.dumps(found))
    stores.reference = json.loads(known.read_text())
    _make(stores, args, "projected", "with_atlas.py", "project", None, paths["projected"])
    if shape["cells"] <= _SOMA_MOST_CELLS:
        _make(stores, args, "tiledb", "with_atlas.py", "ingest_tiledb", None, paths["tiledb"])
        _make(stores, args, "zarr", "with_atlas.py", "write_zarr", None, paths["zarr"])
        _make(stores, args, "sparse", "with_atlas.py", "sparse_tiledb", None, paths["sparse"])
    return stores


def _warm(path: Path) -> None:
    """Read a file, so that it lies in the page cache for the side that comes first as well."""
    with path.open("rb", buffering=0) as file:
        while file.read(2**24):
            pass


def _make(
    stores: Stores,
    args: argparse.Namespace,
    name: str,
    script: str,
    work: str,
    environment: str | None,
    path: str,
) -> None:
    """Make one store, or take the one that is there where it need not be timed."""
    one = stores.made.setdefault(name, {})
    if args.keep_stores and Path(path).exists():
        one["bytes"] = size_of(Path(path))
        return
    python = sys.executable
    if environment is not None:
        python = str(args.peers / environment / "bin" / "python")
        if not Path(python).exists() and find_spec(environment) is not None:
            python = sys.executable  # the store is for a side of ours too
        if not Path(python).exists():
            one["failed"] = f"no environment in {args.peers / environment}"
            return
    asked = stores.paths | ({} if environment is None else {"store": path})
    try:
        outcome = run_worker(str(HERE / script), work, asked, stores.folder, python)
    except RuntimeError as error:
        one["failed"] = str(error)
        say(f"{name}: {error}")
        return
    one.setdefault("seconds", []).append(outcome.result["seconds"])
    one["memory_bytes"] = max(one.get("memory_bytes", 0), outcome.peak_above("work", "work"))
    one["bytes"] = size_of(Path(path))


def size_of(path: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def sequential_rate(path: Path, most: int = 2**30) -> float:
    """Bytes a second at which the files of a folder are read in order from a cold cache."""
    drop_page_cache()
    read, started = 0, time.perf_counter()
    for file in sorted(path.rglob("*"), key=lambda f: -f.stat().st_size):
        if file.is_file() and read < most:
            with file.open("rb", buffering=0) as opened:
                while part := opened.read(2**24):
                    read += len(part)
    return read / (time.perf_counter() - started)
