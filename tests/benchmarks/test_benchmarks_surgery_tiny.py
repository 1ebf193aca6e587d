"""bench_surgery runs, and what it writes is whole and sane; its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_surgery.py"
DATA = ROOT.parent / "shared" / "data" / "pbmc_4batch_3study.h5ad"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not DATA.exists(), reason=f"real counts are not here: {DATA}"),
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
    ),
]


@pytest.mark.timeout(900)  # twenty workers, each with imports of its own
def test_it_measures_all_sides_on_the_same_cells(tmp_path: Path) -> None:
    pytest.importorskip("scvi", reason="the peer is not installed; it is in the extra `bench`")
    out = tmp_path / "figures.json"
    questions = ["mapping", "study", "sizes"]
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(out), "--questions", *questions]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    written = json.loads(out.read_text())
    assert 0 < written["cells"]["n_query"] < written["cells"]["n_cells"]
    by_name = {question["question"]: question for question in written["questions"]}
    assert len(by_name) == 4
    for question in by_name.values():
        found = {(f["side"], f["measure"]): f for f in question["figures"]}
        for side in ("scvi-tools", "ours"):
            for measure in ("accuracy", "weighted accuracy", "entropy", "apart", "purity"):
                figure = found[side, measure]
                assert 0 <= figure["value"] <= 1
                assert (figure["difference"] is None) == (side == "scvi-tools")
            assert side in done.stdout
    trained = by_name["mapping"]["trained"]
    assert trained["ours"] == 2 * trained["ours, in turn"] == 128  # 4 layers of 16, two batches
    assert by_name["study"]["trained"]["ours"] == 64  # both conditions are one batch
