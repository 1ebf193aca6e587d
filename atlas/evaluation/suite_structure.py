"""What an embedding keeps of another view of the same cells: a batch by itself, or proteins."""

from __future__ import annotations

import numpy as np

from atlas.evaluation.catalogue import Result, kind
from atlas.evaluation.cells import Cells, by_group, unasked
from atlas.evaluation.estimates import Sample, draw, mean, mean_of_groups
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
        result = Result(name, estimate, k, found.backend, note=note)
        sample, values = cells.sample, found.values
        groups = list(
            by_group(values, sample, cells, result, batches=True, labels=False, without=why)
        )
    else:
        result = Result(name, None, k, skipped=f"no batch has more than {k} cells")
        groups = [Result(name, None, k, skipped=why, of=f"batch {b}") for b in found.too_small]
    n_clusters = len(cells.labels.present()) if cells.has_labels and cells.labels else 10
    conserved = cluster_conservation(
        cells.embedding, individual, cells.batches, max(2, n_clusters), seed=cells.seed
    )
    conservation = kind("cluster_conservation")
    few = f"{max(2, n_clusters)} clusters need at least twice as many cells"
    names = [cells.batches.names[code] for code in cells.batches.present()]
    left_out = [name for name in names if name not in conserved]
    groups += [Result(conservation, None, skipped=few, of=f"batch {name}") for name in left_out]
    if not conserved:
        return [result, Result(conservation, None, skipped="batches are too small")], groups
    values = np.array(list(conserved.values()))
    rows = np.arange(len(values), dtype=np.int64)
    drawn = Sample(rows, np.zeros_like(rows), np.array([len(rows)]))
    over_batches = Result(conservation, mean(values, drawn), backend="scikit-learn")
    return [result, over_batches], groups


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
        Result(kind(name, k), estimate, k, found.backend)
        for name, estimate in zip(names, estimates, strict=True)
    ]
    return results, list(
        by_group(found.values, sample, cells, results[0], batches=True, labels=True)
    )
