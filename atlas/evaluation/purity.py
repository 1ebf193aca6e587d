"""What each batch keeps of its own structure: kNN purity, and conservation of k-means clusters.

scANVI (Xu et al. 2021), Methods: each batch is embedded on its own, and the neighbours of a cell
there are compared with those in the joint embedding, both searched within the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError
from atlas.evaluation.clustering import adjusted_rand, agreement, kmeans
from atlas.evaluation.codes import Categories
from atlas.evaluation.estimates import Estimate, Sample, draw
from atlas.evaluation.neighbours import Backend, Neighbours, Recall, nearest
from atlas.evaluation.vectors import Embedding, rows_of

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

LEAST_RECALL = 0.995
_ERROR_CELLS = 20_000


def overlap(ours: Neighbours, theirs: Neighbours) -> Floats:
    """Jaccard index of two lists of neighbours for each query: float64, (n,).

    Raises
    ------
    ConfigError
        A list whose recall is below .995 or not known: two searches at .92 give .85 where the
        truth is 1.
    """
    for found in (ours, theirs):
        if found.recall is None or found.recall.value < LEAST_RECALL:
            known = "not known" if found.recall is None else f"{found.recall.value:.3f}"
            raise ConfigError(
                "purity cannot be told from neighbours that may be the wrong ones",
                found=f"recall {known} ({found.backend})",
                expected=f"at least {LEAST_RECALL}",
                do="search exactly",
            )
    both = np.concatenate([np.sort(ours.indices, axis=1), np.sort(theirs.indices, axis=1)], axis=1)
    both.sort(axis=1, kind="stable")
    shared = (both[:, 1:] == both[:, :-1]).sum(axis=1)
    union = ours.k + theirs.k - shared
    return np.asarray(shared / union, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Purity:
    """kNN purity of the sampled cells.

    Attributes
    ----------
    values
        Jaccard index of each cell, NaN in batches that are too small: float64, (n,).
    too_small
        Batches of k cells or fewer, which are left out.
    backend, recall
        What searched, and the least recall of its searches.
    """

    values: Floats
    too_small: tuple[str, ...]
    backend: str
    recall: Recall | None


def purity(
    embedding: Embedding,
    individual: Embedding,
    batches: Categories,
    sample: Sample,
    k: int,
    *,
    backend: Backend = "auto",
) -> Purity:
    """Jaccard index of the k neighbours within the batch, in both embeddings, searched exactly.

    Parameters
    ----------
    embedding, individual
        The joint embedding, and that of each batch on its own: float32, (N, d) and (N, e). Only
        distances within a batch matter, so those of all batches lie in one array.
    batches
        Batch of every cell.
    sample
        Cells to ask.
    k
        Neighbours of each.
    backend
        Of :func:`atlas.evaluation.neighbours.nearest`.
    """
    if len(individual) != len(embedding):
        raise ConfigError(
            "the batches' own embeddings are not of these cells",
            found=f"{len(individual)} cells",
            expected=f"{len(embedding)}, in the same order",
        )
    values = np.full(len(sample), np.nan)
    too_small, used = [], ""
    recall: Recall | None = None
    for batch in batches.present():
        rows = np.flatnonzero(batches.codes == batch).astype(np.int64)
        if len(rows) <= k:
            too_small.append(batches.names[batch])
            continue
        asked = np.flatnonzero(batches.codes[sample.rows] == batch)
        if not len(asked):
            continue
        own = np.searchsorted(rows, sample.rows[asked])
        found = [
            nearest(rows_of(z, rows), z[sample.rows[asked]], k, own, backend=backend)
            for z in (embedding, individual)
        ]
        values[asked] = overlap(*found)
        used = found[0].backend
        told = [each.recall for each in found if each.recall is not None]
        recall = min(told if recall is None else [recall, *told], key=lambda r: r.value)
    return Purity(values, tuple(too_small), used, recall)


def cluster_conservation(
    embedding: Embedding,
    individual: Embedding,
    batches: Categories,
    n_clusters: int,
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """ARI of k-means clusters in the joint and in each batch's own embedding, by batch.

    Batches with fewer than two cells to a cluster are left out. The errors are of cells, with both
    sets of clusters given.
    """
    out = {}
    names = [str(i) for i in range(n_clusters)]
    for batch in batches.present():
        rows = np.flatnonzero(batches.codes == batch).astype(np.int64)
        if len(rows) < 2 * n_clusters:
            continue
        joint = kmeans(embedding, n_clusters, rows=rows, seed=seed)
        own = kmeans(individual, n_clusters, rows=rows, seed=seed)
        places = np.arange(len(rows), dtype=np.int64)
        sample = draw(places, np.zeros_like(places), _ERROR_CELLS, seed)
        found = agreement(adjusted_rand, joint.codes, Categories(own.codes, names), sample)
        out[batches.names[batch]] = found
    return out
