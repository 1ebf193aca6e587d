"""Workers of ``bench_de.py``: they make the cells, train, test, and write what they estimate."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from common import DATA, Json, Phases, say
from de_measures import DELTA, Estimate, Floats

INTERFERON = ("ISG15", "IFI6", "IFIT1", "IFIT3", "ISG20", "MX1")
HALVES = {"ctrl": "halves of ctrl", "stim": "halves of stim", "CD14+ Monocytes": "halves of CD14"}
N_TYPES = 5
FLIPPED, UNTOUCHED = ("type_1", "type_2"), ("type_3", "type_4")
RATES = (0, 30)  # per cent
K = 10
ALMOST_ALL_ZERO = 10  # cells that must have a gene


def prepare(arguments: Json, phases: Phases) -> Json:
    """Make the cells' file and store; tell genes, order and truth in ``cells.npz``."""
    import atlas

    folder = Path(arguments["folder"])
    adata, truth = (_kang if arguments["question"] == "kang" else _simulated)(arguments)
    adata.write_h5ad(folder / "cells.h5ad")
    phases.begin("ingest")
    store = atlas.create_store(folder / "cells.atlas")
    key = "donor" if arguments["question"] == "kang" else "batch"
    store.append(folder / "cells.h5ad", study="cells", batch_key=key, label_key="cell_type")
    genes = list(adata.var_names)
    if arguments["question"] == "kang":
        # Six genes are asked for, whether they are among those that vary most or not.
        chosen = atlas.select_genes(store, n=min(arguments["n_genes"], len(genes)))
        genes = list(dict.fromkeys([*chosen, *INTERFERON]))
    np.savez(
        folder / "cells.npz",
        genes=np.array(genes, str),
        input_position=store.index_array("input_position"),
        **truth,
    )
    return {"n_cells": store.n_obs, "n_genes": len(genes)}


def _kang(arguments: Json) -> tuple[Any, dict[str, Floats]]:
    import anndata as ad

    rng = np.random.default_rng([arguments["seed"], 2])  # of the halves; all cells in a full run
    adata = ad.read_h5ad(DATA / "kang_ifnb_pbmc.h5ad")
    kept = (adata.obs["donor"] != "doublet").to_numpy()  # no donor, and so no batch
    adata = adata[np.flatnonzero(kept & (rng.random(adata.n_obs) < arguments["share"]))].copy()
    for group, name in HALVES.items():
        column = "batch" if group in ("ctrl", "stim") else "cell_type"
        mine = (adata.obs[column] == group).to_numpy()
        half = np.where(rng.random(adata.n_obs) < 0.5, "a", "b")
        adata.obs[name] = np.where(mine, half, "other")
    return adata, {}


def _simulated(arguments: Json) -> tuple[Any, dict[str, Floats]]:
    import anndata as ad
    import scipy.sparse as sp

    from atlas.simulate import Truth, simulate

    folder, seed = Path(arguments["folder"]) / "simulated", arguments["seed"]
    # Each of two studies lacks one of the rarest types, which are then left out.
    paths = simulate(
        folder,
        arguments["cells"],
        2,
        seed,
        genes=arguments["n_genes"],
        types=N_TYPES + 2,
        batches=1,
        process=arguments["process"],
        progress=False,
    )
    truth = Truth.load(folder / "truth.npz")
    names = truth.types[:N_TYPES].tolist()
    adata = ad.concat([ad.read_h5ad(path) for path in paths], label="batch", keys=["good", "poor"])
    adata = adata[adata.obs["true_type"].isin(names).to_numpy()].copy()
    rng = np.random.default_rng([seed, 1])
    poor = (adata.obs["batch"] == "poor").to_numpy()
    counts = sp.csr_matrix(adata.X)
    entries = np.repeat(poor, np.diff(counts.indptr))
    counts.data[entries] = rng.binomial(counts.data[entries].astype(np.int64), 1 / 3)
    counts.eliminate_zeros()
    seen = np.asarray((counts > 0).sum(axis=0)).ravel() >= ALMOST_ALL_ZERO
    adata.X = counts
    adata = adata[:, seen].copy()

    true_type = adata.obs["true_type"].astype(str).to_numpy()
    other = dict([FLIPPED, FLIPPED[::-1]])
    flip = rng.random(adata.n_obs)
    for rate in RATES:
        flips = np.isin(true_type, FLIPPED) & (flip < rate / 100)
        given = np.where(flips, [other.get(name, name) for name in true_type], true_type)
        adata.obs[f"given {rate}"] = np.where(poor, "Unknown", given)
    log_share = np.log2(truth.type_rho[:N_TYPES].astype(np.float64))[:, seen]
    # Genes without a change differ by rounding alone; they are to be equal.
    changes = {
        f"{names[a]} {names[b]}": (log_share[a] - log_share[b]).round(5)
        for a, b in combinations(range(N_TYPES), 2)
    }
    return adata, changes


