"""Memory by its address, in compiled loops."""

from __future__ import annotations

import sys
from typing import Any

from numba import types
from numba.extending import intrinsic

if sys.byteorder != "little":
    raise ImportError("Rows are read where they lie, little-endian, which this machine is not")


def _pointer(kind: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def at(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), generate

    return at


bytes_at = _pointer(types.uint8)
longs_at = _pointer(types.int64)
unsigned_at = _pointer(types.uint64)
halves_at = _pointer(types.uint16)
words_at = _pointer(types.int32)
floats_at = _pointer(types.float32)
