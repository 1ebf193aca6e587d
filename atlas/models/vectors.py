"""Exponential and logarithm that LLVM turns into vector instructions.

numba from PyPI has no vector library: a loop that calls ``math.exp`` calls it element by element.
These are polynomials without branches; a loop over them becomes 8 or 16 elements wide. Reduction
of the argument and coefficients are those of Cephes (exp in float32) and of fdlibm (logarithms),
both to about one unit in the last place; exp in float64 is a Taylor polynomial on the reduced
argument, to 1e-14.

None is compiled with permission to reassociate, which would take the compensated sums apart;
products and sums may be fused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Scalar = Any
"""float32 or float64; numba knows which."""

_CONTRACT = {"contract", "nsz"}

_F32, _F64 = np.float32, np.float64
_ONE32, _TWO32, _HALF32 = _F32(1.0), _F32(2.0), _F32(0.5)

# Adding and subtracting 1.5·2^(bits of the mantissa) rounds to an integer, which then stands in
# the low bits.
_MAGIC32, _MAGIC64 = _F32(12582912.0), _F64(6755399441055744.0)
_LOG2E32, _LOG2E64 = _F32(1.44269504088896341), _F64(1.44269504088896341)
_LN2_HIGH32, _LN2_LOW32 = _F32(6.9313812256e-01), _F32(9.0580006145e-06)
_LN2_HIGH64, _LN2_LOW64 = _F64(6.93147180369123816490e-01), _F64(1.90821492927058770002e-10)

_LOWEST32, _HIGHEST32 = _F32(-80.0), _F32(80.0)
_LOWEST64, _HIGHEST64 = _F64(-700.0), _F64(700.0)

_E32 = tuple(
    map(
        _F32,
        (
            1.9875691500e-4,
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ),
    )
)
_E0, _E1, _E2, _E3, _E4, _E5 = _E32
_L0, _L1, _L2, _L3 = map(_F32, (0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841))
_D0 = _F64(6.666666666666735130e-01)
_D1 = _F64(3.999999999940941908e-01)
_D2 = _F64(2.857142874366239149e-01)
_D3 = _F64(2.222219843214978396e-01)
_D4 = _F64(1.818357216161805012e-01)
_D5 = _F64(1.531383769920937332e-01)
_D6 = _F64(1.479819860511658591e-01)


def _layout(x: Any) -> tuple[Any, Any, int, int, int]:
    """LLVM types of a float and its bits, bits of its mantissa, exponent's bias, bits of √½."""
    if x == types.float32:
        return ir.FloatType(), ir.IntType(32), 23, 127, 0x3F3504F3
    return ir.DoubleType(), ir.IntType(64), 52, 1023, 0x3FE6A09E667F3BCD


@intrinsic  # type: ignore[untyped-decorator]
def _power_of_two(typing: Any, z: Any) -> Any:
    """2^n, of an integer n to which the magic number was added."""
    real, integer, mantissa, bias, _ = _layout(z)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], integer)
        exponent = builder.add(bits, integer(bias))
        return builder.bitcast(builder.shl(exponent, integer(mantissa)), real)

    return z(z), code


@intrinsic  # type: ignore[untyped-decorator]
def _exponent(typing: Any, x: Any) -> Any:
    """The integer n for which x / 2^n is in [√½, √2), as a float."""
    real, integer, mantissa, _, root = _layout(x)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        above = builder.sub(builder.bitcast(arguments[0], integer), integer(root))
        return builder.sitofp(builder.ashr(above, integer(mantissa)), real)

    return x(x), code


@intrinsic  # type: ignore[untyped-decorator]
def _fraction(typing: Any, x: Any) -> Any:
    """x / 2^n, in [√½, √2)."""
    real, integer, mantissa, _, root = _layout(x)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], integer)
        above = builder.ashr(builder.sub(bits, integer(root)), integer(mantissa))
        return builder.bitcast(builder.sub(bits, builder.shl(above, integer(mantissa))), real)

    return x(x), code


