"""Studies added to a trained reference, which must not move."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from workflows_helpers import study as make_study

import atlas
from atlas.config import DavaeConfig, ScviConfig
from atlas.errors import CheckpointError, ConfigError, ModelError
from atlas.models import Conditions
from atlas.models.scanvi import SCANVI

COMMON = {
    "max_epochs": 2,
    "lr": 1e-2,
    "minibatch_size": 64,
    "average_steps": 20,
    "threads": 1,
    "device": "cpu",
}
SMALL = {"n_hidden": 16, "n_latent": 3}
MODELS: dict[str, dict[str, Any]] = {
    "scvi": SMALL,
    "scvi latent": {**SMALL, "library": "latent", "dispersion": "gene-batch"},
    "scvi covariates": {**SMALL, "categorical_covariates": ["lane"]},
    "scvi BatchNorm": {**SMALL, "norm": "batch"},
    "scanvi": {**SMALL, "classifier_epochs": 2},
    "scanvi hierarchy": {
        **SMALL,
        "classifier_epochs": 2,
        "hierarchy": {"type_1": "odd", "type_3": "odd", "type_2": "even", "type_4": "even"},
    },
    "trvae": SMALL,
    "cvae": SMALL,
    "davae": {"n_latent": 3, "encode_batch": True, "norm": "layer"},
}
"""By name: the model, and what it is trained with."""

Stores = tuple[Path, Path]


def _query(seed: int, genes: range = range(60), n: int = 300) -> AnnData:
    query = make_study(seed, n, genes)
    query.obs["lane"] = [f"new {seed}" if i % 3 == 0 else "x" for i in range(n)]
    label = query.obs["cell_type"].to_numpy(object)
    query.obs["cell_type"] = np.where(label == "type_4", f"type_{seed + 2}", label)
    return query


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference studies; two queries, the second without a fifth of the genes."""
    path = tmp_path_factory.mktemp("surgery") / "s.atlas"
    store = atlas.create_store(path)
    keys = {"batch_key": "batch", "label_key": "cell_type"}
    for i in (1, 2):
        study = make_study(i, 400, range(60))
        study.obs["lane"] = ["x" if j % 2 else "y" for j in range(400)]
        store.append(study, study=f"reference_{i}", **keys)
    return path


