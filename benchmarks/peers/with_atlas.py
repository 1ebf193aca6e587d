"""Atlas, in the same harness as its peers, and what the file itself holds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cells import cells_file
from contract import Json, Phases, Rows, fingerprints, measured, serve_worker, touched

_ROWS = 4096


def make_cells(arguments: Json, phases: Phases) -> Json:
    """The file of simulated cells, made once and kept."""
    folder, shape = Path(arguments["folder"]), (arguments["genes"], arguments["nnz"])
    return {"file": str(cells_file(folder, arguments["cells"], *shape))}


def reference(arguments: Json, phases: Phases) -> Json:
    """What the file holds: fingerprints of all rows, over all genes and over the chosen ones.

    Fingerprints rise, and the batch of each row lies beside its own.

    Read with h5py alone, so that no loader vouches for itself.
    """
    import h5py

    import atlas
    import atlas.workflows

    store = atlas.open_store(arguments["store"])
    names = atlas.select_genes(store, arguments["n_genes"], record=False)
    Path(arguments["genes"]).write_text("\n".join(names))
    with h5py.File(arguments["file"]) as file:
        place = {name: i for i, name in enumerate(names)}
        var = file["var"]
        table = np.array([place.get(g, -1) for g in var[var.attrs["_index"]].asstr()[:]])
        counts, indptr = file["X"], file["X/indptr"][:]
        batch = file["obs/batch/codes"][:]
        found: dict[str, Any] = {}
        for kind in ("all", "chosen"):
            prints, total, columns = [], 0.0, 0
            for start in range(0, len(indptr) - 1, _ROWS):
                rows = _rows_of(counts, indptr[start : start + _ROWS + 1])
                if kind == "chosen":
                    rows = _chosen(rows, table)
                part, hashed = touched(rows)
                total, columns = total + part, columns ^ hashed
                prints.append(fingerprints(rows))
            every = np.concatenate(prints)
            order = np.argsort(every, kind="stable")
            np.savez(arguments[kind], prints=every[order], batch=batch[order])
            found[kind] = {"total": total, "columns_hash": columns, "cells": len(indptr) - 1}
    return found | {"nnz": int(indptr[-1])}


def _rows_of(counts: Any, bounds: npt.NDArray[np.int64]) -> Rows:
    part = slice(bounds[0], bounds[-1])
    return counts["data"][part], counts["indices"][part], bounds - bounds[0]


def _chosen(rows: Rows, table: npt.NDArray[np.int64]) -> Rows:
    """The values of genes that have a place in ``table``."""
    data, indices, indptr = rows
    column = table[indices]
    kept = column >= 0
    ends = np.concatenate([[0], np.cumsum(kept)])
    return data[kept], column[kept].astype(np.int32), ends[indptr]


def ingest(arguments: Json, phases: Phases) -> Json:
    """From the file to a new store."""
    import atlas.workflows

    shutil.rmtree(arguments["store"], ignore_errors=True)
    phases.begin("work")
    started = time.perf_counter()
    atlas.workflows.ingest(
        arguments["store"],
        arguments["file"],
        study="cells",
        batch_key="batch",
        label_key="cell_type",
        format=arguments.get("format", "zarr"),
    )
    seconds = time.perf_counter() - started
    phases.begin("rest")
    return {"seconds": seconds}


def ingest_tiledb(arguments: Json, phases: Phases) -> Json:
    """The same store in the format tiledb."""
    return ingest(arguments | {"store": arguments["tiledb"], "format": "tiledb"}, phases)


def write_zarr(arguments: Json, phases: Phases) -> Json:
    """The file as anndata writes it to Zarr."""
    import anndata

    phases.begin("work")
    started = time.perf_counter()
    anndata.read_h5ad(arguments["file"]).write_zarr(arguments["zarr"])
    seconds = time.perf_counter() - started
    phases.begin("rest")
    return {"seconds": seconds}


def sparse_tiledb(arguments: Json, phases: Phases) -> Json:
    """The counts as a sparse TileDB array of two dimensions."""
    import sparse_tiledb as layout

    phases.begin("work")
    started = time.perf_counter()
    layout.write(Path(arguments["file"]), Path(arguments["sparse"]))
    seconds = time.perf_counter() - started
    phases.begin("rest")
    return {"seconds": seconds}


def project(arguments: Json, phases: Phases) -> Json:
    """The derived store of the chosen genes."""
    import atlas
    import atlas.workflows

    shutil.rmtree(arguments["projected"], ignore_errors=True)
    phases.begin("work")
    started = time.perf_counter()
    atlas.project(  # type: ignore[attr-defined,unused-ignore]
        atlas.open_store(arguments["store"]), _genes(arguments), arguments["projected"]
    )
    seconds = time.perf_counter() - started
    phases.begin("rest")
    return {"seconds": seconds}


def _genes(arguments: Json) -> list[str]:
    return Path(arguments["genes"]).read_text().split("\n")


def _source(arguments: Json) -> Any:
    """What is streamed: a store, the chosen genes of it, its projection, or the file as it is."""
    import atlas

    if arguments["source"] == "sparse":
        import sparse_tiledb as layout

        return layout.SparseSource(Path(arguments["sparse"]))
    keys = {"batch_key": "batch", "label_key": "cell_type"}
    if arguments["source"] in ("file", "zarr"):
        return atlas.open_files(arguments[arguments["source"]], **keys)
    if arguments["source"] == "soma":
        return atlas.open_store(arguments["tiledbsoma"], measurement="RNA", **keys)
    if arguments["source"] == "tiledb":
        return atlas.open_store(arguments["tiledb"])
    store = atlas.open_store(arguments["store"])
    if arguments["source"] == "store":
        return store
    if arguments["source"] == "chosen":
        return store.select(_genes(arguments))
    # Opens what is there already: it was made with the same genes.
    return atlas.project(  # type: ignore[attr-defined,unused-ignore]
        store, _genes(arguments), arguments["projected"]
    )


def _weights(source: Any) -> npt.NDArray[np.float64]:
    """From 1 to 100, the labels spread between, the most frequent label lightest."""
    _, codes, sizes = np.unique(source.obs_codes["label"], return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-sizes))
    weights: npt.NDArray[np.float64] = 100.0 ** (rank / max(1, len(sizes) - 1))
    return weights[codes]


def stream(arguments: Json, phases: Phases) -> Json:
    """Stream shuffled minibatches."""
    import atlas.workflows  # noqa: F401
    import loaders

    phases.begin("open")
    source = _source(arguments)
    weighted = {"weights": _weights(source)} if arguments["weighted"] else {}

    asked = arguments["loader"] | weighted
    loader = loaders.MinibatchLoader(source, arguments["minibatch_size"], seed=0, **asked)

    def epoch() -> Iterator[Rows]:
        if loader.step:  # it was left in mid-epoch, and would go on there
            loader.skip_to_epoch(loader.epoch + 1)
        for minibatch in loader:
            yield minibatch.data, minibatch.indices, minibatch.indptr

    result = measured(epoch, arguments, phases)
    phases.begin("rest")
    described = loader.describe() if hasattr(loader, "describe") else None
    return result | {"describe": None if described is None else str(described)}


if __name__ == "__main__":
    serve_worker(
        [make_cells, reference, ingest, ingest_tiledb, write_zarr, sparse_tiledb, project, stream]
    )
