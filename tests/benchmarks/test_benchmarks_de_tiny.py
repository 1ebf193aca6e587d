"""bench_de: its measures against scikit-learn and scipy; it runs, its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_de.py"

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import de_measures

    return de_measures


def test_the_measures_are_those_of_scipy_and_scikit_learn(measures) -> None:
    rng = np.random.default_rng(0)
    truth = np.where(rng.random(300) < 0.3, rng.normal(0, 2, 300), 0.04).round(3)
    lfc = (truth + rng.normal(0, 1, 300)).round(1)  # with ties
    probability = np.abs(lfc) / np.abs(lfc).max()
    called = probability > 0.4
    ranks = np.arange(300)
    estimate = measures.Estimate(lfc, probability, -lfc, called, ranks, ranks)
    found = measures.against_truth([(truth, estimate), (truth, estimate)], 3, seed=0)
    changed = np.abs(truth) >= 0.25
    expected = {
        "Spearman, LFC": scipy.stats.spearmanr(truth, lfc).statistic,
        "Kendall, LFC": scipy.stats.kendalltau(truth, lfc).statistic,
        "Spearman, Bayes factor": scipy.stats.spearmanr(truth, -lfc).statistic,
        "Kendall, Bayes factor": scipy.stats.kendalltau(truth, -lfc).statistic,
        "Spearman, LFC, changed genes": scipy.stats.spearmanr(truth[changed], lfc[changed])[0],
        "AUROC, probability": roc_auc_score(changed, probability),
        "AUROC, Bayes factor": roc_auc_score(changed, np.abs(lfc)),
        "share of changed genes called": (called & changed).sum() / changed.sum(),
        "share of called genes not changed": (called & ~changed).sum() / called.sum(),
    }
    for name, value in expected.items():
        assert found[name].shape == (4,)
        assert found[name][0] == pytest.approx(value, abs=1e-12), name
    none = measures.Estimate(lfc, probability, lfc, np.zeros(300, bool), ranks, ranks)
    assert measures.TRUTH_MEASURES["share of called genes not changed"](truth, none) == 0


def test_differences_are_paired_and_their_intervals_hold(measures) -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 5, (3, 500))  # what both sides have in common is no difference
    theirs = [np.concatenate([[0.0], row]) for row in shared]
    ours = [np.concatenate([[0.5], row + rng.normal(0.5, 0.3, 500)]) for row in shared]
    values = {"case": {"theirs": {"m": theirs}, "ours": {"m": ours}}}
    own, mine = measures.figures_of(values, "theirs")
    assert (own.difference, mine.difference) == (None, 0.5)
    half = 1.96 * 0.3 / 3**0.5  # of the mean of three seeds
    assert mine.genes_low == pytest.approx(0.5 - half, rel=0.05)
    assert mine.genes_high == pytest.approx(0.5 + half, rel=0.05)
    assert mine.seeds_low == mine.seeds_high == 0.5
    ours[0][0], ours[1][0], ours[2][0] = 1.0, 2.0, 3.0
    t = measures.figures_of(values, "theirs")[1]
    low, high = scipy.stats.t.interval(0.95, 2, 2.0, 1 / 3**0.5)
    assert (t.seeds_low, t.seeds_high) == (pytest.approx(low), pytest.approx(high))


SIDES = {
    "kang": {"ours, scVI", "scvi-tools SCVI", "scanpy Wilcoxon"},
    "simulated": {"ours, scVI", "scvi-tools SCVI", "scanpy Wilcoxon", "the truth"},
    "flipped": {
        *("ours, scVI", "scvi-tools SCVI", "scanpy Wilcoxon", "the truth"),
        "scvi-tools SCANVI, its labels",
        *(
            f"ours, scANVI, {training}, {form}"
            for training in ("alternating", "joint")
            for form in ("scANVI form", "its labels")
        ),
    },
}


@needs_proc
@pytest.mark.long
@pytest.mark.timeout(900)  # eight workers, each with imports of its own
@pytest.mark.parametrize("question", list(SIDES))
def test_it_measures_all_sides_on_the_same_cells(tmp_path: Path, real_data, question: str) -> None:
    pytest.importorskip("scvi", reason="the peer is not installed; it is in the extra `bench`")
    real_data("kang_ifnb_pbmc.h5ad")
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(out), "--questions", question]
    done = subprocess.run(
        [*command, "--processes", "umi"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = json.loads(out.read_text())["results"]
    figures = result["figures"]
    cases = {
        "kang": {"stim against ctrl", *(f"halves of {g}" for g in ("ctrl", "stim", "CD14"))},
        "simulated": {"umi"},
        "flipped": {
            f"umi, {what}, {rate}"
            for what in ("flipped", "untouched")
            for rate in ("0 %", "30 %", "30 % less 0 %")
        },
    }[question]
    assert {f["case"] for f in figures} == cases
    for case in cases:
        sides = {f["side"] for f in figures if f["case"] == case}
        assert sides == SIDES[question]
    for f in figures:
        assert (f["difference"] is None) == (f["side"] == "scvi-tools SCVI") or question == "kang"
        if f["measure"].startswith(("AUROC", "share")) and "less" not in f["case"]:
            assert 0 <= f["value"] <= 1
        if f["measure"].startswith("line of"):
            assert 1 <= f["value"] <= result["cells"][0]["n_genes"]
    if question == "simulated":
        best = {f["measure"]: f["value"] for f in figures if f["side"] == "the truth"}
        assert best["Spearman, LFC, changed genes"] == pytest.approx(1)
        assert best["AUROC, probability"] == best["share of changed genes called"] == 1
