"""All measures of one embedding, or of several on the same cells, with their errors.

A measure that the data cannot give (no labels, one batch, fewer cells than neighbours) is listed
without a value and with the reason; it is not an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from atlas.errors import ConfigError
from atlas.evaluation import suite, suite_clusters, suite_structure
from atlas.evaluation.catalogue import Result, kind
from atlas.evaluation.cells import Cells, with_notes
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.index import NeighborIndex
from atlas.evaluation.labels import LabelTransfer, Mask
from atlas.evaluation.metrics import Comparison, Metrics
from atlas.evaluation.neighbours import Backend, check_backend
from atlas.evaluation.proteins import measured
from atlas.evaluation.transfer import protocol, transfer_results
from atlas.evaluation.vectors import Embedding, check_values

MIXING_K = (10, 500)
"""Least and most neighbours for the entropy of batch mixing."""
LEAST_QUERIES = 2
"""One cell tells nothing of the others."""
LARGEST_SEED = 2**32 - 1
"""NumPy's and scikit-learn's."""
NO_INDIVIDUAL = (
    "it needs an embedding of each batch on its own: "
    "`atlas baseline STORE --method pca --per-batch`"
)
NO_BEFORE = "it needs an embedding before integration: `atlas baseline STORE --method pca`"


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, and on how many cells.

    Attributes
    ----------
    mixing_k
        Neighbours for the entropy of batch mixing, one number or more from 10 to 500 (scVI and
        scANVI 50, scArches 15).
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
        where there are more; 0 leaves it out. Any number will do; a million take minutes.
    leiden_cells
        Cells above this number are sampled for Leiden, which says so; 0 leaves it out.
    backend
        Of :func:`atlas.evaluation.neighbours.nearest`. With ``"faiss"`` and ``"torch"`` every
        search is exact; with ``"auto"`` that of all cells, for graph connectivity, takes an
        approximate index where it would take more than two minutes, and its recall is told.

    Raises
    ------
    ConfigError
        A number out of range, or a backend that there is not.
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

    def __post_init__(self) -> None:
        for k in self.mixing_k:
            _check_number("mixing_k", k, *MIXING_K)
        if not self.mixing_k or len(set(self.mixing_k)) < len(self.mixing_k):
            raise ConfigError(
                "mixing_k names no number of neighbours, or one twice",
                found=tuple(self.mixing_k),
                expected="one number or more, each once",
            )
        for name in ("label_k", "purity_k", "protein_k"):
            _check_number(name, getattr(self, name), 1)
        _check_number("max_queries", self.max_queries, LEAST_QUERIES)
        _check_number("graph_cells", self.graph_cells, 0)
        _check_number("leiden_cells", self.leiden_cells, 0)
        _check_number("seed", self.seed, 0, LARGEST_SEED)
        check_backend(self.backend)


def _check_number(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number of the range."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        expected = f"at least {least:,}" if most is None else f"{least:,} to {most:,}"
        raise ConfigError(
            f"{name} is out of range", found=repr(value), expected=f"a whole number, {expected}"
        )


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
        mixing_k=mixing_k,
        label_k=label_k,
        purity_k=purity_k,
        seed=seed,
        max_queries=max_queries,
        graph_cells=graph_cells,
        leiden_cells=leiden_cells,
        backend=backend,
        protein_k=protein_k,
    )
    others = _Others(individual, before, proteins)
    embedding = np.ascontiguousarray(embedding, dtype=np.float32)
    _check_cells({"the embedding": embedding}, batches, labels, reference, query)
    others.check(len(embedding))
    if index is not None:
        index.check_embedding(embedding)
    found = _measure(embedding, batches, labels, reference, query, others, index, options)
    return found.metrics(options.seed)


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
    indices: Mapping[str, NeighborIndex] | None = None,
    options: Options | None = None,
) -> Comparison:
    """Measure several embeddings on the same cells, and the differences between them.

    Parameters
    ----------
    embeddings
        By name: float32, (n_cells, d) each.
    batches, labels, reference, query, individual, before, proteins
        As in :func:`evaluate_embedding`.
    indices
        Of some of the embeddings, by name, to search in place of exact search.
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
            "a comparison needs two embeddings or more",
            found=", ".join(embeddings) or "none",
            do="name two or more; one alone is measured by `atlas evaluate`",
        )
    others = _Others(individual, before, proteins)
    values = {name: np.ascontiguousarray(z, np.float32) for name, z in embeddings.items()}
    named = {f"the embedding {name!r}": z for name, z in values.items()}
    _check_cells(named, batches, labels, reference, query)
    others.check(len(batches))
    known = indices or {}
    for name, index in known.items():
        index.check_embedding(values[name])
    each = {
        name: _measure(z, batches, labels, reference, query, others, known.get(name), options)
        for name, z in values.items()
    }
    differences = []
    for first, second in combinations(each, 2):
        theirs = {result.kind.name: result for result in each[second].results}
        for result in each[first].results:
            found = result.minus(theirs[result.kind.name], first, second)
            if found is not None:
                differences.append(found)
    metrics = {name: one.metrics(options.seed) for name, one in each.items()}
    return Comparison(metrics, tuple(differences))


