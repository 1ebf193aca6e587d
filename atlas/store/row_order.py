"""The order of the rows within a study: by a hash of (study, row name), which is the shuffle."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd


def hash_names(prefix: str, names: pd.Index[Any]) -> npt.NDArray[np.uint64]:
    """BLAKE2b of prefix, a zero byte and name, to 64 bits, of each name."""
    start = hashlib.blake2b(prefix.encode() + b"\0", digest_size=8)
    out = bytearray()
    for name in names:
        one = start.copy()
        one.update(str(name).encode())
        out += one.digest()
    return np.frombuffer(bytes(out), "<u8").astype(np.uint64)


def order_rows(hashes: npt.NDArray[np.uint64], names: pd.Index[Any]) -> npt.NDArray[np.int64]:
    """Rows by rising hash, equal hashes (hardly ever) by name: int64 positions."""
    order = np.argsort(hashes, kind="stable")
    if (np.diff(hashes[order]) == 0).any():
        order = np.lexsort((names.to_numpy(str), hashes))
    return order.astype(np.int64, copy=False)
