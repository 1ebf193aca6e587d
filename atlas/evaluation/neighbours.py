"""Exact nearest neighbours of an embedding.

FAISS or torch propose a few more candidates than are wanted, in float32; their distances are then
computed again in float64 from the embedding as it was given. A bound on the float32 error decides
for each query whether a neighbour can have been left out by the proposal, and where it can, that
query is searched in float64 from end to end. So the answer is the same whichever backend ran.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from atlas.errors import ConfigError, ModelError

Backend = Literal["auto", "faiss", "torch"]
Embedding = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_SPARE_CANDIDATES = 16
_FAISS_GPU_MAX_K = 2048
_LARGEST_VALUE = 1e18  # its square still fits float32
_FLOAT32_ROUNDOFF = 2.0**-24
_TILE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest rows of a database for each query, nearest first.

    Attributes
    ----------
    indices
        Rows of the database: int64, (n_queries, k).
    distances
        Euclidean distances: float32, (n_queries, k).
    backend
        What searched, in words: ``"faiss flat, CPU"``, ``"faiss flat, GPU"``, ``"torch, cuda"``, …
    """

    indices: Indices
    distances: npt.NDArray[np.float32]
    backend: str

    @property
    def k(self) -> int:
        """Number of neighbours per query."""
        return int(self.indices.shape[1])

    def first(self, k: int) -> Neighbours:
        """The ``k`` nearest of these."""
        if not 1 <= k <= self.k:
            raise ConfigError(
                "k is out of range", found=k, expected=f"1 to the {self.k} neighbours searched"
            )
        return Neighbours(self.indices[:, :k], self.distances[:, :k], self.backend)