def ours(arguments: Json, phases: Phases) -> Json:
    """Train with Atlas, and test."""
    import pandas as pd

    import atlas

    folder, options = Path(arguments["folder"]), dict(arguments["options"])
    store = atlas.open_store(folder / "cells.atlas")
    genes = np.load(folder / "cells.npz")["genes"].tolist()
    phases.begin("train")
    model = atlas.train(
        store,
        options.pop("model"),
        out=folder / f"run-{arguments['out']}",
        genes=genes,
        max_epochs=arguments["epochs"],
        n_hidden=arguments["n_hidden"],
        seed=arguments["seed"],
        device="cpu",
        **options,
    )
    phases.begin("test")
    names, found = store.obs([]).index, {}
    columns: dict[tuple[str, str], str] = {}
    for test in arguments["tests"]:
        kind, column = test["kind"], test["column"]
        if kind in ("neighbours", "predicted") and (kind, column) not in columns:
            labels = store.obs([column])[column].to_numpy(str)
            if kind == "predicted":
                labels = atlas.label(model, store, name=None, device="cpu").table["scanvi"]
            else:
                labels = _carried(atlas.embed(model, store, name=None, device="cpu"), labels)
                np.save(folder / f"{column}.npy", labels)  # scanpy takes the same
            made = columns[kind, column] = f"{kind} {column} {arguments['out']}"
            store.annotate(pd.DataFrame({made: np.asarray(labels, str)}, index=names))
        column = columns.get((kind, column), column)
        if kind != "classes" and _absent(store.obs([column])[column].to_numpy(str), test):
            found |= Estimate.nothing(len(genes)).arrays(key_of(test))
            continue
        groups: Json = {"group1": {column: [test["one"]]}, "group2": {column: [test["other"]]}}
        if kind == "classes":
            groups = {"group1": test["one"], "group2": test["other"], "scanvi": True}
        rows = {
            mode: atlas.differential_expression(
                model,
                store,
                **groups,
                mode=mode,
                delta=DELTA if mode == "change" else None,
                n_pairs=arguments["n_pairs"],
                seed=arguments["seed"],
                device="cpu",
            )
            for mode in ("change", "vanilla")
        }
        found |= _estimate(rows["change"], rows["vanilla"], genes).arrays(key_of(test))
    np.savez(folder / f"{arguments['out']}.npz", **found)
    return {}


