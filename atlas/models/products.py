"""Products of dense matrices on the CPU by oneDNN, where torch's own are slower.

torch takes float32 products from MKL, which on an AMD EPYC with AVX-512 is less than half as fast
as oneDNN, which is part of torch too (benchmarks/LOG.md, bench_million). On Intel's processors the
two were not compared.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_THERE = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether oneDNN is in this build of torch, and there is AVX-512."""


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias``.

    The gradient by the weight comes by columns: it is moved least where the weight lies by columns
    too, ``weight.t()`` being contiguous.

    Parameters
    ----------
    x
        (n_cells, n_in).
    weight, bias
        (n_out, n_in) and (n_out,).

    Returns
    -------
    (n_cells, n_out).
    """
    if not _takes(x, weight, bias):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T``, plus the bias, without gradient: (n, m) of (n, k) and (m, k)."""
    if _THERE and a.dtype == torch.float32:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return out
    return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())


def into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """Put :func:`product` into a tensor, which may be a part of another."""
    if _THERE and a.dtype == torch.float32:
        out.copy_(product(a, b, bias))
    elif bias is None:
        torch.mm(a, b.t(), out=out)
    else:
        torch.addmm(bias, a, b.t(), out=out)


def _takes(*tensors: Tensor) -> bool:
    return (
        _THERE
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and tensors[0].dim() == 2
        and len(tensors[0]) > 0
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    """All three products of a linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        return (
            product(grad_output, weight.t()) if by_x else None,
            product(x.t(), grad_output.t()).t() if by_weight else None,
            grad_output.sum(dim=0) if by_bias else None,
        )
