"""One model a batch: what is trained, what comes of it, and what evaluate makes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workflows_helpers import Applied, another, study

import atlas
from atlas.cli import main
from atlas.config import DavaeConfig, TrvaeConfig
from atlas.errors import CheckpointError, ConfigError
from atlas.workflows import per_batch
from atlas.workflows.per_batch import folder_name
from atlas.workflows.streaming import CellStream


@pytest.fixture(scope="module")
def made(applied: Applied, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("own") / "runs"
    z = atlas.embed_per_batch(
        atlas.load_model(applied.scvi), applied.open(), out=folder, max_epochs=4
    )
    return folder, z


def test_each_batch_has_a_model_of_its_own(applied: Applied, made: tuple[Path, np.ndarray]) -> None:
    store, (folder, z) = applied.open(), made
    joint = atlas.load_model(applied.scvi)
    assert z.shape == (store.n_obs, 3)
    assert np.isfinite(z).all()
    np.testing.assert_array_equal(store.embedding("scvi_batch"), z)
    assert len(list(folder.iterdir())) == len(store.batches)
    told = store.embedding_details("scvi_batch")["per_batch"]
    for code, batch in enumerate(store.batches):
        own = atlas.load_model(folder / folder_name(batch))
        assert own.batches == (batch,)
        assert own.genes == joint.genes
        assert own.config == joint.config
        wanted = {**joint.training["config"], "max_epochs": 4}
        assert own.training["config"] == wanted
        rows = np.flatnonzero(store.obs_codes["batch"] == code)
        assert told[batch]["n_obs"] == len(rows)
        mask = store.obs_codes["batch"] == code
        for cells in CellStream(own, store, rows=mask):
            expected = own.embed(cells.inputs)[: cells.n_cells].numpy()
            # dense counts are added up in another order
            np.testing.assert_allclose(z[cells.rows], expected, atol=1e-5)


def test_a_batchs_model_does_not_see_other_batches(applied: Applied, tmp_path: Path) -> None:
    """With other counts in the other batches, the batch's rows are the same to the last bit."""
    model = atlas.load_model(applied.scvi)
    found = []
    for factor in (1, 3):
        adata = study(5, 300, range(60))
        first = adata.obs["batch"] == sorted(adata.obs["batch"])[0]
        adata.X[np.flatnonzero(~first)] *= factor
        store = atlas.create_store(tmp_path / f"{factor}.atlas")
        store.append(adata, study="s", batch_key="batch", label_key="cell_type")
        z = atlas.embed_per_batch(model, store, out=tmp_path / f"runs {factor}", max_epochs=2)
        mine = store.obs_codes["batch"] == store.batches.index(f"s/{adata.obs['batch'].min()}")
        found.append((z[mine], z[~mine]))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert not np.array_equal(found[0][1], found[1][1])


def test_purity_is_taken_against_it(applied: Applied, made: tuple[Path, np.ndarray]) -> None:
    store = applied.open()
    atlas.embed(atlas.load_model(applied.scvi), store, name="scvi")
    metrics = atlas.evaluate(store, embedding="scvi", individual="scvi_batch")
    with pytest.raises(
        ConfigError, match=r"embeds each batch on its own(.|\n)*--individual scvi_b"
    ):
        atlas.evaluate(store, embedding="scvi_batch")
    store.write_embedding("again", store.embedding("scvi_batch"), {})
    same = atlas.evaluate(store, embedding="again", individual="scvi_batch")
    by_chance = 15 / (2 * np.bincount(store.obs_codes["batch"]).min() - 15)
    assert by_chance < metrics["purity_k15"].value < 1
    assert same["purity_k15"].value == 1
    assert metrics["cluster_conservation"].value is not None
    assert metrics["cluster_conservation"].value < same["cluster_conservation"].value == 1


