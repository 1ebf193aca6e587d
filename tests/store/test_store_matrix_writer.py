"""Shards laid out here are those of zarr-python, byte for byte."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

from atlas.store import layout
from atlas.store.layout import Layout
from atlas.store.matrix_writer import write_shard


@pytest.mark.parametrize("profile", ["fast", "portable", "small"])
@pytest.mark.parametrize("rises", [False, True])
@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8", "<f4"])
@pytest.mark.parametrize("n", [1, 64, 100, 256, 700])
def test_shards_are_those_of_zarr_python(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    profile: str,
    rises: bool,
    dtype: str,
    n: int,
) -> None:
    monkeypatch.setattr(layout, "CHUNK", 64)
    monkeypatch.setattr(layout, "SHARD", 256)
    generator = np.random.default_rng(n)
    values = np.sort(generator.integers(0, 60_000, n)) if rises else generator.poisson(2, n)
    values = values.astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(tmp_path / "theirs", mode="w", zarr_format=3)
        how = Layout(dtype, profile, rises, 64, 256)
        array = how.create(group, "x", n)
        array[:] = values
        ours = zarr.open_group(tmp_path / "ours", mode="w", zarr_format=3)
        how.create(ours, "x", n)
        folder = tmp_path / "ours" / "x" / "c"
        folder.mkdir()
        for number, start in enumerate(range(0, n, 256)):
            written = write_shard(folder, number, values[start : start + 256], how)
            assert written.size == (folder / str(number)).stat().st_size
        np.testing.assert_array_equal(ours["x"][:], values)
    their_files = {p.name: p.read_bytes() for p in (tmp_path / "theirs/x/c").iterdir()}
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == their_files