@pytest.fixture(scope="module")
def references(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reference of each model, trained before the queries are in the store."""
    folder = tmp_path_factory.mktemp("references")
    opened = atlas.open_store(store)
    genes = list(opened.var.index)
    for name, options in MODELS.items():
        atlas.train(opened, name.split()[0], out=folder / name, genes=genes, **COMMON, **options)
    keys = {"batch_key": "batch", "label_key": "cell_type"}
    opened.append(_query(3), study="query_1", **keys)
    opened.append(_query(4, range(48)), study="query_2", **keys)
    return {name: folder / name for name in MODELS}


def _extend(
    reference: Path, store: Path, out: Path, studies: list[str], **options: Any
) -> atlas.TrainedModel:
    return atlas.extend_reference(
        reference, atlas.open_store(store), studies, out=out, **{**COMMON, **options}
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_does_not_move(
    name: str, references: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    before = atlas.load_model(references[name])
    bytes_before = (references[name] / "weights.safetensors").read_bytes()
    made = _extend(references[name], store, tmp_path / "new", ["query_1", "query_2"])
    after = atlas.load_model(tmp_path / "new")
    assert (references[name] / "weights.safetensors").read_bytes() == bytes_before
    assert after.batches[: len(before.batches)] == before.batches
    assert after.batches[len(before.batches) :] == made.surgery[0].batches
    assert len(made.surgery[0].batches) == 4
    opened = atlas.open_store(store)
    own = "study=reference_1,reference_2"
    for model in (made, after):
        old = atlas.latent_posterior(before, opened, rows=own, device="cpu")
        new = atlas.latent_posterior(model, opened, rows=own, device="cpu")
        np.testing.assert_array_equal(old.mean, new.mean)
        np.testing.assert_array_equal(old.variance, new.variance)
        z = torch.from_numpy(old.mean[:128])
        categories = torch.zeros(128, 1, dtype=torch.int64) if "covariates" in name else None
        for code in range(len(before.batches)):
            where = Conditions(torch.full((128,), code), categories)
            assert torch.equal(before.decode(z, where), model.decode(z, where))
    new = atlas.embed(made, opened, name=None, device="cpu")
    assert np.isfinite(new).all()


def test_a_study_is_kept_apart_from_one_known_before(
    references: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    _extend(references["scvi"], store, tmp_path / "one", ["query_1"])
    made = {
        name: _extend(
            tmp_path / "one", store, tmp_path / name, ["query_2"], keep_apart=10.0, apart_from=known
        )
        for name, known in (("alone", ()), ("apart", "query_1"))
    }
    assert made["apart"].surgery[1].apart_from == ("query_1",)
    assert atlas.load_model(tmp_path / "apart").surgery == made["apart"].surgery
    opened = atlas.open_store(store)
    z = {name: atlas.embed(model, opened, name=None, device="cpu") for name, model in made.items()}
    last = opened.obs_codes["study"] == opened.studies.index("query_2")
    np.testing.assert_array_equal(z["alone"][~last], z["apart"][~last])
    assert not np.array_equal(z["alone"][last], z["apart"][last])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"apart_from": "query_2"}, r"The model does not have the study.*\n  found: query_2"),
        ({"apart_from": ["nothing"]}, r"does not have the study.*\n  found: nothing"),
        ({"apart_from": "reference_1", "keep_apart": 0}, "nothing keeps them apart"),
    ],
)
def test_a_study_that_cannot_be_kept_apart_from(
    options: dict[str, Any], match: str, references: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        _extend(references["scvi"], store, tmp_path / "new", ["query_1"], **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["scvi", "trvae", "davae"])
def test_only_the_new_rows_are_trained(
    name: str, references: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    before = atlas.load_model(references[name]).module.state_dict()
    made = _extend(references[name], store, tmp_path / "new", ["query_1"], weight_decay=0.1)
    n_new = 0
    for tensor, value in made.module.state_dict().items():
        old = before[tensor]
        assert torch.equal(value[: len(old)] if value.dim() else value, old), tensor
        if value.shape != old.shape and not tensor.startswith("domain_classifier"):
            added = value[len(old) :]
            n_new += added.numel()
            start = atlas.extend_reference(
                references[name],
                atlas.open_store(store),
                ["query_1"],
                out=tmp_path / f"start-{tensor}",
                **{**COMMON, "max_epochs": 1, "lr": 1e-12, "average_steps": 0},
            ).module.state_dict()[tensor][len(old) :]
            assert not torch.allclose(added, start, atol=1e-4), tensor
    assert made.surgery[0].n_trained == n_new


@pytest.mark.parametrize(
    ("name", "initialisation"),
    [
        *(("scvi", how) for how in ("random", "zero", "mean", "nearest")),
        *(("scvi covariates", how) for how in ("random", "mean", "nearest")),
        *(("scanvi", how) for how in ("random", "mean", "nearest")),
        *((name, "random") for name in ("scvi latent", "scanvi hierarchy", "trvae", "davae")),
    ],
)
def test_the_order_of_studies_mapped_alone_does_not_matter(
    name: str, initialisation: str, references: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    """Each study has a category and a label of its own; no bit depends on which came first."""

    def mapped(first: str, second: str) -> atlas.TrainedModel:
        folder = tmp_path / first
        options = {"initialisation": initialisation}
        _extend(references[name], store, folder / "1", [first], **options)
        _extend(folder / "1", store, folder / "2", [second], **options)
        return atlas.load_model(folder / "2")

    one, other = mapped("query_1", "query_2"), mapped("query_2", "query_1")
    assert one.batches != other.batches
    assert set(one.batches) == set(other.batches)
    opened = atlas.open_store(store)
    z = [atlas.latent_posterior(model, opened, device="cpu") for model in (one, other)]
    np.testing.assert_array_equal(z[0].mean, z[1].mean)
    np.testing.assert_array_equal(z[0].variance, z[1].variance)
    rho = [_expected(model, z[0].mean[:64]) for model in (one, other)]
    for batch in one.batches:
        np.testing.assert_array_equal(rho[0][batch], rho[1][batch])
    if one.labels is not None:
        assert other.labels is not None
        assert {"type_5", "type_6"} <= set(one.labels.names) == set(other.labels.names)
        logits = [_logits(model, z[0].mean) for model in (one, other)]
        for label in one.labels.names:
            np.testing.assert_array_equal(logits[0][label], logits[1][label])


def _expected(model: atlas.TrainedModel, z: np.ndarray) -> dict[str, np.ndarray]:
    """What a model decodes from z in each batch, in the first category of a covariate."""
    categories = torch.zeros(len(z), 1, dtype=torch.int64) if model.columns.categorical else None
    found = {}
    for code, batch in enumerate(model.batches):
        where = Conditions(torch.full((len(z),), code), categories)
        found[batch] = model.decode(torch.from_numpy(z), where).numpy()
    return found


def _logits(model: atlas.TrainedModel, z: np.ndarray) -> dict[str, np.ndarray]:
    """Logits of each label at its level."""
    assert isinstance(model.module, SCANVI)
    assert model.labels is not None
    levels = model.module.classifier.level_logits(torch.from_numpy(z))
    depths = model.labels.depths
    found = {}
    for level, values in enumerate(levels):
        names = [n for n, depth in zip(model.labels.names, depths, strict=True) if depth == level]
        found |= dict(zip(names, values.detach().numpy().T, strict=True))
    return found


@pytest.mark.parametrize(
    ("name", "strategy", "said"),
    [
        ("scvi BatchNorm", "conditions", "BatchNorm: its running statistics stay"),
        ("scvi BatchNorm", "all", "BatchNorm: its running statistics go with"),
        ("davae", "conditions", "DAVAE: the domain classifier gets an output"),
        ("scvi", "conditions", ""),
    ],
)
def test_what_surgery_says_of_batchnorm_and_the_domain_classifier(
    name: str,
    strategy: str,
    said: str,
    references: dict[str, Path],
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"strategy": strategy, "progress": True, "max_epochs": 1}
    made = _extend(references[name], store, tmp_path / "new", ["query_1"], **options)
    err = capsys.readouterr().err
    assert said in err
    assert ("BatchNorm" in err, "DAVAE" in err) == ("BatchNorm" in said, "DAVAE" in said)
    if "BatchNorm" in name:
        before = atlas.load_model(references[name]).module.state_dict()
        moved = [
            key
            for key, value in made.module.state_dict().items()
            if "running_mean" in key and not torch.equal(value, before[key])
        ]
        assert bool(moved) == (strategy == "all")


def test_initial_rows(references: dict[str, Path], store: Path, tmp_path: Path) -> None:
    trained = atlas.load_model(references["scvi"])
    weight = "decoder.linears.1.batch_weight"
    own = trained.module.state_dict()[weight]
    start = {"max_epochs": 1, "lr": 1e-12, "average_steps": 0}

    def begun(initialisation: str) -> torch.Tensor:
        out = tmp_path / initialisation
        options = {**start, "initialisation": initialisation}
        made = _extend(references["scvi"], store, out, ["query_1"], **options)
        return made.module.state_dict()[weight][len(own) :]

    torch.testing.assert_close(begun("zero"), torch.zeros(2, 16), atol=1e-6, rtol=0)
    torch.testing.assert_close(begun("mean"), own.mean(0).expand(2, -1), atol=1e-6, rtol=0)
    drawn = begun("random")
    assert drawn.abs().max() <= 1 / np.sqrt(16 + len(own)) + 1e-6
    assert not torch.equal(drawn[0], drawn[1])
    near = begun("nearest")
    assert ((near[:, None] - own[None]).abs().amax(-1) < 1e-6).any(1).all()


@pytest.mark.parametrize("strategy", ["input_layers", "all"])
def test_less_frozen(
    strategy: str, references: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    before = atlas.load_model(references["scvi"]).module.state_dict()
    made = _extend(references["scvi"], store, tmp_path / "new", ["query_1"], strategy=strategy)
    moved = {
        name
        for name, value in made.module.state_dict().items()
        if value.shape == before[name].shape and not torch.equal(value, before[name])
    }
    first = {f"{part}.{leaf}" for part in _FIRST for leaf in ("weight", "bias")}
    if strategy == "input_layers":
        assert moved == first
    else:
        assert moved > first


_FIRST = ("encoder.hidden.linears.0", "decoder.linears.0")


def test_labels_of_the_query(references: dict[str, Path], store: Path, tmp_path: Path) -> None:
    before = atlas.load_model(references["scanvi"])
    made = _extend(references["scanvi"], store, tmp_path / "new", ["query_1"])
    assert before.labels is not None
    assert made.labels is not None
    assert made.labels.names == (*before.labels.names, "type_5")
    assert made.surgery[0].labels == ("type_5",)
    assert isinstance(before.module, SCANVI)
    assert isinstance(made.module, SCANVI)
    assert made.module.config == before.module.config
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(128, 3)).astype(np.float32))
    old = before.module.classifier.level_logits(z)[0]
    new = made.module.classifier.level_logits(z)[0]
    assert torch.equal(new[:, : old.shape[1]], old)
    assert new.shape[1] == old.shape[1] + 1


def test_predictions_stay_where_no_label_is_added(
    references: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    opened = atlas.open_store(store)
    table = pd.DataFrame({"none": ["Unknown"] * opened.n_obs}, index=opened.obs().index)
    table["atlas_study"] = opened.obs()["atlas_study"].astype(str)
    opened.annotate(table)
    before = atlas.load_model(references["scanvi hierarchy"])
    made = _extend(
        references["scanvi hierarchy"], store, tmp_path / "n", ["query_2"], label_key="none"
    )
    own = "study=reference_1,reference_2"
    opened = atlas.open_store(store)
    old, new = (
        atlas.label_probabilities(model, opened, rows=own, device="cpu") for model in (before, made)
    )
    np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def test_missing_genes(references: dict[str, Path], store: Path, tmp_path: Path) -> None:
    """A gene that a study lacks: masked by default, a measured zero where it is said so."""
    masked = _extend(references["scvi"], store, tmp_path / "mask", ["query_2"])
    zero = _extend(references["scvi"], store, tmp_path / "zero", ["query_2"], missing="zero")
    assert masked.presence[-1].sum() == 48
    assert zero.presence[-1].all()
    assert zero.surgery[0].zero_filled
    added = masked.module.state_dict()["decoder.linears.0.batch_weight"][-2:]
    other = zero.module.state_dict()["decoder.linears.0.batch_weight"][-2:]
    assert not torch.equal(added, other)


def test_a_store_of_the_query_alone(
    references: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    """The reference's counts are not needed, and neither are all of its genes."""
    alone = atlas.create_store(tmp_path / "alone.atlas")
    alone.append(_query(4, range(48)), study="query_2", batch_key="batch", label_key="cell_type")
    made = _extend(references["scvi"], alone.path, tmp_path / "alone", ["query_2"])
    there = _extend(references["scvi"], store, tmp_path / "there", ["query_2"])
    np.testing.assert_array_equal(made.presence, there.presence)
    z = atlas.embed(made, alone, name=None, device="cpu")
    assert z.shape == (300, 3)
    assert np.isfinite(z).all()
    with pytest.raises(ModelError, match=r"genes that the store does not have"):
        atlas.embed(atlas.load_model(references["scvi"]), alone, name=None)


def test_a_killed_surgery_goes_on(references: dict[str, Path], store: Path, tmp_path: Path) -> None:
    def run(out: str, **options: Any) -> atlas.TrainedModel:
        return _extend(references["scvi"], store, tmp_path / out, ["query_1"], **options)

    whole = run("whole", max_epochs=3)
    from atlas.training import loop

    def stop(self: Any) -> None:
        original(self)
        if len(self.state.history.records) == 1:
            raise KeyboardInterrupt

    original = loop.Trainer.end_epoch
    loop.Trainer.end_epoch = stop  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            run("stopped", max_epochs=3)
    finally:
        loop.Trainer.end_epoch = original  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="not empty"):
        run("stopped", max_epochs=3)
    with pytest.raises(CheckpointError, match="not the one asked for"):
        run("stopped", max_epochs=3, initialisation="zero", resume=True)
    resumed = run("stopped", max_epochs=3, resume=True)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


