"""The index itself: what it holds, and how it is searched."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from atlas.errors import ConfigError
from atlas.evaluation.exact import (
    FAISS_GPU_MAX_K,
    SPARE_CANDIDATES,
    Device,
    Indices,
    Kernel,
)
from atlas.evaluation.frame import Frame
from atlas.evaluation.index import lists, stored
from atlas.evaluation.index.choice import Choice, Kind, check_names, choose
from atlas.evaluation.index.measuring import measured_recall, tune
from atlas.evaluation.index.searching import search_all, search_lists
from atlas.evaluation.index.spool import Spool
from atlas.evaluation.neighbours import (
    EXACT,
    Neighbours,
    Recall,
    check_k,
    check_query_ids,
    check_space,
    distances_of,
)
from atlas.evaluation.vectors import LARGEST_FLOAT, Embedding, check_values, digest


class NeighborIndex:
    """Nearest neighbours of the rows of an embedding, by Euclidean distance.

    Rows are added in parts; they are centred in float64 before they are rounded to float32 for the
    search, and distances are computed in float64 from the rows as given. A row is left out of its
    own neighbours by its number, and equal distances are ordered by row. What an approximate kind
    finds is compared with exact search on 1,000 of the rows, and every result carries that recall.

    Parameters
    ----------
    n_dimensions
        Columns of the embedding.
    kind
        ``"auto"`` chooses when the index is built, by :func:`choose`; see :data:`Kind`.
    device
        ``"auto"`` takes a GPU where the kind can use one.
    seed
        Of samples and centroids. Two indices of the same rows, kind and seed answer the same.
    folder
        Where vectors are kept while they are added, and lists on disk, in files that are gone when
        the index is; memory without one, and a temporary folder for lists. :meth:`save` keeps it.
    n_queries
        Queries to expect, for the choice; without it as many as rows.
    recall_target
        Share of the neighbours that an approximate kind is tuned to find.
    """

    def __init__(
        self,
        n_dimensions: int,
        *,
        kind: Kind | Literal["auto"] = "auto",
        device: Device | Literal["auto"] = "auto",
        seed: int = 0,
        folder: str | os.PathLike[str] | None = None,
        n_queries: int | None = None,
        recall_target: float = 0.99,
    ) -> None:
        if not 0 < recall_target <= 1:
            raise ConfigError(
                "recall_target is out of range", found=recall_target, expected="(0, 1]"
            )
        check_names(kind, device)
        self.seed = seed
        self.recall_target = recall_target
        self._asked: tuple[Kind | Literal["auto"], Device | Literal["auto"]] = (kind, device)
        self._n_queries = n_queries
        self._folder = None if folder is None else Path(folder)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._spool = Spool(n_dimensions, self._folder)
        self._choice: Choice | None = None
        self._frame = Frame(np.zeros(n_dimensions))
        self._lists: lists.Approximate | None = None
        self._recalls: dict[int, Recall] = {}
        self._read_only = False

    @classmethod
    def build(cls, embedding: Embedding, **options: Any) -> Self:
        """An index of an embedding, which is kept by reference and may be a mapped file.

        Parameters
        ----------
        embedding
            float32, (N, d).
        options
            Those of the class.
        """
        embedding = np.ascontiguousarray(embedding, dtype=np.float32)
        check_space(embedding, embedding)
        check_values(embedding, "the embedding", LARGEST_FLOAT)
        index = cls(embedding.shape[1], **options)
        index._spool = Spool.of(embedding)
        index._make()
        return index

    def add(self, rows: Embedding) -> None:
        """Add rows after those that are there; they get the next numbers.

        An index that was built already keeps its centroids and its origin; but for rows of another
        scale (:class:`atlas.evaluation.frame.Frame`) it is built again.

        Parameters
        ----------
        rows
            float32, (n, d).
        """
        if self._read_only:
            raise ConfigError(
                "an index whose files are mapped takes no more rows",
                do="load it with mapped=False, or build it anew with all rows",
            )
        self._spool.append(rows)
        self._recalls.clear()
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if self._choice is None or self._frame.with_rows(rows).exponent != self._frame.exponent:
            self._choice = self._lists = None
        elif self._lists is not None:
            self._lists.add(rows)

    def __len__(self) -> int:
        return len(self._spool)

    @property
    def vectors(self) -> Embedding:
        """The rows: float32 (N, d)."""
        return self._spool.array()

    @property
    def n_dimensions(self) -> int:
        """Columns of the embedding."""
        return self._spool.n_dimensions

    @property
    def digest(self) -> str:
        """SHA-256 of the rows it was built from."""
        return self._spool.digest

    @property
    def choice(self) -> Choice:
        """Kind, device, and why they were taken."""
        return self._built()

    @property
    def backend(self) -> str:
        """What searches, in words."""
        return self._backend(1)

    def _backend(self, wanted: int) -> str:
        if self._choice is None and self._lists is None:  # lists are there while they are tuned
            self._make()
        if self._lists is not None:
            return self._lists.name(wanted)
        choice = self._built()
        if choice.kind == "flat":
            return f"faiss flat, {'GPU' if self._exact_device(wanted) == 'cuda' else 'CPU'}"
        return f"torch, {choice.device}"

    def _exact_device(self, wanted: int) -> Device:
        choice = self._built()
        return "cpu" if choice.kind == "flat" and wanted > FAISS_GPU_MAX_K else choice.device

    def check_embedding(self, embedding: Embedding) -> None:
        """Refuse an embedding that the index was not built from.

        Raises
        ------
        ConfigError
            Other rows, or the same ones in another order.
        """
        if embedding.shape != (len(self), self.n_dimensions) or digest(embedding) != self.digest:
            raise ConfigError(
                "the index is of another embedding",
                found=f"an index of {len(self):,} × {self.n_dimensions}, digest {self.digest[:12]}",
                expected=f"one of the {embedding.shape} values given",
                do="build the index again from this embedding",
            )

    def search(self, queries: Embedding, k: int, query_ids: Indices | None = None) -> Neighbours:
        """The k nearest rows for each query, nearest first, equal distances by row.

        Parameters
        ----------
        queries
            float32, (Q, d).
        k
            Neighbours of each.
        query_ids
            Row that each query is, left out of its own neighbours: int64 (Q,), -1 for none.

        Raises
        ------
        ConfigError
            Shapes that do not fit, or k out of range.
        ModelError
            Values that are not finite.
        """
        self._built()
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        check_space(self.vectors, queries)
        check_values(queries, "the array of queries", LARGEST_FLOAT)
        ids = check_query_ids(query_ids, len(queries), len(self))
        check_k(k, len(self), ids)
        return self._search(queries, k, ids, self.recall(k))

    def neighbours(self, k: int, rows: Indices | None = None) -> Neighbours:
        """Neighbours of rows of the index, each left out of its own: of all, or of ``rows``."""
        rows = np.arange(len(self), dtype=np.int64) if rows is None else rows
        return self.search(self.vectors[rows], k, rows)

    def recall(self, k: int) -> Recall:
        """Share of the k true neighbours that a search finds; measured once for each k.

        Exact kinds have 1, without queries: each of their answers is proved by a bound.
        """
        self._built()
        if self._lists is None or len(self) < 2:
            return EXACT
        if k not in self._recalls:
            fewer = min(k, len(self) - 1)
            self._recalls[k] = measured_recall(
                self.vectors, self._frame, fewer, self.seed, self._find
            )
        return self._recalls[k]

    def _search(
        self, queries: Embedding, k: int, ids: Indices | None, recall: Recall
    ) -> Neighbours:
        wanted = k + 1 + SPARE_CANDIDATES
        if self._lists is not None:
            indices, squared = search_lists(self._lists, self.vectors, queries, k, ids)
        else:
            kernel: Kernel = "faiss" if self._built().kind == "flat" else "torch"
            device = self._exact_device(wanted)
            indices, squared = search_all(
                self.vectors, queries, k, ids, self._frame, kernel, device
            )
        backend = self._backend(wanted)
        return Neighbours(indices, distances_of(squared), backend, recall, ids, len(self))

    def _find(self, rows: Indices, k: int) -> Neighbours:
        return self._search(self.vectors[rows], k, rows, EXACT)

    def _built(self) -> Choice:
        if self._choice is None:
            self._make()
        assert self._choice is not None
        return self._choice

    def _make(self) -> None:
        vectors = self.vectors
        if not len(vectors):
            raise ConfigError("the index holds no rows", do="add rows before searching")
        kind, device = self._asked
        choice = choose(
            len(vectors),
            self.n_dimensions,
            len(vectors) if self._n_queries is None else self._n_queries,
            kind=kind,
            device=device,
        )
        self._frame = Frame.of(vectors)
        if choice.kind in ("ivf", "hnsw", "disk"):
            folder = None
            if choice.kind == "disk":
                self._scratch = tempfile.TemporaryDirectory(
                    dir=self._folder, prefix=".atlas-index-"
                )
                folder = Path(self._scratch.name)
            self._lists = lists.build(
                vectors, choice.kind, choice.device, self._frame, seed=self.seed, folder=folder
            )
            self._read_only = choice.kind == "disk"
            tune(self._lists, vectors, self.seed, self.recall_target, self._find)
        self._choice = choice

    # on disk

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the index to a new folder, which appears whole or not at all.

        Raises
        ------
        OutputError
            The folder is there and not empty.
        """
        choice = self._built()
        return stored.save(
            Path(folder),
            stored.Stored(
                n=len(self),
                n_dimensions=self.n_dimensions,
                digest=self.digest,
                kind=choice.kind,
                why=choice.why,
                seed=self.seed,
                recall_target=self.recall_target,
                centre=tuple(map(float, self._frame.centre)),
                exponent=self._frame.exponent,
                breadth=0 if self._lists is None else self._lists.breadth,
                recalls=dict(self._recalls),
            ),
            self.vectors,
            None if self._lists is None else self._lists.index,
        )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        embedding: Embedding | None = None,
        device: Device | Literal["auto"] = "auto",
        mapped: bool = True,
        check: bool = True,
    ) -> Self:
        """Open an index that was saved.

        Parameters
        ----------
        folder
            What :meth:`save` wrote.
        embedding
            The embedding it should be of; another one is refused.
        device
            Where to search.
        mapped
            Whether vectors and lists stay in their files, read as they are needed; rows can be
            added only without.
        check
            Whether to read all of it once and compare digests.

        Raises
        ------
        FormatError
            No index, or one of a version that is not read.
        CorruptStoreError
            A file that is missing or not as it was written.
        ConfigError
            The index is of another embedding.
        """
        about, vectors, structure = stored.load(Path(folder), mapped=mapped, check=check)
        index = cls(
            about.n_dimensions,
            kind=about.kind,
            device=device,
            seed=about.seed,
            recall_target=about.recall_target,
        )
        index._spool = Spool.of(vectors, about.digest)
        index._frame = Frame(np.array(about.centre), about.exponent)
        chosen = choose(about.n, about.n_dimensions, 0, kind=about.kind, device=device)
        index._choice = Choice(about.kind, chosen.device, about.why)
        index._recalls = dict(about.recalls)
        index._read_only = mapped or about.kind == "disk"
        if structure is not None and about.kind in ("ivf", "hnsw", "disk"):
            index._lists = lists.Approximate(
                structure, about.kind, chosen.device, index._frame, about.breadth
            )
        if embedding is not None:
            index.check_embedding(embedding)
        return index
