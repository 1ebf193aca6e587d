"""The cells that are measured: samples of them and their neighbours, each made once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from atlas.evaluation.catalogue import Result
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.estimates import Sample, draw, mean
from atlas.evaluation.index import NeighborIndex
from atlas.evaluation.neighbours import Backend, Neighbours, nearest
from atlas.evaluation.vectors import Embedding, rows_of, tiles

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

LISI_K = 89
KBET_K = 49
GRAPH_K = 14
"""scib-metrics counts the cell itself: 90, 50 and 15."""
CLOSED_FORM_CELLS = 100_000
"""From which the error of a figure is reckoned that all cells give."""
_MOST_GROUPS = 200
_BLOCK = 2**17


@dataclass(frozen=True)
class Cells:
    """What is measured, and how.

    Attributes
    ----------
    embedding
        float32, (N, d).
    batches, labels
        Of every cell; labels -1 for none, or None without any.
    seed, max_queries
        Of the samples, and about their size.
    ks
        Neighbours that measures ask for, apart from LISI and kBET.
    backend, index
        What searches: exactly, or an index of this embedding.
    graph_cells
        Most cells of which all neighbours are searched, for graph connectivity.
    leiden_cells
        About how many cells are clustered by Leiden; of more, a sample.
    """

    embedding: Embedding
    batches: Categories
    labels: Categories | None
    seed: int
    max_queries: int
    ks: tuple[int, ...]
    backend: Backend
    index: NeighborIndex | None
    graph_cells: int
    leiden_cells: int

    @cached_property
    def strata(self) -> Indices:
        """Stratum of every cell: its batch and label, or its batch where these are too many."""
        if self.labels is None:
            return self.batches.codes
        both = self.batches.codes * (len(self.labels.names) + 1) + self.labels.codes + 1
        if 4 * len(np.unique(both)) <= self.max_queries:
            return both
        return self.batches.codes

    @cached_property
    def sample(self) -> Sample:
        """Cells that are asked, of all."""
        rows = np.arange(len(self.embedding), dtype=np.int64)
        return draw(rows, self.strata, self.max_queries, self.seed)

    @cached_property
    def labeled(self) -> Sample:
        """Cells that are asked, of those with a label."""
        return self.drawn_of_labeled(self.max_queries)

    def drawn_of_labeled(self, most: int) -> Sample:
        """At most about so many cells with a label."""
        assert self.labels is not None
        rows = np.flatnonzero(self.labels.codes != UNLABELED).astype(np.int64)
        return draw(rows, self.strata[rows], most, self.seed)

    @cached_property
    def has_labels(self) -> bool:
        """Whether any cell has one."""
        return self.labels is not None and bool(len(self.labels.present()))

    @cached_property
    def all_labeled(self) -> bool:
        """Whether every cell has one."""
        return self.labels is not None and bool((self.labels.codes != UNLABELED).all())

    @cached_property
    def neighbours(self) -> Neighbours | None:
        """Of the sampled cells among all; None where there are too few cells for any."""
        n = len(self.embedding)
        wanted = [k for k in (*self.ks, LISI_K, KBET_K) if k < n]
        return None if not wanted else self.search(self.sample.rows, max(wanted))

    @cached_property
    def labeled_neighbours(self) -> Neighbours | None:
        """Of the sampled labeled cells among the labeled, for cLISI."""
        assert self.labels is not None
        if self.all_labeled:
            return self.neighbours
        rows = np.flatnonzero(self.labels.codes != UNLABELED).astype(np.int64)
        if len(rows) <= LISI_K:
            return None
        own = np.searchsorted(rows, self.labeled.rows)
        z = rows_of(self.embedding, rows)
        found = nearest(z, z[own], LISI_K, own, backend=self.backend)
        return Neighbours(rows[found.indices], found.distances, found.backend, found.recall)

    def search(self, rows: Indices, k: int) -> Neighbours:
        """Neighbours of some cells among all."""
        if self.index is not None:
            return self.index.neighbours(k, rows)
        return nearest(self.embedding, self.embedding[rows], k, rows, backend=self.backend)

    def neighbours_of_all(self, rows: Indices, k: int) -> Iterator[tuple[Indices, Neighbours]]:
        """Neighbours of all of ``rows`` among all cells, block by block.

        Exact where that takes less than two minutes; above, an index is made, which tells its
        recall.
        """
        known = self.neighbours if len(self.sample) == len(self.embedding) else None
        if known is not None and known.k >= k:
            yield rows, known.first(k).of(rows)
            return
        index = self.index
        if index is None and self.backend == "auto":
            index = NeighborIndex.build(self.embedding, seed=self.seed, n_queries=len(rows))
        for part in tiles(len(rows), _BLOCK):
            some = rows[part]
            if index is not None:
                yield some, index.neighbours(k, some)
            else:
                yield some, self.search(some, k)


def by_group(
    values: Floats, sample: Sample, cells: Cells, result: Result, *, batches: bool, labels: bool
) -> Iterator[Result]:
    """The mean of a measure of single cells for each batch, each label, or both."""
    kinds: list[tuple[str, Categories]] = []
    if batches:
        kinds.append(("batch", cells.batches))
    if labels and cells.labels is not None:
        kinds.append(("label", cells.labels))
    share = result.estimate is not None and result.estimate.share
    for word, categories in kinds:
        if len(categories.present()) > _MOST_GROUPS:
            continue
        for code in categories.present():
            about = (categories.codes[sample.rows] == code) & np.isfinite(values)
            if about.any():
                yield Result(
                    result.kind,
                    mean(values, sample, about, share=share),
                    result.k,
                    result.backend,
                    result.recall,
                    of=f"{word} {categories.names[code]}",
                )
