"""Normalised expression: what models of it see in place of counts."""

from __future__ import annotations

import torch
from torch import Tensor

from atlas.models.base import Inputs
from atlas.models.likelihood import at_least_float32
from atlas.models.sparse import is_sparse

TARGET_SUM = 1e4


def log_normalized(inputs: Inputs) -> Tensor:
    """``log(1 + counts per 10,000)`` of the modelled genes that the study has; 0 for the others.

    An empty cell stays empty.

    Returns
    -------
    float32, (n_cells, n_genes).
    """
    counts = inputs.measured
    if is_sparse(counts):
        counts = counts.to_dense()
    total = counts.sum(dim=-1, keepdim=True).clamp(min=1.0)
    return (counts * (TARGET_SUM / total)).log1p_()


def shares(expression: Tensor) -> Tensor:
    """Share of each gene in a cell whose normalised expression is given; each row sums to 1.

    The inverse of :func:`log_normalized` but for the total. Of an expected expression it is not
    quite the expected share, because the expectation of a logarithm is below that logarithm.

    Parameters
    ----------
    expression
        At least 0: (n_cells, n_genes).
    """
    # log(exp(x) - 1), which does not overflow where a decoder extrapolates.
    expression = at_least_float32(expression).clamp(min=torch.finfo(torch.float32).tiny)
    return (expression + (-torch.expm1(-expression)).log()).softmax(dim=-1)
