"""Which learning rate for which minibatch, at equal epochs and at equal time?

An scVI (2 × 128, ZINB, 2,000 genes) is trained with minibatches of several sizes. For a minibatch r
times as large as the default the learning rate of Adam is left as it is (*same*), times √r (*root*)
or times r (*linear*); for the default one it is doubled too, which tells whether the default rate
is a good one to begin with. Two sets of cells:

blood
    ``pbmc_4batch_3study.h5ad``, 12,485 cells of three studies;
simulated
    40,000 cells of four studies of ``atlas simulate``.

What is compared is the bound of the same held-out tenth of the cells, in nats (lower is better),

equal epochs
    after as many passes as the default minibatch makes;
equal time
    after as many passes as fit in its time: the passes are counted from the seconds of the first
    trainings, and each is trained anew, since the warm-up is a share of all steps.

Seconds are those of training steps. No peer is beside: it is a question to our own defaults.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    DATA,
    Json,
    Phases,
    argument_parser,
    provenance,
    run_worker,
    say,
    say_provenance,
    serve_worker,
    table,
    write_json,
)

DEFAULT = 128
RATE = 1e-3
DATASETS = ("blood", "simulated")
FULL: Json = {"n_genes": 2000, "n_hidden": 128, "epochs": 40, "cells": 40_000, "share": 1.0}
FULL["sizes"] = [128, 512, 2048]
TINY: Json = {"n_genes": 100, "n_hidden": 8, "epochs": 2, "cells": 400, "share": 0.03}
TINY["sizes"] = [128, 256]


# workers


def prepare(arguments: Json, phases: Phases) -> Json:
    """The cells as a store with its genes chosen."""
    import anndata as ad

    import atlas
    from atlas.simulate import simulate

    folder = Path(arguments["folder"])
    store = atlas.create_store(folder / "cells.atlas")
    if arguments["dataset"] == "blood":
        cells = ad.read_h5ad(DATA / "pbmc_4batch_3study.h5ad")
        kept = np.random.default_rng(0).random(cells.n_obs) < arguments["share"]
        store.append(cells[kept].copy(), study="blood", batch_key="batch")
    else:
        files = simulate(
            folder / "studies", arguments["cells"], 4, 0,
            genes=max(1000, arguments["n_genes"]), progress=False,
        )  # fmt: skip
        for file in files:
            store.append(file, study=file.stem, batch_key="batch")
    atlas.select_genes(store, n=arguments["n_genes"])
    return {"n_cells": store.n_obs}


def train(arguments: Json, phases: Phases) -> Json:
    """The held-out bound at the end, and the seconds of all steps."""
    import atlas

    folder = Path(arguments["folder"])
    store = atlas.open_store(folder / "cells.atlas")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        run = Path(temporary) / "run"
        phases.begin("train")
        atlas.train(
            store,
            "scvi",
            out=run,
            max_epochs=arguments["passes"],
            n_hidden=arguments["n_hidden"],
            minibatch_size=arguments["minibatch_size"],
            lr=arguments["lr"],
            seed=arguments["seed"],
            device="cpu",
        )
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    bounds = [record["validation_bound"] for record in records]
    seconds = float(sum(record["seconds"] for record in records))
    return {"bound": bounds[-1], "by_epoch": bounds, "seconds": seconds}


# the study


def settings_of(sizes: list[int]) -> list[tuple[int, str, float]]:
    """Minibatch size, rule and learning rate of each training; the default is the first."""
    out = [(DEFAULT, "same", RATE), (DEFAULT, "doubled", 2 * RATE)]
    for size in sizes:
        if size != DEFAULT:
            r = size / DEFAULT
            out += [(size, "same", RATE), (size, "root", RATE * r**0.5), (size, "linear", RATE * r)]
    return out


def passes_in_time(trained: list[Json], epochs: int) -> list[int]:
    """Passes that each size makes in the time of the default: by the median of its trainings."""
    sizes = np.array([one["minibatch_size"] for one in trained])
    seconds = np.array([one["epochs"]["seconds"] for one in trained])
    typical = {size: float(np.median(seconds[sizes == size])) for size in set(sizes.tolist())}
    whole = typical[DEFAULT]
    return [max(1, round(epochs * whole / typical[size])) for size in sizes.tolist()]


def rows_of(results: list[Json]) -> list[list[str]]:
    """Lines of the table, means over seeds."""
    keys = dict.fromkeys((one["minibatch_size"], one["rule"]) for one in results)

    def mean(size: int, rule: str, *names: str) -> float:
        found: list[float] = []
        for one in results:
            if (one["minibatch_size"], one["rule"]) == (size, rule):
                value: Any = one
                for name in names:
                    value = value[name]
                found.append(value)
        return float(np.mean(found))

    first = next(iter(keys))
    out = []
    for size, rule in keys:
        line = [f"{size:,}", rule, f"{mean(size, rule, 'lr'):.1e}"]
        for kind in ("epochs", "time"):
            bound = mean(size, rule, kind, "bound")
            line += [
                f"{mean(size, rule, kind, 'passes'):.0f}",
                f"{mean(size, rule, kind, 'seconds'):.0f} s",
                f"{bound:.2f}",
                f"{bound - mean(*first, kind, 'bound'):+.2f}",
            ]
        out.append(line)
    return out


def study(folder: Path, common: Json, seed: int) -> list[Json]:
    """All trainings of one seed: at equal epochs, then in equal time."""
    results: list[Json] = []
    for size, rule, lr in settings_of(common["sizes"]):
        asked = {"minibatch_size": size, "lr": lr, "seed": seed, "passes": common["epochs"]}
        made = run_worker(__file__, "train", common | asked, folder).result
        results.append(asked | {"rule": rule, "epochs": made | {"passes": common["epochs"]}})
        say(f"seed {seed}, {size:,} cells, {rule}: {made['bound']:.2f}, {made['seconds']:.0f} s")
    for one, passes in zip(results, passes_in_time(results, common["epochs"]), strict=True):
        if passes == common["epochs"]:
            one["time"] = one["epochs"]
            continue
        asked = {name: one[name] for name in ("minibatch_size", "lr", "seed")} | {"passes": passes}
        made = run_worker(__file__, "train", common | asked, folder).result
        one["time"] = made | {"passes": passes}
        say(f"seed {seed}, {one['minibatch_size']:,} cells, {one['rule']}: {made['bound']:.2f}")
    return results


HEADER = ["minibatch", "rule", "learning rate"]
HEADER += [
    f"{kind}: {name}"
    for kind in ("equal epochs", "equal time")
    for name in ("passes", "seconds", "bound", "less the first")
]


def main() -> None:
    serve_worker([prepare, train])
    parser = argument_parser("Learning rate against minibatch size")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="passes with the default minibatch")
    args = parser.parse_args()
    settings: Json = dict(TINY if args.tiny else FULL)
    if args.epochs:
        settings["epochs"] = args.epochs
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    found: dict[str, list[Json]] = {}
    for dataset in args.datasets:
        with tempfile.TemporaryDirectory(prefix="bench-minibatch-", dir=args.work) as temporary:
            folder = Path(temporary)
            common = {"folder": str(folder), "dataset": dataset, **settings}
            made = run_worker(__file__, "prepare", common, folder).result
            say(f"\n{dataset}: {made['n_cells']:,} cells")
            found[dataset] = [one for seed in args.seeds for one in study(folder, common, seed)]
            say("\n" + table(HEADER, rows_of(found[dataset])))
    content = {
        "benchmark": "minibatch",
        **known,
        "settings": settings | {"seeds": args.seeds},
        "results": found,
        "seconds": time.monotonic() - started,
    }
    write_json(args.json, content)


if __name__ == "__main__":
    main()
