"""What follows the product of a hidden layer, in one compiled pass on the CPU.

The row of the batch, LayerNorm, ReLU and dropout are half a dozen of torch's operations each way,
of which each takes as long to be called as to be done on a minibatch of the usual size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

Array = npt.NDArray[Any]

_SUM = {"reassoc", "contract", "nsz"}
_NONE = np.empty((0, 0), np.float32)
_NO_BITS = np.empty((0, 0), np.int32)


class Dropout(NamedTuple):
    """Which elements are dropped.

    Attributes
    ----------
    bits
        Uniform draws: int32, of the shape of the layer.
    threshold
        Elements whose draw is below are set to 0.
    scale
        The others are multiplied by it.
    """

    bits: Tensor
    threshold: int
    scale: float


def can_fuse_activation(h: Tensor, batch_weight: Tensor | None) -> bool:
    """Whether the compiled pass takes these: float32 on the CPU."""
    given = (h,) if batch_weight is None else (h, batch_weight)
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in given)


def fused_activation(
    h: Tensor, batch: Tensor, batch_weight: Tensor | None, eps: float, dropout: Dropout | None
) -> Tensor:
    """``relu(layer_norm(h + batch_weight[batch]))``, with some elements dropped.

    Parameters
    ----------
    h
        float32, (n_cells, width).
    batch
        int64, (n_cells,).
    batch_weight
        float32, (n_batch, width); None for nothing to add.
    eps
        Added to the variance of a cell.
    dropout
        None for nothing to drop.

    Returns
    -------
    float32, (n_cells, width).
    """
    out: Tensor = _Activation.apply(h, batch, batch_weight, eps, dropout)  # type: ignore[no-untyped-call]
    return out


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        batch: Tensor,
        batch_weight: Tensor | None,
        eps: float,
        dropout: Dropout | None,
    ) -> Tensor:
        # In numpy's arrays, which are made in a fifth of the time of torch's.
        x, codes = h.detach().contiguous().numpy(), batch.numpy()
        normed, out, scales = np.empty_like(x), np.empty_like(x), np.empty(len(x), np.float32)
        weight = _NONE if batch_weight is None else batch_weight.detach().contiguous().numpy()
        scale = np.float32(1.0 if dropout is None else dropout.scale)
        bits, threshold = (
            (_NO_BITS, 0) if dropout is None else (dropout.bits.numpy(), dropout.threshold)
        )
        _forward(x, codes, weight, eps, bits, threshold, scale, normed, scales, out)
        ctx.held = normed, scales, out, scale, codes, len(weight)
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        normed, scales, out, scale, codes, n_batch = ctx.held
        by_h, by_batch = np.empty_like(normed), np.zeros((n_batch, normed.shape[1]), np.float32)
        gradient = grad_output.contiguous().numpy()
        _backward(gradient, normed, scales, out, scale, codes, by_h, by_batch)
        by_weight = torch.from_numpy(by_batch) if ctx.needs_input_grad[2] else None
        return torch.from_numpy(by_h), None, by_weight, None, None


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _forward(
    h: Array,
    batch: Array,
    batch_weight: Array,
    eps: float,
    bits: Array,
    threshold: int,
    scale: Any,
    normed: Array,
    scales: Array,
    out: Array,
) -> None:
    for i in range(len(h)):
        x = normed[i]
        if len(batch_weight):
            _add(h[i], batch_weight[batch[i]], x)
        else:
            x[:] = h[i]
        mean, variance = _moments(x)
        one_over = np.float32(1.0 / np.sqrt(variance + eps))
        scales[i] = one_over
        _normalise(x, np.float32(mean), one_over, out[i])
        if len(bits):
            _drop(bits[i], threshold, scale, out[i])


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _backward(
    gradient: Array,
    normed: Array,
    scales: Array,
    out: Array,
    scale: Any,
    batch: Array,
    by_h: Array,
    by_batch: Array,
) -> None:
    for i in range(len(gradient)):
        _passed(gradient[i], out[i], scale, by_h[i])
        total, along = _sums(by_h[i], normed[i])
        n = np.float32(gradient.shape[1])
        _through_norm(normed[i], total / n, along / n, scales[i], by_h[i])
        if len(by_batch):
            _add_to(by_h[i], by_batch[batch[i]])


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _add(a: Array, b: Array, out: Array) -> None:
    for j in range(len(out)):
        out[j] = a[j] + b[j]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _add_to(a: Array, out: Array) -> None:
    for j in range(len(out)):
        out[j] += a[j]


@njit(fastmath=_SUM, error_model="numpy")  # type: ignore[untyped-decorator]
def _moments(x: Array) -> tuple[Any, Any]:
    """Mean and variance, in the second pass from the mean."""
    total = np.float32(0.0)
    for j in range(len(x)):
        total += x[j]
    mean = total / np.float32(len(x))
    squares = np.float32(0.0)
    for j in range(len(x)):
        d = x[j] - mean
        squares += d * d
    return mean, squares / np.float32(len(x))


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _normalise(x: Array, mean: Any, one_over: Any, out: Array) -> None:
    """In place; ``out`` is what of it is not below 0, or not a number."""
    zero = np.float32(0.0)
    for j in range(len(x)):
        value = (x[j] - mean) * one_over
        x[j] = value
        out[j] = zero if value < zero else value


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _drop(bits: Array, threshold: int, scale: Any, out: Array) -> None:
    zero = np.float32(0.0)
    for j in range(len(out)):
        out[j] = out[j] * (zero if bits[j] < threshold else scale)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _passed(gradient: Array, out: Array, scale: Any, by: Array) -> None:
    """Gradient through dropout and ReLU."""
    zero = np.float32(0.0)
    for j in range(len(by)):
        by[j] = gradient[j] * scale if out[j] > zero else zero


@njit(fastmath=_SUM, error_model="numpy")  # type: ignore[untyped-decorator]
def _sums(by: Array, normed: Array) -> tuple[Any, Any]:
    """Sum of the gradient, and of its product with the normed values.

    Apart from what writes, because LLVM sums in another order where arrays may overlap.
    """
    total, along = np.float32(0.0), np.float32(0.0)
    for j in range(len(by)):
        total += by[j]
        along += by[j] * normed[j]
    return total, along


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _through_norm(normed: Array, mean: Any, along: Any, one_over: Any, by: Array) -> None:
    for j in range(len(by)):
        by[j] = one_over * (by[j] - mean - normed[j] * along)
