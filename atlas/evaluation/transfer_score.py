"""How well transferred labels, and Unknown, agree with labels that query cells have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from atlas.evaluation.calibration import is_or_lies_below
from atlas.evaluation.codes import UNLABELED
from atlas.evaluation.knn_labels import Codes, Floats, Tree
from atlas.evaluation.labels import Accuracy, Confusion, confusion_matrix, score

Mask = npt.NDArray[np.bool_]

UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True, eq=False)
class Transferred:
    """What labelled query cells got.

    Attributes
    ----------
    truth
        Their own label, a node, or a number above those of the nodes: int64 (n_cells,).
    known
        Whether the reference has that label: bool (n_cells,).
    path
        The label at each level: int64 (n_cells, n_levels), nodes.
    unknown
        Whether it is Unknown at that level: bool (n_cells, n_levels).
    uncertainty, distance
        u at the finest level, and the distance score: float64 (n_cells,).
    sets
        Labels that are in the set of each: bool (n_cells, n_leaves); None without sets.
    misfit
        float64 (n_cells,), NaN where it is not known; None where it was not asked for.
    """

    truth: Codes
    known: Mask
    path: Codes
    unknown: Mask
    uncertainty: Floats
    distance: Floats
    sets: Mask | None
    misfit: Floats | None = None


@dataclass(frozen=True, slots=True)
class QueryScore:
    """Agreement with the labels that query cells have.

    *Known* cells are those whose label the reference has, *unseen* ones the others. A label is
    right where it is the cell's own or lies below it. None stands where there are no such cells.

    Attributes
    ----------
    n_known, n_unseen, unseen_labels
        Cells of either kind, and the labels that the reference lacks.
    accuracy
        Of the known cells at the finest level, Unknown never being right.
    levels
        The same at each level of a hierarchy, coarsest first, of the known cells that have a label
        at that level; empty without one.
    answered_accuracy
        Share right of the known cells that are not Unknown.
    false_unknown, unseen_unknown
        Share of the known, and of the unseen cells, called Unknown.
    uncertainty_right, uncertainty_wrong, uncertainty_unseen
        Mean u of known cells whose label is right (Unknown or not) or wrong, and of unseen cells.
    uncertainty_auroc, distance_auroc, misfit_auroc
        How well u, the distance and the misfit (of cells that have one) tell unseen cells from
        known ones: .5 by chance, 1 at best.
    covered, mean_set_size
        Share of the known cells whose set holds their label, and labels in a set.
    confusion
        Of all labelled cells, by label and label given, Unknown among them.
    """

    n_known: int
    n_unseen: int
    unseen_labels: tuple[str, ...]
    accuracy: Accuracy | None
    levels: tuple[Accuracy, ...]
    answered_accuracy: float | None
    false_unknown: float | None
    unseen_unknown: float | None
    uncertainty_right: float | None
    uncertainty_wrong: float | None
    uncertainty_unseen: float | None
    uncertainty_auroc: float | None
    distance_auroc: float | None
    misfit_auroc: float | None
    covered: float | None
    mean_set_size: float | None
    confusion: Confusion


def score_query(given: Transferred, tree: Tree, names: tuple[str, ...]) -> QueryScore:
    """Compare labels given with those that cells have.

    Parameters
    ----------
    given
        Of the labelled query cells, one at least.
    tree
        The labels.
    names
        Of its nodes, and of the labels beyond.
    """
    known, unseen = given.known, ~given.known
    label, unknown = given.path[:, -1], given.unknown[:, -1]
    right = is_or_lies_below(label, given.truth, tree)
    column = len(names)
    truths = _by_level(given.truth, tree)
    levels = []
    for level in range(tree.n_levels if tree.n_levels > 1 else 0):
        rows = known & (truths[:, level] >= 0)
        said = np.where(given.unknown[:, level], UNLABELED, given.path[:, level])
        if rows.any():
            levels.append(score(truths[rows, level], said[rows]))
    covered = size = None
    if given.sets is not None:
        leaf = known & np.isin(given.truth, tree.leaves)
        own = np.searchsorted(tree.leaves, given.truth[leaf])
        covered, size = _mean(given.sets[leaf, own]), _mean(given.sets[leaf].sum(axis=1))
    # a label right below the cell's own counts as that
    said = np.where(unknown, UNLABELED, np.where(right, given.truth, label))

    def told_apart(by: Floats | None) -> float | None:
        if by is None:
            return None
        rows = ~np.isnan(by)
        both = known[rows].any() and unseen[rows].any()
        return float(roc_auc_score(unseen[rows], by[rows])) if both else None

    return QueryScore(
        n_known=int(known.sum()),
        n_unseen=int(unseen.sum()),
        unseen_labels=tuple(names[node] for node in np.unique(given.truth[unseen])),
        accuracy=score(given.truth[known], said[known]) if known.any() else None,
        levels=tuple(levels),
        answered_accuracy=_mean(right[known & ~unknown]),
        false_unknown=_mean(unknown[known]),
        unseen_unknown=_mean(unknown[unseen]),
        uncertainty_right=_mean(given.uncertainty[known & right]),
        uncertainty_wrong=_mean(given.uncertainty[known & ~right]),
        uncertainty_unseen=_mean(given.uncertainty[unseen]),
        uncertainty_auroc=told_apart(given.uncertainty),
        distance_auroc=told_apart(given.distance),
        misfit_auroc=told_apart(given.misfit),
        covered=covered,
        mean_set_size=size,
        confusion=confusion_matrix(
            given.truth, np.where(unknown, column, label), (*names, UNKNOWN)
        ),
    )


def _by_level(nodes: Codes, tree: Tree) -> Codes:
    """The node at each level above some nodes, -1 where they have none: int64 (n, n_levels)."""
    n_nodes = len(tree.parents)
    out = np.full((n_nodes + 1, tree.n_levels), -1, np.int64)
    leaves = set(tree.leaves)
    for node in range(n_nodes):
        way = [node]
        while (parent := tree.parents[way[0]]) >= 0:
            way.insert(0, parent)
        out[node, : len(way)] = way
        if node in leaves:
            out[node, len(way) :] = node
    return out[np.minimum(nodes, n_nodes)]


def _mean(values: Mask | Codes | Floats) -> float | None:
    return float(values.mean()) if len(values) else None
