"""Embeddings: of any number of threads, and from a projection, the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from workflows_helpers import study as make_study

import atlas
from atlas.cli import main
from atlas.errors import ConfigError, StoreError
from atlas.models.threads import threads

KEYS = {"batch_key": "batch", "label_key": "cell_type"}
TRAINING = {"max_epochs": 1, "n_hidden": 16, "n_latent": 3, "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies of some minibatches each, the second without some genes."""
    path = tmp_path_factory.mktemp("embedding") / "s.atlas"
    made = atlas.create_store(path)
    made.append(make_study(1, 1300, range(60)), study="one", **KEYS)
    made.append(make_study(2, 900, range(50)), study="two", **KEYS)
    return path


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedding") / "run"
    opened = atlas.open_store(store)
    genes = list(opened.var.index[::2])
    atlas.train(opened, "scvi", out=folder, genes=genes, **TRAINING)
    return folder


def test_threads_change_no_bit_and_leave_the_model_as_it_was(store: Path, run: Path) -> None:
    model, opened = atlas.load_model(run), atlas.open_store(store)
    model.module.train()  # in which cells drop out
    found = []
    for n in (1, 2, 3):
        with threads(n, n):
            found.append(atlas.embed(model, opened, name=None, device="cpu"))
            assert torch.get_num_threads() == n
        assert model.module.training
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert len(np.unique(found[0], axis=0)) == opened.n_obs


def test_a_projection_gives_the_same_embedding(
    store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, opened = atlas.load_model(run), atlas.open_store(store)
    atlas.project(opened, model.genes, tmp_path / "projected")
    z = atlas.embed(model, opened, name=None, device="cpu")
    read = atlas.embed(model, opened, name=None, device="cpu", projection=tmp_path / "projected")
    np.testing.assert_array_equal(z, read)
    asked = ["embed", str(run), str(store), "--projection", str(tmp_path / "projected")]
    assert main([*asked, "--name", "read", "--device", "cpu"]) in (0, None)
    np.testing.assert_array_equal(atlas.open_store(store).embedding("read"), z)
    with pytest.raises(SystemExit):
        main([*asked, "--per-batch", str(tmp_path / "runs")])
    assert "not allowed with" in capsys.readouterr().err


def test_projections_that_do_not_fit(store: Path, run: Path, tmp_path: Path) -> None:
    model, opened = atlas.load_model(run), atlas.open_store(store)
    atlas.project(opened, list(model.genes)[:-1], tmp_path / "fewer")
    options = {"name": None, "device": "cpu"}
    with pytest.raises(ConfigError, match="other genes than the model's"):
        atlas.embed(model, opened, projection=tmp_path / "fewer", **options)
    with pytest.raises(StoreError, match="no projection here"):
        atlas.embed(model, opened, projection=tmp_path / "none", **options)
    other = atlas.create_store(tmp_path / "other.atlas")
    other.append(make_study(3, 100, range(60)), study="one", **KEYS)
    atlas.project(other, model.genes, tmp_path / "of_another")
    with pytest.raises(StoreError, match="of another store"):
        atlas.embed(model, opened, projection=tmp_path / "of_another", **options)
