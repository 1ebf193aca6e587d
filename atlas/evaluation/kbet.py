"""kBET: are the batches near a cell as frequent as among all cells? (Büttner et al. 2019)

Pearson's χ² of the batches among a cell and its neighbours, against their frequency; the measure is
the share of cells for which p is at least .05. χ² means little where fewer than one cell of a
batch is expected: such sizes are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories, sample_rows
from atlas.evaluation.estimates import Estimate, Sample, draw, mean
from atlas.evaluation.vectors import Embedding

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

ALPHA = 0.05
SIZES = (0.05, 0.10, 0.15, 0.20, 0.25)
_MOST_CELLS = 50_000


def p_values(indices: Indices, own: Indices, batches: Indices, sizes: Indices) -> Floats:
    """p of each cell and its neighbours, counted together, as scib-metrics counts them.

    Parameters
    ----------
    indices
        Neighbours of each cell, itself left out: int64, (n, k).
    own
        The cells: int64, (n,).
    batches
        Batch of every cell of the database: int64, (N,).
    sizes
        Cells of each batch, none 0: int64, (B,).

    Raises
    ------
    ConfigError
        Fewer than one cell of the smallest batch is expected.
    """
    k = indices.shape[1]
    expected = sizes / sizes.sum() * (k + 1)
    if expected.min() < 1:
        raise ConfigError(
            "kBET cannot be tested with so few neighbours",
            found=f"{expected.min():.2g} cells of the smallest batch expected among {k + 1}",
            expected="at least 1",
            do="take more neighbours, or leave out the smallest batches",
        )
    codes = np.concatenate([batches[own][:, None], batches[indices]], axis=1)
    return _p_values(codes, expected)


def _p_values(codes: Indices, expected: Floats) -> Floats:
    n_batches = len(expected)
    codes = codes + np.arange(len(codes))[:, None] * n_batches
    counts = np.bincount(codes.ravel(), minlength=len(codes) * n_batches)
    difference = counts.reshape(len(codes), n_batches) - expected
    return np.asarray(chi2.sf((difference**2 / expected).sum(axis=1), n_batches - 1))


@dataclass(frozen=True, slots=True)
class LabelAcceptance:
    """kBET within one label, averaged over neighbourhood sizes.

    Attributes
    ----------
    label
        Its code.
    acceptance
        Share of the cells with p ≥ .05, averaged over sizes; None where it cannot be tested.
    sizes
        Shares of the label's cells that were taken as neighbours.
    skipped
        Why there is none.
    """

    label: int
    acceptance: Estimate | None
    sizes: tuple[float, ...]
    skipped: str | None


def acceptance_by_label(
    embedding: Embedding,
    labels: Categories,
    batches: Categories,
    *,
    sizes: tuple[float, ...] = SIZES,
    most: int = 500,
    seed: int = 0,
) -> list[LabelAcceptance]:
    """kBET acceptance within each label, neighbours being 5 to 25 % of its cells.

    Distances are computed within the label, so its neighbourhoods need no repair by diffusion; the
    value is not that of scib-metrics' ``kbet_per_label``, which repairs a joint graph. Labels of
    more than 50,000 cells are sampled to that number: the shares of the batches stay.

    Parameters
    ----------
    embedding
        float32, (N, d).
    labels, batches
        Label (-1 for none) and batch of every cell.
    sizes
        Neighbours, as shares of the label's cells.
    most, seed
        Cells of each label that are tested, and seed of their draw.
    """
    out = []
    for label in labels.present():
        rows = np.flatnonzero(labels.codes == label).astype(np.int64)
        rows = sample_rows(rows, _MOST_CELLS, seed)
        names, codes, counts = np.unique(
            batches.codes[rows], return_inverse=True, return_counts=True
        )
        able = [
            s
            for s in sizes
            if int(s * len(rows)) >= 1 and counts.min() / len(rows) * (int(s * len(rows)) + 1) >= 1
        ]
        if len(names) < 2:
            out.append(LabelAcceptance(int(label), None, (), "it lies in one batch"))
            continue
        if not able:
            why = f"its smallest batch has {counts.min()} of {len(rows)} cells, too few for χ²"
            out.append(LabelAcceptance(int(label), None, (), why))
            continue
        sample = draw(np.arange(len(rows)), codes, most, seed)
        accepted = _accepted(embedding[rows], codes, counts, sample, able)
        out.append(LabelAcceptance(int(label), mean(accepted, sample), tuple(able), None))
    return out


def _accepted(
    embedding: Embedding, codes: Indices, counts: Indices, sample: Sample, sizes: list[float]
) -> Floats:
    """Share of the sizes at which each sampled cell is accepted: float64 (n,)."""
    exact = embedding.astype(np.float64)
    exact -= exact.mean(axis=0)
    squares = np.einsum("nd,nd->n", exact, exact)
    accepted = np.zeros(len(sample))
    wanted = [int(s * len(exact)) for s in sizes]
    tile = max(1, 2**23 // len(exact))
    for start in range(0, len(sample), tile):
        rows = sample.rows[start : start + tile]
        distance = squares - 2 * exact[rows] @ exact.T
        distance[np.arange(len(rows)), rows] = -np.inf  # the cell itself comes first
        nearest = np.argpartition(distance, wanted[-1], axis=1)[:, : wanted[-1] + 1]
        order = np.argsort(np.take_along_axis(distance, nearest, axis=1), axis=1, kind="stable")
        near = codes[np.take_along_axis(nearest, order, axis=1)]
        for k in wanted:
            expected = counts / len(exact) * (k + 1)
            accepted[start : start + tile] += _p_values(near[:, : k + 1], expected) >= ALPHA
    return accepted / len(sizes)
