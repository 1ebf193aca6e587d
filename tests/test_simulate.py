from __future__ import annotations

import resource
import signal

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

from atlas.errors import AtlasError, ConfigError
from atlas.simulate import Truth, draw_truth, simulate
from atlas.simulate.zinb import draw_counts

SMALL = {"cells": 1500, "studies": 3, "genes": 300, "types": 5, "library": 400.0, "progress": False}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "new"
    paths = simulate(out, seed=1, **SMALL)
    return out, [ad.read_h5ad(path) for path in paths], Truth.load(out / "truth.npz")


def test_anndata_reads_what_is_declared(simulated):
    out, studies, truth = simulated
    assert sorted(p.name for p in out.iterdir()) == [
        "study_1.h5ad", "study_2.h5ad", "study_3.h5ad", "truth.npz",
    ]  # fmt: skip
    assert sum(a.n_obs for a in studies) == 1500
    assert studies[0].n_obs > studies[1].n_obs > studies[2].n_obs
    names = np.concatenate([a.obs_names for a in studies])
    assert len(set(names)) == 1500
    for a in studies:
        assert isinstance(a.X, sp.csr_matrix)
        assert a.X.has_sorted_indices
        assert a.X.dtype == np.float32
        assert (a.X.data >= 1).all()
        assert (a.X.data == np.round(a.X.data)).all()
        assert a.var_names.tolist() == truth.genes.tolist()
        assert a.var["gene_id"].tolist() == truth.gene_ids.tolist()
        assert a.var["gene_id"].str.fullmatch(r"ENSG\d{11}").all()
        assert set(a.obs["batch"]) == {"batch_1", "batch_2"}
        np.testing.assert_array_equal(
            a.obsm["X_true_latent"], truth.state_latent[a.obs["state"].to_numpy()]
        )


def test_types_are_unequal_and_absent_where_declared(simulated):
    _, studies, truth = simulated
    absent = truth.type_share == 0
    assert (absent.sum(axis=1) == 1).all()
    assert not absent.all(axis=0).any()
    for a, share in zip(studies, truth.type_share, strict=True):
        found = a.obs["true_type"].value_counts(normalize=True)
        assert set(found.index) == set(truth.types[share > 0])
        expected = dict(zip(truth.types, share, strict=True))
        assert all(abs(found[t] - expected[t]) < 0.1 for t in found.index)
        assert found.max() > 2 * found.min()


def test_labels_are_the_true_types_but_for_a_tenth(simulated):
    _, studies, truth = simulated
    for a in studies:
        label, true = (a.obs[c].astype(str).to_numpy() for c in ("cell_type", "true_type"))
        unknown = label == "Unknown"
        assert 0.03 < unknown.mean() < 0.2
        assert (label == true)[~unknown].all()
        assert (true == truth.types[truth.state_type[a.obs["state"]]]).all()


def test_counts_have_the_moments_of_the_truth(simulated):
    """Per gene, over the cells: count, share of zeros and square against scipy's distribution."""
    _, studies, truth = simulated
    kept = 1 - 1 / (1 + np.exp(-truth.dropout_logit))
    theta = truth.inverse_dispersion
    sums = np.zeros((3, 2, 300))  # of found - expected, and of its variance
    for s, a in enumerate(studies):
        batches = [f"study_{s + 1}/{b}" for b in a.obs["batch"]]
        effect = truth.batch_effect[[truth.batches.tolist().index(b) for b in batches]]
        rho = truth.rho[a.obs["state"]] * np.exp(effect)
        rho = rho / rho.sum(axis=1, keepdims=True)
        mean = np.exp(a.obs["log_library"].to_numpy())[:, None] * rho
        nb = stats.nbinom(theta, theta / (theta + mean))
        m1, m2, m3, m4 = (kept * m for m in _raw_moments(theta, mean))
        del m3
        zero = 1 - kept * (1 - nb.pmf(0))
        x = a.X.toarray().astype(float)
        for i, (found, expected, variance) in enumerate(
            [(x, m1, m2 - m1**2), (x == 0, zero, zero * (1 - zero)), (x**2, m2, m4 - m2**2)]
        ):
            sums[i] += [(found - expected).sum(axis=0), variance.sum(axis=0)]
    z = sums[:, 0] / np.sqrt(sums[:, 1])
    assert np.abs(z.mean(axis=1)).max() < 4 / np.sqrt(300)
    assert (np.abs(z[:2].std(axis=1) - 1) < 0.15).all()
    assert 0.7 < z[2].std() < 1.3  # heavy tails


