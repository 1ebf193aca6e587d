r"""Negative log-likelihoods of counts, from logits, in log space, with analytic gradients.

With :math:`\rho` the softmax of the decoder's logits over the genes present, :math:`\ell` the
library size and :math:`r = \log\theta` the log inverse dispersion, everything is a function of
:math:`d = \log\ell + \log\rho - r = \log(\mu/\theta)`:

.. math::

    \log \mathrm{NB}(x) = \log\Gamma(x+\theta) - \log\Gamma(\theta) - \log\Gamma(x+1)
                          - \theta\,\mathrm{softplus}(d) - x\,\mathrm{softplus}(-d)

so :math:`\mu` is never formed and no logarithm needs an epsilon. Zeros, more than nine tenths of
the elements, need only the fourth term; the rest is evaluated at the other elements, and in double
precision, because its terms cancel: at θ = 10⁶ a log-gamma is about 10⁷, where neighbouring
float32 are 1 apart.

One autograd function holds softmax and likelihood together. It takes the gradients along in the
forward pass, where their parts are at hand, and keeps nothing else for the backward pass.

This is the reference, and what runs in float64 and on other devices than the CPU; in float32 there,
:mod:`atlas.models.fused` does the same in one compiled pass.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from atlas.models.fused import Arguments, can_fuse, fused_loss
from atlas.models.heads import HeadArguments, fused_heads_loss
from atlas.models.sparse import is_sparse

Link = Literal["softmax", "log"]


def nb_loss(
    counts: Tensor,
    scale_logits: Tensor,
    log_library: Tensor,
    log_inverse_dispersion: Tensor,
    present: Tensor | None = None,
    link: Link = "softmax",
) -> Tensor:
    """Negative log-likelihood of counts under a negative binomial, summed over genes.

    The mean is ``exp(log_library) * softmax(scale_logits)`` (scVI, Lopez et al. 2018, Methods 4.1).

    Parameters
    ----------
    counts
        (n_cells, n_genes); no gradient is taken.
    scale_logits
        The decoder's output before the softmax: (n_cells, n_genes).
    log_library
        (n_cells, 1).
    log_inverse_dispersion
        (n_genes,) or (n_cells, n_genes).
    present
        Genes measured, bool (n_cells, n_genes): softmax and sum run over these only, the others
        get no gradient. None: all.
    link
        ``"log"`` where ``scale_logits`` are logarithms of the means already, but for the library.

    Returns
    -------
    (n_cells,), in nats; in float32, or in float64 if an argument is.
    """
    return _call(counts, scale_logits, log_library, log_inverse_dispersion, None, present, link)


def zinb_loss(
    counts: Tensor,
    scale_logits: Tensor,
    log_library: Tensor,
    log_inverse_dispersion: Tensor,
    dropout_logits: Tensor,
    present: Tensor | None = None,
    link: Link = "softmax",
) -> Tensor:
    """Negative log-likelihood under a zero-inflated negative binomial, summed over genes.

    As :func:`nb_loss`, with ``dropout_logits`` (n_cells, n_genes): the log-odds that a count was
    replaced by zero.
    """
    return _call(
        counts, scale_logits, log_library, log_inverse_dispersion, dropout_logits, present, link
    )


def heads_loss(
    counts: Tensor,
    h: Tensor,
    scale: nn.Linear,
    zero_inflation: nn.Linear | None,
    log_library: Tensor,
    log_inverse_dispersion: Tensor,
    present: Tensor | None = None,
) -> Tensor:
    """:func:`zinb_loss` of ``scale(h)`` and ``zero_inflation(h)``; :func:`nb_loss` without it.

    Parameters
    ----------
    h
        What both layers are of: (n_cells, n_hidden).
    scale, zero_inflation
        Linear layers from ``h`` to the genes.
    counts, log_library, log_inverse_dispersion, present
        As in :func:`nb_loss`.

    Returns
    -------
    (n_cells,), in nats.
    """
    weights: list[Tensor | None] = [scale.weight, scale.bias, None, None]
    if zero_inflation is not None:
        weights[2:] = [zero_inflation.weight, zero_inflation.bias]
    if can_fuse(counts, h, log_library, log_inverse_dispersion, *weights):
        given = counts, h, log_library, log_inverse_dispersion, present, *weights
        return fused_heads_loss(HeadArguments._make(given))
    dropout = None if zero_inflation is None else zero_inflation(h)
    return _call(counts, scale(h), log_library, log_inverse_dispersion, dropout, present, "softmax")


def poisson_loss(
    counts: Tensor,
    scale_logits: Tensor,
    log_library: Tensor,
    present: Tensor | None = None,
    link: Link = "softmax",
) -> Tensor:
    """Negative log-likelihood under a Poisson, summed over genes; arguments as :func:`nb_loss`."""
    log_mean = log_means(scale_logits, log_library, present, link)
    counts = counts.to_dense()
    counts = counts if present is None else counts.masked_fill(~present, 0.0)
    # Both terms are about x·log x, and nearly cancel: in double precision.
    x = counts.double()
    matched = torch.lgamma(x + 1) - torch.where(x > 0, x * log_mean.double(), 0.0)
    return (log_mean.exp() + matched.to(log_mean.dtype)).sum(dim=-1)


def gaussian_loss(
    x: Tensor, mean: Tensor, log_variance: Tensor, present: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood under a normal, summed over genes.

    Parameters
    ----------
    x, mean
        (n_cells, n_genes).
    log_variance
        Of anything that broadcasts to them.
    present
        As in :func:`nb_loss`.

    Returns
    -------
    (n_cells,), in nats.
    """
    mean, log_variance = at_least_float32(mean), at_least_float32(log_variance)
    squares = (x - mean).square() * torch.exp(-log_variance)
    loss = 0.5 * (math.log(2 * math.pi) + log_variance + squares)
    return (loss if present is None else loss.masked_fill(~present, 0.0)).sum(dim=-1)


