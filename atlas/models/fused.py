"""Negative binomials in one compiled pass on the CPU, as a node of torch's graph.

:mod:`atlas.models.likelihood` has the same in torch's operations, for other devices and float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


Gradients = tuple[Tensor | None, ...]
"""By each of the arguments; None where there is none."""


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

        def again() -> Gradients:
            arguments = Arguments._make([*given, ctx.softmax])
            _, gradients = _run(arguments, grad_output.contiguous(), True)
            assert gradients is not None
            return gradients

        return (None, *reweighted(found, weight, grad_output, again), None, None)


def reweighted(
    found: Sequence[Tensor | None],
    weight: Tensor,
    grad_output: Tensor,
    again: Callable[[], Gradients],
) -> Gradients:
    """Gradients of a sum of losses with other weights than they were taken for.

    Parameters
    ----------
    found, weight
        The gradients, and the weights that they are of: the same for each cell.
    grad_output
        The weights that are wanted, (n_cells,).
    again
        Takes them anew, for weights that differ from cell to cell.
    """
    if torch.equal(grad_output, weight):
        return tuple(found)
    if torch.equal(grad_output, grad_output[:1].expand_as(grad_output)):
        ratio = grad_output[0] / weight[0]
        return tuple(None if gradient is None else gradient * ratio for gradient in found)
    return again()


class Pass:
    """The compiled pass over the cells of a minibatch, with all but the logits at hand.

    Parameters
    ----------
    counts, log_library, log_theta, present, softmax
        As in :class:`Arguments`.
    shape
        Cells and genes.
    weight
        Of each cell, for the gradients: float32, (n_cells,).

    Attributes
    ----------
    loss
        float32, (n_cells,).
    step
        Parts of the cells are to begin at multiples of it.
    """

    def __init__(
        self,
        counts: Tensor,
        log_library: Tensor,
        log_theta: Tensor,
        present: Tensor | None,
        softmax: bool,
        shape: tuple[int, int],
        weight: Tensor,
    ) -> None:
        n_cells, n_genes = shape
        self._library, self._theta = log_library, log_theta
        held = log_theta.detach().float().clamp(*LOG_THETA).reshape(-1, n_genes).contiguous()
        theta, inverse = held.exp(), (-held).exp()
        # Of each cell its own row, or rows of a few cells each.
        self.step = 1 if log_theta.dim() == 2 else -(-n_cells // _SLOTS) or 1
        self._by_theta = torch.zeros(-(-n_cells // self.step), n_genes)
        self._slots = np.arange(n_cells) // self.step
        if is_sparse(counts):
            csr = tuple(
                _array(part)
                for part in (counts.crow_indices(), counts.col_indices(), counts.values())
            )
        else:
            csr = from_dense(counts.detach().contiguous().numpy())
        mask = np.empty((0, n_genes), np.bool_) if present is None else present.contiguous().numpy()
        library = log_library.detach().float().reshape(-1).contiguous()
        self.loss, self._by_library = torch.empty(n_cells), torch.empty(n_cells)
        self._before = (*csr, mask)
        self._between = tuple(map(_array, (library, held, theta, inverse)))
        self._softmax, self._weight = softmax, weight.numpy()
        self._after = self._by_theta.numpy(), self._by_library.numpy()

    def run(
        self,
        begin: int,
        end: int,
        logits: Tensor,
        dropout: Tensor | None,
        by_logits: Tensor,
        by_dropout: Tensor | None,
    ) -> None:
        """Losses of the cells from ``begin`` to ``end``, and gradients.

        Gradients go to ``by_logits`` and ``by_dropout``, which may be the logits themselves; none
        are taken where these have no rows.
        """
        negative_binomial(
            begin,
            end,
            self._slots,
            *self._before,
            _array(logits),
            _array(logits[:0] if dropout is None else dropout),
            *self._between,
            self._softmax,
            self._weight,
            self.loss.numpy(),
            _array(by_logits),
            _array(logits[:0] if by_dropout is None else by_dropout),
            *self._after,
        )

    @property
    def by_library(self) -> Tensor:
        """Gradient by the library, in its shape and type."""
        return self._by_library.view(self._library.shape).to(self._library.dtype)

    @property
    def by_theta(self) -> Tensor:
        """Gradient by the log inverse dispersion, in its shape and type."""
        found = self._by_theta if self._theta.dim() == 2 else self._by_theta.sum(dim=0)
        return found.to(self._theta.dtype)


def _run(
    arguments: Arguments, weight: Tensor, with_gradients: bool
) -> tuple[Tensor, _Gradients | None]:
    """The losses and, if asked for, the gradients of their sum times ``weight``."""
    counts, logits, log_library, log_theta, dropout, present, softmax = arguments
    logits = logits.detach().contiguous()
    dropout = None if dropout is None else dropout.detach().contiguous()
    of_cells = Pass(
        counts, log_library, log_theta, present, softmax, (len(logits), logits.shape[1]), weight
    )
    by_logits = torch.empty_like(logits) if with_gradients else logits[:0]
    by_dropout = None if dropout is None else torch.empty_like(dropout[: len(by_logits)])

    def work(begin: int, end: int) -> None:
        of_cells.run(begin, end, logits, dropout, by_logits, by_dropout)

    in_parts(len(logits), work, step=of_cells.step)
    if not with_gradients:
        return of_cells.loss, None
    return of_cells.loss, _Gradients(
        scale_logits=by_logits,
        log_library=of_cells.by_library,
        log_theta=of_cells.by_theta,
        dropout_logits=by_dropout,
    )


def _array(values: Tensor) -> Array:
    """As numpy has it: bfloat16 by its bits, uint16."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()
