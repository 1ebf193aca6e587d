"""bench_transfer runs, and what it writes is whole and sane; its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_transfer.py"
DATA = ROOT.parent / "shared" / "data" / "pbmc_4batch_3study.h5ad"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
    ),
]


@pytest.mark.parametrize(("dataset", "removed"), [("kang", "B"), ("simulated", "type_1")])
def test_it_scores_a_removed_type(tmp_path: Path, dataset: str, removed: str) -> None:
    if dataset == "kang" and not DATA.exists():
        pytest.skip(f"real counts are not here: {DATA}")
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(out), "--threads", "1"]
    done = subprocess.run(
        [*command, "--datasets", dataset, "--types", removed],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = json.loads(out.read_text())["results"]
    assert result["removed"] == removed
    figures = result["figures"]
    assert figures["n_unseen"] > 1
    assert figures["n_known"] > 1
    for score in ("distance", "u", "u, published", "scANVI entropy", "distance, scANVI"):
        assert 0 <= figures[score]["auroc"] <= 1
        assert 0 <= figures[score]["recall"] <= 1
        assert score in done.stdout
    for rule in ("rule", "published"):
        assert 0 <= figures[rule]["false_unknown"] <= 1
    assert 0 < figures["own cluster"]["chance"] < 1
