"""Continuous trees: cells all along the branches, whose end points alone are types.

As SymSim's continuous populations (Zhang et al. 2019), which the scANVI paper uses for the
uncertainty of labels (Xu et al. 2021, Supplementary Figure 15): cells are spread evenly along the
branches, and those beside an end point are labelled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

STATES_PER_BRANCH = 32
END_RADIUS = 0.1
"""Cells so near to an end point have its label; branches are 0.5 to 1.5 long."""

_SPREAD = 0.7
"""Standard deviation, per dimension, of the latent at two points that are 1 apart."""


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """A tree and the points along it; end points are the root and the tips.

    Attributes
    ----------
    nodes
        str, (n_nodes,): the root first, a node after its parent.
    parent
        int64, (n_nodes,): -1 for the root.
    length
        float64, (n_nodes,): of the branch to the parent; 0 for the root.
    branches
        str, (n_nodes - 1,): ``parent:node``, of the nodes but the root.
    ends
        str, (n_ends,): the root, then the tips.
    state_branch
        int64, (n_states,): 32 states a branch, evenly spread.
    state_depth
        float64, (n_states,): distance from the root along the tree.
    state_distance
        float64, (n_states, n_ends): distance from each end point along the tree.
    state_latent
        float32, (n_states, n_latent): Brownian motion along the branches, 0 at the root.
    """

    nodes: npt.NDArray[np.str_]
    parent: npt.NDArray[np.int64]
    length: npt.NDArray[np.float64]
    branches: npt.NDArray[np.str_]
    ends: npt.NDArray[np.str_]
    state_branch: npt.NDArray[np.int64]
    state_depth: npt.NDArray[np.float64]
    state_distance: npt.NDArray[np.float64]
    state_latent: npt.NDArray[np.float32]

    @property
    def state_end(self) -> npt.NDArray[np.int64]:
        """The end point that each state lies beside: int64, (n_states,), -1 for none."""
        nearest = self.state_distance.argmin(axis=1)
        return np.where(self.state_distance.min(axis=1) <= END_RADIUS, nearest, -1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed ``.npz`` without pickles."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The inverse of :meth:`save`."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def draw_tree(tips: int, seed: int, n_latent: int = 10) -> Tree:
    """Draw a binary tree: from the root on a random tip splits until there are enough.

    Parameters
    ----------
    tips
        At least 2.
    seed
        Of everything.
    n_latent
        Dimensions of the latent space.
    """
    rng = np.random.default_rng([seed, 5])
    parent, leaves = [-1], [0]
    while len(leaves) < tips:
        split = leaves.pop(int(rng.integers(len(leaves))))
        leaves += [len(parent), len(parent) + 1]
        parent += [split, split]
    n_nodes = len(parent)
    inner = [node for node in range(1, n_nodes) if node not in leaves]
    names = {0: "root"} | {node: f"tip_{i + 1}" for i, node in enumerate(sorted(leaves))}
    names |= {node: f"node_{i + 1}" for i, node in enumerate(inner)}
    length = np.concatenate([[0.0], rng.uniform(0.5, 1.5, n_nodes - 1)])

    depth = np.zeros(n_nodes)
    latent = np.zeros((n_nodes, n_latent))
    # half a step to the first state, whole ones between, half a one to the node
    steps = np.array([0.5, *[1.0] * (STATES_PER_BRANCH - 1), 0.5]) / STATES_PER_BRANCH
    state_depth, state_latent = [], []
    for node in range(1, n_nodes):
        above = parent[node]
        depth[node] = depth[above] + length[node]
        spread = _SPREAD * np.sqrt(steps * length[node])
        path = latent[above] + np.cumsum(
            rng.normal(0.0, 1.0, (len(steps), n_latent)) * spread[:, None], axis=0
        )
        latent[node] = path[-1]
        state_latent.append(path[:-1])
        state_depth.append(depth[above] + np.cumsum(steps)[:-1] * length[node])

    ends = [0, *sorted(leaves)]
    branch = np.repeat(np.arange(n_nodes - 1), STATES_PER_BRANCH)
    depths = np.concatenate(state_depth)
    ancestors = [_with_ancestors(node, parent) for node in range(n_nodes)]
    distance = np.empty((len(depths), len(ends)))
    for column, end in enumerate(ends):
        for node in range(1, n_nodes):
            mine = branch == node - 1
            if node in ancestors[end]:
                distance[mine, column] = depth[end] - depths[mine]
            else:
                meet = max(depth[shared] for shared in ancestors[end] & ancestors[node])
                distance[mine, column] = depths[mine] + depth[end] - 2 * meet
    return Tree(
        nodes=np.array([names[node] for node in range(n_nodes)]),
        parent=np.array(parent, np.int64),
        length=length,
        branches=np.array([f"{names[parent[n]]}:{names[n]}" for n in range(1, n_nodes)]),
        ends=np.array([names[end] for end in ends]),
        state_branch=branch,
        state_depth=depths,
        state_distance=distance,
        state_latent=np.concatenate(state_latent).astype(np.float32),
    )


def _with_ancestors(node: int, parent: list[int]) -> set[int]:
    out = {node}
    while (node := parent[node]) >= 0:
        out.add(node)
    return out
