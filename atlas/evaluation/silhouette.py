"""Silhouettes of labels and of batches within labels, as scib-metrics 0.6 defines them.

``silhouette_label`` and ``silhouette_batch`` there, Euclidean, rescaled (Luecken et al. 2022,
Methods, "Cell type ASW" and "Batch ASW"); the silhouettes themselves are scikit-learn's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import silhouette_samples

from atlas.errors import ConfigError
from atlas.evaluation.codes import UNLABELED, Categories, sample_rows
from atlas.evaluation.mixing import standard_error
from atlas.evaluation.neighbours import Embedding


@dataclass(frozen=True, slots=True)
class Silhouette:
    """A rescaled mean silhouette.

    Attributes
    ----------
    value
        In [0, 1], higher is better.
    standard_error
        Of ``value``, as of a sample from many more cells.
    n_cells
        Cells averaged over.
    """

    value: float
    standard_error: float
    n_cells: int


def label_silhouette(
    embedding: Embedding, labels: Categories, *, max_cells: int = 10_000, seed: int = 0
) -> Silhouette:
    """How well labels are apart: (s + 1) / 2, s averaged over the labeled cells.

    Parameters
    ----------
    embedding
        float32, (n_cells, d).
    labels
        Label of every cell, -1 for none.
    max_cells, seed
        Labeled cells above this number are sampled, as time and pairs grow with their square.

    Raises
    ------
    ConfigError
        Fewer than two labels, or a label for every cell, in the sample.
    """
    rows = _labeled_sample(labels, max_cells, seed)
    codes = labels.codes[rows]
    if not 2 <= len(np.unique(codes)) < len(codes):
        raise ConfigError(
            "labels have no silhouette",
            found=f"{len(np.unique(codes))} labels on {len(codes)} cells",
            expected="at least two labels, and fewer than cells",
        )
    values = (_silhouettes(embedding[rows], codes) + 1) / 2
    return Silhouette(float(values.mean()), standard_error(values), len(values))


def batch_silhouette(
    embedding: Embedding,
    labels: Categories,
    batches: Categories,
    *,
    max_cells: int = 10_000,
    seed: int = 0,
) -> Silhouette:
    """How well batches are mixed within labels: 1 - |s|, averaged by label, then over labels.

    s is the silhouette of batches among the cells of one label. Labels that lie in one batch, or
    have each cell in another batch, are left out.

    Parameters
    ----------
    embedding
        float32, (n_cells, d).
    labels, batches
        Label (-1 for none) and batch of every cell.
    max_cells, seed
        Labeled cells above this number are sampled.

    Raises
    ------
    ConfigError
        No label lies in several batches in the sample.
    """
    rows = _labeled_sample(labels, max_cells, seed)
    means, errors, n_cells = [], [], 0
    for label in np.unique(labels.codes[rows]):
        cells = rows[labels.codes[rows] == label]
        codes = batches.codes[cells]
        if not 2 <= len(np.unique(codes)) < len(codes):
            continue
        values = 1 - np.abs(_silhouettes(embedding[cells], codes))
        means.append(values.mean())
        errors.append(standard_error(values))
        n_cells += len(values)
    if not means:
        raise ConfigError(
            "batches have no silhouette within labels", expected="a label in at least two batches"
        )
    error = math.sqrt(sum(e**2 for e in errors)) / len(errors)
    return Silhouette(float(np.mean(means)), error, n_cells)


def _labeled_sample(labels: Categories, max_cells: int, seed: int) -> npt.NDArray[np.int64]:
    rows = np.flatnonzero(labels.codes != UNLABELED).astype(np.int64)
    return sample_rows(rows, max_cells, seed)


def _silhouettes(values: Embedding, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    exact = values.astype(np.float64)
    exact -= exact.mean(axis=0)  # distances by matrix products lose digits far from the origin
    return np.asarray(silhouette_samples(exact, codes), dtype=np.float64)
