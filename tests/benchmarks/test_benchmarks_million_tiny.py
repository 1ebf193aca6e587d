"""bench_million runs, and what it writes is whole and sane; its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_million.py"

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)


@pytest.mark.timeout(600)  # fourteen workers, each with imports of its own
def test_every_step_is_measured_and_the_peer_does_the_same_cells(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    written = json.loads(out.read_text())
    small, large = written["runs"]
    for run in (small, large):
        assert list(run["ours"]) == ["ingest", "genes", "train", "embed", "evaluate"]
        assert run["seconds"] > 0
        assert run["ours"]["evaluate"]["metrics"]["n_cells"] == run["cells"]
    assert large["peer"] is None
    assert small["peer"]["bound"] > 0
    assert small["ours"]["train"]["bound"] > 0
    for values in small["compared"].values():
        assert list(values) == ["scvi", "scvi-tools"]
    assert "scvi-tools on 1,200 cells, computed and not run" in done.stdout
