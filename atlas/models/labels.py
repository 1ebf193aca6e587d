"""Classes of cells and the groups above them, to any depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError


@dataclass(frozen=True)
class LabelTree:
    """Labels as a forest: types of cells are its leaves, groups of types its inner nodes.

    A label that no table mentions is a root and a leaf, so that labels without a hierarchy are a
    tree of one level (scANVI, Xu et al. 2021, Supplementary Note 5, which has two).

    Parameters
    ----------
    names
        Of all nodes, parents before their children.
    parents
        Number of each node's parent, -1 for a root.

    Raises
    ------
    ConfigError
        Names are empty or come twice, or a parent does not come before its child.
    """

    names: tuple[str, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        ordered = all(parent < i for i, parent in enumerate(self.parents))
        unique = len(set(self.names)) == len(self.names) == len(self.parents)
        if not (self.names and unique and ordered and min(self.parents) >= -1):
            raise ConfigError(
                "These are not the nodes of a tree of labels",
                found=f"{len(self.names)} names, {len(set(self.names))} different, and "
                f"{len(self.parents)} parents",
                expected="different names, each with a parent before it or -1",
            )

    @classmethod
    def make(
        cls,
        labels: Iterable[str],
        parent_of: Mapping[str, str] | None = None,
        unobserved: int = 0,
    ) -> Self:
        """The tree of some labels.

        Parameters
        ----------
        labels
            Labels that cells have, of types or of groups.
        parent_of
            The parent of each node that has one. Nodes of it that no cell is labelled with are part
            of the tree too.
        unobserved
            Classes to add, at the root, for types of cells that no label stands for
            (scANVI, Online Methods, Hyperparameters).

        Raises
        ------
        ConfigError
            The table has a cycle, or stands apart from the labels.
        """
        parent_of = dict(parent_of or {})
        labels = list(dict.fromkeys(labels))
        known = {*parent_of, *parent_of.values()}
        if parent_of and (orphans := [label for label in labels if label not in known]):
            raise ConfigError(
                "The hierarchy does not have all labels of the cells",
                found=", ".join(orphans[:5]) + (", …" if len(orphans) > 5 else ""),
                expected=f"some of {', '.join(sorted(known)[:10])}",
                do="give each label a parent, or name it as one",
            )
        depth: dict[str, int] = {}
        for node in [*labels, *parent_of, *parent_of.values()]:
            depth[node] = _depth(node, parent_of)
        names = sorted(depth, key=lambda node: (depth[node], node))
        names += [f"unobserved {i + 1}" for i in range(unobserved)]
        number = {name: i for i, name in enumerate(names)}
        parents = (number[parent_of[n]] if n in parent_of else -1 for n in names)
        return cls(tuple(names), tuple(parents))

    def with_roots(self, names: Iterable[str]) -> LabelTree:
        """The tree with further leaves at the root, after its own nodes."""
        new = tuple(names)
        return LabelTree((*self.names, *new), (*self.parents, *(-1 for _ in new)))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node; 0 for a root."""
        out: list[int] = []
        for parent in self.parents:
            out.append(0 if parent < 0 else out[parent] + 1)
        return tuple(out)

    @property
    def n_levels(self) -> int:
        """Number of levels."""
        return max(self.depths) + 1

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Numbers of the nodes without children: the classes, in order."""
        inner = set(self.parents)
        return tuple(i for i in range(len(self.names)) if i not in inner)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the leaves."""
        return tuple(self.names[i] for i in self.leaves)

    @cached_property
    def below(self) -> npt.NDArray[np.bool_]:
        """Which leaf is which node, or lies below it: bool, (n_nodes, n_leaves)."""
        out = np.zeros((len(self.names), len(self.leaves)), bool)
        for column, leaf in enumerate(self.leaves):
            node = leaf
            while node >= 0:
                out[node, column] = True
                node = self.parents[node]
        return out

    def at_level(self, level: int) -> npt.NDArray[np.int64]:
        """The node at a level above each leaf, or the leaf itself where it ends before: (leaves,).

        Level 0 is the coarsest.
        """
        out = []
        for leaf in self.leaves:
            node = leaf
            while self.depths[node] > level:
                node = self.parents[node]
            out.append(node)
        return np.array(out, np.int64)

    def paths(self, log_p: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int64]:
        """The way of each cell from a root to a leaf: at each node to the most probable child.

        So the labels of a cell at all levels agree: each is the child of the one before. That at
        level 0 is the most probable of its level; further down a node can be less probable than
        one under another parent, as the best of three equal types of a group of .6 is than a
        group of .4 with one type (top-down prediction of a local classifier per parent node,
        Silla and Freitas 2011, "A survey of hierarchical classification across different
        application domains", Data Mining and Knowledge Discovery 22, section 4).

        Parameters
        ----------
        log_p
            Log-probability of each node: (n_cells, n_nodes).

        Returns
        -------
        int64, (n_cells, n_levels): numbers of nodes; a leaf stands at the levels below it too.
        """
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            children.setdefault(parent, []).append(node)
        out = np.empty((len(log_p), self.n_levels), np.int64)
        at = np.full(len(log_p), -1, np.int64)
        for level in range(self.n_levels):
            above = at.copy()
            for parent in np.unique(above):
                if (below := children.get(int(parent))) is not None:
                    rows = np.flatnonzero(above == parent)
                    at[rows] = np.array(below)[log_p[rows][:, below].argmax(axis=1)]
            out[:, level] = at
        return out

    def codes(self, names: Iterable[str | None]) -> npt.NDArray[np.int32]:
        """Number of each name's node, -1 for None and for names that the tree does not have."""
        number = {name: i for i, name in enumerate(self.names)}
        return np.array([-1 if n is None else number.get(n, -1) for n in names], np.int32)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"names": list(self.names), "parents": list(self.parents)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls(tuple(values["names"]), tuple(values["parents"]))


def _depth(node: str, parent_of: Mapping[str, str]) -> int:
    path = [node]
    while path[-1] in parent_of:
        path.append(parent_of[path[-1]])
        if path[-1] in path[:-1]:
            raise ConfigError(
                "The hierarchy of labels has a cycle",
                found=" → ".join(path[path.index(path[-1]) :]),
                expected="a tree: going from child to parent ends at a root",
                do="take one of these lines out",
            )
    return len(path) - 1
