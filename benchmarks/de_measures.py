"""How well estimated changes of genes agree with true ones, and what a benchmark makes of it.

What a side estimates of a comparison is an :class:`Estimate`; a *measure* makes a number of it and
the truth. Intervals are of two kinds: over genes, by drawing the genes anew (the same for all
sides, so differences are paired), and over seeds (Student's t).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from bench_quality import NORMAL_95
from common import table
from scipy.stats import kendalltau, rankdata
from scipy.stats import t as student

Floats = npt.NDArray[np.float64]

DELTA = 0.25
"""From this log2 fold change on a gene is truly changed; what both are asked to find."""


@dataclass(frozen=True)
class Estimate:
    """What one side says of a comparison; each (n_genes,), in one order of the genes.

    Attributes
    ----------
    lfc
        Log2 fold change: the mean over the pairs.
    probability
        That the gene is changed; anything that orders genes by it.
    k
        Bayes factor of the first group's share being the higher one, or another signed statistic.
    called
        Whether the gene is called at an expected false discovery rate of .05.
    rank, rank_k
        The gene's line in the table of changes and in that of Bayes factors, from 1 on.
    """

    lfc: Floats
    probability: Floats
    k: Floats
    called: npt.NDArray[np.bool_]
    rank: npt.NDArray[np.int64]
    rank_k: npt.NDArray[np.int64]

    @classmethod
    def nothing(cls, n_genes: int) -> Estimate:
        """Of a comparison that a side could not make: no change of any gene."""
        zero, line = np.zeros(n_genes), np.arange(1, n_genes + 1)
        return cls(zero, zero, zero, np.zeros(n_genes, bool), line, line)

    def arrays(self, key: str) -> dict[str, npt.NDArray[np.generic]]:
        """For ``np.savez``."""
        return {f"{key}|{f.name}": getattr(self, f.name) for f in fields(self)}

    @classmethod
    def load(cls, arrays: Mapping[str, npt.NDArray[np.generic]], key: str) -> Estimate:
        """The inverse of :meth:`arrays`."""
        return cls(**{f.name: arrays[f"{key}|{f.name}"] for f in fields(cls)})

    def at(self, genes: npt.NDArray[np.int64]) -> Estimate:
        """Of some genes."""
        return Estimate(**{f.name: getattr(self, f.name)[genes] for f in fields(self)})


def spearman(one: Floats, other: Floats) -> float:
    """Rank correlation; of equal values the mean rank, and 0 where all are."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def kendall(one: Floats, other: Floats) -> float:
    """Rank correlation, τ-b; 0 where all values are equal."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(kendalltau(one, other).statistic)


def auroc(positive: npt.NDArray[np.bool_], score: Floats) -> float:
    """Probability that a positive gene scores higher than another; half where they are equal."""
    n = int(positive.sum())
    rank_sum = float(rankdata(score)[positive].sum())
    return (rank_sum - n * (n + 1) / 2) / (n * (len(positive) - n))


def _changed(truth: Floats) -> npt.NDArray[np.bool_]:
    return np.abs(truth) >= DELTA


def _among_changed(
    correlation: Callable[[Floats, Floats], float], truth: Floats, values: Floats
) -> float:
    changed = _changed(truth)
    return correlation(truth[changed], values[changed])


def _false(truth: Floats, e: Estimate) -> float:
    """Share of the genes called that are not changed; 0 where none is called."""
    return float((e.called & ~_changed(truth)).sum() / max(1, e.called.sum()))


TRUTH_MEASURES: dict[str, Callable[[Floats, Estimate], float]] = {
    "Spearman, LFC": lambda t, e: spearman(t, e.lfc),
    "Kendall, LFC": lambda t, e: kendall(t, e.lfc),
    "Spearman, Bayes factor": lambda t, e: spearman(t, e.k),
    "Kendall, Bayes factor": lambda t, e: kendall(t, e.k),
    "Spearman, LFC, changed genes": lambda t, e: _among_changed(spearman, t, e.lfc),
    "Spearman, Bayes factor, changed genes": lambda t, e: _among_changed(spearman, t, e.k),
    "AUROC, probability": lambda t, e: auroc(_changed(t), e.probability),
    "AUROC, Bayes factor": lambda t, e: auroc(_changed(t), np.abs(e.k)),
    "share of changed genes called": lambda t, e: float(e.called[_changed(t)].mean()),
    "share of called genes not changed": _false,
}


def truth_as_estimate(truth: Floats, rng: np.random.Generator) -> Estimate:
    """The best that can be: the truth, with a random order of the genes that are equal."""
    values = truth + rng.uniform(-1e-7, 1e-7, len(truth))
    order = rankdata(-np.abs(values), method="ordinal").astype(np.int64)
    return Estimate(values, np.abs(values), values, _changed(truth), order, order)


def against_truth(
    comparisons: Sequence[tuple[Floats, Estimate]], resamples: int, seed: int
) -> dict[str, Floats]:
    """All measures, means over comparisons: first of all genes, then of genes drawn anew.

    Parameters
    ----------
    comparisons
        Truth and estimate of each, over the same genes.
    resamples
        How often genes are drawn.
    seed
        Of the draws, which are the same for all sides.

    Returns
    -------
    By measure: float64, (1 + resamples,).
    """
    n_genes = len(comparisons[0][0])
    rng = np.random.default_rng([seed, 77])
    draws = [np.arange(n_genes)] + [rng.integers(0, n_genes, n_genes) for _ in range(resamples)]
    out = {}
    for name, measure in TRUTH_MEASURES.items():
        out[name] = np.array(
            [np.mean([measure(t[genes], e.at(genes)) for t, e in comparisons]) for genes in draws]
        )
    return out


# figures: means over seeds, and differences to a baseline

Values = dict[str, dict[str, dict[str, list[Floats]]]]
"""By case, side and measure: of each seed, of all genes and then of genes drawn anew."""


@dataclass(frozen=True)
class Figure:
    """A measure of one side in one case, and its paired difference to the baseline's.

    Attributes
    ----------
    value, by_seed
        Mean over the seeds, and each.
    difference
        To the baseline; None for the baseline itself.
    genes_low, genes_high
        95 % interval of it over genes, normal; None where genes were not drawn anew.
    seeds_low, seeds_high
        95 % interval of it over seeds, Student's t; None with one seed.
    """

    case: str
    measure: str
    side: str
    value: float
    by_seed: list[float]
    difference: float | None
    genes_low: float | None = None
    genes_high: float | None = None
    seeds_low: float | None = None
    seeds_high: float | None = None


def figures_of(values: Values, baseline: str) -> list[Figure]:
    """Figures of all cases and sides."""
    out = []
    for case, sides in values.items():
        measures = list(dict.fromkeys(m for own in sides.values() for m in own))
        for measure in measures:
            for side, own in sides.items():
                if measure not in own:
                    continue
                other = sides.get(baseline, {}).get(measure)
                if side == baseline:
                    other = None
                out.append(_figure(case, measure, side, own[measure], other))
    return out


def _figure(
    case: str, measure: str, side: str, own: list[Floats], other: list[Floats] | None
) -> Figure:
    mine = np.array([seed[0] for seed in own])
    base = Figure(case, measure, side, float(mine.mean()), mine.tolist(), None)
    if other is None:
        return base
    apart = np.array([one - two for one, two in zip(own, other, strict=True)])  # seeds × draws
    by_seed = apart[:, 0]
    middle, found = float(by_seed.mean()), dict(vars(base))
    found["difference"] = middle
    if apart.shape[1] > 2:
        # Seeds have genes of their own, so their errors are independent.
        spread = NORMAL_95 * float(np.sqrt(apart[:, 1:].var(axis=1, ddof=1).sum()) / len(apart))
        found |= {"genes_low": middle - spread, "genes_high": middle + spread}
    if len(by_seed) > 1:
        half = student.ppf(0.975, len(by_seed) - 1) * by_seed.std(ddof=1) / len(by_seed) ** 0.5
        found |= {"seeds_low": middle - float(half), "seeds_high": middle + float(half)}
    return Figure(**found)


def figure_table(found: Sequence[Figure]) -> str:
    """As Markdown."""

    def interval(low: float | None, high: float | None, digits: int) -> str:
        return "" if low is None or high is None else f"{low:+.{digits}f} … {high:+.{digits}f}"

    rows = []
    for f in found:
        digits = 1 if f.measure.startswith(("line", "last line", "genes")) else 3
        rows.append(
            [
                f.case,
                f.measure,
                f.side,
                f"{f.value:.{digits}f}",
                " ".join(f"{value:.{digits}f}" for value in f.by_seed),
                "" if f.difference is None else f"{f.difference:+.{digits}f}",
                interval(f.genes_low, f.genes_high, digits),
                interval(f.seeds_low, f.seeds_high, digits),
            ]
        )
    header = ["case", "measure", "side", "mean", "by seed", "difference"]
    return table([*header, "95 % over genes", "95 % over seeds"], rows)
