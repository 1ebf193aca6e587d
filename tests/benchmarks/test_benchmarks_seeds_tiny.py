"""The benchmark of seeds runs; its figures are sane, and not looked at otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_seeds_have_a_purity_beside_the_peers(real_data, tmp_path: Path) -> None:
    pytest.importorskip("scanpy", reason="the peer is not installed; it is in the extra `bench`")
    data, out = real_data("zheng_pbmc_facs.h5ad"), tmp_path / "figures.json"
    script = ROOT / "benchmarks" / "bench_seeds.py"
    done = subprocess.run(
        [sys.executable, str(script), "--tiny", "--data", str(data), "--json", str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(out.read_text())
    assert len(figures["signatures"]) == 4
    for row in figures["signatures"].values():
        assert 0 < row["seeds"] <= 10
        assert sum(row["sorted_as"].values()) == row["seeds"]
        assert 0 <= row["purity"] <= 1
        assert 0 <= row["peer"] <= 1
    assert "| CD8 Naive " in done.stdout
