"""What does it take to ingest each format, beside the library that reads it whole into memory?

Ours ends with a store: shuffled, compressed, checksummed, synced, with the statistics of its genes,
within ``--memory``. The peer ends with an AnnData or a table in memory. Both are given the same
counts, and their sums are compared.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from common import (
    Json,
    Phases,
    argument_parser,
    megabytes,
    provenance,
    run_worker,
    say,
    say_provenance,
    serve_worker,
    table,
    write_json,
)

_MEMORY = "256MB"
_CSV_CELLS = 0.25
"""Share of the cells that the table in text has: it is the slowest, and the largest on disk."""


def _h5ad(adata: Any, path: Path) -> Path:
    adata.write_h5ad(path.with_suffix(".h5ad"))
    return path.with_suffix(".h5ad")


def _zarr(adata: Any, path: Path) -> Path:
    adata.write_zarr(path.with_suffix(".zarr"))
    return path.with_suffix(".zarr")


def _mtx(adata: Any, path: Path) -> Path:
    from scipy.io import mmwrite

    path.mkdir()
    with gzip.open(path / "matrix.mtx.gz", "wb", compresslevel=1) as file:
        mmwrite(file, sp.coo_matrix(adata.X.T.astype(np.int32)))
    genes = "".join(f"{g}\t{g}\tGene Expression\n" for g in adata.var_names)
    for name, text in {"features": genes, "barcodes": "\n".join(adata.obs_names) + "\n"}.items():
        with gzip.open(path / f"{name}.tsv.gz", "wt") as file:
            file.write(text)
    return path


def _loom(adata: Any, path: Path) -> Path:
    import h5py

    path = path.with_suffix(".loom")
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "matrix",
            data=adata.X.T.toarray().astype(np.float32),
            chunks=(64, 64) if min(adata.shape) >= 64 else True,
            compression="gzip",
            compression_opts=2,
        )
        file["row_attrs/Gene"] = np.array(adata.var_names, dtype="S")
        file["col_attrs/CellID"] = np.array(adata.obs_names, dtype="S")
        file.create_group("layers")
    return path


def _csv(adata: Any, path: Path) -> Path:
    path = path.with_suffix(".csv")
    adata[: max(1, int(adata.n_obs * _CSV_CELLS))].to_df().astype(np.int32).to_csv(path)
    return path


def _soma(adata: Any, path: Path) -> Path:
    import tiledbsoma.io

    h5ad = str(path.with_name("cells_h5ad.h5ad"))
    tiledbsoma.io.from_h5ad(str(path), h5ad, measurement_name="RNA")
    return path


def _read_h5ad(path: str) -> float:
    import anndata

    return float(anndata.read_h5ad(path).X.sum())


def _read_zarr(path: str) -> float:
    import anndata

    return float(anndata.read_zarr(path).X.sum())


def _read_mtx(path: str) -> float:
    import scanpy

    return float(scanpy.read_10x_mtx(path).X.sum())


def _read_loom(path: str) -> float:
    import h5py

    with h5py.File(path) as file:
        return float(sp.csr_matrix(file["matrix"][:].T).sum())


def _read_csv(path: str) -> float:
    import pandas as pd

    return float(sp.csr_matrix(pd.read_csv(path, index_col=0).to_numpy()).sum())


def _read_soma(path: str) -> float:
    import tiledbsoma.io

    with tiledbsoma.Experiment.open(path) as experiment:
        return float(tiledbsoma.io.to_anndata(experiment, "RNA", X_layer_name="data").X.sum())


FORMATS: dict[str, tuple[Callable[[Any, Path], Path], Callable[[str], float], str]] = {
    "h5ad": (_h5ad, _read_h5ad, "anndata.read_h5ad"),
    "zarr": (_zarr, _read_zarr, "anndata.read_zarr"),
    "mtx": (_mtx, _read_mtx, "scanpy.read_10x_mtx"),
    "loom": (_loom, _read_loom, "h5py, whole"),
    "csv": (_csv, _read_csv, "pandas.read_csv"),
    "soma": (_soma, _read_soma, "tiledbsoma.io.to_anndata"),
}


def make(arguments: Json, phases: Phases) -> Json:
    """The same simulated counts in each format."""
    import anndata

    from atlas.simulate import simulate

    folder = Path(arguments["folder"])
    raw = folder / "simulated"
    simulate(raw, arguments["cells"], 1, seed=0, genes=arguments["genes"], library=4000.0)
    adata = anndata.read_h5ad(raw / "study_1.h5ad")
    plain = anndata.AnnData(sp.csr_matrix(adata.X, dtype=np.float32))
    plain.obs_names, plain.var_names = adata.obs_names, adata.var_names
    found = {}
    for name, (write, _, _) in FORMATS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = write(plain, folder / f"cells_{name}")
        found[name] = str(path)
    return found


def ingest(arguments: Json, phases: Phases) -> Json:
    """Into a new store."""
    import atlas

    target = Path(arguments["store"])
    shutil.rmtree(target, ignore_errors=True)
    atlas.create_store(target)  # so that imports are not timed
    shutil.rmtree(target)
    phases.begin("work")
    started = time.perf_counter()
    store = atlas.create_store(target)
    report = store.append(arguments["path"], study="cells", memory=_MEMORY)
    seconds = time.perf_counter() - started
    phases.begin("rest")
    total = float(store.study("cells").counts.read(0, store.n_obs)[2].sum(dtype=np.float64))
    return {"seconds": seconds, "cells": report.n_obs, "total": total}


def peer(arguments: Json, phases: Phases) -> Json:
    """Into memory."""
    import anndata  # noqa: F401
    import scanpy  # noqa: F401

    phases.begin("work")
    started = time.perf_counter()
    total = FORMATS[arguments["format"]][1](arguments["path"])
    seconds = time.perf_counter() - started
    phases.begin("rest")
    return {"seconds": seconds, "total": total}


def measure(name: str, path: str, work: Path, repeats: int) -> Json:
    """The better of several runs of both, in turn."""
    out: Json = {"format": name, "peer": FORMATS[name][2], "ours": [], "theirs": []}
    asked = {"format": name, "path": path, "store": str(work / "store.atlas")}
    for _ in range(repeats):
        for side, worker in (("ours", "ingest"), ("theirs", "peer")):
            outcome = run_worker(__file__, worker, asked, work)
            peak = outcome.peak_above("work", "work")
            out[side].append(outcome.result | {"memory_bytes": peak})
    totals = {run["total"] for side in ("ours", "theirs") for run in out[side]}
    if max(totals) - min(totals) > 1e-6 * max(totals):
        raise RuntimeError(f"the counts of {name} differ: {sorted(totals)}")
    best = {s: min(run["seconds"] for run in out[s]) for s in ("ours", "theirs")}
    out["cells_a_second"] = out["ours"][0]["cells"] / best["ours"]
    out["ratio"] = best["theirs"] / best["ours"]
    return out


def main() -> None:
    args = argument_parser(__doc__ or "").parse_args()
    known = provenance()
    say_provenance(known)
    shape = {"cells": 200, "genes": 100} if args.tiny else {"cells": 12_000, "genes": 12_000}
    with tempfile.TemporaryDirectory(prefix="bench-formats-", dir=args.work) as temporary:
        work = Path(temporary)
        paths = run_worker(__file__, "make", shape | {"folder": str(work)}, work).result
        found = [measure(n, paths[n], work, 1 if args.tiny else 3) for n in FORMATS]
    header = ["format", "ours", "cells/s", "memory", "peer", "theirs", "memory", "theirs / ours"]
    rows = [
        [
            one["format"],
            f"{min(r['seconds'] for r in one['ours']):.2f} s",
            f"{one['cells_a_second']:,.0f}",
            megabytes(max(r["memory_bytes"] for r in one["ours"])),
            one["peer"],
            f"{min(r['seconds'] for r in one['theirs']):.2f} s",
            megabytes(max(r["memory_bytes"] for r in one["theirs"])),
            f"{one['ratio']:.2f}",
        ]
        for one in found
    ]
    say(table(header, rows))
    write_json(args.json, {"benchmark": "formats", **known, "shape": shape, "formats": found})


if __name__ == "__main__":
    serve_worker([make, ingest, peer])
    main()
