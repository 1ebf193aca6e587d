"""What makes an index of inverted lists, as plain arrays; and of them, checked, the index again.

FAISS's own file is read by code that trusts it, so none is taken from a stranger. Centroids, and
the list that each row is in, are the same index: the vectors in the lists are the embedding itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError
from atlas.evaluation.exact import Device, Floats, Indices, import_faiss
from atlas.evaluation.frame import Frame
from atlas.evaluation.index.choice import Choice, choose
from atlas.evaluation.index.lists import Approximate
from atlas.evaluation.index.neighbor_index import NeighborIndex
from atlas.evaluation.index.spool import Spool
from atlas.evaluation.vectors import LARGEST_FLOAT, LARGEST_VALUE, Embedding, check_values, tiles

MAX_LISTS: Final = 65536
"""As many as are ever made (:func:`atlas.evaluation.index.lists.n_lists`)."""
_ADD_ROWS: Final = 262144
_TRIED: Final = 1000
"""Rows whose list is compared with the nearest centroid."""
_ROUNDING: Final = 1e-5
"""Of a squared distance in float32, as a share of the squared lengths that it is made of."""


@dataclass(frozen=True, slots=True, eq=False)
class ListArrays:
    """What makes an index of inverted lists.

    Attributes
    ----------
    centre
        Origin of rows and centroids: float64 (d,).
    centroids
        Of the lists, as points in the frame of the rows around the centre
        (:class:`atlas.evaluation.frame.Frame`): float32 (n_lists, d).
    assigned
        The list of each row: int32 (N,).
    breadth
        Lists that a search looks at.
    seed
        Of the samples by which recall is measured.
    recall_target
        What the breadth was tuned for.
    """

    centre: Floats
    centroids: Embedding
    assigned: npt.NDArray[np.int32]
    breadth: int
    seed: int
    recall_target: float

    @classmethod
    def of(cls, index: NeighborIndex) -> ListArrays | None:
        """Those of an index; None for one of another kind."""
        index.choice  # noqa: B018 - which builds it
        lists = index._lists
        if lists is None or lists.structure == "hnsw":
            return None
        faiss = import_faiss()
        assert faiss is not None
        structure = lists.index
        centroids = faiss.downcast_index(structure.quantizer).reconstruct_n(0, structure.nlist)
        assigned = np.full(len(index), -1, np.int32)
        for number in range(structure.nlist):
            assigned[_rows_of(faiss, structure.invlists, number)] = number
        if (assigned < 0).any():
            raise ConfigError(
                "the lists of the index do not hold all of its rows",
                found=f"{int((assigned < 0).sum()):,} of {len(index):,} rows in no list",
                do="build the index again",
            )
        return cls(
            index._frame.centre.copy(),
            np.ascontiguousarray(centroids, np.float32),
            assigned,
            lists.breadth,
            index.seed,
            index.recall_target,
        )

    def check(self, vectors: Embedding) -> None:
        """Refuse what is no index of some vectors, float32 (N, d): nothing of it is believed.

        The list of each row has to be there, and that of a sample of rows the nearest.

        Raises
        ------
        ConfigError
            With what is wrong.
        """
        n, d = vectors.shape
        lists = len(self.centroids) if self.centroids.ndim else 0
        for what, array, kind, shape in (
            ("centre", self.centre, np.float64, (d,)),
            ("centroids", self.centroids, np.float32, (lists, d)),
            ("assigned", self.assigned, np.int32, (n,)),
        ):
            if array.dtype != kind or array.shape != shape:
                raise _wrong(f"{what} of {array.dtype} {array.shape}", f"{np.dtype(kind)} {shape}")
        if not 1 <= lists <= min(MAX_LISTS, n):
            raise _wrong(f"{lists:,} lists of {n:,} rows", f"1 to {min(MAX_LISTS, n):,}")
        if not 1 <= self.breadth <= lists:
            raise _wrong(f"a breadth of {self.breadth:,}", f"1 to the {lists:,} lists")
        for what, values, most in (
            ("centre", self.centre, LARGEST_FLOAT),
            ("centroids", self.centroids, LARGEST_VALUE),
        ):
            if not (np.abs(values) <= most).all():
                raise _wrong(f"{what} that are not finite", f"values up to {most:g}")
        if self.assigned.min() < 0 or self.assigned.max() >= lists:
            found = f"rows in lists {self.assigned.min():,} to {self.assigned.max():,}"
            raise _wrong(found, f"0 to {lists - 1:,}")
        self._check_nearest(vectors)

    def _check_nearest(self, vectors: Embedding) -> None:
        frame = Frame.of(vectors, self.centre)
        tried = np.linspace(0, len(vectors) - 1, min(_TRIED, len(vectors))).astype(np.int64)
        centroids = self.centroids.astype(np.float64)
        lengths = np.einsum("ij,ij->i", centroids, centroids)
        for part in tiles(len(tried), 64):
            rows = tried[part]
            points = frame.offsets(vectors[rows])
            squared = lengths - 2 * points @ centroids.T  # less the length of each point
            own = np.take_along_axis(squared, self.assigned[rows, None].astype(np.int64), 1)[:, 0]
            slack = np.einsum("ij,ij->i", points, points) + lengths[self.assigned[rows]]
            far = own - squared.min(axis=1) > _ROUNDING * slack
            if far.any():
                row = int(rows[far.argmax()])
                raise _wrong(
                    f"row {row:,} in list {self.assigned[row]:,}, whose centroid is not the "
                    "nearest",
                    "each row in the list of its nearest centroid",
                )

    def index(
        self, vectors: Embedding, *, device: Device | Literal["auto"] = "auto"
    ) -> NeighborIndex:
        """The index of these vectors, float32 (N, d), with the answers that it had elsewhere.

        No centroid is trained and no row assigned. What its recall was elsewhere is not taken for
        granted but measured, as of any index.

        Raises
        ------
        ConfigError
            :meth:`check` refuses it, or FAISS is not installed.
        ModelError
            The vectors are not finite.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        check_values(vectors, "the embedding", LARGEST_FLOAT)
        self.check(vectors)
        n, d = vectors.shape
        chosen = choose(n, d, 0, kind="ivf", device=device)
        faiss = import_faiss()
        assert faiss is not None
        quantizer = faiss.IndexFlatL2(d)
        quantizer.add(np.ascontiguousarray(self.centroids))
        structure = faiss.IndexIVFFlat(quantizer, d, len(self.centroids))
        structure.is_trained = True
        frame = Frame.of(vectors, self.centre)
        for part in tiles(n, _ADD_ROWS):
            points = frame.points(vectors[part])
            ids = np.arange(part.start, part.stop, dtype=np.int64)
            lists = self.assigned[part].astype(np.int64)
            pointers = (faiss.swig_ptr(array) for array in (points, ids, lists))
            structure.add_core(len(points), *pointers)
        index = NeighborIndex(
            d, kind="ivf", device=device, seed=self.seed, recall_target=self.recall_target
        )
        index._spool = Spool.of(vectors)
        index._frame = frame
        index._choice = Choice("ivf", chosen.device, "of lists that came with the embedding")
        index._lists = Approximate(structure, "ivf", chosen.device, frame, self.breadth)
        return index


def _rows_of(faiss: Any, lists: Any, number: int) -> Indices:
    """Numbers of the rows in a list; a copy, as it may lie in a mapped file."""
    size = lists.list_size(number)
    if not size:
        return np.empty(0, np.int64)
    held = lists.get_ids(number)
    try:
        return np.array(faiss.rev_swig_ptr(held, size), np.int64)
    finally:
        lists.release_ids(number, held)


def _wrong(found: str, expected: str) -> ConfigError:
    return ConfigError(
        "the arrays of the index are not those of an index of this embedding",
        found=found,
        expected=expected,
    )
