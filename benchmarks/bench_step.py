"""How many cells a second does a training step take, and where does its time go?

ZINB, 2 layers of 128, 10 latent dimensions, counts in memory; the same counts for all. Sides:

scvi-tools
    ``SCVI.train``, with its own loader.
plain
    ``atlas.training.loop.fit`` with the likelihood in torch's operations and dense input.
fused
    The same as it comes: compiled passes, sparse input.
bfloat16
    The same with ``precision="bfloat16"``.

Each round runs every side once, each in a process of its own; the figure is the median over the
rounds of cells/s over all epochs but the first, in which things are compiled and warmed up. Then
steps on minibatches at hand, with a clock around the parts of each. Training loss (mean over the
last epoch) is of the same cells, seed and noise on Atlas' sides.

Beside the wall clock stands the time on all cores together, per 1,000 cells: with ``--threads 1``
it says something on a machine that is busy with other work, where the wall clock says nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
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

SIDES = ["scvi-tools", "plain", "fused", "bfloat16"]
PEER, PLAIN = "scvi-tools", "plain"
N_BATCH = 3
FULL: Json = {
    "shapes": [
        {"n_genes": 2000, "density": 0.10, "n_cells": 16_384},
        {"n_genes": 10_000, "density": 0.07, "n_cells": 6144},
    ],
    "minibatches": [128, 1024],
    "n_hidden": 128,
    "epochs": 3,
    "rounds": 3,
}
TINY: Json = {
    "shapes": [{"n_genes": 60, "density": 0.10, "n_cells": 256}],
    "minibatches": [64],
    "n_hidden": 8,
    "epochs": 2,
    "rounds": 1,
}


def simulated(n_cells: int, n_genes: int, density: float) -> Any:
    """Negative binomial counts with genes and cells of many sizes: float32 ``csr_matrix``."""
    from scipy.sparse import csr_matrix, vstack

    rng = np.random.default_rng(0)
    share = np.exp(rng.normal(0, 1.5, n_genes))
    share /= share.sum()
    library = np.exp(rng.normal(0, 0.4, n_cells))
    # P(0) of a negative binomial with inverse dispersion 1 is 1 / (1 + mean).
    low, high = 1e-3 * n_genes, 1e2 * n_genes
    for _ in range(40):
        depth = (low * high) ** 0.5
        mean = depth * share * library[:512, None]
        low, high = (depth, high) if (mean / (1 + mean)).mean() < density else (low, depth)
    parts = []
    for start in range(0, n_cells, 1024):
        mean = depth * share * library[start : start + 1024, None]
        parts.append(csr_matrix(rng.poisson(mean * rng.exponential(size=mean.shape)), dtype="f4"))
    return vstack(parts, format="csr")


def batches(n_cells: int) -> Any:
    """Codes of a few experimental batches: int32, (n_cells,)."""
    return (np.arange(n_cells) % N_BATCH).astype(np.int32)


# workers


def _set_threads(arguments: Json) -> None:
    import torch

    if arguments["threads"]:
        torch.set_num_threads(arguments["threads"])


def _configured(arguments: Json) -> tuple[Any, Any, Any]:
    """Model, source and configuration of one of Atlas' sides, with all that it turns off."""
    from atlas.config import ScviConfig, TrainConfig
    from atlas.models import SCVI, likelihood
    from atlas.models.build import build_model
    from loaders import ArraySource

    if arguments["side"] == PLAIN:
        likelihood.can_fuse = lambda *tensors: False  # type: ignore[assignment]
        SCVI.takes_sparse = False
    _set_threads(arguments)
    n_cells, n_genes = arguments["n_cells"], arguments["n_genes"]
    counts = simulated(n_cells, n_genes, arguments["density"])
    source = ArraySource(counts, {"batch": batches(n_cells), "study": np.zeros(n_cells, "i4")})
    config = TrainConfig(
        max_epochs=arguments["epochs"],
        minibatch_size=arguments["minibatch"],
        validation_share=0.0,
        device="cpu",
        precision="bfloat16" if arguments["side"] == "bfloat16" else "float32",
    )
    model = build_model(ScviConfig(n_hidden=arguments["n_hidden"]), n_genes, N_BATCH, 0)
    return model, source, config


