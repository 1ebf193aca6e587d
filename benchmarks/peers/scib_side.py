"""scib-metrics on the same cells and neighbours; runs in an environment of its own.

    python benchmarks/peers/scib_side.py cells.npz values.json

``cells.npz`` holds z, before, labels, batches, and the neighbours of all cells, each cell itself
first: indices and distances, 90 of them; without these they are searched by its pynndescent, as its
Benchmarker does. ``values.json`` gets each measure and its seconds.

    python benchmarks/peers/scib_side.py cells.npz tables.json benchmarker

writes the tables of its Benchmarker, with and without Leiden, and one of made-up scores.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def tables(cells: Any) -> dict[str, Any]:
    """What Benchmarker.get_results gives, without kBET (minutes); and of made-up scores."""
    import anndata
    import pandas as pd
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation
    from scib_metrics.nearest_neighbors import NeighborsResults

    def near(_: Any, k: int) -> Any:
        return NeighborsResults(
            indices=cells["indices"][:, :k], distances=cells["distances"][:, :k]
        )

    columns = {name: pd.Categorical(cells[name].astype(str)) for name in ("batches", "labels")}
    obs = pd.DataFrame(columns, index=[str(i) for i in range(len(cells["z"]))])
    adata = anndata.AnnData(cells["z"].copy(), obs=obs)
    adata.obsm["z"], adata.obsm["before"] = cells["z"], cells["before"]
    found = {}
    for name, leiden in (("default", False), ("with_leiden", True)):
        made = Benchmarker(
            adata,
            "batches",
            "labels",
            ["z"],
            BioConservation(nmi_ari_cluster_labels_leiden=leiden),
            BatchCorrection(kbet_per_label=False),
            pre_integrated_embedding_obsm_key="before",
            progress_bar=False,
        )
        made.prepare(neighbor_computer=near)
        made.benchmark()
        row = made.get_results(min_max_scale=False).loc["z"]
        found[name] = {title: float(value) for title, value in row.items()}
    made = Benchmarker(adata, "batches", "labels", ["scvi", "pca"])
    rng = np.random.default_rng(0)
    bio = "isolated_labels nmi_ari_cluster_labels_kmeans_nmi nmi_ari_cluster_labels_kmeans_ari"
    bio += " silhouette_label clisi_knn"
    batch = "bras ilisi_knn kbet_per_label graph_connectivity pcr_comparison"
    for part, names in (("Bio conservation", bio), ("Batch correction", batch)):
        for name in names.split():
            for embedding in ("scvi", "pca"):
                made._results.loc[name, embedding] = rng.random()
            made._results.loc[name, "Metric Type"] = part
    frame = made.get_results(min_max_scale=False)
    rule = {
        name: {title: float(value) for title, value in frame.loc[name].items()}
        for name in ("scvi", "pca")
    }
    return {"benchmarker": found, "get_results": rule}


def main() -> None:
    import scib_metrics as scib
    from scib_metrics.nearest_neighbors import NeighborsResults, pynndescent

    with np.load(sys.argv[1]) as cells:
        z, before = cells["z"], cells["before"]
        labels, batches = cells["labels"], cells["batches"]
        given = "indices" in cells
        if given:
            near = NeighborsResults(indices=cells["indices"], distances=cells["distances"])
    wanted = set(sys.argv[3:])
    if wanted == {"benchmarker"}:
        with np.load(sys.argv[1]) as cells:
            Path(sys.argv[2]).write_text(json.dumps(tables(cells), indent=1) + "\n")
        return
    seconds: dict[str, float] = {}
    if not given:
        start = time.perf_counter()
        near = pynndescent(z, n_neighbors=90, random_state=0, n_jobs=-1)
        seconds["neighbours"] = time.perf_counter() - start
    works: dict[str, Callable[[], Any]] = {
        "ilisi": lambda: scib.ilisi_knn(near, batches),
        "clisi": lambda: scib.clisi_knn(near, labels),
        "kbet": lambda: scib.kbet(near.subset_neighbors(n=50), batches)[0],
        "graph_connectivity": lambda: scib.graph_connectivity(near.subset_neighbors(n=15), labels),
        "silhouette_label": lambda: scib.silhouette_label(z, labels),
        "silhouette_batch": lambda: scib.silhouette_batch(z, labels, batches),
        "isolated_labels": lambda: scib.isolated_labels(z, labels, batches),
        "bras": lambda: scib.bras(z, labels, batches),
        "pcr_batch": lambda: scib.utils.principal_component_regression(
            z, batches, categorical=True
        ),
        "pcr_comparison": lambda: scib.pcr_comparison(before, z, batches, categorical=True),
        "kmeans": lambda: scib.nmi_ari_cluster_labels_kmeans(z, labels),
        "leiden": lambda: scib.nmi_ari_cluster_labels_leiden(near.subset_neighbors(n=15), labels),
        "kbet_per_label": lambda: scib.kbet_per_label(near.subset_neighbors(n=50), batches, labels),
    }
    out: dict[str, Any] = {"version": version("scib-metrics"), "values": {}, "seconds": seconds}
    for name, work in works.items():
        if wanted and name not in wanted:
            continue
        start = time.perf_counter()
        try:
            value = work()
        except Exception as error:  # a peer that fails is named in the table
            out["values"][name] = f"{type(error).__name__}: {error}"[:200]
        else:
            if isinstance(value, dict):
                out["values"] |= {f"{name}_{key}": float(v) for key, v in value.items()}
            else:
                out["values"][name] = float(value)
        out["seconds"][name] = time.perf_counter() - start
        Path(sys.argv[2]).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