def test_a_run_that_was_stopped_goes_on(
    applied: Applied,
    made: tuple[Path, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, store, begun = atlas.load_model(applied.scvi), applied.open(), []

    def train(*arguments: Any, **options: Any) -> atlas.TrainedModel:
        begun.append(options["out"])
        if len(begun) == 3:
            raise KeyboardInterrupt
        return atlas.train(*arguments, **options)

    monkeypatch.setattr(per_batch, "train", train)
    out = tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        atlas.embed_per_batch(model, store, out=out, max_epochs=4, name="stopped")
    assert "stopped" not in store.embeddings
    assert len(list(out.iterdir())) == 2
    with pytest.raises(CheckpointError):
        atlas.embed_per_batch(model, store, out=out, max_epochs=4, name="stopped")
    z = atlas.embed_per_batch(model, store, out=out, max_epochs=4, name="stopped", resume=True)
    np.testing.assert_array_equal(z, made[1])
    with pytest.raises(CheckpointError):
        atlas.embed_per_batch(model, store, out=out, max_epochs=5, name=None, resume=True)


def test_a_scanvi_is_compared_with_scvis(
    applied: Applied, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["embed", str(applied.scanvi), str(applied.store), "--per-batch"]
    assert main([*arguments, str(tmp_path / "runs"), "--max-epochs", "1"]) == 0
    assert "embedding scanvi_batch: 1,300 cells × 3 dimensions" in capsys.readouterr().out
    store = applied.open()
    own = atlas.load_model(tmp_path / "runs" / folder_name(store.batches[0]))
    assert own.name == "scvi"
    assert own.training["config"]["max_epochs"] == 1


def test_batches_of_a_few_cells(applied: Applied, tmp_path: Path) -> None:
    """Three cells are trained on, one is not."""
    store = atlas.create_store(tmp_path / "few.atlas")
    adata = atlas.to_anndata(applied.open(), order="input")[:104].copy()
    adata.obs = adata.obs[["cell_type"]].assign(batch=["many"] * 100 + ["three"] * 3 + ["one"])
    store.append(adata, study="s", batch_key="batch", label_key="cell_type")
    model = atlas.load_model(applied.scvi)
    z = atlas.embed_per_batch(model, store, out=tmp_path / "runs", max_epochs=1)
    codes = store.obs_codes["batch"]
    assert np.isfinite(z).all()
    assert not z[codes == store.batches.index("s/one")].any()
    assert z[codes == store.batches.index("s/three")].any(axis=1).all()
    store.write_embedding("joint", z + 1, {})
    metrics = atlas.evaluate(store, embedding="joint", individual="scvi_batch")
    assert metrics["purity_k15"].value == 1
    of = {m.of: m.skipped for m in metrics.groups if m.name == "purity_k15"}
    assert of["batch s/many"] is None
    assert of["batch s/three"] == "15 neighbours within it need at least 16 cells"


def test_what_cannot_be_trained_again_is_refused(applied: Applied, tmp_path: Path) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    elsewhere = dataclasses.replace(model, training={})
    with pytest.raises(ConfigError, match=r"batch by batch\n.*trained elsewhere"):
        atlas.embed_per_batch(elsewhere, store, out=tmp_path / "runs")
    davae = another(model, DavaeConfig(n_latent=3))
    with pytest.raises(ConfigError, match=r"no davae of one batch\n.*scvi, scanvi, cvae, trvae"):
        atlas.embed_per_batch(davae, store, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_trvae_of_one_batch_is_a_cvae(applied: Applied, tmp_path: Path) -> None:
    store = applied.open()
    trvae = another(atlas.load_model(applied.scvi), TrvaeConfig(n_latent=3, n_hidden=8))
    z = atlas.embed_per_batch(trvae, store, out=tmp_path / "runs", max_epochs=1, name=None)
    own = atlas.load_model(tmp_path / "runs" / folder_name(store.batches[0]))
    assert own.name == "cvae"
    assert own.config.to_json().items() <= trvae.config.to_json().items()
    assert z.std(axis=0).min() > 0


def test_names_of_batches_make_folders() -> None:
    names = {folder_name(batch) for batch in ("a/b", "a_b", "a b", "x" * 300, "../up", "é")}
    assert len(names) == 6
    assert all("/" not in name and len(name) <= 49 for name in names)


def test_some_of_the_cells_train_a_model_that_knows_their_batches_only(
    applied: Applied, tmp_path: Path
) -> None:
    store = applied.open()
    options = {"genes": store.var.index[:30], "max_epochs": 1, "threads": 1, "n_hidden": 8}
    study = store.studies[1]
    model = atlas.train(store, out=tmp_path / "run", rows=f"study={study}", **options)
    assert model.batches == tuple(b for b in store.batches if b.startswith(f"{study}/"))
    whole = atlas.train(store, out=tmp_path / "whole", **options)
    assert whole.batches == store.batches
    with pytest.raises(ConfigError, match="No cell has this value"):
        atlas.train(store, out=tmp_path / "none", rows="study=absent", **options)
