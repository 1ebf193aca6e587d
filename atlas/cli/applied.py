"""The commands that apply a trained model: their options, and what each does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.errors import ConfigError

if TYPE_CHECKING:
    from atlas.models import TrainedModel
    from atlas.store import CountStore

Command = Callable[[str, Callable[[argparse.Namespace], int | None], str], Any]


def add_commands(command: Command) -> None:
    """Add the commands to the parser."""
    sub = command("label", label, "label cells by a scANVI, as obs columns of the store")
    _add_common(sub)
    sub.add_argument("--name", default="", help="of the columns; the model's if not given")
    sub.add_argument(
        "--probabilities",
        metavar="FILE",
        help="write that of each class and group, for each cell, as .csv or .tsv",
    )

    sub = command("de", de, "find genes that differ between groups of cells")
    _add_common(sub)
    sub.add_argument("--group1", metavar="CELLS", help="column=value,value; a label with --scanvi")
    sub.add_argument("--group2", metavar="CELLS", help="all others with a value if not given")
    sub.add_argument("--by", metavar="COLUMN", help="each of its values against all others")
    sub.add_argument(
        "--unlabeled",
        default="Unknown",
        help="value that stands for no label: such cells are left out, unless a group is of them",
    )
    sub.add_argument("--pairwise", action="store_true", help="each against each other")
    sub.add_argument(
        "--mode",
        choices=("change", "vanilla"),
        default="change",
        help="log fold changes beyond --delta; or Bayes factors of being higher, by however little",
    )
    sub.add_argument(
        "--scanvi", action="store_true", help="compare labels of a scanvi, not cells of the store"
    )
    sub.add_argument(
        "--batches", metavar="A,B", help="decode for these; all by their frequencies if not given"
    )
    sub.add_argument(
        "--delta", type=float, help="of change: log2 fold change that counts; .25 if not given"
    )
    sub.add_argument("--fdr", type=float, default=0.05, help="expected false discovery rate")
    sub.add_argument(
        "--sides",
        choices=("three", "two"),
        help="of change: up and down apart (three, if not given; the likelier of the two), or "
        "p(|LFC| >= delta)",
    )
    sub.add_argument("--pseudocount", type=float, help="added to shares; estimated if not given")
    sub.add_argument("--pairs", type=int, default=5000, help="pairs of cells of a comparison")
    sub.add_argument("--out", metavar="FILE", help="write all as .csv or .tsv")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--top", type=int, default=20, help="genes to print of each comparison")

    sub = command("normalized", normalized, "write the expected share of each gene in cells")
    _add_dense(sub)
    sub.add_argument(
        "--batch",
        metavar="NAME|average",
        help="decode for this batch, or the mean over all; each cell's own if not given",
    )
    sub.add_argument("--library", type=float, default=1.0, help="what the shares of a cell sum to")
    sub.add_argument(
        "--samples", type=int, default=0, help="mean over so many draws of z; 0: at its mean"
    )

    sub = command("impute", impute, "write the expected counts of cells given their posterior")
    _add_dense(sub)
    sub.add_argument(
        "--samples",
        type=int,
        help="draws of z to average, 0: at its mean; if not given 25, and 0 with --dropout",
    )
    kind = sub.add_mutually_exclusive_group()
    kind.add_argument(
        "--zero-inflation", action="store_true", help="what would be counted, dropout included"
    )
    kind.add_argument(
        "--draw", action="store_true", help="counts drawn from the posterior predictive instead"
    )
    kind.add_argument(
        "--dropout", action="store_true", help="the probability of zero inflation instead"
    )

    sub = command("posterior", posterior, "write mean and variance of z of each cell")
    _add_common(sub)
    sub.add_argument("--out", required=True, metavar="FILE", help="a .csv or .tsv")
    sub.add_argument(
        "--library", action="store_true", help="that of the log library size too: scvi, scanvi"
    )
    sub.add_argument("--samples", type=int, default=0, help="draws of z of each cell, besides")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("likelihood", likelihood, "measure how likely cells are under a model")
    _add_common(sub)
    sub.add_argument(
        "--samples", type=int, default=100, help="draws for the log-likelihood; 0 leaves it out"
    )
    sub.add_argument("--out", metavar="FILE", help="write each cell's values as .csv or .tsv")
    sub.add_argument("--seed", type=int, default=0)


def _add_common(sub: Any) -> None:
    sub.add_argument("model", help="a run folder")
    sub.add_argument("store")
    sub.add_argument("--rows", help="cells by an obs column: column=value,value")
    add_device(sub)


def add_device(sub: Any) -> None:
    """Add the option of where to compute."""
    sub.add_argument(
        "--device",
        default="auto",
        help="where to compute: cpu, cuda or cuda:1; auto takes a GPU where there is one",
    )


def _add_dense(sub: Any) -> None:
    _add_common(sub)
    sub.add_argument(
        "--out", required=True, metavar="OUT.zarr", help="a new AnnData in Zarr, written in blocks"
    )
    sub.add_argument("--genes", metavar="A,B|FILE", help="names, or a file of them, one a line")
    sub.add_argument("--seed", type=int, default=0)


def _opened(options: argparse.Namespace) -> tuple[TrainedModel, CountStore]:
    from atlas import load_model, open_store

    return load_model(options.model), open_store(options.store)


def label(options: argparse.Namespace) -> None:
    from atlas import workflows

    model, store = _opened(options)
    made = workflows.label(
        model,
        store,
        name=options.name,
        probabilities=options.probabilities,
        rows=options.rows,
        device=options.device,
        progress=True,
    )
    for name, n in sorted(made.counts.items(), key=lambda item: -item[1]):
        print(f"  {name:<40} {n:>12,} cells")
    print(
        f"{len(made.table):,} cells labelled; mean probability {made.mean_probability:.3f}, "
        f"mean entropy {made.mean_entropy:.3f} nats"
    )
    print(f"obs columns {', '.join(made.table.columns)}; manifest {store.number}")
    if options.probabilities:
        print(f"{options.probabilities}: {len(made.table):,} lines")


def de(options: argparse.Namespace) -> None:
    from atlas import workflows

    model, store = _opened(options)
    found = workflows.differential_expression(
        model,
        store,
        group1=options.group1,
        group2=options.group2,
        by=options.by,
        pairwise=options.pairwise,
        mode=options.mode,
        scanvi=options.scanvi,
        batches=options.batches.split(",") if options.batches else None,
        delta=options.delta,
        fdr=options.fdr,
        sides=options.sides,
        pseudocount=options.pseudocount,
        n_pairs=options.pairs,
        rows=options.rows,
        unlabeled=options.unlabeled,
        out=options.out,
        seed=options.seed,
        device=options.device,
        progress=True,
    )
    change = options.mode == "change"
    shown = ["proba_de"] if change else ["proba_m1", "bayes_factor"]
    shown += ["lfc_median", "expected_fdr"]
    shown += ["raw_mean1", "raw_mean2", "non_zeros_proportion1", "non_zeros_proportion2"]
    for name, table in found.groupby("comparison", sort=False):
        cells = [float(table[f"n_cells{i}"].iloc[0]) for i in (1, 2)]
        print(f"{name}: {cells[0]:,.0f} and {cells[1]:,.0f} cells")
        if len(table) and options.top > 0:
            print(table[shown].head(options.top).to_string(float_format=lambda v: f"{v:.4g}"))
        called = int(table.filter(like="is_de_fdr_").iloc[:, 0].sum())
        said = "differ" if change else "are higher in one of the two"
        print(f"{called:,} of {len(table):,} genes {said} at an expected FDR of {options.fdr}")
    if options.out:
        print(f"{options.out}: {len(found):,} lines")


def _dense(options: argparse.Namespace) -> dict[str, Any]:
    genes = None
    if options.genes:
        file = Path(options.genes)
        genes = file.read_text().split() if file.is_file() else options.genes.split(",")
    return {
        "genes": genes,
        "rows": options.rows,
        "out": options.out,
        "seed": options.seed,
        "device": options.device,
        "progress": True,
    }


def normalized(options: argparse.Namespace) -> None:
    from atlas import workflows

    model, store = _opened(options)
    out = workflows.normalized(
        model,
        store,
        batch=options.batch,
        library=options.library,
        n_samples=options.samples,
        **_dense(options),
    )
    _print_shape(out)


def impute(options: argparse.Namespace) -> None:
    from atlas import workflows

    if options.draw and options.samples is not None:
        raise ConfigError(
            "One count is drawn for each cell and gene, not a mean over draws",
            found=f"--draw with --samples {options.samples}",
            do="leave --samples out; another --seed gives another draw",
        )
    model, store = _opened(options)
    given = _dense(options)
    if options.samples is not None:
        given["n_samples"] = options.samples
    if options.draw:
        out = workflows.posterior_predictive(model, store, **given)
    elif options.dropout:
        out = workflows.dropout_probability(model, store, **given)
    else:
        out = workflows.impute(model, store, zero_inflation=options.zero_inflation, **given)
    _print_shape(out)


def _print_shape(out: Any) -> None:
    import zarr

    n_obs, n_vars = zarr.open_array(Path(out) / "X", mode="r").shape
    print(f"{out}: {n_obs:,} cells × {n_vars:,} genes (anndata.read_zarr)")


def posterior(options: argparse.Namespace) -> None:
    from atlas import workflows

    model, store = _opened(options)
    found = workflows.posterior_table(
        model,
        store,
        out=options.out,
        n_samples=options.samples,
        library=options.library,
        rows=options.rows,
        seed=options.seed,
        device=options.device,
        progress=True,
    )
    print(f"{options.out}: {len(found):,} cells × {found.shape[1]} columns")


def likelihood(options: argparse.Namespace) -> None:
    from atlas import workflows

    model, store = _opened(options)
    found = workflows.likelihood(
        model,
        store,
        n_samples=options.samples,
        rows=options.rows,
        out=options.out,
        seed=options.seed,
        device=options.device,
        progress=True,
    )
    errors = found.standard_error
    for name, value in found.mean.items():
        print(f"{name.replace('_', ' '):<24} {value:.3f} ± {errors[name]:.3f} nats per cell")
    print(f"{len(found.cells):,} cells" + (f"; {options.out}" if options.out else ""))
