r"""Maximum mean discrepancy between the batches of a minibatch (trVAE).

For batches i and j with cells X and Y, and kernel means :math:`\bar k`,

.. math::

    \mathrm{MMD}_{ij} = \bar k(X, X) + \bar k(Y, Y) - 2 \bar k(X, Y)

(Gretton et al. 2012, its biased estimator). Summed over all pairs of m batches, with
:math:`a_c = 1/n` for each cell c of a batch of n cells, this is one sum over pairs of cells:

.. math::

    \sum_{i<j} \mathrm{MMD}_{ij}
    = \sum_{c,d} a_c a_d\, k(c, d)\, (m\,[c \text{ and } d \text{ of the same batch}] - 1)

So each kernel value is needed once, and the cost depends on the size of the minibatch alone: it is
the same for two batches and for hundreds, and no pair of batches need be left out or drawn.
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
    """Maximum mean discrepancy, summed over all pairs of batches in a minibatch.

    The sum is over unordered pairs, as in scArches' code (Lotfollahi et al. 2022, Methods). Its
    estimator keeps each cell's kernel with itself, so it is above zero for equal distributions,
    the more the fewer the cells. A batch with a single cell here is left out; scArches' code
    leaves it in.

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
    return (kernel * (n_batches * same - 1) * weight.outer(weight)).sum()


def multi_scale_kernel(x: Tensor) -> Tensor:
    """Sum of the Gaussian kernels of all scales between the rows: (n, n), at least float32."""
    x = at_least_float32(x)
    # Not by a product of matrices: its rounding would be large at the smallest scales.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    kernel: Tensor = _MultiScale.apply(distance)  # type: ignore[no-untyped-call]
    return kernel


class _MultiScale(torch.autograd.Function):
    """The kernel of a distance; keeps one derivative for all scales in place of a value of each."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor) -> Tensor:
        squared = distance.square()
        total, slope = torch.zeros_like(squared), torch.zeros_like(squared)
        for scale in SCALES:
            kernel = torch.exp(squared * (-0.5 / scale))
            total += kernel
            slope.add_(kernel, alpha=-1 / scale)
        ctx.save_for_backward(slope.mul_(distance))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        slope: Tensor = ctx.saved_tensors[0]
        return grad_output * slope
