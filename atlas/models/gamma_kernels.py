r"""Differences of log-gamma and digamma functions that the negative binomial needs, compiled.

For a count :math:`x \le 8`, :math:`\Gamma(x+\theta)/\Gamma(\theta)` is the product of
:math:`\theta + k` over :math:`k < x`, and the derivative of its logarithm the sum of
:math:`1/(\theta + k)`; for others see :func:`_log_rising`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy.typing as npt
from numba import njit

from atlas.models.vectors import log64

Array = npt.NDArray[Any]
Scalar = Any

_SUM = {"reassoc", "contract", "nsz"}

_SMALL = 8
"""Counts to here are done by products, all factors for all counts, side by side."""
_SHIFT = 8
"""Stirling's series from here on is exact to 1e-11."""


@njit(fastmath=_SUM, error_model="numpy")  # type: ignore[untyped-decorator]
def rises(x: Array, theta: Array, log_rise: Array, rise: Array) -> None:
    """``log Γ(x+θ) - log Γ(θ) - log Γ(x+1)``, and ``ψ(x+θ) - ψ(θ)``."""
    for k in range(len(x)):
        factor = theta[k]
        product, slope, factorial = factor, 1.0, 1.0
        for step in range(1, _SMALL):
            # The derivative of a product, before the product takes in the factor.
            more = x[k] > step
            factor = theta[k] + step
            slope = slope * factor + product if more else slope
            product = product * factor if more else product
            factorial = factorial * (step + 1.0) if more else factorial
        log_rise[k] = log64(product / factorial)
        rise[k] = slope / product
    for k in range(len(x)):
        if x[k] > _SMALL or x[k] != math.floor(x[k]):
            log_rise[k] = _log_rising(theta[k], x[k]) - _log_rising(1.0, x[k])
            rise[k] = _digamma_rise(theta[k], x[k])


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _log_rising(theta: Scalar, x: Scalar) -> Scalar:
    r"""``log Γ(θ+x) - log Γ(θ)`` without the cancellation of the two at large θ.

    Of :math:`y = \theta + 8` it is the difference of two of Stirling's series, taken term by term;
    the recurrence leads from there to θ.
    """
    ratio = 1.0
    for step in range(_SHIFT):
        ratio *= (theta + step) / (theta + x + step)
    y = theta + _SHIFT
    z = y + x
    return (
        math.log(ratio)
        + (y - 0.5) * math.log1p(x / y)
        + x * math.log(z)
        - x
        + _stirling(1.0 / z)
        - _stirling(1.0 / y)
    )


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _stirling(w: Scalar) -> Scalar:
    """What Stirling's formula lacks of ``log Γ(1/w)``."""
    s = w * w
    return w * (1 / 12 - s * (1 / 360 - s * (1 / 1260 - s * (1 / 1680 - s / 1188))))


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _digamma_rise(theta: Scalar, x: Scalar) -> Scalar:
    """``ψ(θ+x) - ψ(θ)``, as :func:`_log_rising`."""
    rise = 0.0
    for step in range(_SHIFT):
        rise += x / ((theta + step) * (theta + x + step))
    y = theta + _SHIFT
    z = y + x
    return rise + math.log1p(x / y) + _digamma_rest(1.0 / z) - _digamma_rest(1.0 / y)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _digamma_rest(w: Scalar) -> Scalar:
    """``ψ(1/w)`` less its logarithm."""
    s = w * w
    return -0.5 * w - s * (1 / 12 - s * (1 / 120 - s * (1 / 252 - s * (1 / 240 - s / 132))))
