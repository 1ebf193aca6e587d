"""SCVI: what a user relies on, apart from the agreement with scvi-tools."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from atlas.config import ScviConfig
from atlas.errors import ModelError
from atlas.models import SCVI, Conditions, Inputs, build_model
from atlas.models.layers import dropout

SMALL = ScviConfig(n_hidden=16, n_latent=4)
PRIOR = torch.tensor([[3.0, 0.5], [4.0, 0.2]])


def _inputs(seed: int = 0, n_cells: int = 12, n_genes: int = 30, n_batch: int = 2) -> Inputs:
    rng = np.random.default_rng(seed)
    counts = rng.negative_binomial(1, 0.4, (n_cells, n_genes)).astype(np.float32)
    batch = np.arange(n_cells) % n_batch
    return Inputs(torch.from_numpy(counts), torch.from_numpy(batch.astype(np.int64)))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_absent_genes_change_nothing() -> None:
    """A model of all genes, on cells that lack some, is the model of the others."""
    inputs = _inputs()
    genes = torch.arange(0, 30, 3)
    present = torch.zeros(inputs.counts.shape, dtype=torch.bool)
    present[:, genes] = True
    whole = build_model(SMALL, 30, 2, seed=0)
    part = build_model(SMALL, len(genes), 2, seed=1)
    state = whole.state_dict()
    for name, value in part.state_dict().items():
        if value.shape != state[name].shape:
            axis = next(i for i, size in enumerate(value.shape) if size != state[name].shape[i])
            state[name] = state[name].index_select(axis, genes)
    part.load_state_dict(state)

    found = whole.loss(dataclasses.replace(inputs, present=present))
    expected = part.loss(Inputs(inputs.counts[:, genes], inputs.batch))
    torch.testing.assert_close(found.reconstruction_loss, expected.reconstruction_loss)
    torch.testing.assert_close(found.kl, expected.kl)
    found.objective.backward()
    absent = torch.ones(30, dtype=torch.bool)
    absent[genes] = False
    for parameter in (whole.scale.weight, whole.scale.bias, whole.log_inverse_dispersion):
        assert parameter.grad is not None
        assert (parameter.grad[absent] == 0).all()
        assert (parameter.grad[~absent] != 0).any()
    torch.testing.assert_close(
        whole.embed(dataclasses.replace(inputs, present=present)),
        part.embed(Inputs(inputs.counts[:, genes], inputs.batch)),
    )


@pytest.mark.parametrize("library", ["observed", "latent"])
@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_empty_cells_and_lone_cells_are_finite(
    library: str, gene_likelihood: str, norm: str
) -> None:
    config = dataclasses.replace(SMALL, library=library, gene_likelihood=gene_likelihood, norm=norm)
    model = build_model(config, 30, 2, seed=0, library_prior=PRIOR if library == "latent" else None)
    inputs = _inputs(n_cells=3)
    inputs.counts[0] = 0
    losses = model.loss(inputs, 0.5, _generator())
    losses.objective.backward()
    assert torch.isfinite(losses.negative_bound).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    lone = Inputs(torch.zeros(1, 30), torch.zeros(1, dtype=torch.int64))
    assert torch.isfinite(model.embed(lone)).all()


def test_same_seed_same_weights_and_losses_and_the_global_generator_is_untouched() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, second = build_model(SMALL, 30, 2, seed=7), build_model(SMALL, 30, 2, seed=7)
    other = build_model(SMALL, 30, 2, seed=8)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])
    losses = [model.loss(_inputs(), 1.0, _generator(3)) for model in (first, second)]
    assert torch.equal(losses[0].negative_bound, losses[1].negative_bound)
    assert not torch.equal(
        losses[0].negative_bound, first.loss(_inputs(), 1.0, _generator(4)).negative_bound
    )
    losses[0].objective.backward()
    first.embed(_inputs())
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_is_drawn_in_training_only() -> None:
    model = build_model(dataclasses.replace(SMALL, dropout_rate=0.5), 30, 2, seed=0)
    inputs = _inputs()
    means = {model(inputs, _generator(seed)).z_mean.sum().item() for seed in range(4)}
    assert len(means) == 4
    model.eval()
    torch.testing.assert_close(model(inputs, _generator(1)).z_mean, model.embed(inputs))


def test_dropout_keeps_the_expectation() -> None:
    dropped = dropout(torch.ones(400, 500), 0.3, _generator())
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_embedding_needs_no_company_and_leaves_the_flags(norm: str) -> None:
    model = build_model(dataclasses.replace(SMALL, norm=norm), 30, 2, seed=0)
    inputs = _inputs()
    model.loss(inputs, 1.0, _generator())  # moves the running statistics of BatchNorm
    model.decoder.eval()
    flags = {name: part.training for name, part in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    z = model.embed(inputs)
    alone = torch.cat([model.embed(Inputs(inputs.counts[i : i + 1], inputs.batch[i : i + 1]))
                       for i in range(12)])  # fmt: skip
    torch.testing.assert_close(z, alone)
    assert z.shape == (12, 4)
    assert z.dtype == torch.float32
    assert not z.requires_grad
    assert flags == {name: part.training for name, part in model.named_modules()}
    assert flags["encoder"]
    assert not flags["decoder"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_encoder_without_batch_does_not_see_it() -> None:
    inputs = _inputs()
    other = Inputs(inputs.counts, 1 - inputs.batch)
    for encode_batch in (False, True):
        config = dataclasses.replace(SMALL, encode_batch=encode_batch)
        model = build_model(config, 30, 2, seed=0)
        assert torch.equal(model.embed(inputs), model.embed(other)) == (not encode_batch)


def test_decoding_is_a_share_of_every_gene_and_depends_on_the_batch() -> None:
    model = build_model(SMALL, 30, 2, seed=0)
    z = model.embed(_inputs())
    first, second = (model.decode(z, Conditions(torch.full((12,), code))) for code in (0, 1))
    torch.testing.assert_close(first.sum(-1), torch.ones(12))
    assert (first > 0).all()
    assert (first - second).abs().max() > 1e-4


def test_only_parameters_that_are_used_exist() -> None:
    for config, prior in (
        (SMALL, None),
        (dataclasses.replace(SMALL, gene_likelihood="nb", dispersion="gene-batch"), None),
        (dataclasses.replace(SMALL, library="latent", encode_batch=False), PRIOR),
    ):
        model = build_model(config, 30, 2, seed=0, library_prior=prior)
        model.loss(_inputs(), 1.0, _generator()).objective.backward()
        unused = [name for name, p in model.named_parameters() if p.grad is None]
        assert unused == []


def test_kl_weight_scales_the_divergence_of_z_only() -> None:
    model = build_model(
        dataclasses.replace(SMALL, library="latent"), 30, 2, seed=0, library_prior=PRIOR
    ).eval()
    inputs = _inputs()
    out = model(inputs)
    normal, kl_divergence = torch.distributions.Normal, torch.distributions.kl_divergence
    kl_z = kl_divergence(normal(out.z_mean, out.z_variance.sqrt()), normal(0.0, 1.0)).sum(-1)
    prior = PRIOR[inputs.batch]
    kl_library = kl_divergence(
        normal(out.library_mean[:, 0], out.library_variance[:, 0].sqrt()),
        normal(prior[:, 0], prior[:, 1].sqrt()),
    )
    losses = model.loss(inputs, torch.tensor(0.25))
    torch.testing.assert_close(losses.kl, kl_z + kl_library)
    expected = (losses.reconstruction_loss + 0.25 * kl_z + kl_library).mean()
    torch.testing.assert_close(losses.objective, expected)


def test_bfloat16_products_keep_the_loss_close() -> None:
    model = build_model(SMALL, 30, 2, seed=0)
    inputs = _inputs(n_cells=64)
    exact = model.loss(inputs, 1.0, _generator())
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(inputs, 1.0, _generator())
    losses.objective.backward()
    assert losses.negative_bound.dtype == torch.float32
    assert not torch.equal(losses.negative_bound, exact.negative_bound)
    torch.testing.assert_close(losses.negative_bound, exact.negative_bound, rtol=0.02, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("config", "prior"),
    [
        (SMALL, PRIOR),
        (dataclasses.replace(SMALL, library="latent"), None),
        (dataclasses.replace(SMALL, library="latent"), PRIOR[:1]),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(
    config: ScviConfig, prior: torch.Tensor | None
) -> None:
    with pytest.raises(ModelError, match="library prior does not fit"):
        SCVI(config, 30, 2, prior)


def test_genes_that_a_study_lacks_are_recovered() -> None:
    """Train on two simulated studies, one lacking a third of the genes; decode what it lacks."""
    rng = np.random.default_rng(0)
    n_cells, n_genes, n_types = 1500, 60, 6
    profiles = rng.gamma(0.6, 1.0, (n_types, n_genes)) + 0.05
    types = rng.integers(0, n_types, n_cells)
    study = rng.integers(0, 2, n_cells)
    truth = profiles / profiles.sum(1, keepdims=True)
    shifted = profiles * np.exp(rng.normal(0, 0.15, n_genes))  # the second study's batch effect
    per_study = np.stack([truth, shifted / shifted.sum(1, keepdims=True)])
    mean = per_study[study, types] * rng.lognormal(6.0, 0.3, (n_cells, 1))
    counts = rng.poisson(rng.gamma(3.0, mean / 3.0)).astype(np.float32)
    missing = rng.permutation(n_genes)[: n_genes // 3]
    present = np.ones((n_cells, n_genes), bool)
    present[np.ix_(study == 1, missing)] = False
    counts[~present] = 0
    inputs = Inputs(torch.from_numpy(counts), torch.from_numpy(study), torch.from_numpy(present))

    config = ScviConfig(n_hidden=64, n_latent=6, gene_likelihood="nb")
    model = build_model(config, n_genes, 2, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, eps=0.01)
    generator = _generator()
    steps = 400
    objectives = []
    for step in range(steps):
        rows = torch.randperm(n_cells, generator=generator)[:128]
        minibatch = Inputs(inputs.counts[rows], inputs.batch[rows], inputs.present[rows])
        losses = model.loss(minibatch, min(1.0, 2 * step / steps), generator)
        optimizer.zero_grad()
        losses.objective.backward()
        optimizer.step()
        objectives.append(losses.reconstruction_loss.mean().item())
    assert np.mean(objectives[-20:]) < 0.95 * np.mean(objectives[:20])

    lacking = torch.from_numpy(study == 1)
    z = model.embed(inputs)[lacking]
    for batch in (0, 1):  # as if measured in the other study, and in their own
        rho = model.decode(z, Conditions(torch.full((len(z),), batch))).numpy()[:, missing]
        expected = per_study[batch, types[study == 1]][:, missing]
        correlation = np.corrcoef(rho.ravel(), expected.ravel())[0, 1]
        assert correlation >= 0.9
