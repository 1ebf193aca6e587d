"""What the benchmarks of the scVI paper's section 2.4 share: cells, models, tables.

The cells are parts of the paper's CORTEX and BRAIN-LARGE. Of the genes found in one cell of a
hundred at least, the 558 or 720 of highest variance are taken, as many as the paper has (or all,
where fewer are left), and the cells with ten of these genes at least.

scVI has two layers of 128, ten latent dimensions and a latent library size, as in the paper (Lopez
et al. 2018, Methods 4.1), which on both sides makes the likelihood one of the counts: with an
observed library it is that of the counts given their sum. Atlas trains on its path from file to
store to loader, scvi-tools in memory by its own API, with the same architecture, optimiser,
warm-up, minibatches and epochs. Else both keep their defaults, so Atlas averages the weights of its
last 500 steps. Factor analysis (FA) is scikit-learn's with ten factors, of log(1 + count), fitted
with exact singular values, so that seeds change nothing.
"""

from __future__ import annotations

import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
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
    table,
    write_json,
)

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Corrupt = Callable[[sp.csr_matrix, str, np.random.Generator], tuple[sp.csr_matrix, Json]]

# file, genes, epochs; the paper trains for 120 to 250 epochs, fewer where there are more cells
FILES = {
    "zeisel": ("zeisel_cortex_subset.h5ad", 558, 250),
    "tenx": ("tenx_mouse_10k_1000g.h5ad", 720, 120),
}
LEAST_SHARE, LEAST_GENES = 0.01, 10
N_LATENT = 10


@dataclass(frozen=True)
class Side:
    """A model of counts.

    Attributes
    ----------
    name
        For the table.
    worker
        The function of the benchmark that fits it.
    gene_likelihood
        Of scVI.
    """

    name: str
    worker: str
    gene_likelihood: str = ""


SIDES = (
    Side("Atlas, ZINB", "ours", "zinb"),
    Side("scvi-tools, ZINB", "peer", "zinb"),
    Side("Atlas, NB", "ours", "nb"),
    Side("scvi-tools, NB", "peer", "nb"),
    Side("FA", "factors"),
)


# for the workers


def prepare_cells(arguments: Json, phases: Phases, corrupt: Corrupt | None = None) -> Json:
    """Choose genes and cells, corrupt their counts if asked to, ingest them, and hold cells out.

    Writes ``cells.atlas`` and, for the others, ``cells.h5ad`` and ``cells.npz`` in store order.
    """
    import anndata as ad

    import atlas

    folder, rng = Path(arguments["folder"]), np.random.default_rng(0)
    adata = ad.read_h5ad(arguments["source"])
    counts = adata.X.astype(np.float64)
    mean = np.asarray(counts.mean(axis=0)).ravel()
    variance = np.asarray(counts.power(2).mean(axis=0)).ravel() - mean**2
    often = np.asarray((counts > 0).mean(axis=0)).ravel() >= LEAST_SHARE
    highest = np.argsort(np.where(often, -variance, 0), kind="stable")[: arguments["n_genes"]]
    adata = adata[:, np.sort(highest[often[highest]])]
    adata = adata[np.diff(adata.X.indptr) >= LEAST_GENES]
    if arguments["cells"] is not None:
        adata = adata[np.sort(rng.choice(adata.n_obs, arguments["cells"], replace=False))]
    adata = adata.copy()
    asked: Json = {}
    if corrupt is not None:
        adata.X, asked = corrupt(adata.X, arguments["scheme"], rng)
    adata.write_h5ad(folder / "input.h5ad")
    phases.begin("ingest")
    store = atlas.create_store(folder / "cells.atlas")
    store.append(folder / "input.h5ad", study="cells")
    position = store.index_array("input_position").astype(np.int64)
    adata[position].copy().write_h5ad(folder / "cells.h5ad")
    if asked:
        asked["rows"] = np.argsort(position)[asked["rows"]]
    held_out = np.zeros(store.n_obs, bool)
    for start, stop in store.split(arguments["held_out_share"]).validation:
        held_out[start:stop] = True
    np.savez(folder / "cells.npz", held_out=held_out, **asked)
    return {
        "n_cells": store.n_obs,
        "n_genes": adata.n_vars,
        "non_zero": float(adata.X.nnz / np.prod(adata.shape)),
        "n_held_out": int(held_out.sum()),
        "n_asked": len(asked.get("rows", ())),
    }