def _raw_moments(theta, mean):
    """E x … E x⁴ of the negative binomial, by its factorial moments μ^k Γ(θ+k) / (Γ(θ) θ^k)."""
    f1 = mean
    f2 = f1 * mean * (theta + 1) / theta
    f3 = f2 * mean * (theta + 2) / theta
    f4 = f3 * mean * (theta + 3) / theta
    return f1, f2 + f1, f3 + 3 * f2 + f1, f4 + 6 * f3 + 7 * f2 + f1


@pytest.mark.parametrize("mean", [0.02, 0.7, 6.0, 80.0])
@pytest.mark.parametrize(("theta", "kept"), [(0.3, 1.0), (2.0, 0.9), (50.0, 0.6)])
def test_counts_follow_the_zero_inflated_negative_binomial(mean, theta, kept):
    n = 40_000
    zeros = np.zeros(n, dtype=np.int64)
    lengths, _, data = draw_counts(
        np.uint64(11), 0, np.full(n, mean), zeros, zeros, np.ones((1, 1, 1), np.float32),
        np.array([kept]), np.array([theta]), np.array([0]),
    )  # fmt: skip
    counts = np.zeros(n, dtype=np.int64)
    counts[lengths > 0] = data
    nb = stats.nbinom(theta, theta / (theta + mean))
    edges = np.unique(np.concatenate([[0], nb.ppf(np.linspace(0.02, 0.999, 30)), [10**6]]))
    expected = kept * np.diff(nb.cdf(edges), prepend=0)
    expected[0] += 1 - kept
    found = np.bincount(np.searchsorted(edges, counts), minlength=len(edges))
    use = expected * n >= 5
    pooled = [np.append(a[use], a[~use].sum()) for a in (found, expected * n)]
    pooled = [a[pooled[1] > 0] for a in pooled]
    statistic = (np.square(pooled[0] - pooled[1]) / pooled[1]).sum()
    assert stats.chi2.sf(statistic, max(1, len(pooled[0]) - 1)) > 1e-4


def test_draws_of_cells_and_genes_are_uncorrelated():
    n, g = 400, 300
    zeros = np.zeros(n, dtype=np.int64)
    lengths, indices, data = draw_counts(
        np.uint64(5), 0, np.full(n, float(g)), zeros, zeros,
        np.full((1, 1, g), 1 / g, np.float32), np.ones(g), np.full(g, 2.0), np.arange(g),
    )  # fmt: skip
    x = sp.csr_matrix((data, indices, np.concatenate([[0], np.cumsum(lengths)])), (n, g)).toarray()
    for table in (x, x.T):
        r = np.corrcoef(table)[np.triu_indices(len(table), 1)]
        assert abs(r.mean()) < 5 / np.sqrt(r.size * table.shape[1])
        assert abs(r.std() * np.sqrt(table.shape[1]) - 1) < 0.05


def test_files_do_not_depend_on_threads_and_do_on_the_seed(tmp_path):
    contents = []
    for name, seed, threads in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
        paths = simulate(tmp_path / name, seed=seed, threads=threads, **SMALL)
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]


