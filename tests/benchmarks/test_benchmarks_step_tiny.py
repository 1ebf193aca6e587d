"""bench_step runs, and what it writes is whole and sane; its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_step.py"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
    ),
]


def test_it_measures_all_sides_on_the_same_counts(tmp_path: Path) -> None:
    pytest.importorskip("scvi", reason="the peer is not installed; it is in the extra `bench`")
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = {r["side"]: r for r in json.loads(out.read_text())["results"]}
    assert set(results) == {"scvi-tools", "plain", "fused", "bfloat16"}
    for side, result in results.items():
        assert result["cells_per_second"] > 0
        assert side in done.stdout
        if side != "scvi-tools":
            parts = result["parts"]
            inside = ("inputs", "forward", "backward", "optimiser")
            assert 0 < sum(parts[part] for part in inside) <= parts["step"] * 1.001
            assert min(parts.values()) >= 0
    # The same cells, order and noise: the losses differ by rounding alone.
    plain = results["plain"]["train_loss"]
    assert results["fused"]["train_loss"] == pytest.approx(plain, rel=1e-5)
    assert results["bfloat16"]["train_loss"] == pytest.approx(plain, rel=1e-2)
