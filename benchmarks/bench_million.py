"""A million cells from a file on disk to a measured embedding: minutes, and memory that stays flat.

One simulated study (one file) of 20,000 genes and about 1,000 non-zeros a cell. Each step is a
process of its own:

ingest
    the h5ad into a store;
genes
    2,000 of the 20,000, by seurat_v3;
train
    scVI (2 layers of 128, ZINB), 10 epochs, a tenth of the cells held out;
embed
    all cells, kept with the store;
evaluate
    all measures of ``atlas.evaluate``, the batches' own principal components made on the way.

Beside it scvi-tools does the same work in memory on the smallest size: reading, ``SCVI.train`` of
the same architecture, genes, epochs and minibatches, ``get_latent_representation``. What it would
take for the largest is computed in proportion to the cells, and whether it would fit is not asked.
Both embeddings of that size are measured by ``atlas.compare`` on the same sampled cells, and both
held-out bounds stand beside them.

Seconds are of the clock. Memory is private (see ``common.py``), above the process after its
imports; "resident" is the system's high-water mark, mapped files and libraries included.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from bench_memory import modelled, paths, simulated
from common import (
    Json,
    Outcome,
    Phases,
    argument_parser,
    megabytes,
    phases_json,
    provenance,
    run_worker,
    say,
    say_provenance,
    serve_worker,
    table,
    write_json,
)

STEPS = ("ingest", "genes", "train", "embed", "evaluate")
MEASURES = ("mixing_entropy_k50", "label_accuracy_k50", "silhouette_label")
LIMIT_BYTES, LIMIT_SECONDS = 1.5e9, 1800.0

FULL = {"genes": 20_000, "n_genes": 2000, "n_hidden": 128, "epochs": 10, "minibatch": 128}
TINY = {"genes": 500, "n_genes": 200, "n_hidden": 16, "epochs": 2, "minibatch": 64}


# workers


def ingest(arguments: Json, phases: Phases) -> Json:
    """The file into a store."""
    import atlas
    import atlas.workflows

    phases.begin("work")
    store = atlas.create_store(arguments["store"])
    store.append(arguments["file"], study="one", batch_key="batch", label_key="cell_type")
    return {}


def genes(arguments: Json, phases: Phases) -> Json:
    """Choose the genes, and keep them with the store."""
    import numpy as np

    import atlas
    import atlas.workflows

    phases.begin("work")
    chosen = atlas.select_genes(atlas.open_store(arguments["store"]), arguments["n_genes"])
    np.save(arguments["genes_file"], chosen)
    return {}


def train(arguments: Json, phases: Phases) -> Json:
    """Train scVI."""
    import atlas
    import atlas.workflows

    phases.begin("work")
    model = atlas.train(
        atlas.open_store(arguments["store"]),
        "scvi",
        out=arguments["run"],
        max_epochs=arguments["epochs"],
        minibatch_size=arguments["minibatch"],
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        precision=arguments["precision"],
        device="cpu",
    )
    last = model.training["history"][-1]
    return {"bound": last["validation_bound"], "cells_per_second": last["cells_per_second"]}


def embed(arguments: Json, phases: Phases) -> Json:
    """Embed all cells, and keep the embedding with the store."""
    import atlas
    import atlas.workflows

    phases.begin("work")
    model = atlas.load_model(arguments["run"])
    atlas.embed(model, atlas.open_store(arguments["store"]), name="scvi", device="cpu")
    return {}


def evaluate(arguments: Json, phases: Phases) -> Json:
    """Measure the embedding."""
    import atlas
    import atlas.workflows

    phases.begin("work")
    store = atlas.open_store(arguments["store"])
    atlas.baseline(store, "pca", per_batch=True)
    return {"metrics": atlas.evaluate(store, embedding="scvi").to_json()}


def peer(arguments: Json, phases: Phases) -> Json:
    """scvi-tools: read the file, train, embed; ``read``, ``train`` and ``embed`` are its phases."""
    import anndata  # noqa: F401
    import numpy as np
    import scvi

    scvi.settings.verbosity = 30
    scvi.settings.seed = 0
    phases.begin("read")
    adata = modelled(arguments["file"], np.load(arguments["genes_file"]))
    phases.begin("train")
    model = scvi.model.SCVI(
        adata,
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        gene_likelihood="zinb",
        use_layer_norm="both",
        use_batch_norm="none",
        encode_covariates=True,
    )
    model.train(
        max_epochs=arguments["epochs"],
        accelerator="cpu",
        train_size=0.9,
        batch_size=arguments["minibatch"],
        check_val_every_n_epoch=1,
        plan_kwargs={"n_epochs_kl_warmup": arguments["epochs"] // 2},  # as ours
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    phases.begin("embed")
    z = model.get_latent_representation()
    phases.begin("rest")
    np.savez(arguments["peer_z"], z=np.asarray(z, np.float32), name=adata.obs_names.to_numpy(str))
    return {"bound": float(model.history["elbo_validation"].to_numpy()[-1, 0])}


def compare(arguments: Json, phases: Phases) -> Json:
    """Both embeddings, on the same sampled cells."""
    import numpy as np

    import atlas

    store = atlas.open_store(arguments["store"])
    with np.load(arguments["peer_z"]) as made:
        place = {name: i for i, name in enumerate(made["name"])}
        rows = [place[name] for name in store.obs([]).index]
        store.write_embedding("scvi-tools", made["z"][rows], {"method": "scvi-tools"})
    compared = atlas.compare(store, ["scvi", "scvi-tools"])
    return {
        name: {
            side: [m[name].value, m[name].standard_error] for side, m in compared.metrics.items()
        }
        for name in MEASURES
    }


# the run


def figures(outcome: Outcome) -> Json:
    """Seconds, peaks and what the step told."""
    phase = outcome.phases["work"]
    return {
        "seconds": phase.seconds,
        "cpu_seconds": phase.cpu_seconds,
        "peak_bytes": outcome.peak_above("work", "work"),
        "resident_peak_bytes": phase.resident_peak,
        "phases": phases_json(outcome),
        **outcome.result,
    }


def measured(cells: int, work: Path, settings: Json, with_peer: bool) -> Json:
    """All steps on one number of cells."""
    files = work / f"simulated-{cells}x{settings['genes']}-s1"
    with tempfile.TemporaryDirectory(prefix="bench-million-", dir=work) as temporary:
        folder = Path(temporary)
        run_worker(__file__, "simulated", settings | {"cells": cells, "files": str(files)}, folder)
        here = paths(folder / "work", files)
        asked = settings | here | {"genes_file": here["genes"]}
        asked["peer_z"] = str(folder / "peer.npz")
        run: Json = {"cells": cells, "ours": {}, "peer": None}
        for step in STEPS:
            found = run["ours"][step] = figures(run_worker(__file__, step, asked, folder))
            told = f"{found['seconds']:.1f} s, {megabytes(found['peak_bytes'])}"
            say(f"{cells:,} cells, {step}: {told}")
        if with_peer:
            done = run_worker(__file__, "peer", asked, folder)
            steps = ("read", "train", "embed")
            run["peer"] = {
                "seconds": {step: done.phases[step].seconds for step in steps},
                "peak_bytes": done.peak_above("read", *steps),
                "phases": phases_json(done),
                **done.result,
            }
            run["compared"] = run_worker(__file__, "compare", asked, folder).result
    return run


def say_steps(runs: list[Json]) -> None:
    """Seconds and memory of each step, and all together."""
    rows = []
    for step in STEPS:
        for run in runs:
            own = run["ours"][step]
            rows.append(
                [
                    step,
                    f"{run['cells']:,}",
                    f"{own['seconds']:.1f} s",
                    f"{run['cells'] / own['seconds']:,.0f}",
                    megabytes(own["peak_bytes"]),
                    megabytes(own["resident_peak_bytes"]),
                ]
            )
    say("\n" + table(["step", "cells", "seconds", "cells/s", "memory", "resident"], rows))
    for run in runs:
        seconds = sum(own["seconds"] for own in run["ours"].values())
        peak = max(own["peak_bytes"] for own in run["ours"].values())
        run["seconds"], run["peak_bytes"] = seconds, peak
        kept = seconds < LIMIT_SECONDS and peak < LIMIT_BYTES
        limits = f"{LIMIT_SECONDS / 60:.0f} min, {megabytes(LIMIT_BYTES)}"
        say(
            f"{run['cells']:,} cells, all steps: {seconds / 60:.1f} min, {megabytes(peak)}; "
            f"{'within' if kept else 'NOT within'} {limits}"
        )


def say_peer(runs: list[Json], epochs: int) -> None:
    """The peer beside ours at the size that both did, and in proportion at the largest."""
    run = next((run for run in runs if run["peer"]), None)
    if run is None:
        return
    own, other = run["ours"], run["peer"]
    rows = []
    for step, ours, theirs in (
        ("read or ingest, genes", own["ingest"]["seconds"] + own["genes"]["seconds"], "read"),
        (f"train, {epochs} epochs", own["train"]["seconds"], "train"),
        ("embed", own["embed"]["seconds"], "embed"),
    ):
        seconds = other["seconds"][theirs]
        rows.append([step, f"{ours:.1f}", f"{seconds:.1f}", f"{seconds / ours:.1f}"])
    say(f"\n{run['cells']:,} cells beside scvi-tools in memory, seconds")
    say(table(["step", "ours", "scvi-tools", "times"], rows))
    peak = max(own[step]["peak_bytes"] for step in STEPS[:4])
    say(f"memory: {megabytes(peak)}, scvi-tools {megabytes(other['peak_bytes'])}")
    say(f"held-out bound: {own['train']['bound']:.2f}, scvi-tools {other['bound']:.2f}")
    for name, values in run["compared"].items():
        told = ", ".join(f"{side} {v:.4f} ± {e:.4f}" for side, (v, e) in values.items())
        say(f"{name}: {told}")
    largest = runs[-1]["cells"]
    if largest > run["cells"]:
        times = largest / run["cells"]
        seconds, memory = sum(other["seconds"].values()) * times, other["peak_bytes"] * times
        say(
            f"scvi-tools on {largest:,} cells, computed and not run: {seconds / 60:.0f} min, "
            f"{megabytes(memory)}"
        )


def main() -> None:
    serve_worker([simulated, ingest, genes, train, embed, evaluate, peer, compare])
    parser = argument_parser("A million cells end to end, beside scvi-tools in memory")
    parser.add_argument("--cells", type=int, nargs="+", default=None)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--minibatch", type=int)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    settings: dict[str, Any] = dict(TINY if args.tiny else FULL) | {"precision": args.precision}
    settings["epochs"] = args.epochs or settings["epochs"]
    settings["minibatch"] = args.minibatch or settings["minibatch"]
    sizes = sorted(args.cells or ([600, 1200] if args.tiny else [100_000, 1_000_000]))
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-million-", dir=args.work) as temporary:
        work = args.work or Path(temporary)
        runs = [
            measured(cells, work, settings, cells == sizes[0] and not args.no_peer)
            for cells in sizes
        ]
    say_steps(runs)
    say_peer(runs, settings["epochs"])
    write_json(
        args.json,
        {
            "benchmark": "million",
            **known,
            "settings": settings | {"cells": sizes},
            "runs": runs,
            "seconds": time.monotonic() - started,
        },
    )


if __name__ == "__main__":
    main()