def test_what_is_refused(references: dict[str, Path], store: Path, tmp_path: Path) -> None:
    opened = atlas.open_store(store)
    model = atlas.load_model(references["scvi"])

    def extend(reference: Any, studies: Any, **options: Any) -> None:
        atlas.extend_reference(
            reference, opened, studies, out=tmp_path / "refused", **{**COMMON, **options}
        )

    for config in (ScviConfig(**SMALL, encode_batch=False), DavaeConfig(n_latent=3)):
        module = atlas.models.build_model(config, len(model.genes), len(model.batches), 0)
        blind = dataclasses.replace(model, module=module)
        with pytest.raises(ModelError, match="does not see the batch"):
            extend(blind, ["query_1"])
    with pytest.raises(ConfigError, match="no such study"):
        extend(model, ["query_9"])
    with pytest.raises(ModelError, match="There is no study to add"):
        extend(model, ["reference_1"])
    with pytest.raises(ConfigError, match="no such strategy"):
        extend(model, ["query_1"], strategy="some")
    with pytest.raises(ConfigError, match="no such initialisation"):
        extend(model, ["query_1"], initialisation="ones")
    with pytest.raises(ConfigError, match="Surgery has no such options"):
        extend(model, ["query_1"], n_hidden=3)
    with pytest.raises(ConfigError, match="takes no labels"):
        extend(model, ["query_1"], label_key="cell_type")
    assert not (tmp_path / "refused").exists()


