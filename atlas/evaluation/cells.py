"""The cells that are measured: samples of them and their neighbours, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from atlas.evaluation.catalogue import Result
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.estimates import Estimate, GroupMeans, Mask, Sample, draw, mean
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
MOST_GROUPS = 200
"""Batches, or labels, above which figures of each are left out."""
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
        """Stratum of every cell, for samples of about ``max_queries``."""
        return self.strata_for(self.max_queries)

    def strata_for(self, most: int) -> Indices:
        """Stratum of every cell: the finest of which about ``most`` cells ask two each at least.

        Batch and label where that leaves four cells to each on average; else the label, as a rare
        one would be missed; else the batch; else one stratum of all.
        """
        names = [self.batches.codes]
        if self.labels is not None:
            own = self.labels.codes + 1
            names = [self.batches.codes * (len(self.labels.names) + 1) + own, own, *names]
        for strata in names:
            least = 4 if strata is names[0] and len(names) > 1 else 2
            if least * np.count_nonzero(np.bincount(strata)) <= most:
                return strata
        return np.zeros(len(self.embedding), dtype=np.int64)

    @cached_property
    def sample(self) -> Sample:
        """Cells that are asked, of all."""
        rows = np.arange(len(self.embedding), dtype=np.int64)
        return draw(rows, self.strata, self.max_queries, self.seed)

    @cached_property
    def labeled_rows(self) -> Indices:
        """All cells with a label, rising: int64 (n,)."""
        assert self.labels is not None
        return np.flatnonzero(self.labels.codes != UNLABELED).astype(np.int64)

    @cached_property
    def labeled(self) -> Sample:
        """Cells that are asked, of those with a label."""
        return self.drawn_of_labeled(self.max_queries)

    def drawn_of_labeled(self, most: int) -> Sample:
        """At most about so many cells with a label."""
        rows = self.labeled_rows
        return draw(rows, self.strata_for(most)[rows], most, self.seed)

    @cached_property
    def many(self) -> Sample:
        """Cells from which the errors of figures of all cells are reckoned."""
        rows = np.arange(len(self.embedding), dtype=np.int64)
        return draw(rows, self.strata_for(CLOSED_FORM_CELLS), CLOSED_FORM_CELLS, self.seed)

    @cached_property
    def many_labeled(self) -> Sample:
        """The same of all cells with a label."""
        return self.many if self.all_labeled else self.drawn_of_labeled(CLOSED_FORM_CELLS)

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
        if self.all_labeled:
            return self.neighbours
        rows = self.labeled_rows
        if len(rows) <= LISI_K:
            return None
        own = np.searchsorted(rows, self.labeled.rows)
        z = rows_of(self.embedding, rows)
        found = nearest(z, z[own], LISI_K, own, backend=self.backend)
        return Neighbours(rows[found.indices], found.distances, found.backend, found.recall)

    @cached_property
    def at_one_place(self) -> bool:
        """Whether all cells coincide."""
        first = self.embedding[:1]
        return all(bool((self.embedding[part] == first).all()) for part in tiles(len(self)))

    def __len__(self) -> int:
        return len(self.embedding)

    def coincidence(self, k: int | None) -> str | None:
        """What has to be known of a measure, of k neighbours or of none, where cells coincide."""
        if self.at_one_place:
            return "all cells lie at one place"
        if k is None or self.neighbours is None or k > self.neighbours.k:
            return None
        crowded = int((self.neighbours.distances[:, k - 1] == 0).sum())
        if not crowded:
            return None
        return (
            f"{crowded:,} of {len(self.sample):,} cells asked lie at one place with {k} others or "
            "more, and the first of these by row count as their neighbours"
        )

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


Figure = Callable[[Floats, Sample, Mask], Estimate]
"""What gives the figure of some of the sampled cells: of their values, and which they are."""


def by_group(
    values: Floats,
    sample: Sample,
    cells: Cells,
    result: Result,
    *,
    batches: bool,
    labels: bool,
    figure: Figure = mean,
    without: str = "it has no value there",
) -> Iterator[Result]:
    """The figure of a measure of single cells for each batch, each label, or both.

    A batch or label that cells have and none that was asked, or none with a value, is told so.

    Parameters
    ----------
    values
        Of the sampled cells, NaN where the measure has none: float64 (n,).
    sample
        The cells asked.
    cells
        All of them.
    result
        The measure of all cells, of which the group's are.
    batches, labels
        For which groups.
    figure
        What gives it; the mean without.
    without
        Why a group has none, where none of its cells has a value.
    """
    if result.estimate is None:
        return
    kinds: list[tuple[str, Categories]] = []
    if batches:
        kinds.append(("batch", cells.batches))
    if labels and cells.labels is not None:
        kinds.append(("label", cells.labels))
    if figure is mean:
        figure = partial(mean, share=result.estimate.share)
    for word, categories in kinds:
        present = categories.present()
        if len(present) > MOST_GROUPS:
            yield told_apart(result, None, f"{word} *", too_many(word, len(present)))
            continue
        for code in present:
            asked = categories.codes[sample.rows] == code
            about = asked & np.isfinite(values)
            of = f"{word} {categories.names[code]}"
            if about.any():
                yield told_apart(result, figure(values, sample, about), of, None)
            else:
                why = without if asked.any() else "none of its cells was asked"
                yield told_apart(result, None, of, why)


def by_label(
    means: GroupMeans, codes: Indices, cells: Cells, result: Result, without: str
) -> Iterator[Result]:
    """The figure of each label, of a measure that all cells gave.

    Parameters
    ----------
    means
        Of the labels ``codes``: int64 (G,).
    cells
        All cells, with labels.
    result
        The measure over all labels.
    without
        Why other labels have none.
    """
    assert cells.labels is not None
    present = cells.labels.present()
    if len(present) > MOST_GROUPS:
        yield told_apart(result, None, "label *", too_many("label", len(present)))
        return
    place = {int(code): i for i, code in enumerate(codes)}
    for code in map(int, present):
        of = f"label {cells.labels.names[code]}"
        if code in place:
            yield told_apart(result, means.of(place[code]), of, None)
        else:
            yield told_apart(result, None, of, without)


def with_notes(results: Iterable[Result], cells: Cells) -> list[Result]:
    """Notes where cells coincide, beside those that results have."""
    out = []
    for result in results:
        notes = [result.note, None if result.estimate is None else cells.coincidence(result.k)]
        told = "; ".join(note for note in notes if note is not None)
        out.append(replace(result, note=told or None))
    return out


def unasked(categories: Categories, cells: Indices, asked: Indices, word: str) -> str | None:
    """Names the categories that ``cells`` have and none of ``asked`` has; None where there is none.

    Parameters
    ----------
    categories
        Of every cell.
    cells, asked
        Rows: int64 (n,) and int64 (m,).
    word
        ``"label"`` or ``"batch"``.
    """
    missed = np.setdiff1d(np.unique(categories.codes[cells]), categories.codes[asked])
    missed = missed[missed != UNLABELED]
    if not len(missed):
        return None
    named = ", ".join(categories.names[code] for code in missed)
    if len(missed) == 1:
        return f"without {word} {named}: none of its cells was asked"
    plural = "batches" if word == "batch" else f"{word}s"
    return f"without {plural} {named}: none of their cells was asked"


def too_many(word: str, n: int) -> str:
    """Why the figures of single batches or labels are left out."""
    plural = "batches" if word == "batch" else f"{word}s"
    return f"there are {n:,} {plural}, and figures of each are given up to {MOST_GROUPS}"


def told_apart(result: Result, estimate: Estimate | None, of: str, why: str | None) -> Result:
    """The same measure for part of the cells."""
    return replace(result, estimate=estimate, of=of, skipped=why, note=None)
