"""Two dimensions of an embedding, for pictures."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from atlas.evaluation.codes import sample_rows
from atlas.evaluation.neighbours import Embedding, nearest

_NEIGHBOURS = 15
_FEWEST_CELLS = 3 * _NEIGHBOURS
_EPOCHS = 200


@dataclass(frozen=True, slots=True)
class Projection:
    """Where cells are drawn.

    Attributes
    ----------
    rows
        The cells drawn, as rows of the embedding, rising: int64, (n,).
    xy
        Their positions: float32, (n, 2).
    method
        What made them, in words.
    """

    rows: npt.NDArray[np.int64]
    xy: npt.NDArray[np.float32]
    method: str


def project(embedding: Embedding, *, max_cells: int = 100_000, seed: int = 0) -> Projection:
    """Lay out cells by UMAP (McInnes et al. 2018) over their exact nearest neighbours.

    An embedding of up to two dimensions is drawn as it is; one of fewer than 45 cells, or places,
    by its first two principal components.

    Parameters
    ----------
    embedding
        float32, (n_cells, d), finite.
    max_cells
        Cells above this number are sampled.
    seed
        Of the sample and of UMAP, which runs on one thread so that it gives the same again.
    """
    rows = sample_rows(np.arange(len(embedding), dtype=np.int64), max_cells, seed)
    values = np.ascontiguousarray(embedding[rows], dtype=np.float32)
    if values.shape[1] <= 2:
        xy = np.zeros((len(rows), 2), dtype=np.float32)
        xy[:, : values.shape[1]] = values
        return Projection(rows, xy, "the embedding itself")
    values -= values.mean(axis=0, dtype=np.float64)
    # UMAP starts at principal components and divides by them: cells at one place have none.
    if len(np.unique(values, axis=0)) < _FEWEST_CELLS:
        left, scale, _ = np.linalg.svd(values, full_matrices=False)
        xy = np.zeros((len(rows), 2), dtype=np.float32)
        xy[:, : len(scale[:2])] = left[:, :2] * scale[:2]
        return Projection(rows, xy, "principal components")
    return Projection(rows, _umap(values, seed), "UMAP")


def _umap(values: Embedding, seed: int) -> npt.NDArray[np.float32]:
    import umap  # takes seconds to import, and only the report needs it

    own = np.arange(len(values), dtype=np.int64)
    found = nearest(values, values, _NEIGHBOURS - 1, own)
    # UMAP counts a cell as its own first neighbour.
    indices = np.column_stack([own, found.indices]).astype(np.int32)
    distances = np.column_stack([np.zeros(len(values)), found.distances]).astype(np.float32)
    layout = umap.UMAP(
        n_neighbors=_NEIGHBOURS,
        n_epochs=_EPOCHS,
        init="pca",  # a spectral start takes longer than all the rest on many cells
        random_state=seed,
        n_jobs=1,
        precomputed_knn=(indices, distances),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="precomputed_knn", category=UserWarning)
        # numba's OpenMP layer sets the number of threads of the whole process
        threads = torch.get_num_threads()
        xy = layout.fit_transform(values)
        torch.set_num_threads(threads)
    return np.asarray(xy, dtype=np.float32)
