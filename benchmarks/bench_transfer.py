"""Are cells of a type that the reference lacks told from the others?

Each type that reference and query share is removed in turn: from the reference, from the training
of its model, and from the choice of genes. The query, which has it, is mapped on by surgery
(``atlas.extend_reference``), with no label known, and its cells are labelled by the reference. Two
sets of studies:

kang
    ``pbmc_4batch_3study.h5ad``: reference Zheng's and the pbmc3k cells, query Kang's.
simulated
    Three studies of ``atlas simulate``; the last is the query.

Of the query's labelled cells those of the removed type are *unseen*, the others *known*. Compared
are scores that should be high for unseen cells,

distance, misfit
    of ``atlas.transfer_labels``, in an scVI embedding;
u
    1 - P of its label, Gaussian kernel;
u, published
    the same with scArches' kernel (Lotfollahi et al. 2022), the peer;
scANVI entropy
    of the classifier of a scANVI trained and mapped on the same way,
distance, scANVI
    that of ``atlas.transfer_labels`` in its embedding,

by AUROC of unseen against known cells, and by *recall*: the share of unseen cells above the line
that 5 % of the known cells are above. That line is drawn with the truth in hand. What a user gets,
lines drawn by leaving studies of the reference out (``false_unknown=.05``), is the *rule*: the
share of known and of unseen cells that it calls Unknown; published: u above .5.

*Own cluster*: of the 15 nearest cells of an unseen cell, reference and query together, the share
that are unseen too (all cells with a label), and that share at random; 1 is a cluster of their own.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import (
    DATA,
    Json,
    Phases,
    argument_parser,
    phases_json,
    provenance,
    run_worker,
    say,
    say_provenance,
    serve_worker,
    table,
    write_json,
)

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

K = 50
OWN = 15
FALSE_UNKNOWN = 0.05
DATASETS = ("kang", "simulated")
MODELS = ("scvi", "scanvi")
SCORES = ("distance", "misfit", "u", "u, published", "scANVI entropy", "distance, scANVI")
FULL: Json = {"n_genes": 2000, "n_hidden": 128, "epochs": 50, "cells": 9000}
FULL |= {"share": 1.0, "least": 30, "k": K}
TINY: Json = {"n_genes": 200, "n_hidden": 16, "epochs": 2, "cells": 900}
TINY |= {"share": 0.3, "least": 2, "k": 15}


# workers


def prepare(arguments: Json, phases: Phases) -> Json:
    """The cells as one file, with ``study`` and a label; which types are there to remove."""
    import anndata as ad

    from atlas.simulate import simulate

    folder = Path(arguments["folder"])
    if arguments["dataset"] == "kang":
        cells = ad.read_h5ad(DATA / "pbmc_4batch_3study.h5ad")
        cells.obs["query"] = cells.obs["batch"].astype(str).str.startswith("kang")
    else:
        files = simulate(
            folder / "studies", arguments["cells"], 3, arguments["data_seed"],
            genes=max(1000, arguments["n_genes"]), progress=False,
        )  # fmt: skip
        parts = {file.stem: ad.read_h5ad(file) for file in files}
        cells = ad.concat(parts, label="study")
        cells.obs["query"] = cells.obs["study"] == files[-1].stem
    if arguments["share"] < 1:
        kept = np.random.default_rng(0).random(cells.n_obs) < arguments["share"]
        cells = cells[kept].copy()
    label = cells.obs["cell_type"].astype(str)
    in_query = label[cells.obs["query"]].value_counts()
    in_reference = label[~cells.obs["query"]].value_counts()
    types = [
        name
        for name in sorted(set(in_query.index) & set(in_reference.index) - {"Unknown"})
        if in_query[name] >= arguments["least"]
    ]
    cells.obs["true"] = label
    cells.obs["study"] = cells.obs["study"].astype(str).str.replace(" ", "_")
    cells.write_h5ad(folder / "cells.h5ad")
    return {"types": types, "n_query": int(in_query.drop("Unknown", errors="ignore").sum())}


def map_on(arguments: Json, phases: Phases) -> Json:
    """Train without a type, map the query on, keep the embedding and what is known of the cells."""
    import anndata as ad

    import atlas

    folder, removed = Path(arguments["folder"]), arguments["removed"]
    cells = ad.read_h5ad(folder / "cells.h5ad")
    obs = cells.obs
    query = obs["query"].to_numpy(bool)
    # of simulated cells a tenth has no label; they go too
    is_removed = (obs["true_type"] if "true_type" in obs else obs["true"]).astype(str) == removed
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        store = atlas.create_store(work / "cells.atlas")
        keys = {"batch_key": "batch", "label_key": "cell_type"}
        studies = obs["study"].astype(str).to_numpy()
        for study in sorted(set(studies[~query])):
            rows = (studies == study) & ~query & ~is_removed.to_numpy(bool)
            store.append(cells[rows].copy(), study=study, **keys)
        genes = atlas.select_genes(store, n=min(arguments["n_genes"], store.n_vars))
        common = {"seed": arguments["seed"], "device": "cpu", "threads": arguments["threads"]}
        phases.begin("train")
        model = atlas.train(
            store,
            arguments["model"],
            genes=genes,
            out=work / "reference",
            max_epochs=arguments["epochs"],
            n_hidden=arguments["n_hidden"],
            **common,
        )
        asked = cells[query].copy()
        asked.obs["cell_type"] = "Unknown"
        store.append(asked, study="query", **keys)
        phases.begin("surgery")
        model = atlas.extend_reference(
            model,
            store,
            ["query"],
            out=work / "extended",
            **common,
        )
        phases.begin("embed")
        z = atlas.embed(model, store, name="z", device="cpu")
        told = store.obs(["true", "study"])
        truth = told["true"].astype(str).to_numpy(str)
        query = np.asarray(store.obs_codes["study"] == store.studies.index("query"))
        found: dict[str, Any] = {"z": z, "truth": truth, "query": query}
        found["removed"] = truth == removed
        # what else the reference lacks is neither known nor the type in question
        rows = query & (np.isin(truth, truth[~query]) | found["removed"]) & (truth != "Unknown")
        found["asked"] = rows
        phases.begin("transfer")
        options: Json = {"embedding": "z", "reference": ~query, "query": rows, "name": None}
        options["k"] = arguments["k"]
        if arguments["model"] == "scanvi":
            labelled = atlas.label(model, store, name=None, rows=rows, device="cpu").table
            found["entropy"] = labelled["scanvi_entropy"].to_numpy(np.float64)
            made = atlas.transfer_labels(store, **options)
            found["distance"] = made.table["transferred_distance"].to_numpy(np.float64)
        else:
            made = atlas.transfer_labels(store, **options, false_unknown=FALSE_UNKNOWN, sets=0.9)
            # over all query cells, whose neighbours are pooled
            whole = atlas.transfer_labels(store, **options | {"query": query}, misfit=True)
            found["misfit"] = whole.table["transferred_misfit"].to_numpy(np.float64)[rows[query]]
            plain = atlas.transfer_labels(store, **options, kernel="scarches")
            for name, one in (("rule", made), ("published", plain)):
                found[name] = (one.table["transferred"] == "Unknown").to_numpy(bool)
                found[f"u {name}"] = one.table["transferred_uncertainty"].to_numpy(np.float64)
            found["distance"] = made.table["transferred_distance"].to_numpy(np.float64)
            named = made.table["transferred"].astype(str).to_numpy()
            sets = made.table["transferred_set"].astype(str).str.split("; ")
            known = ~found["removed"][rows]
            right = (named == truth[rows])[known].mean()
            inside = [label in own for label, own in zip(truth[rows], sets, strict=True)]
            covered = np.array(inside)[known].mean()
            found["figures"] = np.array([right, covered, made.mean_distance])
        np.savez(folder / arguments["out"], **found)
    return {}


# measures


def auroc(unseen: Mask, score: Floats) -> float:
    """Area under the curve of unseen against known cells."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(unseen, score))


