"""The decoder's last layer and the likelihood of its output, as one node of torch's graph.

A step on the CPU spends most of its time here. As one node, each thread takes some cells through
the layer, the likelihood and the gradient by the layer's input without waiting for the others in
between; then each takes a share of the gradients by the weights. Logits and the gradients by them
lie in the same memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas.models import products
from atlas.models.fused import Gradients, Pass, reweighted
from atlas.models.threads import at_once, cut, heavy_threads

_LEAST_CELLS, _LEAST_GENES = 32, 512
"""Of a thread's part: products of few rows take long for each."""


class HeadArguments(NamedTuple):
    """What the loss is of; see :func:`atlas.models.likelihood.heads_loss`.

    Weights are (n_genes, n_hidden), biases (n_genes,); those of ``dropout`` are None for the NB.
    """

    counts: Tensor
    h: Tensor
    log_library: Tensor
    log_theta: Tensor
    present: Tensor | None
    scale_weight: Tensor
    scale_bias: Tensor
    dropout_weight: Tensor | None
    dropout_bias: Tensor | None


class _Wanted(NamedTuple):
    """Which of the gradients are asked for."""

    counts: bool
    h: bool
    log_library: bool
    log_theta: bool
    present: bool
    scale_weight: bool
    scale_bias: bool
    dropout_weight: bool
    dropout_bias: bool


def fused_heads_loss(arguments: HeadArguments) -> Tensor:
    """Negative log-likelihood of each cell: float32, (n_cells,).

    Under ``torch.autocast`` the products are in bfloat16.
    """
    half = torch.is_autocast_enabled("cpu")
    loss: Tensor = _HeadsLoss.apply(half, *arguments)  # type: ignore[no-untyped-call]
    return loss


class _HeadsLoss(torch.autograd.Function):
    """Takes the gradients along in the forward pass, for the mean over the cells."""

    @staticmethod
    def forward(ctx: Any, half: bool, *values: Any) -> Tensor:
        arguments = HeadArguments(*values)
        n_cells = len(arguments.h)
        weight = torch.full((n_cells,), 1 / max(n_cells, 1))
        ctx.half, ctx.wanted = half, _Wanted(*ctx.needs_input_grad[1:])
        loss, gradients = _run(arguments, half, weight, ctx.wanted)
        if gradients is not None:
            ctx.save_for_backward(*arguments, *gradients, weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        *saved, weight = ctx.saved_tensors
        n = len(HeadArguments._fields)
        arguments, found = HeadArguments(*saved[:n]), saved[n:]

        def again() -> Gradients:
            _, gradients = _run(arguments, ctx.half, grad_output.contiguous(), ctx.wanted)
            assert gradients is not None
            return gradients

        return (None, *reweighted(found, weight, grad_output, again))


def _run(
    arguments: HeadArguments, half: bool, weight: Tensor, wanted: _Wanted
) -> tuple[Tensor, Gradients | None]:
    """The losses and, if asked for, gradients of their sum times ``weight``."""
    counts, h, log_library, log_theta, present, *_ = arguments
    dtype = torch.bfloat16 if half else torch.float32
    h = h.detach().to(dtype).contiguous()
    layers = [
        (layer.detach().to(dtype), bias.detach().to(dtype))
        for layer, bias in (arguments[5:7], arguments[7:9])
        if layer is not None and bias is not None
    ]
    n_cells, n_genes = len(h), len(arguments.scale_weight)
    with_gradients = any(wanted)
    of_cells = Pass(counts, log_library, log_theta, present, True, (n_cells, n_genes), weight)
    # Logits, and then the gradients by them.
    outs = [torch.empty(n_cells, n_genes, dtype=dtype) for _ in layers]
    by_h = torch.empty_like(h)

    def of_part(begin: int, end: int) -> None:
        rows = slice(begin, end)
        for out, (layer, bias) in zip(outs, layers, strict=True):
            products.into(out[rows], h[rows], layer, bias)
        logits, dropout = outs[0], outs[1] if len(outs) > 1 else None
        if with_gradients:
            of_cells.run(begin, end, logits, dropout, logits, dropout)
        else:
            of_cells.run(begin, end, logits, dropout, logits[:0], None)
        if wanted.h:
            products.into(by_h[rows], outs[0][rows], layers[0][0].t())
            for out, (layer, _) in zip(outs[1:], layers[1:], strict=True):
                by_h[rows] += products.product(out[rows], layer.t())

    n_threads = heavy_threads()
    n_parts = min(n_threads, n_cells // _LEAST_CELLS)
    at_once([partial(of_part, *part) for part in cut(n_cells, n_parts, of_cells.step)])
    if not with_gradients:
        return of_cells.loss, None

    # By weight and bias of each layer.
    found: list[Tensor | None] = [None] * 4
    tasks = []
    n_parts = min(-(-n_threads // len(layers)), n_genes // _LEAST_GENES)
    for i, out in enumerate(outs):
        by_layer, by_bias = wanted[5 + 2 * i : 7 + 2 * i]
        if by_layer:
            columns = torch.empty(h.shape[1], n_genes, dtype=dtype)
            found[2 * i] = columns.t()
            tasks += [partial(_by_layer, columns, h, out, *part) for part in cut(n_genes, n_parts)]
        if by_bias:
            found[2 * i + 1] = out.sum(dim=0)
    for first in range(0, len(tasks), n_threads):
        at_once(tasks[first : first + n_threads])
    return of_cells.loss, (
        None,
        by_h.to(arguments.h.dtype) if wanted.h else None,
        of_cells.by_library if wanted.log_library else None,
        of_cells.by_theta if wanted.log_theta else None,
        None,
        *(None if gradient is None else gradient.float() for gradient in found),
    )


def _by_layer(columns: Tensor, h: Tensor, by_out: Tensor, begin: int, end: int) -> None:
    """Gradient by the weights of some genes, a column for each: (n_hidden, n_genes)."""
    products.into(columns[:, begin:end], h.t(), by_out[:, begin:end].t())
