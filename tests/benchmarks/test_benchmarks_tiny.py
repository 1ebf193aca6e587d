"""The benchmarks run, and what they write is whole and sane; their figures are not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
DATA = ROOT.parent / "shared" / "data" / "pbmc_4batch_3study.h5ad"

pytest.importorskip("scvi", reason="the peer is not installed; it is in the extra `bench`")
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)


@pytest.fixture(scope="module")
def quality_module():
    sys.path.insert(0, str(BENCHMARKS))
    import bench_quality

    yield bench_quality
    sys.path.remove(str(BENCHMARKS))


def run(script: str, folder: Path) -> tuple[dict, str]:
    out = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--tiny", "--json", str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(out.read_text())
    assert figures["machine"]["cores"] >= 1
    assert figures["versions"]["scvi-tools"] == "1.4.2"
    return figures, done.stdout


@pytest.mark.long
@pytest.mark.skipif(not DATA.exists(), reason=f"the cells to compare on are not there: {DATA}")
def test_quality_compares_both_on_the_same_cells(tmp_path):
    figures, printed = run("bench_quality.py", tmp_path)
    cells = figures["cells"]
    assert cells["n_cells"] == 1200
    assert 60 < cells["n_held_out"] < 180

    overall = {c["measure"]: c for c in figures["comparisons"] if c["seed"] is None}
    assert set(overall) == {"bound", "entropy", "accuracy", "weighted accuracy"}
    for c in overall.values():
        assert c["low"] < c["difference"] < c["high"]
        assert c["ours"] - c["peer"] == pytest.approx(c["difference"], abs=1e-6)
    # 200 genes of counts: some nats a gene at most, and never a positive log-likelihood
    for side in ("ours", "peer"):
        assert -1000 < overall["bound"][side] < -50
        assert 0 < overall["entropy"][side] <= np.log(4)
        assert 0 <= overall["accuracy"][side] <= 1
    assert overall["bound"]["allowance"] == pytest.approx(0.01 * -overall["bound"]["peer"])
    assert overall["weighted accuracy"]["passed"] is None

    for side in ("ours", "peer"):
        (one,) = [r for r in figures["runs"] if r["side"] == side]
        assert len(one["validation_bound"]) == 2
        # The bound during training is of the same cells and weights, with other noise.
        assert one["validation_bound"][-1] == pytest.approx(overall["bound"][side], rel=0.02)
        assert figures["cost"][side]["private_peak_bytes"] > 0
    assert "| bound " in printed
    assert "ours / peer" in printed


@pytest.mark.long
def test_memory_has_a_figure_for_every_step_and_size(tmp_path):
    figures, printed = run("bench_memory.py", tmp_path)
    small, large = figures["runs"]
    assert (small["cells"], large["cells"]) == (400, 800)
    for part in (small["ours"], large["ours"], small["peer"]):
        assert set(part) == {"ingest", "train", "embed"}
        for step in part.values():
            # Imports take tens of megabytes at least, and nothing here takes a gigabyte.
            assert 3e7 < step["imports_bytes"] < 1e9
            assert 0 < step["after_warm_up_bytes"] <= step["peak_bytes"] < 1e9
            assert step["resident_peak_bytes"] > 0
    assert large["peer"] == {}
    assert large["peer_skipped"]
    assert set(figures["verdicts"]) == {"ingest", "train", "embed"}
    assert "growth a cell" in printed


def test_mean_and_error_agree_with_a_bootstrap(quality_module):
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], [40, 100, 160])
    values = rng.normal(groups, 1 + groups)
    mean, error = quality_module.mean_and_error(values, groups)
    parts = [values[groups == g] for g in range(3)]
    assert mean == pytest.approx(np.mean([p.mean() for p in parts]))
    draws = [np.mean([rng.choice(p, len(p)).mean() for p in parts]) for _ in range(4000)]
    assert error == pytest.approx(np.std(draws), rel=0.06)


def test_verdict_needs_the_whole_interval(quality_module):
    bound = quality_module.MEASURES[0]
    rng = np.random.default_rng(1)
    peer = rng.normal(-500, 100, 1000)
    cases = {-4.0: True, -5.0: False, -6.0: False}  # 1 % of the bound is 5
    for shift, passed in cases.items():
        ours = peer + shift + rng.normal(0, 5, 1000)
        found = quality_module.compare(bound, {"ours": [ours], "peer": [peer]}, None, None)
        assert found.passed is passed
        assert found.difference == pytest.approx(shift, abs=0.6)
