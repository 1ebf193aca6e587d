"""DAVAE: its terms against torch.distributions and scikit-learn, its adversary, its variance."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.distributions import Categorical, Normal, kl_divergence

from atlas.config import DavaeConfig
from atlas.errors import ConfigError, ModelError
from atlas.models import Conditions, Inputs, TrainedModel, build_model, load_model
from atlas.models.davae import DAVAE, reversed_gradient
from atlas.models.expression import log_normalized, shares

SMALL = DavaeConfig(n_latent=4, adversary_weight=2.0)
OPTIONS = [
    SMALL,
    dataclasses.replace(SMALL, norm="layer"),
    dataclasses.replace(SMALL, norm="layer", encode_batch=True),
]


def _inputs(seed: int = 0, n_cells: int = 12, n_genes: int = 30, n_batch: int = 2) -> Inputs:
    rng = np.random.default_rng(seed)
    counts = rng.negative_binomial(1, 0.4, (n_cells, n_genes)).astype(np.float32)
    batch = np.arange(n_cells) % n_batch
    return Inputs(torch.from_numpy(counts), torch.from_numpy(batch.astype(np.int64)))


def _lacking(inputs: Inputs) -> Inputs:
    present = torch.ones_like(inputs.counts, dtype=torch.bool)
    present[1::2, ::3] = False
    return dataclasses.replace(inputs, present=present)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(config: DavaeConfig = SMALL, n_batch: int = 2) -> DAVAE:
    model = build_model(config, 30, n_batch, seed=0)
    assert isinstance(model, DAVAE)
    return model


@pytest.mark.parametrize("lacking", [False, True])
def test_normalised_expression_is_scanpys(lacking: bool) -> None:
    sc = pytest.importorskip("scanpy")
    inputs = _lacking(_inputs()) if lacking else _inputs()
    inputs.counts[4] = 0
    adata = sc.AnnData(inputs.measured.numpy().copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    found = log_normalized(inputs)
    np.testing.assert_allclose(found.numpy(), adata.X, rtol=1e-5)
    cells = [i for i in range(12) if i != 4]
    counts = inputs.measured[cells]
    expected = counts / counts.sum(-1, keepdim=True)
    torch.testing.assert_close(shares(found)[cells], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("config", OPTIONS)
def test_terms_of_the_loss(config: DavaeConfig, lacking: bool) -> None:
    """Equations 7, 9 and 11, cell by cell in double precision."""
    model = _model(config, 3).eval()
    model.residual_variance.fill_(0.3)
    inputs = _inputs(n_batch=3)
    inputs = _lacking(inputs) if lacking else inputs
    losses = model.loss(inputs, torch.tensor(0.25))
    out = model(inputs)
    expected = []
    for i in range(12):
        genes = slice(None) if inputs.present is None else inputs.present[i]
        x = inputs.counts[i, genes].double()
        x = torch.log(1 + 1e4 * x / x.sum())
        mean = out.expression[i, genes].double()
        expected.append(-Normal(mean, 0.3**0.5).log_prob(x).sum())
    reconstruction_loss = torch.stack(expected)
    torch.testing.assert_close(
        losses.reconstruction_loss.double(), reconstruction_loss, rtol=1e-5, atol=1e-4
    )
    posterior = Normal(out.z_mean.double(), out.z_variance.double().sqrt())
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(losses.kl.double(), kl, rtol=1e-5, atol=1e-5)
    logits = model.domain_classifier(out.z).double()
    cross_entropy = -Categorical(logits=logits).log_prob(inputs.batch).mean()
    assert losses.penalty is not None
    torch.testing.assert_close(losses.penalty.double(), 2 * cross_entropy)
    objective = (reconstruction_loss + 0.25 * kl).mean() + 2 * cross_entropy
    torch.testing.assert_close(losses.objective.double(), objective, rtol=1e-5, atol=1e-4)


def test_the_layers_are_the_papers() -> None:
    shapes = {name: tuple(p.shape) for name, p in _model(n_batch=3).named_parameters()}
    encoder = [shapes[f"encoder.hidden.{x}.weight"] for x in ("first", "others.0", "others.1")]
    assert encoder == [(128, 30), (64, 128), (32, 64)]
    decoder = [shapes[f"decoder.{x}.weight"] for x in ("first", "others.0", "others.1")]
    assert decoder == [(32, 4), (64, 32), (128, 64)]
    assert shapes["decoder.first.batch_weight"] == (3, 32)
    assert shapes["expression.weight"] == (30, 128)
    head = [shapes[f"domain_classifier.{x}.weight"] for x in (0, 2)]
    assert head == [(16, 4), (3, 16)]
    assert "encoder.hidden.first.batch_weight" not in shapes


def test_the_reversal_gives_the_negated_finite_difference() -> None:
    x = torch.randn(5, dtype=torch.float64, generator=_generator()).requires_grad_()
    (x.detach() * reversed_gradient(x).exp()).sum().backward()
    found = x.grad
    assert found is not None
    step = 1e-6
    for i in range(5):
        moved = [x.detach().clone() for _ in range(2)]
        moved[0][i] += step
        moved[1][i] -= step
        above, below = ((x.detach() * m.exp()).sum() for m in moved)
        assert found[i].item() == pytest.approx(-(above - below).item() / (2 * step), rel=1e-6)


def test_the_head_descends_and_the_encoder_ascends() -> None:
    """Gradients of λ times the cross-entropy, by finite differences (equations 13 and 15)."""
    model = _model().double().eval()
    inputs = _inputs()
    inputs = dataclasses.replace(inputs, counts=inputs.counts.double())

    def penalty() -> torch.Tensor:
        found = model.loss(inputs).penalty
        assert found is not None
        return found

    penalty().backward()
    signs = {"domain_classifier.0.weight": 1, "encoder.mean.weight": -1, "encoder.mean.bias": -1}
    parameters = dict(model.named_parameters())
    for name, sign in signs.items():
        parameter = parameters[name]
        assert parameter.grad is not None
        found = parameter.grad.flatten()
        at = int(found.abs().argmax())
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[at] += step
                values.append(penalty().item())
                parameter.view(-1)[at] -= step
        difference = (values[0] - values[1]) / 2e-5
        assert abs(difference) > 1e-6
        assert found[at].item() == pytest.approx(sign * difference, rel=1e-4)
    reached = {name for name, p in parameters.items() if p.grad is not None}
    assert not any(name.startswith(("decoder", "expression")) for name in reached)


def test_the_ramp() -> None:
    model = _model(dataclasses.replace(SMALL, adversary_ramp=0.5)).eval()
    found = [model.loss(_inputs(), progress=p).penalty for p in (0.0, 0.125, 0.5, 0.9, 1.0)]
    whole = found[-1]
    assert whole is not None
    assert whole > 0
    shares_ = [(x / whole).item() for x in found if x is not None]
    assert shares_ == pytest.approx([0, 0.25, 1, 1, 1])
    without = _model(dataclasses.replace(SMALL, adversary_ramp=0.0)).eval()
    assert without.loss(_inputs(), progress=0.0).penalty == whole


@pytest.mark.parametrize("lacking", [False, True])
def test_the_residual_variance_is_where_equation_9_is_least(lacking: bool) -> None:
    inputs = _lacking(_inputs()) if lacking else _inputs()
    model = _model()
    model.loss(inputs, 1.0, _generator(5))
    found = model.residual_variance.item()
    # The same noise again; BatchNorm's own statistics do not matter while training.
    out = model(inputs, _generator(5))
    kept = torch.ones_like(inputs.counts, dtype=torch.bool)
    kept = kept if inputs.present is None else inputs.present
    residual = (out.observed - out.expression)[kept].detach().double()

    def negative_log_likelihood(variance: float) -> float:
        return -float(Normal(0.0, variance**0.5).log_prob(residual).sum())

    best = minimize_scalar(negative_log_likelihood, bounds=(1e-3, 1e3), method="bounded")
    assert found == pytest.approx(best.x, rel=1e-3)


def test_the_residual_variance_is_a_running_mean_of_training() -> None:
    model = _model(dataclasses.replace(SMALL, dropout_rate=0.0, norm="layer"))
    optima = []
    for seed in range(150):
        inputs = _inputs(seed)
        out = model(inputs, _generator(seed))
        optima.append((out.observed - out.expression).double().square().mean().item())
        model.loss(inputs, 1.0, _generator(seed))
    expected = np.mean(optima[:100])
    for optimum in optima[100:]:
        expected += 0.01 * (optimum - expected)
    assert model.residual_variance.item() == pytest.approx(expected, rel=1e-4)
    assert not model.residual_variance.requires_grad
    model.eval()
    model.loss(_inputs(), 1.0, _generator())
    assert model.residual_variance.item() == pytest.approx(expected, rel=1e-4)
    assert model.n_minibatches == 150


def test_absent_genes_change_nothing() -> None:
    model = _model(dataclasses.replace(SMALL, norm="layer")).eval()
    one = _lacking(_inputs())
    assert one.present is not None
    other = dataclasses.replace(one, counts=one.counts.masked_fill(~one.present, 1e6))
    first, second = (model.loss(given, 1.0, _generator()) for given in (one, other))
    assert torch.equal(first.negative_bound, second.negative_bound)
    assert torch.equal(model.embed(one), model.embed(other))
    all_lack = dataclasses.replace(one, present=one.present[1:2].expand(12, 30))
    model.loss(all_lack, 1.0, _generator()).objective.backward()
    gradient = model.expression.weight.grad
    assert gradient is not None
    assert (gradient[::3] == 0).all()
    assert (gradient[1::3] != 0).any()


@pytest.mark.parametrize("config", OPTIONS)
def test_large_counts_empty_cells_and_lone_cells_are_finite(config: DavaeConfig) -> None:
    model = _model(config)
    inputs = _inputs(n_cells=5)
    inputs.counts[0] = 0
    inputs.counts[1] *= 1e6
    inputs.counts[2, 0] = 1e6
    empty = Inputs(torch.zeros(4, 30), torch.zeros(4, dtype=torch.int64))
    for given in (inputs, empty):
        model.zero_grad()
        losses = model.loss(given, 0.5, _generator())
        losses.objective.backward()
        assert torch.isfinite(losses.negative_bound).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    lone = Inputs(inputs.counts[:1], inputs.batch[:1])
    if config.norm == "layer":  # the loop gives BatchNorm no minibatch of one cell
        assert torch.isfinite(model.loss(lone, 1.0, _generator()).objective)
    assert torch.isfinite(model.log_weight(lone, _generator())).all()
    assert torch.isfinite(model.embed(lone)).all()
    decoded = model.decode(
        1e4 * torch.randn(9, 4, generator=_generator()), _inputs(n_cells=9).conditions
    )
    torch.testing.assert_close(decoded.sum(-1), torch.ones(9))


def test_one_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"DAVAE needs two batches[\s\S]*1 batch[\s\S]*cvae"):
        build_model(SMALL, 30, 1, seed=0)


def test_only_with_the_option_the_encoder_sees_the_batch() -> None:
    inputs = _inputs()
    other = Inputs(inputs.counts, 1 - inputs.batch)
    for config, same in zip(OPTIONS, (True, True, False), strict=True):
        model = _model(config)
        assert torch.equal(model.embed(inputs), model.embed(other)) == same
        z = model.embed(inputs)
        decoded = [model.decode(z, given.conditions) for given in (inputs, other)]
        assert not torch.equal(*decoded)


@pytest.mark.parametrize("config", OPTIONS)
def test_only_parameters_that_are_used_exist(config: DavaeConfig) -> None:
    model = _model(config)
    model.loss(_inputs(), 1.0, _generator()).objective.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_noise_is_from_the_generator_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    model = _model(dataclasses.replace(SMALL, norm="layer", dropout_rate=0.5))
    model.residual_variance.fill_(1.0)
    expressions = [model(_inputs(), _generator(s)).expression for s in (1, 1, 2)]
    assert torch.equal(expressions[0], expressions[1])
    assert not torch.equal(expressions[0], expressions[2])
    assert torch.equal(model.eval()(_inputs()).z_mean, model.embed(_inputs()))
    assert torch.equal(before, torch.get_rng_state())


def test_it_has_no_distribution_of_counts() -> None:
    with pytest.raises(ModelError, match="no distribution of counts"):
        _model().count_parameters(torch.zeros(12, 4), _inputs())


def test_importance_weights_agree_with_quadrature() -> None:
    """Their mean estimates the evidence, which a grid gives where z has one dimension."""
    model = build_model(dataclasses.replace(SMALL, n_latent=1), 6, 2, seed=0).eval()
    assert isinstance(model, DAVAE)
    inputs = _inputs(n_cells=4, n_genes=6)
    generator = _generator()
    weights = torch.stack([model.log_weight(inputs, generator) for _ in range(4000)])
    densities = []
    with torch.no_grad():
        out = model(inputs)
        for z in torch.linspace(-8, 8, 1601).tolist():
            mean = model._decode(torch.full((4, 1), z), inputs.conditions)
            log_likelihood = Normal(mean, model.residual_variance.sqrt()).log_prob(out.observed)
            densities.append(Normal(0.0, 1.0).log_prob(torch.tensor(z)) + log_likelihood.sum(-1))
    evidence = torch.stack(densities).double().logsumexp(0) + np.log(0.01)
    found = weights.double().logsumexp(0) - np.log(4000)
    torch.testing.assert_close(found, evidence, rtol=0, atol=0.05)


@pytest.mark.parametrize("config", OPTIONS)
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, config: DavaeConfig) -> None:
    module = _model(config)
    module.loss(_inputs(), 1.0, _generator())  # moves the running statistics
    trained = TrainedModel(
        module=module.eval(),
        genes=tuple(f"g{i}" for i in range(30)),
        batches=("a", "b"),
        studies=("s",),
        presence=np.ones((1, 30), bool),
    )
    trained.save(tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    assert loaded.config == config
    assert loaded.module.state_dict()["residual_variance"] == module.residual_variance != 1
    z = trained.embed(_inputs())
    assert torch.equal(z, loaded.embed(_inputs()))
    conditions = Conditions(_inputs().batch)
    assert torch.equal(module.decode(z, conditions), loaded.module.decode(z, conditions))


def test_bfloat16_products_keep_the_loss_close() -> None:
    model = _model(dataclasses.replace(SMALL, norm="layer"))
    inputs = _inputs(n_cells=64)
    exact = model.loss(inputs, 1.0, _generator())
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(inputs, 1.0, _generator())
    losses.objective.backward()
    assert losses.objective.dtype == torch.float32
    torch.testing.assert_close(losses.negative_bound, exact.negative_bound, rtol=0.05, atol=0.3)
