"""Choose the genes to model from the statistics kept at append; no pass over the counts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError
from atlas.store.statistics import Floats, GeneStatistics

Flavour: TypeAlias = Literal["seurat_v3", "dispersion"]
Integers: TypeAlias = npt.NDArray[np.int64]

_MIN_CELLS = 10
"""Batches of fewer cells have no say while another batch has as many: their ranks are noise, and a
gene that is ranked high in one of them alone would come before all others."""


def select_from_statistics(
    studies: Sequence[tuple[GeneStatistics, npt.NDArray[np.int32]]],
    n_genes: int,
    n: int = 2000,
    flavour: Flavour = "seurat_v3",
) -> Integers:
    """Positions of the genes to model.

    ``"seurat_v3"`` is ``scanpy.pp.highly_variable_genes(flavor="seurat_v3", batch_key=...)``, where
    each (study, batch) is a batch: genes are ranked by normalised variance in each batch, the first
    ``n`` of each are kept, and the ``n`` genes are taken that have the lowest median of their kept
    ranks, between equals those kept in more batches, then those that come first in the store. As
    the median runs over the batches that kept the gene, a study that has not measured a gene does
    not speak against it; only between equals does its absence count.

    ``"dispersion"`` is the rule of scANVI (Xu et al. 2021, Methods, "Gene selection"): the ``n``
    genes of the highest variance-to-mean ratio of the counts in each (study, batch), and of these
    the union: as a rule more than ``n``.

    Genes without variance in a batch are not ranked in it, and batches of fewer than 10 cells are
    passed over unless all are as small. (scanpy goes on to rank the genes without variance, which
    are all equal, in an arbitrary order.)

    Parameters
    ----------
    studies
        Per study its statistics and int32, (n_vars of the study,): the position in the store's gene
        table of each of its columns.
    n_genes
        Genes in the store's gene table.
    n
        Genes to choose.
    flavour
        ``"seurat_v3"`` or ``"dispersion"``.

    Returns
    -------
    int64, rising: positions in the store's gene table. Fewer than ``n``, with a warning, where
    fewer vary.

    Raises
    ------
    ConfigError
        If ``n`` is below 1, the flavour is unknown, or no gene varies.
    """
    if n < 1:
        raise ConfigError("the number of genes is out of range", found=n, expected="at least 1")
    if flavour not in get_args(Flavour):
        raise ConfigError(
            "there is no such flavour of gene selection",
            found=repr(flavour),
            expected=" or ".join(map(repr, get_args(Flavour))),
        )
    ranked = [
        _ranked(score, columns, n)
        for statistics, columns in studies
        for score in _scores(statistics, flavour, _least_cells(studies))
    ]
    genes = np.concatenate(ranked) if ranked else np.empty(0, dtype=np.int64)
    if not genes.size:
        raise ConfigError(
            "no gene can be chosen",
            found="no gene whose counts vary within a batch",
            expected="a batch of at least two cells whose counts differ",
        )
    if flavour == "dispersion":
        chosen = np.unique(genes)
    else:
        ranks = np.concatenate([np.arange(len(batch)) for batch in ranked])
        chosen = np.sort(_by_median_rank(genes, ranks, n_genes)[:n])
    if len(chosen) < n:
        warnings.warn(
            f"only {len(chosen)} genes vary within a batch; all of them are chosen instead of {n}",
            stacklevel=2,
        )
    return chosen


def _least_cells(studies: Sequence[tuple[GeneStatistics, npt.NDArray[np.int32]]]) -> int:
    """Cells that a batch needs to have a say."""
    largest = max((int(s.n_cells.max(initial=0)) for s, _ in studies), default=0)
    return _MIN_CELLS if largest >= _MIN_CELLS else 2


def _scores(statistics: GeneStatistics, flavour: Flavour, least_cells: int) -> list[Floats]:
    """The quantity to rank by, per batch that has a say; positive where the gene varies."""
    batches = np.flatnonzero(statistics.n_cells >= least_cells)
    if flavour == "seurat_v3":
        return [statistics.normalized_variance[b] for b in batches]
    return [
        statistics.variance[b] / np.where(statistics.mean[b] > 0, statistics.mean[b], 1)
        for b in batches
    ]


def _ranked(score: Floats, columns: npt.NDArray[np.int32], n: int) -> Integers:
    """Positions in the store of the ``n`` highest positive scores, highest first."""
    # -1 stands for a gene that a fixed gene table leaves out
    varying = np.flatnonzero((score > 0) & (columns >= 0))
    positions = columns[varying].astype(np.int64)
    return positions[np.lexsort((positions, -score[varying]))][:n]


def _by_median_rank(genes: Integers, ranks: Integers, n_genes: int) -> Integers:
    """The distinct ``genes`` by median of their ranks, number of ranks, and position."""
    order = np.lexsort((ranks, genes))
    ranks = ranks[order]
    n_batches = np.bincount(genes, minlength=n_genes)
    distinct = np.flatnonzero(n_batches)
    n_batches = n_batches[distinct]
    first = np.cumsum(n_batches) - n_batches
    median = (ranks[first + (n_batches - 1) // 2] + ranks[first + n_batches // 2]) / 2
    by_rank: Integers = distinct[np.lexsort((distinct, -n_batches, median))]
    return by_rank
