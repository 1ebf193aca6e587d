"""Does scVI of Atlas fit cells not seen as well as scvi-tools', and better than factor analysis?

Table 1 of the scVI paper (Lopez et al. 2018, section 2.4) on the cells and models of
``scvi_paper.py``. A quarter of the cells is held out, the same for all sides; of each of them

bound
    is the evidence lower bound at one draw, of both packages; the paper's is after the encoder was
    trained further on the cells held out (Appendix F), which no side does here;
likelihood
    is the importance-weighted log-likelihood with ``--draws`` draws, of both packages by their own
    functions; for factor analysis the exact one of log(1 + count), less the sum over the genes of
    log(1 + count) (Appendix C), which makes it a density of the count;
FA, as counts
    is the log-probability of the values that round to the count, x − .5 to x + .5, and all below
    .5 for 0, with as many importance-weighted draws. It is not in the paper. A density is no
    probability: where a gene is nearly always 0 it is far above 1 there, and Appendix C alone makes
    factor analysis look likelier the sparser the counts are.

All in nats a cell. Differences are paired by cell, averaged over the seeds first; the interval is
that of the mean over cells, normal, 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from bench_quality import NORMAL_95, mean_and_error
from common import Json, Phases, say, serve_worker, table
from scipy.special import log_ndtr, logsumexp
from scvi_paper import (
    SIDES,
    Difference,
    Fitted,
    Floats,
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

AS_COUNTS = "FA, as counts"
SCVI = ("Atlas, ZINB", "Atlas, NB")
PAIRS = tuple(
    (measure, ours, ours.replace("Atlas", "scvi-tools"))
    for measure in ("bound", "likelihood")
    for ours in SCVI
) + tuple(("likelihood", ours, other) for other in ("FA", AS_COUNTS) for ours in SCVI)
FULL: Json = {"n_hidden": 128, "cells": None, "held_out_share": 0.25, "library": "latent"}
TINY: Json = FULL | {"n_hidden": 16, "cells": 300}


# workers


def prepare(arguments: Json, phases: Phases) -> Json:
    """Ingest the cells and hold a part of them out."""
    return prepare_cells(arguments, phases)


def ours(arguments: Json, phases: Phases) -> Json:
    """Likelihoods of Atlas."""
    import atlas

    model, store = train_ours(arguments, phases)
    phases.begin("likelihood")
    held_out = read_cells(arguments)[1]["held_out"]
    found = atlas.likelihood(
        model,
        store,
        n_samples=arguments["draws"],
        rows=held_out,
        seed=arguments["seed"],
        device="cpu",
    ).cells
    save(arguments, bound=found["elbo"], likelihood=found["log_likelihood"])
    return {}


def peer(arguments: Json, phases: Phases) -> Json:
    """Likelihoods of scvi-tools."""
    model = train_peer(arguments, phases)
    phases.begin("likelihood")
    held_out = np.flatnonzero(read_cells(arguments)[1]["held_out"])
    bound = model.get_elbo(indices=held_out, return_mean=False)
    likelihood = model.get_marginal_ll(
        indices=held_out, n_mc_samples=arguments["draws"], return_mean=False
    )
    save(arguments, bound=bound, likelihood=likelihood)
    return {}


def factors(arguments: Json, phases: Phases) -> Json:
    """Likelihoods of factor analysis: as Appendix C has it, and of counts."""
    model, counts, cells = fit_factors(arguments, phases)
    phases.begin("likelihood")
    counts, rng = counts[cells["held_out"]], np.random.default_rng(arguments["seed"])
    save(
        arguments,
        likelihood=density(model, counts),
        as_counts=probability(model, counts, arguments["draws"], rng),
    )
    return {}


# factor analysis of log(1 + count)


def density(model: Any, counts: Floats) -> Floats:
    """Log-density of counts, where the model is one of log(1 + count) (Appendix C): (n_cells,)."""
    log_counts = np.log1p(counts)
    scores: Floats = model.score_samples(log_counts) - log_counts.sum(axis=1)
    return scores


def probability(model: Any, counts: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """Log-probability that the model gives a value that rounds to the count.

    Genes are independent given the factors, so each has the probability of an interval. Factors
    are drawn from their posterior given log(1 + count) and weighted (Burda et al. 2016, eq. 8).

    Parameters
    ----------
    model
        A fitted ``FactorAnalysis`` of log(1 + count).
    counts
        (n_cells, n_genes).
    draws
        Of the factors of each cell.

    Returns
    -------
    float64, (n_cells,), nats.
    """
    loadings, deviation = model.components_, np.sqrt(model.noise_variance_)
    precision = np.eye(len(loadings)) + (loadings / model.noise_variance_) @ loadings.T
    root = np.linalg.cholesky(precision)
    log_density_at_0 = np.log(np.diag(root)).sum()
    centre = model.transform(np.log1p(counts))
    above = np.log(counts + 1.5) - model.mean_
    below = np.where(counts > 0, np.log(counts + 0.5), -np.inf) - model.mean_
    out = np.empty((draws, len(counts)))
    for i in range(draws):
        noise = rng.standard_normal(centre.shape)
        z = centre + np.linalg.solve(root.T, noise.T).T  # of covariance precision⁻¹
        prior_ratio = 0.5 * (np.square(noise) - np.square(z)).sum(axis=1) - log_density_at_0
        mean = z @ loadings
        inside = log_interval((below - mean) / deviation, (above - mean) / deviation)
        out[i] = prior_ratio + inside.sum(axis=1)
    mixed: Floats = logsumexp(out, axis=0) - np.log(draws)
    return mixed


def log_interval(low: Floats, high: Floats) -> Floats:
    """log(Φ(high) − Φ(low)), also far out where both are 1 to the last digit."""
    right = low + high > 0
    low, high = np.where(right, -high, low), np.where(right, -low, high)
    log_high = log_ndtr(high)
    out: Floats = log_high + np.log1p(-np.exp(log_ndtr(low) - log_high))
    return out


# measures


def by_measure(fitted: Fitted) -> dict[str, dict[str, Floats]]:
    """By measure and side: (n_seeds, n_cells)."""
    values = {name: dict(own) for name, own in fitted.values.items()}
    values[AS_COUNTS] = {"likelihood": values["FA"].pop("as_counts")}
    return {
        measure: {name: own[measure] for name, own in values.items() if measure in own}
        for measure in ("bound", "likelihood")
    }


def compare(values: dict[str, dict[str, Floats]]) -> list[Difference]:
    """Paired differences, with intervals over cells."""
    out = []
    for measure, one, other in PAIRS:
        by_cell = values[measure][one] - values[measure][other]
        mean, error = mean_and_error(by_cell.mean(axis=0))
        low, high = mean - NORMAL_95 * error, mean + NORMAL_95 * error
        by_seed = by_cell.mean(axis=1).tolist()
        out.append(Difference(one, other, measure, mean, low, high, by_seed))
    return out


def figure_table(values: dict[str, dict[str, Floats]], fitted: Fitted) -> str:
    rows = []
    for measure, sides in values.items():
        for name, own in sides.items():
            value, error = mean_and_error(own.mean(axis=0))
            seconds = fitted.seconds.get(name)
            rows.append(
                [
                    measure,
                    name,
                    f"{value:.2f} ± {error:.2f}",
                    " ".join(f"{one:.2f}" for one in own.mean(axis=1)),
                    "" if seconds is None else f"{seconds:.1f} s",
                ]
            )
    return table(["measure", "side", "nats a cell", "by seed", "training"], rows)


def main() -> None:
    serve_worker([prepare, ours, peer, factors])
    parser = paper_parser("Held-out likelihood beside scvi-tools and factor analysis")
    parser.add_argument("--draws", type=int, default=None, help="importance-weighted, of a cell")
    args = parser.parse_args()
    draws = {"draws": args.draws or (10 if args.tiny else 250)}

    def ask(settings: Json, seeds: Sequence[int]) -> Json:
        fitted = fit_sides(__file__, settings, SIDES, seeds, args.work)
        values = by_measure(fitted)
        found = compare(values)
        say("\n" + figure_table(values, fitted) + "\n\n" + difference_table(found, 2))
        figures = {
            measure: {name: own.mean(axis=1).tolist() for name, own in sides.items()}
            for measure, sides in values.items()
        }
        return result(fitted, figures, found)

    measure_files(args, "likelihood", FULL | draws, TINY | draws, [None], ask)


if __name__ == "__main__":
    main()
