"""Labels carried from annotated cells to others by nearest neighbours, and their accuracy.

Two votes: the plain majority (scANVI, Xu et al. 2021, Methods), and scArches' weighted one with an
uncertainty (Lotfollahi et al. 2022, Methods, "Cell type annotation"), which may answer Unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.estimates import Sample, draw
from atlas.evaluation.kernels import kernel_weights
from atlas.evaluation.neighbours import Backend, Embedding, Neighbours, nearest
from atlas.evaluation.vectors import Distances, rows_of

Codes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

UNCERTAIN_ABOVE = 0.5


@dataclass(frozen=True, slots=True)
class Vote:
    """Labels predicted for queries.

    Attributes
    ----------
    codes
        Predicted label, or -1 for Unknown: int64, (n_queries,).
    uncertainty
        1 - P of the best label, in [0, 1): float64, (n_queries,).
    """

    codes: Codes
    uncertainty: npt.NDArray[np.float64]


def majority_vote(labels: Codes, n_labels: int) -> Vote:
    """The most frequent label among the neighbours; of equally frequent ones the nearest.

    Parameters
    ----------
    labels
        Labels of each query's neighbours, nearest first: int64, (n_queries, k).
    n_labels
        Number of labels.
    """
    weights = np.full(labels.shape, 1 / labels.shape[1])
    return _vote(labels, weights, n_labels)


def weighted_vote(labels: Codes, distances: Distances, n_labels: int) -> Vote:
    """scArches' vote: neighbours weighted by a kernel of their distance, Unknown where unsure.

    P of a label is the sum of the weights (:func:`atlas.evaluation.kernels.kernel_weights`,
    ``"scarches"``) of the neighbours that have it, u = 1 - P of the best label, and u above .5 is
    Unknown.

    Parameters
    ----------
    labels
        Labels of each query's neighbours, nearest first: int64, (n_queries, k).
    distances
        Their Euclidean distances: (n_queries, k).
    n_labels
        Number of labels.
    """
    vote = _vote(labels, kernel_weights(distances, "scarches"), n_labels)
    return Vote(
        np.where(vote.uncertainty > UNCERTAIN_ABOVE, UNLABELED, vote.codes), vote.uncertainty
    )


def _vote(labels: Codes, weights: npt.NDArray[np.float64], n_labels: int) -> Vote:
    n_queries, k = labels.shape
    codes = np.empty(n_queries, dtype=np.int64)
    probability = np.empty(n_queries)
    tile = max(1, 2**22 // max(n_labels, k))
    for start in range(0, n_queries, tile):
        part = labels[start : start + tile]
        cell = np.arange(len(part))
        keys = (part + cell[:, None] * n_labels).ravel()
        sums = np.bincount(
            keys, weights=weights[start : start + tile].ravel(), minlength=len(part) * n_labels
        ).reshape(len(part), n_labels)
        best = sums.max(axis=1)
        # Equal sums may differ in the last bits, being added in another order.
        tied = np.take_along_axis(sums, part, axis=1) >= best[:, None] * (1 - 1e-12)
        codes[start : start + tile] = part[cell, tied.argmax(axis=1)]
        probability[start : start + tile] = best
    return Vote(codes, np.clip(1 - probability, 0, 1))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often predicted labels are right.

    Attributes
    ----------
    accuracy
        Share of the query cells whose prediction is their label. Unknown is never right.
    weighted_accuracy
        Mean over the labels that query cells have of the share predicted right (scANVI, Methods).
    accuracy_error, weighted_accuracy_error
        Binomial standard errors; a label with all or none of its cells right adds nothing to the
        second, so with few cells per label it is too small.
    unknown_share
        Share of the query cells answered Unknown.
    """

    accuracy: float
    accuracy_error: float
    weighted_accuracy: float
    weighted_accuracy_error: float
    unknown_share: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of query cells by label (rows) and predicted label (columns).

    Attributes
    ----------
    truth, predicted
        Names of rows and columns: the labels that query cells have, and those that were predicted.
    counts
        int64, (n_truth, n_predicted).
    """

    truth: tuple[str, ...]
    predicted: tuple[str, ...]
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LabelTransfer:
    """Result of carrying labels from reference cells to query cells.

    Labels that no reference cell has cannot be predicted. Query cells with such a label count as
    wrong in every accuracy, and such labels enter the weighted accuracy with 0.

    Attributes
    ----------
    majority, weighted
        Accuracy of the plain vote, and of scArches' weighted vote with Unknown.
    query_only_share
        Share of all query cells, asked or not, whose label no reference cell has.
    query_only_labels
        Those labels.
    confusion
        Of the plain vote.
    n_cells, n_reference, k
        Query cells, labeled reference cells, neighbours of each.
    leave_one_out
        Whether reference and query are the same cells, each one's own label kept from it.
    sample
        The query cells.
    truth, predicted, predicted_weighted
        Their label, and what both votes say, -1 for Unknown: int64, (n_cells,).
    backend
        What searched.
    """

    majority: Accuracy
    weighted: Accuracy
    query_only_share: float
    query_only_labels: tuple[str, ...]
    confusion: Confusion
    n_cells: int
    n_reference: int
    k: int
    leave_one_out: bool
    sample: Sample
    truth: Codes
    predicted: Codes
    predicted_weighted: Codes
    backend: str


def score(truth: Codes, predicted: Codes) -> Accuracy:
    """Compare predicted with true labels.

    Parameters
    ----------
    truth
        Label of each query cell, none of them -1: int64, (n_queries,), at least one.
    predicted
        Predicted label, -1 for Unknown: int64, (n_queries,).
    """
    right = truth == predicted
    share = float(right.mean())
    _, label, cells = np.unique(truth, return_inverse=True, return_counts=True)
    recall = np.bincount(label, weights=right) / cells
    return Accuracy(
        accuracy=share,
        accuracy_error=math.sqrt(share * (1 - share) / len(truth)),
        weighted_accuracy=float(recall.mean()),
        weighted_accuracy_error=math.sqrt((recall * (1 - recall) / cells).sum()) / len(cells),
        unknown_share=float((predicted == UNLABELED).mean()),
    )


def confusion_matrix(truth: Codes, predicted: Codes, names: tuple[str, ...]) -> Confusion:
    """Count query cells by true and predicted label, none of them -1."""
    rows, row = np.unique(truth, return_inverse=True)
    columns, column = np.unique(predicted, return_inverse=True)
    counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
    np.add.at(counts, (row, column), 1)
    return Confusion(tuple(names[i] for i in rows), tuple(names[i] for i in columns), counts)


def label_accuracy(
    embedding: Embedding,
    labels: Categories,
    reference: Mask | None = None,
    query: Mask | None = None,
    *,
    k: int = 50,
    max_queries: int = 20_000,
    seed: int = 0,
    strata: Codes | None = None,
    found: Neighbours | None = None,
    backend: Backend = "auto",
) -> LabelTransfer:
    """Carry labels from reference to query cells by their k nearest neighbours, and score them.

    Unlabeled cells neither vote nor are scored. With neither mask, every labeled cell is both
    reference and query, its own label left out. With one of them, the other is the remaining cells.

    Parameters
    ----------
    embedding
        float32, (n_cells, d).
    labels
        Label of every cell, -1 for none.
    reference, query
        Cells whose labels vote, and cells whose labels are predicted: bool, (n_cells,), disjoint.
    k
        Neighbours that vote.
    max_queries
        Query cells above this number are sampled; the reference never is.
    seed
        Of the sample.
    strata
        Stratum of every cell, from which query cells are drawn in proportion: int64, (n_cells,);
        all are one without.
    found
        Their neighbours among all cells, where all are labeled and both reference and query, and
        they were searched before for the same draw.
    backend
        Of :func:`atlas.evaluation.neighbours.nearest`.

    Raises
    ------
    ConfigError
        Masks that overlap or leave no labeled cell on a side, or fewer than k reference cells.
    """
    labeled = labels.codes != UNLABELED
    leave_one_out = reference is None and query is None
    if leave_one_out:
        voting = asked = np.flatnonzero(labeled).astype(np.int64)
    else:
        if reference is None:
            reference = ~np.asarray(query)
        if query is None:
            query = ~reference
        _check_masks(labeled, reference, query)
        voting = np.flatnonzero(labeled & reference).astype(np.int64)
        asked = np.flatnonzero(labeled & query).astype(np.int64)
    known = np.isin(labels.codes[asked], labels.codes[voting])
    alone = np.unique(labels.codes[asked[~known]])
    sample = draw(
        asked, np.zeros_like(asked) if strata is None else strata[asked], max_queries, seed
    )
    asked = sample.rows
    if found is not None and leave_one_out and len(voting) == len(labels):
        found = found.first(k)
    else:
        found = nearest(
            rows_of(embedding, voting),
            embedding[asked],
            k,
            np.searchsorted(voting, asked) if leave_one_out else None,
            backend=backend,
        )
    truth = labels.codes[asked]
    votes = labels.codes[voting][found.indices]
    plain = majority_vote(votes, len(labels.names))
    weighted = weighted_vote(votes, found.distances, len(labels.names))
    return LabelTransfer(
        majority=score(truth, plain.codes),
        weighted=score(truth, weighted.codes),
        query_only_share=float(1 - known.mean()),
        query_only_labels=tuple(labels.names[code] for code in alone),
        confusion=confusion_matrix(truth, plain.codes, labels.names),
        n_cells=len(asked),
        n_reference=len(voting),
        k=k,
        leave_one_out=leave_one_out,
        sample=sample,
        truth=truth,
        predicted=plain.codes,
        predicted_weighted=weighted.codes,
        backend=found.backend,
    )


def _check_masks(labeled: Mask, reference: Mask, query: Mask) -> None:
    both = int((reference & query).sum())
    if both:
        raise ConfigError(
            "reference and query share cells",
            found=f"{both} cells in both",
            expected="disjoint cells, as a cell would find itself",
            do="choose reference and query so that they do not overlap",
        )
    for name, mask in (("reference", reference), ("query", query)):
        if not (labeled & mask).any():
            raise ConfigError(
                f"the {name} has no labeled cell",
                found=f"{int(mask.sum())} cells, all unlabeled",
                expected="labeled cells on both sides",
            )
