"""Bayesian differential expression from pairs of decoded cells; knows no models.

A pair is a cell of each group, decoded under the same conditions: the shares of all genes, twice.
Pairs come in blocks, as often as they are asked for, so that all of them are never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.floating[Any]]
Pairs = Callable[[], Iterator[tuple[Floats, Floats]]]
"""Gives the pairs anew at each call: shares in the first and the second group, (n, n_genes)."""

Sides = Literal["three", "two"]

EPSILON = 1e-8
"""Added to probabilities before their logarithm, as scvi-tools does: no |K| above 18.4."""

LEAST_PSEUDOCOUNT = 1e-10
MEMORY = 256 * 2**20
"""Bytes that the pairs' shares of some genes may take at a time."""


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """What was counted in a group of cells, whatever the model.

    Attributes
    ----------
    n_cells
        How many there are; the sum of their weights, where cells have weights.
    raw_mean
        Mean count of each gene: float64, (n_genes,); NaN where no cell's study measured it.
    non_zeros_proportion
        Share of the cells that have the gene at all.
    raw_normalized_mean
        Mean of the counts per 10,000 of the modelled genes.
    """

    n_cells: float
    raw_mean: npt.NDArray[np.float64]
    non_zeros_proportion: npt.NDArray[np.float64]
    raw_normalized_mean: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scales:
    """What one pass over the pairs finds, each (n_genes,).

    Attributes
    ----------
    higher
        Share of the pairs in which the first group's share of the gene is above the second's.
    mean1, mean2, max1, max2
        Of the shares in the two groups.
    n_pairs
        How many there are.
    """

    higher: npt.NDArray[np.float64]
    mean1: npt.NDArray[np.float64]
    mean2: npt.NDArray[np.float64]
    max1: npt.NDArray[np.float64]
    max2: npt.NDArray[np.float64]
    n_pairs: int


def summarise(pairs: Pairs) -> Scales:
    """Go through the pairs once."""
    higher, sum1, sum2, max1, max2 = np.zeros((5, 1))  # of all genes from the first block on
    n_pairs = 0
    for one, other in pairs():
        higher = higher + (one > other).sum(axis=0)
        sum1 = sum1 + one.sum(axis=0, dtype=np.float64)
        sum2 = sum2 + other.sum(axis=0, dtype=np.float64)
        max1, max2 = np.maximum(max1, one.max(axis=0)), np.maximum(max2, other.max(axis=0))
        n_pairs += len(one)
    return Scales(higher / n_pairs, sum1 / n_pairs, sum2 / n_pairs, max1, max2, n_pairs)


def bayes_factor(probability: Floats) -> npt.NDArray[np.float64]:
    """``K = log p(H1) / p(H2)``, natural, of a probability of H1 and its complement.

    Finite also where all pairs agree (:data:`EPSILON`). Above 3 the evidence for H1 is strong,
    below -3 that for H2 (scVI, Lopez et al. 2018, Methods 4.3).
    """
    p = np.asarray(probability, np.float64)
    return np.log(p + EPSILON) - np.log(1 - p + EPSILON)


def vanilla(
    pairs: Pairs, scales: Scales, *, pseudocount: float, fdr: float = 0.05, memory: int = MEMORY
) -> pd.DataFrame:
    """Which group expresses each gene at a higher share (scVI, Lopez et al. 2018, Methods 4.3).

    The probability of H1 is that over pairs of cells, one of each group, and over the conditions
    that they were decoded under. A discovery is a gene said to be higher in the group in which it
    is likelier to be, so a false one is a wrong direction: the expected rate is of these.

    Parameters
    ----------
    pairs, scales, pseudocount, fdr, memory
        As for :func:`change`; the pseudocount is in the log fold changes only.

    Returns
    -------
    DataFrame
        A row for each gene: ``proba_m1``, ``proba_m2``, ``bayes_factor``, ``scale1``, ``scale2``,
        the LFC as in :func:`change`, ``expected_fdr``, ``is_de_fdr_…``.
    """
    found = _all_changes(pairs, scales, pseudocount, 0.0, memory)
    p = scales.higher
    return pd.DataFrame(
        {
            "proba_m1": p,
            "proba_m2": 1 - p,
            "bayes_factor": bayes_factor(p),
            "scale1": scales.mean1,
            "scale2": scales.mean2,
            **{name: values for name, values in found.items() if name.startswith("lfc_")},
            **_called(np.maximum(p, 1 - p), fdr),
        }
    )