def log_means(
    scale_logits: Tensor,
    log_library: Tensor,
    present: Tensor | None = None,
    link: Link = "softmax",
) -> Tensor:
    """Logarithm of the mean of each count, as :func:`nb_loss` has it: (n_cells, n_genes).

    A gene that is not present has a mean of 0, whose logarithm is a large negative number.
    """
    scale_logits = at_least_float32(scale_logits)
    if present is not None:
        scale_logits = scale_logits.masked_fill(~present, torch.finfo(scale_logits.dtype).min)
    log_scale = F.log_softmax(scale_logits, dim=-1) if link == "softmax" else scale_logits
    return log_scale + at_least_float32(log_library)


def log_softplus(x: Tensor) -> Tensor:
    """``log(log(1 + exp(x)))``, which is ``x`` to float32's last bit where x is below -20."""
    x = at_least_float32(x)
    low = x < -20.0
    return torch.where(low, x, F.softplus(x.masked_fill(low, 0.0)).log())


def at_least_float32(x: Tensor) -> Tensor:
    """Widen bfloat16 and float16 to float32; leave float32 and float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _call(
    counts: Tensor,
    scale_logits: Tensor,
    log_library: Tensor,
    log_inverse_dispersion: Tensor,
    dropout_logits: Tensor | None,
    present: Tensor | None,
    link: Link,
) -> Tensor:
    others = (scale_logits, log_library, log_inverse_dispersion, dropout_logits)
    if can_fuse(counts, *others):
        softmax = link == "softmax"
        return fused_loss(Arguments(counts, *others, present, softmax))
    if is_sparse(counts):
        counts = counts.to_dense()
    loss: Tensor = _CountLoss.apply(  # type: ignore[no-untyped-call]
        counts,
        at_least_float32(scale_logits),
        at_least_float32(log_library),
        at_least_float32(log_inverse_dispersion),
        None if dropout_logits is None else at_least_float32(dropout_logits),
        present,
        link,
    )
    return loss


class _CountLoss(torch.autograd.Function):
    """Softmax, library and (zero-inflated) negative binomial in one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        counts: Tensor,
        scale_logits: Tensor,
        log_library: Tensor,
        log_theta: Tensor,
        dropout_logits: Tensor | None,
        present: Tensor | None,
        link: Link,
    ) -> Tensor:
        if present is not None:
            # The lowest finite number instead of -inf: an absent gene with count 0 then has
            # likelihood 1 and zero gradients by the formulas below, without a 0·inf on the way.
            lowest = torch.finfo(scale_logits.dtype).min
            scale_logits = scale_logits.masked_fill(~present, lowest)
            counts = counts.masked_fill(~present, 0.0)
        log_scale = F.log_softmax(scale_logits, dim=-1) if link == "softmax" else scale_logits
        d = (log_scale + log_library).sub_(log_theta)

        # Loss and derivatives by log μ, log θ and dropout logit, of each element as if it were 0.
        theta = log_theta.exp()
        loss = _softplus(d).mul_(theta)
        by_mean = torch.sigmoid(d).mul_(theta)
        by_theta = loss - by_mean
        by_dropout = None
        if dropout_logits is not None:
            # P(0) = π + (1 - π) NB(0); `weight` is the share of the second term, `odds` its logit.
            odds = loss.add_(dropout_logits).neg_()
            weight = torch.sigmoid(odds)
            by_mean.mul_(weight)
            by_theta.mul_(weight)
            observed = -dropout_logits
            by_dropout = weight.sub_(torch.sigmoid(observed))
            loss = _softplus(observed).sub_(_softplus(odds))
        elements = _Elements(loss, by_mean, by_theta, by_dropout)
        _replace_positive(elements, counts, d, log_theta, dropout_logits)

        if any(ctx.needs_input_grad):
            by_library = by_mean.sum(dim=-1, keepdim=True)
            by_scale = by_mean
            if link == "softmax":
                by_scale = by_mean.addcmul_(log_scale.exp_(), by_library, value=-1.0)
            ctx.save_for_backward(by_scale, by_library, by_theta, by_dropout)
            ctx.theta_per_cell = log_theta.dim() == 2
        return loss.sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        by_scale, by_library, by_theta, by_dropout = ctx.saved_tensors
        grad = grad_output.unsqueeze(-1)
        theta_grad = by_theta * grad
        return (
            None,
            by_scale * grad,
            by_library * grad,
            theta_grad if ctx.theta_per_cell else theta_grad.sum(dim=0),
            None if by_dropout is None else by_dropout * grad,
            None,
            None,
        )


