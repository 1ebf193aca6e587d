"""All measures of one embedding, or of several on the same cells, with their errors.

A measure that the data cannot give (no labels, one batch, fewer cells than neighbours) is listed
without a value and with the reason; it is not an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from atlas.errors import ConfigError
from atlas.evaluation import suite, suite_clusters, suite_structure
from atlas.evaluation.catalogue import Result
from atlas.evaluation.cells import Cells, with_notes
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.index import NeighborIndex
from atlas.evaluation.labels import LabelTransfer, Mask
from atlas.evaluation.metrics import Comparison, Metrics
from atlas.evaluation.neighbours import Backend
from atlas.evaluation.transfer import protocol, transfer_results
from atlas.evaluation.vectors import Embedding, check_values


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, and on how many cells.

    Attributes
    ----------
    mixing_k
        Neighbours for the entropy of batch mixing (scVI and scANVI 50, scArches 15).
    label_k
        Neighbours that vote on a label.
    purity_k
        Neighbours for kNN purity.
    protein_k
        Neighbours for the consistency with proteins (scVI 100).
    seed
        Of the samples.
    max_queries
        Cells above this number are sampled, in proportion to batches and labels, or to labels
        where their combinations are many; they are searched among all cells, so a sample changes
        the error and not what is measured. 5,000 leave a standard error of some .004 nats.
    graph_cells
        Most cells of which all neighbours are searched, for graph connectivity, which is left out
        where there are more. Any number will do; a million take minutes.
    leiden_cells
        Cells above this number are sampled for Leiden, which says so; 0 leaves it out.
    backend
        Of :func:`atlas.evaluation.neighbours.nearest`.
    """

    mixing_k: Sequence[int] = (50, 15)
    label_k: int = 50
    purity_k: int = 15
    seed: int = 0
    max_queries: int = 5000
    graph_cells: int = 1_000_000
    leiden_cells: int = 20_000
    backend: Backend = "auto"
    protein_k: int = 100


def evaluate_embedding(
    embedding: Embedding,
    batches: Categories,
    labels: Categories | None = None,
    *,
    reference: Mask | None = None,
    query: Mask | None = None,
    individual: Embedding | None = None,
    before: Embedding | None = None,
    proteins: Embedding | None = None,
    index: NeighborIndex | None = None,
    mixing_k: Sequence[int] = (50, 15),
    label_k: int = 50,
    purity_k: int = 15,
    seed: int = 0,
    max_queries: int = 5000,
    graph_cells: int = 1_000_000,
    leiden_cells: int = 20_000,
    backend: Backend = "auto",
    protein_k: int = 100,
) -> Metrics:
    """Measure how well an embedding mixes batches and keeps labels apart.

    Parameters
    ----------
    embedding
        float32, (n_cells, d); a memory-mapped array will do.
    batches
        Batch of every cell.
    labels
        Label of every cell, -1 for none; None without any labels.
    reference, query
        Cells whose labels are carried over, and cells they are carried to: bool, (n_cells,). With
        neither, each labeled cell is predicted from all the others; with one of them, the other
        is the remaining cells.
    individual
        Embeddings of the batches on their own, all in one array: float32, (n_cells, e). Gives kNN
        purity and k-means conservation.
    before
        An embedding before integration, as PCA: float32, (n_cells, p). Gives the PCR comparison.
    proteins
        Proteins of the same cells, as :func:`atlas.evaluation.proteins.centred_log_ratio` gives
        them, rows of NaN for cells without: float32, (n_cells, q). Gives the common neighbours.
    index
        An index of the embedding to search, in place of exact search; its recall is told.
    mixing_k, label_k, purity_k, seed, max_queries, graph_cells, leiden_cells, backend, protein_k
        As in :class:`Options`.

    Raises
    ------
    ConfigError
        Arrays of different lengths, a cell without a batch, reference and query that overlap, or
        an index of another embedding.
    ModelError
        An embedding that is not finite.
    """
    options = Options(
        mixing_k,
        label_k,
        purity_k,
        seed,
        max_queries,
        graph_cells,
        leiden_cells,
        backend,
        protein_k,
    )
    others = _Others(individual, before, proteins)
    measured = _measure(embedding, batches, labels, reference, query, others, index, options)
    return measured.metrics(options.seed)


