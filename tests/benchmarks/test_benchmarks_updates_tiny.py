"""bench_updates runs, and what it writes is whole and sane; its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_updates.py"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
    ),
]


@pytest.mark.timeout(900)  # thirteen workers, each with imports of its own
def test_ten_studies_are_added_and_measured(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    written = json.loads(out.read_text())
    added = [update["n_obs"] for update in written["updates"]]
    assert len(added) == 10
    anew = written["anew"]
    assert anew["n_obs"] == written["reference"]["n_reference"] + sum(added)
    assert anew["reference_same"]
    for figure in anew["figures"].values():
        assert figure["scvi"]["value"] > 0
        assert figure["ratio"] > 0