def recall(unseen: Mask, score: Floats) -> float:
    """Share of unseen cells above the line that 5 % of the known are above."""
    line = np.quantile(score[~unseen], 1 - FALSE_UNKNOWN, method="higher")
    return float((score[unseen] > line).mean())


def scored(unseen: Mask, score: Floats) -> Json:
    """Both, of the cells whose score is known: a misfit is not in batches of 60 cells or fewer."""
    known = np.isfinite(score)
    if unseen[known].all() or not unseen[known].any():
        return {"auroc": None, "recall": None}
    unseen, score = unseen[known], score[known]
    return {"auroc": auroc(unseen, score), "recall": recall(unseen, score)}


def own_cluster(z: npt.NDArray[np.float32], labelled: Mask, unseen: Mask) -> tuple[float, float]:
    """Share of unseen cells among the nearest of unseen cells, and among all cells."""
    from atlas.evaluation.neighbours import nearest

    rows = np.flatnonzero(labelled)
    mine = np.flatnonzero(unseen[rows])
    k = min(OWN, len(mine) - 1)
    near = nearest(z[rows], z[rows][mine], k, mine)
    return float(unseen[rows][near.indices].mean()), (len(mine) - 1) / (len(rows) - 1)


def figures(folder: Path, outs: dict[str, str]) -> Json:
    """All measures of one removed type and one seed."""
    out: Json = {}
    if "scvi" in outs:
        with np.load(folder / outs["scvi"]) as found:
            labelled = found["truth"] != "Unknown"
            unseen = found["removed"][found["asked"]]
            scores = {
                "distance": found["distance"],
                "misfit": found["misfit"],
                "u": found["u rule"],
                "u, published": found["u published"],
            }
            for name, score in scores.items():
                out[name] = scored(unseen, score)
            for name in ("rule", "published"):
                unknown = found[name]
                out[name] = {
                    "false_unknown": float(unknown[~unseen].mean()),
                    "recall": float(unknown[unseen].mean()),
                }
            own, chance = own_cluster(found["z"], labelled, found["removed"] & found["query"])
            out["own cluster"] = {"share": own, "chance": chance}
            accuracy, covered, shift = found["figures"].tolist()
            out |= {"accuracy": accuracy, "covered": covered, "mean_distance": shift}
            out |= {"n_unseen": int(unseen.sum()), "n_known": int((~unseen).sum())}
    if "scanvi" in outs:
        with np.load(folder / outs["scanvi"]) as found:
            unseen = found["removed"][found["asked"]]
            scores = {"scANVI entropy": found["entropy"], "distance, scANVI": found["distance"]}
            for name, score in scores.items():
                out[name] = scored(unseen, score)
    return out


