"""bench_models runs, and what it writes is whole and sane; its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_models.py"
DATA = ROOT.parent / "shared" / "data"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
    ),
]


@pytest.mark.parametrize(
    ("question", "file", "sides"),
    [
        ("hierarchy", "paul15_hspc.h5ad", ["scVI, kNN", "scANVI, hierarchical"]),
        ("seeds", "zheng_pbmc_facs.h5ad", ["scVI, kNN", "scANVI, joint"]),
        ("transfer", "pbmc_4batch_3study.h5ad", ["scvi-tools SCANVI", "DAVAE, kNN"]),
    ],
)
def test_it_measures_all_sides_on_the_same_cells(
    tmp_path: Path, question: str, file: str, sides: list[str]
) -> None:
    if not (DATA / file).exists():
        pytest.skip(f"real counts are not here: {DATA / file}")
    if any(side.startswith("scvi-tools") for side in sides):
        pytest.importorskip("scvi", reason="the peer is not installed; it is in the extra `bench`")
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(out), "--questions", question]
    done = subprocess.run(
        [*command, "--sides", *sides], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = json.loads(out.read_text())["results"]
    assert 0 < result["cells"]["n_labelled"] < result["cells"]["n_cells"]
    found = {(f["side"], f["measure"]): f for f in result["figures"]}
    for side in sides:
        for measure in ("accuracy", "weighted accuracy"):
            figure = found[side, measure]
            assert 0 <= figure["value"] <= 1
            assert (figure["difference"] is None) == (side == sides[0])
        assert side in done.stdout
    assert (sides[0], "entropy") in found or question != "transfer"
