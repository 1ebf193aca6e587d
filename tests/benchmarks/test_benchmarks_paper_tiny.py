"""The benchmarks of imputation and likelihood run tiny; what they compute is checked by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import multivariate_normal
from sklearn.decomposition import FactorAnalysis

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)


@pytest.fixture(scope="module")
def imputation():
    sys.path.insert(0, str(BENCHMARKS))
    import bench_imputation

    yield bench_imputation
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def likelihood():
    sys.path.insert(0, str(BENCHMARKS))
    import bench_likelihood

    yield bench_likelihood
    sys.path.remove(str(BENCHMARKS))


def run(script: str, folder: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    pytest.importorskip("scvi", reason="the peer is not installed; it is in the extra `bench`")
    out = folder / "figures.json"
    command = [sys.executable, str(BENCHMARKS / script), "--tiny", "--json", str(out), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())["results"], done.stdout


@linux
@pytest.mark.long
def test_imputation_asks_all_sides_for_the_same_entries(real_data, tmp_path: Path) -> None:
    real_data("zeisel_cortex_subset.h5ad")
    options = ("--files", "zeisel", "--schemes", "zeros")
    (found,), printed = run("bench_imputation.py", tmp_path, *options)
    cells, figures = found["cells"], found["figures"]
    assert (cells["n_cells"], cells["n_genes"], cells["n_held_out"]) == (300, 558, 0)
    # Nine of a hundred entries that are not zero, which leaves 91 of them.
    assert cells["n_asked"] == pytest.approx(cells["non_zero"] * 300 * 558 * 9 / 91, rel=0.03)
    assert len(figures) == 7
    for name, own in figures.items():
        assert 0 < own["median"][0] < own["mean"][0] < 100, name
    assert len(found["differences"]) == 6
    for d in found["differences"]:
        own, other = (figures[d[side]]["median"][0] for side in ("ours", "other"))
        assert d["difference"] == pytest.approx(own - other)
        assert d["low"] < d["high"]
    assert "| Atlas, ZINB " in printed


@linux
@pytest.mark.long
def test_likelihood_is_of_the_same_cells_for_all_sides(real_data, tmp_path: Path) -> None:
    real_data("tenx_mouse_10k_1000g.h5ad")
    (found,), printed = run("bench_likelihood.py", tmp_path, "--files", "tenx")
    assert found["cells"]["n_cells"] == 300
    assert 40 < found["cells"]["n_held_out"] < 110
    bound, likely = found["figures"]["bound"], found["figures"]["likelihood"]
    assert set(bound) == {f"{p}, {k}" for p in ("Atlas", "scvi-tools") for k in ("ZINB", "NB")}
    assert set(likely) == set(bound) | {"FA", "FA, as counts"}
    for name, (value,) in bound.items():
        # One draw is below many, and both are what training for two epochs gives.
        assert -2000 < value < likely[name][0] < -50
    assert likely["FA, as counts"][0] < 0
    assert len(found["differences"]) == 8
    assert all(d["low"] < d["difference"] < d["high"] for d in found["differences"])
    assert "| FA, as counts " in printed


@pytest.mark.parametrize("scheme", ["zeros", "binomial"])
def test_a_tenth_of_the_non_zeros_is_corrupted_and_told(imputation, scheme: str) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.7, 4, (300, 200)))
    out, asked = imputation.corrupt(sp.csr_matrix(counts), scheme, rng)
    after, at = out.toarray(), (asked["rows"], asked["columns"])
    chosen = np.count_nonzero(counts) // 10
    np.testing.assert_array_equal(counts[at], asked["before"])
    assert len(set(zip(*at, strict=True))) == len(asked["before"])
    assert asked["before"].min() == 1
    rest = np.ones(counts.shape, bool)
    rest[at] = False
    np.testing.assert_array_equal(after[rest], counts[rest])
    if scheme == "zeros":
        assert not after[at].any()
        assert len(asked["before"]) / chosen == pytest.approx(0.9, abs=0.02)
    else:
        assert len(asked["before"]) == chosen
        assert after[at].sum() / counts[at].sum() == pytest.approx(0.2, abs=0.02)
        assert (after[at] <= counts[at]).all()


def test_resampled_medians_are_those_of_cells_written_out(imputation) -> None:
    rng = np.random.default_rng(1)
    errors, cell = rng.normal(size=(2, 501)), rng.integers(0, 40, 501)
    times = rng.multinomial(40, [1 / 40] * 40, 30)
    found = imputation.resampled_medians(errors, cell, times)
    expected = [
        np.mean([np.sort(np.repeat(own, weights[cell]))[(weights[cell].sum() - 1) // 2]
                 for own in errors])
        for weights in times
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    once = imputation.resampled_medians(errors, cell, np.ones((1, 40), np.int64))
    assert once[0] == pytest.approx(np.median(errors, axis=1).mean())


def fitted(n_genes: int, n_factors: int) -> tuple[FactorAnalysis, np.ndarray]:
    rng = np.random.default_rng(2)
    mean = np.exp(rng.normal(size=(400, n_factors)) @ rng.normal(0, 0.7, (n_factors, n_genes)))
    counts = rng.poisson(mean).astype(np.float64)
    return FactorAnalysis(n_factors, svd_method="lapack").fit(np.log1p(counts)), counts


def test_density_of_counts_is_that_of_the_logarithm_corrected(likelihood) -> None:
    model, counts = fitted(5, 2)
    normal = multivariate_normal(model.mean_, model.get_covariance())
    expected = normal.logpdf(np.log1p(counts)) - np.log1p(counts).sum(axis=1)
    np.testing.assert_allclose(likelihood.density(model, counts), expected, rtol=1e-9)


def test_probability_of_counts_is_that_of_boxes_of_the_normal(likelihood) -> None:
    model, counts = fitted(3, 1)
    counts = counts[:40]
    found = likelihood.probability(model, counts, 20_000, np.random.default_rng(3))
    normal = multivariate_normal(model.mean_, model.get_covariance(), seed=0)
    low = np.where(counts > 0, np.log(counts + 0.5), -np.inf)
    for value, one, other in zip(found, low, np.log(counts + 1.5), strict=True):
        assert value == pytest.approx(np.log(normal.cdf(other, lower_limit=one)), abs=0.05)


def test_intervals_far_out_keep_their_digits(likelihood) -> None:
    low, high = np.array([-np.inf, -1.0, 30.0, -31.0]), np.array([0.5, 1.0, 31.0, -30.0])
    found = likelihood.log_interval(low, high)
    # ln Φ(.5), ln(2Φ(1) − 1), and ln Φ(−30) by its asymptotic series
    far = -450 - 0.5 * np.log(2 * np.pi) - np.log(30) + np.log1p(-1 / 900 + 3 / 900**2)
    np.testing.assert_allclose(found, [-0.3689464, -0.3817154, far, far], rtol=1e-6)
