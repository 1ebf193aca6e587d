"""Leiden clusters (Traag, Waltman, van Eck 2019) of the graph of neighbours, as in scib-metrics.

igraph finds them. It is GPL-2, and so an extra that nothing else here needs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from atlas.errors import ConfigError
from atlas.evaluation.clustering import contingency, normalised_mutual_information
from atlas.evaluation.codes import Categories
from atlas.evaluation.index import to_scanpy_graph
from atlas.evaluation.neighbours import Neighbours

Indices = npt.NDArray[np.int64]

RESOLUTIONS = tuple(2 * step / 10 for step in range(1, 11))
"""scib-metrics' ten."""
SEED = 42
"""scib-metrics' too, so that clusters are the same ones."""
_INSTALL = "pip install 'atlas-trainer[leiden]', which is GPL-2"
NEEDED = f"Leiden clusters need igraph: {_INSTALL}"


def import_igraph() -> ModuleType | None:
    """igraph, or None where it is not installed."""
    try:
        import igraph
    except ImportError:
        return None
    module: ModuleType = igraph
    return module


def leiden(
    connectivities: sp.csr_matrix,
    resolutions: tuple[float, ...] = RESOLUTIONS,
    *,
    seed: int = SEED,
) -> dict[float, Indices]:
    """Cluster of each cell at each resolution.

    Parameters
    ----------
    connectivities
        Symmetric weights, (n, n), as :func:`atlas.evaluation.index.to_scanpy_graph` has them.
    resolutions
        Of modularity: more clusters the higher.
    seed
        Of each clustering.

    Returns
    -------
    int64 (n,) by resolution.

    Raises
    ------
    ConfigError
        igraph is not installed.
    """
    igraph = import_igraph()
    if igraph is None:
        raise ConfigError("Leiden clusters need igraph", do=_INSTALL)
    # As scib-metrics and scanpy: every edge twice, which leaves modularity as it is and decides
    # which of several equally good clusterings is found.
    graph = igraph.Graph.Weighted_Adjacency(connectivities, mode="directed")
    graph.to_undirected(mode="each")
    out = {}
    try:
        for resolution in resolutions:
            # igraph has one generator for the process; it is put back below.
            igraph.set_random_number_generator(random.Random(seed))
            found = graph.community_leiden(
                objective_function="modularity", weights="weight", resolution=resolution
            )
            out[resolution] = np.asarray(found.membership, dtype=np.int64)
    finally:
        igraph.set_random_number_generator(random)
    return out


@dataclass(frozen=True, slots=True)
class BestLeiden:
    """The clustering that agrees best with labels.

    Attributes
    ----------
    codes
        Cluster of each cell: int64, (n,).
    resolution
        At which it was found.
    """

    codes: Indices
    resolution: float


def best_leiden(neighbours: Neighbours, labels: Categories, *, seed: int = SEED) -> BestLeiden:
    """Of ten resolutions the one with the highest NMI with labels, the first of equal ones.

    Parameters
    ----------
    neighbours
        Of all cells, in order.
    labels
        Label of every cell.
    """
    found = leiden(to_scanpy_graph(neighbours).connectivities, seed=seed)
    scores = {
        resolution: normalised_mutual_information(contingency(codes, labels).astype(np.float64))
        for resolution, codes in found.items()
    }
    best = max(scores, key=lambda resolution: scores[resolution])
    return BestLeiden(found[best], best)
