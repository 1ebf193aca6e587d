"""Graph connectivity (Luecken et al. 2022, Methods), as scib-metrics 0.5.10 has it, for any number
of cells: neighbours come block by block, and parts are found label by label."""

from __future__ import annotations

import tempfile

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from atlas.errors import ConfigError
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.neighbours import Neighbours
from atlas.evaluation.vectors import tiles

Indices = npt.NDArray[np.int64]

_IN_MEMORY_BYTES = 2**28
_NONE = -1


class LabelGraphs:
    """The graph of each label: its cells, with an edge to each neighbour that has the label too.

    An edge takes 4 bytes, in memory up to 256 MB and else in an unnamed temporary file, and only
    the graph of one label at a time is put together.

    Cells at one place hang together, both ways: of more such cells than neighbours each finds the
    same first few, and which these are is a matter of order alone.

    Parameters
    ----------
    labels
        Label of every cell, -1 for none.
    k
        Neighbours of each.
    """

    def __init__(self, labels: Categories, k: int) -> None:
        self._labels = labels
        self._members = np.argsort(labels.codes, kind="stable")
        self._starts = np.searchsorted(
            labels.codes[self._members], np.arange(len(labels.names) + 1)
        )
        # Edges of a label name its cells by their place among them, which fits 32 bits.
        self._place = np.full(len(labels), _NONE, dtype=np.int32)
        for code in range(len(labels.names)):
            rows = self._rows(code)
            self._place[rows] = np.arange(len(rows), dtype=np.int32)
        shape = (len(labels), k)
        if len(labels) * k * 4 <= _IN_MEMORY_BYTES:
            self._edges: npt.NDArray[np.int32] = np.full(shape, _NONE, dtype=np.int32)
        else:
            file = tempfile.TemporaryFile()  # noqa: SIM115 -- open as long as the array is mapped
            self._edges = np.memmap(file, np.int32, "w+", shape=shape)
        self._twin = np.full(len(labels), _NONE, dtype=np.int32)
        self._known = np.zeros(len(labels), dtype=bool)

    def _rows(self, code: int) -> Indices:
        return self._members[self._starts[code] : self._starts[code + 1]]

    def add(self, rows: Indices, neighbours: Neighbours) -> None:
        """Take in the neighbours of some cells: int64 (n,), and as many queries."""
        label, indices = self._labels.codes, neighbours.indices
        same = label[rows][:, None] == label[indices]
        self._edges[rows] = np.where(same, self._place[indices], _NONE)
        twins = same & (neighbours.distances == 0)
        first = np.take_along_axis(indices, twins.argmax(axis=1)[:, None], axis=1)[:, 0]
        self._twin[rows] = np.where(twins.any(axis=1), self._place[first], _NONE)
        self._known[rows] = True

    def in_largest_part(self) -> npt.NDArray[np.bool_]:
        """Whether each cell lies in the largest strongly connected part of its label's graph.

        Returns
        -------
        bool, (n_cells,), False for cells without a label.

        Raises
        ------
        ConfigError
            The neighbours of a cell with a label are not there.
        """
        labeled = self._labels.codes != UNLABELED
        if not self._known[labeled].all():
            raise ConfigError(
                "graph connectivity needs the neighbours of all cells",
                found=f"neighbours of {int((self._known & labeled).sum())} cells",
                expected=f"of the {int(labeled.sum())} that have a label",
            )
        inside = np.zeros(len(labeled), dtype=bool)
        for code in self._labels.present():
            rows = self._rows(int(code))
            part = _strong_parts(self._edges, self._twin, rows)
            inside[rows] = part == np.bincount(part).argmax()
        return inside


def _strong_parts(
    edges: npt.NDArray[np.int32], twin: npt.NDArray[np.int32], rows: Indices
) -> npt.NDArray[np.int32]:
    """Part of each row of one label's graph: int32 (n,)."""
    counts = np.empty(len(rows), dtype=np.int64)
    columns = []
    for some in tiles(len(rows)):
        block = edges[rows[some]]
        inside = block != _NONE
        counts[some] = inside.sum(axis=1)
        columns.append(block[inside])
    joined = np.concatenate(columns)
    starts = np.concatenate([[0], np.cumsum(counts)])
    if starts[-1] < 2**31:
        starts = starts.astype(np.int32)
    graph = sp.csr_matrix(
        (np.ones(len(joined), dtype=np.int8), joined, starts), shape=(len(rows), len(rows))
    )
    twins = np.flatnonzero(twin[rows] != _NONE)
    if len(twins):  # the way back; the way there is an edge already
        back = np.ones(len(twins), dtype=np.int8)
        graph = graph + sp.csr_matrix((back, (twin[rows[twins]], twins)), shape=graph.shape)
    _, part = connected_components(graph, directed=True, connection="strong")
    return np.asarray(part)
