"""Exact search: float32 proposes, float64 decides, and a bound tells where float32 may be wrong.

The database is read in tiles, from memory or from a mapped file, and each query keeps the best
candidates so far (running top-k). A few more candidates than are wanted are proposed in float32;
their distances are computed again in float64 from the embedding as it was given. A bound on the
float32 error decides for each query whether a neighbour can have been left out, and where it can,
every row within the bound is looked at in float64. So the answer is the same whichever kernel ran,
and in whatever unit the embedding is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from atlas.evaluation.frame import Frame
from atlas.evaluation.vectors import Embedding, tiles

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Kernel = Literal["faiss", "torch"]
Device = Literal["cpu", "cuda"]

FAISS_GPU_MAX_K = 2048
SPARE_CANDIDATES = 16
_FLOAT32_ROUNDOFF = 2.0**-24
_FLOAT32_UNDERFLOW = 2.0**-120  # 64 times what a number loses that becomes 0
_TILE_BYTES = 64 * 2**20
_QUERY_BLOCK = 65536
_TILE_ROWS: dict[tuple[Kernel, Device], int] = {
    ("faiss", "cpu"): 262144,
    ("faiss", "cuda"): 262144,
    ("torch", "cpu"): 16384,
    ("torch", "cuda"): 131072,
}


def import_faiss() -> Any | None:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        return None


def search_exactly(
    database: Embedding,
    queries: Embedding,
    k: int,
    ids: Indices | None,
    *,
    frame: Frame,
    kernel: Kernel,
    device: Device,
) -> tuple[Indices, Floats]:
    """The k nearest rows of ``database``, ordered by (distance, row).

    Parameters
    ----------
    database, queries
        float32 (N, d) and (Q, d), checked.
    k
        Neighbours of each query, at most N, or N - 1 where ids are left out.
    ids
        Row that each query is and that is left out, int64 (Q,), -1 for none.
    frame
        Origin and unit of the float32 distances; that of the database.
    kernel, device
        What computes the float32 distances; on CUDA all GPUs do.

    Returns
    -------
    Rows, int64 (Q, k), and squared distances, float64 (Q, k).
    """
    indices = np.empty((len(queries), k), dtype=np.int64)
    squared = np.empty((len(queries), k), dtype=np.float64)
    wanted = min(k + int(ids is not None) + SPARE_CANDIDATES, len(database))
    for block in tiles(len(queries), _QUERY_BLOCK):
        around = frame.reaching(queries[block])
        candidates = _propose(kernel, device, database, around, queries[block], wanted)
        own = None if ids is None else ids[block]
        indices[block], squared[block], certain = refine(
            database, queries[block], candidates, k, own, around
        )
        unsure = np.flatnonzero(~certain)
        if len(unsure):
            where = block.start + unsure
            indices[where], squared[where] = _search_within(
                database,
                queries[where],
                k,
                None if ids is None else ids[where],
                around,
                squared[where, -1],
            )
    return indices, squared


def refine(
    database: Embedding,
    queries: Embedding,
    candidates: Indices,
    k: int,
    ids: Indices | None,
    frame: Frame,
) -> tuple[Indices, Floats, npt.NDArray[np.bool_]]:
    """The k nearest candidates in float64, and whether they are certainly the k nearest of all.

    A row that was not proposed has a float32 squared distance at least that of every candidate.
    With e the error of a float32 squared distance, its true one is at least that of the farthest
    candidate less 2e. If the k-th true squared distance is below that, nothing is missing. See
    :func:`_error` for e.

    Returns
    -------
    Rows, int64 (Q, k); squared distances, float64 (Q, k); bool (Q,), which means something only
    where all rows were candidates' rivals, as in an exhaustive search.
    """
    indices = np.empty((len(queries), k), dtype=np.int64)
    squared = np.empty((len(queries), k), dtype=np.float64)
    certain = np.ones(len(queries), dtype=bool)
    wanted = candidates.shape[1]
    for rows in tiles(len(queries), max(1, _TILE_BYTES // (8 * wanted * database.shape[1]))):
        differences = database[candidates[rows]].astype(np.float64)
        differences -= queries[rows, None, :]
        distance = np.einsum("qkd,qkd->qk", differences, differences)
        farthest = distance.max(axis=1)
        if ids is not None:
            distance[candidates[rows] == ids[rows, None]] = np.inf
        order = np.lexsort((candidates[rows], distance), axis=1)[:, :k]
        indices[rows] = np.take_along_axis(candidates[rows], order, axis=1)
        squared[rows] = np.take_along_axis(distance, order, axis=1)
        if wanted < len(database):
            error = _error(queries[rows], frame, farthest)
            certain[rows] = squared[rows, -1] < farthest - 2 * error
    return indices, squared, certain


def _error(queries: Embedding, frame: Frame, squared: Floats) -> Floats:
    """Bound on the error of a float32 squared distance, for rows as near as ``squared``.

    For sums of d products in any order it is (d + 8) u (|q| + |x|)², rounding of the centred
    values included; and rows at a distance r have |x| ≤ |q| + r. To it comes what underflows, of
    products and of values, which is less than (d + 8) 2^-120 (1 + |q| + |x|) in the frame's unit.
    """
    sums = 2 * np.linalg.norm(queries - frame.centre, axis=1) + np.sqrt(squared)
    lost = _FLOAT32_UNDERFLOW * frame.unit * (frame.unit + sums)
    bound: Floats = (queries.shape[1] + 8) * (_FLOAT32_ROUNDOFF * sums**2 + lost)
    return bound


def _search_within(
    database: Embedding,
    queries: Embedding,
    k: int,
    ids: Indices | None,
    frame: Frame,
    limit: Floats,
) -> tuple[Indices, Floats]:
    """The k nearest rows in float64, of all whose float32 distance allows that they are.

    ``limit`` is a squared distance within which k rows are known to lie: float64 (Q,).
    """
    points = frame.points(queries)
    squares = np.einsum("qd,qd->q", points, points)
    # Rounded up, as the comparison is one of float32.
    reach = (limit + 2 * _error(queries, frame, limit)) / frame.unit**2
    reach = np.nextafter(reach.astype(np.float32), np.float32(np.inf))
    best = np.full((len(queries), k), np.inf)
    rows = np.full((len(queries), k), len(database), dtype=np.int64)
    for part in tiles(len(database), max(1, _TILE_BYTES // (4 * len(queries)))):
        tile = frame.points(database[part])
        score = np.einsum("nd,nd->n", tile, tile) - 2 * (points @ tile.T) + squares[:, None]
        for query in np.flatnonzero((score <= reach[:, None]).any(axis=1)):
            near = part.start + np.flatnonzero(score[query] <= reach[query])
            if ids is not None:
                near = near[near != ids[query]]
            differences = database[near].astype(np.float64) - queries[query]
            distance = np.concatenate(
                [best[query], np.einsum("nd,nd->n", differences, differences)]
            )
            row = np.concatenate([rows[query], near])
            keep = np.lexsort((row, distance))[:k]
            best[query], rows[query] = distance[keep], row[keep]
    return rows, best


def _propose(
    kernel: Kernel, device: Device, database: Embedding, frame: Frame, queries: Embedding, k: int
) -> Indices:
    """The k rows that are nearest by float32 distances, in no particular order: int64 (Q, k).

    With several GPUs each searches some of the tiles, and the best of all are kept.
    """
    search = _search_faiss if kernel == "faiss" else _search_torch
    points = frame.points(queries)
    parts = list(tiles(len(database), _TILE_ROWS[kernel, device]))
    devices = _devices(kernel, device)[: len(parts)]

    def run(i: int) -> tuple[npt.NDArray[np.float32], Indices]:
        return search(database, frame, points, k, devices[i], parts[i :: len(devices)])

    with full_precision(), ThreadPoolExecutor(len(devices)) as pool:
        found = list(pool.map(run, range(len(devices))))
    return _best(k, *(np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True)))[1]


def _devices(kernel: Kernel, device: Device) -> list[str]:
    """``"cpu"``, or all GPUs that the kernel sees."""
    if device == "cpu":
        return ["cpu"]
    faiss = import_faiss() if kernel == "faiss" else None
    n = torch.cuda.device_count() if faiss is None else faiss.get_num_gpus()
    return [f"cuda:{i}" for i in range(n)]


def _best(
    k: int, score: npt.NDArray[np.float32], rows: Indices
) -> tuple[npt.NDArray[np.float32], Indices]:
    """The k candidates of each query with the lowest score."""
    if score.shape[1] <= k:
        return score, rows
    keep = np.argpartition(score, k - 1, axis=1)[:, :k]
    return np.take_along_axis(score, keep, axis=1), np.take_along_axis(rows, keep, axis=1)


def _search_faiss(
    database: Embedding, frame: Frame, queries: Embedding, k: int, device: str, parts: list[slice]
) -> tuple[npt.NDArray[np.float32], Indices]:
    """Some tiles, by FAISS: scores and rows, (Q, at most k)."""
    faiss = import_faiss()
    assert faiss is not None
    resources = None if device == "cpu" else faiss.StandardGpuResources()
    best = np.empty((len(queries), 0), dtype=np.float32)
    rows = np.empty((len(queries), 0), dtype=np.int64)
    for part in parts:
        tile = frame.points(database[part])
        fewer = min(k, len(tile))
        if resources is None:
            score, column = faiss.knn(queries, tile, fewer)
        else:
            gpu = int(device.removeprefix("cuda:"))
            score, column = faiss.knn_gpu(resources, queries, tile, fewer, device=gpu)
        best, rows = _best(
            k,
            np.concatenate([best, score], axis=1),
            np.concatenate([rows, column + part.start], axis=1),
        )
    return best, rows


def _search_torch(
    database: Embedding, frame: Frame, queries: Embedding, k: int, device: str, parts: list[slice]
) -> tuple[npt.NDArray[np.float32], Indices]:
    """Some tiles, by torch: scores less |q|² and rows, (Q, at most k)."""
    points = torch.from_numpy(queries).to(device)
    blocks = [points[part] for part in tiles(len(points), 512 if device == "cpu" else 4096)]
    best = [torch.empty((len(block), 0), device=device) for block in blocks]
    rows = [torch.empty((len(block), 0), dtype=torch.int64, device=device) for block in blocks]
    for part in parts:
        tile = torch.from_numpy(frame.points(database[part])).to(device)
        squares = tile.square().sum(dim=1)
        for i, block in enumerate(blocks):
            # |x|² - 2 q·x: |q|² is the same for every candidate of a query.
            score = torch.addmm(squares, block, tile.T, alpha=-2)
            score, column = score.topk(min(k, len(tile)), dim=1, largest=False, sorted=False)
            best[i], keep = torch.cat([best[i], score], dim=1).topk(
                min(k, best[i].shape[1] + score.shape[1]), dim=1, largest=False, sorted=False
            )
            rows[i] = torch.cat([rows[i], column + part.start], dim=1).gather(1, keep)
    return torch.cat(best).cpu().numpy(), torch.cat(rows).cpu().numpy()


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products as such: training may have allowed TF32 or bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
