"""The main job through its public names, and what an embedding promises."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
import scanpy
import torch
from anndata import AnnData

import atlas
import loaders
from atlas.config import ARCHITECTURES
from atlas.errors import CheckpointError, ConfigError, MissingColumnError, ModelError
from atlas.models import Inputs
from atlas.simulate import Truth, simulate
from atlas.workflows import modelling
from loaders import LoaderError

MakeStudy = Callable[..., AnnData]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, atlas.TrainedModel]:
    """A store of two simulated studies with a model and an embedding."""
    folder = tmp_path_factory.mktemp("main")
    paths = simulate(folder / "files", cells=700, studies=2, genes=120, types=4, progress=False)
    store = atlas.create_store(folder / "s.atlas")
    for i, path in enumerate(paths, start=1):
        store.append(path, study=f"study_{i}", batch_key="batch", label_key="cell_type")
    genes = atlas.select_genes(store, 60)
    model = atlas.train(
        store, "scvi", genes=genes, max_epochs=2, seed=0, out=folder / "run", n_hidden=16, threads=1
    )
    atlas.embed(model, store, name="scvi")
    return folder, model


def test_the_genes_are_scanpys(trained: tuple[Path, atlas.TrainedModel]) -> None:
    store = atlas.open_store(trained[0] / "s.atlas")
    adata = atlas.to_anndata(store)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = scanpy.pp.highly_variable_genes(
            adata, flavor="seurat_v3", n_top_genes=60, batch_key="atlas_batch", inplace=False
        )
    assert set(store.genes or ()) == set(adata.var_names[theirs["highly_variable"].to_numpy()])


def test_an_embedded_cell_is_what_the_input_file_says(
    trained: tuple[Path, atlas.TrainedModel],
) -> None:
    """z[i] against store.obs().iloc[i], recomputed from the h5ad file by name."""
    folder, _ = trained
    store = atlas.open_store(folder / "s.atlas")
    model = atlas.load_model(folder / "run")
    z = store.embedding("scvi")
    assert z.dtype == np.float32
    assert z.shape == (700, 10)
    obs = store.obs()
    for i in (0, 1, 350, 699):
        study = obs["atlas_study"].iloc[i]
        cell = anndata.read_h5ad(folder / "files" / f"{study}.h5ad")[obs.index[i]]
        counts = torch.tensor(cell[:, list(model.genes)].X.toarray())
        code = model.batches.index(f"{study}/{cell.obs['batch'].iloc[0]}")
        expected = model.module.embed(Inputs(counts, torch.tensor([code])))
        np.testing.assert_allclose(z[i], expected[0].numpy(), rtol=1e-4, atol=1e-5)


def test_an_embedding_does_not_depend_on_the_rest_of_the_store(
    trained: tuple[Path, atlas.TrainedModel], tmp_path: Path
) -> None:
    folder, model = trained
    whole = atlas.open_store(folder / "s.atlas")
    alone = atlas.create_store(tmp_path / "alone.atlas")
    path = folder / "files" / "study_2.h5ad"
    alone.append(path, study="study_2", batch_key="batch")
    start, stop = whole.segments[1:]
    mine = atlas.embed(model, alone, name=None)
    np.testing.assert_array_equal(mine, whole.embedding("scvi")[start:stop])


def test_the_same_seed_gives_the_same_weights(
    trained: tuple[Path, atlas.TrainedModel], tmp_path: Path
) -> None:
    folder, _ = trained
    store = atlas.open_store(folder / "s.atlas")
    options = {"max_epochs": 2, "n_hidden": 16, "threads": 1}  # scanpy changes torch's threads
    again = atlas.train(store, seed=0, out=tmp_path / "run", **options)
    name = "weights.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (folder / "run" / name).read_bytes()
    other = atlas.train(store, seed=1, out=tmp_path / "other", **options)
    assert (tmp_path / "other" / name).read_bytes() != (folder / "run" / name).read_bytes()
    assert again.genes == other.genes


def test_evaluate_and_report(trained: tuple[Path, atlas.TrainedModel], tmp_path: Path) -> None:
    store = atlas.open_store(trained[0] / "s.atlas")
    metrics = atlas.evaluate(
        store, embedding="scvi", reference="study=study_1", query={"study": ["study_2"]}
    )
    measure = metrics["label_accuracy_k50"]
    labeled = store.obs_codes["label"][store.segments[1] :] >= 0
    assert measure.n == labeled.sum()
    assert metrics.to_json()["measures"]
    path = atlas.report(store, embedding="scvi", out=tmp_path / "report.html")
    text = path.read_text()
    for words in ("study_1", "study_2/batch_1", "zinb", torch.__version__):
        assert words in text, words
    assert "http://" not in text.replace("http://www.w3.org", "")
    with pytest.raises(ConfigError, match="No cell has this value in obs column 'study'"):
        atlas.evaluate(store, embedding="scvi", query="study=study_9")
    with pytest.raises(ConfigError, match="column=value"):
        atlas.evaluate(store, embedding="scvi", query="study_9")
    with pytest.raises(MissingColumnError, match="no such obs column"):
        atlas.evaluate(store, embedding="scvi", query="donor=1")


def test_missing_genes_are_recovered(tmp_path: Path) -> None:
    """Without a third of the genes in one study, their decoded rho still follows the truth."""
    paths = simulate(
        tmp_path / "files", 6000, 2, 3, genes=300, types=5, missing_genes=1 / 3, progress=False
    )
    truth = Truth.load(tmp_path / "files" / "truth.npz")
    store = atlas.create_store(tmp_path / "s.atlas")
    for i, path in enumerate(paths, start=1):
        store.append(path, study=f"study_{i}", batch_key="batch")
    genes = list(store.var.index)
    model = atlas.train(store, genes=genes, max_epochs=25, seed=0, out=tmp_path / "run")
    z = atlas.embed(model, store, name=None)
    start, stop = store.segments[1:]
    missing = ~store.presence()[1]
    assert missing.sum() == 100
    obs = store.obs(["state"]).iloc[start:stop]
    measured_in = model.batches.index("study_1/batch_1")
    batch = torch.full((stop - start,), measured_in)
    decoded = model.decode(torch.from_numpy(z[start:stop]), batch).numpy()[:, missing]
    rho = truth.batch_rho(0)[obs["state"].to_numpy(int)]
    columns = np.searchsorted(truth.genes, store.var.index[missing].to_numpy(str))
    correlation = np.corrcoef(decoded.ravel(), rho[:, columns].ravel())[0, 1]
    assert correlation >= 0.9


def test_a_model_of_other_genes_or_batches_is_refused(
    trained: tuple[Path, atlas.TrainedModel], tmp_path: Path, make_study: MakeStudy
) -> None:
    folder, model = trained
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(folder / "files" / "study_1.h5ad", study="study_1")
    with pytest.raises(ModelError, match="batches that the model was not trained on\n  found: st"):
        atlas.embed(model, store)
    with pytest.raises(ConfigError, match="cannot have this name"):
        atlas.embed(model, store, name="a b")
    other = atlas.create_store(tmp_path / "o.atlas")
    other.append(make_study(), study="study_1")
    with pytest.raises(ModelError, match=r"genes that the store does not have\n  found: 60 of 60"):
        atlas.embed(model, other)
    assert store.embeddings == other.embeddings == ()


def test_training_is_checked_before_it_starts(
    trained: tuple[Path, atlas.TrainedModel], tmp_path: Path, make_study: MakeStudy
) -> None:
    store = atlas.create_store(tmp_path / "s.atlas")
    with pytest.raises(ConfigError, match="no cells"):
        atlas.select_genes(store)
    store.append(make_study(), study="one")
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="No genes are chosen"):
        atlas.train(store, out=out)
    with pytest.raises(ConfigError, match="no such options\n  found: n_leyers"):
        atlas.train(store, out=out, genes=["gene1"], n_leyers=1)
    with pytest.raises(ConfigError, match="no such model"):
        atlas.train(store, "svci", out=out, genes=["gene1"])
    assert not out.exists()
    with pytest.raises(CheckpointError, match="not empty"):
        atlas.train(atlas.open_store(trained[0] / "s.atlas"), out=trained[0] / "run")
    with pytest.raises(CheckpointError):
        atlas.load_model(tmp_path / "nowhere")


def test_confounded_batches_are_warned_of(tmp_path: Path, make_study: MakeStudy) -> None:
    adata = make_study(n=200)
    adata.obs["library"] = adata.obs["cell_type"].astype(str) + "-library"
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(adata, study="one", batch_key="library", label_key="cell_type")
    genes = list(store.var.index)
    with pytest.warns(UserWarning, match="the batch tells the label: it explains 100%"):
        atlas.train(store, genes=genes, max_epochs=1, out=tmp_path / "run")


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_every_architecture_trains_and_loads(
    trained: tuple[Path, atlas.TrainedModel], tmp_path: Path, likelihood: str
) -> None:
    store = atlas.open_store(trained[0] / "s.atlas")
    model = atlas.train(
        store,
        max_epochs=1,
        out=tmp_path / "run",
        gene_likelihood=likelihood,
        dispersion="gene-batch",
        norm="batch",
        encode_batch=False,
        library="latent",
        n_layers=1,
    )
    z = atlas.embed(model, store, name=None)
    assert np.isfinite(z).all()
    loaded = atlas.load_model(tmp_path / "run")
    np.testing.assert_array_equal(atlas.embed(loaded, store, name=None), z)
    assert loaded.training["config"]["max_epochs"] == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_model_trains_on_extreme_cells(tmp_path: Path, name: str) -> None:
    """Counts up to a million, empty cells, a batch of one cell, a gene without any counts."""
    rng = np.random.default_rng(0)
    adata = AnnData(rng.poisson(1, (300, 40)).astype(np.float32))
    adata.X[1:6] = 0
    adata.X[6, :3] = adata.X[0, 5] = 1e6
    adata.X[:, 7] = 0
    adata.obs["batch"] = ["lonely", *["b"] * 150, *["c"] * 149]
    adata.obs["cell_type"] = rng.choice(["T", "B", "Unknown"], 300)
    adata.obs_names = [f"c{i}" for i in range(300)]
    adata.var_names = [f"g{i}" for i in range(40)]
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(adata, study="one", batch_key="batch", label_key="cell_type")
    options = {"genes": list(store.var.index), "max_epochs": 2, "minibatch_size": 64, "threads": 1}
    if name == "scanvi":
        options["classifier_epochs"] = 5
    model = atlas.train(store, name, out=tmp_path / "run", **options)
    for weight, value in model.module.state_dict().items():
        assert torch.isfinite(value).all(), weight
    assert np.isfinite([epoch["train_loss"] for epoch in model.training["history"]]).all()
    z = atlas.embed(model, store, name=name)
    assert z.shape == (300, model.module.n_latent)
    assert np.isfinite(z).all()
    assert np.isfinite(atlas.likelihood(model, store, n_samples=4).cells.to_numpy()).all()
    atlas.evaluate(store, embedding=name)


def test_the_public_names() -> None:
    for name in atlas.__all__:
        assert getattr(atlas, name) is not None
    for name in loaders.__all__:
        assert getattr(loaders, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = atlas.nothing


@pytest.mark.long
def test_scanpys_pipeline_runs_on_the_export_of_real_counts(
    tmp_path: Path, real_data: Callable[[str], Path]
) -> None:
    path = real_data("zheng_pbmc_facs.h5ad")
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(path, study="zheng", batch_key="batch", label_key="cell_type")
    source = anndata.read_h5ad(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = anndata.io.read_zarr(tmp_path / "s.atlas" / "studies" / "zheng")
        assert (study[source.obs_names].X != source.X).nnz == 0
        adata = atlas.to_anndata(store)
        adata.write_h5ad(tmp_path / "out.h5ad")
        adata = anndata.read_h5ad(tmp_path / "out.h5ad")
        scanpy.pp.calculate_qc_metrics(adata, inplace=True, percent_top=None)
        scanpy.pp.filter_genes(adata, min_cells=3)
        scanpy.pp.normalize_total(adata, target_sum=1e4)
        scanpy.pp.log1p(adata)
        scanpy.pp.highly_variable_genes(adata, n_top_genes=500)
        scanpy.pp.pca(adata, n_comps=10)
        scanpy.pp.neighbors(adata, n_neighbors=10)
    expected = np.asarray(source.X.sum(axis=1)).ravel()
    position = source.obs_names.get_indexer(adata.obs_names)
    np.testing.assert_array_equal(adata.obs["total_counts"].to_numpy(), expected[position])


def test_metrics_json(trained: tuple[Path, atlas.TrainedModel]) -> None:
    store = atlas.open_store(trained[0] / "s.atlas")
    values = atlas.evaluate(store, embedding="scvi").to_json()
    assert atlas.Metrics.from_json(json.loads(json.dumps(values))).to_json() == values


def test_a_held_out_donor_is_validated_on_and_never_trained_on(
    tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = atlas.create_store(tmp_path / "s.atlas")
    for i in range(3):
        store.append(make_study(60, seed=i, prefix=f"{i}-"), study=f"s{i}", batch_key="batch")
    seen = {}

    def spy(*args, **options):
        seen.update(options)
        return fit(*args, **options)

    fit = modelling.fit
    monkeypatch.setattr(modelling, "fit", spy)
    options = {"genes": [f"gene{g}" for g in range(20)], "max_epochs": 2, "minibatch_size": 16}
    model = atlas.train(
        store, out=tmp_path / "run", hold_out="lane=1", memory="50MB", device="cpu", **options
    )
    lane = store.obs(["lane"])["lane"].to_numpy().astype(str)

    def rows(ranges):
        return np.concatenate([np.arange(a, b) for a, b in ranges])

    assert set(lane[rows(seen["validation_rows"])]) == {"1"}
    assert set(lane[rows(seen["train_rows"])]) == {"0"}
    assert len(rows(seen["train_rows"])) + len(rows(seen["validation_rows"])) == 180
    assert model.training["history"][-1]["validation_bound"] is not None
    with pytest.raises(ConfigError, match="No cell has this value"):
        atlas.train(store, out=tmp_path / "no", hold_out="lane=7", **options)
    with pytest.raises(CheckpointError, match="train_rows"):
        atlas.train(store, out=tmp_path / "run", hold_out="lane=0", resume=True, **options)
    with pytest.raises(LoaderError, match="memory given is too small"):
        atlas.train(store, out=tmp_path / "small", memory="10kB", **options)
