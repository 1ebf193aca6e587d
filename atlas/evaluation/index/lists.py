"""The approximate structures of FAISS: inverted lists in memory or in a file, and HNSW.

They propose candidates; distances and order come from float64 afterwards, as with exact search.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from atlas.evaluation.exact import FAISS_GPU_MAX_K, Device, Indices, import_faiss
from atlas.evaluation.frame import Frame
from atlas.evaluation.vectors import Embedding, tiles

Structure = Literal["ivf", "hnsw", "disk"]

_ADD_ROWS = 262144
_TRAIN_ROWS_A_LIST = 64
_ITERATIONS = 10
_HNSW_LINKS = 32
_HNSW_BUILD = 100
LISTS_FILE = "lists.ivfdata"


def n_lists(n: int) -> int:
    """Lists for ``n`` rows: about 4 √n, with 39 rows each at the least, as FAISS wants them."""
    return int(max(1, min(4 * np.sqrt(n), n // 39, 65536)))


@dataclass(slots=True)
class Approximate:
    """An index of FAISS, and how widely it searches.

    Attributes
    ----------
    index
        The index, on the CPU, of the points of rows in the frame.
    structure, device
        What it is and where it is searched.
    frame
        Where rows are laid.
    breadth
        Lists looked at (``nprobe``), or candidates kept (``efSearch``).
    """

    index: Any
    structure: Structure
    device: Device
    frame: Frame
    breadth: int = 1
    _on_gpu: Any = None

    @property
    def broadest(self) -> int:
        """The breadth at which all lists, or rows, are looked at."""
        return int(self.index.ntotal if self.structure == "hnsw" else self.index.nlist)

    def name(self, k: int = 1) -> str:
        """What searches for k neighbours, in words."""
        where = "GPU" if self._on_device(k) else "CPU"
        if self.structure == "hnsw":
            return f"faiss HNSW, {where}, efSearch {self.breadth}"
        kind = "IVF on disk" if self.structure == "disk" else "IVF"
        return f"faiss {kind}, {where}, {self.breadth} of {self.index.nlist} lists"

    def add(self, rows: Embedding) -> None:
        """Add rows after those that are there."""
        for part in tiles(len(rows), _ADD_ROWS):
            with one_thread(self.structure == "hnsw"):
                self.index.add(self.frame.points(rows[part]))
        self._on_gpu = None

    def propose(self, queries: Embedding, k: int) -> Indices:
        """The k rows that seem nearest, -1 where fewer were found: int64 (Q, k).

        None is found for queries so far off that all rows are at one place for them.
        """
        held = self.frame.holds(queries)
        found = np.full((len(queries), k), -1, dtype=np.int64)
        if held.any():
            found[held] = self._search(self.frame.points(queries[held]), k)
        return found

    def _search(self, points: Embedding, k: int) -> Indices:
        if self._on_device(k):
            found = self._gpu_index().search(points, k)[1]
        elif self.structure == "hnsw":
            self.index.hnsw.efSearch = max(self.breadth, k)
            found = self.index.search(points, k)[1]
        else:
            self.index.nprobe = self.breadth
            found = self.index.search(points, k)[1]
        return np.asarray(found, dtype=np.int64)

    def tune(self, queries: Embedding, k: int, enough: Callable[[], bool]) -> None:
        """Double the breadth until it is enough for the queries, or all is looked at."""
        while self.breadth < self.broadest:
            # Queries that find too few rows are searched exactly, which is slow and no recall.
            found = self.propose(queries, k)
            if (found >= 0).all(axis=1).mean() > 0.99 and enough():
                return
            self.breadth = min(2 * self.breadth, self.broadest)

    def _on_device(self, k: int) -> bool:
        return self.device == "cuda" and k <= FAISS_GPU_MAX_K

    def _gpu_index(self) -> Any:
        """A copy on the GPU, or in shares on all of them, that looks at as many lists."""
        faiss = import_faiss()
        assert faiss is not None
        if self._on_gpu is None:
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            self._on_gpu = faiss.index_cpu_to_all_gpus(self.index, co=options)
        faiss.GpuParameterSpace().set_index_parameter(self._on_gpu, "nprobe", self.breadth)
        return self._on_gpu


def build(
    vectors: Embedding,
    structure: Structure,
    device: Device,
    frame: Frame,
    *,
    seed: int,
    folder: Path | None,
) -> Approximate:
    """Build a structure of all rows, which are read by tiles.

    Parameters
    ----------
    vectors
        float32, (N, d).
    structure, device, frame
        As in :class:`Approximate`.
    seed
        Of the rows that centroids are found from, and of the centroids.
    folder
        Of the lists, for ``disk``.
    """
    faiss = import_faiss()
    assert faiss is not None
    if structure == "hnsw":
        index = faiss.IndexHNSWFlat(vectors.shape[1], _HNSW_LINKS)
        index.hnsw.efConstruction = _HNSW_BUILD
        built = Approximate(index, structure, device, frame, breadth=64)
        built.add(vectors)
        return built
    index = _trained(faiss, vectors, frame, seed)
    if structure == "disk":
        assert folder is not None
        index = _on_disk(faiss, index, vectors, frame, folder)
        return Approximate(index, structure, device, frame)
    built = Approximate(index, structure, device, frame)
    built.add(vectors)
    return built


def _trained(faiss: Any, vectors: Embedding, frame: Frame, seed: int) -> Any:
    n, d = vectors.shape
    lists = n_lists(n)
    wanted = min(n, lists * _TRAIN_ROWS_A_LIST)
    rows = np.sort(np.random.default_rng(seed).choice(n, wanted, replace=False, shuffle=False))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, lists)
    index.cp.seed = seed % 2**31
    index.cp.niter = _ITERATIONS
    index.cp.max_points_per_centroid = _TRAIN_ROWS_A_LIST
    index.train(frame.points(vectors[rows]))
    return index


def _on_disk(faiss: Any, index: Any, vectors: Embedding, frame: Frame, folder: Path) -> Any:
    """Fill the lists part by part, each written out, and merge them into one file."""
    from faiss.contrib.ondisk import merge_ondisk

    with tempfile.TemporaryDirectory(dir=folder, prefix=".parts-") as scratch:
        names = []
        empty = str(Path(scratch) / "empty.faiss")
        faiss.write_index(index, empty)
        for part in tiles(len(vectors), 4 * _ADD_ROWS):
            shard = faiss.read_index(empty)
            shard.add_with_ids(
                frame.points(vectors[part]), np.arange(part.start, part.stop, dtype=np.int64)
            )
            names.append(str(Path(scratch) / f"{part.start}.faiss"))
            faiss.write_index(shard, names[-1])
        merge_ondisk(index, names, str(folder / LISTS_FILE))
    return index


class one_thread:
    """FAISS with one thread while ``wanted``: HNSW links by the order in which rows arrive."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def __enter__(self) -> None:
        if self.wanted:
            faiss = import_faiss()
            assert faiss is not None
            self._before = int(faiss.omp_get_max_threads())
            faiss.omp_set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            faiss = import_faiss()
            assert faiss is not None
            faiss.omp_set_num_threads(self._before)
