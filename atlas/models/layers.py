"""Fully connected layers with a weight per batch, as scvi-tools stacks them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import Norm
from atlas.models.likelihood import at_least_float32

VARIANCE_FLOOR = 1e-4
"""Added to every posterior variance (scvi-tools' ``var_eps``)."""


class BatchLinear(nn.Module):
    """A linear layer plus one row of weights per batch.

    The same function as a linear layer on the input with the one-hot batch appended, but the
    weights of the batches are a parameter of their own: adding batches later leaves every other
    parameter alone (scArches, Lotfollahi et al. 2022, Methods).

    Parameters
    ----------
    n_in, n_out
        Width of input and output.
    n_batch
        Number of batches.
    """

    def __init__(self, n_in: int, n_out: int, n_batch: int) -> None:
        super().__init__()
        # Bounds as if the one-hot batch were part of the input, which is how the peers draw them.
        bound = 1 / math.sqrt(n_in + n_batch)
        self.weight = nn.Parameter(torch.empty(n_out, n_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound))
        self.batch_weight = nn.Parameter(torch.empty(n_batch, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        """Map (n_cells, n_in) and batch codes (n_cells,) to (n_cells, n_out)."""
        return F.linear(x, self.weight, self.bias) + F.embedding(batch, self.batch_weight)


class HiddenStack(nn.Module):
    """Layers of linear → norm → ReLU → dropout; the batch enters each linear layer.

    LayerNorm has no weights of its own and BatchNorm has momentum .01 and epsilon .001, as in
    scvi-tools.

    Parameters
    ----------
    n_in
        Width of the input.
    n_hidden, n_layers
        Width and number of the layers.
    n_batch
        Number of batches; 0 for layers that do not see the batch.
    norm
        ``"layer"`` or ``"batch"``.
    dropout_rate
        Share of the activations set to zero in training mode.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_layers: int,
        n_batch: int,
        norm: Norm,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.sees_batch = n_batch > 0
        self.dropout_rate = dropout_rate
        widths = [n_in] + [n_hidden] * (n_layers - 1)
        self.linears = nn.ModuleList(
            BatchLinear(width, n_hidden, n_batch) if self.sees_batch else nn.Linear(width, n_hidden)
            for width in widths
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(n_hidden, elementwise_affine=False)
            if norm == "layer"
            else nn.BatchNorm1d(n_hidden, momentum=0.01, eps=0.001)
            for _ in widths
        )

    def forward(self, x: Tensor, batch: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map (n_cells, n_in) to (n_cells, n_hidden).

        Without a generator, or in evaluation mode, nothing is dropped.
        """
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = linear(x, batch) if self.sees_batch else linear(x)
            x = F.relu(norm(at_least_float32(x)))
            if self.training and generator is not None and self.dropout_rate > 0:
                x = dropout(x, self.dropout_rate, generator)
        return x


class Encoder(nn.Module):
    """A normal posterior from a hidden stack: mean, and variance ``exp(·) + 1e-4``.

    Parameters
    ----------
    n_in, n_out
        Width of the input and of the posterior.
    n_hidden, n_layers, n_batch, norm, dropout_rate
        As in :class:`HiddenStack`.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_hidden: int,
        n_layers: int,
        n_batch: int,
        norm: Norm,
        dropout_rate: float,
    ) -> None:
        super().__init__()
        self.hidden = HiddenStack(n_in, n_hidden, n_layers, n_batch, norm, dropout_rate)
        self.mean = nn.Linear(n_hidden, n_out)
        self.log_variance = nn.Linear(n_hidden, n_out)

    def forward(
        self, x: Tensor, batch: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance, each (n_cells, n_out) and at least float32."""
        h = self.hidden(x, batch, generator)
        mean = at_least_float32(self.mean(h))
        variance = at_least_float32(self.log_variance(h)).exp() + VARIANCE_FLOOR
        return mean, variance


def dropout(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Set a share ``rate`` of ``x`` to zero and scale the rest by ``1 / (1 - rate)``.

    ``torch.nn.functional.dropout`` knows the global generator only, which cannot be saved and
    restored beside others.
    """
    kept = torch.empty_like(x).bernoulli_(1 - rate, generator=generator)
    return x * kept.div_(1 - rate)


def sample_normal(mean: Tensor, variance: Tensor, generator: torch.Generator | None) -> Tensor:
    """Reparametrised sample of a normal; its mean where there is no generator."""
    if generator is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return torch.addcmul(mean, noise, variance.sqrt())