def read_cells(arguments: Json) -> tuple[Any, Any]:
    """The counts, as AnnData in store order, and what is asked of them."""
    import anndata as ad

    folder = Path(arguments["folder"])
    adata = ad.read_h5ad(folder / "cells.h5ad")
    adata.X = adata.X.astype(np.float32)
    return adata, np.load(folder / "cells.npz")


def train_ours(arguments: Json, phases: Phases) -> tuple[Any, Any]:
    """A model trained with Atlas, and its store."""
    import atlas

    folder = Path(arguments["folder"])
    store = atlas.open_store(folder / "cells.atlas")
    phases.begin("train")
    model = atlas.train(
        store,
        "scvi",
        out=folder / arguments["out"],
        genes=list(store.var.index),
        max_epochs=arguments["epochs"],
        seed=arguments["seed"],
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        n_latent=N_LATENT,
        gene_likelihood=arguments["gene_likelihood"],
        library=arguments["library"],
        lr=1e-3,
        eps=0.01,
        weight_decay=1e-6,
        minibatch_size=128,
        warmup_share=0.5,
        validation_share=arguments["held_out_share"],
        device="cpu",
    )
    return model, store


def train_peer(arguments: Json, phases: Phases) -> Any:
    """A model trained with scvi-tools on ``cells.h5ad``."""
    import scvi

    epochs = arguments["epochs"]
    adata, cells = read_cells(arguments)
    held_out = np.flatnonzero(cells["held_out"])
    split = [np.flatnonzero(~cells["held_out"]), held_out, np.array([], np.int64)]
    scvi.settings.verbosity = 30
    phases.begin("train")
    scvi.settings.seed = arguments["seed"]
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(
        adata,
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        n_latent=N_LATENT,
        gene_likelihood=arguments["gene_likelihood"],
        use_observed_lib_size=arguments["library"] == "observed",
        use_layer_norm="both",
        use_batch_norm="none",
        encode_covariates=True,
    )
    plan = {"lr": 1e-3, "eps": 0.01, "weight_decay": 1e-6, "n_epochs_kl_warmup": epochs // 2}
    model.train(
        max_epochs=epochs,
        accelerator="cpu",
        batch_size=128,
        # Atlas validates after each epoch too, where it has cells to
        check_val_every_n_epoch=1 if len(held_out) else None,
        datasplitter_kwargs={"external_indexing": split},
        plan_kwargs=plan,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=None,
    )
    return model


def fit_factors(arguments: Json, phases: Phases) -> tuple[Any, Floats, Any]:
    """Factor analysis of log(1 + count), the counts, and what is asked of them."""
    from sklearn.decomposition import FactorAnalysis

    adata, cells = read_cells(arguments)
    counts = adata.X.toarray().astype(np.float64)
    phases.begin("train")
    # the default, randomised, stops at the first step that noise makes worse
    model = FactorAnalysis(N_LATENT, svd_method="lapack")
    model.fit(np.log1p(counts[~cells["held_out"]]))
    return model, counts, cells


def save(arguments: Json, **values: Any) -> None:
    """Keep what a worker found for :func:`load`."""
    path = Path(arguments["folder"]) / f"{arguments['out']}.npz"
    np.savez(path, **{name: np.asarray(own, np.float64) for name, own in values.items()})


# from the workers to a table


@dataclass(frozen=True)
class Difference:
    """A measure of ours less another's, paired.

    Attributes
    ----------
    ours, other, measure
        Names of the sides, and of what is measured.
    difference, low, high
        Mean over seeds, and the 95 % interval over cells.
    by_seed
        The difference of each seed.
    """

    ours: str
    other: str
    measure: str
    difference: float
    low: float
    high: float
    by_seed: list[float]


def difference_table(found: Sequence[Difference], digits: int) -> str:
    rows = [
        [
            d.measure,
            f"{d.ours} − {d.other}",
            f"{d.difference:+.{digits}f}",
            f"{d.low:+.{digits}f} … {d.high:+.{digits}f}",
            " ".join(f"{value:+.{digits}f}" for value in d.by_seed),
        ]
        for d in found
    ]
    return table(["measure", "sides", "difference", "95 % over cells", "by seed"], rows)


@dataclass(frozen=True)
class Fitted:
    """All sides fitted to the same cells.

    Attributes
    ----------
    values
        By side and name of a value: (n_seeds, n_values).
    seconds
        Training of each side, mean over seeds.
    runs
        Of each side, the phases of each seed.
    cells, asked
        What ``prepare`` returned, and what it wrote to ``cells.npz``.
    """

    values: dict[str, dict[str, Floats]]
    seconds: dict[str, float]
    runs: Json
    cells: Json
    asked: dict[str, Any]


def fit_sides(
    script: str, settings: Json, sides: Sequence[Side], seeds: Sequence[int], work: Path | None
) -> Fitted:
    """Prepare the cells, and run the worker of each side with each seed."""
    with tempfile.TemporaryDirectory(prefix="bench-scvi-paper-", dir=work) as temporary:
        folder = Path(temporary)
        common = settings | {"folder": temporary}
        cells = run_worker(script, "prepare", common, folder).result
        say(f"\n{settings['file']}, {settings['scheme'] or 'not corrupted'}: {cells}")
        runs: dict[str, list[Outcome]] = {side.name: [] for side in sides}
        kept: dict[str, list[dict[str, Floats]]] = {side.name: [] for side in sides}
        for seed in seeds:
            for i, side in enumerate(sides):
                asked = {"seed": seed, "out": f"{i}-{seed}"}
                asked["gene_likelihood"] = side.gene_likelihood
                runs[side.name].append(run_worker(script, side.worker, common | asked, folder))
                kept[side.name].append(dict(np.load(folder / f"{asked['out']}.npz")))
        asked_of = dict(np.load(folder / "cells.npz"))
    return Fitted(
        values={
            name: {value: np.stack([one[value] for one in own]) for value in own[0]}
            for name, own in kept.items()
        },
        seconds={
            name: float(np.mean([run.phases["train"].seconds for run in own]))
            for name, own in runs.items()
        },
        runs={name: [phases_json(run) for run in own] for name, own in runs.items()},
        cells=cells,
        asked=asked_of,
    )


def paper_parser(description: str) -> ArgumentParser:
    """The options that both benchmarks have."""
    parser = argument_parser(description)
    parser.add_argument("--files", nargs="+", choices=tuple(FILES), default=list(FILES))
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--epochs", type=int, help="passes over the cells")
    return parser


Ask = Callable[[Json, Sequence[int]], Json]


def measure_files(
    args: Namespace, benchmark: str, full: Json, tiny: Json, schemes: Sequence[str | None], ask: Ask
) -> None:
    """Ask for the figures of each file and scheme, and write them all."""
    seeds = args.seeds or ([0] if args.tiny else [0, 1, 2])
    known, started = provenance(), time.monotonic()
    say_provenance(known)
    results = []
    for name in args.files:
        file, n_genes, epochs = FILES[name]
        for scheme in schemes:
            settings = (tiny if args.tiny else full) | {
                "file": file,
                "source": str(DATA / file),
                "n_genes": n_genes,
                "epochs": args.epochs or (2 if args.tiny else epochs),
                "scheme": scheme,
            }
            results.append({"settings": settings | {"seeds": seeds}} | ask(settings, seeds))
    seconds = time.monotonic() - started
    say(f"\n{seconds:.0f} s")
    content = {"benchmark": benchmark, **known, "results": results, "seconds": seconds}
    write_json(args.json, content)


def result(fitted: Fitted, figures: Json, differences: Sequence[Difference]) -> Json:
    """Figures of one file and scheme, as plain values."""
    return {
        "cells": fitted.cells,
        "figures": figures,
        "differences": [asdict(d) for d in differences],
        "training_seconds": fitted.seconds,
        "runs": fitted.runs,
    }
