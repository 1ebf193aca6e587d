"""New batches of a study are kept as far apart as their own expression says that they are.

Each new batch has rows of weights of its own, with which it can be laid upon the reference whole:
what differs between the batches of a study, a stimulation say, is then taken for a technical
effect and lost (entropy of mixing rewards it). The same holds for a study that is a condition of
one that was mapped before. Not of the papers; see benchmarks/LOG.md for what it does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from atlas.models.base import Inputs, Model
from atlas.models.expression import log_normalized

_NEIGHBOURS = 15
"""The squared distance to this one is a cell's unit of length."""

_LEAST = 1e-4
"""The least share, so that its logarithm is finite."""

_FEW = 2 * _NEIGHBOURS
"""A minibatch of fewer cells says nothing of neighbours."""


@dataclass(frozen=True, slots=True)
class Companions:
    """Cells that lie where they are, from which new ones are kept apart.

    Attributes
    ----------
    expression
        Normalised, as :func:`atlas.models.expression.log_normalized` gives it: (n_cells, n_genes).
    z
        float32, (n_cells, n_latent).
    batch
        Their batches' codes, other ones than those of new cells: int64, (n_cells,).
    """

    expression: Tensor
    z: Tensor
    batch: Tensor


class KeepApart:
    r"""A penalty on cells of different batches that are nearer in z than in expression.

    With :math:`d_{ij}` the distance of two cells of a minibatch and :math:`s_i` that of i to its
    15th neighbour, cell j weighs :math:`w_{ij} \propto \exp(-2 d_{ij}^2 / s_i^2)` for i, and the
    weights of i sum to 1. Let :math:`p_i` be the share of them that cells of its own batch have by
    the principal components of the normalised expression of the new cells, and :math:`q_i` the
    same in z. The penalty is the mean of
    :math:`p_i \log (p_i/q_i) + (1-p_i) \log ((1-p_i)/(1-q_i))` times the weight.

    Companions are taken into each minibatch, as many as it has cells, if there are so many. Which
    ones depends on nothing but the minibatch, so that a resumed training goes on as it would have.

    Parameters
    ----------
    mean, components
        Mean expression, (n_genes,), and principal components, (n_genes, n_components), of the new
        cells.
    weight
        Of the penalty, in nats.
    companions
        Further cells, which no gradient moves.
    """

    def __init__(
        self,
        mean: Tensor,
        components: Tensor,
        weight: float,
        companions: Companions | None = None,
    ) -> None:
        self._mean, self._components, self._weight = mean, components, weight
        self._companions = companions
        if companions is not None:
            self._beside = (companions.expression - mean) @ components

    def __call__(self, module: Model, inputs: Inputs) -> Tensor | None:
        """The penalty of a minibatch; None where it is too small, or of one batch."""
        batch, beside = inputs.batch, self._companions
        if len(batch) < _FEW or (beside is None and bool((batch == batch[0]).all())):
            return None
        device = batch.device
        with torch.no_grad():
            expression = log_normalized(inputs) - self._mean.to(device)
            expression = expression @ self._components.to(device)
        z, _ = module.encode(inputs)
        if beside is not None:
            taken = _taken(inputs, len(beside.batch))
            expression = torch.cat([expression, self._beside[taken].to(device)])
            z = torch.cat([z, beside.z[taken].to(device)])
            batch = torch.cat([batch, beside.batch[taken].to(device)])
        p, q = _own_share(expression, batch), _own_share(z, batch)
        divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return self._weight * divergence.mean()


def _taken(inputs: Inputs, n: int) -> Tensor:
    """Which of n companions stand beside a minibatch: evenly spread, from where its counts say."""
    step = max(1, n // len(inputs.batch))
    first = int(inputs.counts.sum()) % step
    return torch.arange(first, n, step)[: len(inputs.batch)]


def _own_share(x: Tensor, batch: Tensor) -> Tensor:
    """Share of each cell's weights that cells of its own batch have: (n_cells,)."""
    squared = (x.unsqueeze(1) - x.unsqueeze(0)).square().sum(dim=-1)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    unit = squared.detach().masked_fill(itself, torch.inf)
    unit = unit.kthvalue(_NEIGHBOURS, dim=1, keepdim=True).values
    logits = (-2 * squared / unit.clamp(min=1e-12)).masked_fill(itself, -torch.inf)
    own = batch.unsqueeze(1) == batch.unsqueeze(0)
    return (logits.softmax(dim=-1) * own).sum(dim=-1).clamp(_LEAST, 1 - _LEAST)


def principal_components(minibatches: Iterable[Inputs], n: int) -> tuple[Tensor, Tensor]:
    """Mean and first principal components of normalised expression, in one pass.

    Parameters
    ----------
    minibatches
        The cells, on any device.
    n
        How many components; fewer where there are fewer genes.

    Returns
    -------
    float32 on the CPU, (n_genes,) and (n_genes, n).
    """
    n_cells, total, products = 0, torch.zeros(()), torch.zeros(())
    for inputs in minibatches:
        x = log_normalized(inputs)
        n_cells += len(x)
        total = total + x.sum(dim=0, dtype=torch.float64).cpu()
        products = products + (x.T @ x).double().cpu()
    mean = total / n_cells
    covariance = (products / n_cells - torch.outer(mean, mean)).numpy()
    last = len(covariance) - 1
    _, vectors = eigh(covariance, subset_by_index=[max(0, last + 1 - n), last])
    components = np.ascontiguousarray(vectors[:, ::-1], np.float32)
    return mean.float(), torch.from_numpy(components)
