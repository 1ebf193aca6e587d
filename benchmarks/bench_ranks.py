"""Is training in several processes on the cores of one machine as fast as in one process?

scVI with the ZINB, 2 layers of 128, 10 latent dimensions; 2,000 genes at 10 % density, 1,024 cells
a rank in each step, so as many more in a step of one process.

one process
    ``atlas.train`` from a store, with as many threads as it takes by itself.
ranks
    The same under ``torchrun --nproc-per-node=N``, talking by gloo.
scvi-tools
    ``SCVI.train``, counts in memory, one process.
scvi-tools, ranks
    The same by Lightning's DistributedDataParallel, under torchrun.

Cells/s are those of all ranks together, over the epochs but for the first. Sides take turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_step import batches, peer_model, simulated
from common import (
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

ONE, RANKS, PEER, PEER_RANKS = "one process", "ranks", "scvi-tools", "scvi-tools, ranks"
SIDES = (ONE, RANKS, PEER, PEER_RANKS)
RATIOS = ((RANKS, ONE, 0.9), (ONE, PEER, None), (RANKS, PEER_RANKS, None))
_DDP = "ddp_find_unused_parameters_true"
"""With ``ddp`` its training ends with an error that names this one."""
FULL: Json = {"n_genes": 2000, "density": 0.10, "n_cells": 32_768, "a_rank": 1024}
FULL |= {"n_hidden": 128, "epochs": 4, "rounds": 3}
TINY: Json = {"n_genes": 60, "density": 0.10, "n_cells": 512, "a_rank": 32}
TINY |= {"n_hidden": 8, "epochs": 2, "rounds": 1}


# workers


def make_store(arguments: Json, phases: Phases) -> Json:
    """A store of the cells, all genes chosen."""
    import anndata as ad
    import pandas as pd

    import atlas

    n_cells, n_genes = arguments["n_cells"], arguments["n_genes"]
    obs = pd.DataFrame({"batch": batches(n_cells).astype(str)}, index=map(str, range(n_cells)))
    var = pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
    counts = simulated(n_cells, n_genes, arguments["density"])
    store = atlas.create_store(arguments["store"])
    store.append(ad.AnnData(counts, obs, var), study="one", batch_key="batch")
    atlas.select_genes(store, n=n_genes)
    return {}


def ours(arguments: Json, phases: Phases) -> Json:
    """Train with Atlas; cells/s, of all ranks together, and steps of each epoch."""
    import atlas

    model = atlas.train(
        atlas.open_store(arguments["store"]),
        "scvi",
        out=arguments["out"],
        max_epochs=arguments["epochs"],
        n_hidden=arguments["n_hidden"],
        minibatch_size=arguments["minibatch"],
        validation_share=0.0,
        device="cpu",
    )
    records = model.training["history"]
    upto = [0, *(record["step"] for record in records)]
    return {
        "cells_per_second": [record["cells_per_second"] for record in records],
        "steps": [after - before for before, after in pairwise(upto)],
    }


def peer(arguments: Json, phases: Phases) -> Json:
    """The same with scvi-tools."""
    import lightning.pytorch as pl

    n_cells, ranks = arguments["n_cells"], arguments["ranks"]
    model = peer_model(arguments)
    wall: list[float] = []
    steps: list[int] = []

    class Clock(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.begin = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, _: Any) -> None:
            wall.append(time.perf_counter() - self.begin)
            steps.append(trainer.num_training_batches)

    several: Json = {} if ranks == 1 else {"devices": ranks, "strategy": _DDP}
    model.train(
        max_epochs=arguments["epochs"],
        accelerator="cpu",
        batch_size=arguments["minibatch"],
        train_size=1.0,
        callbacks=[Clock()],
        enable_progress_bar=False,
        logger=False,
        **several,
    )
    return {"cells_per_second": [n_cells / seconds for seconds in wall], "steps": steps}


# report


def measured(setting: Json, sides: Sequence[str], folder: Path) -> list[Json]:
    """A result for each side."""
    n_ranks, store = setting["ranks"], str(folder / "cells.atlas")
    run_worker(__file__, "make_store", {**setting, "store": store}, folder)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    found: dict[str, list[Json]] = {side: [] for side in sides}
    for turn in range(setting["rounds"]):
        for side in sides:
            ranks = n_ranks if side in (RANKS, PEER_RANKS) else 1
            work = "ours" if side in (ONE, RANKS) else "peer"
            # Atlas takes the minibatch of all ranks, Lightning that of each.
            minibatch = setting["a_rank"] * (n_ranks if work == "ours" else n_ranks // ranks)
            asked = {**setting, "ranks": ranks, "minibatch": minibatch}
            asked |= {"store": store, "out": str(folder / f"{turn} {side}")}
            before = torchrun if ranks > 1 else ()
            one = run_worker(__file__, work, asked, folder, before=before).result
            found[side].append(one)
            say(f"{side}: {statistics.harmonic_mean(one['cells_per_second'][1:]):,.0f} cells/s")
    results = []
    for side, own in found.items():
        rates = [statistics.harmonic_mean(one["cells_per_second"][1:]) for one in own]
        result = {"side": side, "cells_per_second": statistics.median(rates), "rounds": rates}
        results.append(result | {"steps": own[0]["steps"]})
    return results


def main() -> None:
    """Run all and print."""
    parser = argument_parser("Cells/s of training in several processes, beside one")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    setting = dict(TINY if options.tiny else FULL) | {"ranks": options.ranks}
    setting["rounds"] = options.rounds or setting["rounds"]
    known = provenance()
    say_provenance(known)
    say()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        results = measured(setting, options.sides, Path(folder))
    rates = {result["side"]: result["cells_per_second"] for result in results}
    rows = [
        [
            result["side"],
            f"{result['cells_per_second']:,.0f}",
            f"{min(result['rounds']):,.0f}–{max(result['rounds']):,.0f}",
        ]
        for result in results
    ]
    say("\n" + table(["side", "cells/s", "rounds"], rows))
    ratios = [
        {"what": f"{over} / {under}", "found": rates[over] / rates[under], "target": target}
        for over, under, target in RATIOS
        if over in rates and under in rates
    ]
    rows = [
        [r["what"], f"{r['found']:.2f}", "–" if r["target"] is None else f"≥ {r['target']}"]
        for r in ratios
    ]
    say("\n" + table(["ratio", "found", "wanted"], rows))
    write_json(options.json, {**known, "setting": setting, "results": results, "ratios": ratios})


if __name__ == "__main__":
    serve_worker([make_store, ours, peer])
    main()
