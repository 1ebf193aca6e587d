"""Exact nearest neighbours of an embedding; :mod:`atlas.evaluation.exact` says how."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from atlas.errors import ConfigError
from atlas.evaluation.exact import (
    FAISS_GPU_MAX_K,
    SPARE_CANDIDATES,
    Device,
    Indices,
    Kernel,
    import_faiss,
    search_exactly,
)
from atlas.evaluation.frame import Frame
from atlas.evaluation.vectors import LARGEST_FLOAT, Embedding, check_values

__all__ = ["Backend", "Embedding", "Indices", "Neighbours", "Recall", "Search", "nearest"]

Backend = Literal["auto", "faiss", "torch"]


@dataclass(frozen=True, slots=True)
class Recall:
    """Share of the true neighbours that a search finds.

    Attributes
    ----------
    value, standard_error
        Mean over queries of the share found, and its standard error.
    n_queries
        Queries that were searched exactly to know it; 0 where every search is exact, each query
        with a bound that proves it.
    """

    value: float
    standard_error: float
    n_queries: int


EXACT = Recall(1.0, 0.0, 0)
"""Of a search that leaves nothing out."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest rows of a database for each query, nearest first.

    Attributes
    ----------
    indices
        Rows of the database: int64, (n_queries, k).
    distances
        Euclidean distances: float64, (n_queries, k), of as many digits as float32 has
        (:func:`distances_of`).
    backend
        What searched, in words: ``"faiss flat, CPU"``, ``"faiss flat, GPU"``, ``"torch, cuda"``, …
    recall
        Share of the true neighbours that are among these; None where nobody measured it.
    query_ids
        Row of the database that each query is, -1 for none: int64, (n_queries,); None where they
        are not known.
    n
        Rows of the database; None where it is not known.
    """

    indices: Indices
    distances: npt.NDArray[np.float64]
    backend: str
    recall: Recall | None = EXACT
    query_ids: Indices | None = None
    n: int | None = None

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
        return replace(self, indices=self.indices[:, :k], distances=self.distances[:, :k])

    def of(self, queries: Indices | npt.NDArray[np.bool_]) -> Neighbours:
        """Those of some of the queries."""
        return replace(
            self,
            indices=self.indices[queries],
            distances=self.distances[queries],
            query_ids=None if self.query_ids is None else self.query_ids[queries],
        )


Search = Callable[[Embedding, int, Indices | None], Neighbours]
"""What finds the k nearest rows of something for queries; of these some rows' own numbers."""


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
        float32, (N, d); read by tiles, so a memory-mapped array will do. Any finite values: their
        scale has no say (:mod:`atlas.evaluation.frame`).
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
        Values that are not finite.
    """
    database = np.ascontiguousarray(database, dtype=np.float32)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    check_space(database, queries)
    check_values(database, "the database", LARGEST_FLOAT)
    check_values(queries, "the array of queries", LARGEST_FLOAT)
    ids = check_query_ids(query_ids, len(queries), len(database))
    check_k(k, len(database), ids)
    kernel, device, name = kernel_for(backend, k)
    indices, squared = search_exactly(
        database,
        queries,
        k,
        ids,
        frame=Frame.of(database),
        kernel=kernel,
        device=device,
    )
    return Neighbours(indices, distances_of(squared), name, query_ids=ids, n=len(database))


def distances_of(squared: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Square roots with the digits of float32 and the range of float64.

    The digits, as distances that are the same may differ in the last ones of float64, being summed
    in another order; the range, as float32 would round small distances to a few places or to 0.
    """
    digits, exponent = np.frexp(np.sqrt(squared))
    return np.ldexp(digits.astype(np.float32).astype(np.float64), exponent)


def kernel_for(backend: Backend, k: int) -> tuple[Kernel, Device, str]:
    """What searches exactly for k neighbours, where, and its name."""
    check_backend(backend)
    faiss = None if backend == "torch" else import_faiss()
    if faiss is not None:
        if faiss.get_num_gpus() > 0 and k + 1 + SPARE_CANDIDATES <= FAISS_GPU_MAX_K:
            return "faiss", "cuda", "faiss flat, GPU"
        return "faiss", "cpu", "faiss flat, CPU"
    if backend == "faiss":
        raise ConfigError(
            "FAISS is asked for and not installed",
            do="install faiss-cpu or faiss-gpu (never both), or take the torch backend",
        )
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    return "torch", device, f"torch, {device}"


def check_backend(backend: str) -> None:
    """Refuse the name of something that does not search here."""
    if backend not in get_args(Backend):
        raise ConfigError(
            "there is no such backend", found=backend, expected=" or ".join(get_args(Backend))
        )


def check_space(database: Embedding, queries: Embedding) -> None:
    """Refuse arrays that are not (N, d) and (Q, d)."""
    if database.ndim != 2 or queries.ndim != 2 or database.shape[1] != queries.shape[1]:
        raise ConfigError(
            "database and queries do not lie in one space",
            found=f"shapes {database.shape} and {queries.shape}",
            expected="(N, d) and (Q, d)",
        )


def check_query_ids(query_ids: Indices | None, n_queries: int, n: int) -> Indices | None:
    """The ids as int64; refuse those that are no rows of the database."""
    ids = None if query_ids is None else np.asarray(query_ids, dtype=np.int64)
    if ids is not None and (ids.shape != (n_queries,) or np.any((ids < -1) | (ids >= n))):
        raise ConfigError(
            "query_ids do not name rows of the database",
            found=f"shape {ids.shape}",
            expected=f"{n_queries} rows of {n}, or -1",
        )
    return ids


def check_k(k: int, n: int, ids: Indices | None) -> None:
    """Refuse more neighbours than there are rows for a query."""
    available = n - (ids is not None and bool((ids >= 0).any()))
    if not 1 <= k <= available:
        raise ConfigError(
            "k is out of range",
            found=f"k = {k}",
            expected=f"1 to {available}, the cells that can be a neighbour",
            do="ask for fewer neighbours",
        )


def recall_of(found: Neighbours, exact: Neighbours) -> Recall:
    """Share of ``found`` that are as near as the farthest of the ``exact`` neighbours.

    Of rows at equal distance any will do, so twins do not count as lost.
    """
    shares = (found.distances <= exact.distances[:, -1:]).mean(axis=1, dtype=np.float64)
    error = float(shares.std(ddof=1) / math.sqrt(len(shares))) if len(shares) > 1 else 0.0
    return Recall(float(shares.mean()), error, len(shares))
