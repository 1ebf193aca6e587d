r"""Maximum mean discrepancy between the batches of a minibatch (trVAE).

For batches i and j with cells X and Y, and kernel means :math:`\bar k`,

.. math::

    \mathrm{MMD}_{ij} = \bar k(X, X) + \bar k(Y, Y) - 2 \bar k(X, Y)

(Gretton et al. 2012, its biased estimator). Summed over all pairs of m batches, with
:math:`a_c = 1/n` for each cell c of a batch of n cells, it is one sum over pairs of cells:

.. math::

    \sum_{i<j} \mathrm{MMD}_{ij}
    = \sum_{c,d} a_c a_d\, k(c, d)\, (m\,[c \text{ and } d \text{ of the same batch}] - 1)

So each kernel value is needed once, and the cost, in proportion to the square of the minibatch, is
the same for two batches and for hundreds: no pair of batches need be left out or drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas.models.likelihood import at_least_float32

SCALES = (
    *(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0),
    *(1e2, 1e3, 1e4, 1e5, 1e6),
)
"""The 19 scales s of the kernel :math:`\\sum_s \\exp(-|x - y|^2 / 2s)`, as in scArches' code; the
paper's :math:`\\gamma` is 1 / 2s."""


def batch_discrepancy(x: Tensor, batch: Tensor) -> Tensor:
    """Maximum mean discrepancy of two batches, mean over all pairs of batches in a minibatch.

    scArches (Lotfollahi et al. 2022, Methods and code) takes the sum over the pairs in place of the
    mean, m (m - 1) / 2 times as much. A sum grows with the square of the number of batches while
    the likelihood beside it does not: with forty it drowned the likelihood (benchmarks/LOG.md).
    The estimator, theirs, keeps each cell's kernel with itself, so it is above zero for equal
    distributions, the more the fewer the cells. A batch with a single cell here is left out;
    scArches' code leaves it in.

    Parameters
    ----------
    x
        Representation of the cells: (n_cells, n_dimensions).
    batch
        Code of the batch of each cell: int64, (n_cells,).

    Returns
    -------
    A scalar, at least float32; 0 where fewer than two batches have two cells.
    """
    same = batch.unsqueeze(0) == batch.unsqueeze(1)
    kernel = multi_scale_kernel(x)
    n = same.sum(dim=1).to(kernel.dtype)
    weight = n.reciprocal().masked_fill(n < 2, 0.0)
    n_batches = weight.sum().round()
    total = (kernel * (n_batches * same - 1) * weight.outer(weight)).sum()
    return total / (n_batches * (n_batches - 1) / 2).clamp(min=1.0)


def multi_scale_kernel(x: Tensor) -> Tensor:
    """Sum of the Gaussian kernels of all scales between the rows: (n, n), at least float32."""
    x = at_least_float32(x)
    # In double precision, because the squares cancel, and 1e-6 is the smallest scale.
    wide = x.double()
    squares = wide.square().sum(dim=1)
    squared = torch.addmm(squares, wide, wide.T, alpha=-2).add(squares.unsqueeze(1)).clamp(min=0)
    kernel: Tensor = _MultiScale.apply(squared.to(x.dtype))  # type: ignore[no-untyped-call]
    return kernel


class _MultiScale(torch.autograd.Function):
    """The kernel of squared distances; keeps one derivative in place of a value for each scale."""

    @staticmethod
    def forward(ctx: Any, squared: Tensor) -> Tensor:
        total, slope = torch.zeros_like(squared), torch.zeros_like(squared)
        for scale in SCALES:
            # Below this the exponential is nothing beside the largest scales', and slow where it is
            # less than a normal number.
            kernel = (squared * (-0.5 / scale)).clamp_(min=-80.0).exp_()
            total += kernel
            slope.add_(kernel, alpha=-0.5 / scale)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        slope: Tensor = ctx.saved_tensors[0]
        return grad_output * slope
