"""Fully connected layers with a weight per batch, as scvi-tools stacks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, starmap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import Norm
from atlas.models import noise, products
from atlas.models.base import Conditions, CovariateSizes
from atlas.models.likelihood import at_least_float32
from atlas.models.sparse import row_sums, times_weight

NO_COVARIATES = CovariateSizes()

VARIANCE_FLOOR = 1e-4
"""Added to every posterior variance (scvi-tools' ``var_eps``)."""


class ConditionalLinear(nn.Module):
    """A linear layer plus one row of weights per batch, and weights for further covariates.

    The same function as a linear layer on the input with the one-hot batch and covariates appended,
    but each covariate's weights are a parameter of their own: adding batches later leaves every
    other parameter alone (scArches, Lotfollahi et al. 2022, Methods).

    Parameters
    ----------
    n_in, n_out
        Width of input and output.
    n_batch
        Number of batches; 0 where the layer does not see the batch.
    covariates
        Further covariates that it sees.
    """

    def __init__(
        self, n_in: int, n_out: int, n_batch: int, covariates: CovariateSizes = NO_COVARIATES
    ) -> None:
        super().__init__()
        # Bounds as if all conditions were part of the input, which is how the peers draw them.
        n_all = n_in + n_batch + sum(covariates.n_categories) + covariates.n_continuous
        bound = 1 / math.sqrt(n_all)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.weight = draw(n_out, n_in)
        # Sparse counts pick columns of it: they lie contiguous in memory, in any layout of counts.
        self.weight.data = self.weight.data.t().contiguous().t()
        self.bias = draw(n_out)
        self.sees_batch = n_batch > 0
        if self.sees_batch:
            self.batch_weight = draw(n_batch, n_out)
        self.category_weights = nn.ParameterList(draw(n, n_out) for n in covariates.n_categories)
        self.sees_continuous = covariates.n_continuous > 0
        if self.sees_continuous:
            self.continuous_weight = draw(n_out, covariates.n_continuous)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """Map (n_cells, n_in), dense or in ``torch.sparse_csr`` layout, to (n_cells, n_out)."""
        out = times_weight(x, self.weight, self.bias)
        if self.sees_batch:
            out = out + F.embedding(conditions.batch, self.batch_weight)
        if len(self.category_weights):
            assert conditions.categories is not None
            columns = conditions.categories.unbind(dim=1)
            for codes, weight in zip(columns, self.category_weights, strict=True):
                out = out + F.embedding(codes, weight)
        if self.sees_continuous:
            assert conditions.continuous is not None
            out = out + F.linear(conditions.continuous, self.continuous_weight)
        return out


class GeneLinear(nn.Linear):
    """The linear layer from the last hidden one to all genes.

    Parameters
    ----------
    n_in, n_genes
        Width of input and output.
    """

    def __init__(self, n_in: int, n_genes: int) -> None:
        super().__init__(n_in, n_genes)
        self.weight.data = self.weight.data.t().contiguous().t()  # see products.linear

    def forward(self, x: Tensor) -> Tensor:
        """Map (n_cells, n_in) to (n_cells, n_genes)."""
        return products.linear(x, self.weight, self.bias)


class HiddenStack(nn.Module):
    """Layers of linear → norm → ReLU → dropout; batch and covariates enter each linear layer.

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
    covariates
        Further covariates that the layers see.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_layers: int,
        n_batch: int,
        norm: Norm,
        dropout_rate: float = 0.0,
        covariates: CovariateSizes = NO_COVARIATES,
    ) -> None:
        super().__init__()
        self.dropout_rate = dropout_rate
        self.n_out = n_hidden
        widths = [n_in] + [n_hidden] * (n_layers - 1)
        self.linears = nn.ModuleList(
            ConditionalLinear(width, n_hidden, n_batch, covariates) for width in widths
        )
        self.norms = nn.ModuleList(_norm(n_hidden, norm) for _ in widths)

    def forward(
        self, x: Tensor, conditions: Conditions, generator: torch.Generator | None = None
    ) -> Tensor:
        """Map (n_cells, n_in) to (n_cells, n_hidden).

        Without a generator, or in evaluation mode, nothing is dropped.
        """
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = _activated(self, linear(x, conditions), norm, generator)
        return x


class TaperedStack(nn.Module):
    """Layers of linear → norm → ReLU → dropout, each of its own width.

    Unlike in :class:`HiddenStack`, the batch enters the first layer only (scArches, Lotfollahi et
    al. 2022, Methods; DAVAE, "The non-linear model"). The norms are the same.

    Parameters
    ----------
    n_in
        Width of the input.
    widths
        Widths of the layers, one at least.
    n_batch
        Number of batches; 0 where the first layer does not see the batch.
    norm, dropout_rate
        As in :class:`HiddenStack`.
    """

    def __init__(
        self, n_in: int, widths: Sequence[int], n_batch: int, norm: Norm, dropout_rate: float
    ) -> None:
        super().__init__()
        self.dropout_rate = dropout_rate
        self.n_out = widths[-1]
        self.first = ConditionalLinear(n_in, widths[0], n_batch)
        self.others = nn.ModuleList(starmap(nn.Linear, pairwise(widths)))
        self.norms = nn.ModuleList(_norm(width, norm) for width in widths)

    def forward(
        self, x: Tensor, conditions: Conditions, generator: torch.Generator | None = None
    ) -> Tensor:
        """Map (n_cells, n_in) to (n_cells, widths[-1]); see :meth:`HiddenStack.forward`."""
        return self.continued(self.begun(x, conditions, generator), generator)

    def begun(
        self, x: Tensor, conditions: Conditions, generator: torch.Generator | None = None
    ) -> Tensor:
        """Output of the first layer: (n_cells, widths[0])."""
        return _activated(self, self.first(x, conditions), self.norms[0], generator)

    def continued(self, h: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """From the output of the first layer to that of the last: (n_cells, widths[-1])."""
        for linear, norm in zip(self.others, self.norms[1:], strict=True):
            h = _activated(self, linear(h), norm, generator)
        return h


class Encoder(nn.Module):
    """A normal posterior from hidden layers: mean, and variance ``exp(·) + 1e-4``.

    Parameters
    ----------
    hidden
        The layers.
    n_out
        Width of the posterior.
    """

    def __init__(self, hidden: HiddenStack | TaperedStack, n_out: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.mean = nn.Linear(hidden.n_out, n_out)
        self.log_variance = nn.Linear(hidden.n_out, n_out)

    def forward(
        self, x: Tensor, conditions: Conditions, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance, each (n_cells, n_out) and at least float32."""
        h = self.hidden(x, conditions, generator)
        mean = at_least_float32(self.mean(h))
        variance = at_least_float32(self.log_variance(h)).exp() + VARIANCE_FLOOR
        return mean, variance


def _activated(
    stack: HiddenStack | TaperedStack,
    h: Tensor,
    norm: nn.Module,
    generator: torch.Generator | None,
) -> Tensor:
    """Norm, ReLU and, in training mode with a generator, dropout."""
    h = F.relu(norm(at_least_float32(h)))
    if stack.training and generator is not None and stack.dropout_rate > 0:
        h = dropout(h, stack.dropout_rate, generator)
    return h


def _norm(width: int, norm: Norm) -> nn.Module:
    if norm == "layer":
        return nn.LayerNorm(width, elementwise_affine=False)
    return BatchNorm(width, momentum=0.01, eps=0.001)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm whose statistics in training can be those of a minibatch that processes share.

    torch's own ``SyncBatchNorm`` is for GPUs only.

    Attributes
    ----------
    add_up
        Adds a tensor up over the processes, with gradient; None where one process has all cells.
    """

    add_up: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n_cells, width)."""
        if self.add_up is None or not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        # in float64, where the difference of moments loses nothing that matters
        variance, mean = (moment.double() for moment in torch.var_mean(x, 0, correction=0))
        moments = torch.stack([mean, variance + mean.square(), torch.ones_like(mean)])
        mean, square, n_cells = self.add_up(moments * len(x)).unbind()
        mean, square = mean / n_cells, square / n_cells
        variance = square - mean.square()
        with torch.no_grad():
            unbiased = variance * n_cells / (n_cells - 1)
            self.running_mean.lerp_(mean.to(x.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(x.dtype), self.momentum)
            self.num_batches_tracked += 1
        scaled = (x - mean.to(x.dtype)) * (variance + self.eps).rsqrt().to(x.dtype)
        return scaled * self.weight + self.bias


def dropout(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Set a share ``rate`` of ``x`` to zero and scale the rest by ``1 / (1 - rate)``.

    ``torch.nn.functional.dropout`` knows the global generator only, which cannot be saved and
    restored beside others.
    """
    return x * noise.kept(x, rate, generator).to(x.dtype).mul_(1 / noise.kept_share(rate))


def sample_normal(mean: Tensor, variance: Tensor, generator: torch.Generator | None) -> Tensor:
    """Reparametrised sample of a normal; its mean where there is no generator."""
    if generator is None:
        return mean
    return torch.addcmul(mean, noise.normal(mean, generator), variance.sqrt())


def kl_normal(
    mean: Tensor, variance: Tensor, prior_mean: Tensor | float, prior_variance: Tensor | float
) -> Tensor:
    """KL(N(mean, variance) || N(prior)), summed over the last dimension."""
    ratio = variance / prior_variance
    distance = (mean - prior_mean).square() / prior_variance
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(dim=-1)


def log_normal(x: Tensor, mean: Tensor | float, variance: Tensor) -> Tensor:
    """Log-density of a normal with diagonal covariance, summed over the last dimension."""
    log_density = math.log(2 * math.pi) + variance.log() + (x - mean).square() / variance
    return -0.5 * log_density.sum(dim=-1)


def log_prior_ratio(z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """``log N(z; 0, I) - log N(z; mean, variance)``, summed over the last dimension."""
    return log_normal(z, 0.0, torch.ones_like(z)) - log_normal(z, mean, variance)


def log_library(counts: Tensor) -> Tensor:
    """Logarithm of each cell's sum, (n_cells, 1), over the genes that its study has.

    An empty cell counts as one of a single count: its logarithm must be finite, and a mean of one
    count over all genes explains zeros as well as any.
    """
    return row_sums(counts).clamp_(min=1.0).log_()
