"""What an embedding keeps of another view of the same cells: a batch by itself, or proteins."""

from __future__ import annotations

import numpy as np

from atlas.evaluation.catalogue import Result, kind
from atlas.evaluation.cells import MOST_GROUPS, Cells, by_group, too_many, unasked
from atlas.evaluation.estimates import draw, mean, mean_of, mean_of_groups
from atlas.evaluation.proteins import measured, protein_overlap
from atlas.evaluation.purity import cluster_conservation, purity
from atlas.evaluation.vectors import Embedding


def purity_results(
    cells: Cells, individual: Embedding, k: int
) -> tuple[list[Result], list[Result]]:
    """kNN purity and k-means conservation against the batches' own embeddings."""
    found = purity(
        cells.embedding, individual, cells.batches, cells.sample, k, backend=cells.backend
    )
    name, defined = kind("purity", k), np.isfinite(found.values)
    why = f"{k} neighbours within it need at least {k + 1} cells"
    if defined.any():
        batch = np.where(defined, cells.batches.codes[cells.sample.rows], -1)
        estimate = mean_of_groups(np.nan_to_num(found.values), batch, cells.sample)
        everyone = np.arange(len(cells.embedding), dtype=np.int64)
        note = unasked(cells.batches, everyone, cells.sample.rows, "batch")
        result = Result(name, estimate, k, found.backend, found.recall, note=note)
        sample, values = cells.sample, found.values
        groups = list(
            by_group(values, sample, cells, result, batches=True, labels=False, without=why)
        )
    else:
        result = Result(name, None, k, skipped=f"no batch has more than {k} cells")
        groups = [Result(name, None, k, skipped=why, of=f"batch {b}") for b in found.too_small]
    conserved, of_batches = _conservation_results(cells, individual)
    return [result, conserved], [*groups, *of_batches]


def _conservation_results(cells: Cells, individual: Embedding) -> tuple[Result, list[Result]]:
    """k-means conservation, averaged over batches, and of each."""
    n_labels = 0 if cells.labels is None else len(cells.labels.present())
    n_clusters = max(2, n_labels or 10)
    found = cluster_conservation(
        cells.embedding, individual, cells.batches, n_clusters, seed=cells.seed
    )
    name, by = kind("cluster_conservation"), "scikit-learn"
    few = f"{n_clusters} clusters need at least twice as many cells"
    present = cells.batches.present()
    if len(present) > MOST_GROUPS:
        why = too_many("batch", len(present))
        groups = [Result(name, None, skipped=why, of="batch *")]
    else:
        groups = [
            Result(name, found[batch], backend=by, of=f"batch {batch}")
            if batch in found
            else Result(name, None, skipped=few, of=f"batch {batch}")
            for batch in (cells.batches.names[code] for code in present)
        ]
    if not found:
        return Result(name, None, skipped="batches are too small"), groups
    return Result(name, mean_of(list(found.values())), backend=by), groups


def protein_results(cells: Cells, proteins: Embedding, k: int) -> tuple[list[Result], list[Result]]:
    """Neighbours that cells have in common by proteins and in the embedding."""
    names = ("protein_overlap", "protein_fold_enrichment", "protein_spearman")
    rows = measured(proteins)
    if len(rows) <= k:
        why = f"{k} neighbours need at least {k + 1} cells with proteins, and there are {len(rows)}"
        return [Result(kind(name, k), None, k, skipped=why) for name in names], []
    sample = draw(rows, cells.strata[rows], cells.max_queries, cells.seed)
    found = protein_overlap(cells.embedding, proteins, sample.rows, k, backend=cells.backend)
    share = mean(found.values, sample)
    density = k / found.n_cells
    estimates = (
        share,
        share.scaled(1 / density),
        share.scaled(1 / (1 - density), -density / (1 - density)),
    )
    results = [
        Result(kind(name, k), estimate, k, found.backend, found.recall)
        for name, estimate in zip(names, estimates, strict=True)
    ]
    return results, list(
        by_group(found.values, sample, cells, results[0], batches=True, labels=True)
    )