@dataclass(frozen=True, slots=True)
class _Others:
    """What an embedding is held against, of the same cells."""

    individual: Embedding | None
    before: Embedding | None
    proteins: Embedding | None

    def check(self, n_cells: int) -> None:
        """Refuse arrays of other cells, and values that are not finite."""
        given = {"individual": self.individual, "before": self.before, "proteins": self.proteins}
        for name, values in given.items():
            if values is not None:
                _check_same_cells(name, len(values), "embedding", n_cells)
                # a cell without proteins has NaN for all of them
                there = values[measured(values)] if name == "proteins" else values
                check_values(there, f"the array given as {name!r}")


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
    if others.before is None:
        reason = NO_BEFORE if len(batches.present()) > 1 else "there is only one batch"
        results.append(Result(kind("pcr_comparison"), None, skipped=reason))
    results += suite_clusters.kmeans_results(cells)
    results += suite_clusters.leiden_results(cells)
    if others.individual is not None:
        found, more = suite_structure.purity_results(cells, others.individual, options.purity_k)
        results, groups = results + found, groups + more
    else:
        k = options.purity_k
        results.append(Result(kind("purity", k), None, k, skipped=NO_INDIVIDUAL))
        results.append(Result(kind("cluster_conservation"), None, skipped=NO_INDIVIDUAL))
    if others.proteins is not None:
        found, more = suite_structure.protein_results(cells, others.proteins, options.protein_k)
        results, groups = results + found, groups + more
    results = with_notes(results, cells)
    return _Measured(len(embedding), embedding.shape[1], results, groups, transfer)


def _check_cells(
    embeddings: Mapping[str, Embedding],
    batches: Categories,
    labels: Categories | None,
    reference: Mask | None,
    query: Mask | None,
) -> None:
    """Refuse what is not of the same cells, cells without a batch, and values not finite."""
    for name, z in embeddings.items():
        if z.ndim != 2 or not z.size:
            raise ConfigError(
                f"{name} is none that can be evaluated",
                found=f"an array of shape {z.shape}",
                expected="(n_cells, d), neither of them 0",
            )
    first, n_cells = next((name, len(z)) for name, z in embeddings.items())
    for name, z in embeddings.items():
        _check_same_cells(name, len(z), first, n_cells)
    given = {"batches": batches, "labels": labels, "reference": reference, "query": query}
    for name, values in given.items():
        if values is not None:
            _check_same_cells(name, len(values), "embedding", n_cells)
    if np.any(batches.codes == UNLABELED):
        raise ConfigError(
            "some cells have no batch",
            found=f"{int((batches.codes == UNLABELED).sum())} cells with code -1",
            expected="a batch for every cell",
        )
    for name, z in embeddings.items():
        check_values(z, name)


def _check_same_cells(name: str, n: int, other: str, n_other: int) -> None:
    if n != n_other:
        raise ConfigError(
            f"{name} and {other} have different numbers of cells",
            found=f"{n} and {n_other}",
            expected="one entry per cell, in the same order",
        )