def change(
    pairs: Pairs,
    scales: Scales,
    *,
    pseudocount: float,
    delta: float = 0.25,
    sides: Sides = "three",
    fdr: float = 0.05,
    memory: int = MEMORY,
) -> pd.DataFrame:
    """By how much each gene's share differs (Boyeau et al. 2019; columns as in scvi-tools).

    The log fold change of a pair is ``log2(share1 + pseudocount) - log2(share2 + pseudocount)``.

    Parameters
    ----------
    pairs
        The pairs; asked for again for each block of genes.
    scales
        What :func:`summarise` found in them.
    pseudocount
        Added to shares, so that noise in genes near 0 is no change; see :func:`pseudocount_of`.
    delta
        Log fold changes below it are no difference.
    sides
        ``"three"``: the probability of a difference is the larger of those of LFC ≥ delta and
        LFC < -delta, which two like groups of unlike cells keep below a half. ``"two"``: their sum,
        p(|LFC| ≥ delta).
    fdr
        Expected false discovery rate that the genes of ``is_de_fdr_…`` keep to.
    memory
        Bytes for shares.

    Returns
    -------
    DataFrame
        A row for each gene: ``proba_de``, ``proba_not_de``, ``bayes_factor``, ``scale1``,
        ``scale2``, ``pseudocounts``, ``delta``, mean, median, standard deviation and extremes of
        the LFC (with a thousandth of the pseudocount), ``expected_fdr``, ``is_de_fdr_…``.
    """
    found = _all_changes(pairs, scales, pseudocount, delta, memory)
    above, below = found.pop("above"), found.pop("below")
    p = np.maximum(above, below) if sides == "three" else above + below
    return pd.DataFrame(
        {
            "proba_de": p,
            "proba_not_de": 1 - p,
            "bayes_factor": bayes_factor(p),
            "scale1": scales.mean1,
            "scale2": scales.mean2,
            "pseudocounts": pseudocount,
            "delta": delta,
            **found,
            **_called(p, fdr),
        }
    )


def _called(probability: Floats, fdr: float) -> dict[str, Any]:
    """The columns that say which genes are called."""
    expected = expected_fdr(probability)
    return {"expected_fdr": expected, f"is_de_fdr_{fdr:g}": expected <= fdr}


def _all_changes(
    pairs: Pairs, scales: Scales, pseudocount: float, delta: float, memory: int
) -> dict[str, npt.NDArray[np.float64]]:
    """What :func:`_changes` finds of all genes, as many at a time as fit in memory."""
    width = max(1, memory // (16 * scales.n_pairs))  # two of shares, two of what is made of them
    parts = [
        _changes(pairs, scales.n_pairs, slice(a, a + width), pseudocount, delta)
        for a in range(0, len(scales.mean1), width)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _changes(
    pairs: Pairs, n_pairs: int, genes: slice, pseudocount: float, delta: float
) -> dict[str, npt.NDArray[np.float64]]:
    """What the log fold changes of some genes are like over the pairs, each (n_genes,)."""
    one: Floats = np.empty((0, 0), np.float32)
    other, done = one, 0
    for block in pairs():
        first, second = block[0][:, genes], block[1][:, genes]
        if not done:
            one = np.empty((n_pairs, first.shape[1]), first.dtype)
            other = np.empty_like(one)
        stop = done + len(first)
        one[done:stop], other[done:stop] = first, second
        done = stop
    lfc = np.log2(one + pseudocount) - np.log2(other + pseudocount)
    above, below = (lfc >= delta).mean(axis=0), (lfc < -delta).mean(axis=0)
    # As scvi-tools: the decision with the pseudocount, the size of the change nearly without.
    little = 1e-3 * pseudocount
    lfc = np.log2(one + little) - np.log2(other + little)
    return {
        "above": above,
        "below": below,
        "lfc_mean": lfc.mean(axis=0, dtype=np.float64),
        "lfc_median": np.median(lfc, axis=0).astype(np.float64),
        "lfc_std": lfc.std(axis=0, dtype=np.float64),
        "lfc_min": lfc.min(axis=0).astype(np.float64),
        "lfc_max": lfc.max(axis=0).astype(np.float64),
    }


def expected_fdr(probability: Floats) -> npt.NDArray[np.float64]:
    """Expected share of false discoveries if a gene and all at least as probable are called.

    The mean of ``1 - p`` over these genes (Boyeau et al. 2019). Genes of equal probability are
    called together.
    """
    p = np.asarray(probability, np.float64)
    order = np.argsort(-p, kind="stable")
    rates = np.cumsum(1 - p[order]) / np.arange(1, len(p) + 1)
    last = np.searchsorted(-p[order], -p[order], side="right") - 1  # of the genes equal to it
    out = np.empty_like(rates)
    out[order] = rates[last]
    return out


def pseudocount_of(
    scales: Scales, counts1: GroupCounts, counts2: GroupCounts, quantile: float = 0.9
) -> float:
    """The pseudocount of :func:`change`, as scvi-tools 1.x estimates it.

    Genes with a mean count below 0.01 in a group count as not expressed there. Of their highest
    shares over the pairs a quantile is taken, of the two groups the larger, over the number of
    genes.
    """
    offsets = [LEAST_PSEUDOCOUNT]
    for highest, counts in ((scales.max1, counts1), (scales.max2, counts2)):
        silent = counts.raw_mean < 0.01
        if silent.any():
            offsets.append(float(np.quantile(highest[silent], quantile)) / len(highest))
    return max(offsets)
