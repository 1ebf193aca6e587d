"""Silhouettes of labels, of isolated labels, and of batches within labels.

As scib-metrics 0.5.10 defines them: ``silhouette_label`` and ``silhouette_batch`` (Luecken et al.
2022, Methods, "Cell type ASW" and "Batch ASW"), and ``isolated_labels``. Each sampled cell is
measured against all cells, so no sample of pairs is drawn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.distances import summed_distances
from atlas.evaluation.estimates import Sample
from atlas.evaluation.vectors import Embedding

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

COINCIDES = 1e-12
"""Mean distances below that, as a share of the largest coordinate, are rounding and count as 0."""


def label_silhouettes(embedding: Embedding, labels: Categories, sample: Sample) -> Floats:
    """Silhouette of each sampled cell's label among all labeled cells.

    Parameters
    ----------
    embedding
        float32, (N, d).
    labels
        Label of every cell, -1 for none.
    sample
        Labeled cells.

    Returns
    -------
    In [-1, 1], and 0 for the only cell of its label: float64, (n,).

    Raises
    ------
    ConfigError
        Fewer than two labels, or a label for every cell.
    """
    counts = labels.counts()
    present = labels.present()
    if not 2 <= len(present) < counts.sum():
        raise ConfigError(
            "labels have no silhouette",
            found=f"{len(present)} labels on {counts.sum()} cells",
            expected="at least two labels, and fewer than cells",
        )
    rows = np.flatnonzero(labels.codes != UNLABELED).astype(np.int64)
    group = np.searchsorted(present, labels.codes)
    sums = summed_distances(embedding, rows, group[rows], len(present), sample.rows)
    return silhouettes(sums, counts[present], group[sample.rows], _least(embedding, sample))


def _least(embedding: Embedding, sample: Sample) -> float:
    return COINCIDES * float(np.abs(embedding[sample.rows]).max(initial=0))


def silhouettes(sums: Floats, sizes: Indices, own: Indices, least: float = 0.0) -> Floats:
    """Silhouettes from summed distances to each group (Rousseeuw 1987; as scikit-learn).

    Parameters
    ----------
    sums
        Summed distances to each group: float64, (n, G).
    sizes
        Cells of each group: int64, (G,).
    own
        Group of each cell: int64, (n,).
    least
        Mean distances below it count as 0.
    """
    cells = np.arange(len(sums))
    within = sums[cells, own] / np.maximum(sizes[own] - 1, 1)
    others = sums / sizes
    others[cells, own] = np.inf
    between = others.min(axis=1)
    within, between = (np.where(d < least, 0.0, d) for d in (within, between))
    largest = np.maximum(within, between)
    defined = (sizes[own] > 1) & (largest > 0)
    return np.where(defined, (between - within) / np.where(largest > 0, largest, 1), 0.0)


def batch_silhouettes(
    embedding: Embedding, labels: Categories, batches: Categories, sample: Sample
) -> Floats:
    """1 - \\|silhouette\\| of each sampled cell's batch among the cells of its label.

    Returns
    -------
    In [0, 1], NaN for cells whose label lies in one batch or has each cell in another:
    float64, (n,).
    """
    values = np.full(len(sample), np.nan)
    least = _least(embedding, sample)
    for label in labels.present():
        asked = np.flatnonzero(labels.codes[sample.rows] == label)
        rows = np.flatnonzero(labels.codes == label).astype(np.int64)
        names, group, sizes = np.unique(
            batches.codes[rows], return_inverse=True, return_counts=True
        )
        if not len(asked) or not 2 <= len(names) < len(rows):
            continue
        queries = sample.rows[asked]
        sums = summed_distances(embedding, rows, group, len(names), queries)
        own = np.searchsorted(names, batches.codes[queries])
        values[asked] = 1 - np.abs(silhouettes(sums, sizes, own, least))
    return values


def isolated_labels(labels: Categories, batches: Categories) -> Indices:
    """Labels that lie in as few batches as any: rising codes (scib-metrics' default rule)."""
    labeled = labels.codes != UNLABELED
    pairs = np.unique(np.stack([labels.codes[labeled], batches.codes[labeled]]), axis=1)
    codes, in_batches = np.unique(pairs[0], return_counts=True)
    return codes[in_batches == in_batches.min()].astype(np.int64) if len(codes) else codes
