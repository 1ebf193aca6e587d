"""k-means of an embedding, and how well its clusters agree with labels or batches.

NMI (arithmetic mean) and ARI as scikit-learn and scib-metrics 0.5.10 define them, from one table of
counts that is added up over all cells. Clusters are found on a sample, from many starts, and each
cell goes to the nearest centre.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import xlogy
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from atlas.errors import ConfigError
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.estimates import Estimate, Sample
from atlas.evaluation.vectors import Embedding, column_means, tiles

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

STARTS = 10
_FIT_CELLS = 20_000


@dataclass(frozen=True, slots=True)
class Clusters:
    """Clusters of all cells.

    Attributes
    ----------
    codes
        int64, (N,).
    n
        Number of clusters asked for.
    """

    codes: Indices
    n: int


def kmeans(
    embedding: Embedding,
    n_clusters: int,
    *,
    rows: Indices | None = None,
    starts: int = STARTS,
    seed: int = 0,
    fit_cells: int = _FIT_CELLS,
) -> Clusters:
    """k-means with many starts on a sample; then every row goes to its nearest centre.

    Where fewer places than clusters are taken, so many clusters come out.

    Parameters
    ----------
    embedding
        float32, (N, d).
    n_clusters
        Clusters, at most as many as rows.
    rows
        Rows to cluster: int64 (n,); all without.
    starts, seed
        Starts, of which the tightest is kept, and their seed.
    fit_cells
        Rows above this number are sampled to find the centres.
    """
    rows = np.arange(len(embedding), dtype=np.int64) if rows is None else rows
    if not 1 <= n_clusters <= len(rows):
        raise ConfigError(
            "so many clusters cannot be made",
            found=f"{n_clusters} clusters of {len(rows)} cells",
            expected=f"1 to {len(rows)}",
        )
    chosen = rows
    if len(rows) > fit_cells:
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(rows, fit_cells, replace=False, shuffle=False))
    # In float64 from the centre: far from it, distances by products lose digits.
    centre = column_means(embedding)
    fitted = KMeans(n_clusters, n_init=starts, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer places than clusters
        fitted.fit(embedding[chosen] - centre)
    centres = np.asarray(fitted.cluster_centers_)
    squares = np.einsum("cd,cd->c", centres, centres)
    codes = np.empty(len(rows), dtype=np.int64)
    for part in tiles(len(rows)):
        codes[part] = (squares - 2 * (embedding[rows[part]] - centre) @ centres.T).argmin(axis=1)
    return Clusters(codes, n_clusters)


def contingency(clusters: Indices, categories: Categories) -> Indices:
    """Cells by category and cluster, those without a category left out: int64 (C, K)."""
    n_clusters = int(clusters.max()) + 1 if len(clusters) else 1
    table = np.zeros(len(categories.names) * n_clusters, dtype=np.int64)
    for part in tiles(len(clusters)):
        own = categories.codes[part]
        known = own != UNLABELED
        table += np.bincount(own[known] * n_clusters + clusters[part][known], minlength=len(table))
    return table.reshape(len(categories.names), n_clusters)


def adjusted_rand(table: Floats) -> float:
    """Adjusted Rand index of a table of counts (Hubert and Arabie 1985); 1 where both are one."""
    n = float(table.sum())
    if n < 2:
        return 1.0
    pairs = float((table * (table - 1.0)).sum()) / 2
    a, b = table.sum(axis=1), table.sum(axis=0)
    rows, columns = float((a * (a - 1.0)).sum()) / 2, float((b * (b - 1.0)).sum()) / 2
    expected = rows * columns / (n * (n - 1) / 2)
    largest = (rows + columns) / 2
    return 1.0 if largest == expected else (pairs - expected) / (largest - expected)


def normalised_mutual_information(table: Floats) -> float:
    """Mutual information over the mean of both entropies; 1 where both are one."""
    shares = table / table.sum()
    a, b = shares.sum(axis=1), shares.sum(axis=0)
    h_a, h_b = -float(xlogy(a, a).sum()), -float(xlogy(b, b).sum())
    if h_a == 0 and h_b == 0:
        return 1.0
    joint = -float(xlogy(shares, shares).sum())
    return max(0.0, 2 * (h_a + h_b - joint) / (h_a + h_b))


def agreement(
    measure: Callable[[Floats], float],
    clusters: Indices,
    categories: Categories,
    sample: Sample,
) -> Estimate:
    """A measure of all cells' table, with its error, the clusters being given.

    The error is that of the infinitesimal jackknife: what one more cell in each field of the table
    changes. How much the clusters differ from start to start it does not tell: where 1,000 cells
    are drawn and clustered anew, 95 % intervals hold their mean in 91 of 100 runs.

    Parameters
    ----------
    measure
        Of a table of counts: :func:`adjusted_rand` or :func:`normalised_mutual_information`.
    clusters
        Cluster of every cell: int64, (N,).
    categories
        Category of every cell, -1 for none.
    sample
        Cells from which the error is reckoned, drawn of those with a category.
    """
    counts = contingency(clusters, categories).astype(np.float64)
    n = counts.sum()
    value = measure(counts)
    slope = np.zeros_like(counts)
    for field in zip(*np.nonzero(counts), strict=True):
        step = max(1e-3 * counts[field], 1e-6 * n)
        more = counts.copy()
        more[field] += step
        slope[field] = (measure(more) - value) / step
    slope -= (counts * slope).sum() / n
    own = categories.codes[sample.rows]
    influence = n * slope[own, clusters[sample.rows]]
    return Estimate(value, influence, sample.of_all(), int(n))
