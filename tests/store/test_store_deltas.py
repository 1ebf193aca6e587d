"""Running sums of differences, against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.codecs.deltas import sum_deltas


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<u4", "<i8", "<u8"])
@settings(deadline=None)
@given(n=st.integers(0, 100), skip=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_sums_are_those_of_numpy_modulo_the_type(dtype: str, n: int, skip: int, seed: int) -> None:
    info = np.iinfo(dtype)
    rng = np.random.default_rng(seed)
    deltas = rng.integers(info.min, info.max, skip + n, dtype=dtype, endpoint=True)
    expected = np.cumsum(deltas, dtype=dtype)[skip:]
    room = np.full(n + 2, 7, dtype)  # what lies around is left alone
    sum_deltas(deltas, skip, room[1:-1])
    assert (room[1:-1] == expected).all()
    assert room[0] == room[-1] == 7
    if skip == 0:
        sum_deltas(deltas, 0, deltas)
        assert (deltas == expected).all()


def test_summing_undoes_the_filter_of_numcodecs() -> None:
    from numcodecs import Delta

    values = np.sort(np.random.default_rng(0).integers(0, 20_000, 5_001)).astype("<u2")
    stored = Delta(dtype="<u2").encode(values)
    out = np.empty_like(values)
    sum_deltas(stored, 0, out)
    assert (out == values).all()
