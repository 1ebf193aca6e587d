"""A classifier over a tree of labels, in log space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import ScanviConfig
from atlas.models.base import Conditions
from atlas.models.labels import LabelTree
from atlas.models.layers import HiddenStack
from atlas.models.likelihood import at_least_float32

_BLOCK = 16
"""Nodes whose logits are one product."""


class TreeClassifier(nn.Module):
    """Log-probabilities of all nodes of a tree, from z; a network for each level.

    The probability of a node is that of its parent times its share among its siblings, which is a
    softmax over them: q(y_i | z) = f_i(z) / Σ_j f_j(z) · q(parent | z), j over the siblings
    (scANVI, Xu et al. 2021, Supplementary Note 5, for two levels).

    Parameters
    ----------
    labels
        The tree.
    config
        Width, depth, norm and dropout of the networks.
    """

    at: Tensor
    siblings: Tensor
    path: Tensor
    leaves: Tensor

    def __init__(self, labels: LabelTree, config: ScanviConfig) -> None:
        super().__init__()
        layers, hidden = config.classifier_layers, config.classifier_hidden
        depths = labels.depths
        self.hidden = nn.ModuleList()
        self.logits = nn.ModuleList()
        order: list[int] = []
        for level in range(labels.n_levels):
            nodes = [i for i, depth in enumerate(depths) if depth == level]
            order += nodes
            if layers:
                stack = HiddenStack(
                    config.n_latent, hidden, layers, 0, config.norm, config.dropout_rate
                )
                self.hidden.append(stack)
            self.logits.append(nn.Linear(hidden if layers else config.n_latent, len(nodes)))
        # From the order of the levels to that of the tree's nodes.
        at = torch.empty(len(order), dtype=torch.int64)
        at[torch.tensor(order)] = torch.arange(len(order))
        self.register_buffer("at", at, persistent=False)
        # Siblings share a number, roots too; a node's path is itself and all above it.
        numbers = {parent: i for i, parent in enumerate(dict.fromkeys(labels.parents))}
        self.n_groups = len(numbers)
        siblings = torch.tensor([numbers[parent] for parent in labels.parents])
        path = torch.eye(len(depths))
        for node, parent in enumerate(labels.parents):
            if parent >= 0:
                path[node] += path[parent]
        self.register_buffer("siblings", siblings, persistent=False)
        self.register_buffer("path", path, persistent=False)
        self.register_buffer("leaves", torch.tensor(labels.leaves), persistent=False)

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Log-probability of each node: (n_cells, n_nodes); (n_cells, n_latent) in.

        Without a generator nothing is dropped.
        """
        logits = torch.cat(self.level_logits(z, generator), dim=-1)[:, self.at]
        if self.n_groups == 1:
            return logits.log_softmax(dim=-1)
        group = self.siblings.expand_as(logits)
        shape = (len(z), self.n_groups)
        highest = logits.new_full(shape, -torch.inf).scatter_reduce(
            -1, group, logits.detach(), "amax"
        )
        shifted = logits - highest.gather(-1, group)
        sums = logits.new_zeros(shape).scatter_add(-1, group, shifted.exp())
        share = shifted - sums.log().gather(-1, group)
        return share @ self.path.T

    def level_logits(self, z: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Logits of the nodes of each level: (n_cells, n_nodes of the level), coarsest first.

        Nodes that surgery adds to a level change no bit of the others' logits.
        """
        none = Conditions(torch.empty(0, dtype=torch.int64))  # the layers see no batch
        out = []
        for level, linear in enumerate(self.logits):
            assert isinstance(linear, nn.Linear)
            h = self.hidden[level](z, none, generator) if len(self.hidden) else z
            out.append(at_least_float32(_in_blocks(h, linear.weight, linear.bias)))
        return out

    def log_classes(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Log-probability of each class, a leaf of the tree: (n_cells, n_classes)."""
        return self.forward(z, generator)[:, self.leaves]


def _in_blocks(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer by products of one shape, padded with zeros.

    How a product sums depends on the number of its columns; that of a block does not.
    """
    n = len(bias)
    pad = -n % _BLOCK
    weights = F.pad(weight, (0, 0, 0, pad)).view(-1, _BLOCK, weight.shape[1])
    biases = F.pad(bias, (0, pad)).view(-1, _BLOCK)
    parts = [F.linear(h, w, b) for w, b in zip(weights, biases, strict=True)]
    return torch.cat(parts, dim=-1)[:, :n]
