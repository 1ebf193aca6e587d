"""Options of the measures and of an index: what is out of range is refused before any work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.index import NeighborIndex
from atlas.evaluation.measures import Options, evaluate_embedding
from atlas.evaluation.neighbours import nearest

Z = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("mixing_k", (9,), "10 to 500"),
        ("mixing_k", (50, 501), "10 to 500"),
        ("mixing_k", (50, 15.5), "10 to 500"),
        ("mixing_k", (), "one number or more, each once"),
        ("mixing_k", (50, 50), "one number or more, each once"),
        ("label_k", 0, "at least 1"),
        ("purity_k", -1, "at least 1"),
        ("protein_k", True, "at least 1"),
        ("max_queries", 1, "at least 2"),
        ("max_queries", -5, "at least 2"),
        ("graph_cells", -3, "at least 0"),
        ("leiden_cells", -1, "at least 0"),
        ("seed", -1, "0 to 4,294,967,295"),
        ("seed", 2**32, "0 to 4,294,967,295"),
        ("backend", "scann", "auto or faiss or torch"),
    ],
)
def test_what_is_out_of_range_is_refused(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Options(**{option: value})
    with pytest.raises(ConfigError, match=expected):
        evaluate_embedding(Z, Categories(np.arange(60) % 2, "xy"), **{option: value})


def test_ends_of_the_ranges_are_taken() -> None:
    Options(mixing_k=(10, np.int64(500)), seed=2**32 - 1, graph_cells=0, leiden_cells=0)
    found = evaluate_embedding(Z, Categories(np.arange(60) % 2, "xy"), max_queries=2, mixing_k=[10])
    assert found["mixing_entropy_k10"].value is not None


def test_names_of_kinds_devices_and_backends() -> None:
    with pytest.raises(ConfigError, match=r"no such index\n.*annoy"):
        NeighborIndex(3, kind="annoy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no such device\n.*tpu"):
        NeighborIndex(3, device="tpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no such backend\n.*scann"):
        nearest(Z, Z, 3, backend="scann")  # type: ignore[arg-type]
