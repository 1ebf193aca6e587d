"""Does an atlas to which studies are added one by one stay as good as one trained anew?

Thirty simulated studies of one size: twenty are the reference, ten are added in turn by
``atlas.update`` (2,500, 5,000 and 10,000 of their cells). Then a model is trained anew on all
cells, with the settings and passes of the reference's. No other package has such an update, so the
peer is that training: its time is what an update saves.

Asked:

- seconds and peak memory of each update: they should go with its own cells, not with those that are
  there;
- whether the rows of the reference in the embedding are the same bytes after all ten;
- entropy of batch mixing and accuracy of labels carried from the reference to the new studies, on
  the same sampled cells, beside those of the model trained anew.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Json,
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

N_STUDIES, N_NEW = 30, 10
SHARES = (0.25, 0.5, 1.0)
"""Of a new study's cells, in turn."""
KEYS = {"batch_key": "batch", "label_key": "cell_type"}
MEASURES = ("mixing_entropy_k50", "label_accuracy_k50")
FULL: Json = {"cells": 300_000, "genes": 2000, "n_hidden": 128, "epochs": 10, "minibatch": 512}
TINY: Json = {"cells": 6_000, "genes": 100, "n_hidden": 16, "epochs": 2, "minibatch": 128}


def prepare(arguments: Json, phases: Phases) -> Json:
    """Simulate all studies; ingest the reference."""
    import atlas
    from atlas.simulate import simulate

    folder = Path(arguments["folder"])
    files = simulate(
        folder / "studies",
        arguments["cells"],
        N_STUDIES,
        genes=arguments["genes"],
        batches=1,
        types=12,
        progress=False,
    )
    store = atlas.create_store(folder / "cells.atlas")
    for file in files[:-N_NEW]:
        store.append(file, study=file.stem, **KEYS)
    return {"n_reference": store.n_obs, "files": [str(file) for file in files[-N_NEW:]]}


def _train(store: Any, out: Path, arguments: Json) -> Any:
    import atlas

    return atlas.train(
        store,
        "scvi",
        out=out,
        genes=list(store.var.index),
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        max_epochs=arguments["epochs"],
        minibatch_size=arguments["minibatch"],
        device="cpu",
    )


def reference(arguments: Json, phases: Phases) -> Json:
    """Train the reference, and keep it with the store."""
    import atlas

    folder = Path(arguments["folder"])
    store = atlas.open_store(folder / "cells.atlas")
    phases.begin("train")
    _train(store, folder / "reference", arguments)
    phases.begin("keep")
    atlas.keep(store, folder / "reference", "scvi", device="cpu")
    np.save(folder / "reference.npy", store.embedding("scvi"))
    return {}


def update(arguments: Json, phases: Phases) -> Json:
    """Add one study."""
    import anndata as ad

    import atlas

    folder = Path(arguments["folder"])
    file = Path(arguments["file"])
    adata = ad.read_h5ad(file)
    rng = np.random.default_rng(0)
    rows = rng.choice(adata.n_obs, round(arguments["share"] * adata.n_obs), replace=False)
    adata[np.sort(rows)].copy().write_h5ad(folder / "new.h5ad")
    del adata
    add = atlas.update  # imports
    phases.begin("update")
    done = add(
        folder / "cells.atlas",
        folder / "new.h5ad",
        study=file.stem,
        model="scvi",
        ingest=KEYS,
        device="cpu",
        minibatch_size=128,
    )
    return {"n_obs": done.n_obs, "unknown": done.labels.get("Unknown", 0) / done.n_obs}


def retrain(arguments: Json, phases: Phases) -> Json:
    """Train anew on all cells, embed them, and lay both embeddings side by side."""
    import atlas

    folder = Path(arguments["folder"])
    store = atlas.open_store(folder / "cells.atlas")
    phases.begin("train")
    model = _train(store, folder / "retrained", arguments)
    phases.begin("embed")
    atlas.embed(model, store, name="retrained", device="cpu")
    phases.begin("measure")
    kept = np.load(folder / "reference.npy")
    same = bool(np.array_equal(np.asarray(store.embedding("scvi"))[: len(kept)], kept))
    asked = {
        "reference": "study=" + ",".join(store.studies[:-N_NEW]),
        "query": "study=" + ",".join(store.studies[-N_NEW:]),
    }
    compared = atlas.compare(store, ["retrained", "scvi"], **asked)
    figures = {}
    for name in MEASURES:
        values = {side: metrics[name] for side, metrics in compared.metrics.items()}
        figures[name] = {
            side: {"value": e.value, "error": e.standard_error} for side, e in values.items()
        } | {"ratio": values["scvi"].value / values["retrained"].value}
    return {"n_obs": store.n_obs, "reference_same": same, "figures": figures}


def main() -> None:
    serve_worker([prepare, reference, update, retrain])
    parser = argument_parser("An atlas to which studies are added, beside one trained anew")
    parser.add_argument("--epochs", type=int, help="passes of the reference, and of its retraining")
    args = parser.parse_args()
    settings = dict(TINY if args.tiny else FULL)
    settings["epochs"] = args.epochs or settings["epochs"]
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-updates-", dir=args.work) as temporary:
        folder = Path(temporary)
        common = {"folder": str(folder), **settings}
        made = run_worker(__file__, "prepare", common, folder)
        trained = run_worker(__file__, "reference", common, folder)
        say(
            f"\nreference of {made.result['n_reference']:,} cells trained in "
            f"{trained.phases['train'].seconds:.0f} s"
        )
        updates = []
        for i, file in enumerate(made.result["files"]):
            asked = common | {"file": file, "share": SHARES[i % len(SHARES)]}
            updates.append(run_worker(__file__, "update", asked, folder))
        anew = run_worker(__file__, "retrain", common, folder)
    rows, before = [], made.result["n_reference"]
    for done in updates:
        phase = done.phases["update"]
        rows.append(
            [
                f"{before:,}",
                f"{done.result['n_obs']:,}",
                f"{phase.seconds:.1f}",
                f"{done.result['n_obs'] / phase.seconds:,.0f}",
                megabytes(phase.private_peak - phase.private_start),
                f"{done.result['unknown']:.1%}",
            ]
        )
        before += done.result["n_obs"]
    say(
        table(
            ["cells before", "added", "seconds", "cells/s", "memory above start", "Unknown"], rows
        )
    )
    seconds = anew.phases["train"].seconds + anew.phases["embed"].seconds
    say(f"trained anew on {anew.result['n_obs']:,} cells, and embedded: {seconds:.0f} s")
    say(f"rows of the reference in the embedding the same: {anew.result['reference_same']}")
    lines = [
        [
            name,
            *(
                f"{figure[side]['value']:.4f} ± {figure[side]['error']:.4f}"
                for side in ("scvi", "retrained")
            ),
            f"{figure['ratio']:.3f}",
        ]
        for name, figure in anew.result["figures"].items()
    ]
    say(table(["measure", "ten updates", "trained anew", "ratio"], lines))
    content = {
        "benchmark": "updates",
        **known,
        "settings": settings,
        "reference": made.result | {"phases": phases_json(trained)},
        "updates": [done.result | {"phases": phases_json(done)} for done in updates],
        "anew": anew.result | {"phases": phases_json(anew)},
        "seconds": time.monotonic() - started,
    }
    write_json(args.json, content)


if __name__ == "__main__":
    main()