def tables(results: list[Json]) -> str:
    """AUROC and recall of each score, by type, mean over seeds; then the rules."""
    by_type: dict[str, list[Json]] = {}
    for result in results:
        by_type.setdefault(result["removed"], []).append(result["figures"])
    every = [one for own in by_type.values() for one in own]

    def mean(own: list[Json], *keys: str) -> float | None:
        found = []
        for one in own:
            value: Any = one
            for key in keys:
                value = value.get(key) if value is not None else None
            if value is not None:
                found.append(value)
        return float(np.mean(found)) if found else None

    def said(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows, rules = [], []
    for name, own in [*by_type.items(), ("mean", every)]:
        cells = [said(mean(own, score, "auroc")) for score in SCORES]
        cells += [said(mean(own, score, "recall")) for score in SCORES]
        rows.append([name, *cells])
        keys = [("rule", "false_unknown"), ("rule", "recall"), ("published", "false_unknown")]
        keys += [("published", "recall"), ("own cluster", "share"), ("own cluster", "chance")]
        keys += [("accuracy",), ("covered",), ("mean_distance",)]
        rules.append([name, *(said(mean(own, *key)) for key in keys)])
    header = [*(f"AUROC, {score}" for score in SCORES), *(f"recall, {score}" for score in SCORES)]
    told = ["rule: false Unknown", "rule: recall", "published: false Unknown", "published: recall"]
    told += ["own cluster", "at random", "accuracy", "in the set", "mean distance"]
    return table(["removed", *header], rows) + "\n\n" + table(["removed", *told], rules)


def main() -> None:
    serve_worker([prepare, map_on])
    parser = argument_parser("Unseen types: the distance score beside uncertainty and entropy")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--types", nargs="+", help="to remove; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    settings: Json = (TINY if args.tiny else FULL) | {"threads": args.threads}
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    results: list[Json] = []
    for dataset in args.datasets:
        with tempfile.TemporaryDirectory(prefix="bench-transfer-", dir=args.work) as temporary:
            folder = Path(temporary)
            common = {"folder": str(folder), "dataset": dataset, "data_seed": 1, **settings}
            made = run_worker(__file__, "prepare", common, folder).result
            types = [t for t in made["types"] if not args.types or t in args.types]
            say(f"\n{dataset}: {made['n_query']:,} labelled query cells; removed in turn: {types}")
            own = []
            for removed in types:
                for seed in args.seeds:
                    outs, phases = {}, {}
                    for model in args.models:
                        asked = {"removed": removed, "seed": seed, "model": model}
                        asked["out"] = f"{model}-{types.index(removed)}-{seed}.npz"
                        run = run_worker(__file__, "map_on", common | asked, folder)
                        outs[model] = asked["out"]
                        phases[model] = phases_json(run)
                    found = figures(folder, outs)
                    own.append(
                        {
                            "dataset": dataset,
                            "removed": removed,
                            "seed": seed,
                            "figures": found,
                            "runs": phases,
                        }
                    )
                    say(f"{removed}, seed {seed}: {found}")
            say("\n" + tables(own))
            results += own
    content = {
        "benchmark": "transfer",
        **known,
        "settings": settings | {"seeds": args.seeds},
        "results": results,
        "seconds": time.monotonic() - started,
    }
    write_json(args.json, content)


if __name__ == "__main__":
    main()
