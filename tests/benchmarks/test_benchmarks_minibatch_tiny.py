"""bench_minibatch runs, and counts passes as it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    import bench_minibatch

    yield bench_minibatch
    sys.path.remove(str(BENCHMARKS))


def test_rates_by_rule(bench: ModuleType) -> None:
    rates = {(size, rule): lr for size, rule, lr in bench.settings_of([128, 2048])}
    assert rates == pytest.approx(
        {
            (128, "same"): 1e-3,
            (128, "doubled"): 2e-3,
            (2048, "same"): 1e-3,
            (2048, "root"): 4e-3,
            (2048, "linear"): 16e-3,
        }
    )


def test_passes_that_fit_in_the_time_of_the_default(bench: ModuleType) -> None:
    seconds = [(128, 100.0), (128, 90.0), (512, 50.0), (512, 40.0), (512, 60.0)]
    trained = [{"minibatch_size": size, "epochs": {"seconds": s}} for size, s in seconds]
    assert bench.passes_in_time(trained, 20) == [20, 20, 38, 38, 38]


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)
def test_it_trains_at_equal_epochs_and_in_equal_time(tmp_path: Path, real_data) -> None:
    real_data("pbmc_4batch_3study.h5ad")
    out = tmp_path / "minibatch.json"
    command = [sys.executable, str(BENCHMARKS / "bench_minibatch.py"), "--tiny", "--json", str(out)]
    done = subprocess.run(
        [*command, "--work", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["blood", "simulated"]
    for own in results.values():
        assert [one["minibatch_size"] for one in own] == [128, 128, 256, 256, 256]
        for one in own:
            for kind in ("epochs", "time"):
                assert len(one[kind]["by_epoch"]) == one[kind]["passes"]
                assert one[kind]["bound"] > 0
    assert "less the first" in done.stdout
