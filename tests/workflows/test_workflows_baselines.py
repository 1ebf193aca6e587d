"""PCA out of core against scikit-learn, by batch and with genes missing; Harmony; commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from sklearn.decomposition import PCA

import atlas
from atlas.cli import main
from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.measures import evaluate_embedding
from atlas.evaluation.pca import Moments
from atlas.workflows.baselines import _import_harmony

MakeStudy = Callable[..., AnnData]


@pytest.fixture
def store(make_study: MakeStudy, tmp_path: Path) -> atlas.CountStore:
    made = atlas.create_store(tmp_path / "s.atlas")
    for seed, name in enumerate(("one", "two")):
        adata = make_study(120, seed=seed, prefix=name)
        adata.obs["cell_type"] = np.where(np.arange(120) % 3 == 0, "T", "B")
        made.append(adata, study=name, batch_key="batch", label_key="cell_type")
    atlas.select_genes(made, n=20)
    return made


def expression(store: atlas.CountStore) -> np.ndarray:
    """log(1 + counts per 10,000) of the chosen genes, in the order of the store."""
    adata = atlas.to_anndata(store)
    counts = adata[:, list(store.genes)].X.toarray().astype(float)
    return np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)


def same_axes(ours: np.ndarray, theirs: np.ndarray) -> None:
    signs = np.sign((ours * theirs).sum(0))
    np.testing.assert_allclose(ours * signs, theirs, atol=5e-3)


def test_pca_is_scikit_learns(store: atlas.CountStore) -> None:
    z = atlas.baseline(store, "pca", n_components=5)
    same_axes(z, PCA(5, svd_solver="full").fit_transform(expression(store)))
    np.testing.assert_array_equal(store.embedding("pca"), z)
    np.testing.assert_array_equal(atlas.baseline(store, n_components=5, name=None), z)
    details = store.embedding_details("pca")
    assert details["model"]["name"] == "pca"
    assert details["genes"] == list(store.genes)


def test_as_many_axes_as_there_are_genes_or_cells(
    tmp_path: Path, make_study: MakeStudy, store: atlas.CountStore
) -> None:
    assert atlas.baseline(store).shape == (240, 20)
    few = atlas.create_store(tmp_path / "few.atlas")
    few.append(make_study(8), study="one", batch_key="batch")
    genes = list(few.var.index)
    assert atlas.baseline(few, genes=genes).shape == (8, 7)
    largest = int(np.bincount(few.obs_codes["batch"]).max())
    assert atlas.baseline(few, genes=genes, per_batch=True).shape == (8, largest - 1)
    with pytest.raises(
        ConfigError, match=rf"1 to {largest - 1}: .* {largest} cells of the largest"
    ):
        atlas.baseline(few, genes=genes, per_batch=True, n_components=largest)


def test_pca_of_each_batch_is_that_of_its_cells(store: atlas.CountStore) -> None:
    z = atlas.baseline(store, per_batch=True, n_components=4)
    x, batch = expression(store), store.obs_codes["batch"]
    for code in range(len(store.batches)):
        own = batch == code
        same_axes(z[own], PCA(4, svd_solver="full").fit_transform(x[own]))
    assert "pca_batch" in store.manifest.embeddings


def test_a_gene_that_a_study_lacks_counts_as_its_mean() -> None:
    rng = np.random.default_rng(0)
    x = rng.gamma(1.0, 1.0, (300, 6)).astype(np.float32)
    present = np.array([[True] * 6, [True] * 4 + [False] * 2])
    study = np.repeat([0, 1], [200, 100])
    x[200:, 4:] = 0
    moments = Moments(present)
    for start in range(0, 300, 50):
        part = slice(start, start + 50)
        moments.update(torch.from_numpy(x[part]), int(study[start]))
    found = moments.components(3)
    filled = x.astype(float)
    filled[200:, 4:] = filled[:200, 4:].mean(0)
    peer = PCA(3, svd_solver="full").fit(filled)
    np.testing.assert_allclose(found.variance, peer.explained_variance_, rtol=1e-5)
    z = np.concatenate([found.project(torch.from_numpy(x[study == s]), present[s]) for s in (0, 1)])
    same_axes(z, peer.transform(filled))


def test_what_cannot_be_made_is_refused(store: atlas.CountStore) -> None:
    with pytest.raises(ConfigError, match="no such baseline"):
        atlas.baseline(store, "scanorama")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none per batch"):
        atlas.baseline(store, "harmony", per_batch=True)
    for n, per_batch, most in ((-1, False, 20), (0, False, 20), (21, False, 20), (21, True, 20)):
        with pytest.raises(ConfigError, match=rf"n_components.*\n.*{n}\n.*1 to {most}: .*20 genes"):
            atlas.baseline(store, n_components=n, per_batch=per_batch)
    with pytest.raises(ConfigError, match="of so many genes"):
        Moments(np.ones((1, 5001), dtype=bool))
    with pytest.raises(ConfigError, match="two cells or more"):
        Moments(np.ones((1, 5), dtype=bool)).components(2)


def test_harmony_is_given_the_components_and_batches(
    store: atlas.CountStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "harmonypy", None)
    with pytest.raises(ConfigError, match="not installed"):
        atlas.baseline(store, "harmony")
    asked: dict[str, Any] = {}

    def run_harmony(z: np.ndarray, table: Any, keys: list[str], **options: Any) -> Any:
        asked.update(z=z, batch=table[keys[0]].to_numpy(), **options)
        return SimpleNamespace(Z_corr=2 * z.T)  # cells in columns, as version 0.0.x

    fake = ModuleType("harmonypy")
    fake.run_harmony = run_harmony  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "harmonypy", fake)
    z = atlas.baseline(store, "harmony", n_components=5, seed=3)
    np.testing.assert_array_equal(asked["z"], atlas.baseline(store, n_components=5))
    np.testing.assert_array_equal(z, 2 * asked["z"])
    np.testing.assert_array_equal(asked["batch"], np.array(store.batches)[store.obs_codes["batch"]])
    assert asked["random_state"] == 3
    np.testing.assert_array_equal(store.embedding("harmony"), z)


def test_harmony_mixes_what_a_shift_took_apart() -> None:
    pytest.importorskip("harmonypy", reason="harmonypy is not installed")
    rng = np.random.default_rng(0)
    batch, label = rng.integers(0, 2, 800), rng.integers(0, 3, 800)
    z = rng.standard_normal((800, 10)) + 4 * np.eye(10)[label] + 2 * batch[:, None] * np.eye(10)[9]
    joined = _import_harmony()(z.astype(np.float32), batch, ("x", "y"), 0)
    entropy = [
        evaluate_embedding(values.astype(np.float32), Categories(batch, "xy"))["mixing_entropy_k50"]
        for values in (z, joined)
    ]
    assert entropy[1].value > entropy[0].value + 0.05
    np.testing.assert_array_equal(
        joined, _import_harmony()(z.astype(np.float32), batch, ("x", "y"), 0)
    )


def test_commands(
    store: atlas.CountStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        assert main(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    path = str(store.path)
    told = run("baseline", path, "--components", "5")
    assert "embedding pca: 240 cells × 5 dimensions" in told
    assert "pca_batch" in run("baseline", path, "--per-batch", "--components", "4")
    run("baseline", path, "--components", "2", "--name", "flat")
    measures = tmp_path / "measures.csv"
    told = run(
        "evaluate",
        path,
        "--embedding",
        "pca",
        "--individual",
        "pca_batch",
        "--before",
        "flat",
        "--queries",
        "100",
        "--csv",
        str(measures),
    )
    assert "kNN purity and k-means conservation: beside pca_batch" in told
    assert "PCR comparison: beside flat" in told
    assert measures.read_text().startswith("name,title,")
    differences = tmp_path / "differences.csv"
    told = run(
        "compare",
        path,
        "--embedding",
        "pca",
        "flat",
        "--csv",
        str(differences),
        "--json",
        str(tmp_path / "c.json"),
    )
    assert "pca less flat" in told
    assert "Batch mixing, entropy (k 50)" in told
    assert len(differences.read_text().splitlines()) > 20
    assert main(["compare", path, "--embedding", "pca", "pca"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_the_report_tells_the_intervals(store: atlas.CountStore, tmp_path: Path) -> None:
    atlas.baseline(store, n_components=5)
    atlas.baseline(store, n_components=2, name="flat")
    atlas.baseline(store, per_batch=True)
    out = atlas.report(store, embedding="pca", beside=["flat"], out=tmp_path / "r.html")
    text = out.read_text()
    assert "kNN purity and k-means conservation are beside “pca_batch”" in text
    assert "The PCR comparison is with “pca”" in text
    metrics = atlas.evaluate(store, embedding="pca")
    entropy = metrics["mixing_entropy_k50"]
    assert f"{entropy.low:.3f} to {entropy.high:.3f}" in text
    found = atlas.compare(store, ["pca", "flat"]).differences
    assert all(f"{d.low:+.3f} to {d.high:+.3f}" in text for d in found)
