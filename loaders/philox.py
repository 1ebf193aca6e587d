"""Random words and permutations as a pure function of what they are for.

They are the raw stream of Philox4x64-10 (Salmon et al. 2011), keyed by the seed and a purpose, and
counted by (epoch, lane, window). NumPy keeps that stream the same in all its versions, which it
does not promise for what is built upon it (``Generator.permutation``).
"""

from __future__ import annotations

import threading
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import njit

# The second word of the key: what the words are for. 2 was once the pool at the end of an epoch.
BLOCKS: Final = 0
WINDOW: Final = 1
PLACES: Final = 3
VISITS: Final = 4
DRAWS: Final = 5

_thread: Final = threading.local()


def words(
    n: int, seed: int, purpose: int, epoch: int, lane: int = 0, window: int = 0
) -> npt.NDArray[np.uint64]:
    """Random words, (n,). Philox counts up in the first word of its counter: no streams overlap."""
    bits: np.random.Philox | None = getattr(_thread, "bits", None)
    if bits is None:  # made once: it takes longer than the words of a window
        bits = _thread.bits = np.random.Philox(0)
        _thread.state = bits.state
    state: Any = _thread.state
    state["state"] = {
        "key": np.array([seed, purpose], dtype=np.uint64),
        "counter": np.array([0, epoch, lane, window], dtype=np.uint64),
    }
    bits.state = state
    return bits.random_raw(n)


def uniform(
    n: int, seed: int, purpose: int, epoch: int, lane: int = 0, window: int = 0
) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1), float64 (n,): the upper 53 bits of :func:`words`."""
    drawn: npt.NDArray[np.float64] = (
        words(n, seed, purpose, epoch, lane, window) >> np.uint64(11)
    ) / 2.0**53
    return drawn


def permutation(
    n: int, seed: int, purpose: int, epoch: int, lane: int = 0, window: int = 0
) -> npt.NDArray[np.int64]:
    """A permutation of ``range(n)``: int64, (n,); Durstenfeld's shuffle (1964, Algorithm 235).

    A place among k is the integer part of k · word / 2^64: no place is likelier than another by
    more than k / 2^64.
    """
    order = np.arange(n)
    _shuffle(order, words(n, seed, purpose, epoch, lane, window))
    return order


@njit(cache=True)  # type: ignore[untyped-decorator]
def _shuffle(order: npt.NDArray[np.int64], drawn: npt.NDArray[np.uint64]) -> None:
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    for last in range(len(order) - 1, 0, -1):
        word, k = drawn[last], np.uint64(last + 1)
        place = np.int64(((word >> half) * k + (((word & low) * k) >> half)) >> half)
        order[last], order[place] = order[place], order[last]
