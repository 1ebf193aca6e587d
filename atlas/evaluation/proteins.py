"""Consistency with proteins measured in the same cells (CITE-seq).

scVI (Lopez et al. 2018), Methods 4.7, "Protein abundance / mRNA expression": the neighbours of a
cell by its proteins, and by its embedding, 100 of each. The paper reports the fold enrichment of
common edges and the Spearman correlation of the two adjacency matrices. With k neighbours for each
of N cells both follow from the share s of common ones, and so do their errors: s N / k, and
(s - k/N) / (1 - k/N), the matrices being of zeros and ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError
from atlas.evaluation.neighbours import Backend, Recall, nearest
from atlas.evaluation.vectors import Embedding, check_values, rows_of

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def centred_log_ratio(counts: npt.ArrayLike) -> Embedding:
    """ln(count + 1) of each protein less the cell's mean over proteins (Stoeckius et al. 2017).

    Parameters
    ----------
    counts
        At least 0, (n, p).

    Returns
    -------
    float32, (n, p).
    """
    logs = np.log1p(np.asarray(counts, dtype=np.float64))
    return np.asarray(logs - logs.mean(axis=1, keepdims=True), dtype=np.float32)


def are_counts(values: npt.NDArray[np.generic]) -> bool:
    """Whether all values are whole numbers from 0."""
    numbers = np.asarray(values, dtype=np.float64)
    return bool(((numbers >= 0) & (numbers == np.rint(numbers))).all())


@dataclass(frozen=True, slots=True)
class ProteinOverlap:
    """Common neighbours of the cells asked.

    Attributes
    ----------
    values
        Share of the k neighbours by proteins that are so in the embedding too: float64 (n,).
    n_cells
        Cells with proteins, among which was searched.
    backend, recall
        What searched, and the lesser recall of both searches; None where nobody measured it.
    """

    values: Floats
    n_cells: int
    backend: str
    recall: Recall | None


def measured(proteins: Embedding) -> Indices:
    """Rows whose cells have proteins: those that are not all NaN.

    Raises
    ------
    ConfigError
        A cell has some of the proteins and not others.
    """
    missing = np.isnan(proteins)
    some = missing.any(axis=1)
    if (mixed := some & ~missing.all(axis=1)).any():
        raise ConfigError(
            "cells have some of the proteins and not others",
            found=f"{int(mixed.sum())} such cells",
            expected="all proteins of a cell, or NaN for all of them",
            do="keep the proteins that all cells with proteins have",
        )
    return np.flatnonzero(~some).astype(np.int64)


def protein_overlap(
    embedding: Embedding,
    proteins: Embedding,
    asked: Indices,
    k: int,
    *,
    backend: Backend = "auto",
) -> ProteinOverlap:
    """Share of the k nearest cells by proteins that are among the k nearest in the embedding.

    Parameters
    ----------
    embedding, proteins
        float32, (N, d) and (N, p); rows of NaN for cells without proteins, which are left out of
        both searches, as scANVI's authors leave out cells of other studies.
    asked
        Rows to ask, all with proteins: int64 (n,).
    k
        Neighbours of each; the paper's 100.
    backend
        Of :func:`atlas.evaluation.neighbours.nearest`.

    Raises
    ------
    ConfigError
        Arrays of different lengths, or k or fewer cells with proteins.
    ModelError
        Values that are not finite.
    """
    if len(proteins) != len(embedding):
        raise ConfigError(
            "proteins and embedding have different numbers of cells",
            found=f"{len(proteins)} and {len(embedding)}",
            expected="one entry per cell, in the same order",
        )
    rows = measured(proteins)
    check_values(proteins[rows], "the array of proteins")
    own = np.searchsorted(rows, asked)
    found = [
        nearest(rows_of(z, rows), z[asked], k, own, backend=backend) for z in (embedding, proteins)
    ]
    both = np.sort(np.concatenate([each.indices for each in found], axis=1), axis=1)
    shared = (both[:, 1:] == both[:, :-1]).sum(axis=1)
    told = [each.recall for each in found if each.recall is not None]
    recall = min(told, key=lambda r: r.value) if len(told) == len(found) else None
    values = np.asarray(shared / k, dtype=np.float64)
    return ProteinOverlap(values, len(rows), found[0].backend, recall)
