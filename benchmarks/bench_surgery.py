"""Studies mapped onto a reference by surgery, beside scvi-tools' on the same cells.

``pbmc_4batch_3study.h5ad``: Zheng's and the pbmc3k cells are the reference; Kang's control and
stimulated cells are the query, mapped at once or one after the other. Both train scVI of the same
architecture on the reference, each for itself, then map: scvi-tools by ``load_query_data`` and 50
epochs without weight decay, as its documentation says, Atlas by ``atlas.extend_reference``. Genes
are chosen over all four batches, as for the figures of the peer that are known.

accuracy, weighted accuracy
    of labels carried from the reference to the query by the majority of 50 neighbours;
entropy
    of reference and control among 50 neighbours, stimulated cells left out, nats;
apart
    share of cells of the same condition among 15 neighbours of Kang's CD14 monocytes: what is left
    of the response to interferon, which no batch effect is (in the query's own principal
    components it is .999).

Means over seeds; differences to the peer are paired by cell, the interval is that of the mean over
cells, normal, 95 %.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import Figure, figure_table
from bench_quality import NORMAL_95, mean_and_error
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
    write_json,
)

FILE = DATA / "pbmc_4batch_3study.h5ad"
QUERY = ("kang_ctrl", "kang_stim")
MONOCYTES = "CD14 Mono"
K, FEW = 50, 15
FULL = {"n_genes": 2000, "n_hidden": 128, "epochs": 50, "share": 1.0}
TINY = {"n_genes": 150, "n_hidden": 16, "epochs": 2, "share": 0.1}


@dataclass(frozen=True)
class Side:
    """One way to map the query.

    Attributes
    ----------
    name
        For the table.
    worker
        ``"ours"`` or ``"peer"``.
    steps
        Batches that are mapped at once, step after step; none trains on all cells instead.
    options
        Of :func:`atlas.extend_reference`.
    """

    name: str
    worker: str
    steps: tuple[tuple[str, ...], ...]
    options: dict[str, Any]


AT_ONCE, IN_TURN = (QUERY,), tuple((name,) for name in QUERY)
PAPER = {"initialisation": "random", "keep_apart": 0.0, "lr": 1e-3, "max_epochs": 50}
SIDES = [
    Side("scvi-tools", "peer", AT_ONCE, {}),
    Side("scvi-tools, in turn", "peer", IN_TURN, {}),
    Side("ours", "ours", AT_ONCE, {}),
    Side("ours, in turn", "ours", IN_TURN, {}),
    Side("ours, as the paper", "ours", AT_ONCE, PAPER),
    Side("ours, not kept apart", "ours", AT_ONCE, {"keep_apart": 0.0}),
    Side("ours, input layers", "ours", AT_ONCE, {"strategy": "input_layers", "lr": 1e-3}),
    Side("ours, all weights", "ours", AT_ONCE, {"strategy": "all", "lr": 1e-3}),
    Side("ours, trained on all", "ours", (), {}),
]


# workers


def prepare(arguments: Json, phases: Phases) -> Json:
    """Ingest reference and query batches; tell all in ``cells.npz``, in store order."""
    import anndata as ad

    import atlas

    folder = Path(arguments["folder"])
    adata = ad.read_h5ad(arguments["source"])
    rng = np.random.default_rng(0)
    adata = adata[rng.random(adata.n_obs) < arguments["share"]].copy()
    of_query = adata.obs["batch"].isin(QUERY).to_numpy()
    parts = {"reference": adata[~of_query]}
    parts |= {name: adata[(adata.obs["batch"] == name).to_numpy()] for name in QUERY}
    keys = {"batch_key": "batch", "label_key": "cell_type"}
    for name, part in parts.items():
        part.copy().write_h5ad(folder / f"{name}.h5ad")
    adata.write_h5ad(folder / "all.h5ad")
    every = atlas.create_store(folder / "all.atlas")
    every.append(folder / "all.h5ad", study="all", **keys)
    genes = atlas.select_genes(every, n=min(arguments["n_genes"], adata.n_vars))
    alone = atlas.create_store(folder / "reference.atlas")
    alone.append(folder / "reference.h5ad", study="reference", **keys)
    store = atlas.create_store(folder / "cells.atlas")
    for name in parts:
        store.append(folder / f"{name}.h5ad", study=name, **keys)
    batches = np.array([name.split("/")[-1] for name in store.batches])
    labels = np.array([*store.labels, ""])
    np.savez(
        folder / "cells.npz",
        genes=genes,
        name=store.obs([]).index.to_numpy(str),
        batch=batches[store.obs_codes["batch"]],
        label=labels[store.obs_codes["label"]],
    )
    return {"n_cells": store.n_obs, "n_query": int(of_query.sum())}


def reference(arguments: Json, phases: Phases) -> Json:
    """Train the reference with Atlas."""
    import atlas

    folder = Path(arguments["folder"])
    genes = [str(gene) for gene in np.load(folder / "cells.npz")["genes"]]
    phases.begin("train")
    _train(
        atlas.open_store(folder / "reference.atlas"), folder / arguments["out"], genes, arguments
    )
    return {}


def _train(store: Any, out: Path, genes: list[str], arguments: Json) -> Any:
    import atlas

    return atlas.train(
        store,
        "scvi",
        out=out,
        genes=genes,
        max_epochs=arguments["epochs"],
        seed=arguments["seed"],
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        device="cpu",
    )


def ours(arguments: Json, phases: Phases) -> Json:
    """Map the query by surgery, or train on all cells; embed."""
    import atlas

    folder, seed = Path(arguments["folder"]), arguments["seed"]
    store = atlas.open_store(folder / "cells.atlas")
    options = dict(arguments["options"])
    if arguments["tiny"]:
        options["max_epochs"] = 1
    phases.begin("map")
    if not arguments["steps"]:
        genes = [str(gene) for gene in np.load(folder / "cells.npz")["genes"]]
        model = _train(store, folder / arguments["out"], genes, arguments)
    else:
        model = atlas.load_model(folder / f"reference-{seed}")
        for i, studies in enumerate(arguments["steps"]):
            out = folder / f"{arguments['out']}-{i}"
            model = atlas.extend_reference(
                model, store, studies, out=out, seed=seed, device="cpu", **options
            )
    phases.begin("embed")
    np.save(folder / f"{arguments['out']}.npy", atlas.embed(model, store, name=None, device="cpu"))
    return {"trained": model.surgery[-1].n_trained if model.surgery else None}


def peer(arguments: Json, phases: Phases) -> Json:
    """Train and map with scvi-tools; in store order."""
    import anndata as ad
    import scvi

    folder, epochs = Path(arguments["folder"]), arguments["epochs"]
    cells = np.load(folder / "cells.npz")
    scvi.settings.verbosity = 30

    def part(name: str) -> Any:
        adata = ad.read_h5ad(folder / f"{name}.h5ad")[:, cells["genes"]].copy()
        adata.X = adata.X.astype(np.float32)
        adata.obs["batch"] = adata.obs["batch"].astype(str)
        return adata

    quiet = {
        "accelerator": "cpu",
        "batch_size": 128,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": None,
    }
    plan = {"lr": 1e-3, "eps": 0.01, "weight_decay": 1e-6, "n_epochs_kl_warmup": epochs // 2}
    scvi.settings.seed = arguments["seed"]
    adata = part("reference")
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(
        adata,
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        use_layer_norm="both",
        use_batch_norm="none",
        encode_covariates=True,
    )
    phases.begin("train")
    model.train(max_epochs=epochs, plan_kwargs=plan, **quiet)
    phases.begin("map")
    for names in arguments["steps"]:
        query = ad.concat([part(name) for name in names])
        model = scvi.model.SCVI.load_query_data(query, model)
        model.train(max_epochs=epochs, plan_kwargs={"weight_decay": 0.0}, **quiet)
    phases.begin("embed")
    every = part("all")
    z = model.get_latent_representation(every)
    place = {name: i for i, name in enumerate(every.obs_names)}
    order = [place[name] for name in cells["name"]]
    np.save(folder / f"{arguments['out']}.npy", z[order].astype(np.float32))
    return {}


# measures: one value for each cell asked


def cell_values(folder: Path, out: str) -> dict[str, np.ndarray]:
    """By measure the value of each cell that it looks at."""
    from atlas.evaluation.labels import majority_vote
    from atlas.evaluation.mixing import batch_entropies
    from atlas.evaluation.neighbours import nearest

    cells, z = np.load(folder / "cells.npz"), np.load(folder / f"{out}.npy")
    batch, label = cells["batch"], cells["label"]
    of_query, known = np.isin(batch, QUERY), label != ""
    voting = np.flatnonzero(~of_query & known)
    names, codes = np.unique(label[voting], return_inverse=True)
    asked = np.flatnonzero(of_query & np.isin(label, names))
    near = nearest(z[voting], z[asked], min(K, len(voting)))
    found = names[majority_vote(codes[near.indices], len(names)).codes]
    control = np.flatnonzero(batch != QUERY[1])
    mixed = nearest(z[control], z[control], min(K, len(control) - 1), np.arange(len(control)))
    side = of_query[control].astype(np.int64)
    mono = np.flatnonzero(of_query & (label == MONOCYTES))
    own = nearest(z[mono], z[mono], min(FEW, len(mono) - 1), np.arange(len(mono)))
    return {
        "accuracy": (found == label[asked]).astype(np.float64),
        "entropy": batch_entropies(mixed.indices, side, 2),
        "apart": (batch[mono][own.indices] == batch[mono][:, None]).mean(axis=1),
        "truth": label[asked],
    }


def figures(folder: Path, outs: dict[str, list[str]]) -> list[Figure]:
    """All measures of all sides, beside the first side's."""
    values = {side: [cell_values(folder, name) for name in names] for side, names in outs.items()}
    baseline = next(iter(values))
    truth = values[baseline][0]["truth"]
    out = []
    for name in ("accuracy", "weighted accuracy", "entropy", "apart"):
        key, group = (name, None) if name != "weighted accuracy" else ("accuracy", truth)
        for side, runs in values.items():
            by_cell = np.mean([run[key] for run in runs], axis=0)
            value, error = mean_and_error(by_cell, group)
            difference = low = high = None
            if side != baseline:
                other = np.mean([run[key] for run in values[baseline]], axis=0)
                difference, spread = mean_and_error(by_cell - other, group)
                low, high = difference - NORMAL_95 * spread, difference + NORMAL_95 * spread
            by_seed = [mean_and_error(run[key], group)[0] for run in runs]
            out.append(Figure(side, name, value, error, by_seed, difference, low, high))
    return out


