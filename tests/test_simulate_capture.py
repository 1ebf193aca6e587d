"""Capture, PCR and sequencing against their moments in closed form."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import stats
from scipy.special import hyp1f1

from atlas.errors import ConfigError
from atlas.simulate import CaptureGenes, Truth, simulate
from atlas.simulate import capture as module
from atlas.simulate.capture import (
    Capture,
    amplify,
    draw_capture_genes,
    draw_reads,
    draw_transcripts,
)

SMALL = {"cells": 400, "studies": 2, "genes": 60, "types": 3, "library": 150.0, "progress": False}


def _genes(k_on, k_off, rate=0.7, length=1000.0) -> CaptureGenes:
    k_on, k_off = np.atleast_1d(k_on).astype(float), np.atleast_1d(k_off).astype(float)
    return CaptureGenes(k_on, k_off, np.full(len(k_on), rate), np.full(len(k_on), length))


def _dense(n_genes, lengths, indices, data):
    out = np.zeros((len(lengths), n_genes))
    out[np.repeat(np.arange(len(lengths)), lengths), indices] = data
    return out


@pytest.mark.parametrize("efficiency", [1.0, 0.2])
def test_umis_have_the_moments_of_bursts_that_are_thinned(efficiency):
    """Without PCR and with reads in plenty: Poisson-beta, thinned, is Poisson-beta again."""
    n = 20_000
    genes = _genes([0.3, 1.0, 3.0, 8.0], [0.3, 2.0, 0.5, 8.0])
    mean = np.array([20.0, 3.0, 60.0, 0.4])
    rng = np.random.default_rng(1)
    transcripts = draw_transcripts(rng, np.tile(mean, (n, 1)), genes)
    counts = _dense(4, *draw_reads(
        rng, transcripts, np.full(n, efficiency), np.full(n, 1e6), genes,
        Capture(rounds=0, error=0.0), True,
    ))  # fmt: skip
    mean = mean * efficiency
    bursts = genes.k_off / (genes.k_on * (genes.k_on + genes.k_off + 1))
    variance = mean + mean**2 * bursts
    assert (np.abs(counts.mean(axis=0) - mean) < 4.5 * np.sqrt(variance / n)).all()
    np.testing.assert_allclose(counts.var(axis=0), variance, rtol=0.06)
    zero = hyp1f1(genes.k_on, genes.k_on + genes.k_off, -mean * (1 + genes.k_off / genes.k_on))
    error = np.sqrt(zero * (1 - zero) / n)
    assert (np.abs((counts == 0).mean(axis=0) - zero) < 4.5 * error + 1e-9).all()


def test_bursts_are_no_negative_binomial():
    """Two modes: the negative binomial of the same mean and variance has other zeros."""
    genes, n = _genes(0.3, 0.3), 20_000
    counts = draw_transcripts(np.random.default_rng(2), np.full((n, 1), 20.0), genes)
    mean, variance = counts.mean(), counts.var()
    theta = mean**2 / (variance - mean)
    zero = stats.nbinom.pmf(0, theta, theta / (theta + mean))
    assert abs((counts == 0).mean() - zero) > 20 * np.sqrt(zero * (1 - zero) / n)


@pytest.mark.parametrize(("rate", "rounds"), [(0.3, 3), (0.7, 8), (1.0, 6), (0.9, 13)])
def test_copies_have_the_moments_of_a_branching_process(rate, rounds):
    """Harris (1963), Theorem I.5.1, for offspring 1 + Bernoulli(rate)."""
    n = 20_000
    copies, origin = amplify(np.random.default_rng(3), np.full(n, rate), rounds, 0.0)
    assert (origin == np.arange(n)).all()
    m, variance = 1 + rate, rate * (1 - rate)
    mean = m**rounds
    expected = variance * mean * (mean - 1) / (m**2 - m)
    assert abs(copies.mean() - mean) <= 4.5 * np.sqrt(expected / n)
    np.testing.assert_allclose(copies.var(), expected, rtol=0.06, atol=1e-12)


def test_many_copies_are_drawn_with_the_same_variance(monkeypatch):
    monkeypatch.setattr(module, "_MANY", 8)
    copies, _ = amplify(np.random.default_rng(8), np.full(40_000, 0.5), 9, 0.0)
    mean = 1.5**9
    assert abs(copies.mean() - mean) < 0.03 * mean
    np.testing.assert_allclose(copies.var(), 0.25 * mean * (mean - 1) / (2.25 - 1.5), rtol=0.06)


def test_faulty_copies_are_taken_from_the_others():
    copies, origin = amplify(np.random.default_rng(9), np.ones(50), 10, 0.01)
    assert len(copies) > 100
    assert (np.bincount(origin, copies) == 2**10).all()


def test_faulty_copies_make_families():
    n, rate, rounds, error = 30_000, 0.7, 9, 2e-3
    copies, _ = amplify(np.random.default_rng(4), np.full(n, rate), rounds, error)
    mean = 1.7**rounds
    families = len(copies) - n
    expected = n * error * (mean - 1)
    # as many chances as new copies; their number varies too, hence the room
    assert abs(families - expected) < 4.5 * np.sqrt(expected * (1 + error * mean))
    assert copies.min() >= 1


def test_reads_saturate_umis_and_follow_length_and_depth():
    n, genes = 300, _genes([5.0, 5.0], [5.0, 5.0])
    genes = CaptureGenes(genes.k_on, genes.k_off, genes.rate, np.array([500.0, 1500.0]))
    transcripts, one = np.full((n, 2), 100), np.ones(n)
    rng, settings = np.random.default_rng(5), Capture(rounds=0)
    umis = _dense(2, *draw_reads(rng, transcripts, one, np.full(n, 200.0), genes, settings, True))
    seen = 1 - np.exp(-1.0)  # one read a copy
    assert abs(umis.mean() - 100 * seen) < 4.5 * np.sqrt(100 * seen * (1 - seen) / (2 * n))
    reads = _dense(2, *draw_reads(rng, transcripts, one, np.full(n, 200.0), genes, settings, False))
    for found, expected in zip(reads.mean(axis=0), (50.0, 150.0), strict=True):
        assert abs(found - expected) < 4.5 * np.sqrt(expected / n)


def test_pcr_makes_reads_noisier_than_umis_and_favours_some_genes():
    n, settings = 1500, Capture(rounds=14, error=0.0)
    genes = CaptureGenes(*(np.full(2, v) for v in (1e3, 1e3)), np.array([0.6, 0.8]), np.ones(2))
    transcripts, one = np.full((n, 2), 50), np.full(n, 0.2)
    depth = np.full(n, 60.0)
    rng = np.random.default_rng(6)
    umis, reads = (
        _dense(2, *draw_reads(rng, transcripts, one, depth, genes, settings, umi))
        for umi in (True, False)
    )
    fano = [x.var(axis=0) / x.mean(axis=0) for x in (umis, reads)]
    assert (fano[0] < 1).all()  # UMIs are bounded by the transcripts: binomial
    assert (fano[1] > 1.2).all()  # reads are above Poisson
    assert reads[:, 1].mean() / reads[:, 0].mean() > 4  # (1.8 / 1.6)^14 = 5.2, less as they add up
    assert umis[:, 1].mean() / umis[:, 0].mean() < 2


def test_faulty_copies_inflate_umis():
    genes, n = _genes([5.0], [5.0]), 200
    means = []
    for error in (0.0, 1e-4, 1e-3):
        settings = Capture(rounds=12, error=error)
        drawn = draw_reads(np.random.default_rng(7), np.full((n, 1), 100), np.ones(n),
                           np.full(n, 1000.0), genes, settings, True)  # fmt: skip
        means.append(drawn[2].mean())
    assert means[0] < means[1] < means[2]
    assert means[0] <= 100


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    out = tmp_path_factory.mktemp("capture") / "new"
    settings = Capture(error=0.0, depth=300.0)
    paths = simulate(out, seed=1, process="umi", capture=settings, **SMALL)
    return out, [ad.read_h5ad(path) for path in paths], Truth.load(out / "truth.npz")


def test_what_is_captured_is_the_efficiencys_part(simulated):
    """With reads in plenty and no errors the counts of a cell are its captured transcripts."""
    out, studies, truth = simulated
    genes = CaptureGenes.load(out / "capture.npz")
    bursts = genes.k_off / (genes.k_on * (genes.k_on + genes.k_off + 1))
    found = expected = variance = together = pairs = 0.0
    for s, a in enumerate(studies):
        assert a.obs["efficiency"].between(0, 1, inclusive="right").all()
        captured = (a.obs["transcripts"] * a.obs["efficiency"]).to_numpy()
        np.testing.assert_allclose(np.log(captured), a.obs["log_library"])
        code = {name: i for i, name in enumerate(truth.batches)}
        mean = np.zeros(a.shape)
        for batch in a.obs["batch"].unique():
            mine = (a.obs["batch"] == batch).to_numpy()
            rho = truth.batch_rho(code[f"study_{s + 1}/{batch}"])[a.obs["state"][mine]]
            mean[mine] = captured[mine, None] * rho
            location = truth.log_library_location[code[f"study_{s + 1}/{batch}"]]
            middle = np.log(0.1) + location - np.log(SMALL["library"])
            efficiency = np.log(a.obs["efficiency"][mine])
            assert abs(efficiency.mean() - middle) < 4.5 * 0.3 / np.sqrt(mine.sum())
        of_each = mean + mean**2 * bursts
        residual = (a.X.toarray() - mean) / np.sqrt(of_each)
        found += a.X.sum()
        expected += mean.sum()
        variance += of_each.sum()
        together += (residual[64:] * residual[:-64]).sum()  # of cells a block apart
        pairs += residual[64:].size
    assert abs(found - expected) < 4.5 * np.sqrt(variance)
    assert abs(together) < 5 * np.sqrt(pairs)
    assert a.uns["simulation"]["process"] == "umi"
    assert a.uns["simulation"]["capture"]["depth"] == 300.0
    assert np.isnan(truth.dropout_logit).all()
    assert np.isnan(truth.inverse_dispersion).all()
    assert a.X.has_sorted_indices
    assert (a.X.data >= 1).all()


def test_files_depend_on_the_seed_and_not_on_threads(tmp_path):
    contents = []
    for name, seed, threads in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
        paths = simulate(tmp_path / name, seed=seed, threads=threads, process="reads", **SMALL)
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]
    a = ad.read_h5ad(paths[0])
    total = a.X.sum(axis=1).A1
    depth = a.obs["depth"].to_numpy()
    assert abs((total - depth).sum()) < 4.5 * np.sqrt(depth.sum())
    np.testing.assert_allclose(np.log(depth), a.obs["log_library"])


def test_missing_genes_change_nothing_else(tmp_path):
    whole, part = (
        [ad.read_h5ad(p) for p in simulate(
            tmp_path / str(share), seed=1, process="umi", missing_genes=share, **SMALL)]
        for share in (0.0, 1 / 3)
    )  # fmt: skip
    assert [a.n_vars for a in part] == [60, 40]
    for a, b in zip(part, whole, strict=True):
        assert (a.X != b[:, a.var_names].X).nnz == 0


@pytest.mark.parametrize(
    ("wrong", "value"),
    [
        ("efficiency", 0.0),
        ("efficiency", 1.1),
        ("efficiency_spread", -1.0),
        ("rounds", 25),
        ("rate", 0.0),
        ("rate_spread", 2.0),
        ("error", 0.1),
        ("depth", 0.0),
        ("depth", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(wrong, value):
    with pytest.raises(ConfigError, match=f"{wrong} of the capture is out of range"):
        Capture(**{wrong: value})


def test_wrong_processes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="process is out of range"):
        simulate(tmp_path / "x", process="poisson", **SMALL)
    with pytest.raises(ConfigError, match=r"library is out of range(.|\n)*in \[1, 100000\]"):
        simulate(tmp_path / "x", process="umi", **{**SMALL, "library": 2e5})
    with pytest.raises(ConfigError, match="Only a process with capture has settings"):
        simulate(tmp_path / "x", capture=Capture(), **SMALL)
    assert not (tmp_path / "x").exists()
    assert (draw_capture_genes(50, Capture(rate=0.1, rate_spread=0.0), 0).rate == 0.1).all()
