"""bench_ranks runs, and all sides take the same steps; its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_ranks.py"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
    ),
]


def test_all_sides_go_through_the_cells_in_the_same_steps(tmp_path: Path) -> None:
    pytest.importorskip("scvi", reason="the peer is not installed; it is in the extra `bench`")
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    written = json.loads(out.read_text())
    results = {result["side"]: result for result in written["results"]}
    assert set(results) == {"one process", "ranks", "scvi-tools", "scvi-tools, ranks"}
    for side, result in results.items():
        assert result["cells_per_second"] > 0
        assert result["steps"] == [8, 8], side
    rates = {side: result["cells_per_second"] for side, result in results.items()}
    ratios = {ratio["what"]: ratio["found"] for ratio in written["ratios"]}
    assert ratios["ranks / one process"] == rates["ranks"] / rates["one process"]
    assert len(ratios) == 3
