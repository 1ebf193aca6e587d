"""The benchmarks of neighbours and measures run, and what they write is whole and sane."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
    ),
]


def run(script: str, folder: Path, *options: str) -> dict[str, Any]:
    out = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--tiny", "--json", str(out), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def test_neighbours(tmp_path: Path) -> None:
    # pynndescent compiles for a minute
    sides = ["ours, exact (torch)", "ours, flat, mapped file", "FAISS IndexFlatL2", "ours, ivf"]
    figures = run("bench_neighbours.py", tmp_path, "--sides", *sides, "FAISS HNSW")
    for row in figures["exact"]:
        assert row["skipped"] is None, row
        assert row["pairs_a_second"] > 0
        assert row["same_neighbours"] > (0.99999 if row["side"].startswith("ours") else 0.999)
    for row in figures["near"]:
        assert row["skipped"] is None, row
        assert row["recall"] > 0.5
        if row["side"].startswith("ours"):
            assert row["recall"] > 0.97
            assert row["recall_told"] == pytest.approx(row["recall"], abs=0.02)


def test_metrics(tmp_path: Path) -> None:
    figures = run("bench_metrics.py", tmp_path, "--peers", str(tmp_path / "none"))
    assert "no environment" in figures["beside"]["theirs"]["skipped"]
    both = (figures["beside"]["ours"], figures["beside"]["sampled"])
    for found in (*both, *figures["large"]):
        assert found["seconds"] > 0
        names = {m["name"] for m in found["metrics"]["measures"] if m["value"] is not None}
        assert {"mixing_entropy_k50", "purity_k15", "bras", "ilisi", "pcr_comparison"} <= names
