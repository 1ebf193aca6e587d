"""BRAS: how little the batches of a label lie apart, by cosine distance.

As scib-metrics 0.5.10 defines ``bras`` (Rautenstrauch and Ohler 2025): a silhouette in which all
other batches of the label are taken together. No pairs are needed, as the mean cosine distance to a
set is that to the mean of its unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.estimates import GroupMeans, Sample
from atlas.evaluation.silhouette import COINCIDES
from atlas.evaluation.vectors import Embedding, tiles

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _UnitSums:
    """Summed unit vectors of each label and batch, and what distances follow from them.

    The mean cosine distance of a cell to n others is 1 less the product of its unit vector with
    their mean.

    Attributes
    ----------
    of
        Sum of each label's cells in each batch: float64 (L, B, d).
    sizes
        Cells of each: int64 (L, B).
    """

    of: Floats
    sizes: Indices

    @property
    def defined(self) -> npt.NDArray[np.bool_]:
        """Labels with several cells in a batch and cells in two at least: bool (L,)."""
        in_batches = (self.sizes > 0).sum(axis=1)
        return np.asarray((in_batches >= 2) & (in_batches < self.sizes.sum(axis=1)))

    def distances(self, unit: Floats, label: Indices, batch: Indices) -> tuple[Floats, Floats]:
        """Mean distance of cells to the others of their label and batch, and to those of the rest.

        Cells at the origin are at distance 1 from all, themselves included, as scikit-learn has it;
        scib-metrics gives NaN there.
        """
        n_own = self.sizes[label, batch]
        n_others = self.sizes.sum(axis=1)[label] - n_own
        own = _products(unit, self.of[label, batch])
        others = _products(unit, self.of.sum(axis=1)[label]) - own
        itself = _products(unit, unit)
        within = (n_own - own - (1 - itself)) / np.maximum(n_own - 1, 1)
        return within, (n_others - others) / np.maximum(n_others, 1)


def _unit_sums(embedding: Embedding, labels: Categories, batches: Categories) -> _UnitSums:
    shape = (len(labels.names), len(batches.names))
    n_groups, d = shape[0] * shape[1], embedding.shape[1]
    sums = np.zeros((n_groups, d))
    sizes = np.zeros(n_groups, dtype=np.int64)
    for part in tiles(len(embedding)):
        labeled = labels.codes[part] != UNLABELED
        group = (labels.codes[part] * shape[1] + batches.codes[part])[labeled]
        _add(sums, group, _unit(embedding[part][labeled]))
        sizes += np.bincount(group, minlength=n_groups)
    return _UnitSums(sums.reshape(*shape, d), sizes.reshape(shape))


def _add(sums: Floats, groups: Indices, vectors: Floats) -> None:
    """Add up vectors by group, into float64 (G, d)."""
    for column in range(vectors.shape[1]):
        sums[:, column] += np.bincount(groups, vectors[:, column], minlength=len(sums))


class _Mixed(NamedTuple):
    r"""1 - \|silhouette\|, which is the smaller of two distances over the larger; its slopes."""

    score: Floats
    by_within: Floats
    by_between: Floats


def _mixed(within: Floats, between: Floats, has_company: npt.NDArray[np.bool_]) -> _Mixed:
    # What is left of 1 - 1 where directions are the same is no distance.
    within = np.where(within < COINCIDES, 0.0, within)
    between = np.where(between < COINCIDES, 0.0, between)
    largest, least = np.maximum(within, between), np.minimum(within, between)
    defined = has_company & (largest > 0)
    whole = np.where(defined, largest, 1.0)
    upper, lower = 1 / whole, -least / whole**2
    nearer = within < between
    return _Mixed(
        np.where(defined, least / whole, 1.0),
        np.where(defined, np.where(nearer, upper, lower), 0.0),
        np.where(defined, np.where(nearer, lower, upper), 0.0),
    )


def bras(
    embedding: Embedding, labels: Categories, batches: Categories, sample: Sample
) -> tuple[Indices, GroupMeans]:
    r"""The mean of 1 - \|silhouette\| within each label, of all cells, in two passes over them.

    Labels that lie in one batch, or have each cell in another, have none.

    Each cell moves its label's mean in three ways: by its own score, and by its share in the mean
    of its batch, to which others of the batch are near or far, and in that of the rest, which cells
    of other batches are. The second pass adds up the slopes that the latter two need. Where batches
    are mixed perfectly, scores lie at their upper edge, where slopes mean little.

    Parameters
    ----------
    embedding
        float32, (N, d).
    labels, batches
        Of every cell; labels -1 for none.
    sample
        Labeled cells from which the errors are reckoned.

    Returns
    -------
    Labels that have a value, rising codes, and their means.
    """
    sums = _unit_sums(embedding, labels, batches)
    n_labels, n_batches = sums.sizes.shape
    n_groups, d = n_labels * n_batches, embedding.shape[1]
    totals = np.zeros(n_labels)
    to_own, to_rest = np.zeros((n_groups, d)), np.zeros((n_groups, d))
    own_sum, rest_sum = np.zeros(n_groups), np.zeros(n_groups)
    for part in tiles(len(embedding)):
        label, batch = labels.codes[part], batches.codes[part]
        kept = (label != UNLABELED) & sums.defined[label]
        label, batch = label[kept], batch[kept]
        unit, group = _unit(embedding[part][kept]), label * n_batches + batch
        within, between = sums.distances(unit, label, batch)
        found = _mixed(within, between, sums.sizes[label, batch] > 1)
        totals += np.bincount(label, found.score, minlength=n_labels)
        _add(to_own, group, found.by_within[:, None] * unit)
        _add(to_rest, group, found.by_between[:, None] * unit)
        own_sum += np.bincount(group, found.by_within * (1 - within), minlength=n_groups)
        rest_sum += np.bincount(group, found.by_between * (1 - between), minlength=n_groups)
    codes = np.flatnonzero(sums.defined).astype(np.int64)
    sizes = sums.sizes.sum(axis=1)
    means = totals / sizes.clip(1)
    # One more cell j moves the mean distance of cell i to a set of n cells that j joins by
    # (distance of i and j - that mean) / n; it counts with the slope of i, and all i are added up.
    # The cells of each other batch look at a rest that j joins.
    in_rest = 1 / (sizes[:, None] - sums.sizes).clip(1)
    rest = rest_sum.reshape(n_labels, n_batches) * in_rest
    rest = rest.sum(axis=1, keepdims=True) - rest
    rest_vectors = to_rest.reshape(n_labels, n_batches, d) * in_rest[:, :, None]
    rest_vectors = rest_vectors.sum(axis=1, keepdims=True) - rest_vectors
    label, batch = labels.codes[sample.rows], batches.codes[sample.rows]
    group, unit = label * n_batches + batch, _unit(embedding[sample.rows])
    within, between = sums.distances(unit, label, batch)
    found = _mixed(within, between, sums.sizes[label, batch] > 1)
    itself = 1 - _products(unit, unit)
    own = own_sum[group] - _products(unit, to_own[group]) - found.by_within * (itself - within)
    others = rest[label, batch] - _products(unit, rest_vectors[label, batch])
    influence = found.score - means[label] + own / sums.sizes[label, batch] + others
    defined = sums.defined[label]
    place = np.where(defined, np.searchsorted(codes, label), -1)
    influence = np.where(defined, influence, 0.0)
    return codes, GroupMeans(means[codes], sizes[codes], place, influence, sample)


def _products(first: Floats, second: Floats) -> Floats:
    """Scalar product of each pair of rows: float64 (n,)."""
    return np.asarray(np.einsum("nd,nd->n", first, second))


def _unit(values: Embedding) -> Floats:
    exact = values.astype(np.float64)
    length = np.linalg.norm(exact, axis=1, keepdims=True)
    unit: Floats = exact / np.where(length > 0, length, 1)
    return unit