def compare_embeddings(
    embeddings: Mapping[str, Embedding],
    batches: Categories,
    labels: Categories | None = None,
    *,
    reference: Mask | None = None,
    query: Mask | None = None,
    individual: Embedding | None = None,
    before: Embedding | None = None,
    proteins: Embedding | None = None,
    options: Options | None = None,
) -> Comparison:
    """Measure several embeddings on the same cells, and the differences between them.

    Parameters
    ----------
    embeddings
        By name: float32, (n_cells, d) each.
    batches, labels, reference, query, individual, before, proteins
        As in :func:`evaluate_embedding`.
    options
        What is measured; the defaults without.

    Raises
    ------
    ConfigError, ModelError
        As :func:`evaluate_embedding`; and fewer than two embeddings.
    """
    options = options or Options()
    if len(embeddings) < 2:
        raise ConfigError(
            "a comparison needs two embeddings or more", found=", ".join(embeddings) or "none"
        )
    others = _Others(individual, before, proteins)
    measured = {
        name: _measure(z, batches, labels, reference, query, others, None, options)
        for name, z in embeddings.items()
    }
    differences = []
    for first, second in combinations(measured, 2):
        theirs = {result.kind.name: result for result in measured[second].results}
        for result in measured[first].results:
            found = result.minus(theirs[result.kind.name], first, second)
            if found is not None:
                differences.append(found)
    return Comparison(
        {name: each.metrics(options.seed) for name, each in measured.items()}, tuple(differences)
    )


@dataclass(frozen=True, slots=True)
class _Others:
    """What an embedding is held against, of the same cells."""

    individual: Embedding | None
    before: Embedding | None
    proteins: Embedding | None


@dataclass(frozen=True, slots=True)
class _Measured:
    n_cells: int
    n_dimensions: int
    results: list[Result]
    groups: list[Result]
    transfer: LabelTransfer | None

    def metrics(self, seed: int) -> Metrics:
        return Metrics(
            n_cells=self.n_cells,
            n_dimensions=self.n_dimensions,
            seed=seed,
            measures=tuple(result.measure() for result in self.results),
            groups=tuple(result.measure() for result in self.groups),
            confusion=self.transfer.confusion if self.transfer else None,
            label_protocol=protocol(self.transfer) if self.transfer else None,
        )


def _measure(
    embedding: Embedding,
    batches: Categories,
    labels: Categories | None,
    reference: Mask | None,
    query: Mask | None,
    others: _Others,
    index: NeighborIndex | None,
    options: Options,
) -> _Measured:
    embedding = np.ascontiguousarray(embedding, dtype=np.float32)
    _check(embedding, batches, labels, reference, query)
    for name, other in (("individual", others.individual), ("before", others.before)):
        if other is not None:
            _check_same_cells(name, len(other), embedding)
            check_values(other, name)
    if others.proteins is not None:
        _check_same_cells("proteins", len(others.proteins), embedding)
    if index is not None:
        index.check_embedding(embedding)
    cells = Cells(
        embedding,
        batches,
        labels,
        options.seed,
        options.max_queries,
        (*options.mixing_k, options.label_k),
        options.backend,
        index,
        options.graph_cells,
        options.leiden_cells,
    )
    results, groups = suite.mixing_results(cells, options.mixing_k)
    transfer, found, more = transfer_results(cells, reference, query, options.label_k)
    results, groups = results + found, groups + more
    for family in (
        suite.silhouette_results,
        suite.kbet_results,
        suite.graph_results,
        suite.lisi_results,
    ):
        found, more = family(cells)
        results, groups = results + found, groups + more
    results += suite.variance_results(cells, others.before)
    results += suite_clusters.kmeans_results(cells)
    results += suite_clusters.leiden_results(cells)
    if others.individual is not None:
        found, more = suite_structure.purity_results(cells, others.individual, options.purity_k)
        results, groups = results + found, groups + more
    if others.proteins is not None:
        found, more = suite_structure.protein_results(cells, others.proteins, options.protein_k)
        results, groups = results + found, groups + more
    results = with_notes(results, cells)
    return _Measured(len(embedding), embedding.shape[1], results, groups, transfer)


def _check(
    embedding: Embedding,
    batches: Categories,
    labels: Categories | None,
    reference: Mask | None,
    query: Mask | None,
) -> None:
    if embedding.ndim != 2 or not embedding.size:
        raise ConfigError(
            "there is no embedding to evaluate",
            found=f"an array of shape {embedding.shape}",
            expected="(n_cells, d), neither of them 0",
        )
    given = {"batches": batches, "labels": labels, "reference": reference, "query": query}
    for name, values in given.items():
        if values is not None:
            _check_same_cells(name, len(values), embedding)
    if np.any(batches.codes == UNLABELED):
        raise ConfigError(
            "some cells have no batch",
            found=f"{int((batches.codes == UNLABELED).sum())} cells with code -1",
            expected="a batch for every cell",
        )
    check_values(embedding, "embedding")


def _check_same_cells(name: str, n: int, embedding: Embedding) -> None:
    if n != len(embedding):
        raise ConfigError(
            f"{name} and embedding have different numbers of cells",
            found=f"{n} and {len(embedding)}",
            expected="one entry per cell, in the same order",
        )
