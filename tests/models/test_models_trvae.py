"""TRVAE: against scArches, against torch.distributions, and what a user relies on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scarches_reference import HIDDEN, LATENT, N_BATCH, N_CELLS, N_GENES, waves
from torch import Tensor
from torch.distributions import NegativeBinomial, Normal, kl_divergence

from atlas.config import CvaeConfig, TrvaeConfig
from atlas.errors import ConfigError, ModelError
from atlas.models import Conditions, Inputs, TrainedModel, build_model, load_model
from atlas.models.mmd import batch_discrepancy
from atlas.models.trvae import TRVAE, TrvaeOutputs

SMALL = TrvaeConfig(n_hidden=16, n_latent=4)
SMALL_CVAE = CvaeConfig(n_hidden=16, n_latent=4)
LIKELIHOODS = ("nb", "zinb", "gaussian")

SCARCHES = {
    ("nb", "decoder"): (31.317325592041016, 5.646681308746338, 14.352693557739258),
    ("nb", "z"): (31.317325592041016, 5.646681308746338, 15.024299621582031),
    ("zinb", "decoder"): (29.899831771850586, 8.288202285766602, 16.393333435058594),
    ("zinb", "z"): (29.899831771850586, 8.288202285766602, 13.53738784790039),
}
"""Reconstruction loss, divergence and discrepancy as ``scarches_reference.py`` printed them."""

SCARCHES_NAMES = {
    "decoder.FirstL.L0.cond_L.weight": "decoder.first.batch_weight",
    "decoder.FirstL.L0.expr_L.weight": "decoder.first.weight",
    "decoder.HiddenL.L1.weight": "decoder.others.0.weight",
    "decoder.dropout_decoder.bias": "zero_inflation.bias",
    "decoder.dropout_decoder.weight": "zero_inflation.weight",
    "decoder.mean_decoder.0.bias": "scale.bias",
    "decoder.mean_decoder.0.weight": "scale.weight",
    "encoder.FC.L0.cond_L.weight": "encoder.hidden.first.batch_weight",
    "encoder.FC.L0.expr_L.bias": "encoder.hidden.first.bias",
    "encoder.FC.L0.expr_L.weight": "encoder.hidden.first.weight",
    "encoder.FC.L1.bias": "encoder.hidden.others.0.bias",
    "encoder.FC.L1.weight": "encoder.hidden.others.0.weight",
    "encoder.log_var_encoder.bias": "encoder.log_variance.bias",
    "encoder.log_var_encoder.weight": "encoder.log_variance.weight",
    "encoder.mean_encoder.bias": "encoder.mean.bias",
    "encoder.mean_encoder.weight": "encoder.mean.weight",
    "theta": "log_inverse_dispersion",
}
"""Ours of each of its weights; those by condition are transposed."""


def _inputs(seed: int = 0, n_cells: int = 12, n_genes: int = 30, n_batch: int = 2) -> Inputs:
    rng = np.random.default_rng(seed)
    counts = rng.negative_binomial(1, 0.4, (n_cells, n_genes)).astype(np.float32)
    batch = np.arange(n_cells) % n_batch
    return Inputs(torch.from_numpy(counts), torch.from_numpy(batch.astype(np.int64)))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("likelihood", "place"), SCARCHES)
def test_it_is_the_network_of_scarches(likelihood: str, place: str) -> None:
    """Same weights and counts, same three terms."""
    config = TrvaeConfig(
        n_hidden=HIDDEN, n_latent=LATENT, gene_likelihood=likelihood, mmd_on=place, mmd_weight=3
    )  # three pairs of batches: it sums over them
    model = build_model(config, N_GENES, N_BATCH, seed=0).eval()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    names = [name for name in sorted(SCARCHES_NAMES) if SCARCHES_NAMES[name] in state]
    for i, name in enumerate(names):
        ours = SCARCHES_NAMES[name]
        by_condition = ours == "log_inverse_dispersion" or ours.endswith("batch_weight")
        shape = tuple(state[ours].shape)
        weight = waves(shape[::-1] if by_condition else shape, 0.9 + 0.1 * i)
        state[ours] = weight.T if by_condition else weight
    model.load_state_dict(state)
    counts = (10 * waves((N_CELLS, N_GENES), 0.7)).round().clamp(min=0)
    counts[3] *= 1000
    losses = model.loss(Inputs(counts, torch.arange(N_CELLS) % N_BATCH))
    assert losses.penalty is not None
    found = (losses.reconstruction_loss.mean(), losses.kl.mean(), losses.penalty)
    # Its likelihood is in float32, with 1e-8 inside the logarithms.
    assert [x.item() for x in found] == pytest.approx(SCARCHES[likelihood, place], rel=3e-5)


def _reference(model: TRVAE, inputs: Inputs, out: TrvaeOutputs) -> Tensor:
    """Negative log-likelihood of each cell in double precision, by torch.distributions."""
    present = torch.ones_like(inputs.counts, dtype=torch.bool)
    if inputs.present is not None:
        present = inputs.present
    logits = model.scale(out.decoded.h).double()
    losses = []
    for i in range(len(logits)):
        genes = present[i]
        x = inputs.counts[i, genes].double()
        if model.config.gene_likelihood == "gaussian":
            x = torch.log(1 + x * 1e4 / x.sum().clamp(min=1))
            mean = torch.log(1 + logits[i, genes].exp())
            losses.append(-Normal(mean, 0.5**0.5).log_prob(x).sum())
            continue
        share = logits[i, genes].exp() / logits[i, genes].exp().sum()
        mean = x.sum().clamp(min=1) * share
        theta = model.log_inverse_dispersion[inputs.batch[i], genes].double().exp()
        density = NegativeBinomial(theta, logits=(mean / theta).log()).log_prob(x).exp()
        if model.config.gene_likelihood == "zinb":
            dropped = torch.sigmoid(model.zero_inflation(out.decoded.h)[i, genes].double())
            density = dropped * (x == 0) + (1 - dropped) * density
        losses.append(-density.log().sum())
    return torch.stack(losses)


@pytest.mark.parametrize("place", ["decoder", "z"])
@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_terms_of_the_loss(likelihood: str, lacking: bool, place: str) -> None:
    """With z drawn, and the discrepancy at it or at what the decoder's first layer makes of it."""
    config = dataclasses.replace(SMALL, gene_likelihood=likelihood, mmd_on=place, mmd_weight=3.0)
    model = build_model(config, 30, 2, seed=0).eval()
    assert isinstance(model, TRVAE)
    inputs = _inputs()
    inputs.counts[0] = 0
    if lacking:
        present = torch.ones_like(inputs.counts, dtype=torch.bool)
        present[1::2, ::3] = False
        inputs = dataclasses.replace(inputs, present=present)
    losses = model.loss(inputs, torch.tensor(0.25), _generator())
    out = model(inputs, _generator())
    assert (out.z - out.z_mean).abs().min() > 1e-4
    torch.testing.assert_close(
        losses.reconstruction_loss.double(), _reference(model, inputs, out), rtol=1e-5, atol=1e-4
    )
    posterior = Normal(out.z_mean.double(), out.z_variance.double().sqrt())
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(losses.kl.double(), kl, rtol=1e-5, atol=1e-5)
    where = out.z if place == "z" else out.decoded.first
    penalty = 3.0 * batch_discrepancy(where.double(), inputs.batch)
    assert losses.penalty is not None
    torch.testing.assert_close(losses.penalty.double(), penalty, rtol=1e-4, atol=1e-4)
    objective = (losses.reconstruction_loss.double() + 0.25 * kl).mean() + penalty
    torch.testing.assert_close(losses.objective.double(), objective, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_absent_genes_change_nothing(likelihood: str) -> None:
    """Whatever their counts; and their outputs get no gradient."""
    model = build_model(dataclasses.replace(SMALL, gene_likelihood=likelihood), 30, 2, seed=0)
    inputs = _inputs()
    present = torch.ones_like(inputs.counts, dtype=torch.bool)
    present[:, ::3] = False
    one = dataclasses.replace(inputs, present=present)
    other = dataclasses.replace(one, counts=inputs.counts.masked_fill(~present, 1e6))
    losses = [model.loss(given, 1.0, _generator()) for given in (one, other)]
    assert torch.equal(losses[0].negative_bound, losses[1].negative_bound)
    assert torch.equal(model.embed(one), model.embed(other))
    losses[0].objective.backward()
    parameters = [model.scale.weight, model.scale.bias]
    for parameter in parameters:
        assert parameter.grad is not None
        assert (parameter.grad[::3] == 0).all()
        assert (parameter.grad[1::3] != 0).any()


def test_the_batch_enters_the_first_layers_only() -> None:
    model = build_model(dataclasses.replace(SMALL, n_layers=3), 30, 2, seed=0)
    seeing = {name for name, p in model.named_parameters() if p.shape[0] == 2}
    assert seeing == {
        "encoder.hidden.first.batch_weight",
        "decoder.first.batch_weight",
        "log_inverse_dispersion",
    }
    inputs = _inputs()
    assert not torch.equal(
        model.embed(inputs), model.embed(Inputs(inputs.counts, 1 - inputs.batch))
    )


def test_the_cvae_is_trvae_without_the_discrepancy() -> None:
    trvae, cvae = (build_model(config, 30, 2, seed=0) for config in (SMALL, SMALL_CVAE))
    cvae.load_state_dict(trvae.state_dict())
    with_, without = (model.loss(_inputs(), 0.5, _generator()) for model in (trvae, cvae))
    assert without.penalty is None
    assert with_.penalty is not None
    assert with_.penalty > 0
    torch.testing.assert_close(with_.objective, without.objective + with_.penalty)


@pytest.mark.parametrize("place", ["decoder", "z"])
def test_the_discrepancy_reaches_the_encoder_from_either_place(place: str) -> None:
    model = build_model(dataclasses.replace(SMALL, mmd_on=place), 30, 2, seed=0)
    losses = model.loss(_inputs(), 1.0, _generator())
    assert losses.penalty is not None
    losses.penalty.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert "encoder.hidden.first.weight" in reached
    assert ("decoder.first.batch_weight" in reached) == (place == "decoder")
    assert "scale.weight" not in reached


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("config", [SMALL, SMALL_CVAE])
def test_large_counts_empty_cells_and_lone_cells_are_finite(
    config: TrvaeConfig | CvaeConfig, likelihood: str
) -> None:
    model = build_model(dataclasses.replace(config, gene_likelihood=likelihood), 30, 2, seed=0)
    inputs = _inputs(n_cells=5)
    inputs.counts[0] = 0
    inputs.counts[1] *= 1e6
    inputs.counts[2, 0] = 1e6
    lone = Inputs(torch.zeros(1, 30), torch.zeros(1, dtype=torch.int64))
    for given in (inputs, lone):
        model.zero_grad()
        losses = model.loss(given, 0.5, _generator())
        losses.objective.backward()
        assert torch.isfinite(losses.negative_bound).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert torch.isfinite(model.log_weight(given, _generator())).all()
        z = model.embed(given)
        assert torch.isfinite(z).all()
        shares = model.decode(1e3 * z, given.conditions)
        torch.testing.assert_close(shares.sum(-1), torch.ones(len(z)))


def test_trvae_of_one_batch_is_refused_and_cvae_is_not() -> None:
    with pytest.raises(ConfigError, match=r"trVAE needs two batches[\s\S]*1 batch[\s\S]*cvae"):
        build_model(SMALL, 30, 1, seed=0)
    model = build_model(SMALL_CVAE, 30, 1, seed=0)
    assert torch.isfinite(model.loss(_inputs(n_batch=1), 1.0, _generator()).objective)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_only_parameters_that_are_used_exist(likelihood: str) -> None:
    model = build_model(dataclasses.replace(SMALL, gene_likelihood=likelihood), 30, 2, seed=0)
    model.loss(_inputs(), 1.0, _generator()).objective.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_noise_is_from_the_generator_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    model = build_model(dataclasses.replace(SMALL, dropout_rate=0.5), 30, 2, seed=0)
    losses = [model.loss(_inputs(), 1.0, _generator(s)).objective for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    # Dropout in both networks, in training only.
    firsts = [model(_inputs(), _generator(s)).decoded.first for s in (1, 2)]
    assert all((first == 0).float().mean() > 0.6 for first in firsts)
    last = model.decoder.continued(firsts[0], _generator())
    assert (last == 0).float().mean() > 0.6
    assert torch.equal(model.eval()(_inputs()).z_mean, model.embed(_inputs()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_the_distribution_of_counts(likelihood: str) -> None:
    """Its log-density at the posterior mean is the loss there; samples have its expectation."""
    model = build_model(dataclasses.replace(SMALL, gene_likelihood=likelihood), 30, 2, seed=0)
    model.eval()
    present = torch.ones(12, 30, dtype=torch.bool)
    present[::2, 5:9] = False
    inputs = dataclasses.replace(_inputs(), present=present)
    z = model.embed(inputs)
    found = model.count_parameters(z, inputs)
    assert found.inverse_dispersion is not None
    density = (
        NegativeBinomial(
            found.inverse_dispersion, logits=(found.mean / found.inverse_dispersion).log()
        )
        .log_prob(inputs.counts)
        .exp()
    )
    if found.dropout is not None:
        density = found.dropout * (inputs.counts == 0) + (1 - found.dropout) * density
    expected = -density.log().masked_fill(~present, 0).sum(-1)
    torch.testing.assert_close(model.loss(inputs).reconstruction_loss, expected)
    torch.testing.assert_close(found.mean.sum(-1), inputs.measured.sum(-1))
    generator = _generator()
    draws = torch.stack([found.sample(generator) for _ in range(400)]).mean(0)
    torch.testing.assert_close(draws.mean(), found.expected.mean(), rtol=0.05, atol=0)


def test_a_gaussian_has_no_distribution_of_counts() -> None:
    model = build_model(dataclasses.replace(SMALL, gene_likelihood="gaussian"), 30, 2, seed=0)
    with pytest.raises(ModelError, match="no distribution of counts"):
        model.count_parameters(torch.zeros(12, 4), _inputs())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_importance_weights_agree_with_quadrature(likelihood: str) -> None:
    """Their mean estimates the evidence, which a grid gives where z has one dimension."""
    config = TrvaeConfig(n_hidden=8, n_latent=1, n_layers=1, gene_likelihood=likelihood)
    model = build_model(config, 6, 2, seed=0).eval()
    assert isinstance(model, TRVAE)
    inputs = _inputs(n_cells=4, n_genes=6)
    generator = _generator()
    weights = torch.stack([model.log_weight(inputs, generator) for _ in range(4000)])
    grid = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    densities = []
    with torch.no_grad():
        for z in grid.tolist():
            decoded = model._decode(torch.full((4, 1), z), inputs.conditions)
            log_prior = Normal(0.0, 1.0).log_prob(torch.tensor(z))
            densities.append(log_prior - model.reconstruction_loss(inputs, decoded))
    evidence = torch.stack(densities).double().logsumexp(0) + np.log(0.01)
    found = weights.double().logsumexp(0) - np.log(4000)
    torch.testing.assert_close(found, evidence, rtol=0, atol=0.05)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("config", [SMALL, SMALL_CVAE])
def test_saved_and_loaded_it_is_the_same(
    tmp_path: Path, config: TrvaeConfig | CvaeConfig, likelihood: str
) -> None:
    module = build_model(dataclasses.replace(config, gene_likelihood=likelihood), 30, 2, seed=0)
    trained = TrainedModel(
        module=module.eval(),
        genes=tuple(f"g{i}" for i in range(30)),
        batches=("a", "b"),
        studies=("s",),
        presence=np.ones((1, 30), bool),
    )
    trained.save(tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    assert loaded.config == module.config
    z = trained.embed(_inputs())
    assert torch.equal(z, loaded.embed(_inputs()))
    conditions = Conditions(_inputs().batch)
    assert torch.equal(module.decode(z, conditions), loaded.module.decode(z, conditions))


def test_bfloat16_products_keep_the_loss_close() -> None:
    for likelihood in LIKELIHOODS:
        model = build_model(dataclasses.replace(SMALL, gene_likelihood=likelihood), 30, 2, seed=0)
        inputs = _inputs(n_cells=64)
        exact = model.loss(inputs, 1.0, _generator())
        with torch.autocast("cpu", torch.bfloat16):
            losses = model.loss(inputs, 1.0, _generator())
        losses.objective.backward()
        assert losses.objective.dtype == torch.float32
        torch.testing.assert_close(losses.negative_bound, exact.negative_bound, rtol=0.02, atol=0.3)
