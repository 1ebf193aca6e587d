"""Does scVI of Atlas impute counts as well as scvi-tools', and better than factor analysis?

As in the scVI paper (Lopez et al. 2018, section 2.4 and Methods 4.7); ``scvi_paper.py`` says which
cells and models. A tenth of the non-zero counts is chosen, once for all sides and seeds:

zeros
    Each count chosen is set to zero with probability .9, and those are what is asked. This is the
    9 % of section 2.4; Methods 4.7 prints Ber(.9) for the factor, which would set 1 % to zero.
binomial
    Each count n chosen becomes a draw of Binomial(n, .2), and all chosen are asked. Section 2.4
    chooses among the non-zero entries, Methods 4.7 in the whole matrix, most of which stays as is.

Models are fitted to the corrupted counts of all cells, none held out. Imputed are

scVI
    the mean of the negative binomial at the cell's own library, without the zero inflation, over
    25 draws of z; a latent library is drawn too in scvi-tools, and at its mean in Atlas
    (``--library observed``: the counts of the cell, the default of both packages);
FA
    the mean given the cell, brought back by exp(·) − 1 and not below 0;
gene's share
    the gene's share in the counts of all cells, times the counts of the cell: what any model is to
    be better than;
0
    nothing, so that the error is the count itself.

The score is the paper's: the median over the entries asked of |imputed − count before|; the mean
is beside it. The difference of two sides is of medians, each a mean over the seeds. Entries of a
cell go together, so its interval is the middle 95 % of a bootstrap over cells: each resample draws
as many cells with replacement, with all their entries, the same for both sides and all seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from common import Json, Phases, say, serve_worker, table
from scvi_paper import (
    SIDES,
    Difference,
    Fitted,
    Floats,
    Integers,
    Side,
    difference_table,
    fit_factors,
    fit_sides,
    measure_files,
    paper_parser,
    prepare_cells,
    read_cells,
    result,
    save,
    train_ours,
    train_peer,
)

SCHEMES = ("zeros", "binomial")
SHARE = "gene's share"
IMPUTERS = (*SIDES, Side(SHARE, "shares"))
PAIRS = (
    ("Atlas, ZINB", "scvi-tools, ZINB"),
    ("Atlas, NB", "scvi-tools, NB"),
    *((ours, other) for other in ("FA", SHARE) for ours in ("Atlas, ZINB", "Atlas, NB")),
)
FULL: Json = {"n_hidden": 128, "cells": None, "draws": 25, "held_out_share": 0.0}
TINY: Json = FULL | {"n_hidden": 16, "cells": 300, "draws": 2}
RESAMPLES = 1000


def corrupt(
    counts: sp.csr_matrix, scheme: str, rng: np.random.Generator
) -> tuple[sp.csr_matrix, Json]:
    """Corrupt a tenth of the non-zero counts.

    Returns
    -------
    The corrupted counts; and of the entries asked ``rows``, ``columns`` and the counts ``before``.
    """
    entries = counts.tocoo()
    chosen = rng.choice(entries.nnz, entries.nnz // 10, replace=False)
    if scheme == "zeros":
        chosen = chosen[rng.random(len(chosen)) < 0.9]
    before = entries.data[chosen].astype(np.int64)
    values = entries.data.copy()
    values[chosen] = 0 if scheme == "zeros" else rng.binomial(before, 0.2)
    out = sp.csr_matrix((values, (entries.row, entries.col)), shape=counts.shape)
    out.eliminate_zeros()
    return out, {"rows": entries.row[chosen], "columns": entries.col[chosen], "before": before}


# workers


def prepare(arguments: Json, phases: Phases) -> Json:
    """Corrupt the counts and ingest them."""
    return prepare_cells(arguments, phases, corrupt)


def ours(arguments: Json, phases: Phases) -> Json:
    """Impute with Atlas."""
    import atlas

    model, store = train_ours(arguments, phases)
    phases.begin("impute")
    imputed = atlas.impute(
        model, store, n_samples=arguments["draws"], seed=arguments["seed"], device="cpu"
    )
    return _save(arguments, np.asarray(imputed.X))


def peer(arguments: Json, phases: Phases) -> Json:
    """Impute with scvi-tools."""
    model = train_peer(arguments, phases)
    phases.begin("impute")
    # scaled by the latent library this is the mean of the negative binomial, not of the ZINB
    return _save(
        arguments,
        model.get_normalized_expression(
            library_size="latent", n_samples=arguments["draws"], return_numpy=True
        ),
    )


def factors(arguments: Json, phases: Phases) -> Json:
    """Impute with factor analysis."""
    model, counts, _ = fit_factors(arguments, phases)
    phases.begin("impute")
    mean = model.transform(np.log1p(counts)) @ model.components_ + model.mean_
    return _save(arguments, np.expm1(mean).clip(0))


def shares(arguments: Json, phases: Phases) -> Json:
    """Impute the gene's share of the cell's counts."""
    counts = read_cells(arguments)[0].X.astype(np.float64)
    phases.begin("train")
    share = np.asarray(counts.sum(axis=0)) / counts.sum()
    phases.begin("impute")
    return _save(arguments, np.asarray(counts.sum(axis=1)) * share)


def _save(arguments: Json, imputed: Any) -> Json:
    cells = read_cells(arguments)[1]
    save(arguments, imputed=imputed[cells["rows"], cells["columns"]])
    return {}


# measures


def resampled_medians(errors: Floats, cell: Integers, times: Integers) -> Floats:
    """Mean over seeds of the median error, where each cell comes so many times.

    Parameters
    ----------
    errors
        (n_seeds, n_entries).
    cell
        The cell of each entry, (n_entries,).
    times
        How often each cell comes in each resample, (n_resamples, n_cells).

    Returns
    -------
    float64, (n_resamples,); of an even number of entries the lower median.
    """
    out = np.zeros(len(times))
    for own in errors:
        order = np.argsort(own, kind="stable")
        own, of = own[order], cell[order]
        for i, weights in enumerate(times):
            counted = np.cumsum(weights[of])
            out[i] += own[np.searchsorted(counted, (counted[-1] + 1) // 2)] / len(errors)
    return out


def compare(errors: dict[str, Floats], cell: Integers) -> list[Difference]:
    """Differences of median errors, with intervals over cells."""
    _, cell = np.unique(cell, return_inverse=True)
    n_cells = int(cell.max()) + 1
    times = np.random.default_rng(0).multinomial(n_cells, [1 / n_cells] * n_cells, RESAMPLES)
    drawn = {name: resampled_medians(own, cell, times) for name, own in errors.items()}
    out = []
    for one, other in PAIRS:
        by_seed = np.median(errors[one], axis=1) - np.median(errors[other], axis=1)
        low, high = np.quantile(drawn[one] - drawn[other], [0.025, 0.975]).tolist()
        difference = float(by_seed.mean())
        out.append(Difference(one, other, "error", difference, low, high, by_seed.tolist()))
    return out


def figure_table(errors: dict[str, Floats], fitted: Fitted) -> str:
    rows = []
    for name, own in errors.items():
        medians = np.median(own, axis=1)
        rows.append(
            [
                name,
                f"{medians.mean():.4f}",
                " ".join(f"{value:.4f}" for value in medians),
                f"{own.mean():.4f}",
                f"{fitted.seconds[name]:.1f} s" if name in fitted.seconds else "",
            ]
        )
    return table(["side", "median error", "by seed", "mean error", "training"], rows)


def main() -> None:
    serve_worker([prepare, ours, peer, factors, shares])
    parser = paper_parser("Imputation beside scvi-tools and factor analysis")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument(
        "--library", choices=("latent", "observed"), default="latent", help="size, of scVI"
    )
    args = parser.parse_args()
    library = {"library": args.library}

    def ask(settings: Json, seeds: Sequence[int]) -> Json:
        fitted = fit_sides(__file__, settings, IMPUTERS, seeds, args.work)
        before = fitted.asked["before"].astype(np.float64)
        errors = {n: np.abs(own["imputed"] - before) for n, own in fitted.values.items()}
        errors["0"] = np.abs(before)[None]
        found = compare(errors, fitted.asked["rows"])
        say("\n" + figure_table(errors, fitted) + "\n\n" + difference_table(found, 4))
        figures = {
            name: {
                "median": np.median(own, axis=1).tolist(),
                "mean": own.mean(axis=1).tolist(),
            }
            for name, own in errors.items()
        }
        return result(fitted, figures, found)

    measure_files(args, "imputation", FULL | library, TINY | library, args.schemes, ask)


if __name__ == "__main__":
    main()
