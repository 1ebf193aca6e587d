"""One index of neighbours: exact or FAISS, built by parts, saved, mapped, with its recall."""

from atlas.evaluation.index.choice import Choice, Kind, choose
from atlas.evaluation.index.interchange import (
    NeighborsResults,
    ScanpyGraph,
    from_neighbors_results,
    to_neighbors_results,
    to_scanpy_graph,
)
from atlas.evaluation.index.neighbor_index import NeighborIndex

__all__ = [
    "Choice",
    "Kind",
    "NeighborIndex",
    "NeighborsResults",
    "ScanpyGraph",
    "choose",
    "from_neighbors_results",
    "to_neighbors_results",
    "to_scanpy_graph",
]