@intrinsic  # type: ignore[untyped-decorator]
def widen(typing: Any, x: Any) -> Any:
    """The float32 that a bfloat16 stands for, given by its bits as uint16; float32 stays."""
    if x == types.float32:
        return x(x), lambda context, builder, signature, arguments: arguments[0]

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.shl(builder.zext(arguments[0], word), word(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(x), code


@intrinsic  # type: ignore[untyped-decorator]
def narrow(typing: Any, x: Any, like: Any) -> Any:
    """A float32 as ``like`` is: the nearest bfloat16's bits for uint16, itself for float32."""
    if like == types.float32:
        return x(x, like), lambda context, builder, signature, arguments: arguments[0]

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, word(16)), ir.IntType(16))

    return like(x, like), code


@intrinsic  # type: ignore[untyped-decorator]
def larger(typing: Any, x: Any, y: Any) -> Any:
    """The larger of two floats that are numbers, with the flags by which it may be vectorised."""
    flags = ("nnan", "nsz")

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        above = builder.fcmp_ordered(">", *arguments, flags=flags)
        return builder.select(above, *arguments, flags=flags)

    return x(x, y), code


@njit(fastmath=_CONTRACT, error_model="numpy")  # type: ignore[untyped-decorator]
def exp32(x: Scalar) -> Scalar:
    """``exp(x)`` in float32, of x between -80 and 80; beyond, that of the nearer end."""
    x = x if x > _LOWEST32 else _LOWEST32
    x = x if x < _HIGHEST32 else _HIGHEST32
    z = x * _LOG2E32 + _MAGIC32
    n = z - _MAGIC32
    r = (x - n * _LN2_HIGH32) - n * _LN2_LOW32
    p = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    return (p * (r * r) + r + _ONE32) * _power_of_two(z)


@njit(fastmath=_CONTRACT, error_model="numpy")  # type: ignore[untyped-decorator]
def log32(x: Scalar) -> Scalar:
    """``log(x)`` in float32, of normal positive numbers."""
    n = _exponent(x)
    f = _fraction(x) - _ONE32
    s = f / (_TWO32 + f)
    z = s * s
    w = z * z
    r = z * (_L0 + w * _L2) + w * (_L1 + w * _L3)
    half = _HALF32 * f * f
    return s * (half + r) + n * _LN2_LOW32 - half + f + n * _LN2_HIGH32


@njit(fastmath=_CONTRACT, error_model="numpy")  # type: ignore[untyped-decorator]
def log1p32(x: Scalar, one_over: Scalar) -> Scalar:
    """``log(1 + x)`` in float32, of x from 0 to 1e37; ``one_over`` is ``1 / (1 + x)``."""
    u = _ONE32 + x
    return log32(u) + (x - (u - _ONE32)) * one_over


@njit(fastmath=_CONTRACT, error_model="numpy")  # type: ignore[untyped-decorator]
def exp64(x: Scalar) -> Scalar:
    """``exp(x)`` in float64, of x between -700 and 700; beyond, that of the nearer end."""
    x = x if x > _LOWEST64 else _LOWEST64
    x = x if x < _HIGHEST64 else _HIGHEST64
    z = x * _LOG2E64 + _MAGIC64
    n = z - _MAGIC64
    r = (x - n * _LN2_HIGH64) - n * _LN2_LOW64
    p = 1 / 479001600.0
    p = p * r + 1 / 39916800.0
    p = p * r + 1 / 3628800.0
    p = p * r + 1 / 362880.0
    p = p * r + 1 / 40320.0
    p = p * r + 1 / 5040.0
    p = p * r + 1 / 720.0
    p = p * r + 1 / 120.0
    p = p * r + 1 / 24.0
    p = p * r + 1 / 6.0
    p = p * r + 0.5
    return (p * (r * r) + r + 1.0) * _power_of_two(z)


@njit(fastmath=_CONTRACT, error_model="numpy")  # type: ignore[untyped-decorator]
def log64(x: Scalar) -> Scalar:
    """``log(x)`` in float64, of normal positive numbers."""
    n = _exponent(x)
    f = _fraction(x) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    odd = z * (_D0 + w * (_D2 + w * (_D4 + w * _D6)))
    even = w * (_D1 + w * (_D3 + w * _D5))
    half = 0.5 * f * f
    return n * _LN2_HIGH64 - ((half - (s * (half + odd + even) + n * _LN2_LOW64)) - f)


@njit(fastmath=_CONTRACT, error_model="numpy")  # type: ignore[untyped-decorator]
def log1p64(x: Scalar) -> Scalar:
    """``log(1 + x)`` in float64, of x from 0."""
    u = 1.0 + x
    return log64(u) + (x - (u - 1.0)) / u