def test_genes_of_another_kind(references: dict[str, Path], tmp_path: Path) -> None:
    def store(n: int) -> atlas.CountStore:
        path = tmp_path / f"{n}.atlas"
        query = _query(5)
        query.var_names = [f"gene{i}" if i < n else f"other{i}" for i in range(60)]
        made = atlas.create_store(path)
        made.append(query, study="query", batch_key="batch")
        return made

    options = {**COMMON, "max_epochs": 1}
    with pytest.raises(ModelError, match=r"too few of the model's genes(.|\n)*query has 33%"):
        atlas.extend_reference(references["scvi"], store(20), out=tmp_path / "few", **options)
    with pytest.warns(UserWarning, match="query has 75% of 60"):
        atlas.extend_reference(references["scvi"], store(45), out=tmp_path / "some", **options)
    with pytest.warns(UserWarning, match="33%"):
        made = atlas.extend_reference(
            references["scvi"],
            atlas.open_store(tmp_path / "20.atlas"),
            out=tmp_path / "forced",
            force=True,
            **options,
        )
    assert made.presence[-1].sum() == 20


def test_labels_of_which_the_model_knows_none(references: dict[str, Path], tmp_path: Path) -> None:
    query = make_study(6, 200, range(60))
    query.obs["cell_type"] = ["other " + name for name in query.obs["cell_type"]]
    store = atlas.create_store(tmp_path / "q.atlas")
    store.append(query, study="query", batch_key="batch", label_key="cell_type")
    with pytest.warns(UserWarning, match=r"None of the studies' labels is a class.*other type_1"):
        made = atlas.extend_reference(
            references["scanvi"], store, out=tmp_path / "run", label_key="cell_type", **COMMON
        )
    known = atlas.load_model(references["scanvi"]).labels.names
    assert made.labels.names == (*known, *made.surgery[0].labels)
    assert set(made.surgery[0].labels) >= {f"other type_{i}" for i in range(1, 5)}
