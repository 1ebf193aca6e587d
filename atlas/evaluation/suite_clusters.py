"""How well clusters of an embedding agree with labels, and how little with batches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atlas.evaluation.catalogue import Result, kind
from atlas.evaluation.cells import GRAPH_K, Cells
from atlas.evaluation.clustering import (
    adjusted_rand,
    agreement,
    kmeans,
    normalised_mutual_information,
)
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.estimates import Estimate, Sample
from atlas.evaluation.leiden import NEEDED, best_leiden, import_igraph
from atlas.evaluation.neighbours import Neighbours, nearest

Indices = npt.NDArray[np.int64]


def _no_labels(cells: Cells) -> str | None:
    if not cells.has_labels or cells.labels is None:
        return "no cell has a label"
    if len(cells.labels.present()) < 2:
        return "there is only one label"
    return None


def _results(
    cells: Cells, names: tuple[str, str, str], estimates: list[Estimate], k: int | None, by: str
) -> list[Result]:
    """NMI and ARI with labels, 1 - ARI with batches."""
    results = [
        Result(kind(name), estimate, k, backend=by)
        for name, estimate in zip(names, estimates, strict=True)
    ]
    if len(cells.batches.present()) < 2:
        results[2] = Result(kind(names[2]), None, k, skipped="there is only one batch")
    return results


def _agreements(
    clusters: Indices, labels: Categories, batches: Categories, sample: Sample
) -> list[Estimate]:
    return [
        agreement(normalised_mutual_information, clusters, labels, sample),
        agreement(adjusted_rand, clusters, labels, sample),
        agreement(adjusted_rand, clusters, batches, sample).scaled(-1.0, 1.0),
    ]


def kmeans_results(cells: Cells) -> list[Result]:
    """NMI and ARI of k-means with labels and batches."""
    names = ("nmi_kmeans", "ari_kmeans", "ari_batch")
    if reason := _no_labels(cells):
        return [Result(kind(name), None, skipped=reason) for name in names]
    assert cells.labels is not None
    # scib-metrics clusters the cells it is given; those without a label have no part in either.
    rows = cells.labeled_rows
    found = kmeans(cells.embedding, len(cells.labels.present()), rows=rows, seed=cells.seed)
    clusters = np.zeros(len(cells.embedding), dtype=np.int64)
    clusters[rows] = found.codes
    batches = Categories(
        np.where(cells.labels.codes != UNLABELED, cells.batches.codes, UNLABELED),
        cells.batches.names,
    )
    estimates = _agreements(clusters, cells.labels, batches, cells.many_labeled)
    return _results(cells, names, estimates, None, "scikit-learn")


def leiden_results(cells: Cells) -> list[Result]:
    """NMI and ARI of Leiden clusters with labels and batches, at the resolution of the best NMI.

    Of more labeled cells than ``cells.leiden_cells`` a sample is clustered, in the graph of its own
    neighbours, and the result says so. The errors are those of cells with the clusters given: that
    the best of ten resolutions was taken they do not know.
    """
    names = ("nmi_leiden", "ari_leiden", "ari_batch_leiden")
    reason = _no_labels(cells)
    if reason is None and import_igraph() is None:
        reason = NEEDED
    if reason is None and cells.leiden_cells == 0:
        reason = "it was not asked for"
    drawn = None
    if reason is None:
        drawn = cells.drawn_of_labeled(cells.leiden_cells)
        if len(drawn) <= GRAPH_K:
            reason = f"{GRAPH_K} neighbours need at least {GRAPH_K + 1} labeled cells"
    if reason is not None or drawn is None:
        return [Result(kind(name), None, GRAPH_K, skipped=reason) for name in names]
    assert cells.labels is not None
    rows = drawn.rows
    n_labeled = int((cells.labels.codes != UNLABELED).sum())
    labels = cells.labels[rows]
    found = best_leiden(_graph(cells, rows), labels)
    # The clustered cells are all there are, to the measures: rows of the sample.
    places = np.arange(len(rows), dtype=np.int64)
    own = Sample(places, np.zeros_like(places), np.array([len(rows)]))
    estimates = _agreements(found.codes, labels, cells.batches[rows], own)
    by = f"igraph, resolution {found.resolution:g}"
    if len(rows) < n_labeled:
        by += f", a sample of {len(rows):,} of {n_labeled:,} labeled cells"
    return _results(cells, names, estimates, GRAPH_K, by)


def _graph(cells: Cells, rows: Indices) -> Neighbours:
    """Neighbours of some cells among these."""
    if len(rows) == len(cells.embedding):
        ((_, found),) = cells.neighbours_of_all(rows, GRAPH_K)
        return found
    z = cells.embedding[rows]
    own = np.arange(len(rows), dtype=np.int64)
    return nearest(z, z, GRAPH_K, own, backend=cells.backend)
