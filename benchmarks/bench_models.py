"""Which model labels cells best, and mixes batches, beside scvi-tools on the same cells?

Three questions, each with all models that it makes sense for:

transfer
    ``pbmc_4batch_3study.h5ad``: labels of Zheng's and the pbmc3k cells, carried to Kang's.
seeds
    ``zheng_pbmc_facs.h5ad``, sorted T cells: the top 50 cells of each of the paper's signatures
    are the labels (scANVI, Xu et al. 2021, "Cell type annotation in a single dataset"); the sorted
    populations are the truth.
hierarchy
    ``paul15_hspc.h5ad``: 5 labelled cells of each of 19 clusters, with and without the lineages
    above them (the same, "Cell type taxonomy").

A model without classes labels by the majority of 50 neighbours among the labelled cells in its
latent space (15 where there are few labels). Accuracy is over the cells asked, weighted accuracy
the mean over the labels of the share that is right; entropy is of the batches among 50 neighbours.
Differences are to the baseline that is named, paired by cell, averaged over the seeds first; the
interval is that of the mean over cells, normal, 95 %.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_quality import NORMAL_95, mean_and_error
from common import (
    DATA,
    Json,
    Outcome,
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

K = 50
FEW = 15
FULL = {"n_genes": 2000, "n_hidden": 128, "epochs": 50, "share": 1.0}
TINY = {"n_genes": 150, "n_hidden": 16, "epochs": 2, "share": 0.1}
SIGNATURES = """\
CD4 Regulatory: GITR+ CTLA4+ FOXP3+ CD25+ S100A4- CD45- CD8B-
CD4 Naive: CCR7+ CD4+ S100A4- CD45- FOXP3- IL2RA- CD69-
CD4 Memory: S100A4+ CD25- FOXP3- GITR- CCR7-
CD8 Naive: CD8B+ CCR7+ CD4-
"""
SORTED = {  # libraries of sorted cells (Zheng et al. 2017) and the signatures that stand for them
    "CD4+/CD25 T Reg": "CD4 Regulatory",
    "CD4+/CD45RA+/CD25- Naive T": "CD4 Naive",
    "CD4+/CD45RO+ Memory": "CD4 Memory",
    "CD8+/CD45RA+ Naive Cytotoxic": "CD8 Naive",
}
LINEAGES = {  # Paul et al. 2015, Figure 1; DC, Lymph and Meg stand for themselves
    **{f"{i}{name}": "erythroid" for i, name in [(k, "Ery") for k in range(1, 7)]},
    **{"7MEP": "erythroid", "8Mk": "megakaryocyte", "9GMP": "myeloid", "10GMP": "myeloid"},
    **{"11DC": "dendritic", "12Baso": "basophil", "13Baso": "basophil", "14Mo": "monocyte"},
    **{"15Mo": "monocyte", "16Neu": "neutrophil", "17Neu": "neutrophil"},
    **{"18Eos": "eosinophil", "19Lymph": "lymphoid"},
}


@dataclass(frozen=True)
class Side:
    """One way to label cells.

    Attributes
    ----------
    name
        For the table.
    worker
        ``"ours"``, ``"scvi_tools"``.
    options
        Of :func:`atlas.train`; the model and what it is told.
    """

    name: str
    worker: str
    options: dict[str, Any]


SCVI = Side("scVI, kNN", "ours", {"model": "scvi"})
SCANVI = Side("scANVI", "ours", {"model": "scanvi"})
ONE = {"classifier_layers": 2, "classifier_hidden": 256, "classifier_epochs": 1}
SIDES: dict[str, list[Side]] = {
    "transfer": [
        Side("scvi-tools SCVI, kNN", "scvi_tools", {"model": "scvi"}),
        Side("scvi-tools SCANVI", "scvi_tools", {"model": "scanvi"}),
        SCVI,
        SCANVI,
        Side("scANVI, joint", "ours", {"model": "scanvi", "training": "joint"}),
        Side("trVAE, kNN", "ours", {"model": "trvae"}),
        Side("DAVAE, kNN", "ours", {"model": "davae"}),
    ],
    "seeds": [
        SCVI,
        Side("scANVI", "ours", {"model": "scanvi", **ONE}),
        Side("scANVI, from scVI", "ours", {"model": "scanvi", "pretrained": True}),
        Side("scANVI, joint", "ours", {"model": "scanvi", "training": "joint"}),
        Side("scvi-tools SCANVI", "scvi_tools", {"model": "scanvi"}),
    ],
    "hierarchy": [
        SCVI,
        Side("scANVI, flat", "ours", {"model": "scanvi", **ONE}),
        Side("scANVI, hierarchical", "ours", {"model": "scanvi", **ONE, "tree": True}),
        Side("scANVI, flat, from scVI", "ours", {"model": "scanvi", "pretrained": True}),
        Side(
            "scANVI, hierarchical, from scVI",
            "ours",
            {"model": "scanvi", "pretrained": True, "tree": True},
        ),
        Side("scANVI, flat, joint", "ours", {"model": "scanvi", "training": "joint"}),
        Side(
            "scANVI, hierarchical, joint",
            "ours",
            {"model": "scanvi", "training": "joint", "tree": True},
        ),
        Side("scvi-tools SCANVI", "scvi_tools", {"model": "scanvi"}),
    ],
}
FILES = {
    "transfer": "pbmc_4batch_3study.h5ad",
    "seeds": "zheng_pbmc_facs.h5ad",
    "hierarchy": "paul15_hspc.h5ad",
}


# workers


def prepare(arguments: Json, phases: Phases) -> Json:
    """Ingest the file, choose genes, hide labels; tell all in ``cells.npz``, in store order."""
    import anndata as ad
    import pandas as pd

    import atlas

    folder, question = Path(arguments["folder"]), arguments["question"]
    adata = ad.read_h5ad(arguments["source"])
    obs = adata.obs
    if question == "seeds":
        truth = obs["library"].astype(str).map(SORTED)
        adata = adata[truth.notna().to_numpy()].copy()
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(rng.random(adata.n_obs) < arguments["share"])
    adata = adata[rows].copy()
    adata.write_h5ad(folder / "cells.h5ad")
    phases.begin("ingest")
    store = atlas.create_store(folder / "cells.atlas")
    batch = "batch" if "batch" in adata.obs else None
    store.append(folder / "cells.h5ad", study="cells", batch_key=batch, label_key="cell_type")
    obs = store.obs()
    truth = obs["cell_type"].astype(object).where(obs["cell_type"] != "Unknown")
    if question == "transfer":
        seen = truth.where(~obs["batch"].astype(str).str.startswith("kang"))
        asked = seen.isna() & truth.notna() & truth.isin(seen.dropna().unique())
    elif question == "seeds":
        (folder / "signatures.txt").write_text(SIGNATURES)
        top = min(50, store.n_obs // 10)
        atlas.seed_labels(store, folder / "signatures.txt", name="seen", top=top)
        truth = obs["library"].astype(str).map(SORTED)
        seen = store.obs(["seen"])["seen"].astype(object)
        seen = seen.where(seen != "Unknown")
        asked = truth.notna()
    else:
        seen = pd.Series(None, index=obs.index, dtype=object)
        for name in sorted(set(truth.dropna())):
            mine = np.flatnonzero(truth == name)
            seen.iloc[rng.choice(mine, min(5, len(mine)), replace=False)] = name
        asked = seen.isna() & truth.notna()
    if question != "seeds":
        store.annotate(pd.DataFrame({"seen": seen}, index=obs.index))
    phases.begin("genes")
    genes = atlas.select_genes(store, n=min(arguments["n_genes"], len(adata.var_names)))
    np.savez(
        folder / "cells.npz",
        genes=genes,
        input_position=store.index_array("input_position"),
        batch=store.obs_codes["batch"],
        n_batch=len(store.batches),
        seen=seen.where(seen.notna(), "").to_numpy(str),
        truth=truth.where(truth.notna(), "").to_numpy(str),
        asked=asked.to_numpy(bool),
    )
    return {
        "n_cells": store.n_obs,
        "n_labelled": int(seen.notna().sum()),
        "asked": int(asked.sum()),
    }


def ours(arguments: Json, phases: Phases) -> Json:
    """Train with Atlas; embed, and label by the classifier where the model has one.

    A model that is ``pretrained`` goes on from a scVI for a fifth as long, as scvi-tools' does.
    """
    import atlas

    folder, options = Path(arguments["folder"]), dict(arguments["options"])
    store = atlas.open_store(folder / "cells.atlas")
    name = options.pop("model")
    if name == "scanvi":
        options["label_key"] = "seen"
        if options.pop("tree", False):
            options["hierarchy"] = LINEAGES
    if name != "davae":
        options["n_hidden"] = arguments["n_hidden"]
    epochs = arguments["epochs"]
    common = {"seed": arguments["seed"], "device": "cpu"}
    phases.begin("train")
    if options.pop("pretrained", False):
        hidden, begun = options["n_hidden"], folder / f"{arguments['out']}-scvi"
        options["start_from"] = atlas.train(
            store, "scvi", out=begun, max_epochs=epochs, n_hidden=hidden, **common
        )
        epochs = max(1, epochs // 5)
    model = atlas.train(
        store, name, out=folder / arguments["out"], max_epochs=epochs, **common, **options
    )
    phases.begin("embed")
    z = atlas.embed(model, store, name=None, device="cpu")
    found = np.full(store.n_obs, "", object)
    more = {}
    if model.labels is not None:
        found = atlas.label(model, store, name=None, device="cpu").table["scanvi"].to_numpy(object)
        p = atlas.label_probabilities(model, store, device="cpu")
        more = {"p": p.to_numpy(np.float32), "classes": p.columns.to_numpy(str)}
    np.savez(folder / f"{arguments['out']}.npz", z=z, found=found.astype(str), **more)
    return {}


def scvi_tools(arguments: Json, phases: Phases) -> Json:
    """Train SCVI with scvi-tools and, for SCANVI, a fifth as long from it; in store order."""
    import anndata as ad
    import scvi

    folder, seed, epochs = Path(arguments["folder"]), arguments["seed"], arguments["epochs"]
    cells = np.load(folder / "cells.npz")
    position = cells["input_position"].astype(np.int64)
    scvi.settings.verbosity = 30
    adata = ad.read_h5ad(folder / "cells.h5ad")[:, cells["genes"]].copy()
    adata.X = adata.X.astype(np.float32)
    seen = np.empty(len(position), object)
    seen[position] = np.where(cells["seen"] == "", "Unknown", cells["seen"])
    adata.obs["seen"] = seen.astype(str)
    scvi.settings.seed = seed
    phases.begin("train")
    batch = "batch" if "batch" in adata.obs else None
    scvi.model.SCVI.setup_anndata(adata, batch_key=batch, labels_key="seen")
    model = scvi.model.SCVI(
        adata,
        n_layers=2,
        n_hidden=arguments["n_hidden"],
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
    found = np.full(len(position), "", object)
    more = {}
    if arguments["options"]["model"] == "scanvi":
        model = scvi.model.SCANVI.from_scvi_model(model, "Unknown")
        model.train(max_epochs=max(1, epochs // 5), **quiet)
        found = np.asarray(model.predict(), object)[position]
        p = model.predict(soft=True)
        more = {"p": p.to_numpy(np.float32)[position], "classes": p.columns.to_numpy(str)}
    phases.begin("embed")
    z = model.get_latent_representation()[position].astype(np.float32)
    np.savez(folder / f"{arguments['out']}.npz", z=z, found=found.astype(str), **more)
    return {}


# measures: one value for each cell asked


def cell_values(folder: Path, out: str, few: bool) -> dict[str, np.ndarray]:
    """Whether each cell asked is labelled right, and the entropy around each cell."""
    from atlas.evaluation.labels import majority_vote
    from atlas.evaluation.mixing import batch_entropies
    from atlas.evaluation.neighbours import nearest

    cells, made = np.load(folder / "cells.npz"), np.load(folder / f"{out}.npz")
    z, found, asked = made["z"], made["found"], cells["asked"]
    if not (found != "").any():
        names, codes = np.unique(cells["seen"], return_inverse=True)
        known = np.flatnonzero(cells["seen"] != "")
        near = nearest(z[known], z, min(FEW if few else K, len(known)))
        found = names[majority_vote(codes[known][near.indices], len(names)).codes]
    values = {"accuracy": (found == cells["truth"])[asked].astype(np.float64)}
    if int(cells["n_batch"]) > 1:
        mixed = nearest(z, z, min(K, len(z) - 1), np.arange(len(z)))
        batch = cells["batch"].astype(np.int64)
        values["entropy"] = batch_entropies(mixed.indices, batch, int(cells["n_batch"]))
    return values


@dataclass(frozen=True)
class Figure:
    """A measure of one side, and its paired difference to the baseline's.

    Attributes
    ----------
    value, error
        Mean over seeds, and its standard error over cells.
    by_seed
        The value of each seed.
    difference, low, high
        To the baseline; None for the baseline itself.
    """

    side: str
    measure: str
    value: float
    error: float
    by_seed: list[float]
    difference: float | None
    low: float | None
    high: float | None


def figures(
    folder: Path, question: str, seeds: list[int], outs: dict[str, list[str]]
) -> list[Figure]:
    """All measures of all sides, beside the first side's."""
    cells = np.load(folder / "cells.npz")
    truth = cells["truth"][cells["asked"]]
    groups = {"accuracy": None, "weighted accuracy": truth, "entropy": None}
    values: dict[str, dict[str, list[np.ndarray]]] = {}
    for side, names in outs.items():
        found = [cell_values(folder, name, few=question != "transfer") for name in names]
        values[side] = {name: [one[name] for one in found] for name in found[0]}
        values[side]["weighted accuracy"] = values[side]["accuracy"]
    baseline = next(iter(values))
    out = []
    for measure, group in groups.items():
        for side, own in values.items():
            if measure not in own:
                continue
            by_cell = np.mean(own[measure], axis=0)
            value, error = mean_and_error(by_cell, group)
            difference = low = high = None
            if side != baseline:
                other = np.mean(values[baseline][measure], axis=0)
                difference, spread = mean_and_error(by_cell - other, group)
                low, high = difference - NORMAL_95 * spread, difference + NORMAL_95 * spread
            seeds_own = [mean_and_error(one, group)[0] for one in own[measure]]
            out.append(Figure(side, measure, value, error, seeds_own, difference, low, high))
    return out