def main() -> None:
    serve_worker([prepare, reference, ours, peer])
    parser = argument_parser("Surgery beside scvi-tools' on the same cells")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--sides", nargs="+", help="of the names in the table; all by default")
    args = parser.parse_args()
    seeds = args.seeds or ([0] if args.tiny else [0, 1, 2])
    settings = dict(TINY if args.tiny else FULL)
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    chosen = [side for side in SIDES if not args.sides or side.name in args.sides]
    with tempfile.TemporaryDirectory(prefix="bench-surgery-", dir=args.work) as temporary:
        folder = Path(temporary)
        common = {"folder": str(folder), "source": str(FILE), "tiny": args.tiny, **settings}
        made = run_worker(__file__, "prepare", common, folder)
        say(f"\n{made.result}")
        if any(side.worker == "ours" for side in chosen):
            for seed in seeds:
                asked = common | {"seed": seed, "out": f"reference-{seed}"}
                run_worker(__file__, "reference", asked, folder)
        outs: dict[str, list[str]] = {}
        runs: dict[str, list[Any]] = {}
        for i, side in enumerate(chosen):
            for seed in seeds:
                asked = {"seed": seed, "out": f"{i}-{seed}", "steps": side.steps}
                asked["options"] = side.options
                run = run_worker(__file__, side.worker, common | asked, folder)
                outs.setdefault(side.name, []).append(f"{i}-{seed}")
                runs.setdefault(side.name, []).append(run)
        found = figures(folder, outs)
    seconds = {
        name: float(np.mean([run.phases["map"].seconds for run in own]))
        for name, own in runs.items()
    }
    say(figure_table(found, seconds))
    trained = {name: own[0].result.get("trained") for name, own in runs.items()}
    say("parameters trained: " + ", ".join(f"{k} {v:,}" for k, v in trained.items() if v))
    content = {
        "benchmark": "surgery",
        **known,
        "settings": settings | {"seeds": seeds},
        "cells": made.result,
        "figures": [asdict(figure) for figure in found],
        "trained": trained,
        "runs": {name: [phases_json(run) for run in own] for name, own in runs.items()},
        "seconds": time.monotonic() - started,
    }
    write_json(args.json, content)


if __name__ == "__main__":
    main()
