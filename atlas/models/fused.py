"""Negative binomials in one compiled pass on the CPU, as a node of torch's graph.

:mod:`atlas.models.likelihood` has the same in torch's operations, for other devices and float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas.models.count_kernels import LOG_THETA, negative_binomial
from atlas.models.sparse import from_dense, is_sparse
from atlas.models.threads import in_parts

Array = npt.NDArray[Any]

_SLOTS = 32
"""Gradients by a gene's dispersion are sums of at most so many partial ones, each of the same cells
whatever the number of threads."""


class Arguments(NamedTuple):
    """What a likelihood is of; see :func:`atlas.models.likelihood.zinb_loss`."""

    counts: Tensor
    scale_logits: Tensor
    log_library: Tensor
    log_theta: Tensor
    dropout_logits: Tensor | None
    present: Tensor | None
    softmax: bool


class _Gradients(NamedTuple):
    """Of the sum of the losses, each times a weight."""

    scale_logits: Tensor
    log_library: Tensor
    log_theta: Tensor
    dropout_logits: Tensor | None


def can_fuse(counts: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled pass takes these: on the CPU, float32 or, but for counts, bfloat16."""
    kinds = (torch.float32, torch.bfloat16)
    return (
        counts.device.type == "cpu"
        and counts.dtype == torch.float32
        and all(other is None or other.dtype in kinds for other in others)
    )


def fused_loss(arguments: Arguments) -> Tensor:
    """Negative log-likelihood of each cell: float32, (n_cells,)."""
    loss: Tensor = _FusedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


class _FusedLoss(torch.autograd.Function):
    """Takes the gradients along in the forward pass, for the mean over the cells.

    That is what a training asks for. Where the backward pass asks for another weighting, it scales
    them, or runs the kernel again.
    """

    @staticmethod
    def forward(ctx: Any, *values: Any) -> Tensor:
        arguments = Arguments(*values)
        n_cells = len(arguments.scale_logits)
        weight = torch.full((n_cells,), 1 / max(n_cells, 1))
        loss, gradients = _run(arguments, weight, any(ctx.needs_input_grad))
        if gradients is not None:
            ctx.softmax = arguments.softmax
            ctx.save_for_backward(*arguments[:-1], *gradients, weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *saved, weight = ctx.saved_tensors
        n = len(Arguments._fields) - 1
        given, found = saved[:n], saved[n:]
        if not torch.equal(grad_output, weight):
            if torch.equal(grad_output, grad_output[:1].expand_as(grad_output)):
                ratio = grad_output[0] / weight[0]
                found = [None if gradient is None else gradient * ratio for gradient in found]
            else:
                arguments = Arguments._make([*given, ctx.softmax])
                _, again = _run(arguments, grad_output.contiguous(), True)
                assert again is not None
                found = list(again)
        return (None, *found, None, None)


def _run(
    arguments: Arguments, weight: Tensor, with_gradients: bool
) -> tuple[Tensor, _Gradients | None]:
    """The losses and, if asked for, the gradients of their sum times ``weight``."""
    counts, logits, log_library, log_theta, dropout, present, softmax = arguments
    n_cells, n_genes = logits.shape
    per_cell = log_theta.dim() == 2
    held = log_theta.detach().float().clamp(*LOG_THETA).reshape(-1, n_genes).contiguous()
    theta, inverse = held.exp(), (-held).exp()
    # Of each cell its own row, or rows of a few cells each.
    size = 1 if per_cell else -(-n_cells // _SLOTS) or 1
    n_slots = -(-n_cells // size)
    slots = np.arange(n_cells) // size

    if is_sparse(counts):
        csr = counts.crow_indices().numpy(), counts.col_indices().numpy(), counts.values().numpy()
    else:
        csr = from_dense(counts.detach().contiguous().numpy())
    logits, dropout = logits.detach().contiguous(), _detached(dropout)
    by_logits = torch.empty_like(logits) if with_gradients else logits[:0]
    by_dropout = None if dropout is None else torch.empty_like(dropout[: len(by_logits)])
    by_theta = torch.zeros(n_slots, n_genes)
    library = log_library.detach().float().reshape(-1).contiguous()
    loss, by_library = torch.empty(n_cells), torch.empty(n_cells)
    mask = np.empty((0, n_genes), np.bool_) if present is None else present.contiguous().numpy()
    of_cells = (
        *csr,
        mask,
        _array(logits),
        _array(logits[:0] if dropout is None else dropout),
        library.numpy(),
        held.numpy(),
        theta.numpy(),
        inverse.numpy(),
        softmax,
        weight.numpy(),
        loss.numpy(),
        _array(by_logits),
        _array(logits[:0] if by_dropout is None else by_dropout),
        by_theta.numpy(),
        by_library.numpy(),
    )

    def work(begin: int, end: int) -> None:
        negative_binomial(begin, end, slots, *of_cells)

    in_parts(n_cells, work, step=size)
    if not with_gradients:
        return loss, None
    return loss, _Gradients(
        scale_logits=by_logits,
        log_library=by_library.view(log_library.shape).to(log_library.dtype),
        log_theta=(by_theta if per_cell else by_theta.sum(dim=0)).to(log_theta.dtype),
        dropout_logits=by_dropout,
    )


def _detached(dropout: Tensor | None) -> Tensor | None:
    return None if dropout is None else dropout.detach().contiguous()


def _array(values: Tensor) -> Array:
    """As numpy has it: bfloat16 by its bits, uint16."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()
