"""HDF5 vectors read past the library are what the library reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from atlas.errors import InputError
from atlas.ingest.direct import read_vector
from atlas.ingest.matrix import read

KNOWN: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunks": {"chunks": (70,)},
    "gzip": {"chunks": (70,), "compression": "gzip"},
    "shuffled": {"chunks": (70,), "shuffle": True},
    "both": {"chunks": (70,), "compression": "gzip", "shuffle": True},
}
OTHERS: dict[str, dict[str, Any]] = {
    "lzf": {"chunks": (70,), "compression": "lzf"},
    "fletcher32": {"chunks": (70,), "fletcher32": True},
}


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).poisson(300, 1_000)


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i4", "<i8", "<u2", "u1"])
@pytest.mark.parametrize("kind", KNOWN)
def test_plain_vectors(tmp_path: Path, values: np.ndarray, kind: str, dtype: str) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=values.astype(dtype), **KNOWN[kind])
    with h5py.File(tmp_path / "x.h5") as file:
        data = file["x"]
        for start, stop in ((0, 1_000), (3, 4), (69, 71), (70, 140), (65, 999)):
            found = read_vector(data, start, stop)
            assert found is not None
            assert found.dtype == data.dtype
            np.testing.assert_array_equal(found, data[start:stop])
        assert read_vector(data, 5, 5) is None
        assert read_vector(data, 5, 1_001) is None
        with ThreadPoolExecutor(4) as pool:
            parts = pool.map(lambda i: read(data, slice(i, i + 50)), range(0, 1_000, 50))
            np.testing.assert_array_equal(np.concatenate(list(parts)), data[()])


@pytest.mark.parametrize("kind", OTHERS)
def test_other_filters_are_left_to_the_library(
    tmp_path: Path, values: np.ndarray, kind: str
) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=values, **OTHERS[kind])
    with h5py.File(tmp_path / "x.h5") as file:
        assert read_vector(file["x"], 0, 100) is None
        np.testing.assert_array_equal(read(file["x"], slice(5, 200)), values[5:200])


def test_odd_vectors_are_left_to_the_library(tmp_path: Path, values: np.ndarray) -> None:
    with h5py.File(tmp_path / "x.h5", "w", userblock_size=512) as file:
        file["x"] = values
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["big"] = values.astype(">i4")
        file["flags"] = values > 300
        file["table"] = values.reshape(10, 100)
        file.create_dataset("never", (100,), "i4", chunks=(10,))
        layout = h5py.VirtualLayout((1_000,), "i8")
        layout[:] = h5py.VirtualSource(tmp_path / "x.h5", "x", (1_000,))
        file.create_virtual_dataset("virtual", layout)
    with h5py.File(tmp_path / "x.h5") as file:
        assert read_vector(file["x"], 0, 100) is None
    with h5py.File(tmp_path / "y.h5") as file:
        for name in ("big", "flags", "table", "never", "virtual"):
            assert read_vector(file[name], 0, 10) is None
            np.testing.assert_array_equal(read(file[name], slice(0, 10)), file[name][0:10])


def test_a_damaged_chunk_has_the_message_of_the_library(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, **KNOWN["gzip"])
        info = file["x"].id.get_chunk_info(3)
    content = bytearray(path.read_bytes())
    content[info.byte_offset : info.byte_offset + 20] = bytes(20)
    path.write_bytes(content)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(read(file["x"], slice(0, 210)), values[:210])
        with pytest.raises(InputError, match="part of /x cannot be read"):
            read(file["x"], slice(0, 211))
