"""Trained models: what is saved is what is loaded, and nothing else is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from atlas.config import ScviConfig
from atlas.errors import CheckpointError, ModelError
from atlas.models import Inputs, TrainedModel, build_model, load_model

GENES = tuple(f"g{i}" for i in range(11))


def _model(seed: int = 0, **overrides: object) -> TrainedModel:
    config = ScviConfig(n_hidden=8, n_latent=3, norm="batch", library="latent")
    prior = torch.tensor([[3.0, 0.5], [4.0, 0.2]])
    presence = np.ones((2, 11), bool)
    presence[1, 4:7] = False
    parts = {
        "module": build_model(config, 11, 2, seed=seed, library_prior=prior),
        "genes": GENES,
        "batches": ("a/1", "b/1"),
        "studies": ("a", "b"),
        "presence": presence,
        "gene_ids": ("ENSG1", *[None] * 10),
        "training": {"epochs": 3, "losses": [1.5, 0.1]},
    }
    return TrainedModel(**{**parts, **overrides})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _model().save(tmp_path / "run")
    return tmp_path / "run"


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model = _model()
    counts = torch.arange(55.0).reshape(5, 11)
    batch = torch.tensor([0, 1, 0, 1, 1])
    model.module.loss(Inputs(counts, batch), 1.0, torch.Generator().manual_seed(0))
    model.save(tmp_path / "deep" / "run")
    folder = tmp_path / "deep" / "run"
    assert {path.name for path in folder.iterdir()} == {"model.json", "weights.safetensors"}
    loaded = load_model(folder)

    state = model.module.state_dict()
    assert state["encoder.hidden.norms.0.running_mean"].abs().max() > 0
    assert loaded.module.state_dict().keys() == state.keys()
    for name, value in loaded.module.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.dtype == state[name].dtype
    for name in ("genes", "gene_ids", "batches", "studies", "training", "config"):
        assert getattr(loaded, name) == getattr(model, name)
    assert loaded.presence.dtype == np.bool_
    assert np.array_equal(loaded.presence, model.presence)
    assert not loaded.module.training
    present = torch.from_numpy(model.presence)[batch]
    z = model.embed(Inputs(counts, batch, present))
    assert torch.equal(z, loaded.embed(Inputs(counts, batch, present)))
    assert not torch.equal(z, loaded.embed(Inputs(counts, batch)))
    assert torch.equal(model.decode(z, 1 - batch), loaded.decode(z, 1 - batch))


def test_saving_again_replaces_and_is_the_same_bytes(folder: Path) -> None:
    first = (folder / "weights.safetensors").read_bytes()
    _model().save(folder)
    assert (folder / "weights.safetensors").read_bytes() == first
    _model(seed=1).save(folder)
    assert (folder / "weights.safetensors").read_bytes() != first
    load_model(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder[\s\S]*nowhere"):
        load_model(tmp_path / "nowhere")


def test_unfinished_training_is_said(folder: Path) -> None:
    (folder / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"no finished model[\s\S]*--resume"):
        load_model(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights are missing"):
        load_model(folder)


@pytest.mark.parametrize("at", [3, 200, -1])
def test_a_flipped_bit_in_the_weights(folder: Path, at: int) -> None:
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[at] ^= 1
    (folder / "weights.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="weights are damaged"):
        load_model(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=rf"damaged[\s\S]*{name}"):
        load_model(folder)


def _edit(folder: Path, **values: object) -> None:
    metadata = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**metadata, **values}))


def test_a_later_version_is_not_guessed_at(folder: Path) -> None:
    _edit(folder, version=4, novelty=True)
    with pytest.raises(CheckpointError, match=r"later version[\s\S]*version 4[\s\S]*at most 3"):
        load_model(folder)


SURGERY = {
    "studies": ["b"],
    "batches": ["b/1"],
    "labels": [],
    "strategy": "conditions",
    "initialisation": "nearest",
    "keep_apart": 0.0,
    "zero_filled": False,
    "n_trained": 1,
}


def test_surgery_that_fits_is_read(folder: Path) -> None:
    _edit(folder, surgery=[SURGERY])
    assert load_model(folder).surgery[0].batches == ("b/1",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": "another"}, r"damaged[\s\S]*schema"),
        ({"genes": "g0"}, r"damaged[\s\S]*genes"),
        ({"genes": ["g0"] * 11}, r"damaged[\s\S]*genes"),
        ({"extra": 1}, r"damaged[\s\S]*extra"),
        ({"genes": [*GENES, "g11"]}, r"shapes of the model[\s\S]*scale.weight \(11, 8\)"),
        ({"batches": ["a/1", "b/1", "c/1"]}, "library prior does not fit"),
        ({"studies": ["a"]}, "do not make a model"),
        ({"gene_ids": ["ENSG1"]}, "do not make a model"),
        ({"config": {}}, "do not make a model"),
        ({"surgery": [{**SURGERY, "batches": ["b/2"]}]}, "not the last batches"),
        ({"surgery": [{**SURGERY, "batches": ["a/1", "b/1"]}]}, "not the last batches"),
        ({"surgery": [{**SURGERY, "labels": ["T"]}]}, "not the last labels"),
        ({"surgery": [{**SURGERY, "n_categories": [1]}]}, "categories that surgery added"),
        ({"surgery": [{**SURGERY, "n_categories": [-1]}]}, r"damaged[\s\S]*n_categories"),
    ],
)
def test_metadata_that_do_not_fit(folder: Path, values: dict[str, object], message: str) -> None:
    _edit(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_config_value_that_is_not_offered(folder: Path) -> None:
    config = json.loads((folder / "model.json").read_text())["config"]
    _edit(folder, config={**config, "norm": "none"})
    with pytest.raises(CheckpointError, match="norm has a value that is not offered"):
        load_model(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_hidden": 10**9}, r"shapes of the model[\s\S]*1000000000"),
        ({"n_latent": 10**8}, "shapes of the model"),
        ({"n_layers": 10**9}, "too few for the layers"),
    ],
)
def test_a_model_of_any_size_takes_no_memory_before_its_weights_are_looked_at(
    folder: Path, values: dict[str, int], message: str
) -> None:
    config = json.loads((folder / "model.json").read_text())["config"]
    _edit(folder, config={**config, **values})
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_weights_of_other_names(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "weights.safetensors")
    tensors["module.surplus"] = tensors.pop("module.scale.bias")
    content = safetensors.torch.save(tensors)
    (folder / "weights.safetensors").write_bytes(content)
    _edit(folder, weights_sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(CheckpointError, match=r"scale.bias missing[\s\S]*surplus absent"):
        load_model(folder)


class _PowerCut(BaseException):
    """Not an Exception, so that nothing tidies up after it."""


@pytest.mark.parametrize("existing", [False, True])
def test_a_crash_while_saving_never_leaves_half_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    """Stop at every sync and rename in turn; what loads afterwards is one model or the other."""
    old, new = _model(seed=0), _model(seed=1)
    outcomes = set()
    for stop_at in range(100):
        folder = tmp_path / str(stop_at)
        if existing:
            old.save(folder)
        calls = 0

        def counted(function, stop_at=stop_at):
            def call(*arguments):
                nonlocal calls
                calls += 1
                if calls > stop_at:
                    raise _PowerCut
                return function(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(os.fsync))
            patch.setattr(Path, "replace", counted(Path.replace))
            try:
                new.save(folder)
                finished = True
            except _PowerCut:
                finished = False
        try:
            bias = load_model(folder).module.scale.bias
        except CheckpointError:
            outcomes.add("refused")
            assert not finished
        else:
            is_new = torch.equal(bias, new.module.scale.bias)
            assert is_new or (existing and torch.equal(bias, old.module.scale.bias))
            outcomes.add("new" if is_new else "old")
            if not is_new:
                assert not finished
        if finished:
            break
    assert finished
    assert stop_at >= 6
    assert {"refused", "new"} <= outcomes


def test_parts_that_do_not_fit_are_refused() -> None:
    for overrides in (
        {"genes": GENES[:-1]},
        {"batches": ("a/1",)},
        {"presence": np.ones((2, 10), bool)},
        {"gene_ids": ("x",)},
    ):
        with pytest.raises(ModelError, match="do not fit the model"):
            _model(**overrides)


def test_counts_and_batches_that_do_not_fit_are_refused() -> None:
    model = _model()
    with pytest.raises(ModelError, match=r"not of the model's genes[\s\S]*11"):
        model.embed(Inputs(torch.zeros(2, 10), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(ModelError, match=r"unknown to the model[\s\S]*0 to 1"):
        model.embed(Inputs(torch.zeros(2, 11), torch.tensor([0, 2])))
    with pytest.raises(ModelError, match="unknown to the model"):
        model.decode(torch.zeros(1, 3), torch.tensor([-1]))
