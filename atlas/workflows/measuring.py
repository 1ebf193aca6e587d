"""What is measured, beside what, and what searches: arrays of a store, checked, by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError
from atlas.evaluation.exact import import_faiss
from atlas.evaluation.index import NeighborIndex
from atlas.evaluation.neighbours import Backend
from atlas.evaluation.vectors import check_values
from atlas.store import CountStore
from atlas.workflows.indexing import stored_index

Rows = npt.NDArray[np.float32]
Searcher = Backend | Literal["index"]
"""What searches: exact search with FAISS or torch; ``"index"``, the index kept with an embedding,
whatever its recall; ``"auto"``, that index where it is exact, else exact search."""

SEARCHERS: tuple[Searcher, ...] = ("auto", "faiss", "torch", "index")
INDIVIDUAL = "pca_batch"
BEFORE = "pca"
"""Embeddings that are taken where none are named, if they are there and of the same cells."""


def joint(store: CountStore, name: str) -> Rows:
    """An embedding of all cells in one space: float32 (n_obs, n_latent), finite.

    Raises
    ------
    ConfigError
        It is one of each batch on its own.
    ModelError
        Values that are not finite.
    """
    if _is_per_batch(store.embedding_details(name)):
        raise ConfigError(
            f"{name!r} embeds each batch on its own, and says nothing of batches together",
            found=f"{name!r} as an embedding of all cells",
            expected="one embedding of all cells",
            do=f"name another, and give this one with --individual {name} (individual={name!r})",
            path=store.path,
        )
    return _checked(store, name)


def individual(store: CountStore, name: str | None) -> Rows | None:
    """The batches' own embeddings; None where there are none.

    Warns
    -----
    UserWarning
        The store knows that the one named embeds all cells together.

    Raises
    ------
    ConfigError
        It is of other batches than those that the cells have now.
    """
    if name is None:
        return None
    about = store.embedding_details(name)
    if not _of_the_batches(store, about):
        raise ConfigError(
            f"{name!r} is of other batches than those that the cells have now",
            do="make it again: `atlas baseline STORE --method pca --per-batch`, or `atlas embed "
            "RUN STORE --per-batch DIR`",
            path=store.path,
        )
    if "model" in about and not _is_per_batch(about):
        warnings.warn(
            f"{name!r} embeds all cells together: purity beside it does not say what each batch "
            "keeps of its own structure; `atlas baseline STORE --method pca --per-batch` makes "
            "embeddings of the batches on their own",
            stacklevel=3,
        )
    return _checked(store, name)


def beside(
    store: CountStore, individual: str | None, before: str | None
) -> tuple[str | None, str | None]:
    """Names of the batches' own embeddings, and of the one before integration.

    Where none is named it is ``"pca_batch"``, and ``"pca"``, if these are of all cells and, the
    first, of the batches that they have now; None where they are not.
    """
    if individual is None and _covers(store, INDIVIDUAL):
        about = store.embedding_details(INDIVIDUAL)
        if about.get("per_batch") and _of_the_batches(store, about):
            individual = INDIVIDUAL
    if before is None and _covers(store, BEFORE):
        before = None if _is_per_batch(store.embedding_details(BEFORE)) else BEFORE
    return individual, before


def searcher(
    store: CountStore, name: str, z: Rows, backend: Searcher
) -> tuple[Backend, NeighborIndex | None]:
    """What searches exactly, and the kept index of an embedding where that is searched.

    Raises
    ------
    ConfigError
        There is no such searcher, or no index is kept with the embedding.
    """
    if backend not in SEARCHERS:
        raise ConfigError(
            "there is no such backend", found=backend, expected=" or ".join(SEARCHERS)
        )
    if backend in ("faiss", "torch") or (backend == "auto" and import_faiss() is None):
        return backend, None  # without FAISS an index of its kinds cannot be read
    index = stored_index(store, name, z)
    if backend == "auto":
        exact = index is not None and index.choice.kind in ("exact", "flat")
        return "auto", index if exact else None
    if index is None:
        raise ConfigError(
            f"no index is kept with the embedding {name!r}",
            found="--backend index",
            expected="an embedding with an index, as `atlas keep` and `atlas update` make it",
            do="leave --backend out: the search is exact then",
            path=store.path,
        )
    return "auto", index


def batch_sizes(store: CountStore) -> dict[str, dict[str, int]]:
    """Cells of each batch, as they are kept with embeddings of the batches on their own."""
    codes, counts = np.unique(store.obs_codes["batch"], return_counts=True)
    return {store.batches[c]: {"n_obs": int(n)} for c, n in zip(codes, counts, strict=True)}


def _checked(store: CountStore, name: str) -> Rows:
    z = store.embedding(name)
    check_values(z, f"the embedding {name!r}")
    return z


def _is_per_batch(about: Mapping[str, Any]) -> bool:
    return bool(about.get("per_batch") or about.get("model", {}).get("per_batch"))


def _of_the_batches(store: CountStore, about: Mapping[str, Any]) -> bool:
    """Whether it was made of the batches that cells have now, as far as it is known."""
    made = about.get("per_batch") or {}
    sizes = batch_sizes(store).items()
    return not made or all(made.get(name, {}).get("n_obs") == n["n_obs"] for name, n in sizes)


def _covers(store: CountStore, name: str) -> bool:
    """Whether there is such an embedding, of all studies."""
    parts = [study.parts for study in store.manifest.studies]
    return name in store.embeddings and all(f"embedding:{name}" in part for part in parts)
