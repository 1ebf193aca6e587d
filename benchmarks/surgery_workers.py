"""The two sides of ``bench_surgery.py``: each trains a reference, maps the query, embeds.

``cells.npz`` tells of each cell its name, condition (zheng, pbmc3k, kang_ctrl, kang_stim), study,
label and the principal components of its own condition. An embedding is written as ``z`` and the
``name`` of its cells, in the order of whoever made it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import Json, Phases

QUERY = ("kang_ctrl", "kang_stim")
KEYS = ("batch", "study")
"""What is a batch for the model: each condition, or each study (both of Kang's are one then)."""


def _cells(arguments: Json, rows: np.ndarray | None = None) -> Any:
    """The counts, as AnnData; of all cells in ``cells.npz`` if no rows are given."""
    import anndata as ad

    names = np.load(Path(arguments["folder"]) / "cells.npz")["name"]
    return ad.read_h5ad(arguments["source"])[names if rows is None else names[rows]].copy()


def _append(store: Any, adata: Any, key: str) -> None:
    """The reference and each batch of the query as studies of a store."""
    of_query = adata.obs["batch"].isin(QUERY)
    parts = {"reference": ~of_query}
    if key == "study":
        parts["kang"] = of_query
    else:
        parts |= {name: adata.obs["batch"] == name for name in QUERY}
    for name, inside in parts.items():
        if inside.any():
            part = adata[inside.to_numpy()].copy()
            store.append(part, study=name, batch_key=key, label_key="cell_type")


def prepare(arguments: Json, phases: Phases) -> Json:
    """Choose cells and genes, over all four conditions; ingest the reference under each key."""
    import anndata as ad

    import atlas

    folder = Path(arguments["folder"])
    adata = ad.read_h5ad(arguments["source"])
    rng = np.random.default_rng(0)
    adata = adata[rng.random(adata.n_obs) < arguments["share"]].copy()
    every = atlas.create_store(folder / "every.atlas")
    every.append(adata, study="every", batch_key="batch", label_key="cell_type")
    genes = atlas.select_genes(every, n=min(arguments["n_genes"], adata.n_vars))
    own = atlas.baseline(every, "pca", per_batch=True, name=None)
    order = every.obs([]).index
    adata = adata[order]
    labels = adata.obs["cell_type"].astype(str).to_numpy(str)
    np.savez(
        folder / "cells.npz",
        genes=np.array(genes, str),
        name=order.to_numpy(str),
        batch=adata.obs["batch"].astype(str).to_numpy(str),
        label=np.where(labels == "Unknown", "", labels),
        own=own,
    )
    of_query = adata.obs["batch"].isin(QUERY).to_numpy()
    for key in KEYS:
        _append(atlas.create_store(folder / f"reference-{key}.atlas"), adata[~of_query].copy(), key)
    return {"n_cells": adata.n_obs, "n_query": int(of_query.sum())}


def sample_query(arguments: Json, phases: Phases) -> Json:
    """A part of the query, by seed, in a store with the reference; its rows for the peer."""
    import atlas

    folder, share = Path(arguments["folder"]), arguments["query_share"]
    batch = np.load(folder / "cells.npz")["batch"]
    rng = np.random.default_rng(arguments["seed"])
    taken = [np.flatnonzero(~np.isin(batch, QUERY))]
    for name in QUERY:
        rows = np.flatnonzero(batch == name)
        taken.append(rng.choice(rows, max(1, round(share * len(rows))), replace=False))
    rows = np.sort(np.concatenate(taken))
    np.save(folder / f"{arguments['sample']}.npy", rows)
    store = atlas.create_store(folder / f"{arguments['sample']}.atlas")
    _append(store, _cells(arguments, rows), arguments["key"])
    return {"n_cells": len(rows)}


def ours_reference(arguments: Json, phases: Phases) -> Json:
    """Train the reference with Atlas."""
    import atlas

    folder = Path(arguments["folder"])
    phases.begin("train")
    _train(atlas.open_store(folder / f"reference-{arguments['key']}.atlas"), arguments)
    return {}


def _train(store: Any, arguments: Json) -> Any:
    import atlas

    folder = Path(arguments["folder"])
    return atlas.train(
        store,
        "scvi",
        out=folder / arguments["out"],
        genes=[str(gene) for gene in np.load(folder / "cells.npz")["genes"]],
        max_epochs=arguments["epochs"],
        seed=arguments["seed"],
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        device="cpu",
    )


def ours(arguments: Json, phases: Phases) -> Json:
    """Map the query by surgery, or train on all cells; embed."""
    import atlas

    folder = Path(arguments["folder"])
    store = atlas.open_store(folder / f"{arguments['sample']}.atlas")
    options = dict(arguments["options"])
    if arguments["tiny"]:
        options["max_epochs"] = 1
    extend = atlas.extend_reference  # imports
    phases.begin("map")
    if not arguments["steps"]:
        model = _train(store, arguments)
    else:
        model = atlas.load_model(folder / arguments["reference"])
        for i, studies in enumerate(arguments["steps"]):
            out = folder / f"{arguments['out']}-{i}"
            known = [name for name in arguments["apart_from"] if name in model.studies]
            model = extend(
                model,
                store,
                studies,
                out=out,
                seed=arguments["seed"],
                device="cpu",
                apart_from=known,
                **options,
            )
    phases.begin("embed")
    z = atlas.embed(model, store, name=None, device="cpu")
    np.savez(folder / f"{arguments['out']}.npz", z=z, name=store.obs([]).index.to_numpy(str))
    return {"trained": model.surgery[-1].n_trained if model.surgery else None}


_QUIET = {
    "accelerator": "cpu",
    "batch_size": 128,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": None,
}


def _for_peer(arguments: Json, rows: np.ndarray) -> Any:
    genes = np.load(Path(arguments["folder"]) / "cells.npz")["genes"]
    adata = _cells(arguments, rows)[:, genes].copy()
    adata.X = adata.X.astype(np.float32)
    for key in KEYS:
        adata.obs[key] = adata.obs[key].astype(str)
    return adata


def peer_reference(arguments: Json, phases: Phases) -> Json:
    """Train the reference with scvi-tools, the architecture of ours."""
    import scvi

    folder, epochs = Path(arguments["folder"]), arguments["epochs"]
    scvi.settings.verbosity = 30
    scvi.settings.seed = arguments["seed"]
    batch = np.load(folder / "cells.npz")["batch"]
    adata = _for_peer(arguments, np.flatnonzero(~np.isin(batch, QUERY)))
    scvi.model.SCVI.setup_anndata(adata, batch_key=arguments["key"])
    model = scvi.model.SCVI(
        adata,
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        use_layer_norm="both",
        use_batch_norm="none",
        encode_covariates=True,
    )
    phases.begin("train")
    plan = {"lr": 1e-3, "eps": 0.01, "weight_decay": 1e-6, "n_epochs_kl_warmup": epochs // 2}
    model.train(max_epochs=epochs, plan_kwargs=plan, **_QUIET)
    model.save(str(folder / arguments["out"]))
    return {}


def peer(arguments: Json, phases: Phases) -> Json:
    """Map with scvi-tools as its documentation says: without weight decay; embed."""
    import anndata as ad
    import scvi

    folder = Path(arguments["folder"])
    scvi.settings.verbosity = 30
    scvi.settings.seed = arguments["seed"]
    rows = np.load(folder / f"{arguments['sample']}.npy")
    batch = np.load(folder / "cells.npz")["batch"][rows]
    model: Any = str(folder / arguments["reference"])
    parts = []
    phases.begin("map")
    for studies in arguments["steps"]:
        names = QUERY if studies == ["kang"] else studies
        parts.append(_for_peer(arguments, rows[np.isin(batch, names)]))
        model = scvi.model.SCVI.load_query_data(parts[-1].copy(), model)
        model.train(max_epochs=arguments["epochs"], plan_kwargs={"weight_decay": 0.0}, **_QUIET)
    phases.begin("embed")
    every = ad.concat([_for_peer(arguments, rows[~np.isin(batch, QUERY)]), *parts])
    z = np.asarray(model.get_latent_representation(every), np.float32)
    np.savez(folder / f"{arguments['out']}.npz", z=z, name=every.obs_names.to_numpy(str))
    return {}
