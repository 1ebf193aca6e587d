"""trVAE, CVAE and DAVAE through ``atlas.train``: stopped, resumed, read again, embedded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

import atlas
from atlas.errors import ConfigError
from atlas.store import CountStore
from atlas.training import loop

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "trvae": ("trvae", {"n_hidden": 12}),
    "trvae at z, Gaussian": (
        "trvae",
        {"n_hidden": 12, "mmd_on": "z", "gene_likelihood": "gaussian", "balance": "batch"},
    ),
    "cvae": ("cvae", {"n_hidden": 12, "gene_likelihood": "zinb"}),
    "davae": ("davae", {}),
    "davae for surgery": (
        "davae",
        {"norm": "layer", "encode_batch": True, "adversary_ramp": 0.0},
    ),
}
OPTIONS: dict[str, Any] = {
    "max_epochs": 3,
    "seed": 0,
    "minibatch_size": 32,
    "device": "cpu",
    "threads": 1,
    "n_latent": 3,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CountStore:
    """Two studies of two batches; each lacks genes that the other has, and holds an empty cell."""
    folder = tmp_path_factory.mktemp("family")
    store = atlas.create_store(folder / "s.atlas")
    rng = np.random.default_rng(0)
    for name, genes in (("one", range(30)), ("two", range(6, 36))):
        counts = rng.poisson(rng.gamma(0.5, 3, len(genes)), (90, len(genes))).astype(np.float32)
        counts[4] = 0
        adata = AnnData(counts)
        adata.obs["batch"] = rng.choice(["a", "b"], 90)
        adata.obs_names = [f"{name}{i}" for i in range(90)]
        adata.var_names = [f"gene{i}" for i in genes]
        store.append(adata, study=name, batch_key="batch")
    return store


GENES = [f"gene{i}" for i in range(2, 34)]


@pytest.mark.parametrize("name", MODELS)
def test_stopped_and_resumed_it_is_the_same_to_the_byte(
    store: CountStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, changes = MODELS[name]
    options = {**OPTIONS, **changes, "genes": GENES}
    whole = atlas.train(store, model, out=tmp_path / "whole", **options)
    assert not whole.presence.all()
    out = tmp_path / "stopped"
    for stop_at in (4, 9):
        with monkeypatch.context() as patch:
            real = loop.Trainer.step

            def step(self: Any, minibatch: Any, at: int = stop_at, real: Any = real) -> None:
                if self.state.step == at:
                    raise RuntimeError("the lights went out")
                real(self, minibatch)

            patch.setattr(loop.Trainer, "step", step)
            with pytest.raises(RuntimeError, match="lights"):
                atlas.train(store, model, out=out, resume=True, checkpoint_steps=3, **options)
    # Steps between checkpoints are no part of what is trained.
    resumed = atlas.train(store, model, out=out, resume=True, checkpoint_steps=3, **options)
    weights = [
        (tmp_path / run / "weights.safetensors").read_bytes() for run in ("whole", "stopped")
    ]
    assert weights[0] == weights[1]

    z = [atlas.embed(m, store, name=None) for m in (whole, resumed, atlas.load_model(out))]
    assert z[0].shape == (180, 3)
    assert np.isfinite(z[0]).all()
    assert np.array_equal(z[0], z[1])
    assert np.array_equal(z[0], z[2])
    penalties = [record["penalty"] for record in whole.training["history"]]
    assert all((penalty > 0) == (model != "cvae") for penalty in penalties)


def test_the_ramp_reaches_training(store: CountStore, tmp_path: Path) -> None:
    options = {**OPTIONS, "genes": GENES, "adversary_weight": 5.0}
    first = [
        atlas.train(store, "davae", out=tmp_path / str(ramp), adversary_ramp=ramp, **options)
        .training["history"][0]["penalty"]
        for ramp in (0.0, 1.0)
    ]  # fmt: skip
    assert 0 < first[1] < 0.4 * first[0]


@pytest.mark.parametrize("name", ["trvae", "davae"])
def test_minibatches_of_a_lone_cell(store: CountStore, tmp_path: Path, name: str) -> None:
    """163 training cells by 2: the loop keeps BatchNorm from a minibatch of one."""
    options = {**OPTIONS, "genes": GENES, "max_epochs": 1, "minibatch_size": 2}
    model = atlas.train(store, name, out=tmp_path / "run", **options)
    assert all(torch.isfinite(p).all() for p in model.module.parameters())


@pytest.mark.parametrize("name", ["trvae", "davae"])
def test_one_batch_is_refused_before_a_run_is_begun(
    make_study: Callable[..., AnnData], tmp_path: Path, name: str
) -> None:
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(make_study(), study="one")
    options = {**OPTIONS, "genes": [f"gene{i}" for i in range(30)]}
    with pytest.raises(ConfigError, match=r"needs two batches[\s\S]*cvae"):
        atlas.train(store, name, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    atlas.train(store, "cvae", out=tmp_path / "cvae", **options)


def test_balanced_minibatches_hold_each_batch_equally(
    make_study: Callable[..., AnnData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of a twentieth of the cells, in trVAE's training."""
    adata = make_study(600)
    adata.obs["batch"] = np.where(np.arange(600) % 20 == 0, "rare", "common")
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(adata, study="one", batch_key="batch")
    shares: dict[str, list[float]] = {"none": [], "batch": []}
    real = loop.Trainer.step
    for balance, seen in shares.items():

        def step(self: Any, minibatch: Any, seen: list[float] = seen) -> None:
            codes = minibatch.obs["batch"]
            seen.append(float((codes == store.batches.index("one/rare")).mean()))
            real(self, minibatch)

        monkeypatch.setattr(loop.Trainer, "step", step)
        options = {**OPTIONS, "genes": [f"gene{i}" for i in range(30)], "balance": balance}
        atlas.train(store, "trvae", out=tmp_path / balance, **options)
    assert np.mean(shares["none"]) == pytest.approx(0.05, abs=0.015)
    assert np.mean(shares["batch"]) == pytest.approx(0.5, abs=0.05)
    # Both batches can be compared in every minibatch, the last of an epoch perhaps excepted.
    assert np.mean([0 < share < 1 for share in shares["batch"]]) > 0.95