class _Elements(NamedTuple):
    """Loss of every element and its derivatives, each (n_cells, n_genes)."""

    loss: Tensor
    by_mean: Tensor
    by_theta: Tensor
    by_dropout: Tensor | None


def _replace_positive(
    elements: _Elements,
    counts: Tensor,
    d: Tensor,
    log_theta: Tensor,
    dropout_logits: Tensor | None,
) -> None:
    """Put loss and derivatives of the counts above zero in place of those of zeros."""
    positive = counts > 0
    at = positive.flatten().nonzero().squeeze(-1) if _gathers(counts.device) else None
    gene = None if at is None else at % counts.shape[-1]

    def pick(values: Tensor) -> Tensor:
        if at is None:
            return values
        return values[gene] if values.dim() == 1 else values.reshape(-1)[at]

    def put(target: Tensor, values: Tensor) -> None:
        values = values.to(target.dtype)
        if at is None:
            torch.where(positive, values, target, out=target)
        else:
            target.view(-1)[at] = values

    x, d = pick(counts).double(), pick(d).double()
    # Functions of θ alone: of each gene, then picked, where that is fewer.
    per_gene = log_theta.dim() == 1
    theta = (log_theta if per_gene else pick(log_theta)).double().exp()
    lgamma, digamma = torch.lgamma(theta), torch.digamma(theta)
    if per_gene:
        theta, lgamma, digamma = pick(theta), pick(lgamma), pick(digamma)

    theta_x = theta + x
    loss = theta * _softplus(d)
    by_mean = theta_x * torch.sigmoid(d) - x
    by_theta = loss - by_mean - theta * (torch.digamma(theta_x) - digamma)
    loss += x * _softplus(-d) + torch.lgamma(x + 1.0) + lgamma - torch.lgamma(theta_x)
    if dropout_logits is not None and elements.by_dropout is not None:
        dropout = pick(dropout_logits).double()
        loss += _softplus(dropout)
        put(elements.by_dropout, torch.sigmoid(dropout))
    put(elements.loss, loss)
    put(elements.by_mean, by_mean)
    put(elements.by_theta, by_theta)


def _gathers(device: torch.device) -> bool:
    """Whether to gather the few positive counts, or compute all elements and choose.

    A GPU would have to report how many they are, which makes the host wait at every step.
    """
    return device.type == "cpu"


def _softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; above 40 it is ``x`` to the last bit of float64."""
    return F.softplus(x, threshold=40.0)