def test_missing_genes_are_absent_from_the_last_study_and_change_nothing_else(simulated, tmp_path):
    _, whole, _ = simulated
    paths = simulate(tmp_path / "x", seed=1, missing_genes=1 / 3, **SMALL)
    studies = [ad.read_h5ad(path) for path in paths]
    truth = Truth.load(tmp_path / "x/truth.npz")
    assert [a.n_vars for a in studies] == [300, 300, 200]
    assert truth.measured.sum(axis=1).tolist() == [300, 300, 200]
    assert studies[2].var_names.tolist() == truth.genes[truth.measured[2]].tolist()
    for a, b in zip(studies, whole, strict=True):
        assert (a.X != b[:, a.var_names].X).nnz == 0


def test_rho_is_normalised_and_the_mean_of_its_states():
    truth = draw_truth(2, 3, genes=100, types=4)
    np.testing.assert_allclose(truth.rho.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(truth.batch_rho(1).sum(axis=1), 1, rtol=1e-5)
    for t in range(4):
        np.testing.assert_allclose(
            truth.type_rho[t], truth.rho[truth.state_type == t].mean(axis=0), rtol=1e-5
        )


@pytest.mark.parametrize(("cells", "studies"), [(1, 1), (5, 5), (9, 4)])
def test_few_cells_leave_no_study_empty(tmp_path, cells, studies):
    paths = simulate(tmp_path, cells, studies, genes=20, types=2, progress=False)
    sizes = [ad.read_h5ad(path).n_obs for path in paths]
    assert sum(sizes) == cells
    assert min(sizes) >= 1


@pytest.mark.parametrize(
    ("wrong", "value"),
    [
        ("cells", 0),
        ("cells", 2),
        ("studies", 0),
        ("seed", -1),
        ("genes", 0),
        ("types", 0),
        ("batches", 0),
        ("library", 0.0),
        ("missing_genes", 1.0),
        ("varying_genes", 1.1),
        ("threads", 0),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, wrong, value):
    with pytest.raises(ConfigError, match=f"{wrong} is out of range"):
        simulate(tmp_path / "x", **{**SMALL, wrong: value})
    assert not (tmp_path / "x").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="the output folder is not empty"):
        simulate(tmp_path, **SMALL)
    with pytest.raises(ConfigError, match="not a folder"):
        simulate(tmp_path / "mine.txt", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of HDF5's own
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.75, 0.95, 0.9999])
def test_a_failed_write_leaves_nothing(simulated, tmp_path, share):
    limit = int(share * (simulated[0] / "study_1.h5ad").stat().st_size)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(AtlasError, match="could not be written"):
            simulate(tmp_path / "x", seed=1, **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not (tmp_path / "x").exists()


def test_progress_goes_to_standard_error(tmp_path, capsys):
    simulate(tmp_path, 10, 1, genes=20, types=2)
    captured = capsys.readouterr()
    assert "cell/s" in captured.err
    assert captured.out == ""


def test_the_last_study_can_have_a_type_of_its_own(tmp_path):
    share = [draw_truth(3, 3, genes=50, types=8, new_type=new).type_share for new in (False, True)]
    gone = (share[1] == 0) & (share[0] > 0)
    assert np.argwhere(gone).tolist() == [[0, 4], [1, 4]]
    assert share[1][2, 4] == share[0][2, 4] > 0
    for studies in (2, 3, 5):  # also where the middle one is what the last study lacks
        share = draw_truth(studies, 0, genes=50, types=4, new_type=True).type_share
        own = (share[:-1] == 0).all(axis=0) & (share[-1] > 0)
        assert own.sum() >= 1
    simulate(tmp_path / "x", 600, 3, genes=50, types=8, new_type=True, progress=False)
    types = [set(ad.read_h5ad(tmp_path / f"x/study_{i}.h5ad").obs["true_type"]) for i in (1, 2, 3)]
    assert types[2] - types[0] - types[1] == {"type_5"}
    for options in ({"tree": True}, {"types": 3}, {"studies": 1}):
        with pytest.raises(ConfigError, match="no type of its own"):
            simulate(tmp_path / "y", new_type=True, **{"studies": 3, **options})
