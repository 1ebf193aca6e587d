"""bench_embed runs, and all sides embed the same; its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_embed.py"

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)


@pytest.mark.long
@pytest.mark.timeout(600)  # six workers, each with imports of its own
def test_all_sides_embed_the_same_cells(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--rounds", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    sides = json.loads(out.read_text())["sides"]
    assert list(sides) == ["ours", "ours, projected", "scvi-tools", "scvi-tools, 4,096"]
    for side in sides.values():
        assert side["differs"] < 1e-3
        assert len(side["seconds"]) == 3
        assert side["cells_per_second"] > 0
    assert "/ scvi-tools" in done.stdout
