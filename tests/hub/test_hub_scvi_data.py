"""scvi-tools trains on a store; what it learns is what it learns from an AnnData in memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from anndata import AnnData

import atlas
from atlas.errors import ConfigError
from loaders import LoaderError

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")
Callback = pytest.importorskip("lightning.pytorch").Callback
pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False}


@pytest.fixture(scope="module")
def cells() -> AnnData:
    path = Path(__file__).parents[2].parent / "shared" / "data" / "pbmc_4batch_3study.h5ad"
    if not path.is_file():
        pytest.skip(f"real counts are not here: {path}")
    adata = ad.read_h5ad(path)[::20, 200:320].copy()
    adata.X = adata.X.astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def store(cells, tmp_path_factory) -> atlas.CountStore:
    store = atlas.create_store(tmp_path_factory.mktemp("hub") / "store")
    store.append(cells, study="pbmc", batch_key="batch", label_key="cell_type")
    return store


def module(store: atlas.CountStore, model: str = "SCVI", **options) -> atlas.ScviDataModule:
    return atlas.ScviDataModule(store, model, genes=list(store.gene_table.names), **options)


def test_minibatches_are_the_cells_of_the_store(store):
    data = module(store, minibatch_size=50)
    expected = atlas.to_anndata(store)
    found = list(data.inference_dataloader())
    assert len(found) == len(data.inference_dataloader())
    x = torch.cat([batch["X"] for batch in found])
    assert (x.numpy() == expected.X.toarray()).all()
    batch = torch.cat([b["batch"] for b in found])[:, 0].numpy()
    assert (np.array(data.batch_labels)[batch] == expected.obs["atlas_batch"].astype(str)).all()
    label = torch.cat([b["labels"] for b in found])[:, 0].numpy()
    assert (
        data.labels[label] == expected.obs["atlas_label"].astype(object).fillna("Unknown")
    ).all()
    epochs = [torch.cat([b["X"].sum(1) for b in data.train_dataloader()]) for _ in range(2)]
    held_out = torch.cat([b["X"].sum(1) for b in data.val_dataloader()])
    assert (epochs[0] != epochs[1]).any()
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert len(epochs[0]) + len(held_out) == store.n_obs


def test_scvi_learns_as_from_memory(store, cells):
    adata = atlas.to_anndata(store)
    held_out = np.zeros(store.n_obs, bool)
    for start, stop in store.split(0.1).validation:
        held_out[start:stop] = True
    split = {"external_indexing": [np.flatnonzero(~held_out), np.flatnonzero(held_out)]}
    scvi.settings.seed = 1
    scvi.model.SCVI.setup_anndata(adata, batch_key="atlas_batch")
    options = {"n_hidden": 32, "n_latent": 5}
    memory = scvi.model.SCVI(adata, **options)
    memory.train(max_epochs=12, datasplitter_kwargs=split, **QUICK)

    data = module(store)
    scvi.settings.seed = 1
    model = scvi.model.SCVI(registry=data.registry, **options)
    model.train(datamodule=data, max_epochs=12, **QUICK)
    z = model.get_latent_representation(dataloader=data.inference_dataloader())
    assert z.shape == (store.n_obs, 5)
    expected = float(memory.get_elbo())
    elbo = float(model.get_elbo(dataloader=data.inference_dataloader()))
    # the same initial weights and cells in another order; other seeds differ by 7 %
    assert elbo == pytest.approx(expected, rel=0.01)


def test_its_model_can_be_imported(store, tmp_path):
    data = module(store)
    model = scvi.model.SCVI(registry=data.registry, n_hidden=16, n_latent=4)
    model.train(datamodule=data, max_epochs=1, **QUICK)
    model.save(tmp_path / "model", datamodule=data)
    z = model.get_latent_representation(dataloader=data.inference_dataloader())
    ours = atlas.import_scvi(tmp_path / "model")
    np.testing.assert_allclose(atlas.embed(ours, store, name=None), z, atol=1e-5)

    data = module(store, "SCANVI")
    model = scvi.model.SCANVI(registry=data.registry, datamodule=data, n_hidden=16, n_latent=4)
    model.train(datamodule=data, max_epochs=1, **QUICK)
    model.save(tmp_path / "scanvi", datamodule=data)
    z = model.get_latent_representation(dataloader=data.inference_dataloader())
    ours = atlas.import_scvi(tmp_path / "scanvi")
    np.testing.assert_allclose(atlas.embed(ours, store, name=None), z, atol=1e-5)


def test_scanvi_learns_labels(store):
    data = module(store, "SCANVI", minibatch_size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = scvi.model.SCANVI(registry=data.registry, datamodule=data, n_hidden=32, n_latent=5)
        model.train(datamodule=data, max_epochs=15, **QUICK)
    model.module.eval()
    right, n = 0, 0
    with torch.no_grad():
        for batch in data.inference_dataloader():
            known = batch["labels"][:, 0] < data.n_labels - 1
            scores = model.module.classify(batch["X"], batch["batch"])
            right += int((scores.argmax(1) == batch["labels"][:, 0])[known].sum())
            n += int(known.sum())
    _, counts = np.unique(
        store.obs_codes["label"][store.obs_codes["label"] >= 0], return_counts=True
    )
    assert right / n > counts.max() / counts.sum() + 0.1  # more than the most frequent label


def test_an_epoch_goes_on_where_it_was(store):
    whole = [batch["X"].sum(1).tolist() for batch in module(store).train_dataloader()]
    first = module(store)
    iteration = iter(first.train_dataloader())
    begun = [next(iteration)["X"].sum(1).tolist() for _ in range(2)]
    second = module(store)
    second.load_state_dict(first.state_dict())
    assert begun + [b["X"].sum(1).tolist() for b in second.train_dataloader()] == whole


class Kept(Callback):
    """What was trained on; a checkpoint after one of the steps."""

    def __init__(self, path: Path, at: int | None = None) -> None:
        self.path, self.at = path, at
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer, plan, outputs, batch, index) -> None:
        parts = batch if isinstance(batch, (tuple, list)) else [batch]
        self.seen.append([x for part in parts for x in part["X"].sum(1).tolist()])
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", ["SCVI", "SCANVI"])
@pytest.mark.parametrize("at", [3, 9, 13, 18])  # within and at the end of epochs of nine steps
def test_lightning_goes_on_where_it_was(store, tmp_path, kind, at):
    def train(at: int | None = None, **more: str) -> list[list[float]]:
        data = module(store, kind, minibatch_size=64)
        given = {"datamodule": data} if kind == "SCANVI" else {}
        model = getattr(scvi.model, kind)(registry=data.registry, n_hidden=4, n_latent=2, **given)
        kept = Kept(tmp_path / "checkpoint", at)
        model.train(datamodule=data, max_epochs=3, callbacks=[kept], **more, **QUICK)
        return kept.seen

    whole = train(at)
    assert len(whole) == 27
    assert train(ckpt_path=str(tmp_path / "checkpoint")) == whole[at:]


def test_memory_is_that_of_all_loaders(store):
    one, both = (module(store, kind, memory="64MB") for kind in ("SCVI", "SCANVI"))
    held = [str(loader.budget).split(" (")[0] for loader in (one._loader, both._loader)]
    assert held == ["64.0 MB", "32.0 MB"]
    assert str(both._labeled.budget).startswith("32.0 MB")
    with pytest.raises(LoaderError, match="memory"):
        module(store, "SCANVI", memory="1MB")


def test_wrong_use(store, tmp_path, cells):
    with pytest.raises(ConfigError, match="No genes are chosen"):
        atlas.ScviDataModule(store)
    with pytest.raises(ConfigError, match=r"no such model\n.*'TOTALVI'"):
        module(store, "TOTALVI")
    bare = atlas.create_store(tmp_path / "bare")
    bare.append(cells, study="pbmc")
    with pytest.raises(ConfigError, match="no labeled cell"):
        module(bare, "SCANVI")
    with pytest.raises(ConfigError, match=r"is that of a label\n.*'NK'"):
        module(store, unlabeled="NK")
    missing = cells.var_names[0]
    bare.append(cells[:, 1:], study="other")
    with pytest.raises(ConfigError, match=rf"{missing} was not measured in other"):
        module(bare)
    shared = atlas.ScviDataModule(bare, genes=list(cells.var_names[1:]))
    assert shared.n_vars == cells.n_vars - 1
