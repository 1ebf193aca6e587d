"""Sums of weighted rows that stay in registers.

A count adds a multiple of a row of weights to a cell's sum. Weights of 2,000 genes and 128 hidden
units are a megabyte, more than a core's second cache: so they lie in blocks of 32 columns, one
block after the other is gone through, and the 32 sums are one vector that is written once.
"""

from __future__ import annotations

from typing import Any, Final

import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Array = npt.NDArray[Any]

WIDTH: Final = 32
"""Columns of a block: four registers of 8 floats, or two of 16."""


@intrinsic  # type: ignore[untyped-decorator]
def _add_weighted_rows(
    typing: Any,
    weights: Any,
    numbers: Any,
    begin: Any,
    end: Any,
    table: Any,
    first: Any,
    out: Any,
    at: Any,
) -> Any:
    """``out[at:at+32] += Σ_k weights[k] * row numbers[k]``, k from ``begin`` to ``end``.

    The rows are of 32 elements and lie in ``table`` from the element ``first`` on; ``table`` and
    ``out`` are taken by their elements, whatever their shape, and nothing is checked. Products and
    sums are fused, one k after the other.
    """
    given = (weights, numbers, types.int64, types.int64, table, types.int64, out, types.int64)
    number = numbers.dtype

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def elements(i: int) -> Any:
            made = context.make_array(signature.args[i])
            return made(context, builder, arguments[i]).data

        real, integer = ir.FloatType(), ir.IntType(64)
        vector = ir.VectorType(real, WIDTH)
        undefined = ir.Constant(vector, ir.Undefined)
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
        fused = builder.module.declare_intrinsic(
            f"llvm.fma.v{WIDTH}f32", (), ir.FunctionType(vector, [vector] * 3)
        )
        scales, places, rows, sums = (elements(i) for i in (0, 1, 4, 6))
        _, _, begin, end, _, first, _, at = arguments

        def address(base: Any, element: Any) -> Any:
            return builder.bitcast(builder.gep(base, [element]), vector.as_pointer())

        target = address(sums, at)
        before = builder.load(target, align=4)
        entry = builder.block
        test, body, done = (builder.append_basic_block(name) for name in ("test", "body", "done"))
        builder.branch(test)

        builder.position_at_end(test)
        k, total = builder.phi(integer), builder.phi(vector)
        k.add_incoming(begin, entry)
        total.add_incoming(before, entry)
        builder.cbranch(builder.icmp_signed("<", k, end), body, done)

        builder.position_at_end(body)
        place = builder.load(builder.gep(places, [k]))
        place = context.cast(builder, place, number, types.int64)
        row = address(rows, builder.add(first, builder.mul(place, integer(WIDTH))))
        scale = builder.load(builder.gep(scales, [k]))
        scale = builder.insert_element(undefined, scale, ir.IntType(32)(0))
        scale = builder.shuffle_vector(scale, undefined, lanes)
        more = builder.call(fused, [builder.load(row, align=4), scale, total])
        k.add_incoming(builder.add(k, integer(1)), body)
        total.add_incoming(more, body)
        builder.branch(test)

        builder.position_at_end(done)
        builder.store(total, target, align=4)
        return context.get_dummy_value()

    return types.void(*given), code


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def add_rows(
    begin: int,
    end: int,
    indptr: Array,
    indices: Array,
    values: Array,
    blocks: Array,
    out: Array,
) -> None:
    """Add rows of the product of a CSR matrix and a dense one, from ``begin`` to ``end``.

    Parameters
    ----------
    begin, end
        Rows.
    indptr, indices, values
        The CSR matrix; values are float32, all of them contiguous.
    blocks
        The dense one by blocks of columns: float32, (n_blocks, n_columns, WIDTH), contiguous.
    out
        float32, (n_rows, n_blocks · WIDTH), contiguous.
    """
    for block in range(len(blocks)):
        first = block * blocks.shape[1] * WIDTH
        for i in range(begin, end):
            at = i * out.shape[1] + block * WIDTH
            _add_weighted_rows(values, indices, indptr[i], indptr[i + 1], blocks, first, out, at)