def scvi_tools(arguments: Json, phases: Phases) -> Json:
    """Train SCVI, from it a SCANVI for each column of labels that is predicted, and test."""
    import scvi

    folder, epochs = Path(arguments["folder"]), arguments["epochs"]
    adata = _read(folder)
    scvi.settings.verbosity = 30
    scvi.settings.seed = arguments["seed"]
    phases.begin("train")
    batch = "donor" if arguments["question"] == "kang" else "batch"
    scvi.model.SCVI.setup_anndata(adata, batch_key=batch)
    model = scvi.model.SCVI(
        adata,
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        gene_likelihood="zinb",
        use_layer_norm="both",
        use_batch_norm="none",
        encode_covariates=True,
    )
    quiet = {
        "accelerator": "cpu",
        "batch_size": 128,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": None,
    }
    plan = {"lr": 1e-3, "eps": 0.01, "weight_decay": 1e-6, "n_epochs_kl_warmup": epochs // 2}
    model.train(max_epochs=epochs, plan_kwargs=plan, **quiet)
    phases.begin("test")
    found: Json = {}
    made: dict[tuple[str, str], tuple[Any, np.ndarray]] = {}
    for test in arguments["tests"]:
        kind, column = test["kind"], test["column"]
        if (kind, column) not in made:
            labels = adata.obs[column].to_numpy(str)
            tested = model
            if kind == "neighbours":
                labels = _carried(model.get_latent_representation(), labels)
            elif kind == "predicted":
                tested = scvi.model.SCANVI.from_scvi_model(model, "Unknown", labels_key=column)
                tested.train(max_epochs=max(1, epochs // 5), **quiet)
                labels = np.asarray(tested.predict(), str)
            made[kind, column] = tested, labels
        tested, labels = made[kind, column]
        if _absent(labels, test):
            found |= Estimate.nothing(adata.n_vars).arrays(key_of(test))
            continue
        rows = {
            mode: tested.differential_expression(
                idx1=labels == test["one"],
                idx2=labels == test["other"],
                mode=mode,
                delta=DELTA,
                batch_correction=True,
                n_samples_overall=arguments["n_pairs"],
                silent=True,
            )
            for mode in ("change", "vanilla")
        }
        genes = adata.var_names.tolist()
        found |= _estimate(rows["change"], rows["vanilla"], genes).arrays(key_of(test))
    np.savez(folder / f"{arguments['out']}.npz", **found)
    return {}


def scanpy_wilcoxon(arguments: Json, phases: Phases) -> Json:
    """Test counts without a model; labels that were carried are those of our scVI."""
    import scanpy as sc

    folder = Path(arguments["folder"])
    adata = _read(folder)
    position = np.load(folder / "cells.npz")["input_position"].astype(np.int64)
    phases.begin("test")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    found: Json = {}
    for test in arguments["tests"]:
        labels = adata.obs[test["column"]].to_numpy(str)
        if test["kind"] == "neighbours":
            in_store = np.load(folder / f"{test['column']}.npy")
            labels = np.empty(len(in_store), in_store.dtype)
            labels[position] = in_store
        if _absent(labels, test, least=2):
            found |= Estimate.nothing(adata.n_vars).arrays(key_of(test))
            continue
        groups = [test["one"], test["other"]]
        pair = adata[np.isin(labels, groups)].copy()
        pair.obs["group"] = labels[np.isin(labels, groups)]
        pair.obs["group"] = pair.obs["group"].astype("category")
        sc.tl.rank_genes_groups(
            pair, "group", groups=groups[:1], reference=groups[1], method="wilcoxon"
        )
        rows = sc.get.rank_genes_groups_df(pair, group=groups[0]).set_index("names")
        rows["proba_de"] = rows["scores"].abs()
        rows["bayes_factor"], rows["lfc_mean"] = rows["scores"], rows["logfoldchanges"]
        beyond = rows["logfoldchanges"].abs() >= DELTA
        rows["is_de_fdr_0.05"] = (rows["pvals_adj"] < 0.05) & beyond
        change = rows.sort_values("proba_de", ascending=False, kind="stable")
        found |= _estimate(change, rows, adata.var_names.tolist()).arrays(key_of(test))
    np.savez(folder / f"{arguments['out']}.npz", **found)
    return {}


def _read(folder: Path) -> Any:
    """The cells as AnnData, in the order of the file, of the genes chosen."""
    import anndata as ad

    adata = ad.read_h5ad(folder / "cells.h5ad")[:, np.load(folder / "cells.npz")["genes"]].copy()
    adata.X = adata.X.astype(np.float32)
    return adata


def _carried(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels, those of cells without one by the majority of their neighbours."""
    from atlas.evaluation.labels import majority_vote
    from atlas.evaluation.neighbours import nearest

    z = np.asarray(z, np.float32)
    known = np.flatnonzero(labels != "Unknown")
    asked = np.flatnonzero(labels == "Unknown")
    names, codes = np.unique(labels[known], return_inverse=True)
    near = nearest(z[known], z[asked], min(K, len(known)))
    out = labels.copy()
    out[asked] = names[majority_vote(codes[near.indices], len(names)).codes]
    return out


def _absent(labels: np.ndarray, test: Json, least: int = 1) -> bool:
    """Whether a group has no cells, so that there is nothing to be said of it; says so."""
    n_cells = [int((labels == test[group]).sum()) for group in ("one", "other")]
    if min(n_cells) < least:
        say(f"{key_of(test)}: {n_cells} cells are labelled {test['one']} and {test['other']}")
    return min(n_cells) < least


def _estimate(change: Any, vanilla: Any, genes: list[str]) -> Estimate:
    """What the two tables say, gene by gene."""
    first, second = change.loc[genes], vanilla.loc[genes]
    return Estimate(
        lfc=first["lfc_mean"].to_numpy(np.float64),
        probability=first["proba_de"].to_numpy(np.float64),
        k=second["bayes_factor"].to_numpy(np.float64),
        called=first["is_de_fdr_0.05"].to_numpy(bool),
        rank=1 + change.index.get_indexer(genes).astype(np.int64),
        rank_k=1 + vanilla.index.get_indexer(genes).astype(np.int64),
    )


def key_of(test: Json) -> str:
    return f"{test['side']}|{test['name']}"
