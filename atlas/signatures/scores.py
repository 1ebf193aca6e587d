"""The signature calculus of the scANVI paper, out of core, and the choice of seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from loaders import RowSource, SequentialLoader

Floats = npt.NDArray[np.float64]

_SCALE = 1e4
_MINIBATCH = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """How well cells fit signatures.

    Attributes
    ----------
    values
        float64, (n_obs, n_signatures): NaN for cells not chosen, and for cells without counts.
    baseline
        float64, (n_signatures,): the score of a cell that shows none of the genes.
    detected
        float64, (n_genes,): share of the scored cells in which a gene has counts.
    """

    values: Floats
    baseline: Floats
    detected: Floats

    @property
    def n_scored(self) -> int:
        """Cells that have scores."""
        return int((~np.isnan(self.values[:, 0])).sum())


def score_cells(
    source: RowSource,
    view: RowSource,
    positions: npt.NDArray[np.int64],
    signs: npt.NDArray[np.int64],
    rows: npt.NDArray[np.bool_],
    *,
    progress: bool = False,
) -> Scores:
    """Score cells by signatures (Xu et al. 2021, Online Methods, "Signature calculus").

    Counts are divided by the cell's total over all genes and become ``x = log(1 + 1e4 · share)``;
    each gene is z-scored over the cells (standard deviation with n - 1, as scanpy's; 0 for a gene
    that does not vary), given the sign that it has in the signature, and averaged over the genes of
    the signature.

    Two passes: totals, means and standard deviations over all genes' rows, then scores over the
    signatures' genes alone. Memory: a minibatch, and 8 bytes × (signatures + 1) a cell.

    Parameters
    ----------
    source
        All genes.
    view
        The same rows over the genes of the signatures.
    positions
        int64, (n_genes,): columns of the genes in ``source``, in the order of ``view``.
    signs
        int64, (n_signatures, n_genes): 1, -1, or 0 for a gene that is not in the signature.
    rows
        bool, (n_obs,): the cells to score and to take means over. Cells without any count are left
        out of both.
    progress
        Show cells/s and the time left on stderr.
    """
    totals = np.zeros(len(rows))
    moments = _Moments(len(positions))
    detected = np.zeros(len(positions))
    out = np.full((len(rows), len(signs)), np.nan)
    weights = signs / np.maximum(np.abs(signs).sum(axis=1, keepdims=True), 1)
    with tqdm(
        total=2 * int(rows.sum()),
        desc="scoring",
        unit=" cells",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for minibatch in SequentialLoader(source, _MINIBATCH, rows):
            counts = minibatch.to_scipy().astype(np.float64)
            total = totals[minibatch.rows] = np.asarray(counts.sum(axis=1)).ravel()
            x = _normalized(counts[:, positions].toarray(), total)[total > 0]
            moments.add(x)
            detected += (x > 0).sum(axis=0)
            bar.update(minibatch.n_rows)
        for minibatch in SequentialLoader(view, _MINIBATCH, rows & (totals > 0)):
            counts = minibatch.to_scipy().toarray().astype(np.float64)
            z = moments.standardized(_normalized(counts, totals[minibatch.rows]))
            out[minibatch.rows] = z @ weights.T
            bar.update(minibatch.n_rows)
    baseline = moments.standardized(np.zeros((1, len(positions)))) @ weights.T
    return Scores(out, baseline[0], detected / max(moments.n, 1))


@dataclass(frozen=True, slots=True, eq=False)
class Seeds:
    """The seeds of signatures.

    Attributes
    ----------
    labels
        int64, (n_obs,): the signature of each seed, -1 for the other cells.
    n_shared
        Cells among the top of more than one signature.
    """

    labels: npt.NDArray[np.int64]
    n_shared: int


def choose_seeds(scores: Scores, top: int) -> Seeds:
    """Choose the cells that fit each signature best.

    The seeds of a signature are the ``top`` cells of the highest scores (between equals those that
    come first), as far as they score above a cell that shows none of its genes: such a cell has at
    least one of the positive ones. A cell among the top of several signatures goes to the one in
    which it scores highest, and to none where two scores are equal; nobody takes its place in the
    others, so that a signature may have fewer seeds. What the authors do with such cells is not in
    the paper.
    """
    values = np.where(np.isnan(scores.values), -np.inf, scores.values)
    kept = np.full(values.shape, -np.inf)
    for signature, baseline in enumerate(scores.baseline):
        column = values[:, signature]
        best = np.argsort(-column, kind="stable")[:top]
        # a little above, so that the rounding of a sum is no expression
        best = best[column[best] > baseline + 1e-9]
        kept[best, signature] = column[best]
    highest = kept.max(axis=1)
    winners = kept == highest[:, None]
    seed = np.isfinite(highest) & (winners.sum(axis=1) == 1)
    n_shared = int((np.isfinite(kept).sum(axis=1) > 1).sum())
    return Seeds(np.where(seed, winners.argmax(axis=1), -1), n_shared)


class _Moments:
    """Means and variances of genes, block by block (Chan et al. 1979)."""

    def __init__(self, n_genes: int) -> None:
        self.n = 0
        self._mean = np.zeros(n_genes)
        self._squares = np.zeros(n_genes)  # of deviations from the mean, summed

    def add(self, x: Floats) -> None:
        """Take in cells: float64, (n_cells, n_genes)."""
        if not len(x):
            return
        mean, n = x.mean(axis=0), self.n + len(x)
        apart = mean - self._mean
        self._squares += ((x - mean) ** 2).sum(axis=0) + apart**2 * self.n * len(x) / n
        self._mean += apart * len(x) / n
        self.n = n

    def standardized(self, x: Floats) -> Floats:
        """z-scores; 0 for a gene that does not vary."""
        deviation = np.sqrt(self._squares / max(self.n - 1, 1))
        varies = deviation > 1e-12
        return np.where(varies, (x - self._mean) / np.where(varies, deviation, 1), 0.0)


def _normalized(counts: Floats, totals: Floats) -> npt.NDArray[Any]:
    return np.log1p(_SCALE * counts / np.where(totals > 0, totals, 1)[:, None])
