r"""The negative binomials of likelihood.py, compiled for the CPU, in float32, cell after cell.

Of a zero, with :math:`t = \mu/\theta`, :math:`a = \theta\log(1+t)` and the dropout logit
:math:`\delta`,

.. math::

    -\log P(0) = \mathrm{softplus}(\delta) - \log(e^\delta + e^{-a})
               = \max(\delta, 0) - \max(\delta, -a)
                 + \log\frac{1 + e^{-|\delta|}}{1 + e^{-|\delta + a|}}

which overflows nowhere. A pass over all genes of a cell takes them for zeros, with the shares of
those that were counted set to 0: their terms and gradients then vanish. The few that were counted
follow, packed side by side, in double precision.

Loops hold few arrays each, because LLVM gives up on a loop with more than a handful of pointers
that might overlap. What they write lies in rows of a few thousand genes, which stay in the cache:
the means of a minibatch are never in memory together.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from atlas.models.gamma_kernels import rises
from atlas.models.vectors import (
    exp32,
    exp64,
    larger,
    log1p32,
    log1p64,
    log32,
    narrow,
    widen,
)

Array = npt.NDArray[Any]
Scalar = Any
"""float32 or float64, as the caller has it: numba compiles for either."""

_SUM = {"reassoc", "contract", "nsz"}
_F32 = np.float32
_ZERO, _ONE = _F32(0.0), _F32(1.0)
_MOST, _ABSENT, _FLOOR, _UNDERFLOW = _F32(1e30), _F32(-3e38), _F32(-1e30), _F32(-80.0)

_APART = 256
"""Elements between arrays; a round of a vectorised loop is 128 at most."""
LOG_THETA = (-80.0, 40.0)
"""Log inverse dispersions are held in this range. Above it the distribution is a Poisson."""


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def negative_binomial(
    begin: int,
    end: int,
    slots: Array,
    indptr: Array,
    indices: Array,
    values: Array,
    present: Array,
    logits: Array,
    dropout: Array,
    log_library: Array,
    log_theta: Array,
    theta: Array,
    inverse: Array,
    softmax: bool,
    weight: Array,
    loss: Array,
    by_logits: Array,
    by_dropout: Array,
    by_theta: Array,
    by_library: Array,
) -> None:
    """Losses of the cells from ``begin`` to ``end``, and their gradients times ``weight``.

    Parameters
    ----------
    begin, end
        First cell, and last + 1.
    slots
        Row of ``by_theta`` that a cell's gradient is added to: int64, (n_cells,).
    indptr, indices, values
        Counts, in CSR form. The columns of a row need no order, but may occur once only.
    present
        bool, (n_cells, n_genes), or without rows where all genes are.
    logits, dropout
        (n_cells, n_genes), float32 or the bits of bfloat16; ``dropout`` without rows for the NB.
    log_library
        float32, (n_cells,).
    log_theta, theta, inverse
        Log inverse dispersion, its exponential, and one over that; (n_genes,) in one row for all
        cells, or (n_cells, n_genes): float32.
    softmax
        Whether logits go through a softmax, or are logarithms of the means but for the library.
    weight
        Of each cell, for the gradients: float32, (n_cells,).
    loss, by_library
        Results: float32, (n_cells,).
    by_logits, by_dropout
        Results, as the arguments; without rows where no gradient is asked for.
    by_theta
        Result, zeros before: float32, (n_slots, n_genes).
    """
    n_genes = logits.shape[1]
    longest = 0
    for i in range(begin, end):
        longest = max(longest, indptr[i + 1] - indptr[i])
    # Arrays of their own: of the rows of one array LLVM cannot tell that they do not overlap.
    logit, delta = _scratch32(n_genes), _scratch32(n_genes)
    shares, softplus, by_mean = _scratch32(n_genes), _scratch32(n_genes), _scratch32(n_genes)
    genes, counted_shares = np.empty(longest, np.int64), _scratch32(longest)
    all_x, all_d, all_theta = _scratch64(longest), _scratch64(longest), _scratch64(longest)
    all_delta, all_by_mean = _scratch64(longest), _scratch64(longest)
    all_by_theta = _scratch64(longest)
    all_log_rise, all_rise = _scratch64(longest), _scratch64(longest)
    for i in range(begin, end):
        row = i if len(theta) > 1 else 0
        cell_theta, grad_theta = theta[row], by_theta[slots[i]]

        # Means are shares · scale, and their logarithms logit + log_scale.
        finite = _load(logits[i], logit)
        if len(present):
            _hide_absent(present[i], logit)
        library = np.float64(log_library[i])
        if softmax:
            top = np.float64(max(_largest(logit), _FLOOR))
            total = max(np.float64(_exponentials(logit, _F32(top), shares)), 1e-30)
            scale = _F32(min(math.exp(min(library, 80.0)) / total, 1e30))
            log_scale = library - (top + math.log(total))
        else:
            total = 1.0
            _exponentials(logit, -log_library[i], shares)
            scale = _ONE
            log_scale = library
        if len(dropout):
            finite += _load(dropout[i], delta)

        n = 0
        for k in range(indptr[i], indptr[i + 1]):
            gene = np.int64(indices[k])
            if values[k] > _ZERO and (len(present) == 0 or present[i, gene]):
                genes[n] = gene
                counted_shares[n] = shares[gene]
                shares[gene] = _ZERO
                all_x[n] = values[k]
                all_d[n] = logit[gene] + log_scale - log_theta[row, gene]
                all_theta[n] = cell_theta[gene]
                if len(dropout):
                    all_delta[n] = delta[gene]
                n += 1

        _zeros(shares, scale, cell_theta, inverse[row], softplus, by_mean)
        if len(dropout):
            zeros_loss, zeros_sum = _inflated(softplus, weight[i], delta, by_mean, grad_theta)
        else:
            zeros_loss, zeros_sum = _plain(softplus, weight[i], by_mean, grad_theta)
        cell_loss, cell_sum = np.float64(zeros_loss), np.float64(zeros_sum)
        if n:
            x, d, counted_theta, counted_delta = all_x[:n], all_d[:n], all_theta[:n], all_delta[:n]
            counted_by_mean, counted_by_theta = all_by_mean[:n], all_by_theta[:n]
            log_rise, rise = all_log_rise[:n], all_rise[:n]
            rises(x, counted_theta, log_rise, rise)
            cell_loss += _counted(
                x, d, counted_theta, log_rise, rise, counted_by_mean, counted_by_theta
            )
            if len(dropout):
                cell_loss += _not_dropped(counted_delta)
            for k in range(n):
                gene = genes[k]
                shares[gene] = counted_shares[k]
                by_mean[gene] = _F32(counted_by_mean[k])
                grad_theta[gene] += weight[i] * _F32(counted_by_theta[k])
                if len(dropout):
                    delta[gene] = _F32(counted_delta[k])
                cell_sum += counted_by_mean[k]

        # A logit that is not finite was clamped on the way; the sum of all says so.
        loss[i] = _F32(cell_loss) if math.isfinite(finite) else _F32(math.nan)
        by_library[i] = weight[i] * _F32(cell_sum)
        if len(by_logits):
            share = _F32(cell_sum / total) if softmax else _ZERO
            _store_difference(by_mean, shares, share, weight[i], by_logits[i])
            if len(dropout):
                _store(delta, weight[i], by_dropout[i])


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _scratch32(n: int) -> Array:
    """Memory that begins and ends far from any other array.

    A loop that LLVM has vectorised first looks whether its arrays begin less than one round of it
    apart, and if so goes element by element, which sums in another order: with short arrays, the
    last bits of a result would depend on where they happen to lie.
    """
    return np.empty(n + 2 * _APART, _F32)[_APART : _APART + n]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _scratch64(n: int) -> Array:
    """As :func:`_scratch32`."""
    return np.empty(n + 2 * _APART)[_APART : _APART + n]


@njit(fastmath=_SUM, error_model="numpy")  # type: ignore[untyped-decorator]
def _load(source: Array, out: Array) -> Scalar:
    """Widen a row; returns a sum that is finite if, barring overflow, all of the row is."""
    total = _ZERO
    for j in range(len(out)):
        x = widen(source[j])
        out[j] = x
        total += x
    return total


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _hide_absent(present: Array, logit: Array) -> None:
    """A number so low for the genes that are absent that their share is 0."""
    for j in range(len(logit)):
        logit[j] = logit[j] if present[j] else _ABSENT


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _largest(x: Array) -> Scalar:
    largest = _ABSENT
    for j in range(len(x)):
        largest = larger(x[j], largest)
    return largest


@njit(fastmath=_SUM, error_model="numpy")  # type: ignore[untyped-decorator]
def _exponentials(logit: Array, top: Scalar, shares: Array) -> Scalar:
    """``exp(logit - top)``, 0 where that is below exp(-80); returns their sum."""
    total = _ZERO
    for j in range(len(logit)):
        x = logit[j] - top
        share = exp32(x)
        share = share if x > _UNDERFLOW else _ZERO
        shares[j] = share
        total += share
    return total


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _zeros(
    shares: Array, scale: Scalar, theta: Array, inverse: Array, softplus: Array, by_mean: Array
) -> None:
    """Of zeros under the NB: ``θ log(1 + μ/θ)``, and its derivative by the log of the mean."""
    for j in range(len(shares)):
        mean = shares[j] * scale
        t = mean * inverse[j]
        t = t if t < _MOST else _MOST
        one_over = _ONE / (_ONE + t)
        softplus[j] = theta[j] * log1p32(t, one_over)
        by_mean[j] = mean * one_over


@njit(fastmath=_SUM, error_model="numpy")  # type: ignore[untyped-decorator]
def _plain(
    softplus: Array, weight: Scalar, by_mean: Array, by_theta: Array
) -> tuple[Scalar, Scalar]:
    """Sums of loss and derivative by the mean of zeros under the NB; adds to ``by_theta``."""
    loss = _ZERO
    total = _ZERO
    for j in range(len(softplus)):
        loss += softplus[j]
        total += by_mean[j]
        by_theta[j] += weight * (softplus[j] - by_mean[j])
    return loss, total


@njit(fastmath=_SUM, error_model="numpy")  # type: ignore[untyped-decorator]
def _inflated(
    softplus: Array, weight: Scalar, delta: Array, by_mean: Array, by_theta: Array
) -> tuple[Scalar, Scalar]:
    """As :func:`_plain`, under the ZINB; ``delta`` becomes the derivative by it."""
    loss = _ZERO
    total = _ZERO
    for j in range(len(softplus)):
        x, a = delta[j], softplus[j]
        y = x + a
        e1, e2 = exp32(-abs(x)), exp32(-abs(y))
        p1, p2 = _ONE + e1, _ONE + e2
        both = _ONE / (p1 * p2)
        inverse1, inverse2 = both * p2, both * p1
        # Probability that a count is not replaced, and that a zero is one of the NB.
        kept = inverse1 if x <= _ZERO else e1 * inverse1
        of_nb = inverse2 if y <= _ZERO else e2 * inverse2
        high1 = x if x > _ZERO else _ZERO
        high2 = x if x > -a else -a
        loss += high1 - high2 + log32(p1 * inverse2)
        m = of_nb * by_mean[j]
        by_mean[j] = m
        total += m
        by_theta[j] += weight * (of_nb * a - m)
        delta[j] = of_nb - kept
    return loss, total


@njit(fastmath=_SUM, error_model="numpy")  # type: ignore[untyped-decorator]
def _counted(
    x: Array,
    d: Array,
    theta: Array,
    log_rise: Array,
    rise: Array,
    by_mean: Array,
    by_theta: Array,
) -> Scalar:
    """Sum of the losses under the NB of counts x above zero, and derivatives by log μ and log θ.

    ``d`` is log(μ/θ); for the others see :func:`rises`.
    """
    softplus = by_theta
    for k in range(len(x)):
        t = exp64(d[k])
        softplus[k] = log1p64(t)
        by_mean[k] = (theta[k] * t - x[k]) / (1.0 + t)
    loss = 0.0
    for k in range(len(x)):
        loss += (theta[k] + x[k]) * softplus[k] - x[k] * d[k] - log_rise[k]
    for k in range(len(x)):
        by_theta[k] = theta[k] * (softplus[k] - rise[k]) - by_mean[k]
    return loss


@njit(fastmath=_SUM, error_model="numpy")  # type: ignore[untyped-decorator]
def _not_dropped(delta: Array) -> Scalar:
    """Sum of softplus(δ) of the counts above zero; ``delta`` becomes the derivative, σ(δ)."""
    loss = 0.0
    for k in range(len(delta)):
        x = delta[k]
        e = exp64(-abs(x))
        inverse = 1.0 / (1.0 + e)
        loss += (x if x > 0.0 else 0.0) + log1p64(e)
        delta[k] = inverse if x > 0.0 else e * inverse
    return loss


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _store_difference(
    by_mean: Array, shares: Array, share: Scalar, weight: Scalar, out: Array
) -> None:
    """The derivative by the logits: through a softmax it is less the share of that of the sum."""
    for j in range(len(out)):
        out[j] = narrow(weight * (by_mean[j] - shares[j] * share), out[j])


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _store(values: Array, weight: Scalar, out: Array) -> None:
    for j in range(len(out)):
        out[j] = narrow(weight * values[j], out[j])
