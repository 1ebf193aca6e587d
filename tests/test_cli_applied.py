"""The commands that apply a model, as the README has them, and what they say to wrong ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from atlas import embed, latent_posterior, load_model, to_anndata
from atlas.cli import main
from atlas.store import open_store

MakeStudy = Callable[..., AnnData]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("applied")


@pytest.fixture
def store(folder: Path, make_study: MakeStudy) -> str:
    """A store with a scvi and a scanvi, made once."""
    path = folder / "s.atlas"
    if not path.exists():
        make_study(n=200).write_h5ad(folder / "one.h5ad")
        keys = ("--batch-key", "batch", "--label-key", "cell_type")
        assert main(["ingest", str(path), str(folder / "one.h5ad"), "--study", "one", *keys]) == 0
        assert main(["genes", str(path), "--n", "20"]) == 0
        for model in ("scvi", "scanvi"):
            run = ["train", str(path), "--model", model, "--out", str(folder / model)]
            run += ["--epochs", "2", "--n-hidden", "8"]
            run += ["--classifier-epochs", "2"] if model == "scanvi" else []
            assert main(run) == 0
    return str(path)


def test_the_commands(store: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def atlas(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    scvi, scanvi = str(folder / "scvi"), str(folder / "scanvi")
    every = folder / "p.csv"
    chosen = ("--rows", "batch=a")
    said = atlas("label", scanvi, store, "--name", "pred", *chosen, "--probabilities", str(every))
    assert "obs columns pred, pred_probability, pred_entropy" in said
    obs = open_store(store).obs()
    assert obs["pred"].notna().equals(obs["batch"] == "a")
    assert f"{int((obs['pred'] == 'T').sum())} cells" in said
    p = pd.read_csv(every, index_col="cell")
    assert p.columns.tolist() == ["B", "T"]
    assert p.index.equals(obs.index[obs["pred"].notna()])
    assert p.idxmax(axis=1).tolist() == obs["pred"].dropna().tolist()
    np.testing.assert_allclose(p.max(axis=1), obs["pred_probability"].dropna(), rtol=1e-5)
    out = folder / "de.tsv"
    pairs = ("--pairs", "300")
    said = atlas("de", scvi, store, "--group1", "cell_type=T", "--out", str(out), *pairs)
    assert "cell_type=T vs Rest" in said
    table = pd.read_csv(out, sep="\t", index_col="gene")
    assert len(table) == 20
    assert {"proba_de", "lfc_mean", "raw_mean1", "is_de_fdr_0.05"} <= set(table)
    said = atlas("de", scvi, store, "--by", "cell_type", "--pairwise", "--mode", "vanilla", *pairs)
    assert (
        f"B vs T: {(obs['cell_type'] == 'B').sum()} and {(obs['cell_type'] == 'T').sum()}" in said
    )
    assert "Unknown" not in said
    said = atlas("de", scanvi, store, "--scanvi", "--group1", "T", "--batches", "one/a", *pairs)
    assert "T vs Rest" in said
    rho = folder / "rho.zarr"
    said = atlas("normalized", scvi, store, "--batch", "average", "--library", "1e4",
                 "--out", str(rho))  # fmt: skip
    assert "200 cells × 20 genes" in said
    assert anndata.read_zarr(rho).X.sum(axis=1) == pytest.approx(1e4, rel=1e-4)
    genes = open_store(store).genes[:3]
    (folder / "genes.txt").write_text("\n".join(genes))
    for i, flag in enumerate(([], ["--draw"], ["--dropout"], ["--zero-inflation"])):
        made = folder / f"imputed{i}.zarr"
        listed = str(folder / "genes.txt") if i else ",".join(genes)
        atlas("impute", scvi, store, "--genes", listed, "--out", str(made), *flag)
        found = anndata.read_zarr(made)
        assert found.var_names.tolist() == list(genes)
        assert found.uns["atlas"]["n_samples"] == (25, 1, 0, 25)[i]
    out = folder / "z.tsv"
    said = atlas(
        "posterior", scvi, store, "--out", str(out), "--samples", "2", "--library", *chosen
    )
    assert "× 42 columns" in said  # mean, variance and two draws of 10 dimensions; two of library
    z = pd.read_csv(out, sep="\t", index_col="cell")
    here = (obs["batch"] == "a").to_numpy()
    opened = open_store(store)
    loaded = load_model(scvi)
    means = embed(loaded, opened, name=None)[here]
    np.testing.assert_allclose(z.filter(regex="^mean"), means, rtol=1e-5, atol=1e-6)
    latent = latent_posterior(loaded, opened, n_samples=2, rows="batch=a")
    np.testing.assert_allclose(z.filter(regex="^sample_2_"), latent.samples[1], rtol=1e-5)
    np.testing.assert_allclose(z.filter(regex="^variance"), latent.variance, rtol=1e-5)
    counts = to_anndata(opened).X[here][:, [opened.var.index.get_loc(g) for g in loaded.genes]]
    with np.errstate(divide="ignore"):
        log_total = np.log(np.asarray(counts.sum(axis=1)).ravel())
    some = np.isfinite(log_total)
    np.testing.assert_allclose(z["log_library_mean"][some], log_total[some], rtol=1e-5)
    assert (z["log_library_variance"] == 0).all()
    said = atlas("likelihood", scvi, store, "--samples", "3", "--out", str(folder / "ll.csv"))
    assert "log likelihood" in said
    assert len(pd.read_csv(folder / "ll.csv")) == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["label", "scvi"], ["no classes of cells", "a scvi model", "--model scanvi"]),
        (["label", "scanvi", "--name", "lane"], ["obs column 'lane' already", "another --name"]),
        (["label", "scanvi", "--rows", "batch"], ["column=value"]),
        (["de", "scvi"], ["--group1 column=value", "--by column"]),
        (["de", "scvi", "--group1", "cell_type=NK"], ["No cell has this value", "NK", "B, T"]),
        (["de", "scvi", "--group1", "lane=0", "--group2", "batch=a"], ["overlap", "in both"]),
        (["de", "scanvi", "--scanvi", "--group1", "NK"], ["not trained on this label", "B, T"]),
        (["de", "scvi", "--by", "batch", "--out", "de.xlsx"], ["CSV or TSV", "de.xlsx"]),
        (
            ["de", "scvi", "--by", "score"],
            ["'score' holds measurements", "200 different", "ranges"],
        ),
        (["normalized", "scvi", "--out", "o.h5ad"], ["a folder", "o.zarr"]),
        (["normalized", "scvi", "--out", "o.zarr", "--batch", "a"], ["no such batch", "one/a"]),
        (["impute", "scvi", "--out", "o.zarr", "--genes", "CD3E"], ["no such genes", "CD3E"]),
        (
            ["impute", "scvi", "--out", "o.zarr", "--draw", "--samples", "0"],
            ["--draw", "another --seed"],
        ),
        (
            ["de", "scvi", "--by", "batch", "--mode", "vanilla", "--delta", "1"],
            ["delta=1.0", "change"],
        ),
        (["label", "scanvi", "--probabilities", "p.h5ad"], ["CSV or TSV", "p.h5ad"]),
        (["posterior", "scvi", "--out", "no/z.tsv"], ["cannot be written", "no folder no"]),
        (["posterior", "scvi", "--out", "z.tsv", "--samples", "-1"], ["n_samples is out of range"]),
        (["likelihood", "scvi", "--samples", "-3"], ["n_samples is out of range", "-3"]),
        (["likelihood", "nowhere"], ["no such folder"]),
    ],
)
def test_wrong_ways(
    store: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    number = open_store(store).number
    command, model, *rest = arguments
    capsys.readouterr()
    assert main([command, str(folder / model), store, *rest]) == 2
    error = capsys.readouterr().err
    assert error.count("atlas: ") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    assert list(tmp_path.iterdir()) == []
    assert open_store(store).number == number
