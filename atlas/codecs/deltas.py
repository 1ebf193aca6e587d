"""Running sums of stored differences: a third of what decoding takes if one by one."""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_VECTOR_BITS: Final = 128
"""Of a register that every processor with vectors has; LLVM does without where there is none."""


@intrinsic  # type: ignore[untyped-decorator]
def _sum_groups(_: Any, source: Any, target: Any, n_groups: Any, total: Any) -> Any:
    """Running sums of ``n_groups`` vectors at the address ``source``, written to ``target``.

    Within a vector each element gets those before it in log2 steps (Hillis and Steele 1986); then
    the sum so far, ``total``, is added to all. Returns the last sum.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_value_type(signature.args[3])
        lanes = _VECTOR_BITS // element.width
        vector = ir.VectorType(element, lanes)
        zeros = ir.Constant(vector, [0] * lanes)
        last = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [lanes - 1] * lanes)
        begin, to = (builder.inttoptr(arg, vector.as_pointer()) for arg in args[:2])
        carry = cgutils.alloca_once(builder, vector)
        whole = builder.insert_element(zeros, args[3], ir.Constant(ir.IntType(32), lanes - 1))
        builder.store(builder.shuffle_vector(whole, zeros, last), carry)
        with cgutils.for_range(builder, args[2]) as loop:
            sums = builder.load(builder.gep(begin, [loop.index]), align=element.width // 8)
            shift = 1
            while shift < lanes:
                moved = [i if i < shift else lanes + i - shift for i in range(lanes)]
                mask = ir.Constant(last.type, moved)
                sums = builder.add(sums, builder.shuffle_vector(zeros, sums, mask))
                shift *= 2
            sums = builder.add(sums, builder.load(carry))
            builder.store(sums, builder.gep(to, [loop.index]), align=element.width // 8)
            builder.store(builder.shuffle_vector(sums, zeros, last), carry)
        return builder.extract_element(builder.load(carry), ir.Constant(ir.IntType(32), lanes - 1))

    return total(types.int64, types.int64, types.int64, total), generate


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def sum_deltas(deltas: npt.NDArray[Any], skip: int, out: npt.NDArray[Any]) -> None:
    """Running sums of ``deltas``, modulo their type, from element ``skip`` on into ``out``.

    Parameters
    ----------
    deltas, out
        Contiguous, of one integer type; ``out`` may be ``deltas`` itself.
    skip
        Elements that are summed but not written.
    """
    total = deltas.dtype.type(0)
    for k in range(skip):
        total = deltas.dtype.type(total + deltas[k])
    lanes = 16 // deltas.itemsize
    n_groups = len(out) // lanes
    total = _sum_groups(
        np.int64(deltas[skip:].ctypes.data), np.int64(out.ctypes.data), n_groups, total
    )
    for k in range(n_groups * lanes, len(out)):
        total = deltas.dtype.type(total + deltas[skip + k])
        out[k] = total