def nearest(
    database: Embedding,
    queries: Embedding,
    k: int,
    query_ids: Indices | None = None,
    *,
    backend: Backend = "auto",
) -> Neighbours:
    """Find the k nearest rows of ``database`` for each query, exactly.

    Distances are Euclidean; equal ones are ordered by row of the database.

    Parameters
    ----------
    database
        float32, (N, d).
    queries
        float32, (Q, d).
    k
        Neighbours per query.
    query_ids
        Row of the database that each query is, int64 (Q,), or -1 where it is none; that row is
        left out, and so a duplicate of the query in another row is not. None: nothing is left out.
    backend
        ``"auto"`` takes FAISS where it is installed (on a GPU where it sees one), else torch.

    Raises
    ------
    ConfigError
        Shapes that do not fit, k out of range, or FAISS asked for and not installed.
    ModelError
        Values that are not finite, or above 1e18.
    """
    database = np.ascontiguousarray(database, dtype=np.float32)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    ids = _checked(database, queries, k, query_ids)

    # Distances do not change when the origin does, but their rounding errors grow with the distance
    # from it: 1,000 off the centre, float32 products lose nine neighbours in ten.
    centre = database.mean(axis=0, dtype=np.float64)
    wanted = min(k + int(ids is not None) + _SPARE_CANDIDATES, len(database))
    candidates, name = _propose(
        _centred(database, centre), _centred(queries, centre), wanted, backend
    )

    indices = np.empty((len(queries), k), dtype=np.int64)
    squared = np.empty((len(queries), k), dtype=np.float64)
    norms = np.linalg.norm(queries - centre, axis=1)
    tile = max(1, _TILE_BYTES // (8 * wanted * database.shape[1]))
    for start in range(0, len(queries), tile):
        rows = slice(start, start + tile)
        indices[rows], squared[rows], certain = _refine(
            database,
            queries[rows],
            candidates[rows],
            norms[rows],
            k,
            None if ids is None else ids[rows],
        )
        for query in start + np.flatnonzero(~certain):
            own = -1 if ids is None else int(ids[query])
            indices[query], squared[query] = _search_all(database, queries[query], k, own)
    return Neighbours(indices, np.sqrt(squared).astype(np.float32), name)


def _checked(
    database: Embedding, queries: Embedding, k: int, query_ids: Indices | None
) -> Indices | None:
    if database.ndim != 2 or queries.ndim != 2 or database.shape[1] != queries.shape[1]:
        raise ConfigError(
            "database and queries do not lie in one space",
            found=f"shapes {database.shape} and {queries.shape}",
            expected="(N, d) and (Q, d)",
        )
    for name, array in (("database", database), ("queries", queries)):
        if array.size and not np.abs(array).max() <= _LARGEST_VALUE:  # false for NaN too
            raise ModelError(
                f"the embedding ({name}) has values that are not finite, or are too large",
                found=f"{int((~(np.abs(array) <= _LARGEST_VALUE)).sum())} of {array.size} values",
                expected=f"finite values up to {_LARGEST_VALUE:g}",
                do="look at the training loss; a model whose loss diverged has to be trained again",
            )
    ids = None if query_ids is None else np.asarray(query_ids, dtype=np.int64)
    if ids is not None and (
        ids.shape != (len(queries),) or np.any((ids < -1) | (ids >= len(database)))
    ):
        raise ConfigError(
            "query_ids do not name rows of the database",
            found=f"shape {ids.shape}",
            expected=f"{len(queries)} rows of {len(database)}, or -1",
        )
    available = len(database) - (ids is not None and bool((ids >= 0).any()))
    if not 1 <= k <= available:
        raise ConfigError(
            "k is out of range",
            found=f"k = {k}",
            expected=f"1 to {available}, the cells that can be a neighbour",
            do="ask for fewer neighbours",
        )
    return ids


def _centred(values: Embedding, centre: npt.NDArray[np.float64]) -> Embedding:
    out = np.empty_like(values)
    for start in range(0, len(values), 65536):
        out[start : start + 65536] = values[start : start + 65536] - centre
    return out


def _propose(
    database: Embedding, queries: Embedding, k: int, backend: Backend
) -> tuple[Indices, str]:
    """The k rows that are nearest by float32 distances, in no particular order: int64 (Q, k)."""
    faiss = None if backend == "torch" else _import_faiss()
    if faiss is not None:
        return _propose_faiss(faiss, database, queries, k)
    if backend == "faiss":
        raise ConfigError(
            "FAISS is asked for and not installed",
            do="install faiss-cpu or faiss-gpu (never both), or take the torch backend",
        )
    return _propose_torch(database, queries, k)


def _import_faiss() -> Any | None:
    try:
        return importlib.import_module("faiss")
    except ImportError:
        return None


def _propose_faiss(
    faiss: Any, database: Embedding, queries: Embedding, k: int
) -> tuple[Indices, str]:
    index = faiss.IndexFlatL2(database.shape[1])
    name = "faiss flat, CPU"
    if faiss.get_num_gpus() > 0 and k <= _FAISS_GPU_MAX_K:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        name = "faiss flat, GPU"
    index.add(database)
    _, indices = index.search(queries, k)
    return np.asarray(indices, dtype=np.int64), name


def _propose_torch(database: Embedding, queries: Embedding, k: int) -> tuple[Indices, str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    query_tile, database_tile = (4096, 262144) if device.type == "cuda" else (512, 16384)
    found = np.empty((len(queries), k), dtype=np.int64)
    points = torch.from_numpy(database).to(device)
    squares = points.square().sum(dim=1)
    precision = torch.get_float32_matmul_precision()
    # Training may have allowed TF32 or bfloat16 products; the error bound assumes float32 ones.
    torch.set_float32_matmul_precision("highest")
    try:
        for first in range(0, len(queries), query_tile):
            block = torch.from_numpy(queries[first : first + query_tile]).to(device)
            best = torch.empty((len(block), 0), device=device)
            rows = torch.empty((len(block), 0), dtype=torch.int64, device=device)
            for start in range(0, len(points), database_tile):
                part = points[start : start + database_tile]
                # |x|² - 2 q·x: |q|² is the same for every candidate of a query.
                score = torch.addmm(squares[start : start + len(part)], block, part.T, alpha=-2)
                score, column = score.topk(min(k, len(part)), dim=1, largest=False, sorted=False)
                best, keep = torch.cat([best, score], dim=1).topk(
                    min(k, best.shape[1] + score.shape[1]), dim=1, largest=False, sorted=False
                )
                rows = torch.cat([rows, column + start], dim=1).gather(1, keep)
            found[first : first + len(block)] = rows.cpu().numpy()
    finally:
        torch.set_float32_matmul_precision(precision)
    return found, f"torch, {device.type}"


def _refine(
    database: Embedding,
    queries: Embedding,
    candidates: Indices,
    norms: npt.NDArray[np.float64],
    k: int,
    ids: Indices | None,
) -> tuple[Indices, npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """The k nearest candidates in float64, and whether they are certainly the k nearest of all.

    A row that was not proposed has a float32 squared distance at least that of every candidate.
    With e the error of a float32 squared distance, its true one is at least that of the farthest
    candidate less 2e. If the k-th true squared distance is below that, nothing is missing. For
    sums of d products in any order, e ≤ (d + 8) u (|q| + |x|)², rounding of the centred values
    included; and the rows that matter have |x| ≤ |q| + r, r the distance of the farthest candidate.
    """
    differences = database[candidates].astype(np.float64)
    differences -= queries[:, None, :]
    squared = np.einsum("qkd,qkd->qk", differences, differences)
    farthest = squared.max(axis=1)
    if ids is not None:
        squared[candidates == ids[:, None]] = np.inf
    order = np.lexsort((candidates, squared), axis=1)[:, :k]
    indices = np.take_along_axis(candidates, order, axis=1)
    squared = np.take_along_axis(squared, order, axis=1)
    if candidates.shape[1] == len(database):
        return indices, squared, np.ones(len(queries), dtype=bool)
    reach = (2 * norms + np.sqrt(farthest)) ** 2
    error = (database.shape[1] + 8) * _FLOAT32_ROUNDOFF * reach
    return indices, squared, squared[:, -1] < farthest - 2 * error


def _search_all(
    database: Embedding, query: Embedding, k: int, own: int
) -> tuple[Indices, npt.NDArray[np.float64]]:
    """One query against every row, in float64."""
    squared = np.empty(len(database))
    tile = max(1, _TILE_BYTES // (8 * database.shape[1]))
    for start in range(0, len(database), tile):
        differences = database[start : start + tile].astype(np.float64) - query
        squared[start : start + tile] = np.einsum("nd,nd->n", differences, differences)
    if own >= 0:
        squared[own] = np.inf
    near = np.flatnonzero(squared <= np.partition(squared, k - 1)[k - 1])
    rows = near[np.lexsort((near, squared[near]))[:k]]
    return rows, squared[rows]
