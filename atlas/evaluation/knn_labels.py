"""Labels of cells from their nearest labelled neighbours, at each level of a tree of labels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from atlas.config import VoteKernel
from atlas.errors import ConfigError
from atlas.evaluation.frame import check_apart
from atlas.evaluation.kernels import kernel_weights
from atlas.evaluation.neighbours import Backend, Embedding, Search, nearest
from atlas.evaluation.novelty import DistanceScale

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_EQUAL = 1 - 1e-12  # sums of the same weights in another order differ in the last bits


class Tree(Protocol):
    """Labels as a forest, parents before their children (:class:`atlas.models.LabelTree`)."""

    @property
    def parents(self) -> tuple[int, ...]:
        """Of each node, -1 for a root."""

    @property
    def leaves(self) -> tuple[int, ...]:
        """Nodes without children."""

    @property
    def n_levels(self) -> int:
        """Number of levels."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the reference says of some cells.

    Attributes
    ----------
    path
        The label at each level, coarsest first: int64 (n_cells, n_levels), nodes. Each is a child
        of the one before; a leaf stands at the levels below it too.
    probability
        P of each of them: float64 (n_cells, n_levels), falling from level to level.
    leaves
        P of each leaf: float64 (n_cells, n_leaves).
    distance
        How far the cell is from the reference, in the reference's own terms; see
        :class:`atlas.evaluation.novelty.DistanceScale`: float64 (n_cells,).
    """

    path: Codes
    probability: Floats
    leaves: Floats
    distance: Floats

    @property
    def label(self) -> Codes:
        """The label at the finest level."""
        return self.path[:, -1]

    @property
    def uncertainty(self) -> Floats:
        """u = 1 - P of the label at the finest level."""
        return 1 - self.probability[:, -1]


class KnnLabels:
    """A reference of labelled cells, which answers for others by their k nearest neighbours.

    Parameters
    ----------
    z
        Embedding of the reference: float32 (n_reference, d).
    nodes
        Label of each of its cells, a node of the tree: int64 (n_reference,).
    tree
        The labels.
    k
        Neighbours that vote.
    kernel
        Their weights; see :func:`atlas.evaluation.kernels.kernel_weights`.
    seed
        Of the sample by which distances within the reference are known.
    backend
        Of :func:`atlas.evaluation.neighbours.nearest`.
    search
        What searches the rows of ``z`` in its place, such as an index.
    scale
        Distances within the reference, where they are known already.

    Raises
    ------
    ConfigError
        k is not within 1 to the number of cells, or not each of them has a node of the tree.
    ModelError
        The embedding has values that are not finite, or does not tell cells apart.
    """

    def __init__(
        self,
        z: Embedding,
        nodes: Codes,
        tree: Tree,
        *,
        k: int,
        kernel: VoteKernel = "gaussian",
        seed: int = 0,
        backend: Backend = "auto",
        search: Search | None = None,
        scale: DistanceScale | None = None,
    ) -> None:
        # one more than k: each cell's own distances are to k others
        if not 1 <= k < len(z):
            raise ConfigError(
                "k does not fit the reference",
                found=f"k = {k}, and {len(z):,} labelled cells",
                expected="at least 1, and fewer than the labelled cells of the reference",
                do="ask for fewer neighbours, or choose a larger reference",
            )
        n_nodes = len(tree.parents)
        low, high = nodes.min(initial=0), nodes.max(initial=0)
        if nodes.shape != (len(z),) or low < 0 or high >= n_nodes:
            raise ConfigError(
                "the labels of the reference do not fit it",
                found=f"{nodes.size:,} labels, nodes {low} to {high}",
                expected=f"a node of each of {len(z):,} cells, from 0 to {n_nodes - 1}",
                do="leave cells without a label out of the reference",
            )
        check_apart(z, "the embedding of the reference")
        self.z, self.nodes, self.tree, self.k = z, nodes, tree, k
        self.backend = ""
        self._kernel = kernel
        self._search: Search = search or partial(nearest, z, backend=backend)
        self.scale = scale or DistanceScale.of(
            z,
            nodes,
            np.array(tree.parents, np.int64),
            k,
            seed=seed,
            backend=backend,
            search=search,
        )

    def ask(self, queries: Embedding) -> Answer:
        """Label cells that are not in the reference: float32 (n_queries, d).

        Where a cell lies at one place with more than k of the reference, the first of these by row
        vote, of which is warned.
        """
        near = self._search(queries, self.k, None)
        if crowded := int((near.distances[:, -1] == 0).sum()):
            warnings.warn(
                f"{crowded:,} of {len(queries):,} cells lie at one place with {self.k} cells of "
                "the reference or more, of which the first by row vote",
                stacklevel=2,
            )
        self.backend = near.backend
        votes = self.nodes[near.indices]
        weights = kernel_weights(near.distances, self._kernel)
        p = node_probabilities(votes, weights, self.tree)
        path = most_probable_path(p, votes, self.tree)
        return Answer(
            path=path,
            probability=np.take_along_axis(p, path, axis=1),
            leaves=p[:, list(self.tree.leaves)],
            distance=self.scale.score(near.distances, path[:, -1]),
        )


def node_probabilities(votes: Codes, weights: Floats, tree: Tree) -> Floats:
    """P of each node: the share of the neighbours' weights that is for it or for a label below it.

    A neighbour labelled with a group, as some studies' cells are, has no say in which of its
    children it is: it counts for these as the other neighbours of the group do, and for none of
    them where all of the group are labelled so. P of children then is 0; else it sums to that of
    their parent.

    Parameters
    ----------
    votes
        Label of each neighbour: int64 (n_queries, k), nodes.
    weights
        Of the neighbours, with sum 1: float64 (n_queries, k).
    tree
        The labels.

    Returns
    -------
    float64 (n_queries, n_nodes).
    """
    n, n_nodes = len(votes), len(tree.parents)
    keys = (votes + np.arange(n)[:, None] * n_nodes).ravel()
    shares = np.bincount(keys, weights=weights.ravel(), minlength=n * n_nodes).reshape(n, n_nodes)
    for node in range(n_nodes - 1, -1, -1):
        if (parent := tree.parents[node]) >= 0:
            shares[:, parent] += shares[:, node]
    for parent, children in _children(tree).items():
        if parent >= 0:
            own = shares[:, children]
            total = own.sum(axis=1, keepdims=True)
            split = np.divide(own, total, out=np.zeros_like(own), where=total > 0)
            shares[:, children] = shares[:, [parent]] * split
    return np.minimum(shares, 1.0)


def most_probable_path(p: Floats, votes: Codes, tree: Tree) -> Codes:
    """The way of each cell from a root to a leaf: at each node to the most probable child.

    So the labels of a cell at all levels agree. Without a hierarchy it is the most probable label.
    Between equals the one of the nearest neighbour that has one of them is taken.

    Parameters
    ----------
    p
        P of each node: float64 (n_queries, n_nodes).
    votes
        Label of each neighbour, nearest first: int64 (n_queries, k), nodes.
    tree
        The labels.

    Returns
    -------
    int64 (n_queries, n_levels): nodes; a leaf stands at the levels below it too.
    """
    children = _children(tree)
    out = np.empty((len(p), tree.n_levels), np.int64)
    at = np.full(len(p), -1, np.int64)
    for level in range(tree.n_levels):
        above = at.copy()
        for parent in np.unique(above):
            if (below := children.get(int(parent))) is not None:
                rows = np.flatnonzero(above == parent)
                member = _member_of(below, tree)
                at[rows] = below[_best(p[np.ix_(rows, below)], member[votes[rows]])]
        out[:, level] = at
    return out


def _best(p: Floats, votes: Codes) -> Codes:
    """The column of the largest p in each row; of equals that of the first of ``votes`` there.

    ``votes`` are columns of ``p``, -1 for none of them.
    """
    best: Codes = p.argmax(axis=1)
    tied = p >= p.max(axis=1, keepdims=True) * _EQUAL
    rows = np.flatnonzero(tied.sum(axis=1) > 1)
    among = votes[rows]
    counts = np.take_along_axis(tied[rows], np.maximum(among, 0), axis=1) & (among >= 0)
    first = np.take_along_axis(among, counts.argmax(axis=1)[:, None], axis=1)[:, 0]
    best[rows] = np.where(counts.any(axis=1), first, best[rows])
    return best


def _children(tree: Tree) -> dict[int, Codes]:
    """Children of each node that has any, and the roots as those of -1; parents come first."""
    parents = np.array(tree.parents, np.int64)
    return {int(parent): np.flatnonzero(parents == parent) for parent in np.unique(parents)}


def _member_of(siblings: Codes, tree: Tree) -> Codes:
    """Which of some siblings each node is or lies below, -1 for none: int64 (n_nodes,)."""
    out = np.full(len(tree.parents), -1, np.int64)
    out[siblings] = np.arange(len(siblings))
    for node, parent in enumerate(tree.parents):
        if parent >= 0 and out[parent] >= 0:
            out[node] = out[parent]
    return out