def ours(arguments: Json, phases: Phases) -> Json:
    """Train with Atlas; cells/s and training loss of each epoch."""
    from atlas.training import loop

    phases.begin("data")
    model, source, config = _configured(arguments)
    cpu = [0.0]
    end_epoch = loop.Trainer.end_epoch

    def end(trainer: Any) -> None:
        cpu.append(time.process_time())
        end_epoch(trainer)

    loop.Trainer.end_epoch = end  # type: ignore[method-assign]
    phases.begin("train")
    with tempfile.TemporaryDirectory() as folder:
        history = loop.fit(
            model,
            source,
            train_rows=[(0, source.n_obs)],
            validation_rows=[],
            presence=None,
            config=config,
            out=Path(folder) / "run",
            resume=False,
            describe={},
            progress=False,
        )
    return {
        "cells_per_second": [record.cells_per_second for record in history.records],
        "cpu_seconds": np.diff(cpu).tolist(),
        "train_loss": [record.train_loss for record in history.records],
    }


def peer_model(arguments: Json) -> Any:
    """The model of scvi-tools that Atlas' is beside, with the cells in memory."""
    import warnings

    import anndata as ad
    import pandas as pd
    import scvi

    warnings.filterwarnings("ignore")
    scvi.settings.verbosity = 40
    n_cells = arguments["n_cells"]
    counts = simulated(n_cells, arguments["n_genes"], arguments["density"])
    obs = pd.DataFrame({"batch": batches(n_cells).astype(str)}, index=map(str, range(n_cells)))
    adata = ad.AnnData(counts, obs=obs)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    return scvi.model.SCVI(
        adata,
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        n_latent=10,
        gene_likelihood="zinb",
        use_layer_norm="both",
        use_batch_norm="none",
        encode_covariates=True,
    )


