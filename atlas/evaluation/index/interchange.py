"""Neighbours as other packages hold them: scib-metrics' results, and the graphs of scanpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from atlas.errors import ConfigError
from atlas.evaluation.neighbours import Indices, Neighbours, Recall

if TYPE_CHECKING:
    from anndata import AnnData


class NeighborsResultsLike(Protocol):
    """What is read of scib-metrics' ``NeighborsResults``."""

    indices: Any
    distances: Any


@dataclass(frozen=True, slots=True)
class NeighborsResults:
    """The fields of scib-metrics' class of that name, where it is not installed.

    Attributes
    ----------
    indices, distances
        int64 and float32, (n_cells, k), each cell itself first.
    """

    indices: Indices
    distances: npt.NDArray[np.float32]


def to_neighbors_results(neighbours: Neighbours) -> Any:
    """What scib-metrics takes: all cells in order, each cell itself first, at distance 0.

    Returns
    -------
    ``scib_metrics.nearest_neighbors.NeighborsResults`` where it is installed, else
    :class:`NeighborsResults`, with k + 1 columns.

    Raises
    ------
    ConfigError
        They are not of all cells in order, or some cells are among their own.
    """
    own = _all_cells(neighbours)
    indices = np.concatenate([own[:, None], neighbours.indices], axis=1)
    distances = np.concatenate(
        [np.zeros((len(own), 1), np.float32), neighbours.distances.astype(np.float32)], axis=1
    )
    try:
        from scib_metrics.nearest_neighbors import NeighborsResults as Theirs
    except ImportError:
        return NeighborsResults(indices, distances)
    return Theirs(indices=indices, distances=distances)


def _all_cells(neighbours: Neighbours) -> Indices:
    """Numbers of all cells; refused where the neighbours are not those of all, in order."""
    found, n = neighbours.query_ids, neighbours.n
    own = np.arange(len(neighbours.indices), dtype=np.int64)
    wrong = None
    if found is None or n is None:
        wrong = "neighbours of which it is not known whose they are (query_ids, n)"
    elif len(own) != n:
        wrong = f"neighbours of {len(own):,} queries among {n:,} cells"
    elif not np.array_equal(found, own):
        wrong = "neighbours in another order than that of the cells"
    elif np.any(neighbours.indices == own[:, None]):
        wrong = "cells among their own neighbours"
    if wrong is not None:
        raise ConfigError(
            "other packages take the neighbours of all cells",
            found=wrong,
            expected="neighbours of all cells, in order, each left out of its own",
            do="search all: NeighborIndex.build(embedding).neighbours(k)",
        )
    return own


def from_neighbors_results(
    results: NeighborsResultsLike, backend: str = "given", recall: Recall | None = None
) -> Neighbours:
    """Neighbours of all cells from scib-metrics' results; each cell is left out of its own by id.

    Where a search did not find the cell itself, the farthest of its neighbours is dropped, so that
    all have k - 1. The recall of what someone else searched is not known unless it is given.
    """
    indices = np.asarray(results.indices, dtype=np.int64)
    distances = np.asarray(results.distances, dtype=np.float32)
    if indices.ndim != 2 or indices.shape != distances.shape or indices.shape[1] < 2:
        raise ConfigError(
            "these are no neighbours",
            found=f"shapes {indices.shape} and {distances.shape}",
            expected="indices and distances of one shape (n_cells, k), k at least 2",
        )
    n, k = indices.shape
    if indices.min() < 0 or indices.max() >= n:
        raise ConfigError(
            "neighbours that are no cells",
            found=f"{indices.min()} to {indices.max()}",
            expected=f"0 to {n - 1}",
        )
    own = indices == np.arange(n)[:, None]
    own[~own.any(axis=1), -1] = True
    if np.any(own.sum(axis=1) != 1):
        raise ConfigError("some cells are their own neighbour twice", expected="each id once")
    keep = ~own
    return Neighbours(
        indices[keep].reshape(n, k - 1),
        distances[keep].reshape(n, k - 1).astype(np.float64),
        backend,
        recall,
        np.arange(n, dtype=np.int64),
        n,
    )


@dataclass(frozen=True, slots=True)
class ScanpyGraph:
    """Neighbours as ``scanpy.pp.neighbors`` leaves them.

    Attributes
    ----------
    distances
        CSR float64 (n, n): distances to the k nearest cells, each cell itself left out.
    connectivities
        CSR float32 (n, n): UMAP's fuzzy union.
    params
        What ``adata.uns[key]["params"]`` holds.
    """

    distances: sp.csr_matrix
    connectivities: sp.csr_matrix
    params: dict[str, Any]

    def write(self, adata: AnnData, key: str = "neighbors") -> None:
        """Put them where scanpy's tools look for them."""
        prefix = "" if key == "neighbors" else f"{key}_"
        adata.obsp[f"{prefix}distances"] = self.distances
        adata.obsp[f"{prefix}connectivities"] = self.connectivities
        adata.uns[key] = {
            "connectivities_key": f"{prefix}connectivities",
            "distances_key": f"{prefix}distances",
            "params": dict(self.params),
        }


def to_scanpy_graph(neighbours: Neighbours) -> ScanpyGraph:
    """Graphs for scanpy from the neighbours of all cells.

    ``n_neighbors`` there counts the cell itself: k neighbours are ``n_neighbors = k + 1``.

    Raises
    ------
    ConfigError
        As :func:`to_neighbors_results`.
    """
    whole = to_neighbors_results(neighbours)
    from umap.umap_ import fuzzy_simplicial_set  # takes seconds to import

    n, k = neighbours.indices.shape
    distances = sp.csr_matrix(
        (
            neighbours.distances.flatten(),  # a copy, as it is sorted below
            neighbours.indices.ravel(),
            np.arange(0, n * k + 1, k),
        ),
        shape=(n, n),
    )
    distances.sort_indices()
    connectivities = fuzzy_simplicial_set(
        sp.coo_matrix((n, 1)),
        k + 1,
        None,
        None,
        knn_indices=np.asarray(whole.indices),
        knn_dists=np.asarray(whole.distances),
        set_op_mix_ratio=1.0,
        local_connectivity=1.0,
    )[0]
    return ScanpyGraph(
        distances,
        sp.csr_matrix(connectivities),
        {"n_neighbors": k + 1, "method": "umap", "metric": "euclidean", "random_state": 0},
    )
