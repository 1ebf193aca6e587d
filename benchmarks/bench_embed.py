"""How fast is a whole atlas embedded from disk, beside scvi-tools in memory?

One simulated study of 20,000 genes and about 1,000 non-zeros a cell is ingested, 2,000 genes are
chosen and projected, and a scVI of 2 × 128 is trained for one epoch. The same weights, written by
``atlas.export_scvi``, embed the same cells on every side, each in a process of its own, in turn:

ours
    ``atlas.embed`` from the store, which decodes all genes;
ours, projected
    the same from the projection to the model's genes;
scvi-tools
    ``get_latent_representation`` of the counts in memory, with its own minibatch of 128;
scvi-tools, 4,096
    the same with minibatches of 4,096.

Each process embeds once for the imports and compiled code, and then as often as ``--repeats`` says.
What is embedded has to agree to 1e-3.

    python benchmarks/bench_embed.py --json embed.json    # --cells, --rounds, --repeats
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_memory import simulated
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

OURS = ("ours", "ours, projected")
THEIRS = {"scvi-tools": 128, "scvi-tools, 4,096": 4096}
WANTED = {"ours": 1.5, "ours, projected": 3.0}
CLOSE = 1e-3

FULL: Json = {"genes": 20_000, "n_genes": 2000, "n_hidden": 128, "cells": 100_000}
TINY: Json = {"genes": 500, "n_genes": 200, "n_hidden": 16, "cells": 1200}


# workers


def prepare(arguments: Json, phases: Phases) -> Json:
    """The store, its projection, and the trained model in both forms."""
    import atlas

    store = atlas.create_store(arguments["store"])
    file = Path(arguments["files"]) / "study_1.h5ad"
    store.append(file, study="one", batch_key="batch", label_key="cell_type")
    genes = atlas.select_genes(store, arguments["n_genes"])
    model = atlas.train(
        store,
        "scvi",
        out=arguments["run"],
        max_epochs=1,
        minibatch_size=1024,
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        device="cpu",
    )
    atlas.project(store, genes, arguments["projection"])
    atlas.export_scvi(model, arguments["exported"])
    return {}


def ours(arguments: Json, phases: Phases) -> Json:
    """Embed from the store, or its projection."""
    import atlas

    store, model = atlas.open_store(arguments["store"]), atlas.load_model(arguments["run"])
    projection = arguments["projection"] if "projected" in arguments["side"] else None

    def embed() -> np.ndarray:
        return atlas.embed(model, store, name=None, device="cpu", projection=projection)

    return measured(embed, store.obs().index.to_numpy(str), arguments, phases)


def theirs(arguments: Json, phases: Phases) -> Json:
    """Embed the same cells, held in memory, with the same weights."""
    import scvi

    import atlas

    scvi.settings.verbosity = 30
    adata = atlas.to_anndata(atlas.open_store(arguments["store"]))
    model = atlas.load_model(arguments["run"])
    adata = adata[:, list(model.genes)].copy()
    adata.obs["batch"] = adata.obs["atlas_batch"].astype(str)
    peer = scvi.model.SCVI.load(arguments["exported"], adata=adata, accelerator="cpu")

    def embed() -> np.ndarray:
        return peer.get_latent_representation(batch_size=arguments["minibatch"])

    return measured(embed, adata.obs_names.to_numpy(str), arguments, phases)


def measured(
    embed: Callable[[], np.ndarray], names: np.ndarray, arguments: Json, phases: Phases
) -> Json:
    """Seconds of each call but the first, and what was embedded, by the cells' names."""
    embed()
    phases.begin("embed")
    seconds = []
    for _ in range(arguments["repeats"]):
        start = time.perf_counter()
        z = embed()
        seconds.append(time.perf_counter() - start)
    phases.begin("after")
    np.savez(arguments["out"], z=np.asarray(z, np.float32), names=names)
    return {"seconds": seconds}


# the run


def run(settings: Json, work: Path) -> Json:
    """All sides in turn, on the same cells."""
    cells = settings["cells"]
    files = work / f"simulated-{cells}x{settings['genes']}-s1"
    sides: dict[str, Json] = {side: {"seconds": [], "peaks": []} for side in (*OURS, *THEIRS)}
    with tempfile.TemporaryDirectory(prefix="bench-embed-", dir=work) as temporary:
        folder = Path(temporary)
        here = {name: str(folder / name) for name in ("store", "run", "projection", "exported")} | {
            "files": str(files)
        }
        run_worker(__file__, "simulated", settings | here, folder)
        run_worker(__file__, "prepare", settings | here, folder)
        for _ in range(settings["rounds"]):
            for side, found in sides.items():
                asked: Json = settings | here | {"side": side, "out": str(folder / f"{side}.npz")}
                asked["minibatch"] = THEIRS.get(side)
                done = run_worker(__file__, "ours" if side in OURS else "theirs", asked, folder)
                found["seconds"] += done.result["seconds"]
                found["peaks"].append(done.phases["embed"].private_peak)
        for side, found in sides.items():
            found["differs"] = difference(folder / "ours.npz", folder / f"{side}.npz")
            found["cells_per_second"] = cells / float(np.median(found["seconds"]))
            found["peak_bytes"] = max(found["peaks"])
    return sides


def difference(one: Path, other: Path) -> float:
    """The largest difference of two embeddings, in standard deviations of the first."""
    with np.load(one) as a, np.load(other) as b:
        order = [np.argsort(found["names"]) for found in (a, b)]
        assert np.array_equal(a["names"][order[0]], b["names"][order[1]])
        gap = np.abs(a["z"][order[0]] - b["z"][order[1]]).max()
        return float(gap / a["z"].std())


def said(sides: Json) -> str:
    """Speeds, memory of the process, and ratios to both minibatches of the peer."""
    rows = []
    for side, found in sides.items():
        speed = found["cells_per_second"]
        ratios = [f"{speed / sides[peer]['cells_per_second']:.2f}" for peer in THEIRS]
        spread = f"{min(found['seconds']):.2f} to {max(found['seconds']):.2f} s"
        wanted = f"{WANTED[side]:g}" if side in WANTED else ""
        rows.append(
            [side, f"{speed:,.0f}", spread, megabytes(found["peak_bytes"]), *ratios, wanted]
        )
    header = ["side", "cells/s", "seconds", "memory", *(f"/ {peer}" for peer in THEIRS), "wanted"]
    return table(header, rows)


def main() -> None:
    serve_worker([simulated, prepare, ours, theirs])
    parser = argument_parser("Embedding from disk beside scvi-tools in memory")
    parser.add_argument("--cells", type=int)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turn")
    parser.add_argument("--repeats", type=int, default=3, help="embeddings of each process")
    args = parser.parse_args()
    settings: Json = (TINY if args.tiny else FULL) | {
        "rounds": args.rounds,
        "repeats": args.repeats,
    }
    if args.cells:
        settings["cells"] = args.cells
    known = provenance()
    say_provenance(known)
    with tempfile.TemporaryDirectory(prefix="bench-embed-") as temporary:
        sides = run(settings, args.work or Path(temporary))
    say("\n" + said(sides))
    far = {side: found["differs"] for side, found in sides.items() if found["differs"] > CLOSE}
    if far:
        raise SystemExit(f"the embeddings differ: {far}")
    content: dict[str, Any] = {"benchmark": "embed", **known, "settings": settings, "sides": sides}
    write_json(args.json, content)


if __name__ == "__main__":
    main()