def peer(arguments: Json, phases: Phases) -> Json:
    """Train with scvi-tools; cells/s of each epoch."""
    import lightning.pytorch as pl

    phases.begin("data")
    n_cells, model = arguments["n_cells"], peer_model(arguments)
    wall, cpu = [], [0.0]

    class Clock(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.begin = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            wall.append(time.perf_counter() - self.begin)
            cpu.append(time.process_time())

    _set_threads(arguments)
    phases.begin("train")
    model.train(
        max_epochs=arguments["epochs"],
        accelerator="cpu",
        batch_size=arguments["minibatch"],
        train_size=1.0,
        callbacks=[Clock()],
        enable_progress_bar=False,
        logger=False,
    )
    return {
        "cells_per_second": [n_cells / seconds for seconds in wall],
        "cpu_seconds": np.diff(cpu).tolist(),
    }


def parts(arguments: Json, phases: Phases) -> Json:
    """Milliseconds of the parts of a step of Atlas, on minibatches that are at hand."""
    import torch

    from atlas.models import scvi
    from atlas.training.adam import Stepper
    from atlas.training.environment import torch_threads
    from atlas.training.inputs import CellColumns, InputsBuilder
    from atlas.training.loading import training_loader
    from atlas.training.ranks import Ranks
    from atlas.training.state import TrainingState

    phases.begin("data")
    model, source, config = _configured(arguments)
    device, columns = torch.device("cpu"), CellColumns()
    rows = [(0, source.n_obs)]
    loader = training_loader(model, source, rows, config, device, columns, Ranks())
    minibatches = list(loader)
    state = TrainingState.start(model, loader, config, device)
    stepper = Stepper(state.optimizer, state.average, model)
    to_inputs = InputsBuilder(device, None, columns, sparse=model.takes_sparse)
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def clock(part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[part] += time.perf_counter() - begin

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            with clock(part):
                return function(*given, **named)

        return call

    scvi.heads_loss = timed("heads", scvi.heads_loss)
    model.encoder.forward = timed("encoder", model.encoder.forward)
    bfloat16 = config.precision == "bfloat16"
    phases.begin("steps")
    steps = 0
    n_values = config.minibatch_size * source.n_vars
    with torch_threads(arguments["threads"], None, Path(), n_values):  # as in a training
        for turn in range(3):
            if turn == 1:
                seconds.clear()
                begin = time.perf_counter()
                steps = 2 * len(minibatches)
            for minibatch in minibatches:
                with clock("inputs"):
                    inputs = to_inputs(minibatch)
                with clock("forward"), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    losses = model.loss(inputs, 1.0, state.generator)
                with clock("backward"):
                    state.optimizer.zero_grad()
                    losses.objective.backward()
                with clock("optimiser"):
                    stepper.step(1000)
    seconds["step"] = time.perf_counter() - begin
    seconds["other forward"] = seconds["forward"] - sum(
        seconds[part] for part in ("encoder", "heads")
    )
    return {part: 1e3 * value / steps for part, value in seconds.items()}


# report

COLUMNS = ["inputs", "encoder", "heads", "other forward", "backward", "optimiser"]


def main() -> None:
    """Run all and print."""
    parser = argument_parser("Cells/s of a training step beside scvi-tools")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--genes", type=int, nargs="+", help="only these numbers of genes")
    parser.add_argument("--minibatches", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as it takes")
    options = parser.parse_args()
    setting = dict(TINY if options.tiny else FULL)
    known = provenance()
    say_provenance(known)
    say()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        results = list(measured(setting, options, Path(folder)))
    say_table(results)
    write_json(options.json, {**known, "setting": setting, "results": results})


def measured(setting: Json, options: argparse.Namespace, folder: Path) -> Iterator[Json]:
    """One result for each shape, minibatch and side."""
    for shape in setting["shapes"]:
        if options.genes and shape["n_genes"] not in options.genes:
            continue
        for minibatch in options.minibatches or setting["minibatches"]:
            common = {**shape, "minibatch": minibatch}
            common |= {name: setting[name] for name in ("n_hidden", "epochs")}
            common["threads"] = options.threads
            found: dict[str, list[Json]] = {side: [] for side in options.sides}
            for _ in range(options.rounds or setting["rounds"]):
                for side in options.sides:
                    work = "peer" if side == PEER else "ours"
                    outcome = run_worker(__file__, work, {**common, "side": side}, folder)
                    found[side].append(outcome.result)
            for side in options.sides:
                rates = [
                    statistics.harmonic_mean(result["cells_per_second"][1:])
                    for result in found[side]
                ]
                result = {
                    **common,
                    "side": side,
                    "cells_per_second": statistics.median(rates),
                    "rounds": rates,
                    "cpu_ms_per_cell": statistics.median(
                        1e3 * statistics.mean(result["cpu_seconds"][1:]) / shape["n_cells"]
                        for result in found[side]
                    ),
                    "train_loss": found[side][0].get("train_loss"),
                }
                if side != PEER:
                    asked = {**common, "side": side}
                    result["parts"] = run_worker(__file__, "parts", asked, folder).result
                yield result


def say_table(results: list[Json]) -> None:
    """Cells/s with ratios, and the milliseconds of a step."""
    peers = {(r["n_genes"], r["minibatch"]): r for r in results if r["side"] == PEER}
    rows, clocks = [], []
    for r in results:
        beside = peers.get((r["n_genes"], r["minibatch"]))
        where = [f"{r['n_genes']:,}", f"{r['minibatch']:,}", r["side"]]
        rows.append(
            [
                *where,
                f"{r['cells_per_second']:,.0f}",
                f"{min(r['rounds']):,.0f}–{max(r['rounds']):,.0f}",
                ""
                if beside is None
                else f"{r['cells_per_second'] / beside['cells_per_second']:.2f}",
                f"{r['cpu_ms_per_cell']:.3f}",
                "" if beside is None else f"{beside['cpu_ms_per_cell'] / r['cpu_ms_per_cell']:.2f}",
                "" if r["train_loss"] is None else f"{r['train_loss'][-1]:.3f}",
            ]
        )
        if "parts" in r:
            clocks.append([*where, *(f"{r['parts'][c]:.2f}" for c in [*COLUMNS, "step"])])
    heads = ["genes", "minibatch", "side"]
    columns = ["cells/s", "rounds", "×", "CPU s/1,000 cells", "× less", "training loss"]
    say(table([*heads, *columns], rows))
    say()
    say("Milliseconds of a step on minibatches at hand:")
    say(table([*heads, *COLUMNS, "step"], clocks))


if __name__ == "__main__":
    serve_worker([ours, peer, parts])
    main()