def figure_table(found: list[Figure], seconds: dict[str, float]) -> str:
    rows = [
        [
            f.measure,
            f.side,
            f"{f.value:.3f} ± {f.error:.3f}",
            " ".join(f"{value:.3f}" for value in f.by_seed),
            "" if f.difference is None else f"{f.difference:+.3f}",
            "" if f.low is None else f"{f.low:+.3f} … {f.high:+.3f}",
            f"{seconds[f.side]:.0f} s",
        ]
        for f in found
    ]
    header = ["measure", "model", "value", "by seed", "to the first", "95 % over cells", "training"]
    return table(header, rows)


def main() -> None:
    serve_worker([prepare, ours, scvi_tools])
    parser = argument_parser("Models beside scvi-tools on the same cells")
    parser.add_argument("--questions", nargs="+", choices=tuple(SIDES), default=list(SIDES))
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--sides", nargs="+", help="of the names in the table; all by default")
    parser.add_argument("--epochs", type=int, help="passes over the cells")
    args = parser.parse_args()
    seeds = args.seeds or ([0] if args.tiny else [0, 1, 2])
    settings = dict(TINY if args.tiny else FULL)
    if args.epochs:
        settings["epochs"] = args.epochs
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    results: list[Json] = []
    for question in args.questions:
        chosen = [s for s in SIDES[question] if not args.sides or s.name in args.sides]
        with tempfile.TemporaryDirectory(prefix="bench-models-", dir=args.work) as temporary:
            folder = Path(temporary)
            common = {"folder": str(folder), "question": question, **settings}
            source = str(DATA / FILES[question])
            made = run_worker(__file__, "prepare", common | {"source": source}, folder)
            say(f"\n{question}: {made.result}")
            outs: dict[str, list[str]] = {}
            runs: dict[str, list[Outcome]] = {}
            for i, side in enumerate(chosen):
                for seed in seeds:
                    asked = {"seed": seed, "out": f"{i}-{seed}", "options": side.options}
                    run = run_worker(__file__, side.worker, common | asked, folder)
                    outs.setdefault(side.name, []).append(f"{i}-{seed}")
                    runs.setdefault(side.name, []).append(run)
            found = figures(folder, question, seeds, outs)
        seconds = {
            name: float(np.mean([r.phases["train"].seconds for r in own]))
            for name, own in runs.items()
        }
        say(figure_table(found, seconds))
        results.append(
            {
                "question": question,
                "cells": made.result,
                "figures": [asdict(figure) for figure in found],
                "runs": {name: [phases_json(r) for r in own] for name, own in runs.items()},
            }
        )
    content = {
        "benchmark": "models",
        **known,
        "settings": settings | {"seeds": seeds},
        "results": results,
        "seconds": time.monotonic() - started,
    }
    write_json(args.json, content)


if __name__ == "__main__":
    main()
